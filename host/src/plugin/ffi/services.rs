//! The table of host services that plug-ins call, over [`HostCalls`].
//!
//! Every pointer and length that arrives here is a plug-in's: null, overflowing or over-long ones are refused, and a
//! context is refused on another thread than the one it was given to.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use vfio_mediate_sdk::abi;

use crate::plugin::calls::{CallFrame, HostCalls, IrqRequest, IrqRequestData, Origin, Request, TrapMap};

/// What [`abi::CallContext::host`] points at: lives on the stack of the call.
pub struct Frame<'a> {
    calls: &'a dyn HostCalls,
    frame: CallFrame<'a>,
    thread: usize,
}

/// Longest copy that one service call makes, in bytes.
const LENGTH_MAX: usize = 16 * 1024 * 1024;
/// Longest log message, in bytes.
const MESSAGE_MAX: usize = 4096;

thread_local! {
    static MARK: u8 = const { 0 };
}

/// Tells threads apart while they live, at the price of one address.
fn thread() -> usize {
    MARK.with(|mark| std::ptr::from_ref(mark) as usize)
}

/// Runs `call` with a context that is valid until it returns.
pub fn with_context<T>(
    calls: &dyn HostCalls,
    frame: CallFrame<'_>,
    call: impl FnOnce(*const abi::CallContext) -> T,
) -> T {
    let host = Frame { calls, frame, thread: thread() };
    let context = abi::CallContext {
        struct_size: size_of::<abi::CallContext>() as u32,
        origin: match frame.origin {
            Origin::Client => abi::ORIGIN_CLIENT,
            Origin::Migration => abi::ORIGIN_MIGRATION,
            Origin::Host => abi::ORIGIN_HOST,
        },
        services: &raw const SERVICES,
        host: (&raw const host).cast(),
        deadline: frame.deadline,
    };
    call(&raw const context)
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

/// # Safety
/// `ctx` is null or a context that this host made for a call that has not returned.
unsafe fn frame<'a>(ctx: *const abi::CallContext) -> Result<&'a Frame<'a>, Errno> {
    if ctx.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: a context of ours that is still alive, by the caller; ours always have a frame.
    let frame = unsafe { &*(*ctx).host.cast::<Frame<'a>>() };
    if frame.thread != thread() {
        return Err(Errno::PERM);
    }
    Ok(frame)
}

fn answer(result: Result<(), Errno>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(errno) => -errno.raw_os_error(),
    }
}

/// # Safety
/// `data` is writable for `length` bytes.
unsafe fn bytes_mut<'a>(data: *mut u8, length: usize) -> Result<&'a mut [u8], Errno> {
    if length == 0 {
        return Ok(&mut []);
    }
    if data.is_null() || length > LENGTH_MAX {
        return Err(Errno::INVAL);
    }
    // SAFETY: not null, and writable by the caller.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, length) })
}

/// # Safety
/// `data` is readable for `length` bytes.
unsafe fn bytes<'a>(data: *const u8, length: usize) -> Result<&'a [u8], Errno> {
    if length == 0 {
        return Ok(&[]);
    }
    if data.is_null() || length > LENGTH_MAX {
        return Err(Errno::INVAL);
    }
    // SAFETY: not null, and readable by the caller.
    Ok(unsafe { std::slice::from_raw_parts(data, length) })
}

/// Messages of plug-ins per second that reach the host's log; the rest is counted.
const MESSAGES_PER_SECOND: u64 = 200;

/// The second in bits 63:16, how many messages it has had in bits 15:0.
static LOGGED: AtomicU64 = AtomicU64::new(0);

fn may_log() -> bool {
    let second = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec.cast_unsigned();
    let update = |state: u64| {
        let (at, count) = (state >> 16, state & 0xffff);
        if at != second & (u64::MAX >> 16) {
            Some(second << 16 | 1)
        } else if count < MESSAGES_PER_SECOND {
            Some(state + 1)
        } else {
            None
        }
    };
    LOGGED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).is_ok()
}

unsafe extern "C" fn log(level: u32, target: abi::Bytes, message: abi::Bytes) {
    if !may_log() {
        return;
    }
    // SAFETY: readable by the plug-in's word; the length is capped.
    let read = |text: abi::Bytes| match unsafe { bytes(text.ptr, text.len.min(MESSAGE_MAX)) } {
        Ok(raw) => String::from_utf8_lossy(raw).into_owned(),
        Err(_) => String::new(),
    };
    let (plugin, message) = (read(target), read(message));
    match level {
        abi::LOG_ERROR => tracing::error!(target: "plugin", %plugin, "{message}"),
        abi::LOG_WARN => tracing::warn!(target: "plugin", %plugin, "{message}"),
        abi::LOG_INFO => tracing::info!(target: "plugin", %plugin, "{message}"),
        abi::LOG_DEBUG => tracing::debug!(target: "plugin", %plugin, "{message}"),
        _ => tracing::trace!(target: "plugin", %plugin, "{message}"),
    }
}

unsafe extern "C" fn region_read(
    ctx: *const abi::CallContext,
    region: u32,
    offset: u64,
    data: *mut u8,
    length: usize,
) -> i32 {
    // SAFETY: context and buffer are as the ABI demands of the plug-in.
    answer(unsafe { frame(ctx).and_then(|f| f.calls.region_read(region, offset, bytes_mut(data, length)?)) })
}

unsafe extern "C" fn region_write(
    ctx: *const abi::CallContext,
    region: u32,
    offset: u64,
    data: *const u8,
    length: usize,
) -> i32 {
    // SAFETY: as above.
    answer(unsafe { frame(ctx).and_then(|f| f.calls.region_write(region, offset, bytes(data, length)?)) })
}

unsafe extern "C" fn default_rw(ctx: *const abi::CallContext, access: *mut abi::Access) -> i32 {
    let run = || {
        // SAFETY: as above.
        let frame = unsafe { frame(ctx) }?;
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let access = unsafe { super::copy_sized(access.cast_const(), "an access") }.map_err(|_| Errno::INVAL)?;
        let length = usize::try_from(access.length).map_err(|_| Errno::INVAL)?;
        // SAFETY: the access's data are readable and writable for its length, by the plug-in's word.
        let data = unsafe { bytes_mut(access.data, length) }?;
        match access.write {
            0 => frame.calls.default_read(access.region, access.offset, data),
            1 => frame.calls.default_write(access.region, access.offset, data),
            _ => Err(Errno::INVAL),
        }
    };
    answer(run())
}

unsafe extern "C" fn default_region_info(ctx: *const abi::CallContext, info: *mut abi::RegionInfo) -> i32 {
    let run = || {
        // SAFETY: as above.
        let frame = unsafe { frame(ctx) }?;
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let asked = unsafe { super::copy_sized(info.cast_const(), "region info") }.map_err(|_| Errno::INVAL)?;
        let found = frame.calls.region_info(asked.index)?;
        // SAFETY: `copy_sized` found it not null and aligned; it holds a whole structure only if its size says so.
        unsafe { store_sized(info, found, asked.struct_size) }
    };
    answer(run())
}

unsafe extern "C" fn default_irq_info(ctx: *const abi::CallContext, info: *mut abi::IrqInfo) -> i32 {
    let run = || {
        // SAFETY: as above.
        let frame = unsafe { frame(ctx) }?;
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let asked = unsafe { super::copy_sized(info.cast_const(), "irq info") }.map_err(|_| Errno::INVAL)?;
        let found = frame.calls.irq_info(asked.index)?;
        // SAFETY: as above.
        unsafe { store_sized(info, found, asked.struct_size) }
    };
    answer(run())
}

/// # Safety
/// `target` is aligned and writable for `size` bytes.
unsafe fn store_sized<T: Copy>(target: *mut T, value: T, size: u32) -> Result<(), Errno> {
    if (size as usize) < size_of::<T>() {
        return Err(Errno::INVAL);
    }
    // SAFETY: writable for at least a whole `T`, by the caller and the check above.
    unsafe { target.write(value) };
    Ok(())
}

unsafe extern "C" fn default_set_irqs(ctx: *const abi::CallContext, request: *const abi::IrqRequest) -> i32 {
    let run = || {
        // SAFETY: as above.
        let frame = unsafe { frame(ctx) }?;
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let raw = unsafe { super::copy_sized(request, "an irq request") }.map_err(|_| Errno::INVAL)?;
        let count = raw.count as usize;
        let data = match raw.data_kind {
            abi::IRQ_DATA_NONE => IrqRequestData::None,
            // SAFETY: readable for `count` entries, by the plug-in's word.
            abi::IRQ_DATA_BOOL => IrqRequestData::Bool(unsafe { bytes(raw.bools, count) }?),
            abi::IRQ_DATA_EVENTFD => {
                // SAFETY: as above.
                IrqRequestData::EventFd(
                    unsafe { super::entries(raw.fds, count, "eventfds") }.map_err(|_| Errno::INVAL)?,
                )
            }
            _ => return Err(Errno::INVAL),
        };
        frame.calls.set_irqs(&IrqRequest {
            index: raw.index,
            start: raw.start,
            count: raw.count,
            action: raw.action,
            data,
        })
    };
    answer(run())
}

unsafe extern "C" fn guest_read(ctx: *const abi::CallContext, iova: u64, data: *mut u8, length: usize) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx).and_then(|f| f.calls.guest_read(iova, bytes_mut(data, length)?)) })
}

unsafe extern "C" fn guest_write(ctx: *const abi::CallContext, iova: u64, data: *const u8, length: usize) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx).and_then(|f| f.calls.guest_write(iova, bytes(data, length)?)) })
}

unsafe extern "C" fn mark_dirty(ctx: *const abi::CallContext, iova: u64, length: u64) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx) }.and_then(|f| f.calls.mark_dirty(iova, length)))
}

unsafe extern "C" fn scratch_alloc(ctx: *const abi::CallContext, scratch: *mut abi::Scratch) -> i32 {
    let run = || {
        // SAFETY: as above.
        let frame = unsafe { frame(ctx) }?;
        // SAFETY: null or a structure of the ABI, by the plug-in's word.
        let asked = unsafe { super::copy_sized(scratch.cast_const(), "scratch") }.map_err(|_| Errno::INVAL)?;
        if asked.address_bits > 64 {
            return Err(Errno::INVAL);
        }
        let found = frame.calls.scratch_alloc(asked.length, asked.address_bits)?;
        let filled = abi::Scratch {
            iova: found.iova,
            length: found.length,
            ptr: std::ptr::with_exposed_provenance_mut(found.address as usize),
            ..asked
        };
        // SAFETY: as above.
        unsafe { store_sized(scratch, filled, asked.struct_size) }
    };
    answer(run())
}

unsafe extern "C" fn scratch_free(ctx: *const abi::CallContext, iova: u64) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx) }.and_then(|f| f.calls.scratch_free(iova)))
}

unsafe extern "C" fn irq_inject(ctx: *const abi::CallContext, index: u32, vector: u32) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx) }.and_then(|f| f.calls.irq_inject(index, vector)))
}

unsafe extern "C" fn request(ctx: *const abi::CallContext, what: u32, arg: u64) -> i32 {
    let run = || {
        // SAFETY: as for `region_read`.
        let frame = unsafe { frame(ctx) }?;
        let request = match (what, u32::try_from(arg)) {
            (abi::REQUEST_RESET, _) => Request::Reset,
            (abi::REQUEST_FAIL, Ok(number @ 1..4096)) => Request::Fail(Errno::from_raw_os_error(number.cast_signed())),
            (abi::REQUEST_MAP, Ok(abi::MAP_NORMAL)) => Request::Map(TrapMap::Normal),
            (abi::REQUEST_MAP, Ok(abi::MAP_TRACKING)) => Request::Map(TrapMap::Tracking),
            _ => return Err(Errno::INVAL),
        };
        frame.calls.request(request)
    };
    answer(run())
}

unsafe extern "C" fn now(ctx: *const abi::CallContext) -> u64 {
    // SAFETY: as for `region_read`.
    unsafe { frame(ctx) }.map_or(0, |f| f.calls.now())
}

unsafe extern "C" fn wait(ctx: *const abi::CallContext, nanoseconds: u64) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx) }.and_then(|f| f.calls.wait(nanoseconds, f.frame.deadline, &|| is_cancelled(f))))
}

unsafe extern "C" fn cancelled(ctx: *const abi::CallContext) -> i32 {
    // SAFETY: as for `region_read`. A context that is not valid here has been given up.
    unsafe { frame(ctx) }.map_or(1, |f| i32::from(is_cancelled(f)))
}

fn is_cancelled(frame: &Frame<'_>) -> bool {
    frame.frame.cancel.is_some_and(|cancel| cancel.load(Ordering::Acquire))
        || (frame.frame.deadline != u64::MAX && frame.calls.now() >= frame.frame.deadline)
}

unsafe extern "C" fn timer_arm(ctx: *const abi::CallContext, cookie: u64, nanoseconds: u64) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx) }.and_then(|f| f.calls.timer_arm(cookie, nanoseconds)))
}

unsafe extern "C" fn timer_cancel(ctx: *const abi::CallContext, cookie: u64) -> i32 {
    // SAFETY: as for `region_read`.
    answer(unsafe { frame(ctx) }.and_then(|f| f.calls.timer_cancel(cookie)))
}

/// Version 1.0 of the ABI has no extensions of the host.
unsafe extern "C" fn get_extension(_ctx: *const abi::CallContext, _id: abi::Bytes) -> *const c_void {
    std::ptr::null()
}
