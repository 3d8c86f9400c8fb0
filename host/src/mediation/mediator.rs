//! What a mediated device needs of the plug-in that claimed it, and what it does for it in return.
//!
//! **Owns** the two traits: [`Mediator`], one device opened by a plug-in, and [`HostCalls`], the host's services to it.
//! [`Mediator`] has two kinds of implementations: a loaded library's device, and scripted ones in tests.

use std::fmt::Debug;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

use crate::device::IrqAction;
use crate::sys::Mapping;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Client,
    Migration,
    Host,
}

/// How a call into the plug-in is made: who asks, until when, and how it is called off.
#[derive(Debug, Clone, Copy)]
pub struct CallFrame<'a> {
    pub origin: Origin,
    /// Nanoseconds of [`HostCalls::now`]; `u64::MAX`: none
    pub deadline: u64,
    pub cancel: Option<&'a AtomicBool>,
}

/// A hook's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Handled,
    Forward,
    Deny(Errno),
}

/// A claimed byte range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    pub region: u32,
    pub offset: u64,
    pub length: u64,
    /// Holds in the normal map
    pub normal: bool,
    /// Holds in the tracking map
    pub tracking: bool,
    pub has_rw: bool,
    pub has_region_info: bool,
    pub has_mmap: bool,
}

/// Claimed vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqClaim {
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub has_irq_info: bool,
    pub has_set_irqs: bool,
    pub has_fired: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtraRegion {
    pub flags: u32,
    pub size: u64,
    pub type_: u32,
    pub subtype: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtraIrq {
    pub flags: u32,
    pub count: u32,
}

/// A `VFIO_DEVICE_SET_IRQS`.
#[derive(Debug, Clone, Copy)]
pub struct IrqRequest<'a> {
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub action: IrqAction,
    pub data: IrqRequestData<'a>,
}

#[derive(Debug, Clone, Copy)]
pub enum IrqRequestData<'a> {
    None,
    Bool(&'a [bool]),
    EventFd(&'a [Option<BorrowedFd<'a>>]),
}

/// A file in place of a claimed range.
#[derive(Debug)]
pub struct MmapAnswer {
    pub fd: OwnedFd,
    pub offset: u64,
}

/// An arc failed; the device is in `actual`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArcFailed {
    pub errno: Errno,
    pub actual: DeviceState,
}

/// Bytes that `save` made; `end`: there are no more (STOP_COPY), or none for now (PRE_COPY).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    pub bytes: usize,
    pub end: bool,
}

/// What is left to send, in bytes; `u64::MAX`: unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remaining {
    pub initial_bytes: u64,
    pub dirty_bytes: u64,
    pub stop_copy_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exactness {
    Exact,
    Superset,
}

/// Something happened (`abi::EVENT_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    pub kind: u32,
    pub args: [u64; 3],
}

/// One device opened by a plug-in; its tables were parsed and are constant. Dropped, it is closed: the owner sees to it that
/// no call is in flight then.
pub trait Mediator: Send + Sync + Debug {
    fn plugin(&self) -> PluginSummary;
    fn claims(&self) -> &[Claim];
    fn irq_claims(&self) -> &[IrqClaim];
    fn extra_regions(&self) -> &[ExtraRegion];
    fn extra_irqs(&self) -> &[ExtraIrq];

    fn read(&self, claim: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict;
    fn write(&self, claim: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict;
    fn extra_read(&self, index: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict;
    fn extra_write(&self, index: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict;
    fn region_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::RegionInfo) -> Verdict;
    /// `None`: not mapped.
    fn mmap(&self, claim: usize, frame: CallFrame<'_>, offset: u64, length: u64) -> Option<MmapAnswer>;
    fn irq_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::IrqInfo) -> Verdict;
    fn set_irqs(&self, claim: usize, frame: CallFrame<'_>, request: &IrqRequest<'_>) -> Verdict;
    fn fired(&self, claim: usize, frame: CallFrame<'_>, index: u32, vector: u32) -> Verdict;
    fn event(&self, frame: CallFrame<'_>, event: Event) -> Result<(), Errno>;

    fn migration(&self) -> Option<&dyn MediatorMigration>;
    fn dirty(&self) -> Option<&dyn MediatorDirty>;
}

/// `abi::MigrationOps`, called one at a time.
pub trait MediatorMigration {
    fn flags(&self) -> MigrationFlags;
    fn match_data(&self, frame: CallFrame<'_>) -> Result<Vec<u8>, Errno>;
    fn check_match(&self, frame: CallFrame<'_>, data: &[u8]) -> Result<(), super::Refusal>;
    fn set_state(&self, frame: CallFrame<'_>, from: DeviceState, to: DeviceState) -> Result<(), ArcFailed>;
    fn save(&self, frame: CallFrame<'_>, buffer: &mut [u8]) -> Result<Saved, Errno>;
    fn load(&self, frame: CallFrame<'_>, data: &[u8]) -> Result<(), Errno>;
    fn remaining(&self, frame: CallFrame<'_>) -> Result<Remaining, Errno>;
}

/// `abi::DirtyOps`, called one at a time.
pub trait MediatorDirty {
    fn exactness(&self) -> Exactness;
    fn start(&self, frame: CallFrame<'_>, ranges: &[abi::IovaRange], page_size: u64) -> Result<(), Errno>;
    fn report(
        &self,
        frame: CallFrame<'_>,
        iova: u64,
        length: u64,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> Result<(), Errno>;
    fn stop(&self, frame: CallFrame<'_>);
}

/// Which plug-in mediates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginSummary {
    pub name: String,
    pub version: String,
    pub path: String,
}

/// A block of scratch memory.
#[derive(Debug, Clone)]
pub struct ScratchMemory {
    pub iova: u64,
    pub length: u64,
    pub memory: Arc<Mapping>,
}

/// What must not happen inside a hook and is done afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Reset,
    Fail(Errno),
    Map(TrapMap),
}

/// Which hook table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrapMap {
    Normal = 0,
    Tracking = 1,
}

/// What the host does for a plug-in. Called inside a call into the plug-in, under the pass that this call was made with: no
/// method enters the gate.
pub trait HostCalls: Send + Sync {
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;
    fn default_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn default_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;
    fn region_info(&self, index: u32) -> Result<abi::RegionInfo, Errno>;
    fn irq_info(&self, index: u32) -> Result<abi::IrqInfo, Errno>;
    fn set_irqs(&self, request: &IrqRequest<'_>) -> Result<(), Errno>;
    fn guest_read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn guest_write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;
    fn mark_dirty(&self, iova: u64, length: u64) -> Result<(), Errno>;
    fn scratch_alloc(&self, length: u64) -> Result<ScratchMemory, Errno>;
    fn scratch_free(&self, iova: u64) -> Result<(), Errno>;
    fn irq_inject(&self, index: u32, vector: u32) -> Result<(), Errno>;
    fn request(&self, request: Request) -> Result<(), Errno>;
    fn now(&self) -> u64;
    fn wait(&self, nanoseconds: u64, deadline: u64, cancelled: &dyn Fn() -> bool) -> Result<(), Errno>;
    fn timer_arm(&self, cookie: u64, nanoseconds: u64) -> Result<(), Errno>;
    fn timer_cancel(&self, cookie: u64) -> Result<(), Errno>;
}
