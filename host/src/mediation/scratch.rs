//! Memory that a device can reach and its guest cannot see, for plug-ins.
//!
//! **Owns** the blocks and where they lie in the device's I/O address space. **Must never** overlap a guest map: a block
//! goes where nothing is mapped, and a later guest map that would cover one is refused (EEXIST). Locks: `blocks`, a leaf.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::device::IovaRange;
use crate::lock_order::{Guard, lock};
use crate::memory::{IovaMapping, PAGE_SIZE};
use crate::sys::{Mapping, Seal, memfd};

/// Per block and per device, in bytes (`HostServices::scratch_alloc`).
pub const SCRATCH_MAX: u64 = 16 << 20;
const BLOCKS_MAX: usize = 64;
#[derive(Debug, Default)]
pub struct Scratch {
    blocks: Mutex<BTreeMap<u64, Arc<Mapping>>>,
}

impl Scratch {
    /// Makes a block and reserves its place, the highest free one below 2^`address_bits` (0: 2^64); the device does not
    /// see it yet.
    pub fn reserve(
        &self,
        length: u64,
        address_bits: u32,
        ranges: &[IovaRange],
        maps: &[IovaMapping],
    ) -> Result<(u64, Arc<Mapping>), Errno> {
        if length == 0 || !length.is_multiple_of(PAGE_SIZE) || length > SCRATCH_MAX {
            return Err(Errno::INVAL);
        }
        let errno = |error: &std::io::Error| Errno::from_io_error(error).unwrap_or(Errno::NOMEM);
        let fd = memfd("vfio-mediate-scratch", length, Seal::Size).map_err(|error| errno(&error))?;
        let mapping = Arc::new(Mapping::new(&fd, 0, length).map_err(|_| Errno::NOMEM)?);
        let mut blocks = self.lock();
        if blocks.len() >= BLOCKS_MAX {
            return Err(Errno::NOSPC);
        }
        let mut taken: Vec<(u64, u64)> = maps.iter().map(|map| (map.iova, map.iova + (map.length - 1))).collect();
        taken.extend(blocks.iter().map(|(iova, block)| (*iova, iova + (block.len() - 1))));
        taken.sort_unstable();
        let limit = if (1..64).contains(&address_bits) { (1 << address_bits) - 1 } else { u64::MAX };
        let iova = highest_free(length, limit, ranges, &taken).ok_or(Errno::NOSPC)?;
        blocks.insert(iova, mapping.clone());
        Ok((iova, mapping))
    }

    pub fn remove(&self, iova: u64) -> Option<Arc<Mapping>> {
        self.lock().remove(&iova)
    }

    pub fn length(&self, iova: u64) -> Option<u64> {
        self.lock().get(&iova).map(|block| block.len())
    }

    pub fn all(&self) -> Vec<u64> {
        self.lock().keys().copied().collect()
    }

    /// Whether a guest map would cover a block.
    pub fn collides(&self, iova: u64, length: u64) -> bool {
        let last = iova.saturating_add(length.saturating_sub(1));
        self.lock().iter().any(|(start, block)| *start <= last && iova <= start + (block.len() - 1))
    }

    fn lock(&self) -> Guard<'_, BTreeMap<u64, Arc<Mapping>>> {
        lock(&self.blocks)
    }
}

/// The highest page boundary from which `length` bytes are free inside a range and end at `limit` or below. `taken`:
/// ascending by start, inclusive ends.
fn highest_free(length: u64, limit: u64, ranges: &[IovaRange], taken: &[(u64, u64)]) -> Option<u64> {
    let candidate = |range: &IovaRange| {
        let mut last = range.last.min(limit);
        loop {
            // `start ..= last` on page boundaries.
            let end = last.checked_add(1).map_or(0u64.wrapping_sub(PAGE_SIZE), |end| end & !(PAGE_SIZE - 1));
            let start = end.checked_sub(length).filter(|start| *start >= range.iova)?;
            // Address 0 is what an unset register holds.
            if start == 0 {
                return None;
            }
            match taken.iter().rfind(|(from, to)| *from < end && *to >= start) {
                None => return Some(start),
                Some((from, _)) => last = from.checked_sub(1)?,
            }
        }
    };
    ranges.iter().filter_map(candidate).max()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const ALL: [IovaRange; 1] = [IovaRange { iova: 0, last: u64::MAX }];

    fn map(iova: u64, length: u64) -> IovaMapping {
        IovaMapping { iova, length, ram_offset: 0, read: true, write: true }
    }

    /// spec: SCRATCH-1
    #[test]
    fn a_block_lies_within_the_devices_reach_and_beside_every_map_and_block() {
        let scratch = Scratch::default();
        let (first, _) = scratch.reserve(2 * PAGE_SIZE, 28, &ALL, &[]).unwrap();
        assert_eq!(first, (1 << 28) - 2 * PAGE_SIZE);
        let (second, _) = scratch.reserve(PAGE_SIZE, 28, &ALL, &[map(first - PAGE_SIZE, PAGE_SIZE)]).unwrap();
        assert_eq!(second, first - 2 * PAGE_SIZE);
        assert_eq!(scratch.reserve(PAGE_SIZE, 28, &ALL, &[map(0, 1 << 28)]).unwrap_err(), Errno::NOSPC);
        let (third, _) = scratch.reserve(PAGE_SIZE, 32, &ALL, &[map(0, 1 << 28)]).unwrap();
        assert_eq!(third, (1 << 32) - PAGE_SIZE);
        let (high, _) = scratch.reserve(PAGE_SIZE, 0, &ALL, &[]).unwrap();
        assert_eq!(high, u64::MAX - 2 * PAGE_SIZE + 1);
        assert!(scratch.collides(first + 2 * PAGE_SIZE - 1, 1) && scratch.collides(first - 1, 2));
        assert!(!scratch.collides(first - 1, 1) && !scratch.collides(first + 2 * PAGE_SIZE, 1));
    }

    #[test]
    fn ranges_are_kept_to_and_a_full_space_is_an_error() {
        let scratch = Scratch::default();
        let ranges = [IovaRange { iova: PAGE_SIZE, last: 3 * PAGE_SIZE - 1 }];
        assert_eq!(scratch.reserve(3 * PAGE_SIZE, 0, &ranges, &[]).unwrap_err(), Errno::NOSPC);
        assert_eq!(scratch.reserve(2 * PAGE_SIZE, 0, &ranges, &[]).unwrap().0, PAGE_SIZE);
        assert_eq!(scratch.reserve(PAGE_SIZE, 0, &ranges, &[]).unwrap_err(), Errno::NOSPC);
        assert_eq!(scratch.remove(PAGE_SIZE).unwrap().len(), 2 * PAGE_SIZE);
        assert!(scratch.remove(PAGE_SIZE).is_none());
    }

    #[test]
    fn lengths_are_whole_pages_up_to_the_limit() {
        let scratch = Scratch::default();
        for length in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, SCRATCH_MAX + PAGE_SIZE, u64::MAX] {
            assert_eq!(scratch.reserve(length, 0, &ALL, &[]).unwrap_err(), Errno::INVAL, "{length}");
        }
        scratch.reserve(SCRATCH_MAX, 0, &ALL, &[]).unwrap();
    }
}
