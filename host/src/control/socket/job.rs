//! A request that takes its time, as its followers see it.
//!
//! Whoever works at it tells the newest progress and never waits for a follower: a client that does not read must not hold
//! up a migration. Lock: one mutex, held for copies only.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{Progress, Response};

#[derive(Debug, Default)]
pub struct Job {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Grows with every progress told
    number: u64,
    progress: Option<Progress>,
    end: Option<Response>,
}

/// What a follower sees next.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    Progress {
        number: u64,
        progress: Progress,
    },
    End(Response),
    /// Nothing until the deadline
    Silence,
}

impl Job {
    pub fn tell(&self, progress: Progress) {
        let mut state = self.state();
        state.number += 1;
        state.progress = Some(progress);
        drop(state);
        self.changed.notify_all();
    }

    /// The first end counts.
    pub fn end(&self, response: Response) {
        let mut state = self.state();
        state.end.get_or_insert(response);
        drop(state);
        self.changed.notify_all();
    }

    pub fn latest(&self) -> Option<Progress> {
        self.state().progress.clone()
    }

    pub fn is_over(&self) -> bool {
        self.state().end.is_some()
    }

    /// Waits for something newer than progress number `seen` (0: anything). Progress that was overtaken is not told.
    pub fn next(&self, seen: u64, patience: Duration) -> News {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        loop {
            // The last progress is told before the end, so that a bar ends where the job did.
            if let Some(progress) = state.progress.as_ref().filter(|_| state.number > seen) {
                return News::Progress { number: state.number, progress: progress.clone() };
            }
            if let Some(end) = &state.end {
                return News::End(end.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return News::Silence;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(round: u32) -> Progress {
        Progress { round, ..Progress::default() }
    }

    #[test]
    fn followers_see_the_newest_progress_then_the_first_end() {
        let job = Job::default();
        assert_eq!(job.next(0, Duration::ZERO), News::Silence);
        job.tell(progress(1));
        job.tell(progress(2));
        assert_eq!(job.next(0, Duration::ZERO), News::Progress { number: 2, progress: progress(2) });
        let done = Response::Done { note: "first".to_owned() };
        job.end(done.clone());
        job.end(Response::Done { note: "second".to_owned() });
        assert_eq!(job.next(0, Duration::ZERO), News::Progress { number: 2, progress: progress(2) });
        assert_eq!(job.next(2, Duration::ZERO), News::End(done));
        assert!(job.is_over());
    }

    #[test]
    fn a_waiting_follower_is_woken_by_the_end() {
        let job = std::sync::Arc::new(Job::default());
        let follower = {
            let job = std::sync::Arc::clone(&job);
            std::thread::spawn(move || job.next(0, Duration::from_secs(60)))
        };
        job.end(Response::Done { note: String::new() });
        assert!(matches!(follower.join().unwrap(), News::End(_)));
    }
}
