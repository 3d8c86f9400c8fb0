//! The side that receives, as a pure machine: events and time in, one action out.
//!
//! **Owns** what a stream must look like, and when a guest may begin to run here. **Must never** let it run before OWNED is
//! in the journal, nor say that it never will before DISCARDED is.
//!
//! ```text
//!  AwaitFirst --HELLO--> Match --no--> Refuse ==> Refused
//!      |                   |
//!      |                   v
//!      |      Began* -> Resuming -> Accept -> Receive <--> Apply, Load, Ack
//!      |                                        |
//!      |   any failure, cancel or ABORT above ==|==> DiscardJournal* -> Discard -> Aborted ==> Discarded
//!      |                                        v
//!      |                         STOP ... DIGEST -> Compare -> Validate (devices to STOP) -> JournalPrepared*
//!      |                                                                                          |
//!      |   ======================= from here on the source decides ======================         v
//!      |                       AwaitCommit <----------------------------------------------- SendReady
//!      |     lost, late, damaged /   |   \ ABORT
//!      |        ==> IN DOUBT <--+    |    +--> DiscardJournal* --failed--> IN DOUBT
//!      |            (all is held)    v
//!      |                       JournalOwned* --failed--> Retract* --failed--> IN DOUBT
//!      |                             |                      +--ok--> Discard -> Aborted ==> Discarded
//!      |                             v
//!      |               Quiescent -> Running -> Resume -> Committed -> [AwaitVerify -> Hash -> Verified] ==> Owned
//!      |
//!      +--QUERY--> Recall the journal of its id -- owned ------------> Outcome(owned) ==> Owned
//!                                               -- prepared, held ---> Outcome(prepared) -> AwaitCommit
//!                                               -- prepared, lost ---> DiscardJournal* -> Outcome(discarded)
//!                                               -- began, discarded -> DiscardJournal* -> Outcome(discarded)
//!                                               -- none -------------> Outcome(unknown)         (* = fsync)
//! ```

mod receiving;

use vfio_mediate_sdk::state::DeviceState;

use super::cause::{Cause, Phase};
use super::journal::Mark;
use super::policy::Policy;
use super::report::Times;
use super::source::Facts;
use super::wire::{Digest, Outcome, Record, RefuseCode, SourceClaim};

/// What the driver is to do next. Each is answered by exactly one [`Event`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Wait for a record: [`Event::Received`], or [`Event::TimedOut`] at this time
    Wait {
        until_us: u64,
    },
    /// Compare the HELLO in hand with this host: [`Event::Matched`]
    Match,
    /// Open the journal of the id that the QUERY in hand bears: [`Event::Recalled`]
    Recall,
    Journal(Mark),
    Send(Record<'static>),
    SetState {
        device: usize,
        target: DeviceState,
        until_us: u64,
    },
    /// Write the pages of the record in hand
    WritePages,
    /// Pages that are in memory already
    PlacedPages {
        first: u64,
        count: u64,
    },
    ZeroPages {
        first: u64,
        count: u64,
    },
    /// Load the chunk of the record in hand
    LoadState {
        device: usize,
    },
    /// What this side's digest of the stream is: [`Event::Hashed`]
    Compare,
    /// Bring a device out of RESUMING (or wherever it is) for good: its state is worth nothing
    Discard {
        device: usize,
    },
    ResumeVmm,
    HashMemory,
    End(End),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    Begin,
    Done,
    Matched(Result<Facts, (RefuseCode, String)>),
    /// The last mark in the journal; `None`: there is no such journal
    Recalled(Option<Mark>),
    Received(Record<'a>),
    Hashed {
        digest: Digest,
        more: bool,
    },
    Failed(Cause),
    TimedOut,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input<'a> {
    pub now_us: u64,
    pub cancelled: bool,
    pub event: Event<'a>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest is here. It runs, unless `resumed` is false. `lost`: devices that could not be started
    Owned { verified: Option<bool>, resumed: bool, lost: Vec<usize> },
    /// It never was here and never will be by this migration
    Discarded { cause: Cause },
    /// A source that came back for an old migration was answered; nothing of that one is in this process
    Answered { outcome: Outcome },
    /// All is held; nobody may run the guest until this is settled
    InDoubt { cause: Cause },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    AwaitFirst,
    Match,
    Refuse,
    JournalBegan,
    EnterResuming(usize),
    Accept,
    Receive,
    Apply,
    Ack,
    Compare,
    Validate(usize),
    JournalPrepared,
    SendReady,
    AwaitCommit,
    JournalOwned,
    Retract,
    Quiescent(usize),
    Running(usize),
    Resume,
    SendCommitted,
    AwaitVerify,
    Hash,
    SendVerified,
    Recall,
    SendOutcome(Outcome),
    /// Journal DISCARDED; `must`: in doubt if that fails
    DiscardJournal {
        must: bool,
    },
    Discard(usize),
    SendAborted,
    /// An operator's word is in the journal
    Resolved {
        here: bool,
    },
    Ended,
}

/// See the module's diagram.
#[derive(Debug)]
pub struct Destination {
    policy: Policy,
    state: State,
    facts: Option<Facts>,
    /// Devices that were asked to leave RUNNING
    touched: usize,
    round: u32,
    pages_in_round: u64,
    pages: u64,
    zero_pages: u64,
    stopped: bool,
    /// Next chunk of each device, `None` once its state has ended
    sequences: Vec<Option<u64>>,
    digest: Option<Digest>,
    claimed: Option<Digest>,
    source_memory: Option<Digest>,
    verified: Option<bool>,
    /// A settlement is being answered by OUTCOME, not by ABORTED
    queried: bool,
    claim: Option<SourceClaim>,
    /// An operator decided; no peer is told
    resolved: bool,
    cause: Option<Cause>,
    lost: Vec<usize>,
    resumed: bool,
    owned_us: u64,
    times: Times,
}

impl Destination {
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            state: State::AwaitFirst,
            facts: None,
            touched: 0,
            round: 0,
            pages_in_round: 0,
            pages: 0,
            zero_pages: 0,
            stopped: false,
            sequences: Vec::new(),
            digest: None,
            claimed: None,
            source_memory: None,
            verified: None,
            queried: false,
            claim: None,
            resolved: false,
            cause: None,
            lost: Vec::new(),
            resumed: true,
            owned_us: 0,
            times: Times::default(),
        }
    }

    /// Answers a source that comes back. `held`: what this process holds prepared; `None` after a restart.
    pub fn settling(policy: Policy, held: Option<(Digest, Facts)>) -> Self {
        let mut destination = Self::new(policy);
        destination.queried = true;
        if let Some((digest, facts)) = held {
            destination.digest = Some(digest);
            destination.touched = facts.devices.len();
            destination.facts = Some(facts);
        }
        destination
    }

    /// An operator resolved what is held here, and the journal says so: run it, or let go of it.
    pub fn resolved(policy: Policy, here: bool, digest: Digest, facts: Facts) -> Self {
        let mut destination = Self::settling(policy, Some((digest, facts)));
        destination.queried = false;
        destination.resolved = true;
        destination.state = State::Resolved { here };
        destination
    }

    pub fn phase(&self) -> Phase {
        match &self.state {
            State::AwaitFirst if self.queried => Phase::Settling,
            State::AwaitFirst | State::Match | State::Refuse | State::JournalBegan => Phase::Negotiating,
            State::EnterResuming(_) | State::Accept => Phase::Negotiating,
            State::Receive | State::Apply | State::Ack if self.stopped => Phase::DeviceState,
            State::Receive | State::Apply | State::Ack => Phase::PreCopy,
            State::Compare | State::Validate(_) | State::JournalPrepared | State::SendReady => Phase::Digest,
            State::AwaitCommit | State::JournalOwned | State::Retract => Phase::Committing,
            State::Quiescent(_) | State::Running(_) | State::Resume => Phase::Resuming,
            State::SendCommitted => Phase::Finishing,
            State::AwaitVerify | State::Hash | State::SendVerified => Phase::Verifying,
            State::Recall | State::SendOutcome(_) => Phase::Settling,
            State::DiscardJournal { .. } | State::Discard(_) | State::SendAborted => Phase::Unwinding,
            State::Resolved { .. } => Phase::Settling,
            State::Ended => Phase::Ended,
        }
    }

    pub fn facts(&self) -> Option<&Facts> {
        self.facts.as_ref()
    }

    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Rounds received whole.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Pages received, and how many of them were zero.
    pub fn pages(&self) -> (u64, u64) {
        (self.pages, self.zero_pages)
    }

    pub fn times(&self) -> &Times {
        &self.times
    }

    pub fn handle(&mut self, input: Input<'_>) -> Action {
        let phase = self.phase();
        self.times.advance(phase, input.now_us);
        let now = input.now_us;
        match input.event {
            Event::Failed(cause) => self.fail(cause),
            Event::TimedOut => self.fail(Cause::TimedOut(phase)),
            Event::Received(Record::Abort { reason }) => self.aborted(reason.into_owned()),
            // Progress is for people; whoever waits goes on waiting.
            Event::Received(Record::Progress { .. }) => self.wait(self.state.clone(), now),
            _ if input.cancelled && self.cancellable() => self.fail(Cause::Cancelled),
            event => self.advance(event, now),
        }
    }

    /// Whether this side may still give up by itself: until READY may have left.
    pub fn cancellable(&self) -> bool {
        match &self.state {
            State::AwaitFirst | State::Match | State::JournalBegan | State::EnterResuming(_) => !self.queried,
            State::Accept | State::Receive | State::Apply | State::Ack | State::Compare | State::Validate(_) => true,
            State::Refuse | State::JournalPrepared | State::SendReady | State::AwaitCommit => false,
            State::JournalOwned | State::Retract | State::Quiescent(_) | State::Running(_) | State::Resume => false,
            State::SendCommitted | State::AwaitVerify | State::Hash | State::SendVerified => false,
            State::Recall | State::SendOutcome(_) | State::DiscardJournal { .. } | State::Discard(_) => false,
            State::SendAborted | State::Resolved { .. } | State::Ended => false,
        }
    }

    fn enter(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        action
    }

    fn wait(&mut self, state: State, now: u64) -> Action {
        let until_us = now.saturating_add(self.policy.answer_ms_max.saturating_mul(1000));
        self.enter(state, Action::Wait { until_us })
    }

    fn device_count(&self) -> usize {
        self.facts.as_ref().map_or(0, |facts| facts.devices.len())
    }

    fn set_state(&mut self, state: State, device: usize, target: DeviceState, now: u64) -> Action {
        let until_us = now.saturating_add(self.policy.device_ms_max.saturating_mul(1000));
        self.enter(state, Action::SetState { device, target, until_us })
    }

    fn unexpected(&mut self, event: &Event<'_>) -> Action {
        let cause = match event {
            Event::Received(record) => Cause::Protocol(format!("{:?} while {}", record.kind(), self.phase())),
            other => Cause::Internal(format!("{other:?} in {:?}", self.state)),
        };
        self.fail(cause)
    }

    fn advance(&mut self, event: Event<'_>, now: u64) -> Action {
        match (self.state.clone(), event) {
            (State::AwaitFirst, Event::Begin) => self.wait(State::AwaitFirst, now),
            (State::AwaitFirst, Event::Received(Record::Hello(_))) if !self.queried => {
                self.enter(State::Match, Action::Match)
            }
            (State::AwaitFirst, Event::Received(Record::Query { claim })) => {
                self.queried = true;
                self.claim = Some(claim);
                self.enter(State::Recall, Action::Recall)
            }
            (State::Match, Event::Matched(Ok(facts))) => self.matched(facts),
            (State::Match, Event::Matched(Err((code, reason)))) => self.refuse(code, reason),
            (State::Refuse, Event::Done) => self.discarded(),
            (State::JournalBegan, Event::Done) => self.enter_resuming(0, now),
            (State::EnterResuming(device), Event::Done) => self.enter_resuming(device + 1, now),
            (State::Accept | State::Apply | State::Ack, Event::Done) => self.wait(State::Receive, now),
            (State::Receive, Event::Received(record)) => self.receive(record, now),
            (State::Compare, Event::Hashed { digest, .. }) if self.claimed == Some(digest) => {
                self.digest = Some(digest);
                self.validate(0, now)
            }
            (State::Compare, Event::Hashed { digest, .. }) => {
                let claimed = self.claimed.map_or(String::new(), |claimed| claimed.to_string());
                self.fail(Cause::Protocol(format!("the stream's digest is {digest} here and {claimed} there")))
            }
            (State::Validate(device), Event::Done) => self.validate(device + 1, now),
            (State::JournalPrepared, Event::Done) => match self.digest {
                Some(digest) => self.enter(State::SendReady, Action::Send(Record::Ready { digest })),
                None => self.fail(Cause::Internal("no digest".into())),
            },
            (State::SendReady, Event::Done) => self.wait(State::AwaitCommit, now),
            (State::AwaitCommit, Event::Received(Record::Commit { digest })) if self.digest == Some(digest) => {
                self.enter(State::JournalOwned, Action::Journal(Mark::Owned))
            }
            (State::JournalOwned, Event::Done) => {
                self.owned_us = now;
                self.quiescent(0, now)
            }
            (State::Retract, Event::Done) => {
                self.queried = false;
                self.discard(0)
            }
            (State::Quiescent(device), Event::Done) => self.quiescent(device + 1, now),
            (State::Running(device), Event::Done) => self.running(device + 1, now),
            (State::Resume, Event::Done) => self.committed(now),
            (State::SendCommitted, Event::Done) if self.facts.as_ref().is_some_and(|facts| facts.verify) => {
                self.wait(State::AwaitVerify, now)
            }
            (State::SendCommitted, Event::Done) => self.owned(),
            (State::AwaitVerify, Event::Received(Record::Verify { digest })) => {
                self.source_memory = Some(digest);
                self.enter(State::Hash, Action::HashMemory)
            }
            (State::Hash, Event::Hashed { more: true, .. }) => self.enter(State::Hash, Action::HashMemory),
            (State::Hash, Event::Hashed { digest, more: false }) => {
                self.verified = Some(self.source_memory == Some(digest));
                self.enter(State::SendVerified, Action::Send(Record::Verified { digest }))
            }
            (State::SendVerified, Event::Done) => self.owned(),
            (State::Recall, Event::Recalled(mark)) => self.recalled(mark),
            (State::SendOutcome(outcome), Event::Done) => self.answered(outcome, now),
            (State::DiscardJournal { .. }, Event::Done) => self.discard(0),
            (State::Discard(device), Event::Done) => self.discard(device + 1),
            (State::SendAborted, Event::Done) => self.discarded(),
            (State::Resolved { here: true }, Event::Begin) => {
                self.owned_us = now;
                self.quiescent(0, now)
            }
            (State::Resolved { here: false }, Event::Begin) => self.discard(0),
            // What else may come: a peer out of step, or a driver. States are listed so that a new one must choose.
            (State::AwaitFirst | State::Match | State::Refuse | State::JournalBegan, event) => self.unexpected(&event),
            (State::EnterResuming(_) | State::Accept | State::Receive | State::Apply, event) => self.unexpected(&event),
            (State::Ack | State::Compare | State::Validate(_) | State::JournalPrepared, event) => {
                self.unexpected(&event)
            }
            (State::SendReady | State::AwaitCommit | State::JournalOwned | State::Retract, event) => {
                self.unexpected(&event)
            }
            (State::Quiescent(_) | State::Running(_) | State::Resume | State::SendCommitted, event) => {
                self.unexpected(&event)
            }
            (State::AwaitVerify | State::Hash | State::SendVerified | State::Recall, event) => self.unexpected(&event),
            (State::SendOutcome(_) | State::DiscardJournal { .. } | State::Discard(_), event) => {
                self.unexpected(&event)
            }
            (State::SendAborted | State::Resolved { .. } | State::Ended, event) => self.unexpected(&event),
        }
    }

    fn matched(&mut self, facts: Facts) -> Action {
        if let Some(reason) = facts.refusal() {
            return self.refuse(RefuseCode::Device, reason);
        }
        self.sequences = vec![Some(0); facts.devices.len()];
        self.facts = Some(facts);
        self.enter(State::JournalBegan, Action::Journal(Mark::Began))
    }

    fn refuse(&mut self, code: RefuseCode, reason: String) -> Action {
        self.cause = Some(Cause::Refused { code, reason: reason.clone() });
        self.enter(State::Refuse, Action::Send(Record::Refuse { code, reason: reason.into() }))
    }

    fn enter_resuming(&mut self, device: usize, now: u64) -> Action {
        if device < self.device_count() {
            self.touched = device + 1;
            return self.set_state(State::EnterResuming(device), device, DeviceState::Resuming, now);
        }
        self.enter(State::Accept, Action::Send(Record::Accept { capabilities: 0 }))
    }

    /// RESUMING -> STOP: the device judges what it was given, while the source can still go on.
    fn validate(&mut self, device: usize, now: u64) -> Action {
        if device < self.device_count() {
            return self.set_state(State::Validate(device), device, DeviceState::Stop, now);
        }
        match self.digest {
            Some(digest) => self.enter(State::JournalPrepared, Action::Journal(Mark::Prepared { digest })),
            None => self.fail(Cause::Internal("no digest".into())),
        }
    }

    /// First of the two phases of starting: all devices answer each other before any starts anything.
    fn quiescent(&mut self, from: usize, now: u64) -> Action {
        let next = self.facts.as_ref().and_then(|facts| {
            (from..facts.devices.len()).find(|device| facts.devices[*device].p2p && !self.lost.contains(device))
        });
        match next {
            Some(device) => self.set_state(State::Quiescent(device), device, DeviceState::RunningP2p, now),
            None => self.running(0, now),
        }
    }

    fn running(&mut self, from: usize, now: u64) -> Action {
        match (from..self.device_count()).find(|device| !self.lost.contains(device)) {
            Some(device) => self.set_state(State::Running(device), device, DeviceState::Running, now),
            None => self.enter(State::Resume, Action::ResumeVmm),
        }
    }

    fn committed(&mut self, now: u64) -> Action {
        let resume_us = now.saturating_sub(self.owned_us);
        self.enter(State::SendCommitted, Action::Send(Record::Committed { resume_us }))
    }

    fn owned(&mut self) -> Action {
        let (verified, resumed) = (self.verified, self.resumed);
        let lost = std::mem::take(&mut self.lost);
        self.enter(State::Ended, Action::End(End::Owned { verified, resumed, lost }))
    }

    fn in_doubt(&mut self, cause: Cause) -> Action {
        self.enter(State::Ended, Action::End(End::InDoubt { cause }))
    }

    fn begin_discard(&mut self, cause: Cause, must: bool) -> Action {
        self.cause = Some(cause);
        self.enter(State::DiscardJournal { must }, Action::Journal(Mark::Discarded))
    }

    fn discard(&mut self, device: usize) -> Action {
        if device < self.touched {
            return self.enter(State::Discard(device), Action::Discard { device });
        }
        if self.queried {
            return self.send_outcome(Outcome::Discarded);
        }
        if self.resolved {
            return self.discarded();
        }
        let reason = self.cause.as_ref().map_or(String::new(), Cause::to_string);
        self.enter(State::SendAborted, Action::Send(Record::Aborted { reason: reason.into() }))
    }

    fn discarded(&mut self) -> Action {
        let cause = self.cause.take().unwrap_or(Cause::Cancelled);
        self.enter(State::Ended, Action::End(End::Discarded { cause }))
    }

    fn aborted(&mut self, reason: String) -> Action {
        let cause = Cause::PeerGaveUp { reason };
        match &self.state {
            State::Receive => self.begin_discard(cause, false),
            State::AwaitCommit => self.begin_discard(cause, true),
            State::AwaitFirst | State::Match | State::Refuse | State::JournalBegan | State::EnterResuming(_) => {
                self.fail(cause)
            }
            State::Accept | State::Apply | State::Ack | State::Compare | State::Validate(_) => self.fail(cause),
            State::JournalPrepared | State::SendReady | State::JournalOwned | State::Retract => self.fail(cause),
            State::Quiescent(_) | State::Running(_) | State::Resume | State::SendCommitted => self.fail(cause),
            State::AwaitVerify | State::Hash | State::SendVerified | State::Recall => self.fail(cause),
            State::SendOutcome(_) | State::DiscardJournal { .. } | State::Discard(_) => self.fail(cause),
            State::SendAborted | State::Resolved { .. } | State::Ended => self.fail(cause),
        }
    }

    /// What the journal says decides, and what is held only where it says PREPARED.
    fn recalled(&mut self, mark: Option<Mark>) -> Action {
        let held = self.digest.is_some();
        match (mark, self.claim) {
            (Some(Mark::Owned), _) => self.send_outcome(Outcome::Owned),
            (Some(Mark::Discarded), _) => {
                self.cause = Some(Cause::PeerGaveUp { reason: "discarded before".into() });
                self.send_outcome(Outcome::Discarded)
            }
            (Some(Mark::Prepared { digest }), Some(SourceClaim::Committing)) if self.digest == Some(digest) => {
                self.send_outcome(Outcome::Prepared)
            }
            (Some(Mark::Prepared { .. }), Some(SourceClaim::Committing)) if held => {
                self.in_doubt(Cause::Internal("the journal tells of another stream than the one held".into()))
            }
            (Some(Mark::Began | Mark::Prepared { .. }), Some(SourceClaim::Committing)) => {
                self.begin_discard(Cause::PeerGaveUp { reason: "this host lost what it had received".into() }, true)
            }
            (Some(Mark::Began | Mark::Prepared { .. }), Some(SourceClaim::Kept) | None) => {
                self.begin_discard(Cause::PeerGaveUp { reason: "the source kept the guest".into() }, true)
            }
            (None | Some(Mark::Committing { .. } | Mark::Kept | Mark::Moved), _) => {
                self.cause = Some(Cause::Protocol("a migration that this host does not know".into()));
                self.send_outcome(Outcome::Unknown)
            }
        }
    }

    fn send_outcome(&mut self, outcome: Outcome) -> Action {
        let explanation = match outcome {
            Outcome::Owned => "the guest belongs to the destination",
            Outcome::Prepared => "all was received and waits for COMMIT",
            Outcome::Discarded => "the destination discarded it and will never run it",
            Outcome::Unknown => "the destination's journal has no such migration",
        };
        let record = Record::Outcome { outcome, explanation: explanation.into() };
        self.enter(State::SendOutcome(outcome), Action::Send(record))
    }

    fn answered(&mut self, outcome: Outcome, now: u64) -> Action {
        match outcome {
            Outcome::Owned => self.enter(State::Ended, Action::End(End::Answered { outcome })),
            Outcome::Discarded | Outcome::Unknown if self.touched == 0 => {
                self.enter(State::Ended, Action::End(End::Answered { outcome }))
            }
            Outcome::Prepared => {
                self.queried = false;
                self.wait(State::AwaitCommit, now)
            }
            Outcome::Discarded | Outcome::Unknown => self.discarded(),
        }
    }

    /// The arrow of each state when its action failed, timed out, was answered wrongly, or was cancelled.
    fn fail(&mut self, cause: Cause) -> Action {
        match self.state.clone() {
            State::AwaitFirst | State::Recall if self.queried => self.in_doubt(cause),
            State::AwaitFirst | State::Match | State::Refuse | State::Recall => {
                self.cause.get_or_insert(cause);
                self.discarded()
            }
            State::JournalBegan => match cause {
                Cause::Refused { code, reason } => self.refuse(code, reason),
                other => self.refuse(RefuseCode::Busy, other.to_string()),
            },
            State::EnterResuming(_) | State::Accept | State::Receive | State::Apply | State::Ack => {
                self.begin_discard(cause, false)
            }
            State::Compare | State::Validate(_) | State::JournalPrepared => self.begin_discard(cause, false),
            // READY may have arrived: the source may have committed, or may yet.
            State::SendReady | State::AwaitCommit => self.in_doubt(cause),
            State::JournalOwned => {
                self.cause = Some(cause);
                self.enter(State::Retract, Action::Journal(Mark::Discarded))
            }
            State::Retract => self.in_doubt(cause),
            // The guest is ours now; it gets what can be had of its devices.
            State::Quiescent(device) => {
                self.lost.push(device);
                self.quiescent(device + 1, self.owned_us)
            }
            State::Running(device) => {
                self.lost.push(device);
                self.running(device + 1, self.owned_us)
            }
            State::Resume => {
                self.resumed = false;
                self.committed(self.owned_us)
            }
            // The source will ask, and find OWNED in the journal.
            State::SendCommitted | State::AwaitVerify | State::Hash | State::SendVerified => self.owned(),
            State::SendOutcome(Outcome::Owned) => self.in_doubt(cause),
            State::SendOutcome(Outcome::Prepared) => self.in_doubt(cause),
            State::SendOutcome(Outcome::Discarded | Outcome::Unknown) => self.discarded(),
            // READY may be out: without DISCARDED on the disk nothing may be promised.
            State::DiscardJournal { must: true } => self.in_doubt(cause),
            State::DiscardJournal { must: false } => self.discard(0),
            State::Discard(device) => self.discard(device + 1),
            State::SendAborted => self.discarded(),
            State::Resolved { .. } | State::Ended => self.in_doubt(cause),
        }
    }
}
