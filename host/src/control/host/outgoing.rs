//! Migrations out, and the settling of those that end in doubt.

use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::throttle::Throttled;
use super::watch::{Watch, policy};
use super::{Guest, Host, lock};
use crate::control::address;
use crate::control::protocol::{Failure, FailureCode, LastMigration, Response};
use crate::control::socket::Job;
use crate::migration::cause::Cause;
use crate::migration::driver::{
    Cancel, InDoubt, MediatedHost, MigrationError, Monotonic, SourceJob, Time, migrate_out, settle_out,
};
use crate::migration::policy::Policy;
use crate::migration::report::Report;
use crate::migration::transport::{TcpTransport, Transport};
use crate::migration::wire::MigrationId;

/// How often a lost answer is asked for again before the operator is told that it is in doubt, and how long between.
const SETTLE_TRIES: u32 = 5;
const SETTLE_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 1000 });
/// Afterwards it is asked for in ever longer intervals, until somebody resolves it.
const SETTLE_PAUSE_MAX: Duration = Duration::from_secs(60);
/// For a destination to say that it heard that the guest stayed.
const TELL_MS: u64 = 5_000;
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Connects to the first address that answers.
pub(super) fn connect(addresses: &[SocketAddr]) -> Result<Box<TcpTransport>, String> {
    let mut why = "no address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(address, CONNECT_PATIENCE).and_then(TcpTransport::new) {
            Ok(transport) => return Ok(Box::new(transport)),
            Err(error) => why = format!("connecting to {address}: {error}"),
        }
    }
    Err(why)
}

/// One migration out: what stays the same over all attempts to bring it to an end.
struct Out<'a> {
    host: &'a Host,
    mediated: Arc<MediatedHost>,
    id: MigrationId,
    to: Vec<SocketAddr>,
    verify: bool,
    cancel: Arc<Cancel>,
    watch: Watch<'a>,
    time: Box<dyn Time>,
}

impl Out<'_> {
    /// Where to, for people.
    fn shown(&self) -> String {
        self.to.first().map_or_else(String::new, SocketAddr::to_string)
    }

    fn job(&self) -> SourceJob<'_> {
        SourceJob {
            id: self.id,
            host: &*self.mediated,
            store: &self.host.store,
            policy: policy(&self.host.config.limits),
            verify: self.verify,
            observer: &self.watch,
            cancel: &self.cancel,
            time: &*self.time,
        }
    }
}

/// Ends a job whose thread panicked: whoever follows it must not wait for ever.
struct LastWord<'a>(&'a Job);

impl Drop for LastWord<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let message = "the migration's thread panicked: the journal knows more (vfio-mediate doctor --state-dir)";
            self.0.end(Response::Error(Failure::new(FailureCode::InDoubt, message)));
        }
    }
}

impl Host {
    /// Begins to move the guest to `to` (HOST:PORT). The job tells progress and the end; the migration goes on whoever
    /// watches.
    pub fn migrate(self: &Arc<Self>, to: &str, insecure: bool, verify: bool) -> Result<Arc<Job>, Failure> {
        if self.config.devices.iter().any(|device| device.serve.is_some()) {
            return Err(Failure::refused("the VM of served devices is moved by its VMM, and they with it"));
        }
        let addresses = address::connect(to, insecure).map_err(|error| Failure::refused(error.to_string()))?;
        let job = Arc::new(Job::default());
        let mediated = {
            let mut state = lock(&self.state);
            match &state.guest {
                _ if state.stopping => return Err(Failure::refused("the host is stopping")),
                Guest::Here if state.job.is_none() => {}
                Guest::Here => return Err(Failure::refused("a migration is under way already")),
                Guest::Awaited => return Err(Failure::refused("there is no guest here yet")),
                Guest::Gone { to } => return Err(Failure::refused(format!("the guest moved to {to} already"))),
                Guest::InDoubt(_) | Guest::Settling { .. } => {
                    let what = "an earlier migration is in doubt: resolve it first";
                    return Err(Failure::new(FailureCode::InDoubt, what));
                }
            }
            let mediated = state
                .mediated
                .clone()
                .ok_or_else(|| Failure::refused("the host is stopping, or lets go of a device"))?;
            state.job = Some(Arc::clone(&job));
            state.cancel = Arc::default();
            mediated
        };
        let run = Arc::clone(&job);
        let spawned = self.spawn("migration out", move |host| host.run_out(mediated, addresses, verify, &run));
        if let Err(error) = spawned {
            lock(&self.state).job = None;
            return Err(Failure::new(FailureCode::Failed, format!("starting a thread: {error}")));
        }
        Ok(job)
    }

    /// A connection no faster than the operator allows.
    fn connect(&self, to: &[SocketAddr]) -> Result<Box<dyn Transport>, String> {
        let plain = connect(to)?;
        Ok(match self.config.limits.bandwidth_max {
            Some(limit) => Box::new(Throttled::new(plain, limit.bytes_per_second())),
            None => plain,
        })
    }

    /// Asks for the migration under way to be given up.
    pub fn cancel(&self) -> Result<(), Failure> {
        let state = lock(&self.state);
        if state.job.is_none() {
            return Err(Failure::refused("no migration is under way"));
        }
        state.cancel.cancel();
        Ok(())
    }

    fn run_out(&self, mediated: Arc<MediatedHost>, to: Vec<SocketAddr>, verify: bool, job: &Arc<Job>) {
        let _last_word = LastWord(job);
        let begun = MigrationId::random().map_err(|error| format!("making an id: {error}"));
        let (id, link) = match begun.and_then(|id| self.connect(&to).map(|link| (id, link))) {
            Ok(begun) => begun,
            Err(why) => return self.ended(job, Guest::Here, Err(Failure::new(FailureCode::NotMigrated, why))),
        };
        let cancel = Arc::clone(&lock(&self.state).cancel);
        let watch = self.watch(job);
        let out = Out { host: self, mediated, id, to, verify, cancel, watch, time: Box::new(Monotonic::new()) };
        let mut result = migrate_out(out.job(), link);
        for _ in 0..SETTLE_TRIES {
            let Err(MigrationError::InDoubt(doubt)) = result else { break };
            if self.waits_to_stop(SETTLE_PAUSE) {
                result = Err(MigrationError::InDoubt(doubt));
                break;
            }
            result = settle(&out, doubt);
        }
        let in_doubt = matches!(result, Err(MigrationError::InDoubt(_)));
        // The guest runs already; whoever is told that it stayed may rely on the destination having been told too.
        let untold = leaves_in_doubt(&result) && !tell_kept(&out);
        self.out_ended(job, out.shown(), result);
        if in_doubt {
            self.keep_asking(&out);
        } else if untold {
            self.keep_telling(&out);
        }
    }

    /// Until the destination knows that the guest stayed, another migration begins, or the tries are used up: then the
    /// destination's operator has to resolve it.
    fn keep_telling(&self, out: &Out<'_>) {
        let mut pause = SETTLE_PAUSE;
        for _ in 0..SETTLE_TRIES {
            if self.waits_to_stop(pause) {
                return;
            }
            {
                let state = lock(&self.state);
                if state.job.is_some() || !matches!(state.guest, Guest::Here) {
                    return;
                }
            }
            if tell_kept(out) {
                return;
            }
            pause *= 2;
        }
        tracing::warn!(migration = %out.id, to = out.shown(), "the destination may be in doubt: resolve it there");
    }

    /// Until the doubt is settled, resolved by an operator, or the host ends.
    fn keep_asking(&self, out: &Out<'_>) {
        let mut pause = SETTLE_PAUSE;
        loop {
            pause = (pause * 2).min(SETTLE_PAUSE_MAX);
            if self.waits_to_stop(pause) || !matches!(&lock(&self.state).guest, Guest::InDoubt(_)) {
                return;
            }
            let Ok(link) = self.connect(&out.to) else { continue };
            let doubt = {
                let mut state = lock(&self.state);
                match std::mem::replace(&mut state.guest, Guest::Awaited) {
                    Guest::InDoubt(doubt) if doubt.id == out.id => {
                        state.guest = Guest::Settling { id: doubt.id, peer: doubt.peer.clone() };
                        doubt
                    }
                    other => {
                        state.guest = other;
                        return;
                    }
                }
            };
            let settled = doubt.settle_out(out.job(), link);
            self.out_ended(&Arc::new(Job::default()), out.shown(), settled);
        }
    }

    /// Waits, unless the host ends before: then true.
    pub(super) fn waits_to_stop(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = lock(&self.state);
        while !state.stopping {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// What a migration out, or an operator's word about one, came to.
    pub(super) fn out_ended(&self, job: &Arc<Job>, to: String, result: Result<Report, MigrationError>) {
        match result {
            Ok(report) => {
                // Before the embedder's code runs: whatever it does, or however it ends, the guest is not here.
                lock(&self.state).guest = Guest::Gone { to: to.clone() };
                self.embedder.gone();
                let report = serde_json::to_value(&report);
                let report = report.map_err(|error| Failure::new(FailureCode::Failed, error.to_string()));
                self.ended(job, Guest::Gone { to }, report);
            }
            Err(MigrationError::InDoubt(doubt)) => {
                let failure = Failure::new(FailureCode::InDoubt, doubt.to_string());
                self.ended(job, Guest::InDoubt(doubt), Err(failure));
            }
            Err(
                error @ (MigrationError::Kept { .. }
                | MigrationError::Discarded { .. }
                | MigrationError::Answered { .. }),
            ) => {
                let mut text = error.to_string();
                if let MigrationError::Kept { resumed: false, .. } = &error {
                    text.push_str("; the guest is here but does not run");
                }
                if let MigrationError::Kept { lost, .. } = &error
                    && !lost.is_empty()
                {
                    text.push_str(&format!(
                        "; devices {lost:?} did not come back and must be opened anew: restart this host"
                    ));
                }
                self.ended(job, Guest::Here, Err(Failure::new(FailureCode::NotMigrated, text)));
            }
        }
    }

    /// The one place where a migration out ends. The guest's place is known before anybody is told.
    fn ended(&self, job: &Arc<Job>, guest: Guest, result: Result<serde_json::Value, Failure>) {
        let mut state = lock(&self.state);
        state.guest = guest;
        state.job = None;
        state.last = Some(match &result {
            Ok(report) => LastMigration::Moved { report: Box::new(report.clone()) },
            Err(failure) => LastMigration::Failed { failure: failure.clone() },
        });
        drop(state);
        self.changed.notify_all();
        job.end(match result {
            Ok(report) => Response::Migrated { report: Box::new(report) },
            Err(failure) => Response::Error(failure),
        });
    }
}

/// The guest stayed, and the connection was gone before the destination could be told: it may stand prepared, in doubt.
fn leaves_in_doubt(result: &Result<Report, MigrationError>) -> bool {
    let Err(MigrationError::Kept { cause, .. }) = result else { return false };
    matches!(cause, Cause::Link(_) | Cause::TimedOut(_) | Cause::Stream(_) | Cause::Protocol(_))
}

/// One attempt to tell the destination that the guest stayed. True: it knows, and will never run it.
fn tell_kept(out: &Out<'_>) -> bool {
    let Ok(link) = connect(&out.to) else { return false };
    // It touches nothing but the journal, which says that the guest was kept.
    let policy = Policy { answer_ms_max: TELL_MS.min(out.job().policy.answer_ms_max), ..out.job().policy };
    match settle_out(SourceJob { policy, ..out.job() }, link) {
        Err(MigrationError::Kept { cause: Cause::Link(_) | Cause::TimedOut(_), .. }) => false,
        Err(MigrationError::InDoubt(doubt)) => {
            if let Cause::Conflict(_) = doubt.cause {
                tracing::error!(%doubt, "the guest may run twice: stop one of them");
            }
            false
        }
        Ok(_) | Err(_) => true,
    }
}

/// One attempt to have the lost answer after all.
fn settle(out: &Out<'_>, doubt: Box<InDoubt>) -> Result<Report, MigrationError> {
    match out.host.connect(&out.to) {
        Ok(link) => doubt.settle_out(out.job(), link),
        Err(_) => Err(MigrationError::InDoubt(doubt)),
    }
}
