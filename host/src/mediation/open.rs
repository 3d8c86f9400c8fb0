//! Opening: everything is asked and checked before anything is published; a failing step undoes the ones before it.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use rustix::fs::SealFlags;
use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::DeviceState;

use super::calls::Shared;
use super::config::ConfigFilter;
use super::device::{Condition, Limits, MediatedDevice, StandIn};
use super::error::{MediationError, Result};
use super::gate::{Gate, Reason};
use super::lane::Lane;
use super::layout;
use super::maps::Maps;
use super::mediator::{Claim, HostCalls, Mediator, MmapAnswer, Origin};
use super::tables::Tables;
use crate::device::{Area, Backend, CONFIG_REGION, Device, ErrorKind, RegionInfo};
use crate::lock_order::Right;
use crate::memory::{AddressSpace, PAGE_SIZE};
use crate::plugin::{OpenError, ProbeIdentity, Registry};

/// Regions and irq indices of one device, own and added.
const INDICES_MAX: u32 = 1024;
const CONFIG_EXTENDED: u64 = 0x100;
const CONFIG_SIZE: u64 = 0x1000;

impl MediatedDevice {
    /// Mediates `device` by the first plug-in of the registry that claims it; where none does it passes through plainly.
    pub fn open(device: Arc<dyn Device>, registry: &Registry, memory: Arc<AddressSpace>) -> Result<Arc<Self>> {
        let asked = device.clone();
        Self::with_mediator(device, memory, Limits::default(), |calls| {
            let opened = registry.open(&probe_identity(&*asked), calls);
            let refused = |error: OpenError| MediationError::Open { message: error.to_string(), errno: error.errno() };
            Ok(opened.map_err(refused)?.map(|opened| Box::new(opened) as _))
        })
    }

    /// Mediates `device` by whatever `claim` opens for it: it is given the host's services and returns the opened device, or
    /// nothing for plain passthrough. On an error nothing of the device is changed, and what was opened is closed.
    pub fn with_mediator(
        device: Arc<dyn Device>,
        memory: Arc<AddressSpace>,
        limits: Limits,
        claim: impl FnOnce(Arc<dyn HostCalls>) -> Result<Option<Box<dyn Mediator>>>,
    ) -> Result<Arc<Self>> {
        let shared = Arc::new(survey(device, memory)?);
        let plugin = claim(shared.clone())?;
        let claims = plugin.as_ref().map_or(&[][..], |plugin| plugin.claims());
        let sizes: Vec<u64> = shared.regions.iter().map(|info| info.as_ref().map_or(0, |info| info.size)).collect();
        let tables = Tables::new(claims, &sizes)?;
        let mappable = mappable(&shared.regions, claims)?;
        let maps = Maps::new(&shared.regions, claims)?;
        if let Some(plugin) = &plugin {
            check_irqs(&**plugin, &shared)?;
        }
        let mut mediated = Self {
            summary: plugin.as_ref().map(|plugin| plugin.plugin()),
            plugin,
            device: Arc::clone(&shared.device),
            shared,
            limits,
            tables,
            mappable,
            stand_ins: Vec::new(),
            maps,
            ioeventfds: Arc::default(),
            condition: Mutex::new(Condition {
                state: DeviceState::Running,
                command: 0,
                low_power: false,
                entered: None,
                has_memory_enable: false,
            }),
            streams: Mutex::default(),
            tracking: Mutex::default(),
            lane: Lane::new(Right::Lane),
            walking: AtomicBool::new(false),
            events: Lane::new(Right::Events),
        };
        mediated.stand_ins = mediated.ask_stand_ins()?;
        let mediated = Arc::new(mediated);
        mediated.publish()?;
        Ok(mediated)
    }

    /// The last step: from here on accesses come in.
    fn publish(self: &Arc<Self>) -> Result<()> {
        let shared = &self.shared;
        let interposed: Vec<_> = self.plugin.as_ref().map_or(Vec::new(), |plugin| {
            let claims = plugin.irq_claims().iter().filter(|claim| claim.has_fired);
            claims.map(|claim| (claim.index, claim.start, claim.count)).collect()
        });
        if !interposed.is_empty() {
            let owner = Arc::downgrade(self);
            let fired = move |vector| {
                if let Some(owner) = owner.upgrade() {
                    owner.irq_fired(vector);
                }
            };
            shared.irqs.start(fired).map_err(|errno| MediationError::refused("starting the irq thread", errno))?;
        }
        let _first = shared.interposed.set(interposed);
        shared.watch.arm(self.device(), &shared.irq_infos)?;
        let owner = Arc::downgrade(self);
        shared.watch.start(move |index| {
            if let Some(owner) = owner.upgrade() {
                owner.line_fired(index);
            }
        })?;
        self.alone(Reason::NotBound, self.drain_deadline(), || self.look_at_command())?;
        let _first = shared.owner.set(Arc::downgrade(self));
        self.attend();
        Ok(())
    }

    /// What the mmap hooks give in place of claimed pages. Asked once: the answer holds for the device's life.
    fn ask_stand_ins(&self) -> Result<Vec<StandIn>> {
        let Some(plugin) = &self.plugin else { return Ok(Vec::new()) };
        let mut stand_ins = Vec::new();
        for (position, claim) in plugin.claims().iter().enumerate().filter(|(_, claim)| claim.has_mmap) {
            let start = claim.offset.next_multiple_of(PAGE_SIZE);
            let end = (claim.offset + claim.length) & !(PAGE_SIZE - 1);
            // In one map only, or sharing its pages with another claim: the page could not be taken back when that holds.
            let others = plugin.claims().iter().enumerate().filter(|(other, _)| *other != position);
            let shared = others.into_iter().any(|(_, other)| {
                other.region == claim.region && other.offset < end && start < other.offset + other.length
            });
            if start >= end || shared || !(claim.normal && claim.tracking) {
                continue;
            }
            let answer = plugin.mmap(position, self.frame(Origin::Host), start, end - start);
            let area = Area { offset: start, length: end - start };
            stand_ins.extend(stand_in(claim.region, area, answer)?);
        }
        for (position, extra) in plugin.extra_regions().iter().enumerate().filter(|(_, extra)| extra.has_mmap) {
            let (region, length) = (self.own_regions() + position as u32, extra.size & !(PAGE_SIZE - 1));
            if length > 0 {
                let answer = plugin.extra_mmap(position, region, self.frame(Origin::Host), 0, length);
                stand_ins.extend(stand_in(region, Area { offset: 0, length }, answer)?);
            }
        }
        Ok(stand_ins)
    }
}

/// A file that a plug-in offers in place of `area`. It must be a whole file of that size which cannot shrink: a client that
/// touched a page beyond its end would die of SIGBUS.
fn stand_in(region: u32, area: Area, answer: MmapAnswer) -> Result<Option<StandIn>> {
    let MmapAnswer::Instead { fd, offset: fd_offset } = answer else { return Ok(None) };
    let fault = |what: String| Err(MediationError::PluginFault { what: format!("region {region}: {what}") });
    if !fd_offset.is_multiple_of(PAGE_SIZE) {
        return fault(format!("a file offset of {fd_offset:#x} to map"));
    }
    let seals = rustix::fs::fcntl_get_seals(&fd).unwrap_or_else(|_| SealFlags::empty());
    if !seals.contains(SealFlags::SHRINK) {
        return fault("the file to map is not sealed against shrinking (F_SEAL_SHRINK)".to_owned());
    }
    let size = rustix::fs::fstat(&fd).map_or(0, |stat| stat.st_size.cast_unsigned());
    if fd_offset.checked_add(area.length).is_none_or(|end| end > size) {
        return fault(format!("a file of {size:#x} bytes cannot stand in for {:#x} from {fd_offset:#x}", area.length));
    }
    Ok(Some(StandIn { region, area, fd, fd_offset }))
}

fn probe_identity(device: &dyn Device) -> ProbeIdentity<'_> {
    let (identity, info) = (device.identity(), device.info());
    ProbeIdentity {
        name: &identity.name,
        backend: match identity.backend {
            Backend::VfioGroup => abi::BACKEND_VFIO_GROUP,
            Backend::VfioCdev => abi::BACKEND_VFIO_CDEV,
            Backend::Sim => abi::BACKEND_SIM,
        },
        vendor_id: identity.vendor_id,
        device_id: identity.device_id,
        subsystem_vendor_id: identity.subsystem_vendor_id,
        subsystem_device_id: identity.subsystem_device_id,
        class_code: identity.class_code,
        revision: identity.revision,
        num_regions: info.num_regions,
        num_irqs: info.num_irqs,
        config: &identity.config,
    }
}

/// Asks the device for everything that is constant.
fn survey(device: Arc<dyn Device>, memory: Arc<AddressSpace>) -> Result<Shared> {
    let info = device.info();
    if info.num_regions > INDICES_MAX || info.num_irqs > INDICES_MAX {
        let what = format!("a device of {} regions and {} irq indices", info.num_regions, info.num_irqs);
        return Err(MediationError::refused(what, Errno::TOOBIG));
    }
    let mut regions = Vec::new();
    for index in 0..info.num_regions {
        regions.push(present(device.region_info(index))?);
    }
    let mut irqs = Vec::new();
    for index in 0..info.num_irqs {
        irqs.push(present(device.irq_info(index))?);
    }
    let extended = extended_config(&*device, &regions);
    let filter = ConfigFilter::new(device.identity(), &extended);
    Ok(Shared::new(device, memory, Gate::new(Reason::NotBound), filter, regions, irqs))
}

/// An index that the device refuses is one that it lacks (VGA).
fn present<T>(answer: crate::device::Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.kind == ErrorKind::Refused => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn extended_config(device: &dyn Device, regions: &[Option<RegionInfo>]) -> Vec<u8> {
    let size = regions.get(CONFIG_REGION as usize).and_then(Option::as_ref).map_or(0, |info| info.size);
    if size < CONFIG_SIZE {
        return Vec::new();
    }
    let mut extended = vec![0; (CONFIG_SIZE - CONFIG_EXTENDED) as usize];
    match device.region_read(CONFIG_REGION, CONFIG_EXTENDED, &mut extended) {
        Ok(()) => extended,
        // A function without extended space in a region that has room for it: there is nothing to protect.
        Err(_) => Vec::new(),
    }
}

/// Per region, what a client may map: the device's areas minus every claim of either map.
pub(super) fn mappable(regions: &[Option<RegionInfo>], claims: &[Claim]) -> Result<Vec<Vec<Area>>> {
    let mut all = Vec::new();
    for (index, info) in regions.iter().enumerate() {
        let Some(info) = info else {
            all.push(Vec::new());
            continue;
        };
        let areas =
            layout::device_areas(info).map_err(|error| MediationError::refused(error.to_string(), Errno::INVAL))?;
        let claimed = claims.iter().filter(|claim| claim.region as usize == index);
        let claimed: Vec<Area> = claimed.map(|claim| Area { offset: claim.offset, length: claim.length }).collect();
        all.push(layout::subtract(&areas, &claimed));
    }
    Ok(all)
}

fn check_irqs(plugin: &dyn Mediator, shared: &Shared) -> Result<()> {
    let added = plugin.extra_regions().len().max(plugin.extra_irqs().len());
    if added > INDICES_MAX as usize {
        return Err(MediationError::PluginFault { what: format!("{added} added indices") });
    }
    for claim in plugin.irq_claims() {
        let own = shared.irq_infos.get(claim.index as usize).and_then(Option::as_ref).map_or(0, |info| info.count);
        let end = claim.start.checked_add(claim.count);
        if claim.count == 0 || end.is_none_or(|end| end > own) {
            let (index, start, count) = (claim.index, claim.start, claim.count);
            let what = format!("a claim of {count} vectors from {start} of irq index {index}, which has {own}");
            return Err(MediationError::PluginFault { what });
        }
    }
    Ok(())
}
