//! Migrations in: one at a time, each from its connection to its end.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::greeting::{GREETING_PATIENCE, Greeting};
use super::watch::policy;
use super::{Guest, Host, StartError, lock};
use crate::control::protocol::{Failure, FailureCode, LastMigration};
use crate::control::socket::Job;
use crate::migration::driver::{DestinationJob, InDoubt, MigrationError, Monotonic, migrate_in, settle_in};
use crate::migration::report::Report;
use crate::migration::transport::TcpTransport;

/// After an accept that failed, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What an incoming connection may be about.
enum Incoming {
    New,
    Settle(Box<InDoubt>),
    /// An old migration, from the journal
    Answer,
}

pub(super) fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    let failed = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Waits a moment for a connection. The wait has an end, so that a stop is seen.
fn wait_readable(listener: &TcpListener) {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    // An error is found by the next accept.
    let _ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }));
}

impl Host {
    /// A guest that comes finds its memory there.
    pub(super) fn populate(self: &Arc<Self>) {
        let Some(memory) = self.with_machine(|machine| Arc::clone(&machine.memory)) else { return };
        // Clients' memory is the clients' to make.
        let Some(ram) = memory.ram() else { return };
        if let Err(error) = ram.populate(|| lock(&self.state).stopping) {
            tracing::info!(%error, "guest memory is made as the guest comes");
        }
    }

    pub(super) fn await_guests(self: &Arc<Self>) {
        let Some(listener) = &self.listener else { return };
        loop {
            if lock(&self.state).stopping {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => self.take(stream),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => wait_readable(listener),
                Err(error) => {
                    tracing::warn!(%error, "accepting a migration");
                    if self.waits_to_stop(ACCEPT_PAUSE) {
                        return;
                    }
                }
            }
        }
    }

    fn take(&self, stream: TcpStream) {
        let link = match TcpTransport::new(stream) {
            Ok(link) => Box::new(Greeting::new(link, Instant::now() + GREETING_PATIENCE)),
            Err(error) => return tracing::warn!(%error, "a migration's connection"),
        };
        let job = Arc::new(Job::default());
        let (incoming, cancel, mediated) = {
            let mut state = lock(&self.state);
            if state.job.is_some() || state.stopping {
                return;
            }
            let Some(mediated) = state.mediated.clone() else { return };
            let incoming = match std::mem::replace(&mut state.guest, Guest::Awaited) {
                Guest::InDoubt(doubt) => {
                    state.guest = Guest::Settling { id: doubt.id, peer: doubt.peer.clone() };
                    Incoming::Settle(doubt)
                }
                Guest::Awaited => Incoming::New,
                other => {
                    state.guest = other;
                    Incoming::Answer
                }
            };
            state.cancel = Arc::default();
            if !matches!(incoming, Incoming::Answer) {
                state.job = Some(Arc::clone(&job));
            }
            (incoming, Arc::clone(&state.cancel), mediated)
        };
        let (watch, time) = (self.watch(&job), Monotonic::new());
        let make = DestinationJob {
            host: &*mediated,
            store: &self.store,
            policy: policy(&self.config.limits),
            observer: &watch,
            cancel: &cancel,
            time: &time,
        };
        match incoming {
            Incoming::New => self.in_ended(migrate_in(make, link)),
            Incoming::Settle(doubt) => self.in_ended(doubt.settle_in(make, link)),
            Incoming::Answer => {
                // What was answered is in the journal already; it changes nothing here.
                if let Err(error) = settle_in(make, link) {
                    tracing::info!(%error, "a source came back");
                }
            }
        }
    }

    /// The one place where a migration in ends.
    pub(super) fn in_ended(&self, result: Result<Report, MigrationError>) {
        let runs = matches!(&result, Ok(_) | Err(MigrationError::Kept { resumed: true, .. }));
        let (guest, last) = match result {
            Ok(report) => {
                let report = serde_json::to_value(&report);
                let last = report.map(|report| LastMigration::Arrived { report: Box::new(report) });
                (Guest::Here, Some(last.map_err(|error| Failure::new(FailureCode::Failed, error.to_string()))))
            }
            Err(MigrationError::InDoubt(doubt)) => {
                let failure = Failure::new(FailureCode::InDoubt, doubt.to_string());
                (Guest::InDoubt(doubt), Some(Err(failure)))
            }
            // The journal gave the guest to this host; what of it does not run is for the operator to mend.
            Err(error @ MigrationError::Kept { .. }) => {
                (Guest::Here, Some(Err(Failure::new(FailureCode::Failed, error.to_string()))))
            }
            Err(error @ MigrationError::Discarded { .. }) => {
                (Guest::Awaited, Some(Err(Failure::new(FailureCode::NotMigrated, error.to_string()))))
            }
            // Nothing migrated; how the last one ended is still how the last one ended.
            Err(MigrationError::Answered { outcome }) => {
                tracing::info!(?outcome, "a source was told of an old migration");
                (Guest::Awaited, None)
            }
        };
        // The migration has ended when whoever runs the guest knows that it is here; until then it is under way.
        lock(&self.state).guest = guest;
        if runs {
            self.embedder.running();
        }
        let mut state = lock(&self.state);
        state.job = None;
        if let Some(last) = last {
            state.last = Some(last.unwrap_or_else(|failure| {
                tracing::warn!(%failure, "a migration in");
                LastMigration::Failed { failure }
            }));
        }
        drop(state);
        self.changed.notify_all();
    }
}
