//! Bytes of the server, as messages.
//!
//! **Owns** what was received and not yet looked at, and the descriptors that came with it. **Must never** wait, or believe a length
//! that it has not capped: it has room for one message of the longest kind, always.

use std::ops::Range;
use std::os::fd::OwnedFd;

use super::error::Violation;
use crate::frontend::vfio_user::wire::{HEADER_LENGTH, Header, MESSAGE_MAX, MSG_FDS_MAX};

/// The longest message (a dirty report has the longest head before its data), and room for many short ones.
const BUFFER_BYTES: usize = MESSAGE_MAX + 64 * 1024;
/// Most bytes of a message that the server may send.
pub const INCOMING_MAX: usize = MESSAGE_MAX + 64;

#[derive(Debug)]
pub struct Reader {
    buffer: Vec<u8>,
    begin: usize,
    end: usize,
    /// Of the message that has the last byte received, until it is whole
    fds: Vec<OwnedFd>,
}

/// A message, whole or as far as it is here.
#[derive(Debug)]
pub struct Frame {
    pub header: Header,
    /// Of its payload, in the buffer
    pub payload: Range<usize>,
    /// Bytes of the payload that are still to come
    pub missing: usize,
}

impl Reader {
    pub fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES], begin: 0, end: 0, fds: Vec::new() }
    }

    /// Where to receive into; never empty. Ranges of frames end to be valid.
    pub fn space(&mut self) -> &mut [u8] {
        if self.begin == self.end {
            (self.begin, self.end) = (0, 0);
        } else if self.begin + INCOMING_MAX > BUFFER_BYTES {
            self.buffer.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
        }
        self.buffer.get_mut(self.end..).unwrap_or(&mut [])
    }

    /// One receive brought these. They belong to the message that has the last byte of it.
    pub fn received(&mut self, count: usize, fds: Vec<OwnedFd>, fds_lost: bool) -> Result<(), Violation> {
        self.end = (self.end + count).min(BUFFER_BYTES);
        if fds_lost || self.fds.len() + fds.len() > MSG_FDS_MAX {
            return Err(Violation::Descriptors);
        }
        self.fds.extend(fds);
        Ok(())
    }

    /// The oldest message, as soon as its header is here.
    pub fn frame(&self) -> Result<Option<Frame>, Violation> {
        let bytes = self.buffer.get(self.begin..self.end).unwrap_or(&[]);
        let Some(head) = bytes.first_chunk::<HEADER_LENGTH>() else { return Ok(None) };
        let header = Header::parse(head);
        let length = header.size as usize;
        if !(HEADER_LENGTH..=INCOMING_MAX).contains(&length) {
            return Err(Violation::Size { size: header.size });
        }
        let here = bytes.len().min(length);
        let payload = self.begin + HEADER_LENGTH..self.begin + here;
        Ok(Some(Frame { header, payload, missing: length - here }))
    }

    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buffer.get(range).unwrap_or(&[])
    }

    /// The frame has been looked at, all of it that is here. Its descriptors.
    pub fn consume(&mut self, frame: &Frame) -> Vec<OwnedFd> {
        self.begin = frame.payload.end;
        if self.begin == self.end { std::mem::take(&mut self.fds) } else { Vec::new() }
    }
}
