//! The call context: a plug-in's only way to the host.
//!
//! **Owns** the safe side of [`abi::HostServices`]. **Must never** outlive its call or leave its thread: [`Context`] borrows
//! the call and is neither `Send` nor `Sync`.
//!
//! Every method may be called in every state and from every function that gets a context; none calls a hook of the same
//! device back. A plug-in should hold no lock that its hooks take while it waits ([`Context::wait`], [`Context::poll_until`]):
//! a hook that waits for it blocks the client's thread, and the host drains such threads when it closes the gate.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use crate::abi;
use crate::access::Access;
use crate::hooks::{IrqRequest, Maps};
use crate::scratch::{Scratch, ScratchGuard};
use crate::{Errno, Result};

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// An access or request of the client
    Client,
    /// A step of a migration
    Migration,
    /// The host's own doing: open, close, events, timers
    Host,
    /// A newer host's
    Other(u32),
}

/// The pass that comes with a call.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    raw: &'a abi::CallContext,
    services: &'a abi::HostServices,
    // Valid on this thread only.
    thread: PhantomData<*const ()>,
}

impl<'a> Context<'a> {
    /// # Safety
    /// `raw` is the context that the host handed to the call in progress, `'a` does not exceed that call, and its `services`
    /// is a table of at least version 1 (the export shims check that once, in `init`).
    pub unsafe fn from_raw(raw: *const abi::CallContext) -> Self {
        // SAFETY: both live during the call, by the caller.
        let (raw, services) = unsafe { (&*raw, &*(*raw).services) };
        Self { raw, services, thread: PhantomData }
    }

    /// For the C-shaped parts of a plug-in.
    pub fn as_raw(&self) -> *const abi::CallContext {
        self.raw
    }

    pub fn origin(&self) -> Origin {
        match self.raw.origin {
            abi::ORIGIN_CLIENT => Origin::Client,
            abi::ORIGIN_MIGRATION => Origin::Migration,
            abi::ORIGIN_HOST => Origin::Host,
            other => Origin::Other(other),
        }
    }

    // ---- the device itself

    /// Reads the device, past every hook. ENODEV once the device is lost, EIO where it cannot be reached, EINVAL outside
    /// the region.
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        // SAFETY: `data` is ours for the call; the context is valid, by `from_raw`.
        Errno::check(unsafe { (self.services.region_read)(self.raw, region, offset, data.as_mut_ptr(), data.len()) })
    }

    /// Writes the device, past every hook. Errors as in [`Self::region_read`].
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        // SAFETY: as in `region_read`.
        Errno::check(unsafe { (self.services.region_write)(self.raw, region, offset, data.as_ptr(), data.len()) })
    }

    /// One 4-byte access, little-endian as PCI is.
    pub fn read_u32(&self, region: u32, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.region_read(region, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// One 4-byte access.
    pub fn write_u32(&self, region: u32, offset: u64, value: u32) -> Result<()> {
        self.region_write(region, offset, &value.to_le_bytes())
    }

    /// One 8-byte access.
    pub fn read_u64(&self, region: u32, offset: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.region_read(region, offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// One 8-byte access.
    pub fn write_u64(&self, region: u32, offset: u64, value: u64) -> Result<()> {
        self.region_write(region, offset, &value.to_le_bytes())
    }

    // ---- what the host does where a hook forwards

    /// Performs the access as if the hook had forwarded it, so that the hook sees the result; answer
    /// [`Verdict::Handled`](crate::Verdict::Handled) afterwards, else it happens twice.
    pub fn default_rw(&self, access: &mut Access<'_>) -> Result<()> {
        // SAFETY: the access is exclusively ours, by `Access::from_raw`.
        Errno::check(unsafe { (self.services.default_rw)(self.raw, access.as_raw()) })
    }

    /// The device's own answer for `index`.
    pub fn default_region_info(&self, index: u32) -> Result<abi::RegionInfo> {
        let mut info =
            abi::RegionInfo { struct_size: size32::<abi::RegionInfo>(), index, flags: 0, reserved: 0, size: 0 };
        // SAFETY: `info` is ours for the call.
        Errno::check(unsafe { (self.services.default_region_info)(self.raw, &raw mut info) })?;
        Ok(info)
    }

    /// The device's own answer for `index`.
    pub fn default_irq_info(&self, index: u32) -> Result<abi::IrqInfo> {
        let mut info = abi::IrqInfo { struct_size: size32::<abi::IrqInfo>(), index, flags: 0, count: 0 };
        // SAFETY: `info` is ours for the call.
        Errno::check(unsafe { (self.services.default_irq_info)(self.raw, &raw mut info) })?;
        Ok(info)
    }

    /// Performs the request as if the hook had forwarded it; answer `Handled` afterwards.
    pub fn default_set_irqs(&self, request: &IrqRequest<'_>) -> Result<()> {
        // SAFETY: the request lives during the call, by `IrqRequest::from_raw`.
        Errno::check(unsafe { (self.services.default_set_irqs)(self.raw, request.as_raw()) })
    }

    // ---- guest memory

    /// Reads guest memory. EFAULT where nothing is mapped; then nothing was copied.
    pub fn guest_read(&self, iova: u64, data: &mut [u8]) -> Result<()> {
        // SAFETY: `data` is ours for the call.
        Errno::check(unsafe { (self.services.guest_read)(self.raw, iova, data.as_mut_ptr(), data.len()) })
    }

    /// Writes guest memory; the host marks it dirty. EFAULT where nothing writable is mapped; then nothing was copied.
    pub fn guest_write(&self, iova: u64, data: &[u8]) -> Result<()> {
        // SAFETY: `data` is ours for the call.
        Errno::check(unsafe { (self.services.guest_write)(self.raw, iova, data.as_ptr(), data.len()) })
    }

    /// The device wrote, or may have written, these bytes. EFAULT when part of them is not mapped; the rest is marked.
    pub fn mark_dirty(&self, iova: u64, length: u64) -> Result<()> {
        // SAFETY: no pointers but the context.
        Errno::check(unsafe { (self.services.mark_dirty)(self.raw, iova, length) })
    }

    /// DMA memory outside the guest's: `length` bytes, a multiple of 4096, at most 16 MiB. Freed when the guard is dropped;
    /// [`ScratchGuard::keep`] keeps it for the device's life.
    pub fn scratch(&self, length: u64) -> Result<ScratchGuard<'a>> {
        self.scratch_below(length, 0)
    }

    /// [`Self::scratch`] for a device that reaches only addresses below 2 to the power `address_bits`; 0 for all.
    /// ENOSPC when guest memory leaves no room there.
    pub fn scratch_below(&self, length: u64, address_bits: u32) -> Result<ScratchGuard<'a>> {
        let mut raw = abi::Scratch {
            struct_size: size32::<abi::Scratch>(),
            address_bits,
            iova: 0,
            length,
            ptr: std::ptr::null_mut(),
        };
        // SAFETY: `raw` is ours for the call.
        Errno::check(unsafe { (self.services.scratch_alloc)(self.raw, &raw mut raw) })?;
        if raw.ptr.is_null() || raw.length < length {
            return Err(Errno::EPROTO);
        }
        // SAFETY: the host's promise of `scratch_alloc`: `length` bytes until freed, or until `close` has returned.
        Ok(ScratchGuard::new(*self, unsafe { Scratch::from_raw(raw) }))
    }

    pub(crate) fn scratch_free(&self, iova: u64) -> Result<()> {
        // SAFETY: no pointers but the context; the caller gives its `Scratch` up.
        Errno::check(unsafe { (self.services.scratch_free)(self.raw, iova) })
    }

    // ---- interrupts and requests

    /// Signals the client's eventfd of this vector, if it has one.
    pub fn irq_inject(&self, index: u32, vector: u32) -> Result<()> {
        // SAFETY: no pointers but the context.
        Errno::check(unsafe { (self.services.irq_inject)(self.raw, index, vector) })
    }

    /// Asks for a reset of the device, once this call has returned.
    pub fn request_reset(&self) -> Result<()> {
        self.request(abi::REQUEST_RESET, 0)
    }

    /// Asks for the device to be failed, once this call has returned.
    pub fn request_fail(&self, errno: Errno) -> Result<()> {
        self.request(abi::REQUEST_FAIL, u64::from(errno.raw().unsigned_abs()))
    }

    /// Asks for a switch of the trap map, once this call has returned: [`Maps::NORMAL`] or [`Maps::TRACKING`].
    pub fn request_map(&self, map: Maps) -> Result<()> {
        self.request(abi::REQUEST_MAP, u64::from(map.raw()))
    }

    fn request(&self, what: u32, arg: u64) -> Result<()> {
        // SAFETY: no pointers but the context.
        Errno::check(unsafe { (self.services.request)(self.raw, what, arg) })
    }

    // ---- time

    /// The device's clock: monotonic, from some fixed point, virtual for simulated devices.
    pub fn now(&self) -> Duration {
        // SAFETY: no pointers but the context.
        Duration::from_nanos(unsafe { (self.services.now)(self.raw) })
    }

    /// When the caller gives up, on the clock of [`Self::now`].
    pub fn deadline(&self) -> Option<Duration> {
        (self.raw.deadline != u64::MAX).then(|| Duration::from_nanos(self.raw.deadline))
    }

    /// Waits on that clock. ECANCELED when the call was cancelled, ETIMEDOUT at the context's deadline.
    pub fn wait(&self, duration: Duration) -> Result<()> {
        // SAFETY: no pointers but the context.
        Errno::check(unsafe { (self.services.wait)(self.raw, nanoseconds(duration)) })
    }

    /// Whether the caller has given up. Long calls ask now and then and return ECANCELED.
    pub fn cancelled(&self) -> bool {
        // SAFETY: no pointers but the context.
        unsafe { (self.services.cancelled)(self.raw) != 0 }
    }

    /// Asks `done` every `interval` until it says yes. ETIMEDOUT once `limit` has passed on the device's clock (after a last
    /// look), or at the context's deadline; ECANCELED when the call was cancelled; else `done`'s own error.
    pub fn poll_until(
        &self,
        interval: Duration,
        limit: Duration,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let end = self.now().saturating_add(limit);
        // A zero interval would spin for ever on a virtual clock.
        let interval = interval.max(Duration::from_nanos(1));
        loop {
            // Taken before the look, so that the last look comes after the limit.
            let now = self.now();
            if done()? {
                return Ok(());
            }
            if now >= end {
                return Err(Errno::ETIMEDOUT);
            }
            self.wait(interval.min(end - now))?;
        }
    }

    /// One [`Event::Timer`](crate::Event::Timer) with this cookie after `delay`; again moves it. ENOSPC beyond 16 cookies.
    pub fn timer_arm(&self, cookie: u64, delay: Duration) -> Result<()> {
        // SAFETY: no pointers but the context.
        Errno::check(unsafe { (self.services.timer_arm)(self.raw, cookie, nanoseconds(delay)) })
    }

    pub fn timer_cancel(&self, cookie: u64) -> Result<()> {
        // SAFETY: no pointers but the context.
        Errno::check(unsafe { (self.services.timer_cancel)(self.raw, cookie) })
    }

    /// A table of the host's for `id` (`vfio-mediate.name/1`), or null.
    pub fn extension(&self, id: &str) -> *const c_void {
        // SAFETY: `id` lives during the call.
        unsafe { (self.services.get_extension)(self.raw, abi::Bytes::borrowed(id.as_bytes())) }
    }
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("origin", &self.origin()).field("deadline", &self.deadline()).finish()
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The `struct_size` of a structure of the ABI.
pub(crate) const fn size32<T>() -> u32 {
    size_of::<T>() as u32
}
