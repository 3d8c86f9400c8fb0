//! The client's DMA maps, as it has made them.
//!
//! **Owns** which addresses the client has given, and for what. **Must never** have two maps of one address, or more than were
//! agreed on. The memory behind them is the backend's.

use std::collections::BTreeMap;

use rustix::io::Errno;

use crate::frontend::vfio_user::wire::{DmaMap, UnmapScope};

/// By address.
#[derive(Debug, Default)]
pub struct Maps {
    by_address: BTreeMap<u64, DmaMap>,
}

impl Maps {
    /// EEXIST: an address is mapped already; ENOSPC: there are `most` maps.
    pub fn check(&self, map: &DmaMap, most: u32) -> Result<(), Errno> {
        // Parsed: not empty, and its last byte has an address.
        let last = map.address + (map.size - 1);
        let before = self.by_address.range(..=last).next_back();
        if before.is_some_and(|(_, other)| other.address + (other.size - 1) >= map.address) {
            return Err(Errno::EXIST);
        }
        if self.by_address.len() >= most as usize { Err(Errno::NOSPC) } else { Ok(()) }
    }

    pub fn insert(&mut self, map: DmaMap) {
        self.by_address.insert(map.address, map);
    }

    /// What an unmap means: exactly one map, or all. ENOENT: it is no map.
    pub fn find(&self, scope: UnmapScope) -> Result<Vec<DmaMap>, Errno> {
        match scope {
            UnmapScope::All => Ok(self.by_address.values().copied().collect()),
            UnmapScope::One { address, size } => {
                let map = self.by_address.get(&address).filter(|map| map.size == size);
                map.map(|map| vec![*map]).ok_or(Errno::NOENT)
            }
        }
    }

    pub fn remove(&mut self, address: u64) {
        self.by_address.remove(&address);
    }

    pub fn len(&self) -> usize {
        self.by_address.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &DmaMap> {
        self.by_address.values()
    }

    /// May the device write all of these bytes? For DMA_WRITE without a reply, whose errors nobody sees.
    pub fn is_writable(&self, address: u64, count: u32) -> bool {
        self.covers(address, count, |map| map.writable)
    }

    pub fn is_readable(&self, address: u64, count: u32) -> bool {
        self.covers(address, count, |map| map.readable)
    }

    fn covers(&self, address: u64, count: u32, allowed: impl Fn(&DmaMap) -> bool) -> bool {
        let Some(last) = u64::from(count).checked_sub(1).and_then(|more| address.checked_add(more)) else {
            return false;
        };
        let mut at = address;
        loop {
            let map = self.by_address.range(..=at).next_back().map(|(_, map)| map);
            let Some(map) = map.filter(|map| allowed(map) && at - map.address < map.size) else { return false };
            let map_last = map.address + (map.size - 1);
            if map_last >= last {
                return true;
            }
            at = map_last + 1;
        }
    }
}
