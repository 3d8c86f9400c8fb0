//! The side that has the guest, as a pure machine: events and time in, one action out.
//!
//! **Owns** the order of steps and every failure arrow. **Must never** perform anything, block, or let the guest run here
//! once COMMITTING is in the journal, unless the destination has said, durably, that it never will.
//!
//! ```text
//!  Describe -> Began* -> Hello -> AwaitAccept -> StartTracking -> EnterPreCopy
//!                                                                     |
//!     +---------------------------------------------------------------+
//!     v
//!  Sync -> Estimate --converged--> Pause -> Quiesce -> Stop -> SendStop -> LastSync -> LastDrain -> LastPages
//!     ^        |again                                                                                  |
//!     |        v                                                                                       v
//!     +-- CommitRound <- AwaitAck <- RoundEnd <- RoundDevices <- RoundPages <- Drain      LastDevices -> Digest -> AwaitReady
//!                                                                                                           |
//!   any failure or cancel above ==> Unwind: dirt back, devices run, guest runs, ABORT ==> Kept              v
//!                                                                                                  CommitLastDrain
//!   ================================= the commit point ==============================                       v
//!   JournalCommitting* --failed--> Retract* --failed--> AskAbort -> AwaitAborted --no answer--> IN DOUBT
//!        |                            +-------ok-----> Unwind <---------+ aborted
//!        v
//!   SendCommit -> AwaitCommitted --lost, late, damaged--> IN DOUBT
//!                      |      \--ABORTED (durably discarded there)--> JournalKept* -> Unwind ==> Kept
//!                      v
//!               JournalMoved* -> Release (devices stop, tracking stops) -> [Hash -> SendVerify -> AwaitVerified] ==> Moved
//!
//!   settling after IN DOUBT or a restart: Query -> AwaitOutcome -- owned --> JournalMoved
//!                                                               -- prepared --> SendCommit
//!                                                               -- discarded --> JournalKept
//!                                                               -- unknown, lost --> IN DOUBT            (* = fsync)
//! ```

mod types;
mod unwind;

pub use types::{Action, End, Event, Facts, Input};

use vfio_mediate_sdk::state::DeviceState;

use super::cause::{Cause, Phase};
use super::journal::Mark;
use super::policy::{Convergence, Left, Policy, Verdict};
use super::report::{RoundReport, Times};
use super::wire::{Digest, MemoryCopier, Outcome, Record, RefuseCode, SourceClaim};

/// What of this side must be undone. Set before the action is asked for: an action that fails, or whose answer meets a
/// cancel, may have been performed.
#[derive(Debug, Clone, Default)]
struct Undo {
    drain: bool,
    /// Devices that were asked to leave RUNNING
    touched: Vec<usize>,
    paused: bool,
    tracking: bool,
    journaled: bool,
    greeted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UndoStep {
    Drain,
    Quiescent(usize),
    Running(usize),
    Resume,
    Tracking,
    Journal,
    Tell,
    End,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    New,
    Describing,
    JournalBegan,
    Greeting,
    AwaitAccept,
    StartTracking,
    EnterPreCopy(usize),
    Sync,
    Estimate,
    Draining,
    RoundPages,
    RoundDevices(usize),
    RoundEnd,
    AwaitAck,
    CommitRound,
    Pause,
    Quiesce(usize),
    Stop(usize),
    SendStop,
    LastSync,
    LastDrain,
    LastPages,
    LastDevices(usize),
    Digest,
    AwaitReady,
    CommitLastDrain,
    JournalCommitting,
    Retract,
    AskAbort,
    AwaitAborted,
    SendCommit,
    AwaitCommitted,
    Query,
    AwaitOutcome,
    JournalMoved,
    JournalKept,
    Release(usize),
    ReleaseTracking,
    Hash,
    SendVerify,
    AwaitVerified,
    Unwind(UndoStep),
    /// An operator's word is in the journal
    Resolved {
        here: bool,
    },
    Ended,
}

/// See the module's diagram.
#[derive(Debug)]
pub struct Source {
    policy: Policy,
    state: State,
    facts: Facts,
    undo: Undo,
    /// Why it is being unwound or in doubt; kept for the end
    cause: Option<Cause>,
    lost: Vec<usize>,
    resumed: bool,
    claim: SourceClaim,
    /// Restarted: neither guest nor devices are in this process any more
    alive: bool,
    digest: Option<Digest>,
    memory: Option<Digest>,
    verified: Option<bool>,
    convergence: Convergence,
    sequences: Vec<u64>,
    round: RoundReport,
    round_began_us: u64,
    rounds: Vec<RoundReport>,
    times: Times,
    resume_us: u64,
}

impl Source {
    pub fn new(policy: Policy) -> Self {
        let facts = Facts { copier: MemoryCopier::Host, pages: 0, devices: Vec::new(), verify: false };
        Self {
            policy,
            state: State::New,
            facts,
            undo: Undo::default(),
            cause: None,
            lost: Vec::new(),
            resumed: true,
            claim: SourceClaim::Committing,
            alive: true,
            digest: None,
            memory: None,
            verified: None,
            convergence: Convergence::default(),
            sequences: Vec::new(),
            round: RoundReport::default(),
            round_began_us: 0,
            rounds: Vec::new(),
            times: Times::default(),
            resume_us: 0,
        }
    }

    /// Settles a migration whose journal says COMMITTING (`digest`), or that this side kept the guest (`None`).
    /// `facts`: of the paused guest in this process; `None` after a restart, when there is nothing to resume.
    pub fn settling(policy: Policy, digest: Option<Digest>, facts: Option<Facts>) -> Self {
        let mut source = Self::new(policy);
        source.claim = if digest.is_some() { SourceClaim::Committing } else { SourceClaim::Kept };
        source.digest = digest;
        source.alive = facts.is_some() && digest.is_some();
        source.resumed = source.alive;
        source.undo.journaled = true;
        if let Some(facts) = facts.filter(|_| source.alive) {
            source.undo.touched = (0..facts.devices.len()).collect();
            source.undo.paused = true;
            source.undo.tracking = true;
            source.facts = facts;
        }
        source.state = State::Query;
        source
    }

    /// An operator resolved a doubt about the guest that stands paused here, and the journal says so: run it, or let go.
    pub fn resolved(policy: Policy, here: bool, digest: Digest, facts: Facts) -> Self {
        let mut source = Self::settling(policy, Some(digest), Some(facts));
        source.undo.journaled = false;
        source.facts.verify = false;
        source.state = State::Resolved { here };
        source
    }

    pub fn phase(&self) -> Phase {
        match &self.state {
            State::New | State::Describing | State::JournalBegan | State::Greeting | State::AwaitAccept => {
                Phase::Negotiating
            }
            State::StartTracking | State::EnterPreCopy(_) | State::Sync | State::Estimate => Phase::PreCopy,
            State::Draining | State::RoundPages | State::RoundDevices(_) | State::RoundEnd => Phase::PreCopy,
            State::AwaitAck | State::CommitRound => Phase::PreCopy,
            State::Pause => Phase::Pausing,
            State::Quiesce(_) | State::Stop(_) | State::SendStop => Phase::Stopping,
            State::LastSync | State::LastDrain => Phase::LastDrain,
            State::LastPages => Phase::LastPages,
            State::LastDevices(_) => Phase::DeviceState,
            State::Digest | State::AwaitReady | State::CommitLastDrain => Phase::Digest,
            State::JournalCommitting | State::Retract | State::AskAbort | State::AwaitAborted => Phase::Committing,
            State::SendCommit => Phase::Committing,
            State::AwaitCommitted => Phase::Resuming,
            State::Query | State::AwaitOutcome | State::Resolved { .. } => Phase::Settling,
            State::JournalMoved | State::Release(_) | State::ReleaseTracking => Phase::Finishing,
            State::Hash | State::SendVerify | State::AwaitVerified => Phase::Verifying,
            State::JournalKept | State::Unwind(_) => Phase::Unwinding,
            State::Ended => Phase::Ended,
        }
    }

    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    pub fn rounds(&self) -> &[RoundReport] {
        &self.rounds
    }

    /// Time spent in each phase; the destination's own resume time where it told us.
    pub fn times(&self) -> (&Times, u64) {
        (&self.times, self.resume_us)
    }

    /// What COMMIT and the settlement will carry, once READY came.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Whether the journal may say COMMITTING. From here on this side does not run the guest by itself.
    pub fn past_commit_point(&self) -> bool {
        match &self.state {
            State::JournalCommitting | State::Retract | State::AskAbort | State::AwaitAborted => true,
            State::SendCommit | State::AwaitCommitted | State::JournalMoved => true,
            State::Release(_) | State::ReleaseTracking | State::Hash | State::SendVerify => true,
            State::AwaitVerified => true,
            State::Query | State::AwaitOutcome => self.claim == SourceClaim::Committing,
            State::New | State::Describing | State::JournalBegan | State::Greeting | State::AwaitAccept => false,
            State::StartTracking | State::EnterPreCopy(_) | State::Sync | State::Estimate => false,
            State::Draining | State::RoundPages | State::RoundDevices(_) | State::RoundEnd => false,
            State::AwaitAck | State::CommitRound | State::Pause | State::Quiesce(_) | State::Stop(_) => false,
            State::SendStop | State::LastSync | State::LastDrain | State::LastPages => false,
            State::LastDevices(_) | State::Digest | State::AwaitReady | State::CommitLastDrain => false,
            State::JournalKept | State::Unwind(_) | State::Resolved { .. } | State::Ended => false,
        }
    }

    /// One step.
    pub fn handle(&mut self, input: Input<'_>) -> Action {
        let phase = self.phase();
        self.times.advance(phase, input.now_us);
        let now = input.now_us;
        match input.event {
            Event::Failed(cause) => self.fail(cause, now),
            Event::TimedOut => self.fail(Cause::TimedOut(phase), now),
            Event::Received(Record::Aborted { reason }) if !matches!(self.state, State::AwaitAborted) => {
                self.aborted(reason.into_owned(), now)
            }
            _ if input.cancelled && self.cancellable() => self.fail(Cause::Cancelled, now),
            event => self.advance(event, now),
        }
    }

    /// Whether the guest or its devices are in this process.
    pub fn is_alive(&self) -> bool {
        self.alive
    }

    /// Whether somebody who wants out may still have it.
    pub fn cancellable(&self) -> bool {
        !self.past_commit_point()
            && !matches!(self.state, State::Unwind(_) | State::JournalKept | State::Ended)
            && !matches!(self.state, State::Query | State::AwaitOutcome | State::Resolved { .. })
    }

    fn enter(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        action
    }

    fn wait(&mut self, state: State, now: u64, ms: u64) -> Action {
        let until_us = now.saturating_add(ms.saturating_mul(1000));
        self.enter(state, Action::Wait { until_us })
    }

    fn device_until(&self, now: u64) -> u64 {
        now.saturating_add(self.policy.device_ms_max.saturating_mul(1000))
    }

    fn unexpected(&mut self, event: &Event<'_>, now: u64) -> Action {
        let cause = match event {
            Event::Received(record) => Cause::Protocol(format!("{:?} while {}", record.kind(), self.phase())),
            other => Cause::Internal(format!("{other:?} in {:?}", self.state)),
        };
        self.fail(cause, now)
    }

    /// The step that follows success.
    fn advance(&mut self, event: Event<'_>, now: u64) -> Action {
        match (self.state.clone(), event) {
            (State::New, Event::Begin) => self.enter(State::Describing, Action::Describe),
            (State::Describing, Event::Described(facts)) => self.described(facts, now),
            (State::JournalBegan, Event::Done) => {
                self.undo.greeted = true;
                self.enter(State::Greeting, Action::SendHello)
            }
            (State::Greeting, Event::Done) => self.wait(State::AwaitAccept, now, self.policy.answer_ms_max),
            (State::AwaitAccept, Event::Received(Record::Accept { capabilities: 0 })) => {
                self.undo.tracking = true;
                self.enter(State::StartTracking, Action::StartTracking)
            }
            (State::AwaitAccept, Event::Received(Record::Refuse { code, reason })) => {
                self.undo.greeted = false;
                self.fail(Cause::RefusedByPeer { code, reason: reason.into_owned() }, now)
            }
            (State::StartTracking, Event::Done) => self.enter_pre_copy(0, now),
            (State::EnterPreCopy(device), Event::Done) => self.enter_pre_copy(device + 1, now),
            (State::Sync, Event::Done) => self.enter(State::Estimate, Action::Estimate),
            (State::Estimate, Event::Estimated(left)) => self.decide(left, now),
            (State::Draining, Event::Drained { pages }) => {
                self.round.drained_pages = pages;
                self.enter(State::RoundPages, Action::SendPages)
            }
            (State::RoundPages, Event::PagesSent { pages, zero_pages, bytes, more }) => {
                self.round.count(pages, zero_pages, bytes);
                if more { self.enter(State::RoundPages, Action::SendPages) } else { self.round_state(0, now) }
            }
            (State::RoundDevices(device), Event::StateSent { bytes, more }) => {
                self.count_state(device, bytes);
                self.round_state(if more { device } else { device + 1 }, now)
            }
            (State::RoundEnd, Event::Done) => self.wait(State::AwaitAck, now, self.policy.answer_ms_max),
            (State::AwaitAck, Event::Received(Record::RoundAck { round, pages }))
                if round == self.round.round && pages == self.round.pages =>
            {
                self.enter(State::CommitRound, Action::CommitDrain)
            }
            (State::CommitRound, Event::Done) => {
                self.undo.drain = false;
                self.end_round(now);
                self.enter(State::Sync, Action::SyncDirty)
            }
            (State::Pause, Event::Done) => self.quiesce(0, now),
            (State::Quiesce(device), Event::Done) => self.quiesce(device + 1, now),
            (State::Stop(device), Event::Done) => self.stop(device + 1, now),
            (State::SendStop, Event::Done) => self.enter(State::LastSync, Action::SyncDirty),
            (State::LastSync, Event::Done) => {
                self.undo.drain = true;
                self.enter(State::LastDrain, Action::Drain)
            }
            (State::LastDrain, Event::Drained { pages }) => {
                self.round.drained_pages = pages;
                self.enter(State::LastPages, Action::SendPages)
            }
            (State::LastPages, Event::PagesSent { pages, zero_pages, bytes, more }) => {
                self.round.count(pages, zero_pages, bytes);
                if more { self.enter(State::LastPages, Action::SendPages) } else { self.last_state(0) }
            }
            (State::LastDevices(device), Event::StateSent { bytes, more }) => {
                self.count_state(device, bytes);
                self.last_state(if more { device } else { device + 1 })
            }
            (State::Digest, Event::Hashed { digest, .. }) => {
                self.digest = Some(digest);
                self.end_round(now);
                self.wait(State::AwaitReady, now, self.policy.switchover_answer_ms_max)
            }
            (State::AwaitReady, Event::Received(Record::Ready { digest })) if self.digest == Some(digest) => {
                self.enter(State::CommitLastDrain, Action::CommitDrain)
            }
            (State::CommitLastDrain, Event::Done) => {
                self.undo.drain = false;
                match self.digest {
                    Some(digest) => self.enter(State::JournalCommitting, Action::Journal(Mark::Committing { digest })),
                    None => self.fail(Cause::Internal("no digest".into()), now),
                }
            }
            (State::JournalCommitting, Event::Done) => self.send_commit(now),
            (State::Retract, Event::Done) => {
                self.undo.journaled = false;
                self.unwind(UndoStep::Drain, now)
            }
            (State::AskAbort, Event::Done) => self.wait(State::AwaitAborted, now, self.policy.switchover_answer_ms_max),
            (State::AwaitAborted, Event::Received(Record::Aborted { .. })) => {
                self.undo.greeted = false;
                self.unwind(UndoStep::Drain, now)
            }
            (State::SendCommit, Event::Done) => {
                self.wait(State::AwaitCommitted, now, self.policy.switchover_answer_ms_max)
            }
            (State::AwaitCommitted, Event::Received(Record::Committed { resume_us })) => {
                self.resume_us = resume_us;
                self.enter(State::JournalMoved, Action::Journal(Mark::Moved))
            }
            (State::Query, Event::Begin) => self.enter(State::Query, Action::Send(Record::Query { claim: self.claim })),
            (State::Query, Event::Done) => self.wait(State::AwaitOutcome, now, self.policy.answer_ms_max),
            (State::AwaitOutcome, Event::Received(Record::Outcome { outcome, explanation })) => {
                self.outcome(outcome, explanation.into_owned(), now)
            }
            (State::JournalMoved, Event::Done) => self.release(0, now),
            (State::JournalKept, Event::Done) => {
                self.undo.journaled = false;
                self.unwind(UndoStep::Drain, now)
            }
            (State::Release(device), Event::Done) => self.release(device + 1, now),
            (State::ReleaseTracking, Event::Done) => self.verify(),
            (State::Hash, Event::Hashed { more: true, .. }) => self.enter(State::Hash, Action::HashMemory),
            (State::Hash, Event::Hashed { digest, more: false }) => {
                self.memory = Some(digest);
                self.enter(State::SendVerify, Action::Send(Record::Verify { digest }))
            }
            (State::SendVerify, Event::Done) => self.wait(State::AwaitVerified, now, self.policy.answer_ms_max),
            (State::AwaitVerified, Event::Received(Record::Verified { digest })) => {
                self.verified = Some(self.memory == Some(digest));
                self.moved()
            }
            (State::Unwind(step), Event::Done) => self.unwound(step, now),
            (State::Resolved { here: true }, Event::Begin) => self.begin_unwind(Cause::Resolved, now),
            (State::Resolved { here: false }, Event::Begin) => self.release(0, now),
            // What else may come: a peer out of step, or a driver. States are listed so that a new one must choose.
            (State::New | State::Describing | State::JournalBegan | State::Greeting | State::AwaitAccept, event) => {
                self.unexpected(&event, now)
            }
            (
                State::StartTracking | State::EnterPreCopy(_) | State::Sync | State::Estimate | State::Draining,
                event,
            ) => self.unexpected(&event, now),
            (
                State::RoundPages | State::RoundDevices(_) | State::RoundEnd | State::AwaitAck | State::CommitRound,
                event,
            ) => self.unexpected(&event, now),
            (State::Pause | State::Quiesce(_) | State::Stop(_) | State::SendStop | State::LastSync, event) => {
                self.unexpected(&event, now)
            }
            (
                State::LastDrain | State::LastPages | State::LastDevices(_) | State::Digest | State::AwaitReady,
                event,
            ) => self.unexpected(&event, now),
            (
                State::CommitLastDrain
                | State::JournalCommitting
                | State::Retract
                | State::AskAbort
                | State::AwaitAborted,
                event,
            ) => self.unexpected(&event, now),
            (
                State::SendCommit | State::AwaitCommitted | State::Query | State::AwaitOutcome | State::JournalMoved,
                event,
            ) => self.unexpected(&event, now),
            (
                State::JournalKept | State::Release(_) | State::ReleaseTracking | State::Hash | State::SendVerify,
                event,
            ) => self.unexpected(&event, now),
            (State::AwaitVerified | State::Unwind(_) | State::Resolved { .. } | State::Ended, event) => {
                self.unexpected(&event, now)
            }
        }
    }

    fn described(&mut self, facts: Facts, now: u64) -> Action {
        self.sequences = vec![0; facts.devices.len()];
        let refusal = facts.refusal();
        self.facts = facts;
        if let Some(reason) = refusal {
            return self.fail(Cause::Refused { code: RefuseCode::Device, reason }, now);
        }
        self.undo.journaled = true;
        self.enter(State::JournalBegan, Action::Journal(Mark::Began))
    }

    fn enter_pre_copy(&mut self, from: usize, now: u64) -> Action {
        match (from..self.facts.devices.len()).find(|device| self.facts.devices[*device].pre_copy) {
            Some(device) => {
                self.undo.touched.push(device);
                let action =
                    Action::SetState { device, target: DeviceState::PreCopy, until_us: self.device_until(now) };
                self.enter(State::EnterPreCopy(device), action)
            }
            None => self.enter(State::Sync, Action::SyncDirty),
        }
    }

    fn decide(&mut self, left: Left, now: u64) -> Action {
        let done = self.rounds.len() as u32;
        if let Some(last) = self.rounds.last_mut() {
            last.dirty_left = left.dirty_pages;
        }
        let nothing_to_pre_copy = self.facts.pages == 0 && !self.facts.devices.iter().any(|flags| flags.pre_copy);
        let verdict = match done {
            _ if nothing_to_pre_copy => Verdict::SwitchOver,
            // The first round always runs: nothing has been measured.
            0 => Verdict::Again,
            _ => self.convergence.decide(&self.policy, done, left),
        };
        self.round = RoundReport { round: done + 1, ..RoundReport::default() };
        self.round_began_us = now;
        match verdict {
            Verdict::Again => {
                self.undo.drain = true;
                self.enter(State::Draining, Action::Drain)
            }
            Verdict::SwitchOver => {
                self.undo.paused = true;
                let until_us = now.saturating_add(self.policy.pause_ms_max.saturating_mul(1000));
                self.enter(State::Pause, Action::PauseVmm { until_us })
            }
            Verdict::Stalled(why) => self.fail(Cause::Stalled(why), now),
        }
    }

    fn count_state(&mut self, device: usize, bytes: u64) {
        if let Some(sequence) = self.sequences.get_mut(device) {
            *sequence += 1;
        }
        self.round.device_bytes += bytes;
        self.round.bytes += bytes;
    }

    fn round_state(&mut self, from: usize, _now: u64) -> Action {
        match (from..self.facts.devices.len()).find(|device| self.facts.devices[*device].pre_copy) {
            Some(device) => {
                let sequence = self.sequences[device];
                self.enter(State::RoundDevices(device), Action::SendState { device, sequence })
            }
            None => {
                let record = Record::RoundEnd { round: self.round.round, pages: self.round.pages };
                self.enter(State::RoundEnd, Action::Send(record))
            }
        }
    }

    fn end_round(&mut self, now: u64) {
        let us = now.saturating_sub(self.round_began_us);
        self.round.ms = us as f64 / 1000.0;
        // What a round settled, not only what it sent: else memory full of zeroes would look like a slow link, on which
        // no device state, however small, seems to fit into the downtime.
        let settled = self.round.pages.saturating_mul(u64::from(crate::migration::wire::PAGE_SIZE));
        self.convergence.round(self.round.bytes.max(settled), us);
        self.rounds.push(self.round.clone());
    }

    /// First of the two phases: no device starts anything at another.
    fn quiesce(&mut self, from: usize, now: u64) -> Action {
        match (from..self.facts.devices.len()).find(|device| self.facts.devices[*device].p2p) {
            Some(device) => {
                self.touch(device);
                let pre_copy = self.facts.devices[device].pre_copy;
                let target = if pre_copy { DeviceState::PreCopyP2p } else { DeviceState::RunningP2p };
                let until_us = self.device_until(now);
                self.enter(State::Quiesce(device), Action::SetState { device, target, until_us })
            }
            None => self.stop(0, now),
        }
    }

    fn touch(&mut self, device: usize) {
        if !self.undo.touched.contains(&device) {
            self.undo.touched.push(device);
        }
    }

    fn stop(&mut self, device: usize, now: u64) -> Action {
        if device < self.facts.devices.len() {
            self.touch(device);
            let until_us = self.device_until(now);
            let action = Action::SetState { device, target: DeviceState::StopCopy, until_us };
            return self.enter(State::Stop(device), action);
        }
        let rounds = self.rounds.len() as u32;
        self.enter(State::SendStop, Action::Send(Record::Stop { rounds }))
    }

    fn last_state(&mut self, device: usize) -> Action {
        match self.sequences.get(device).copied() {
            Some(sequence) => self.enter(State::LastDevices(device), Action::SendState { device, sequence }),
            None => self.enter(State::Digest, Action::SendDigest),
        }
    }

    fn send_commit(&mut self, now: u64) -> Action {
        match self.digest {
            Some(digest) => self.enter(State::SendCommit, Action::Send(Record::Commit { digest })),
            None => self.fail(Cause::Internal("no digest to commit".into()), now),
        }
    }

    fn outcome(&mut self, outcome: Outcome, explanation: String, now: u64) -> Action {
        match (self.claim, outcome) {
            (SourceClaim::Committing, Outcome::Owned) => self.enter(State::JournalMoved, Action::Journal(Mark::Moved)),
            (SourceClaim::Committing, Outcome::Prepared) => self.send_commit(now),
            (SourceClaim::Committing, Outcome::Discarded) => {
                self.undo.greeted = false;
                self.cause = Some(Cause::PeerGaveUp { reason: explanation });
                self.enter(State::JournalKept, Action::Journal(Mark::Kept))
            }
            (SourceClaim::Committing, Outcome::Unknown) => {
                let why = format!("the destination does not know this migration: {explanation}");
                self.in_doubt(Cause::Protocol(why))
            }
            (SourceClaim::Kept, Outcome::Discarded | Outcome::Unknown) => {
                self.undo.journaled = false;
                self.cause = Some(Cause::PeerGaveUp { reason: explanation });
                self.unwind(UndoStep::Drain, now)
            }
            (SourceClaim::Kept, Outcome::Owned | Outcome::Prepared) => {
                self.in_doubt(Cause::Conflict(format!("the destination claims the guest: {explanation}")))
            }
        }
    }

    /// ABORTED came where something else was due.
    fn aborted(&mut self, reason: String, now: u64) -> Action {
        let cause = Cause::PeerGaveUp { reason };
        self.undo.greeted = false;
        match self.state {
            // The destination has durably discarded: the guest may go on here whatever our journal says, since
            // the same answer will be had again after a restart.
            State::SendCommit | State::AwaitCommitted => {
                self.cause = Some(cause);
                self.enter(State::JournalKept, Action::Journal(Mark::Kept))
            }
            _ => self.fail(cause, now),
        }
    }

    fn release(&mut self, device: usize, now: u64) -> Action {
        if self.alive && device < self.facts.devices.len() {
            let until_us = self.device_until(now);
            let action = Action::SetState { device, target: DeviceState::Stop, until_us };
            return self.enter(State::Release(device), action);
        }
        if self.alive && self.undo.tracking {
            return self.enter(State::ReleaseTracking, Action::StopTracking);
        }
        self.verify()
    }

    fn verify(&mut self) -> Action {
        if self.alive && self.facts.verify && self.memory.is_none() {
            return self.enter(State::Hash, Action::HashMemory);
        }
        self.moved()
    }

    fn moved(&mut self) -> Action {
        let verified = self.verified;
        self.enter(State::Ended, Action::End(End::Moved { verified }))
    }

    fn in_doubt(&mut self, cause: Cause) -> Action {
        self.enter(State::Ended, Action::End(End::InDoubt { cause }))
    }
}
