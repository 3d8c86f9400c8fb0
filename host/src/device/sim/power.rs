//! A model's power: low power as vfio-pci offers it, and the proof that nobody touches a device that has none.
//!
//! **Owns** whether low power was entered, whether the device is suspended, and the wake-up eventfd, under the model's
//! mutex; and outside it [`Watch`], which counts accesses in flight and those that came to a suspended device. **Must
//! never** be kinder than the real thing: a model does not resume by itself for an access, as the kernel would.
//!
//! ```text
//!   D0 -- entry --> D3hot | D3cold (entered, suspended) -- exit, or resumed by another --> D0
//!    \--- entry --> D0 (entered, never suspended: `Sleep::Never`) -- exit --> D0
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;

use crate::device::{Feature, FeatureAccess, Power, PowerState};
use crate::sys::{is_eventfd, signal_shared};

/// What becomes of a model whose low power was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sleep {
    /// Suspended at once, with its registers kept
    #[default]
    D3Hot,
    /// Suspended at once and without power: its registers are as after a reset when it wakes
    D3Cold,
    /// Never suspended: something else keeps it up
    Never,
    /// There is no low power, as with an older kernel
    Unsupported,
}

#[derive(Debug, Default)]
pub(super) struct PowerModel {
    sleep: Sleep,
    entered: bool,
    suspended: bool,
    wakeup: Option<OwnedFd>,
    /// Enabled VFs, where the model plays a PF
    pub(super) vfs: u32,
}

/// What a resume did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resumed {
    /// It was not suspended
    Nothing,
    Kept,
    /// Registers are lost
    PowerLost,
}

impl PowerModel {
    pub(super) fn new(sleep: Sleep) -> Self {
        Self { sleep, ..Self::default() }
    }

    pub(super) fn is_supported(&self) -> bool {
        self.sleep != Sleep::Unsupported
    }

    pub(super) fn is_suspended(&self) -> bool {
        self.suspended
    }

    pub(super) fn power(&self) -> Power {
        let state = match self.sleep {
            Sleep::D3Hot if self.suspended => PowerState::D3Hot,
            Sleep::D3Cold if self.suspended => PowerState::D3Cold,
            _ => PowerState::D0,
        };
        Power { state, suspended: self.suspended }
    }

    pub(super) fn enter(&mut self, wakeup: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        if !self.is_supported() {
            return Err(Errno::NOTTY);
        }
        if self.vfs > 0 {
            return Err(Errno::BUSY);
        }
        if self.entered {
            return Err(Errno::INVAL);
        }
        if wakeup.is_some_and(|fd| !is_eventfd(fd)) {
            return Err(Errno::INVAL);
        }
        let wakeup = wakeup.map(|fd| fd.try_clone_to_owned()).transpose();
        self.wakeup = wakeup.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))?;
        self.entered = true;
        self.suspended = self.sleep != Sleep::Never;
        Ok(())
    }

    pub(super) fn exit(&mut self) -> Result<Resumed, Errno> {
        if !self.is_supported() {
            return Err(Errno::NOTTY);
        }
        let resumed = self.resume();
        self.entered = false;
        self.wakeup = None;
        Ok(resumed)
    }

    /// Somebody else on this machine needs the device for a moment: with a wake-up that ends low power, without one it is
    /// suspended again.
    pub(super) fn resumed_by_another(&mut self) -> Resumed {
        if self.wakeup.is_none() {
            return Resumed::Nothing;
        }
        let resumed = self.resume();
        self.entered &= resumed == Resumed::Nothing;
        resumed
    }

    /// Signals the wake-up, once, if there was something to wake up.
    fn resume(&mut self) -> Resumed {
        if !std::mem::take(&mut self.suspended) {
            return Resumed::Nothing;
        }
        if let Some(wakeup) = self.wakeup.take() {
            signal_shared(wakeup.as_fd());
        }
        if self.sleep == Sleep::D3Cold { Resumed::PowerLost } else { Resumed::Kept }
    }
}

pub(super) fn is_low_power(feature: Feature, access: FeatureAccess) -> bool {
    let entry_or_exit = [Feature::LowPowerEntry, Feature::LowPowerEntryWithWakeup, Feature::LowPowerExit];
    access == FeatureAccess::Set && entry_or_exit.contains(&feature)
}

/// Who touches the device, and whether that was allowed.
#[derive(Debug, Default)]
pub(super) struct Watch {
    asleep: AtomicBool,
    in_flight: AtomicU32,
    violations: AtomicU64,
}

impl Watch {
    /// An access begins. `None`: the device is suspended, and the access is counted as a violation.
    pub(super) fn begin(&self) -> Option<Touch<'_>> {
        // In flight first: either this sees the sleep, or the entry sees this.
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        let touch = Touch(self);
        if self.asleep.load(Ordering::SeqCst) {
            self.violations.fetch_add(1, Ordering::SeqCst);
            return None;
        }
        Some(touch)
    }

    pub(super) fn falls_asleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        let cut_off = self.in_flight.load(Ordering::SeqCst);
        self.violations.fetch_add(u64::from(cut_off), Ordering::SeqCst);
    }

    pub(super) fn wakes(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    pub(super) fn violations(&self) -> u64 {
        self.violations.load(Ordering::SeqCst)
    }
}

/// An access in flight.
#[derive(Debug)]
pub(super) struct Touch<'a>(&'a Watch);

impl Drop for Touch<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(all(test, not(loom)))]
#[path = "power_tests.rs"]
mod tests;
