//! One connection to a server, as many threads use it.
//!
//! **Owns** the socket, the ids of requests, who sends and who receives now. **Must never** split a message, wait without a
//! deadline, or let a request of its own hold up an answer to the server: while it waits for room to send it receives.
//!
//! ```text
//!  a thread that waits for a reply:  nobody receives -> it does, until its reply is here, and delivers the others'
//!                                    somebody does   -> it sleeps until it is woken
//! ```
//! Locks: `state` and `maps` are leaves. `outbound` is a right, held while a message is sent, which has a deadline; whoever cannot
//! have it leaves its answer in `state.answers`, and the holder sends it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

use super::error::{Failure, Violation};
use super::lock;
use super::memory::{GuestMemory, answer};
use super::reader::{Frame, Reader};
use crate::frontend::vfio_user::server::socket;
use crate::frontend::vfio_user::session::Maps;
use crate::frontend::vfio_user::wire::{Command, DATA_XFER_MAX, HEADER_LENGTH, Header, MessageType};

/// Most requests at a time; one more waits.
const PENDING_MAX: usize = 256;
/// Most answers that wait to be sent, and bytes of them; a server that has asked for more does not read.
const ANSWERS_MAX: usize = 128;
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Most bytes of a reply before its data.
pub const FIXED_MAX: usize = 40;
/// Of a reply with more data than this what is still to come is received where it belongs.
const DIRECT_MIN: usize = 16 * 1024;

/// A reply, checked for its length only. Its data are where the caller wanted them.
#[derive(Debug)]
pub struct Reply {
    fixed: [u8; FIXED_MAX],
    fixed_length: usize,
    /// Bytes of data behind the fixed part
    pub data: usize,
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    pub fn fixed(&self) -> &[u8] {
        self.fixed.get(..self.fixed_length).unwrap_or(&[])
    }
}

/// A request to be sent: `head` and `tail` are its payload.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub command: Command,
    pub head: &'a [u8],
    pub tail: &'a [u8],
    pub fds: &'a [BorrowedFd<'a>],
    /// Bytes of the reply before its data, at most [`FIXED_MAX`]
    pub fixed: usize,
    /// Most descriptors that may come with the reply
    pub fds_max: usize,
}

impl<'a> Ask<'a> {
    pub fn new(command: Command, head: &'a [u8], fixed: usize) -> Self {
        Self { command, head, tail: &[], fds: &[], fixed, fds_max: 0 }
    }
}

type Outcome = Result<(Vec<u8>, Vec<OwnedFd>), Errno>;

#[derive(Debug)]
struct Pending {
    id: u16,
    command: Command,
    payload_max: usize,
    fds_max: usize,
    /// Put here by another thread than the one that waits
    outcome: Option<Outcome>,
}

#[derive(Debug)]
struct State {
    pending: Vec<Pending>,
    next_id: u16,
    /// `None`: somebody receives
    reader: Option<Box<Reader>>,
    answers: VecDeque<Vec<u8>>,
    answer_bytes: usize,
    waiting: u32,
    ended: Option<Failure>,
}

#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    patience: Duration,
    memory: Option<Arc<dyn GuestMemory>>,
    pub maps: Mutex<Maps>,
    state: Mutex<State>,
    changed: Condvar,
    outbound: Mutex<()>,
}

/// The reply that the receiving thread itself waits for.
struct Own<'a> {
    id: u16,
    fixed: usize,
    into: &'a mut [u8],
    outcome: Option<Result<Reply, Errno>>,
}

impl Connection {
    pub fn new(socket: OwnedFd, patience: Duration, memory: Option<Arc<dyn GuestMemory>>) -> Result<Self, Errno> {
        rustix::io::ioctl_fionbio(&socket, false)?;
        // The whole of a usual wait is one receive.
        // As the server: a long request goes in few steps; without it goes in more.
        let _larger = rustix::net::sockopt::set_socket_send_buffer_size(&socket, socket::SEND_BUFFER);
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(patience))?;
        let state = State {
            pending: Vec::new(),
            next_id: 0,
            reader: Some(Box::new(Reader::new())),
            answers: VecDeque::new(),
            answer_bytes: 0,
            waiting: 0,
            ended: None,
        };
        let (state, maps) = (Mutex::new(state), Mutex::default());
        Ok(Self { socket, patience, memory, maps, state, changed: Condvar::new(), outbound: Mutex::new(()) })
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn ended(&self) -> Option<Failure> {
        lock(&self.state).ended
    }

    /// The connection is of no use any more. The first reason holds, and is returned.
    pub fn end(&self, why: Failure) -> Failure {
        let mut state = lock(&self.state);
        let why = *state.ended.get_or_insert(why);
        drop(state);
        // Not connected any more is what is wanted.
        let _ended = shutdown(&self.socket, Shutdown::Both);
        self.changed.notify_all();
        why
    }

    /// Sends a request without a reply.
    pub fn post(&self, command: Command, head: &[u8], tail: &[u8]) -> Result<(), Failure> {
        let id = {
            let mut state = lock(&self.state);
            if let Some(why) = state.ended {
                return Err(why);
            }
            state.id()
        };
        let header = Header::command(id, command, head.len() + tail.len(), true);
        self.send_request(&header, head, tail, &[])
    }

    /// Sends a request and waits for its reply, whose data go to `into`. The inner error is the server's refusal.
    pub fn ask(&self, ask: &Ask<'_>, into: &mut [u8]) -> Result<Result<Reply, Errno>, Failure> {
        let deadline = Instant::now() + self.patience;
        let id = self.register(ask, into.len(), deadline)?;
        let header = Header::command(id, ask.command, ask.head.len() + ask.tail.len(), false);
        self.send_request(&header, ask.head, ask.tail, ask.fds)?;
        let mut own = Own { id, fixed: ask.fixed, into, outcome: None };
        self.wait(&mut own, deadline)
    }

    fn register(&self, ask: &Ask<'_>, data_max: usize, deadline: Instant) -> Result<u16, Failure> {
        let mut state = lock(&self.state);
        loop {
            if let Some(why) = state.ended {
                return Err(why);
            }
            if state.pending.len() < PENDING_MAX {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return Err(self.end(Failure::Unanswered));
            }
            state.waiting += 1;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= 1;
        }
        let id = state.id();
        let payload_max = ask.fixed + data_max;
        state.pending.push(Pending { id, command: ask.command, payload_max, fds_max: ask.fds_max, outcome: None });
        Ok(id)
    }

    fn wait(&self, own: &mut Own<'_>, deadline: Instant) -> Result<Result<Reply, Errno>, Failure> {
        let mut state = lock(&self.state);
        let outcome = loop {
            if let Some(outcome) = state.take(own.id) {
                break Ok(outcome.and_then(|(payload, fds)| own.fill(&payload, fds)));
            }
            if let Some(why) = state.ended {
                break Err(why);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return Err(self.end(Failure::Unanswered));
            }
            if let Some(mut reader) = state.reader.take() {
                drop(state);
                let received = self.receive_until(&mut reader, Some(own), deadline);
                if let Err(why) = received {
                    self.end(why);
                }
                state = lock(&self.state);
                state.reader = Some(reader);
                if let Some(outcome) = own.outcome.take() {
                    break Ok(outcome);
                }
            } else {
                state.waiting += 1;
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                state.waiting -= 1;
            }
        };
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            self.changed.notify_all();
        }
        outcome
    }

    /// Answers the server until `deadline`, for those who wait for nothing themselves.
    pub fn serve(&self, deadline: Instant) -> Result<(), Failure> {
        loop {
            let mut state = lock(&self.state);
            if let Some(why) = state.ended {
                return Err(why);
            }
            if Instant::now() >= deadline {
                return Ok(());
            }
            let Some(mut reader) = state.reader.take() else {
                let left = deadline.saturating_duration_since(Instant::now());
                state.waiting += 1;
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                state.waiting -= 1;
                continue;
            };
            drop(state);
            let ready = socket::wait_for(self.socket(), PollFlags::IN, deadline);
            let received = match ready {
                Ok(_) => self.receive_once(&mut reader, None, RecvFlags::DONTWAIT),
                Err(Errno::TIMEDOUT) => Ok(()),
                Err(errno) => Err(Failure::Receive(errno)),
            };
            let received = received.and_then(|()| self.flush(Some(&mut reader)));
            lock(&self.state).reader = Some(reader);
            self.changed.notify_all();
            received.map_err(|why| self.end(why))?;
        }
    }

    /// Receives until the reply that `own` waits for is here, or anything that others may wait for is.
    fn receive_until(
        &self,
        reader: &mut Reader,
        mut own: Option<&mut Own<'_>>,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let mut first = true;
        while own.as_ref().is_some_and(|own| own.outcome.is_none()) {
            // The socket's own timeout is as long as the first wait usually is; later ones are what is left.
            let left = deadline.saturating_duration_since(Instant::now());
            let flags = if first && left + Duration::from_millis(50) >= self.patience {
                RecvFlags::empty()
            } else {
                match socket::wait_for(self.socket(), PollFlags::IN, deadline) {
                    Ok(_) => RecvFlags::DONTWAIT,
                    Err(Errno::TIMEDOUT) => return Err(Failure::Unanswered),
                    Err(errno) => return Err(Failure::Receive(errno)),
                }
            };
            first = false;
            self.receive_once(reader, own.as_deref_mut(), flags)?;
            self.flush(Some(reader))?;
            // While it sent answers it may have received its own reply for others.
            let state = lock(&self.state);
            if own.as_ref().is_some_and(|own| state.is_here(own.id)) || state.ended.is_some() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// One receive, and what it brought.
    fn receive_once(
        &self,
        reader: &mut Reader,
        mut own: Option<&mut Own<'_>>,
        flags: RecvFlags,
    ) -> Result<(), Failure> {
        let bulk = own.as_ref().is_some_and(|own| own.into.len() > DIRECT_MIN);
        let space = reader.space();
        // Not more of a long reply than its head: the rest is received where it belongs.
        let most = if bulk { space.len().min(4096) } else { space.len() };
        let received = match socket::receive(self.socket(), space.get_mut(..most).unwrap_or(&mut []), flags) {
            Ok(socket::Received { bytes: 0, .. }) | Err(Errno::CONNRESET) => return Err(Failure::Closed),
            Ok(received) => received,
            // Nothing came; whoever has a deadline looks at it.
            Err(Errno::AGAIN) => return Ok(()),
            Err(errno) => return Err(Failure::Receive(errno)),
        };
        let took = reader.received(received.bytes, received.fds, received.fds_lost);
        took.map_err(Failure::Violation)?;
        while let Some(frame) = reader.frame().map_err(Failure::Violation)? {
            let direct = own.as_deref_mut().filter(|own| bulk && own.is(&frame.header) && frame.missing > 0);
            if let Some(own) = direct {
                if frame.payload.len() < own.fixed {
                    break;
                }
                self.receive_direct(reader, own, &frame)?;
            } else if frame.missing > 0 {
                break;
            } else {
                self.message(reader, own.as_deref_mut(), &frame)?;
            }
        }
        Ok(())
    }

    /// The rest of a long reply, without a detour.
    fn receive_direct(&self, reader: &mut Reader, own: &mut Own<'_>, frame: &Frame) -> Result<(), Failure> {
        self.expected(&frame.header, frame.payload.len() + frame.missing, 0, true)?;
        let deadline = Instant::now() + self.patience;
        let payload = reader.bytes(frame.payload.clone());
        let (fixed, here) = payload.split_at(own.fixed.min(payload.len()));
        let mut reply = reply_of(fixed);
        let total = here.len() + frame.missing;
        let into = own.into.get_mut(..total).ok_or(WRONG)?;
        let (begin, mut rest) = into.split_at_mut(here.len());
        begin.copy_from_slice(here);
        if !reader.consume(frame).is_empty() {
            return Err(Failure::Violation(Violation::Descriptors));
        }
        while !rest.is_empty() {
            match recv(&self.socket, &mut *rest, RecvFlags::WAITALL) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Err(Failure::Closed),
                Ok((_, count)) => rest = rest.get_mut(count..).unwrap_or(&mut []),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(Failure::Unanswered),
                Err(errno) => return Err(Failure::Receive(errno)),
            }
            if Instant::now() > deadline {
                return Err(Failure::Unanswered);
            }
        }
        reply.data = total;
        own.outcome = Some(Ok(reply));
        Ok(())
    }

    /// A whole message.
    fn message(&self, reader: &mut Reader, own: Option<&mut Own<'_>>, frame: &Frame) -> Result<(), Failure> {
        let fds = reader.consume(frame);
        let payload = reader.bytes(frame.payload.clone());
        let header = &frame.header;
        match header.kind {
            MessageType::Unknown(_) => Err(Failure::Violation(Violation::Kind)),
            MessageType::Command { .. } => {
                // Descriptors mean nothing here.
                drop(fds);
                let answered = answer(self.memory.as_deref(), &self.maps, DATA_XFER_MAX, header, payload);
                answered.map_or(Ok(()), |bytes| lock(&self.state).push_answer(bytes))
            }
            MessageType::Reply { error } => {
                let outcome = error.map_or(Ok(()), Err);
                let own = own.filter(|own| own.id == header.id);
                self.expected(header, payload.len(), fds.len(), own.is_some())?;
                if let Some(own) = own {
                    own.outcome = Some(outcome.and_then(|()| own.fill(payload, fds)));
                } else {
                    lock(&self.state).deliver(header.id, outcome.map(|()| (payload.to_vec(), fds)))?;
                    // The server may answer us only after they have gone on.
                    self.changed.notify_all();
                }
                Ok(())
            }
        }
    }

    /// Is it a reply to what was asked, of a length that there is room for? `own`: the receiving thread takes it itself, and
    /// nothing else may answer that request.
    fn expected(&self, header: &Header, payload: usize, fds: usize, own: bool) -> Result<(), Failure> {
        let mut state = lock(&self.state);
        let at = state.pending.iter().position(|pending| pending.id == header.id && pending.outcome.is_none());
        let at = at.ok_or(Failure::Violation(Violation::Unsolicited))?;
        let Pending { command, payload_max, fds_max, .. } = state.pending[at];
        if fds > fds_max {
            return Err(Failure::Violation(Violation::Descriptors));
        }
        if header.command != command.raw() || payload > payload_max {
            return Err(Failure::Violation(Violation::WrongReply { command }));
        }
        if own {
            state.pending.swap_remove(at);
        }
        Ok(())
    }

    /// Any failure is the connection's.
    fn send_request(&self, header: &Header, head: &[u8], tail: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        let mut short = [0; HEADER_LENGTH + 112];
        let long;
        let (begin, tail): (&[u8], &[u8]) = match short.get_mut(..HEADER_LENGTH + head.len() + tail.len()) {
            Some(short) => {
                let (header_bytes, payload) = short.split_at_mut(HEADER_LENGTH);
                let (first, last) = payload.split_at_mut(head.len());
                header_bytes.copy_from_slice(&header.to_bytes());
                first.copy_from_slice(head);
                last.copy_from_slice(tail);
                (short, &[])
            }
            None => {
                long = [&header.to_bytes(), head].concat();
                (&long, tail)
            }
        };
        let sent = {
            let _right = lock(&self.outbound);
            self.send(begin, tail, fds, None)
        };
        // Somebody may have left an answer meanwhile.
        sent.and_then(|()| self.flush(None)).map_err(|why| self.end(why))
    }

    /// Sends the answers that wait, unless somebody sends: who then does it.
    fn flush(&self, mut reader: Option<&mut Reader>) -> Result<(), Failure> {
        loop {
            if lock(&self.state).answers.is_empty() {
                return Ok(());
            }
            let _right = match self.outbound.try_lock() {
                Ok(right) => right,
                Err(std::sync::TryLockError::Poisoned(right)) => right.into_inner(),
                // The holder looks again, after it has let go.
                Err(std::sync::TryLockError::WouldBlock) => return Ok(()),
            };
            let answer = lock(&self.state).pop_answer();
            if let Some(answer) = answer {
                self.send(&answer, &[], &[], reader.as_deref_mut())?;
            }
        }
    }

    /// The caller has the right. Where there is no room for it, what the server sends is received meanwhile: it may be waiting for
    /// just that.
    fn send(
        &self,
        head: &[u8],
        tail: &[u8],
        fds: &[BorrowedFd<'_>],
        mut reader: Option<&mut Reader>,
    ) -> Result<(), Failure> {
        let total = head.len() + tail.len();
        let mut sent = 0;
        let mut deadline = None;
        loop {
            let fds = if sent == 0 { fds } else { &[] };
            let rest = (head.get(sent..).unwrap_or(&[]), tail.get(sent.saturating_sub(head.len())..).unwrap_or(&[]));
            sent += socket::send_some(self.socket(), rest.0, rest.1, fds).map_err(|errno| match errno {
                Errno::PIPE | Errno::CONNRESET => Failure::Closed,
                errno => Failure::Send(errno),
            })?;
            if sent >= total {
                return Ok(());
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + self.patience);
            let mut taken = if reader.is_none() { lock(&self.state).reader.take() } else { None };
            let received = self.make_room(reader.as_deref_mut().or(taken.as_deref_mut()), deadline);
            if let Some(taken) = taken {
                lock(&self.state).reader = Some(taken);
                self.changed.notify_all();
            }
            received?;
        }
    }

    fn make_room(&self, reader: Option<&mut Reader>, deadline: Instant) -> Result<(), Failure> {
        let what = if reader.is_some() { PollFlags::OUT | PollFlags::IN } else { PollFlags::OUT };
        match socket::wait_for(self.socket(), what, deadline) {
            Ok(_) => reader.map_or(Ok(()), |reader| self.receive_once(reader, None, RecvFlags::DONTWAIT)),
            Err(Errno::TIMEDOUT) => Err(Failure::Unanswered),
            Err(errno) => Err(Failure::Send(errno)),
        }
    }
}

const WRONG: Failure = Failure::Violation(Violation::Size { size: 0 });

fn reply_of(fixed: &[u8]) -> Reply {
    let mut reply = Reply { fixed: [0; FIXED_MAX], fixed_length: fixed.len().min(FIXED_MAX), data: 0, fds: Vec::new() };
    reply.fixed.iter_mut().zip(fixed).for_each(|(to, from)| *to = *from);
    reply
}

impl Own<'_> {
    fn is(&self, header: &Header) -> bool {
        header.id == self.id && matches!(header.kind, MessageType::Reply { error: None })
    }

    /// Not longer than what there is room for.
    fn fill(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Reply, Errno> {
        let (fixed, data) = payload.split_at(self.fixed.min(payload.len()));
        let mut reply = reply_of(fixed);
        self.into.get_mut(..data.len()).ok_or(Errno::MSGSIZE)?.copy_from_slice(data);
        reply.data = data.len();
        reply.fds = fds;
        Ok(reply)
    }
}

impl State {
    /// One that no request in flight has.
    fn id(&mut self) -> u16 {
        loop {
            self.next_id = self.next_id.wrapping_add(1);
            if self.pending.iter().all(|pending| pending.id != self.next_id) {
                return self.next_id;
            }
        }
    }

    fn is_here(&self, id: u16) -> bool {
        self.pending.iter().any(|pending| pending.id == id && pending.outcome.is_some())
    }

    fn take(&mut self, id: u16) -> Option<Outcome> {
        let at = self.pending.iter().position(|pending| pending.id == id && pending.outcome.is_some())?;
        self.pending.swap_remove(at).outcome
    }

    fn deliver(&mut self, id: u16, outcome: Outcome) -> Result<(), Failure> {
        let pending = self.pending.iter_mut().find(|pending| pending.id == id && pending.outcome.is_none());
        pending.ok_or(Failure::Violation(Violation::Unsolicited))?.outcome = Some(outcome);
        Ok(())
    }

    fn push_answer(&mut self, bytes: Vec<u8>) -> Result<(), Failure> {
        self.answer_bytes += bytes.len();
        self.answers.push_back(bytes);
        if self.answers.len() > ANSWERS_MAX || self.answer_bytes > ANSWER_BYTES_MAX {
            return Err(Failure::Violation(Violation::Flood));
        }
        Ok(())
    }

    fn pop_answer(&mut self) -> Option<Vec<u8>> {
        let bytes = self.answers.pop_front()?;
        self.answer_bytes -= bytes.len();
        Some(bytes)
    }
}
