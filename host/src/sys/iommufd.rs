//! The calls of `linux/iommufd.h` that the host uses. Its structures are written out here: they have no bindings crate.

use std::os::fd::BorrowedFd;

use rustix::io::{self, Errno};

use super::ioctl::with_pointer;

const DESTROY: u8 = 0x80;
const IOAS_ALLOC: u8 = 0x81;
const IOAS_IOVA_RANGES: u8 = 0x84;
const IOAS_MAP: u8 = 0x85;
const IOAS_UNMAP: u8 = 0x86;
const HWPT_ALLOC: u8 = 0x89;
const GET_HW_INFO: u8 = 0x8a;

const MAP_FIXED_IOVA: u32 = 1 << 0;
const MAP_WRITEABLE: u32 = 1 << 1;
const MAP_READABLE: u32 = 1 << 2;
const HWPT_ALLOC_DIRTY_TRACKING: u32 = 1 << 1;
/// `IOMMU_HW_CAP_DIRTY_TRACKING`.
pub const HW_CAP_DIRTY_TRACKING: u64 = 1 << 0;

/// The most ranges that are taken from the kernel.
const IOVA_RANGES_MAX: u32 = 4096;

#[repr(C)]
struct Destroy {
    size: u32,
    id: u32,
}

#[repr(C)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IovaRange {
    pub start: u64,
    /// inclusive
    pub last: u64,
}

#[repr(C)]
struct IoasIovaRanges {
    size: u32,
    ioas_id: u32,
    num_iovas: u32,
    reserved: u32,
    allowed_iovas: u64,
    out_iova_alignment: u64,
}

#[repr(C)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

#[repr(C)]
struct IoasUnmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct HwptAlloc {
    size: u32,
    flags: u32,
    dev_id: u32,
    pt_id: u32,
    out_hwpt_id: u32,
    reserved: u32,
    data_type: u32,
    data_len: u32,
    data_uptr: u64,
    fault_id: u32,
    reserved2: u32,
}

#[repr(C)]
#[derive(Default)]
struct HwInfo {
    size: u32,
    flags: u32,
    dev_id: u32,
    data_len: u32,
    data_uptr: u64,
    out_data_type: u32,
    out_max_pasid_log2: u8,
    reserved: [u8; 3],
    out_capabilities: u64,
}

const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}

/// A new I/O address space; returns its id.
pub fn ioas_alloc(iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut call = IoasAlloc { size: size_of_u32::<IoasAlloc>(), flags: 0, out_ioas_id: 0 };
    // SAFETY: the handler reads and writes `size` bytes of the structure.
    unsafe { with_pointer(iommufd, IOAS_ALLOC, &raw mut call) }?;
    Ok(call.out_ioas_id)
}

pub fn destroy(iommufd: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    let mut call = Destroy { size: size_of_u32::<Destroy>(), id };
    // SAFETY: the handler reads `size` bytes of the structure.
    unsafe { with_pointer(iommufd, DESTROY, &raw mut call) }.map(drop)
}

/// What may be mapped, given the devices attached now.
pub fn ioas_iova_ranges(iommufd: BorrowedFd<'_>, ioas_id: u32) -> io::Result<Vec<IovaRange>> {
    let mut ranges = vec![IovaRange::default(); 16];
    // Twice suffices unless a device is attached between the calls.
    for _ in 0..4 {
        let mut call = IoasIovaRanges {
            size: size_of_u32::<IoasIovaRanges>(),
            ioas_id,
            num_iovas: ranges.len() as u32,
            reserved: 0,
            allowed_iovas: ranges.as_mut_ptr() as u64,
            out_iova_alignment: 0,
        };
        // SAFETY: the handler writes at most num_iovas ranges, and as many are there.
        match unsafe { with_pointer(iommufd, IOAS_IOVA_RANGES, &raw mut call) } {
            Ok(_) if call.num_iovas as usize <= ranges.len() => {
                ranges.truncate(call.num_iovas as usize);
                return Ok(ranges);
            }
            Ok(_) => return Err(Errno::OVERFLOW),
            Err(Errno::MSGSIZE) if call.num_iovas <= IOVA_RANGES_MAX => {
                ranges.resize(call.num_iovas as usize, IovaRange::default());
            }
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::AGAIN)
}

/// # Safety
/// `user_va .. user_va + length` is memory that nothing but system calls, raw pointers and devices touches, and it stays
/// mapped until [`ioas_unmap`] has returned: a device with an emulated IOMMU pins by address, and late.
pub(super) unsafe fn ioas_map(
    iommufd: BorrowedFd<'_>,
    ioas_id: u32,
    user_va: u64,
    length: u64,
    iova: u64,
    (read, write): (bool, bool),
) -> io::Result<()> {
    let flags = MAP_FIXED_IOVA | if read { MAP_READABLE } else { 0 } | if write { MAP_WRITEABLE } else { 0 };
    let mut call = IoasMap { size: size_of_u32::<IoasMap>(), flags, ioas_id, reserved: 0, user_va, length, iova };
    // SAFETY: the handler reads the structure; the memory is the caller's promise.
    unsafe { with_pointer(iommufd, IOAS_MAP, &raw mut call) }.map(drop)
}

/// Unmaps exactly one earlier map.
pub(super) fn ioas_unmap(iommufd: BorrowedFd<'_>, ioas_id: u32, iova: u64, length: u64) -> io::Result<()> {
    let mut call = IoasUnmap { size: size_of_u32::<IoasUnmap>(), ioas_id, iova, length };
    // SAFETY: the handler reads and writes `size` bytes of the structure.
    unsafe { with_pointer(iommufd, IOAS_UNMAP, &raw mut call) }?;
    if call.length == length { Ok(()) } else { Err(Errno::INVAL) }
}

/// `IOMMU_HW_CAP_*` of the IOMMU in front of a bound device.
pub fn hw_capabilities(iommufd: BorrowedFd<'_>, dev_id: u32) -> io::Result<u64> {
    let mut call = HwInfo { size: size_of_u32::<HwInfo>(), dev_id, ..Default::default() };
    // SAFETY: the handler writes `size` bytes of the structure, and no data, since data_len is 0.
    unsafe { with_pointer(iommufd, GET_HW_INFO, &raw mut call) }?;
    Ok(call.out_capabilities)
}

/// Whether a page table with dirty tracking can be had for the device: allocates one and destroys it.
pub fn probe_dirty_tracking(iommufd: BorrowedFd<'_>, dev_id: u32, ioas_id: u32) -> io::Result<()> {
    let mut call = HwptAlloc {
        size: size_of_u32::<HwptAlloc>(),
        flags: HWPT_ALLOC_DIRTY_TRACKING,
        dev_id,
        pt_id: ioas_id,
        ..Default::default()
    };
    // SAFETY: the handler reads and writes `size` bytes of the structure, and no data, since data_len is 0.
    unsafe { with_pointer(iommufd, HWPT_ALLOC, &raw mut call) }?;
    destroy(iommufd, call.out_hwpt_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes are part of each call; taken from `linux/iommufd.h`.
    #[test]
    fn structures_have_the_uapi_s_sizes() {
        assert_eq!(size_of::<Destroy>(), 8);
        assert_eq!(size_of::<IoasAlloc>(), 12);
        assert_eq!(size_of::<IoasIovaRanges>(), 32);
        assert_eq!(size_of::<IoasMap>(), 40);
        assert_eq!(size_of::<IoasUnmap>(), 24);
        assert_eq!(size_of::<HwptAlloc>(), 48);
        assert_eq!(size_of::<HwInfo>(), 40);
    }
}
