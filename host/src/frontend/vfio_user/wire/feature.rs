//! DEVICE_FEATURE: migration, dirty page logging, low power.

use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET};

use super::{
    BITMAP_MAX, LOGGING_RANGES_MAX, PAGE_SIZE, Put, Reader, Result, WireError, at_least, at_most, bitmap_length, range,
};
use crate::device::{Feature, IovaRange};

const INDEX_MASK: u32 = 0xffff;

/// `enum vfio_device_mig_state` as far as vfio-user has it. P2P states are not used over this protocol, and ERROR cannot be
/// asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationState {
    Error,
    Stop,
    Running,
    StopCopy,
    Resuming,
    PreCopy,
}

impl MigrationState {
    pub const fn raw(self) -> u32 {
        match self {
            Self::Error => 0,
            Self::Stop => 1,
            Self::Running => 2,
            Self::StopCopy => 3,
            Self::Resuming => 4,
            Self::PreCopy => 6,
        }
    }

    pub const fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            0 => Self::Error,
            1 => Self::Stop,
            2 => Self::Running,
            3 => Self::StopCopy,
            4 => Self::Resuming,
            6 => Self::PreCopy,
            _ => return None,
        })
    }
}

/// What is done with a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Get,
    Set,
    /// Is it there, and can all of these be done with it?
    Probe {
        get: bool,
        set: bool,
    },
}

/// Ranges to be logged, which have been looked at. None: everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoggingRanges<'a>(&'a [u8]);

impl<'a> LoggingRanges<'a> {
    pub fn is_everything(self) -> bool {
        self.0.is_empty()
    }

    /// Not empty, aligned to the page size of their message, apart from each other.
    pub fn iter(self) -> impl Iterator<Item = IovaRange> + 'a {
        self.0.chunks_exact(16).filter_map(|bytes| {
            let mut reader = Reader::new(bytes);
            let (iova, length) = (reader.u64().ok()?, reader.u64().ok()?);
            Some(IovaRange { iova, last: iova.checked_add(length.checked_sub(1)?)? })
        })
    }
}

/// DMA_LOGGING_START's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoggingStart<'a> {
    /// A hint, in bytes: a power of two, at least 4096
    pub page_size: u64,
    pub ranges: LoggingRanges<'a>,
}

impl<'a> LoggingStart<'a> {
    fn parse(data: &'a [u8]) -> Result<Self> {
        let mut reader = Reader::new(data);
        let (page_size, count, _reserved) = (reader.u64()?, reader.u32()?, reader.u32()?);
        page_size_ok(page_size)?;
        at_most("ranges", u64::from(count), u64::from(LOGGING_RANGES_MAX))?;
        let ranges = LoggingRanges(reader.exactly(count as usize * 16)?);
        for bytes in ranges.0.chunks_exact(16) {
            let mut reader = Reader::new(bytes);
            let (iova, length) = (reader.u64()?, reader.u64()?);
            range(iova, length)?;
            if !(iova | length).is_multiple_of(page_size) {
                return Err(WireError::Invalid("a range to be logged that does not begin and end with a page"));
            }
        }
        let mut sorted: Vec<IovaRange> = ranges.iter().collect();
        sorted.sort_unstable_by_key(|range| range.iova);
        if sorted.windows(2).any(|pair| pair[0].last >= pair[1].iova) {
            return Err(WireError::Invalid("ranges to be logged that overlap"));
        }
        Ok(Self { page_size, ranges })
    }

    /// Data with these ranges.
    pub fn write(page_size: u64, ranges: &[(u64, u64)], out: &mut Vec<u8>) {
        out.u64(page_size);
        out.u32(ranges.len() as u32);
        out.u32(0);
        for (iova, length) in ranges {
            out.u64(*iova);
            out.u64(*length);
        }
    }
}

/// DMA_LOGGING_REPORT's data: a range, not empty, that begins with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoggingReport {
    pub iova: u64,
    /// In bytes
    pub length: u64,
    /// Of one bit, in bytes: a power of two, at least 4096; any such one, whatever is logged by
    pub page_size: u64,
}

impl LoggingReport {
    pub const LENGTH: usize = 24;

    fn parse(data: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(data);
        let report = Self { iova: reader.u64()?, length: reader.u64()?, page_size: reader.u64()? };
        reader.end()?;
        page_size_ok(report.page_size)?;
        range(report.iova, report.length)?;
        if !report.iova.is_multiple_of(report.page_size) {
            return Err(WireError::Invalid("a report that does not begin with a page"));
        }
        at_most("bitmap", report.bitmap_length(), BITMAP_MAX)?;
        Ok(report)
    }

    /// In bytes, at most [`BITMAP_MAX`]; bit i is page i.
    pub fn bitmap_length(&self) -> u64 {
        bitmap_length(self.length, self.page_size)
    }

    /// Bits that have a page.
    pub fn pages(&self) -> u64 {
        self.length.div_ceil(self.page_size)
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u64(self.iova);
        out.u64(self.length);
        out.u64(self.page_size);
    }
}

fn page_size_ok(page_size: u64) -> Result<()> {
    if page_size < PAGE_SIZE || !page_size.is_power_of_two() {
        return Err(WireError::Invalid("page size of dirty page logging"));
    }
    Ok(())
}

/// What is asked of a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureCall<'a> {
    Probe {
        feature: Feature,
        get: bool,
        set: bool,
    },
    GetMigration,
    GetState,
    /// Never ERROR
    SetState(MigrationState),
    LowPowerEntry,
    /// The message's only file descriptor is the eventfd
    LowPowerEntryWithWakeup,
    LowPowerExit,
    LoggingStart(LoggingStart<'a>),
    LoggingStop,
    LoggingReport(LoggingReport),
}

/// DEVICE_FEATURE's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFeature<'a> {
    /// Room for the reply's payload, in bytes
    pub argsz: u32,
    pub call: FeatureCall<'a>,
}

impl<'a> DeviceFeature<'a> {
    pub const LENGTH: usize = 8;

    pub fn parse(payload: &'a [u8], fds: usize) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        at_least(argsz, Self::LENGTH as u64)?;
        let data = reader.rest();
        let operation = operation(flags)?;
        let feature = feature(flags)?;
        let wakeup = feature == Feature::LowPowerEntryWithWakeup && operation == Operation::Set;
        if fds != usize::from(wakeup) {
            return Err(WireError::Fds { found: fds, most: usize::from(wakeup) });
        }
        let call = match operation {
            Operation::Probe { get, set } => FeatureCall::Probe { feature, get, set },
            Operation::Get => get(feature, data)?,
            Operation::Set => set(feature, data)?,
        };
        let need = (Self::LENGTH + data.len()) as u64 + added_by_get(&call);
        if !matches!(call, FeatureCall::Probe { .. }) {
            at_least(argsz, need)?;
        }
        Ok(Self { argsz, call })
    }

    /// The head of a request; its data come behind it.
    pub fn write_head(argsz: u32, feature: Feature, operation: Operation, out: &mut Vec<u8>) {
        let operation = match operation {
            Operation::Get => VFIO_DEVICE_FEATURE_GET,
            Operation::Set => VFIO_DEVICE_FEATURE_SET,
            Operation::Probe { get, set } => {
                VFIO_DEVICE_FEATURE_PROBE
                    | if get { VFIO_DEVICE_FEATURE_GET } else { 0 }
                    | if set { VFIO_DEVICE_FEATURE_SET } else { 0 }
            }
        };
        out.u32(argsz);
        out.u32(u32::from(feature as u16) | operation);
    }

    /// The data of a reply, behind 8 bytes that repeat the request's.
    pub fn parse_reply(payload: &[u8]) -> Result<&[u8]> {
        let mut reader = Reader::new(payload);
        let (argsz, _flags) = (reader.u32()?, reader.u32()?);
        at_least(argsz, payload.len() as u64)?;
        Ok(reader.rest())
    }
}

/// Bytes of the reply's data that the request's do not have.
fn added_by_get(call: &FeatureCall<'_>) -> u64 {
    match call {
        FeatureCall::GetMigration | FeatureCall::GetState => 8,
        FeatureCall::LoggingReport(report) => report.bitmap_length(),
        FeatureCall::Probe { .. }
        | FeatureCall::SetState(_)
        | FeatureCall::LowPowerEntry
        | FeatureCall::LowPowerEntryWithWakeup
        | FeatureCall::LowPowerExit
        | FeatureCall::LoggingStart(_)
        | FeatureCall::LoggingStop => 0,
    }
}

fn operation(flags: u32) -> Result<Operation> {
    let has = |bit| flags & bit != 0;
    let (get, set) = (has(VFIO_DEVICE_FEATURE_GET), has(VFIO_DEVICE_FEATURE_SET));
    let known = INDEX_MASK | VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_PROBE;
    match (flags & !known, has(VFIO_DEVICE_FEATURE_PROBE), get, set) {
        (0, true, get, set) => Ok(Operation::Probe { get, set }),
        (0, false, true, false) => Ok(Operation::Get),
        (0, false, false, true) => Ok(Operation::Set),
        _ => Err(WireError::Invalid("flags of a device feature")),
    }
}

fn feature(flags: u32) -> Result<Feature> {
    let raw = (flags & INDEX_MASK) as u16;
    let known = [
        Feature::Migration,
        Feature::MigDeviceState,
        Feature::LowPowerEntry,
        Feature::LowPowerEntryWithWakeup,
        Feature::LowPowerExit,
        Feature::DmaLoggingStart,
        Feature::DmaLoggingStop,
        Feature::DmaLoggingReport,
    ];
    known.into_iter().find(|feature| *feature as u16 == raw).ok_or(WireError::UnknownFeature(raw))
}

fn get<'a>(feature: Feature, data: &[u8]) -> Result<FeatureCall<'a>> {
    let none = || Reader::new(data).end();
    match feature {
        Feature::Migration => none().map(|()| FeatureCall::GetMigration),
        Feature::MigDeviceState => none().map(|()| FeatureCall::GetState),
        Feature::DmaLoggingReport => LoggingReport::parse(data).map(FeatureCall::LoggingReport),
        _ => Err(WireError::UnknownFeature(feature as u16)),
    }
}

fn set(feature: Feature, data: &[u8]) -> Result<FeatureCall<'_>> {
    let none = || Reader::new(data).end();
    match feature {
        Feature::MigDeviceState => {
            let mut reader = Reader::new(data);
            let (state, _data_fd) = (reader.u32()?, reader.u32()?);
            reader.end()?;
            let state = MigrationState::from_raw(state).filter(|state| *state != MigrationState::Error);
            Ok(FeatureCall::SetState(state.ok_or(WireError::Invalid("a state that cannot be asked for"))?))
        }
        Feature::LowPowerEntry => none().map(|()| FeatureCall::LowPowerEntry),
        // `struct vfio_device_low_power_entry_with_wakeup`: its fd is the message's.
        Feature::LowPowerEntryWithWakeup => Reader::new(data).exactly(8).map(|_| FeatureCall::LowPowerEntryWithWakeup),
        Feature::LowPowerExit => none().map(|()| FeatureCall::LowPowerExit),
        Feature::DmaLoggingStart => LoggingStart::parse(data).map(FeatureCall::LoggingStart),
        Feature::DmaLoggingStop => none().map(|()| FeatureCall::LoggingStop),
        _ => Err(WireError::UnknownFeature(feature as u16)),
    }
}
