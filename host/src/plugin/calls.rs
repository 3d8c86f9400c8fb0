//! The types of calls between the host and a plug-in, in Rust's words.
//!
//! `ffi` turns them into the ABI's and back. What mediation has to provide is [`HostCalls`].

use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::DeviceState;

/// Which device a plug-in is asked about.
#[derive(Debug, Clone, Copy)]
pub struct ProbeIdentity<'a> {
    /// PCI address, or a simulated device's name
    pub name: &'a str,
    /// `abi::BACKEND_*`
    pub backend: u32,
    pub vendor_id: u16,
    pub device_id: u16,
    pub subsystem_vendor_id: u16,
    pub subsystem_device_id: u16,
    pub class_code: u32,
    pub revision: u8,
    pub num_regions: u32,
    pub num_irqs: u32,
    /// The first 256 bytes of configuration space
    pub config: &'a [u8],
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Client,
    Migration,
    Host,
}

/// How a call into a plug-in is made. `deadline` is in nanoseconds of [`HostCalls::now`], `u64::MAX` for none.
#[derive(Debug, Clone, Copy)]
pub struct CallFrame<'a> {
    pub origin: Origin,
    pub deadline: u64,
    pub cancel: Option<&'a AtomicBool>,
}

impl CallFrame<'_> {
    pub const fn new(origin: Origin) -> Self {
        Self { origin, deadline: u64::MAX, cancel: None }
    }
}

/// A hook's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Handled,
    Forward,
    Deny(Errno),
}

/// A hook's answer to a question for a mapping.
#[derive(Debug)]
pub enum MmapAnswer {
    NotMapped,
    /// Map this file at this offset instead
    Instead {
        fd: OwnedFd,
        offset: u64,
    },
}

/// The two sets of claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrapMap {
    Normal,
    Tracking,
}

/// What a plug-in asks for that must not happen inside its call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Reset,
    Fail(Errno),
    Map(TrapMap),
}

/// Memory that the device can reach and the guest cannot see. `address` is where it is in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScratchMemory {
    pub iova: u64,
    pub length: u64,
    pub address: u64,
}

#[derive(Debug, Clone, Copy)]
pub enum IrqRequestData<'a> {
    None,
    Bool(&'a [u8]),
    /// -1 for none
    EventFd(&'a [RawFd]),
}

/// `VFIO_DEVICE_SET_IRQS` across the boundary. `action` is `abi::IRQ_*`.
#[derive(Debug, Clone, Copy)]
pub struct IrqRequest<'a> {
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub action: u32,
    pub data: IrqRequestData<'a>,
}

/// What the host does for a plug-in. Called on the thread of the plug-in's call, under that call's pass through the
/// device's gate: an implementation must not wait for the gate.
pub trait HostCalls: Send + Sync {
    /// The device itself, past every hook.
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;
    /// What the host does where a hook forwards.
    fn default_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn default_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;
    fn region_info(&self, index: u32) -> Result<abi::RegionInfo, Errno>;
    fn irq_info(&self, index: u32) -> Result<abi::IrqInfo, Errno>;
    fn set_irqs(&self, request: &IrqRequest<'_>) -> Result<(), Errno>;
    fn guest_read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn guest_write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;
    fn mark_dirty(&self, iova: u64, length: u64) -> Result<(), Errno>;
    /// `address_bits`: the device reaches only IOVAs below 2^bits; 0 for all of them.
    fn scratch_alloc(&self, length: u64, address_bits: u32) -> Result<ScratchMemory, Errno>;
    fn scratch_free(&self, iova: u64) -> Result<(), Errno>;
    fn irq_inject(&self, index: u32, vector: u32) -> Result<(), Errno>;
    fn request(&self, request: Request) -> Result<(), Errno>;
    /// Nanoseconds on the device's clock.
    fn now(&self) -> u64;
    /// Waits on that clock; ECANCELED or ETIMEDOUT when the call's time is up before.
    fn wait(&self, nanoseconds: u64, deadline: u64, cancelled: &dyn Fn() -> bool) -> Result<(), Errno>;
    fn timer_arm(&self, cookie: u64, nanoseconds: u64) -> Result<(), Errno>;
    fn timer_cancel(&self, cookie: u64) -> Result<(), Errno>;
}

/// A destination cannot take a device's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub errno: Errno,
    pub reason: String,
}

/// An arc failed; the device is in `actual`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArcFailed {
    pub errno: Errno,
    pub actual: DeviceState,
}

/// What `save` gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    pub bytes: usize,
    /// The end of the stream, or in PRE_COPY its end for now
    pub end: bool,
}

/// A plug-in's migration operations: see `OpenDevice::migration`.
#[derive(Debug, Clone, Copy)]
pub struct PluginMigration<'a> {
    pub(super) device: &'a super::OpenDevice,
    pub(super) ops: &'a abi::MigrationOps,
    pub(super) flags: vfio_mediate_sdk::state::MigrationFlags,
}

/// A plug-in's dirty tracking: see `OpenDevice::dirty`.
#[derive(Debug, Clone, Copy)]
pub struct PluginDirty<'a> {
    pub(super) device: &'a super::OpenDevice,
    pub(super) ops: &'a abi::DirtyOps,
    pub(super) exactness: super::Exactness,
}
