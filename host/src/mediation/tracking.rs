//! The dirt of one device: who reports it, and how it comes into the VM's log.
//!
//! **Must never** call a page clean on doubt: a failed report, a map made after tracking began, a reset in between make
//! everything dirty that they may hide. Bits go straight into the log, before anything else can fail.

use std::sync::Arc;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;

use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::gate::Class;
use super::lock;
use super::mediator::{Exactness, Origin, TrapMap};
use crate::device::{IovaRange, NativeDmaLogging};
use crate::memory::{AddressSpace, IovaMapping, PAGE_SIZE, Report, Taken};

/// Longest range of one report: its bitmap has 32 KiB. Reports end at its multiples, which no page of a log crosses.
const REPORT_SIZE: u64 = 1 << 30;
/// Largest page that a device's log may grant.
const LOG_PAGE_MAX: u64 = REPORT_SIZE;
/// The uAPI's limit on ranges (`VFIO_DEVICE_FEATURE_DMA_LOGGING_START`): one page of them.
const RANGES_MAX: usize = 256;

/// Where the device's dirt comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// The device's own DMA logging (with the plug-in's reports, if it makes any)
    Native,
    Plugin(Exactness),
    /// Nobody knows: every sync marks all that the device may write
    Everything,
}

/// Tracking that has begun.
#[derive(Debug, Clone)]
pub(super) struct Active {
    source: Tracking,
    /// The page size that the device's log granted: what one of its bits stands for
    native_page: Option<u64>,
    plugin: bool,
    ranges: Vec<IovaRange>,
    /// A reset has ended what was begun
    lost: bool,
    _logging: Option<Arc<Logging>>,
}

/// The VM's log runs for this device.
#[derive(Debug)]
struct Logging {
    memory: Arc<AddressSpace>,
}

impl Logging {
    fn begin(memory: &Arc<AddressSpace>) -> Self {
        memory.begin_log();
        Self { memory: Arc::clone(memory) }
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        self.memory.end_log();
    }
}

impl MediatedDevice {
    /// Begins tracking. The hook table for tracking holds, and every access under the normal one has ended, *before* the
    /// device or the plug-in begins to count: no write falls in between. Starts the log if nobody has: RAM is all dirty then,
    /// a client's memory clean, since he knows that all before is dirty. A failure leaves nothing started. EEXIST when it has
    /// begun already.
    pub fn start_tracking(&self) -> Result<Tracking> {
        self.in_lane(|| self.start_in())
    }

    fn start_in(&self) -> Result<Tracking> {
        if self.is_tracking() {
            return Err(MediationError::refused("tracking twice", Errno::EXIST));
        }
        let logging = Arc::new(Logging::begin(&self.shared.memory));
        self.switch_table(TrapMap::Tracking)?;
        let begun = self.with_pass(Class::Control, || self.begin());
        match begun {
            Ok(active) => {
                let source = active.source;
                *lock(&self.tracking) = Some(Active { _logging: Some(logging), ..active });
                Ok(source)
            }
            Err(error) => {
                self.switch_table(TrapMap::Normal)?;
                Err(error)
            }
        }
    }

    fn begin(&self) -> Result<Active> {
        let ranges = merged(self.shared.mappings());
        let plugin = self.plugin.as_ref().and_then(|plugin| plugin.dirty());
        let mut active = Active {
            source: Tracking::Everything,
            native_page: None,
            plugin: false,
            ranges,
            lost: false,
            _logging: None,
        };
        if active.ranges.is_empty() {
            // Nothing is mapped, and what is mapped later is taken as dirty.
            return Ok(active);
        }
        if let Some(plugin) = &plugin {
            let ranges: Vec<abi::IovaRange> = active
                .ranges
                .iter()
                .map(|range| abi::IovaRange { iova: range.iova, length: range.last - range.iova + 1 })
                .collect();
            let refused = |errno| MediationError::Plugin { what: "dirty tracking", errno };
            plugin.start(self.frame(Origin::Migration), &ranges, PAGE_SIZE).map_err(refused)?;
            active.plugin = true;
            active.source = Tracking::Plugin(plugin.exactness());
        }
        if let Some(native) = self.device().dma_logging() {
            match start_native(native, &active.ranges) {
                Ok(page) => (active.native_page, active.source) = (Some(page), Tracking::Native),
                Err(error) => {
                    if let Some(plugin) = &plugin {
                        plugin.stop(self.frame(Origin::Migration));
                    }
                    return Err(error);
                }
            }
        }
        Ok(active)
    }

    /// ORs what the device has written since the last call into the VM's log. To be called once more after the device has
    /// stopped. A report that fails makes its whole range dirty.
    pub fn sync_dirty(&self) -> Result<()> {
        self.in_lane(|| {
            if !self.is_tracking() {
                return Err(MediationError::refused("a dirty report without tracking", Errno::INVAL));
            }
            self.with_pass(Class::Control, || {
                for map in self.shared.mappings() {
                    self.sync_map(&map);
                }
                Ok(())
            })
        })
    }

    /// What has been written since logging began or the last report, by whichever device of the VM: ORs into `bitmap` one bit
    /// for each `page_size` bytes (a power of two, 4096 at least) of any `length` bytes from `iova` on, a multiple of 4096; bit i
    /// is bit i % 8 of byte i / 8. What this device has not mapped stays clear. The pages are not in the log any more until
    /// what is returned is dropped without having been committed.
    ///
    /// EINVAL for a range, a page size or a bitmap that cannot be, and where nobody tracks.
    pub fn dirty_report(&self, iova: u64, length: u64, page_size: u64, bitmap: &mut [u8]) -> Result<Taken> {
        self.in_lane(|| {
            let mut report = Report::new(iova, length, page_size, bitmap)?;
            if !self.is_tracking() {
                return Err(MediationError::refused("a dirty report without tracking", Errno::INVAL));
            }
            self.with_pass(Class::Control, || {
                let mut taken = Taken::new(&self.shared.memory);
                for map in self.shared.mappings() {
                    if let Some((first, last)) = report.part_of(&map) {
                        self.sync_part(&map, IovaRange { iova: first, last });
                        taken.take(&map, &mut report);
                    }
                }
                Ok(taken)
            })
        })
    }

    /// One map's dirt, whatever happens. Nothing is done while nobody tracks.
    pub(super) fn sync_map(&self, map: &IovaMapping) {
        self.sync_part(map, IovaRange { iova: map.iova, last: map.iova + (map.length - 1) });
    }

    /// The same of whole pages of it.
    fn sync_part(&self, map: &IovaMapping, part: IovaRange) {
        let Some(active) = lock(&self.tracking).clone() else { return };
        if !map.write {
            return;
        }
        let IovaRange { iova: first, last } = part;
        let logged = active.ranges.iter().find(|range| range.iova <= first && last <= range.last);
        let Some(logged) = logged.filter(|_| !active.lost && active.source != Tracking::Everything) else {
            return self.mark(map.ram_offset + (first - map.iova), last - first + 1);
        };
        let mut at = first;
        loop {
            let end = last.min(at | (REPORT_SIZE - 1));
            self.sync_range(&active, logged, IovaRange { iova: at, last: end }, map.ram_offset + (at - map.iova));
            if end == last {
                return;
            }
            at = end + 1;
        }
    }

    fn sync_range(&self, active: &Active, logged: &IovaRange, range: IovaRange, ram_offset: u64) {
        let (iova, length) = (range.iova, range.last - range.iova + 1);
        let pages = length / PAGE_SIZE;
        let mut words = vec![0u64; pages.div_ceil(64) as usize];
        let mut failed = false;
        if active.plugin
            && let Some(plugin) = self.plugin.as_ref().and_then(|plugin| plugin.dirty())
        {
            failed |= plugin.report(self.frame(Origin::Migration), iova, length, PAGE_SIZE, &mut words).is_err();
        }
        if let (Some(page), Some(native)) = (active.native_page, self.device().dma_logging()) {
            failed |= self.native_report(native, page, logged, range, &mut words).is_err();
        }
        let tail = pages % 64;
        if tail != 0
            && let Some(last) = words.last_mut()
        {
            // Bits beyond the range would be somebody else's pages.
            *last &= (1 << tail) - 1;
        }
        if failed || self.shared.memory.log().merge(ram_offset / PAGE_SIZE, &words).is_err() {
            self.mark(ram_offset, length);
        }
    }

    /// ORs what the device's log has of `range` into `words`. Being told of a page of the log clears it: one that reaches beyond
    /// the range is asked for as far as it is logged, and marked whole, wherever it is mapped.
    fn native_report(
        &self,
        native: &dyn NativeDmaLogging,
        page: u64,
        logged: &IovaRange,
        range: IovaRange,
        words: &mut [u64],
    ) -> Result<()> {
        let (lower, upper) = (range.iova & !(page - 1), range.last | (page - 1));
        if page <= PAGE_SIZE || (lower, upper) == (range.iova, range.last) {
            return Ok(native.report(range, PAGE_SIZE, words)?);
        }
        let asked = IovaRange { iova: lower.max(logged.iova), last: upper.min(logged.last) };
        let bit_of = |iova: u64| (iova - asked.iova) / PAGE_SIZE;
        let mut all = vec![0u64; (bit_of(asked.last) / 64 + 1) as usize];
        let reported = native.report(asked, PAGE_SIZE, &mut all);
        let is_dirty = |bit: u64| all[(bit / 64) as usize] >> (bit % 64) & 1 != 0;
        for bit in bit_of(range.iova)..=bit_of(range.last) {
            let own = bit - bit_of(range.iova);
            words[(own / 64) as usize] |= u64::from(is_dirty(bit)) << (own % 64);
        }
        // The first page of the log and the last one, which may be the same.
        for first in [lower, upper - (page - 1)] {
            let edge = IovaRange { iova: first, last: first + (page - 1) };
            let mut bits = bit_of(edge.iova.max(asked.iova))..=bit_of(edge.last.min(asked.last));
            if reported.is_err() || bits.any(is_dirty) {
                self.mark_mapped(edge);
            }
        }
        Ok(reported?)
    }

    /// Marks what is mapped in this range for the device to write.
    fn mark_mapped(&self, range: IovaRange) {
        for map in self.shared.mappings().iter().filter(|map| map.write) {
            let (first, last) = (range.iova.max(map.iova), range.last.min(map.iova + (map.length - 1)));
            if first <= last {
                self.mark(map.ram_offset + (first - map.iova), last - first + 1);
            }
        }
    }

    fn mark(&self, ram_offset: u64, length: u64) {
        // Maps lie inside RAM: it cannot be out of range.
        let marked = self.shared.memory.log().mark_bytes(ram_offset, length);
        debug_assert!(marked.is_ok(), "{marked:?}");
    }

    /// Ends tracking and goes back to the normal hook table. Harmless when it has not begun.
    pub fn stop_tracking(&self) {
        let stopped = self.lane.enter(self.drain_deadline()).map_err(MediationError::from).and_then(|_token| {
            let Some(active) = lock(&self.tracking).take() else { return Ok(()) };
            let ended = self.with_pass(Class::Control, || Ok(self.end_tracking(&active)?));
            self.switch_table(TrapMap::Normal).and(ended)
        });
        if let Err(error) = stopped {
            tracing::warn!(device = %self.identity().name, %error, "ending dirty tracking");
        }
        self.attend();
    }

    /// Nothing of it is started afterwards, as far as the device still answers.
    pub(super) fn end_tracking(&self, active: &Active) -> crate::device::Result<()> {
        if active.plugin
            && let Some(plugin) = self.plugin.as_ref().and_then(|plugin| plugin.dirty())
        {
            plugin.stop(self.frame(Origin::Migration));
        }
        match self.device().dma_logging() {
            Some(native) if active.native_page.is_some() && !active.lost => native.stop(),
            _ => Ok(()),
        }
    }

    /// The device was reset: whatever it counted is gone.
    pub(super) fn tracking_lost(&self) {
        if let Some(active) = &mut *lock(&self.tracking) {
            active.lost = true;
        }
    }
}

/// Starts the device's log; the page size that it grants. One that cannot be a page's is refused, and the log stopped.
fn start_native(native: &dyn NativeDmaLogging, ranges: &[IovaRange]) -> Result<u64> {
    let page = native.start(ranges, PAGE_SIZE)?;
    if page.is_power_of_two() && page <= LOG_PAGE_MAX {
        return Ok(page);
    }
    native.stop()?;
    Err(MediationError::refused(format!("a dirty log with pages of {page} bytes"), Errno::PROTO))
}

/// Ranges that the device may write, ascending; neighbours made one, and the nearest ones until they are few enough.
fn merged(maps: Vec<IovaMapping>) -> Vec<IovaRange> {
    let mut ranges: Vec<IovaRange> = Vec::new();
    for map in maps.iter().filter(|map| map.write) {
        let last = map.iova + (map.length - 1);
        match ranges.last_mut() {
            Some(before) if before.last + 1 == map.iova => before.last = last,
            _ => ranges.push(IovaRange { iova: map.iova, last }),
        }
    }
    while ranges.len() > RANGES_MAX {
        let gap = |at: &usize| ranges[at + 1].iova - ranges[*at].last;
        let Some(at) = (0..ranges.len() - 1).min_by_key(gap) else { break };
        ranges[at].last = ranges.remove(at + 1).last;
    }
    ranges
}
