//! Changes that need the device alone, and the queue of those that hooks asked for.

use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::DeviceState;

use super::calls::{Task, borrowed};
use super::config::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY, POWER_STATE};
use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::{Class, CloseError, GateClosed, Reason};
use super::irqs::Armed;
use super::mediator::{Request, TrapMap};
use super::timers::Delivery;
use super::{lane, lock};
use crate::device::{CONFIG_REGION, ErrorKind, IrqAction, IrqData, IrqSet};

/// Rounds of requests that ask for requests.
const ROUNDS_MAX: usize = 16;

impl MediatedDevice {
    /// Resets the function, and ends low power. Open save and load streams end, tracking takes everything as dirty from here on. While an arc
    /// of the state machine is under way the reset is put off until it has ended, and this returns at once.
    pub fn reset(&self) -> Result<()> {
        if self.walking.load(Ordering::Acquire) {
            // Whoever walks attends when he is done.
            let full = |errno| MediationError::refused("one more request", errno);
            self.shared.queue(Task::Asked(Request::Reset)).map_err(full)?;
            if !self.walking.load(Ordering::Acquire) {
                // He was done, and may have looked before it was there.
                self.attend();
            }
            return Ok(());
        }
        // Refuses at once, for the gate's own reason, what nobody may do now. A device that sleeps is resumed for it.
        match self.enter(Class::Control) {
            Err(MediationError::Gate(GateClosed { reason: Reason::Suspended })) => {}
            pass => drop(pass?),
        }
        let token = self.lane.enter(self.drain_deadline())?;
        let done = self.reset_in(&token);
        drop(token);
        self.attend();
        done
    }

    pub(super) fn reset_in(&self, _token: &lane::Token<'_>) -> Result<()> {
        self.alone(Reason::Resetting, self.drain_deadline(), || {
            self.revoke_maps()?;
            self.event(abi::EVENT_RESET_PREPARE, [0; 3])?;
            let reset = self.device().reset().inspect_err(|error| {
                if error.kind == ErrorKind::Lost {
                    self.shared.gate.fail();
                }
            });
            if reset.is_ok() {
                lock(&self.streams).end();
                self.tracking_lost();
                lock(&self.condition).state = DeviceState::Running;
            }
            let seen = self.look_at_command();
            self.tell(abi::EVENT_RESET_DONE, [0; 3]);
            reset?;
            seen
        })
    }

    /// After a failed transition: the named state if the device can still be brought there, else a reset, which leads to
    /// RUNNING; then COMMAND and the interrupts are as before. Returns where the device is.
    pub fn recover(&self, to: DeviceState, deadline: Instant) -> Result<DeviceState> {
        if self.state() != DeviceState::Error && self.set_state(to, deadline).is_ok() {
            return Ok(self.state());
        }
        let command = lock(&self.condition).command;
        {
            let token = self.lane.enter(deadline)?;
            self.reset_in(&token)?;
        }
        self.alone(Reason::Resetting, deadline, || {
            self.revoke_if_disabled(COMMAND, &command.to_le_bytes())?;
            self.device().region_write(CONFIG_REGION, COMMAND, &command.to_le_bytes())?;
            self.look_at_command()?;
            self.arm_again()
        })?;
        self.attend();
        Ok(self.state())
    }

    fn arm_again(&self) -> Result<()> {
        for Armed { index, start, fds } in self.shared.irqs.armed() {
            if index < self.own_irqs() && !self.shared.watch.covers(index) {
                let fds = borrowed(&fds);
                let (action, data) = (IrqAction::Trigger, IrqData::EventFd(&fds));
                let count = fds.len() as u32;
                self.device().set_irqs(&IrqSet { index, start, count, action, data })?;
            }
        }
        Ok(())
    }

    /// Reads COMMAND and the power state back and remembers what they mean for the gate. The caller has the device alone.
    pub(super) fn look_at_command(&self) -> Result<()> {
        let (command, low_power) = read_command(self)?;
        let (before, gated) = {
            let mut condition = lock(&self.condition);
            let before = condition.command;
            condition.command = command;
            condition.low_power = low_power;
            // The bus has no such bit for a VF; what a driver shows there is its own.
            condition.has_memory_enable |= command & COMMAND_MEMORY != 0 && !self.identity().virtual_function;
            (before, condition.has_memory_enable)
        };
        self.shared.gated.store(gated, Ordering::Release);
        if (before ^ command) & COMMAND_MASTER != 0 {
            self.tell(abi::EVENT_BUS_MASTER, [u64::from(command & COMMAND_MASTER != 0), 0, 0]);
        }
        Ok(())
    }

    /// Switches the hook table, alone: when this returns no access under the other one is in flight, nor will be.
    pub(super) fn switch_table(&self, map: TrapMap) -> Result<()> {
        if self.plugin.is_none() || self.map() == map {
            return Ok(());
        }
        self.alone(Reason::TableSwap, self.drain_deadline(), || {
            self.revoke_trapped(map)?;
            self.tables.select(map);
            Ok(())
        })
    }

    /// Does what hooks asked for. Called by whoever leaves the gate, without a pass of its own.
    #[cold]
    pub(super) fn attend(&self) {
        for _ in 0..ROUNDS_MAX {
            if !self.shared.gate.wants_attention() || self.shared.gate.is_held() {
                // Held: the outer pass of this thread attends when it ends.
                return;
            }
            self.shared.gate.take_attention();
            self.revoke_failed();
            let put_back = self.shared.take_requests().into_iter().filter(|task| !self.perform(*task)).count();
            if put_back != 0 {
                // Whoever is in the way attends when he is done.
                return;
            }
        }
    }

    /// False when it was put back into the queue.
    fn perform(&self, task: Task) -> bool {
        let done = match task {
            Task::Asked(Request::Fail(errno)) => {
                self.fail(errno);
                Ok(())
            }
            Task::Asked(Request::Reset) => match self.lane.try_enter() {
                Some(token) => self.reset_in(&token),
                // Whoever was in the way may have attended before it was back in the queue: then it is done in the next round.
                None => return self.put_back(task) || self.lane.try_enter().is_some(),
            },
            Task::Asked(Request::Map(map)) => self.switch_table(map),
            Task::Recheck => self.alone(Reason::Reconfiguring, self.drain_deadline(), || self.look_at_command()),
        };
        match done {
            Err(MediationError::Close(CloseError::Busy | CloseError::Held)) => return self.put_back(task),
            // Nobody asked us who could be told.
            Err(error) => tracing::warn!(device = %self.identity().name, ?task, %error, "what a hook asked for failed"),
            Ok(()) => {}
        }
        true
    }

    /// The queue is as long as it was: there is room.
    fn put_back(&self, task: Task) -> bool {
        if let Err(errno) = self.shared.queue(task) {
            tracing::warn!(device = %self.identity().name, ?task, %errno, "what a hook asked for was dropped");
        }
        false
    }

    /// The device has failed: everything is refused from now on, whatever is in flight is called off.
    pub fn fail(&self, errno: Errno) {
        self.shared.gate.fail();
        self.shared.cancel.store(true, Ordering::Release);
        // Its hook may want to look at the device, which must not be reached while it sleeps; from here on it cannot enter.
        if self.entered().is_none() {
            self.tell(abi::EVENT_DEVICE_ERROR, [errno.raw_os_error() as u64, 0, 0]);
        }
        self.revoke_failed();
    }

    pub(super) fn timer_fired(&self, cookie: u64) -> Delivery {
        let fired = self.with_own_pass(Class::Control, || {
            self.tell(abi::EVENT_TIMER, [cookie, 0, 0]);
            Ok(())
        });
        match fired {
            Ok(()) => Delivery::Done,
            Err(error) if error.errno() == Errno::NODEV => Delivery::Done,
            Err(_) => Delivery::Later,
        }
    }

    /// A front-end's client came or went.
    pub fn client(&self, attached: bool) -> Result<()> {
        let kind = if attached { abi::EVENT_CLIENT_ATTACH } else { abi::EVENT_CLIENT_DETACH };
        for _ in 0..ROUNDS_MAX {
            // Whoever entered low power is gone, or was another.
            self.awaken()?;
            let told = self.with_own_pass(Class::Control, || {
                self.tell(kind, [0; 3]);
                Ok(())
            });
            match told {
                // Entered again since, by one more.
                Err(MediationError::Gate(GateClosed { reason: Reason::Suspended })) => {}
                told => return told,
            }
        }
        Err(GateClosed { reason: Reason::Suspended }.into())
    }
}

fn read_command(mediated: &MediatedDevice) -> Result<(u16, bool)> {
    let mut command = [0; 2];
    mediated.device().region_read(CONFIG_REGION, COMMAND, &mut command)?;
    let mut power = [0; 2];
    if let Some(offset) = mediated.shared.filter.power() {
        mediated.device().region_read(CONFIG_REGION, offset, &mut power)?;
    }
    Ok((u16::from_le_bytes(command), power[0] & POWER_STATE != 0))
}
