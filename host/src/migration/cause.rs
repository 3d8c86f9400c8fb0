//! Why a migration did not go as asked, shaped by what a caller can do, and the phases that reports name.

use super::wire::{RefuseCode, WireError};

/// Which side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Source,
    Destination,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// What stopped a migration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// Asked for; nothing to repair
    #[error("cancelled")]
    Cancelled,
    /// This side will not begin; change the configuration
    #[error("refused here: {reason}")]
    Refused { code: RefuseCode, reason: String },
    /// The other side will not begin; change its configuration
    #[error("refused by the destination: {reason}")]
    RefusedByPeer { code: RefuseCode, reason: String },
    /// The other side gave up; its text says why
    #[error("the peer gave up: {reason}")]
    PeerGaveUp { reason: String },
    /// The connection failed; try again
    #[error("connection: {0}")]
    Link(String),
    /// An answer did not come in time; try again
    #[error("no answer in time while {0}")]
    TimedOut(Phase),
    /// The guest writes faster than the stream; raise `downtime_ms_max`, or force
    #[error("does not converge: {0}")]
    Stalled(String),
    /// The peer breaks the protocol or the stream is damaged: the peer's fault
    #[error("stream: {0}")]
    Stream(#[from] WireError),
    /// As above, found by a machine
    #[error("the peer breaks the protocol: {0}")]
    Protocol(String),
    #[error("device {device}: {what}")]
    Device { device: usize, what: String },
    #[error("the VMM: {0}")]
    Vmm(String),
    #[error("guest memory: {0}")]
    Memory(String),
    /// The journal cannot be written
    #[error("journal: {0}")]
    Storage(String),
    /// Both sides own the guest: an operator resolved both to run
    #[error("two owners: {0}")]
    Conflict(String),
    /// An operator decided where the guest runs
    #[error("resolved by an operator")]
    Resolved,
    /// A fault of this program
    #[error("internal: {0}")]
    Internal(String),
}

/// Where a migration is. In the order in which phases come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Negotiating,
    /// The guest runs; rounds of memory and device state
    PreCopy,
    /// The VMM is asked to pause the guest: downtime begins
    Pausing,
    /// Devices go quiescent, then stop
    Stopping,
    LastDrain,
    LastPages,
    DeviceState,
    /// Digests are compared, the destination prepares
    Digest,
    /// The commit point: journal, COMMIT, and the answer
    Committing,
    /// The destination starts devices and guest: downtime ends
    Resuming,
    /// The guest runs at the destination; the source lets go
    Finishing,
    Verifying,
    /// A failed or cancelled migration is undone
    Unwinding,
    /// A lost answer is asked for again
    Settling,
    Ended,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Negotiating => "negotiating",
            Self::PreCopy => "pre-copying",
            Self::Pausing => "pausing the guest",
            Self::Stopping => "stopping devices",
            Self::LastDrain => "draining dirt for the last time",
            Self::LastPages => "sending the last pages",
            Self::DeviceState => "sending device state",
            Self::Digest => "comparing digests",
            Self::Committing => "committing",
            Self::Resuming => "resuming the guest",
            Self::Finishing => "finishing",
            Self::Verifying => "verifying",
            Self::Unwinding => "unwinding",
            Self::Settling => "settling",
            Self::Ended => "ended",
        })
    }
}
