//! Small numbers for threads, so that each thread has a slot of its own in every gate.
//!
//! **Owns** the process-wide slab of indices. A thread takes the lowest free one at its first pass and gives it back when
//! it ends. When all are taken, the thread shares the overflow slot, which works the same and costs a bouncing line.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

/// Threads with a slot of their own. Indices lie below; [`OVERFLOW`] is the shared slot's.
pub const OWN_SLOTS: usize = if cfg!(loom) { 2 } else { 64 };
pub const OVERFLOW: usize = OWN_SLOTS;

const UNASSIGNED: usize = usize::MAX;

static SLAB: Slab = Slab(Mutex::new(0));

/// Which indices are taken, as bits.
struct Slab(Mutex<u64>);

impl Slab {
    /// The lowest free index, or [`OVERFLOW`].
    fn take(&self) -> usize {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = taken.trailing_ones() as usize;
        if index >= OWN_SLOTS {
            return OVERFLOW;
        }
        *taken |= 1 << index;
        index
    }

    fn give_back(&self, index: usize) {
        if index < OWN_SLOTS {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) &= !(1 << index);
        }
    }
}

thread_local! {
    // Two cells: this one has no destructor, so that reading it is one load; the other's destructor gives the index back.
    static INDEX: Cell<usize> = const { Cell::new(UNASSIGNED) };
    static LEASE: Lease = const { Lease };
}

struct Lease;

impl Drop for Lease {
    fn drop(&mut self) {
        SLAB.give_back(INDEX.replace(OVERFLOW));
    }
}

/// This thread's index: below [`OWN_SLOTS`], or [`OVERFLOW`].
#[inline]
pub fn current() -> usize {
    let index = INDEX.get();
    if index == UNASSIGNED { assign() } else { index }
}

/// As [`current`], but larger than every index while this thread has none.
#[inline(always)]
pub fn assigned() -> usize {
    INDEX.get()
}

#[cold]
fn assign() -> usize {
    // Registers the destructor. A thread whose locals are already gone stays in the overflow slot: nobody would give its
    // index back.
    let leased = LEASE.try_with(|_| ()).is_ok();
    let index = if leased { SLAB.take() } else { OVERFLOW };
    INDEX.set(index);
    index
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_its_index_and_two_threads_never_share_one() {
        let mine = current();
        assert_eq!(mine, current());
        let other = std::thread::spawn(current).join().unwrap();
        assert!(mine == OVERFLOW || other != mine);
    }

    #[test]
    fn an_index_is_given_out_once_and_again_when_it_came_back() {
        let slab = Slab(Mutex::new(0));
        let all: Vec<usize> = (0..OWN_SLOTS + 2).map(|_| slab.take()).collect();
        assert!(all[..OWN_SLOTS].iter().copied().eq(0..OWN_SLOTS));
        assert_eq!(all[OWN_SLOTS..], [OVERFLOW; 2]);
        slab.give_back(OVERFLOW);
        assert_eq!(slab.take(), OVERFLOW);
        slab.give_back(5);
        assert_eq!((slab.take(), slab.take()), (5, OVERFLOW));
    }
}
