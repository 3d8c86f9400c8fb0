//! The DMA log of a [`Stateful`], as a variant driver's: its report destroys what it reads.

use std::collections::BTreeSet;

use rustix::io::Errno;

use super::stateful::{PAGE_SIZE, Stateful};
use crate::device::{IovaRange, NativeDmaLogging, Result};

/// As the kernel: ranges that fit one page of `struct vfio_device_feature_dma_logging_range`.
const RANGES_MAX: usize = 256;

/// Pages of the log's own size (iova / granted) written inside the ranges since they were last reported.
#[derive(Debug)]
pub(super) struct Log {
    ranges: Vec<IovaRange>,
    granted: u64,
    dirty: BTreeSet<u64>,
}

impl Log {
    pub(super) fn mark(&mut self, iova: u64, length: u64) {
        let last = iova + (length - 1);
        for range in &self.ranges {
            let (from, to) = (range.iova.max(iova), range.last.min(last));
            if from <= to {
                self.dirty.extend(from / self.granted..=to / self.granted);
            }
        }
    }
}

impl NativeDmaLogging for Stateful {
    /// Grants what it was made to grant, whatever is asked for.
    fn start(&self, ranges: &[IovaRange], page_size: u64) -> Result<u64> {
        let _access = self.function.access("stateful log start")?;
        let refused = |errno| self.function.refused(format!("logging {} ranges", ranges.len()), errno);
        if ranges.len() > RANGES_MAX {
            return Err(refused(Errno::TOOBIG));
        }
        if ranges.is_empty() || !page_size.is_power_of_two() || page_size < PAGE_SIZE {
            return Err(refused(Errno::INVAL));
        }
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable();
        let aligned = |range: &IovaRange| {
            range.iova.is_multiple_of(page_size) && range.last.wrapping_add(1).is_multiple_of(page_size)
        };
        let proper = sorted.iter().all(|range| range.iova <= range.last && aligned(range));
        let disjoint = sorted.windows(2).all(|pair| pair[0].last < pair[1].iova);
        let mut state = Stateful::state(self);
        if !proper || !disjoint || state.log.is_some() {
            return Err(refused(Errno::INVAL));
        }
        // 2^64 bytes are a length that the uAPI cannot say.
        if sorted[0].iova == 0 && sorted[0].last == u64::MAX {
            return Err(refused(Errno::OVERFLOW));
        }
        state.log = Some(Log { ranges: sorted, granted: self.log_page_size.max(1), dirty: BTreeSet::new() });
        Ok(self.log_page_size)
    }

    /// EINVAL outside the logged ranges, where nobody knows. What is reported is forgotten, and a failure that a plan
    /// injects comes after that. Of a page of the log that reaches beyond `range` only what is inside is told, and all of it
    /// forgotten.
    fn report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<()> {
        let taken = self.take_dirty(range, page_size, bitmap.len());
        let _access = self.function.access("stateful log report")?;
        for page in taken? {
            let first = page.saturating_mul(self.log_page_size);
            let last = first.saturating_add(self.log_page_size - 1).min(range.last);
            let bit = |iova: u64| (iova.max(range.iova) - range.iova) / page_size;
            for bit in bit(first)..=bit(last) {
                bitmap[(bit / 64) as usize] |= 1 << (bit % 64);
            }
        }
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        let _access = self.function.access("stateful log stop")?;
        let log = Stateful::state(self).log.take();
        log.map(drop).ok_or_else(|| self.function.refused("logging has not started", Errno::INVAL))
    }
}

impl Stateful {
    /// Takes the dirty pages of a range out of the log, after checking that `words` words can hold the answer.
    fn take_dirty(&self, range: IovaRange, page_size: u64, words: usize) -> Result<Vec<u64>> {
        let refused =
            || self.function.refused(format!("report of {:#x}..={:#x}", range.iova, range.last), Errno::INVAL);
        let sized = page_size.is_power_of_two() && page_size >= PAGE_SIZE && range.iova.is_multiple_of(page_size);
        let ordered = range.iova <= range.last;
        if !sized || !ordered || (range.last - range.iova) / page_size / 64 >= words as u64 {
            return Err(refused());
        }
        let mut state = self.state();
        let log = state.log.as_mut().ok_or_else(refused)?;
        if !log.ranges.iter().any(|logged| logged.iova <= range.iova && range.last <= logged.last) {
            return Err(refused());
        }
        let (first, last) = (range.iova / log.granted, range.last / log.granted);
        let taken: Vec<u64> = log.dirty.range(first..=last).copied().collect();
        taken.iter().for_each(|page| {
            log.dirty.remove(page);
        });
        Ok(taken)
    }
}
