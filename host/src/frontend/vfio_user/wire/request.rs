//! Any request of a client.

use super::{
    Command, DeviceFeature, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, MigDataRead, MigDataWrite, Reader, RegionAccess,
    RegionInfo, RegionIoFds, RegionWrite, Result, SetIrqs, Version, WireError, WriteMulti,
};

/// A client's request, with every field in its range. Its file descriptors are the message's, as many as the request
/// takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    Version(Version),
    DmaMap(DmaMap),
    DmaUnmap(DmaUnmap),
    DeviceGetInfo,
    DeviceGetRegionInfo { index: u32, argsz: u32 },
    DeviceGetRegionIoFds { index: u32 },
    DeviceGetIrqInfo { index: u32 },
    DeviceSetIrqs(SetIrqs<'a>),
    RegionRead(RegionAccess),
    RegionWrite(RegionWrite<'a>),
    DeviceReset,
    RegionWriteMulti(WriteMulti<'a>),
    DeviceFeature(DeviceFeature<'a>),
    MigDataRead(MigDataRead),
    MigDataWrite(MigDataWrite<'a>),
}

impl<'a> Request<'a> {
    /// `data_xfer_max`: most bytes of data, as negotiated; `fds`: how many came with the message.
    pub fn parse(command: u16, payload: &'a [u8], fds: usize, data_xfer_max: u32) -> Result<Self> {
        let command = Command::from_raw(command).ok_or(WireError::UnknownCommand(command))?;
        let fds_max = match command {
            Command::DmaMap | Command::DeviceFeature => 1,
            // Counts them itself.
            Command::DeviceSetIrqs => usize::MAX,
            _ => 0,
        };
        if fds > fds_max {
            return Err(WireError::Fds { found: fds, most: fds_max });
        }
        Ok(match command {
            Command::Version => Self::Version(Version::parse(payload)?),
            Command::DmaMap => Self::DmaMap(DmaMap::parse(payload, fds)?),
            Command::DmaUnmap => Self::DmaUnmap(DmaUnmap::parse(payload)?),
            Command::DeviceGetInfo => DeviceInfo::parse_request(payload).map(|()| Self::DeviceGetInfo)?,
            Command::DeviceGetRegionInfo => {
                let (info, rest) = RegionInfo::parse(payload)?;
                Reader::new(rest).end()?;
                Self::DeviceGetRegionInfo { index: info.index, argsz: info.argsz }
            }
            Command::DeviceGetRegionIoFds => Self::DeviceGetRegionIoFds { index: RegionIoFds::parse_request(payload)? },
            Command::DeviceGetIrqInfo => Self::DeviceGetIrqInfo { index: IrqInfo::parse(payload)?.index },
            Command::DeviceSetIrqs => Self::DeviceSetIrqs(SetIrqs::parse(payload, fds)?),
            Command::RegionRead => Self::RegionRead(RegionAccess::parse(payload, data_xfer_max)?),
            Command::RegionWrite => Self::RegionWrite(RegionWrite::parse(payload, data_xfer_max)?),
            Command::DmaRead | Command::DmaWrite => return Err(WireError::WrongDirection(command)),
            Command::DeviceReset => Reader::new(payload).end().map(|()| Self::DeviceReset)?,
            Command::RegionWriteMulti => Self::RegionWriteMulti(WriteMulti::parse(payload)?),
            Command::DeviceFeature => Self::DeviceFeature(DeviceFeature::parse(payload, fds)?),
            Command::MigDataRead => Self::MigDataRead(MigDataRead::parse(payload, data_xfer_max)?),
            Command::MigDataWrite => Self::MigDataWrite(MigDataWrite::parse(payload, data_xfer_max)?),
        })
    }
}
