//! One at a time, with a deadline: for work that calls out (plug-in, ioctl) and so may not be done under a lock.
//!
//! **Owns** a flag and its waiters. A token is a right, not a lock: nothing is held while it is out, and whoever wants it
//! gives up at a deadline. Locks: `taken`, a leaf.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use super::gate::CloseError;
use crate::lock_order::{self, Held, Right, lock};

#[derive(Debug)]
pub struct Lane {
    /// Its place in the order
    right: Right,
    taken: Mutex<bool>,
    freed: Condvar,
}

/// Stays on its thread.
#[derive(Debug)]
#[must_use = "dropping the token frees the lane"]
pub struct Token<'a> {
    lane: &'a Lane,
    _held: Held,
}

impl Lane {
    pub fn new(right: Right) -> Self {
        Self { right, taken: Mutex::new(false), freed: Condvar::new() }
    }

    /// [`CloseError::Busy`] at the deadline.
    pub fn enter(&self, deadline: Instant) -> Result<Token<'_>, CloseError> {
        let held = lock_order::right(self.right);
        let mut taken = lock(&self.taken);
        while *taken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(CloseError::Busy);
            }
            taken = taken.wait_timeout(&self.freed, left);
        }
        *taken = true;
        Ok(Token { lane: self, _held: held })
    }

    pub fn try_enter(&self) -> Option<Token<'_>> {
        let mut taken = lock(&self.taken);
        if std::mem::replace(&mut *taken, true) {
            return None;
        }
        drop(taken);
        Some(Token { lane: self, _held: lock_order::tried(self.right) })
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        *lock(&self.lane.taken) = false;
        self.lane.freed.notify_one();
    }
}
