//! What a mediated device needs of the plug-in that claimed it, and what it does for it in return.
//!
//! **Owns** the trait [`Mediator`], one device opened by a plug-in. It has two kinds of implementations: a loaded library's
//! device ([`super::open`]), and scripted ones in tests. The other direction is [`HostCalls`].

use std::fmt::Debug;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

use crate::device::IrqSet;

pub use crate::plugin::{
    ArcFailed, CallFrame, Claim, Exactness, ExtraIrq, ExtraRegion, HostCalls, IrqClaim, IrqRequest, IrqRequestData,
    MmapAnswer, Origin, Request, Saved, ScratchMemory, TrapMap, Verdict,
};

/// What is left to send, in bytes; `u64::MAX`: unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remaining {
    pub initial_bytes: u64,
    pub dirty_bytes: u64,
    pub stop_copy_bytes: u64,
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
    fn extra_read(&self, index: usize, region: u32, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict;
    fn extra_write(&self, index: usize, region: u32, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict;
    fn region_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::RegionInfo) -> Verdict;
    fn mmap(&self, claim: usize, frame: CallFrame<'_>, offset: u64, length: u64) -> MmapAnswer;
    /// For extra region number `extra`, which the client knows as `region`.
    fn extra_mmap(&self, extra: usize, region: u32, frame: CallFrame<'_>, offset: u64, length: u64) -> MmapAnswer;
    fn irq_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::IrqInfo) -> Verdict;
    fn set_irqs(&self, claim: usize, frame: CallFrame<'_>, request: &IrqSet<'_>) -> Verdict;
    fn fired(&self, claim: usize, frame: CallFrame<'_>, index: u32, vector: u32) -> Verdict;
    fn event(&self, frame: CallFrame<'_>, event: Event) -> Result<(), Errno>;

    fn migration(&self) -> Option<Box<dyn MediatorMigration + '_>>;
    fn dirty(&self) -> Option<Box<dyn MediatorDirty + '_>>;
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
