//! A wire that breaks at the last records: afterwards one host runs the guest, or a doubt has a name and can be resolved.

use std::sync::Arc;

use crate::proxy::{Bytes, Cut, Proxy};
use crate::support::{Setup, Side, assert_moved, until};
use vfio_mediate::control::host::{Host, StartError};
use vfio_mediate::control::protocol::{FailureCode, Ownership, Run};
use vfio_mediate::control::protocol::{Request, Response};
use vfio_mediate::control::service::HostService;
use vfio_mediate::control::socket::{Answer, Service};
use vfio_mediate::migration::wire::Kind;

const LAST: [Kind; 5] = [Kind::DeviceState, Kind::Digest, Kind::Ready, Kind::Commit, Kind::Committed];
const CUTS: [Bytes; 4] = [Bytes::None, Bytes::Header, Bytes::AllButOne, Bytes::All];

/// The id of the doubt, as `status` shows it.
fn doubt(host: &Arc<Host>) -> Option<String> {
    match HostService::new(Arc::clone(host), || ()).answer(Request::Status {}) {
        Answer::Now(Response::Status(status)) => status.in_doubt.map(|doubt| doubt.id),
        _ => panic!("no status"),
    }
}

/// Exactly one of the two runs the guest, and both know.
#[track_caller]
fn assert_one_runs(here: &Side, there: &Side, cut: Cut) {
    let places = || (here.ownership(), there.ownership());
    until(&format!("an end of the doubt after {cut:?}"), || {
        matches!(places(), (Ownership::Here, Ownership::Elsewhere) | (Ownership::Elsewhere, Ownership::Here))
            && there.host.may_stop(false).is_ok()
    });
    if here.ownership() == Ownership::Here {
        assert!(!there.runs(), "{cut:?}");
        here.assert_runs();
    } else {
        assert_moved(here, there);
    }
}

fn cut_and_settle(cut: Cut) {
    let there = Side::start(Setup::new("sim:stateful").listening());
    let here = Side::start(Setup::new("sim:stateful"));
    until("a few doorbells", || here.steps() > 20);
    let proxy = Proxy::start(there.address(), Some(cut), false);
    let result = here.migrate(proxy.address);
    assert!(proxy.is_cut(), "{cut:?}");
    assert_one_runs(&here, &there, cut);
    match (result, here.ownership()) {
        (Ok(_), Ownership::Elsewhere) => {}
        (Err(failure), Ownership::Here) => {
            assert_eq!(failure.code, FailureCode::NotMigrated, "{cut:?}: {failure}");
            crate::support::move_guest(&here, &there);
        }
        (result, ownership) => panic!("{cut:?}: {result:?}, but {ownership:?}"),
    }
    here.stop();
    there.stop();
}

/// spec: HOST-8
#[test]
fn a_wire_that_breaks_at_any_of_the_last_records_leaves_one_runner() {
    let cuts = LAST.iter().flat_map(|kind| CUTS.map(|bytes| Cut { kind: *kind, bytes }));
    let threads: Vec<_> = cuts.map(|cut| std::thread::spawn(move || cut_and_settle(cut))).collect();
    let failed = threads.into_iter().filter_map(|thread| thread.join().err()).count();
    assert_eq!(failed, 0);
}

/// spec: HOST-8
#[test]
fn a_destination_that_could_not_be_told_at_once_is_told_when_the_wire_is_mended() {
    for kind in [Kind::Ready, Kind::Commit] {
        let there = Side::start(Setup::new("sim:stateful").listening());
        let here = Side::start(Setup::new("sim:stateful"));
        let cut = Cut { kind, bytes: Bytes::None };
        let proxy = Proxy::start(there.address(), Some(cut), true);
        let failure = here.migrate(proxy.address).unwrap_err();
        until("the destination's doubt", || there.ownership() == Ownership::InDoubt);
        if kind == Kind::Ready {
            assert_eq!(failure.code, FailureCode::NotMigrated, "{failure}");
            here.assert_runs();
        }
        proxy.mend();
        assert_one_runs(&here, &there, cut);
        here.stop();
        there.stop();
    }
}

/// The wire breaks before `kind` gets through, and stays broken.
fn in_doubt(kind: Kind) -> (Side, Side, String) {
    let there = Side::start(Setup::new("sim:stateful").listening());
    let here = Side::start(Setup::new("sim:stateful"));
    let proxy = Proxy::start(there.address(), Some(Cut { kind, bytes: Bytes::None }), true);
    let failure = here.migrate(proxy.address).unwrap_err();
    assert_eq!(failure.code, FailureCode::InDoubt, "{failure}");
    assert_eq!(here.ownership(), Ownership::InDoubt);
    assert!(!here.runs());
    let id = doubt(&here.host).unwrap();
    assert!(failure.message.contains(&id), "{failure}");
    assert_eq!(here.migrate(there.address()).unwrap_err().code, FailureCode::InDoubt);
    assert_eq!(here.host.may_stop(false).unwrap_err().code, FailureCode::InDoubt);
    (here, there, id)
}

/// spec: HOST-9
#[test]
fn a_lost_commit_is_resolved_to_run_here() {
    let (here, there, id) = in_doubt(Kind::Commit);
    until("the destination's doubt", || there.ownership() == Ownership::InDoubt);
    assert_eq!(doubt(&there.host).as_ref(), Some(&id));
    assert!(!there.runs());
    assert!(here.host.resolve("0123", Run::Here).is_err());
    assert_eq!(here.ownership(), Ownership::InDoubt);
    there.host.resolve(&id, Run::There).unwrap();
    assert_eq!(there.ownership(), Ownership::Elsewhere);
    here.host.resolve(&id, Run::Here).unwrap();
    here.assert_runs();
    assert!(!there.runs());
    crate::support::move_guest(&here, &there);
    here.stop();
    there.stop();
}

/// spec: HOST-9
#[test]
fn a_lost_commit_is_resolved_to_run_there() {
    let (here, there, id) = in_doubt(Kind::Commit);
    until("the destination's doubt", || there.ownership() == Ownership::InDoubt);
    here.host.resolve(&id, Run::There).unwrap();
    there.host.resolve(&id, Run::Here).unwrap();
    assert_moved(&here, &there);
    here.stop();
    there.stop();
}

/// spec: HOST-9
#[test]
fn a_lost_answer_is_resolved_where_the_guest_runs_already() {
    let (here, there, id) = in_doubt(Kind::Committed);
    until("the guest", || there.ownership() == Ownership::Here);
    here.host.resolve(&id, Run::There).unwrap();
    assert_moved(&here, &there);
    here.stop();
    there.stop();
}

/// spec: HOST-10
#[test]
fn a_source_that_restarts_in_doubt_names_the_migration_and_runs_nothing() {
    let (here, there, id) = in_doubt(Kind::Committed);
    until("the guest", || there.ownership() == Ownership::Here);
    let folder = here.stop();
    match Side::start_in(Setup::new("sim:stateful"), Arc::clone(&folder)) {
        Err(StartError::InDoubt { id: named, .. }) => assert_eq!(named.to_string(), id),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a second guest runs"),
    }
    there.stop();
}

/// spec: HOST-10
#[test]
fn a_host_whose_guest_moved_runs_no_new_one_but_may_take_it_back() {
    let there = Side::start(Setup::new("sim:stateful").listening());
    let here = Side::start(Setup::new("sim:stateful"));
    crate::support::move_guest(&here, &there);
    let folder = here.stop();
    match Side::start_in(Setup::new("sim:stateful"), Arc::clone(&folder)) {
        Err(StartError::GuestElsewhere { .. }) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a second guest runs"),
    }
    let back = Side::start_in(Setup::new("sim:stateful").listening(), Arc::clone(&folder)).unwrap();
    assert!(matches!(
        Side::start_in(Setup::new("sim:stateful").listening(), folder),
        Err(StartError::StateInUse { .. })
    ));
    crate::support::move_guest(&there, &back);
    there.stop();
    back.stop();
}
