//! Every limit and every length, one below, at and one above.

use super::*;

fn map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    out.u32(32);
    out.u32(flags);
    [offset, address, size].into_iter().for_each(|field| out.u64(field));
    out
}

fn errno(result: Result<Request<'_>>) -> Option<Errno> {
    result.err().map(|error| error.errno())
}

/// spec: VFU-50
#[test]
fn a_map_is_of_whole_pages_and_ends_within_the_addresses() {
    let check =
        |flags, offset, address, size, fds| errno(parse(Command::DmaMap, &map(flags, offset, address, size), fds));
    let top = u64::MAX - 4095;
    for (flags, taken) in [(0, false), (1, true), (2, true), (3, true), (4, false), (7, false), (1 << 31 | 3, false)] {
        assert_eq!(check(flags, 0, 0, 4096, 0).is_none(), taken, "{flags}");
    }
    for (size, taken) in [(0, false), (4095, false), (4096, true), (4097, false)] {
        assert_eq!(check(3, 0, 0, size, 0).is_none(), taken, "{size}");
    }
    assert_eq!(check(3, 0, top, 4096, 0), None, "the last page");
    assert_eq!(check(3, 0, top, 8192, 0), Some(Errno::INVAL));
    assert_eq!(check(3, 0, 4095, 4096, 0), Some(Errno::INVAL));
    assert_eq!(check(3, top, 0, 4096, 1), None);
    assert_eq!(check(3, top, 0, 8192, 1), Some(Errno::INVAL), "a file does not reach so far");
    assert_eq!(check(3, 1, 0, 4096, 1), Some(Errno::INVAL));
    assert_eq!(check(3, 1, 0, 4096, 0), None, "an offset without a file means nothing");
    let mut short = map(3, 0, 0, 4096);
    short[0] = 31;
    assert_eq!(errno(parse(Command::DmaMap, &short, 0)), Some(Errno::INVAL), "argsz");
}

/// spec: VFU-51
#[test]
fn an_unmap_names_one_map_or_everything() {
    let check = |flags: u32, address: u64, size: u64| {
        let mut out = Vec::new();
        out.u32(24);
        out.u32(flags);
        out.u64(address);
        out.u64(size);
        errno(parse(Command::DmaUnmap, &out, 0))
    };
    assert_eq!(check(2, 0, 0), None);
    assert_eq!(check(2, 0, 1), Some(Errno::INVAL));
    assert_eq!(check(2, 1, 0), Some(Errno::INVAL));
    assert_eq!(check(0, 0, 0), Some(Errno::INVAL));
    assert_eq!(check(0, u64::MAX, 1), None);
    assert_eq!(check(0, u64::MAX, 2), Some(Errno::INVAL));
    for flags in [1, 3, 4, 8, 1 << 31] {
        assert_eq!(check(flags, 0, 4096), Some(Errno::INVAL), "{flags}");
    }
}

/// spec: VFU-52
#[test]
fn an_unmaps_bitmap_has_room_for_its_range() {
    let check = |argsz: u64, length: u64, page_size: u64, size: u64| {
        let mut out = Vec::new();
        out.u32(argsz as u32);
        out.u32(1);
        [0, length, page_size, size].into_iter().for_each(|field| out.u64(field));
        errno(parse(Command::DmaUnmap, &out, 0))
    };
    assert_eq!(check(48, 64 << 12, 4096, 8), None);
    assert_eq!(check(47, 64 << 12, 4096, 8), Some(Errno::INVAL));
    assert_eq!(check(48, 65 << 12, 4096, 8), Some(Errno::INVAL));
    assert_eq!(check(48, 64 << 12, 4096, 7), Some(Errno::INVAL));
    for page_size in [0, 1, 2048, 4095, 4097, 12288] {
        assert_eq!(check(48, 4096, page_size, 8), Some(Errno::INVAL), "{page_size}");
    }
    assert_eq!(check(40 + BITMAP_MAX, 4096, 4096, BITMAP_MAX), None);
    assert_eq!(check(41 + BITMAP_MAX, 4096, 4096, BITMAP_MAX + 1), Some(Errno::TOOBIG));
    assert_eq!(check(48, 4096, 4096, u64::MAX), Some(Errno::TOOBIG));
}

/// spec: VFU-53
#[test]
fn reads_and_writes_are_not_empty_and_not_above_what_was_agreed_on() {
    let read = |offset: u64, count: u32| {
        let mut out = Vec::new();
        RegionAccess { offset, region: 0, count }.write(&mut out);
        Request::parse(9, &out, 0, 8192).err().map(|error| error.errno())
    };
    assert_eq!(read(0, 0), Some(Errno::INVAL));
    assert_eq!(read(0, 1), None);
    assert_eq!([read(0, 8191), read(0, 8192), read(0, 8193)], [None, None, Some(Errno::TOOBIG)]);
    assert_eq!(read(0, u32::MAX), Some(Errno::TOOBIG));
    assert_eq!([read(u64::MAX, 1), read(u64::MAX, 2)], [None, Some(Errno::INVAL)]);
    for (count, given) in [(4_u32, 3_usize), (4, 5), (0, 0), (1, 0)] {
        let mut out = Vec::new();
        RegionAccess { offset: 0, region: 0, count }.write(&mut out);
        out.resize(out.len() + given, 0);
        assert_eq!(errno(Request::parse(10, &out, 0, 8192)), Some(Errno::INVAL), "{count} and {given}");
    }
}

/// spec: VFU-54
#[test]
fn a_write_multi_has_a_bounded_number_of_small_writes() {
    let check = |count: u64, given: u64, length: u32| {
        let mut out = Vec::new();
        out.u64(count);
        for _ in 0..given {
            out.u64(0);
            out.u32(0);
            out.u32(length);
            out.u64(0);
        }
        errno(parse(Command::RegionWriteMulti, &out, 0))
    };
    assert_eq!(check(0, 0, 1), Some(Errno::INVAL));
    let most = WRITE_MULTI_MAX;
    assert_eq!([check(most - 1, most - 1, 8), check(most, most, 8)], [None, None]);
    assert_eq!(check(most + 1, most + 1, 8), Some(Errno::TOOBIG));
    assert_eq!(check(u64::MAX, 0, 8), Some(Errno::TOOBIG));
    assert_eq!([check(2, 1, 8), check(1, 2, 8)], [Some(Errno::INVAL); 2]);
    assert_eq!([check(1, 1, 0), check(1, 1, 9), check(1, 1, u32::MAX)], [Some(Errno::INVAL); 3]);
    assert_eq!([check(1, 1, 1), check(1, 1, 7), check(1, 1, 8)], [None; 3]);
}

/// spec: VFU-55
#[test]
fn set_irqs_has_one_action_one_kind_of_data_and_a_bounded_number_of_vectors() {
    let check = |flags: u32, start: u32, count: u32, bools: usize, fds: usize| {
        let mut out = Vec::new();
        [20, flags, 0, start, count].into_iter().for_each(|field| out.u32(field));
        out.resize(out.len() + bools, 1);
        errno(parse(Command::DeviceSetIrqs, &out, fds))
    };
    for flags in 0..64_u32 {
        let one = |bits: u32| bits.count_ones() == 1;
        let taken = one(flags & 7) && one(flags >> 3);
        let bools = if flags & 7 == 2 { 1 } else { 0 };
        assert_eq!(check(flags, 0, 1, bools, 0).is_none(), taken, "{flags:#b}");
    }
    assert_eq!(check(64 | 0x21, 0, 1, 0, 0), Some(Errno::INVAL));
    let most = IRQ_VECTORS_MAX;
    assert_eq!([check(0x21, 0, most, 0, 0), check(0x21, 0, most + 1, 0, 0)], [None, Some(Errno::TOOBIG)]);
    assert_eq!(check(0x22, 0, most, most as usize, 0), None);
    assert_eq!([check(0x22, 0, 3, 2, 0), check(0x22, 0, 3, 4, 0)], [Some(Errno::INVAL); 2]);
    assert_eq!([check(0x21, u32::MAX, 1, 0, 0), check(0x21, u32::MAX - 1, 1, 0, 0)], [Some(Errno::INVAL), None]);
    assert_eq!([check(0x21, 0, 0, 0, 0), check(0x21, 1, 0, 0, 0)], [None, Some(Errno::INVAL)]);
    assert_eq!([check(0x22, 0, 0, 0, 0), check(0x24, 0, 0, 0, 0)], [Some(Errno::INVAL); 2]);
    assert_eq!([check(0x24, 0, 3, 0, 2), check(0x24, 0, 3, 0, 4)], [Some(Errno::INVAL); 2]);
    let fds = MSG_FDS_MAX as u32;
    assert_eq!(check(0x24, 0, fds, 0, fds as usize), None);
    assert_eq!(check(0x24, 0, 1, 1, 1), Some(Errno::INVAL), "eventfds are no bytes");
    assert_eq!(check(0x21, 0, 1, 0, 1), Some(Errno::INVAL), "descriptors that nobody wants");
}

fn feature(argsz: u64, flags: u32, fields: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    out.u32(argsz as u32);
    out.u32(flags);
    fields.iter().for_each(|field| out.u64(*field));
    out
}

/// spec: VFU-56
#[test]
fn a_feature_is_got_set_or_probed() {
    const GET: u32 = 1 << 16;
    const SET: u32 = 1 << 17;
    const PROBE: u32 = 1 << 18;
    let check = |flags| errno(parse(Command::DeviceFeature, &feature(16, flags, &[]), 0));
    assert_eq!([check(1), check(1 | GET | SET), check(1 | GET | 1 << 19)], [Some(Errno::INVAL); 3]);
    assert_eq!([check(1 | PROBE), check(1 | PROBE | GET), check(1 | PROBE | GET | SET)], [None; 3]);
    assert_eq!([check(1 | GET), check(2 | GET)], [None; 2]);
    for unknown in [0, 9, 10, 11, 12, 13, 0xffff] {
        assert_eq!(check(unknown | GET), Some(Errno::NOTTY), "{unknown}");
        assert_eq!(check(unknown | PROBE), Some(Errno::NOTTY), "{unknown}");
    }
    for only_set in [3, 4, 5, 6, 7] {
        let get = errno(parse(Command::DeviceFeature, &feature(16, only_set | GET, &[]), 0));
        assert_eq!(get, Some(Errno::NOTTY), "{only_set}");
    }
    for (argsz, taken) in [(7, false), (8, false), (15, false), (16, true), (u64::from(u32::MAX), true)] {
        let get = errno(parse(Command::DeviceFeature, &feature(argsz, 1 | GET, &[]), 0));
        assert_eq!(get.is_none(), taken, "room of {argsz}");
    }
}

/// spec: VFU-57
#[test]
fn only_states_of_the_protocol_can_be_asked_for() {
    let check = |state: u64| errno(parse(Command::DeviceFeature, &feature(16, 2 | 1 << 17, &[state]), 0));
    let taken: Vec<u64> = (0..20).filter(|state| check(*state).is_none()).collect();
    assert_eq!(taken, [1, 2, 3, 4, 6], "neither ERROR nor a P2P state");
    assert_eq!(check(u64::from(u32::MAX)), Some(Errno::INVAL));
    assert_eq!(errno(parse(Command::DeviceFeature, &feature(16, 2 | 1 << 17, &[]), 0)), Some(Errno::INVAL));
    for raw in 0..20 {
        assert!(MigrationState::from_raw(raw).is_none_or(|state| state.raw() == raw));
    }
}

/// spec: VFU-58
#[test]
fn logged_ranges_are_bounded_aligned_and_apart() {
    let start = |page_size: u64, count: u64, ranges: &[u64]| {
        let fields = [&[page_size, count], ranges].concat();
        errno(parse(Command::DeviceFeature, &feature(1 << 20, 6 | 1 << 17, &fields), 0))
    };
    assert_eq!(start(4096, 0, &[]), None, "everything");
    for page_size in [0, 1, 2048, 4095, 4097, 12288, u64::MAX] {
        assert_eq!(start(page_size, 0, &[]), Some(Errno::INVAL), "{page_size}");
    }
    assert_eq!(start(1 << 63, 0, &[]), None);
    assert_eq!([start(4096, 1, &[]), start(4096, 0, &[0, 4096])], [Some(Errno::INVAL); 2]);
    let ranges: Vec<u64> = (0..u64::from(LOGGING_RANGES_MAX) + 1).flat_map(|i| [i << 12, 4096]).collect();
    let most = LOGGING_RANGES_MAX as usize;
    assert_eq!(start(4096, most as u64, &ranges[..most * 2]), None);
    assert_eq!(start(4096, most as u64 + 1, &ranges), Some(Errno::TOOBIG));
    assert_eq!(
        [start(4096, 1, &[0, 0]), start(4096, 1, &[1, 4096]), start(4096, 1, &[0, 4097])],
        [Some(Errno::INVAL); 3]
    );
    assert_eq!(start(4096, 1, &[u64::MAX - 4095, 4096]), None);
    assert_eq!(start(4096, 1, &[u64::MAX - 4095, 8192]), Some(Errno::INVAL));
    assert_eq!(start(4096, 2, &[8192, 4096, 0, 8192]), None, "in any order");
    assert_eq!(start(4096, 2, &[4096, 4096, 0, 8192]), Some(Errno::INVAL));
}

/// spec: VFU-59
#[test]
fn a_report_is_of_any_range_whose_bitmap_fits() {
    let report = |argsz: u64, iova: u64, length: u64, page_size: u64| {
        errno(parse(Command::DeviceFeature, &feature(argsz, 8 | 1 << 16, &[iova, length, page_size]), 0))
    };
    assert_eq!([report(40, 0, 64 << 12, 4096), report(39, 0, 64 << 12, 4096)], [None, Some(Errno::INVAL)]);
    assert_eq!([report(40, 0, (64 << 12) + 1, 4096), report(48, 0, (64 << 12) + 1, 4096)], [Some(Errno::INVAL), None]);
    assert_eq!([report(40, 0, 0, 4096), report(40, 2048, 1, 4096)], [Some(Errno::INVAL); 2]);
    for page_size in [0, 1, 2048, 4097] {
        assert_eq!(report(40, 0, 4096, page_size), Some(Errno::INVAL), "{page_size}");
    }
    let most = BITMAP_MAX * 8 * 4096;
    let room = 32 + BITMAP_MAX;
    assert_eq!([report(room, 0, most, 4096), report(room + 8, 0, most + 1, 4096)], [None, Some(Errno::TOOBIG)]);
    assert_eq!(report(room, 0, u64::MAX, 4096), Some(Errno::TOOBIG));
    assert_eq!(report(40, 1 << 40, 1 << 30, 1 << 30), None);
}

/// spec: VFU-60
#[test]
fn migration_data_are_bounded_and_never_short_for_lack_of_room() {
    let read = |argsz: u32, size: u32| {
        let payload = [argsz.to_le_bytes(), size.to_le_bytes()].concat();
        Request::parse(17, &payload, 0, 4096).err().map(|error| error.errno())
    };
    assert_eq!([read(8, 0), read(8, 1), read(9, 1)], [Some(Errno::INVAL), Some(Errno::INVAL), None]);
    assert_eq!([read(4104, 4096), read(4103, 4096)], [None, Some(Errno::INVAL)]);
    assert_eq!([read(5000, 4097), read(u32::MAX, u32::MAX)], [Some(Errno::TOOBIG); 2]);
    let write = |argsz: u32, size: u32, given: usize| {
        let payload = [&argsz.to_le_bytes()[..], &size.to_le_bytes(), &vec![1; given]].concat();
        Request::parse(18, &payload, 0, 4096).err().map(|error| error.errno())
    };
    assert_eq!([write(12, 4, 4), write(8 + 4096, 4096, 4096)], [None; 2]);
    assert_eq!([write(12, 4, 3), write(12, 4, 5), write(8, 0, 0), write(11, 4, 4)], [Some(Errno::INVAL); 4]);
    assert_eq!(write(8 + 4097, 4097, 4097), Some(Errno::TOOBIG));
}

/// spec: VFU-23
#[test]
fn version_data_have_a_longest_length() {
    let of = |length: usize| [&[0; 4][..], b"{}", &vec![b' '; length - 3], &[0]].concat();
    assert!(Version::parse(&of(VERSION_DATA_MAX)).is_ok());
    assert_eq!(Version::parse(&of(VERSION_DATA_MAX + 1)).unwrap_err().errno(), Errno::TOOBIG);
}
