//! One open device: its tables, and the shims of its hooks.
#![allow(unsafe_code)]
#![allow(clippy::vec_box)] // the host holds pointers into the boxes, which must not move with the vector

use super::{guard, guard_unit};
use crate::abi::{self, Opaque};
use crate::access::Access;
use crate::context::{Context, size32};
use crate::device::{Device, Event, Events};
use crate::hooks::{IrqHookSet, IrqRequest, Layout, MmapRange, RegionHookSet, Vector};
use crate::{Errno, Verdict};

/// What `DeviceOps::state` points at: the device, its hooks, and the tables that the host reads.
pub(super) struct Instance<D> {
    device: D,
    // Tables point into these boxes; neither they nor the tables change after `new`.
    _region_hooks: Vec<Box<(RegionHookSet<D>, abi::RegionHooks)>>,
    _irq_hooks: Vec<Box<(IrqHookSet<D>, abi::IrqHooks)>>,
    regions: Vec<abi::RegionClaim>,
    irqs: Vec<abi::IrqClaim>,
    extra_regions: Vec<abi::ExtraRegion>,
    extra_irqs: Vec<abi::ExtraIrq>,
    migration: Option<Box<abi::MigrationOps>>,
    dirty: Option<Box<abi::DirtyOps>>,
    event: Option<crate::hooks::EventFn>,
}

impl<D: Device> Instance<D> {
    pub(super) fn new(device: D, layout: Layout<D>) -> Self {
        let mut region_hooks = Vec::new();
        let mut irq_hooks = Vec::new();
        let regions = layout.claims.into_iter().map(|claim| {
            let (hooks, data) = keep_region_hooks(&mut region_hooks, claim.hooks);
            abi::RegionClaim {
                struct_size: size32::<abi::RegionClaim>(),
                region: claim.region,
                offset: claim.range.start,
                // A range that runs backwards is empty; the host refuses empty claims.
                length: claim.range.end.saturating_sub(claim.range.start),
                maps: claim.maps.raw(),
                reserved: 0,
                hooks,
                data,
            }
        });
        let regions = regions.collect();
        let extra_regions = layout.extra_regions.into_iter().map(|region| {
            let (hooks, data) = keep_region_hooks(&mut region_hooks, region.hooks);
            abi::ExtraRegion {
                struct_size: size32::<abi::ExtraRegion>(),
                flags: region.flags,
                size: region.size,
                type_: region.type_,
                subtype: region.subtype,
                hooks,
                data,
            }
        });
        let extra_regions = extra_regions.collect();
        let irqs = layout.irqs.into_iter().map(|claim| {
            let (hooks, data) = keep_irq_hooks(&mut irq_hooks, claim.hooks);
            abi::IrqClaim {
                struct_size: size32::<abi::IrqClaim>(),
                index: claim.index,
                start: claim.vectors.start,
                count: claim.vectors.end.saturating_sub(claim.vectors.start),
                hooks,
                data,
            }
        });
        let irqs = irqs.collect();
        Self {
            device,
            regions,
            irqs,
            extra_regions,
            extra_irqs: layout.extra_irqs,
            migration: layout.migration.map(Box::new),
            dirty: layout.dirty.map(Box::new),
            event: layout.event,
            _region_hooks: region_hooks,
            _irq_hooks: irq_hooks,
        }
    }

    /// Hands the instance to the host, until `close`.
    pub(super) fn publish(instance: Box<Self>) -> abi::DeviceOps {
        let state = Box::into_raw(instance);
        // SAFETY: just leaked, so alive; nobody else has it yet.
        let instance = unsafe { &*state };
        abi::DeviceOps {
            struct_size: size32::<abi::DeviceOps>(),
            reserved: 0,
            state: state.cast(),
            regions: instance.regions.as_ptr(),
            region_count: instance.regions.len(),
            irqs: instance.irqs.as_ptr(),
            irq_count: instance.irqs.len(),
            extra_regions: instance.extra_regions.as_ptr(),
            extra_region_count: instance.extra_regions.len(),
            extra_irqs: instance.extra_irqs.as_ptr(),
            extra_irq_count: instance.extra_irqs.len(),
            migration: instance.migration.as_deref().map_or(std::ptr::null(), std::ptr::from_ref),
            dirty: instance.dirty.as_deref().map_or(std::ptr::null(), std::ptr::from_ref),
            event: instance.event,
            close: Some(close::<D>),
        }
    }
}

/// The device behind a `state`.
///
/// # Safety
/// `state` came from [`Instance::publish`] of the same `D`, and `close` has not returned.
pub(super) unsafe fn device<'a, D: Device>(state: Opaque) -> &'a D {
    // SAFETY: by the caller.
    unsafe { &(*state.cast::<Instance<D>>()).device }
}

fn keep_region_hooks<D: Device>(
    kept: &mut Vec<Box<(RegionHookSet<D>, abi::RegionHooks)>>,
    hooks: RegionHookSet<D>,
) -> (*const abi::RegionHooks, Opaque) {
    let table = abi::RegionHooks {
        struct_size: size32::<abi::RegionHooks>(),
        reserved: 0,
        rw: hooks.rw.is_some().then_some(rw::<D> as _),
        region_info: hooks.region_info.is_some().then_some(region_info::<D> as _),
        mmap: hooks.mmap.is_some().then_some(mmap::<D> as _),
    };
    let pair = Box::new((hooks, table));
    let pointers = (&raw const pair.1, (&raw const pair.0).cast_mut().cast());
    kept.push(pair);
    pointers
}

fn keep_irq_hooks<D: Device>(
    kept: &mut Vec<Box<(IrqHookSet<D>, abi::IrqHooks)>>,
    hooks: IrqHookSet<D>,
) -> (*const abi::IrqHooks, Opaque) {
    let table = abi::IrqHooks {
        struct_size: size32::<abi::IrqHooks>(),
        reserved: 0,
        irq_info: hooks.irq_info.is_some().then_some(irq_info::<D> as _),
        set_irqs: hooks.set_irqs.is_some().then_some(set_irqs::<D> as _),
        fired: hooks.fired.is_some().then_some(fired::<D> as _),
    };
    let pair = Box::new((hooks, table));
    let pointers = (&raw const pair.1, (&raw const pair.0).cast_mut().cast());
    kept.push(pair);
    pointers
}

// Every shim below is called by the host with the `state` and `data` that it was given for this table, and with a context
// and structures that live during the call: the contracts in `abi`. Each SAFETY text names what it relies on of that.

unsafe extern "C" fn rw<D: Device>(
    state: Opaque,
    data: Opaque,
    ctx: *const abi::CallContext,
    access: *mut abi::Access,
) -> i32 {
    guard("an rw hook", || {
        // SAFETY: ours, from `keep_region_hooks`, alive until `close`; the context and the access of this call.
        let (device, hooks, cx, mut access) = unsafe {
            (device::<D>(state), &*data.cast::<RegionHookSet<D>>(), Context::from_raw(ctx), Access::from_raw(access)?)
        };
        let hook = hooks.rw.as_ref().ok_or(Errno::EIO)?;
        Ok(hook(device, &cx, &mut access).status())
    })
}

unsafe extern "C" fn region_info<D: Device>(
    state: Opaque,
    data: Opaque,
    ctx: *const abi::CallContext,
    info: *mut abi::RegionInfo,
) -> i32 {
    guard("a region_info hook", || {
        // SAFETY: as in `rw`; the structure is the host's, exclusively ours during the call.
        let (device, hooks, cx, info) =
            unsafe { (device::<D>(state), &*data.cast::<RegionHookSet<D>>(), Context::from_raw(ctx), &mut *info) };
        let hook = hooks.region_info.as_ref().ok_or(Errno::EIO)?;
        hook(device, &cx, info).map(|()| 0)
    })
}

unsafe extern "C" fn mmap<D: Device>(
    state: Opaque,
    data: Opaque,
    ctx: *const abi::CallContext,
    request: *mut abi::MmapRequest,
) -> i32 {
    guard("an mmap hook", || {
        // SAFETY: as in `region_info`.
        let (device, hooks, cx, request) =
            unsafe { (device::<D>(state), &*data.cast::<RegionHookSet<D>>(), Context::from_raw(ctx), &mut *request) };
        let hook = hooks.mmap.as_ref().ok_or(Errno::EIO)?;
        let range = MmapRange { region: request.region, offset: request.offset, length: request.length };
        Ok(match hook(device, &cx, range) {
            Some(file) => {
                request.fd = std::os::fd::AsRawFd::as_raw_fd(&file.fd);
                request.fd_offset = file.offset;
                abi::VERDICT_HANDLED
            }
            None => abi::VERDICT_FORWARD,
        })
    })
}

unsafe extern "C" fn irq_info<D: Device>(
    state: Opaque,
    data: Opaque,
    ctx: *const abi::CallContext,
    info: *mut abi::IrqInfo,
) -> i32 {
    guard("an irq_info hook", || {
        // SAFETY: as in `region_info`, with the hooks of `keep_irq_hooks`.
        let (device, hooks, cx, info) =
            unsafe { (device::<D>(state), &*data.cast::<IrqHookSet<D>>(), Context::from_raw(ctx), &mut *info) };
        let hook = hooks.irq_info.as_ref().ok_or(Errno::EIO)?;
        hook(device, &cx, info).map(|()| 0)
    })
}

unsafe extern "C" fn set_irqs<D: Device>(
    state: Opaque,
    data: Opaque,
    ctx: *const abi::CallContext,
    request: *const abi::IrqRequest,
) -> i32 {
    guard("a set_irqs hook", || {
        // SAFETY: as in `irq_info`; the request and its data live during the call.
        let (device, hooks, cx, request) = unsafe {
            (device::<D>(state), &*data.cast::<IrqHookSet<D>>(), Context::from_raw(ctx), IrqRequest::from_raw(request)?)
        };
        let hook = hooks.set_irqs.as_ref().ok_or(Errno::EIO)?;
        Ok(hook(device, &cx, &request).status())
    })
}

unsafe extern "C" fn fired<D: Device>(
    state: Opaque,
    data: Opaque,
    ctx: *const abi::CallContext,
    index: u32,
    vector: u32,
) -> i32 {
    guard("a fired hook", || {
        // SAFETY: as in `irq_info`.
        let (device, hooks, cx) =
            unsafe { (device::<D>(state), &*data.cast::<IrqHookSet<D>>(), Context::from_raw(ctx)) };
        let hook = hooks.fired.as_ref().ok_or(Errno::EIO)?;
        let verdict: Verdict = hook(device, &cx, Vector { index, vector });
        Ok(verdict.status())
    })
}

pub(crate) unsafe extern "C" fn event<D: Events>(
    state: Opaque,
    ctx: *const abi::CallContext,
    event: *const abi::Event,
) -> i32 {
    guard("event", || {
        // SAFETY: as in `region_info`.
        let (device, cx, event) = unsafe { (device::<D>(state), Context::from_raw(ctx), &*event) };
        match Event::from_raw(event) {
            Some(event) => device.event(&cx, event).map(|()| 0),
            // A newer host's; plug-ins ignore what they do not know.
            None => Ok(0),
        }
    })
}

unsafe extern "C" fn close<D: Device>(state: Opaque, ctx: *const abi::CallContext) {
    // Two guards: the device is dropped even when its `close` panics.
    guard_unit("close", || {
        // SAFETY: as in `region_info`.
        let (device, cx) = unsafe { (device::<D>(state), Context::from_raw(ctx)) };
        device.close(&cx);
    });
    guard_unit("drop", || {
        // SAFETY: boxed in `publish`; this is the last call and no hook is in flight, by the contract of `close`.
        drop(unsafe { Box::from_raw(state.cast::<Instance<D>>()) });
    });
}
