//! `PAGEMAP_SCAN` on this process: which pages of a mapping were written since they were last write-protected.
//!
//! Source: `linux/fs.h` (`struct pm_scan_arg`), Linux 6.7.

use std::fs::File;
use std::io;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::Mapping;

const PAGE_IS_WPALLOWED: u64 = 1 << 0;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `struct page_region`: addresses `start .. end`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanArg>(b'f', 16);
/// Runs per system call.
const REGIONS: usize = 512;

struct Scan<'a>(&'a mut ScanArg);

// SAFETY: the opcode is that of `ScanArg`, which outlives the call; the kernel writes `walk_end` and at most `vec_len`
// entries at `vec`, which `take_written` points at an array of that length that outlives the call too.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::from_mut(self.0).cast()
    }

    // SAFETY: reads only the call's result, the number of regions, never the pointer.
    unsafe fn output_from_ptr(regions: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<usize> {
        usize::try_from(regions).map_err(|_| rustix::io::Errno::OVERFLOW)
    }
}

/// This process's page map.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    pub fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")? })
    }

    /// Reports every run of written pages of `mapping` as (byte offset, bytes), write-protecting them again in the same
    /// step of the kernel. `report` is called before the next part is read, since the reading destroys. EPERM when the
    /// mapping is not registered for asynchronous write-protection.
    pub fn take_written(&self, mapping: &Mapping, mut report: impl FnMut(u64, u64)) -> io::Result<()> {
        let base = mapping.address();
        let end = base + mapping.len();
        let mut regions = [PageRegion::default(); REGIONS];
        let mut start = base;
        while start < end {
            let mut scan = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                start,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_mask: PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN,
                return_mask: PAGE_IS_WRITTEN,
                ..ScanArg::default()
            };
            // SAFETY: `Scan`'s own contract; `regions` has `REGIONS` entries and is not otherwise used meanwhile.
            let count = unsafe { ioctl(&self.file, Scan(&mut scan)) }?;
            for region in regions.get(..count).ok_or(io::ErrorKind::InvalidData)? {
                report(region.start - base, region.end - region.start);
            }
            // The kernel promises progress; a walk that stands still would be an endless loop here.
            if scan.walk_end <= start {
                return Err(io::ErrorKind::InvalidData.into());
            }
            start = scan.walk_end;
        }
        Ok(())
    }
}

/// A read(2) whose buffer is the mapping, so that the kernel is the writer.
#[cfg(all(test, not(loom)))]
pub(crate) fn read_into(
    fd: impl std::os::fd::AsFd,
    mapping: &Mapping,
    offset: u64,
    length: usize,
) -> io::Result<usize> {
    assert!(offset + length as u64 <= mapping.len());
    let pointer = (mapping.address() + offset) as *mut std::mem::MaybeUninit<u8>;
    // SAFETY: inside a live, writable mapping; the tests that call this touch these bytes from no other thread meanwhile.
    let buffer = unsafe { std::slice::from_raw_parts_mut(pointer, length) };
    let (read, _) = rustix::io::read(fd, buffer)?;
    Ok(read.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_is_that_of_the_uapi() {
        assert_eq!(PAGEMAP_SCAN, 0xC060_6610);
    }
}
