//! Interleavings of registration, opens and unregistration, over the real protocol. The member's own flags are relaxed, so
//! that only the roster orders what the calls see.

use std::time::{Duration, Instant};

use loom::sync::Arc as LoomArc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use super::*;

/// What a plug-in would notice.
#[derive(Debug, Default)]
struct Life {
    /// Set by its init
    ready: AtomicU32,
    retired: AtomicU32,
    open: AtomicU32,
    /// Set by who registers it, once its place is taken
    begun: AtomicU32,
    /// Set by who withdrew it, afterwards
    withdrawn: AtomicU32,
}

#[derive(Debug, Clone)]
struct Fake(LoomArc<Life>);

impl Fake {
    fn init() -> Self {
        let [ready, retired, open, begun, withdrawn] = std::array::from_fn(|_| AtomicU32::new(0));
        let life = LoomArc::new(Life { ready, retired, open, begun, withdrawn });
        life.ready.store(1, Ordering::Relaxed);
        Self(life)
    }

    fn call(&self) {
        assert_eq!(self.0.ready.load(Ordering::Relaxed), 1, "called before its init was done");
        assert_eq!(self.0.retired.load(Ordering::Relaxed), 0, "called after it was retired");
    }
}

impl Member for Fake {
    fn retire(&self) {
        self.call();
        assert_eq!(self.0.open.load(Ordering::Relaxed), 0, "retired while a device was open");
        self.0.retired.store(1, Ordering::Relaxed);
    }
}

type Fakes = Roster<u32, Fake>;

fn some_day() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

fn registered() -> (Arc<Fakes>, PluginId, Fake) {
    let (roster, fake) = (Fakes::new(), Fake::init());
    let id = roster.reserve(Arc::new(1), u32::eq).unwrap();
    roster.publish(id, fake.clone()).unwrap();
    (roster, id, fake)
}

/// As the registry opens a device: look, hold, probe, seat, open, use, close.
fn open(roster: &Arc<Fakes>, limit: u32) -> Option<Hold<u32, Fake>> {
    for entry in roster.survey().ok()? {
        if entry.standing != Standing::Published {
            continue;
        }
        if let Some(hold) = roster.hold(entry.id, "device").and_then(|hold| taken(hold, limit)) {
            return Some(hold);
        }
    }
    None
}

fn taken(hold: Hold<u32, Fake>, limit: u32) -> Option<Hold<u32, Fake>> {
    hold.member().call();
    let withdrawn = hold.member().0.withdrawn.load(Ordering::Acquire);
    hold.seat(limit).ok()?;
    assert_eq!(withdrawn, 0, "given away after its withdrawal");
    hold.member().0.open.fetch_add(1, Ordering::Relaxed);
    Some(hold)
}

fn close(hold: Hold<u32, Fake>) {
    hold.member().call();
    hold.member().0.open.fetch_sub(1, Ordering::Relaxed);
}

/// spec: REG-1
#[test]
fn loom_an_open_during_registration_sees_all_or_nothing() {
    loom::model(|| {
        let roster = Fakes::new();
        let registering = Arc::clone(&roster);
        let thread = thread::spawn(move || {
            let id = registering.reserve(Arc::new(1), u32::eq).unwrap();
            registering.publish(id, Fake::init()).unwrap();
        });
        for entry in roster.survey().unwrap() {
            if entry.standing == Standing::Published {
                // Nobody withdraws it here: who sees it can have it, and what its init did.
                close(taken(roster.hold(entry.id, "device").expect("visible and not there"), 1).unwrap());
            }
        }
        thread.join().unwrap();
        close(open(&roster, 1).expect("it is registered by now"));
    });
}

/// spec: REG-8 REG-9
#[test]
fn loom_the_last_of_closers_and_unregistration_retires_once_and_nothing_runs_afterwards() {
    // All interleavings take minutes; those of five preemptions take seconds.
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(5);
    bounded.check(|| {
        let (roster, id, fake) = registered();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let roster = Arc::clone(&roster);
                thread::spawn(move || {
                    if let Some(hold) = open(&roster, 2) {
                        close(hold);
                    }
                })
            })
            .collect();
        assert!(roster.withdraw(id));
        fake.0.withdrawn.store(1, Ordering::Release);
        roster.wait_gone(id, some_day()).unwrap();
        assert_eq!(fake.0.retired.load(Ordering::Relaxed), 1, "waiting ended before it was retired");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(roster.list().is_empty());
    });
}

/// spec: REG-6
#[test]
fn loom_the_limit_holds_however_opens_race() {
    loom::model(|| {
        let (roster, _, fake) = registered();
        let other = Arc::clone(&roster);
        let one = move |roster: &Arc<Fakes>| {
            if let Some(hold) = open(roster, 1) {
                assert_eq!(hold.member().0.open.load(Ordering::Relaxed), 1, "two devices under a limit of one");
                close(hold);
            }
        };
        let thread = thread::spawn(move || one(&other));
        one(&roster);
        thread.join().unwrap();
        assert_eq!(fake.0.open.load(Ordering::Relaxed), 0);
        close(open(&roster, 1).expect("the count is refunded"));
    });
}

/// spec: REG-11
#[test]
fn loom_shutting_down_waits_for_a_registration_that_had_begun() {
    loom::model(|| {
        let (roster, fake) = (Fakes::new(), Fake::init());
        let (registering, member) = (Arc::clone(&roster), fake.clone());
        let thread = thread::spawn(move || match registering.reserve(Arc::new(1), u32::eq) {
            Ok(id) => {
                member.0.begun.store(1, Ordering::Relaxed);
                let _known = registering.publish(id, member);
            }
            Err(refused) => assert_eq!(refused, Refused::Closed),
        });
        for id in roster.close() {
            assert!(roster.withdraw(id));
        }
        roster.wait_empty(some_day()).unwrap();
        let [begun, retired] = [&fake.0.begun, &fake.0.retired].map(|flag| flag.load(Ordering::Relaxed));
        assert_eq!(begun, retired, "it outlived the shutdown");
        assert!(roster.list().is_empty());
        thread.join().unwrap();
    });
}
