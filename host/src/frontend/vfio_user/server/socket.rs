//! One client's socket: what a receive brings, and messages sent whole.
//!
//! **Must never** raise SIGPIPE, let a descriptor that came be inherited or lost, or wait without a deadline for a client that
//! does not read.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};

use crate::frontend::vfio_user::wire::MSG_FDS_MAX;

/// `SCM_MAX_FD`: as many as the kernel lets into one message. With room for all, none is dropped unseen.
const KERNEL_FDS_MAX: usize = 253;

/// Bytes that are asked for to be sent and not taken yet: some of the longest messages.
pub const SEND_BUFFER: usize = 4 << 20;

/// What one receive brought.
#[derive(Debug, Default)]
pub struct Received {
    /// 0: the client is gone
    pub bytes: usize,
    pub fds: Vec<OwnedFd>,
    /// There were more, for which this process has no room
    pub fds_lost: bool,
}

/// Waits for bytes, unless `flags` say otherwise, into `space`, which is not empty.
pub fn receive(socket: BorrowedFd<'_>, space: &mut [u8], flags: RecvFlags) -> Result<Received, Errno> {
    let mut room = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(space)], &mut control, flags) {
            Err(Errno::INTR) => {}
            done => break done?,
        }
    };
    let mut fds = Vec::new();
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = ancillary {
            fds.extend(rights);
        }
    }
    Ok(Received { bytes: message.bytes, fds, fds_lost: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// A message on its way: `head`, then `tail`, and the descriptors with its first byte.
#[derive(Debug)]
pub struct Sending<'a> {
    head: &'a [u8],
    tail: &'a [u8],
    fds: &'a [OwnedFd],
    sent: usize,
}

impl<'a> Sending<'a> {
    pub fn new(head: &'a [u8], tail: &'a [u8], fds: &'a [OwnedFd]) -> Self {
        Self { head, tail, fds, sent: 0 }
    }

    /// Sends as much as there is room for, without waiting. True: all of it. EPIPE: the client is gone.
    pub fn step(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Errno> {
        // The descriptors are on their way once a byte is.
        let fds = if self.sent == 0 { self.fds } else { &[] };
        let head = self.head.get(self.sent..).unwrap_or(&[]);
        let tail = self.tail.get(self.sent.saturating_sub(self.head.len())..).unwrap_or(&[]);
        self.sent += retry(|| send_first(socket, head, tail, fds))?;
        Ok(self.sent == self.head.len() + self.tail.len())
    }
}

/// Sends what there is room for of a message, without waiting, maybe nothing; the descriptors go with the first byte.
pub fn send_some(socket: BorrowedFd<'_>, head: &[u8], tail: &[u8], fds: &[impl AsFd]) -> Result<usize, Errno> {
    retry(|| send_first(socket, head, tail, fds))
}

/// As much as there is room for, maybe nothing.
fn send_first(socket: BorrowedFd<'_>, head: &[u8], tail: &[u8], fds: &[impl AsFd]) -> Result<usize, Errno> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match (head, tail, fds) {
        (one, [], []) | ([], one, []) => send(socket, one, flags),
        _ => {
            let mut room = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MSG_FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            let mut borrowed = [socket; MSG_FDS_MAX];
            let borrowed = borrowed.get_mut(..fds.len()).ok_or(Errno::INVAL)?;
            borrowed.iter_mut().zip(fds).for_each(|(slot, fd)| *slot = fd.as_fd());
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(borrowed)) {
                return Err(Errno::INVAL);
            }
            sendmsg(socket, &[IoSlice::new(head), IoSlice::new(tail)], &mut control, flags)
        }
    }
}

/// No room is no error, an interrupted call none either.
fn retry(mut call: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(0),
            done => return done,
        }
    }
}

/// Waits until the socket is ready or its other end is gone, and says for what. ETIMEDOUT at the deadline.
pub fn wait_for(socket: BorrowedFd<'_>, what: PollFlags, deadline: Instant) -> Result<PollFlags, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::TIMEDOUT);
        }
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut ready = [PollFd::from_borrowed_fd(socket, what)];
        match poll(&mut ready, Some(&timeout)) {
            Ok(0) => return Err(Errno::TIMEDOUT),
            Ok(_) => return Ok(ready[0].revents()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
