//! Whose guest is it, when nobody knows: an operator's word, and the question that a restarted host asks.

use std::sync::Arc;

use super::embedder::{IdleVmm, NoGuest};
use super::watch::{Watch, policy};
use super::{Guest, Host, lock, outgoing};
use crate::control::address;
use crate::control::config::Config;
use crate::control::protocol::{Failure, FailureCode, Ownership, Run};
use crate::control::socket::Job;
use crate::memory::{AddressSpace, GuestRam, PAGE_SIZE};
use crate::migration::cause::Role;
use crate::migration::driver::{Cancel, DestinationJob, InDoubt, MediatedHost, Monotonic, SourceJob, settle_out};
use crate::migration::journal::{FileStore, JournalError, Resolution, Standing, recover};

/// What the journal means for a host that starts. A source in doubt asks its destination once, since the answer may be
/// had without an operator.
pub(super) fn standing_at_start(store: &FileStore, config: &Config) -> Result<Standing, JournalError> {
    match recover(store)? {
        Standing::InDoubt { id, peer, explanation } if !peer.is_empty() => match ask(store, config, id, &peer) {
            Ok(()) => recover(store),
            Err(why) => Ok(Standing::InDoubt { id, peer, explanation: format!("{explanation}; {why}") }),
        },
        known @ (Standing::Idle | Standing::MayRun | Standing::MustNotRun | Standing::InDoubt { .. }) => Ok(known),
    }
}

/// There is no guest and no device in this process yet: only the journal takes part.
fn ask(store: &FileStore, config: &Config, id: crate::migration::wire::MigrationId, peer: &str) -> Result<(), String> {
    let addresses = address::connect(peer, config.insecure).map_err(|error| error.to_string())?;
    let link = outgoing::connect(&addresses)?;
    let ram = GuestRam::new(PAGE_SIZE).map_err(|error| error.to_string())?;
    let nothing = MediatedHost::new(Vec::new(), AddressSpace::new(ram), Arc::new(IdleVmm), false);
    let (job, cancel, time) = (Job::default(), Cancel::new(), Monotonic::new());
    let watch = Watch { embedder: &NoGuest, job: &job, pages_total: 0, started: std::time::Instant::now() };
    let source = SourceJob {
        id,
        host: &nothing,
        store,
        policy: policy(&config.limits),
        verify: false,
        observer: &watch,
        cancel: &cancel,
        time: &time,
    };
    // Whatever it ends with, the journal is asked what it means.
    if let Err(error) = settle_out(source, link) {
        tracing::info!(migration = %id, peer, %error, "asked the destination");
    }
    Ok(())
}

impl Host {
    /// An operator's word. Whoever says it has made sure that the other side does the opposite.
    pub fn resolve(&self, id: &str, run: Run) -> Result<String, Failure> {
        let (doubt, mediated) = self.doubt_in_hand(id)?;
        let (cancel, time, job) = (Cancel::new(), Monotonic::new(), Arc::new(Job::default()));
        let watch = self.watch(&job);
        let resolution = match run {
            Run::Here => Resolution::RunHere,
            Run::There => Resolution::RunThere,
        };
        let (store, policy) = (&self.store, policy(&self.config.limits));
        match doubt.role {
            Role::Source => {
                let source = SourceJob {
                    id: doubt.id,
                    host: &*mediated,
                    store,
                    policy,
                    verify: false,
                    observer: &watch,
                    cancel: &cancel,
                    time: &time,
                };
                let peer = doubt.peer.clone();
                let result = doubt.resolve_out(source, resolution);
                self.out_ended(&job, peer, result);
            }
            Role::Destination => {
                let destination =
                    DestinationJob { host: &*mediated, store, policy, observer: &watch, cancel: &cancel, time: &time };
                let result = doubt.resolve_in(destination, resolution);
                self.in_ended(result);
            }
        }
        match (run, self.ownership()) {
            (Run::Here, (Ownership::Here, _)) => Ok("the guest is this host's".to_owned()),
            (Run::There, (Ownership::Elsewhere, _)) => Ok("the guest is the other host's".to_owned()),
            (_, (Ownership::InDoubt, why)) => Err(Failure::new(FailureCode::InDoubt, why)),
            (_, (_, why)) => Err(Failure::new(FailureCode::Failed, why)),
        }
    }

    /// Takes the doubt out of the state; whoever has it decides and puts the outcome back.
    fn doubt_in_hand(&self, id: &str) -> Result<(Box<InDoubt>, Arc<MediatedHost>), Failure> {
        let mut state = lock(&self.state);
        let mediated = state.mediated.clone().ok_or_else(|| Failure::refused("the host is stopping"))?;
        let other = match std::mem::replace(&mut state.guest, Guest::Awaited) {
            Guest::InDoubt(doubt) if doubt.id.to_string() == id => {
                state.guest = Guest::Settling { id: doubt.id, peer: doubt.peer.clone() };
                return Ok((doubt, mediated));
            }
            other => other,
        };
        let what = match &other {
            Guest::InDoubt(doubt) => format!("the migration in doubt is {}, not {id}", doubt.id),
            Guest::Settling { id, .. } => format!("migration {id} is being settled at this moment: ask again"),
            Guest::Awaited | Guest::Here | Guest::Gone { .. } => "nothing is in doubt here".to_owned(),
        };
        state.guest = other;
        Err(Failure::refused(what))
    }
}
