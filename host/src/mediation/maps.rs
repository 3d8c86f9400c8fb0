//! Mappings of regions in this process, taken back whenever the device may not be reached and put back afterwards.
//!
//! **Owns** [`RegionMap`], a mapping at an address that stays, and the list of those that are out. **Must never** let one
//! reach a device whose memory is disabled, that is being reset, sleeps or is stopped, nor bytes that the hook table in force
//! traps. What is done to the device comes after its mappings are gone: *revoke first, then act*.
//!
//! ```text
//!   LIVE -- the device is had alone, and: memory will be disabled, reset, low power, an arc that stops it,
//!     |     a table that traps some of its bytes --> REVOKED -- a turn ends with the device open --> LIVE
//!     +-- the device is closed --> ENDED
//! ```
//! Accesses by the map's own methods hold a pass, so that none is in flight when it is revoked; raw pointers meet what
//! [`Faults`] says. Another process's mappings cannot be taken back from here: what a region's information offers never
//! holds a byte that either hook table traps (`layout`), and a file descriptor of the device is never handed out.
//! Locks: `all`, a leaf.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::io::Errno;

use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::{Class, Exclusive, GateClosed, Reason, Standing};
use super::mediator::{Claim, TrapMap};
use super::{layout, lock, open};
use crate::device::{Area, RegionInfo};
use crate::sys::{Faults, Mapping, Revocable, RevocableError};

/// Mappings of one device that may be out at once.
const MAPS_MAX: usize = 1024;

/// How a region is to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MapOptions {
    /// What a raw pointer meets while the mapping is revoked
    pub faults: Faults,
    /// Also bytes that the other hook table traps: the mapping is revoked for as long as that one is in force. Without it only
    /// what [`MediatedDevice::region_info`] offers can be mapped, and no change of tables revokes it.
    pub may_be_trapped: bool,
}

/// Part of a region, mapped into this process. The address stays the same; while the device may not be reached the mapping
/// is *revoked*. Dropped, the addresses are free again.
#[derive(Debug)]
pub struct RegionMap {
    owner: u64,
    index: u32,
    area: Area,
    options: MapOptions,
    memory: Revocable,
}

/// The mappings of one device that are out.
#[derive(Debug)]
pub struct Maps {
    /// Whose they are
    id: u64,
    all: Mutex<Vec<Weak<RegionMap>>>,
    /// By hook table, and by region: what may be mapped while it is in force
    by_table: [Vec<Vec<Area>>; 2],
}

impl Maps {
    pub fn new(regions: &[Option<RegionInfo>], claims: &[Claim]) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let of = |holds: fn(&Claim) -> bool| {
            let holding: Vec<Claim> = claims.iter().filter(|claim| holds(claim)).cloned().collect();
            open::mappable(regions, &holding)
        };
        let by_table = [of(|claim| claim.normal)?, of(|claim| claim.tracking)?];
        Ok(Self { id: NEXT.fetch_add(1, Ordering::Relaxed), all: Mutex::default(), by_table })
    }

    fn out(&self) -> Vec<Arc<RegionMap>> {
        lock(&self.all).iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether these bytes may be mapped while `table` is in force.
    fn allows(&self, table: TrapMap, index: u32, area: Area) -> bool {
        let areas = &self.by_table[usize::from(table == TrapMap::Tracking)];
        areas.get(index as usize).is_some_and(|areas| layout::contains(areas, area))
    }
}

impl RegionMap {
    /// Of which region.
    pub fn region(&self) -> u32 {
        self.index
    }

    /// Of which of its bytes.
    pub fn area(&self) -> Area {
        self.area
    }

    /// The first byte's address, for an embedder that hands it to a guest or keeps a pointer. A touch while the mapping is
    /// revoked meets what [`MapOptions::faults`] says, never stale data; a touch that races with the revocation is either
    /// before it or meets that.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Whether it is not revoked now. Changes at any time.
    pub fn is_live(&self) -> bool {
        self.memory.is_live()
    }

    /// Reads bytes of the mapping, ascending, each access aligned and as wide as it can be. As [`MediatedDevice::region_read`]
    /// of the same bytes in what is refused: EIO while memory is disabled and while the bytes are trapped. EINVAL outside, and
    /// for another device than the mapping's.
    pub fn read(&self, device: &MediatedDevice, offset: u64, data: &mut [u8]) -> Result<()> {
        self.access(device, || self.memory.read(offset, data))
    }

    pub fn write(&self, device: &MediatedDevice, offset: u64, data: &[u8]) -> Result<()> {
        self.access(device, || self.memory.write(offset, data))
    }

    /// One 32-bit load. EINVAL where it is not aligned.
    pub fn load_u32(&self, device: &MediatedDevice, offset: u64) -> Result<u32> {
        self.access(device, || self.memory.load_u32(offset))
    }

    pub fn store_u32(&self, device: &MediatedDevice, offset: u64, value: u32) -> Result<()> {
        self.access(device, || self.memory.store_u32(offset, value))
    }

    /// One 32-bit load as by a raw pointer ([`Self::address`]): no pass, no check. While the mapping is revoked the calling thread
    /// gets SIGBUS, or waits, as [`MapOptions::faults`] says. EINVAL outside and where it is not aligned.
    pub fn touch_u32(&self, offset: u64) -> Result<u32> {
        self.memory.touch_u32(offset).map_err(|error| self.error(&error))
    }

    /// Under a pass: it is not revoked meanwhile.
    fn access<T>(
        &self,
        device: &MediatedDevice,
        work: impl FnOnce() -> std::result::Result<T, RevocableError>,
    ) -> Result<T> {
        if device.maps.id != self.owner {
            return Err(MediationError::refused("a mapping of another device", Errno::INVAL));
        }
        device.with_pass(Class::Memory, || work().map_err(|error| self.error(&error)))
    }

    #[cold]
    fn error(&self, error: &RevocableError) -> MediationError {
        let errno = match error {
            RevocableError::Revoked => Errno::IO,
            RevocableError::OutOfBounds { .. } | RevocableError::Misaligned { .. } => Errno::INVAL,
            RevocableError::Os(error) => errno_of(error),
        };
        MediationError::refused(format!("region {}: {error}", self.index), errno)
    }
}

fn unmappable(index: u32, area: Area) -> MediationError {
    let what = format!("mapping {:#x} bytes at {:#x} of region {index}", area.length, area.offset);
    MediationError::refused(what, Errno::NODEV)
}

impl MediatedDevice {
    /// Maps part of a region into this process: whole areas of [`Self::region_info`] only. ENODEV where nothing may be
    /// mapped, EIO while memory is disabled, ENOSPC for too many mappings.
    pub fn region_map(&self, index: u32, offset: u64, length: u64) -> Result<Arc<RegionMap>> {
        self.region_map_with(index, offset, length, MapOptions::default())
    }

    /// As [`Self::region_map`]; with [`Faults::Block`] also EPERM or ENOSYS, where the machine gives no userfaultfd.
    pub fn region_map_with(&self, index: u32, offset: u64, length: u64, options: MapOptions) -> Result<Arc<RegionMap>> {
        let area = Area { offset, length };
        // The pass is held until the map is in the list: whoever revokes afterwards finds it.
        self.with_pass(Class::Memory, || {
            if !self.hooks_let_map(index, area)? {
                return Err(unmappable(index, area));
            }
            let mapping = self.fresh(index, area, options)?;
            let failed = |error| MediationError::refused(format!("mapping region {index}"), errno_of(&error));
            let memory = Revocable::new(mapping, options.faults).map_err(failed)?;
            let map = Arc::new(RegionMap { owner: self.maps.id, index, area, options, memory });
            let mut all = lock(&self.maps.all);
            all.retain(|map| map.strong_count() > 0);
            if all.len() >= MAPS_MAX {
                return Err(MediationError::refused("one more mapping", Errno::NOSPC));
            }
            all.push(Arc::downgrade(&map));
            drop(all);
            // A hook that disables memory under a pass refuses it first and then looks for mappings: one of both sees the other.
            if let Some(reason) = self.shared.gate.cut(Class::Memory) {
                map.memory.revoke().map_err(failed)?;
                return Err(GateClosed { reason }.into());
            }
            Ok(map)
        })
    }

    /// The device's memory itself, or the file that stands in for it.
    fn fresh(&self, index: u32, area: Area, options: MapOptions) -> Result<Arc<Mapping>> {
        let Area { offset, length } = area;
        let offered = layout::contains(self.mappable(index), area);
        if offered || (options.may_be_trapped && self.maps.allows(self.map(), index, area)) {
            return Ok(self.device().region_map(index, offset, length)?);
        }
        let Some(stand_in) = self.stand_in(index, area) else {
            return Err(unmappable(index, area));
        };
        let from = stand_in.fd_offset + (offset - stand_in.area.offset);
        let map = Mapping::new(stand_in.fd.as_fd(), from, length);
        map.map(Arc::new).map_err(|error| MediationError::PluginFault { what: error.to_string() })
    }

    /// No mapping reaches the device when this has returned. The caller has the device alone, and does afterwards what needs
    /// it; on an error he does not.
    pub(super) fn revoke_maps(&self) -> Result<()> {
        self.revoke_those(|_| true)
    }

    /// As [`Self::revoke_maps`], of the mappings with bytes that `table` traps.
    pub(super) fn revoke_trapped(&self, table: TrapMap) -> Result<()> {
        self.revoke_those(|map| !self.fits(map, table))
    }

    fn revoke_those(&self, which: impl Fn(&RegionMap) -> bool) -> Result<()> {
        for map in self.maps.out().iter().filter(|map| which(map)) {
            let failed = |error| MediationError::refused("taking a mapping back", errno_of(&error));
            map.memory.revoke().map_err(failed)?;
        }
        Ok(())
    }

    /// Before a write to configuration space: revoke first, then act. The caller has the device alone, or writes nothing that
    /// disables memory.
    #[cold]
    pub(super) fn revoke_if_disabled(&self, offset: u64, data: &[u8]) -> Result<()> {
        let gated = self.shared.gated.load(Ordering::Acquire);
        if self.shared.filter.disables(offset, data, gated) { self.revoke_maps() } else { Ok(()) }
    }

    /// Whether any mapping is live.
    pub(super) fn has_live_maps(&self) -> bool {
        self.maps.out().iter().any(|map| map.is_live())
    }

    /// Puts back what may be put back. The caller has the device alone and open. What cannot be mapped again stays revoked:
    /// its accesses are errors, and the next turn tries once more.
    pub(super) fn restore_maps(&self) {
        let table = self.map();
        for map in self.maps.out().iter().filter(|map| !map.is_live() && self.fits(map, table)) {
            let restored = self.fresh(map.index, map.area, map.options);
            let restored = restored.and_then(|mapping| {
                let failed = |error| MediationError::refused("putting a mapping back", errno_of(&error));
                map.memory.restore(mapping).map_err(failed)
            });
            if let Err(error) = restored {
                tracing::warn!(device = %self.identity().name, region = map.index, %error, "a mapping stays revoked");
            }
        }
    }

    fn fits(&self, map: &RegionMap, table: TrapMap) -> bool {
        !map.options.may_be_trapped || self.maps.allows(table, map.index, map.area)
    }

    /// Ends a turn: mappings and gate are as the condition says.
    pub(super) fn release(&self, turn: Exclusive<'_>) {
        let standing = lock(&self.condition).standing();
        let open = || standing == Standing::OPEN && !self.has_failed();
        if open() {
            self.restore_maps();
        }
        // Also when it failed meanwhile: whoever failed it may have revoked before they were back.
        if !open()
            && let Err(error) = self.revoke_maps()
        {
            // Late, for what a hook did by itself; and a mapping that stays may reach what must not be reached.
            tracing::error!(device = %self.identity().name, %error, "the device is failed");
            self.shared.gate.fail();
        }
        turn.release(standing);
    }

    /// Everything is refused for good.
    pub fn has_failed(&self) -> bool {
        self.shared.gate.closed(Class::Control) == Some(Reason::Failed)
    }

    /// A failed device is out of reach as soon as nobody is in the middle of an access; the last one comes here again.
    pub(super) fn revoke_failed(&self) {
        if !self.has_failed() || !self.has_live_maps() {
            return;
        }
        if !self.shared.gate.is_failed_and_empty() {
            self.shared.gate.raise_attention();
            // Whoever left in between has not seen it.
            if !self.shared.gate.is_failed_and_empty() {
                return;
            }
        }
        if let Err(error) = self.revoke_maps() {
            tracing::error!(device = %self.identity().name, %error, "a mapping of a failed device stays");
        }
    }

    /// The device is being closed, and nothing is in flight.
    pub(super) fn end_maps(&self) {
        for map in self.maps.out() {
            if let Err(error) = map.memory.end() {
                tracing::error!(device = %self.identity().name, %error, "a mapping outlives its device");
            }
        }
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}
