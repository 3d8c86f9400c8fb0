//! Hook tables: what a claim may intercept, and how it answers.

use abi_stable::StableAbi;

use super::{CallContext, Opaque};

/// A verdict: the hook did it all.
pub const VERDICT_HANDLED: i32 = 0;
/// A verdict: the host goes on with the device's own behaviour, with the data as the hook left them.
pub const VERDICT_FORWARD: i32 = 1;
// A negative verdict denies the access with that errno. Any other number is the plug-in's fault and denies with EIO.

/// One access to a claimed byte range.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct Access {
    pub struct_size: u32,
    /// VFIO region index
    pub region: u32,
    /// Byte offset inside the region, within the claim
    pub offset: u64,
    /// Bytes, 1 or more; an access that straddles claims arrives in ascending pieces
    pub length: u64,
    /// On a write the data, which a hook may change before it forwards. On a read the place for the data: zeroed.
    pub data: *mut u8,
    /// 1 for a write, 0 for a read
    pub write: u32,
    pub reserved: u32,
}

/// Region information, in VFIO's words.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct RegionInfo {
    pub struct_size: u32,
    pub index: u32,
    /// `VFIO_REGION_INFO_FLAG_*` without CAPS. A hook may clear flags, never set one that the device lacks.
    pub flags: u32,
    pub reserved: u32,
    /// Bytes. A hook may make it smaller.
    pub size: u64,
}

/// A question: where may the client map?
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct MmapRequest {
    pub struct_size: u32,
    pub region: u32,
    /// Byte range inside the claim, on page boundaries
    pub offset: u64,
    pub length: u64,
    /// Out, on HANDLED: a file whose pages `fd_offset ..` are mapped in place of the device's. The host duplicates it.
    pub fd: i32,
    pub reserved: u32,
    pub fd_offset: u64,
}

/// What one claim intercepts. A null hook is passthrough and costs nothing.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct RegionHooks {
    pub struct_size: u32,
    pub reserved: u32,
    /// Called for every read and write of a byte of the claim. In states RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P;
    /// for configuration space after the permission filter, and in STOP and RESUMING too. Null: the bytes reach the
    /// device, but are still not mapped.
    pub rw:
        Option<unsafe extern "C" fn(state: Opaque, data: Opaque, ctx: *const CallContext, access: *mut Access) -> i32>,
    /// May narrow what the client is told of the region. Null: the device's own.
    pub region_info: Option<
        unsafe extern "C" fn(state: Opaque, data: Opaque, ctx: *const CallContext, info: *mut RegionInfo) -> i32,
    >,
    /// FORWARD or a negative number: the range is not mapped (it is claimed). HANDLED: the file that the request names
    /// is mapped instead. Null: not mapped.
    pub mmap: Option<
        unsafe extern "C" fn(state: Opaque, data: Opaque, ctx: *const CallContext, request: *mut MmapRequest) -> i32,
    >,
}

/// Irq information, in VFIO's words.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct IrqInfo {
    pub struct_size: u32,
    pub index: u32,
    /// `VFIO_IRQ_INFO_*`
    pub flags: u32,
    pub count: u32,
}

/// `set_irqs`: [`IrqRequest::action`], as `VFIO_IRQ_SET_ACTION_*` without the shift.
pub const IRQ_MASK: u32 = 0;
pub const IRQ_UNMASK: u32 = 1;
pub const IRQ_TRIGGER: u32 = 2;
/// [`IrqRequest::data_kind`]: none.
pub const IRQ_DATA_NONE: u32 = 0;
/// [`IrqRequest::data_kind`]: `bools` holds `count` bytes, 0 or 1.
pub const IRQ_DATA_BOOL: u32 = 1;
/// [`IrqRequest::data_kind`]: `fds` holds `count` descriptors, -1 for none. They stay the host's.
pub const IRQ_DATA_EVENTFD: u32 = 2;

/// A `VFIO_DEVICE_SET_IRQS` that touches claimed vectors.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct IrqRequest {
    pub struct_size: u32,
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub action: u32,
    pub data_kind: u32,
    pub bools: *const u8,
    pub fds: *const i32,
}

/// What an irq claim intercepts.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct IrqHooks {
    pub struct_size: u32,
    pub reserved: u32,
    /// May narrow what the client is told. Null: the device's own.
    pub irq_info:
        Option<unsafe extern "C" fn(state: Opaque, data: Opaque, ctx: *const CallContext, info: *mut IrqInfo) -> i32>,
    /// Null: passes.
    pub set_irqs: Option<
        unsafe extern "C" fn(state: Opaque, data: Opaque, ctx: *const CallContext, request: *const IrqRequest) -> i32,
    >,
    /// A vector fired. HANDLED swallows it, FORWARD passes it on. Interposes the host's eventfd between the device and
    /// the client. Null: the device signals the client directly.
    pub fired: Option<
        unsafe extern "C" fn(state: Opaque, data: Opaque, ctx: *const CallContext, index: u32, vector: u32) -> i32,
    >,
}
