//! A VM's memory as its devices see it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::drain::Runs;
use super::{DirtyLog, GuestRam, MemoryError, PAGE_SIZE};

/// Most maps of one VM; the kernel's own limit for a type1 container.
pub const MAPS_MAX: usize = 65_535;

/// `length` bytes of RAM from `ram_offset`, seen by devices at `iova`. All three are multiples of [`PAGE_SIZE`], and
/// `length` is not 0. `read` and `write` say what a *device* may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IovaMapping {
    pub iova: u64,
    pub length: u64,
    pub ram_offset: u64,
    pub read: bool,
    pub write: bool,
}

impl IovaMapping {
    /// The last address, inclusive. A map in the table does not overflow.
    fn last(&self) -> u64 {
        self.iova + (self.length - 1)
    }
}

/// A VM's memory: RAM, IOVA map, dirty log.
#[derive(Debug)]
pub struct AddressSpace {
    ram: Arc<GuestRam>,
    log: DirtyLog,
    /// By iova; disjoint.
    maps: RwLock<BTreeMap<u64, IovaMapping>>,
    /// By iova: how many hold a map besides the first. Taken under the writer side of `maps` only.
    sharers: Mutex<BTreeMap<u64, u32>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    /// Marking: whoever wrote there was allowed to, or did it anyway.
    Mark,
}

/// Part of a range of addresses that one map covers.
#[derive(Debug, Clone, Copy, Default)]
struct Piece {
    /// From the range's first address
    at: u64,
    ram_offset: u64,
    length: u64,
}

/// What covers a range. Most ranges lie in one map, nearly all in four, and then nothing is allocated.
#[derive(Debug, Default)]
struct Pieces {
    near: [Piece; 4],
    count: usize,
    far: Vec<Piece>,
}

impl Pieces {
    fn push(&mut self, piece: Piece) {
        match self.near.get_mut(self.count) {
            Some(slot) => (*slot, self.count) = (piece, self.count + 1),
            None => self.far.push(piece),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Piece> {
        self.near[..self.count].iter().chain(&self.far)
    }
}

impl AddressSpace {
    /// Nothing is mapped and the log is stopped.
    pub fn new(ram: Arc<GuestRam>) -> Arc<Self> {
        let log = DirtyLog::new(ram.pages());
        Arc::new(Self { ram, log, maps: RwLock::default(), sharers: Mutex::default() })
    }

    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// Adds a map. Refused: misaligned or empty, beyond the last address, outside RAM, without any access, overlapping a
    /// map (which the error names), one map too many.
    pub fn map(&self, map: IovaMapping) -> Result<(), MemoryError> {
        self.insert(map, false)
    }

    /// As [`Self::map`], but an equal map that is there already is held once more: the devices of a VM share its address
    /// space. Each holder gives it back with [`Self::leave`].
    pub fn join(&self, map: IovaMapping) -> Result<(), MemoryError> {
        self.insert(map, true)
    }

    /// Gives a map back that was joined; it goes when the last holder has given it back. Nothing happens where it has been
    /// unmapped for all.
    pub fn leave(&self, map: &IovaMapping) {
        let mut maps = self.write_maps();
        if maps.get(&map.iova) != Some(map) {
            return;
        }
        let mut sharers = self.sharers();
        match sharers.get_mut(&map.iova) {
            Some(1) => {
                sharers.remove(&map.iova);
            }
            Some(others) => *others -= 1,
            None => {
                maps.remove(&map.iova);
            }
        }
    }

    fn sharers(&self) -> MutexGuard<'_, BTreeMap<u64, u32>> {
        self.sharers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, map: IovaMapping, joins: bool) -> Result<(), MemoryError> {
        let IovaMapping { iova, length, ram_offset, .. } = map;
        if length == 0 || [iova, length, ram_offset].iter().any(|value| !value.is_multiple_of(PAGE_SIZE)) {
            return Err(MemoryError::Misaligned { iova, length, granule: PAGE_SIZE });
        }
        let last = last_of(iova, length)?;
        if ram_offset.checked_add(length).is_none_or(|end| end > self.ram.size()) {
            return Err(MemoryError::OutsideRam { ram_offset, length, size: self.ram.size() });
        }
        if !map.read && !map.write {
            return Err(MemoryError::NoAccess);
        }
        let mut maps = self.write_maps();
        if let Some((_, before)) = maps.range(..=last).next_back()
            && before.last() >= iova
        {
            if joins && *before == map {
                *self.sharers().entry(iova).or_default() += 1;
                return Ok(());
            }
            return Err(MemoryError::Overlap { iova, length, existing: *before });
        }
        if maps.len() >= MAPS_MAX {
            return Err(MemoryError::TooManyMaps);
        }
        maps.insert(iova, map);
        Ok(())
    }

    /// Removes and returns the maps that lie wholly inside the range, in ascending order; there may be none. A range that
    /// cuts a map is refused and removes nothing.
    pub fn unmap(&self, iova: u64, length: u64) -> Result<Vec<IovaMapping>, MemoryError> {
        if length == 0 {
            return Err(MemoryError::Misaligned { iova, length, granule: PAGE_SIZE });
        }
        let last = last_of(iova, length)?;
        let mut maps = self.write_maps();
        let inside: Vec<IovaMapping> = overlapping(&maps, iova, last).collect();
        if let Some(cut) = inside.iter().find(|map| map.iova < iova || map.last() > last) {
            return Err(MemoryError::Cut { iova, length, existing: *cut });
        }
        for map in &inside {
            maps.remove(&map.iova);
            self.sharers().remove(&map.iova);
        }
        Ok(inside)
    }

    /// Ascending.
    pub fn mappings(&self) -> Vec<IovaMapping> {
        self.read_maps().values().copied().collect()
    }

    /// Reads as a device would. The range may cross adjacent maps; when any byte of it cannot be read, none is.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let (pieces, result) = self.resolve(iova, data.len() as u64, Access::Read);
        result?;
        for piece in pieces.iter() {
            let part = &mut data[piece.at as usize..][..piece.length as usize];
            self.ram.dma_mapping().read(piece.ram_offset, part)?;
        }
        Ok(())
    }

    /// Writes as a device would, and marks the pages dirty once the bytes are there. When any byte of the range cannot be
    /// written, none is.
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), MemoryError> {
        let (pieces, result) = self.resolve(iova, data.len() as u64, Access::Write);
        result?;
        for piece in pieces.iter() {
            let part = &data[piece.at as usize..][..piece.length as usize];
            self.ram.dma_mapping().write(piece.ram_offset, part)?;
            self.log.mark_bytes(piece.ram_offset, piece.length)?;
        }
        Ok(())
    }

    /// Marks the pages that `length` bytes at `iova` touch, whatever the maps allow. Where part of the range is not
    /// mapped the rest is marked, and then it is an error.
    pub fn mark_dirty(&self, iova: u64, length: u64) -> Result<(), MemoryError> {
        let (pieces, result) = self.resolve(iova, length, Access::Mark);
        for piece in pieces.iter() {
            self.log.mark_bytes(piece.ram_offset, piece.length)?;
        }
        result
    }

    /// ORs a tracker's report in: bit i of `bitmap` is the bytes `[iova + i * page_size, + page_size)`, cut off at `length`.
    /// `page_size` is a power of two that `iova` is a multiple of. A report that cannot be understood (wrong page size,
    /// too few words, bits beyond the range) makes the whole range dirty, and is an error; bits for addresses that are
    /// not mapped are an error after the others are marked.
    pub fn mark_bitmap(&self, iova: u64, length: u64, page_size: u64, bitmap: &[u64]) -> Result<(), MemoryError> {
        if let Err(error) = check_report(iova, length, page_size, bitmap) {
            // Unknown is dirty. The report's own error says more than that part of its range is not mapped.
            let _unmapped = self.mark_dirty(iova, length);
            return Err(error);
        }
        if page_size != PAGE_SIZE {
            return self.mark_report_runs(iova, length, page_size, bitmap);
        }
        let (pieces, whole) = self.resolve(iova, length, Access::Mark);
        let mut covered = 0;
        for piece in pieces.iter() {
            // Maps and reports both begin on page boundaries here, so that bit and page correspond one to one.
            let bits = piece.length.div_ceil(PAGE_SIZE);
            self.log.merge_bits(piece.ram_offset / PAGE_SIZE, bitmap, piece.at / PAGE_SIZE, bits)?;
            covered += set_bits(bitmap, piece.at / PAGE_SIZE, bits);
        }
        if whole.is_err() && covered != set_bits(bitmap, 0, length.div_ceil(PAGE_SIZE)) { whole } else { Ok(()) }
    }

    /// The same for a page size that is not the log's, run by run.
    fn mark_report_runs(&self, iova: u64, length: u64, page_size: u64, bitmap: &[u64]) -> Result<(), MemoryError> {
        let mut result = Ok(());
        for run in Runs::new(bitmap, 0) {
            let start = run.first * page_size;
            let bytes = (run.count.saturating_mul(page_size)).min(length - start);
            result = result.and(self.mark_dirty(iova + start, bytes));
        }
        result
    }

    /// Looks a range up: the parts that are mapped with this access, and an error when that is not all of it. The first
    /// address that fails is the one that is named.
    fn resolve(&self, iova: u64, length: u64, access: Access) -> (Pieces, Result<(), MemoryError>) {
        let mut pieces = Pieces::default();
        if length == 0 {
            return (pieces, Ok(()));
        }
        let (last, mut result) = match last_of(iova, length) {
            Ok(last) => (last, Ok(())),
            Err(error) => (u64::MAX, Err(error)),
        };
        let mut next = Some(iova);
        let maps = self.read_maps();
        for map in overlapping(&maps, iova, last) {
            let (from, to) = (map.iova.max(iova), map.last().min(last));
            if next != Some(from) {
                result = result.and(Err(MemoryError::Unmapped { iova: next.unwrap_or(from) }));
            }
            let allowed = match access {
                Access::Read => map.read,
                Access::Write => map.write,
                Access::Mark => true,
            };
            if allowed {
                let ram_offset = map.ram_offset + (from - map.iova);
                pieces.push(Piece { at: from - iova, ram_offset, length: to - from + 1 });
            } else {
                result = result.and(Err(MemoryError::Denied { iova: from }));
            }
            next = to.checked_add(1);
        }
        if let Some(next) = next
            && next <= last
        {
            result = result.and(Err(MemoryError::Unmapped { iova: next }));
        }
        (pieces, result)
    }

    fn read_maps(&self) -> RwLockReadGuard<'_, BTreeMap<u64, IovaMapping>> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_maps(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, IovaMapping>> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last address of a range that is not empty.
fn last_of(iova: u64, length: u64) -> Result<u64, MemoryError> {
    iova.checked_add(length - 1).ok_or(MemoryError::Overflow { iova, length })
}

/// Maps that share an address with `iova ..= last`, ascending.
fn overlapping(maps: &BTreeMap<u64, IovaMapping>, iova: u64, last: u64) -> impl Iterator<Item = IovaMapping> {
    let begins_before = maps.range(..iova).next_back().filter(|(_, map)| map.last() >= iova);
    begins_before.into_iter().chain(maps.range(iova..=last)).map(|(_, map)| *map)
}

fn check_report(iova: u64, length: u64, page_size: u64, bitmap: &[u64]) -> Result<(), MemoryError> {
    if !page_size.is_power_of_two() || !iova.is_multiple_of(page_size) {
        return Err(MemoryError::Misaligned { iova, length, granule: page_size });
    }
    if length != 0 {
        last_of(iova, length)?;
    }
    let bits = length.div_ceil(page_size);
    let words = bitmap.len() as u64;
    if words < bits.div_ceil(64) || set_bits(bitmap, bits, words * 64 - bits) != 0 {
        return Err(MemoryError::Bitmap { words: bitmap.len(), bits });
    }
    Ok(())
}

/// Set bits among `count` from `from`, which lie inside `words`.
fn set_bits(words: &[u64], from: u64, count: u64) -> u64 {
    let bits = bitvec::slice::BitSlice::<u64, bitvec::order::Lsb0>::from_slice(words);
    bits[from as usize..(from + count) as usize].count_ones() as u64
}

#[cfg(all(test, not(loom)))]
#[path = "space_tests.rs"]
mod tests;
