use proptest::prelude::*;
use rustix::io::Errno;

use super::*;
use crate::device::{Area, Feature, IrqAction, RegionCapability};

mod boundaries;

/// Hexadecimal digits, blanks between them for the reader.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn version_payload(json: &str) -> Vec<u8> {
    [&[0, 0, 1, 0], json.as_bytes(), &[0]].concat()
}

/// One payload of each request, byte for byte as the protocol's text lays it out, and how many descriptors come with it.
fn golden() -> Vec<(&'static str, Command, Vec<u8>, usize)> {
    use Command::*;
    vec![
        ("version", Version, version_payload(r#"{"capabilities":{"max_msg_fds":16,"write_multiple":true}}"#), 0),
        ("map", DmaMap, hex("20000000 03000000 0010000000000000 0000100000000000 0020000000000000"), 1),
        ("unmap", DmaUnmap, hex("18000000 00000000 0000100000000000 0020000000000000"), 0),
        ("unmap all", DmaUnmap, hex("18000000 02000000 0000000000000000 0000000000000000"), 0),
        (
            "unmap with bitmap",
            DmaUnmap,
            hex("30000000 01000000 0000100000000000 0020000000000000 0010000000000000 0800000000000000"),
            0,
        ),
        ("info", DeviceGetInfo, hex("10000000 00000000 00000000 00000000"), 0),
        (
            "region info",
            DeviceGetRegionInfo,
            hex("20000000 00000000 07000000 00000000 0000000000000000 0000000000000000"),
            0,
        ),
        ("io fds", DeviceGetRegionIoFds, hex("10000000 00000000 02000000 00000000"), 0),
        ("irq info", DeviceGetIrqInfo, hex("10000000 00000000 02000000 00000000"), 0),
        ("irqs disabled", DeviceSetIrqs, hex("14000000 21000000 02000000 00000000 00000000"), 0),
        ("irqs bool", DeviceSetIrqs, hex("17000000 0a000000 02000000 01000000 03000000 010001"), 0),
        ("irqs eventfd", DeviceSetIrqs, hex("14000000 24000000 02000000 00000000 03000000"), 3),
        ("irqs no eventfd", DeviceSetIrqs, hex("14000000 24000000 02000000 00000000 03000000"), 0),
        ("read", RegionRead, hex("0400000000000000 07000000 08000000"), 0),
        ("write", RegionWrite, hex("0400000000000000 00000000 03000000 aabbcc"), 0),
        ("reset", DeviceReset, vec![], 0),
        (
            "write multi",
            RegionWriteMulti,
            hex("0200000000000000 1000000000000000 00000000 04000000 0102030400000000
                 2000000000000000 01000000 08000000 0102030405060708"),
            0,
        ),
        ("get migration", DeviceFeature, hex("10000000 01000100"), 0),
        ("set state", DeviceFeature, hex("10000000 02000200 03000000 ffffffff"), 0),
        (
            "logging start",
            DeviceFeature,
            hex("28000000 06000200 0010000000000000 01000000 00000000 0000100000000000 0000200000000000"),
            0,
        ),
        ("logging start of everything", DeviceFeature, hex("18000000 06000200 0010000000000000 00000000 00000000"), 0),
        ("logging stop", DeviceFeature, hex("08000000 07000200"), 0),
        (
            "logging report",
            DeviceFeature,
            hex("28000000 08000100 0000100000000000 0000040000000000 0010000000000000"),
            0,
        ),
        ("probe", DeviceFeature, hex("08000000 08000500"), 0),
        ("low power entry", DeviceFeature, hex("08000000 03000200"), 0),
        ("low power entry with wakeup", DeviceFeature, hex("10000000 04000200 00000000 00000000"), 1),
        ("low power exit", DeviceFeature, hex("08000000 05000200"), 0),
        ("mig data read", MigDataRead, hex("08100000 00100000"), 0),
        ("mig data write", MigDataWrite, hex("0b000000 03000000 010203"), 0),
    ]
}

fn parse(command: Command, payload: &[u8], fds: usize) -> Result<Request<'_>> {
    Request::parse(command.raw(), payload, fds, DATA_XFER_MAX)
}

/// The bytes that our builders make of a request.
fn rebuilt(request: &Request<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    match *request {
        Request::Version(version) => version.write(&mut out),
        Request::DmaMap(map) => map.write(&mut out),
        Request::DmaUnmap(unmap) => unmap.write(&mut out),
        Request::DeviceGetInfo => {
            DeviceInfo { flags: 0, num_regions: 0, num_irqs: 0 }.write(&mut out);
        }
        Request::DeviceGetRegionInfo { index, argsz } => {
            RegionInfo { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 }.write(&mut out);
        }
        Request::DeviceGetRegionIoFds { index } => RegionIoFds::write_request(index, 16, &mut out),
        Request::DeviceGetIrqInfo { index } => IrqInfo { flags: 0, index, count: 0 }.write(&mut out),
        Request::DeviceSetIrqs(irqs) => irqs.write(&mut out),
        Request::RegionRead(read) => read.write(&mut out),
        Request::RegionWrite(write) => write.write(&mut out),
        Request::DeviceReset => {}
        Request::RegionWriteMulti(writes) => {
            WriteMulti::write_request(&writes.iter().collect::<Vec<_>>(), &mut out);
        }
        Request::DeviceFeature(feature) => rebuild_feature(&feature, &mut out),
        Request::MigDataRead(read) => read.write(&mut out),
        Request::MigDataWrite(write) => write.write(&mut out),
    }
    out
}

fn rebuild_feature(request: &DeviceFeature<'_>, out: &mut Vec<u8>) {
    use Operation::{Get, Probe, Set};
    let mut head = |feature, operation| DeviceFeature::write_head(request.argsz, feature, operation, out);
    match request.call {
        FeatureCall::Probe { feature, get, set } => head(feature, Probe { get, set }),
        FeatureCall::GetMigration => head(Feature::Migration, Get),
        FeatureCall::GetState => head(Feature::MigDeviceState, Get),
        FeatureCall::SetState(state) => {
            head(Feature::MigDeviceState, Set);
            out.u32(state.raw());
            out.u32(u32::MAX);
        }
        FeatureCall::LowPowerEntry => head(Feature::LowPowerEntry, Set),
        FeatureCall::LowPowerEntryWithWakeup => {
            head(Feature::LowPowerEntryWithWakeup, Set);
            out.u64(0);
        }
        FeatureCall::LowPowerExit => head(Feature::LowPowerExit, Set),
        FeatureCall::LoggingStart(start) => {
            head(Feature::DmaLoggingStart, Set);
            let ranges: Vec<_> = start.ranges.iter().map(|range| (range.iova, range.last - range.iova + 1)).collect();
            LoggingStart::write(start.page_size, &ranges, out);
        }
        FeatureCall::LoggingStop => head(Feature::DmaLoggingStop, Set),
        FeatureCall::LoggingReport(report) => {
            head(Feature::DmaLoggingReport, Get);
            report.write(out);
        }
    }
}

/// spec: VFU-1
#[test]
fn every_request_is_read_and_written_byte_for_byte() {
    for (name, command, payload, fds) in golden() {
        let request = parse(command, &payload, fds).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(rebuilt(&request), payload, "{name}");
    }
    let covered: std::collections::BTreeSet<_> = golden().into_iter().map(|(_, command, ..)| command).collect();
    let servers = [Command::DmaRead, Command::DmaWrite];
    assert!(Command::ALL.iter().all(|command| covered.contains(command) || servers.contains(command)));
}

/// spec: VFU-1
#[test]
fn the_header_is_laid_out_as_the_protocol_says() {
    let bytes: [u8; 16] = hex("3412 0900 20000000 10000000 00000000").try_into().unwrap();
    let header = Header::parse(&bytes);
    let kind = MessageType::Command { no_reply: true };
    assert_eq!(header, Header { id: 0x1234, command: 9, size: 32, kind });
    assert_eq!(header.to_bytes(), bytes);
    let error = Header::error(0x1234, 9, Errno::NODEV);
    assert_eq!(error.to_bytes().to_vec(), hex("3412 0900 10000000 21000000 13000000"));
    assert_eq!(Header::reply(1, 9, 20).to_bytes().to_vec(), hex("0100 0900 24000000 01000000 00000000"));
}

/// spec: VFU-12
#[test]
fn an_error_without_an_errno_is_read_as_eio() {
    for raw in ["00000000", "ffffffff", "00100000"] {
        let bytes: [u8; 16] = hex(&format!("0100 0b00 10000000 21000000 {raw}")).try_into().unwrap();
        assert_eq!(Header::parse(&bytes).kind, MessageType::Reply { error: Some(Errno::IO) });
    }
}

#[test]
fn the_servers_requests_and_their_replies_are_laid_out_as_the_protocol_says() {
    let access = DmaAccess { address: 0x1000, count: 3 };
    let mut bytes = Vec::new();
    access.write(&mut bytes);
    assert_eq!(bytes, hex("0010000000000000 0300000000000000"));
    assert_eq!(DmaAccess::parse(&bytes, 3), Ok(access));
    assert_eq!(DmaAccess::parse_write_reply(&bytes, 3), Ok(access));
    bytes.extend_from_slice(b"abc");
    assert_eq!(DmaAccess::parse_with_data(&bytes, 3), Ok((access, &b"abc"[..])));
    assert!(DmaAccess::parse_with_data(&bytes, 2).is_err());
}

/// spec: VFU-40
#[test]
fn a_dma_write_reply_may_count_in_four_bytes() {
    let short = hex("0010000000000000 03000000");
    assert_eq!(DmaAccess::parse_write_reply(&short, 3), Ok(DmaAccess { address: 0x1000, count: 3 }));
    for length in [0, 8, 11, 13, 15, 17] {
        let bytes = vec![1; length];
        assert!(DmaAccess::parse_write_reply(&bytes, u32::MAX).is_err(), "{length}");
    }
}

/// spec: VFU-2
#[test]
fn no_truncated_and_no_longer_request_is_taken() {
    for (name, command, payload, fds) in golden() {
        let ends_anywhere = command == Command::Version;
        for length in 0..payload.len() {
            let parsed = parse(command, &payload[..length], fds);
            assert!(ends_anywhere || parsed.is_err(), "{name} cut to {length}: {parsed:?}");
        }
        let longer = [&payload[..], &[7]].concat();
        let parsed = parse(command, &longer, fds);
        // A probe's data are not looked at.
        assert!(name == "probe" || parsed.is_err(), "{name}, longer: {parsed:?}");
    }
}

/// spec: VFU-2
#[test]
fn every_flipped_bit_is_an_error_or_another_request_and_never_a_panic() {
    for (name, command, payload, fds) in golden() {
        for bit in 0..payload.len() * 8 {
            let mut flipped = payload.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(request) = parse(command, &flipped, fds) {
                let again = rebuilt(&request);
                let same = parse(command, &again, fds);
                // Fields that are not looked at are not kept.
                assert!(same.is_ok(), "{name}, bit {bit}: {request:?} does not come back: {same:?}");
            }
        }
    }
}

/// spec: VFU-3
#[test]
fn descriptors_come_only_with_requests_that_take_them() {
    for (name, command, payload, fds) in golden() {
        for other in 0..=MSG_FDS_MAX + 1 {
            let taken = parse(command, &payload, other).is_ok();
            let allowed = match name {
                "map" => other <= 1,
                "irqs eventfd" | "irqs no eventfd" => other == 0 || other == 3,
                _ => other == fds,
            };
            assert_eq!(taken, allowed, "{name} with {other}");
        }
    }
}

/// spec: VFU-4
#[test]
fn each_kind_of_error_has_its_errno() {
    let errno = |command: u16, payload: &[u8]| Request::parse(command, payload, 0, 4096).unwrap_err().errno();
    assert_eq!(errno(0, &[]), Errno::NOSYS);
    assert_eq!(errno(14, &[]), Errno::NOSYS, "removed from the protocol");
    assert_eq!(errno(19, &[]), Errno::NOSYS);
    assert_eq!(errno(u16::MAX, &[]), Errno::NOSYS);
    assert_eq!(errno(11, &hex("0010000000000000 0300000000000000")), Errno::NOSYS, "the server asks that");
    assert_eq!(errno(13, &[0]), Errno::INVAL);
    assert_eq!(errno(9, &hex("0000000000000000 00000000 01100000")), Errno::TOOBIG);
    assert_eq!(errno(16, &hex("08000000 0a000100")), Errno::NOTTY);
    assert_eq!(errno(16, &hex("10000000 01000200 0000000000000000")), Errno::NOTTY, "MIGRATION cannot be set");
}

/// spec: VFU-20
#[test]
fn version_data_may_be_missing_empty_or_without_a_nul() {
    let none = Capabilities::default();
    let data = ["", "\0", "{}", "{}\0", "{}\0\0\0", "{\"capabilities\":{}}", "{\"other\":[1,{\"x\":null}]}\0"];
    for text in data {
        let payload = [&[0, 0, 1, 0], text.as_bytes()].concat();
        let version = Version::parse(&payload).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        assert_eq!(version, Version { major: 0, minor: 1, capabilities: none }, "{text:?}");
    }
    assert_eq!((none.max_msg_fds(), none.max_data_xfer_size()), (1, 1048576));
    assert_eq!((none.max_dma_maps(), none.pgsizes()), (65535, 4096));
}

/// spec: VFU-21
#[test]
fn every_capability_is_read_and_written() {
    let json = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536,"max_dma_maps":7,"pgsizes":2101248,"twin_socket":{"supported":true,"fd_index":0},"write_multiple":true,"migration":{"pgsize":4096,"max_bitmap_size":256}}}"#;
    let version = Version::parse(&version_payload(json)).unwrap();
    let expected = Capabilities {
        max_msg_fds: Some(8),
        max_data_xfer_size: Some(65536),
        max_dma_maps: Some(7),
        pgsizes: Some(0x20_1000),
        twin_socket: Some(TwinSocket { supported: true, fd_index: Some(0) }),
        write_multiple: Some(true),
        migration: Some(MigrationCapability { pgsize: 4096, max_bitmap_size: Some(256) }),
    };
    assert_eq!(version.capabilities, expected);
    let mut bytes = Vec::new();
    version.write(&mut bytes);
    assert_eq!(bytes, version_payload(json));
}

/// spec: VFU-22
#[test]
fn version_data_that_are_not_what_they_should_be_are_refused() {
    let wrong = [
        "[]",
        "1",
        "{",
        "{}}",
        "\"a\"",
        "{}\0{}",
        "{\"capabilities\":1}",
        "{\"capabilities\":[]}",
        "{\"capabilities\":{\"max_msg_fds\":-1}}",
        "{\"capabilities\":{\"max_msg_fds\":1.5}}",
        "{\"capabilities\":{\"max_msg_fds\":\"8\"}}",
        "{\"capabilities\":{\"max_msg_fds\":4294967296}}",
        "{\"capabilities\":{\"write_multiple\":1}}",
        "{\"capabilities\":{\"twin_socket\":true}}",
        "{\"capabilities\":{\"twin_socket\":{\"supported\":0}}}",
        "{\"capabilities\":{\"migration\":4096}}",
        "\u{1}",
    ];
    for text in wrong {
        let error = Version::parse(&version_payload(text)).expect_err(text);
        assert_eq!(error.errno(), Errno::INVAL, "{text}");
    }
    let deep = "[".repeat(VERSION_DATA_MAX - 1);
    assert!(Version::parse(&version_payload(&deep)).is_err(), "and the stack is as deep as before");
}

fn capability() -> impl Strategy<Value = RegionCapability> {
    let area = (0_u64..16, 1_u64..16).prop_map(|(offset, length)| Area { offset: offset << 12, length: length << 12 });
    prop_oneof![
        prop::collection::vec(area, 0..5).prop_map(RegionCapability::SparseMmap),
        any::<(u32, u32)>().prop_map(|(type_, subtype)| RegionCapability::Type { type_, subtype }),
        Just(RegionCapability::MsixMappable),
        (100_u16.., any::<u16>(), 0_usize..4).prop_map(|(id, version, words)| RegionCapability::Other {
            id,
            version,
            data: vec![7; words * 8],
        }),
    ]
}

fn info_of(capabilities: usize) -> RegionInfo {
    let cap_offset = if capabilities == 0 { 0 } else { 32 };
    RegionInfo { argsz: 32, flags: 0, index: 0, cap_offset, size: 1 << 20, offset: 0 }
}

/// spec: VFU-30
#[test]
fn a_capability_chain_is_laid_out_as_the_kernel_does() {
    let chain = [
        RegionCapability::SparseMmap(vec![Area { offset: 0x1000, length: 0x2000 }]),
        RegionCapability::MsixMappable,
        RegionCapability::Type { type_: 0x8086, subtype: 2 },
    ];
    let mut bytes = Vec::new();
    write_capabilities(&chain, &mut bytes).unwrap();
    let expected = hex("0100 0100 40000000 01000000 00000000 0010000000000000 0020000000000000
        0300 0100 48000000   0200 0100 00000000 86800000 02000000");
    assert_eq!(bytes, expected);
    assert_eq!(capabilities_length(&chain), bytes.len());
    assert_eq!(parse_capabilities(&info_of(3), &bytes).unwrap(), chain);
}

#[test]
fn a_chain_that_loops_or_leaves_its_message_is_an_error() {
    let at = |next: u32| [&hex("0300 0100")[..], &next.to_le_bytes(), &[0; 8]].concat();
    for next in [1, 8, 31, 32, 39, 41, 49, 1000, !7] {
        assert!(parse_capabilities(&info_of(1), &at(next)).is_err(), "{next}");
    }
    let outside = RegionCapability::SparseMmap(vec![Area { offset: 0xf_f000, length: 0x2000 }]);
    let mut bytes = Vec::new();
    write_capabilities(&[outside], &mut bytes).unwrap();
    assert!(parse_capabilities(&info_of(1), &bytes).is_err());
}

/// spec: VFU-31
#[test]
fn io_fds_are_read_and_written() {
    let entry = |kind| IoFd { offset: 0x10, size: 4, fd_index: 1, flags: 1, kind };
    let entries =
        vec![entry(IoFdKind::IoEventFd { datamatch: 9 }), entry(IoFdKind::IoRegionFd { user_data: 0x1122_3344 })];
    let reply = RegionIoFds { index: 2, entries };
    let mut bytes = Vec::new();
    reply.write(&mut bytes);
    let expected = hex("60000000 00000000 02000000 02000000
        1000000000000000 0400000000000000 01000000 00000000 01000000 00000000 0900000000000000
        1000000000000000 0400000000000000 01000000 01000000 01000000 00000000 4433221100000000");
    assert_eq!(bytes, expected);
    assert_eq!(RegionIoFds::parse(&bytes, 2), Ok(reply));
    assert!(RegionIoFds::parse(&bytes, 1).is_err(), "an index beyond the descriptors");
    (0..bytes.len()).for_each(|length| assert!(RegionIoFds::parse(&bytes[..length], 2).is_err()));
}

proptest! {
    #[test]
    fn a_capability_chain_comes_back(chain in prop::collection::vec(capability(), 0..6)) {
        let mut bytes = Vec::new();
        write_capabilities(&chain, &mut bytes).unwrap();
        prop_assert_eq!(bytes.len(), capabilities_length(&chain));
        prop_assert_eq!(parse_capabilities(&info_of(chain.len()), &bytes).unwrap(), chain);
    }

    /// spec: VFU-2
    #[test]
    fn no_bytes_make_a_parser_panic(
        command in 0_u16..20,
        payload in prop::collection::vec(prop_oneof![Just(0_u8), 0_u8..64, any::<u8>()], 0..200),
        fds in 0_usize..5,
        cap_offset in 0_u32..256,
    ) {
        let _ = Request::parse(command, &payload, fds, 64);
        let _ = RegionIoFds::parse(&payload, fds);
        let _ = parse_capabilities(&RegionInfo { cap_offset, ..info_of(1) }, &payload);
        let _ = DmaAccess::parse_with_data(&payload, 64);
        let _ = DmaAccess::parse_write_reply(&payload, 64);
        let _ = RegionAccess::parse_with_data(&payload, 64);
        let _ = MigDataWrite::parse_reply(&payload, 64);
        let _ = WriteMulti::parse_reply(&payload);
        let _ = DeviceFeature::parse_reply(&payload);
    }

    #[test]
    fn a_header_comes_back(id: u16, command: u16, size: u32, no_reply: bool, errno in 1_i32..4096) {
        let error = MessageType::Reply { error: Some(Errno::from_raw_os_error(errno)) };
        for kind in [MessageType::Command { no_reply }, MessageType::Reply { error: None }, error] {
            let header = Header { id, command, size, kind };
            prop_assert_eq!(Header::parse(&header.to_bytes()), header);
        }
    }

    #[test]
    fn single_writes_come_back(writes in prop::collection::vec((0_u64..1000, any::<u32>(), 1_usize..9), 1..20)) {
        let data = [1, 2, 3, 4, 5, 6, 7, 8];
        let single = |(offset, region, count): (u64, u32, usize)| SingleWrite::new(offset, region, &data[..count]);
        let writes: Vec<_> = writes.into_iter().filter_map(single).collect();
        let mut bytes = Vec::new();
        WriteMulti::write_request(&writes, &mut bytes);
        prop_assert_eq!(WriteMulti::parse(&bytes).unwrap().iter().collect::<Vec<_>>(), writes);
    }

    /// Bits of a bitmap are counted one by one.
    #[test]
    fn a_bitmap_has_a_bit_for_every_page_and_whole_words(length in 1_u64..100_000_000, shift in 12_u32..22) {
        let page_size = 1_u64 << shift;
        let (mut pages, mut covered) = (0_u64, 0);
        while covered < length {
            pages += 1;
            covered += page_size;
        }
        let bytes = bitmap_length(length, page_size);
        prop_assert!(bytes * 8 >= pages && bytes.is_multiple_of(8) && (bytes - 8) * 8 < pages);
    }
}

#[test]
fn an_action_has_its_own_flag() {
    for (flag, action) in [(8, IrqAction::Mask), (16, IrqAction::Unmask), (32, IrqAction::Trigger)] {
        let payload = [hex("14000000"), vec![flag | 1, 0, 0, 0], hex("00000000 00000000 01000000")].concat();
        let Ok(Request::DeviceSetIrqs(irqs)) = parse(Command::DeviceSetIrqs, &payload, 0) else { panic!() };
        assert_eq!(irqs.action, action);
    }
}
