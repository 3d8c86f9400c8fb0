//! The machine that a host runs: devices, memory and plug-ins, put together from a configuration.
//!
//! **Owns** the order in which things are opened, and that everything opened is closed when a later step fails. **Must
//! never** leave a device half open: what this returns is whole.

use std::sync::Arc;
use std::time::Instant;

use crate::control::config::{Config, DeviceConfig, DeviceName, OpenBy};
use crate::device::vfio::sysfs::Sysfs;
use crate::device::vfio::{Iommu, Options, VfioDevice};
use crate::device::{Backend, Device, DeviceError, IovaRange, sim};
use crate::kvm;
use crate::mediation::{MediatedDevice, MediationError};
use crate::memory::{AddressSpace, GuestRam, IovaMapping, MemoryError, PAGE_SIZE};
use crate::plugin::{Library, Limits, LoadError, RegisterError, Registry, UnregisterError};

/// A machine that could not be put together, shaped by what the operator mends.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Register(#[from] RegisterError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Sim(#[from] sim::SpecError),
    #[error("device {device}: {source}")]
    Mediation { device: String, source: MediationError },
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// The IOMMU of this device cannot reach a part of guest memory.
    #[error("device {device}: its IOMMU reaches no guest memory at all")]
    Unreachable { device: String },
}

/// Most bytes of memory that the clients of served devices may bring at a time: those of a VM, with what it maps twice. The dirty log
/// of it takes address space, and memory once a page is dirty.
const CLIENT_MEMORY_MAX: u64 = 1 << 39;

/// Devices, memory and plug-ins of one VM.
#[derive(Debug)]
pub struct Machine {
    pub devices: Vec<Arc<MediatedDevice>>,
    pub memory: Arc<AddressSpace>,
    pub registry: Arc<Registry>,
}

impl Machine {
    /// `kvm`: the VM that is to know the devices' files.
    pub fn build(config: &Config, kvm: Option<kvm::Handle>) -> Result<Self, MachineError> {
        let registry = Registry::new();
        for plugin in &config.plugins {
            let library = Library::open(&plugin.path)?;
            if library.panic_aborts() {
                tracing::warn!(plugin = library.name(), "was built with panic=abort: a panic in it ends this host");
            }
            registry.register(library, Limits { devices_max: plugin.devices_max })?;
        }
        let memory = match config.memory {
            Some(memory) => AddressSpace::new(GuestRam::new(memory.bytes())?),
            // Clients of served devices bring it.
            None => AddressSpace::of_clients(CLIENT_MEMORY_MAX),
        };
        // Dropped on an error, it lets go of what is open by then.
        let mut machine = Self { devices: Vec::with_capacity(config.devices.len()), memory, registry };
        let mut opener = Opener { kvm, ..Opener::default() };
        for wanted in &config.devices {
            let device = opener.open(wanted)?;
            machine.add(device)?;
        }
        Ok(machine)
    }

    /// The device may reach all of the host's own memory. What clients bring they map themselves.
    fn add(&mut self, device: Arc<dyn Device>) -> Result<(), MachineError> {
        let name = device.identity().name.clone();
        let ranges = device.iova_ranges();
        let failed = |source| MachineError::Mediation { device: name.clone(), source };
        let mediated = MediatedDevice::open(device, &self.registry, Arc::clone(&self.memory)).map_err(failed)?;
        let Some(ram) = self.memory.ram() else {
            self.devices.push(mediated);
            return Ok(());
        };
        let maps = reachable(ram.size(), &ranges);
        if maps.is_empty() {
            return Err(MachineError::Unreachable { device: name });
        }
        for map in maps {
            mediated.dma_map(map).map_err(failed)?;
        }
        self.devices.push(mediated);
        Ok(())
    }

    /// Closes the devices, then retires the plug-ins.
    pub fn close(mut self, deadline: Instant) -> Result<(), UnregisterError> {
        self.devices.clear();
        self.registry.shutdown(deadline)
    }
}

/// A machine that is not closed, because something after it failed, retires its plug-ins as soon as its devices are let go.
impl Drop for Machine {
    fn drop(&mut self) {
        self.devices.clear();
        if let Err(busy) = self.registry.shutdown(Instant::now()) {
            tracing::info!(%busy, "a plug-in retires when its devices are let go");
        }
    }
}

/// Opens one device by itself.
pub fn open(wanted: &DeviceConfig) -> Result<Arc<dyn Device>, MachineError> {
    Opener::default().open(wanted)
}

/// Opens devices; those of one kind share one address space of the IOMMU, as one VM's devices must.
#[derive(Debug, Default)]
struct Opener {
    container: Option<Arc<Iommu>>,
    iommufd: Option<Arc<Iommu>>,
    kvm: Option<kvm::Handle>,
}

impl Opener {
    fn open(&mut self, wanted: &DeviceConfig) -> Result<Arc<dyn Device>, MachineError> {
        let name = match &wanted.name {
            DeviceName::Sim(spec) => return Ok(sim::open(spec)?),
            DeviceName::Vfio(name) => name,
        };
        let backend = match wanted.open {
            OpenBy::Group => Backend::VfioGroup,
            OpenBy::Cdev => Backend::VfioCdev,
            OpenBy::Auto if has_cdev(name) => Backend::VfioCdev,
            OpenBy::Auto => Backend::VfioGroup,
        };
        let shared = match backend {
            Backend::VfioCdev => &mut self.iommufd,
            Backend::VfioGroup | Backend::Sim => &mut self.container,
        };
        let options = Options { iommu: shared.clone(), vf_token: wanted.vf_token, kvm: self.kvm.clone() };
        let device = match backend {
            Backend::VfioCdev => VfioDevice::open_cdev(name, &options)?,
            Backend::VfioGroup | Backend::Sim => VfioDevice::open_group(name, &options)?,
        };
        *shared = Some(Arc::clone(device.iommu()));
        Ok(Arc::new(device))
    }
}

/// Whether this kernel gives the device a character device of its own. A folder that cannot be read is told when the group
/// is opened.
fn has_cdev(name: &str) -> bool {
    Sysfs::default().cdev_node(name).is_ok_and(|node| node.is_some())
}

/// Guest memory at its own addresses, as far as the IOMMU lets the device reach it: an x86 machine keeps a window for
/// interrupts, which no guest's memory can be mapped to.
fn reachable(size: u64, ranges: &[IovaRange]) -> Vec<IovaMapping> {
    ranges
        .iter()
        .filter_map(|range| {
            let first = range.iova.checked_next_multiple_of(PAGE_SIZE)?;
            let end = match range.last.checked_add(1) {
                Some(end) => end / PAGE_SIZE * PAGE_SIZE,
                None => u64::MAX / PAGE_SIZE * PAGE_SIZE,
            };
            let end = end.min(size);
            (first < end).then(|| IovaMapping {
                iova: first,
                length: end - first,
                ram_offset: first,
                read: true,
                write: true,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: CONTROL-46
    #[test]
    fn guest_memory_is_mapped_around_what_the_iommu_keeps() {
        let msi = [IovaRange { iova: 0, last: 0xfedf_ffff }, IovaRange { iova: 0xfef0_0000, last: u64::MAX }];
        let shapes = |size| reachable(size, &msi).iter().map(|m| (m.iova, m.length)).collect::<Vec<_>>();
        assert_eq!(shapes(0xfee0_0000 - 4096), [(0, 0xfee0_0000 - 4096)]);
        assert_eq!(shapes(0xfee0_0000), [(0, 0xfee0_0000)]);
        assert_eq!(shapes(0xfee0_0000 + 4096), [(0, 0xfee0_0000)]);
        assert_eq!(shapes(0xfef0_0000 + 4096), [(0, 0xfee0_0000), (0xfef0_0000, 4096)]);
        assert!(reachable(4096, &[IovaRange { iova: 1, last: 4095 }]).is_empty());
    }
}
