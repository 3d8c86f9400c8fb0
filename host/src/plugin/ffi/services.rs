//! The table of host services that plug-ins call, over [`HostCalls`].
//!
//! Every pointer and length that arrives here is a plug-in's: null, overflowing or over-long ones are refused. A context is
//! looked up among the calls that this thread is in, never followed: one that is stale, invented, or another thread's is
//! answered by EPERM. A panic of the host's own side ends at this boundary with EIO, instead of ending the process.

use std::cell::Cell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use vfio_mediate_sdk::abi;

use super::log::log;
use crate::plugin::calls::{CallFrame, HostCalls, IrqRequest, IrqRequestData, Origin, Request, TrapMap};

/// One call into a plug-in: lives on its caller's stack, linked to the calls further out on the same thread.
struct Frame<'a> {
    context: abi::CallContext,
    calls: &'a dyn HostCalls,
    /// Not read back from the context, which the plug-in could have scribbled over
    deadline: u64,
    cancel: Option<&'a AtomicBool>,
    outer: *const Frame<'static>,
}

/// Longest copy that one service call makes, in bytes.
const LENGTH_MAX: usize = 16 * 1024 * 1024;
/// Blocks of scratch memory are multiples of this, in bytes.
const SCRATCH_ALIGN: u64 = 4096;

thread_local! {
    /// The call that this thread made last and has not returned from.
    static INNERMOST: Cell<*const Frame<'static>> = const { Cell::new(std::ptr::null()) };
}

/// Takes a frame out of its thread's list, however its call ends.
struct Unlink<'a> {
    innermost: &'a Cell<*const Frame<'static>>,
    outer: *const Frame<'static>,
}

impl Drop for Unlink<'_> {
    fn drop(&mut self) {
        self.innermost.set(self.outer);
    }
}

/// Runs `call` with a context that is valid until it returns.
#[inline]
pub fn with_context<T>(
    calls: &dyn HostCalls,
    frame: CallFrame<'_>,
    call: impl FnOnce(*const abi::CallContext) -> T,
) -> T {
    let context = abi::CallContext {
        struct_size: size_of::<abi::CallContext>() as u32,
        origin: match frame.origin {
            Origin::Client => abi::ORIGIN_CLIENT,
            Origin::Migration => abi::ORIGIN_MIGRATION,
            Origin::Host => abi::ORIGIN_HOST,
        },
        services: &raw const SERVICES,
        host: std::ptr::null(),
        deadline: frame.deadline,
    };
    // One look-up of the thread's cell for the whole call: it is a good part of what a hook costs.
    let innermost = innermost();
    let outer = innermost.get();
    let linked = Frame { context, calls, deadline: frame.deadline, cancel: frame.cancel, outer };
    innermost.set((&raw const linked).cast());
    let _unlink = Unlink { innermost, outer };
    call(&raw const linked.context)
}

/// This thread's cell. Not to be kept beyond the caller's frame, hence without a lifetime of its own choosing.
#[inline]
fn innermost<'a>() -> &'a Cell<*const Frame<'static>> {
    let cell = INNERMOST.with(std::ptr::from_ref);
    // SAFETY: the cell has no destructor, so it lives as long as its thread, on whose stack the caller stands; a `Cell` is not
    // `Sync`, so the reference stays on it.
    unsafe { &*cell }
}

/// The host's table. One for all plug-ins and devices: the context says which device is meant.
pub static SERVICES: abi::HostServices = abi::HostServices {
    struct_size: size_of::<abi::HostServices>() as u32,
    abi_major: abi::ABI_MAJOR,
    abi_minor: abi::ABI_MINOR,
    log,
    region_read,
    region_write,
    default_rw,
    default_region_info,
    default_irq_info,
    default_set_irqs,
    guest_read,
    guest_write,
    mark_dirty,
    scratch_alloc,
    scratch_free,
    irq_inject,
    request,
    now,
    wait,
    cancelled,
    timer_arm,
    timer_cancel,
    get_extension,
};

/// Runs a service for a context of this thread, and gives its result the ABI's number.
fn serve(ctx: *const abi::CallContext, service: impl FnOnce(&Frame<'_>) -> Result<(), Errno>) -> i32 {
    let result = if ctx.is_null() { Err(Errno::INVAL) } else { contained(|| with_frame(ctx, service)) };
    match result {
        Ok(()) => 0,
        Err(errno) => -errno.raw_os_error(),
    }
}

fn with_frame<T>(
    ctx: *const abi::CallContext,
    service: impl FnOnce(&Frame<'_>) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut at = INNERMOST.get();
    // SAFETY: frames in this thread's list are on its stack further out, and leave the list before they end.
    while let Some(frame) = unsafe { at.as_ref() } {
        if std::ptr::eq(&raw const frame.context, ctx) {
            return service(frame);
        }
        at = frame.outer;
    }
    Err(Errno::PERM)
}

/// The panic hook has reported it by then; the plug-in is told that its call failed.
fn contained<T>(call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(Errno::IO))
}

fn check_range(address: usize, length: usize) -> Result<(), Errno> {
    if address == 0 || length > LENGTH_MAX || address.checked_add(length).is_none() {
        return Err(Errno::INVAL);
    }
    Ok(())
}

/// # Safety
/// `data` is writable for `length` bytes.
unsafe fn bytes_mut<'a>(data: *mut u8, length: usize) -> Result<&'a mut [u8], Errno> {
    if length == 0 {
        return Ok(&mut []);
    }
    check_range(data.addr(), length)?;
    // SAFETY: not null, does not wrap, and writable by the caller.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, length) })
}

/// # Safety
/// `data` is readable for `length` bytes.
unsafe fn bytes<'a>(data: *const u8, length: usize) -> Result<&'a [u8], Errno> {
    if length == 0 {
        return Ok(&[]);
    }
    check_range(data.addr(), length)?;
    // SAFETY: not null, does not wrap, and readable by the caller.
    Ok(unsafe { std::slice::from_raw_parts(data, length) })
}

/// Copies a structure that the plug-in passed, whole: version 1 of each is frozen, so another size is a mistake.
///
/// # Safety
/// As for `copy_sized`, whose contract the ABI puts upon the plug-in.
unsafe fn argument<T: Copy>(pointer: *const T) -> Result<T, Errno> {
    // SAFETY: by the caller.
    unsafe { super::copy_whole(pointer, "an argument") }.map_err(|_| Errno::INVAL)
}

unsafe extern "C" fn region_read(
    ctx: *const abi::CallContext,
    region: u32,
    offset: u64,
    data: *mut u8,
    length: usize,
) -> i32 {
    // SAFETY: the buffer is as the ABI demands of the plug-in.
    serve(ctx, |f| f.calls.region_read(region, offset, unsafe { bytes_mut(data, length) }?))
}

unsafe extern "C" fn region_write(
    ctx: *const abi::CallContext,
    region: u32,
    offset: u64,
    data: *const u8,
    length: usize,
) -> i32 {
    // SAFETY: as above.
    serve(ctx, |f| f.calls.region_write(region, offset, unsafe { bytes(data, length) }?))
}

unsafe extern "C" fn default_rw(ctx: *const abi::CallContext, access: *mut abi::Access) -> i32 {
    serve(ctx, |f| {
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let access = unsafe { argument(access.cast_const()) }?;
        let length = usize::try_from(access.length).map_err(|_| Errno::INVAL)?;
        // SAFETY: the access's data are readable and writable for its length, by the plug-in's word.
        let data = unsafe { bytes_mut(access.data, length) }?;
        match access.write {
            0 => f.calls.default_read(access.region, access.offset, data),
            1 => f.calls.default_write(access.region, access.offset, data),
            _ => Err(Errno::INVAL),
        }
    })
}

unsafe extern "C" fn default_region_info(ctx: *const abi::CallContext, info: *mut abi::RegionInfo) -> i32 {
    serve(ctx, |f| {
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let asked = unsafe { argument(info.cast_const()) }?;
        let found = f.calls.region_info(asked.index)?;
        // SAFETY: `argument` found it not null, aligned and of a whole structure's size.
        unsafe { info.write(abi::RegionInfo { struct_size: asked.struct_size, ..found }) };
        Ok(())
    })
}

unsafe extern "C" fn default_irq_info(ctx: *const abi::CallContext, info: *mut abi::IrqInfo) -> i32 {
    serve(ctx, |f| {
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let asked = unsafe { argument(info.cast_const()) }?;
        let found = f.calls.irq_info(asked.index)?;
        // SAFETY: as above.
        unsafe { info.write(abi::IrqInfo { struct_size: asked.struct_size, ..found }) };
        Ok(())
    })
}

unsafe extern "C" fn default_set_irqs(ctx: *const abi::CallContext, request: *const abi::IrqRequest) -> i32 {
    serve(ctx, |f| {
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let raw = unsafe { argument(request) }?;
        if !matches!(raw.action, abi::IRQ_MASK | abi::IRQ_UNMASK | abi::IRQ_TRIGGER) {
            return Err(Errno::INVAL);
        }
        // SAFETY: the request's lists are readable for `count` entries, by the plug-in's word.
        let data = unsafe { irq_data(&raw) }?;
        let (index, start, count, action) = (raw.index, raw.start, raw.count, raw.action);
        f.calls.set_irqs(&IrqRequest { index, start, count, action, data })
    })
}

/// # Safety
/// The list that `raw.data_kind` names is readable for `raw.count` entries.
unsafe fn irq_data(raw: &abi::IrqRequest) -> Result<IrqRequestData<'_>, Errno> {
    let count = raw.count as usize;
    if count > crate::plugin::tables::ENTRIES_MAX && raw.data_kind != abi::IRQ_DATA_NONE {
        return Err(Errno::INVAL);
    }
    match raw.data_kind {
        abi::IRQ_DATA_NONE => Ok(IrqRequestData::None),
        abi::IRQ_DATA_BOOL => {
            // SAFETY: by the caller.
            let bools = unsafe { bytes(raw.bools, count) }?;
            if bools.iter().any(|bool| *bool > 1) { Err(Errno::INVAL) } else { Ok(IrqRequestData::Bool(bools)) }
        }
        abi::IRQ_DATA_EVENTFD => {
            // SAFETY: by the caller.
            let fds = unsafe { super::entries(raw.fds, count, "eventfds") }.map_err(|_| Errno::INVAL)?;
            if fds.iter().any(|fd| *fd < -1) { Err(Errno::BADF) } else { Ok(IrqRequestData::EventFd(fds)) }
        }
        _ => Err(Errno::INVAL),
    }
}

unsafe extern "C" fn guest_read(ctx: *const abi::CallContext, iova: u64, data: *mut u8, length: usize) -> i32 {
    // SAFETY: as for `region_read`.
    serve(ctx, |f| f.calls.guest_read(iova, unsafe { bytes_mut(data, length) }?))
}

unsafe extern "C" fn guest_write(ctx: *const abi::CallContext, iova: u64, data: *const u8, length: usize) -> i32 {
    // SAFETY: as for `region_read`.
    serve(ctx, |f| f.calls.guest_write(iova, unsafe { bytes(data, length) }?))
}

unsafe extern "C" fn mark_dirty(ctx: *const abi::CallContext, iova: u64, length: u64) -> i32 {
    serve(ctx, |f| f.calls.mark_dirty(iova, length))
}

unsafe extern "C" fn scratch_alloc(ctx: *const abi::CallContext, scratch: *mut abi::Scratch) -> i32 {
    serve(ctx, |f| {
        // Everything that can be refused is refused before anything is allocated.
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let asked = unsafe { argument(scratch.cast_const()) }?;
        let sound = asked.length > 0 && asked.length.is_multiple_of(SCRATCH_ALIGN) && asked.length <= LENGTH_MAX as u64;
        if !sound || asked.address_bits > 64 {
            return Err(Errno::INVAL);
        }
        let found = f.calls.scratch_alloc(asked.length, asked.address_bits)?;
        let filled = abi::Scratch {
            iova: found.iova,
            length: found.length,
            ptr: std::ptr::with_exposed_provenance_mut(found.address as usize),
            ..asked
        };
        // SAFETY: `argument` found it not null, aligned and of a whole structure's size.
        unsafe { scratch.write(filled) };
        Ok(())
    })
}

unsafe extern "C" fn scratch_free(ctx: *const abi::CallContext, iova: u64) -> i32 {
    serve(ctx, |f| f.calls.scratch_free(iova))
}

unsafe extern "C" fn irq_inject(ctx: *const abi::CallContext, index: u32, vector: u32) -> i32 {
    serve(ctx, |f| f.calls.irq_inject(index, vector))
}

unsafe extern "C" fn request(ctx: *const abi::CallContext, what: u32, arg: u64) -> i32 {
    serve(ctx, |f| {
        f.calls.request(match (what, u32::try_from(arg)) {
            (abi::REQUEST_RESET, _) => Request::Reset,
            (abi::REQUEST_FAIL, Ok(number @ 1..4096)) => Request::Fail(Errno::from_raw_os_error(number.cast_signed())),
            (abi::REQUEST_MAP, Ok(abi::MAP_NORMAL)) => Request::Map(TrapMap::Normal),
            (abi::REQUEST_MAP, Ok(abi::MAP_TRACKING)) => Request::Map(TrapMap::Tracking),
            _ => return Err(Errno::INVAL),
        })
    })
}

/// 0 for a context that is not valid here.
unsafe extern "C" fn now(ctx: *const abi::CallContext) -> u64 {
    contained(|| with_frame(ctx, |f| Ok(f.calls.now()))).unwrap_or(0)
}

unsafe extern "C" fn wait(ctx: *const abi::CallContext, nanoseconds: u64) -> i32 {
    serve(ctx, |f| f.calls.wait(nanoseconds, f.deadline, &|| is_cancelled(f)))
}

/// A context that is not valid here has been given up.
unsafe extern "C" fn cancelled(ctx: *const abi::CallContext) -> i32 {
    contained(|| with_frame(ctx, |f| Ok(is_cancelled(f)))).map_or(1, i32::from)
}

fn is_cancelled(frame: &Frame<'_>) -> bool {
    frame.cancel.is_some_and(|cancel| cancel.load(Ordering::Acquire))
        || (frame.deadline != u64::MAX && frame.calls.now() >= frame.deadline)
}

unsafe extern "C" fn timer_arm(ctx: *const abi::CallContext, cookie: u64, nanoseconds: u64) -> i32 {
    serve(ctx, |f| f.calls.timer_arm(cookie, nanoseconds))
}

unsafe extern "C" fn timer_cancel(ctx: *const abi::CallContext, cookie: u64) -> i32 {
    serve(ctx, |f| f.calls.timer_cancel(cookie))
}

/// Version 1.0 of the ABI has no extensions of the host.
unsafe extern "C" fn get_extension(_ctx: *const abi::CallContext, _id: abi::Bytes) -> *const c_void {
    std::ptr::null()
}
