//! Rounds of pages and device state: what may come while the guest still runs at the source, and when it has stopped.

use super::{Action, Destination, Event, State};
use crate::migration::cause::Cause;
use crate::migration::wire::{PAGE_SIZE, Record};

impl Destination {
    /// Whether these pages would be taken if they were the next record: then their data may go to where they belong before
    /// the record is complete. Memory that a migration has failed over is garbage in any case.
    pub fn would_take(&self, first: u64, count: u64) -> bool {
        let size = self.facts.as_ref().map_or(0, |facts| facts.pages);
        matches!(self.state, State::Receive) && first.checked_add(count).is_some_and(|end| end <= size)
    }

    pub(super) fn receive(&mut self, record: Record<'_>, now: u64) -> Action {
        match record {
            Record::Pages { first, data } => {
                let count = (data.len() / PAGE_SIZE as usize) as u64;
                self.take_pages(first, count, 0, Action::WritePages)
            }
            Record::PlacedPages { first, count } => {
                self.take_pages(first, count, 0, Action::PlacedPages { first, count })
            }
            Record::ZeroPages { first, count } => {
                self.take_pages(first, count, count, Action::ZeroPages { first, count })
            }
            Record::DeviceState { device, last, sequence, .. } => self.take_state(device as usize, last, sequence),
            Record::RoundEnd { round, pages } if !self.stopped => {
                let due = self.round + 1;
                if round != due || pages != self.pages_in_round {
                    let held = self.pages_in_round;
                    let what = format!("round {round} of {pages} pages ends where round {due} has brought {held}");
                    return self.fail(Cause::Protocol(what));
                }
                self.round = round;
                self.pages_in_round = 0;
                self.enter(State::Ack, Action::Send(Record::RoundAck { round, pages }))
            }
            Record::Stop { rounds } if !self.stopped && rounds == self.round && self.pages_in_round == 0 => {
                self.stopped = true;
                self.wait(State::Receive, now)
            }
            Record::Digest { digest } if self.stopped && self.sequences.iter().all(Option::is_none) => {
                self.claimed = Some(digest);
                self.enter(State::Compare, Action::Compare)
            }
            other => self.unexpected(&Event::Received(other)),
        }
    }

    fn take_pages(&mut self, first: u64, count: u64, zero: u64, action: Action) -> Action {
        let size = self.facts.as_ref().map_or(0, |facts| facts.pages);
        match first.checked_add(count) {
            Some(end) if end <= size => {
                self.pages_in_round = self.pages_in_round.saturating_add(count);
                self.pages = self.pages.saturating_add(count);
                self.zero_pages = self.zero_pages.saturating_add(zero);
                self.enter(State::Apply, action)
            }
            _ => self.fail(Cause::Protocol(format!("{count} pages from {first} on, in a memory of {size}"))),
        }
    }

    fn take_state(&mut self, device: usize, last: bool, sequence: u64) -> Action {
        match self.sequences.get_mut(device) {
            Some(next) if *next == Some(sequence) && (self.stopped || !last) => {
                *next = if last { None } else { sequence.checked_add(1) };
                self.enter(State::Apply, Action::LoadState { device })
            }
            _ => self.fail(Cause::Protocol(format!("chunk {sequence} of device {device} is not what is due"))),
        }
    }
}
