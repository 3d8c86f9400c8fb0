//! The fake host's side of [`abi::HostServices`].
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Bus, Machine, Shared, lock};
use crate::abi::{self, Bytes, CallContext};
use crate::context::size32;
use crate::{Errno, Result};

pub(super) const SCRATCH_BASE: u64 = 0xf000_0000_0000;
const SCRATCH_MAX: u64 = 16 << 20;
const TIMERS_MAX: usize = 16;

pub(super) static SERVICES: abi::HostServices = abi::HostServices {
    struct_size: size32::<abi::HostServices>(),
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

// SAFETY of every function below: the contexts come from `TestDevice`, whose `host` is a `Shared` that outlives the call;
// pointers and lengths come from the sdk's `Context`, from slices.

unsafe fn shared<'a>(ctx: *const CallContext) -> &'a Shared {
    // SAFETY: as above.
    unsafe { &*(*ctx).host.cast::<Shared>() }
}

fn status(result: Result<()>) -> i32 {
    result.map_or_else(Errno::status, |()| 0)
}

unsafe fn bytes<'a>(ptr: *const u8, length: usize) -> &'a [u8] {
    // SAFETY: as above; an empty slice's pointer is dangling but aligned, never null.
    unsafe { std::slice::from_raw_parts(ptr, length) }
}

unsafe fn bytes_mut<'a>(ptr: *mut u8, length: usize) -> &'a mut [u8] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(ptr, length) }
}

unsafe extern "C" fn log(level: u32, target: Bytes, message: Bytes) {
    // SAFETY: both live during the call.
    let (target, message) = unsafe { (bytes(target.ptr, target.len), bytes(message.ptr, message.len)) };
    eprintln!("plug-in [{level}] {}: {}", String::from_utf8_lossy(target), String::from_utf8_lossy(message));
}

unsafe extern "C" fn region_read(
    ctx: *const CallContext,
    region: u32,
    offset: u64,
    data: *mut u8,
    length: usize,
) -> i32 {
    // SAFETY: as above.
    let (shared, data) = unsafe { (shared(ctx), bytes_mut(data, length)) };
    let Machine { model, bus } = &mut *shared.machine();
    status(model.read(bus, region, offset, data))
}

unsafe extern "C" fn region_write(
    ctx: *const CallContext,
    region: u32,
    offset: u64,
    data: *const u8,
    length: usize,
) -> i32 {
    // SAFETY: as above.
    let (shared, data) = unsafe { (shared(ctx), bytes(data, length)) };
    let Machine { model, bus } = &mut *shared.machine();
    status(model.write(bus, region, offset, data))
}

unsafe extern "C" fn default_rw(ctx: *const CallContext, access: *mut abi::Access) -> i32 {
    // SAFETY: as above.
    unsafe {
        let abi::Access { region, offset, data, length, write, .. } = access.read();
        if write == 0 {
            region_read(ctx, region, offset, data, length as usize)
        } else {
            region_write(ctx, region, offset, data, length as usize)
        }
    }
}

unsafe extern "C" fn default_region_info(_: *const CallContext, _: *mut abi::RegionInfo) -> i32 {
    Errno::EOPNOTSUPP.status()
}

unsafe extern "C" fn default_irq_info(_: *const CallContext, _: *mut abi::IrqInfo) -> i32 {
    Errno::EOPNOTSUPP.status()
}

unsafe extern "C" fn default_set_irqs(_: *const CallContext, _: *const abi::IrqRequest) -> i32 {
    Errno::EOPNOTSUPP.status()
}

fn guest(machine: &mut Machine, iova: u64, length: usize) -> Result<&mut [u8]> {
    let start = usize::try_from(iova).map_err(|_| Errno::EFAULT)?;
    let end = start.checked_add(length).ok_or(Errno::EFAULT)?;
    machine.bus.memory.get_mut(start..end).ok_or(Errno::EFAULT)
}

unsafe extern "C" fn guest_read(ctx: *const CallContext, iova: u64, data: *mut u8, length: usize) -> i32 {
    // SAFETY: as above.
    let (shared, data) = unsafe { (shared(ctx), bytes_mut(data, length)) };
    status(guest(&mut shared.machine(), iova, length).map(|memory| data.copy_from_slice(memory)))
}

unsafe extern "C" fn guest_write(ctx: *const CallContext, iova: u64, data: *const u8, length: usize) -> i32 {
    // SAFETY: as above.
    let (shared, data) = unsafe { (shared(ctx), bytes(data, length)) };
    let written = guest(&mut shared.machine(), iova, length).map(|memory| memory.copy_from_slice(data));
    if written.is_ok() {
        lock(&shared.dirty).push((iova, length as u64));
    }
    status(written)
}

unsafe extern "C" fn mark_dirty(ctx: *const CallContext, iova: u64, length: u64) -> i32 {
    // SAFETY: as above.
    let shared = unsafe { shared(ctx) };
    let size = shared.machine().bus.memory.len() as u64;
    let mapped = length.min(size.saturating_sub(iova));
    if mapped > 0 {
        lock(&shared.dirty).push((iova, mapped));
    }
    status(if mapped == length { Ok(()) } else { Err(Errno::EFAULT) })
}

unsafe extern "C" fn scratch_alloc(ctx: *const CallContext, scratch: *mut abi::Scratch) -> i32 {
    // SAFETY: as above.
    let (shared, scratch) = unsafe { (shared(ctx), &mut *scratch) };
    if scratch.length == 0 || !scratch.length.is_multiple_of(4096) || scratch.length > SCRATCH_MAX {
        return Errno::EINVAL.status();
    }
    let Bus { scratch: held, memory, .. } = &mut shared.machine().bus;
    let base = match scratch.address_bits {
        1..48 => (memory.len() as u64).next_multiple_of(4096),
        _ => SCRATCH_BASE,
    };
    let ends = held.iter().map(|(iova, memory)| iova + memory.len() as u64);
    // Low scratch memory grows up from the guest's, the other from its own base.
    let last = ends.filter(|end| (*end > SCRATCH_BASE) == (base == SCRATCH_BASE)).max();
    scratch.iova = last.unwrap_or(base).max(base);
    if (1..64).contains(&scratch.address_bits) && scratch.iova + scratch.length > 1 << scratch.address_bits {
        return Errno::ENOSPC.status();
    }
    // Old bytes must not look like new ones.
    let memory = held.entry(scratch.iova).or_insert(vec![0xa5; scratch.length as usize].into());
    scratch.ptr = memory.as_mut_ptr();
    0
}

unsafe extern "C" fn scratch_free(ctx: *const CallContext, iova: u64) -> i32 {
    // SAFETY: as above.
    let freed = unsafe { shared(ctx) }.machine().bus.scratch.remove(&iova);
    status(freed.map(|_| ()).ok_or(Errno::ENOENT))
}

unsafe extern "C" fn irq_inject(ctx: *const CallContext, index: u32, vector: u32) -> i32 {
    // SAFETY: as above.
    lock(&unsafe { shared(ctx) }.injected).push((index, vector));
    0
}

unsafe extern "C" fn request(ctx: *const CallContext, what: u32, arg: u64) -> i32 {
    // SAFETY: as above.
    lock(&unsafe { shared(ctx) }.requests).push((what, arg));
    0
}

unsafe extern "C" fn now(ctx: *const CallContext) -> u64 {
    // SAFETY: as above.
    unsafe { shared(ctx) }.machine().bus.now.as_nanos() as u64
}

unsafe extern "C" fn wait(ctx: *const CallContext, nanoseconds: u64) -> i32 {
    // SAFETY: as above.
    let (shared, deadline) = unsafe { (shared(ctx), (*ctx).deadline) };
    if shared.cancelled.load(Ordering::SeqCst) {
        return Errno::ECANCELED.status();
    }
    let now = shared.machine().bus.now.as_nanos() as u64;
    let left = deadline.saturating_sub(now);
    shared.advance(Duration::from_nanos(nanoseconds.min(left)));
    status(if nanoseconds < left { Ok(()) } else { Err(Errno::ETIMEDOUT) })
}

unsafe extern "C" fn cancelled(ctx: *const CallContext) -> i32 {
    // SAFETY: as above.
    i32::from(unsafe { shared(ctx) }.cancelled.load(Ordering::SeqCst))
}

unsafe extern "C" fn timer_arm(ctx: *const CallContext, cookie: u64, nanoseconds: u64) -> i32 {
    // SAFETY: as above.
    let shared = unsafe { shared(ctx) };
    let now = shared.machine().bus.now.as_nanos() as u64;
    let mut timers = lock(&shared.timers);
    if timers.len() >= TIMERS_MAX && !timers.contains_key(&cookie) {
        return Errno::ENOSPC.status();
    }
    timers.insert(cookie, now.saturating_add(nanoseconds));
    0
}

unsafe extern "C" fn timer_cancel(ctx: *const CallContext, cookie: u64) -> i32 {
    // SAFETY: as above.
    let removed = lock(&unsafe { shared(ctx) }.timers).remove(&cookie);
    status(removed.map(|_| ()).ok_or(Errno::ENOENT))
}

unsafe extern "C" fn get_extension(_: *const CallContext, _: Bytes) -> *const c_void {
    std::ptr::null()
}
