//! The real hosts of a migration: mediated devices, guest memory, and the VMM behind its port.
//!
//! **Owns** nothing but references. **Must never** call memory clean on doubt: a tracker that cannot be read dirties
//! everything, and the first round sends every page because the log starts full.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vfio_mediate_sdk::state::DeviceState;

use super::connection::Place;
use super::host::{
    DestinationHost, DestinationShape, DirtyDrain, HostError, OfferedDevice, Remaining, Result, Saved, SourceHost,
    SourceOffer,
};
use crate::mediation::{MediatedDevice, MediationError, VmmError, VmmPort};
use crate::memory::{AddressSpace, Drain, MemoryError, PAGE_SIZE};
use crate::migration::report::DeviceReport;
use crate::migration::wire::{DeviceOffer, MemoryCopier};

/// One VM: its devices in order, its memory, its VMM.
pub struct MediatedHost {
    devices: Vec<Arc<MediatedDevice>>,
    memory: Arc<AddressSpace>,
    vmm: Arc<dyn VmmPort>,
    /// Guest memory has never been written
    fresh: AtomicBool,
}

impl std::fmt::Debug for MediatedHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MediatedHost").field("devices", &self.devices.len()).finish_non_exhaustive()
    }
}

impl MediatedHost {
    /// `fresh`: nobody has written guest memory since it was made, so it reads as zeroes.
    pub fn new(
        devices: Vec<Arc<MediatedDevice>>,
        memory: Arc<AddressSpace>,
        vmm: Arc<dyn VmmPort>,
        fresh: bool,
    ) -> Self {
        Self { devices, memory, vmm, fresh: AtomicBool::new(fresh) }
    }

    /// The same without one of its devices.
    pub fn without(&self, device: &Arc<MediatedDevice>) -> Self {
        let devices = self.devices.iter().filter(|other| !Arc::ptr_eq(other, device)).cloned().collect();
        let (memory, vmm) = (Arc::clone(&self.memory), Arc::clone(&self.vmm));
        let fresh = AtomicBool::new(self.fresh.load(Ordering::Acquire));
        Self { devices, memory, vmm, fresh }
    }

    fn device(&self, index: usize) -> Result<&MediatedDevice> {
        let missing = || HostError::Device { device: index, what: "there is no such device".to_owned() };
        self.devices.get(index).map(Arc::as_ref).ok_or_else(missing)
    }

    /// Refused where the memory is not ours to move.
    fn pages(&self) -> Result<u64> {
        Ok(self.memory.own_ram()?.pages())
    }

    fn walk(&self, index: usize, target: DeviceState, deadline_ms: u64) -> Result<()> {
        let deadline = Instant::now() + Duration::from_millis(deadline_ms);
        self.device(index)?
            .set_state(target, deadline)
            .map_err(|error| HostError::Device { device: index, what: error.to_string() })
    }

    fn reset(&self, index: usize) -> Result<()> {
        self.device(index)?.reset().map_err(|error| device_error(index, &error))
    }

    fn span(&self, first: u64, bytes: u64) -> Result<u64> {
        let size = self.memory.own_ram()?.size();
        first
            .checked_mul(PAGE_SIZE)
            .filter(|offset| offset.checked_add(bytes).is_some_and(|end| end <= size))
            .ok_or_else(|| HostError::Memory(format!("{bytes} bytes from page {first} on lie outside guest memory")))
    }
}

fn device_error(device: usize, error: &MediationError) -> HostError {
    HostError::Device { device, what: error.to_string() }
}

impl From<VmmError> for HostError {
    fn from(error: VmmError) -> Self {
        Self::Vmm(error.to_string())
    }
}

impl From<MemoryError> for HostError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}

impl From<crate::sys::MappingError> for HostError {
    fn from(error: crate::sys::MappingError) -> Self {
        Self::Memory(error.to_string())
    }
}

fn report_of(device: &MediatedDevice) -> DeviceReport {
    let plugin = device.plugin();
    DeviceReport {
        name: device.identity().name.clone(),
        plugin: plugin.as_ref().map(|p| p.name.clone()),
        plugin_version: plugin.as_ref().map(|p| p.version.clone()),
        plugin_path: plugin.as_ref().map(|p| p.path.clone()),
        state_bytes: 0,
    }
}

/// A snapshot of the VM's log.
#[derive(Debug)]
struct LogDrain<'a>(Drain<'a>);

impl DirtyDrain for LogDrain<'_> {
    fn words(&self) -> &[u64] {
        self.0.words()
    }

    fn commit(self: Box<Self>) {
        self.0.commit();
    }
}

impl SourceHost for MediatedHost {
    fn describe(&self) -> Result<SourceOffer> {
        let mut devices = Vec::new();
        for (index, device) in self.devices.iter().enumerate() {
            let flags = device.migratable().map_err(|error| HostError::Refused(error.to_string()))?;
            let match_data = device.match_data().map_err(|error| device_error(index, &error))?;
            let report = report_of(device);
            let offer =
                DeviceOffer { name: report.name.clone().into(), flags: flags.raw(), match_data: match_data.into() };
            devices.push(OfferedDevice { offer, flags, report });
        }
        Ok(SourceOffer { copier: MemoryCopier::Host, pages: self.pages()?, devices })
    }

    fn start_tracking(&self) -> Result<()> {
        // Full from the first moment: what is written before a tracker counts is sent in any case.
        self.memory.log().start();
        self.vmm.start_cpu_dirt()?;
        for (index, device) in self.devices.iter().enumerate() {
            let source = device.start_tracking().map_err(|error| device_error(index, &error))?;
            tracing::debug!(device = %device.identity().name, ?source, "tracking dirty pages");
        }
        Ok(())
    }

    fn stop_tracking(&self) {
        for device in &self.devices {
            device.stop_tracking();
        }
        self.vmm.stop_cpu_dirt();
        self.memory.log().stop();
    }

    fn sync_dirty(&self) -> Result<()> {
        let log = self.memory.log();
        if let Err(error) = self.vmm.sync_cpu_dirt(log) {
            tracing::warn!(%error, "what the guest wrote cannot be read: all of its memory is taken as dirty");
            log.mark_pages(0, log.pages())?;
        }
        for device in &self.devices {
            if let Err(error) = device.sync_dirty() {
                let name = &device.identity().name;
                tracing::warn!(device = %name, %error, "what the device wrote cannot be read: all memory is taken as dirty");
                log.mark_pages(0, log.pages())?;
            }
        }
        Ok(())
    }

    fn dirty_pages(&self) -> u64 {
        self.memory.log().count()
    }

    fn drain(&self) -> Result<Box<dyn DirtyDrain + '_>> {
        Ok(Box::new(LogDrain(self.memory.log().drain())))
    }

    fn read_pages(&self, first: u64, data: &mut [u8]) -> Result<()> {
        let offset = self.span(first, data.len() as u64)?;
        Ok(self.memory.own_ram()?.mapping().read(offset, data)?)
    }

    fn set_state(&self, device: usize, target: DeviceState, deadline_ms: u64) -> Result<()> {
        self.walk(device, target, deadline_ms)
    }

    fn restore(&self, device: usize, target: DeviceState, deadline_ms: u64) -> Result<()> {
        let Err(error) = self.walk(device, target, deadline_ms) else { return Ok(()) };
        // A reset makes the device answer again, but what the guest had set up in it is gone: it counts as lost.
        match self.reset(device) {
            Ok(()) => Err(error),
            Err(reset) => {
                tracing::warn!(device, ?reset, "a device that does not come back cannot be reset either");
                Err(error)
            }
        }
    }

    fn save(&self, device: usize, buffer: &mut [u8]) -> Result<Saved> {
        let saved = self.device(device)?.save(buffer).map_err(|error| device_error(device, &error))?;
        Ok(Saved { bytes: saved.bytes, end: saved.end })
    }

    fn remaining(&self, device: usize) -> Result<Remaining> {
        let left = self.device(device)?.remaining().map_err(|error| device_error(device, &error))?;
        Ok(Remaining {
            initial_bytes: left.initial_bytes,
            stop_copy_bytes: (left.stop_copy_bytes != u64::MAX).then_some(left.stop_copy_bytes),
        })
    }

    fn pause(&self, deadline_ms: u64) -> Result<()> {
        Ok(self.vmm.pause(Instant::now() + Duration::from_millis(deadline_ms))?)
    }

    fn resume(&self) -> Result<()> {
        Ok(self.vmm.resume()?)
    }
}

impl DestinationHost for MediatedHost {
    fn shape(&self) -> Result<DestinationShape> {
        let mut devices = Vec::new();
        for device in &self.devices {
            let flags = device.migratable().map_err(|error| HostError::Refused(error.to_string()))?;
            let state = device.state();
            if state != DeviceState::Running {
                // A device without a reset cannot shed what a failed migration left in it.
                let name = &device.identity().name;
                let reason =
                    format!("{name} is in {state} since an earlier migration failed: restart the destination's host");
                return Err(HostError::Refused(reason));
            }
            devices.push((flags, report_of(device)));
        }
        let fresh = self.fresh.load(Ordering::Acquire);
        Ok(DestinationShape { copier: MemoryCopier::Host, pages: self.pages()?, fresh, devices })
    }

    fn check_match(&self, device: usize, offer: &DeviceOffer<'_>) -> std::result::Result<(), String> {
        let ours = self.devices.get(device).ok_or("there is no such device here")?;
        ours.check_match(&offer.match_data).map_err(|refusal| refusal.reason)
    }

    fn set_state(&self, device: usize, target: DeviceState, deadline_ms: u64) -> Result<()> {
        self.walk(device, target, deadline_ms)
    }

    fn discard(&self, device: usize) -> Result<()> {
        self.reset(device)
    }

    fn load(&self, device: usize, data: &[u8]) -> Result<()> {
        self.device(device)?.load(data).map_err(|error| device_error(device, &error))
    }

    fn write_pages(&self, first: u64, data: &[u8]) -> Result<()> {
        let offset = self.span(first, data.len() as u64)?;
        self.fresh.store(false, Ordering::Release);
        let ram = self.memory.own_ram()?;
        if ram.is_populated() { Ok(ram.mapping().write(offset, data)?) } else { Ok(ram.write_fresh(offset, data)?) }
    }

    /// Only where every page is there: a read into one that is not would fault it in, and zero it first.
    fn place(&self, first: u64, count: u64) -> Result<Option<Place>> {
        let ram = self.memory.own_ram()?;
        if !ram.is_populated() {
            return Ok(None);
        }
        let bytes = count.checked_mul(PAGE_SIZE).ok_or_else(|| HostError::Memory(format!("{count} pages")))?;
        let offset = self.span(first, bytes)?;
        self.fresh.store(false, Ordering::Release);
        Ok(Some(Place { memory: Arc::clone(ram.mapping()), offset }))
    }

    fn zero_pages(&self, first: u64, count: u64) -> Result<()> {
        let bytes = count.checked_mul(PAGE_SIZE).ok_or_else(|| HostError::Memory(format!("{count} zero pages")))?;
        let offset = self.span(first, bytes)?;
        Ok(self.memory.own_ram()?.mapping().fill(offset, bytes, 0)?)
    }

    fn read_pages(&self, first: u64, data: &mut [u8]) -> Result<()> {
        SourceHost::read_pages(self, first, data)
    }

    fn resume(&self) -> Result<()> {
        self.fresh.store(false, Ordering::Release);
        Ok(self.vmm.resume()?)
    }
}

#[cfg(test)]
#[path = "mediated_tests.rs"]
mod tests;
