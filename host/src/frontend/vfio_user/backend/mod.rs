//! A mediated device as the protocol calls it.
//!
//! **Owns** what a client has of the device beyond the device's own state: its interrupts and memory, logging and low power that it
//! began. **Must never** hand out a file of which any page is claimed, leave something of a client in the device, or lose a
//! dirty page that the client has not been told of.

mod migration;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use self::migration::{Loading, Saving};
use super::server::{CLIENT_PATIENCE, Link};
use super::session::{Backend, RegionAnswer};
use super::wire::{DeviceInfo, DmaMap, IrqInfo, LoggingRanges, LoggingReport, MigrationState, SetIrqs, SetIrqsData};
use crate::device::{Feature, IrqAction, IrqData, IrqSet};
use crate::mediation::MediatedDevice;

/// What an operator chooses for a served device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Clients get the file of the device itself, to map its regions: they are trusted like this process
    pub share_device_fd: bool,
    /// For a client to take a message or to answer a DMA request
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { share_device_fd: false, patience: CLIENT_PATIENCE }
    }
}

/// A device, and what its client has of it.
#[derive(Debug)]
pub struct DeviceBackend {
    device: Arc<MediatedDevice>,
    options: Options,
    /// The client that is served
    link: Option<Arc<Link>>,
    // The state of the device, which outlives a client.
    saving: Saving,
    loading: Loading,
    /// The client began it
    logging: bool,
    low_power: bool,
}

impl DeviceBackend {
    pub fn new(device: Arc<MediatedDevice>, options: Options) -> Self {
        let (saving, loading) = Default::default();
        Self { device, options, link: None, saving, loading, logging: false, low_power: false }
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn device(&self) -> &MediatedDevice {
        &self.device
    }

    /// A client has come.
    pub fn attach(&mut self, link: Arc<Link>) {
        self.link = Some(link);
        if let Err(error) = self.device.client(true) {
            tracing::warn!(device = %self.device.identity().name, %error, "a client came");
        }
    }

    /// The client is gone, and nobody waits for it.
    pub fn detach(&mut self) {
        self.link = None;
        self.disarm_irqs();
        if std::mem::take(&mut self.logging) {
            self.device.stop_tracking();
        }
        if std::mem::take(&mut self.low_power)
            && let Err(error) = self.device.low_power_exit()
        {
            tracing::warn!(device = %self.device.identity().name, %error, "low power of a client that is gone");
        }
        if let Err(error) = self.device.client(false) {
            tracing::warn!(device = %self.device.identity().name, %error, "a client left");
        }
    }

    /// No vector signals a client that is gone.
    fn disarm_irqs(&self) {
        for index in 0..self.device.info().num_irqs {
            if self.device.irq_info(index).is_ok_and(|info| info.count > 0) {
                let (action, data) = (IrqAction::Trigger, IrqData::None);
                let disabled = self.device.set_irqs(&IrqSet { index, start: 0, count: 0, action, data });
                if let Err(error) = disabled {
                    tracing::warn!(device = %self.device.identity().name, index, %error, "disarming irqs");
                }
            }
        }
    }

    /// The reply of the last request is on its way; `report`: it had dirty pages.
    pub fn replied(&mut self, _report: bool) {}

    /// A file whose pages a client may reach, all of them.
    fn region_file(&self, _index: u32) -> Option<(OwnedFd, u64)> {
        if !self.options.share_device_fd {
            return None;
        }
        None
    }
}

impl Backend for DeviceBackend {
    type Fd = OwnedFd;

    fn device_info(&mut self) -> Result<DeviceInfo, Errno> {
        let info = self.device.info();
        Ok(DeviceInfo { flags: info.flags, num_regions: info.num_regions, num_irqs: info.num_irqs })
    }

    fn region_info(&mut self, index: u32) -> Result<RegionAnswer<OwnedFd>, Errno> {
        let info = self.device.region_info(index).map_err(|error| error.errno())?;
        let file = self.region_file(index);
        Ok(RegionAnswer { flags: info.flags, size: info.size, capabilities: info.capabilities, file })
    }

    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno> {
        let info = self.device.irq_info(index).map_err(|error| error.errno())?;
        Ok(IrqInfo { flags: info.flags, index: info.index, count: info.count })
    }

    fn set_irqs(&mut self, request: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let bools: Vec<bool>;
        let eventfds: Vec<Option<_>>;
        let data = match request.data {
            SetIrqsData::None => IrqData::None,
            SetIrqsData::Bool(data) => {
                bools = data.iter().collect();
                IrqData::Bool(&bools)
            }
            SetIrqsData::EventFds => {
                eventfds = fds.iter().map(|fd| Some(fd.as_fd())).collect();
                IrqData::EventFd(&eventfds)
            }
            SetIrqsData::NoEventFds => {
                eventfds = vec![None; request.count as usize];
                IrqData::EventFd(&eventfds)
            }
        };
        let SetIrqs { index, start, count, action, .. } = *request;
        self.device.set_irqs(&IrqSet { index, start, count, action, data }).map_err(|error| error.errno())
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.device.region_read(region, offset, data).map_err(|error| error.errno())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.device.region_write(region, offset, data).map_err(|error| error.errno())
    }

    fn dma_map(&mut self, _map: &DmaMap, _fd: Option<OwnedFd>) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn dma_unmap(&mut self, _map: &DmaMap, _dirty: Option<(u64, &mut [u8])>) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.saving.forget();
        self.loading = Loading::default();
        self.device.reset().map_err(|error| error.errno())
    }

    fn probe(&mut self, feature: Feature, get: bool, set: bool) -> Result<(), Errno> {
        self.probe_feature(feature, get, set)
    }

    fn migration_flags(&mut self) -> Result<u64, Errno> {
        self.migration_bits()
    }

    fn state(&mut self) -> Result<MigrationState, Errno> {
        self.migration_state()
    }

    fn set_state(&mut self, state: MigrationState) -> Result<(), Errno> {
        self.walk_to(state)
    }

    fn mig_data_read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        self.saving.read(&self.device, buffer)
    }

    fn mig_data_write(&mut self, data: &[u8]) -> Result<(), Errno> {
        self.loading.write(&self.device, data)
    }

    fn logging_start(&mut self, _page_size: u64, _ranges: LoggingRanges<'_>) -> Result<u64, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn logging_stop(&mut self) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn logging_report(&mut self, _report: &LoggingReport, _bitmap: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn low_power_entry(&mut self, wakeup: Option<OwnedFd>) -> Result<(), Errno> {
        let entered = self.device.low_power_entry(wakeup.as_ref().map(AsFd::as_fd));
        entered.map_err(|error| error.errno())?;
        self.low_power = true;
        Ok(())
    }

    fn low_power_exit(&mut self) -> Result<(), Errno> {
        self.device.low_power_exit().map_err(|error| error.errno())?;
        self.low_power = false;
        Ok(())
    }
}
