//! Shared memory in this process: guest RAM, device regions, scratch.
//!
//! A [`Mapping`] is only ever read and written through raw pointers, since a guest, a device or another process may
//! write it at any time: no Rust reference to its bytes exists.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::io::Errno;

/// A shared mapping of known length. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    map: MmapRaw,
}

/// An access outside the mapping, or a mapping that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    #[error("{length} bytes at {offset:#x} lie outside a mapping of {size} bytes")]
    OutOfBounds { offset: u64, length: u64, size: u64 },
    #[error("{length} bytes at {offset:#x} are not aligned to their size")]
    Misaligned { offset: u64, length: u64 },
    #[error("mapping {length} bytes at file offset {offset:#x}")]
    Map { offset: u64, length: u64, source: std::io::Error },
    /// Its file has been cut off, or has no memory for it
    #[error("{length} bytes at {offset:#x} are not there any more: {errno}")]
    Gone { offset: u64, length: u64, errno: Errno },
    #[error("the client refused {length} bytes at {iova:#x}: {errno}")]
    Client { iova: u64, length: u64, errno: Errno },
}

impl Mapping {
    /// Maps `length` bytes of `fd` at `offset`, shared, for reading and writing.
    pub fn new(fd: impl AsFd, offset: u64, length: u64) -> Result<Self, MappingError> {
        Self::map(fd, offset, length, |options, fd| options.map_raw(fd))
    }

    /// As [`Self::new`], for reading only: a store through it would be a signal. [`Self::kernel_write`] fails instead.
    pub fn read_only(fd: impl AsFd, offset: u64, length: u64) -> Result<Self, MappingError> {
        Self::map(fd, offset, length, |options, fd| options.map_raw_read_only(fd))
    }

    fn map(
        fd: impl AsFd,
        offset: u64,
        length: u64,
        map: impl FnOnce(&MmapOptions, RawFd) -> std::io::Result<MmapRaw>,
    ) -> Result<Self, MappingError> {
        let fail = |source| MappingError::Map { offset, length, source };
        let size = usize::try_from(length).map_err(|_| fail(std::io::ErrorKind::OutOfMemory.into()))?;
        if size == 0 {
            return Err(fail(std::io::ErrorKind::InvalidInput.into()));
        }
        // The length is always given: a character device without one maps zero bytes and reports success.
        let raw_fd = std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd());
        let map = map(MmapOptions::new().len(size).offset(offset), raw_fd).map_err(fail)?;
        Ok(Self { map })
    }

    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// The first byte's address in this process, for system calls that take one (DMA map, PAGEMAP_SCAN).
    pub fn address(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    /// The first page, and the size in whole pages. A mapping of a file begins on a page.
    pub(super) fn range(&self) -> (NonNull<u8>, usize) {
        let start = NonNull::new(self.map.as_mut_ptr()).unwrap_or(NonNull::dangling());
        (start, self.map.len().next_multiple_of(rustix::param::page_size()))
    }

    /// As [`Self::range`]; whoever gets it unmaps it.
    pub(super) fn into_range(self) -> (NonNull<u8>, usize) {
        ManuallyDrop::new(self).range()
    }

    /// Where `offset` is, if `length` bytes from there lie inside.
    fn at(&self, offset: u64, length: u64) -> Result<*mut u8, MappingError> {
        let size = self.len();
        match offset.checked_add(length) {
            // SAFETY: `offset <= size`, the mapping's length, so the pointer stays within it or one past its end.
            Some(end) if end <= size => Ok(unsafe { self.map.as_mut_ptr().add(offset as usize) }),
            _ => Err(MappingError::OutOfBounds { offset, length, size }),
        }
    }

    /// Copies out. The bytes may be torn if somebody writes them meanwhile; they are never undefined for *us*, since the
    /// copy's source is not a Rust object.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), MappingError> {
        let source = self.at(offset, data.len() as u64)?;
        // SAFETY: `at` checked the source's bounds; `data` is ours and cannot overlap a mapping nobody has references to.
        unsafe { std::ptr::copy_nonoverlapping(source, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    /// Copies in.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), MappingError> {
        let target = self.at(offset, data.len() as u64)?;
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len()) };
        Ok(())
    }

    /// As [`Self::read`], by the kernel: where the file has been cut off, or has no memory, it is an error and no signal. It
    /// costs a system call; on an error part of the bytes may have been copied.
    pub fn kernel_read(&self, offset: u64, data: &mut [u8]) -> Result<(), MappingError> {
        let length = data.len();
        let remote = self.at(offset, length as u64)?;
        let local = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: length };
        let remote = libc::iovec { iov_base: remote.cast(), iov_len: length };
        // SAFETY: the local side is `data`, which is ours for the call. The other is inside the mapping (`at`), only read, and
        // no page of it that is missing is touched by anybody but the kernel.
        let copied = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        Self::copied(offset, length, copied)
    }

    /// As [`Self::write`], by the kernel; see [`Self::kernel_read`].
    pub fn kernel_write(&self, offset: u64, data: &[u8]) -> Result<(), MappingError> {
        let length = data.len();
        let remote = self.at(offset, length as u64)?;
        let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: length };
        let remote = libc::iovec { iov_base: remote.cast(), iov_len: length };
        // SAFETY: the local side is `data`, which is only read. The other is inside the mapping (`at`), of which no Rust
        // reference exists; the kernel refuses (EFAULT) what is not there or may not be written.
        let copied = unsafe { libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        Self::copied(offset, length, copied)
    }

    fn copied(offset: u64, length: usize, copied: isize) -> Result<(), MappingError> {
        let errno = match usize::try_from(copied) {
            Ok(copied) if copied == length => return Ok(()),
            // The rest is not there.
            Ok(_) => Errno::FAULT,
            Err(_) => Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::FAULT),
        };
        Err(MappingError::Gone { offset, length: length as u64, errno })
    }

    /// Reads what `fd` has, at most `length` bytes, straight into the mapping, as `read(2)`: 0 is the end.
    pub fn read_from(&self, fd: impl AsFd, offset: u64, length: u64) -> std::io::Result<u64> {
        let target = self.at(offset, length).map_err(std::io::Error::other)?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd());
        // SAFETY: `at` checked the bounds; the kernel writes them, and nobody holds a reference to a mapping's bytes.
        let count = unsafe { libc::read(fd, target.cast(), length as usize) };
        u64::try_from(count).map_err(|_| std::io::Error::last_os_error())
    }

    /// Makes every page of a range present and writable, so that no access of it faults; contents stay. It may take
    /// about a second for each GiB that has never been written (Linux 5.14).
    pub fn populate(&self, offset: u64, length: u64) -> std::io::Result<()> {
        self.at(offset, length).map_err(std::io::Error::other)?;
        self.map.advise_range(memmap2::Advice::PopulateWrite, offset as usize, length as usize)
    }

    /// Sets `length` bytes to `value`.
    pub fn fill(&self, offset: u64, length: u64, value: u8) -> Result<(), MappingError> {
        let target = self.at(offset, length)?;
        // SAFETY: `at` checked the bounds.
        unsafe { std::ptr::write_bytes(target, value, length as usize) };
        Ok(())
    }

    fn aligned(&self, offset: u64, length: u64) -> Result<*mut u8, MappingError> {
        let pointer = self.at(offset, length)?;
        if !(pointer as u64).is_multiple_of(length) {
            return Err(MappingError::Misaligned { offset, length });
        }
        Ok(pointer)
    }

    /// One 32-bit load, as a register access.
    pub fn load_u32(&self, offset: u64, order: Ordering) -> Result<u32, MappingError> {
        let pointer = self.aligned(offset, 4)?;
        // SAFETY: in bounds and aligned; an atomic may be shared with any other accessor of the same width.
        Ok(unsafe { AtomicU32::from_ptr(pointer.cast()) }.load(order))
    }

    pub fn store_u32(&self, offset: u64, value: u32, order: Ordering) -> Result<(), MappingError> {
        let pointer = self.aligned(offset, 4)?;
        // SAFETY: as in `load_u32`.
        unsafe { AtomicU32::from_ptr(pointer.cast()) }.store(value, order);
        Ok(())
    }

    pub fn load_u64(&self, offset: u64, order: Ordering) -> Result<u64, MappingError> {
        let pointer = self.aligned(offset, 8)?;
        // SAFETY: as in `load_u32`.
        Ok(unsafe { AtomicU64::from_ptr(pointer.cast()) }.load(order))
    }

    pub fn store_u64(&self, offset: u64, value: u64, order: Ordering) -> Result<(), MappingError> {
        let pointer = self.aligned(offset, 8)?;
        // SAFETY: as in `load_u32`.
        unsafe { AtomicU64::from_ptr(pointer.cast()) }.store(value, order);
        Ok(())
    }
}
