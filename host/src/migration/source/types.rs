//! What goes into the source machine and what comes out of it.

use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

use crate::migration::cause::Cause;
use crate::migration::journal::Mark;
use crate::migration::policy::Left;
use crate::migration::wire::{Digest, MemoryCopier, Record};

/// What the machine must know of a migration before it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub copier: MemoryCopier,
    /// Guest memory; 0 if the VMM copies
    pub pages: u64,
    /// Each device, in the order that both sides share
    pub devices: Vec<MigrationFlags>,
    pub verify: bool,
}

impl Facts {
    /// The rule for more than one device: all must be able to go quiescent towards each other.
    pub fn refusal(&self) -> Option<String> {
        let without = self.devices.iter().position(|flags| !flags.p2p);
        match without {
            Some(device) if self.devices.len() > 1 => {
                Some(format!("device {device} has no P2P state, which a migration of several devices needs"))
            }
            _ => None,
        }
    }
}

/// What the driver is to do next. Each is answered by exactly one [`Event`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Find out the [`Facts`]: [`Event::Described`]
    Describe,
    /// Append to the journal, durably
    Journal(Mark),
    /// Build and send HELLO from what [`Action::Describe`] found
    SendHello,
    Send(Record<'static>),
    /// Wait for a record: [`Event::Received`], or [`Event::TimedOut`] at this time
    Wait {
        until_us: u64,
    },
    /// Every page is dirty from now on until drained
    StartTracking,
    StopTracking,
    /// Bring every tracker's dirt into the log
    SyncDirty,
    /// Ask what is left: [`Event::Estimated`]
    Estimate,
    /// Take the log's dirt under a guard: [`Event::Drained`]
    Drain,
    /// Send the next batch of the guard's pages: [`Event::PagesSent`]
    SendPages,
    /// What the guard holds is safe at the peer
    CommitDrain,
    /// Drop the guard: its dirt goes back into the log
    RestoreDrain,
    SetState {
        device: usize,
        target: DeviceState,
        until_us: u64,
    },
    /// As SetState, and where that fails, reset the device and bring it there
    Restore {
        device: usize,
        target: DeviceState,
        until_us: u64,
    },
    /// Send the device's next chunk: [`Event::StateSent`]
    SendState {
        device: usize,
        sequence: u64,
    },
    SendDigest,
    PauseVmm {
        until_us: u64,
    },
    ResumeVmm,
    /// Hash more of guest memory: [`Event::Hashed`]
    HashMemory,
    /// The machine has ended
    End(End),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    Begin,
    Done,
    Described(Facts),
    Drained {
        pages: u64,
    },
    /// `pages` includes `zero_pages`; `bytes` is what the stream carried
    PagesSent {
        pages: u64,
        zero_pages: u64,
        bytes: u64,
        more: bool,
    },
    /// `more`: there is more to be had at once
    StateSent {
        bytes: u64,
        more: bool,
    },
    Estimated(Left),
    Received(Record<'a>),
    Hashed {
        digest: Digest,
        more: bool,
    },
    Failed(Cause),
    TimedOut,
}

/// An event, when it happened, and whether somebody wants out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input<'a> {
    pub now_us: u64,
    pub cancelled: bool,
    pub event: Event<'a>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The destination owns the guest. `verified`: `None` if not asked for or not answered
    Moved { verified: Option<bool> },
    /// The guest is here. It runs, unless `resumed` is false. `lost`: devices that could not be brought back
    Kept { cause: Cause, resumed: bool, lost: Vec<usize> },
    /// Nobody may run the guest until this is settled
    InDoubt { cause: Cause },
}
