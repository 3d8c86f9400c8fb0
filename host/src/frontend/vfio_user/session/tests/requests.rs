//! What each request does, and what is answered.

use super::*;

fn feature(flags: u32, argsz: u32, fields: &[u64]) -> Vec<u8> {
    let data: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
    [words(&[argsz, flags]), data].concat()
}

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// spec: VFU-11
#[test]
fn a_reply_bears_the_id_and_command_of_its_request() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let bytes: Vec<u8> = [1, 1, 0xffff, 0].iter().flat_map(|id| request(*id, 13, false, &[])).collect();
    bench.receive(&bytes, 0).unwrap();
    let (answers, _) = bench.serve();
    let heads: Vec<_> = answers.iter().map(|answer| (answer.header.id, answer.header.command)).collect();
    assert_eq!(heads, [(1, 13), (1, 13), (0xffff, 13), (0, 13)], "in order, whatever the ids");
}

/// spec: VFU-13
#[test]
fn what_wants_no_reply_gets_none_even_if_it_fails() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    bench.device.fails = Some((2, Errno::IO));
    let write = [region_read(0, 1), vec![9]].concat();
    let posted: Vec<u8> = (0..3).flat_map(|_| request(5, 10, true, &write)).collect();
    let unknown = request(5, 99, true, &[1, 2, 3]);
    let last = request(6, 13, false, &[]);
    bench.receive(&[posted, unknown, last].concat(), 0).unwrap();
    let (answers, _) = bench.serve();
    assert_eq!(answers.iter().map(|answer| answer.header.id).collect::<Vec<_>>(), [6]);
    assert_eq!(bench.calls(), ["write 0 0x0 1", "write 0 0x0 1", "write 0 0x0 1", "reset"], "all are done before");
}

/// spec: VFU-14
#[test]
fn a_message_of_an_unknown_type_is_refused() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let mut bytes = request(1, 13, false, &[]);
    bytes[8] = 2;
    assert_eq!(bench.ask(&bytes, 0).errno(), Some(Errno::INVAL));
    assert!(bench.calls().is_empty());
}

#[test]
fn infos_are_what_the_device_says() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let info = bench.ask(&request(1, 4, false, &words(&[16, 0, 0, 0])), 0);
    assert_eq!(info.payload, words(&[16, 3, 9, 5]));
    let irq = bench.ask(&request(1, 7, false, &words(&[16, 0, 2, 0])), 0);
    assert_eq!(irq.payload, words(&[16, 9, 2, 3]));
    bench.device.fails = Some((3, Errno::INVAL));
    assert_eq!(bench.errno(Command::DeviceGetIrqInfo, &words(&[16, 0, 9, 0]), 0), Some(Errno::INVAL));
}

/// spec: VFU-32, VFU-33
#[test]
fn region_info_without_room_tells_the_room_it_needs_and_brings_no_file() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let areas = vec![Area { offset: 0x1000, length: 0x1000 }];
    bench.device.capabilities = vec![RegionCapability::SparseMmap(areas)];
    let ask = |argsz: u32| request(1, 5, false, &words(&[argsz, 0, 2, 0, 0, 0, 0, 0]));
    for room in [32, 63] {
        bench.device.region_file = Some(Fd::open(&open));
        let answer = bench.ask(&ask(room), 0);
        assert_eq!((answer.payload.len(), answer.fds, open.load(Ordering::SeqCst)), (32, 0, 0));
        let (info, _) = RegionInfo::parse(&answer.payload).unwrap();
        assert_eq!((info.argsz, info.flags, info.cap_offset), (64, 0b1111, 32));
    }
    for room in [64, 65, u32::MAX] {
        bench.device.region_file = Some(Fd::open(&open));
        let answer = bench.ask(&ask(room), 0);
        assert_eq!((answer.payload.len(), answer.fds), (64, 1), "exactly one descriptor");
        let (info, rest) = RegionInfo::parse(&answer.payload).unwrap();
        assert_eq!((info.argsz, info.cap_offset, info.offset), (64, 32, 0x3000));
        assert_eq!(parse_capabilities(&info, rest).unwrap(), bench.device.capabilities);
    }
    // Without a file nothing is mappable, whatever the areas say.
    let answer = bench.ask(&ask(64), 0);
    let (info, _) = RegionInfo::parse(&answer.payload).unwrap();
    assert_eq!((info.flags, answer.fds), (0b1011, 0));
    bench.device.capabilities.clear();
    let answer = bench.ask(&ask(32), 0);
    assert_eq!(RegionInfo::parse(&answer.payload).unwrap().0.flags, 0b0011);
    assert_eq!(bench.errno(Command::DeviceGetRegionInfo, &words(&[31, 0, 2, 0, 0, 0, 0, 0]), 0), Some(Errno::INVAL));
}

/// spec: VFU-34
#[test]
fn io_fds_are_refused_properly() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    assert_eq!(bench.errno(Command::DeviceGetRegionIoFds, &words(&[16, 0, 0, 0]), 0), Some(Errno::OPNOTSUPP));
    assert_eq!(bench.errno(Command::DeviceGetRegionIoFds, &words(&[15, 0, 0, 0]), 0), Some(Errno::INVAL));
}

/// spec: VFU-53
#[test]
fn reads_bring_data_and_writes_repeat_their_head() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let read = bench.ask(&request(1, 9, false, &region_read(5, 4)), 0);
    assert_eq!(read.payload, [region_read(5, 4), vec![5, 6, 7, 8]].concat());
    let write = bench.ask(&request(1, 10, false, &[region_read(8, 2), vec![1, 2]].concat()), 0);
    assert_eq!(write.payload, region_read(8, 2));
    let long = bench.ask(&request(1, 9, false, &region_read(0, DATA_XFER_MAX)), 0);
    assert_eq!(long.payload.len(), 16 + DATA_XFER_MAX as usize);
    bench.device.fails = Some((4, Errno::NXIO));
    let failed = bench.ask(&request(1, 9, false, &region_read(0, 4)), 0);
    assert_eq!((failed.errno(), failed.payload.len()), (Some(Errno::NXIO), 0), "an error is a header alone");
}

/// spec: VFU-15
#[test]
fn long_requests_between_short_ones_arrive_whole() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let write = |count: u32, byte: u8| [region_read(u64::from(byte), count), vec![byte; count as usize]].concat();
    let bytes: Vec<u8> = [(1, 4), (2, 200_000), (3, 7), (4, 65_536), (5, 1)]
        .iter()
        .flat_map(|(id, count)| request(*id, 10, false, &write(*count, *id as u8)))
        .collect();
    bench.receive(&bytes, 0).unwrap();
    for (id, count) in [(1_u8, 4), (2, 200_000), (3, 7), (4, 65_536), (5, 1)] {
        assert!(matches!(bench.session.next(&mut bench.message, &mut bench.out), Next::Serve(_)));
        assert_eq!(bench.message.payload(), write(count, id));
    }
}

/// spec: VFU-54
#[test]
fn a_write_multi_tells_how_many_were_done() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let single = |offset| SingleWrite::new(offset, 1, &[1, 2, 3, 4]).unwrap();
    let mut payload = Vec::new();
    WriteMulti::write_request(&[single(0), single(4), single(8)], &mut payload);
    let done = |bench: &mut Bench<'_>| {
        let answer = bench.ask(&request(1, 15, false, &payload), 0);
        answer.errno().map_or_else(|| Ok(WriteMulti::parse_reply(&answer.payload).unwrap()), Err)
    };
    assert_eq!(done(&mut bench), Ok(3));
    assert_eq!(bench.calls(), ["write 1 0x0 4", "write 1 0x4 4", "write 1 0x8 4"]);
    bench.device.fails = Some((3, Errno::IO));
    assert_eq!(done(&mut bench), Ok(2));
    bench.calls();
    bench.device.fails = Some((1, Errno::IO));
    assert_eq!(done(&mut bench), Err(Errno::IO));
    let mut plain = Bench::fresh(&open);
    plain.ask(&version(0, 0, b"{}"), 0);
    assert_eq!(done(&mut plain), Err(Errno::OPNOTSUPP), "it was not agreed on");
}

/// spec: VFU-61, VFU-62
#[test]
fn maps_are_refused_over_each_other_and_above_their_number() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::fresh(&open);
    bench.ask(&version(0, 0, br#"{"capabilities":{"max_dma_maps":2}}"#), 0);
    let map = |bench: &mut Bench<'_>, address, size| bench.errno(Command::DmaMap, &dma_map(address, size), 0);
    assert_eq!(map(&mut bench, 0x1000, 0x2000), None, "without a file, too");
    for (address, size) in [(0x1000, 0x2000), (0, 0x2000), (0x2000, 0x1000), (0, 0x10000)] {
        assert_eq!(map(&mut bench, address, size), Some(Errno::EXIST));
    }
    assert_eq!(map(&mut bench, 0x3000, 0x1000), None);
    assert_eq!(map(&mut bench, 0x8000, 0x1000), Some(Errno::NOSPC));
    assert_eq!(bench.calls(), ["map 0x1000+0x2000 false", "map 0x3000+0x1000 false"]);
    let unmap = |bench: &mut Bench<'_>, address, size| {
        let mut payload = Vec::new();
        DmaUnmap { scope: UnmapScope::One { address, size }, bitmap: None }.write(&mut payload);
        let answer = bench.ask(&request(1, 3, false, &payload), 0);
        assert!(answer.errno().is_some() || answer.payload == payload, "the reply is the request");
        answer.errno()
    };
    for (address, size) in [(0x1000, 0x1000), (0x2000, 0x1000), (0x1000, 0x3000), (0, 0x10000)] {
        assert_eq!(unmap(&mut bench, address, size), Some(Errno::NOENT));
    }
    assert_eq!(unmap(&mut bench, 0x1000, 0x2000), None);
    assert_eq!(map(&mut bench, 0x1000, 0x1000), None);
}

/// spec: VFU-63
#[test]
fn everything_is_unmapped_at_once() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let all = words(&[24, 2, 0, 0, 0, 0]);
    assert_eq!(bench.errno(Command::DmaUnmap, &all, 0), None, "nothing is everything");
    for page in 0..3 {
        assert_eq!(bench.errno(Command::DmaMap, &dma_map(page << 12, 4096), 1), None);
    }
    bench.calls();
    bench.device.fails = Some((2, Errno::BUSY));
    assert_eq!(bench.errno(Command::DmaUnmap, &all, 0), Some(Errno::BUSY));
    assert_eq!(bench.maps.lock().unwrap().len(), 2, "what was not unmapped is still a map");
    assert_eq!(bench.errno(Command::DmaUnmap, &all, 0), None);
    assert!(bench.maps.lock().unwrap().is_empty());
}

/// spec: VFU-52
#[test]
fn an_unmap_with_a_bitmap_is_answered_with_its_bits() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    assert_eq!(bench.errno(Command::DmaMap, &dma_map(0, 0x3000), 0), None);
    let payload = words(&[56, 1, 0, 0, 0x3000, 0, 4096, 0, 16, 0]);
    let answer = bench.ask(&request(1, 3, false, &payload), 0);
    assert_eq!(answer.payload, [payload, vec![0b101], vec![0; 15]].concat());
}

#[test]
fn features_reach_the_device_and_replies_repeat_the_request() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let mut ask = |flags: u32, argsz: u32, fields: &[u64], fds: usize| {
        let answer = bench.ask(&request(1, 16, false, &feature(flags, argsz, fields)), fds);
        assert_eq!(answer.errno(), None, "{flags:#x}");
        answer.payload
    };
    assert_eq!(ask(1 | GET, 16, &[], 0), feature(1 | GET, 16, &[5]), "P2P is not told");
    assert_eq!(ask(2 | GET, 99, &[], 0), feature(2 | GET, 16, &[6]));
    assert_eq!(ask(2 | SET, 16, &[3], 0), feature(2 | SET, 16, &[3]));
    assert_eq!(ask(6 | SET, 24, &[4096, 0], 0), feature(6 | SET, 24, &[0x1_0000, 0]), "the page size chosen");
    assert_eq!(ask(6 | SET, 40, &[4096, 1, 0, 8192], 0).len(), 40);
    assert_eq!(ask(7 | SET, 8, &[], 0), feature(7 | SET, 8, &[]));
    assert_eq!(ask(3 | SET, 8, &[], 0), feature(3 | SET, 8, &[]));
    assert_eq!(ask(4 | SET, 16, &[0], 1), feature(4 | SET, 16, &[0]));
    assert_eq!(ask(5 | SET, 8, &[], 0), feature(5 | SET, 8, &[]));
    assert_eq!(ask(8 | PROBE | GET, 8, &[], 0), feature(8 | PROBE | GET, 8, &[]));
    let expected = [
        "flags",
        "state",
        "to StopCopy",
        "log 4096 true 0",
        "log 4096 false 1",
        "log stop",
        "sleep false",
        "sleep true",
        "wake",
        "probe DmaLoggingReport true false",
    ];
    assert_eq!(bench.calls(), expected);
}

/// spec: VFU-59, VFU-64
#[test]
fn a_report_has_no_bit_behind_its_last_page() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    for (pages, bits) in
        [(1_u64, vec![1_u64]), (63, vec![u64::MAX >> 1]), (64, vec![u64::MAX]), (65, vec![u64::MAX, 1])]
    {
        let argsz = 32 + bits.len() as u32 * 8;
        let fields = [0x10000, pages * 4096, 4096];
        let answer = bench.ask(&request(1, 16, false, &feature(8 | GET, argsz, &fields)), 0);
        assert_eq!(answer.payload, feature(8 | GET, argsz, &[&fields[..], &bits].concat()));
    }
}

/// spec: VFU-60
#[test]
fn migration_data_end_with_a_short_read() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    bench.device.mig_data = (0..10).collect();
    let mut read = |size: u32| {
        let answer = bench.ask(&request(1, 17, false, &words(&[size + 8, size])), 0);
        assert_eq!(answer.errno(), None);
        MigDataWrite::parse_reply(&answer.payload, size).unwrap().data.to_vec()
    };
    assert_eq!([read(6), read(6), read(6)], [vec![0, 1, 2, 3, 4, 5], vec![6, 7, 8, 9], vec![]]);
    assert_eq!(bench.errno(Command::MigDataWrite, &[words(&[11, 3]), vec![1, 2, 3]].concat(), 0), None);
}

/// spec: VFU-65
#[test]
fn a_report_that_is_not_sent_is_told_apart_from_one_that_is() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let report = feature(8 | GET, 40, &[0, 4096, 4096]);
    bench.ask(&request(1, 16, false, &report), 0);
    assert_eq!(bench.served, Some(Served::Report));
    bench.receive(&request(1, 16, true, &report), 0).unwrap();
    bench.serve();
    assert_eq!(bench.served, Some(Served::Silent), "the client saw nothing of it");
    bench.device.fails = Some((3, Errno::IO));
    bench.ask(&request(1, 16, false, &report), 0);
    assert_eq!(bench.served, Some(Served::Reply), "an error has no dirty pages");
    assert_eq!(bench.errno(Command::DmaMap, &dma_map(0, 0x3000), 0), None);
    bench.ask(&request(1, 3, false, &words(&[56, 1, 0, 0, 0x3000, 0, 4096, 0, 16, 0])), 0);
    assert_eq!(bench.served, Some(Served::Report), "an unmap's bitmap, too");
}

/// spec: VFU-15
#[test]
fn a_stream_of_long_requests_never_runs_out_of_room() {
    long_requests_arrive(&[1_000_000, 3, 70_000, 900_001, 1, 65_536, 65_535, 1_048_576, 12]);
    // Short enough to be copied out: the one in progress is never at the front.
    long_requests_arrive(&[60_000; 30]);
}

fn long_requests_arrive(lengths: &[usize]) {
    let write = |number: usize, length: usize| {
        let data: Vec<u8> = (0..length).map(|i| (i * 7 + number) as u8).collect();
        [region_read(0, length as u32), data].concat()
    };
    let sent: Vec<_> = (0..3 * lengths.len()).map(|number| write(number, lengths[number % lengths.len()])).collect();
    let stream: Vec<u8> = sent.iter().flat_map(|payload| request(1, 10, false, payload)).collect();
    for piece in [5_001, 65_536, 300_007, usize::MAX] {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::ready(&open);
        let (mut rest, mut seen) = (&stream[..], 0);
        while !rest.is_empty() {
            let count = bench.session.space().len().min(piece).min(rest.len());
            assert!(count > 0, "with nothing left to serve there is room");
            bench.receive(&rest[..count], 0).unwrap();
            rest = &rest[count..];
            while let Next::Serve(_) = bench.session.next(&mut bench.message, &mut bench.out) {
                assert!(bench.message.payload() == sent[seen], "request {seen} in pieces of {piece}");
                seen += 1;
            }
        }
        assert_eq!(seen, sent.len());
    }
}
