//! One at a time, with a deadline: for work that calls out (plug-in, ioctl) and so may not be done under a lock.
//!
//! **Owns** a flag and its waiters. A token is a right, not a lock: nothing is held while it is out, and whoever wants it
//! gives up at a deadline. Locks: `taken`, a leaf.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::gate::CloseError;

#[derive(Debug, Default)]
pub struct Lane {
    taken: Mutex<bool>,
    freed: Condvar,
}

#[derive(Debug)]
#[must_use = "dropping the token frees the lane"]
pub struct Token<'a> {
    lane: &'a Lane,
}

impl Lane {
    /// [`CloseError::Busy`] at the deadline.
    pub fn enter(&self, deadline: Instant) -> Result<Token<'_>, CloseError> {
        let mut taken = self.lock();
        while *taken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(CloseError::Busy);
            }
            taken = self.freed.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken = true;
        Ok(Token { lane: self })
    }

    pub fn try_enter(&self) -> Option<Token<'_>> {
        self.enter(Instant::now()).ok()
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        *self.lane.lock() = false;
        self.lane.freed.notify_one();
    }
}
