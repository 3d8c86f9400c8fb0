//! A guest inside the host's own process: for embedders, for the demo, for tests.
//!
//! **Owns** the pause gate of the guest's threads and the watch over what they store. **Must never** let a guest thread
//! run past a checkpoint while the guest is paused, nor let `pause` return while one does.
//!
//! ```text
//!  RUNNING -- pause --> PAUSING -- last thread parked or gone --> PAUSED -- resume --> RUNNING
//!                          +-- deadline passed: back to RUNNING, all of them --+
//! ```
//! Locks: `threads`, over the counts, never held while guest code, a device or memory is touched, and not taken at a
//! checkpoint of a guest that runs; `dirt`, over the watch, held while it is read. Neither is taken under the other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::device::{IrqAction, IrqData, IrqSet};
use crate::mediation::{MediatedDevice, MediationError, VmmError, VmmPort};
use crate::memory::{AddressSpace, CpuDirt, DirtyLog};
use crate::sys::EventFd;
use std::os::fd::AsFd;

#[derive(Debug, Default)]
struct Threads {
    paused: bool,
    /// Guest threads that exist
    attached: u32,
    /// Of those, the ones that wait at a checkpoint
    parked: u32,
    /// The guest is not to run again: checkpoints answer false
    ended: bool,
}

/// The machine that a guest in this process runs on.
pub struct InProcess {
    memory: Arc<AddressSpace>,
    threads: Mutex<Threads>,
    /// Paused or ended, as `threads` has it: what a checkpoint looks at first, so that a running guest takes no lock
    halted: AtomicBool,
    changed: Condvar,
    dirt: Mutex<Option<CpuDirt>>,
}

impl std::fmt::Debug for InProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InProcess").field("threads", &*lock(&self.threads)).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl InProcess {
    /// A machine whose guest is paused until [`VmmPort::resume`].
    pub fn paused(memory: Arc<AddressSpace>) -> Arc<Self> {
        let threads = Threads { paused: true, ..Threads::default() };
        Arc::new(Self {
            memory,
            threads: Mutex::new(threads),
            halted: AtomicBool::new(true),
            changed: Condvar::new(),
            dirt: Mutex::new(None),
        })
    }

    pub fn memory(&self) -> &Arc<AddressSpace> {
        &self.memory
    }

    /// A guest thread begins. It must call [`GuestThread::checkpoint`] before it touches anything.
    pub fn attach(self: &Arc<Self>) -> GuestThread {
        lock(&self.threads).attached += 1;
        GuestThread { machine: Arc::clone(self) }
    }

    /// Ends the guest: every checkpoint answers false from now on, also those that wait.
    pub fn end(&self) {
        let mut threads = lock(&self.threads);
        threads.ended = true;
        self.publish(&threads);
        drop(threads);
        self.changed.notify_all();
    }

    /// Under the lock, after a change. Release: whoever sees a guest that runs sees all that was done while it did not.
    fn publish(&self, threads: &Threads) {
        self.halted.store(threads.paused || threads.ended, Ordering::Release);
    }

    pub fn is_paused(&self) -> bool {
        let threads = lock(&self.threads);
        threads.paused && threads.parked == threads.attached
    }
}

/// One thread of the guest. Dropped, the guest has one fewer.
#[derive(Debug)]
pub struct GuestThread {
    machine: Arc<InProcess>,
}

impl GuestThread {
    /// Waits while the guest is paused. Between two checkpoints the guest cannot be paused: keep it short. False: the
    /// guest has ended, and this thread must touch nothing any more.
    pub fn checkpoint(&self) -> bool {
        // A thread that looks too early is waited for by `pause` until its next checkpoint.
        if !self.machine.halted.load(Ordering::Acquire) {
            return true;
        }
        Parked::new(&self.machine).leave()
    }

    /// Does something that touches neither the guest's memory nor its devices, such as a wait for an interrupt: the guest
    /// may be paused, and even move, meanwhile. Afterwards as [`Self::checkpoint`].
    pub fn idle<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let parked = Parked::new(&self.machine);
        let done = work();
        parked.leave().then_some(done)
    }

    pub fn machine(&self) -> &Arc<InProcess> {
        &self.machine
    }
}

/// A thread that counts as waiting.
struct Parked<'a>(&'a InProcess);

impl<'a> Parked<'a> {
    fn new(machine: &'a InProcess) -> Self {
        lock(&machine.threads).parked += 1;
        machine.changed.notify_all();
        Self(machine)
    }

    /// Waits while the guest is paused. Counting as running again and finding it not paused are one step: a pause that
    /// came in between would have counted this thread as waiting. False: the guest has ended.
    fn leave(self) -> bool {
        let mut threads = lock(&self.0.threads);
        while threads.paused && !threads.ended {
            threads = self.0.changed.wait(threads).unwrap_or_else(PoisonError::into_inner);
        }
        threads.parked -= 1;
        let ended = threads.ended;
        drop(threads);
        std::mem::forget(self);
        !ended
    }
}

impl Drop for Parked<'_> {
    /// The work panicked: its thread is about to go.
    fn drop(&mut self) {
        lock(&self.0.threads).parked -= 1;
    }
}

impl Drop for GuestThread {
    fn drop(&mut self) {
        lock(&self.machine.threads).attached -= 1;
        self.machine.changed.notify_all();
    }
}

impl VmmPort for InProcess {
    fn pause(&self, deadline: Instant) -> Result<(), VmmError> {
        let mut threads = lock(&self.threads);
        let before = threads.paused;
        threads.paused = true;
        self.publish(&threads);
        // Threads of a guest that has ended go instead of parking; until they have gone they may be in a step.
        while threads.parked < threads.attached {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                threads.paused = before;
                self.publish(&threads);
                let running = threads.attached - threads.parked;
                self.changed.notify_all();
                let what = format!("{running} guest threads did not come to a checkpoint in time");
                return Err(VmmError { what, errno: Errno::TIMEDOUT });
            }
            threads = self.changed.wait_timeout(threads, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        let mut threads = lock(&self.threads);
        threads.paused = false;
        self.publish(&threads);
        drop(threads);
        self.changed.notify_all();
        Ok(())
    }

    fn start_cpu_dirt(&self) -> Result<(), VmmError> {
        let failed = |error: crate::memory::MemoryError| VmmError {
            what: format!("watching what the guest stores: {error}"),
            errno: error.errno(),
        };
        let dirt = self.memory.own_ram().and_then(|ram| CpuDirt::new(Arc::clone(ram.mapping()))).map_err(failed)?;
        dirt.arm().map_err(failed)?;
        *lock(&self.dirt) = Some(dirt);
        Ok(())
    }

    fn sync_cpu_dirt(&self, log: &DirtyLog) -> Result<(), VmmError> {
        let dirt = lock(&self.dirt);
        let Some(dirt) = dirt.as_ref() else {
            let what = "nobody watches what the guest stores".to_owned();
            return Err(VmmError { what, errno: Errno::INVAL });
        };
        dirt.collect(log, 0)
            .map_err(|error| VmmError { what: format!("reading what the guest stored: {error}"), errno: error.errno() })
    }

    fn stop_cpu_dirt(&self) {
        lock(&self.dirt).take();
    }
}

/// One interrupt vector of a device, as an eventfd of the guest's.
#[derive(Debug)]
pub struct IrqLine {
    event: EventFd,
}

impl IrqLine {
    /// Connects a vector: from now on the device signals this line.
    pub fn connect(device: &MediatedDevice, index: u32, vector: u32) -> Result<Self, MediationError> {
        let event = EventFd::new()
            .map_err(|errno| MediationError::Refused { what: "an eventfd for the guest".to_owned(), errno })?;
        let fds = [Some(event.as_fd())];
        device.set_irqs(&IrqSet {
            index,
            start: vector,
            count: 1,
            action: IrqAction::Trigger,
            data: IrqData::EventFd(&fds),
        })?;
        Ok(Self { event })
    }

    /// Waits until the vector fires, at most `patience`; takes it. How often it fired since. Not for
    /// [`GuestThread::idle`]: an interrupt that is taken while the guest moves is lost.
    pub fn wait(&self, patience: Duration) -> Result<u64, Errno> {
        self.event.wait(Instant::now() + patience)
    }

    /// Waits until the vector has fired, at most `patience`, and takes nothing: for [`GuestThread::idle`].
    pub fn wait_pending(&self, patience: Duration) -> Result<bool, Errno> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            match poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&timeout)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Takes what has fired, without waiting.
    pub fn take(&self) -> Result<u64, Errno> {
        self.event.read()
    }

    /// Fires it once more, as a guest that arrived may want: what was pending at the source and had not been taken is not in
    /// its memory. An interrupt may be repeated; it must not be lost.
    pub fn repeat(&self) -> Result<(), Errno> {
        self.event.signal(1)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::memory::{GuestRam, PAGE_SIZE};

    fn machine() -> Arc<InProcess> {
        InProcess::paused(AddressSpace::new(GuestRam::new(4 * PAGE_SIZE).unwrap()))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// spec: GUEST-1
    #[test]
    fn no_thread_runs_between_pause_and_resume() {
        let machine = machine();
        let steps = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (thread, steps) = (machine.attach(), Arc::clone(&steps));
                std::thread::spawn(move || {
                    while thread.checkpoint() {
                        steps.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        for _ in 0..100 {
            machine.resume().unwrap();
            let before = steps.load(Ordering::SeqCst);
            while steps.load(Ordering::SeqCst) < before + 3 {
                std::thread::yield_now();
            }
            machine.pause(soon()).unwrap();
            let stopped = steps.load(Ordering::SeqCst);
            assert!(machine.is_paused());
            for _ in 0..10 {
                std::thread::yield_now();
            }
            assert_eq!(steps.load(Ordering::SeqCst), stopped);
        }
        machine.end();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    /// spec: GUEST-2
    #[test]
    fn a_pause_that_comes_too_late_leaves_every_thread_running() {
        let machine = machine();
        machine.resume().unwrap();
        let stubborn = machine.attach();
        let error = machine.pause(Instant::now()).unwrap_err();
        assert_eq!(error.errno, Errno::TIMEDOUT);
        assert!(stubborn.checkpoint(), "runs on without waiting");
    }

    /// spec: GUEST-1
    #[test]
    fn a_thread_of_an_ended_guest_is_waited_for_until_it_is_gone() {
        let machine = machine();
        machine.resume().unwrap();
        let busy = machine.attach();
        machine.end();
        assert_eq!(machine.pause(Instant::now()).unwrap_err().errno, Errno::TIMEDOUT);
        drop(busy);
        machine.pause(soon()).unwrap();
    }

    #[test]
    fn a_thread_that_has_gone_is_not_waited_for() {
        let machine = machine();
        machine.resume().unwrap();
        drop(machine.attach());
        machine.pause(soon()).unwrap();
    }

    /// spec: GUEST-4
    #[test]
    fn an_idle_thread_does_not_hold_up_a_pause_and_does_not_run_after_it() {
        let machine = machine();
        machine.resume().unwrap();
        let (wake, woken) = std::sync::mpsc::channel::<()>();
        let ran = Arc::new(AtomicU64::new(0));
        let idle = {
            let (thread, ran) = (machine.attach(), Arc::clone(&ran));
            std::thread::spawn(move || {
                let slept = thread.idle(|| woken.recv().is_ok());
                ran.fetch_add(1, Ordering::SeqCst);
                slept
            })
        };
        machine.pause(soon()).unwrap();
        wake.send(()).unwrap();
        for _ in 0..100 {
            std::thread::yield_now();
        }
        assert!(machine.is_paused());
        assert_eq!(ran.load(Ordering::SeqCst), 0, "awake, and not running");
        machine.resume().unwrap();
        assert_eq!(idle.join().unwrap(), Some(true));
    }

    #[test]
    fn a_pause_waits_for_the_threads_of_a_guest_that_has_ended() {
        let machine = machine();
        machine.resume().unwrap();
        let thread = machine.attach();
        machine.end();
        assert!(machine.pause(Instant::now()).is_err(), "it may still be in a step");
        assert!(!thread.checkpoint() && thread.idle(|| ()).is_none());
        drop(thread);
        machine.pause(soon()).unwrap();
    }

    /// spec: GUEST-3
    #[test]
    fn stores_of_guest_threads_are_seen_and_unwatched_memory_is_an_error() {
        let machine = machine();
        let log = DirtyLog::new(4);
        log.start();
        log.drain().commit();
        assert!(machine.sync_cpu_dirt(&log).is_err(), "nobody watches");
        if let Err(why) = CpuDirt::supported() {
            // The kernel's word decides; then the host refuses to copy memory, which has its own test.
            assert!(machine.start_cpu_dirt().is_err(), "{why}");
            return;
        }
        machine.start_cpu_dirt().unwrap();
        machine.memory().ram().unwrap().mapping().fill(2 * PAGE_SIZE, 1, 7).unwrap();
        machine.sync_cpu_dirt(&log).unwrap();
        assert_eq!(log.drain().words(), [0b100]);
        machine.stop_cpu_dirt();
    }
}
