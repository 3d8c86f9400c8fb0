//! Low power of a mediated device: in, out, and who wakes it.
//!
//! **Owns** the ways between awake and *entered* (the device may be suspended). **Must never** let anything reach an
//! entered device: the gate is closed for [`Reason::Suspended`] all the while, and whoever takes the device alone for
//! something else resumes it first, in the same turn ([`MediatedDevice::alone`]).
//!
//! ```text
//!   AWAKE -- entry, at zero passes --> ENTERED (gate closed; mappings revoked; device suspended, sooner or later)
//!     ^                                   | exit
//!     |                                   | an access of the client, if entered with a wake-up (without: EIO)
//!     |                                   | a state, dirty or memory operation, a reset, a detached client, closing
//!     +-----------------------------------+
//! ```
//!
//! The eventfd is the device's to signal: the kernel (or the model) does it when a device that had really been suspended
//! is resumed, by whomever, and once. Nothing is signalled here.
//! Rights: entry takes the lane and then the gate's turn; a wake-up takes the turn alone. Locks: none of its own.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::DeviceState;

use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::{Class, CloseError, GateClosed, Pass, Reason};
use super::lock;
use crate::device::{ErrorKind, Feature, FeatureAccess, Power};
use crate::lock_order::{self, Right};

/// Times that what hooks have asked for is done before an entry gives up.
const ROUNDS_MAX: usize = 4;

/// Low power that was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entered {
    /// With a wake-up: the client's next access ends it
    pub wakeup: bool,
}

/// What is to be done with an entered device by whoever takes it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asleep {
    /// Resumed
    Resume,
    /// Resumed if an access may; else the access is refused
    AsAccess,
}

impl MediatedDevice {
    /// As `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY`, with an eventfd as `.._ENTRY_WITH_WAKEUP`. Waits, up to
    /// `Limits::access_wait`, until no access is in flight; this call is none.
    ///
    /// EINVAL when it was entered already; EBUSY when accesses do not end, for a device that is being migrated, for a PF with
    /// enabled VFs; ENOTTY where there is no low power. Nothing has changed then.
    pub fn low_power_entry(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        let deadline = Instant::now() + self.limits.access_wait;
        for _ in 0..ROUNDS_MAX {
            // What hooks asked for needs the device: it is done before, not by waking it up again.
            if self.entered().is_none() {
                self.attend();
            }
            let _token = self.lane.enter(deadline)?;
            if self.state() != DeviceState::Running || self.is_tracking() {
                return Err(MediationError::refused("low power of a device that is being migrated", Errno::BUSY));
            }
            // For a passing reason: who comes meanwhile learns at the end whether the device sleeps.
            let _right = lock_order::right(Right::Turn);
            let turn = self.shared.gate.close_or_leave(Reason::Reconfiguring, deadline)?;
            let wanted = self.shared.gate.wants_attention() && self.entered().is_none();
            let done = if wanted { None } else { Some(self.fall_asleep(wakeup)) };
            self.release(turn);
            if let Some(done) = done {
                return done;
            }
        }
        Err(CloseError::Busy.into())
    }

    /// The caller has the device alone.
    fn fall_asleep(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        if let Some(entered) = self.entered() {
            return self.enter_again(entered, wakeup);
        }
        if !self.device().probe_feature(Feature::LowPowerEntry, FeatureAccess::Set) {
            return Err(MediationError::refused("low power", Errno::NOTTY));
        }
        // While it may still reach the device.
        self.tell(abi::EVENT_POWER, [1, 0, 0]);
        let entered = self.revoke_maps().and_then(|()| Ok(self.device().low_power_entry(wakeup)?));
        match entered {
            Ok(()) => {
                lock(&self.condition).entered = Some(Entered { wakeup: wakeup.is_some() });
                Ok(())
            }
            Err(error) => {
                self.tell(abi::EVENT_POWER, [0; 3]);
                Err(error)
            }
        }
    }

    /// The kernel ends low power with a wake-up by itself when something else wakes the device, and tells the client alone: only
    /// it can say whether this is the second entry. Mappings are revoked already.
    fn enter_again(&self, entered: Entered, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        if !entered.wakeup {
            return Err(MediationError::refused("entering low power twice", Errno::INVAL));
        }
        self.device().low_power_entry(wakeup)?;
        lock(&self.condition).entered = Some(Entered { wakeup: wakeup.is_some() });
        Ok(())
    }

    /// As `VFIO_DEVICE_FEATURE_LOW_POWER_EXIT`: the device is awake when it returns. Succeeds when there is nothing to leave;
    /// ENOTTY where there is no low power. When the device does not resume, accesses stay refused.
    pub fn low_power_exit(&self) -> Result<()> {
        if self.entered().is_none() && !self.device().probe_feature(Feature::LowPowerExit, FeatureAccess::Set) {
            return Err(MediationError::refused("low power", Errno::NOTTY));
        }
        self.awaken()
    }

    /// As `VFIO_DEVICE_FEATURE_PROBE`, of the device's own features. Nothing is woken by asking.
    pub fn has_feature(&self, feature: Feature, access: FeatureAccess) -> bool {
        self.device().probe_feature(feature, access)
    }

    /// Low power that was entered, if it was.
    pub fn entered(&self) -> Option<Entered> {
        lock(&self.condition).entered
    }

    /// Where the device's power is, as the kernel or the model says; nothing is woken by asking.
    pub fn power(&self) -> Option<Power> {
        self.device().power().ok()
    }

    /// Ends low power, if it was entered, whoever asks. In the lane or outside of it.
    pub(super) fn awaken(&self) -> Result<()> {
        if self.entered().is_none() {
            return Ok(());
        }
        let awake = self.end_low_power(Asleep::Resume, self.drain_deadline());
        if self.shared.gate.wants_attention() {
            self.attend();
        }
        awake
    }

    /// An access found the device suspended.
    #[cold]
    pub(super) fn enter_suspended(&self, class: Class) -> Result<Pass<'_>> {
        let deadline = Instant::now() + self.limits.access_wait;
        loop {
            self.end_low_power(Asleep::AsAccess, deadline)?;
            match self.shared.gate.enter_until(class, || deadline) {
                Ok(pass) => return Ok(pass),
                // Entered again by another.
                Err(GateClosed { reason: Reason::Suspended }) if Instant::now() < deadline => {}
                Err(refused) => return Err(refused.into()),
            }
        }
    }

    fn end_low_power(&self, asleep: Asleep, deadline: Instant) -> Result<()> {
        let _right = lock_order::right(Right::Turn);
        match self.shared.gate.close_or_leave(Reason::Reconfiguring, deadline) {
            Ok(turn) => {
                let awake = self.settle(asleep);
                self.release(turn);
                awake
            }
            // With passes in flight it is awake: somebody was faster.
            Err(CloseError::Busy) if self.entered().is_none() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Before anything else is done with a device that the caller has alone.
    pub(super) fn settle(&self, asleep: Asleep) -> Result<()> {
        match (self.entered(), asleep) {
            (None, _) => Ok(()),
            (Some(Entered { wakeup: false }), Asleep::AsAccess) => Err(GateClosed { reason: Reason::Suspended }.into()),
            (Some(_), Asleep::Resume | Asleep::AsAccess) => self.resume(),
        }
    }

    fn resume(&self) -> Result<()> {
        self.device().low_power_exit().inspect_err(|error| {
            if error.kind == ErrorKind::Lost {
                self.shared.gate.fail();
            }
        })?;
        lock(&self.condition).entered = None;
        let seen = self.look_at_command();
        self.tell(abi::EVENT_POWER, [0; 3]);
        seen
    }
}

#[cfg(all(test, not(loom)))]
#[path = "low_power_tests.rs"]
mod tests;
