//! A VM's memory as its devices see it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::clients::{Backing, Clients};
use super::drain::Runs;
use super::{DirtyLog, GuestRam, MemoryError, PAGE_SIZE};

/// Most maps of one VM; the kernel's own limit for a type1 container.
pub const MAPS_MAX: usize = 65_535;

/// `length` bytes of RAM from `ram_offset`, seen by devices at `iova`. All three are multiples of [`PAGE_SIZE`], and
/// `length` is not 0. `read` and `write` say what a *device* may do. Of a client's memory, `ram_offset` is its place in the
/// dirty log, and nothing else.
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
    pub(super) fn last(&self) -> u64 {
        self.iova + (self.length - 1)
    }
}

/// Whose memory it is.
#[derive(Debug)]
pub(super) enum Kind {
    /// This process's: one block
    Ram(Arc<GuestRam>),
    /// Clients bring it, a block for each map
    Clients(Clients),
}

/// A VM's memory: what it is made of, IOVA map, dirty log.
#[derive(Debug)]
pub struct AddressSpace {
    pub(super) kind: Kind,
    pub(super) log: DirtyLog,
    maps: RwLock<Maps>,
    /// How many have begun to log and not ended
    loggers: Mutex<u32>,
}

/// By iova; disjoint.
pub(super) type Maps = BTreeMap<u64, Entry>;

/// A map, and who holds it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) map: IovaMapping,
    /// Of RAM: how many hold it besides the first
    pub(super) others: u32,
    pub(super) backing: Backing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    /// Marking: whoever wrote there was allowed to, or did it anyway.
    Mark,
}

/// Part of a range of addresses that one map covers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Piece {
    /// From the range's first address
    pub(super) at: u64,
    pub(super) ram_offset: u64,
    pub(super) length: u64,
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
    /// Over this process's own RAM. Nothing is mapped and the log is stopped.
    pub fn new(ram: Arc<GuestRam>) -> Arc<Self> {
        let pages = ram.pages();
        Self::of(Kind::Ram(ram), pages)
    }

    pub(super) fn of(kind: Kind, pages: u64) -> Arc<Self> {
        let (log, maps) = (DirtyLog::new(pages), RwLock::default());
        Arc::new(Self { kind, log, maps, loggers: Mutex::default() })
    }

    /// `None`: the memory is the clients', who map it piece by piece.
    pub fn ram(&self) -> Option<&Arc<GuestRam>> {
        match &self.kind {
            Kind::Ram(ram) => Some(ram),
            Kind::Clients(_) => None,
        }
    }

    /// The RAM, for those who cannot do without.
    pub fn own_ram(&self) -> Result<&Arc<GuestRam>, MemoryError> {
        self.ram().ok_or(MemoryError::NoRam)
    }

    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// Starts the log, or joins those who have: all of RAM is dirty then, and nothing of a client's memory, which he takes
    /// as dirty himself. Each begin has its [`Self::end_log`].
    pub fn begin_log(&self) {
        let mut loggers = self.loggers.lock().unwrap_or_else(PoisonError::into_inner);
        *loggers += 1;
        match &self.kind {
            Kind::Ram(_) if !self.log.is_tracking() => self.log.start(),
            Kind::Clients(_) if *loggers == 1 => self.log.start_clean(),
            _ => {}
        }
    }

    /// The log of clients' memory stops with the last who had begun it. That of RAM is stopped by whoever migrates it.
    pub fn end_log(&self) {
        let mut loggers = self.loggers.lock().unwrap_or_else(PoisonError::into_inner);
        *loggers = loggers.saturating_sub(1);
        if *loggers == 0 && matches!(self.kind, Kind::Clients(_)) {
            self.log.stop();
        }
    }

    /// Adds a map of RAM. Refused: misaligned or empty, beyond the last address, outside RAM, without any access,
    /// overlapping a map (which the error names), one map too many; anything, where there is no RAM.
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
        let Some(entry) = maps.get_mut(&map.iova).filter(|entry| entry.map == *map) else { return };
        match entry.others.checked_sub(1) {
            Some(others) => entry.others = others,
            None => drop(maps.remove(&map.iova)),
        }
    }

    fn insert(&self, map: IovaMapping, joins: bool) -> Result<(), MemoryError> {
        let Kind::Ram(ram) = &self.kind else { return Err(MemoryError::NoRam) };
        let IovaMapping { length, ram_offset, .. } = map;
        if !ram_offset.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Misaligned { iova: map.iova, length, granule: PAGE_SIZE });
        }
        let last = check_map(&map)?;
        if ram_offset.checked_add(length).is_none_or(|end| end > ram.size()) {
            return Err(MemoryError::OutsideRam { ram_offset, length, size: ram.size() });
        }
        let mut maps = self.write_maps();
        if let Some(before) = last_before(&mut maps, map.iova, last) {
            if joins && before.map == map {
                before.others += 1;
                return Ok(());
            }
            return Err(MemoryError::Overlap { iova: map.iova, length, existing: before.map });
        }
        if maps.len() >= MAPS_MAX {
            return Err(MemoryError::TooManyMaps);
        }
        maps.insert(map.iova, Entry { map, others: 0, backing: Backing::Ram });
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
        let inside: Vec<IovaMapping> = overlapping(&maps, iova, last).map(|entry| entry.map).collect();
        if let Some(cut) = inside.iter().find(|map| map.iova < iova || map.last() > last) {
            return Err(MemoryError::Cut { iova, length, existing: *cut });
        }
        let removed: Vec<Entry> = inside.iter().filter_map(|map| maps.remove(&map.iova)).collect();
        drop(maps);
        match &self.kind {
            Kind::Ram(_) => {}
            Kind::Clients(clients) => clients.retire(removed, &self.log, |_| {})?,
        }
        Ok(inside)
    }

    /// Ascending.
    pub fn mappings(&self) -> Vec<IovaMapping> {
        self.read_maps().values().map(|entry| entry.map).collect()
    }

    /// Reads as a device would. The range may cross adjacent maps; when any byte of it cannot be read, none is. Where a
    /// client takes its memory away meanwhile, or does not answer, some may have been.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let Kind::Ram(ram) = &self.kind else { return self.read_clients(iova, data) };
        let (pieces, result) = self.resolve(iova, data.len() as u64, Access::Read);
        result?;
        for piece in pieces.iter() {
            let part = &mut data[piece.at as usize..][..piece.length as usize];
            ram.dma_mapping().read(piece.ram_offset, part)?;
        }
        Ok(())
    }

    /// Writes as a device would, and marks the pages dirty once the bytes are there. When any byte of the range cannot be
    /// written, none is; as in [`Self::read`] for a client's memory, of which then all pages are marked.
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), MemoryError> {
        let Kind::Ram(ram) = &self.kind else { return self.write_clients(iova, data) };
        let (pieces, result) = self.resolve(iova, data.len() as u64, Access::Write);
        result?;
        for piece in pieces.iter() {
            let part = &data[piece.at as usize..][..piece.length as usize];
            ram.dma_mapping().write(piece.ram_offset, part)?;
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

    /// Looks a range up: the parts that are mapped with this access, and an error when that is not all of it.
    fn resolve(&self, iova: u64, length: u64, access: Access) -> (Pieces, Result<(), MemoryError>) {
        let mut pieces = Pieces::default();
        let result = self.look_up(iova, length, access, |piece, _| pieces.push(piece));
        (pieces, result)
    }

    /// Shows each part of a range that is mapped with this access, ascending, while the table is locked. An error when that is
    /// not all of it: the first address that fails is the one that is named.
    pub(super) fn look_up(
        &self,
        iova: u64,
        length: u64,
        access: Access,
        mut found: impl FnMut(Piece, &Entry),
    ) -> Result<(), MemoryError> {
        if length == 0 {
            return Ok(());
        }
        let (last, mut result) = match last_of(iova, length) {
            Ok(last) => (last, Ok(())),
            Err(error) => (u64::MAX, Err(error)),
        };
        let mut next = Some(iova);
        let maps = self.read_maps();
        for entry in overlapping(&maps, iova, last) {
            let map = &entry.map;
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
                found(Piece { at: from - iova, ram_offset, length: to - from + 1 }, entry);
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
        result
    }

    pub(super) fn read_maps(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write_maps(&self) -> RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every map must be. Its last address.
pub(super) fn check_map(map: &IovaMapping) -> Result<u64, MemoryError> {
    let IovaMapping { iova, length, .. } = *map;
    if length == 0 || !iova.is_multiple_of(PAGE_SIZE) || !length.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::Misaligned { iova, length, granule: PAGE_SIZE });
    }
    let last = last_of(iova, length)?;
    if map.read || map.write { Ok(last) } else { Err(MemoryError::NoAccess) }
}

/// The last map that shares an address with `iova ..= last`.
pub(super) fn last_before(maps: &mut Maps, iova: u64, last: u64) -> Option<&mut Entry> {
    maps.range_mut(..=last).next_back().map(|(_, entry)| entry).filter(|entry| entry.map.last() >= iova)
}

/// The last address of a range that is not empty.
fn last_of(iova: u64, length: u64) -> Result<u64, MemoryError> {
    iova.checked_add(length - 1).ok_or(MemoryError::Overflow { iova, length })
}

/// Maps that share an address with `iova ..= last`, ascending.
fn overlapping(maps: &Maps, iova: u64, last: u64) -> impl Iterator<Item = &Entry> {
    let begins_before = maps.range(..iova).next_back().filter(|(_, entry)| entry.map.last() >= iova);
    begins_before.into_iter().chain(maps.range(iova..=last)).map(|(_, entry)| entry)
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
