use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn open() -> Gate {
    let gate = Gate::new(Reason::NotBound);
    gate.close(Reason::NotBound, soon()).unwrap().release(Standing::OPEN);
    gate
}

/// spec: GATE-3
#[test]
fn each_reason_has_its_documented_errno() {
    let table = [
        (Reason::NotBound, Errno::INVAL, false),
        (Reason::Suspended, Errno::IO, false),
        (Reason::MemoryDisabled, Errno::IO, false),
        (Reason::Stopped, Errno::IO, false),
        (Reason::Resetting, Errno::AGAIN, true),
        (Reason::StateArc, Errno::AGAIN, true),
        (Reason::TableSwap, Errno::AGAIN, true),
        (Reason::Failed, Errno::NODEV, false),
        (Reason::Closed, Errno::NODEV, false),
        (Reason::Reconfiguring, Errno::AGAIN, true),
    ];
    assert_eq!(table.map(|(reason, ..)| reason), Reason::ALL);
    for (reason, errno, passing) in table {
        assert_eq!((reason.errno(), reason.is_passing()), (errno, passing), "{reason}");
    }
}

/// spec: GATE-4
#[test]
fn nothing_enters_before_the_device_is_bound() {
    let gate = Gate::new(Reason::NotBound);
    assert_eq!(gate.enter(Class::Control).unwrap_err().reason, Reason::NotBound);
    assert_eq!(gate.enter_until(Class::Memory, soon).unwrap_err().reason, Reason::NotBound);
}

#[test]
fn each_lasting_reason_refuses_with_itself_and_at_once() {
    for reason in [Reason::NotBound, Reason::Suspended, Reason::MemoryDisabled, Reason::Stopped] {
        let gate = open();
        let turn = gate.close(Reason::StateArc, soon()).unwrap();
        turn.release(Standing { everything: Some(reason), memory: None });
        assert_eq!(gate.enter_until(Class::Control, soon).unwrap_err().reason, reason);
        gate.close(Reason::StateArc, soon()).unwrap().release(Standing { everything: None, memory: Some(reason) });
        assert_eq!(gate.enter_until(Class::Memory, soon).unwrap_err().reason, reason);
        assert!(gate.enter(Class::Control).is_ok());
        assert_eq!((gate.closed(Class::Control), gate.closed(Class::Memory)), (None, Some(reason)));
    }
}

/// spec: GATE-5
#[test]
fn a_drain_that_times_out_fails_the_gate_for_good() {
    let gate = Arc::new(open());
    let (entered, wait_entered) = mpsc::channel();
    let (let_go, wait_let_go) = mpsc::channel::<()>();
    let other = gate.clone();
    let holder = thread::spawn(move || {
        let _pass = other.enter(Class::Memory).unwrap();
        entered.send(()).unwrap();
        wait_let_go.recv().unwrap();
    });
    wait_entered.recv().unwrap();
    let refused = gate.close(Reason::Resetting, Instant::now() + Duration::from_millis(5));
    assert_eq!(refused.unwrap_err(), CloseError::DrainTimeout);
    assert_eq!(gate.enter(Class::Control).unwrap_err().reason, Reason::Failed);
    let_go.send(()).unwrap();
    holder.join().unwrap();
    assert!(matches!(gate.close(Reason::Resetting, soon()), Err(CloseError::Gone(_))));
    // Tearing down is still possible, and is the last thing that is.
    let turn = gate.close(Reason::Closed, soon()).unwrap();
    turn.release(Standing { everything: Some(Reason::Closed), memory: None });
    assert_eq!(gate.enter(Class::Control).unwrap_err().reason, Reason::Closed);
    assert!(matches!(gate.close(Reason::Closed, soon()), Err(CloseError::Gone(_))));
}

fn has_own_slot() -> bool {
    thread_index::current() < thread_index::OWN_SLOTS
}

#[test]
fn a_closer_does_not_wait_for_its_own_pass() {
    let gate = open();
    let pass = gate.enter(Class::Control).unwrap();
    if !has_own_slot() {
        // Other tests of this process have taken every slot: then it is their pass as much as ours.
        return;
    }
    assert!(gate.is_held());
    assert_eq!(gate.close(Reason::Resetting, soon()).unwrap_err(), CloseError::Held);
    let nested = gate.enter(Class::Control).unwrap();
    drop(pass);
    assert_eq!(gate.close(Reason::Resetting, soon()).unwrap_err(), CloseError::Held);
    drop(nested);
    gate.close(Reason::Resetting, soon()).unwrap().release(Standing::OPEN);
}

#[test]
fn a_second_closer_waits_its_turn_and_gives_up_at_its_deadline() {
    let gate = open();
    let turn = gate.close(Reason::StateArc, soon()).unwrap();
    assert_eq!(gate.close(Reason::Resetting, Instant::now()).unwrap_err(), CloseError::Busy);
    turn.release(Standing::OPEN);
    assert!(gate.enter(Class::Memory).is_ok());
}

/// spec: GATE-7
#[test]
fn a_close_that_may_be_left_undone_leaves_the_gate_as_it_was() {
    for standing in [Standing::OPEN, Standing { everything: None, memory: Some(Reason::MemoryDisabled) }] {
        let gate = open();
        gate.close(Reason::Resetting, soon()).unwrap().release(standing);
        let pass = gate.enter(Class::Control).unwrap();
        thread::scope(|scope| {
            let closer = scope.spawn(|| gate.close_or_leave(Reason::Reconfiguring, Instant::now()).unwrap_err());
            assert_eq!(closer.join().unwrap(), CloseError::Busy);
        });
        assert_eq!((gate.closed(Class::Control), gate.closed(Class::Memory)), (None, standing.memory));
        drop(pass);
        gate.close_or_leave(Reason::Reconfiguring, soon()).unwrap().release(Standing::OPEN);
        assert_eq!(gate.closed(Class::Memory), None);
    }
    // What failed meanwhile stays failed.
    let gate = open();
    let pass = gate.enter(Class::Control).unwrap();
    gate.fail();
    thread::scope(|scope| {
        let closer = scope.spawn(|| gate.close_or_leave(Reason::Reconfiguring, soon()).unwrap_err());
        assert!(matches!(closer.join().unwrap(), CloseError::Gone(_)));
    });
    drop(pass);
    assert_eq!(gate.closed(Class::Control), Some(Reason::Failed));
}

#[test]
fn a_waiting_access_gets_the_passing_reason_at_its_deadline() {
    let gate = open();
    let turn = gate.close(Reason::TableSwap, soon()).unwrap();
    let refused = gate.enter_until(Class::Memory, Instant::now).unwrap_err();
    assert_eq!(refused.reason, Reason::TableSwap);
    turn.release(Standing::OPEN);
}

#[test]
fn a_turn_dropped_without_release_fails_the_gate() {
    let gate = open();
    drop(gate.close(Reason::StateArc, soon()).unwrap());
    assert_eq!(gate.enter(Class::Control).unwrap_err().reason, Reason::Failed);
}

#[test]
fn a_failure_during_a_turn_outlasts_it() {
    let gate = open();
    let turn = gate.close(Reason::StateArc, soon()).unwrap();
    gate.fail();
    turn.release(Standing::OPEN);
    assert_eq!(gate.enter(Class::Control).unwrap_err().reason, Reason::Failed);
}

#[test]
fn attention_stays_raised_across_a_turn_until_it_is_taken() {
    let gate = open();
    assert!(!gate.take_attention());
    gate.raise_attention();
    gate.close(Reason::StateArc, soon()).unwrap().release(Standing::OPEN);
    assert!(gate.wants_attention());
    assert!(gate.enter(Class::Memory).is_ok());
    assert!(gate.take_attention());
    assert!(!gate.wants_attention());
}

/// More threads than slots, half of the time in the overflow slot; each turn asserts that it is alone.
///
/// spec: GATE-1 GATE-2
#[test]
fn no_pass_is_in_flight_during_a_turn_with_more_threads_than_slots() {
    let gate = Arc::new(open());
    let inside = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..OWN_SLOTS + 8)
        .map(|_| {
            let (gate, inside, done) = (gate.clone(), inside.clone(), done.clone());
            thread::spawn(move || {
                let mut entered = 0u64;
                while !done.load(Ordering::Relaxed) {
                    if let Ok(_pass) = gate.enter_until(Class::Memory, soon) {
                        inside.fetch_add(1, Ordering::Relaxed);
                        entered += 1;
                        inside.fetch_sub(1, Ordering::Relaxed);
                    }
                    thread::yield_now();
                }
                entered
            })
        })
        .collect();
    for _ in 0..300 {
        let turn = gate.close(Reason::TableSwap, soon()).unwrap();
        for _ in 0..3 {
            assert_eq!(inside.load(Ordering::Relaxed), 0);
            thread::yield_now();
        }
        turn.release(Standing::OPEN);
    }
    done.store(true, Ordering::Relaxed);
    let entered: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert!(entered > 0);
}

/// The quick way in answers as the other does, and a refusal leaves nothing behind that a closer would wait for.
#[test]
fn the_quick_way_in_keeps_the_gates_promise() {
    let gate = open();
    // Where this thread has no slot of its own, or the kernel no fence, there is no quick way, which is always right.
    let offered = gate.enter_quickly(Class::Memory).is_some();
    assert_eq!(offered, thread_index::current() < gate.quick);
    let turn = gate.close(Reason::StateArc, soon()).unwrap();
    assert!(gate.enter_quickly(Class::Control).is_none());
    turn.release(Standing { everything: None, memory: Some(Reason::MemoryDisabled) });
    assert!(gate.enter_quickly(Class::Memory).is_none() && !gate.is_held());
    assert_eq!(gate.enter_quickly(Class::Control).is_some(), offered);
    gate.close(Reason::StateArc, Instant::now()).unwrap().release(Standing::OPEN);
    if let Some(pass) = gate.enter_quickly(Class::Memory) {
        assert!(gate.is_held());
        assert_eq!(gate.close(Reason::Resetting, soon()).unwrap_err(), CloseError::Held);
        gate.raise_attention();
        assert!(pass.leave() && !gate.is_held());
    }
}

/// As where membarrier is refused: every thread fences.
#[test]
fn without_the_quick_way_the_gate_works_the_same() {
    let mut gate = open();
    gate.quick = 0;
    assert!(gate.enter_quickly(Class::Memory).is_none());
    let pass = gate.enter(Class::Memory).unwrap();
    // A thread that shares the overflow slot cannot know that the pass in it is its own.
    if has_own_slot() {
        assert_eq!(gate.close(Reason::Resetting, soon()).unwrap_err(), CloseError::Held);
    }
    assert!(!pass.leave());
    gate.close(Reason::Resetting, Instant::now()).unwrap().release(Standing::OPEN);
}
