//! What can go wrong with guest memory.

use rustix::io::Errno;

use super::{CpuDirtError, IovaMapping, MAPS_MAX, PAGE_SIZE, RAM_SIZE_MAX};
use crate::sys::MappingError;

/// A refused or failed request. Nothing was changed, except where a method says that the rest was marked dirty.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("{size} bytes of guest RAM: it is a positive multiple of {PAGE_SIZE}, {RAM_SIZE_MAX} at most")]
    RamSize { size: u64 },
    #[error("making {size} bytes of guest RAM")]
    Ram { size: u64, source: std::io::Error },
    #[error("populating {size} bytes of guest RAM")]
    Populate { size: u64, source: std::io::Error },
    #[error("writing {length:#x} bytes at RAM offset {ram_offset:#x}")]
    Write { ram_offset: u64, length: u64, source: std::io::Error },
    #[error("mapping guest RAM")]
    Mapping(#[from] MappingError),
    #[error("{length:#x} bytes at {iova:#x}: addresses and lengths are multiples of {granule:#x} and not empty")]
    Misaligned { iova: u64, length: u64, granule: u64 },
    #[error("{length:#x} bytes at {iova:#x} end beyond the last address")]
    Overflow { iova: u64, length: u64 },
    #[error("{length:#x} bytes at RAM offset {ram_offset:#x} lie outside {size:#x} bytes of RAM")]
    OutsideRam { ram_offset: u64, length: u64, size: u64 },
    #[error("this machine has no RAM of its own: its clients bring their memory")]
    NoRam,
    #[error("this machine's memory is its own: a client's cannot be mapped into it")]
    NoClients,
    #[error(
        "{length:#x} bytes at offset {offset:#x} lie outside a file of {size:#x} bytes, or begin inside a page of it"
    )]
    OutsideFile { offset: u64, length: u64, size: u64 },
    #[error("a client's file to map: {why}: {errno}")]
    File { why: &'static str, errno: Errno },
    #[error("no room for a client's map of {length:#x} bytes among {limit:#x} bytes of all clients")]
    NoRoom { length: u64, limit: u64 },
    #[error(
        "{length:#x} bytes at {iova:#x} are mapped with other memory, or with other rights, by another device of the VM"
    )]
    OtherMemory { iova: u64, length: u64 },
    #[error("a client's memory at {iova:#x} is still being copied")]
    Busy { iova: u64 },
    #[error("a map that may be neither read nor written")]
    NoAccess,
    #[error("{length:#x} bytes at {iova:#x} overlap the map of {:#x} bytes at {:#x}", .existing.length, .existing.iova)]
    Overlap { iova: u64, length: u64, existing: IovaMapping },
    #[error("{MAPS_MAX} maps exist, no more are kept")]
    TooManyMaps,
    #[error("{length:#x} bytes at {iova:#x} would cut the map of {:#x} bytes at {:#x}", .existing.length, .existing.iova)]
    Cut { iova: u64, length: u64, existing: IovaMapping },
    #[error("nothing is mapped at {iova:#x}")]
    Unmapped { iova: u64 },
    #[error("the map at {iova:#x} does not allow this access")]
    Denied { iova: u64 },
    #[error("pages {first} and {count} from there lie outside a log of {pages} pages")]
    OutOfRange { first: u64, count: u64, pages: u64 },
    #[error("a dirty bitmap of {words} words for {bits} bits, or with bits set beyond them")]
    Bitmap { words: usize, bits: u64 },
    #[error("the dirty log is not tracking")]
    NotTracking,
    #[error("CPU dirt")]
    CpuDirt(#[from] CpuDirtError),
}

impl MemoryError {
    /// The errno at the edge: what VFIO's own DMA map, unmap and bitmap calls answer.
    pub fn errno(&self) -> Errno {
        match self {
            Self::RamSize { .. }
            | Self::Misaligned { .. }
            | Self::OutsideRam { .. }
            | Self::NoRam
            | Self::NoClients
            | Self::OutsideFile { .. }
            | Self::NoAccess
            | Self::Cut { .. }
            | Self::OutOfRange { .. }
            | Self::Bitmap { .. }
            | Self::NotTracking => Errno::INVAL,
            Self::Ram { source, .. } | Self::Populate { source, .. } | Self::Write { source, .. } => {
                Errno::from_io_error(source).unwrap_or(Errno::NOMEM)
            }
            Self::Mapping(MappingError::Map { source, .. }) => Errno::from_io_error(source).unwrap_or(Errno::NOMEM),
            Self::File { errno, .. } | Self::Mapping(MappingError::Client { errno, .. }) => *errno,
            Self::Busy { .. } => Errno::BUSY,
            Self::Mapping(_) | Self::Unmapped { .. } => Errno::FAULT,
            Self::Overflow { .. } => Errno::OVERFLOW,
            Self::Overlap { .. } | Self::OtherMemory { .. } => Errno::EXIST,
            Self::TooManyMaps | Self::NoRoom { .. } => Errno::NOSPC,
            Self::Denied { .. } => Errno::ACCESS,
            Self::CpuDirt(error) => error.errno(),
        }
    }
}
