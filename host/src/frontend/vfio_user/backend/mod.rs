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
use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;

use self::migration::{Loading, Saving};
use super::server::{CLIENT_PATIENCE, Link};
use super::session::{Backend, RegionAnswer};
use super::wire::{
    DeviceInfo, DmaMap, IrqInfo, LoggingRanges, LoggingReport, MigrationState, PAGE_SIZE, SetIrqs, SetIrqsData,
};
use crate::device::{Feature, IrqData, IrqSet};
use crate::mediation::{MediatedDevice, MediationError};
use crate::memory::{ClientMap, ClientSource, Taken};

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
    /// Dirty pages of the reply that is being made
    taken: Vec<Taken>,
    /// The device has not let go of all that a client had which is gone
    lost: bool,
}

impl DeviceBackend {
    pub fn new(device: Arc<MediatedDevice>, options: Options) -> Self {
        let (saving, loading) = Default::default();
        Self { device, options, link: None, saving, loading, taken: Vec::new(), lost: false }
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn device(&self) -> &MediatedDevice {
        &self.device
    }

    /// A client has come. An error: the device has not let go of the one before.
    pub fn attach(&mut self, link: Arc<Link>) -> Result<(), MediationError> {
        if std::mem::replace(&mut self.lost, false) {
            self.let_go()?;
        }
        self.link = Some(link);
        if let Err(error) = self.device.client(true) {
            tracing::warn!(device = %self.device.identity().name, %error, "a client came");
        }
        Ok(())
    }

    /// Of a client that is gone: memory, interrupts, logging. What fails is tried again, at the latest before the next client is served.
    fn let_go(&mut self) -> Result<(), MediationError> {
        self.device.client_lost().inspect_err(|_| self.lost = true)
    }

    /// The device has not let go of the last client.
    pub fn owes(&self) -> bool {
        self.lost
    }

    /// One more try.
    pub fn settle(&mut self) {
        if std::mem::replace(&mut self.lost, false)
            && let Err(error) = self.let_go()
        {
            tracing::warn!(device = %self.device.identity().name, %error, "still not let go of a client's memory and interrupts");
        }
    }

    /// The client is gone, and nobody waits for it.
    pub fn detach(&mut self) {
        self.link = None;
        self.taken.clear();
        // Ends logging, and low power, too: whoever began them is gone.
        if let Err(error) = self.let_go() {
            tracing::error!(device = %self.device.identity().name, %error, "letting go of a client's memory and interrupts");
        }
        if let Err(error) = self.device.client(false) {
            tracing::warn!(device = %self.device.identity().name, %error, "a client left");
        }
    }

    /// The last request has been dealt with. `reported`: the reply was sent in full, and has the dirty pages that were taken out of
    /// the log for it. Else they go back.
    pub fn replied(&mut self, reported: bool) {
        let taken = std::mem::take(&mut self.taken);
        if reported {
            taken.into_iter().for_each(Taken::commit);
        }
    }

    /// By default none: what has been handed out cannot be taken back when the device may not be reached.
    fn region_file(&self, index: u32, flags: u32) -> Result<Option<(OwnedFd, u64)>, Errno> {
        if !self.options.share_device_fd || flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Ok(None);
        }
        self.device.region_file(index).map_err(|error| error.errno())
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
        let file = self.region_file(index, info.flags)?;
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

    fn dma_map(&mut self, map: &DmaMap, fd: Option<OwnedFd>) -> Result<(), Errno> {
        let source = match (fd, &self.link) {
            (Some(fd), _) => ClientSource::File { fd, offset: map.offset },
            (None, Some(link)) => ClientSource::Messages(Arc::clone(link) as _),
            (None, None) => return Err(Errno::NOTCONN),
        };
        let DmaMap { address: iova, size: length, readable: read, writable: write, .. } = *map;
        self.device.dma_map_client(ClientMap { iova, length, read, write, source }).map_err(|error| {
            // The client's user has to know why; an errno does not say it.
            tracing::warn!(device = %self.device.identity().name, %error, "a client's memory");
            error.errno()
        })
    }

    fn dma_unmap(&mut self, map: &DmaMap, dirty: Option<(u64, &mut [u8])>) -> Result<(), Errno> {
        let DmaMap { address: iova, size: length, .. } = *map;
        match dirty {
            None => self.device.dma_unmap(iova, length).map_err(|error| error.errno()),
            Some((page_size, bitmap)) => {
                let taken = self.device.dma_unmap_dirty(iova, length, page_size, bitmap);
                self.taken.push(taken.map_err(|error| error.errno())?);
                Ok(())
            }
        }
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

    /// Everything is logged, whatever the ranges, page by page: both only ask for less.
    fn logging_start(&mut self, _page_size: u64, _ranges: LoggingRanges<'_>) -> Result<u64, Errno> {
        self.device.start_tracking().map_err(|error| error.errno())?;
        Ok(PAGE_SIZE)
    }

    fn logging_stop(&mut self) -> Result<(), Errno> {
        self.device.stop_tracking();
        // Somebody else had the device all the while.
        if self.device.is_tracking() { Err(Errno::BUSY) } else { Ok(()) }
    }

    fn logging_report(&mut self, report: &LoggingReport, bitmap: &mut [u8]) -> Result<(), Errno> {
        let LoggingReport { iova, length, page_size } = *report;
        let taken = self.device.dirty_report(iova, length, page_size, bitmap);
        self.taken.push(taken.map_err(|error| error.errno())?);
        Ok(())
    }

    fn low_power_entry(&mut self, wakeup: Option<OwnedFd>) -> Result<(), Errno> {
        let entered = self.device.low_power_entry(wakeup.as_ref().map(AsFd::as_fd));
        entered.map_err(|error| error.errno())
    }

    fn low_power_exit(&mut self) -> Result<(), Errno> {
        self.device.low_power_exit().map_err(|error| error.errno())
    }
}
