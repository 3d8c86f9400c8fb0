//! Every parser of the wire, on any bytes.
//!
//! ```text
//!  which u8 | descriptors u8 | payload        which: a command of the client's, or 0x80 and up: what comes back
//! ```
//! What is parsed keeps its limits; what is written again and parsed again is the same.

use vfio_mediate::device::RegionCapability;
use vfio_mediate::frontend::vfio_user::wire::{
    BITMAP_MAX, CAPABILITIES_MAX, DATA_XFER_MAX, DeviceFeature, DeviceInfo, DmaAccess, FeatureCall, HEADER_LENGTH,
    Header, IO_FDS_MAX, IRQ_VECTORS_MAX, IrqInfo, LOGGING_RANGES_MAX, MSG_FDS_MAX, MessageType, MigDataWrite,
    RegionInfo, RegionIoFds, Request, SetIrqsData, VERSION_DATA_MAX, Version, WRITE_MULTI_MAX, WriteMulti,
    capabilities_length, parse_capabilities, write_capabilities,
};

/// As much data as this input's client takes: small ones make their limit easy to reach.
const DATA_MAX: [u32; 4] = [DATA_XFER_MAX, 1, 64, 4096];

pub fn run(data: &[u8]) {
    let [which, fds, payload @ ..] = data else { return };
    let data_max = DATA_MAX[usize::from(fds >> 6)];
    let fds = usize::from(fds & 0x3f) * 2;
    if *which < 0x80 {
        return request(u16::from(*which), payload, fds, data_max);
    }
    match which & 0x0f {
        0 => header(payload),
        1 => version(payload),
        2 => same(DeviceInfo::parse(payload), |info, out| info.write(out), DeviceInfo::parse),
        3 => region_info(payload),
        4 => same(IrqInfo::parse(payload), |info, out| info.write(out), IrqInfo::parse),
        5 => io_fds(payload, fds),
        6 => same(
            DmaAccess::parse(payload, data_max),
            |access, out| access.write(out),
            |bytes| DmaAccess::parse(bytes, data_max),
        ),
        7 => {
            if let Ok(access) = DmaAccess::parse_write_reply(payload, data_max) {
                assert!(access.count > 0 && access.count <= data_max);
            }
        }
        8 => {
            if let Ok((access, data)) = DmaAccess::parse_with_data(payload, data_max) {
                assert!(data.len() == access.count as usize && access.count <= data_max);
                assert!(access.address.checked_add(u64::from(access.count) - 1).is_some());
            }
        }
        9 => {
            let _data = DeviceFeature::parse_reply(payload);
        }
        10 => {
            if let Ok(reply) = MigDataWrite::parse_reply(payload, data_max) {
                assert!(reply.data.len() <= data_max as usize);
            }
        }
        _ => {
            let _done = WriteMulti::parse_reply(payload);
        }
    }
}

/// What was parsed is what is parsed again from what is written of it.
fn same<T: PartialEq + std::fmt::Debug, E: std::fmt::Debug + PartialEq>(
    parsed: Result<T, E>,
    write: impl Fn(&T, &mut Vec<u8>),
    parse: impl Fn(&[u8]) -> Result<T, E>,
) {
    if let Ok(value) = parsed {
        let mut bytes = Vec::new();
        write(&value, &mut bytes);
        assert_eq!(parse(&bytes), Ok(value));
    }
}

fn header(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HEADER_LENGTH>() else { return };
    let header = Header::parse(bytes);
    assert_eq!(Header::parse(&header.to_bytes()), header);
    if let MessageType::Reply { error: Some(errno) } = header.kind {
        assert!(errno.raw_os_error() > 0);
    }
}

fn version(bytes: &[u8]) {
    same(Version::parse(bytes), |version, out| version.write(out), Version::parse);
}

fn region_info(payload: &[u8]) {
    let Ok((info, rest)) = RegionInfo::parse(payload) else { return };
    let Ok(mut capabilities) = parse_capabilities(&info, rest) else { return };
    // The last one of an unknown kind has what is left of the message; written, it is padded.
    for capability in &mut capabilities {
        if let RegionCapability::Other { data, .. } = capability {
            data.resize(data.len().next_multiple_of(8), 0);
        }
    }
    let length = capabilities_length(&capabilities);
    let mut bytes = Vec::new();
    if write_capabilities(&capabilities, &mut bytes).is_err() {
        assert!(length > CAPABILITIES_MAX);
        return;
    }
    assert_eq!(bytes.len(), length);
    let cap_offset = if capabilities.is_empty() { 0 } else { RegionInfo::LENGTH as u32 };
    let again = RegionInfo { cap_offset, argsz: (RegionInfo::LENGTH + length) as u32, ..info };
    assert_eq!(parse_capabilities(&again, &bytes), Ok(capabilities));
}

fn io_fds(payload: &[u8], fds: usize) {
    if let Ok(io_fds) = RegionIoFds::parse(payload, fds) {
        assert!(io_fds.entries.len() <= IO_FDS_MAX as usize);
        assert!(io_fds.entries.iter().all(|entry| (entry.fd_index as usize) < fds.min(MSG_FDS_MAX)));
    }
    same(RegionIoFds::parse(payload, fds), |io_fds, out| io_fds.write(out), |bytes| RegionIoFds::parse(bytes, fds));
}

fn request(command: u16, payload: &[u8], fds: usize, data_max: u32) {
    let parsed = match Request::parse(command, payload, fds, data_max) {
        Ok(parsed) => parsed,
        Err(error) => return assert!(error.errno().raw_os_error() > 0),
    };
    let mut bytes = Vec::new();
    match parsed {
        Request::Version(version) => {
            assert!(payload.len() <= 4 + VERSION_DATA_MAX);
            version.write(&mut bytes);
        }
        Request::DmaMap(map) => {
            assert!(map.size > 0 && (map.address | map.size).is_multiple_of(4096) && fds <= 1);
            assert!(map.address.checked_add(map.size - 1).is_some() && (map.readable || map.writable));
            map.write(&mut bytes);
        }
        Request::DmaUnmap(unmap) => {
            if let Some(bitmap) = unmap.bitmap {
                assert!(bitmap.size <= BITMAP_MAX && bitmap.page_size.is_power_of_two());
            }
            unmap.write(&mut bytes);
        }
        Request::DeviceSetIrqs(irqs) => {
            assert!(irqs.count <= IRQ_VECTORS_MAX && irqs.start.checked_add(irqs.count).is_some());
            assert!((irqs.data == SetIrqsData::EventFds) == (fds > 0) && fds <= MSG_FDS_MAX);
            if let SetIrqsData::Bool(bools) = irqs.data {
                assert_eq!(bools.iter().count(), irqs.count as usize);
            }
            irqs.write(&mut bytes);
        }
        Request::RegionRead(access) => {
            assert!(access.count > 0 && access.count <= data_max);
            access.write(&mut bytes);
        }
        Request::RegionWrite(write) => {
            assert!(!write.data.is_empty() && write.data.len() <= data_max as usize);
            write.write(&mut bytes);
        }
        Request::RegionWriteMulti(writes) => {
            let singles: Vec<_> = writes.iter().collect();
            assert!(singles.len() as u64 <= WRITE_MULTI_MAX);
            assert!(singles.iter().all(|single| matches!(single.data().len(), 1..=8)));
            WriteMulti::write_request(&singles, &mut bytes);
        }
        Request::MigDataRead(read) => {
            assert!(read.size > 0 && read.size <= data_max);
            read.write(&mut bytes);
        }
        Request::MigDataWrite(write) => {
            assert!(!write.data.is_empty() && write.data.len() <= data_max as usize);
            write.write(&mut bytes);
        }
        Request::DeviceFeature(feature) => return call(feature.call),
        Request::DeviceGetInfo
        | Request::DeviceGetRegionInfo { .. }
        | Request::DeviceGetRegionIoFds { .. }
        | Request::DeviceGetIrqInfo { .. }
        | Request::DeviceReset => return,
    }
    // Padding behind a single write's data is not kept: only the parsed values are compared.
    let again = Request::parse(command, &bytes, fds, data_max);
    let (again, parsed) = (format!("{again:?}"), format!("Ok({parsed:?})"));
    assert!(again == parsed || command == 15, "{again} is not {parsed}");
}

fn call(call: FeatureCall<'_>) {
    match call {
        FeatureCall::LoggingStart(start) => {
            assert!(start.page_size.is_power_of_two() && start.ranges.iter().count() <= LOGGING_RANGES_MAX as usize);
        }
        FeatureCall::LoggingReport(report) => {
            assert!(report.bitmap_length() <= BITMAP_MAX && report.pages() <= report.bitmap_length() * 8);
        }
        _ => {}
    }
}
