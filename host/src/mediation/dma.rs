//! Guest memory for the device: maps and unmaps, each step undone when a later one fails.

use rustix::io::Errno;
use vfio_mediate_sdk::abi;

use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::Class;
use crate::device::DmaMap;
use crate::memory::IovaMapping;

impl MediatedDevice {
    /// Lets the device reach part of the VM's memory. The VM's address space is shared by its devices: the first of them
    /// adds the map, the others join it, and it goes with the last. EEXIST where it would cover a plug-in's scratch memory or another map.
    pub fn dma_map(&self, map: IovaMapping) -> Result<()> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                if self.shared.scratch.collides(map.iova, map.length) {
                    let what = format!("mapping {:#x} bytes at {:#x} over the plug-in's memory", map.length, map.iova);
                    return Err(MediationError::refused(what, Errno::EXIST));
                }
                if self.shared.maps().get(&map.iova) == Some(&map) {
                    return Ok(());
                }
                let memory = &self.shared.memory;
                memory.join(map)?;
                self.map_device(map).inspect_err(|_| memory.leave(&map))
            })
        })
    }

    fn map_device(&self, map: IovaMapping) -> Result<()> {
        let IovaMapping { iova, length, ram_offset: offset, read, write } = map;
        let memory = self.shared.memory.ram().dma_mapping().clone();
        self.device().dma_map(&DmaMap { iova, length, memory, offset, read, write })?;
        let accepted = self.event(abi::EVENT_DMA_MAP, [iova, length, u64::from(write)]);
        if let Err(refused) = accepted {
            self.device().dma_unmap(iova, length)?;
            return Err(refused);
        }
        self.shared.maps().insert(iova, map);
        Ok(())
    }

    /// Takes the maps inside the range away; EINVAL when one is cut. What the device wrote there is in the dirty log when
    /// this returns.
    pub fn dma_unmap(&self, iova: u64, length: u64) -> Result<()> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                let inside = self.maps_inside(iova, length)?;
                for map in inside {
                    self.device().dma_unmap(map.iova, map.length)?;
                    // After: nothing more is written. Before the map is forgotten: the report needs it.
                    self.sync_map(&map);
                    self.shared.maps().remove(&map.iova);
                    // The VM's other devices go on using theirs.
                    self.shared.memory.leave(&map);
                    self.tell(abi::EVENT_DMA_UNMAP, [map.iova, map.length, 0]);
                }
                Ok(())
            })
        })
    }

    fn maps_inside(&self, iova: u64, length: u64) -> Result<Vec<IovaMapping>> {
        let range = || format!("unmapping {length:#x} bytes at {iova:#x}");
        let last = length.checked_sub(1).and_then(|length| iova.checked_add(length));
        let last = last.ok_or_else(|| MediationError::refused(range(), Errno::INVAL))?;
        let maps = self.shared.mappings();
        let end = |map: &IovaMapping| map.iova + (map.length - 1);
        let touched: Vec<IovaMapping> = maps.into_iter().filter(|map| map.iova <= last && end(map) >= iova).collect();
        if touched.iter().any(|map| map.iova < iova || end(map) > last) {
            return Err(MediationError::refused(range(), Errno::INVAL));
        }
        Ok(touched)
    }
}
