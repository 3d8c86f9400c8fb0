//! How a migration that did not move its guest ended, and the one ending that needs a sequel.

use crate::migration::cause::{Cause, Role};
use crate::migration::journal::{Journal, JournalError, Mark, Resolution};
use crate::migration::source::Facts;
use crate::migration::transport::Transport;
use crate::migration::wire::{Digest, MigrationId, Outcome};
use crate::migration::{destination, policy::Policy, source};

use super::destination::{DestinationDriver, DestinationJob};
use super::source::{SourceDriver, SourceJob};
use crate::migration::report::Report;

/// The guest did not change hands, or nobody knows.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// Source: the guest is here. It runs unless `resumed` is false; `lost` devices must be opened anew.
    #[error("{cause}")]
    Kept { cause: Cause, resumed: bool, lost: Vec<usize> },
    /// Destination: it never was here.
    #[error("{cause}")]
    Discarded { cause: Cause },
    /// Destination: a source came back for an old migration, and was told what the journal says.
    #[error("a source was told of an old migration: {outcome:?}")]
    Answered { outcome: Outcome },
    /// Nobody may run the guest until this is settled.
    #[error("in doubt: {0}")]
    InDoubt(Box<InDoubt>),
}

/// A guest that stands still because nobody knows whose it is. Holds the journal, so that no other process can decide
/// meanwhile. Dropping it leaves the doubt in the journal.
#[derive(Debug)]
pub struct InDoubt {
    pub id: MigrationId,
    pub role: Role,
    pub peer: String,
    pub cause: Cause,
    pub(super) journal: Option<Journal>,
    pub(super) digest: Option<Digest>,
    pub(super) facts: Option<Facts>,
}

impl std::fmt::Display for InDoubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let other = match self.role {
            Role::Source => "the destination may or may not have committed",
            Role::Destination => "the source may or may not have committed",
        };
        let Self { id, peer, cause, .. } = self;
        write!(f, "migration {id} with {peer}: {cause}; {other}; settle by reconnecting, or resolve")
    }
}

impl InDoubt {
    /// Source: asks the destination over a new connection.
    pub fn settle_out(self, job: SourceJob<'_>, transport: Box<dyn Transport>) -> Result<Report, MigrationError> {
        SourceDriver::reconnect(job, transport, self)?.run()
    }

    /// Destination: answers a source that has come back.
    pub fn settle_in(self, job: DestinationJob<'_>, transport: Box<dyn Transport>) -> Result<Report, MigrationError> {
        DestinationDriver::reconnect(job, transport, self)?.run()
    }

    /// Source: performs an operator's decision. The caller has made sure that the other side does the opposite.
    pub fn resolve_out(mut self, job: SourceJob<'_>, resolution: Resolution) -> Result<Report, MigrationError> {
        let here = match self.record(resolution) {
            Ok(here) => here,
            Err(cause) => return Err(self.with(cause)),
        };
        match (self.digest, self.facts.clone()) {
            (Some(digest), Some(facts)) => {
                let machine = source::Source::resolved(job.policy.clone(), here, digest, facts);
                SourceDriver::from_doubt(job, Box::new(super::NoLink), machine, self).run()
            }
            _ => Err(self.with(Cause::Internal("nothing is held here".into()))),
        }
    }

    /// Destination: performs an operator's decision.
    pub fn resolve_in(mut self, job: DestinationJob<'_>, resolution: Resolution) -> Result<Report, MigrationError> {
        let here = match self.record(resolution) {
            Ok(here) => here,
            Err(cause) => return Err(self.with(cause)),
        };
        match (self.digest, self.facts.clone()) {
            (Some(digest), Some(facts)) => {
                let machine = destination::Destination::resolved(job.policy.clone(), here, digest, facts);
                DestinationDriver::from_doubt(job, Box::new(super::NoLink), machine, self).run()
            }
            _ => Err(self.with(Cause::Internal("nothing is held here".into()))),
        }
    }

    fn record(&mut self, resolution: Resolution) -> Result<bool, Cause> {
        let journal = self.journal.as_mut().ok_or(Cause::Storage("the journal is not open".into()))?;
        // The doubt may be the journal's own: it could not be written when COMMITTING was due.
        if let (Mark::Began, Some(digest)) = (journal.story().last, self.digest) {
            journal.append(Mark::Committing { digest }).map_err(cause_of)?;
        }
        journal.resolve(resolution).map_err(cause_of)?;
        Ok(resolution == Resolution::RunHere)
    }

    pub(super) fn with(self, cause: Cause) -> MigrationError {
        MigrationError::InDoubt(Box::new(Self { cause, ..self }))
    }
}

pub(super) fn cause_of(error: JournalError) -> Cause {
    use crate::migration::wire::RefuseCode;
    match error {
        JournalError::InUse { .. } => Cause::Refused { code: RefuseCode::Replayed, reason: error.to_string() },
        JournalError::Storage(source) => Cause::Storage(source.to_string()),
        JournalError::Damaged { .. } | JournalError::NotAllowed { .. } => Cause::Storage(error.to_string()),
    }
}

/// Milliseconds from now until a machine's deadline.
pub(super) fn ms_until(now_us: u64, until_us: u64) -> u64 {
    until_us.saturating_sub(now_us).div_ceil(1000)
}

/// How long one record may be on its way.
pub(super) fn record_until(policy: &Policy, now_us: u64) -> u64 {
    now_us.saturating_add(policy.record_ms_max.saturating_mul(1000))
}
