//! What a client asks about the device, its regions and its irqs.

use super::{CAPABILITIES_MAX, IO_FDS_MAX, MSG_FDS_MAX, Put, Reader, Result, WireError, at_least, at_most};

/// DEVICE_GET_INFO's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`
    pub flags: u32,
    pub num_regions: u32,
    pub num_irqs: u32,
}

impl DeviceInfo {
    pub const LENGTH: usize = 16;

    /// The request: only its room for the reply counts.
    pub fn parse_request(payload: &[u8]) -> Result<()> {
        Self::parse(payload).map(drop)
    }

    pub fn parse(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let argsz = reader.u32()?;
        let info = Self { flags: reader.u32()?, num_regions: reader.u32()?, num_irqs: reader.u32()? };
        reader.end()?;
        at_least(argsz, Self::LENGTH as u64)?;
        Ok(info)
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u32(Self::LENGTH as u32);
        out.u32(self.flags);
        out.u32(self.num_regions);
        out.u32(self.num_irqs);
    }
}

/// DEVICE_GET_REGION_INFO's reply, without its capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes that the whole reply has or would have; in a request, bytes that there is room for
    pub argsz: u32,
    /// `VFIO_REGION_INFO_FLAG_*`
    pub flags: u32,
    pub index: u32,
    /// Of the first capability from the begin of this structure on, in bytes; 0: none is here
    pub cap_offset: u32,
    /// In bytes
    pub size: u64,
    /// In the file that comes with the reply, in bytes
    pub offset: u64,
}

impl RegionInfo {
    pub const LENGTH: usize = 32;

    /// Of a request only `argsz` and `index` count. Returns the capability bytes too, which a reply may have.
    pub fn parse(payload: &[u8]) -> Result<(Self, &[u8])> {
        let mut reader = Reader::new(payload);
        let info = Self {
            argsz: reader.u32()?,
            flags: reader.u32()?,
            index: reader.u32()?,
            cap_offset: reader.u32()?,
            size: reader.u64()?,
            offset: reader.u64()?,
        };
        let rest = reader.rest();
        at_least(info.argsz, Self::LENGTH as u64)?;
        at_most("capabilities", rest.len() as u64, CAPABILITIES_MAX as u64)?;
        Ok((info, rest))
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u32(self.argsz);
        out.u32(self.flags);
        out.u32(self.index);
        out.u32(self.cap_offset);
        out.u64(self.size);
        out.u64(self.offset);
    }
}

/// DEVICE_GET_IRQ_INFO, both ways; of a request only `index` counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`
    pub flags: u32,
    pub index: u32,
    pub count: u32,
}

impl IrqInfo {
    pub const LENGTH: usize = 16;

    pub fn parse(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let argsz = reader.u32()?;
        let info = Self { flags: reader.u32()?, index: reader.u32()?, count: reader.u32()? };
        reader.end()?;
        at_least(argsz, Self::LENGTH as u64)?;
        Ok(info)
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u32(Self::LENGTH as u32);
        out.u32(self.flags);
        out.u32(self.index);
        out.u32(self.count);
    }
}

/// How the kernel tells the server of a store, and what that needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoFdKind {
    /// `VFIO_USER_IO_FD_TYPE_IOEVENTFD`
    IoEventFd { datamatch: u64 },
    /// `VFIO_USER_IO_FD_TYPE_IOREGIONFD`
    IoRegionFd { user_data: u64 },
}

/// One entry of REGION_IO_FDS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoFd {
    /// In the region, in bytes
    pub offset: u64,
    /// In bytes; 0: any
    pub size: u64,
    /// Which of the message's file descriptors
    pub fd_index: u32,
    /// `KVM_IOEVENTFD_FLAG_*` or `KVM_IOREGION_*`
    pub flags: u32,
    pub kind: IoFdKind,
}

/// DEVICE_GET_REGION_IO_FDS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionIoFds {
    pub index: u32,
    pub entries: Vec<IoFd>,
}

impl RegionIoFds {
    pub const LENGTH: usize = 16;
    pub const ENTRY_LENGTH: usize = 40;

    /// The region that is asked about.
    pub fn parse_request(payload: &[u8]) -> Result<u32> {
        let mut reader = Reader::new(payload);
        let (argsz, flags, index, count) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        reader.end()?;
        at_least(argsz, Self::LENGTH as u64)?;
        if flags != 0 || count != 0 {
            return Err(WireError::Invalid("a question for I/O fds with fields that must be 0"));
        }
        Ok(index)
    }

    pub fn write_request(index: u32, argsz: u32, out: &mut Vec<u8>) {
        [argsz, 0, index, 0].into_iter().for_each(|field| out.u32(field));
    }

    pub fn parse(payload: &[u8], fds: usize) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (argsz, flags, index, count) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        at_most("I/O fds", u64::from(count), u64::from(IO_FDS_MAX))?;
        let length = Self::LENGTH as u64 + u64::from(count) * Self::ENTRY_LENGTH as u64;
        at_least(argsz, length)?;
        if flags != 0 {
            return Err(WireError::Invalid("flags of I/O fds"));
        }
        let entries = reader.exactly(count as usize * Self::ENTRY_LENGTH)?;
        let entries = entries.chunks_exact(Self::ENTRY_LENGTH).map(|bytes| IoFd::parse(bytes, fds.min(MSG_FDS_MAX)));
        Ok(Self { index, entries: entries.collect::<Result<_>>()? })
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        let length = Self::LENGTH + self.entries.len() * Self::ENTRY_LENGTH;
        out.u32(u32::try_from(length).unwrap_or(u32::MAX));
        out.u32(0);
        out.u32(self.index);
        out.u32(self.entries.len() as u32);
        self.entries.iter().for_each(|entry| entry.write(out));
    }
}

impl IoFd {
    fn parse(bytes: &[u8], fds: usize) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let (offset, size) = (reader.u64()?, reader.u64()?);
        let (fd_index, kind, flags, _padding) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        let value = reader.u64()?;
        if offset.checked_add(size).is_none() || fd_index as usize >= fds {
            return Err(WireError::Invalid("an I/O fd's area or index"));
        }
        let kind = match kind {
            0 => IoFdKind::IoEventFd { datamatch: value },
            1 => IoFdKind::IoRegionFd { user_data: value },
            _ => return Err(WireError::Invalid("an unknown type of I/O fd")),
        };
        Ok(Self { offset, size, fd_index, flags, kind })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let (kind, value) = match self.kind {
            IoFdKind::IoEventFd { datamatch } => (0, datamatch),
            IoFdKind::IoRegionFd { user_data } => (1, user_data),
        };
        out.u64(self.offset);
        out.u64(self.size);
        [self.fd_index, kind, self.flags, 0].into_iter().for_each(|field| out.u32(field));
        out.u64(value);
    }
}
