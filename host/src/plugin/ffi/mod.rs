//! The boundary itself: the only `unsafe` code of the plug-in layer.
//!
//! **Owns** reading the ABI's structures out of a library, the C table of host services, and the calls. Each structure is
//! copied into a flat one of the host's, up to the smaller of both sizes, and its contents checked, before any of it is
//! used. **Must never** hand a plug-in a pointer that outlives the call, or take a length from one unchecked.
//!
//! Trust: a *loaded* plug-in can do anything in this process. The checks here turn a careless plug-in into an error
//! message; they cannot contain a hostile one.
#![allow(unsafe_code)]

mod device;
mod library;
mod log;
mod operations;
mod services;

pub use device::OpenDevice;
pub(super) use device::{Globals, open_device};
pub use library::Library;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;

/// A status as the ABI has it: 0 or `-errno`. Anything else is the plug-in's fault, and EPROTO.
fn status(code: i32) -> Result<(), Errno> {
    if code == 0 { Ok(()) } else { Err(errno(code, Errno::PROTO)) }
}

/// The errno of a negative answer; `otherwise` for numbers that are none.
fn errno(code: i32, otherwise: Errno) -> Errno {
    match code.checked_neg() {
        Some(number) if (1..4096).contains(&number) => Errno::from_raw_os_error(number),
        _ => otherwise,
    }
}

/// Copies a structure that begins with its size: the smaller of what the other side has and what we know.
///
/// # Safety
/// `source` is null, or readable for the `struct_size` bytes that its first field tells, and `T` is a plain structure
/// of the ABI for which zeroed bytes are valid and whose first field is that `u32`.
unsafe fn copy_sized<T: Copy>(source: *const T, what: &str) -> Result<T, String> {
    if source.is_null() {
        return Err(format!("{what} is null"));
    }
    if !source.is_aligned() {
        return Err(format!("{what} is misaligned"));
    }
    // SAFETY: readable, by the caller: every such structure begins with its size.
    let size = unsafe { source.cast::<u32>().read() } as usize;
    if size < size_of::<u32>() || size > 4096 {
        return Err(format!("{what} says that it has {size} bytes"));
    }
    let mut copy = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: both sides are readable or writable for the smaller size; zeroed bytes are valid for `T`, by the caller.
    unsafe {
        std::ptr::copy_nonoverlapping(source.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), size.min(size_of::<T>()));
        Ok(copy.assume_init())
    }
}

/// As [`copy_sized`], for a structure that comes in an array or is written back: version 1 of each is frozen, and another
/// size would mean that the next entry is not where we look for it, or that we write past the end.
///
/// # Safety
/// As for [`copy_sized`].
unsafe fn copy_whole<T: Copy>(source: *const T, what: &str) -> Result<T, String> {
    if !source.is_null() && source.is_aligned() {
        // SAFETY: not null and aligned; readable, by the caller: every such structure begins with its size.
        let size = unsafe { source.cast::<u32>().read() } as usize;
        if size != size_of::<T>() {
            return Err(format!("{what} says that it has {size} bytes, not {}", size_of::<T>()));
        }
    }
    // SAFETY: by the caller.
    unsafe { copy_sized(source, what) }
}

/// Text that a plug-in published.
///
/// # Safety
/// `bytes` is readable as the ABI says, for as long as the call lasts.
unsafe fn text(bytes: abi::Bytes, what: &str, least: usize, most: usize) -> Result<String, String> {
    if bytes.len < least || bytes.len > most {
        return Err(format!("{what} has {} bytes, allowed are {least} to {most}", bytes.len));
    }
    if bytes.len == 0 {
        return Ok(String::new());
    }
    if bytes.ptr.is_null() {
        return Err(format!("{what} is null"));
    }
    // SAFETY: not null, and readable for its length by the caller; capped above.
    let raw = unsafe { std::slice::from_raw_parts(bytes.ptr, bytes.len) };
    std::str::from_utf8(raw).map(str::to_owned).map_err(|_| format!("{what} is not UTF-8"))
}

/// Entries of an array that a plug-in published; none for a count of 0.
///
/// # Safety
/// `first` is null or readable for `count` entries, for as long as the call lasts.
unsafe fn entries<'a, T>(first: *const T, count: usize, what: &str) -> Result<&'a [T], String> {
    if count == 0 {
        return Ok(&[]);
    }
    if count > super::tables::ENTRIES_MAX {
        return Err(format!("{count} {what}, more than {}", super::tables::ENTRIES_MAX));
    }
    if first.is_null() || !first.is_aligned() {
        return Err(format!("the list of {what} is null or misaligned"));
    }
    // SAFETY: not null, aligned, and readable for `count` entries by the caller.
    Ok(unsafe { std::slice::from_raw_parts(first, count) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: REG-15, ABI-STATUS
    #[test]
    fn numbers_that_are_no_errno_break_the_contract() {
        for code in [i32::MIN, -4096, 1, 2, i32::MAX] {
            assert_eq!(status(code), Err(Errno::PROTO), "{code}");
            assert_eq!(errno(code, Errno::IO), Errno::IO, "{code}");
        }
        assert_eq!(status(0), Ok(()));
        assert_eq!(status(-1), Err(Errno::PERM));
        assert_eq!(status(-4095), Err(Errno::from_raw_os_error(4095)));
    }

    /// spec: REG-16
    #[test]
    fn a_shorter_structure_is_filled_with_zeroes_and_a_longer_one_cut() {
        let short = abi::RegionHooks { struct_size: 8, reserved: 7, rw: None, region_info: None, mmap: None };
        // SAFETY: a whole structure, of which eight bytes are read.
        let copy = unsafe { copy_sized(&raw const short, "hooks") }.unwrap();
        assert_eq!((copy.struct_size, copy.reserved, copy.rw.is_none()), (8, 7, true));
        let whole = abi::RegionHooks { struct_size: size_of::<abi::RegionHooks>() as u32, ..short };
        // SAFETY: whole structures, of which the sizes that they tell are read.
        unsafe {
            copy_whole(&raw const whole, "hooks").unwrap();
            copy_whole(&raw const short, "hooks").unwrap_err();
            copy_whole(std::ptr::null::<abi::RegionHooks>(), "hooks").unwrap_err();
            copy_whole((&raw const whole).byte_add(1), "hooks").unwrap_err();
        }
        for size in [0, 3, 4097] {
            let wrong = abi::RegionHooks { struct_size: size, ..short };
            // SAFETY: as above; the size is refused before anything else is read.
            unsafe { copy_sized(&raw const wrong, "hooks") }.unwrap_err();
        }
    }
}
