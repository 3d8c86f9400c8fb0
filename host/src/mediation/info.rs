//! What a client is told of regions and irqs, mappings, and SET_IRQS.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;
use vfio_mediate_sdk::abi;

use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::Class;
use super::lock;
use super::mediator::{HostCalls, Mediator, Origin, Verdict};
use crate::device::{Area, IrqData, IrqInfo, IrqSet, RegionCapability, RegionInfo};

impl MediatedDevice {
    /// The device's own, narrowed by hooks, with the areas that may be mapped: never a claimed byte. EINVAL beyond the last
    /// index and for regions that the device lacks.
    pub fn region_info(&self, index: u32) -> Result<RegionInfo> {
        self.with_pass(Class::Control, || match index.checked_sub(self.own_regions()) {
            None => self.own_region_info(index),
            Some(position) => self.extra_region_info(index, position as usize),
        })
    }

    /// What the device tells of one of its own regions, and what the hooks leave of that.
    fn narrowed(&self, index: u32) -> Result<(&RegionInfo, abi::RegionInfo)> {
        let no_region = || MediationError::refused(format!("region {index}"), Errno::INVAL);
        let own = self.shared.regions[index as usize].as_ref().ok_or_else(no_region)?;
        let mut info = self.shared.region_info(index).map_err(|_| no_region())?;
        if let Some(plugin) = &self.plugin {
            for claim in claims_of(&**plugin, index) {
                narrow_region(&**plugin, claim, self, &mut info)?;
            }
        }
        Ok((own, info))
    }

    /// Whether the hooks of region info let these bytes be mapped, if anything else does. The caller has a pass.
    pub(super) fn hooks_let_map(&self, index: u32, area: Area) -> Result<bool> {
        if index >= self.own_regions() {
            return Ok(true);
        }
        let (own, info) = self.narrowed(index)?;
        let forbidden = own.flags & !info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        Ok(!forbidden && area.offset.checked_add(area.length).is_some_and(|end| end <= info.size))
    }

    fn own_region_info(&self, index: u32) -> Result<RegionInfo> {
        let (own, info) = self.narrowed(index)?;
        let mut areas: Vec<Area> = self.mappable(index).to_vec();
        areas.extend(self.stand_ins.iter().filter(|stand_in| stand_in.region == index).map(|stand_in| stand_in.area));
        areas.sort_unstable();
        if own.flags & VFIO_REGION_INFO_FLAG_MMAP != 0 && info.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            areas.clear();
        }
        Ok(with_areas(own, &info, cut(areas, info.size)))
    }

    fn extra_region_info(&self, index: u32, position: usize) -> Result<RegionInfo> {
        let extra = self.plugin.as_ref().and_then(|plugin| plugin.extra_regions().get(position));
        let extra = extra.ok_or_else(|| MediationError::refused(format!("region {index}"), Errno::INVAL))?;
        let kind = RegionCapability::Type { type_: extra.type_, subtype: extra.subtype };
        let own = RegionInfo { index, flags: extra.flags, size: extra.size, capabilities: vec![kind] };
        let info = abi::RegionInfo { struct_size: 0, index, flags: extra.flags, reserved: 0, size: extra.size };
        let stand_ins = self.stand_ins.iter().filter(|stand_in| stand_in.region == index);
        Ok(with_areas(&own, &info, stand_ins.map(|stand_in| stand_in.area).collect()))
    }

    /// Whether the device's file may be given to a process that is trusted like this one: it reaches every byte and every vector.
    /// EPERM with any claim.
    pub fn check_shareable(&self) -> Result<()> {
        let Some(plugin) = &self.plugin else { return Ok(()) };
        if plugin.claims().is_empty() && plugin.irq_claims().is_empty() {
            return Ok(());
        }
        let name = self.summary.as_ref().map_or("a plug-in", |summary| &summary.name);
        Err(MediationError::refused(format!("sharing the device's file, since {name} has claims on it"), Errno::PERM))
    }

    /// The file that a region is mapped from, for such a process, and where in it the region begins; never of a device with
    /// claims, since who has it reaches all of it. Nothing takes it back.
    pub fn region_file(&self, index: u32) -> Result<Option<(OwnedFd, u64)>> {
        self.check_shareable()?;
        let Some((file, offset)) = self.device().region_file(index) else { return Ok(None) };
        let file = file.try_clone_to_owned();
        let file = file.map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::MFILE, Errno::from_raw_os_error);
            MediationError::refused(format!("one more descriptor for region {index}"), errno)
        })?;
        Ok(Some((file, offset)))
    }

    /// As the device's own, narrowed by hooks.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let no_index = || MediationError::refused(format!("irq index {index}"), Errno::INVAL);
        self.with_pass(Class::Control, || {
            if let Some(position) = index.checked_sub(self.own_irqs()) {
                let extra = self.plugin.as_ref().and_then(|plugin| plugin.extra_irqs().get(position as usize));
                let extra = extra.ok_or_else(no_index)?;
                return Ok(IrqInfo { index, flags: extra.flags, count: extra.count });
            }
            let mut info = self.shared.irq_info(index).map_err(|_| no_index())?;
            if let Some(plugin) = &self.plugin {
                let claims = plugin.irq_claims().iter().enumerate();
                for (claim, _) in claims.filter(|(_, claim)| claim.index == index && claim.has_irq_info) {
                    narrow_irq(&**plugin, claim, self, &mut info)?;
                }
            }
            Ok(IrqInfo { index, flags: info.flags, count: info.count })
        })
    }

    /// As `VFIO_DEVICE_SET_IRQS`. Vectors whose claim has a hook go to it, ascending; the rest to the device, in one request
    /// where no hook handled any.
    pub fn set_irqs(&self, request: &IrqSet<'_>) -> Result<()> {
        self.with_pass(Class::Control, || {
            self.check_irqs(request)?;
            let handled = self.offer_irqs(request)?;
            for part in left_over(request, &handled) {
                let refused = |errno| MediationError::refused(format!("irqs of index {}", part.index), errno);
                self.shared.default_set_irqs(&part).map_err(refused)?;
            }
            Ok(())
        })
    }

    fn check_irqs(&self, request: &IrqSet<'_>) -> Result<()> {
        let count = match request.index.checked_sub(self.own_irqs()) {
            None => self.shared.irq_info(request.index).ok().map(|info| info.count),
            Some(position) => {
                let extra = self.plugin.as_ref().and_then(|plugin| plugin.extra_irqs().get(position as usize));
                extra.map(|extra| extra.count)
            }
        };
        let data = match request.data {
            IrqData::None => request.count,
            IrqData::Bool(bools) => bools.len() as u32,
            IrqData::EventFd(fds) => fds.len() as u32,
        };
        let end = request.start.checked_add(request.count);
        match (count, end) {
            (Some(count), Some(end)) if end <= count && data == request.count => Ok(()),
            _ => Err(MediationError::refused(format!("irqs of index {}", request.index), Errno::INVAL)),
        }
    }

    /// Asks the hooks, and returns the vectors that they handled, as `start .. end`, ascending.
    pub(super) fn offer_irqs(&self, request: &IrqSet<'_>) -> Result<Vec<(u32, u32)>> {
        let Some(plugin) = &self.plugin else { return Ok(Vec::new()) };
        let mut claims: Vec<_> = plugin.irq_claims().iter().enumerate().collect();
        claims.retain(|(_, claim)| claim.index == request.index && claim.has_set_irqs);
        claims.sort_unstable_by_key(|(_, claim)| claim.start);
        let mut handled = Vec::new();
        for (position, claim) in claims {
            let whole_index = request.count == 0;
            let start = request.start.max(claim.start);
            let end = (request.start + request.count).min(claim.start.saturating_add(claim.count));
            if start >= end && !whole_index {
                continue;
            }
            let (start, end) = if whole_index { (request.start, request.start) } else { (start, end) };
            let part = part_of(request, start, end);
            match plugin.set_irqs(position, self.frame(Origin::Client), &part) {
                Verdict::Handled => handled.push((start, end)),
                Verdict::Forward => {}
                Verdict::Deny(errno) => return Err(MediationError::Plugin { what: "a change of irqs", errno }),
            }
        }
        Ok(handled)
    }

    /// An interposed vector fired: the plug-in sees it first, and it reaches the client unless the plug-in took it.
    pub(super) fn irq_fired(&self, vector: (u32, u32)) {
        let verdict = self.with_own_pass(Class::Control, || {
            let Some(plugin) = &self.plugin else { return Ok(Verdict::Forward) };
            let covers = |claim: &&super::mediator::IrqClaim| {
                claim.has_fired && claim.index == vector.0 && vector.1.wrapping_sub(claim.start) < claim.count
            };
            let claim = plugin.irq_claims().iter().position(|claim| covers(&claim));
            Ok(claim
                .map_or(Verdict::Forward, |claim| plugin.fired(claim, self.frame(Origin::Host), vector.0, vector.1)))
        });
        // A lost interrupt hangs a guest, a spurious one does not: what cannot be asked about is passed on.
        if !matches!(verdict, Ok(Verdict::Handled)) {
            self.shared.irqs.signal(vector);
        }
    }

    /// The bits of the device's dirt source that a status page shows.
    pub fn is_tracking(&self) -> bool {
        lock(&self.tracking).is_some()
    }
}

fn claims_of(plugin: &dyn Mediator, region: u32) -> impl Iterator<Item = usize> + '_ {
    let claims = plugin.claims().iter().enumerate();
    claims.filter(move |(_, claim)| claim.region == region && claim.has_region_info).map(|(position, _)| position)
}

fn narrow_region(
    plugin: &dyn Mediator,
    claim: usize,
    device: &MediatedDevice,
    info: &mut abi::RegionInfo,
) -> Result<()> {
    let mut asked = *info;
    match plugin.region_info(claim, device.frame(Origin::Client), &mut asked) {
        Verdict::Forward => Ok(()),
        Verdict::Deny(errno) => Err(MediationError::Plugin { what: "region information", errno }),
        Verdict::Handled if asked.size <= info.size && asked.flags & !info.flags == 0 && asked.index == info.index => {
            *info = asked;
            Ok(())
        }
        Verdict::Handled => {
            let what = format!("its information on region {} is wider than the device's", info.index);
            Err(MediationError::PluginFault { what })
        }
    }
}

fn narrow_irq(plugin: &dyn Mediator, claim: usize, device: &MediatedDevice, info: &mut abi::IrqInfo) -> Result<()> {
    let mut asked = *info;
    match plugin.irq_info(claim, device.frame(Origin::Client), &mut asked) {
        Verdict::Forward => Ok(()),
        Verdict::Deny(errno) => Err(MediationError::Plugin { what: "irq information", errno }),
        Verdict::Handled
            if asked.count <= info.count && asked.flags & !info.flags == 0 && asked.index == info.index =>
        {
            *info = asked;
            Ok(())
        }
        Verdict::Handled => {
            let what = format!("its information on irq index {} is wider than the device's", info.index);
            Err(MediationError::PluginFault { what })
        }
    }
}

fn cut(areas: Vec<Area>, size: u64) -> Vec<Area> {
    let inside = areas.into_iter().filter(|area| area.offset < size);
    inside.map(|area| Area { length: area.length.min(size - area.offset), ..area }).collect()
}

fn with_areas(own: &RegionInfo, info: &abi::RegionInfo, areas: Vec<Area>) -> RegionInfo {
    let mut capabilities = own.capabilities.clone();
    capabilities.retain(|capability| !matches!(capability, RegionCapability::SparseMmap(_)));
    let whole = areas == [Area { offset: 0, length: info.size }];
    let mut flags = info.flags & !VFIO_REGION_INFO_FLAG_MMAP;
    if !areas.is_empty() {
        flags |= VFIO_REGION_INFO_FLAG_MMAP;
        if !whole {
            capabilities.push(RegionCapability::SparseMmap(areas));
        }
    }
    RegionInfo { index: own.index, flags, size: info.size, capabilities }
}

/// The vectors `start .. end` of a request.
fn part_of<'a>(request: &IrqSet<'a>, start: u32, end: u32) -> IrqSet<'a> {
    let range = (start - request.start) as usize..(end - request.start) as usize;
    let data = match request.data {
        IrqData::None => IrqData::None,
        IrqData::Bool(bools) => IrqData::Bool(&bools[range]),
        IrqData::EventFd(fds) => IrqData::EventFd(&fds[range]),
    };
    IrqSet { index: request.index, start, count: end - start, action: request.action, data }
}

/// What hooks have not handled, ascending.
fn left_over<'a>(request: &IrqSet<'a>, handled: &[(u32, u32)]) -> Vec<IrqSet<'a>> {
    if request.count == 0 {
        return if handled.is_empty() { vec![*request] } else { Vec::new() };
    }
    let end = request.start + request.count;
    let mut parts = Vec::new();
    let mut from = request.start;
    for (start, stop) in handled.iter().copied().chain([(end, end)]) {
        if from < start {
            parts.push(part_of(request, from, start));
        }
        from = from.max(stop);
    }
    parts
}
