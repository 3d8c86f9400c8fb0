//! Scratch memory: the device can reach it, the guest cannot see it.
//!
//! **Must never** hand out a Rust reference into the memory: the device may write it at any time. Bytes are copied with
//! volatile accesses; what a copy sees while the device writes is any mixture of old and new bytes.
#![allow(unsafe_code)]

use crate::abi;
use crate::context::Context;
use crate::{Errno, Result};

/// Scratch memory that lives as long as the device is open, or until [`Scratch::free`].
///
/// Copies need a [`Context`]: a proof that a call is in progress, and so that `close` has not returned.
#[derive(Debug)]
pub struct Scratch {
    iova: u64,
    length: usize,
    ptr: *mut u8,
}

// SAFETY: the memory belongs to this handle alone on the CPU's side (`write` takes `&mut self`), whatever the thread.
unsafe impl Send for Scratch {}
// SAFETY: as above; shared handles only read.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// # Safety
    /// `raw.ptr` points at `raw.length` bytes that are nobody else's on the CPU's side until they are freed or `close`
    /// has returned.
    pub(crate) unsafe fn from_raw(raw: abi::Scratch) -> Self {
        Self { iova: raw.iova, length: raw.length as usize, ptr: raw.ptr }
    }

    /// Where the device finds it.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// In bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Copies out. EINVAL beyond the end.
    pub fn read(&self, _cx: &Context<'_>, offset: usize, data: &mut [u8]) -> Result<()> {
        self.check(offset, data.len())?;
        for (i, byte) in data.iter_mut().enumerate() {
            // SAFETY: inside the memory, just checked; alive, by `from_raw` and the context.
            *byte = unsafe { self.ptr.add(offset + i).read_volatile() };
        }
        Ok(())
    }

    /// Copies in. EINVAL beyond the end.
    pub fn write(&mut self, _cx: &Context<'_>, offset: usize, data: &[u8]) -> Result<()> {
        self.check(offset, data.len())?;
        for (i, byte) in data.iter().enumerate() {
            // SAFETY: as in `read`; `&mut self` keeps other writers and readers of this process out.
            unsafe { self.ptr.add(offset + i).write_volatile(*byte) };
        }
        Ok(())
    }

    /// Gives it back. The device must not reach it any more: its DMA there has ended.
    pub fn free(self, cx: &Context<'_>) -> Result<()> {
        cx.scratch_free(self.iova)
    }

    fn check(&self, offset: usize, length: usize) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }
}

/// Scratch memory for one call: freed when dropped. Drop it after the device's DMA there has ended, not before; when that
/// cannot be known, [`ScratchGuard::keep`] leaves the memory to `close`.
#[derive(Debug)]
pub struct ScratchGuard<'a> {
    cx: Context<'a>,
    scratch: Scratch,
    kept: bool,
}

impl<'a> ScratchGuard<'a> {
    pub(crate) fn new(cx: Context<'a>, scratch: Scratch) -> Self {
        Self { cx, scratch, kept: false }
    }

    /// Keeps the memory beyond this call.
    pub fn keep(mut self) -> Scratch {
        self.kept = true;
        Scratch { iova: self.scratch.iova, length: self.scratch.length, ptr: self.scratch.ptr }
    }
}

impl std::ops::Deref for ScratchGuard<'_> {
    type Target = Scratch;

    fn deref(&self) -> &Scratch {
        &self.scratch
    }
}

impl std::ops::DerefMut for ScratchGuard<'_> {
    fn deref_mut(&mut self) -> &mut Scratch {
        &mut self.scratch
    }
}

impl Drop for ScratchGuard<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(errno) = self.cx.scratch_free(self.scratch.iova)
        {
            tracing::warn!(%errno, "scratch memory was not freed; it is at close");
        }
    }
}
