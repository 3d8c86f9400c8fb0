//! One connection's rules, without a connection: bytes and file descriptors in, requests and replies out.
//!
//! **Owns** the handshake, the limits that were agreed on, the order of requests, and what the server has asked the client.
//! **Must never** perform I/O, block, or let a reply wait for a request: a device that waits for its DMA inside a request
//! gets its answer although more requests came first.
//!
//! ```text
//!  FRESH -- VERSION, agreed --> READY -- violation, or the peer is gone --> ENDED
//!    +----- VERSION refused, or another command first: answered, then --------^
//! ```
//! The driver: receive into [`Session::space`], tell [`Session::received`], then [`Session::next`] until it says
//! [`Next::Wait`]; [`Next::Serve`] goes to [`serve`], which needs no session and so no lock on it. `F` is a file descriptor;
//! dropping it closes it.

mod input;
mod maps;
mod outstanding;
mod serve;
#[cfg(test)]
mod tests;

pub use input::{FDS_WAITING_MAX, INPUT_BYTES, Lent, Message, REQUESTS_WAITING_MAX};
pub use maps::Maps;
pub use outstanding::{OUTSTANDING_BYTES_MAX, OUTSTANDING_MAX, Ticket};
pub use serve::{Backend, RegionAnswer, Served, serve};

use rustix::io::Errno;

use self::input::Input;
use self::outstanding::Outstanding;
use super::wire::{
    Capabilities, Command, DATA_XFER_MAX, DMA_MAPS_MAX, DmaAccess, HEADER_LENGTH, Header, MESSAGE_MAX, MSG_FDS_MAX,
    MessageType, MigrationCapability, PAGE_SIZE, Put, Request, VERSION_MAJOR, VERSION_MESSAGE_MAX, VERSION_MINOR_MAX,
    Version,
};

/// Most bytes that one send of a batch has: longer ones reach some clients in pieces, which end the connection there. A
/// single longer message is a send of its own.
pub const BATCH_SEND_MAX: usize = 16 * 1024;
/// Most bytes of a batch.
pub const BATCH_MAX: usize = 1024 * 1024;

/// The client does not keep to the protocol. Nothing that it sends can be understood any more: the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("a message of {size} bytes, less than its header")]
    Size { size: u32 },
    #[error("a message of {size} bytes, at most {most} are taken here")]
    TooLong { size: u32, most: usize },
    #[error("a reply to {command:?} that does not answer it")]
    WrongReply { command: Command },
    #[error("no VERSION was agreed on")]
    NoVersion,
    #[error("more requests than can wait came before a reply that is waited for")]
    Flood,
    #[error("the session has ended")]
    Ended,
}

/// What both sides can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    pub minor: u16,
    /// Most file descriptors that the client takes in one message
    pub client_msg_fds: u32,
    /// Most bytes of data in one message, either way
    pub max_data_xfer_size: u32,
    pub max_dma_maps: u32,
    pub write_multiple: bool,
}

/// Fewer bytes of data than this lie behind their header; more have memory of their own, which is never filled in advance.
const BULK_MIN: usize = 4096;

/// Replies in the making: `bytes`, and [`Self::bulk`] behind them. The memory is reused from one reply to the next.
#[derive(Debug)]
pub struct Output<F> {
    pub bytes: Vec<u8>,
    pub fds: Vec<F>,
    /// As long as the longest reply had it
    bulk: Vec<u8>,
    bulk_length: usize,
}

impl<F> Default for Output<F> {
    fn default() -> Self {
        Self { bytes: Vec::new(), fds: Vec::new(), bulk: Vec::new(), bulk_length: 0 }
    }
}

impl<F> Output<F> {
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.fds.clear();
        self.bulk_length = 0;
    }

    /// What comes behind `bytes`.
    pub fn bulk(&self) -> &[u8] {
        self.bulk.get(..self.bulk_length).unwrap_or(&[])
    }

    /// The message, in one piece.
    pub fn concat(&self) -> Vec<u8> {
        [&self.bytes, self.bulk()].concat()
    }

    /// Room for `count` bytes at the end of the reply, at most once. They are what they happen to be: bytes of an earlier reply to
    /// the same client.
    fn room(&mut self, count: usize) -> &mut [u8] {
        if count < BULK_MIN {
            let begin = self.bytes.len();
            self.bytes.resize(begin + count, 0);
            return self.bytes.get_mut(begin..).unwrap_or(&mut []);
        }
        if self.bulk.len() < count {
            self.bulk.resize(count, 0);
        }
        self.bulk_length = count;
        self.bulk.get_mut(..count).unwrap_or(&mut [])
    }

    /// Of `room` bytes, which are the end of the reply, only `count` are sent.
    fn shorten(&mut self, room: usize, count: usize) {
        if room < BULK_MIN {
            self.bytes.truncate(self.bytes.len() + count - room);
        } else {
            self.bulk_length = count;
        }
    }

    /// Replaces all of it by an error's reply.
    fn error<G>(&mut self, to: &Message<G>, errno: Errno) {
        self.clear();
        Header::error(to.header.id, to.header.command, errno).write(&mut self.bytes);
    }

    /// Room for the header, before the payload is written.
    fn begin(&mut self) {
        self.clear();
        self.bytes.resize(HEADER_LENGTH, 0);
    }

    fn finish<G>(&mut self, to: &Message<G>) {
        let payload = (self.bytes.len() + self.bulk_length).saturating_sub(HEADER_LENGTH);
        let header = Header::reply(to.header.id, to.header.command, payload).to_bytes();
        self.bytes[..HEADER_LENGTH].copy_from_slice(&header);
    }
}

/// What the driver does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Receive
    Wait,
    /// Send the output, then ask again
    Send,
    /// Hand the message to [`serve`], send the output unless it is empty, then ask again
    Serve(Negotiated),
    /// Close; nothing else will come
    Close(Violation),
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Fresh,
    Ready(Negotiated),
    Ended(Violation),
}

/// Many DMA_WRITEs without replies and, at the end, one that is replied to: once its reply is here, all are done.
#[derive(Debug)]
pub struct Batch {
    pub bytes: Vec<u8>,
    /// Where each send ends; never inside a message
    pub ends: Vec<usize>,
    pub barrier: Ticket,
}

/// One client's connection.
#[derive(Debug)]
pub struct Session<F> {
    phase: Phase,
    input: Input<F>,
    outstanding: Outstanding,
}

impl<F> Default for Session<F> {
    fn default() -> Self {
        Self { phase: Phase::Fresh, input: Input::new(), outstanding: Outstanding::default() }
    }
}

impl<F> Session<F> {
    pub fn new() -> Self {
        Self::default()
    }

    /// What was agreed on.
    pub fn negotiated(&self) -> Option<Negotiated> {
        match self.phase {
            Phase::Ready(negotiated) => Some(negotiated),
            Phase::Fresh | Phase::Ended(_) => None,
        }
    }

    /// Replies to nothing that were dropped.
    pub fn unsolicited_replies(&self) -> u64 {
        self.outstanding.unsolicited
    }

    /// Where to receive into. Empty: serve first, there is no room for more.
    pub fn space(&mut self) -> &mut [u8] {
        if matches!(self.phase, Phase::Ended(_)) { &mut [] } else { self.input.space() }
    }

    /// As [`Self::space`], for a driver that receives while the session is in use otherwise. Until [`Self::give_back`] nothing
    /// may be received or taken ([`Self::next`]).
    pub fn lend(&mut self) -> Lent {
        self.input.lend()
    }

    pub fn give_back(&mut self, lent: Lent) {
        self.input.give_back(lent);
    }

    /// `count` bytes were received into [`Self::space`] by one receive, and `fds` with them.
    pub fn received(&mut self, count: usize, fds: impl IntoIterator<Item = F>) -> Result<(), Violation> {
        self.received_with(count, fds, false)?;
        if self.input.is_full() && self.outstanding.is_waiting() {
            self.end(Violation::Flood);
            return Err(Violation::Flood);
        }
        Ok(())
    }

    /// As [`Self::received`], for a driver that looks itself after replies that can be waited for no longer because as many requests
    /// wait as can. `fds_lost`: descriptors came that could not be taken, so that their message must not be taken for one without.
    pub fn received_with(
        &mut self,
        count: usize,
        fds: impl IntoIterator<Item = F>,
        fds_lost: bool,
    ) -> Result<(), Violation> {
        // Behind a VERSION that has not been looked at yet other requests may come already.
        let first_max = match self.phase {
            Phase::Fresh => VERSION_MESSAGE_MAX,
            Phase::Ready(_) => MESSAGE_MAX,
            Phase::Ended(_) => return Err(Violation::Ended),
        };
        let outstanding = &mut self.outstanding;
        let on_reply = |header: &Header, payload: &[u8]| outstanding.reply(header, payload);
        let received = self.input.received(count, fds, fds_lost, first_max, on_reply);
        received.inspect_err(|violation| self.end(*violation))
    }

    /// The connection is of no use any more: everything that waits gets ENOTCONN, descriptors are closed.
    pub fn end(&mut self, why: Violation) {
        if !matches!(self.phase, Phase::Ended(_)) {
            self.phase = Phase::Ended(why);
        }
        self.outstanding.end(Errno::NOTCONN);
        self.input.clear();
    }

    /// The oldest request that has not been served.
    pub fn next(&mut self, message: &mut Message<F>, out: &mut Output<F>) -> Next {
        out.clear();
        if let Phase::Ended(why) = self.phase {
            return Next::Close(why);
        }
        if !self.input.take(message) {
            return Next::Wait;
        }
        match self.phase {
            Phase::Ready(negotiated) => Next::Serve(negotiated),
            Phase::Fresh => {
                match handshake(message) {
                    Ok((negotiated, version)) => {
                        self.phase = Phase::Ready(negotiated);
                        out.begin();
                        version.write(&mut out.bytes);
                        out.finish(message);
                    }
                    Err(errno) => {
                        out.error(message, errno);
                        self.end(Violation::NoVersion);
                    }
                }
                Next::Send
            }
            Phase::Ended(why) => Next::Close(why),
        }
    }

    /// Asks for `count` bytes of the client's memory: `out` is what to send. Not more than the client takes in one message
    /// (EINVAL). EAGAIN: too much is waited for already.
    pub fn dma_read(&mut self, address: u64, count: u32, out: &mut Vec<u8>) -> Result<Ticket, Errno> {
        let access = self.access(address, count)?;
        let ticket = self.outstanding.begin(Command::DmaRead, access)?;
        out.clear();
        Header::command(ticket.id(), Command::DmaRead, DmaAccess::LENGTH, false).write(out);
        access.write(out);
        Ok(ticket)
    }

    /// Writes to the client's memory, and is told when it is done. As [`Self::dma_read`].
    pub fn dma_write(&mut self, address: u64, data: &[u8], out: &mut Vec<u8>) -> Result<Ticket, Errno> {
        let access = self.access(address, u32::try_from(data.len()).unwrap_or(u32::MAX))?;
        let ticket = self.outstanding.begin(Command::DmaWrite, access)?;
        out.clear();
        push_write(ticket.id(), access, data, false, out);
        Ok(ticket)
    }

    /// Takes writes off `writes` until they end or the batch is full ([`BATCH_MAX`]). The last one taken is replied to.
    /// EINVAL where there is none, or one is longer than the client takes: nothing of the batch may be sent then. EAGAIN: none
    /// was taken.
    pub fn dma_write_batch<'a>(
        &mut self,
        writes: &mut std::iter::Peekable<impl Iterator<Item = (u64, &'a [u8])>>,
    ) -> Result<Batch, Errno> {
        self.outstanding.room(0)?;
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        let mut send_begin = 0;
        while let Some((address, data)) = writes.next() {
            let access = self.access(address, u32::try_from(data.len()).unwrap_or(u32::MAX))?;
            let length = HEADER_LENGTH + DmaAccess::LENGTH + data.len();
            if bytes.len() > send_begin && bytes.len() + length - send_begin > BATCH_SEND_MAX {
                ends.push(bytes.len());
                send_begin = bytes.len();
            }
            let next_length = writes.peek().map(|(_, data)| HEADER_LENGTH + DmaAccess::LENGTH + data.len());
            let is_last = next_length.is_none_or(|next| bytes.len() + length + next > BATCH_MAX);
            if is_last {
                let barrier = self.outstanding.begin(Command::DmaWrite, access)?;
                push_write(barrier.id(), access, data, false, &mut bytes);
                ends.push(bytes.len());
                return Ok(Batch { bytes, ends, barrier });
            }
            let id = self.outstanding.id();
            push_write(id, access, data, true, &mut bytes);
        }
        Err(Errno::INVAL)
    }

    fn access(&self, address: u64, count: u32) -> Result<DmaAccess, Errno> {
        let negotiated = self.negotiated().ok_or(Errno::NOTCONN)?;
        let last = u64::from(count).checked_sub(1).and_then(|more| address.checked_add(more));
        if last.is_none() || count > negotiated.max_data_xfer_size {
            return Err(Errno::INVAL);
        }
        Ok(DmaAccess { address, count })
    }

    /// What came: a read's data, nothing for a write, the client's errno, or ENOTCONN after the end. `None`: not yet.
    pub fn take_reply(&mut self, ticket: Ticket) -> Option<Result<Vec<u8>, Errno>> {
        self.outstanding.take(ticket)
    }

    /// Nobody waits for this any more; a reply that comes later is dropped.
    pub fn abandon(&mut self, ticket: Ticket) {
        self.outstanding.abandon(ticket);
    }
}

fn push_write(id: u16, access: DmaAccess, data: &[u8], no_reply: bool, out: &mut Vec<u8>) {
    Header::command(id, Command::DmaWrite, DmaAccess::LENGTH + data.len(), no_reply).write(out);
    access.write(out);
    out.extend_from_slice(data);
}

/// What is agreed on with a client that sends this first, and the reply; or the errno before the connection ends.
fn handshake<F>(message: &Message<F>) -> Result<(Negotiated, Version), Errno> {
    let is_request = message.header.kind == MessageType::Command { no_reply: false };
    if !is_request || message.header.command != Command::Version.raw() {
        return Err(Errno::PROTO);
    }
    if message.fds_refused || !message.fds.is_empty() {
        return Err(Errno::INVAL);
    }
    let request = Request::parse(message.header.command, message.payload(), 0, DATA_XFER_MAX);
    let Ok(Request::Version(proposed)) = request else { return Err(Errno::INVAL) };
    if proposed.major != VERSION_MAJOR {
        return Err(Errno::PROTONOSUPPORT);
    }
    let theirs = proposed.capabilities;
    if theirs.pgsizes() & PAGE_SIZE == 0 || theirs.max_data_xfer_size() == 0 {
        return Err(Errno::INVAL);
    }
    let negotiated = Negotiated {
        minor: proposed.minor.min(VERSION_MINOR_MAX),
        client_msg_fds: theirs.max_msg_fds(),
        max_data_xfer_size: theirs.max_data_xfer_size().min(DATA_XFER_MAX),
        max_dma_maps: theirs.max_dma_maps().min(DMA_MAPS_MAX),
        write_multiple: theirs.write_multiple == Some(true),
    };
    // Some clients refuse numbers above their own. Twin sockets are not offered, and so are not named.
    let capabilities = Capabilities {
        max_msg_fds: Some(theirs.max_msg_fds().min(MSG_FDS_MAX as u32)),
        max_data_xfer_size: Some(negotiated.max_data_xfer_size),
        max_dma_maps: theirs.max_dma_maps.map(|_| negotiated.max_dma_maps),
        pgsizes: theirs.pgsizes.map(|_| PAGE_SIZE),
        twin_socket: None,
        write_multiple: negotiated.write_multiple.then_some(true),
        migration: theirs.migration.map(|theirs| MigrationCapability {
            pgsize: PAGE_SIZE,
            max_bitmap_size: Some(theirs.max_bitmap_size.map_or(BITMAP, |size| size.min(BITMAP))),
        }),
    };
    Ok((negotiated, Version { major: VERSION_MAJOR, minor: negotiated.minor, capabilities }))
}

const BITMAP: u64 = super::wire::BITMAP_MAX;
