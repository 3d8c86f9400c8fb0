//! Low power by an operator's word, and devices that the kernel wants back.
//!
//! **Must never** wake a device to tell about it, nor let go of one that a migration under way still needs.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Host, lock};
use crate::control::protocol::{Failure, FailureCode, Power, PowerAction};
use crate::mediation::{MediatedDevice, MediationError, Notice, Remedy};
use crate::migration::driver::MediatedHost;
use crate::sys::EventFd;

/// Between two tries to let go of a device that somebody has alone.
const RELEASE_PAUSE: Duration = Duration::from_millis(500);
/// A migration that was cancelled may take so long to end before a device is let go under it.
const RELEASE_PATIENCE: Duration = Duration::from_secs(60);

impl Host {
    /// Low power of one device: its name, as `status` shows it, or its place in that list.
    pub fn power(&self, device: &str, action: PowerAction) -> Result<Power, Failure> {
        let device = self.find(device)?;
        match action {
            PowerAction::Status => {}
            PowerAction::Exit => device.low_power_exit().map_err(|error| failure(&device, &error))?,
            PowerAction::Enter { wakeup: false } => {
                device.low_power_entry(None).map_err(|error| failure(&device, &error))?;
            }
            PowerAction::Enter { wakeup: true } => {
                // Nobody waits for it: the next request wakes the device, and `status` shows that.
                let unheard = EventFd::new().map_err(|errno| Failure::new(FailureCode::Failed, errno.to_string()))?;
                let entered = device.low_power_entry(Some(unheard.as_fd()));
                entered.map_err(|error| failure(&device, &error))?;
            }
        }
        Ok(power(&device))
    }

    fn find(&self, wanted: &str) -> Result<Arc<MediatedDevice>, Failure> {
        let devices = self.with_machine(|machine| machine.devices.clone());
        let devices = devices.ok_or_else(|| Failure::refused("the host is stopping"))?;
        if let Some(device) = wanted.parse().ok().and_then(|place: usize| devices.get(place)) {
            return Ok(Arc::clone(device));
        }
        let plain = wanted.strip_prefix("vfio:").unwrap_or(wanted);
        let mut named = devices.iter().filter(|device| [plain, wanted].contains(&device.identity().name.as_str()));
        match (named.next(), named.next()) {
            (Some(device), None) => Ok(Arc::clone(device)),
            (None, _) => Err(Failure::refused(format!("this host has no device {wanted}: see `vfio-mediate status`"))),
            (Some(_), Some(_)) => {
                let what = format!("several devices are called {wanted}: give the place in `status`'s list, from 0");
                Err(Failure::refused(what))
            }
        }
    }

    /// Listens to what the kernel says about each device, for as long as the host lives.
    pub(super) fn listen_to_devices(self: &Arc<Self>) {
        for device in self.with_machine(|machine| machine.devices.clone()).into_iter().flatten() {
            let (host, subject) = (Arc::downgrade(self), Arc::downgrade(&device));
            device.observe(Arc::new(move |notice| {
                if let (Some(host), Some(device)) = (host.upgrade(), subject.upgrade()) {
                    host.heard(&device, notice);
                }
            }));
        }
    }

    fn heard(self: &Arc<Self>, device: &Arc<MediatedDevice>, notice: Notice) {
        let name = device.identity().name.clone();
        match notice {
            Notice::DeviceError => {
                tracing::error!(device = name, "an uncorrectable error: the device is failed");
                self.embedder.device_failed(&name);
            }
            Notice::ReleaseRequested => {
                let device = Arc::clone(device);
                // A host that ends lets go of everything anyway.
                if let Err(error) = self.spawn("release", move |host| host.release(device)) {
                    tracing::info!(device = name, %error, "it is wanted back");
                }
            }
        }
    }

    /// Lets go of a device: a migration under way is cancelled and awaited, then the device refuses everything and is closed.
    /// Whoever embeds the host and holds it too closes it by letting go.
    fn release(&self, device: Arc<MediatedDevice>) {
        let name = device.identity().name.clone();
        let before = self.await_no_migration(Instant::now() + RELEASE_PATIENCE);
        // A client that waits for the device, or for which it waits, is gone first.
        self.stop_serving(Some(&device));
        while let Err(error) = device.let_go() {
            tracing::warn!(device = name, %error, "it is wanted back, and not let go yet");
            if device.has_failed() || self.waits_to_stop(RELEASE_PAUSE) {
                break;
            }
        }
        if let Some(machine) = &mut *lock(&self.machine) {
            machine.devices.retain(|other| !Arc::ptr_eq(other, &device));
        }
        {
            let mut state = lock(&self.state);
            state.released.push(name.clone());
            // A host that ended meanwhile holds nothing.
            if !state.stopping {
                state.mediated = before.as_ref().map(|all| Arc::new(MediatedHost::without(all, &device)));
            }
        }
        drop(before);
        drop(device);
        tracing::warn!(device = name, "released: the kernel wanted it back");
        self.embedder.device_released(&name);
    }

    /// Past its commit point a migration is not undone, and is not long either. What is returned is what a migration needs: none
    /// begins before it is back.
    fn await_no_migration(&self, deadline: Instant) -> Option<Arc<MediatedHost>> {
        let mut state = lock(&self.state);
        while state.job.is_some() && Instant::now() < deadline {
            state.cancel.cancel();
            let left = deadline.saturating_duration_since(Instant::now());
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.mediated.take()
    }

    /// Devices that the kernel wanted back, and has.
    pub(in crate::control) fn released(&self) -> Vec<String> {
        lock(&self.state).released.clone()
    }
}

/// What is known of a device's power, without waking it.
pub(in crate::control) fn power(device: &MediatedDevice) -> Power {
    let (entered, power) = (device.entered(), device.power());
    Power {
        device: device.identity().name.clone(),
        low_power: entered.is_some(),
        wakeup: entered.is_some_and(|entered| entered.wakeup),
        state: power.map(|power| power.state.to_string()),
        suspended: power.map(|power| power.suspended),
    }
}

fn failure(device: &MediatedDevice, error: &MediationError) -> Failure {
    let code = match error.remedy() {
        Remedy::Change | Remedy::Retry => FailureCode::Refused,
        Remedy::Recover | Remedy::Lost => FailureCode::Failed,
    };
    Failure::new(code, format!("device {}: {error}", device.identity().name))
}
