//! Dirty pages that a client is being told of.
//!
//! **Owns** what was taken out of the log, until the client is known to have it. **Must never** lose a page: dropped uncommitted,
//! all of them come back.

use std::sync::Arc;

use super::drain::Runs;
use super::{AddressSpace, IovaMapping, MemoryError, PAGE_SIZE};

/// Taken at once: 1 GiB.
const PART_PAGES: u64 = 1 << 18;

/// What a report took out of the dirty log. Dropped, it puts everything back; commit it once the report has been sent in full.
#[must_use = "dropping it puts the pages back"]
#[derive(Debug)]
pub struct Taken {
    memory: Arc<AddressSpace>,
    /// First page, and the bits from there
    parts: Vec<(u64, Vec<u64>)>,
}

/// A report's question: one bit for each `page_size` bytes of `length` from `iova` on; bit i is bit i % 8 of byte i / 8.
#[derive(Debug)]
pub struct Report<'a> {
    iova: u64,
    last: u64,
    page_size: u64,
    bitmap: &'a mut [u8],
}

impl<'a> Report<'a> {
    /// Refused: an empty range, one that does not begin with a page or ends beyond the last address, a page size that is no
    /// power of two or below [`PAGE_SIZE`], and a bitmap with fewer bits than there are pages.
    pub fn new(iova: u64, length: u64, page_size: u64, bitmap: &'a mut [u8]) -> Result<Self, MemoryError> {
        let sized = page_size.is_power_of_two() && page_size >= PAGE_SIZE;
        if length == 0 || !sized || !iova.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Misaligned { iova, length, granule: PAGE_SIZE });
        }
        let last = iova.checked_add(length - 1).ok_or(MemoryError::Overflow { iova, length })?;
        let bits = (length - 1) / page_size + 1;
        if (bitmap.len() as u64) < bits.div_ceil(8) {
            return Err(MemoryError::Bitmap { words: bitmap.len() / 8, bits });
        }
        Ok(Self { iova, last, page_size, bitmap })
    }

    /// The part of a map that is asked for, in whole pages: its first and last address.
    pub fn part_of(&self, map: &IovaMapping) -> Option<(u64, u64)> {
        let (first, last) = (self.iova.max(map.iova), (self.last | (PAGE_SIZE - 1)).min(map.last()));
        (first <= last).then_some((first, last))
    }
}

impl Taken {
    pub fn new(memory: &Arc<AddressSpace>) -> Self {
        Self { memory: Arc::clone(memory), parts: Vec::new() }
    }

    /// Takes what the report asks of one map, and ORs it into the report's bitmap.
    pub fn take(&mut self, map: &IovaMapping, report: &mut Report<'_>) {
        let Some((first, last)) = report.part_of(map) else { return };
        let (mut base, mut page) = (first - report.iova, (map.ram_offset + (first - map.iova)) / PAGE_SIZE);
        let end = page + (last - first) / PAGE_SIZE + 1;
        // In parts, of which the clean ones, most of them, need no memory.
        while page < end {
            let count = PART_PAGES.min(end - page);
            let words = self.memory.log().take_pages(page, count);
            let bit = |page: u64| (base + page * PAGE_SIZE) / report.page_size;
            let mut dirty = false;
            for run in Runs::new(&words, 0) {
                set_bits(report.bitmap, bit(run.first), bit(run.first + run.count - 1));
                dirty = true;
            }
            if dirty {
                self.parts.push((page, words));
            }
            page += count;
            // The last part may end with the last address.
            base = base.wrapping_add(count * PAGE_SIZE);
        }
    }

    /// Of a map that somebody may still write: all of it is dirty.
    pub fn take_all(&mut self, map: &IovaMapping, report: &mut Report<'_>) {
        let Some((first, last)) = report.part_of(map) else { return };
        set_bits(report.bitmap, (first - report.iova) / report.page_size, (last - report.iova) / report.page_size);
    }

    /// The client has been told.
    pub fn commit(mut self) {
        self.parts.clear();
    }

    /// Pages that come back if this is dropped.
    pub fn count(&self) -> u64 {
        self.parts.iter().flat_map(|(_, words)| words).map(|word| u64::from(word.count_ones())).sum()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        for (page, words) in &self.parts {
            // They were in the log. If their map has gone meanwhile, another's pages are dirty without need.
            let restored = self.memory.log().merge(*page, words);
            debug_assert!(restored.is_ok(), "{restored:?}");
        }
    }
}

/// Sets bits `first ..= last`, as far as there are any.
fn set_bits(bitmap: &mut [u8], first: u64, last: u64) {
    let at = |bit: u64| usize::try_from(bit / 8).unwrap_or(usize::MAX);
    let (head, tail) = (0xFF << (first % 8), 0xFF >> (7 - last % 8));
    if at(first) == at(last) {
        if let Some(byte) = bitmap.get_mut(at(first)) {
            *byte |= head & tail;
        }
        return;
    }
    if let Some(byte) = bitmap.get_mut(at(first)) {
        *byte |= head;
    }
    if let Some(between) = bitmap.get_mut(at(first) + 1..at(last)) {
        between.fill(0xFF);
    }
    if let Some(byte) = bitmap.get_mut(at(last)) {
        *byte |= tail;
    }
}

#[cfg(all(test, not(loom)))]
#[path = "taken_tests.rs"]
mod tests;
