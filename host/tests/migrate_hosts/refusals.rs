//! What cannot move is refused, with a reason, and nothing has changed.

use crate::support::{Setup, Side, move_guest, until};
use vfio_mediate::control::protocol::{Failure, FailureCode};
use vfio_mediate::migration::cause::{Phase, Role};

#[track_caller]
fn assert_refused(source: &Side, result: Result<serde_json::Value, Failure>, reason: &str) {
    let failure = result.unwrap_err();
    assert_eq!(failure.code, FailureCode::NotMigrated, "{failure}");
    assert!(failure.message.contains(reason), "{failure}");
    assert!(!failure.message.contains('\n') && failure.message.len() < 300, "{failure}");
    source.assert_runs();
}

/// spec: HOST-3
#[test]
fn a_device_that_nobody_can_migrate_is_refused_before_anything_moves() {
    let there = Side::start(Setup::new("sim:edu").listening());
    let here = Side::start(Setup { plugin: false, ..Setup::new("sim:edu") });
    assert_refused(&here, here.migrate(there.address()), "sim:edu");
    let phases = crate::support::lock(&here.world.phases).clone();
    assert!(phases.iter().all(|(role, phase)| *role == Role::Source && *phase != Phase::PreCopy), "{phases:?}");
    assert!(crate::support::lock(&there.world.phases).iter().all(|(_, phase)| *phase != Phase::PreCopy));
    here.stop();
    there.stop();
}

/// spec: HOST-3
#[test]
fn a_machine_whose_stores_cannot_be_watched_is_refused() {
    let there = Side::start(Setup::new("sim:stateful").listening());
    let here = Side::start(Setup { no_cpu_dirt: true, ..Setup::new("sim:stateful") });
    assert_refused(&here, here.migrate(there.address()), "no source of CPU dirt");
    here.stop();
    let right = Side::start(Setup::new("sim:stateful"));
    move_guest(&right, &there);
    right.stop();
    there.stop();
}

/// spec: HOST-4
#[test]
fn a_destination_of_another_shape_says_what_differs_and_takes_the_right_source_afterwards() {
    let there = Side::start(Setup::new("sim:stateful").listening());
    let usual = Setup::new("sim:stateful");
    let wrong = [
        (Setup::new("sim:edu"), "device 0 (sim:edu)"),
        (Setup { memory: 2 << 20, ..usual.clone() }, "a memory of 512 pages there, of 256 here"),
        (Setup { devices: vec!["sim:stateful"; 2], ..usual.clone() }, "2 devices there, 1 here"),
    ];
    for (setup, reason) in wrong {
        let here = Side::start(setup);
        assert_refused(&here, here.migrate(there.address()), reason);
        here.stop();
    }
    let here = Side::start(usual);
    until("a few doorbells", || here.steps() > 20);
    move_guest(&here, &there);
    here.stop();
    there.stop();
}

/// spec: HOST-4
#[test]
fn a_destination_without_the_plugin_refuses_and_the_guest_runs_on() {
    let there = Side::start(Setup { plugin: false, ..Setup::new("sim:edu").listening() });
    let here = Side::start(Setup::new("sim:edu"));
    assert_refused(&here, here.migrate(there.address()), "sim:edu");
    there.stop();
    here.stop();
}
