//! VFIO groups and devices: each ioctl of `linux/vfio.h` that the host uses, with its types. Containers and iommufds are
//! in `iospace`.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{self, Errno};
use vfio_bindings::bindings::vfio::*;

use super::ioctl::{with_pointer, with_value};

const GROUP_GET_STATUS: u8 = VFIO_BASE as u8 + 3;
const GROUP_SET_CONTAINER: u8 = VFIO_BASE as u8 + 4;
const GROUP_GET_DEVICE_FD: u8 = VFIO_BASE as u8 + 6;
const DEVICE_GET_INFO: u8 = VFIO_BASE as u8 + 7;
const DEVICE_GET_REGION_INFO: u8 = VFIO_BASE as u8 + 8;
const DEVICE_GET_IRQ_INFO: u8 = VFIO_BASE as u8 + 9;
const DEVICE_SET_IRQS: u8 = VFIO_BASE as u8 + 10;
const DEVICE_RESET: u8 = VFIO_BASE as u8 + 11;
const DEVICE_FEATURE: u8 = VFIO_BASE as u8 + 17;
const DEVICE_BIND_IOMMUFD: u8 = VFIO_BASE as u8 + 18;
const DEVICE_ATTACH_IOMMUFD_PT: u8 = VFIO_BASE as u8 + 19;
const MIG_GET_PRECOPY_INFO: u8 = VFIO_BASE as u8 + 21;

/// The longest answer with capabilities that is taken from the kernel.
pub const INFO_BYTES_MAX: u32 = 64 << 10;

const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}

// ---- groups -------------------------------------------------------------------------------------------------------

/// `VFIO_GROUP_FLAGS_*`.
pub fn group_status(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = vfio_group_status { argsz: size_of_u32::<vfio_group_status>(), flags: 0 };
    // SAFETY: the handler writes a vfio_group_status.
    unsafe { with_pointer(group, GROUP_GET_STATUS, &raw mut status) }?;
    Ok(status.flags)
}

pub fn group_set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let mut fd: i32 = container.as_raw_fd();
    // SAFETY: the handler reads an i32; it takes its own reference to the container.
    unsafe { with_pointer(group, GROUP_SET_CONTAINER, &raw mut fd) }.map(drop)
}

/// `name` is the device's name, for PCI perhaps followed by ` vf_token=UUID`.
pub fn group_device_fd(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the handler reads a string up to its terminator.
    let raw = unsafe { with_pointer(group, GROUP_GET_DEVICE_FD, name.as_ptr().cast_mut()) }?;
    // SAFETY: the call succeeded, so this is a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

// ---- opening by cdev ----------------------------------------------------------------------------------------------

/// Binds a device's cdev to an iommufd; returns the device's id there. Until then every other call on it fails.
pub fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>, token: Option<&[u8; 16]>) -> io::Result<u32> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of_u32::<vfio_device_bind_iommufd>(),
        flags: 0,
        iommufd: iommufd.as_raw_fd(),
        out_devid: 0,
        token_uuid_ptr: 0,
    };
    match token {
        Some(token) => {
            bind.flags = VFIO_DEVICE_BIND_FLAG_TOKEN;
            bind.token_uuid_ptr = token.as_ptr() as u64;
        }
        // Kernels before the token know a shorter structure; the first 16 bytes mean the same in both.
        None => bind.argsz = 16,
    }
    // SAFETY: the handler reads and writes argsz bytes of the structure, and 16 bytes of the token while `token` is borrowed.
    unsafe { with_pointer(device, DEVICE_BIND_IOMMUFD, &raw mut bind) }?;
    Ok(bind.out_devid)
}

/// Attaches a bound device to an IOAS or page table; returns the id of the page table in use.
pub fn attach_iommufd_pt(device: BorrowedFd<'_>, pt_id: u32) -> io::Result<u32> {
    // Without the PASID field, which older kernels do not know.
    let mut attach = vfio_device_attach_iommufd_pt { argsz: 12, flags: 0, pt_id, pasid: 0 };
    // SAFETY: the handler reads and writes argsz bytes of the structure.
    unsafe { with_pointer(device, DEVICE_ATTACH_IOMMUFD_PT, &raw mut attach) }?;
    Ok(attach.pt_id)
}

// ---- devices ------------------------------------------------------------------------------------------------------

pub fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info { argsz: size_of_u32::<vfio_device_info>(), ..Default::default() };
    // SAFETY: the handler writes at most argsz bytes of the structure.
    unsafe { with_pointer(device, DEVICE_GET_INFO, &raw mut info) }?;
    Ok(info)
}

/// One region, and the whole answer as bytes with the capability chain behind the structure (`cap_offset` counts from
/// the first byte).
pub fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<(vfio_region_info, Vec<u8>)> {
    let header = |argsz| vfio_region_info { argsz, index, ..Default::default() };
    with_chain(device, DEVICE_GET_REGION_INFO, header, |info| info.argsz)
}

/// Asks with a growing buffer until the kernel's `argsz` fits. EMSGSIZE beyond [`INFO_BYTES_MAX`].
pub(super) fn with_chain<T: Copy>(
    fd: BorrowedFd<'_>,
    number: u8,
    header: impl Fn(u32) -> T,
    argsz: impl Fn(&T) -> u32,
) -> io::Result<(T, Vec<u8>)> {
    let mut size = size_of_u32::<T>();
    // Twice suffices unless the answer grows between the calls.
    for _ in 0..4 {
        // Words, so that the structure is aligned.
        let mut words = vec![0u64; (size as usize).div_ceil(8)];
        let start: *mut T = words.as_mut_ptr().cast();
        // SAFETY: `words` holds at least size_of::<T>() bytes, aligned to 8, which no VFIO structure exceeds.
        unsafe { start.write(header(size)) };
        // SAFETY: the handler writes at most argsz = size bytes, and as many are there.
        unsafe { with_pointer(fd, number, start) }?;
        // SAFETY: written above, and any bit pattern is a valid T (integers only).
        let answer = unsafe { start.read() };
        match argsz(&answer) {
            needed if needed <= size => {
                let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                bytes.truncate(size as usize);
                return Ok((answer, bytes));
            }
            needed if needed > INFO_BYTES_MAX => return Err(Errno::MSGSIZE),
            needed => size = needed,
        }
    }
    Err(Errno::AGAIN)
}

pub fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<vfio_irq_info> {
    let mut info = vfio_irq_info { argsz: size_of_u32::<vfio_irq_info>(), flags: 0, index, count: 0 };
    // SAFETY: the handler writes at most argsz bytes of the structure.
    unsafe { with_pointer(device, DEVICE_GET_IRQ_INFO, &raw mut info) }?;
    Ok(info)
}

/// `VFIO_DEVICE_SET_IRQS` with `data` behind the header: nothing, `count` bytes, or `count` native 32-bit eventfds.
/// The kernel checks the data's length against `count` and takes its own references to eventfds.
pub fn set_irqs(device: BorrowedFd<'_>, flags: u32, index: u32, start: u32, count: u32, data: &[u8]) -> io::Result<()> {
    let argsz = size_of::<vfio_irq_set>() + data.len();
    let mut words = Vec::with_capacity(argsz.div_ceil(4));
    words.extend([u32::try_from(argsz).map_err(|_| Errno::INVAL)?, flags, index, start, count]);
    words.extend(data.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    }));
    // SAFETY: the handler reads argsz bytes, and `words` has as many.
    unsafe { with_pointer(device, DEVICE_SET_IRQS, words.as_mut_ptr()) }.map(drop)
}

pub fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the handler takes no argument.
    unsafe { with_value(device, DEVICE_RESET, 0) }.map(drop)
}

// ---- features -----------------------------------------------------------------------------------------------------

/// `struct vfio_device_feature` with its data. Only for `T` of alignment up to 8 and plain integers.
#[repr(C)]
struct FeatureCall<T> {
    argsz: u32,
    flags: u32,
    data: T,
}

/// # Safety
/// `T` is what this feature reads and writes, and pointers inside are valid for it.
unsafe fn feature<T>(device: BorrowedFd<'_>, flags: u32, data: T) -> io::Result<T> {
    let mut call = FeatureCall { argsz: size_of_u32::<FeatureCall<T>>(), flags, data };
    // SAFETY: argsz is the structure's size; the rest is the caller's promise.
    unsafe { with_pointer(device, DEVICE_FEATURE, &raw mut call) }?;
    Ok(call.data)
}

/// Whether the device has the feature for the access in `flags` (`VFIO_DEVICE_FEATURE_GET`, `SET` or both).
pub fn feature_probe(device: BorrowedFd<'_>, number: u32, flags: u32) -> io::Result<()> {
    // SAFETY: PROBE reads and writes no data.
    unsafe { feature(device, number | flags | VFIO_DEVICE_FEATURE_PROBE, ()) }
}

/// Allows the device to be suspended; with an eventfd, until the first resume, which signals it. The kernel takes its own
/// reference to the eventfd.
pub fn low_power_entry(device: BorrowedFd<'_>, wakeup: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(wakeup) = wakeup else {
        // SAFETY: the feature has no data.
        return unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, ()) };
    };
    let data = vfio_device_low_power_entry_with_wakeup { wakeup_eventfd: wakeup.as_raw_fd(), reserved: 0 };
    // SAFETY: the feature's own structure.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, data) }
        .map(drop)
}

/// Resumes the device, and keeps it so.
pub fn low_power_exit(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the feature has no data.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, ()) }
}

/// `VFIO_MIGRATION_*` bits.
pub fn migration_flags(device: BorrowedFd<'_>) -> io::Result<u64> {
    let data = vfio_device_feature_migration::default();
    // SAFETY: the feature's own structure.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIGRATION, data) }.map(|data| data.flags)
}

pub fn migration_state(device: BorrowedFd<'_>) -> io::Result<u32> {
    let data = vfio_device_feature_mig_state { device_state: 0, data_fd: -1 };
    // SAFETY: the feature's own structure.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, data) }
        .map(|data| data.device_state)
}

/// Asks for a state; returns the data stream if the path opened one.
pub fn migration_set_state(device: BorrowedFd<'_>, device_state: u32) -> io::Result<Option<OwnedFd>> {
    let data = vfio_device_feature_mig_state { device_state, data_fd: -1 };
    // SAFETY: the feature's own structure.
    let data = unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, data) }?;
    // SAFETY: the call succeeded, so a number that is not negative is a new fd that nobody else owns.
    Ok((data.data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(data.data_fd) }))
}

pub fn migration_data_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    let data = vfio_device_feature_mig_data_size::default();
    // SAFETY: the feature's own structure.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, data) }
        .map(|data| data.stop_copy_length)
}

/// Opts in to `VFIO_PRECOPY_INFO_REINIT`.
pub fn precopy_info_v2(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the feature has no data.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, ()) }
}

/// On the migration's data stream, not on the device.
pub fn precopy_info(stream: BorrowedFd<'_>) -> io::Result<vfio_precopy_info> {
    let mut info = vfio_precopy_info { argsz: size_of_u32::<vfio_precopy_info>(), ..Default::default() };
    // SAFETY: the handler writes at most argsz bytes of the structure.
    unsafe { with_pointer(stream, MIG_GET_PRECOPY_INFO, &raw mut info) }?;
    Ok(info)
}

/// Starts DMA logging; returns the page size that the driver granted.
pub fn dma_logging_start(
    device: BorrowedFd<'_>,
    ranges: &[vfio_device_feature_dma_logging_range],
    page_size: u64,
) -> io::Result<u64> {
    let data = vfio_device_feature_dma_logging_control {
        page_size,
        num_ranges: u32::try_from(ranges.len()).map_err(|_| Errno::TOOBIG)?,
        __reserved: 0,
        ranges: ranges.as_ptr() as u64,
    };
    // SAFETY: the feature's own structure; the handler reads num_ranges entries while `ranges` is borrowed.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START, data) }
        .map(|data| data.page_size)
}

pub fn dma_logging_stop(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the feature has no data.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, ()) }
}

/// Sets the bits of dirty pages. EINVAL when `bitmap` is too short for the range.
pub fn dma_logging_report(
    device: BorrowedFd<'_>,
    iova: u64,
    length: u64,
    page_size: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    let pages = length.checked_next_multiple_of(page_size).ok_or(Errno::INVAL)?.checked_div(page_size);
    if pages.ok_or(Errno::INVAL)?.div_ceil(64) > bitmap.len() as u64 {
        return Err(Errno::INVAL);
    }
    let data = vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap: bitmap.as_mut_ptr() as u64 };
    // SAFETY: the feature's own structure; the handler sets bits of `pages` pages, and the bitmap has as many.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, data) }.map(drop)
}

/// As a PF's owner: the token that openers of its VFs must present.
pub fn set_vf_token(device: BorrowedFd<'_>, token: [u8; 16]) -> io::Result<()> {
    // SAFETY: the feature reads 16 bytes.
    unsafe { feature(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, token) }.map(drop)
}
