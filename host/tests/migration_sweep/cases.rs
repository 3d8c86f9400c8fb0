//! Single stories, each with its promise.

use std::io::IoSlice;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use vfio_mediate::migration::cause::{Cause, Phase, Role};
use vfio_mediate::migration::driver::{
    DestinationDriver, MigrationError, Monotonic, SourceDriver, Step, migrate_in, migrate_out,
};
use vfio_mediate::migration::journal::{Resolution, Standing, recover};
use vfio_mediate::migration::policy::{OnStall, Policy};
use vfio_mediate::migration::transport::{MemoryTransport, TcpTransport, Transport};

use crate::sim::SimHost;
use crate::{Ending, FULL, Fault, Harness, P2P, PLAIN, Planned};

fn cause(ending: &Ending) -> Cause {
    match ending {
        Ending::Ended(Err(MigrationError::Kept { cause, .. } | MigrationError::Discarded { cause })) => cause.clone(),
        other => panic!("{other:?}"),
    }
}

/// spec: MIGRATION-5
#[test]
fn phases_come_in_order_and_the_report_accounts_for_the_downtime() {
    let (harness, mut oracle) = Harness::new(&[FULL, P2P], 3, true);
    let outcome = harness.migrate(&mut oracle, &[], true);
    let mut due = oracle.phases.clone();
    due.sort();
    assert_eq!(oracle.phases, due, "phases are declared in the order in which they come");
    let Ending::Ended(Ok(report)) = &outcome.source else { panic!("{outcome:?}") };
    assert_eq!(report.verified, Some(true));
    assert!(report.rounds.len() >= 2 && report.rounds[0].pages == crate::sim::PAGES, "{report:?}");
    assert!(report.zero_pages > 0 && report.zero_pages < report.pages_sent);
    let part = &report.downtime;
    let sum = part.pause + part.device_stop + part.last_drain + part.last_pages + part.device_state;
    let sum = sum + part.validation + part.commit + part.resume;
    assert!(
        (report.downtime_ms - sum).abs() < 1e-9 && report.downtime_ms > 0.0 && report.downtime_ms < report.total_ms
    );
    assert_eq!(report.devices.iter().map(|device| device.state_bytes).collect::<Vec<_>>(), [40, 40]);
}

/// spec: MIGRATION-6
#[test]
fn several_devices_without_p2p_are_refused_before_anything_moves() {
    for (flags, refused) in [(vec![PLAIN, FULL], true), (vec![FULL, PLAIN], true), (vec![PLAIN], false)] {
        let (harness, mut oracle) = Harness::new(&flags, 1, false);
        let outcome = harness.migrate(&mut oracle, &[], true);
        assert_eq!(matches!(outcome.source, Ending::Ended(Ok(_))), !refused, "{outcome:?}");
        if refused {
            assert!(matches!(cause(&outcome.source), Cause::Refused { .. }));
            assert!(!oracle.phases.contains(&Phase::PreCopy));
        }
        harness.assert_promises(&mut oracle, outcome);
    }
}

/// spec: MIGRATION-7
#[test]
fn a_destination_that_does_not_match_refuses_and_the_source_goes_on() {
    let (mut harness, mut oracle) = Harness::new(&[PLAIN], 1, false);
    harness.destination.host = SimHost::new(&[PLAIN, PLAIN], false);
    let outcome = harness.migrate(&mut oracle, &[], true);
    assert!(matches!(cause(&outcome.source), Cause::RefusedByPeer { .. }), "{outcome:?}");
    assert!(matches!(cause(&outcome.destination), Cause::Refused { .. }), "{outcome:?}");
    assert!(!oracle.phases.contains(&Phase::PreCopy));
    harness.assert_promises(&mut oracle, outcome);
}

/// spec: MIGRATION-8
#[test]
fn a_replayed_migration_is_refused() {
    let (mut harness, mut oracle) = Harness::new(&[PLAIN], 1, false);
    let outcome = harness.migrate(&mut oracle, &[], true);
    assert!(matches!(outcome.destination, Ending::Ended(Ok(_))));
    // The same id again, from a source that has forgotten it.
    harness.source = crate::Side::new(&[PLAIN], true);
    let truth = harness.source.host.truth();
    harness.destination.host = SimHost::new(&[PLAIN], false);
    let mut again = crate::Oracle { truth, ..oracle };
    let outcome = harness.migrate(&mut again, &[], true);
    let why = cause(&outcome.source).to_string();
    assert!(why.contains("used before"), "{why}");
    assert!(harness.source.host.runs() && !harness.destination.host.runs());
}

/// spec: MIGRATION-22
#[test]
fn a_guest_that_is_never_clean_stays_where_it_is() {
    let (mut harness, mut oracle) = Harness::new(&[PLAIN], 1, false);
    harness.policy = Policy { on_stall: OnStall::Cancel, ..harness.policy };
    let outcome = harness.migrate(&mut oracle, &[], true);
    assert!(matches!(cause(&outcome.source), Cause::Stalled(_)), "{outcome:?}");
    assert!(matches!(cause(&outcome.destination), Cause::PeerGaveUp { .. }), "{outcome:?}");
    harness.assert_promises(&mut oracle, outcome);
}

/// spec: MIGRATION-9
#[test]
fn verification_notices_a_tracker_that_forgets() {
    let (harness, mut oracle) = Harness::new(&[PLAIN], 5, true);
    harness.source.host.forget();
    let (left, right, _link) = MemoryTransport::pair(9000, Duration::ZERO);
    let mut source = SourceDriver::new(harness.source_job(), Box::new(left));
    let mut destination = DestinationDriver::new(harness.destination_job(), Box::new(right));
    let mut ended = (false, false);
    for _ in 0..10_000 {
        ended = (source.step() == Step::Ended, destination.step() == Step::Ended);
        // The destination's guest has lost writes: only the source's may work.
        if harness.source.host.runs() {
            harness.source.host.work(&mut oracle.random, &mut oracle.truth);
        }
        if ended == (true, true) {
            break;
        }
        harness.time.0.fetch_add(10, std::sync::atomic::Ordering::Relaxed);
    }
    assert_eq!(ended, (true, true));
    assert_eq!(source.finish().expect("it moves all the same").verified, Some(false));
    assert_eq!(destination.finish().expect("it moves all the same").verified, Some(false));
}

/// A source in doubt, because the destination died before COMMIT came; and a destination in doubt, because the source did.
fn doubts(side: Role) -> (Harness, crate::Oracle, crate::Outcome) {
    for step in 0.. {
        let (harness, mut oracle) = Harness::new(&[FULL], 1, false);
        let other = if side == Role::Source { Role::Destination } else { Role::Source };
        let planned = Planned { side: other, step, fault: Fault::Crash };
        let outcome = harness.migrate(&mut oracle, &[planned], true);
        let ending = if side == Role::Source { &outcome.source } else { &outcome.destination };
        if ending.in_doubt() {
            return (harness, oracle, outcome);
        }
        assert!(!matches!(ending, Ending::Ended(Ok(_))), "no step leaves a doubt");
    }
    unreachable!("the loop returns")
}

/// spec: MIGRATION-10
#[test]
fn an_operator_resolves_a_source_in_doubt_either_way() {
    for resolution in [Resolution::RunHere, Resolution::RunThere] {
        let (harness, oracle, outcome) = doubts(Role::Source);
        let Ending::Ended(Err(MigrationError::InDoubt(doubt))) = outcome.source else { panic!("{outcome:?}") };
        assert!(!harness.source.host.runs());
        let ended = doubt.resolve_out(harness.source_job(), resolution);
        let here = resolution == Resolution::RunHere;
        assert_eq!(ended.is_err(), here, "{ended:?}");
        assert_eq!(harness.source.host.runs(), here);
        assert_eq!(harness.source.host.device_runs(), here);
        let standing = recover(&harness.source.store).expect("memory is read");
        assert_eq!(standing, if here { Standing::MayRun } else { Standing::MustNotRun });
        harness.source.host.assert_truth(&oracle.truth, &[]);
    }
}

/// spec: MIGRATION-10
#[test]
fn an_operator_resolves_a_destination_in_doubt_either_way() {
    for resolution in [Resolution::RunHere, Resolution::RunThere] {
        let (harness, oracle, outcome) = doubts(Role::Destination);
        let Ending::Ended(Err(MigrationError::InDoubt(doubt))) = outcome.destination else { panic!("{outcome:?}") };
        let ended = doubt.resolve_in(harness.destination_job(), resolution);
        let here = resolution == Resolution::RunHere;
        assert_eq!(ended.is_ok(), here, "{ended:?}");
        assert_eq!(harness.destination.host.runs(), here);
        let standing = recover(&harness.destination.store).expect("memory is read");
        assert_eq!(standing, if here { Standing::MayRun } else { Standing::MustNotRun });
        if here {
            harness.destination.host.assert_truth(&oracle.truth, &[]);
        }
    }
}

/// spec: MIGRATION-11
#[test]
fn strangers_and_garbage_are_a_clear_error_and_nothing_begins() {
    let text = b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: somebody\r\n\r\n".to_vec();
    for bytes in [text, vec![0; 100], Vec::new(), vec![0xff; 10]] {
        let (harness, _) = Harness::new(&[PLAIN], 1, false);
        let (mut left, right, _link) = MemoryTransport::pair(9000, Duration::ZERO);
        if !bytes.is_empty() {
            left.send(&[IoSlice::new(&bytes)]).expect("there is room");
        }
        drop(left);
        let error = migrate_in(harness.destination_job(), Box::new(right)).expect_err("no migration");
        let MigrationError::Discarded { cause } = &error else { panic!("{error}") };
        assert!(matches!(cause, Cause::Stream(_) | Cause::Link(_)), "{cause:?}");
        assert!(!error.to_string().contains('\n'));
        assert_eq!(recover(&harness.destination.store).expect("memory is read"), Standing::Idle);
    }
}

/// spec: MIGRATION-5
#[test]
fn a_guest_moves_over_tcp_between_two_threads() {
    let (harness, oracle) = Harness::new(&[FULL, P2P], 9, true);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let out = TcpStream::connect(listener.local_addr().expect("its address")).expect("loopback connects");
    let (into, _) = listener.accept().expect("loopback connects");
    let time = Monotonic::new();
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let job = vfio_mediate::migration::driver::DestinationJob { time: &time, ..harness.destination_job() };
            migrate_in(job, Box::new(TcpTransport::new(into).expect("a connected socket")))
        });
        let job = vfio_mediate::migration::driver::SourceJob { time: &time, ..harness.source_job() };
        let sent = migrate_out(job, Box::new(TcpTransport::new(out).expect("a connected socket")));
        (sent, receiver.join().expect("the receiver does not panic"))
    });
    let (sent, received) = (sent.expect("it goes"), received.expect("it arrives"));
    assert_eq!((sent.verified, received.verified), (Some(true), Some(true)));
    assert_eq!((sent.pages_sent, sent.bytes), (received.pages_sent, received.bytes));
    assert_eq!((&sent.digest, &sent.migration_id), (&received.digest, &received.migration_id));
    assert!(!harness.source.host.runs() && harness.destination.host.runs());
    harness.destination.host.assert_truth(&oracle.truth, &[]);
    let text = serde_json::to_string(&sent).expect("a report is plain data");
    let again: vfio_mediate::migration::report::Report = serde_json::from_str(&text).expect("and reads back");
    assert_eq!(again.migration_id, sent.migration_id);
}
