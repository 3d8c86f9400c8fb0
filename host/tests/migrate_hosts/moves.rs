//! What can move, moves.

use crate::support::{PATIENCE, Setup, Side, move_guest, until};
use vfio_mediate::control::protocol::Ownership;

/// spec: HOST-1
#[test]
fn an_edu_under_its_plugin_moves_there_and_back_with_every_byte() {
    let there = Side::start(Setup::new("sim:edu").listening());
    let here = Side::start(Setup::new("sim:edu"));
    until("a DMA", || here.steps() > 400);
    let report = move_guest(&here, &there);
    assert_eq!(report["devices"][0]["plugin"], "edu");
    here.stop();
    let back = Side::start(Setup::new("sim:edu").listening());
    until("a DMA", || there.steps() > 800);
    move_guest(&there, &back);
    there.stop();
    back.stop();
}

/// spec: HOST-1
#[test]
fn a_device_with_native_migration_moves_without_a_plugin() {
    let there = Side::start(Setup::new("sim:stateful").listening());
    let here = Side::start(Setup::new("sim:stateful"));
    until("a few doorbells", || here.steps() > 50);
    let report = here.migrate_with(there.address(), true).unwrap();
    crate::support::assert_moved(&here, &there);
    assert!(report["devices"][0]["plugin"].is_null());
    assert_eq!(report["verified"], true);
    assert!(here.host.migrate(&there.address().to_string(), false, false).is_err(), "it is gone");
    here.stop();
    there.stop();
}

/// spec: HOST-1
#[test]
fn two_devices_of_one_machine_move_together() {
    for device in ["sim:edu", "sim:stateful"] {
        let setup = Setup { devices: vec![device, device], ..Setup::new(device) };
        let there = Side::start(setup.clone().listening());
        let here = Side::start(setup);
        until("a DMA of each", || here.steps() > 400);
        let report = move_guest(&here, &there);
        assert_eq!(report["devices"].as_array().unwrap().len(), 2);
        let before = there.steps();
        until("another DMA of each", || there.steps() > before + 600);
        here.stop();
        there.stop();
    }
}

/// spec: HOST-2
#[test]
fn a_host_ends_in_time_and_lets_go_of_its_devices() {
    let there = Side::start(Setup::new("sim:edu").listening());
    assert_eq!(there.ownership(), Ownership::Elsewhere);
    let silent = std::net::TcpStream::connect(there.address()).unwrap();
    until("the host to see it", || there.host.may_stop(false).is_err() || there.steps() == 0);
    let begun = std::time::Instant::now();
    there.stop();
    assert!(begun.elapsed() < PATIENCE / 10);
    drop(silent);
}
