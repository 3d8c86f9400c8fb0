//! Every failure arrow of the source, and the way back to a guest that runs here.

use vfio_mediate_sdk::state::DeviceState;

use super::{Action, End, Source, State, UndoStep};
use crate::migration::cause::Cause;
use crate::migration::journal::Mark;
use crate::migration::wire::{Record, SourceClaim};

impl Source {
    /// The arrow of each state when its action failed, timed out, was answered wrongly, or was cancelled.
    pub(super) fn fail(&mut self, cause: Cause, now: u64) -> Action {
        match self.state.clone() {
            State::New | State::Describing | State::JournalBegan | State::Greeting | State::AwaitAccept => {
                self.begin_unwind(cause, now)
            }
            State::StartTracking | State::EnterPreCopy(_) | State::Sync | State::Estimate | State::Draining => {
                self.begin_unwind(cause, now)
            }
            State::RoundPages | State::RoundDevices(_) | State::RoundEnd | State::AwaitAck | State::CommitRound => {
                self.begin_unwind(cause, now)
            }
            State::Pause | State::Quiesce(_) | State::Stop(_) | State::SendStop | State::LastSync => {
                self.begin_unwind(cause, now)
            }
            State::LastDrain | State::LastPages | State::LastDevices(_) | State::Digest | State::AwaitReady => {
                self.begin_unwind(cause, now)
            }
            State::CommitLastDrain => self.begin_unwind(cause, now),
            // COMMIT was not sent, but COMMITTING may be on the disk: a restart would give the guest away.
            State::JournalCommitting => {
                self.cause = Some(cause);
                self.enter(State::Retract, Action::Journal(Mark::Kept))
            }
            State::Retract => {
                let reason = "the source cannot write its journal".into();
                self.enter(State::AskAbort, Action::Send(Record::Abort { reason }))
            }
            State::AskAbort | State::AwaitAborted | State::SendCommit | State::AwaitCommitted => self.in_doubt(cause),
            State::Query | State::AwaitOutcome => match self.claim {
                SourceClaim::Committing => self.in_doubt(cause),
                SourceClaim::Kept => {
                    self.undo.journaled = false;
                    self.begin_unwind(cause, now)
                }
            },
            // The destination owns the guest and will say so again: a restart asks it.
            State::JournalMoved => self.release(0, now),
            State::Release(device) => {
                self.lost.push(device);
                self.release(device + 1, now)
            }
            State::ReleaseTracking => self.verify(),
            State::Hash | State::SendVerify | State::AwaitVerified => self.moved(),
            State::JournalKept => self.unwind(UndoStep::Drain, now),
            State::Unwind(step) => {
                self.undo_failed(step);
                self.unwound(step, now)
            }
            State::Resolved { .. } | State::Ended => self.in_doubt(cause),
        }
    }

    pub(super) fn begin_unwind(&mut self, cause: Cause, now: u64) -> Action {
        self.cause = Some(cause);
        self.unwind(UndoStep::Drain, now)
    }

    pub(super) fn undo_failed(&mut self, step: UndoStep) {
        match step {
            UndoStep::Quiescent(index) | UndoStep::Running(index) => {
                if let Some(device) = self.undo.touched.get(index).filter(|device| !self.lost.contains(device)) {
                    self.lost.push(*device);
                }
            }
            UndoStep::Resume => self.resumed = false,
            // The guest runs; a peer that was not told finds out by its deadline, or by asking.
            UndoStep::Drain | UndoStep::Tracking | UndoStep::Journal | UndoStep::Tell | UndoStep::End => {}
        }
    }

    pub(super) fn unwound(&mut self, step: UndoStep, now: u64) -> Action {
        let next = match step {
            UndoStep::Drain => UndoStep::Quiescent(0),
            UndoStep::Quiescent(index) => UndoStep::Quiescent(index + 1),
            UndoStep::Running(index) => UndoStep::Running(index + 1),
            UndoStep::Resume => UndoStep::Tracking,
            UndoStep::Tracking => UndoStep::Journal,
            UndoStep::Journal => UndoStep::Tell,
            UndoStep::Tell | UndoStep::End => UndoStep::End,
        };
        self.unwind(next, now)
    }

    /// From `step` on, the first that there is something to do for. The guest comes first, the peer last.
    pub(super) fn unwind(&mut self, step: UndoStep, now: u64) -> Action {
        let until_us = self.device_until(now);
        let mut step = step;
        loop {
            let (action, next) = match step {
                UndoStep::Drain => (self.undo.drain.then_some(Action::RestoreDrain), UndoStep::Quiescent(0)),
                UndoStep::Quiescent(index) => match self.undo.touched.get(index).copied() {
                    Some(device) if self.facts.devices[device].p2p => {
                        let target = DeviceState::RunningP2p;
                        (Some(Action::Restore { device, target, until_us }), UndoStep::Quiescent(index + 1))
                    }
                    Some(_) => (None, UndoStep::Quiescent(index + 1)),
                    None => (None, UndoStep::Running(0)),
                },
                UndoStep::Running(index) => match self.undo.touched.get(index).copied() {
                    Some(device) if self.lost.contains(&device) => (None, UndoStep::Running(index + 1)),
                    Some(device) => {
                        let target = DeviceState::Running;
                        (Some(Action::Restore { device, target, until_us }), UndoStep::Running(index + 1))
                    }
                    None => (None, UndoStep::Resume),
                },
                UndoStep::Resume => (self.undo.paused.then_some(Action::ResumeVmm), UndoStep::Tracking),
                UndoStep::Tracking => (self.undo.tracking.then_some(Action::StopTracking), UndoStep::Journal),
                UndoStep::Journal => (self.undo.journaled.then_some(Action::Journal(Mark::Kept)), UndoStep::Tell),
                UndoStep::Tell => {
                    let reason = self.cause.as_ref().map_or(String::new(), Cause::to_string);
                    let abort = Action::Send(Record::Abort { reason: reason.into() });
                    (self.undo.greeted.then_some(abort), UndoStep::End)
                }
                UndoStep::End => {
                    let cause = self.cause.take().unwrap_or(Cause::Cancelled);
                    let lost = std::mem::take(&mut self.lost);
                    return self.enter(State::Ended, Action::End(End::Kept { cause, resumed: self.resumed, lost }));
                }
            };
            match action {
                Some(action) => return self.enter(State::Unwind(step), action),
                None => step = next,
            }
        }
    }
}
