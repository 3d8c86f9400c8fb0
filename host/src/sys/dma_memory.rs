//! Memory that a device may be given, and how this process touches it.
//!
//! **Owns** the choice between a plain copy, one by the kernel, and a question to whoever has the memory. **Must never** touch
//! memory that somebody else can take away by a plain copy: that ends in a signal.

use std::fmt::Debug;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Mapping, MappingError};

/// Memory that only its owner reaches: a client that is asked, by messages, for each transfer. Called from any thread, with no
/// lock of this host's held; a call ends when the client has answered or is gone.
pub trait ClientAccess: Send + Sync + Debug {
    /// Fills all of `data` from `iova` on. On an error its contents are unspecified.
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// When it returns, the bytes are there. On an error some of them may be.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;

    /// Many writes, in this order, of which only the last one needs to have been answered when it returns.
    fn write_many(&self, writes: &mut dyn Iterator<Item = (u64, &[u8])>) -> Result<(), Errno> {
        for (iova, data) in writes {
            self.write(iova, data)?;
        }
        Ok(())
    }
}

/// A block of memory.
#[derive(Debug, Clone)]
pub enum DmaMemory {
    /// Of a fixed size, and writable: touched directly
    Mapped(Arc<Mapping>),
    /// Of a file that its owner may cut off at any time, or that may only be read: the kernel copies
    Guarded(Arc<Mapping>),
    /// Nothing of it is in this process. Its first byte is the client's `iova`.
    Messages { access: Arc<dyn ClientAccess>, iova: u64, length: u64 },
}

impl From<Arc<Mapping>> for DmaMemory {
    fn from(mapping: Arc<Mapping>) -> Self {
        Self::Mapped(mapping)
    }
}

impl DmaMemory {
    /// In bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Mapped(mapping) | Self::Guarded(mapping) => mapping.len(),
            Self::Messages { length, .. } => *length,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For hardware: what there is to be pinned.
    pub fn mapping(&self) -> Option<&Arc<Mapping>> {
        match self {
            Self::Mapped(mapping) | Self::Guarded(mapping) => Some(mapping),
            Self::Messages { .. } => None,
        }
    }

    /// Reads and writes wait for somebody outside: no lock may be held.
    pub fn waits(&self) -> bool {
        matches!(self, Self::Messages { .. })
    }

    /// Copies out, from `offset` on. On an error the contents of `data` are unspecified.
    #[inline]
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), MappingError> {
        match self {
            Self::Mapped(mapping) => mapping.read(offset, data),
            Self::Guarded(mapping) => mapping.kernel_read(offset, data),
            Self::Messages { access, iova, length } => {
                let iova = within(*iova, *length, offset, data.len() as u64)?;
                let length = data.len() as u64;
                access.read(iova, data).map_err(|errno| MappingError::Client { iova, length, errno })
            }
        }
    }

    /// Copies in. On an error some bytes may have been written.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), MappingError> {
        match self {
            Self::Mapped(mapping) => mapping.write(offset, data),
            Self::Guarded(mapping) => mapping.kernel_write(offset, data),
            Self::Messages { access, iova, length } => {
                let iova = within(*iova, *length, offset, data.len() as u64)?;
                let length = data.len() as u64;
                access.write(iova, data).map_err(|errno| MappingError::Client { iova, length, errno })
            }
        }
    }
}

/// The address of a range, if it lies inside the block.
fn within(iova: u64, size: u64, offset: u64, length: u64) -> Result<u64, MappingError> {
    match offset.checked_add(length) {
        // The block's last byte has an address.
        Some(end) if end <= size => Ok(iova.wrapping_add(offset)),
        _ => Err(MappingError::OutOfBounds { offset, length, size }),
    }
}
