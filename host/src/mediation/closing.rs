//! Closing a device: what was started in it is ended, whoever else still has it.
//!
//! The kernel does the same when the last descriptor of a device goes, but who says that ours is the last? **Must never**
//! start a stopped device (its guest may run elsewhere), nor leave half-loaded state in one.

use vfio_mediate_sdk::state::DeviceState;

use super::device::MediatedDevice;
use super::lock;
use crate::device::{DeviceError, ErrorKind, IrqAction, IrqData, IrqSet};

impl MediatedDevice {
    /// With the device alone, and before its plug-in is closed. Goes on after failures, which are logged: nobody could do
    /// anything about them.
    pub(super) fn leave_nothing_started(&self) {
        let active = lock(&self.tracking).take();
        if let Some(active) = active {
            self.report("ending its dirty log", self.end_tracking(&active));
        }
        self.report("ending its migration stream", self.end_streams());
        for index in self.shared.irqs.indices() {
            let off = IrqSet { index, start: 0, count: 0, action: IrqAction::Trigger, data: IrqData::None };
            if index < self.own_irqs() && !self.shared.watch.covers(index) {
                self.report("disarming its interrupts", self.device().set_irqs(&off));
            }
            self.shared.irqs.clear(index);
        }
    }

    /// To the state without a stream that the guest is in now: one that runs goes on, one that stands stays so.
    fn end_streams(&self) -> Result<(), DeviceError> {
        lock(&self.streams).end();
        let Some(native) = self.device().migration() else { return Ok(()) };
        match native.state()? {
            DeviceState::PreCopy => native.set_state(DeviceState::Running),
            DeviceState::PreCopyP2p => native.set_state(DeviceState::RunningP2p),
            DeviceState::StopCopy => native.set_state(DeviceState::Stop),
            // Whether what was loaded is whole was for somebody to ask who wanted it to run.
            DeviceState::Resuming => self.device().reset().or_else(|_| native.set_state(DeviceState::Stop)),
            _ => Ok(()),
        }
    }

    fn report(&self, what: &str, done: Result<(), DeviceError>) {
        match done {
            // A device that is gone has nothing started in it.
            Err(error) if error.kind != ErrorKind::Lost => {
                tracing::warn!(device = %self.identity().name, %error, "closing: {what}");
            }
            _ => {}
        }
    }
}
