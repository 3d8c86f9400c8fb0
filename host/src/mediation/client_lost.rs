//! A client is gone: the device is quiet, has none of his memory, and is otherwise as it was.
//!
//! **Must never** leave a DMA on its way to memory of a client who is gone, nor an eventfd of his in use; and whatever fails, it
//! goes on with the rest. What it cannot keep is the bus-master bit: a device that went on would reach for addresses where nothing
//! is mapped, and the next client's maps come one by one.

use rustix::io::Errno;

use super::config::{COMMAND, COMMAND_MASTER};
use super::device::MediatedDevice;
use super::error::Result;
use super::gate::{CloseError, Reason};
use super::mediator::TrapMap;
use super::{MediationError, lock};
use crate::device::{CONFIG_REGION, IrqAction, IrqData, IrqSet};

impl MediatedDevice {
    /// The client has died, or has gone without a word: interrupts are disabled and his eventfds closed, bus mastering is
    /// turned off, accesses in flight have ended, what the device wrote is in the dirty log (which other devices' clients may
    /// read), and nothing of the client's is mapped. Then tracking ends, if he had begun it. Nothing else of the device
    /// changes: the next client finds its registers and its migration state.
    ///
    /// Everything is tried, also of a device that has failed; the first thing that failed is returned. A map that the device did not
    /// let go of is still there, and the call may be repeated. Nothing has changed if the device was not to be had alone, or does
    /// not resume.
    pub fn client_lost(&self) -> Result<()> {
        let token = self.lane.enter(self.drain_deadline())?;
        let quiet = || {
            let irqs = self.unwire_irqs();
            self.ioeventfds.clear();
            let quiet = self.end_bus_mastering();
            let done = self.unmap_all(irqs.and(quiet));
            done.and(self.end_lost_tracking())
        };
        // A device that sleeps is resumed for it.
        let mut done = Ok(());
        let alone = self.alone(Reason::Reconfiguring, self.drain_deadline(), || {
            done = quiet();
            Ok(())
        });
        let done = match alone {
            Ok(()) => {
                let table = self.switch_table(TrapMap::Normal);
                done.and(table)
            }
            // Failed or closed: nobody else gets in any more.
            Err(MediationError::Close(CloseError::Gone(_))) => quiet(),
            // Failed just now, with accesses in it that do not end.
            Err(error @ MediationError::Close(CloseError::DrainTimeout)) => quiet().and(Err(error)),
            Err(error) => Err(error),
        };
        drop(token);
        self.attend();
        done
    }

    /// What did not end is still there, to be ended when this is repeated.
    fn end_lost_tracking(&self) -> Result<()> {
        let Some(active) = lock(&self.tracking).take() else { return Ok(()) };
        let ended = self.end_tracking(&active);
        if ended.is_err() && !self.has_failed() {
            *lock(&self.tracking) = Some(active);
        }
        Ok(ended?)
    }

    /// Hooks that keep eventfds of their own are told, too. Whatever they say, the device lets go of the client's; an index that it
    /// does not let go of keeps its eventfds here, to be tried again.
    fn unwire_irqs(&self) -> Result<()> {
        let armed = self.shared.irqs.indices();
        let mut indices = armed.clone();
        if let Some(plugin) = &self.plugin {
            indices.extend(plugin.irq_claims().iter().filter(|claim| claim.has_set_irqs).map(|claim| claim.index));
        }
        indices.sort_unstable();
        indices.dedup();
        let mut done = Ok(());
        for index in indices {
            let off = IrqSet { index, start: 0, count: 0, action: IrqAction::Trigger, data: IrqData::None };
            if let Err(error) = self.offer_irqs(&off) {
                tracing::warn!(device = %self.identity().name, index, %error, "a hook, told that the client was lost");
            }
            // Also where a hook has handled it: the eventfds are the client's.
            match self.shared.default_set_irqs(&off) {
                Err(errno) if armed.contains(&index) && errno != Errno::NODEV && !self.has_failed() => {
                    done = done.and(Err(MediationError::refused(format!("disarming index {index}"), errno)));
                }
                // Not armed in the device, or the device is gone.
                _ => self.shared.irqs.clear(index),
            }
        }
        done
    }

    fn end_bus_mastering(&self) -> Result<()> {
        if self.entered().is_some() {
            // Failed in its sleep: nothing reaches it, and it does nothing.
            return Ok(());
        }
        let mut command = [0; 2];
        self.device().region_read(CONFIG_REGION, COMMAND, &mut command)?;
        let command = u16::from_le_bytes(command);
        if command & COMMAND_MASTER == 0 {
            return Ok(());
        }
        self.device().region_write(CONFIG_REGION, COMMAND, &(command & !COMMAND_MASTER).to_le_bytes())?;
        self.look_at_command()
    }

    fn unmap_all(&self, before: Result<()>) -> Result<()> {
        self.shared.mappings().iter().fold(before, |done, map| done.and(self.unmap(map, || {})))
    }
}
