//! The saved state of one mediated device as a byte stream: the host's own part, the plug-in's, the device's.
//!
//! **Owns** the framing. **Must never** hold more than one header and one host part in memory, or call a stream whole that
//! lacks its end. The plug-in's and the device's own bytes are opaque: their order is kept, their segmentation is not.
//!
//! Records, little-endian: `kind: u16`, `reserved: u16` (0), `length: u32`, then `length` bytes.
//!
//! | kind | payload |
//! |---|---|
//! | 1 HOST | `version: u16`, `count: u16`, then `count` times `offset: u16, length: u16, bytes` of configuration space |
//! | 2 PLUGIN | the next bytes of the plug-in's stream |
//! | 3 DEVICE | the next bytes of the device's own (native) stream |
//! | 4 END | `bytes: u64` before this record, `crc32: u32` of them |
//!
//! HOST comes first, and again when STOP_COPY begins, since what it describes changes while the device runs; the last one
//! holds. END comes once, at the end of STOP_COPY.

use super::error::{MediationError, Result};

pub const HEADER: usize = 8;
/// Least buffer for saving: no record is cut by it except the opaque ones.
pub const BUFFER_MIN: usize = HEADER + HOST_MAX;
const VERSION: u16 = 1;
/// The host part is a few dozen bytes; a peer's may not be more than this.
const HOST_MAX: usize = 1024;
const END_LENGTH: usize = 12;
const OPAQUE_MAX: usize = 1 << 30;

const HOST: u16 = 1;
const PLUGIN: u16 = 2;
const DEVICE: u16 = 3;
const END: u16 = 4;

/// Whose opaque bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Plugin,
    Device,
}

/// Bytes of configuration space that the host saves: offset and contents.
pub type HostState = Vec<(u16, Vec<u8>)>;

/// Makes records.
#[derive(Debug, Default)]
pub struct Saver {
    crc: crc32fast::Hasher,
    bytes: u64,
}

impl Saver {
    /// Into `buffer`, which holds [`BUFFER_MIN`] at least. Returns the record's length.
    pub fn host(&mut self, buffer: &mut [u8], state: &HostState) -> Result<usize> {
        let mut payload = Vec::with_capacity(HOST_MAX);
        payload.extend_from_slice(&VERSION.to_le_bytes());
        payload.extend_from_slice(&(state.len() as u16).to_le_bytes());
        for (offset, bytes) in state {
            payload.extend_from_slice(&offset.to_le_bytes());
            payload.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
            payload.extend_from_slice(bytes);
        }
        if payload.len() > HOST_MAX {
            return Err(stream("the host part is too long"));
        }
        self.record(buffer, HOST, &payload)
    }

    /// Room for opaque bytes inside `buffer`.
    pub fn opaque<'a>(&self, buffer: &'a mut [u8]) -> &'a mut [u8] {
        let end = buffer.len().min(HEADER + OPAQUE_MAX);
        &mut buffer[HEADER..end]
    }

    /// The `length` bytes that were put into [`Self::opaque`] become a record.
    pub fn seal(&mut self, buffer: &mut [u8], part: Part, length: usize) -> usize {
        let kind = match part {
            Part::Plugin => PLUGIN,
            Part::Device => DEVICE,
        };
        buffer[..HEADER].copy_from_slice(&header(kind, length));
        self.count(&buffer[..HEADER + length])
    }

    pub fn end(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut payload = [0; END_LENGTH];
        payload[..8].copy_from_slice(&self.bytes.to_le_bytes());
        payload[8..].copy_from_slice(&self.crc.clone().finalize().to_le_bytes());
        self.record(buffer, END, &payload)
    }

    fn record(&mut self, buffer: &mut [u8], kind: u16, payload: &[u8]) -> Result<usize> {
        let length = HEADER + payload.len();
        let target = buffer.get_mut(..length).ok_or_else(|| stream("the buffer is too small"))?;
        target[..HEADER].copy_from_slice(&header(kind, payload.len()));
        target[HEADER..].copy_from_slice(payload);
        Ok(self.count(&buffer[..length]))
    }

    fn count(&mut self, record: &[u8]) -> usize {
        self.crc.update(record);
        self.bytes += record.len() as u64;
        record.len()
    }
}

fn header(kind: u16, length: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..2].copy_from_slice(&kind.to_le_bytes());
    header[4..].copy_from_slice(&(length as u32).to_le_bytes());
    header
}

fn stream(what: impl Into<String>) -> MediationError {
    MediationError::Stream { what: what.into() }
}

/// Where a stream's contents go.
pub trait Sink {
    fn host(&mut self, state: HostState) -> Result<()>;
    fn opaque(&mut self, part: Part, data: &[u8]) -> Result<()>;
}

/// Takes records, cut anywhere. After an error nothing more is taken.
#[derive(Debug, Default)]
pub struct Loader {
    /// The header that is coming in, or that of the record whose payload is
    header: Vec<u8>,
    /// A HOST or END payload
    payload: Vec<u8>,
    /// Bytes of an opaque payload still to come
    opaque_left: usize,
    crc: crc32fast::Hasher,
    bytes: u64,
    host_seen: bool,
    ended: bool,
    failed: bool,
}

impl Loader {
    pub fn feed(&mut self, data: &[u8], sink: &mut dyn Sink) -> Result<()> {
        if self.failed {
            return Err(stream("an earlier part was refused"));
        }
        let fed = self.feed_all(data, sink);
        self.failed = fed.is_err();
        fed
    }

    /// The stream is whole: it had a host part and its end, and nothing after it.
    pub fn finish(&self) -> Result<()> {
        match (self.failed, self.host_seen, self.ended) {
            (true, ..) => Err(stream("a part was refused")),
            (_, false, _) => Err(stream("it has no host part")),
            (.., false) => Err(stream(format!("it ends after {} bytes, before its end", self.bytes))),
            _ => Ok(()),
        }
    }

    fn feed_all(&mut self, mut data: &[u8], sink: &mut dyn Sink) -> Result<()> {
        while !data.is_empty() {
            if self.ended {
                return Err(stream("bytes after its end"));
            }
            let missing = HEADER - self.header.len();
            if missing > 0 {
                let (part, rest) = data.split_at(missing.min(data.len()));
                self.header.extend_from_slice(part);
                data = rest;
                if self.header.len() == HEADER {
                    self.begin_record()?;
                    // A record without a payload is complete.
                    self.try_complete(sink)?;
                }
                continue;
            }
            data = self.take_payload(data, sink)?;
            self.try_complete(sink)?;
        }
        Ok(())
    }

    fn kind(&self) -> u16 {
        u16::from_le_bytes([self.header[0], self.header[1]])
    }

    fn length(&self) -> usize {
        u32::from_le_bytes([self.header[4], self.header[5], self.header[6], self.header[7]]) as usize
    }

    fn begin_record(&mut self) -> Result<()> {
        let (kind, length) = (self.kind(), self.length());
        let allowed = match kind {
            HOST => (4..=HOST_MAX).contains(&length),
            PLUGIN | DEVICE if !self.host_seen => return Err(stream("a device part before the host part")),
            PLUGIN | DEVICE => length <= OPAQUE_MAX,
            END => length == END_LENGTH && self.host_seen,
            _ => return Err(stream(format!("a record of unknown kind {kind}"))),
        };
        if !allowed || self.header[2..4] != [0, 0] {
            return Err(stream(format!("a record of kind {kind} with {length} bytes")));
        }
        if kind != END {
            self.crc.update(&self.header);
            self.bytes += HEADER as u64;
        }
        self.opaque_left = if matches!(kind, PLUGIN | DEVICE) { length } else { 0 };
        self.payload.clear();
        Ok(())
    }

    fn take_payload<'a>(&mut self, data: &'a [u8], sink: &mut dyn Sink) -> Result<&'a [u8]> {
        let kind = self.kind();
        let left = match kind {
            PLUGIN | DEVICE => self.opaque_left,
            _ => self.length() - self.payload.len(),
        };
        let (part, rest) = data.split_at(left.min(data.len()));
        if kind != END {
            self.crc.update(part);
            self.bytes += part.len() as u64;
        }
        match kind {
            PLUGIN => sink.opaque(Part::Plugin, part)?,
            DEVICE => sink.opaque(Part::Device, part)?,
            _ => self.payload.extend_from_slice(part),
        }
        if matches!(kind, PLUGIN | DEVICE) {
            self.opaque_left -= part.len();
        }
        Ok(rest)
    }

    fn try_complete(&mut self, sink: &mut dyn Sink) -> Result<()> {
        match self.kind() {
            PLUGIN | DEVICE if self.opaque_left == 0 => {}
            HOST if self.payload.len() == self.length() => {
                sink.host(parse_host(&self.payload)?)?;
                self.host_seen = true;
            }
            END if self.payload.len() == self.length() => self.check_end()?,
            _ => return Ok(()),
        }
        self.header.clear();
        Ok(())
    }

    fn check_end(&mut self) -> Result<()> {
        let mut expected = [0; END_LENGTH];
        expected[..8].copy_from_slice(&self.bytes.to_le_bytes());
        expected[8..].copy_from_slice(&self.crc.clone().finalize().to_le_bytes());
        if self.payload != expected {
            return Err(stream("its end does not agree with what came before"));
        }
        self.ended = true;
        Ok(())
    }
}

fn parse_host(payload: &[u8]) -> Result<HostState> {
    fn number(rest: &mut &[u8]) -> Option<u16> {
        let (number, tail) = rest.split_first_chunk::<2>()?;
        *rest = tail;
        Some(u16::from_le_bytes(*number))
    }
    let mut rest = payload;
    let version = number(&mut rest).unwrap_or(0);
    if version != VERSION {
        return Err(stream(format!("a host part of version {version}, not {VERSION}")));
    }
    let short = || stream("a host part that is cut short");
    let count = number(&mut rest).ok_or_else(short)?;
    let mut state = HostState::new();
    for _ in 0..count {
        let offset = number(&mut rest).ok_or_else(short)?;
        let length = usize::from(number(&mut rest).ok_or_else(short)?);
        let bytes = rest.get(..length).ok_or_else(short)?;
        rest = &rest[length..];
        state.push((offset, bytes.to_vec()));
    }
    if rest.is_empty() { Ok(state) } else { Err(stream("a host part with bytes after its end")) }
}

#[cfg(all(test, not(loom)))]
#[path = "stream_tests.rs"]
mod tests;
