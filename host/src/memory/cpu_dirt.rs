//! The CPU's own dirt: which pages of a mapping somebody in this process, or the kernel on its behalf, has written.
//!
//! A userfaultfd in asynchronous write-protect mode and `PAGEMAP_SCAN` (Linux 6.7). It sees writes through *this* mapping
//! and none through another mapping of the same memory or from another process; discarding pages (hole punching) is no
//! write either, so that who discards must mark. It needs no privilege where the kernel
//! lets users open a userfaultfd for user-mode faults, which is the default.

use std::sync::Arc;

use rustix::io::Errno;

use super::{DirtyLog, MemoryError, PAGE_SIZE};
use crate::sys::{AsyncWriteProtect, Mapping, Pagemap, Seal, memfd};

/// Why there is no CPU dirt; the text says what the machine lacks.
#[derive(Debug, thiserror::Error)]
pub enum CpuDirtError {
    #[error("no userfaultfd with asynchronous write-protection (Linux 6.7, CONFIG_PTE_MARKER_UFFD_WP)")]
    Userfaultfd(#[source] std::io::Error),
    #[error("the mapping cannot be registered for write-protection")]
    Register(#[source] std::io::Error),
    #[error("write-protecting the mapping")]
    Protect(#[source] std::io::Error),
    #[error("opening /proc/self/pagemap")]
    Pagemap(#[source] std::io::Error),
    #[error("PAGEMAP_SCAN (Linux 6.7)")]
    Scan(#[source] std::io::Error),
    #[error("making memory to try it on")]
    Probe(#[source] std::io::Error),
    #[error("the kernel accepted everything and missed a write")]
    Blind,
}

impl CpuDirtError {
    pub fn errno(&self) -> Errno {
        match self {
            Self::Userfaultfd(source)
            | Self::Register(source)
            | Self::Protect(source)
            | Self::Pagemap(source)
            | Self::Scan(source)
            | Self::Probe(source) => Errno::from_io_error(source).unwrap_or(Errno::IO),
            Self::Blind => Errno::NOTSUP,
        }
    }
}

/// CPU dirt of one mapping. Dropped, the kernel stops watching.
#[derive(Debug)]
pub struct CpuDirt {
    // Before `mapping`: the registration ends while the mapping still exists.
    protect: AsyncWriteProtect,
    pagemap: Pagemap,
    mapping: Arc<Mapping>,
}

impl CpuDirt {
    /// Watches a mapping, a whole number of pages long. EBUSY when another [`CpuDirt`] watches it.
    pub fn new(mapping: Arc<Mapping>) -> Result<Self, MemoryError> {
        if !mapping.len().is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Misaligned { iova: 0, length: mapping.len(), granule: PAGE_SIZE });
        }
        let pagemap = Pagemap::open().map_err(CpuDirtError::Pagemap)?;
        let protect = AsyncWriteProtect::open().map_err(CpuDirtError::Userfaultfd)?;
        protect.register(&mapping).map_err(CpuDirtError::Register)?;
        Ok(Self { protect, pagemap, mapping })
    }

    /// From now on writes count; what was written before does not.
    pub fn arm(&self) -> Result<(), MemoryError> {
        Ok(self.protect.protect(&self.mapping).map_err(CpuDirtError::Protect)?)
    }

    /// Moves the pages written since `arm` or the last `collect` into `log`, where the mapping begins at `first_page`. On
    /// an error the whole mapping is marked dirty. A log that is not tracking is refused before anything is read, since
    /// the reading destroys.
    pub fn collect(&self, log: &DirtyLog, first_page: u64) -> Result<(), MemoryError> {
        let pages = self.mapping.len() / PAGE_SIZE;
        if !log.is_tracking() {
            return Err(MemoryError::NotTracking);
        }
        if first_page.checked_add(pages).is_none_or(|end| end > log.pages()) {
            log.mark_pages(first_page, pages)?;
        }
        let mut placed = Ok(());
        let scanned = self.pagemap.take_written(&self.mapping, |offset, length| {
            let marked = log.mark_pages(first_page + offset / PAGE_SIZE, length / PAGE_SIZE);
            placed = std::mem::replace(&mut placed, Ok(())).and(marked);
        });
        let result = scanned.map_err(|source| CpuDirtError::Scan(source).into()).and(placed);
        if result.is_err() {
            log.mark_pages(first_page, pages)?;
        }
        result
    }

    /// Whether this machine gives CPU dirt to this user: tried on two pages, not guessed from a version.
    pub fn supported() -> Result<(), MemoryError> {
        let fd = memfd("cpu-dirt-probe", 2 * PAGE_SIZE, Seal::Size).map_err(CpuDirtError::Probe)?;
        let mapping = Arc::new(Mapping::new(&fd, 0, 2 * PAGE_SIZE)?);
        let dirt = Self::new(Arc::clone(&mapping))?;
        let log = DirtyLog::new(2);
        log.start();
        log.drain().commit();
        dirt.arm()?;
        mapping.fill(PAGE_SIZE, 1, 1)?;
        dirt.collect(&log, 0)?;
        let drain = log.drain();
        let seen = drain.words() == [0b10];
        drain.commit();
        if seen { Ok(()) } else { Err(CpuDirtError::Blind.into()) }
    }
}

#[cfg(all(test, not(loom)))]
#[path = "cpu_dirt_tests.rs"]
mod tests;
