//! What a library exports, and what is read before any of its code runs.

use std::ffi::c_void;

use abi_stable::StableAbi;

use super::{Bytes, DeviceIdentity, DeviceOps, HostServices, Opaque};

/// The name of the one exported symbol, a static [`Entry`].
pub const ENTRY_SYMBOL: &str = "vfio_mediate_plugin";
/// "VFIOMED1" read as a little-endian number.
pub const ENTRY_MAGIC: u64 = u64::from_le_bytes(*b"VFIOMED1");
/// A plug-in loads when its major version equals the host's.
pub const ABI_MAJOR: u16 = 1;
/// Raised with every new extension; a host takes any minor version.
pub const ABI_MINOR: u16 = 0;

/// [`Entry::flags`]: a panic in this plug-in aborts the process (`panic=abort`), so that the host cannot contain it.
pub const ENTRY_PANIC_ABORTS: u32 = 1 << 0;

/// The exported symbol. The host reads it before it runs anything of the plug-in.
///
/// A Rust plug-in points `rust_header` at its sdk's [`RUST_HEADER`](crate::layout::RUST_HEADER), whose layout the host compares with its own in both
/// directions. A C plug-in leaves it null and is checked by `abi_major`, `struct_size` and `fingerprint`, which the
/// generated header defines.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct Entry {
    /// [`ENTRY_MAGIC`]
    pub magic: u64,
    /// `sizeof(Entry)` as the plug-in was compiled
    pub struct_size: u32,
    pub abi_major: u16,
    pub abi_minor: u16,
    /// [`ABI_FINGERPRINT`](crate::layout::ABI_FINGERPRINT) as the plug-in was compiled: a hash over the sizes and offsets of every structure of the ABI
    pub fingerprint: u64,
    /// `ENTRY_*` bits; unknown bits are refused
    pub flags: u32,
    pub reserved: u32,
    /// [`RustHeader`](crate::layout::RustHeader), or null for a plug-in that is not written in Rust
    pub rust_header: *const c_void,
    /// Never null
    pub plugin: *const Plugin,
}

// SAFETY: an entry is immutable and points at statics only; upheld by the macro that exports it, or by C's author.
#[allow(unsafe_code)]
unsafe impl Sync for Entry {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Send for Entry {}

/// A PCI function that a plug-in wants to be asked about. `ANY_ID` matches everything.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct DeviceMatch {
    pub vendor_id: u32,
    pub device_id: u32,
    pub subsystem_vendor_id: u32,
    pub subsystem_device_id: u32,
}

/// Matches every id, as in the kernel's `PCI_ANY_ID`.
pub const ANY_ID: u32 = 0xffff_ffff;

/// [`Plugin::probe`]: not mine. The next plug-in is asked, then the device passes through plainly.
pub const PROBE_DECLINE: i32 = 0;
/// [`Plugin::probe`]: mine.
pub const PROBE_CLAIM: i32 = 1;

/// A plug-in: who it is, which devices it knows, how to open one.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct Plugin {
    pub struct_size: u32,
    pub reserved: u32,
    /// Identifies the plug-in: 1 to 64 bytes of `[a-z0-9_-]`. Two versions of one plug-in share it.
    pub name: Bytes,
    /// Semantic version, 1 to 64 bytes
    pub version: Bytes,
    /// For people, 0 to 128 bytes
    pub vendor: Bytes,
    /// Devices to be asked about. An empty list matches nothing.
    pub matches: *const DeviceMatch,
    pub match_count: usize,
    /// Called once, before the first `probe`, on the thread that registers. Stores what the plug-in needs for all its
    /// devices in `state`. Null: nothing to do.
    pub init: Option<unsafe extern "C" fn(services: *const HostServices, state: *mut Opaque) -> i32>,
    /// Claim or decline: [`PROBE_CLAIM`], [`PROBE_DECLINE`], or `-errno` when the device is the plug-in's and cannot be
    /// served (the open fails then; declining is not failing). May only look at `identity`. Null: claims what matches.
    pub probe: Option<unsafe extern "C" fn(state: Opaque, identity: *const DeviceIdentity) -> i32>,
    /// Opens a device that was claimed. `ops` comes zeroed, with its `struct_size` set, and is filled in. The device
    /// may be read and written through `ctx`; it is in state RUNNING. After a failure `close` is not called.
    pub open: Option<
        unsafe extern "C" fn(
            state: Opaque,
            ctx: *const super::CallContext,
            identity: *const DeviceIdentity,
            ops: *mut DeviceOps,
        ) -> i32,
    >,
    /// Called once when the last reference has gone; afterwards no code of the plug-in runs again. Null: nothing to do.
    pub retire: Option<unsafe extern "C" fn(state: Opaque)>,
    /// A table for `id` (`vendor.name/1`), or null. Null: no extensions.
    pub get_extension: Option<unsafe extern "C" fn(state: Opaque, id: Bytes) -> *const c_void>,
}

// SAFETY: as for `Entry`.
#[allow(unsafe_code)]
unsafe impl Sync for Plugin {}
// SAFETY: as for `Entry`.
#[allow(unsafe_code)]
unsafe impl Send for Plugin {}
