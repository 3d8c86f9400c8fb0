//! Guest memory for the device: maps and unmaps, each step undone when a later one fails.
//!
//! What a map needs is done in this order: scratch memory is not covered, the VM's address space has it (joined, where
//! another device of the VM brought it), the device has it, the plug-in agrees. An unmap goes backwards: nothing is forgotten
//! before the device has let go of it, and what it wrote is in the dirty log first.

use rustix::io::Errno;
use vfio_mediate_sdk::abi;

use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::Class;
use crate::device::{Backend, DmaMap};
use crate::memory::{ClientMap, ClientSource, IovaMapping, MemoryError, Report, Taken};
use crate::sys::DmaMemory;

/// A real device cannot ask a client for bytes. Firmware that a VMM has in no file is small and not what devices read: such a
/// map is kept without the device, up to this length.
const ROM_MAX: u64 = 1 << 20;

impl MediatedDevice {
    /// Lets the device reach part of the VM's RAM. The VM's address space is shared by its devices: the first of them
    /// adds the map, the others join it, and it goes with the last. EEXIST where it would cover a plug-in's scratch memory or another map.
    pub fn dma_map(&self, map: IovaMapping) -> Result<()> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                self.check_scratch(map.iova, map.length)?;
                if self.shared.maps().get(&map.iova) == Some(&map) {
                    return Ok(());
                }
                let memory = &self.shared.memory;
                let ram = memory.own_ram()?.dma_mapping().clone();
                memory.join(map)?;
                self.map_device(map, Some((ram.into(), map.ram_offset))).inspect_err(|_| memory.leave(&map))
            })
        })
    }

    /// Lets the device reach memory that its client brings. The VM's other devices may bring the same, and then share it.
    ///
    /// EEXIST where it would cover a plug-in's scratch memory, or a map of this device, or of the VM's other memory; ENOSPC
    /// beyond a limit; EINVAL or EACCES for a file that is not taken; EOPNOTSUPP for memory without a file that a real device
    /// would have to reach. All else as [`crate::memory::AddressSpace::join_client`].
    pub fn dma_map_client(&self, map: ClientMap) -> Result<()> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                let ClientMap { iova, length, .. } = map;
                self.check_scratch(iova, length)?;
                if self.shared.maps().contains_key(&iova) {
                    let what = format!("mapping {length:#x} bytes at {iova:#x} again");
                    return Err(MediationError::refused(what, Errno::EXIST));
                }
                let in_device = self.is_for_device(&map)?;
                let joined = self.shared.memory.join_client(map, self.shared.holder)?;
                let given = in_device.then_some((joined.memory, joined.offset));
                self.map_device(joined.map, given).inspect_err(|_| self.leave(&joined.map))
            })
        })
    }

    fn check_scratch(&self, iova: u64, length: u64) -> Result<()> {
        if self.shared.scratch.collides(iova, length) {
            let what = format!("mapping {length:#x} bytes at {iova:#x} over the plug-in's memory");
            return Err(MediationError::refused(what, Errno::EXIST));
        }
        Ok(())
    }

    /// Whether the device itself gets the map.
    fn is_for_device(&self, map: &ClientMap) -> Result<bool> {
        let ClientMap { iova, length, .. } = map;
        if self.identity().backend == Backend::Sim || matches!(map.source, ClientSource::File { .. }) {
            return Ok(true);
        }
        if *length <= ROM_MAX {
            tracing::debug!(device = %self.identity().name, iova, length, "no file: the device cannot reach it");
            return Ok(false);
        }
        let what = format!(
            "{length:#x} bytes of guest memory at {iova:#x} came without a file, so that the device cannot reach them: \
             let the VMM share its memory (QEMU: -object memory-backend-memfd,share=on,... with -machine memory-backend=...)"
        );
        Err(MediationError::refused(what, Errno::OPNOTSUPP))
    }

    fn map_device(&self, map: IovaMapping, given: Option<(DmaMemory, u64)>) -> Result<()> {
        let IovaMapping { iova, length, read, write, .. } = map;
        let in_device = given.is_some();
        if let Some((memory, offset)) = given {
            self.device().dma_map(&DmaMap { iova, length, memory, offset, read, write })?;
        }
        let accepted = self.event(abi::EVENT_DMA_MAP, [iova, length, u64::from(write)]);
        if let Err(refused) = accepted {
            if in_device && let Err(kept) = self.device().dma_unmap(iova, length) {
                // It reaches the memory still: the map stays, so that its writes are reported and the end takes it away.
                tracing::error!(device = %self.identity().name, iova, length, %kept, "a refused map stays");
                self.shared.maps().insert(iova, map);
                return Ok(());
            }
            return Err(refused);
        }
        self.shared.maps().insert(iova, map);
        Ok(())
    }

    /// Takes the maps inside the range away; EINVAL when one is cut. What the device wrote there is in the dirty log when
    /// this returns, and nothing of this host touches a client's memory there any more; EBUSY where a copy does not end, though
    /// the map is gone.
    pub fn dma_unmap(&self, iova: u64, length: u64) -> Result<()> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                let inside = self.maps_inside(iova, length)?;
                inside.iter().try_for_each(|map| self.unmap(map, || {}))
            })
        })
    }

    /// As [`Self::dma_unmap`], and ORs the dirty pages of what was unmapped into `bitmap`: the last chance to learn of them.
    /// The arguments are [`Self::dirty_report`]'s, and so is what to do with what was taken (it matters to the VM's other devices
    /// that have the same map). EINVAL, and nothing is unmapped, where nobody tracks. After another error some may have been unmapped,
    /// whose pages `bitmap` has.
    pub fn dma_unmap_dirty(&self, iova: u64, length: u64, page_size: u64, bitmap: &mut [u8]) -> Result<Taken> {
        self.in_lane(|| {
            let mut report = Report::new(iova, length, page_size, bitmap)?;
            if !self.is_tracking() {
                return Err(MediationError::refused("a dirty report without tracking", Errno::INVAL));
            }
            self.with_pass(Class::Control, || {
                let mut taken = Taken::new(&self.shared.memory);
                let inside = self.maps_inside(iova, length)?;
                for map in &inside {
                    match self.unmap(map, || taken.take(map, &mut report)) {
                        // The map is gone, and a copy into it may not have ended.
                        Err(MediationError::Memory(MemoryError::Busy { .. })) => taken.take_all(map, &mut report),
                        done => done?,
                    }
                }
                Ok(taken)
            })
        })
    }

    /// One map. `last` is called when its dirt is complete and in the log, that of copies on their way included, and its place there
    /// still its own.
    pub(super) fn unmap(&self, map: &IovaMapping, last: impl FnOnce()) -> Result<()> {
        self.device().dma_unmap(map.iova, map.length)?;
        // After: nothing more is written. Before the map is forgotten: the report needs it.
        self.sync_map(map);
        self.shared.maps().remove(&map.iova);
        // The VM's other devices go on using theirs.
        let left = self.shared.leave(map, last);
        self.tell(abi::EVENT_DMA_UNMAP, [map.iova, map.length, 0]);
        Ok(left?)
    }

    fn leave(&self, map: &IovaMapping) {
        if let Err(error) = self.shared.leave(map, || {}) {
            tracing::warn!(device = %self.identity().name, %error, "a client's memory is still being copied");
        }
    }

    fn maps_inside(&self, iova: u64, length: u64) -> Result<Vec<IovaMapping>> {
        let range = || format!("unmapping {length:#x} bytes at {iova:#x}");
        let last = length.checked_sub(1).and_then(|length| iova.checked_add(length));
        let last = last.ok_or_else(|| MediationError::refused(range(), Errno::INVAL))?;
        let end = |map: &IovaMapping| map.iova + (map.length - 1);
        let touched: Vec<IovaMapping> = {
            // There may be many: only the range, and what begins before it and may reach into it, is looked at.
            let maps = self.shared.maps();
            let before = maps.range(..iova).next_back().filter(|(_, map)| end(map) >= iova);
            before.into_iter().chain(maps.range(iova..=last)).map(|(_, map)| *map).collect()
        };
        if touched.iter().any(|map| map.iova < iova || end(map) > last) {
            return Err(MediationError::refused(range(), Errno::INVAL));
        }
        Ok(touched)
    }
}
