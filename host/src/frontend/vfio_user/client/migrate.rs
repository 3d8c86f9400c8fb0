//! A migration from one server to another, as a VMM performs it.
//!
//! **Owns** the order of the steps. **Must never** let both devices run, drop a page that either the guest or the device has dirtied,
//! or leave the source stopped after a failure from which it can go on.
//!
//! ```text
//!  step                      source        guest     destination
//!  log, copy all memory      RUNNING       runs      RESUMING
//!  rounds: data, dirt        PRE_COPY      runs      RESUMING      (where the device has pre-copy)
//!  pause                     PRE_COPY      paused    RESUMING
//!  last dirt and data        STOP_COPY     paused    RESUMING
//!  -- failure until here: the source is RUNNING again, the destination is reset, the guest goes on --
//!  source lets go            STOP          paused    RESUMING
//!  commit                    STOP          paused    RUNNING       no way back; a lost reply leaves it in doubt
//! ```

use vfio_bindings::bindings::vfio::{VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY};

use super::{Client, Error};
use crate::frontend::vfio_user::wire::{BITMAP_MAX, LoggingReport, MigrationState, PAGE_SIZE};

/// The VMM: whose guest it is, and where its memory goes.
pub trait Guest {
    /// All of the guest's memory that the device may reach: address and length, whole pages.
    fn memory(&self) -> Vec<(u64, u64)>;
    /// Brings these bytes of the guest's memory, as they are now, to the destination.
    fn copy(&mut self, address: u64, length: u64) -> std::io::Result<()>;
    /// No vCPU runs any more. Pages that vCPUs have dirtied since they were copied are copied again by the VMM itself, after
    /// this.
    fn pause(&mut self) -> std::io::Result<()>;
    /// After a failure: the guest goes on at the source.
    fn resume(&mut self);
}

/// When to stop the guest.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Rounds of pre-copy at most
    pub rounds_max: u32,
    /// Fewer dirty bytes than this, and it is paused
    pub dirty_bytes_max: u64,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Migrated {
    pub rounds: u32,
    /// Of the device's state
    pub data_bytes: u64,
    /// Of the guest's memory, repeated ones counted again
    pub memory_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The guest goes on at the source
    #[error("the source: {0}")]
    Source(#[source] Error),
    /// The guest goes on at the source
    #[error("the destination: {0}")]
    Destination(#[source] Error),
    /// The guest goes on at the source
    #[error("the guest: {0}")]
    Guest(#[source] std::io::Error),
    /// The guest goes on at the source
    #[error("the device cannot be migrated")]
    Unsupported,
    /// The source's device does not run, and could not be made to: the guest stays paused
    #[error("the source's device is stopped: {recovery}, after: {cause}")]
    Stopped { cause: Box<MigrateError>, recovery: Error },
    /// Nobody may run the guest before somebody has asked the destination for its state
    #[error("it is not known whether the destination runs: {0}")]
    InDoubt(#[source] Error),
}

type Result<T> = std::result::Result<T, MigrateError>;

/// Bytes of state in one step.
const DATA_BYTES: usize = 1 << 20;

/// Moves the device's state and the memory that it dirties. Afterwards the destination's device runs, the source's is stopped, and
/// the guest is paused: the VMM goes on at the destination.
pub fn migrate(source: &Client, destination: &Client, guest: &mut dyn Guest, policy: &Policy) -> Result<Migrated> {
    let mut run = Run { source, destination, memory: guest.memory(), done: Migrated::default(), buffer: Vec::new() };
    let mut paused = false;
    let moved = run.until_commit(guest, policy, &mut paused);
    if let Err(cause) = moved {
        return Err(run.recover(guest, paused, cause));
    }
    match destination.set_migration_state(MigrationState::Running) {
        Ok(()) => Ok(run.done),
        // It said no, so that it has not begun.
        Err(error @ (Error::Refused { .. } | Error::Invalid(_))) => match destination.migration_state() {
            Ok(MigrationState::Running) | Err(_) => Err(MigrateError::InDoubt(error)),
            Ok(_) => Err(run.recover(guest, paused, MigrateError::Destination(error))),
        },
        Err(error) => Err(MigrateError::InDoubt(error)),
    }
}

struct Run<'a> {
    source: &'a Client,
    destination: &'a Client,
    memory: Vec<(u64, u64)>,
    done: Migrated,
    buffer: Vec<u8>,
}

impl Run<'_> {
    fn until_commit(&mut self, guest: &mut dyn Guest, policy: &Policy, paused: &mut bool) -> Result<()> {
        let flags = self.source.migration_flags().map_err(MigrateError::Source)?;
        if flags & u64::from(VFIO_MIGRATION_STOP_COPY) == 0 {
            return Err(MigrateError::Unsupported);
        }
        self.destination.migration_flags().map_err(MigrateError::Destination)?;
        // What the device dirtied before is in the copy of everything that comes after.
        self.source.logging_start(PAGE_SIZE, &self.memory).map_err(MigrateError::Source)?;
        self.resuming()?;
        for (address, length) in self.memory.clone() {
            self.copy(guest, address, length)?;
        }
        if flags & u64::from(VFIO_MIGRATION_PRE_COPY) != 0 {
            self.source.set_migration_state(MigrationState::PreCopy).map_err(MigrateError::Source)?;
            self.data()?;
        }
        while self.done.rounds < policy.rounds_max {
            self.done.rounds += 1;
            if self.dirt(guest)? < policy.dirty_bytes_max {
                break;
            }
        }
        *paused = true;
        guest.pause().map_err(MigrateError::Guest)?;
        // Only now the device is still, so that only now its dirt is all.
        self.source.set_migration_state(MigrationState::StopCopy).map_err(MigrateError::Source)?;
        self.dirt(guest)?;
        self.data()?;
        self.source.logging_stop().map_err(MigrateError::Source)?;
        self.source.set_migration_state(MigrationState::Stop).map_err(MigrateError::Source)
    }

    fn resuming(&self) -> Result<()> {
        self.destination.set_migration_state(MigrationState::Resuming).map_err(MigrateError::Destination)
    }

    fn copy(&mut self, guest: &mut dyn Guest, address: u64, length: u64) -> Result<()> {
        self.done.memory_bytes += length;
        guest.copy(address, length).map_err(MigrateError::Guest)
    }

    /// Until a read is short: the end, in pre-copy for now.
    fn data(&mut self) -> Result<()> {
        self.buffer.resize(DATA_BYTES, 0);
        loop {
            let count = self.source.mig_data_read(&mut self.buffer).map_err(MigrateError::Source)?;
            self.done.data_bytes += count as u64;
            let data = self.buffer.get(..count).unwrap_or(&[]);
            self.destination.mig_data_write(data).map_err(MigrateError::Destination)?;
            if count < DATA_BYTES {
                return Ok(());
            }
        }
    }

    /// Copies what the device has dirtied since the last time; bytes of it.
    fn dirt(&mut self, guest: &mut dyn Guest) -> Result<u64> {
        let before = self.done.memory_bytes;
        let mut bitmap = Vec::new();
        for (address, length) in self.memory.clone() {
            let step = BITMAP_MAX * 8 * PAGE_SIZE;
            for at in (0..length).step_by(step as usize) {
                let report = LoggingReport { iova: address + at, length: step.min(length - at), page_size: PAGE_SIZE };
                self.source.logging_report(&report, &mut bitmap).map_err(MigrateError::Source)?;
                for (first, pages) in runs(&bitmap, report.pages()) {
                    self.copy(guest, report.iova + first * PAGE_SIZE, pages * PAGE_SIZE)?;
                }
            }
        }
        Ok(self.done.memory_bytes - before)
    }

    /// The source goes on. Never called once the destination may run.
    fn recover(&self, guest: &mut dyn Guest, paused: bool, cause: MigrateError) -> MigrateError {
        // What the destination has got is of no use; if it is lost it does not run either.
        let _reset = self.destination.reset();
        // Where it is not logging any more that is what is wanted.
        let _stopped = self.source.logging_stop();
        if let Err(recovery) = self.source.set_migration_state(MigrationState::Running) {
            return MigrateError::Stopped { cause: Box::new(cause), recovery };
        }
        if paused {
            guest.resume();
        }
        cause
    }
}

/// Runs of set bits, as first bit and count; bits from `pages` on are not looked at.
fn runs(bitmap: &[u8], pages: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let is_set = move |page: u64| {
        bitmap.get((page / 8) as usize).is_some_and(|byte| page < pages && byte & (1 << (page % 8)) != 0)
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < pages && !is_set(at) {
            // A byte without a set bit, at once.
            at += if at.is_multiple_of(8) && bitmap.get((at / 8) as usize) == Some(&0) { 8 } else { 1 };
        }
        let first = at;
        while is_set(at) {
            at += 1;
        }
        (at > first).then_some((first, at - first))
    })
}
