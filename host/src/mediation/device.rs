//! The mediated device: its parts, and how the gate is gone through.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_mediate_sdk::state::DeviceState;

use super::calls::Shared;
use super::config::COMMAND_MEMORY;
use super::error::Result;
use super::gate::{Class, CloseError, Exclusive, GateClosed, Pass, Reason, Standing};
use super::ioeventfd::IoEventFds;
use super::lane::Lane;
use super::layout;
use super::low_power::{Asleep, Entered};
use super::maps::Maps;
use super::mediator::{CallFrame, Event, Mediator, Origin, PluginSummary, TrapMap};
use super::state::Streams;
use super::tables::Tables;
use super::tracking::Active;
use super::{MediationError, lock};
use crate::device::{Area, Device, DeviceInfo, Identity};
use crate::lock_order::{self, Right};
use crate::memory::AddressSpace;

/// How long things may take before they become errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// An access waits so long for a state change to end
    pub access_wait: Duration,
    /// A state change waits so long for accesses in flight; afterwards the device is failed
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { access_wait: Duration::from_secs(1), drain: Duration::from_secs(5) }
    }
}

/// What keeps the gate closed between turns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Condition {
    pub(super) state: DeviceState,
    /// COMMAND, as it was last seen
    pub(super) command: u16,
    /// The function is not in D0
    pub(super) low_power: bool,
    /// The device may be suspended: nothing reaches it
    pub(super) entered: Option<Entered>,
    /// COMMAND's memory bit has been seen set: a function that cannot set it is never gated by it; nor is a VF, whose bit is
    /// not on the bus (its PF's VF MSE enables its memory)
    pub(super) has_memory_enable: bool,
}

impl Condition {
    pub(super) fn standing(&self) -> Standing {
        let disabled = self.low_power || (self.has_memory_enable && self.command & COMMAND_MEMORY == 0);
        let memory = match (self.state.is_running(), disabled) {
            (false, _) => Some(Reason::Stopped),
            (true, true) => Some(Reason::MemoryDisabled),
            (true, false) => None,
        };
        Standing { everything: self.entered.map(|_| Reason::Suspended), memory }
    }
}

/// A file in place of claimed pages.
#[derive(Debug)]
pub(super) struct StandIn {
    pub(super) region: u32,
    pub(super) area: Area,
    pub(super) fd: std::os::fd::OwnedFd,
    pub(super) fd_offset: u64,
}

/// A device, the plug-in that claimed it if one did, and its VM's memory. Every method may be called from any thread.
///
/// Dropping the last reference closes the device: nothing is in flight then, since every call borrows it.
#[derive(Debug)]
pub struct MediatedDevice {
    // Dropped in this order: the plug-in is closed while the device still answers.
    pub(super) plugin: Option<Box<dyn Mediator>>,
    pub(super) summary: Option<PluginSummary>,
    pub(super) shared: Arc<Shared>,
    /// The same device as `shared`'s, one pointer nearer
    pub(super) device: Arc<dyn Device>,
    pub(super) limits: Limits,
    pub(super) tables: Tables,
    /// Areas of each own region that a client may map, ascending
    pub(super) mappable: Vec<Vec<Area>>,
    pub(super) stand_ins: Vec<StandIn>,
    pub(super) maps: Maps,
    pub(super) ioeventfds: Arc<IoEventFds>,
    pub(super) condition: Mutex<Condition>,
    pub(super) streams: Mutex<Streams>,
    pub(super) tracking: Mutex<Option<Active>>,
    /// One state, dirty or DMA operation at a time
    pub(super) lane: Lane,
    /// A walk through the migration states is under way
    pub(super) walking: AtomicBool,
    /// One event at a time
    pub(super) events: Lane,
}

impl MediatedDevice {
    pub fn identity(&self) -> &Identity {
        self.shared.device.identity()
    }

    pub fn plugin(&self) -> Option<PluginSummary> {
        self.summary.clone()
    }

    pub fn memory(&self) -> &Arc<AddressSpace> {
        &self.shared.memory
    }

    /// As the device's own, with the plug-in's regions and irqs counted behind it. Constant.
    pub fn info(&self) -> DeviceInfo {
        let (regions, irqs) = match &self.plugin {
            Some(plugin) => (plugin.extra_regions().len() as u32, plugin.extra_irqs().len() as u32),
            None => (0, 0),
        };
        let own = self.shared.device.info();
        let num_regions = self.own_regions() + regions;
        DeviceInfo { flags: own.flags, num_regions, num_irqs: self.own_irqs() + irqs }
    }

    /// Where the device is in the migration state machine.
    pub fn state(&self) -> DeviceState {
        lock(&self.condition).state
    }

    /// Why accesses are refused now, if they are: of everything, or of memory regions.
    pub fn closed(&self) -> Option<Reason> {
        self.shared.gate.closed(Class::Memory)
    }

    pub(super) fn own_regions(&self) -> u32 {
        self.shared.regions.len() as u32
    }

    pub(super) fn own_irqs(&self) -> u32 {
        self.shared.irq_infos.len() as u32
    }

    /// To be called at once: nothing is locked.
    #[track_caller]
    pub(super) fn device(&self) -> &dyn Device {
        lock_order::calling_out();
        &*self.device
    }

    /// For a call of the plug-in, at once: nothing is locked.
    #[track_caller]
    #[inline]
    pub(super) fn frame(&self, origin: Origin) -> CallFrame<'_> {
        lock_order::calling_out();
        CallFrame { origin, deadline: u64::MAX, cancel: Some(&self.shared.cancel) }
    }

    /// With a deadline, on the device's clock.
    pub(super) fn frame_until(&self, origin: Origin, deadline: Instant) -> CallFrame<'_> {
        let left = deadline.saturating_duration_since(Instant::now());
        let at = self.device().clock().now().saturating_add(left);
        CallFrame { deadline: u64::try_from(at.as_nanos()).unwrap_or(u64::MAX), ..self.frame(origin) }
    }

    pub(super) fn drain_deadline(&self) -> Instant {
        Instant::now() + self.limits.drain
    }

    /// Under a pass; afterwards what hooks asked for is done.
    #[inline]
    pub(super) fn with_pass<T>(&self, class: Class, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.under(self.enter(class)?, work)
    }

    /// As [`Self::with_pass`], of the host's own accord: no reason to wake a device that sleeps.
    pub(super) fn with_own_pass<T>(&self, class: Class, work: impl FnOnce() -> Result<T>) -> Result<T> {
        lock_order::entering();
        let pass = self.shared.gate.enter_until(class, || Instant::now() + self.limits.access_wait)?;
        self.under(pass, work)
    }

    #[inline]
    fn under<T>(&self, pass: Pass<'_>, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = work();
        if pass.leave() {
            self.attend();
        }
        done
    }

    /// A client's pass: it wakes the device, where that sleeps with a wake-up.
    #[inline]
    pub(super) fn enter(&self, class: Class) -> Result<Pass<'_>> {
        lock_order::entering();
        match self.shared.gate.enter_until(class, || Instant::now() + self.limits.access_wait) {
            Ok(pass) => Ok(pass),
            Err(GateClosed { reason: Reason::Suspended }) => self.enter_suspended(class),
            Err(closed) => Err(closed.into()),
        }
    }

    /// Alone, and awake; the gate's standing afterwards follows from the condition that `work` leaves.
    pub(super) fn alone<T>(&self, reason: Reason, deadline: Instant, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.alone_if(Asleep::Resume, reason, deadline, work)
    }

    /// As [`Self::alone`]; `asleep` says what of a device that sleeps.
    pub(super) fn alone_if<T>(
        &self,
        asleep: Asleep,
        reason: Reason,
        deadline: Instant,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _right = lock_order::right(Right::Turn);
        let turn: Exclusive<'_> = self.shared.gate.close(reason, deadline).inspect_err(|error| {
            if *error == CloseError::DrainTimeout {
                self.shared.cancel.store(true, Ordering::Release);
                // Whoever leaves last takes the mappings back.
                self.shared.gate.raise_attention();
            }
        })?;
        let done = self.settle(asleep).and_then(|()| work());
        self.release(turn);
        done
    }

    /// One state, dirty or DMA operation at a time, with the device awake; afterwards what hooks asked for meanwhile is done.
    pub(super) fn in_lane<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let token = self.lane.enter(self.drain_deadline())?;
        let done = self.awaken().and_then(|()| work());
        drop(token);
        if self.shared.gate.wants_attention() {
            self.attend();
        }
        done
    }

    pub(super) fn map(&self) -> TrapMap {
        self.tables.map()
    }

    /// To the plug-in, one at a time. Without a plug-in there is nobody to refuse.
    pub(super) fn event(&self, kind: u32, args: [u64; 3]) -> Result<()> {
        let Some(plugin) = &self.plugin else { return Ok(()) };
        let _token = self.events.enter(self.drain_deadline())?;
        let refused = |errno| MediationError::Plugin { what: "an event", errno };
        plugin.event(self.frame(Origin::Host), Event { kind, args }).map_err(refused)
    }

    /// For events that only tell: nobody waits for the answer, so that it is logged.
    pub(super) fn tell(&self, kind: u32, args: [u64; 3]) {
        if let Err(error) = self.event(kind, args) {
            tracing::warn!(device = %self.identity().name, kind, %error, "the plug-in did not take an event");
        }
    }

    /// Lets go of the device as far as those can who do not hold it alone: it is resumed, and from here on refuses everything
    /// (ENODEV) for good. It is closed when the last reference goes. An error: somebody else had it alone all the while (then
    /// nothing has changed: ask again), or accesses did not end (then it is failed, and whoever leaves last takes its mappings).
    pub fn let_go(&self) -> Result<()> {
        self.shared.cancel.store(true, Ordering::Release);
        let done = match self.shut() {
            Err(CloseError::Gone(_)) => Ok(()),
            done => done.map_err(MediationError::from),
        };
        self.shared.cancel.store(false, Ordering::Release);
        self.revoke_failed();
        done
    }

    /// For good. The second time nothing is left to do.
    fn shut(&self) -> std::result::Result<(), CloseError> {
        let _right = lock_order::right(Right::Turn);
        let turn = self.shared.gate.close(Reason::Closed, self.drain_deadline())?;
        self.wake_and_leave();
        self.end_maps();
        turn.release(Standing { everything: Some(Reason::Closed), memory: None });
        Ok(())
    }

    /// The plug-in's last call still reaches the device: it is awake for that, with nothing of ours started in it.
    fn wake_and_leave(&self) {
        match self.settle(Asleep::Resume) {
            Ok(()) => {
                self.shared.watch.disarm(self.device());
                self.leave_nothing_started();
            }
            Err(error) => {
                tracing::warn!(device = %self.identity().name, %error, "it does not resume before it is closed");
            }
        }
    }

    pub(super) fn mappable(&self, region: u32) -> &[Area] {
        self.mappable.get(region as usize).map_or(&[], |areas| areas)
    }

    pub(super) fn stand_in(&self, region: u32, wanted: Area) -> Option<&StandIn> {
        self.stand_ins.iter().find(|stand_in| stand_in.region == region && layout::contains(&[stand_in.area], wanted))
    }
}

impl Drop for MediatedDevice {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.cancel.store(true, Ordering::Release);
        shared.timers.stop();
        shared.irqs.stop();
        self.ioeventfds.stop();
        shared.watch.stop();
        // Nothing is in flight: every call borrows the device, and its threads are gone or are this one. A forgotten pass
        // would fail the gate, which refuses everything too.
        if self.shut().is_err() {
            // Closed or failed before: what did not resume then may now.
            if self.entered().is_some() {
                self.wake_and_leave();
            }
            self.end_maps();
        }
        self.shared.cancel.store(false, Ordering::Release);
        // Before the services go, which take the device's maps away.
        self.plugin = None;
    }
}
