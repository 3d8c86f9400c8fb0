//! Models of the gate's protocol, over the real code. The kernel's barrier is modelled by `fence(SeqCst)` on both sides,
//! since loom treats `SeqCst` accesses as `AcqRel`.
//!
//! An access and an exclusive turn each look for the other by relaxed loads; the run in which they meet fails.

use std::time::{Duration, Instant};

use loom::sync::Arc;
use loom::thread;

use super::*;

struct Modelled {
    gate: Gate,
    /// 1 while somebody has the device alone
    alone: AtomicU32,
    /// Accesses inside
    inside: AtomicU32,
}

fn open() -> Arc<Modelled> {
    let gate = Gate::new(Reason::NotBound);
    gate.state.store(0, Ordering::Release);
    Arc::new(Modelled { gate, alone: AtomicU32::new(0), inside: AtomicU32::new(0) })
}

/// loom has no time: a wait ends only when somebody wakes it.
fn some_day() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// Every load is relaxed, so that only the gate orders them.
fn touch(model: &Modelled) {
    model.inside.fetch_add(1, Ordering::Relaxed);
    assert_eq!(model.alone.load(Ordering::Relaxed), 0, "an access met an exclusive turn");
    model.inside.fetch_sub(1, Ordering::Relaxed);
}

fn touch_alone(model: &Modelled) {
    assert_eq!(model.alone.load(Ordering::Relaxed), 0, "two exclusive turns at once");
    model.alone.store(1, Ordering::Relaxed);
    assert_eq!(model.inside.load(Ordering::Relaxed), 0, "an exclusive turn met an access");
    model.alone.store(0, Ordering::Relaxed);
}

fn access(model: &Modelled, index: usize) -> bool {
    match model.gate.enter_at(index, Class::Memory) {
        Ok(_pass) => {
            touch(model);
            true
        }
        Err(_) => false,
    }
}

fn change(model: &Modelled, standing: Standing) {
    let turn = model.gate.close_as(Reason::Resetting, some_day(), Late::Fail).expect("a turn");
    touch_alone(model);
    turn.release(standing);
}

/// spec: GATE-1 GATE-2
#[test]
fn loom_gate_no_access_meets_an_exclusive_turn() {
    loom::model(|| {
        let model = open();
        let other = model.clone();
        let reader = thread::spawn(move || {
            access(&other, 0);
        });
        change(&model, Standing::OPEN);
        reader.join().unwrap();
        assert!(access(&model, 1));
    });
}

/// An access that takes the quick way, and goes the other way where that does not let it in: as the dispatcher does.
/// spec: GATE-1 GATE-2
#[test]
fn loom_gate_the_quick_way_in_meets_no_exclusive_turn() {
    loom::model(|| {
        let model = open();
        let other = model.clone();
        let reader = thread::spawn(move || match other.gate.enter_quickly_at(0, Class::Memory) {
            Some(pass) => {
                touch(&other);
                pass.leave();
            }
            None => _ = access(&other, 0),
        });
        change(&model, Standing::OPEN);
        reader.join().unwrap();
        assert!(model.gate.enter_quickly_at(OVERFLOW, Class::Memory).is_none(), "only slots of one's own are quick");
        assert!(model.gate.enter_quickly_at(1, Class::Memory).is_some());
    });
}

/// The shared slot keeps the same promise for two threads in it.
#[test]
fn loom_gate_overflow_slot_keeps_the_promise() {
    // Three threads: bounded, since the full search takes minutes.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let model = open();
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let other = model.clone();
                thread::spawn(move || {
                    access(&other, OVERFLOW);
                })
            })
            .collect();
        change(&model, Standing::OPEN);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

/// loom reports a deadlock when the leaver's wake-up is lost.
#[test]
fn loom_gate_the_last_leaver_wakes_the_closer() {
    loom::model(|| {
        let model = open();
        let pass = model.gate.enter_at(0, Class::Memory).unwrap();
        let other = model.clone();
        let closer = thread::spawn(move || change(&other, Standing::OPEN));
        touch(&model);
        drop(pass);
        closer.join().unwrap();
    });
}

#[test]
fn loom_gate_two_closers_take_turns() {
    loom::model(|| {
        let model = open();
        let other = model.clone();
        let closer = thread::spawn(move || change(&other, Standing::OPEN));
        change(&model, Standing::OPEN);
        closer.join().unwrap();
    });
}

#[test]
fn loom_gate_a_waiting_access_gets_in_when_the_turn_ends() {
    loom::model(|| {
        let model = open();
        let turn = model.gate.close_as(Reason::TableSwap, some_day(), Late::Fail).unwrap();
        let other = model.clone();
        let waiter = thread::spawn(move || {
            let pass = other.gate.enter_slow(0, Class::Memory, some_day());
            assert!(pass.is_ok());
            touch(&other);
        });
        touch_alone(&model);
        turn.release(Standing::OPEN);
        waiter.join().unwrap();
    });
}

/// A gate that stays closed after the turn lets nobody in, and nobody who was in is still there.
#[test]
fn loom_gate_disabled_memory_is_never_reached() {
    loom::model(|| {
        let model = open();
        let other = model.clone();
        let reader = thread::spawn(move || access(&other, 0));
        change(&model, Standing { everything: None, memory: Some(Reason::MemoryDisabled) });
        touch_alone(&model);
        reader.join().unwrap();
        assert!(!access(&model, 1));
        assert!(model.gate.enter_at(1, Class::Control).is_ok());
    });
}

/// Opening is many relaxed stores and one release; whoever is admitted has seen them all, whoever is not is refused with EINVAL.
/// spec: KVM-10 GATE-4
#[test]
fn loom_gate_no_access_before_the_bind_completes() {
    loom::model(|| {
        let gate = Gate::new(Reason::NotBound);
        let model = Arc::new(Modelled { gate, alone: AtomicU32::new(0), inside: AtomicU32::new(0) });
        let bound = Arc::new(AtomicU32::new(0));
        let (other, published) = (model.clone(), bound.clone());
        let reader = thread::spawn(move || match other.gate.enter_at(0, Class::Control) {
            Ok(_pass) => assert_eq!(published.load(Ordering::Relaxed), 1, "an access before the bind"),
            Err(closed) => assert_eq!(closed.reason.errno(), rustix::io::Errno::INVAL),
        });
        let turn = model.gate.close_as(Reason::NotBound, some_day(), Late::Fail).expect("a turn");
        bound.store(1, Ordering::Relaxed);
        turn.release(Standing::OPEN);
        reader.join().unwrap();
        assert!(access(&model, 1));
    });
}
