//! State records: what a plug-in's blob is made of, and the adaptors that make a stream of them.
//!
//! **Owns** the format, and nothing of its meaning. **Must never** hold more than one record, trust a length before it is
//! capped, or take a stream for whole that lacks its end.
//!
//! A record, little-endian: `kind` u16, `format` u8 = 1, `flags` u8 (bit 0: mandatory, others 0), `length` u32 of the
//! payload, `crc` u32 (CRC-32 over the 8 bytes before it and the payload), payload. The last record has kind 0xffff, is
//! mandatory, and counts the records before it (u32). A reader skips optional records of a kind that it does not know and
//! refuses mandatory ones: that is how a newer plug-in's state loads in an older one, or does not.

use crate::device::Saved;
use crate::{Errno, Result};

/// Bytes before the payload.
pub const HEADER: usize = 12;
const FORMAT: u8 = 1;
const MANDATORY: u8 = 1 << 0;
const KIND_END: u16 = 0xffff;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The plug-in's own; not 0xffff
    pub kind: u16,
    /// A reader that does not know the kind refuses the stream
    pub mandatory: bool,
    pub payload: Vec<u8>,
}

impl Record {
    pub fn mandatory(kind: u16) -> Self {
        Self { kind, mandatory: true, payload: Vec::new() }
    }

    pub fn optional(kind: u16) -> Self {
        Self { kind, mandatory: false, payload: Vec::new() }
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.payload.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.payload.extend(value.to_le_bytes());
        self
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.payload.extend(bytes);
        self
    }

    /// In the stream, in bytes.
    pub fn encoded_length(&self) -> usize {
        HEADER + self.payload.len()
    }

    pub fn fields(&self) -> Fields<'_> {
        Fields(&self.payload)
    }

    fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let length = u32::try_from(self.payload.len()).map_err(|_| Errno::EOVERFLOW)?;
        let start = out.len();
        out.extend(self.kind.to_le_bytes());
        out.extend([FORMAT, if self.mandatory { MANDATORY } else { 0 }]);
        out.extend(length.to_le_bytes());
        let crc = checksum(&out[start..], &self.payload);
        out.extend(crc.to_le_bytes());
        out.extend(&self.payload);
        Ok(())
    }
}

/// Reads a payload from its front. Every method fails with EBADMSG when there are not enough bytes.
#[derive(Debug, Clone)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(Errno::EBADMSG)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// EBADMSG unless everything was read.
    pub fn end(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Errno::EBADMSG) }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Errno::EBADMSG)?;
        self.0 = rest;
        Ok(*array)
    }
}

/// What comes next in a saving stream.
#[derive(Debug)]
pub enum Next {
    Record(Record),
    /// Nothing more for now: PRE_COPY
    Pause,
    /// Nothing more: STOP_COPY
    End,
}

/// Cuts records into whatever buffers the host brings. Holds one record.
#[derive(Debug, Default)]
pub struct StreamWriter {
    pending: Vec<u8>,
    taken: usize,
    records: u32,
    ended: bool,
}

impl StreamWriter {
    /// Fills `buffer`, asking `next` for records as they are needed. `next` is not asked again after [`Next::End`].
    pub fn fill(&mut self, buffer: &mut [u8], mut next: impl FnMut() -> Result<Next>) -> Result<Saved> {
        let mut bytes = 0;
        loop {
            let count = (self.pending.len() - self.taken).min(buffer.len() - bytes);
            buffer[bytes..bytes + count].copy_from_slice(&self.pending[self.taken..self.taken + count]);
            bytes += count;
            self.taken += count;
            if self.taken < self.pending.len() {
                return Ok(Saved { bytes, end: false });
            }
            self.pending.clear();
            self.taken = 0;
            if self.ended {
                return Ok(Saved { bytes, end: true });
            }
            if bytes == buffer.len() {
                return Ok(Saved { bytes, end: false });
            }
            match next()? {
                Next::Record(record) => {
                    record.encode(&mut self.pending)?;
                    self.records += 1;
                }
                Next::Pause => return Ok(Saved { bytes, end: true }),
                Next::End => {
                    Record::mandatory(KIND_END).u32(self.records).encode(&mut self.pending)?;
                    self.ended = true;
                }
            }
        }
    }
}

/// Whether a reader knew a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Known,
    Unknown,
}

/// Puts records together from pieces cut anywhere. Holds one record of at most `max_payload` bytes.
#[derive(Debug)]
pub struct StreamReader {
    max_payload: usize,
    pending: Vec<u8>,
    records: u32,
    state: ReaderState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReaderState {
    Open,
    Ended,
    Failed(Errno),
}

impl StreamReader {
    pub fn new(max_payload: usize) -> Self {
        Self { max_payload, pending: Vec::new(), records: 0, state: ReaderState::Open }
    }

    /// Takes the next bytes. EBADMSG for a corrupt stream, a record that is too long, or bytes after the end; EOPNOTSUPP
    /// for a mandatory record that `take` does not know, or another format; else `take`'s own error. After an error the
    /// stream is dead, and every further call gives the same error.
    pub fn feed(&mut self, mut data: &[u8], mut take: impl FnMut(&Record) -> Result<Taken>) -> Result<()> {
        if let ReaderState::Failed(errno) = self.state {
            return Err(errno);
        }
        while !data.is_empty() {
            if let Err(errno) = self.step(&mut data, &mut take) {
                self.state = ReaderState::Failed(errno);
                self.pending = Vec::new();
                return Err(errno);
            }
        }
        Ok(())
    }

    /// EBADMSG unless the stream came to its end.
    pub fn finish(&self) -> Result<()> {
        match self.state {
            ReaderState::Ended => Ok(()),
            ReaderState::Open => Err(Errno::EBADMSG),
            ReaderState::Failed(errno) => Err(errno),
        }
    }

    fn step(&mut self, data: &mut &[u8], take: &mut impl FnMut(&Record) -> Result<Taken>) -> Result<()> {
        if self.state == ReaderState::Ended {
            return Err(Errno::EBADMSG);
        }
        self.pull(data, HEADER);
        if self.pending.len() < HEADER {
            return Ok(());
        }
        let mut fields = Fields(&self.pending);
        let head: [u8; 4] = fields.array()?;
        let length = fields.u32()? as usize;
        let crc = fields.u32()?;
        if head[2] != FORMAT || head[3] & !MANDATORY != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if length > self.max_payload {
            return Err(Errno::EBADMSG);
        }
        self.pull(data, HEADER + length);
        if self.pending.len() < HEADER + length {
            return Ok(());
        }
        let payload = self.pending.split_off(HEADER);
        if checksum(&self.pending[..HEADER - 4], &payload) != crc {
            return Err(Errno::EBADMSG);
        }
        self.pending.clear();
        let kind = u16::from_le_bytes([head[0], head[1]]);
        self.take(Record { kind, mandatory: head[3] & MANDATORY != 0, payload }, take)
    }

    fn take(&mut self, record: Record, take: &mut impl FnMut(&Record) -> Result<Taken>) -> Result<()> {
        if record.kind == KIND_END {
            let mut fields = record.fields();
            let count = fields.u32()?;
            fields.end()?;
            if count != self.records {
                return Err(Errno::EBADMSG);
            }
            self.state = ReaderState::Ended;
            return Ok(());
        }
        self.records = self.records.checked_add(1).ok_or(Errno::EBADMSG)?;
        match take(&record)? {
            Taken::Unknown if record.mandatory => Err(Errno::EOPNOTSUPP),
            Taken::Known | Taken::Unknown => Ok(()),
        }
    }

    fn pull(&mut self, data: &mut &[u8], up_to: usize) {
        let count = up_to.saturating_sub(self.pending.len()).min(data.len());
        let (head, rest) = data.split_at(count);
        self.pending.extend(head);
        *data = rest;
    }
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

#[cfg(test)]
mod tests;
