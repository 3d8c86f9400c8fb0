//! What the server has asked the client and waits for.
//!
//! **Owns** the ids of the server's requests and the replies that have come. **Must never** take a reply for another
//! request, or wait without a bound on how much it waits for.
//!
//! ```text
//!  begin --> WAITING -- its reply --> DONE -- take --> gone
//!               +-- abandon --> ABANDONED -- its reply --> gone      (the id is not used again before)
//! ```

use std::collections::BTreeMap;

use rustix::io::Errno;

use super::Violation;
use crate::frontend::vfio_user::wire::{Command, DATA_XFER_MAX, DmaAccess, Header, MessageType};

/// Most requests of the server that wait for a reply.
pub const OUTSTANDING_MAX: usize = 64;
/// Most bytes of DMA_READ data that are waited for or wait to be taken.
pub const OUTSTANDING_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// One request of the server that is replied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u16);

impl Ticket {
    pub(super) fn id(self) -> u16 {
        self.0
    }
}

#[derive(Debug)]
struct Slot {
    command: Command,
    access: DmaAccess,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting,
    Abandoned,
    Done(Result<Vec<u8>, Errno>),
}

#[derive(Debug, Default)]
pub(super) struct Outstanding {
    slots: BTreeMap<u16, Slot>,
    next: u16,
    bytes: u64,
    /// Replies to nothing
    pub unsolicited: u64,
    ended: Option<Errno>,
}

impl Outstanding {
    /// An id that no request bears that waits.
    pub fn id(&mut self) -> u16 {
        while self.slots.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        id
    }

    /// EAGAIN: as much is waited for as may be; ENOTCONN after the end.
    pub fn begin(&mut self, command: Command, access: DmaAccess) -> Result<Ticket, Errno> {
        let bytes = data_bytes(command, access);
        self.room(bytes)?;
        let id = self.id();
        self.bytes += bytes;
        self.slots.insert(id, Slot { command, access, state: State::Waiting });
        Ok(Ticket(id))
    }

    pub fn room(&self, bytes: u64) -> Result<(), Errno> {
        match self.ended {
            Some(errno) => Err(errno),
            None if self.slots.len() == OUTSTANDING_MAX || self.bytes + bytes > OUTSTANDING_BYTES_MAX => {
                Err(Errno::AGAIN)
            }
            None => Ok(()),
        }
    }

    pub fn is_waiting(&self) -> bool {
        self.slots.values().any(|slot| matches!(slot.state, State::Waiting))
    }

    /// A reply that answers nothing is dropped; one that answers wrongly ends the session.
    pub fn reply(&mut self, header: &Header, payload: &[u8]) -> Result<(), Violation> {
        let MessageType::Reply { error } = header.kind else { return Ok(()) };
        let waits = |slot: &&mut Slot| !matches!(slot.state, State::Done(_)) && slot.command.raw() == header.command;
        let Some(slot) = self.slots.get_mut(&header.id).filter(waits) else {
            self.unsolicited += 1;
            return Ok(());
        };
        let outcome = match error {
            Some(errno) => Err(errno),
            None => Ok(data_of(slot, payload).ok_or(Violation::WrongReply { command: slot.command })?),
        };
        if matches!(slot.state, State::Abandoned) {
            self.remove(header.id);
        } else {
            slot.state = State::Done(outcome);
        }
        Ok(())
    }

    /// What came: a read's data, nothing for a write. `None`: not yet.
    pub fn take(&mut self, ticket: Ticket) -> Option<Result<Vec<u8>, Errno>> {
        match self.slots.get(&ticket.0) {
            None => Some(Err(self.ended.unwrap_or(Errno::INVAL))),
            Some(Slot { state: State::Done(_), .. }) => match self.remove(ticket.0)?.state {
                State::Done(outcome) => Some(outcome),
                State::Waiting | State::Abandoned => None,
            },
            Some(_) => None,
        }
    }

    /// Nobody waits any more.
    pub fn abandon(&mut self, ticket: Ticket) {
        match self.slots.get_mut(&ticket.0) {
            Some(slot) if matches!(slot.state, State::Waiting) => slot.state = State::Abandoned,
            Some(Slot { state: State::Done(_), .. }) => drop(self.remove(ticket.0)),
            _ => {}
        }
    }

    fn remove(&mut self, id: u16) -> Option<Slot> {
        let slot = self.slots.remove(&id)?;
        self.bytes -= data_bytes(slot.command, slot.access);
        Some(slot)
    }

    /// No reply will come: whoever waits gets this.
    pub fn end(&mut self, errno: Errno) {
        self.ended.get_or_insert(errno);
        for slot in self.slots.values_mut().filter(|slot| !matches!(slot.state, State::Done(_))) {
            slot.state = State::Done(Err(errno));
        }
    }
}

fn data_bytes(command: Command, access: DmaAccess) -> u64 {
    if command == Command::DmaRead { u64::from(access.count) } else { 0 }
}

/// The data of a reply that answers this.
fn data_of(slot: &Slot, payload: &[u8]) -> Option<Vec<u8>> {
    let (access, data) = match slot.command {
        Command::DmaRead => DmaAccess::parse_with_data(payload, DATA_XFER_MAX).ok()?,
        _ => (DmaAccess::parse_write_reply(payload, DATA_XFER_MAX).ok()?, &[][..]),
    };
    (access == slot.access).then(|| data.to_vec())
}
