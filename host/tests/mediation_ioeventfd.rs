//! Ioeventfds: doorbells that are eventfds.

mod mediation_support;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::mediation::mediator::Verdict;
use vfio_mediate::mediation::{Kick, MediatedDevice};
use vfio_mediate::sys::EventFd;

fn kick(offset: u64) -> Kick {
    Kick { region: 0, offset, width: 4, value: 0x1122_3344 }
}

fn wait_for(what: impl Fn() -> bool) {
    let deadline = soon();
    while !what() {
        assert!(std::time::Instant::now() < deadline, "it does not come");
        thread::yield_now();
    }
}

fn toggle(mediated: &MediatedDevice, on: bool) {
    mediated.region_write(CONFIG, COMMAND, &[if on { 2 } else { 0 }, 0]).unwrap();
}

/// Until the thread has taken every signal.
fn is_taken(event: &EventFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(event, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).unwrap() == 0
}

/// spec: MEMEN-14
#[test]
fn a_kick_is_a_write_and_while_memory_is_disabled_it_is_nothing() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    let (event, other) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    mediated.set_ioeventfd(kick(8), Some(event.as_fd())).unwrap();
    event.signal(1).unwrap();
    wait_for(|| device.bar_writes.load(Ordering::SeqCst) == 1);
    assert_eq!(device.bar.lock().unwrap()[8..12], [0x44, 0x33, 0x22, 0x11]);
    for round in 1..=20 {
        toggle(&mediated, false);
        event.signal(1).unwrap();
        wait_for(|| is_taken(&event));
        toggle(&mediated, true);
        event.signal(1).unwrap();
        wait_for(|| device.bar_writes.load(Ordering::SeqCst) > round);
    }
    assert_eq!(device.bar_writes.load(Ordering::SeqCst), 21, "what was dropped does not come later");
    // The thread waits with a list in which it still is.
    for _ in 0..100 {
        mediated.set_ioeventfd(kick(8), None).unwrap();
        event.signal(1).unwrap();
        mediated.set_ioeventfd(kick(12), Some(other.as_fd())).unwrap();
        mediated.set_ioeventfd(kick(12), None).unwrap();
        assert_eq!(event.read().unwrap(), 1, "taken away, it is not waited for");
        mediated.set_ioeventfd(kick(8), Some(event.as_fd())).unwrap();
    }
    drop(mediated);
    event.signal(1).unwrap();
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(device.violations.load(Ordering::SeqCst), 0);
}

/// spec: MEMEN-14
#[test]
fn a_kick_goes_through_the_hooks() {
    let device = Arc::new(FakeDevice::new());
    let (seen, counted) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (value, count) = (seen.clone(), counted.clone());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 16)];
        script.write = Box::new(move |_, _, offset, data| {
            let word = u32::from_le_bytes(data.try_into().unwrap());
            value.store(u64::from(word) << 32 | offset, Ordering::SeqCst);
            count.fetch_add(1, Ordering::SeqCst);
            Verdict::Handled
        });
    })
    .unwrap();
    let event = EventFd::new().unwrap();
    mediated.set_ioeventfd(kick(8), Some(event.as_fd())).unwrap();
    event.signal(1).unwrap();
    wait_for(|| counted.load(Ordering::SeqCst) == 1);
    assert_eq!(seen.load(Ordering::SeqCst), 0x1122_3344 << 32 | 8);
    assert_eq!(device.bar_writes.load(Ordering::SeqCst), 0);
}

/// spec: MEMEN-15
#[test]
fn what_is_no_doorbell_is_refused() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    let event = EventFd::new().unwrap();
    let set = |kick| mediated.set_ioeventfd(kick, Some(event.as_fd())).map_err(|error| error.errno());
    for wrong in [
        Kick { width: 3, ..kick(0) },
        Kick { width: 0, ..kick(0) },
        Kick { offset: 2, ..kick(0) },
        Kick { offset: BAR, ..kick(0) },
        Kick { width: 8, offset: BAR - 4, ..kick(0) },
        Kick { offset: u64::MAX - 3, ..kick(0) },
        Kick { region: CONFIG, ..kick(0) },
        Kick { region: 9, ..kick(0) },
    ] {
        assert_eq!(set(wrong), Err(Errno::INVAL), "{wrong:?}");
    }
    let (read, _write) = rustix::pipe::pipe().unwrap();
    let pipe = mediated.set_ioeventfd(kick(0), Some(read.as_fd()));
    assert_eq!(pipe.unwrap_err().errno(), Errno::INVAL);
    assert_eq!(mediated.set_ioeventfd(kick(0), None).unwrap_err().errno(), Errno::NODEV);
    assert_eq!(set(kick(BAR - 4)), Ok(()));
    assert_eq!(set(kick(BAR - 4)), Err(Errno::EXIST));
    assert_eq!(set(Kick { value: 1, ..kick(BAR - 4) }), Ok(()));
    for number in 2..1000 {
        assert_eq!(set(Kick { value: number, ..kick(0) }), Ok(()));
    }
    assert_eq!(set(Kick { value: 1000, ..kick(0) }), Err(Errno::NOSPC));
}

/// spec: MEMEN-14
#[test]
fn kicks_against_memory_that_goes_on_and_off_never_arrive_while_it_is_off() {
    let device = Arc::new(FakeDevice { slow: true, ..FakeDevice::new() });
    let mediated = open_plain(&device);
    let event = EventFd::new().unwrap();
    mediated.set_ioeventfd(kick(0), Some(event.as_fd())).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                event.signal(1).unwrap();
                thread::yield_now();
            }
        });
        for _ in 0..200 {
            toggle(&mediated, false);
            mediated.reset().unwrap();
            toggle(&mediated, true);
            thread::yield_now();
        }
        wait_for(|| device.bar_writes.load(Ordering::SeqCst) > 0);
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(device.violations.load(Ordering::SeqCst), 0);
}
