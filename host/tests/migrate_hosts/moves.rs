//! What can move, moves.

use std::time::{Duration, Instant};

use crate::support::{PATIENCE, Setup, Side, move_guest, until};
use vfio_mediate::control::protocol::Ownership;
use vfio_mediate::migration::cause::Phase;

/// spec: HOST-1
#[test]
fn an_edu_under_its_plugin_moves_there_and_back_with_every_byte() {
    let there = Side::start(Setup::new("sim:edu").listening());
    let here = Side::start(Setup::new("sim:edu"));
    until("a DMA", || here.steps() > 400);
    here.wait_for_dma_before_pausing();
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
        here.wait_for_dma_before_pausing();
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
    until("the host to see it", || !crate::support::lock(&there.world.phases).is_empty());
    let begun = std::time::Instant::now();
    there.stop();
    assert!(begun.elapsed() < PATIENCE / 10);
    drop(silent);
}

/// spec: HOST-2
#[test]
fn a_stop_that_cannot_be_done_in_time_says_so_and_can_be_asked_again() {
    let there = Side::start(Setup::new("sim:stateful").listening());
    let here = Side::start(Setup::new("sim:stateful"));
    let (let_go, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    here.on_phase(move |_, phase| {
        if phase == Phase::PreCopy {
            let _until_dropped = crate::support::lock(&held).recv();
        }
    });
    let job = here.host.migrate(&there.address().to_string(), false, false).unwrap();
    until("the phase", || crate::support::lock(&here.world.phases).iter().any(|(_, phase)| *phase == Phase::PreCopy));
    let begun = Instant::now();
    assert!(here.host.stop(begun + Duration::from_millis(50)).is_err());
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(here.host.migrate(&there.address().to_string(), false, false).is_err());
    drop(let_go);
    assert!(crate::support::wait(&job).is_err(), "it is cancelled");
    here.stop();
    there.stop();
}
