//! The models' time: the machine's, with a timer thread per device, or a clock that tests turn.

use std::fmt::Debug;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::device::{Clock, RealClock};

/// Which time a model lives in.
#[derive(Debug, Clone)]
pub enum Time {
    /// The machine's monotonic clock; completions come from a thread of the device, never early.
    Real,
    /// A clock that stands still unless somebody turns it. Devices may share one.
    Virtual(Arc<VirtualClock>),
}

impl Time {
    pub(super) fn clock(&self) -> &dyn Clock {
        match self {
            Self::Real => &RealClock,
            Self::Virtual(clock) => &**clock,
        }
    }
}

/// Something with events in the future.
pub(super) trait Tick: Send + Sync {
    /// When the next event is due.
    fn next_due(&self) -> Option<Duration>;

    /// Performs what is due by `now`.
    fn tick(&self, now: Duration);
}

/// A clock that begins at 0 and moves only when it is turned.
#[derive(Default)]
pub struct VirtualClock {
    /// Held by whoever turns the clock, so that events happen one at a time and in order.
    turn: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    now: Duration,
    listeners: Vec<Weak<dyn Tick>>,
}

impl VirtualClock {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Moves time forward by `duration`. Every event that becomes due happens on this thread, at its own time, in the order
    /// of time and then of the devices' creation; all of them have happened when this returns.
    pub fn advance(&self, duration: Duration) {
        let target = self.state().now.saturating_add(duration);
        self.advance_to(target);
    }

    fn advance_to(&self, target: Duration) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let listeners: Vec<Arc<dyn Tick>> = {
                let mut state = self.state();
                state.listeners.retain(|listener| listener.strong_count() > 0);
                state.listeners.iter().filter_map(Weak::upgrade).collect()
            };
            let due = listeners.iter().filter_map(|listener| Some((listener.next_due()?, listener)));
            // `min_by_key` gives the first of several minima.
            let Some((due, listener)) = due.min_by_key(|(due, _)| *due).filter(|(due, _)| *due <= target) else {
                break;
            };
            let now = {
                let mut state = self.state();
                state.now = state.now.max(due);
                state.now
            };
            listener.tick(now);
        }
        let mut state = self.state();
        state.now = state.now.max(target);
    }

    pub(super) fn listen(&self, listener: Weak<dyn Tick>) {
        self.state().listeners.push(listener);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Debug for VirtualClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtualClock").field("now", &self.state().now).finish_non_exhaustive()
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        self.state().now
    }

    fn wait(&self, duration: Duration) {
        self.advance(duration);
    }
}

/// Makes a device's events happen: by a thread in real time, by the clock's turning otherwise. Dropped, it stops.
#[derive(Debug)]
pub(super) struct Alarm {
    thread: Option<(Arc<Bell>, JoinHandle<()>)>,
}

#[derive(Debug, Default)]
struct Bell {
    state: Mutex<Ring>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct Ring {
    again: bool,
    stop: bool,
}

impl Alarm {
    pub(super) fn new(time: &Time, name: &str, target: Arc<dyn Tick>) -> std::io::Result<Self> {
        match time {
            Time::Virtual(clock) => {
                clock.listen(Arc::downgrade(&target));
                Ok(Self { thread: None })
            }
            Time::Real => {
                let bell = Arc::new(Bell::default());
                let ours = Arc::clone(&bell);
                let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || ours.run(&*target))?;
                Ok(Self { thread: Some((bell, thread)) })
            }
        }
    }

    /// Says that `next_due` may have changed. Not to be called with the device's lock held.
    pub(super) fn ring(&self) {
        if let Some((bell, _)) = &self.thread {
            bell.set(|ring| ring.again = true);
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if let Some((bell, thread)) = self.thread.take() {
            bell.set(|ring| ring.stop = true);
            // A panic of the thread has been reported where it happened.
            let _finished = thread.join();
        }
    }
}

impl Bell {
    fn set(&self, change: impl FnOnce(&mut Ring)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.rung.notify_one();
    }

    fn run(&self, target: &dyn Tick) {
        let mut ring = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !ring.stop {
            ring.again = false;
            drop(ring);
            let now = RealClock.now();
            let due = target.next_due();
            if due.is_some_and(|due| due <= now) {
                target.tick(now);
            }
            ring = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            // Whatever was armed since `next_due` was asked has rung, or will.
            ring = match due.map(|due| due.saturating_sub(now)) {
                _ if ring.again || ring.stop => ring,
                Some(Duration::ZERO) => ring,
                Some(left) => self.rung.wait_timeout(ring, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.rung.wait(ring).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}
