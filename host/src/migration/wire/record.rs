//! What records say. One enum; a builder and a parser for each kind, side by side.

use std::borrow::Cow;

use super::{
    DEVICES_MAX, Digest, HEADER_LENGTH, Kind, MATCH_DATA_MAX, NAME_MAX, PAGE_SIZE, PAGES_MAX, STATE_MAX, WireError,
};

/// Longest text for people, in bytes of UTF-8.
pub const REASON_CAP: usize = 1024;

/// Bits that a source may need and a destination may grant. Version 1 knows none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The destination refuses if it does not know one of these
    pub required: u64,
    /// The destination may leave these out
    pub optional: u64,
}

impl Capabilities {
    pub const KNOWN: u64 = 0;
    pub const NONE: Self = Self { required: 0, optional: 0 };
}

/// Who brings the guest's memory over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum MemoryCopier {
    /// PAGES records in this stream
    Host = 1,
    /// The VMM's own migration; this stream carries device state only
    Vmm = 2,
}

/// A device of the source, as the destination must judge it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOffer<'a> {
    /// For people; devices are matched by their order
    pub name: Cow<'a, str>,
    /// `VFIO_MIGRATION_*`
    pub flags: u64,
    /// Opaque here: `mediation` and the plug-in wrote it, and the other side's read it
    pub match_data: Cow<'a, [u8]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello<'a> {
    pub capabilities: Capabilities,
    pub copier: MemoryCopier,
    /// Both sides compare all of memory, after the switchover
    pub verify: bool,
    /// Bytes; the destination must copy in the same unit
    pub page_size: u32,
    /// Guest memory, in pages; 0 if the VMM copies
    pub pages: u64,
    pub devices: Vec<DeviceOffer<'a>>,
}

/// Why a destination will not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RefuseCode {
    /// Memory size, page size, copier, capabilities
    Shape = 1,
    /// A device cannot take the other's state
    Device = 2,
    /// Not now
    Busy = 3,
    /// The id was used before
    Replayed = 4,
}

/// What the source's journal says when it asks for an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum SourceClaim {
    /// COMMIT may have been sent; the source waits for the answer
    Committing = 1,
    /// It kept the guest; the destination must discard
    Kept = 2,
}

/// What the destination's journal says of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// The destination owns the guest
    Owned = 1,
    /// It holds everything and waits for COMMIT
    Prepared = 2,
    /// It will never run this guest; that is on its disk
    Discarded = 3,
    /// It has no memory of this migration: no answer either way
    Unknown = 4,
}

/// One record. Text and bytes are borrowed from the stream when parsed, owned when built by a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'a> {
    Hello(Hello<'a>),
    Accept {
        capabilities: u64,
    },
    Refuse {
        code: RefuseCode,
        reason: Cow<'a, str>,
    },
    /// As [`Self::Pages`], received: the data went straight to where they belong. Never sent.
    PlacedPages {
        first: u64,
        count: u64,
    },
    /// `data` is a whole number of pages, 1 to [`PAGES_MAX`]
    Pages {
        first: u64,
        data: Cow<'a, [u8]>,
    },
    /// Pages of zeroes; at least one
    ZeroPages {
        first: u64,
        count: u64,
    },
    /// `sequence` counts each device's chunks from 0; `last` ends its state
    DeviceState {
        device: u32,
        last: bool,
        sequence: u64,
        data: Cow<'a, [u8]>,
    },
    /// Everything drained in this round has been sent: `pages` of them
    RoundEnd {
        round: u32,
        pages: u64,
    },
    /// ... and is in the destination's memory
    RoundAck {
        round: u32,
        pages: u64,
    },
    /// The guest and its devices stand still; what follows is final
    Stop {
        rounds: u32,
    },
    Digest {
        digest: Digest,
    },
    Ready {
        digest: Digest,
    },
    Commit {
        digest: Digest,
    },
    Committed {
        resume_us: u64,
    },
    Abort {
        reason: Cow<'a, str>,
    },
    Aborted {
        reason: Cow<'a, str>,
    },
    Query {
        claim: SourceClaim,
    },
    Outcome {
        outcome: Outcome,
        explanation: Cow<'a, str>,
    },
    Verify {
        digest: Digest,
    },
    Verified {
        digest: Digest,
    },
    Progress {
        round: u32,
        pages_left: u64,
    },
}

/// Cuts text to [`REASON_CAP`] bytes at a character's edge.
pub(crate) fn capped(text: &str) -> &str {
    let mut end = text.len().min(REASON_CAP);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Record<'_> {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Accept { .. } => Kind::Accept,
            Self::Refuse { .. } => Kind::Refuse,
            Self::Pages { .. } | Self::PlacedPages { .. } => Kind::Pages,
            Self::ZeroPages { .. } => Kind::ZeroPages,
            Self::DeviceState { .. } => Kind::DeviceState,
            Self::RoundEnd { .. } => Kind::RoundEnd,
            Self::RoundAck { .. } => Kind::RoundAck,
            Self::Stop { .. } => Kind::Stop,
            Self::Digest { .. } => Kind::Digest,
            Self::Ready { .. } => Kind::Ready,
            Self::Commit { .. } => Kind::Commit,
            Self::Committed { .. } => Kind::Committed,
            Self::Abort { .. } => Kind::Abort,
            Self::Aborted { .. } => Kind::Aborted,
            Self::Query { .. } => Kind::Query,
            Self::Outcome { .. } => Kind::Outcome,
            Self::Verify { .. } => Kind::Verify,
            Self::Verified { .. } => Kind::Verified,
            Self::Progress { .. } => Kind::Progress,
        }
    }

    /// The trailing bytes, which [`super::Encoder::encode`] leaves where they are.
    pub fn body(&self) -> &[u8] {
        match self {
            Self::Pages { data, .. } | Self::DeviceState { data, .. } => data,
            _ => &[],
        }
    }

    /// Appends everything but [`Self::body`].
    pub(super) fn write_fields(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => hello.write(out),
            Self::Accept { capabilities } => put(out, &capabilities.to_le_bytes()),
            Self::Refuse { code, reason } => {
                put(out, &(*code as u32).to_le_bytes());
                put(out, capped(reason).as_bytes());
            }
            Self::Pages { first, data } => {
                put(out, &first.to_le_bytes());
                put(out, &((data.len() / PAGE_SIZE as usize) as u64).to_le_bytes());
            }
            Self::ZeroPages { first, count } | Self::PlacedPages { first, count } => {
                put(out, &first.to_le_bytes());
                put(out, &count.to_le_bytes());
            }
            Self::DeviceState { device, last, sequence, .. } => {
                put(out, &device.to_le_bytes());
                put(out, &u32::from(*last).to_le_bytes());
                put(out, &sequence.to_le_bytes());
            }
            Self::RoundEnd { round, pages } | Self::RoundAck { round, pages } => put_round(out, *round, *pages),
            Self::Progress { round, pages_left } => put_round(out, *round, *pages_left),
            Self::Stop { rounds } => put(out, &u64::from(*rounds).to_le_bytes()),
            Self::Digest { digest } | Self::Ready { digest } | Self::Commit { digest } => put(out, &digest.0),
            Self::Verify { digest } | Self::Verified { digest } => put(out, &digest.0),
            Self::Committed { resume_us } => put(out, &resume_us.to_le_bytes()),
            Self::Abort { reason } | Self::Aborted { reason } => put(out, capped(reason).as_bytes()),
            Self::Query { claim } => put(out, &(*claim as u32).to_le_bytes()),
            Self::Outcome { outcome, explanation } => {
                put(out, &(*outcome as u32).to_le_bytes());
                put(out, capped(explanation).as_bytes());
            }
        }
    }

    /// What a builder could get wrong and a parser would refuse.
    pub(super) fn check(&self) -> Result<(), WireError> {
        let what = match self {
            Self::Hello(hello) => return hello.check(),
            Self::Pages { first, data } => pages_fault(*first, (data.len() / PAGE_SIZE as usize) as u64, data.len()),
            Self::ZeroPages { first, count } => range_fault(*first, *count),
            Self::PlacedPages { .. } => Some("its data are elsewhere"),
            Self::DeviceState { device, .. } if *device as usize >= DEVICES_MAX => Some("device index too high"),
            Self::DeviceState { data, .. } if data.len() > STATE_MAX as usize => Some("too many bytes"),
            _ => None,
        };
        what.map_or(Ok(()), |what| Err(WireError::Malformed { kind: self.kind(), what }))
    }
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
}

fn put_round(out: &mut Vec<u8>, round: u32, count: u64) {
    put(out, &u64::from(round).to_le_bytes());
    put(out, &count.to_le_bytes());
}

fn range_fault(first: u64, count: u64) -> Option<&'static str> {
    match first.checked_add(count) {
        _ if count == 0 => Some("no pages"),
        None => Some("page numbers overflow"),
        Some(_) => None,
    }
}

pub(super) fn pages_fault(first: u64, count: u64, bytes: usize) -> Option<&'static str> {
    if count > u64::from(PAGES_MAX) {
        return Some("too many pages");
    }
    if count * u64::from(PAGE_SIZE) != bytes as u64 {
        return Some("page count and data differ");
    }
    range_fault(first, count)
}

impl Hello<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        put(out, &self.capabilities.required.to_le_bytes());
        put(out, &self.capabilities.optional.to_le_bytes());
        put(out, &self.pages.to_le_bytes());
        put(out, &self.page_size.to_le_bytes());
        put(out, &[self.copier as u8, u8::from(self.verify)]);
        put(out, &(self.devices.len() as u16).to_le_bytes());
        for device in &self.devices {
            put(out, &device.flags.to_le_bytes());
            put(out, &(device.name.len() as u32).to_le_bytes());
            put(out, &(device.match_data.len() as u32).to_le_bytes());
            put(out, device.name.as_bytes());
            put(out, &device.match_data);
        }
    }

    fn check(&self) -> Result<(), WireError> {
        let malformed = |what| Err(WireError::Malformed { kind: Kind::Hello, what });
        if self.devices.len() > DEVICES_MAX {
            return malformed("too many devices");
        }
        if self.devices.iter().any(|device| device.name.len() > NAME_MAX) {
            return malformed("a device name is too long");
        }
        if self.devices.iter().any(|device| device.match_data.len() > MATCH_DATA_MAX) {
            return malformed("match data are too long");
        }
        Ok(())
    }
}

/// Takes fields off the front of a payload.
struct Fields<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn malformed(&self, what: &'static str) -> WireError {
        WireError::Malformed { kind: self.kind, what }
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(self.malformed("too short"))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A 32-bit number in 64 bits.
    fn wide_u32(&mut self) -> Result<u32, WireError> {
        u32::try_from(self.u64()?).map_err(|_| self.malformed("number too high"))
    }

    fn flag(&mut self, value: u32) -> Result<bool, WireError> {
        match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.malformed("a flag is neither 0 nor 1")),
        }
    }

    fn digest(&mut self) -> Result<Digest, WireError> {
        Ok(Digest(self.array()?))
    }

    fn text(&mut self, bytes: &'a [u8]) -> Result<Cow<'a, str>, WireError> {
        std::str::from_utf8(bytes).map(Cow::Borrowed).map_err(|_| self.malformed("text is not UTF-8"))
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    fn rest_text(&mut self) -> Result<Cow<'a, str>, WireError> {
        let bytes = self.rest();
        self.text(bytes)
    }
}

impl<'a> Record<'a> {
    /// Parses a payload. Every byte must be accounted for.
    pub fn parse(kind: Kind, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields { kind, rest: payload };
        let record = Self::parse_fields(&mut fields)?;
        if !fields.rest.is_empty() {
            return Err(fields.malformed("too long"));
        }
        record.check()?;
        Ok(record)
    }

    fn parse_fields(fields: &mut Fields<'a>) -> Result<Self, WireError> {
        Ok(match fields.kind {
            Kind::Hello => Self::Hello(Hello::parse(fields)?),
            Kind::Accept => Self::Accept { capabilities: fields.u64()? },
            Kind::Refuse => {
                let code = fields.u32()?;
                let code = RefuseCode::from_raw(code).ok_or(fields.malformed("unknown code"))?;
                Self::Refuse { code, reason: fields.rest_text()? }
            }
            Kind::Pages => {
                let (first, count) = (fields.u64()?, fields.u64()?);
                let data = fields.rest();
                match pages_fault(first, count, data.len()) {
                    Some(what) => return Err(fields.malformed(what)),
                    None => Self::Pages { first, data: Cow::Borrowed(data) },
                }
            }
            Kind::ZeroPages => Self::ZeroPages { first: fields.u64()?, count: fields.u64()? },
            Kind::DeviceState => {
                let device = fields.u32()?;
                let flags = fields.u32()?;
                let last = fields.flag(flags)?;
                Self::DeviceState { device, last, sequence: fields.u64()?, data: Cow::Borrowed(fields.rest()) }
            }
            Kind::RoundEnd => Self::RoundEnd { round: fields.wide_u32()?, pages: fields.u64()? },
            Kind::RoundAck => Self::RoundAck { round: fields.wide_u32()?, pages: fields.u64()? },
            Kind::Stop => Self::Stop { rounds: fields.wide_u32()? },
            Kind::Digest => Self::Digest { digest: fields.digest()? },
            Kind::Ready => Self::Ready { digest: fields.digest()? },
            Kind::Commit => Self::Commit { digest: fields.digest()? },
            Kind::Committed => Self::Committed { resume_us: fields.u64()? },
            Kind::Abort => Self::Abort { reason: fields.rest_text()? },
            Kind::Aborted => Self::Aborted { reason: fields.rest_text()? },
            Kind::Query => {
                let claim = fields.u32()?;
                Self::Query { claim: SourceClaim::from_raw(claim).ok_or(fields.malformed("unknown claim"))? }
            }
            Kind::Outcome => {
                let outcome = fields.u32()?;
                let outcome = Outcome::from_raw(outcome).ok_or(fields.malformed("unknown outcome"))?;
                Self::Outcome { outcome, explanation: fields.rest_text()? }
            }
            Kind::Verify => Self::Verify { digest: fields.digest()? },
            Kind::Verified => Self::Verified { digest: fields.digest()? },
            Kind::Progress => Self::Progress { round: fields.wide_u32()?, pages_left: fields.u64()? },
        })
    }

    /// The same record, owning its bytes.
    pub fn into_owned(self) -> Record<'static> {
        let text = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        let bytes = |bytes: Cow<'_, [u8]>| Cow::Owned(bytes.into_owned());
        match self {
            Self::Hello(hello) => Record::Hello(hello.into_owned()),
            Self::Accept { capabilities } => Record::Accept { capabilities },
            Self::Refuse { code, reason } => Record::Refuse { code, reason: text(reason) },
            Self::Pages { first, data } => Record::Pages { first, data: bytes(data) },
            Self::ZeroPages { first, count } => Record::ZeroPages { first, count },
            Self::PlacedPages { first, count } => Record::PlacedPages { first, count },
            Self::DeviceState { device, last, sequence, data } => {
                Record::DeviceState { device, last, sequence, data: bytes(data) }
            }
            Self::RoundEnd { round, pages } => Record::RoundEnd { round, pages },
            Self::RoundAck { round, pages } => Record::RoundAck { round, pages },
            Self::Stop { rounds } => Record::Stop { rounds },
            Self::Digest { digest } => Record::Digest { digest },
            Self::Ready { digest } => Record::Ready { digest },
            Self::Commit { digest } => Record::Commit { digest },
            Self::Committed { resume_us } => Record::Committed { resume_us },
            Self::Abort { reason } => Record::Abort { reason: text(reason) },
            Self::Aborted { reason } => Record::Aborted { reason: text(reason) },
            Self::Query { claim } => Record::Query { claim },
            Self::Outcome { outcome, explanation } => Record::Outcome { outcome, explanation: text(explanation) },
            Self::Verify { digest } => Record::Verify { digest },
            Self::Verified { digest } => Record::Verified { digest },
            Self::Progress { round, pages_left } => Record::Progress { round, pages_left },
        }
    }
}

impl<'a> Hello<'a> {
    fn parse(fields: &mut Fields<'a>) -> Result<Self, WireError> {
        let capabilities = Capabilities { required: fields.u64()?, optional: fields.u64()? };
        let pages = fields.u64()?;
        let page_size = fields.u32()?;
        let copier = match fields.u8()? {
            1 => MemoryCopier::Host,
            2 => MemoryCopier::Vmm,
            _ => return Err(fields.malformed("unknown memory copier")),
        };
        let verify = fields.u8()?;
        let verify = fields.flag(u32::from(verify))?;
        let count = usize::from(fields.u16()?);
        if count > DEVICES_MAX {
            return Err(fields.malformed("too many devices"));
        }
        let mut devices = Vec::with_capacity(count);
        for _ in 0..count {
            let flags = fields.u64()?;
            let (name, match_data) = (fields.u32()? as usize, fields.u32()? as usize);
            let name = fields.bytes(name)?;
            let name = fields.text(name)?;
            devices.push(DeviceOffer { name, flags, match_data: Cow::Borrowed(fields.bytes(match_data)?) });
        }
        Ok(Self { capabilities, copier, verify, page_size, pages, devices })
    }

    pub fn into_owned(self) -> Hello<'static> {
        let devices = self.devices.into_iter().map(DeviceOffer::into_owned).collect();
        let Hello { capabilities, copier, verify, page_size, pages, .. } = self;
        Hello { capabilities, copier, verify, page_size, pages, devices }
    }
}

impl DeviceOffer<'_> {
    pub fn into_owned(self) -> DeviceOffer<'static> {
        DeviceOffer {
            name: Cow::Owned(self.name.into_owned()),
            flags: self.flags,
            match_data: Cow::Owned(self.match_data.into_owned()),
        }
    }
}

impl RefuseCode {
    pub fn from_raw(raw: u32) -> Option<Self> {
        [Self::Shape, Self::Device, Self::Busy, Self::Replayed].into_iter().find(|code| *code as u32 == raw)
    }
}

impl SourceClaim {
    pub fn from_raw(raw: u32) -> Option<Self> {
        [Self::Committing, Self::Kept].into_iter().find(|claim| *claim as u32 == raw)
    }
}

impl Outcome {
    pub fn from_raw(raw: u32) -> Option<Self> {
        [Self::Owned, Self::Prepared, Self::Discarded, Self::Unknown].into_iter().find(|outcome| *outcome as u32 == raw)
    }
}

const _: () = assert!(HEADER_LENGTH == 48);
