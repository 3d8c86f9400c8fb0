//! Devices: one VFIO-shaped trait, implemented by the kernel's vfio-pci (`vfio`) and by models (`sim`).
//!
//! **Owns** the [`Device`] trait and the types of its questions and answers. **Must never** know a plug-in, a hook or a
//! migration's order of steps: a device does what it is told, and says what went wrong.
//! Locks: each implementation's own, never held while a caller's code runs.

mod error;
pub mod sim;
mod types;
pub mod vfio;

pub use error::{DeviceError, ErrorKind};
pub use types::*;

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

pub type Result<T> = std::result::Result<T, DeviceError>;

/// A passthrough device, in VFIO's shape. Every method may be called from any thread; ordering between accesses is the
/// caller's business (`mediation` has the gate).
pub trait Device: Send + Sync + Debug {
    fn identity(&self) -> &Identity;

    /// Flags and counts, as `VFIO_DEVICE_GET_INFO`. Constant for the device's life.
    fn info(&self) -> DeviceInfo;

    /// As `VFIO_DEVICE_GET_REGION_INFO`, capability chain parsed. EINVAL beyond the last index.
    fn region_info(&self, index: u32) -> Result<RegionInfo>;

    /// As `VFIO_DEVICE_GET_IRQ_INFO`. EINVAL beyond the last index.
    fn irq_info(&self, index: u32) -> Result<IrqInfo>;

    /// Reads `data.len()` bytes at `offset` of a region. All or nothing from the caller's view: on an error the buffer's
    /// contents are unspecified. EINVAL outside the region.
    fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// Maps part of a region into this process. ENODEV (Refused) where the region cannot be mapped.
    fn region_map(&self, index: u32, offset: u64, length: u64) -> Result<Arc<crate::sys::Mapping>>;

    /// The file that a region is mapped from, and where in it the region begins. Whoever has it reaches all that the file has,
    /// whatever the region's areas say; what else it lets him do is the file's business. `None`: it has none.
    fn region_file(&self, _index: u32) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    /// As `VFIO_DEVICE_SET_IRQS`. The device keeps its own duplicates of the eventfds.
    fn set_irqs(&self, request: &IrqSet<'_>) -> Result<()>;

    /// Resets the function. ENOTTY (Refused) where the device has no reset of any kind.
    fn reset(&self) -> Result<()>;

    /// Lets the device reach `map.length` bytes of `map.memory` at `map.iova`. Refuses overlaps (EEXIST).
    fn dma_map(&self, map: &DmaMap) -> Result<()>;

    /// Removes maps that lie wholly inside the range; EINVAL when one is cut. No DMA arrives after it returns.
    fn dma_unmap(&self, iova: u64, length: u64) -> Result<()>;

    /// IOVA ranges that may be mapped, ascending and disjoint. Everything, for a device without an IOMMU.
    fn iova_ranges(&self) -> Vec<IovaRange>;

    /// As `VFIO_DEVICE_FEATURE_PROBE | SET or GET`: does the device have this feature?
    fn probe_feature(&self, feature: Feature, access: FeatureAccess) -> bool;

    /// The device's own migration v2 (variant drivers, mdev), if it has one.
    fn migration(&self) -> Option<&dyn NativeMigration>;

    /// The device's own DMA logging, if it has one.
    fn dma_logging(&self) -> Option<&dyn NativeDmaLogging>;

    /// As `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY`, with an eventfd as `.._ENTRY_WITH_WAKEUP`: allows the device to be suspended
    /// until [`Self::low_power_exit`]. It may be suspended at once, later or never. The eventfd is signalled once, when a device
    /// that had been suspended is resumed, by whomever, and that ends low power. The device keeps its own duplicate.
    ///
    /// Refused: EINVAL when it was entered already, EBUSY for a PF with VFs enabled, ENOTTY without the feature.
    fn low_power_entry(&self, _wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        Err(DeviceError::refused(&self.identity().name, "low power", Errno::NOTTY))
    }

    /// As `VFIO_DEVICE_FEATURE_LOW_POWER_EXIT`: when it returns the device is resumed. Succeeds without a low power to leave.
    fn low_power_exit(&self) -> Result<()> {
        Err(DeviceError::refused(&self.identity().name, "low power", Errno::NOTTY))
    }

    /// Where its power is. Asks nothing of the device itself, and never resumes it. ENOTTY (Refused) where nobody knows.
    fn power(&self) -> Result<Power> {
        Err(DeviceError::refused(&self.identity().name, "its power state", Errno::NOTTY))
    }

    /// Time as this device sees it: real, or the model's.
    fn clock(&self) -> &dyn Clock;
}

/// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE` and its data stream.
pub trait NativeMigration: Send + Sync {
    fn flags(&self) -> MigrationFlags;

    /// Asks for `target`, which may be several arcs away: the driver walks the path. After a failure ask [`Self::state`].
    fn set_state(&self, target: DeviceState) -> Result<()>;

    fn state(&self) -> Result<DeviceState>;

    /// Reads from the saving stream: 0 bytes is its end. In PRE_COPY* the end for now is `Ok(0)` too (ENOMSG).
    fn read(&self, buffer: &mut [u8]) -> Result<usize>;

    /// Writes all of `data` to the resuming stream.
    fn write(&self, data: &[u8]) -> Result<()>;

    /// `VFIO_MIG_GET_PRECOPY_INFO`. EINVAL outside PRE_COPY*.
    fn precopy_info(&self) -> Result<PrecopyInfo>;

    /// `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`: estimated bytes of STOP_COPY.
    fn stop_copy_bytes(&self) -> Result<u64>;
}

/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_*`.
pub trait NativeDmaLogging: Send + Sync {
    /// Returns the page size that the device granted.
    fn start(&self, ranges: &[IovaRange], page_size: u64) -> Result<u64>;

    /// Sets (never clears) the bits of `bitmap`, little-endian words, for dirty pages of `range`. On an error the caller
    /// takes the whole range as dirty.
    fn report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<()>;

    fn stop(&self) -> Result<()>;
}

/// Time as a device sees it.
pub trait Clock: Send + Sync + Debug {
    /// Since some fixed point.
    fn now(&self) -> Duration;

    /// Returns once `now` has advanced by at least `duration`. A virtual clock advances itself.
    fn wait(&self, duration: Duration);
}

/// The machine's monotonic clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealClock;

impl Clock for RealClock {
    fn now(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    }

    fn wait(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
