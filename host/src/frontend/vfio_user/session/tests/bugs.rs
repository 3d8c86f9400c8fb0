//! What has been seen to go wrong in other servers.

use super::*;

const SET_STATE: u32 = 2 | 1 << 17;

/// spec: VFU-64
#[test]
fn a_report_by_smaller_pages_than_are_logged_by_ends() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let start = words(&[24, 6 | 1 << 17, 0x1_0000, 0, 0, 0]);
    assert_eq!(bench.errno(Command::DeviceFeature, &start, 0), None);
    let report = words(&[40, 8 | 1 << 16, 0, 0, 0x4_0000, 0, 4096, 0]);
    assert_eq!(bench.ask(&request(1, 16, false, &report), 0).payload.len(), 40);
}

/// spec: VFU-64
#[test]
fn a_report_is_of_any_range_not_only_of_exactly_one_map() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    assert_eq!(bench.errno(Command::DmaMap, &dma_map(0x10000, 0x10000), 1), None);
    for (iova, length) in [(0x10000, 0x10000), (0x11000, 0x1000), (0, 0x40000), (0x18000, 0x20000)] {
        let report = words(&[40, 8 | 1 << 16, iova, 0, length, 0, 4096, 0]);
        assert_eq!(bench.errno(Command::DeviceFeature, &report, 0), None, "{iova:#x}+{length:#x}");
    }
}

/// spec: VFU-57
#[test]
fn a_state_without_data_reads_nothing_behind_the_message() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    for payload in [words(&[8, SET_STATE]), words(&[16, SET_STATE]), words(&[12, SET_STATE, 2])] {
        assert_eq!(bench.errno(Command::DeviceFeature, &payload, 0), Some(Errno::INVAL));
    }
    assert!(bench.calls().is_empty());
}

/// spec: VFU-57
#[test]
fn the_state_behind_the_last_one_is_refused() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    for (state, taken) in [(0, false), (1, true), (4, true), (5, false), (6, true), (7, false), (8, false), (9, false)]
    {
        let errno = bench.errno(Command::DeviceFeature, &words(&[16, SET_STATE, state, 0]), 0);
        assert_eq!(errno, if taken { None } else { Some(Errno::INVAL) }, "{state}");
    }
}

/// spec: VFU-20
#[test]
fn a_version_without_a_nul_and_an_empty_object_are_legal() {
    for data in [&b"{}"[..], b"{}\0", b"", b"\0", JSON] {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::fresh(&open);
        let payload = [&[0, 0, 0, 0], data].concat();
        assert_eq!(bench.ask(&request(0, 1, false, &payload), 0).errno(), None, "{data:?}");
    }
}

/// spec: VFU-16
#[test]
fn an_unknown_commands_payload_does_not_stay_in_the_stream() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    for command in [0, 14, 19, 99, 0xffff] {
        let bytes = [request(1, command, false, &[0x55; 1000]), request(2, 13, false, &[])].concat();
        bench.receive(&bytes, 0).unwrap();
        let (answers, closed) = bench.serve();
        let errnos: Vec<_> = answers.iter().map(|answer| (answer.header.id, answer.errno())).collect();
        assert_eq!((errnos, closed), (vec![(1, Some(Errno::NOSYS)), (2, None)], None));
    }
}

/// spec: VFU-12
#[test]
fn an_error_reply_never_has_errno_0() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    bench.device.fails = Some((1, Errno::PERM));
    assert_eq!(bench.errno(Command::DeviceReset, &[], 0), Some(Errno::PERM), "the smallest");
    for command in 0..40_u16 {
        // The bench looks at the bytes.
        let answer = bench.ask(&request(1, command, false, &[1, 2, 3]), 0);
        assert!(answer.errno().is_some(), "{command}");
    }
}

/// spec: VFU-17
#[test]
fn no_memory_is_taken_for_a_length_that_was_only_said() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let before = bench.out.bytes.capacity();
    assert_eq!(bench.errno(Command::RegionRead, &region_read(0, u32::MAX), 0), Some(Errno::TOOBIG));
    assert_eq!(bench.errno(Command::MigDataRead, &words(&[u32::MAX, u32::MAX - 8]), 0), Some(Errno::TOOBIG));
    let report = words(&[u32::MAX, 8 | 1 << 16, 0, 0, 0, u32::MAX, 4096, 0]);
    assert_eq!(bench.errno(Command::DeviceFeature, &report, 0), Some(Errno::TOOBIG));
    let multi = [u64::MAX.to_le_bytes().to_vec(), vec![0; 24]].concat();
    assert_eq!(bench.errno(Command::RegionWriteMulti, &multi, 0), Some(Errno::TOOBIG));
    assert_eq!(bench.errno(Command::DeviceSetIrqs, &words(&[20, 0x22, 0, 0, u32::MAX]), 0), Some(Errno::TOOBIG));
    let logging = words(&[u32::MAX, 6 | 1 << 17, 4096, 0, u32::MAX, 0]);
    assert_eq!(bench.errno(Command::DeviceFeature, &logging, 0), Some(Errno::TOOBIG));
    assert!(bench.calls().is_empty() && bench.out.bytes.capacity() <= before.max(4096));
}

/// spec: VFU-18
#[test]
fn regions_are_served_in_every_state() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    for state in [1, 3, 4, 6, 2] {
        assert_eq!(bench.errno(Command::DeviceFeature, &words(&[16, SET_STATE, state, 0]), 0), None);
        assert_eq!(bench.errno(Command::RegionRead, &region_read(0, 4), 0), None, "whether is the device's to say");
    }
}

/// spec: VFU-8
#[test]
fn sixteen_descriptors_are_taken_whatever_was_agreed_on() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::fresh(&open);
    bench.ask(&version(0, 0, br#"{"capabilities":{"max_msg_fds":1}}"#), 0);
    assert_eq!(bench.errno(Command::DeviceSetIrqs, &words(&[20, 0x24, 2, 0, 16]), 16), None);
}

/// spec: VFU-63
#[test]
fn an_unmap_with_flags_is_no_error() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    assert_eq!(bench.errno(Command::DmaMap, &dma_map(0xfffc_0000, 0x4_0000), 0), None, "a ROM without a file");
    assert_eq!(bench.errno(Command::DmaUnmap, &words(&[24, 2, 0, 0, 0, 0]), 0), None);
}
