//! The stream: records, their bytes, and everything that a hostile peer may try with them.
//!
//! **Owns** the bytes between two hosts (`spec/stream.md`; golden bytes in `spec/golden/stream`). Parsers and builders
//! are total: any bytes in, a record or a typed error out. **Must never** perform I/O, decide what a record *means* for
//! a migration (the machines do), or allocate by a length that it has not capped.

mod frame;
mod record;
#[cfg(test)]
mod tests;

pub use frame::{Decoder, Encoder, HEADER_LENGTH, MAGIC, OPTIONAL_CAP, VERSION};
pub use record::{
    Capabilities, DeviceOffer, Hello, MemoryCopier, Outcome, REASON_CAP, Record, RefuseCode, SourceClaim,
};

use std::fmt;

/// Bytes of guest memory that the stream counts as a page.
pub const PAGE_SIZE: u32 = 4096;
/// Most pages in one PAGES record.
pub const PAGES_MAX: u32 = 256;
/// Most bytes of device state in one DEVICE_STATE record.
pub const STATE_MAX: u32 = 1024 * 1024;
/// No payload is longer, in bytes.
pub const MAX_PAYLOAD: u32 = 1024 * 1024 + 4096;
/// Most devices of one migration.
pub const DEVICES_MAX: usize = 64;
/// Longest match data of one device, in bytes; all of a HELLO's must fit one payload.
pub const MATCH_DATA_MAX: usize = 64 * 1024;
/// Longest device name, in bytes.
pub const NAME_MAX: usize = 255;

/// 128 random bits that name one attempt to migrate, on both sides, for ever.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// A fresh id from the kernel's random numbers.
    pub fn random() -> std::io::Result<Self> {
        use std::io::Read;
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Parses 32 hexadecimal digits, as [`fmt::Display`] writes them.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

/// xxh3-128 over the headers of a stream's records, in order; each has its payload's hash in it. Not cryptographic: it shows that both sides saw the same stream, and
/// defends against damage, not against a forger (that is the transport's business).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 16]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

/// A [`Digest`] in the making.
#[derive(Clone)]
pub struct RunningDigest(Box<xxhash_rust::xxh3::Xxh3>);

impl RunningDigest {
    pub fn new() -> Self {
        Self(Box::new(xxhash_rust::xxh3::Xxh3::new()))
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn value(&self) -> Digest {
        Digest(self.0.digest128().to_le_bytes())
    }
}

impl Default for RunningDigest {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RunningDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RunningDigest")
    }
}

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    FromSource,
    FromDestination,
}

macro_rules! kinds {
    ($($name:ident = $number:expr, $direction:ident, $cap:expr;)*) => {
        /// What a record is, as our enum; [`Kind::raw`] is the wire's number.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Kind { $($name,)* }

        impl Kind {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            pub const fn raw(self) -> u16 {
                match self { $(Self::$name => $number,)* }
            }

            pub const fn direction(self) -> Direction {
                match self { $(Self::$name => Direction::$direction,)* }
            }

            /// Longest payload, in bytes.
            pub const fn cap(self) -> u32 {
                match self { $(Self::$name => $cap,)* }
            }
        }
    };
}

kinds! {
    Hello = 1, FromSource, MAX_PAYLOAD;
    Accept = 2, FromDestination, 8;
    Refuse = 3, FromDestination, 4 + REASON_CAP as u32;
    Pages = 4, FromSource, 16 + PAGES_MAX * PAGE_SIZE;
    ZeroPages = 5, FromSource, 16;
    DeviceState = 6, FromSource, 16 + STATE_MAX;
    RoundEnd = 7, FromSource, 16;
    RoundAck = 8, FromDestination, 16;
    Stop = 9, FromSource, 8;
    Digest = 10, FromSource, 16;
    Ready = 11, FromDestination, 16;
    Commit = 12, FromSource, 16;
    Committed = 13, FromDestination, 8;
    Abort = 14, FromSource, REASON_CAP as u32;
    Aborted = 15, FromDestination, REASON_CAP as u32;
    Query = 16, FromSource, 4;
    Outcome = 17, FromDestination, 4 + REASON_CAP as u32;
    Verify = 18, FromSource, 16;
    Verified = 19, FromDestination, 16;
    Progress = 20 | Kind::OPTIONAL, FromSource, 16;
}

impl Kind {
    /// Set in the number of a kind that may be skipped by who does not know it.
    pub const OPTIONAL: u16 = 1 << 15;

    pub fn from_raw(raw: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.raw() == raw)
    }
}

/// The stream is damaged, or its sender does not keep to the protocol. Nothing of such a stream may be believed after.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("not a migration stream (magic {found:#010x})")]
    Magic { found: u32 },
    #[error("stream version {found} is not spoken here (only {VERSION})")]
    Version { found: u16 },
    #[error("record {sequence}: damaged header")]
    HeaderChecksum { sequence: u64 },
    #[error("record {sequence}: damaged payload")]
    PayloadChecksum { sequence: u64 },
    #[error("a record of another migration ({found})")]
    Foreign { found: MigrationId },
    #[error("record {found} where {expected} was due: lost, repeated or out of order")]
    Sequence { expected: u64, found: u64 },
    #[error("unknown mandatory record kind {kind}")]
    UnknownKind { kind: u16 },
    #[error("{kind:?} does not come from this side")]
    WrongDirection { kind: Kind },
    #[error("record kind {kind} of {length} bytes (at most {cap})")]
    TooLong { kind: u16, length: u32, cap: u32 },
    #[error("the stream ends inside a record ({have} of {need} bytes)")]
    Short { have: usize, need: usize },
    #[error("{kind:?}: {what}")]
    Malformed { kind: Kind, what: &'static str },
}
