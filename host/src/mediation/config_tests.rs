use super::*;
use crate::device::Backend;

fn filter(config: Vec<u8>, extended: &[u8]) -> ConfigFilter {
    let identity = Identity {
        name: "test".to_owned(),
        backend: Backend::Sim,
        vendor_id: 0x1234,
        device_id: 1,
        subsystem_vendor_id: 0,
        subsystem_device_id: 0,
        class_code: 0,
        virtual_function: false,
        revision: 0,
        config,
    };
    ConfigFilter::new(&identity, extended)
}

fn with_power() -> Vec<u8> {
    let mut config = vec![0; 256];
    config[0x06] = 0x10;
    config[0x34] = 0x40;
    config[0x40..0x44].copy_from_slice(&[0x05, 0x60, 0, 0]);
    config[0x60..0x64].copy_from_slice(&[0x01, 0, 0, 0]);
    config
}

/// spec: CONFIG-1
#[test]
fn the_headers_read_only_bytes_are_ignored_and_the_others_pass() {
    let filter = filter(vec![0; 256], &[]);
    for (offset, length, permission) in [
        (0x00, 4, Permission::Ignored),
        (0x04, 2, Permission::Merge),
        (0x06, 2, Permission::Merge),
        (0x08, 4, Permission::Ignored),
        (0x0c, 2, Permission::Whole),
        (0x0c, 4, Permission::Merge),
        (0x0e, 2, Permission::Ignored),
        (0x10, 24, Permission::Whole),
        (0x24, 8, Permission::Merge),
        (0x28, 8, Permission::Ignored),
        (0x30, 4, Permission::Merge),
        (0x34, 8, Permission::Ignored),
        (0x3c, 1, Permission::Whole),
        (0x3c, 4, Permission::Merge),
        (0x40, 192, Permission::Whole),
        (0x100, 4, Permission::Whole),
    ] {
        assert_eq!(filter.permission(offset, length), permission, "{length} bytes at {offset:#x}");
    }
}

/// spec: CONFIG-1
#[test]
fn a_merge_keeps_what_is_there_and_never_clears_a_status_bit_unasked() {
    let filter = filter(vec![0; 256], &[]);
    let mut data = [0xff, 0xff, 0x00, 0x00];
    filter.merge(0x04, &mut data, &[0x00, 0x00, 0x10, 0xf9]);
    assert_eq!(data, [0x47, 0x05, 0x10, 0x00]);
    let mut clear = [0x00, 0x80];
    filter.merge(0x06, &mut clear, &[0x10, 0xf9]);
    assert_eq!(clear, [0x10, 0x80]);
}

#[test]
fn capability_headers_are_read_only_and_the_power_state_is_found() {
    let filter = filter(with_power(), &[]);
    assert_eq!(filter.permission(0x40, 2), Permission::Ignored);
    assert_eq!(filter.permission(0x42, 2), Permission::Whole);
    assert_eq!(filter.permission(0x60, 1), Permission::Ignored);
    assert_eq!(filter.power(), Some(0x64));
}

/// spec: CONFIG-2
#[test]
fn writes_that_touch_command_or_the_power_state_may_disable_memory() {
    let filter = filter(with_power(), &[]);
    for (offset, length, may) in [(3, 1, false), (3, 2, true), (4, 1, true), (5, 1, false), (0x63, 1, false)] {
        assert_eq!(filter.may_disable(offset, length), may, "{length} bytes at {offset:#x}");
    }
    assert!(filter.may_disable(0x64, 2) && filter.may_disable(0x60, 8));
    assert!(!filter.may_disable(0x65, 1));
    assert!(!filter.may_disable(u64::MAX, 4));
}

#[test]
fn a_capability_chain_that_loops_or_leaves_the_space_ends() {
    let mut looped = with_power();
    looped[0x61] = 0x40;
    assert_eq!(filter(looped, &[]).power(), Some(0x64));
    let mut out = with_power();
    out[0x41] = 0xfc;
    out[0xfc] = 0x01;
    assert_eq!(filter(out, &[]).power(), None);
    assert_eq!(filter(vec![0; 4], &[]).power(), None);
    assert_eq!(filter(Vec::new(), &[]).permission(0, 4), Permission::Ignored);
}

#[test]
fn extended_capability_headers_are_read_only() {
    let mut extended = vec![0; 0x100];
    extended[..4].copy_from_slice(&(0x140_u32 << 20 | 1 << 16 | 1).to_le_bytes());
    extended[0x40..0x44].copy_from_slice(&(1_u32 << 16 | 3).to_le_bytes());
    let filter = filter(vec![0; 256], &extended);
    assert_eq!(filter.permission(0x100, 4), Permission::Ignored);
    assert_eq!(filter.permission(0x104, 4), Permission::Whole);
    assert_eq!(filter.permission(0x140, 2), Permission::Ignored);
    assert_eq!(filter.permission(0x13e, 4), Permission::Merge);
}
