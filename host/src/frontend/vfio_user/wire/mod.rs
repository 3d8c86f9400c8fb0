//! Messages of vfio-user 0.0 and 0.1 and their bytes.
//!
//! **Owns** the layout of every message and every limit on what a peer may put into one. Parsers are total: any bytes
//! give a value that keeps the protocol's rules, or an error that knows its errno. Builders write what parsers read. **Must
//! never** perform I/O, allocate by a length that it has not capped, or know a device.
//!
//! All numbers are little-endian. Fields that the protocol declares unused in a request are not looked at. Values borrow
//! from the message that they were parsed from, so that bulk data are not copied.

mod capability;
mod dma;
mod feature;
mod header;
mod info;
mod irqs;
mod mig_data;
mod region;
mod request;
#[cfg(test)]
mod tests;
mod version;

pub use capability::{capabilities_length, parse_capabilities, write_capabilities};
pub use dma::{BitmapRequest, DmaAccess, DmaMap, DmaUnmap, UnmapScope};
pub use feature::{DeviceFeature, FeatureCall, LoggingRanges, LoggingReport, LoggingStart, MigrationState, Operation};
pub use header::{Command, HEADER_LENGTH, Header, MessageType};
pub use info::{DeviceInfo, IoFd, IoFdKind, IrqInfo, RegionInfo, RegionIoFds};
pub use irqs::{Bools, SetIrqs, SetIrqsData};
pub use mig_data::{MigDataRead, MigDataWrite};
pub use region::{RegionAccess, RegionWrite, SingleWrite, WriteMulti};
pub use request::Request;
pub use version::{Capabilities, MigrationCapability, TwinSocket, Version};

use rustix::io::Errno;

/// The only major version.
pub const VERSION_MAJOR: u16 = 0;
/// The highest minor version that is spoken.
pub const VERSION_MINOR_MAX: u16 = 1;
/// Most bytes of data in one message; also the protocol's default for `max_data_xfer_size`.
pub const DATA_XFER_MAX: u32 = 1024 * 1024;
/// Most bytes of version data (JSON) in a VERSION message, its NUL included.
pub const VERSION_DATA_MAX: usize = 8192;
/// Most bytes of a message, its header included: the largest has 16 bytes of fields and [`DATA_XFER_MAX`] of data.
pub const MESSAGE_MAX: usize = HEADER_LENGTH + 16 + DATA_XFER_MAX as usize;
/// Most bytes of a VERSION message.
pub const VERSION_MESSAGE_MAX: usize = HEADER_LENGTH + 4 + VERSION_DATA_MAX;
/// Most file descriptors in one message. More are accepted than QEMU's 16, the number that some clients send whatever
/// was negotiated.
pub const MSG_FDS_MAX: usize = 64;
/// The protocol's default for `max_msg_fds`.
pub const MSG_FDS_DEFAULT: u32 = 1;
/// Most DMA maps at a time; the protocol's default for `max_dma_maps`.
pub const DMA_MAPS_MAX: u32 = 65535;
/// The page size of DMA maps; the protocol's default for `pgsizes` is this bit.
pub const PAGE_SIZE: u64 = 4096;
/// Most single writes in one REGION_WRITE_MULTI.
pub const WRITE_MULTI_MAX: u64 = 1024;
/// Most vectors in one SET_IRQS: all of an MSI-X table.
pub const IRQ_VECTORS_MAX: u32 = 2048;
/// Most ranges in one DMA_LOGGING_START.
pub const LOGGING_RANGES_MAX: u32 = 1024;
/// Most bytes of a dirty bitmap in one reply: 8 Mi pages.
pub const BITMAP_MAX: u64 = DATA_XFER_MAX as u64;
/// Most bytes of a region's capabilities.
pub const CAPABILITIES_MAX: usize = 64 * 1024;
/// Most entries of a REGION_IO_FDS reply.
pub const IO_FDS_MAX: u32 = 1024;

/// What is wrong with a message. The stream is still aligned: the next message can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("command {0} is unknown")]
    UnknownCommand(u16),
    #[error("{0:?} does not come from this side")]
    WrongDirection(Command),
    #[error("{have} bytes of payload where {need} are due")]
    Length { have: usize, need: usize },
    #[error("{found} file descriptors, at most {most} are taken here")]
    Fds { found: usize, most: usize },
    #[error("argsz of {found} where {need} is the least")]
    Argsz { found: u32, need: u64 },
    #[error("{what}: {found} is more than {most}")]
    Limit { what: &'static str, found: u64, most: u64 },
    #[error("{0}")]
    Invalid(&'static str),
    #[error("feature {0} is unknown")]
    UnknownFeature(u16),
}

impl WireError {
    /// What is answered.
    pub fn errno(&self) -> Errno {
        match self {
            Self::UnknownCommand(_) | Self::WrongDirection(_) => Errno::NOSYS,
            Self::Limit { .. } => Errno::TOOBIG,
            Self::UnknownFeature(_) => Errno::NOTTY,
            Self::Length { .. } | Self::Fds { .. } | Self::Argsz { .. } | Self::Invalid(_) => Errno::INVAL,
        }
    }
}

pub type Result<T> = std::result::Result<T, WireError>;

/// Takes fields off the front of a payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    /// Bytes of the whole payload
    length: usize,
}

impl<'a> Reader<'a> {
    pub fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload, length: payload.len() }
    }

    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| WireError::Length {
            have: self.length,
            need: (self.length - self.rest.len()).saturating_add(count),
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Nothing may follow.
    pub fn end(self) -> Result<()> {
        match self.rest.len() {
            0 => Ok(()),
            over => Err(WireError::Length { have: self.length, need: self.length - over }),
        }
    }

    /// The rest, which must be `count` bytes.
    pub fn exactly(mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.bytes(count)?;
        self.end()?;
        Ok(taken)
    }
}

/// Puts fields behind each other.
pub(in crate::frontend::vfio_user) trait Put {
    fn u16(&mut self, value: u16);
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
}

pub(super) fn at_least(argsz: u32, need: u64) -> Result<()> {
    if u64::from(argsz) < need { Err(WireError::Argsz { found: argsz, need }) } else { Ok(()) }
}

pub(super) fn at_most(what: &'static str, found: u64, most: u64) -> Result<()> {
    if found > most { Err(WireError::Limit { what, found, most }) } else { Ok(()) }
}

/// A range that is not empty and whose last byte has an address.
pub(super) fn range(start: u64, length: u64) -> Result<()> {
    match length.checked_sub(1).map(|last| start.checked_add(last)) {
        Some(Some(_)) => Ok(()),
        Some(None) => Err(WireError::Invalid("a range beyond the last address")),
        None => Err(WireError::Invalid("an empty range")),
    }
}

/// Bytes of the bitmap over `length` bytes in pages of `page_size`, whole 64-bit words. `page_size` is not 0.
pub fn bitmap_length(length: u64, page_size: u64) -> u64 {
    length.div_ceil(page_size).div_ceil(64) * 8
}
