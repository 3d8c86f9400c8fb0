//! Real devices: the kernel's VFIO, opened by group or by character device.
//!
//! **Owns** the device's file descriptor and its place in an I/O address space ([`Iommu`]). One [`VfioDevice`] behind both
//! openers: they differ in how the fd is come by and in who maps DMA, in nothing else.
//! **Must never** hand the device's fd out: its holder can do everything to the device, `mmap` and SET_IRQS included.
//! Locks: none here; those of `iommu` and `migration` are described there.

mod caps;
mod iommu;
mod kernel;
mod migration;
mod open;
pub mod sysfs;
mod token;

use std::fmt::Display;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::{self, Errno};
use vfio_bindings::bindings::vfio::*;
use vfio_mediate_sdk::state::DeviceState;

pub use caps::ChainError;
pub use iommu::Iommu;
pub use open::Options;
use sysfs::Sysfs;
pub use token::{BadToken, VfToken};

use super::{
    Backend, CONFIG_REGION, Clock, Device, DeviceError, DeviceInfo, DmaMap, ErrorKind, Feature, FeatureAccess,
    Identity, IovaRange, IrqAction, IrqData, IrqInfo, IrqSet, NativeDmaLogging, NativeMigration, Power, RealClock,
    RegionCapability, RegionInfo, Result,
};
use crate::sys::{IoMap, Mapping, vfio};

/// The most regions and irq indices that are taken from a driver; vfio-pci has 9 and 5, variants a few more.
const INDICES_MAX: u32 = 256;

/// A device of the kernel's VFIO.
#[derive(Debug)]
pub struct VfioDevice {
    identity: Identity,
    info: DeviceInfo,
    /// Constant for the device's life; an index without a region keeps its errno (VGA of a device that has none)
    regions: Vec<std::result::Result<Region, Errno>>,
    migration: Option<migration::Migration>,
    dma_logging: Option<migration::DmaLogging>,
    // Dropped in this order: the fd is closed (by cdev, with KVM's reference if there is one), then the maps leave, then the group.
    fd: Arc<OwnedFd>,
    membership: iommu::Membership,
}

#[derive(Debug)]
struct Region {
    info: RegionInfo,
    /// Where it begins in the device's fd
    offset: u64,
}

/// An error of the kernel, by what its errno lets the caller do.
fn error(device: &str, what: impl Into<String>, errno: Errno) -> DeviceError {
    let kind = match errno {
        Errno::NODEV | Errno::NXIO => ErrorKind::Lost,
        Errno::IO | Errno::FAULT | Errno::INTR | Errno::TIMEDOUT | Errno::PROTO | Errno::MSGSIZE => ErrorKind::Failed,
        _ => ErrorKind::Refused,
    };
    DeviceError { kind, device: device.to_owned(), what: what.into(), errno }
}

impl VfioDevice {
    /// Opens through the device's IOMMU group and a container.
    pub fn open_group(name: &str, options: &Options) -> Result<Self> {
        let (fd, membership) = open::by_group(name, options)?;
        Self::new(name, Backend::VfioGroup, membership, fd)
    }

    /// Opens through the device's own node and an iommufd.
    pub fn open_cdev(name: &str, options: &Options) -> Result<Self> {
        let (fd, membership) = open::by_cdev(name, options)?;
        Self::new(name, Backend::VfioCdev, membership, fd)
    }

    /// On an error the fd goes first, as when the device is dropped: the last parameter is.
    fn new(name: &str, backend: Backend, membership: iommu::Membership, fd: Arc<OwnedFd>) -> Result<Self> {
        let fail = |what: &str, errno| error(name, format!("open: {what}"), errno);
        let raw = vfio::device_info(fd.as_fd()).map_err(|errno| fail("asking for its information", errno))?;
        let info = DeviceInfo { flags: raw.flags, num_regions: raw.num_regions, num_irqs: raw.num_irqs };
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(fail("it is no PCI device", Errno::NODEV));
        }
        if info.num_regions > INDICES_MAX || info.num_irqs > INDICES_MAX {
            return Err(fail("it has more regions or irqs than this version takes", Errno::TOOBIG));
        }
        let regions: Vec<_> =
            (0..info.num_regions).map(|index| region(name, fd.as_fd(), index)).collect::<Result<_>>()?;
        let mut device = Self {
            identity: Identity {
                name: name.to_owned(),
                backend,
                vendor_id: 0,
                device_id: 0,
                subsystem_vendor_id: 0,
                subsystem_device_id: 0,
                class_code: 0,
                revision: 0,
                virtual_function: Sysfs::default().is_virtual_function(name).map_err(|error| {
                    let errno = error.raw_os_error().map_or(Errno::NODEV, Errno::from_raw_os_error);
                    fail("asking sysfs whether it is a VF", errno)
                })?,
                config: Vec::new(),
            },
            info,
            regions,
            migration: migration::Migration::of(name, &fd),
            dma_logging: migration::DmaLogging::of(name, &fd),
            fd,
            membership,
        };
        device.begin_running()?;
        device.read_identity()?;
        Ok(device)
    }

    /// A driver may keep the migration state that the device's last user left, without the stream that belonged to it.
    fn begin_running(&self) -> Result<()> {
        let Some(migration) = &self.migration else { return Ok(()) };
        let state = migration.state()?;
        if state == DeviceState::Running {
            return Ok(());
        }
        tracing::warn!(device = self.identity.name, %state, "its last user left it in this migration state: resetting it");
        self.reset()?;
        match migration.state()? {
            DeviceState::Running => Ok(()),
            state => {
                Err(self
                    .error(format!("open: its last user left it in {state}, and a reset does not help"), Errno::BUSY))
            }
        }
    }

    /// Fills in who the device says it is.
    fn read_identity(&mut self) -> Result<()> {
        let size = self.region(CONFIG_REGION)?.info.size.min(256);
        let mut config = vec![0; size as usize];
        if config.len() < 64 {
            return Err(self.error("open: its configuration space is shorter than a header", Errno::PROTO));
        }
        self.region_read(CONFIG_REGION, 0, &mut config)?;
        let word = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
        let class_code = u32::from_le_bytes([config[9], config[10], config[11], 0]);
        self.identity = Identity {
            vendor_id: word(0),
            device_id: word(2),
            subsystem_vendor_id: word(0x2c),
            subsystem_device_id: word(0x2e),
            class_code,
            revision: config[8],
            config,
            ..self.identity.clone()
        };
        Ok(())
    }

    /// The address space, for the VM's next device.
    pub fn iommu(&self) -> &Arc<Iommu> {
        self.membership.iommu()
    }

    /// Whether the IOMMU in front of the device tracks dirty pages (an iommufd page table with DIRTY_TRACKING).
    pub fn iommu_tracks_dirt(&self) -> Result<bool> {
        self.membership.iommu_tracks_dirt().map_err(|errno| self.error("asking the IOMMU for dirty tracking", errno))
    }

    /// As a PF's owner: the token that openers of its VFs must present. ENOTTY for a device that has no VFs.
    pub fn set_vf_token(&self, token: VfToken) -> Result<()> {
        vfio::set_vf_token(self.fd.as_fd(), *token.as_bytes())
            .map_err(|errno| self.error("setting the VF token", errno))
    }

    fn error(&self, what: impl Into<String>, errno: Errno) -> DeviceError {
        error(&self.identity.name, what, errno)
    }

    fn region(&self, index: u32) -> Result<&Region> {
        match self.regions.get(index as usize) {
            Some(Ok(region)) => Ok(region),
            Some(Err(errno)) => Err(self.error(format!("region {index}"), *errno)),
            None => Err(self.error(format!("region {index} of {}", self.regions.len()), Errno::INVAL)),
        }
    }

    /// Where an access begins in the fd, if it lies inside the region and the region allows it.
    fn access(&self, index: u32, offset: u64, length: usize, flag: u32, what: impl Display) -> Result<u64> {
        let region = self.region(index)?;
        let refuse = |why: &str| {
            let text = format!("{what} {length} bytes at {offset:#x} of region {index}: {why}");
            Err(self.error(text, Errno::INVAL))
        };
        if region.info.flags & flag == 0 {
            return refuse("the region does not allow it");
        }
        match offset.checked_add(length as u64) {
            Some(end) if end <= region.info.size => Ok(region.offset + offset),
            _ => refuse(&format!("the region has {:#x}", region.info.size)),
        }
    }
}

/// Asks for one region. A driver that has no such region (EINVAL) is an answer, anything else an error.
fn region(device: &str, fd: BorrowedFd<'_>, index: u32) -> Result<std::result::Result<Region, Errno>> {
    let (raw, answer) = match vfio::region_info(fd, index) {
        Ok(found) => found,
        Err(Errno::INVAL) => return Ok(Err(Errno::INVAL)),
        Err(errno) => return Err(error(device, format!("open: information on region {index}"), errno)),
    };
    let first = if raw.flags & VFIO_REGION_INFO_FLAG_CAPS == 0 { 0 } else { raw.cap_offset };
    let capabilities = caps::region_capabilities(&answer, size_of::<vfio_region_info>(), first, raw.size)
        .map_err(|chain| error(device, format!("open: information on region {index}: {chain}"), Errno::PROTO))?;
    // pread and pwrite take a signed offset; a region beyond it could be reached by nobody.
    if raw.offset.checked_add(raw.size).is_none_or(|end| end > i64::MAX as u64) {
        return Err(error(device, format!("open: region {index} ends beyond the largest file offset"), Errno::PROTO));
    }
    let flags = raw.flags & !VFIO_REGION_INFO_FLAG_CAPS;
    Ok(Ok(Region { info: RegionInfo { index, flags, size: raw.size, capabilities }, offset: raw.offset }))
}

impl Device for VfioDevice {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo> {
        self.region(index).map(|region| region.info.clone())
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let raw = vfio::irq_info(self.fd.as_fd(), index)
            .map_err(|errno| self.error(format!("information on irq {index}"), errno))?;
        Ok(IrqInfo { index, flags: raw.flags, count: raw.count })
    }

    /// One `pread` for the whole access, so that a register access keeps its width; more only when the kernel stops in the
    /// middle.
    fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let mut at = self.access(index, offset, data.len(), VFIO_REGION_INFO_FLAG_READ, "reading")?;
        let fail =
            |at: u64, errno| self.error(format!("reading region {index} at {:#x}", offset_in(at, index, self)), errno);
        let mut rest = data;
        while !rest.is_empty() {
            match io::retry_on_intr(|| io::pread(&*self.fd, &mut *rest, at)) {
                Ok(0) => return Err(fail(at, Errno::IO)),
                Ok(read) => {
                    at += read as u64;
                    rest = &mut rest[read..];
                }
                Err(errno) => return Err(fail(at, errno)),
            }
        }
        Ok(())
    }

    fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        let mut at = self.access(index, offset, data.len(), VFIO_REGION_INFO_FLAG_WRITE, "writing")?;
        let fail =
            |at: u64, errno| self.error(format!("writing region {index} at {:#x}", offset_in(at, index, self)), errno);
        let mut rest = data;
        while !rest.is_empty() {
            match io::retry_on_intr(|| io::pwrite(&*self.fd, rest, at)) {
                Ok(0) => return Err(fail(at, Errno::IO)),
                Ok(written) => {
                    at += written as u64;
                    rest = &rest[written..];
                }
                Err(errno) => return Err(fail(at, errno)),
            }
        }
        Ok(())
    }

    /// The device's own: for whoever is trusted like this process.
    fn region_file(&self, index: u32) -> Option<(BorrowedFd<'_>, u64)> {
        let region = self.region(index).ok()?;
        let mappable = region.info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        mappable.then(|| (self.fd.as_fd(), region.offset))
    }

    /// A mapping keeps the device open in the kernel after this object is gone: drop it first, or the device and its group
    /// stay busy.
    fn region_map(&self, index: u32, offset: u64, length: u64) -> Result<Arc<Mapping>> {
        let region = self.region(index)?;
        let what = || format!("mapping {length:#x} bytes at {offset:#x} of region {index}");
        let Some(end) = offset.checked_add(length).filter(|end| length > 0 && *end <= region.info.size) else {
            return Err(self.error(what(), Errno::INVAL));
        };
        let mappable = region.info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        let inside = region.info.capabilities.iter().all(|capability| match capability {
            RegionCapability::SparseMmap(areas) => {
                areas.iter().any(|area| offset >= area.offset && end <= area.offset + area.length)
            }
            _ => true,
        });
        if !mappable || !inside {
            return Err(DeviceError::refused(&self.identity.name, what(), Errno::NODEV));
        }
        let mapping = Mapping::new(&*self.fd, region.offset + offset, length);
        mapping.map(Arc::new).map_err(|error| {
            let errno = match &error {
                crate::sys::MappingError::Map { source, .. } => source.raw_os_error(),
                _ => None,
            };
            self.error(what(), errno.map_or(Errno::INVAL, Errno::from_raw_os_error))
        })
    }

    fn set_irqs(&self, request: &IrqSet<'_>) -> Result<()> {
        let what = || {
            let IrqSet { index, start, count, action, .. } = request;
            format!("{action:?} of irq {index}, vectors {start}+{count}")
        };
        let available = self.irq_info(request.index)?.count;
        let fits = request.start.checked_add(request.count).is_some_and(|end| end <= available);
        let Some((flags, data)) = irq_data(request).filter(|_| fits) else {
            return Err(self.error(what(), Errno::INVAL));
        };
        let action = match request.action {
            IrqAction::Mask => VFIO_IRQ_SET_ACTION_MASK,
            IrqAction::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            IrqAction::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        };
        vfio::set_irqs(self.fd.as_fd(), flags | action, request.index, request.start, request.count, &data)
            .map_err(|errno| self.error(what(), errno))
    }

    /// Asked of the driver even without `VFIO_DEVICE_FLAGS_RESET`: mdev drivers reset and do not say so. vfio-pci answers
    /// EINVAL for a function without a reset; that is ENOTTY here, whatever the driver.
    fn reset(&self) -> Result<()> {
        let declared = self.info.flags & VFIO_DEVICE_FLAGS_RESET != 0;
        match vfio::reset(self.fd.as_fd()) {
            Err(Errno::INVAL | Errno::NOTTY) if !declared => {
                Err(self.error("reset: the device has none of any kind", Errno::NOTTY))
            }
            Err(errno) => Err(self.error("reset", errno)),
            Ok(()) => {
                if let Some(migration) = &self.migration {
                    migration.was_reset();
                }
                Ok(())
            }
        }
    }

    fn dma_map(&self, map: &DmaMap) -> Result<()> {
        let DmaMap { iova, length, offset, read, write, .. } = *map;
        let Some(memory) = map.memory.mapping().cloned() else {
            let what = format!("DMA map of {length:#x} bytes at {iova:#x} that only messages reach");
            return Err(DeviceError::refused(&self.identity.name, what, Errno::OPNOTSUPP));
        };
        self.membership
            .map(&IoMap { iova, length, memory, offset, read, write })
            .map_err(|errno| self.error(dma_text("DMA map", iova, length, errno), errno))
    }

    /// With a shared [`Iommu`], this device's share of the map: the kernel unmaps when the last device has left it.
    fn dma_unmap(&self, iova: u64, length: u64) -> Result<()> {
        self.membership
            .unmap(iova, length)
            .map_err(|errno| self.error(dma_text("DMA unmap", iova, length, errno), errno))
    }

    /// Nothing where the kernel does not say: then nothing may be mapped.
    fn iova_ranges(&self) -> Vec<IovaRange> {
        self.membership.iova_ranges().unwrap_or_else(|errno| {
            tracing::error!(device = self.identity.name, %errno, "the kernel names no IOVA ranges");
            Vec::new()
        })
    }

    fn probe_feature(&self, feature: Feature, access: FeatureAccess) -> bool {
        let access = match access {
            FeatureAccess::Get => VFIO_DEVICE_FEATURE_GET,
            FeatureAccess::Set => VFIO_DEVICE_FEATURE_SET,
        };
        vfio::feature_probe(self.fd.as_fd(), feature as u32, access).is_ok()
    }

    fn migration(&self) -> Option<&dyn NativeMigration> {
        self.migration.as_ref().map(|migration| migration as &dyn NativeMigration)
    }

    fn dma_logging(&self) -> Option<&dyn NativeDmaLogging> {
        self.dma_logging.as_ref().map(|logging| logging as &dyn NativeDmaLogging)
    }

    /// The kernel lets a PF with enabled VFs enter, and never suspends it: nobody would learn why.
    fn low_power_entry(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        let name = &self.identity.name;
        if let Some(vfs @ 1..) = Sysfs::default().enabled_vfs(name).ok().flatten() {
            return Err(self.error(format!("low power: {vfs} of its VFs are enabled"), Errno::BUSY));
        }
        vfio::low_power_entry(self.fd.as_fd(), wakeup).map_err(|errno| {
            let what = match errno {
                Errno::INVAL => "low power: it was entered already",
                Errno::NOTTY => "low power: its driver or this kernel has none",
                _ => "entering low power",
            };
            self.error(what, errno)
        })
    }

    fn low_power_exit(&self) -> Result<()> {
        vfio::low_power_exit(self.fd.as_fd()).map_err(|errno| self.error("leaving low power", errno))
    }

    fn power(&self) -> Result<Power> {
        let power = Sysfs::default().power(&self.identity.name);
        power.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::NOTTY);
            DeviceError::refused(&self.identity.name, format!("its power state: {error}"), errno)
        })
    }

    fn clock(&self) -> &dyn Clock {
        &RealClock
    }
}

/// The offset inside region `index` of a position in the fd.
fn offset_in(at: u64, index: u32, device: &VfioDevice) -> u64 {
    device.region(index).map_or(at, |region| at - region.offset)
}

fn dma_text(what: &str, iova: u64, length: u64, errno: Errno) -> String {
    let why = match errno {
        Errno::NOMEM => " (RLIMIT_MEMLOCK, or out of memory)",
        Errno::EXIST => " (overlaps a map)",
        Errno::NOSPC => " (too many maps)",
        _ => "",
    };
    format!("{what} of {length:#x} bytes at {iova:#x}{why}")
}

/// `VFIO_IRQ_SET_DATA_*` and the bytes behind the header. `None` when the data's length is not `count`.
fn irq_data(request: &IrqSet<'_>) -> Option<(u32, Vec<u8>)> {
    let count = request.count as usize;
    match request.data {
        IrqData::None => Some((VFIO_IRQ_SET_DATA_NONE, Vec::new())),
        IrqData::Bool(values) => (values.len() == count)
            .then(|| (VFIO_IRQ_SET_DATA_BOOL, values.iter().map(|value| u8::from(*value)).collect())),
        IrqData::EventFd(fds) => {
            let raw = |fd: &Option<BorrowedFd<'_>>| fd.map_or(-1, |fd| fd.as_raw_fd()).to_ne_bytes();
            (fds.len() == count).then(|| (VFIO_IRQ_SET_DATA_EVENTFD, fds.iter().flat_map(raw).collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn irq_data_is_as_long_as_its_count_says() {
        let event = crate::sys::EventFd::new().unwrap();
        let fds = [Some(event.as_fd()), None];
        let set = |count, data| IrqSet { index: 0, start: 0, count, action: IrqAction::Trigger, data };
        let (flags, bytes) = irq_data(&set(2, IrqData::EventFd(&fds))).unwrap();
        assert_eq!(flags, VFIO_IRQ_SET_DATA_EVENTFD);
        assert_eq!(bytes, [event.as_fd().as_raw_fd().to_ne_bytes(), (-1i32).to_ne_bytes()].concat());
        for count in [1, 3] {
            assert!(irq_data(&set(count, IrqData::EventFd(&fds))).is_none());
            assert!(irq_data(&set(count, IrqData::Bool(&[true, false]))).is_none());
        }
        assert_eq!(irq_data(&set(2, IrqData::Bool(&[true, false]))).unwrap().1, [1, 0]);
        assert!(irq_data(&set(9, IrqData::None)).unwrap().1.is_empty());
    }

    #[test]
    fn an_errno_says_what_the_caller_can_do() {
        let kind = |errno| error("x", "y", errno).kind;
        assert_eq!(kind(Errno::INVAL), ErrorKind::Refused);
        assert_eq!(kind(Errno::NOTTY), ErrorKind::Refused);
        assert_eq!(kind(Errno::IO), ErrorKind::Failed);
        assert_eq!(kind(Errno::NODEV), ErrorKind::Lost);
    }

    #[test]
    fn a_device_that_is_not_there_is_refused_with_its_name() {
        for result in [
            VfioDevice::open_group("ffff:ff:1f.7", &Options::default()),
            VfioDevice::open_cdev("ffff:ff:1f.7", &Options::default()),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Refused);
            assert!(error.to_string().starts_with("device ffff:ff:1f.7: open: no such PCI or mdev device"), "{error}");
        }
    }
}
