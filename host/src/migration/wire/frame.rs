//! Framing: a header of 48 bytes, a payload, and nothing between records.
//!
//! ```text
//!  0  u32  magic             "VFMM"
//!  4  u16  version           1; these first 6 bytes never change their meaning
//!  6  u16  kind              bit 15 set: may be skipped by who does not know it
//!  8  u32  length            bytes of payload, capped for each kind
//! 12  u32  header crc32      of bytes 0 .. 12 and 16 .. 48
//! 16  [16] migration id      a record of another migration is foreign
//! 32  u64  sequence          0, 1, 2, ... in each direction of each connection
//! 40  u64  payload xxh3-64
//! ```
//!
//! A payload is hashed once, for its header; the digest is taken over the headers, and so is over everything.
//!
//! **Owns** the checks that every byte passes before a parser sees it. **Must never** perform I/O, nor hold more than one
//! record: [`Decoder::space`] asks for exactly the bytes that the record in progress still needs.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::record::pages_fault;
use super::{Direction, Kind, MAX_PAYLOAD, MigrationId, Record, RunningDigest, WireError};

pub const MAGIC: u32 = u32::from_le_bytes(*b"VFMM");
pub const VERSION: u16 = 1;
pub const HEADER_LENGTH: usize = 48;
/// An unknown optional record may be this long, in bytes.
pub const OPTIONAL_CAP: u32 = 64 * 1024;
/// Before the data in a PAGES record: first page and count.
const PAGES_FIELDS: usize = 16;
const PAGES_FIELDS_END: usize = HEADER_LENGTH + PAGES_FIELDS;

#[derive(Debug, Clone, Copy)]
struct Header {
    /// `None`: unknown and optional
    kind: Option<Kind>,
    length: u32,
    payload_hash: u64,
    id: MigrationId,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Of everything in a header but itself.
fn header_crc(header: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..12]);
    hasher.update(&header[16..HEADER_LENGTH]);
    hasher.finalize()
}

/// Of a payload in two parts.
fn payload_hash(fields: &[u8], body: &[u8]) -> u64 {
    if body.is_empty() {
        return xxh3_64(fields);
    }
    let mut hasher = Xxh3::new();
    hasher.update(fields);
    hasher.update(body);
    hasher.digest()
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
        if u32_at(bytes, 12) != header_crc(bytes) {
            return Err(WireError::HeaderChecksum { sequence });
        }
        let mut found_id = [0; 16];
        found_id.copy_from_slice(&bytes[16..32]);
        let found_id = MigrationId(found_id);
        if id.is_some_and(|id| id != found_id) {
            return Err(WireError::Foreign { found: found_id });
        }
        let found = u64_at(bytes, 32);
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
        Ok(Self { kind, length, payload_hash: u64_at(bytes, 40), id: found_id })
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
        let payload_hash = payload_hash(&head[HEADER_LENGTH..], body);
        head[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        head[4..6].copy_from_slice(&VERSION.to_le_bytes());
        head[6..8].copy_from_slice(&kind.to_le_bytes());
        head[8..12].copy_from_slice(&length.to_le_bytes());
        head[16..32].copy_from_slice(&self.id.0);
        head[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        head[40..48].copy_from_slice(&payload_hash.to_le_bytes());
        let header_crc = header_crc(head);
        head[12..16].copy_from_slice(&header_crc.to_le_bytes());
        self.sequence += 1;
        self.digest.update(&head[..HEADER_LENGTH]);
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

/// A PAGES record whose data go elsewhere.
struct Placing {
    first: u64,
    count: u64,
    /// Bytes that have not come yet
    left: usize,
    hasher: Box<Xxh3>,
}

impl std::fmt::Debug for Placing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Placing").field("first", &self.first).field("left", &self.left).finish_non_exhaustive()
    }
}

/// Takes records of one direction of one connection apart. Holds one record at most; its buffer never grows.
///
/// The data of a PAGES record need not come into the buffer: once its leading fields are here ([`Self::pages_ahead`])
/// they may be [placed](Self::place), and are then only shown to the decoder, which hashes them ([`Self::placed`]). They
/// are as good as unknown until the record is complete.
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
    placing: Option<Placing>,
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
            placing: None,
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

    /// Bytes in the buffer after the step in progress: a header, the leading fields of PAGES, a whole record.
    fn need(&self) -> usize {
        let Some(header) = self.header else { return HEADER_LENGTH };
        let length = header.length as usize;
        match header.kind {
            Some(Kind::Pages) if self.filled < PAGES_FIELDS_END => PAGES_FIELDS_END.min(HEADER_LENGTH + length),
            _ => HEADER_LENGTH + length,
        }
    }

    /// The pages, as first and count, whose data are the next to come, and all that is left of the record.
    pub fn pages_ahead(&self) -> Option<(u64, u64)> {
        let header = self.header.filter(|header| header.kind == Some(Kind::Pages))?;
        if self.complete || self.placing.is_some() || self.filled != PAGES_FIELDS_END {
            return None;
        }
        let (first, count) = (u64_at(&self.buffer, HEADER_LENGTH), u64_at(&self.buffer, HEADER_LENGTH + 8));
        let bytes = (header.length as usize).checked_sub(PAGES_FIELDS)?;
        pages_fault(first, count, bytes).is_none().then_some((first, count))
    }

    /// The data of [`Self::pages_ahead`] go elsewhere.
    pub fn place(&mut self) {
        if let (Some((first, count)), Some(header)) = (self.pages_ahead(), self.header) {
            let mut hasher = Box::new(Xxh3::new());
            hasher.update(&self.buffer[HEADER_LENGTH..PAGES_FIELDS_END]);
            self.placing = Some(Placing { first, count, left: header.length as usize - PAGES_FIELDS, hasher });
        }
    }

    /// Bytes of placed data that have not come yet. `None`: the stream goes on in [`Self::space`].
    pub fn left_to_place(&self) -> Option<usize> {
        self.placing.as_ref().map(|placing| placing.left).filter(|left| *left > 0)
    }

    /// The next bytes of placed data, as they are where they were put. True once the record is complete.
    pub fn placed(&mut self, bytes: &[u8]) -> Result<bool, WireError> {
        let Some(placing) = self.placing.as_mut().filter(|placing| bytes.len() <= placing.left) else {
            return Err(WireError::Malformed { kind: Kind::Pages, what: "more data than were announced" });
        };
        placing.hasher.update(bytes);
        placing.left -= bytes.len();
        if placing.left > 0 {
            return Ok(false);
        }
        let hash = placing.hasher.digest();
        match self.header {
            Some(header) => self.completed(header, hash),
            None => Ok(false),
        }
    }

    /// Where the next bytes of the stream go: exactly what the record in progress still needs. Never empty. Begins the
    /// next record if one was complete.
    pub fn space(&mut self) -> &mut [u8] {
        if self.complete {
            self.complete = false;
            self.header = None;
            self.placing = None;
            self.filled = 0;
        }
        let need = self.need();
        &mut self.buffer[self.filled..need]
    }

    /// `count` bytes were put into [`Self::space`]. True once a record is complete. After an error the stream is over.
    pub fn advance(&mut self, count: usize) -> Result<bool, WireError> {
        let need = self.need();
        self.filled = self.filled.saturating_add(count).min(need);
        if self.filled < need {
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
        if self.filled < HEADER_LENGTH + header.length as usize {
            return Ok(false);
        }
        let hash = xxh3_64(&self.buffer[HEADER_LENGTH..self.filled]);
        self.completed(header, hash)
    }

    /// All of the record is here.
    fn completed(&mut self, header: Header, hash: u64) -> Result<bool, WireError> {
        if hash != header.payload_hash {
            return Err(WireError::PayloadChecksum { sequence: self.sequence });
        }
        if header.kind == Some(Kind::Digest) {
            self.digest_before = self.digest.value();
        }
        self.digest.update(&self.buffer[..HEADER_LENGTH]);
        self.id = Some(header.id);
        self.sequence += 1;
        self.complete = true;
        Ok(true)
    }

    /// The record in hand, if [`Self::advance`] said that there is one. `Ok(None)`: unknown and optional, skip it.
    pub fn record(&self) -> Result<Option<Record<'_>>, WireError> {
        if let (true, Some(Placing { first, count, .. })) = (self.complete, &self.placing) {
            return Ok(Some(Record::PlacedPages { first: *first, count: *count }));
        }
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
