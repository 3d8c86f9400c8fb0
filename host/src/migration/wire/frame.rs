//! Framing: a header of 44 bytes, a payload, and nothing between records.
//!
//! ```text
//!  0  u32  magic             "VFMM"
//!  4  u16  version           1; these first 6 bytes never change their meaning
//!  6  u16  kind              bit 15 set: may be skipped by who does not know it
//!  8  u32  length            bytes of payload, capped for each kind
//! 12  u32  payload crc32
//! 16  [16] migration id      a record of another migration is foreign
//! 32  u64  sequence          0, 1, 2, ... in each direction of each connection
//! 40  u32  header crc32      of bytes 0 .. 40
//! ```
//!
//! **Owns** the checks that every byte passes before a parser sees it. **Must never** perform I/O, nor hold more than one
//! record: [`Decoder::space`] asks for exactly the bytes that the record in progress still needs.

use super::{Direction, Kind, MAX_PAYLOAD, MigrationId, Record, RunningDigest, WireError};

pub const MAGIC: u32 = u32::from_le_bytes(*b"VFMM");
pub const VERSION: u16 = 1;
pub const HEADER_LENGTH: usize = 44;
/// An unknown optional record may be this long, in bytes.
pub const OPTIONAL_CAP: u32 = 64 * 1024;

#[derive(Debug, Clone, Copy)]
struct Header {
    /// `None`: unknown and optional
    kind: Option<Kind>,
    length: u32,
    payload_crc: u32,
    id: MigrationId,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn crc(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

impl Header {
    fn parse(
        bytes: &[u8; HEADER_LENGTH],
        from: Direction,
        id: Option<MigrationId>,
        sequence: u64,
    ) -> Result<Self, WireError> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(WireError::Magic { found: magic });
        }
        let version = u16_at(bytes, 4);
        if version != VERSION {
            return Err(WireError::Version { found: version });
        }
        if u32_at(bytes, 40) != crc(&[&bytes[..40]]) {
            return Err(WireError::HeaderChecksum { sequence });
        }
        let mut found_id = [0; 16];
        found_id.copy_from_slice(&bytes[16..32]);
        let found_id = MigrationId(found_id);
        if id.is_some_and(|id| id != found_id) {
            return Err(WireError::Foreign { found: found_id });
        }
        let mut found = [0; 8];
        found.copy_from_slice(&bytes[32..40]);
        let found = u64::from_le_bytes(found);
        if found != sequence {
            return Err(WireError::Sequence { expected: sequence, found });
        }
        let number = u16_at(bytes, 6);
        let kind = Kind::from_raw(number);
        let cap = match kind {
            Some(kind) if kind.direction() != from => return Err(WireError::WrongDirection { kind }),
            Some(kind) => kind.cap(),
            None if number & Kind::OPTIONAL == 0 => return Err(WireError::UnknownKind { kind: number }),
            None => OPTIONAL_CAP,
        };
        let length = u32_at(bytes, 8);
        if length > cap {
            return Err(WireError::TooLong { kind: number, length, cap });
        }
        Ok(Self { kind, length, payload_crc: u32_at(bytes, 12), id: found_id })
    }
}

/// Makes records of one direction of one connection.
#[derive(Debug)]
pub struct Encoder {
    id: MigrationId,
    sequence: u64,
    digest: RunningDigest,
}

impl Encoder {
    pub fn new(id: MigrationId) -> Self {
        Self { id, sequence: 0, digest: RunningDigest::new() }
    }

    /// Over every record made so far.
    pub fn digest(&self) -> super::Digest {
        self.digest.value()
    }

    /// Replaces `head` by the record's header and leading fields. The record is `head` followed by [`Record::body`],
    /// which is not copied.
    pub fn encode(&mut self, record: &Record<'_>, head: &mut Vec<u8>) -> Result<(), WireError> {
        head.clear();
        head.resize(HEADER_LENGTH, 0);
        record.write_fields(head);
        let kind = record.kind();
        let length = (head.len() - HEADER_LENGTH).saturating_add(record.body().len());
        let cap = kind.cap();
        let length = match u32::try_from(length) {
            Ok(length) if length <= cap => length,
            _ => return Err(WireError::TooLong { kind: kind.raw(), length: u32::MAX, cap }),
        };
        record.check()?;
        self.frame(kind.raw(), length, head, record.body());
        Ok(())
    }

    /// Fills in the header of a record whose leading fields are in `head` already, and counts the record.
    fn frame(&mut self, kind: u16, length: u32, head: &mut [u8], body: &[u8]) {
        let payload_crc = crc(&[&head[HEADER_LENGTH..], body]);
        head[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        head[4..6].copy_from_slice(&VERSION.to_le_bytes());
        head[6..8].copy_from_slice(&kind.to_le_bytes());
        head[8..12].copy_from_slice(&length.to_le_bytes());
        head[12..16].copy_from_slice(&payload_crc.to_le_bytes());
        head[16..32].copy_from_slice(&self.id.0);
        head[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        let header_crc = crc(&[&head[..40]]);
        head[40..44].copy_from_slice(&header_crc.to_le_bytes());
        self.sequence += 1;
        self.digest.update(head);
        self.digest.update(body);
    }

    /// A record of a kind that this version does not know, for tests of those who receive one.
    #[cfg(test)]
    pub(crate) fn encode_unknown(&mut self, kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEADER_LENGTH];
        head.extend_from_slice(payload);
        self.frame(kind, payload.len() as u32, &mut head, &[]);
        head
    }
}

/// Takes records of one direction of one connection apart. Holds one record at most; its buffer never grows.
#[derive(Debug)]
pub struct Decoder {
    from: Direction,
    /// `None` until the first record, which then binds the stream
    id: Option<MigrationId>,
    sequence: u64,
    digest: RunningDigest,
    /// Before the last DIGEST record
    digest_before: super::Digest,
    buffer: Box<[u8]>,
    filled: usize,
    header: Option<Header>,
    complete: bool,
}

impl Decoder {
    /// Expects records sent in direction `from`. `id`: of this migration only; `None`: of the one that comes first.
    pub fn new(from: Direction, id: Option<MigrationId>) -> Self {
        let digest = RunningDigest::new();
        Self {
            from,
            id,
            sequence: 0,
            digest_before: digest.value(),
            digest,
            buffer: vec![0; HEADER_LENGTH + MAX_PAYLOAD as usize].into_boxed_slice(),
            filled: 0,
            header: None,
            complete: false,
        }
    }

    /// The migration that this stream belongs to, once known.
    pub fn id(&self) -> Option<MigrationId> {
        self.id
    }

    /// Over every record before the last DIGEST.
    pub fn digest_before(&self) -> super::Digest {
        self.digest_before
    }

    fn need(&self) -> usize {
        HEADER_LENGTH + self.header.map_or(0, |header| header.length as usize)
    }

    /// Where the next bytes of the stream go: exactly what the record in progress still needs. Never empty. Begins the
    /// next record if one was complete.
    pub fn space(&mut self) -> &mut [u8] {
        if self.complete {
            self.complete = false;
            self.header = None;
            self.filled = 0;
        }
        let need = self.need();
        &mut self.buffer[self.filled..need]
    }

    /// `count` bytes were put into [`Self::space`]. True once a record is complete. After an error the stream is over.
    pub fn advance(&mut self, count: usize) -> Result<bool, WireError> {
        self.filled = self.filled.saturating_add(count).min(self.need());
        if self.filled < self.need() {
            return Ok(false);
        }
        let header = match self.header {
            Some(header) => header,
            None => {
                let mut bytes = [0; HEADER_LENGTH];
                bytes.copy_from_slice(&self.buffer[..HEADER_LENGTH]);
                let header = Header::parse(&bytes, self.from, self.id, self.sequence)?;
                self.header = Some(header);
                if header.length > 0 {
                    return Ok(false);
                }
                header
            }
        };
        let bytes = &self.buffer[..self.filled];
        if crc(&[&bytes[HEADER_LENGTH..]]) != header.payload_crc {
            return Err(WireError::PayloadChecksum { sequence: self.sequence });
        }
        if header.kind == Some(Kind::Digest) {
            self.digest_before = self.digest.value();
        }
        self.digest.update(bytes);
        self.id = Some(header.id);
        self.sequence += 1;
        self.complete = true;
        Ok(true)
    }

    /// The record in hand, if [`Self::advance`] said that there is one. `Ok(None)`: unknown and optional, skip it.
    pub fn record(&self) -> Result<Option<Record<'_>>, WireError> {
        match (self.complete, self.header) {
            (true, Some(Header { kind: Some(kind), .. })) => {
                Record::parse(kind, &self.buffer[HEADER_LENGTH..self.filled]).map(Some)
            }
            (true, Some(Header { kind: None, .. })) => Ok(None),
            (true, None) | (false, _) => Err(WireError::Short { have: self.filled, need: self.need() }),
        }
    }

    /// The stream has ended. Fine between records only.
    pub fn end(&self) -> Result<(), WireError> {
        if self.complete || self.filled == 0 {
            return Ok(());
        }
        Err(WireError::Short { have: self.filled, need: self.need() })
    }
}
