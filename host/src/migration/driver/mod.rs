//! Performs what the machines ask for, over a [`Transport`] and an embedding's host.
//!
//! **Owns** buffers, deadlines, the connection and the drain guard. **Must never** decide: every order of steps is a
//! machine's, every ownership a journal's. Memory is bounded: one batch of pages, one record, one chunk of device state.
//! Locks: none held across a call to the embedding. Each driver is one thread's.

mod connection;
mod destination;
mod doubt;
mod host;
mod mediated;
mod pages;
mod source;

pub use connection::Place;
pub use destination::{DestinationDriver, DestinationJob, migrate_in, settle_in};
pub use doubt::{InDoubt, MigrationError};
pub use host::{
    DestinationHost, DestinationShape, DirtyDrain, HostError, OfferedDevice, Remaining, Saved, SourceHost, SourceOffer,
};
pub use mediated::MediatedHost;
pub use source::{SourceDriver, SourceJob, migrate_out, settle_out};

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::cause::{Phase, Role};
use super::wire::MigrationId;

/// Set by anyone who wants a migration to stop. Takes effect at the next step that may be undone.
#[derive(Debug, Default)]
pub struct Cancel(AtomicBool);

impl Cancel {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Time as deadlines see it, in microseconds since some fixed point.
pub trait Time: Send + Sync {
    fn now_us(&self) -> u64;
}

/// The machine's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Monotonic(Instant);

impl Monotonic {
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for Monotonic {
    fn default() -> Self {
        Self::new()
    }
}

impl Time for Monotonic {
    fn now_us(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    /// From 1; 0 before the first
    pub round: u32,
    pub pages_sent: u64,
    /// Of this round, still to be sent (source), or 0
    pub pages_left: u64,
    pub bytes: u64,
}

/// Told of every change of phase *before* its first step is performed, and of progress. Called by the migration's
/// thread: whoever blocks here holds the migration where it is.
pub trait Observer: Send + Sync {
    fn phase(&self, id: MigrationId, role: Role, phase: Phase);
    fn progress(&self, id: MigrationId, role: Role, progress: Progress);
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {
    fn phase(&self, _: MigrationId, _: Role, _: Phase) {}
    fn progress(&self, _: MigrationId, _: Role, _: Progress) {}
}

/// What one step of a driver did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Progress,
    /// Nothing can be done until the other side does something, or until this time
    Blocked {
        until_us: u64,
    },
    Ended,
}

/// A link that was never there: an operator's decision is performed without the other side.
struct NoLink;

impl super::transport::Transport for NoLink {
    fn send(&mut self, _: &[std::io::IoSlice<'_>]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::NotConnected.into())
    }

    fn receive(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::NotConnected.into())
    }

    fn peer(&self) -> String {
        "an operator".to_owned()
    }
}
