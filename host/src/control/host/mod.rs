//! A host: one machine, the journal that says whose guest it is, the control socket, and migrations in and out.
//!
//! **Owns** the ownership of the guest: [`Guest`] changes here and nowhere else, after the journal says so. **Must never**
//! let the guest run while the journal has it elsewhere or in doubt, nor run two migrations at once.
//!
//! ```text
//!  start -- listen? --> AWAITED -- migrate_in ok --> HERE -- migrate_out ok --> GONE
//!     \---- else ----------------------------------> HERE     \- in doubt --> IN_DOUBT -- settled, resolved --> HERE | GONE
//!                        AWAITED -- in doubt --> IN_DOUBT -- settled, resolved --> HERE | AWAITED
//! ```
//! Threads: one that listens for migrations, one for each migration out, the socket's, one for each served device. Locks: `state`,
//! `serving`, leaves; never held
//! while a device, the VMM, the journal or a peer is waited for.

mod doubt;
mod embedder;
mod greeting;
mod incoming;
mod outgoing;
mod power;
mod serve;
mod throttle;
mod watch;

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::config::Config;
use super::machine::{Machine, MachineError};
use super::protocol::{self, Failure, FailureCode, LastMigration, Ownership, Progress};
use super::socket::Job;
use crate::frontend::vfio_user::server::ListenError;
use crate::migration::driver::{Cancel, InDoubt, MediatedHost};
use crate::migration::journal::{FileStore, JournalError, Standing};
use crate::migration::wire::MigrationId;

pub use embedder::{Embedder, NoGuest};
pub(in crate::control) use power::power;
pub use serve::Served;

/// A host that could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("state folder {folder}: {source}")]
    State { folder: String, source: JournalError },
    /// Two hosts with one journal would both believe that the guest is theirs.
    #[error("state folder {folder}: another host uses it: stop that one, or choose another --state-dir")]
    StateInUse { folder: String },
    /// The journal forbids a new guest here.
    #[error(
        "this host's guest lives elsewhere (journal in {folder}): await one with --listen, or use another --state-dir"
    )]
    GuestElsewhere { folder: String },
    /// An operator must say where the guest of an earlier run is.
    #[error(
        "migration {id} with {peer} is in doubt: {explanation} (vfio-mediate resolve --state-dir {folder} --id {id} ...)"
    )]
    InDoubt { id: MigrationId, peer: String, explanation: String, folder: String },
    #[error("listening on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("the embedder: {0}")]
    Embedder(String),
    #[error("starting a thread: {0}")]
    Thread(std::io::Error),
    #[error(transparent)]
    Serve(#[from] ListenError),
}

/// Whose guest it is.
#[derive(Debug)]
enum Guest {
    Awaited,
    Here,
    Gone {
        to: String,
    },
    InDoubt(Box<InDoubt>),
    /// Somebody settles the doubt at this moment
    Settling {
        id: MigrationId,
        peer: String,
    },
}

#[derive(Debug)]
struct State {
    guest: Guest,
    /// `None` once the host has stopped: the devices are to be closed
    mediated: Option<Arc<MediatedHost>>,
    /// The migration under way, out or in
    job: Option<Arc<Job>>,
    cancel: Arc<Cancel>,
    last: Option<LastMigration>,
    /// Devices that the kernel wanted back, and has
    released: Vec<String>,
    /// No thread is started any more
    stopping: bool,
    /// Threads of this host that have not ended
    threads: usize,
}

/// A running host.
pub struct Host {
    config: Config,
    machine: Mutex<Option<Machine>>,
    pages: u64,
    embedder: Arc<dyn Embedder>,
    store: FileStore,
    listener: Option<TcpListener>,
    listen: Option<SocketAddr>,
    state: Mutex<State>,
    changed: Condvar,
    started: Instant,
    threads: Mutex<Vec<JoinHandle<()>>>,
    serving: Mutex<Vec<serve::Serving>>,
    /// Held, so that no other host uses the journal
    _state_lock: File,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("config", &self.config).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Reads the journal, opens everything, and lets the guest run if it is here. With `config.listen` a guest is awaited.
    pub fn start(config: Config, embedder: Arc<dyn Embedder>) -> Result<Arc<Self>, StartError> {
        let folder = config.state_dir.display().to_string();
        let state_error = |source| StartError::State { folder: folder.clone(), source };
        let store = FileStore::new(&config.state_dir).map_err(|error| state_error(error.into()))?;
        let state_lock = lock_state(&config.state_dir)?;
        match doubt::standing_at_start(&store, &config).map_err(state_error)? {
            Standing::Idle | Standing::MayRun => {}
            Standing::MustNotRun if config.listen.is_some() => {}
            Standing::MustNotRun => return Err(StartError::GuestElsewhere { folder }),
            Standing::InDoubt { id, peer, explanation } => {
                return Err(StartError::InDoubt { id, peer, explanation, folder });
            }
        }
        let machine = Machine::build(&config, embedder.kvm())?;
        let vmm = embedder.vmm(&machine).map_err(StartError::Embedder)?;
        let listener = config.listen.map(incoming::listen).transpose()?;
        let here = listener.is_none();
        let (devices, memory) = (machine.devices.clone(), Arc::clone(&machine.memory));
        let pages = memory.ram().map_or(0, |ram| ram.pages());
        let mediated = Arc::new(MediatedHost::new(devices, memory, Arc::clone(&vmm), listener.is_some()));
        let state = State {
            guest: if here { Guest::Here } else { Guest::Awaited },
            mediated: Some(mediated),
            job: None,
            cancel: Arc::default(),
            last: None,
            released: Vec::new(),
            stopping: false,
            threads: 0,
        };
        let host = Arc::new(Self {
            config,
            machine: Mutex::new(Some(machine)),
            pages,
            embedder,
            store,
            listen: listener.as_ref().and_then(|listener| listener.local_addr().ok()),
            listener,
            state: Mutex::new(state),
            changed: Condvar::new(),
            started: Instant::now(),
            threads: Mutex::default(),
            serving: Mutex::default(),
            _state_lock: state_lock,
        });
        host.listen_to_devices();
        host.serve_devices()?;
        if here {
            vmm.resume().map_err(|error| StartError::Embedder(error.to_string()))?;
            host.embedder.running();
        } else {
            host.spawn("guest RAM", Self::populate).map_err(StartError::Thread)?;
            host.spawn("migrations in", Self::await_guests).map_err(StartError::Thread)?;
        }
        Ok(host)
    }

    fn spawn(self: &Arc<Self>, name: &str, work: impl FnOnce(&Arc<Self>) + Send + 'static) -> std::io::Result<()> {
        {
            let mut state = lock(&self.state);
            if state.stopping {
                return Err(std::io::Error::other("the host is stopping"));
            }
            state.threads += 1;
        }
        let counted = Counted(Arc::clone(self));
        let run = move || work(&counted.0);
        // Where it cannot be started, what it was to run is dropped, and counted no more.
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Where migrations in are taken, with the port that was chosen.
    pub fn listening(&self) -> Option<SocketAddr> {
        self.listen
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `None`: the host has stopped.
    pub(super) fn with_machine<T>(&self, ask: impl FnOnce(&Machine) -> T) -> Option<T> {
        lock(&self.machine).as_ref().map(ask)
    }

    pub(super) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    fn watch<'a>(&'a self, job: &'a Job) -> watch::Watch<'a> {
        watch::Watch { embedder: &*self.embedder, job, pages_total: self.pages, started: Instant::now() }
    }

    /// Whose guest it is, in one word and in one sentence.
    pub fn ownership(&self) -> (Ownership, String) {
        match &lock(&self.state).guest {
            Guest::Awaited => (Ownership::Elsewhere, "no guest yet: one is awaited".to_owned()),
            Guest::Here => (Ownership::Here, "the guest runs here".to_owned()),
            Guest::Gone { to } => (Ownership::Elsewhere, format!("the guest moved to {to}")),
            Guest::InDoubt(doubt) => (Ownership::InDoubt, doubt.to_string()),
            Guest::Settling { id, peer } => {
                (Ownership::InDoubt, format!("migration {id} with {peer} is being settled"))
            }
        }
    }

    pub(super) fn doubt(&self) -> Option<protocol::InDoubt> {
        let (id, peer, explanation) = match &lock(&self.state).guest {
            Guest::InDoubt(doubt) => (doubt.id, doubt.peer.clone(), doubt.to_string()),
            Guest::Settling { id, peer } => (*id, peer.clone(), "it is being settled".to_owned()),
            Guest::Awaited | Guest::Here | Guest::Gone { .. } => return None,
        };
        Some(protocol::InDoubt { id: id.to_string(), peer, explanation })
    }

    pub(super) fn progress(&self) -> Option<Progress> {
        lock(&self.state).job.as_ref().map(|job| job.latest().unwrap_or_default())
    }

    pub(super) fn last(&self) -> Option<LastMigration> {
        lock(&self.state).last.clone()
    }

    /// Whether the host may end: not while a migration is under way or the guest is in doubt, unless forced.
    pub fn may_stop(&self, force: bool) -> Result<(), Failure> {
        let state = lock(&self.state);
        if force {
            return Ok(());
        }
        if state.job.is_some() {
            return Err(Failure::refused("a migration is under way: cancel it first, or force"));
        }
        if matches!(state.guest, Guest::InDoubt(_) | Guest::Settling { .. }) {
            return Err(Failure::new(FailureCode::InDoubt, "the guest is in doubt: resolve it first, or force"));
        }
        Ok(())
    }

    /// Ends everything in order: no new migrations, the running one cancelled, devices closed, plug-ins retired. A doubt
    /// stays in the journal. Devices that the embedder still holds are closed, and their plug-ins retired, when it lets go;
    /// the host does not wait for that. An error at the deadline: a migration that cannot be cancelled any more goes on, with
    /// everything open; ask again.
    pub fn stop(&self, deadline: Instant) -> Result<(), Failure> {
        self.wind_down(deadline)?;
        self.stop_serving(None);
        let mut panicked = false;
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            if thread.thread().id() != std::thread::current().id() {
                panicked |= thread.join().is_err();
            }
        }
        let shared = lock(&self.state).mediated.take();
        drop(shared);
        let machine = lock(&self.machine).take();
        if let Some(machine) = machine {
            let held = machine.devices.iter().any(|device| Arc::strong_count(device) > 1);
            let patience = if held { Instant::now() } else { deadline };
            if let Err(busy) = machine.close(patience) {
                tracing::info!(%busy, "a plug-in retires when its devices are let go");
            }
        }
        if panicked { Err(Failure::new(FailureCode::Failed, "a thread of the host panicked")) } else { Ok(()) }
    }

    /// Waits for the host's threads to end, and says how to. A thread that calls this itself is not waited for.
    fn wind_down(&self, deadline: Instant) -> Result<(), Failure> {
        let me = std::thread::current().id();
        let own = usize::from(lock(&self.threads).iter().any(|thread| thread.thread().id() == me));
        let mut state = lock(&self.state);
        state.stopping = true;
        state.cancel.cancel();
        self.changed.notify_all();
        while state.threads > own {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::new(FailureCode::Failed, "a migration has not ended yet: stop again"));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

/// A thread of the host, for as long as it runs.
struct Counted(Arc<Host>);

impl Drop for Counted {
    fn drop(&mut self) {
        lock(&self.0.state).threads -= 1;
        self.0.changed.notify_all();
    }
}

/// The folder's lock, beside its journals; it goes with the process, however that ends.
fn lock_state(folder: &Path) -> Result<File, StartError> {
    let shown = || folder.display().to_string();
    let failed = |source: std::io::Error| StartError::State { folder: shown(), source: JournalError::Storage(source) };
    let file = File::options().write(true).create(true).truncate(false).open(folder.join("lock")).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::StateInUse { folder: shown() }),
        Err(errno) => Err(failed(errno.into())),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
