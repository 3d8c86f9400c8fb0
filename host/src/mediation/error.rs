//! What can go wrong between a client and a mediated device, shaped by what the caller can do about it.

use rustix::io::Errno;
use vfio_mediate_sdk::state::DeviceState;

use super::gate::{CloseError, GateClosed};
use crate::device::{DeviceError, ErrorKind};
use crate::memory::MemoryError;

pub type Result<T> = std::result::Result<T, MediationError>;

/// What an access gives. An error is in a box, so that the result fits a register and success costs nothing.
pub(super) type Access = std::result::Result<(), Box<MediationError>>;

/// The way from one to the other, out of line.
#[cold]
#[inline(never)]
pub(super) fn boxed(error: impl Into<MediationError>) -> Box<MediationError> {
    Box::new(error.into())
}

#[cold]
#[inline(never)]
#[expect(clippy::boxed_local, reason = "taking it out of its box is what this is for")]
pub(super) fn unboxed(error: Box<MediationError>) -> MediationError {
    *error
}

/// What a caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// The request was wrong, is not supported or was denied: do something else. The device is as it was.
    Change,
    /// The same request may succeed later.
    Retry,
    /// The device's state is not what was asked for: recover it, or reset it.
    Recover,
    /// The device is gone until it is opened again.
    Lost,
}

/// An error of one mediated device.
#[derive(Debug, thiserror::Error)]
pub enum MediationError {
    /// The host itself refuses; `what` says what was asked for.
    #[error("{what}: {errno}")]
    Refused { what: String, errno: Errno },
    /// A hook, an event or another function of the plug-in refused or failed.
    #[error("the plug-in refused {what}: {errno}")]
    Plugin { what: &'static str, errno: Errno },
    /// The plug-in broke a rule of the ABI.
    #[error("the plug-in's fault: {what}")]
    PluginFault { what: String },
    #[error("{message}")]
    Open { message: String, errno: Errno },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Gate(#[from] GateClosed),
    /// The device was not had alone.
    #[error(transparent)]
    Close(#[from] CloseError),
    /// An access was cut off after `done` bytes, which did take effect.
    #[error("after {done} bytes")]
    Partial { done: u64, source: Box<MediationError> },
    /// Neither the plug-in nor the device itself can save and restore the device's state.
    #[error("{device} cannot be migrated: {reason}")]
    Unmigratable { device: String, reason: String },
    /// The stream of a saved device is short, corrupt, out of order or another device's.
    #[error("the device's saved state: {what}")]
    Stream { what: String },
    /// Wrong in this migration state.
    #[error("{what} in state {state}")]
    WrongState { what: &'static str, state: DeviceState },
}

impl MediationError {
    pub(super) fn refused(what: impl Into<String>, errno: Errno) -> Self {
        Self::Refused { what: what.into(), errno }
    }

    /// The errno at the edge.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Refused { errno, .. } | Self::Plugin { errno, .. } | Self::Open { errno, .. } => *errno,
            Self::PluginFault { .. } => Errno::IO,
            Self::Device(error) => error.errno,
            Self::Memory(error) => error.errno(),
            Self::Gate(closed) | Self::Close(CloseError::Gone(closed)) => closed.reason.errno(),
            Self::Close(CloseError::DrainTimeout) => Errno::TIMEDOUT,
            Self::Close(CloseError::Busy) => Errno::BUSY,
            Self::Close(CloseError::Held) => Errno::DEADLK,
            Self::Partial { source, .. } => source.errno(),
            Self::Unmigratable { .. } => Errno::NOTTY,
            Self::Stream { .. } => Errno::BADMSG,
            Self::WrongState { .. } => Errno::INVAL,
        }
    }

    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Refused { .. }
            | Self::Plugin { .. }
            | Self::Open { .. }
            | Self::Memory(_)
            | Self::Unmigratable { .. }
            | Self::WrongState { .. }
            | Self::Close(CloseError::Held) => Remedy::Change,
            Self::Close(CloseError::Busy) => Remedy::Retry,
            Self::PluginFault { .. } | Self::Stream { .. } => Remedy::Recover,
            Self::Device(error) => match error.kind {
                ErrorKind::Refused => Remedy::Change,
                ErrorKind::Failed => Remedy::Retry,
                ErrorKind::Lost => Remedy::Lost,
            },
            Self::Gate(closed) | Self::Close(CloseError::Gone(closed)) => match closed.reason.errno() {
                Errno::NODEV => Remedy::Lost,
                _ => Remedy::Retry,
            },
            Self::Close(CloseError::DrainTimeout) => Remedy::Lost,
            Self::Partial { source, .. } => source.remedy(),
        }
    }

    /// Bytes of the access that took effect before it failed.
    pub fn bytes_done(&self) -> u64 {
        match self {
            Self::Partial { done, .. } => *done,
            _ => 0,
        }
    }

    /// An access failed after its first `done` bytes.
    #[cold]
    pub(super) fn after(self: Box<Self>, done: usize) -> Box<Self> {
        if done == 0 { self } else { Box::new(Self::Partial { done: done as u64, source: self }) }
    }
}

/// A transition failed. The device is in `actual`, which may be any state on the path.
#[derive(Debug, thiserror::Error)]
#[error("going from {from} to {to}: the device is in {actual}")]
pub struct StateError {
    pub from: DeviceState,
    /// Where the failed arc led
    pub to: DeviceState,
    /// [`DeviceState::Error`]: only a reset helps
    pub actual: DeviceState,
    pub errno: Errno,
    #[source]
    pub source: Box<MediationError>,
}

/// A destination's device cannot take the source's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    pub reason: String,
    pub errno: Errno,
}
