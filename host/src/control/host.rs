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
//! Threads: one that listens for migrations, one for each migration out, the socket's. Locks: `state`, a leaf; never held
//! while a device, the VMM, the journal or a peer is waited for.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::config::{Config, OnStall};
use super::machine::{Machine, MachineError};
use super::protocol::{Failure, FailureCode, Ownership, Progress, Report, Run};
use super::socket::Job;
use crate::mediation::VmmPort;
use crate::migration::cause::{Phase, Role};
use crate::migration::driver::{
    Cancel, DestinationJob, InDoubt, MediatedHost, MigrationError, Monotonic, Observer, SourceJob, migrate_in,
    migrate_out, settle_in,
};
use crate::migration::journal::{FileStore, JournalError, Resolution, Standing, recover};
use crate::migration::policy::{self, Policy};
use crate::migration::transport::TcpTransport;
use crate::migration::wire::MigrationId;

/// How often a lost answer is asked for again before an operator is needed, and how long between.
const SETTLE_TRIES: u32 = 5;
const SETTLE_PAUSE: Duration = Duration::from_secs(1);
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// A host that could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("state folder {folder}: {source}")]
    State { folder: String, source: JournalError },
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
}

/// The program around the host: brings the VMM, and watches.
pub trait Embedder: Send + Sync + 'static {
    /// Makes the VMM for this machine. Its guest must not run before [`VmmPort::resume`].
    fn vmm(&self, machine: &Machine) -> Result<Arc<dyn VmmPort>, String>;

    /// A phase of a migration begins; whoever blocks here holds the migration.
    fn phase(&self, role: Role, phase: Phase);

    /// The guest is here and runs.
    fn running(&self);

    /// The guest is gone for good.
    fn gone(&self);
}

/// No guest: devices are open and can be moved, nobody uses them.
#[derive(Debug, Default)]
pub struct NoGuest;

#[derive(Debug)]
struct IdleVmm;

impl VmmPort for IdleVmm {
    fn pause(&self, _: Instant) -> Result<(), crate::mediation::VmmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), crate::mediation::VmmError> {
        Ok(())
    }

    // Nobody stores into this memory but the host and the devices, which mark what they write.
    fn start_cpu_dirt(&self) -> Result<(), crate::mediation::VmmError> {
        Ok(())
    }

    fn sync_cpu_dirt(&self, _: &crate::memory::DirtyLog) -> Result<(), crate::mediation::VmmError> {
        Ok(())
    }

    fn stop_cpu_dirt(&self) {}
}

impl Embedder for NoGuest {
    fn vmm(&self, _: &Machine) -> Result<Arc<dyn VmmPort>, String> {
        Ok(Arc::new(IdleVmm))
    }

    fn phase(&self, _: Role, _: Phase) {}

    fn running(&self) {}

    fn gone(&self) {}
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
    /// The migration under way, out or in
    job: Option<Arc<Job>>,
    cancel: Arc<Cancel>,
    last: Option<super::protocol::LastMigration>,
    stopping: bool,
}

/// A running host.
pub struct Host {
    config: Config,
    machine: Mutex<Option<Machine>>,
    mediated: MediatedHost,
    embedder: Arc<dyn Embedder>,
    store: FileStore,
    listener: Option<TcpListener>,
    listen: Option<SocketAddr>,
    state: Mutex<State>,
    changed: Condvar,
    started: Instant,
    threads: Mutex<Vec<JoinHandle<()>>>,
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
        match recover(&store).map_err(state_error)? {
            Standing::Idle | Standing::MayRun => {}
            Standing::MustNotRun if config.listen.is_some() => {}
            Standing::MustNotRun => return Err(StartError::GuestElsewhere { folder }),
            Standing::InDoubt { id, peer, explanation } => {
                return Err(StartError::InDoubt { id, peer, explanation, folder });
            }
        }
        let machine = Machine::build(&config)?;
        let vmm = embedder.vmm(&machine).map_err(StartError::Embedder)?;
        let listener = config.listen.map(listen).transpose()?;
        let bound = listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let mediated = MediatedHost::new(
            machine.devices.clone(),
            Arc::clone(&machine.memory),
            Arc::clone(&vmm),
            listener.is_some(),
        );
        let guest = if listener.is_some() { Guest::Awaited } else { Guest::Here };
        let here = matches!(guest, Guest::Here);
        let host = Arc::new(Self {
            config,
            machine: Mutex::new(Some(machine)),
            mediated,
            embedder,
            store,
            listener,
            listen: bound,
            state: Mutex::new(State { guest, job: None, cancel: Arc::default(), last: None, stopping: false }),
            changed: Condvar::new(),
            started: Instant::now(),
            threads: Mutex::default(),
        });
        if here {
            vmm.resume().map_err(|error| StartError::Embedder(error.to_string()))?;
            host.embedder.running();
        }
        if host.listener.is_some() {
            host.spawn("migrations in", Host::await_guests).map_err(StartError::Thread)?;
        }
        Ok(host)
    }

    fn spawn(self: &Arc<Self>, name: &str, work: impl FnOnce(&Arc<Self>) + Send + 'static) -> std::io::Result<()> {
        let host = Arc::clone(self);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&host))?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Where migrations in are taken, with the port that was chosen.
    pub fn listening(&self) -> Option<SocketAddr> {
        self.listen
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn with_machine<T>(&self, ask: impl FnOnce(&Machine) -> T) -> Option<T> {
        lock(&self.machine).as_ref().map(ask)
    }

    pub(super) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    // ---- migration out

    /// Begins to move the guest. The job tells progress and the end; it goes on whoever watches.
    pub fn migrate(self: &Arc<Self>, to: SocketAddr, verify: bool) -> Result<Arc<Job>, Failure> {
        let job = Arc::new(Job::default());
        {
            let mut state = lock(&self.state);
            match &state.guest {
                Guest::Here if state.job.is_none() && !state.stopping => {}
                Guest::Here if state.stopping => return Err(Failure::refused("the host is stopping")),
                Guest::Here => return Err(Failure::refused("a migration is under way already")),
                Guest::Awaited => return Err(Failure::refused("there is no guest here yet")),
                Guest::Gone { to } => return Err(Failure::refused(format!("the guest moved to {to} already"))),
                Guest::InDoubt(_) | Guest::Settling { .. } => {
                    return Err(Failure::new(
                        FailureCode::InDoubt,
                        "an earlier migration is in doubt: resolve it first",
                    ));
                }
            }
            state.job = Some(Arc::clone(&job));
            state.cancel = Arc::default();
        }
        let run = Arc::clone(&job);
        let spawned = self.spawn("migration out", move |host| host.run_out(to, verify, &run));
        if let Err(error) = spawned {
            lock(&self.state).job = None;
            return Err(Failure::new(FailureCode::Failed, format!("starting a thread: {error}")));
        }
        Ok(job)
    }

    fn run_out(&self, to: SocketAddr, verify: bool, job: &Arc<Job>) {
        let cancel = Arc::clone(&lock(&self.state).cancel);
        let observer = Watch { host: self, job, started: Instant::now() };
        let time = Monotonic::new();
        let connect = || {
            let stream = TcpStream::connect_timeout(&to, CONNECT_PATIENCE)
                .map_err(|error| format!("connecting to {to}: {error}"))?;
            TcpTransport::new(stream).map(Box::new).map_err(|error| format!("connecting to {to}: {error}"))
        };
        let make = |id| SourceJob {
            id,
            host: &self.mediated,
            store: &self.store,
            policy: policy(&self.config),
            verify,
            observer: &observer,
            cancel: &cancel,
            time: &time,
        };
        let begun = MigrationId::random().map_err(|e| e.to_string()).and_then(|id| connect().map(|link| (id, link)));
        let (id, link) = match begun {
            Ok(begun) => begun,
            Err(why) => return self.ended(job, Guest::Here, Err(Failure::new(FailureCode::NotMigrated, why))),
        };
        let mut result = migrate_out(make(id), link);
        for _ in 0..SETTLE_TRIES {
            let Err(MigrationError::InDoubt(doubt)) = result else { break };
            if lock(&self.state).stopping {
                result = Err(MigrationError::InDoubt(doubt));
                break;
            }
            std::thread::sleep(SETTLE_PAUSE);
            result = match connect() {
                Ok(link) => doubt.settle_out(make(id), link),
                Err(_) => Err(MigrationError::InDoubt(doubt)),
            };
        }
        self.out_ended(job, to.to_string(), result);
    }

    fn out_ended(&self, job: &Arc<Job>, to: String, result: Result<crate::migration::report::Report, MigrationError>) {
        match result {
            Ok(report) => {
                self.embedder.gone();
                self.ended(job, Guest::Gone { to }, report_value(&report));
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
                self.ended(job, Guest::Here, Err(Failure::new(FailureCode::NotMigrated, text)));
            }
        }
    }

    /// The one place where a migration out ends.
    fn ended(&self, job: &Arc<Job>, guest: Guest, result: Result<Report, Failure>) {
        let mut state = lock(&self.state);
        state.guest = guest;
        state.job = None;
        state.last = Some(match &result {
            Ok(report) => super::protocol::LastMigration::Moved { report: Box::new(report.clone()) },
            Err(failure) => super::protocol::LastMigration::Failed { failure: failure.clone() },
        });
        drop(state);
        self.changed.notify_all();
        job.end(match result {
            Ok(report) => super::protocol::Response::Migrated { report: Box::new(report) },
            Err(failure) => super::protocol::Response::Error(failure),
        });
    }

    pub fn cancel(&self) -> Result<(), Failure> {
        let state = lock(&self.state);
        if state.job.is_none() {
            return Err(Failure::refused("no migration is under way"));
        }
        state.cancel.cancel();
        Ok(())
    }

    // ---- migration in

    fn await_guests(self: &Arc<Self>) {
        let Some(listener) = &self.listener else { return };
        loop {
            if lock(&self.state).stopping {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => self.take(stream),
                // The wait has an end, so that a stop is seen.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => wait_readable(listener),
                Err(error) => {
                    tracing::warn!(%error, "accepting a migration");
                    std::thread::sleep(SETTLE_PAUSE);
                }
            }
        }
    }

    fn take(&self, stream: TcpStream) {
        let link = match TcpTransport::new(stream) {
            Ok(link) => Box::new(link),
            Err(error) => return tracing::warn!(%error, "a migration's connection"),
        };
        let job = Arc::new(Job::default());
        let (guest, cancel) = {
            let mut state = lock(&self.state);
            if state.job.is_some() || state.stopping {
                return;
            }
            let doubt = match std::mem::replace(&mut state.guest, Guest::Awaited) {
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
            if !matches!(doubt, Incoming::Answer) {
                state.job = Some(Arc::clone(&job));
            }
            (doubt, Arc::clone(&state.cancel))
        };
        let observer = Watch { host: self, job: &job, started: Instant::now() };
        let time = Monotonic::new();
        let make = DestinationJob {
            host: &self.mediated,
            store: &self.store,
            policy: policy(&self.config),
            observer: &observer,
            cancel: &cancel,
            time: &time,
        };
        let answered_only = matches!(guest, Incoming::Answer);
        let result = match guest {
            Incoming::New => migrate_in(make, link),
            Incoming::Settle(doubt) => doubt.settle_in(make, link),
            Incoming::Answer => settle_in(make, link),
        };
        if answered_only {
            return;
        }
        self.in_ended(result);
    }

    /// The one place where a migration in ends.
    fn in_ended(&self, result: Result<crate::migration::report::Report, MigrationError>) {
        let (guest, last) = match result {
            Ok(report) => {
                let value = report_value(&report);
                let last = value.map(|report| super::protocol::LastMigration::Arrived { report: Box::new(report) });
                (Guest::Here, last)
            }
            Err(MigrationError::InDoubt(doubt)) => {
                let failure = Failure::new(FailureCode::InDoubt, doubt.to_string());
                (Guest::InDoubt(doubt), Err(failure))
            }
            Err(error) => (Guest::Awaited, Err(Failure::new(FailureCode::NotMigrated, error.to_string()))),
        };
        let arrived = matches!(guest, Guest::Here);
        let mut state = lock(&self.state);
        state.guest = guest;
        state.job = None;
        if let Err(failure) = &last {
            tracing::warn!(%failure, "a migration in");
        }
        state.last = Some(last.unwrap_or_else(|failure| super::protocol::LastMigration::Failed { failure }));
        drop(state);
        self.changed.notify_all();
        if arrived {
            self.embedder.running();
        }
    }

    // ---- doubt

    /// An operator's word. Whoever says it has made sure that the other side does the opposite.
    pub fn resolve(&self, id: &str, run: Run) -> Result<String, Failure> {
        let doubt = {
            let mut state = lock(&self.state);
            match std::mem::replace(&mut state.guest, Guest::Awaited) {
                Guest::InDoubt(doubt) if doubt.id.to_string() == id => {
                    state.guest = Guest::Settling { id: doubt.id, peer: doubt.peer.clone() };
                    doubt
                }
                Guest::InDoubt(doubt) => {
                    let what = format!("the migration in doubt is {}, not {id}", doubt.id);
                    state.guest = Guest::InDoubt(doubt);
                    return Err(Failure::refused(what));
                }
                other => {
                    state.guest = other;
                    return Err(Failure::refused("nothing is in doubt here"));
                }
            }
        };
        let (cancel, time, job) = (Cancel::new(), Monotonic::new(), Arc::new(Job::default()));
        let observer = Watch { host: self, job: &job, started: Instant::now() };
        let resolution = match run {
            Run::Here => Resolution::RunHere,
            Run::There => Resolution::RunThere,
        };
        let peer = doubt.peer.clone();
        let (host, store, policy) = (&self.mediated, &self.store, policy(&self.config));
        match doubt.role {
            Role::Source => {
                let source = SourceJob {
                    id: doubt.id,
                    host,
                    store,
                    policy,
                    verify: false,
                    observer: &observer,
                    cancel: &cancel,
                    time: &time,
                };
                let result = doubt.resolve_out(source, resolution);
                self.out_ended(&job, peer, result);
            }
            Role::Destination => {
                let destination =
                    DestinationJob { host, store, policy, observer: &observer, cancel: &cancel, time: &time };
                let result = doubt.resolve_in(destination, resolution);
                self.in_ended(result);
            }
        }
        match (run, self.ownership().0) {
            (Run::Here, Ownership::Here) => Ok("the guest runs here".to_owned()),
            (Run::There, Ownership::Elsewhere) => Ok("the guest is the other side's".to_owned()),
            (_, Ownership::InDoubt) => Err(Failure::new(FailureCode::InDoubt, self.ownership().1)),
            (_, _) => Err(Failure::new(FailureCode::Failed, self.ownership().1)),
        }
    }

    // ---- what is shown

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

    pub(super) fn doubt(&self) -> Option<super::protocol::InDoubt> {
        let (id, peer, explanation) = match &lock(&self.state).guest {
            Guest::InDoubt(doubt) => (doubt.id, doubt.peer.clone(), doubt.to_string()),
            Guest::Settling { id, peer } => (*id, peer.clone(), "it is being settled".to_owned()),
            Guest::Awaited | Guest::Here | Guest::Gone { .. } => return None,
        };
        Some(super::protocol::InDoubt { id: id.to_string(), peer, explanation })
    }

    pub(super) fn progress(&self) -> Option<Progress> {
        lock(&self.state).job.as_ref().map(|job| job.latest().unwrap_or_default())
    }

    pub(super) fn last(&self) -> Option<super::protocol::LastMigration> {
        lock(&self.state).last.clone()
    }

    // ---- the end

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

    /// Ends everything in order: no new migrations, the running one cancelled, devices closed, plug-ins retired.
    pub fn stop(&self, deadline: Instant) -> Result<(), Failure> {
        {
            let mut state = lock(&self.state);
            state.stopping = true;
            state.cancel.cancel();
        }
        self.changed.notify_all();
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            // A thread that calls this itself is not waited for.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of the host panicked");
            }
        }
        Ok(()).and_then(|()| self.close(deadline))
    }

    fn close(&self, deadline: Instant) -> Result<(), Failure> {
        // The devices are closed when the last reference goes, which may be the embedder's; the plug-ins wait for it.
        match lock(&self.machine).take() {
            Some(machine) => {
                let registry = Arc::clone(&machine.registry);
                drop(machine);
                drop(registry);
                let _ = deadline;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// What an incoming connection may be about.
enum Incoming {
    New,
    Settle(Box<InDoubt>),
    /// An old migration, from the journal
    Answer,
}

fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    let failed = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Waits a moment for a connection.
fn wait_readable(listener: &TcpListener) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    // An error is found by the next accept.
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }));
}

fn report_value(report: &crate::migration::report::Report) -> Result<Report, Failure> {
    serde_json::to_value(report).map_err(|error| Failure::new(FailureCode::Failed, error.to_string()))
}

fn policy(config: &Config) -> Policy {
    let (limits, default) = (&config.limits, Policy::default());
    Policy {
        downtime_ms_max: limits.downtime_ms_max.unwrap_or(default.downtime_ms_max),
        rounds_max: limits.rounds_max.unwrap_or(default.rounds_max),
        stalled_rounds_max: limits.stalled_rounds_max.unwrap_or(default.stalled_rounds_max),
        on_stall: limits.on_stall.map_or(default.on_stall, |choice| match choice {
            OnStall::Cancel => policy::OnStall::Cancel,
            OnStall::Force => policy::OnStall::Force,
        }),
        answer_ms_max: limits.answer_ms_max.unwrap_or(default.answer_ms_max),
        switchover_answer_ms_max: limits.switchover_answer_ms_max.unwrap_or(default.switchover_answer_ms_max),
        pause_ms_max: limits.pause_ms_max.unwrap_or(default.pause_ms_max),
        device_ms_max: limits.device_ms_max.unwrap_or(default.device_ms_max),
        record_ms_max: limits.record_ms_max.unwrap_or(default.record_ms_max),
        ..default
    }
}

/// Tells a job and the embedder what a migration does.
struct Watch<'a> {
    host: &'a Host,
    job: &'a Job,
    started: Instant,
}

impl Watch<'_> {
    fn tell(&self, phase: Phase, progress: Option<crate::migration::driver::Progress>) {
        let before = self.job.latest().unwrap_or_default();
        let pages_total = self.host.with_machine(|machine| machine.memory.ram().pages()).unwrap_or(0);
        self.job.tell(Progress {
            phase: serde_json::to_value(phase).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default(),
            round: progress.map_or(before.round, |p| p.round),
            pages_sent: progress.map_or(before.pages_sent, |p| p.pages_sent),
            pages_left: progress.map_or(before.pages_left, |p| p.pages_left),
            pages_total,
            bytes: progress.map_or(before.bytes, |p| p.bytes),
            elapsed_ms: self.started.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
        });
    }
}

impl Observer for Watch<'_> {
    fn phase(&self, _: MigrationId, role: Role, phase: Phase) {
        self.tell(phase, None);
        self.host.embedder.phase(role, phase);
    }

    fn progress(&self, _: MigrationId, _: Role, progress: crate::migration::driver::Progress) {
        self.tell(progress.phase, Some(progress));
    }
}
