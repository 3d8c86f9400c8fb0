//! What the host does for a plug-in.

use std::ffi::c_void;

use abi_stable::StableAbi;

use super::{Access, Bytes, IrqInfo, IrqRequest, RegionInfo};

/// [`CallContext::origin`]: an access or request of the client.
pub const ORIGIN_CLIENT: u32 = 1;
/// [`CallContext::origin`]: a step of a migration.
pub const ORIGIN_MIGRATION: u32 = 2;
/// [`CallContext::origin`]: the host's own doing: open, close, events, timers.
pub const ORIGIN_HOST: u32 = 3;

/// Comes with every call into a plug-in, and goes back with every call into the host. Valid on this thread until the
/// call returns; it carries the pass through the device's gate, so services never wait for the gate.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct CallContext {
    pub struct_size: u32,
    /// `ORIGIN_*`
    pub origin: u32,
    pub services: *const HostServices,
    /// The host's own
    pub host: *const c_void,
    /// When the caller gives up, in nanoseconds of `now`'s clock; `u64::MAX` when there is no limit
    pub deadline: u64,
}

/// Memory that the device can reach and the guest cannot see.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct Scratch {
    pub struct_size: u32,
    /// In: the device reaches only addresses below 2 to this power; 0 when it reaches all
    pub address_bits: u32,
    pub iova: u64,
    pub length: u64,
    /// The same memory in this process. The device may write it at any time.
    pub ptr: *mut u8,
}

/// [`HostServices::log`]: levels.
pub const LOG_ERROR: u32 = 1;
pub const LOG_WARN: u32 = 2;
pub const LOG_INFO: u32 = 3;
pub const LOG_DEBUG: u32 = 4;
pub const LOG_TRACE: u32 = 5;

/// [`HostServices::request`]: reset the device once this call has returned.
pub const REQUEST_RESET: u32 = 1;
/// [`HostServices::request`]: fail the device; `arg` is the errno.
pub const REQUEST_FAIL: u32 = 2;
/// [`HostServices::request`]: switch the trap map once this call has returned; `arg` is `MAP_NORMAL` or `MAP_TRACKING`.
pub const REQUEST_MAP: u32 = 3;

/// The host's side of the ABI. The table and its functions live as long as the process; none of them is null.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct HostServices {
    pub struct_size: u32,
    pub abi_major: u16,
    pub abi_minor: u16,
    /// Any thread, any time, without a context. The host limits its rate.
    pub log: unsafe extern "C" fn(level: u32, target: Bytes, message: Bytes),
    /// Reads the device itself, past every hook. ENODEV once the device is lost, EIO where it cannot be reached.
    pub region_read:
        unsafe extern "C" fn(ctx: *const CallContext, region: u32, offset: u64, data: *mut u8, length: usize) -> i32,
    pub region_write:
        unsafe extern "C" fn(ctx: *const CallContext, region: u32, offset: u64, data: *const u8, length: usize) -> i32,
    /// What the host does where a hook forwards: for a hook that wants to see the result.
    pub default_rw: unsafe extern "C" fn(ctx: *const CallContext, access: *mut Access) -> i32,
    pub default_region_info: unsafe extern "C" fn(ctx: *const CallContext, info: *mut RegionInfo) -> i32,
    pub default_irq_info: unsafe extern "C" fn(ctx: *const CallContext, info: *mut IrqInfo) -> i32,
    pub default_set_irqs: unsafe extern "C" fn(ctx: *const CallContext, request: *const IrqRequest) -> i32,
    /// Guest memory by IOVA. EFAULT where nothing (or nothing writable) is mapped; then nothing was copied. A write is
    /// marked dirty by the host.
    pub guest_read: unsafe extern "C" fn(ctx: *const CallContext, iova: u64, data: *mut u8, length: usize) -> i32,
    pub guest_write: unsafe extern "C" fn(ctx: *const CallContext, iova: u64, data: *const u8, length: usize) -> i32,
    /// The device wrote (or may have written) these bytes. Unmapped parts are ignored and reported by EFAULT.
    pub mark_dirty: unsafe extern "C" fn(ctx: *const CallContext, iova: u64, length: u64) -> i32,
    /// `scratch.length` in, a multiple of 4096 and at most 16 MiB; the rest out. Freed at `close` at the latest.
    pub scratch_alloc: unsafe extern "C" fn(ctx: *const CallContext, scratch: *mut Scratch) -> i32,
    pub scratch_free: unsafe extern "C" fn(ctx: *const CallContext, iova: u64) -> i32,
    /// Signals the client's eventfd of this vector, if it has one.
    pub irq_inject: unsafe extern "C" fn(ctx: *const CallContext, index: u32, vector: u32) -> i32,
    /// Asks for a change that must not happen inside a hook: queued, and done after the call has returned. `REQUEST_*`.
    pub request: unsafe extern "C" fn(ctx: *const CallContext, what: u32, arg: u64) -> i32,
    /// The device's clock in nanoseconds: monotonic, virtual for simulated devices.
    pub now: unsafe extern "C" fn(ctx: *const CallContext) -> u64,
    /// Waits on that clock. ECANCELED when the call was cancelled, ETIMEDOUT at the context's deadline.
    pub wait: unsafe extern "C" fn(ctx: *const CallContext, nanoseconds: u64) -> i32,
    /// 1 when the caller has given up.
    pub cancelled: unsafe extern "C" fn(ctx: *const CallContext) -> i32,
    /// One-shot `EVENT_TIMER` with this cookie; setting it again moves it. At most 16 cookies a device, else ENOSPC.
    pub timer_arm: unsafe extern "C" fn(ctx: *const CallContext, cookie: u64, nanoseconds: u64) -> i32,
    pub timer_cancel: unsafe extern "C" fn(ctx: *const CallContext, cookie: u64) -> i32,
    /// A table for `id` (`vfio-mediate.name/1`), or null. The host's own pointer comes with the context.
    pub get_extension: unsafe extern "C" fn(ctx: *const CallContext, id: Bytes) -> *const c_void,
}
