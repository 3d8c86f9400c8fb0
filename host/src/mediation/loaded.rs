//! A loaded library's device as a [`Mediator`]: words only, no decisions.

use std::os::fd::{AsRawFd, RawFd};

use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

use super::error::Refusal;
use super::mediator::{
    ArcFailed, CallFrame, Claim, Event, Exactness, ExtraIrq, ExtraRegion, IrqClaim, IrqRequest, IrqRequestData,
    Mediator, MediatorDirty, MediatorMigration, MmapAnswer, PluginSummary, Remaining, Saved, Verdict,
};
use crate::device::{IrqAction, IrqData, IrqSet};
use crate::plugin::{OpenDevice, PluginDirty, PluginMigration};

impl Mediator for OpenDevice {
    fn plugin(&self) -> PluginSummary {
        let info = self.plugin();
        let path = info.path.display().to_string();
        PluginSummary { name: info.name.clone(), version: info.version.clone(), path }
    }

    fn claims(&self) -> &[Claim] {
        self.claims()
    }

    fn irq_claims(&self) -> &[IrqClaim] {
        self.irq_claims()
    }

    fn extra_regions(&self) -> &[ExtraRegion] {
        self.extra_regions()
    }

    fn extra_irqs(&self) -> &[ExtraIrq] {
        self.extra_irqs()
    }

    #[inline]
    fn read(&self, claim: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        self.read(claim, frame, offset, data)
    }

    #[inline]
    fn write(&self, claim: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        self.write(claim, frame, offset, data)
    }

    fn extra_read(&self, index: usize, region: u32, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        self.extra_read(index, region, frame, offset, data)
    }

    fn extra_write(&self, index: usize, region: u32, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        self.extra_write(index, region, frame, offset, data)
    }

    fn region_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::RegionInfo) -> Verdict {
        self.claim_region_info(claim, frame, info)
    }

    fn mmap(&self, claim: usize, frame: CallFrame<'_>, offset: u64, length: u64) -> MmapAnswer {
        self.claim_mmap(claim, frame, offset, length)
    }

    fn extra_mmap(&self, extra: usize, region: u32, frame: CallFrame<'_>, offset: u64, length: u64) -> MmapAnswer {
        OpenDevice::extra_mmap(self, extra, region, frame, offset, length)
    }

    fn irq_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::IrqInfo) -> Verdict {
        self.irq_claim_info(claim, frame, info)
    }

    fn set_irqs(&self, claim: usize, frame: CallFrame<'_>, request: &IrqSet<'_>) -> Verdict {
        let bools: Vec<u8>;
        let fds: Vec<RawFd>;
        let data = match request.data {
            IrqData::None => IrqRequestData::None,
            IrqData::Bool(values) => {
                bools = values.iter().map(|value| u8::from(*value)).collect();
                IrqRequestData::Bool(&bools)
            }
            IrqData::EventFd(values) => {
                fds = values.iter().map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd())).collect();
                IrqRequestData::EventFd(&fds)
            }
        };
        let action = match request.action {
            IrqAction::Mask => abi::IRQ_MASK,
            IrqAction::Unmask => abi::IRQ_UNMASK,
            IrqAction::Trigger => abi::IRQ_TRIGGER,
        };
        let IrqSet { index, start, count, .. } = *request;
        self.irq_claim_set(claim, frame, &IrqRequest { index, start, count, action, data })
    }

    fn fired(&self, claim: usize, frame: CallFrame<'_>, index: u32, vector: u32) -> Verdict {
        self.irq_fired(claim, frame, index, vector)
    }

    fn event(&self, frame: CallFrame<'_>, event: Event) -> Result<(), Errno> {
        self.event(frame, event.kind, event.args)
    }

    fn migration(&self) -> Option<Box<dyn MediatorMigration + '_>> {
        self.migration().map(|migration| Box::new(migration) as _)
    }

    fn dirty(&self) -> Option<Box<dyn MediatorDirty + '_>> {
        self.dirty().map(|dirty| Box::new(dirty) as _)
    }
}

impl MediatorMigration for PluginMigration<'_> {
    fn flags(&self) -> MigrationFlags {
        self.flags()
    }

    fn match_data(&self, frame: CallFrame<'_>) -> Result<Vec<u8>, Errno> {
        self.match_data(frame)
    }

    fn check_match(&self, frame: CallFrame<'_>, data: &[u8]) -> Result<(), Refusal> {
        self.check_match(frame, data).map_err(|refusal| Refusal { reason: refusal.reason, errno: refusal.errno })
    }

    fn set_state(&self, frame: CallFrame<'_>, from: DeviceState, to: DeviceState) -> Result<(), ArcFailed> {
        self.set_state(frame, from, to)
    }

    fn save(&self, frame: CallFrame<'_>, buffer: &mut [u8]) -> Result<Saved, Errno> {
        self.save(frame, buffer)
    }

    fn load(&self, frame: CallFrame<'_>, data: &[u8]) -> Result<(), Errno> {
        self.load(frame, data)
    }

    fn remaining(&self, frame: CallFrame<'_>) -> Result<Remaining, Errno> {
        let left = self.remaining(frame)?;
        let (initial_bytes, dirty_bytes) = match self.flags().pre_copy {
            true => (left.initial_bytes, left.dirty_bytes),
            // Without pre-copy there is nothing that could be sent early.
            false => (0, 0),
        };
        Ok(Remaining { initial_bytes, dirty_bytes, stop_copy_bytes: left.stop_copy_bytes })
    }
}

impl MediatorDirty for PluginDirty<'_> {
    fn exactness(&self) -> Exactness {
        self.exactness()
    }

    fn start(&self, frame: CallFrame<'_>, ranges: &[abi::IovaRange], page_size: u64) -> Result<(), Errno> {
        self.start(frame, ranges, page_size)
    }

    fn report(
        &self,
        frame: CallFrame<'_>,
        iova: u64,
        length: u64,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> Result<(), Errno> {
        self.report(frame, iova, length, page_size, bitmap)
    }

    fn stop(&self, frame: CallFrame<'_>) {
        self.stop(frame);
    }
}
