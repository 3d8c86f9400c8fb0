//! The shims of migration and dirty tracking.
#![allow(unsafe_code)]

use super::device::device;
use super::{guard, guard_unit};
use crate::abi::{self, Opaque};
use crate::context::{Context, size32};
use crate::device::{DirtyBitmap, DirtyTracking, Exactness, Migration};
use crate::state::{DeviceState, MigrationFlags};
use crate::{Errno, Result};

pub(crate) fn migration_ops<D: Migration>(flags: MigrationFlags) -> abi::MigrationOps {
    abi::MigrationOps {
        struct_size: size32::<abi::MigrationOps>(),
        reserved: 0,
        flags: flags.raw(),
        match_data: Some(match_data::<D>),
        check_match: Some(check_match::<D>),
        set_state: Some(set_state::<D>),
        save: Some(save::<D>),
        load: Some(load::<D>),
        remaining: Some(remaining::<D>),
    }
}

pub(crate) fn dirty_ops<D: DirtyTracking>(exactness: Exactness) -> abi::DirtyOps {
    abi::DirtyOps {
        struct_size: size32::<abi::DirtyOps>(),
        exactness: match exactness {
            Exactness::Exact => abi::DIRTY_EXACT,
            Exactness::Superset => abi::DIRTY_SUPERSET,
        },
        start: Some(start::<D>),
        report: Some(report::<D>),
        stop: Some(stop::<D>),
    }
}

// As in `device`: `state` is the one that the host was given with the table, everything else lives during the call, and
// buffers are initialised memory that is exclusively ours until it returns.

unsafe extern "C" fn match_data<D: Migration>(
    state: Opaque,
    ctx: *const abi::CallContext,
    buffer: *mut u8,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    guard("match_data", || {
        // SAFETY: this call's.
        let (device, cx, buffer) =
            unsafe { (device::<D>(state), Context::from_raw(ctx), slice_mut(buffer, capacity)?) };
        let data = device.match_data(&cx)?;
        buffer.get_mut(..data.len()).ok_or(Errno::ERANGE)?.copy_from_slice(&data);
        // SAFETY: the host's place for the count.
        unsafe { length.write(data.len()) };
        Ok(0)
    })
}

unsafe extern "C" fn check_match<D: Migration>(
    state: Opaque,
    ctx: *const abi::CallContext,
    data: *const u8,
    length: usize,
    reason: *mut abi::Reason,
) -> i32 {
    guard("check_match", || {
        // SAFETY: this call's.
        let (device, cx, data) = unsafe { (device::<D>(state), Context::from_raw(ctx), slice(data, length)?) };
        device.check_match(&cx, data).map(|()| 0).map_err(|refusal| {
            // SAFETY: the host's structure, this call's.
            let reason = unsafe { reason.as_mut() };
            // SAFETY: its buffer, as above.
            let text = reason.and_then(|r| Some((unsafe { slice_mut(r.text, r.capacity) }.ok()?, &mut r.length)));
            if let Some((text, length)) = text {
                let fits = refusal.reason.floor_char_boundary(text.len());
                text[..fits].copy_from_slice(&refusal.reason.as_bytes()[..fits]);
                *length = fits;
            }
            refusal.errno
        })
    })
}

unsafe extern "C" fn set_state<D: Migration>(
    state: Opaque,
    ctx: *const abi::CallContext,
    from: u32,
    to: u32,
    actual: *mut u32,
) -> i32 {
    let mut reached = abi::STATE_ERROR;
    let status = guard("set_state", || {
        let (Some(from), Some(to)) = (DeviceState::from_raw(from), DeviceState::from_raw(to)) else {
            reached = from;
            return Err(Errno::EINVAL);
        };
        // SAFETY: this call's.
        let (device, cx) = unsafe { (device::<D>(state), Context::from_raw(ctx)) };
        match device.set_state(&cx, from, to) {
            Ok(()) => {
                reached = to.raw();
                Ok(0)
            }
            Err(failed) => {
                reached = failed.actual.raw();
                Err(failed.errno)
            }
        }
    });
    // After a panic nobody knows where the device is: ERROR, as `reached` began.
    // SAFETY: the host's place for it.
    unsafe { actual.write(reached) };
    status
}

unsafe extern "C" fn save<D: Migration>(
    state: Opaque,
    ctx: *const abi::CallContext,
    buffer: *mut u8,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    guard("save", || {
        // SAFETY: this call's.
        let (device, cx, buffer) =
            unsafe { (device::<D>(state), Context::from_raw(ctx), slice_mut(buffer, capacity)?) };
        let saved = device.save(&cx, buffer)?;
        if saved.bytes > capacity {
            return Err(Errno::EOVERFLOW);
        }
        // SAFETY: the host's place for the count.
        unsafe { length.write(saved.bytes) };
        Ok(if saved.end { abi::SAVE_END } else { abi::SAVE_MORE })
    })
}

unsafe extern "C" fn load<D: Migration>(
    state: Opaque,
    ctx: *const abi::CallContext,
    data: *const u8,
    length: usize,
) -> i32 {
    guard("load", || {
        // SAFETY: this call's.
        let (device, cx, data) = unsafe { (device::<D>(state), Context::from_raw(ctx), slice(data, length)?) };
        device.load(&cx, data).map(|()| 0)
    })
}

unsafe extern "C" fn remaining<D: Migration>(
    state: Opaque,
    ctx: *const abi::CallContext,
    answer: *mut abi::Remaining,
) -> i32 {
    guard("remaining", || {
        // SAFETY: this call's.
        let (device, cx, answer) = unsafe { (device::<D>(state), Context::from_raw(ctx), &mut *answer) };
        let left = device.remaining(&cx)?;
        answer.initial_bytes = left.initial_bytes;
        answer.dirty_bytes = left.dirty_bytes;
        answer.stop_copy_bytes = left.stop_copy_bytes.unwrap_or(u64::MAX);
        Ok(0)
    })
}

unsafe extern "C" fn start<D: DirtyTracking>(
    state: Opaque,
    ctx: *const abi::CallContext,
    ranges: *const abi::IovaRange,
    count: usize,
    page_size: u64,
) -> i32 {
    guard("start", || {
        // SAFETY: this call's.
        let (device, cx, ranges) = unsafe { (device::<D>(state), Context::from_raw(ctx), slice(ranges, count)?) };
        device.start(&cx, ranges, page_size).map(|()| 0)
    })
}

unsafe extern "C" fn report<D: DirtyTracking>(
    state: Opaque,
    ctx: *const abi::CallContext,
    iova: u64,
    length: u64,
    page_size: u64,
    bitmap: *mut u64,
) -> i32 {
    guard("report", || {
        // SAFETY: this call's; the host sized the bitmap for the range.
        let (device, cx, mut bitmap) = unsafe {
            (device::<D>(state), Context::from_raw(ctx), DirtyBitmap::from_raw(iova, length, page_size, bitmap)?)
        };
        device.report(&cx, &mut bitmap).map(|()| 0)
    })
}

unsafe extern "C" fn stop<D: DirtyTracking>(state: Opaque, ctx: *const abi::CallContext) {
    guard_unit("stop", || {
        // SAFETY: this call's.
        let (device, cx) = unsafe { (device::<D>(state), Context::from_raw(ctx)) };
        device.stop(&cx);
    });
}

/// # Safety
/// `length` elements live at `ptr` during `'a`, unless `length` is 0.
unsafe fn slice<'a, T>(ptr: *const T, length: usize) -> Result<&'a [T]> {
    match (ptr.is_null(), length) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(Errno::EINVAL),
        // SAFETY: by the caller.
        (false, _) => Ok(unsafe { std::slice::from_raw_parts(ptr, length) }),
    }
}

/// # Safety
/// As [`slice`], and the bytes are exclusively the caller's.
unsafe fn slice_mut<'a>(ptr: *mut u8, length: usize) -> Result<&'a mut [u8]> {
    match (ptr.is_null(), length) {
        (_, 0) => Ok(&mut []),
        (true, _) => Err(Errno::EINVAL),
        // SAFETY: by the caller.
        (false, _) => Ok(unsafe { std::slice::from_raw_parts_mut(ptr, length) }),
    }
}
