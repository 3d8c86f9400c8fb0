//! What has been received and not yet been served.
//!
//! **Owns** one buffer of fixed size, the bounds of the messages in it, and the file descriptors that came with them.
//! **Must never** grow, or keep a descriptor of a message that it has given up.
//!
//! ```text
//!  0        frames: whole requests,       scanned: begin of the    end           INPUT_BYTES
//!  |        oldest first                  message in progress       |                  |
//!  +--------[ request ][ request ]-------[ incom                    )      free        +
//! ```
//! Replies are taken out as soon as they are whole, past requests that wait: whoever waits for one never waits for the
//! requests before it.

use std::collections::VecDeque;
use std::ops::Range;

use super::Violation;
use crate::frontend::vfio_user::wire::{HEADER_LENGTH, Header, MESSAGE_MAX, MSG_FDS_MAX, MessageType};

/// Room for what a client sends ahead: two of the longest messages.
pub const INPUT_BYTES: usize = 2 * MESSAGE_MAX;
/// Most requests that wait to be served.
pub const REQUESTS_WAITING_MAX: usize = 4096;
/// Most file descriptors that wait with them.
pub const FDS_WAITING_MAX: usize = 256;
/// Requests of at least so many bytes are handed out without a copy.
const SWAP_BYTES: usize = 64 * 1024;

/// The session's buffer, out of the session while something is received into it: nobody waits for a lock meanwhile.
#[derive(Debug)]
pub struct Lent {
    buffer: Vec<u8>,
    at: usize,
}

impl Lent {
    /// Where to receive into. Empty: requests must be taken first.
    pub fn space(&mut self) -> &mut [u8] {
        self.buffer.get_mut(self.at..).unwrap_or(&mut [])
    }
}

/// A request, taken out of the session. Its memory is reused from one request to the next.
#[derive(Debug)]
pub struct Message<F> {
    buffer: Vec<u8>,
    range: Range<usize>,
    pub header: Header,
    /// What came with it; dropped, they are closed
    pub fds: Vec<F>,
    /// More came than any message may have; `fds` is empty then
    pub fds_refused: bool,
}

impl<F> Message<F> {
    pub fn new() -> Self {
        let header = Header { id: 0, command: 0, size: HEADER_LENGTH as u32, kind: MessageType::Unknown(0xf) };
        // Zeroed memory that the kernel hands out when it is touched.
        Self { buffer: vec![0; INPUT_BYTES], range: 0..0, header, fds: Vec::new(), fds_refused: false }
    }

    pub fn payload(&self) -> &[u8] {
        self.buffer.get(self.range.clone()).unwrap_or(&[])
    }

    pub fn no_reply(&self) -> bool {
        matches!(self.header.kind, MessageType::Command { no_reply: true })
    }
}

impl<F> Default for Message<F> {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug)]
struct Frame<F> {
    header: Header,
    /// The whole message
    range: Range<usize>,
    fds: Vec<F>,
    fds_refused: bool,
}

#[derive(Debug)]
pub(super) struct Input<F> {
    buffer: Vec<u8>,
    frames: VecDeque<Frame<F>>,
    scanned: usize,
    end: usize,
    /// Of the message in progress
    fds: Vec<F>,
    fds_refused: bool,
    fds_waiting: usize,
}

impl<F> Input<F> {
    pub fn new() -> Self {
        Self {
            buffer: vec![0; INPUT_BYTES],
            frames: VecDeque::new(),
            scanned: 0,
            end: 0,
            fds: Vec::new(),
            fds_refused: false,
            fds_waiting: 0,
        }
    }

    pub fn is_full(&self) -> bool {
        self.frames.len() >= REQUESTS_WAITING_MAX
            || self.fds_waiting > FDS_WAITING_MAX - MSG_FDS_MAX
            || self.end - self.begin() == INPUT_BYTES
    }

    fn begin(&self) -> usize {
        self.frames.front().map_or(self.scanned, |frame| frame.range.start)
    }

    /// Where to receive into. Empty: requests must be taken first.
    pub fn space(&mut self) -> &mut [u8] {
        if self.is_full() {
            return &mut [];
        }
        let begin = self.begin();
        if begin == self.end {
            (self.scanned, self.end) = (0, 0);
        } else if begin > 0 && self.scanned + self.in_progress() > INPUT_BYTES {
            // The message in progress would not fit: what is here moves to the front.
            self.buffer.copy_within(begin..self.end, 0);
            self.shift(begin);
        }
        self.buffer.get_mut(self.end..).unwrap_or(&mut [])
    }

    /// The buffer, with where [`Self::space`] begins. Nothing may be taken until it is back.
    pub fn lend(&mut self) -> Lent {
        let at = if self.space().is_empty() { INPUT_BYTES } else { self.end };
        Lent { buffer: std::mem::take(&mut self.buffer), at }
    }

    pub fn give_back(&mut self, lent: Lent) {
        debug_assert!(self.buffer.is_empty() && lent.buffer.len() == INPUT_BYTES);
        self.buffer = lent.buffer;
    }

    /// Bytes of the message in progress, as far as it is known.
    fn in_progress(&self) -> usize {
        let head = self.buffer[self.scanned..self.end].first_chunk::<HEADER_LENGTH>();
        head.map_or(HEADER_LENGTH, |head| Header::parse(head).size as usize)
    }

    fn shift(&mut self, by: usize) {
        for frame in &mut self.frames {
            frame.range = frame.range.start - by..frame.range.end - by;
        }
        self.scanned -= by;
        self.end -= by;
    }

    /// `count` bytes were received into [`Self::space`], and these with them. They belong to the message that has the last
    /// byte: the kernel ends a receive behind the piece that carries descriptors.
    ///
    /// `fds_lost`: more came, and are gone; their message is refused. Whole replies go to `on_reply`; its error is the end. A message that none waits before has at most `first_max` bytes.
    pub fn received(
        &mut self,
        count: usize,
        fds: impl IntoIterator<Item = F>,
        fds_lost: bool,
        first_max: usize,
        mut on_reply: impl FnMut(&Header, &[u8]) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        let before = self.end;
        self.end = before.saturating_add(count).min(INPUT_BYTES);
        let mut arrived = Some(fds);
        loop {
            let bytes = &self.buffer[self.scanned..self.end];
            let most = if self.frames.is_empty() { first_max } else { MESSAGE_MAX };
            let Some((header, length)) = whole(bytes, most)? else { break };
            let range = self.scanned..self.scanned + length;
            if range.end == self.end {
                self.keep_all(arrived.take(), fds_lost);
            }
            self.scanned = range.end;
            let (fds, fds_refused) = (std::mem::take(&mut self.fds), std::mem::take(&mut self.fds_refused));
            if let MessageType::Reply { .. } = header.kind {
                on_reply(&header, &self.buffer[range.start + HEADER_LENGTH..range.end])?;
            } else {
                self.fds_waiting += fds.len();
                self.frames.push_back(Frame { header, range, fds, fds_refused });
            }
        }
        self.keep_all(arrived, fds_lost);
        Ok(())
    }

    /// What one receive brought; nothing where that has been given to a message.
    fn keep_all(&mut self, arrived: Option<impl IntoIterator<Item = F>>, lost: bool) {
        let Some(fds) = arrived else { return };
        fds.into_iter().for_each(|fd| self.keep(fd));
        if lost {
            self.fds.clear();
            self.fds_refused = true;
        }
    }

    /// For the message in progress. One too many, and none is kept.
    fn keep(&mut self, fd: F) {
        if self.fds_refused || self.fds.len() == MSG_FDS_MAX {
            self.fds.clear();
            self.fds_refused = true;
        } else {
            self.fds.push(fd);
        }
    }

    /// The oldest request, into `message`; what that held before is dropped. False: there is none.
    pub fn take(&mut self, message: &mut Message<F>) -> bool {
        message.fds.clear();
        let Some(frame) = self.frames.pop_front() else { return false };
        self.fds_waiting -= frame.fds.len();
        message.header = frame.header;
        message.fds = frame.fds;
        message.fds_refused = frame.fds_refused;
        let payload = frame.range.start + HEADER_LENGTH..frame.range.end;
        if payload.len() >= SWAP_BYTES && message.buffer.len() == self.buffer.len() {
            std::mem::swap(&mut self.buffer, &mut message.buffer);
            let rest = frame.range.end..self.end;
            self.buffer[..rest.len()].copy_from_slice(&message.buffer[rest]);
            message.range = payload;
            self.shift(frame.range.end);
        } else {
            message.range = 0..payload.len();
            message.buffer[..payload.len()].copy_from_slice(&self.buffer[payload]);
        }
        true
    }

    /// Nothing of it will be served; descriptors are closed.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.fds.clear();
        (self.scanned, self.end, self.fds_waiting) = (0, 0, 0);
    }
}

/// The message at the begin of `bytes`, if it is whole; an error if it can never be.
fn whole(bytes: &[u8], cap: usize) -> Result<Option<(Header, usize)>, Violation> {
    let Some(head) = bytes.first_chunk::<HEADER_LENGTH>() else { return Ok(None) };
    let header = Header::parse(head);
    let length = header.size as usize;
    if length < HEADER_LENGTH {
        return Err(Violation::Size { size: header.size });
    }
    if length > cap {
        return Err(Violation::TooLong { size: header.size, most: cap });
    }
    Ok((length <= bytes.len()).then_some((header, length)))
}
