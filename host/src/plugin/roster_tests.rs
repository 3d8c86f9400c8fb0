//! The protocol step by step; its interleavings are in `roster_loom`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;

#[derive(Debug, Clone, Default)]
struct Fake(Arc<AtomicU32>);

impl Member for Fake {
    fn retire(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Fake {
    fn retired(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

type Fakes = Roster<u32, Fake>;

fn add(roster: &Fakes, card: u32) -> (PluginId, Fake) {
    let fake = Fake::default();
    let id = roster.reserve(Arc::new(card), u32::eq).unwrap();
    roster.publish(id, fake.clone()).unwrap();
    (id, fake)
}

fn now() -> Instant {
    Instant::now()
}

/// spec: REG-6
#[test]
fn the_limit_is_exact_counts_devices_only_and_is_refunded() {
    let roster = Fakes::new();
    let (id, _) = add(&roster, 1);
    let holds: Vec<_> = (0..4).map(|_| roster.hold(id, "device").unwrap()).collect();
    assert_eq!(holds[0].seat(0), Err(Unseated::Full));
    assert_eq!(holds[0].seat(2), Ok(()));
    assert_eq!(holds[1].seat(2), Ok(()));
    assert_eq!(holds[2].seat(2), Err(Unseated::Full));
    let mut holds = holds.into_iter();
    drop(holds.next());
    let [_, third, _] = <[_; 3]>::try_from(holds.collect::<Vec<_>>()).unwrap();
    assert_eq!(third.seat(2), Ok(()));
}

/// spec: REG-8 REG-9
#[test]
fn a_withdrawn_member_is_given_to_nobody_and_retires_with_its_last_hold() {
    let roster = Fakes::new();
    let (id, fake) = add(&roster, 1);
    let (device, probe) = (roster.hold(id, "device").unwrap(), roster.hold(id, "other").unwrap());
    device.seat(1).unwrap();
    assert!(roster.withdraw(id));
    assert!(roster.withdraw(id), "a second withdrawal changes nothing");
    assert!(roster.hold(id, "late").is_none());
    assert_eq!(probe.seat(8), Err(Unseated::Withdrawn));
    let (_, busy) = roster.wait_gone(id, now()).unwrap_err();
    assert_eq!(busy, Busy(vec!["device".into(), "a probe of other".into()]));
    drop(device);
    assert_eq!(fake.retired(), 0);
    drop(probe);
    assert_eq!(fake.retired(), 1);
    assert_eq!(roster.wait_gone(id, now()), Ok(()));
    assert!(roster.withdraw(id), "that it is gone is what was wanted");
    assert!(!Fakes::new().withdraw(id), "another roster's number");
}

/// spec: REG-2
#[test]
fn order_is_that_of_the_reservations_and_not_of_how_long_init_took() {
    let roster = Fakes::new();
    let slow = roster.reserve(Arc::new(1), u32::eq).unwrap();
    let (quick, _) = add(&roster, 2);
    let standings = |roster: &Fakes| roster.list().iter().map(|e| (e.id, e.standing)).collect::<Vec<_>>();
    assert_eq!(standings(&roster), [(slow, Standing::Registering), (quick, Standing::Published)]);
    assert!(roster.hold(slow, "device").is_none(), "nobody holds what is not published");
    roster.publish(slow, Fake::default()).unwrap();
    assert_eq!(standings(&roster), [(slow, Standing::Published), (quick, Standing::Published)]);
}

/// spec: REG-3
#[test]
fn a_card_is_taken_from_reservation_to_retirement() {
    let roster = Fakes::new();
    let same = || roster.reserve(Arc::new(1), u32::eq);
    let id = same().unwrap();
    assert_eq!(same(), Err(Refused::Duplicate));
    roster.abandon(id);
    let (id, _) = add(&roster, 1);
    let hold = roster.hold(id, "device").unwrap();
    assert!(roster.withdraw(id));
    assert_eq!(same(), Err(Refused::Duplicate), "it still drains");
    drop(hold);
    same().unwrap();
}

/// spec: REG-11
#[test]
fn a_closed_roster_waits_for_registrations_in_flight_and_keeps_none() {
    let roster = Fakes::new();
    let id = roster.reserve(Arc::new(7), u32::eq).unwrap();
    assert!(roster.close().is_empty());
    assert_eq!(roster.reserve(Arc::new(8), u32::eq), Err(Refused::Closed));
    assert!(roster.survey().is_err());
    let (card, busy) = roster.wait_empty(now() + Duration::from_millis(1)).unwrap_err();
    assert_eq!((*card, busy), (7, Busy(vec!["its own init".into()])));
    let fake = Fake::default();
    assert_eq!(roster.publish(id, fake.clone()), Err(Refused::Closed));
    assert_eq!(fake.retired(), 1);
    assert_eq!(roster.wait_empty(now()), Ok(()));
}
