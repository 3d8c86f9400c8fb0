//! A client's connection as all its users share it: one who serves requests, and threads of the device that ask for memory.
//!
//! **Owns** the socket, the session, and who receives and who sends now. **Must never** split a message, keep a reply from
//! whoever waits for it, or let a request that waits to be served hold up a device's DMA.
//!
//! ```text
//!  receiving:  NOBODY -- the server has nothing to serve --> SERVER (blocks in the receive, the buffer is lent to it)
//!                 ^------------ something came ---------------'
//!              NOBODY -- a reply is waited for --> WAITER (polls, then receives without waiting, under the lock)
//!                 ^------------ something came, or its deadline ------------'
//! ```
//! While the server works, whoever waits for a reply receives by itself: also the server, inside a call of the device. Requests
//! that come meanwhile wait in the session, from where the server can take them at any time.
//!
//! Locks: `inbound`, a leaf; held over a receive only where that does not wait. `outbound` is a right: it is held while a message
//! is sent, which has a deadline. Order: `outbound`, then `inbound`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, shutdown, sockopt};

use super::socket::{self, Received, Sending};
use crate::frontend::vfio_user::session::{Message, Next, Output, Session, Ticket, Violation};
use crate::memory::ClientAccess;

/// A client has so long to take a message or to answer a DMA request, unless the server is told otherwise; then its connection
/// ends. QEMU is as patient with its server.
pub const CLIENT_PATIENCE: Duration = Duration::from_secs(5);
/// Receives of a connection that has ended. No more can be in a socket's buffer of the usual size.
const DRAINS_MAX: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiver {
    Nobody,
    Server,
    Waiter,
}

#[derive(Debug)]
struct Inbound {
    session: Session<OwnedFd>,
    receiver: Receiver,
    /// Threads that wait for a reply, or to ask
    waiting: u32,
    /// Why it ended, if something went wrong
    failure: Option<Failure>,
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("the client closed it")]
    Closed,
    #[error("{0}")]
    Violation(Violation),
    #[error("sending: {0}")]
    Send(Errno),
    #[error("receiving: {0}")]
    Receive(Errno),
    #[error("it did not say VERSION in time")]
    Silent,
    #[error("the client did not answer a DMA request in time")]
    Unanswered,
    #[error("the device has not let go of the client before")]
    Device,
    #[error("the server stops")]
    Stopped,
}

#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    patience: Duration,
    /// VERSION must be here by then: whoever never says it would keep others from the device
    agreed_until: Instant,
    inbound: Mutex<Inbound>,
    changed: Condvar,
    /// Who serves requests
    server: OnceLock<ThreadId>,
    /// What is being sent by threads of the device; the memory is reused
    outbound: Mutex<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub fn new(socket: OwnedFd, patience: Duration) -> Arc<Self> {
        let inbound = Inbound { session: Session::new(), receiver: Receiver::Nobody, waiting: 0, failure: None };
        // A long reply goes in few steps; the kernel gives as much as the machine allows, and works without.
        let _larger = sockopt::set_socket_send_buffer_size(&socket, socket::SEND_BUFFER);
        let (inbound, changed) = (Mutex::new(inbound), Condvar::new());
        let (server, outbound) = (OnceLock::new(), Mutex::default());
        let agreed_until = Instant::now() + patience;
        Arc::new(Self { socket, patience, agreed_until, inbound, changed, server, outbound })
    }

    /// What is to be done next; waits for a request if there is none. Only for the one thread that serves.
    pub fn next(&self, message: &mut Message<OwnedFd>, out: &mut Output<OwnedFd>) -> Result<Next, Failure> {
        self.server.get_or_init(|| std::thread::current().id());
        let mut inbound = lock(&self.inbound);
        loop {
            let next = inbound.session.next(message, out);
            if inbound.waiting > 0 {
                // There may be room to receive into now.
                self.changed.notify_all();
            }
            match next {
                Next::Wait => {}
                Next::Close(violation) => return Err(inbound.failure.unwrap_or(Failure::Violation(violation))),
                other => return Ok(other),
            }
            if inbound.receiver != Receiver::Nobody {
                // Whoever receives has a deadline, and hands it on.
                inbound = self.changed.wait(inbound).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let mut lent = inbound.session.lend();
            inbound.receiver = Receiver::Server;
            let is_agreed = inbound.session.negotiated().is_some();
            drop(inbound);
            let ready = if is_agreed {
                Ok(())
            } else {
                socket::wait_for(self.socket.as_fd(), PollFlags::IN, self.agreed_until).map(drop)
            };
            let received = ready.and_then(|()| socket::receive(self.socket.as_fd(), lent.space(), RecvFlags::empty()));
            inbound = lock(&self.inbound);
            inbound.session.give_back(lent);
            self.received(&mut inbound, received);
        }
    }

    /// Whoever received has done so.
    fn received(&self, inbound: &mut Inbound, received: Result<Received, Errno>) {
        inbound.receiver = Receiver::Nobody;
        let failure = match received {
            Ok(Received { bytes: 0, .. }) | Err(Errno::CONNRESET) => Some(Failure::Closed),
            Ok(Received { bytes, fds, fds_lost }) => {
                inbound.session.received_with(bytes, fds, fds_lost).err().map(Failure::Violation)
            }
            Err(Errno::AGAIN) => None,
            // Only before VERSION is there a time to keep.
            Err(Errno::TIMEDOUT) => Some(Failure::Silent),
            Err(errno) => Some(Failure::Receive(errno)),
        };
        if let Some(failure) = failure {
            self.end_in(inbound, failure);
        }
        if inbound.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Ends the connection: every wait for the client ends now. The first reason holds.
    pub fn end(&self, why: Failure) {
        self.end_in(&mut lock(&self.inbound), why);
    }

    fn end_in(&self, inbound: &mut Inbound, why: Failure) {
        inbound.failure.get_or_insert(why);
        let violation = if let Failure::Violation(violation) = why { violation } else { Violation::Ended };
        inbound.session.end(violation);
        // Not connected any more is what is wanted.
        let _ended = shutdown(&self.socket, Shutdown::Both);
        self.changed.notify_all();
    }

    /// Sends a reply, all of it.
    pub fn reply(&self, out: &Output<OwnedFd>) -> Result<(), Failure> {
        let _right = lock(&self.outbound);
        self.send(&out.bytes, out.bulk(), &out.fds)
    }

    /// The caller has the right to send.
    fn send(&self, bytes: &[u8], bulk: &[u8], fds: &[OwnedFd]) -> Result<(), Failure> {
        self.send_in(&mut Sending::new(bytes, bulk, fds)).map_err(|errno| {
            let failure = if errno == Errno::PIPE { Failure::Closed } else { Failure::Send(errno) };
            self.end(failure);
            failure
        })
    }

    fn send_in(&self, message: &mut Sending<'_>) -> Result<(), Errno> {
        if message.step(self.socket.as_fd())? {
            return Ok(());
        }
        let deadline = Instant::now() + self.patience;
        loop {
            self.wait_for_room_to_send(deadline)?;
            if message.step(self.socket.as_fd())? {
                return Ok(());
            }
        }
    }

    /// What comes meanwhile is received, as far as it can wait: a client may send many requests before it takes the first reply.
    fn wait_for_room_to_send(&self, deadline: Instant) -> Result<(), Errno> {
        let mut inbound = lock(&self.inbound);
        if inbound.receiver != Receiver::Nobody || inbound.session.space().is_empty() {
            drop(inbound);
            return socket::wait_for(self.socket.as_fd(), PollFlags::OUT, deadline).map(drop);
        }
        inbound.receiver = Receiver::Waiter;
        drop(inbound);
        let ready = socket::wait_for(self.socket.as_fd(), PollFlags::IN | PollFlags::OUT, deadline);
        let mut inbound = lock(&self.inbound);
        let received = match ready {
            Ok(flags) if flags.contains(PollFlags::IN) => {
                socket::receive(self.socket.as_fd(), inbound.session.space(), RecvFlags::DONTWAIT)
            }
            _ => Err(Errno::AGAIN),
        };
        self.received(&mut inbound, received);
        self.changed.notify_all();
        ready.map(drop)
    }

    /// Reads the client's memory. The client's errno is the error; ENOTCONN: it is gone, ENOTCONN and the end of the connection
    /// also where it does not answer in time.
    pub fn dma_read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        let most = self.transfer_max()?;
        let mut at = address;
        for piece in data.chunks_mut(most) {
            let count = piece.len() as u32;
            let ticket = self.ask(|session, out| session.dma_read(at, count, out))?;
            let bytes = self.answer(ticket)?;
            if bytes.len() != piece.len() {
                return Err(Errno::IO);
            }
            piece.copy_from_slice(&bytes);
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes the client's memory; returns when the client has done it. Errors as [`Self::dma_read`].
    pub fn dma_write(&self, address: u64, data: &[u8]) -> Result<(), Errno> {
        let most = self.transfer_max()?;
        let mut at = address;
        for piece in data.chunks(most) {
            let ticket = self.ask(|session, out| session.dma_write(at, piece, out))?;
            self.answer(ticket)?;
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes many pieces in bulk, in order; returns when the client has done all. Errors as [`Self::dma_read`], except that an error
    /// of any but the last piece of a batch is not told by the client.
    pub fn dma_write_many<'a>(&self, writes: impl Iterator<Item = (u64, &'a [u8])>) -> Result<(), Errno> {
        let most = self.transfer_max()?;
        let pieces = writes.flat_map(|(address, data)| {
            let starts = (0u64..).step_by(most).map(move |at| address.wrapping_add(at));
            starts.zip(data.chunks(most))
        });
        let mut pieces = pieces.peekable();
        while pieces.peek().is_some() {
            let barrier = self.send_batch(&mut pieces)?;
            self.answer(barrier)?;
        }
        Ok(())
    }

    fn send_batch<'a>(
        &self,
        pieces: &mut std::iter::Peekable<impl Iterator<Item = (u64, &'a [u8])>>,
    ) -> Result<Ticket, Errno> {
        let deadline = Instant::now() + self.patience;
        loop {
            let right = lock(&self.outbound);
            let mut inbound = lock(&self.inbound);
            match inbound.session.dma_write_batch(pieces) {
                Err(Errno::AGAIN) => {
                    drop(right);
                    self.wait_for_room(inbound, deadline)?;
                }
                Err(errno) => return Err(errno),
                Ok(batch) => {
                    drop(inbound);
                    let mut begin = 0;
                    for end in batch.ends {
                        let sent = batch.bytes.get(begin..end).unwrap_or(&[]);
                        self.send(sent, &[], &[]).map_err(|_| Errno::NOTCONN)?;
                        begin = end;
                    }
                    return Ok(batch.barrier);
                }
            }
        }
    }

    /// Most bytes of data in one message.
    fn transfer_max(&self) -> Result<usize, Errno> {
        let negotiated = lock(&self.inbound).session.negotiated().ok_or(Errno::NOTCONN)?;
        Ok(negotiated.max_data_xfer_size as usize)
    }

    fn ask(
        &self,
        mut make: impl FnMut(&mut Session<OwnedFd>, &mut Vec<u8>) -> Result<Ticket, Errno>,
    ) -> Result<Ticket, Errno> {
        let deadline = Instant::now() + self.patience;
        loop {
            let mut outbound = lock(&self.outbound);
            let mut inbound = lock(&self.inbound);
            match make(&mut inbound.session, &mut outbound) {
                Err(Errno::AGAIN) => {
                    drop(outbound);
                    self.wait_for_room(inbound, deadline)?;
                }
                Err(errno) => return Err(errno),
                Ok(ticket) => {
                    drop(inbound);
                    self.send(&outbound, &[], &[]).map_err(|_| Errno::NOTCONN)?;
                    return Ok(ticket);
                }
            }
        }
    }

    /// As much is asked for as may be: those who wait for it receive.
    fn wait_for_room(&self, mut inbound: MutexGuard<'_, Inbound>, deadline: Instant) -> Result<(), Errno> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.end_in(&mut inbound, Failure::Unanswered);
            return Err(Errno::NOTCONN);
        }
        inbound.waiting += 1;
        let (mut inbound, _) = self.changed.wait_timeout(inbound, left).unwrap_or_else(PoisonError::into_inner);
        inbound.waiting -= 1;
        Ok(())
    }

    /// Waits for the reply, and receives meanwhile if nobody else does.
    fn answer(&self, ticket: Ticket) -> Result<Vec<u8>, Errno> {
        let deadline = Instant::now() + self.patience;
        let mut inbound = lock(&self.inbound);
        inbound.waiting += 1;
        let answer = loop {
            if let Some(answer) = inbound.session.take_reply(ticket) {
                break answer;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The next round finds the end.
                self.end_in(&mut inbound, Failure::Unanswered);
            } else if inbound.receiver == Receiver::Nobody && !inbound.session.space().is_empty() {
                inbound = self.receive_waiting(inbound, deadline);
            } else if inbound.receiver == Receiver::Nobody && self.is_server() {
                // Who could make room waits here: the reply is behind what cannot be taken.
                self.end_in(&mut inbound, Failure::Violation(Violation::Flood));
            } else {
                inbound = self.changed.wait_timeout(inbound, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        };
        inbound.waiting -= 1;
        // Another one who waits receives from now on, or the server does; and there is room to ask.
        self.changed.notify_all();
        answer
    }

    fn is_server(&self) -> bool {
        self.server.get() == Some(&std::thread::current().id())
    }

    /// One receive of somebody who waits for a reply.
    fn receive_waiting<'a>(
        &'a self,
        mut inbound: MutexGuard<'a, Inbound>,
        deadline: Instant,
    ) -> MutexGuard<'a, Inbound> {
        inbound.receiver = Receiver::Waiter;
        drop(inbound);
        let ready = socket::wait_for(self.socket.as_fd(), PollFlags::IN, deadline);
        let mut inbound = lock(&self.inbound);
        let received = match ready {
            Ok(_) => socket::receive(self.socket.as_fd(), inbound.session.space(), RecvFlags::DONTWAIT),
            Err(Errno::TIMEDOUT) => Err(Errno::AGAIN),
            Err(errno) => Err(errno),
        };
        self.received(&mut inbound, received);
        // The server waits here too, for its turn.
        self.changed.notify_all();
        inbound
    }

    /// Takes what the client sent and nobody will serve, so that it reads the last reply before it learns of the end. Bounded.
    pub fn drain(&self) {
        let mut scrap = [0; 16 * 1024];
        for _ in 0..DRAINS_MAX {
            match socket::receive(self.socket.as_fd(), &mut scrap, RecvFlags::DONTWAIT) {
                Ok(Received { bytes, .. }) if bytes > 0 => {}
                _ => return,
            }
        }
    }

    /// Replies that the client sent and nobody had asked for.
    pub fn unsolicited_replies(&self) -> u64 {
        lock(&self.inbound).session.unsolicited_replies()
    }
}

impl ClientAccess for Link {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.dma_read(iova, data)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.dma_write(iova, data)
    }

    fn write_many(&self, writes: &mut dyn Iterator<Item = (u64, &[u8])>) -> Result<(), Errno> {
        self.dma_write_many(writes)
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
