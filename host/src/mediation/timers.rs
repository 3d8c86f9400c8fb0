//! One-shot timers of a plug-in, on its device's clock.
//!
//! **Owns** the cookies and the thread that waits for them, which begins with the first timer. **Must never** call out with
//! its lock held, nor turn a virtual clock: there a timer fires once somebody else has. Locks: `armed`, a leaf.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use crate::lock_order::lock;

/// Cookies of one device (`HostServices::timer_arm`).
pub const TIMERS_MAX: usize = 16;
/// How often a clock is looked at that does not move with the machine's.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Debug, Default)]
pub struct Timers {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Due times by cookie
    armed: BTreeMap<u64, Duration>,
    thread: Option<JoinHandle<()>>,
    stop: bool,
}

/// What a due timer's delivery came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    Done,
    /// Not possible just now
    Later,
}

impl Timers {
    /// Sets or moves `cookie`. `run` begins the thread when there is none: it gets [`Self::run`]'s loop as its body.
    pub fn arm(
        &self,
        cookie: u64,
        due: Duration,
        spawn: impl FnOnce() -> std::io::Result<JoinHandle<()>>,
    ) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        if !state.armed.contains_key(&cookie) && state.armed.len() >= TIMERS_MAX {
            return Err(Errno::NOSPC);
        }
        if state.stop {
            return Err(Errno::NODEV);
        }
        if state.thread.is_none() {
            state.thread = Some(spawn().map_err(|_| Errno::AGAIN)?);
        }
        state.armed.insert(cookie, due);
        self.changed.notify_all();
        Ok(())
    }

    /// Harmless when it is not armed.
    pub fn cancel(&self, cookie: u64) {
        lock(&self.state).armed.remove(&cookie);
    }

    /// The thread's body. `now` is the device's clock; `deliver` calls the plug-in.
    pub fn run(&self, now: impl Fn() -> Duration, deliver: impl Fn(u64) -> Delivery) {
        let mut state = lock(&self.state);
        while !state.stop {
            let next = state.armed.iter().min_by_key(|(_, due)| **due).map(|(cookie, due)| (*cookie, *due));
            let Some((cookie, due)) = next else {
                state = state.wait(&self.changed);
                continue;
            };
            // The clock is the device's: it is asked without the lock, and what was armed meanwhile is looked at next time.
            drop(state);
            let left = due.saturating_sub(now());
            state = lock(&self.state);
            if left > Duration::ZERO {
                state = state.wait_timeout(&self.changed, left.min(LOOK));
                continue;
            }
            // Cancelled or moved in between?
            if state.stop || state.armed.get(&cookie) != Some(&due) {
                continue;
            }
            state.armed.remove(&cookie);
            drop(state);
            let delivery = deliver(cookie);
            state = lock(&self.state);
            if delivery == Delivery::Later {
                state.armed.entry(cookie).or_insert(due);
                state = state.wait_timeout(&self.changed, LOOK);
            }
        }
    }

    /// Ends the thread and forgets every timer.
    pub fn stop(&self) {
        let mut state = lock(&self.state);
        state.stop = true;
        state.armed.clear();
        let thread = state.thread.take();
        drop(state);
        self.changed.notify_all();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the thread has been reported where it happened.
            let _finished = thread.join();
        }
    }
}

/// A thread over `timers`, for [`Timers::arm`].
pub fn spawn(
    timers: &Arc<Timers>,
    now: impl Fn() -> Duration + Send + 'static,
    deliver: impl Fn(u64) -> Delivery + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    let timers = Arc::clone(timers);
    std::thread::Builder::new().name("vfio-mediate-timer".to_owned()).spawn(move || timers.run(now, deliver))
}
