//! The order of locks and rights, checked while debug builds run; in release builds every type here is empty and every
//! function nothing.
//!
//! **Owns** what this thread holds. **Must never** decide anything: a wrong order panics, and that is a defect of ours.
//! The order is that of `ARCHITECTURE.md`:
//!
//! * A *lock* is a leaf: under it neither a lock nor a right is taken, nor a pass asked for, nor anything called that is not
//!   ours (a device, a plug-in, an embedder), nor guest memory touched.
//! * A *right* may be held across such calls. Rights are taken in the order of [`Right`]; trying for one without waiting may be
//!   done in any order.
//! * Whoever has the device alone asks for no pass: it would wait for itself.
//!
//! Under loom nothing is checked: its threads are one thread of the machine.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What is waited for with a deadline, in the order in which it is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// One state, dirty or DMA operation at a time
    Lane,
    /// The device alone
    Turn,
    /// One event at a time
    Events,
}

#[cfg(all(debug_assertions, not(loom)))]
mod checked {
    use std::cell::RefCell;
    use std::marker::PhantomData;
    use std::panic::Location;

    use super::Right;

    #[derive(Debug, Clone, Copy)]
    struct Entry {
        id: u64,
        /// `None`: a lock
        right: Option<Right>,
        at: &'static Location<'static>,
    }

    #[derive(Debug, Default)]
    struct Thread {
        next: u64,
        held: Vec<Entry>,
    }

    thread_local! {
        static THREAD: RefCell<Thread> = RefCell::default();
    }

    /// Something that this thread holds, until it is dropped.
    #[derive(Debug)]
    pub struct Held {
        id: u64,
        not_send: PhantomData<*const ()>,
    }

    impl Drop for Held {
        fn drop(&mut self) {
            // Gone with the thread's other locals: then nobody asks any more.
            let _ = THREAD.try_with(|thread| thread.borrow_mut().held.retain(|entry| entry.id != self.id));
        }
    }

    /// The first thing held for which `wrong` holds, for a message.
    fn refuse(what: &str, at: &Location<'_>, wrong: impl Fn(Option<Right>) -> bool) {
        let found = THREAD.try_with(|thread| thread.borrow().held.iter().find(|entry| wrong(entry.right)).copied());
        // A second panic while one unwinds would end the process without its message.
        if let Ok(Some(entry)) = found
            && !std::thread::panicking()
        {
            let held = entry.right.map_or("a lock".to_owned(), |right| format!("the right {right:?}"));
            panic!("lock order: {what} at {at}, under {held} taken at {}", entry.at);
        }
    }

    fn push(right: Option<Right>, at: &'static Location<'static>) -> Held {
        let id = THREAD.try_with(|thread| {
            let mut thread = thread.borrow_mut();
            thread.next += 1;
            let id = thread.next;
            thread.held.push(Entry { id, right, at });
            id
        });
        Held { id: id.unwrap_or(0), not_send: PhantomData }
    }

    #[track_caller]
    pub fn leaf() -> Held {
        let at = Location::caller();
        refuse("a lock is taken", at, |held| held.is_none());
        push(None, at)
    }

    #[track_caller]
    pub fn right(right: Right) -> Held {
        let at = Location::caller();
        refuse(&format!("the right {right:?} is waited for"), at, |held| held.is_none_or(|held| held >= right));
        push(Some(right), at)
    }

    #[track_caller]
    pub fn tried(right: Right) -> Held {
        let at = Location::caller();
        refuse(&format!("the right {right:?} is tried for"), at, |held| held.is_none());
        push(Some(right), at)
    }

    #[track_caller]
    pub fn calling_out() {
        refuse("something is called that is not ours", Location::caller(), |held| held.is_none());
    }

    #[track_caller]
    pub fn entering() {
        let alone = |held: Option<Right>| held.is_none_or(|held| held == Right::Turn);
        refuse("a pass is asked for", Location::caller(), alone);
    }
}

#[cfg(not(all(debug_assertions, not(loom))))]
mod checked {
    use super::Right;

    #[derive(Debug)]
    pub struct Held;

    #[inline(always)]
    pub fn leaf() -> Held {
        Held
    }

    #[inline(always)]
    pub fn right(_right: Right) -> Held {
        Held
    }

    #[inline(always)]
    pub fn tried(_right: Right) -> Held {
        Held
    }

    #[inline(always)]
    pub fn calling_out() {}

    #[inline(always)]
    pub fn entering() {}
}

/// `leaf`: a lock is about to be taken. `right`: a right is about to be waited for; `tried`: it has been had without waiting.
/// `calling_out`: a device, a plug-in or an embedder is about to be called, or guest memory to be touched. `entering`: a pass
/// is about to be asked for.
pub use checked::{Held, calling_out, entering, leaf, right, tried};

/// A locked leaf.
#[derive(Debug)]
pub struct Guard<'a, T> {
    // Unlocked first.
    guard: MutexGuard<'a, T>,
    held: Held,
}

/// Locks a leaf. A poisoned lock's data are still whole: nothing that can panic runs under one.
#[track_caller]
#[inline]
pub fn lock<T>(mutex: &Mutex<T>) -> Guard<'_, T> {
    let held = leaf();
    Guard { guard: mutex.lock().unwrap_or_else(PoisonError::into_inner), held }
}

impl<T> Guard<'_, T> {
    /// Waits to be woken, unlocked meanwhile.
    pub fn wait(self, changed: &Condvar) -> Self {
        Self { guard: changed.wait(self.guard).unwrap_or_else(PoisonError::into_inner), held: self.held }
    }

    /// As [`Self::wait`], not longer than this.
    pub fn wait_timeout(self, changed: &Condvar, at_most: Duration) -> Self {
        let (guard, _) = changed.wait_timeout(self.guard, at_most).unwrap_or_else(PoisonError::into_inner);
        Self { guard, held: self.held }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(all(test, debug_assertions, not(loom)))]
mod tests {
    use super::*;

    fn panics(work: impl FnOnce()) -> String {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).expect_err("it must panic");
        caught.downcast_ref::<String>().expect("with a text").clone()
    }

    /// spec: MEMEN-20
    #[test]
    fn a_lock_under_a_lock_panics_and_one_after_the_other_does_not() {
        let (one, other) = (Mutex::new(1), Mutex::new(2));
        assert_eq!(*lock(&one) + 1, 2);
        assert_eq!(*lock(&other), 2);
        let text = panics(|| {
            let _one = lock(&one);
            let _other = lock(&other);
        });
        assert!(text.contains("a lock is taken at") && text.contains("under a lock taken at"), "{text}");
        // What the panic unwound is not held any more.
        drop(lock(&other));
    }

    /// spec: MEMEN-20
    #[test]
    fn rights_are_taken_in_their_order_only() {
        let order = [Right::Lane, Right::Turn, Right::Events];
        let all: Vec<Held> = order.into_iter().map(right).collect();
        drop(all);
        for (at, &first) in order.iter().enumerate() {
            for (then, &second) in order.iter().enumerate() {
                let _held = right(first);
                if at < then {
                    drop(right(second));
                } else {
                    let text = panics(|| drop(right(second)));
                    assert!(text.contains(&format!("{second:?} is waited for")), "{text}");
                    drop(tried(second));
                }
            }
        }
    }

    /// spec: MEMEN-21
    #[test]
    fn nothing_is_called_and_no_right_waited_for_under_a_lock() {
        let mutex = Mutex::new(());
        for forbidden in [calling_out, entering, || drop(right(Right::Lane)), || drop(tried(Right::Lane))] {
            forbidden();
            let text = panics(|| {
                let _locked = lock(&mutex);
                forbidden();
            });
            assert!(text.contains("under a lock"), "{text}");
        }
    }

    #[test]
    fn whoever_is_alone_asks_for_no_pass_but_calls_out() {
        let lane = right(Right::Lane);
        entering();
        let turn = right(Right::Turn);
        calling_out();
        assert!(panics(entering).contains("the right Turn"));
        // Not in the order in which they were taken.
        drop(lane);
        drop(turn);
        entering();
    }

    #[test]
    fn another_thread_holds_what_it_holds() {
        let mutex = Mutex::new(());
        let _locked = lock(&mutex);
        std::thread::scope(|scope| {
            scope.spawn(calling_out).join().unwrap();
        });
    }
}
