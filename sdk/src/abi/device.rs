//! A device as a plug-in sees it: its identity, and the tables that `open` returns.

use abi_stable::StableAbi;

use super::{Bytes, CallContext, DirtyOps, IrqHooks, MigrationOps, Opaque, RegionHooks};

/// [`DeviceIdentity::backend`]: VFIO group with a type1 container.
pub const BACKEND_VFIO_GROUP: u32 = 1;
/// [`DeviceIdentity::backend`]: VFIO character device with iommufd.
pub const BACKEND_VFIO_CDEV: u32 = 2;
/// [`DeviceIdentity::backend`]: a simulated device.
pub const BACKEND_SIM: u32 = 3;

/// Which device this is. Valid during the call only.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct DeviceIdentity {
    pub struct_size: u32,
    pub backend: u32,
    pub vendor_id: u16,
    pub device_id: u16,
    pub subsystem_vendor_id: u16,
    pub subsystem_device_id: u16,
    /// base class, subclass, programming interface in bits 23:0
    pub class_code: u32,
    pub revision: u8,
    pub reserved: [u8; 3],
    pub num_regions: u32,
    pub num_irqs: u32,
    /// The PCI address, or a simulated device's name
    pub name: Bytes,
    /// The first 256 bytes of configuration space as they were at open
    pub config: Bytes,
}

/// [`RegionClaim::maps`]: the claim holds in normal running.
pub const MAP_NORMAL: u32 = 1 << 0;
/// [`RegionClaim::maps`]: the claim holds while dirty pages are tracked.
pub const MAP_TRACKING: u32 = 1 << 1;

/// One claimed byte range of one region, with its hooks.
///
/// In each map (normal, tracking) the claims of one region must not overlap. Every byte of the range loses its mmap
/// while the claim holds, unless the `mmap` hook gives one of its own.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct RegionClaim {
    pub struct_size: u32,
    /// VFIO region index
    pub region: u32,
    /// Byte range inside the region; `length` is not 0
    pub offset: u64,
    pub length: u64,
    /// `MAP_*` bits, at least one
    pub maps: u32,
    pub reserved: u32,
    pub hooks: *const RegionHooks,
    /// Handed to each hook
    pub data: Opaque,
}

/// Claimed vectors `start .. start + count` of one irq index.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct IrqClaim {
    pub struct_size: u32,
    /// VFIO irq index
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub hooks: *const IrqHooks,
    pub data: Opaque,
}

/// A region that the plug-in adds. Its index is the device's own count plus its position in the list, and stays so
/// for the device's life.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct ExtraRegion {
    pub struct_size: u32,
    /// `VFIO_REGION_INFO_FLAG_READ | WRITE`
    pub flags: u32,
    pub size: u64,
    /// For the region-type capability
    pub type_: u32,
    pub subtype: u32,
    /// `rw` must not be null: there is no device behind this region
    pub hooks: *const RegionHooks,
    pub data: Opaque,
}

/// An irq index that the plug-in adds, numbered like [`ExtraRegion`].
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct ExtraIrq {
    pub struct_size: u32,
    /// `VFIO_IRQ_INFO_*`
    pub flags: u32,
    pub count: u32,
    pub reserved: u32,
}

/// What `open` fills in. All that it points to lives until `close` returns.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct DeviceOps {
    pub struct_size: u32,
    pub reserved: u32,
    /// Handed to each function of this device
    pub state: Opaque,
    pub regions: *const RegionClaim,
    pub region_count: usize,
    pub irqs: *const IrqClaim,
    pub irq_count: usize,
    pub extra_regions: *const ExtraRegion,
    pub extra_region_count: usize,
    pub extra_irqs: *const ExtraIrq,
    pub extra_irq_count: usize,
    /// Null: the plug-in does not save or restore the device (its own driver may)
    pub migration: *const MigrationOps,
    /// Null: the plug-in does not track dirty pages
    pub dirty: *const DirtyOps,
    /// Called after the fact, on any thread, never concurrently with itself. A negative answer to `EVENT_DMA_MAP` or
    /// `EVENT_RESET_PREPARE` refuses it; other answers are logged. Null: no interest.
    pub event: Option<unsafe extern "C" fn(state: Opaque, ctx: *const CallContext, event: *const Event) -> i32>,
    /// The last call for this device; no hook is in flight. `ctx` still reaches the device. Null: nothing to free.
    pub close: Option<unsafe extern "C" fn(state: Opaque, ctx: *const CallContext)>,
}

/// [`Event::kind`]: the device is about to be reset.
pub const EVENT_RESET_PREPARE: u32 = 1;
/// [`Event::kind`]: the device was reset.
pub const EVENT_RESET_DONE: u32 = 2;
/// [`Event::kind`]: `args` = iova, length in bytes, 1 if the device may write.
pub const EVENT_DMA_MAP: u32 = 3;
/// [`Event::kind`]: `args` = iova, length in bytes.
pub const EVENT_DMA_UNMAP: u32 = 4;
/// [`Event::kind`]: `args[0]` = 1 when COMMAND's bus-master bit went on, 0 when it went off.
pub const EVENT_BUS_MASTER: u32 = 5;
/// [`Event::kind`]: `args[0]` = 1 entering low power, 0 leaving it.
pub const EVENT_POWER: u32 = 6;
/// [`Event::kind`]: a front-end client came.
pub const EVENT_CLIENT_ATTACH: u32 = 7;
/// [`Event::kind`]: a front-end client went.
pub const EVENT_CLIENT_DETACH: u32 = 8;
/// [`Event::kind`]: the device reported an error or was failed; `args[0]` = errno.
pub const EVENT_DEVICE_ERROR: u32 = 9;
/// [`Event::kind`]: a timer of this device fired; `args[0]` = its cookie.
pub const EVENT_TIMER: u32 = 10;

/// Something happened to a device.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct Event {
    pub struct_size: u32,
    /// `EVENT_*`; a plug-in ignores kinds that it does not know
    pub kind: u32,
    pub args: [u64; 3],
}
