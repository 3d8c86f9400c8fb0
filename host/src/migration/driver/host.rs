//! What a driver needs of the host that embeds it: devices, memory, VMM. Implemented over the mediation layer, and by the
//! simulation that the fault sweep runs in.

use std::fmt::Debug;

use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

use super::connection::Place;
use crate::migration::cause::Cause;
use crate::migration::report::DeviceReport;
use crate::migration::wire::{DeviceOffer, MemoryCopier, RefuseCode};

/// Something that the host could not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostError {
    /// It will not be tried: the reason, for people
    Refused(String),
    Device {
        device: usize,
        what: String,
    },
    Memory(String),
    Vmm(String),
}

impl From<HostError> for Cause {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Refused(reason) => Self::Refused { code: RefuseCode::Device, reason },
            HostError::Device { device, what } => Self::Device { device, what },
            HostError::Memory(what) => Self::Memory(what),
            HostError::Vmm(what) => Self::Vmm(what),
        }
    }
}

pub type Result<T> = std::result::Result<T, HostError>;

/// A device as the source offers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferedDevice {
    pub offer: DeviceOffer<'static>,
    pub flags: MigrationFlags,
    pub report: DeviceReport,
}

/// All that a source offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceOffer {
    pub copier: MemoryCopier,
    /// Guest memory in pages of [`crate::migration::wire::PAGE_SIZE`]
    pub pages: u64,
    pub devices: Vec<OfferedDevice>,
}

/// What a destination has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationShape {
    pub copier: MemoryCopier,
    pub pages: u64,
    /// Nobody has written guest memory since it was made: it reads as zeroes
    pub fresh: bool,
    pub devices: Vec<(MigrationFlags, DeviceReport)>,
}

/// Result of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    pub bytes: usize,
    /// STOP_COPY: the state is complete. PRE_COPY: nothing more for now.
    pub end: bool,
}

/// Estimate of a device's state, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remaining {
    pub initial_bytes: u64,
    /// `None`: unknown
    pub stop_copy_bytes: Option<u64>,
}

/// A snapshot of dirt, taken out of the log. Dropped uncommitted it goes back.
pub trait DirtyDrain: Debug {
    /// Bit i of word w: page 64 w + i.
    fn words(&self) -> &[u64];
    /// Every page of it is safe at the peer.
    fn commit(self: Box<Self>);
}

/// The side with the guest. Methods are called by the migration's thread, one at a time.
pub trait SourceHost: Send + Sync {
    /// Whether everything here can migrate, and as what.
    fn describe(&self) -> Result<SourceOffer>;
    /// Tracks the writes of guest and devices from now on; every page counts as dirty. On an error nothing is left
    /// started that [`Self::stop_tracking`] does not stop.
    fn start_tracking(&self) -> Result<()>;
    fn stop_tracking(&self);
    /// Brings the dirt of every tracker into the log. A tracker that cannot be read dirties all it tracks, and is an
    /// error only where not even that can be done.
    fn sync_dirty(&self) -> Result<()>;
    fn dirty_pages(&self) -> u64;
    fn drain(&self) -> Result<Box<dyn DirtyDrain + '_>>;
    /// Fills `data`, whole pages, from page `first` on.
    fn read_pages(&self, first: u64, data: &mut [u8]) -> Result<()>;
    /// Walks the path to `target`. `deadline_ms`: from now.
    fn set_state(&self, device: usize, target: DeviceState, deadline_ms: u64) -> Result<()>;
    /// As [`Self::set_state`]; where that fails, resets the device.
    fn restore(&self, device: usize, target: DeviceState, deadline_ms: u64) -> Result<()>;
    fn save(&self, device: usize, buffer: &mut [u8]) -> Result<Saved>;
    fn remaining(&self, device: usize) -> Result<Remaining>;
    /// The guest executes nothing once it returns `Ok`. After an error it may or may not.
    fn pause(&self, deadline_ms: u64) -> Result<()>;
    fn resume(&self) -> Result<()>;
}

/// The side that receives.
pub trait DestinationHost: Send + Sync {
    fn shape(&self) -> Result<DestinationShape>;
    /// Can this device take the offered one's state? The reason if not.
    fn check_match(&self, device: usize, offer: &DeviceOffer<'_>) -> std::result::Result<(), String>;
    fn set_state(&self, device: usize, target: DeviceState, deadline_ms: u64) -> Result<()>;
    /// Abandons a device's half-loaded state: resets it.
    fn discard(&self, device: usize) -> Result<()>;
    fn load(&self, device: usize, data: &[u8]) -> Result<()>;
    fn write_pages(&self, first: u64, data: &[u8]) -> Result<()>;
    /// Where these pages may be received directly. What is there is garbage until the record that brought it is complete.
    /// `None`: they come by [`Self::write_pages`].
    fn place(&self, first: u64, count: u64) -> Result<Option<Place>> {
        let _ = (first, count);
        Ok(None)
    }
    fn zero_pages(&self, first: u64, count: u64) -> Result<()>;
    /// For `verify`.
    fn read_pages(&self, first: u64, data: &mut [u8]) -> Result<()>;
    fn resume(&self) -> Result<()>;
}
