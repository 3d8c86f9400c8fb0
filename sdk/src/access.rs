//! One access of a client, and a hook's answer to it.
#![allow(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;

use crate::abi;
use crate::{Errno, Result};

/// What becomes of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// The hook did it all: a read's data are the answer, a write reaches nobody else.
    Handled,
    /// The device's own behaviour follows, with the data as the hook left them.
    Forward,
    /// The access fails with this errno; nothing reaches the device.
    Deny(Errno),
}

impl Verdict {
    pub(crate) const fn status(self) -> i32 {
        match self {
            Self::Handled => abi::VERDICT_HANDLED,
            Self::Forward => abi::VERDICT_FORWARD,
            Self::Deny(errno) => errno.status(),
        }
    }
}

/// `Ok` is handled, an error denies.
impl From<Result<()>> for Verdict {
    fn from(result: Result<()>) -> Self {
        match result {
            Ok(()) => Self::Handled,
            Err(errno) => Self::Deny(errno),
        }
    }
}

/// One read or write of bytes inside one claim. Lives during the hook only.
pub struct Access<'a> {
    // A pointer, not a reference: the host reads and writes the same structure in `Context::default_rw`.
    raw: *mut abi::Access,
    call: PhantomData<&'a mut abi::Access>,
}

impl<'a> Access<'a> {
    /// EINVAL when the structure is shorter than version 1, empty, or has no data.
    ///
    /// # Safety
    /// `raw` points at an `abi::Access` that is exclusively the caller's during `'a`, and its `data` at `length` bytes that
    /// are too.
    pub unsafe fn from_raw(raw: *mut abi::Access) -> Result<Self> {
        // SAFETY: readable, by the caller.
        let (size, length, data) = unsafe { ((*raw).struct_size, (*raw).length, (*raw).data) };
        let valid = size as usize >= size_of::<abi::Access>() && length > 0 && isize::try_from(length).is_ok();
        if !valid || data.is_null() {
            return Err(Errno::EINVAL);
        }
        Ok(Self { raw, call: PhantomData })
    }

    fn raw(&self) -> &abi::Access {
        // SAFETY: exclusively ours during `'a`, by `from_raw`; the reference ends before `default_rw` can be called.
        unsafe { &*self.raw }
    }

    pub(crate) fn as_raw(&mut self) -> *mut abi::Access {
        self.raw
    }

    /// VFIO region index.
    pub fn region(&self) -> u32 {
        self.raw().region
    }

    /// Byte offset inside the region; inside the claim.
    pub fn offset(&self) -> u64 {
        self.raw().offset
    }

    /// Bytes, at least 1.
    pub fn length(&self) -> usize {
        self.raw().length as usize
    }

    pub fn is_write(&self) -> bool {
        self.raw().write != 0
    }

    /// Whether the access covers just these bytes.
    pub fn is_at(&self, offset: u64, length: usize) -> bool {
        self.offset() == offset && self.length() == length
    }

    /// A write's data; on a read what was answered so far (zeroes at first).
    pub fn data(&self) -> &[u8] {
        // SAFETY: `length` bytes of our own, checked by `from_raw`.
        unsafe { std::slice::from_raw_parts(self.raw().data, self.length()) }
    }

    /// A read's answer; a write's data, which may be changed before they are forwarded.
    pub fn data_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `data`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.raw().data, self.length()) }
    }

    /// The data as a little-endian number of 1, 2, 4 or 8 bytes; `None` for other lengths.
    pub fn value(&self) -> Option<u64> {
        let mut bytes = [0; 8];
        match self.length() {
            length @ (1 | 2 | 4 | 8) => {
                bytes[..length].copy_from_slice(self.data());
                Some(u64::from_le_bytes(bytes))
            }
            _ => None,
        }
    }

    /// The data as a little-endian number, if they are 4 bytes.
    pub fn value_u32(&self) -> Option<u32> {
        self.data().try_into().ok().map(u32::from_le_bytes)
    }

    /// Answers with the low bytes of `value`, little-endian. EINVAL for lengths other than 1, 2, 4 and 8.
    pub fn set_value(&mut self, value: u64) -> Result<()> {
        match self.length() {
            length @ (1 | 2 | 4 | 8) => {
                self.data_mut().copy_from_slice(&value.to_le_bytes()[..length]);
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }
}

impl fmt::Debug for Access<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_write() { "write" } else { "read" };
        write!(f, "{what} of {} at {:#x} of region {}", self.length(), self.offset(), self.region())
    }
}
