//! A migration that is given up leaves the guest where it was, with all of its memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::support::{Setup, Side, lock, move_guest, until};
use vfio_mediate::control::protocol::{FailureCode, Ownership};
use vfio_mediate::migration::cause::{Phase, Role};

/// Cancels at the source when `role` enters `phase`; then migrates for good.
fn cancel_at(device: &'static str, role: Role, phase: Phase) {
    let there = Side::start(Setup::new(device).listening());
    let here = Side::start(Setup::new(device));
    until("a DMA", || here.steps() > 60);
    let watched = if role == Role::Source { &here } else { &there };
    let source = Arc::downgrade(&here.host);
    watched.on_phase(move |whose, now| {
        if (whose, now) == (role, phase)
            && let Some(host) = source.upgrade()
        {
            host.cancel().unwrap();
        }
    });
    let result = here.migrate(there.address());
    watched.no_hook();
    let phases = lock(&watched.world.phases).clone();
    assert!(phases.contains(&(role, phase)), "{role} never was {phase}: {phases:?}");
    // A cancel that comes from elsewhere may come too late; then the guest has moved, whole.
    if let Err(failure) = &result {
        assert_eq!((failure.code, failure.message.as_str()), (FailureCode::NotMigrated, "cancelled"), "{phase}");
        here.assert_runs();
        assert_eq!(here.world.gone.load(Ordering::SeqCst), 0);
        assert_eq!(there.world.running.load(Ordering::SeqCst), 0);
        until("the destination to let go", || there.host.may_stop(false).is_ok());
        assert_eq!(there.ownership(), Ownership::Elsewhere, "{phase}: {:?}", there.host.ownership());
        assert!(!there.runs());
        let there = if device == "sim:edu" { restarted(&here, there) } else { there };
        move_guest(&here, &there);
        there.stop();
    } else {
        assert_eq!(role, Role::Destination, "cancelled while {phase}");
        crate::support::assert_moved(&here, &there);
        there.stop();
    }
    here.stop();
}

/// An edu has no reset: what the cancelled migration left in the destination's goes with its host only.
fn restarted(here: &Side, there: Side) -> Side {
    let failure = here.migrate(there.address()).unwrap_err();
    assert!(failure.message.contains("restart the destination's host"), "{failure}");
    here.assert_runs();
    let folder = there.stop();
    Side::start_in(Setup::new("sim:edu").listening(), folder).unwrap()
}

const BEFORE_COMMIT: [Phase; 8] = [
    Phase::Negotiating,
    Phase::PreCopy,
    Phase::Pausing,
    Phase::Stopping,
    Phase::LastDrain,
    Phase::LastPages,
    Phase::DeviceState,
    Phase::Digest,
];

/// spec: HOST-5
#[test]
fn a_cancel_in_any_phase_before_the_commit_keeps_guest_and_memory() {
    for phase in BEFORE_COMMIT {
        cancel_at("sim:stateful", Role::Source, phase);
    }
}

/// spec: HOST-5
#[test]
fn a_cancel_while_the_destination_works_keeps_guest_and_memory_or_comes_too_late() {
    for phase in [Phase::PreCopy, Phase::DeviceState, Phase::Digest, Phase::Committing] {
        cancel_at("sim:stateful", Role::Destination, phase);
    }
}

/// spec: HOST-5 HOST-7
#[test]
fn a_cancelled_edu_goes_on_and_moves_to_a_destination_that_restarted() {
    for phase in [Phase::PreCopy, Phase::LastDrain, Phase::Digest] {
        cancel_at("sim:edu", Role::Source, phase);
    }
}

/// spec: HOST-6
#[test]
fn a_destination_that_gives_up_leaves_the_guest_at_the_source() {
    for phase in [Phase::Negotiating, Phase::PreCopy, Phase::DeviceState, Phase::Digest] {
        let there = Side::start(Setup::new("sim:stateful").listening());
        let here = Side::start(Setup::new("sim:stateful"));
        let destination = Arc::downgrade(&there.host);
        there.on_phase(move |_, now| {
            if now == phase
                && let Some(host) = destination.upgrade()
            {
                host.cancel().unwrap();
            }
        });
        let failure = here.migrate(there.address()).unwrap_err();
        there.no_hook();
        assert_eq!(failure.code, FailureCode::NotMigrated);
        assert!(!failure.message.is_empty() && !failure.message.contains('\n'));
        here.assert_runs();
        until("the destination to let go", || there.host.may_stop(false).is_ok());
        move_guest(&here, &there);
        here.stop();
        there.stop();
    }
}
