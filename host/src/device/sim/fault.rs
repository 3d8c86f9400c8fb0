//! The seam through which models fail: every operation asks the plan first.
//!
//! A sweep runs twice: pass one counts the steps of a scenario ([`FaultPlan::steps`]), pass two repeats it once for each
//! step with a fault there. The same calls in the same order are the same step numbers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

/// What happens instead of, or before, an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this number and did nothing. Where an operation destroys what it reads, it has read.
    Errno(Errno),
    /// The device is gone: this and every later operation is `ErrorKind::Lost`.
    Lose,
    /// It takes this much longer of the device's time, and then succeeds.
    Delay(Duration),
}

/// Most names that are kept for [`FaultPlan::trace`]; counting goes on beyond it.
const TRACE_MAX: usize = 65_536;

/// Faults by step number, shared by as many devices as should be counted together. Steps count from 0.
#[derive(Debug, Default)]
pub struct FaultPlan {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    steps: u64,
    injected: u64,
    trace: Vec<&'static str>,
    faults: BTreeMap<u64, Fault>,
}

impl FaultPlan {
    /// Counts, and fails nothing until [`Self::add`].
    pub fn none() -> Arc<Self> {
        Arc::default()
    }

    /// One fault.
    pub fn at(step: u64, fault: Fault) -> Arc<Self> {
        let plan = Self::none();
        plan.add(step, fault);
        plan
    }

    /// Adds a fault for a step, or replaces the one that is there.
    pub fn add(&self, step: u64, fault: Fault) {
        self.state().faults.insert(step, fault);
    }

    /// Adds a fault for the step that comes next.
    pub fn add_next(&self, fault: Fault) {
        let mut state = self.state();
        let next = state.steps;
        state.faults.insert(next, fault);
    }

    /// Steps so far; also the number of the next one.
    pub fn steps(&self) -> u64 {
        self.state().steps
    }

    /// Faults that have happened. A sweep that injected none has tested nothing.
    pub fn injected(&self) -> u64 {
        self.state().injected
    }

    /// The names of the first steps, for a failing sweep's message.
    pub fn trace(&self) -> Vec<&'static str> {
        self.state().trace.clone()
    }

    /// Counts one operation and says what is to happen to it.
    pub(super) fn step(&self, name: &'static str) -> Option<Fault> {
        let mut state = self.state();
        let step = state.steps;
        state.steps += 1;
        if state.trace.len() < TRACE_MAX {
            state.trace.push(name);
        }
        let fault = state.faults.get(&step).copied();
        state.injected += u64::from(fault.is_some());
        fault
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
