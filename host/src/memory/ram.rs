//! One VM's RAM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{MemoryError, PAGE_SIZE};
use crate::sys::{Mapping, Seal, memfd, write_at};

/// Largest RAM of one VM: 16 TiB.
pub const RAM_SIZE_MAX: u64 = 1 << 44;

/// Populated between two looks at whether to stop.
const POPULATE_STEP: u64 = 16 << 20;

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
    populated: AtomicBool,
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
        Ok(Arc::new(Self { fd, size, cpu, dma, populated: AtomicBool::new(false) }))
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

    /// Gives the CPU's mapping every page that it does not have yet, step by step, until it has all of them or `stop` says
    /// so; contents stay. Devices that are reached by DMA have all of memory pinned in any case; this takes the time that
    /// it costs before a guest comes, not while it comes.
    pub fn populate(&self, mut stop: impl FnMut() -> bool) -> Result<(), MemoryError> {
        for offset in (0..self.size).step_by(POPULATE_STEP as usize) {
            if stop() {
                return Ok(());
            }
            let length = POPULATE_STEP.min(self.size - offset);
            self.cpu.populate(offset, length).map_err(|source| MemoryError::Populate { size: self.size, source })?;
        }
        self.populated.store(true, Ordering::Release);
        Ok(())
    }

    /// Every page is there; none is taken away again.
    pub fn is_populated(&self) -> bool {
        self.populated.load(Ordering::Acquire)
    }

    /// Writes through the file, not through a mapping: for memory that has none yet. A store into a page that does not
    /// exist costs a fault and a page of zeroes before the first byte; the file takes whole pages without either, and a
    /// machine that is out of memory is an error instead of a signal. Neither mapping's dirt source sees it. The page
    /// tables stay empty: the first access to each page through a mapping then costs a minor fault.
    pub fn write_fresh(&self, ram_offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let length = data.len() as u64;
        if ram_offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(MemoryError::OutsideRam { ram_offset, length, size: self.size });
        }
        write_at(&self.fd, ram_offset, data).map_err(|source| MemoryError::Write { ram_offset, length, source })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: MEM-36
    #[test]
    fn fresh_writes_are_seen_by_both_mappings_and_never_pass_the_end() {
        let size = 4 * PAGE_SIZE;
        let ram = GuestRam::new(size).unwrap();
        let page: Vec<u8> = (0..PAGE_SIZE).map(|at| (at % 251) as u8 + 1).collect();
        ram.write_fresh(3 * PAGE_SIZE, &page).unwrap();
        for mapping in [ram.mapping(), ram.dma_mapping()] {
            let mut all = vec![0xff; size as usize];
            mapping.read(0, &mut all).unwrap();
            assert!(all[..3 * PAGE_SIZE as usize].iter().all(|byte| *byte == 0));
            assert_eq!(all[3 * PAGE_SIZE as usize..], page);
        }
        let at = size - PAGE_SIZE;
        for (offset, fits) in [(at - 1, true), (at, true), (at + 1, false), (size, false), (u64::MAX, false)] {
            let before = rustix::fs::fstat(ram.fd()).unwrap().st_size;
            match ram.write_fresh(offset, &page) {
                Ok(()) => assert!(fits, "{offset:#x}"),
                Err(MemoryError::OutsideRam { ram_offset, length, .. }) => {
                    assert_eq!((fits, ram_offset, length), (false, offset, PAGE_SIZE));
                }
                Err(error) => panic!("{error}"),
            }
            assert_eq!(rustix::fs::fstat(ram.fd()).unwrap().st_size, before);
        }
        ram.write_fresh(size, &[]).unwrap();
    }

    /// spec: MEM-37
    #[test]
    fn populating_keeps_contents_and_is_complete_or_not_said_to_be() {
        let size = POPULATE_STEP + PAGE_SIZE;
        let ram = GuestRam::new(size).unwrap();
        ram.write_fresh(PAGE_SIZE, &[7; 3]).unwrap();
        let mut asked = 0;
        ram.populate(|| {
            asked += 1;
            asked == 2
        })
        .unwrap();
        assert!(!ram.is_populated(), "it was stopped after the first step");
        ram.populate(|| false).unwrap();
        assert!(ram.is_populated());
        assert_eq!(rustix::fs::fstat(ram.fd()).unwrap().st_blocks * 512, size as i64);
        let mut all = vec![0xff; size as usize];
        ram.mapping().read(0, &mut all).unwrap();
        assert!(all.iter().enumerate().all(|(at, byte)| *byte == if (4096..4099).contains(&at) { 7 } else { 0 }));
    }

    #[test]
    fn a_fresh_write_uses_up_its_own_pages_only() {
        let ram = GuestRam::new(64 * PAGE_SIZE).unwrap();
        ram.write_fresh(7 * PAGE_SIZE, &vec![1; 2 * PAGE_SIZE as usize]).unwrap();
        assert_eq!(rustix::fs::fstat(ram.fd()).unwrap().st_blocks * 512, 2 * PAGE_SIZE as i64);
    }
}
