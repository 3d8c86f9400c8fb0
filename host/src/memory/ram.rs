//! One VM's RAM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::{MemoryError, PAGE_SIZE};
use crate::sys::{Mapping, Seal, memfd};

/// Largest RAM of one VM: 16 TiB.
pub const RAM_SIZE_MAX: u64 = 1 << 44;

/// One block of guest memory over a sealed memfd; offset 0 is guest-physical 0.
///
/// It is mapped twice. What the CPU does to guest memory goes through [`Self::mapping`], which [`super::CpuDirt`]
/// watches; what devices and the host do goes through [`Self::dma_mapping`], where the CPU's dirt source is blind, so
/// that it can never cover up for a device's tracker that forgets a page.
#[derive(Debug)]
pub struct GuestRam {
    fd: OwnedFd,
    size: u64,
    cpu: Arc<Mapping>,
    dma: Arc<Mapping>,
}

impl GuestRam {
    /// Makes `size` zero bytes, a positive multiple of [`PAGE_SIZE`] up to [`RAM_SIZE_MAX`]. Nothing is populated yet.
    pub fn new(size: u64) -> Result<Arc<Self>, MemoryError> {
        if size == 0 || size > RAM_SIZE_MAX || !size.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::RamSize { size });
        }
        let fd = memfd("guest-ram", size, Seal::Size).map_err(|source| MemoryError::Ram { size, source })?;
        let cpu = Arc::new(Mapping::new(&fd, 0, size)?);
        let dma = Arc::new(Mapping::new(&fd, 0, size)?);
        Ok(Arc::new(Self { fd, size, cpu, dma }))
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }

    /// The CPU's mapping: an in-process guest and a VMM's own stores use this one.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.cpu
    }

    /// The mapping for devices and for the host's writes on their behalf.
    pub fn dma_mapping(&self) -> &Arc<Mapping> {
        &self.dma
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
