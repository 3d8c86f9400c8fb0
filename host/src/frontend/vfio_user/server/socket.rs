//! One client's socket: what a receive brings, and messages sent whole.
//!
//! **Must never** raise SIGPIPE, let a descriptor that came be inherited or lost, or wait without a deadline for a client that
//! does not read.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};

use crate::frontend::vfio_user::wire::MSG_FDS_MAX;

/// `SCM_MAX_FD`: as many as the kernel lets into one message. With room for all, none is dropped unseen.
const KERNEL_FDS_MAX: usize = 253;

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

/// Sends `head` and `tail` as one message, and the descriptors with its first byte. EPIPE: the client is gone; ETIMEDOUT: it
/// does not read, for all of `patience`. After an error part of it may have been sent.
pub fn send_all(
    socket: BorrowedFd<'_>,
    head: &[u8],
    tail: &[u8],
    fds: &[OwnedFd],
    patience: Duration,
) -> Result<(), Errno> {
    let total = head.len() + tail.len();
    let mut sent = retry(|| send_first(socket, head, tail, fds))?;
    if sent == total {
        return Ok(());
    }
    let deadline = Instant::now() + patience;
    loop {
        // The descriptors are on their way once a byte is.
        let fds = if sent == 0 { fds } else { &[] };
        let rest = tail.get(sent.saturating_sub(head.len())..).unwrap_or(&[]);
        sent += retry(|| send_first(socket, head.get(sent..).unwrap_or(&[]), rest, fds))?;
        if sent == total {
            return Ok(());
        }
        wait_for(socket, PollFlags::OUT, deadline)?;
    }
}

/// As much as there is room for, maybe nothing.
fn send_first(socket: BorrowedFd<'_>, head: &[u8], tail: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
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

/// Waits until the socket is ready or its other end is gone. ETIMEDOUT at the deadline.
pub fn wait_for(socket: BorrowedFd<'_>, what: PollFlags, deadline: Instant) -> Result<(), Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::TIMEDOUT);
        }
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::from_borrowed_fd(socket, what)], Some(&timeout)) {
            Ok(0) => return Err(Errno::TIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
