//! Low power by an operator's word, and devices that the kernel wants back.

use super::*;
use crate::control::protocol::PowerAction;
use crate::mediation::Notice;

fn device(host: &Host) -> Arc<crate::mediation::MediatedDevice> {
    host.with_machine(|machine| Arc::clone(&machine.devices[0])).unwrap()
}

/// spec: POWER-40
#[test]
fn power_is_told_and_changed_by_name_and_by_place() {
    let (here, watcher) = (Place::new(), Arc::default());
    let host = here.source(&watcher).unwrap();
    let told = |name: &str, action| {
        let power = host.power(name, action).unwrap();
        (power.low_power, power.wakeup, power.state.unwrap(), power.suspended.unwrap())
    };
    let (awake, name) = ((false, false, "D0".to_owned(), false), "sim:stateful");
    let asleep = |wakeup| (true, wakeup, "D3hot".to_owned(), true);
    assert_eq!(told(name, PowerAction::Status), awake);
    assert_eq!(told("0", PowerAction::Enter { wakeup: false }), asleep(false));
    assert_eq!(told(name, PowerAction::Status), asleep(false), "asking wakes nobody");
    let twice = host.power(name, PowerAction::Enter { wakeup: true }).unwrap_err();
    assert_eq!(twice.code, FailureCode::Refused, "{twice}");
    assert_eq!(told(name, PowerAction::Exit), awake);
    assert_eq!(told(name, PowerAction::Exit), awake);
    assert_eq!(told(name, PowerAction::Enter { wakeup: true }), asleep(true));
    device(&host).region_read(0, 0, &mut [0; 4]).unwrap();
    assert_eq!(told(name, PowerAction::Status), awake);
    for unknown in ["1", "sim:edu", ""] {
        let failure = host.power(unknown, PowerAction::Status).unwrap_err();
        assert_eq!(failure.code, FailureCode::Refused, "{failure}");
    }
    stop(&host);
    assert!(host.power(name, PowerAction::Status).is_err());
}

/// spec: POWER-17
#[test]
fn a_guest_whose_device_sleeps_is_migrated() {
    let (here, there) = (Place::new(), Place::new());
    let (at_source, at_destination) = (Arc::default(), Arc::default());
    let (source, destination) = (here.source(&at_source).unwrap(), there.destination(&at_destination).unwrap());
    source.power("0", PowerAction::Enter { wakeup: false }).unwrap();
    let job = source.migrate(&destination.listening().unwrap().to_string(), false, true).unwrap();
    assert!(matches!(end(&job), Response::Migrated { .. }), "{:?}", end(&job));
    settled(&destination, Ownership::Here);
    assert!(!destination.power("0", PowerAction::Status).unwrap().low_power);
    stop(&source);
    stop(&destination);
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// spec: POWER-41
#[test]
fn a_device_that_the_kernel_wants_back_is_let_go_and_the_host_says_so() {
    let (here, watcher) = (Place::new(), Arc::<Watcher>::default());
    let host = here.source(&watcher).unwrap();
    let held = device(&host);
    held.low_power_entry(None).unwrap();
    let weak = Arc::downgrade(&held);
    held.announce(Notice::ReleaseRequested);
    until("it is released", || *lock(&watcher.released) == ["sim:stateful"]);
    // Who holds it still finds it closed, and is the last to let go.
    assert_eq!(held.region_read(0, 0, &mut [0; 4]).unwrap_err().errno(), rustix::io::Errno::NODEV);
    assert_eq!(held.power().map(|power| power.suspended), Some(false));
    drop(held);
    until("nobody holds it", || weak.upgrade().is_none());
    assert_eq!(host.released(), ["sim:stateful"]);
    assert_eq!(host.with_machine(|machine| machine.devices.len()), Some(0));
    stop(&host);
}

/// spec: POWER-41
#[test]
fn a_migration_under_way_is_cancelled_before_its_device_is_let_go() {
    let (here, there) = (Place::new(), Place::new());
    let watcher = Watcher::holding(Phase::PreCopy);
    let (source, destination) = (here.source(&watcher).unwrap(), there.destination(&Arc::default()).unwrap());
    let job = source.migrate(&destination.listening().unwrap().to_string(), false, false).unwrap();
    watcher.wait_held();
    device(&source).announce(Notice::ReleaseRequested);
    until("it is cancelled", || lock(&source.state).cancel.is_cancelled());
    assert!(lock(&watcher.released).is_empty());
    watcher.let_go();
    let Response::Error(failure) = end(&job) else { panic!("{:?}", end(&job)) };
    assert_eq!(failure.code, FailureCode::NotMigrated, "{failure}");
    until("it is released", || *lock(&watcher.released) == ["sim:stateful"]);
    assert_eq!(source.ownership().0, Ownership::Here);
    stop(&source);
    stop(&destination);
}

/// spec: POWER-42
#[test]
fn an_error_is_told_and_the_device_stays_for_the_operator_to_see() {
    let (here, watcher) = (Place::new(), Arc::<Watcher>::default());
    let host = here.source(&watcher).unwrap();
    device(&host).announce(Notice::DeviceError);
    assert_eq!(*lock(&watcher.failed), ["sim:stateful"]);
    assert_eq!(device(&host).closed(), Some(crate::mediation::gate::Reason::Failed));
    assert_eq!(host.power("0", PowerAction::Enter { wakeup: false }).unwrap_err().code, FailureCode::Failed);
    stop(&host);
}
