//! A device's own migration v2 and DMA logging, where its kernel driver has them (variant drivers, mdev).
//!
//! **Owns** the data stream that the kernel hands out on entering PRE_COPY, STOP_COPY or RESUMING. **Must never** keep a
//! stream across a state that has none: what was read from it would belong to another migration.
//! Locks: `stream`, held only to take or swap the handle, never across a call.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::{self, Errno};
use vfio_bindings::bindings::vfio::*;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

use super::error;
use crate::device::{IovaRange, NativeDmaLogging, NativeMigration, PrecopyInfo, Result};
use crate::sys::vfio;

/// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE` of one device.
#[derive(Debug)]
pub(super) struct Migration {
    device: String,
    fd: Arc<OwnedFd>,
    flags: MigrationFlags,
    stream: Mutex<Option<Arc<OwnedFd>>>,
}

impl Migration {
    /// `None` where the device's driver has no migration, or one with bits that this version does not know.
    pub fn of(device: &str, fd: &Arc<OwnedFd>) -> Option<Self> {
        let raw = vfio::migration_flags(fd.as_fd()).ok()?;
        let Some(flags) = MigrationFlags::from_raw(raw) else {
            tracing::warn!(
                device,
                flags = raw,
                "the driver's migration flags are not understood: its migration is not used"
            );
            return None;
        };
        if flags.pre_copy {
            match vfio::precopy_info_v2(fd.as_fd()) {
                Ok(()) => tracing::debug!(device, "pre-copy information version 2"),
                // An older kernel or a driver without it: initial_bytes then only ever shrinks.
                Err(errno) => tracing::debug!(device, %errno, "pre-copy information version 1"),
            }
        }
        Some(Self { device: device.to_owned(), fd: fd.clone(), flags, stream: Mutex::default() })
    }

    fn error(&self, what: impl Into<String>, errno: Errno) -> crate::device::DeviceError {
        error(&self.device, what, errno)
    }

    fn stream(&self, what: &str) -> Result<Arc<OwnedFd>> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner).clone();
        stream.ok_or_else(|| self.error(format!("{what}: no migration stream is open"), Errno::INVAL))
    }

    /// A reset ends every stream.
    pub fn was_reset(&self) {
        self.replace_stream(None);
    }

    fn replace_stream(&self, stream: Option<OwnedFd>) {
        let old = {
            let mut slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *slot, stream.map(Arc::new))
        };
        drop(old); // closing may sleep: outside the lock
    }
}

impl NativeMigration for Migration {
    fn flags(&self) -> MigrationFlags {
        self.flags
    }

    fn set_state(&self, target: DeviceState) -> Result<()> {
        match vfio::migration_set_state(self.fd.as_fd(), target.raw()) {
            // PRE_COPY, PRE_COPY_P2P and STOP_COPY share the stream that the first of them opened.
            Ok(None) if has_stream(target) => Ok(()),
            Ok(stream) => {
                self.replace_stream(stream);
                Ok(())
            }
            Err(errno) => {
                // The device may be anywhere on the path. A stream outlives only a state that has one.
                if !self.state().is_ok_and(has_stream) {
                    self.replace_stream(None);
                }
                Err(self.error(format!("migration state {target}"), errno))
            }
        }
    }

    fn state(&self) -> Result<DeviceState> {
        let what = "asking for the migration state";
        let raw = vfio::migration_state(self.fd.as_fd()).map_err(|errno| self.error(what, errno))?;
        DeviceState::from_raw(raw).ok_or_else(|| self.error(format!("{what}: {raw} is no state"), Errno::PROTO))
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize> {
        let stream = self.stream("reading device state")?;
        match io::retry_on_intr(|| io::read(&*stream, &mut *buffer)) {
            // The end for now of pre-copy data.
            Err(Errno::NOMSG) => Ok(0),
            result => result.map_err(|errno| self.error("reading device state", errno)),
        }
    }

    fn write(&self, mut data: &[u8]) -> Result<()> {
        let stream = self.stream("writing device state")?;
        while !data.is_empty() {
            match io::retry_on_intr(|| io::write(&*stream, data)) {
                Ok(0) => return Err(self.error("writing device state: the stream takes no more", Errno::NOSPC)),
                Ok(written) => data = &data[written..],
                Err(errno) => return Err(self.error("writing device state", errno)),
            }
        }
        Ok(())
    }

    /// With the kernel's version 2, `initial_bytes` may rise again when the device was reconfigured; it is then the new
    /// initial data's size, as a fresh pre-copy would report it.
    fn precopy_info(&self) -> Result<PrecopyInfo> {
        let stream = self.stream("pre-copy information")?;
        let info = vfio::precopy_info(stream.as_fd()).map_err(|errno| self.error("pre-copy information", errno))?;
        Ok(PrecopyInfo { initial_bytes: info.initial_bytes, dirty_bytes: info.dirty_bytes })
    }

    fn stop_copy_bytes(&self) -> Result<u64> {
        vfio::migration_data_size(self.fd.as_fd()).map_err(|errno| self.error("size of the stop-copy data", errno))
    }
}

fn has_stream(state: DeviceState) -> bool {
    state.is_saving() || state == DeviceState::Resuming
}

/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_*` of one device.
#[derive(Debug)]
pub(super) struct DmaLogging {
    device: String,
    fd: Arc<OwnedFd>,
}

impl DmaLogging {
    /// `None` where the device's driver does not log.
    pub fn of(device: &str, fd: &Arc<OwnedFd>) -> Option<Self> {
        let has = |number, access| vfio::feature_probe(fd.as_fd(), number, access).is_ok();
        let complete = has(VFIO_DEVICE_FEATURE_DMA_LOGGING_START, VFIO_DEVICE_FEATURE_SET)
            && has(VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_SET)
            && has(VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_GET);
        complete.then(|| Self { device: device.to_owned(), fd: fd.clone() })
    }

    fn error(&self, what: impl Into<String>, errno: Errno) -> crate::device::DeviceError {
        error(&self.device, what, errno)
    }
}

impl NativeDmaLogging for DmaLogging {
    fn start(&self, ranges: &[IovaRange], page_size: u64) -> Result<u64> {
        let raw = |range: &IovaRange| {
            let length = range.last.checked_sub(range.iova)?.checked_add(1)?;
            Some(vfio_device_feature_dma_logging_range { iova: range.iova, length })
        };
        let ranges: Option<Vec<_>> = ranges.iter().map(raw).collect();
        // All 2^64 addresses have no length in 64 bits.
        let ranges = ranges.ok_or_else(|| self.error("DMA logging start: a range has no length", Errno::OVERFLOW))?;
        let granted = vfio::dma_logging_start(self.fd.as_fd(), &ranges, page_size)
            .map_err(|errno| self.error(format!("DMA logging start, {} ranges", ranges.len()), errno))?;
        // A driver that leaves the field alone granted what was asked for.
        Ok(granted)
    }

    fn report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<()> {
        let what = || format!("DMA logging report of {:#x}..={:#x}", range.iova, range.last);
        let length = range.last.checked_sub(range.iova).and_then(|length| length.checked_add(1));
        let length = length.ok_or_else(|| self.error(what(), Errno::OVERFLOW))?;
        if !page_size.is_power_of_two() {
            return Err(self.error(what(), Errno::INVAL));
        }
        vfio::dma_logging_report(self.fd.as_fd(), range.iova, length, page_size, bitmap)
            .map_err(|errno| self.error(what(), errno))
    }

    fn stop(&self) -> Result<()> {
        vfio::dma_logging_stop(self.fd.as_fd()).map_err(|errno| self.error("DMA logging stop", errno))
    }
}
