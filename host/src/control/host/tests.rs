//! Hosts without guests, each with a simulated device that migrates by itself, over loopback.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::control::config::Draft;
use crate::control::protocol::{Response, Run};
use crate::control::socket::News;
use crate::control::units::ByteSize;
use crate::mediation::VmmPort;
use crate::migration::cause::{Phase, Role};
use crate::migration::journal::{Journal, Mark};
use crate::migration::wire::Digest;

#[path = "power_tests.rs"]
mod power;

/// Counts what it is told, and can hold a migration at a phase.
#[derive(Debug, Default)]
struct Watcher {
    running: AtomicU32,
    gone: AtomicU32,
    released: Mutex<Vec<String>>,
    failed: Mutex<Vec<String>>,
    hold: Mutex<Option<Phase>>,
    held: Mutex<bool>,
    changed: Condvar,
}

impl Watcher {
    fn holding(phase: Phase) -> Arc<Self> {
        Arc::new(Self { hold: Mutex::new(Some(phase)), ..Self::default() })
    }

    fn wait_held(&self) {
        let held = lock(&self.held);
        let (held, _) = self.changed.wait_timeout_while(held, Duration::from_secs(30), |held| !*held).unwrap();
        assert!(*held, "the phase was never reached");
    }

    fn let_go(&self) {
        *lock(&self.hold) = None;
        self.changed.notify_all();
    }

    fn told(&self) -> (u32, u32) {
        (self.running.load(Ordering::SeqCst), self.gone.load(Ordering::SeqCst))
    }
}

impl Embedder for Watcher {
    fn vmm(&self, machine: &Machine) -> Result<Arc<dyn VmmPort>, String> {
        NoGuest.vmm(machine)
    }

    fn phase(&self, _: Role, phase: Phase) {
        let mut hold = lock(&self.hold);
        if *hold == Some(phase) {
            *lock(&self.held) = true;
            self.changed.notify_all();
            while *hold == Some(phase) {
                hold = self.changed.wait(hold).unwrap();
            }
        }
    }

    fn running(&self) {
        self.running.fetch_add(1, Ordering::SeqCst);
    }

    fn gone(&self) {
        self.gone.fetch_add(1, Ordering::SeqCst);
    }

    fn device_failed(&self, device: &str) {
        lock(&self.failed).push(device.to_owned());
    }

    fn device_released(&self, device: &str) {
        lock(&self.released).push(device.to_owned());
    }
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn state(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn config(&self, listen: Option<&str>) -> Config {
        let mut draft = Draft {
            memory: Some(ByteSize(1 << 20)),
            control_socket: Some(self.0.path().join("control.sock")),
            state_dir: Some(self.state()),
            listen: listen.map(str::to_owned),
            ..Draft::default()
        };
        draft.devices.push(super::super::config::DeviceConfig {
            name: "sim:stateful".parse().unwrap(),
            open: super::super::config::OpenBy::Auto,
            vf_token: None,
            serve: None,
        });
        // A machine under load measures slow links; how long it takes is not what is tested here.
        draft.limits.downtime_ms_max = Some(60_000);
        draft.finish().unwrap()
    }

    fn source(&self, watcher: &Arc<Watcher>) -> Result<Arc<Host>, StartError> {
        Host::start(self.config(None), Arc::clone(watcher) as Arc<dyn Embedder>)
    }

    fn destination(&self, watcher: &Arc<Watcher>) -> Result<Arc<Host>, StartError> {
        Host::start(self.config(Some("127.0.0.1:0")), Arc::clone(watcher) as Arc<dyn Embedder>)
    }

    /// A journal of a source, with these marks after BEGAN.
    fn journal(&self, peer: &str, marks: &[Mark]) -> MigrationId {
        let store = FileStore::new(self.state()).unwrap();
        let id = MigrationId::random().unwrap();
        let mut journal = Journal::begin(&store, id, Role::Source, peer).unwrap();
        for mark in marks {
            journal.append(*mark).unwrap();
        }
        id
    }
}

fn end(job: &Job) -> Response {
    let mut seen = 0;
    loop {
        match job.next(seen, Duration::from_secs(60)) {
            News::Progress { number, .. } => seen = number,
            News::End(response) => return response,
            News::Silence => panic!("no end within a minute"),
        }
    }
}

fn stop(host: &Arc<Host>) {
    host.stop(Instant::now() + Duration::from_secs(20)).unwrap();
}

/// The migration has ended here too: the answer to the source leaves before the books are closed.
fn settled(host: &Host, ownership: Ownership) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while host.ownership().0 != ownership || host.progress().is_some() {
        assert!(Instant::now() < deadline, "{:?}", host.ownership());
        std::thread::yield_now();
    }
}

/// spec: CONTROL-40
#[test]
fn a_guest_that_moved_is_there_and_not_here_any_more() {
    let (here, there) = (Place::new(), Place::new());
    let (at_source, at_destination) = (Arc::default(), Arc::default());
    let (source, destination) = (here.source(&at_source).unwrap(), there.destination(&at_destination).unwrap());
    let to = destination.listening().unwrap().to_string();
    assert_eq!((source.ownership().0, destination.ownership().0), (Ownership::Here, Ownership::Elsewhere));
    let job = source.migrate(&to, false, true).unwrap();
    let Response::Migrated { report } = end(&job) else { panic!("{:?}", end(&job)) };
    assert_eq!(report.get("verified"), Some(&serde_json::Value::Bool(true)), "{report}");
    settled(&source, Ownership::Elsewhere);
    settled(&destination, Ownership::Here);
    assert_eq!((at_source.told(), at_destination.told()), ((1, 1), (1, 0)));
    assert!(matches!(source.last(), Some(LastMigration::Moved { .. })));
    assert!(matches!(destination.last(), Some(LastMigration::Arrived { .. })));
    let again = source.migrate(&to, false, false).unwrap_err();
    assert!(again.message.contains("moved to"), "{again}");
    stop(&source);
    stop(&destination);
    drop((source, destination));
    // The journals remember.
    assert!(matches!(here.source(&Arc::default()), Err(StartError::GuestElsewhere { .. })));
    stop(&here.destination(&Arc::default()).unwrap());
    stop(&there.source(&Arc::default()).unwrap());
}

/// spec: CONTROL-41
#[test]
fn one_migration_at_a_time_and_a_cancelled_one_leaves_the_guest() {
    let (here, there) = (Place::new(), Place::new());
    let watcher = Watcher::holding(Phase::PreCopy);
    let (source, destination) = (here.source(&watcher).unwrap(), there.destination(&Arc::default()).unwrap());
    let to = destination.listening().unwrap().to_string();
    let job = source.migrate(&to, false, false).unwrap();
    watcher.wait_held();
    assert!(source.migrate(&to, false, false).unwrap_err().message.contains("under way"));
    assert!(source.may_stop(false).is_err() && source.may_stop(true).is_ok());
    assert_eq!(source.progress().unwrap().phase, "pre_copy");
    source.cancel().unwrap();
    watcher.let_go();
    let Response::Error(failure) = end(&job) else { panic!("{:?}", end(&job)) };
    assert_eq!(failure.code, FailureCode::NotMigrated, "{failure}");
    settled(&source, Ownership::Here);
    assert_eq!(watcher.told(), (1, 0));
    assert!(source.cancel().is_err() && source.may_stop(false).is_ok());
    settled(&destination, Ownership::Elsewhere);
    // The same guest may try again.
    let job = source.migrate(&to, false, false).unwrap();
    assert!(matches!(end(&job), Response::Migrated { .. }), "{:?}", end(&job));
    stop(&source);
    stop(&destination);
}

#[test]
fn what_cannot_be_migrated_is_refused_before_anything_moves() {
    let (here, there) = (Place::new(), Place::new());
    let (source, destination) = (here.source(&Arc::default()).unwrap(), there.destination(&Arc::default()).unwrap());
    for (to, word) in
        [("127.0.0.1", "HOST:PORT"), ("192.0.2.1:7000", "--insecure"), ("[::ffff:192.0.2.1]:1", "--insecure")]
    {
        let failure = source.migrate(to, false, false).unwrap_err();
        assert_eq!(failure.code, FailureCode::Refused);
        assert!(failure.message.contains(word), "{failure}");
    }
    assert!(destination.migrate("127.0.0.1:1", false, false).unwrap_err().message.contains("no guest here"));
    assert!(destination.resolve(&"0".repeat(32), Run::Here).unwrap_err().message.contains("nothing is in doubt"));
    // Nobody listens: found out once the thread tries.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let Response::Error(failure) = end(&source.migrate(&free.to_string(), false, false).unwrap()) else { panic!() };
    assert_eq!(failure.code, FailureCode::NotMigrated);
    assert_eq!(source.ownership().0, Ownership::Here);
    stop(&source);
    stop(&destination);
}

/// A pair that cannot agree in time: the destination is held at `phase`, until the source has told that it is in doubt.
fn in_doubt(here: &Place, there: &Place, phase: Phase) -> (Arc<Host>, Arc<Host>, Arc<Watcher>, String) {
    let watcher = Watcher::holding(phase);
    let destination = there.destination(&watcher).unwrap();
    let mut config = here.config(None);
    config.limits.switchover_answer_ms_max = Some(200);
    config.limits.answer_ms_max = Some(200);
    let source = Host::start(config, Arc::new(NoGuest)).unwrap();
    let job = source.migrate(&destination.listening().unwrap().to_string(), false, false).unwrap();
    watcher.wait_held();
    let Response::Error(failure) = end(&job) else { panic!("{:?}", end(&job)) };
    assert_eq!(failure.code, FailureCode::InDoubt, "{failure}");
    let id = source.doubt().expect("it is in doubt").id;
    (source, destination, watcher, id)
}

/// spec: CONTROL-47
#[test]
fn a_source_in_doubt_runs_nothing_and_asks_until_it_is_answered() {
    let (here, there) = (Place::new(), Place::new());
    let (source, destination, watcher, _) = in_doubt(&here, &there, Phase::Resuming);
    assert!(source.migrate("127.0.0.1:1", false, false).unwrap_err().code == FailureCode::InDoubt);
    assert!(source.may_stop(false).is_err());
    assert_eq!(watcher.told(), (0, 0), "held: nobody runs the guest");
    watcher.let_go();
    settled(&destination, Ownership::Here);
    settled(&source, Ownership::Elsewhere);
    assert_eq!(watcher.told(), (1, 0));
    stop(&source);
    stop(&destination);
}

/// spec: CONTROL-47
#[test]
fn an_operator_resolves_what_cannot_be_asked() {
    let (here, there) = (Place::new(), Place::new());
    let (source, destination, watcher, id) = in_doubt(&here, &there, Phase::Resuming);
    assert!(source.resolve(&"0".repeat(32), Run::There).unwrap_err().message.contains(&id));
    // The background may have the doubt in hand at this moment; then it says so.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match source.resolve(&id, Run::There) {
            Ok(_) => break,
            Err(failure) => assert!(failure.message.contains("ask again"), "{failure}"),
        }
        assert!(Instant::now() < deadline);
    }
    assert_eq!(source.ownership().0, Ownership::Elsewhere);
    watcher.let_go();
    settled(&destination, Ownership::Here);
    stop(&source);
    stop(&destination);
    drop(source);
    assert!(matches!(here.source(&Arc::default()), Err(StartError::GuestElsewhere { .. })));
}

/// spec: CONTROL-42
#[test]
fn two_hosts_do_not_share_a_journal() {
    let here = Place::new();
    let first = here.source(&Arc::default()).unwrap();
    assert!(matches!(here.source(&Arc::default()), Err(StartError::StateInUse { .. })));
    stop(&first);
    drop(first);
    stop(&here.source(&Arc::default()).unwrap());
}

/// spec: CONTROL-43
#[test]
fn a_host_in_doubt_does_not_start_and_one_that_kept_its_guest_does() {
    let digest = Digest([7; 16]);
    let here = Place::new();
    let id = here.journal("127.0.0.1:1", &[Mark::Committing { digest }]);
    match here.source(&Arc::default()) {
        Err(StartError::InDoubt { id: found, .. }) => assert_eq!(found, id),
        other => panic!("{other:?}"),
    }
    let here = Place::new();
    here.journal("127.0.0.1:1", &[Mark::Committing { digest }, Mark::Kept]);
    stop(&here.source(&Arc::default()).unwrap());
    let here = Place::new();
    here.journal("127.0.0.1:1", &[Mark::Committing { digest }, Mark::Moved]);
    assert!(matches!(here.source(&Arc::default()), Err(StartError::GuestElsewhere { .. })));
}

/// spec: CONTROL-44
#[test]
fn a_restarted_source_asks_its_destination_before_it_calls_for_an_operator() {
    let (here, there) = (Place::new(), Place::new());
    // A destination that never heard of the migration cannot settle it.
    let destination = there.destination(&Arc::default()).unwrap();
    let peer = destination.listening().unwrap().to_string();
    let id = here.journal(&peer, &[Mark::Committing { digest: Digest([7; 16]) }]);
    assert!(matches!(here.source(&Arc::default()), Err(StartError::InDoubt { .. })));
    stop(&destination);
    drop(destination);
    // One whose journal says that it prepared, and lost what it held with its process, discards: the guest stays.
    {
        let store = FileStore::new(there.state()).unwrap();
        let mut journal = Journal::begin(&store, id, Role::Destination, "here").unwrap();
        journal.append(Mark::Prepared { digest: Digest([7; 16]) }).unwrap();
    }
    let config = there.config(Some(&peer));
    let destination = Host::start(config, Arc::new(NoGuest)).unwrap();
    let source = here.source(&Arc::default());
    let source = source.expect("the guest is this host's: the destination can never run it");
    assert_eq!(source.ownership().0, Ownership::Here);
    stop(&source);
    stop(&destination);
}

/// spec: CONTROL-45
#[test]
fn stopping_closes_the_devices_and_cancels_what_is_under_way() {
    let (here, there) = (Place::new(), Place::new());
    let watcher = Watcher::holding(Phase::PreCopy);
    let (source, destination) = (here.source(&watcher).unwrap(), there.destination(&Arc::default()).unwrap());
    let device = source.with_machine(|machine| Arc::downgrade(&machine.devices[0])).unwrap();
    let job = source.migrate(&destination.listening().unwrap().to_string(), false, false).unwrap();
    watcher.wait_held();
    let stopping = {
        let source = Arc::clone(&source);
        std::thread::spawn(move || source.stop(Instant::now() + Duration::from_secs(20)))
    };
    while !lock(&source.state).stopping {
        std::thread::yield_now();
    }
    watcher.let_go();
    stopping.join().unwrap().unwrap();
    assert!(matches!(end(&job), Response::Error(failure) if failure.code == FailureCode::NotMigrated));
    assert!(device.upgrade().is_none(), "the device is closed although the host object lives");
    assert!(source.migrate("127.0.0.1:1", false, false).unwrap_err().message.contains("stopping"));
    stop(&destination);
}
