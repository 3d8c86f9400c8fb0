//! The device state machine of VFIO migration v2: states, and the next step of every path.
//!
//! **Owns** the table that the host walks and that plug-ins are called along. Pure; no device is touched here.
//! **Must never** guess: a number that names no state is not a state, a path that the rules do not give is an error.
//! Source: `linux/vfio.h`, `enum vfio_device_mig_state`; the table stores next steps only, for a device with every
//! optional state; [`next_step`] skips the states that a device does not have.

use crate::abi;

/// `enum vfio_device_mig_state`, without the two sentinels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum DeviceState {
    Error = abi::STATE_ERROR,
    Stop = abi::STATE_STOP,
    Running = abi::STATE_RUNNING,
    StopCopy = abi::STATE_STOP_COPY,
    Resuming = abi::STATE_RESUMING,
    RunningP2p = abi::STATE_RUNNING_P2P,
    PreCopy = abi::STATE_PRE_COPY,
    PreCopyP2p = abi::STATE_PRE_COPY_P2P,
}

use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

impl DeviceState {
    pub const ALL: [Self; 8] = [Error, Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p];

    /// Parses the uAPI's number.
    pub fn from_raw(raw: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u32 == raw)
    }

    pub const fn raw(self) -> u32 {
        self as u32
    }

    /// States in which the device may read and write guest memory and raise interrupts on its own.
    pub const fn is_running(self) -> bool {
        matches!(self, Running | RunningP2p | PreCopy | PreCopyP2p)
    }

    /// States with an open saving stream.
    pub const fn is_saving(self) -> bool {
        matches!(self, PreCopy | PreCopyP2p | StopCopy)
    }
}

impl std::fmt::Display for DeviceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Error => "ERROR",
            Stop => "STOP",
            Running => "RUNNING",
            StopCopy => "STOP_COPY",
            Resuming => "RESUMING",
            RunningP2p => "RUNNING_P2P",
            PreCopy => "PRE_COPY",
            PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

/// `VFIO_MIGRATION_*` of a device that can migrate: STOP_COPY always, the others as declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationFlags {
    pub p2p: bool,
    pub pre_copy: bool,
}

impl MigrationFlags {
    /// Parses the uAPI's bits. `None` without STOP_COPY or with a bit that this version does not know.
    pub fn from_raw(raw: u64) -> Option<Self> {
        let known = abi::MIGRATION_STOP_COPY | abi::MIGRATION_P2P | abi::MIGRATION_PRE_COPY;
        if raw & abi::MIGRATION_STOP_COPY == 0 || raw & !known != 0 {
            return None;
        }
        Some(Self { p2p: raw & abi::MIGRATION_P2P != 0, pre_copy: raw & abi::MIGRATION_PRE_COPY != 0 })
    }

    pub const fn raw(self) -> u64 {
        let p2p = if self.p2p { abi::MIGRATION_P2P } else { 0 };
        let pre_copy = if self.pre_copy { abi::MIGRATION_PRE_COPY } else { 0 };
        abi::MIGRATION_STOP_COPY | p2p | pre_copy
    }

    /// Whether a device with these flags has the state.
    pub const fn supports(self, state: DeviceState) -> bool {
        match state {
            Error | Stop | Running | StopCopy | Resuming => true,
            RunningP2p => self.p2p,
            PreCopy => self.pre_copy,
            PreCopyP2p => self.p2p && self.pre_copy,
        }
    }
}

/// No arc leads there: EINVAL in the uAPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no path from {from} to {to}")]
pub struct NoPath {
    pub from: DeviceState,
    pub to: DeviceState,
}

/// The next state on the way from `from` to `to`, for a device with `flags`. `Ok(to)` when they are equal.
pub fn next_step(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> Result<DeviceState, NoPath> {
    let no_path = Err(NoPath { from, to });
    if !flags.supports(from) || !flags.supports(to) || from == Error || to == Error {
        return no_path;
    }
    let mut at = from;
    // Each pass leaves a state that the device lacks; there are three of them.
    for _ in 0..DeviceState::ALL.len() {
        let next = full_step(at, to);
        if next == Error {
            return no_path;
        }
        if flags.supports(next) {
            return Ok(next);
        }
        at = next;
    }
    no_path
}

/// Every state between `from` (not included) and `to` (included), in order; empty when they are equal.
pub fn path(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> Result<Vec<DeviceState>, NoPath> {
    let mut states = Vec::new();
    let mut at = from;
    while at != to {
        at = next_step(at, to, flags)?;
        states.push(at);
    }
    if states.is_empty() {
        next_step(from, to, flags)?;
    }
    Ok(states)
}

/// The table with every optional state. `Error` where there is no path.
const fn full_step(from: DeviceState, to: DeviceState) -> DeviceState {
    match (from, to) {
        (Error, _) | (_, Error) => Error,
        (Stop, Stop) => Stop,
        (Stop, StopCopy) => StopCopy,
        (Stop, Resuming) => Resuming,
        (Stop, Running | RunningP2p | PreCopy | PreCopyP2p) => RunningP2p,
        (Running, Running) => Running,
        (Running, PreCopy) => PreCopy,
        (Running, Stop | StopCopy | Resuming | RunningP2p | PreCopyP2p) => RunningP2p,
        (PreCopy, PreCopy) => PreCopy,
        (PreCopy, PreCopyP2p | StopCopy) => PreCopyP2p,
        (PreCopy, Stop | Running | Resuming | RunningP2p) => Running,
        (PreCopyP2p, PreCopyP2p) => PreCopyP2p,
        (PreCopyP2p, PreCopy) => PreCopy,
        (PreCopyP2p, StopCopy) => StopCopy,
        (PreCopyP2p, Stop | Running | Resuming | RunningP2p) => RunningP2p,
        (StopCopy, StopCopy) => StopCopy,
        (StopCopy, Stop | Running | Resuming | RunningP2p) => Stop,
        (StopCopy, PreCopy | PreCopyP2p) => Error,
        (Resuming, Resuming) => Resuming,
        (Resuming, Stop | Running | StopCopy | RunningP2p | PreCopy | PreCopyP2p) => Stop,
        (RunningP2p, RunningP2p) => RunningP2p,
        (RunningP2p, Running | PreCopy) => Running,
        (RunningP2p, PreCopyP2p) => PreCopyP2p,
        (RunningP2p, Stop | StopCopy | Resuming) => Stop,
    }
}

#[cfg(test)]
mod tests;
