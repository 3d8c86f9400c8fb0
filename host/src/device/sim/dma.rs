//! What a model may reach, and what it tried to reach in vain.

use std::collections::BTreeMap;

use rustix::io::Errno;

use crate::device::DmaMap;
use crate::sys::DmaMemory;

const PAGE_SIZE: u64 = 4096;
/// Faults that are kept; counting goes on beyond it.
const FAULTS_MAX: usize = 1024;

/// Why a transfer, or a part of one, did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaFaultKind {
    /// COMMAND.BUS_MASTER was off
    BusMasterOff,
    /// The device was suspended
    Suspended,
    /// Nothing is mapped there
    Unmapped,
    /// The map does not allow this direction
    Denied,
    /// The device's own side of the transfer lies outside its buffer; `iova` is that address
    OutsideBuffer,
}

/// A transfer that an IOMMU, or the device itself, refused. No byte of it moved, unless its memory went away meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaFault {
    pub kind: DmaFaultKind,
    pub iova: u64,
    pub length: u64,
    /// The device wanted to write memory
    pub write: bool,
}

#[derive(Debug, Default)]
pub(super) struct DmaSpace {
    /// By iova; disjoint
    maps: BTreeMap<u64, DmaMap>,
    faults: Vec<DmaFault>,
}

/// Bytes that a device moves, out of memory or into it. A part of it that lies with a client waits for him: it is moved
/// ([`Ask::perform`]) while the model is not locked.
#[derive(Debug)]
pub(super) struct Transfer {
    iova: u64,
    data: Vec<u8>,
    /// To memory
    write: bool,
    done: usize,
    /// What was written: iova and length
    written: Vec<(u64, u64)>,
}

/// A part that waits for somebody.
#[derive(Debug)]
pub(super) struct Ask {
    memory: DmaMemory,
    /// In `memory`
    offset: u64,
    length: usize,
}

impl Transfer {
    /// Reads into what it is given, as far as there is something to read.
    pub(super) fn from_memory(iova: u64, data: Vec<u8>) -> Self {
        Self { iova, data, write: false, done: 0, written: Vec::new() }
    }

    pub(super) fn to_memory(iova: u64, data: Vec<u8>) -> Self {
        Self { write: true, ..Self::from_memory(iova, data) }
    }

    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }

    pub(super) fn written(&self) -> &[(u64, u64)] {
        &self.written
    }

    /// Where it is. The bus wraps at 2^64, and so does a device's address counter.
    fn at(&self) -> u64 {
        self.iova.wrapping_add(self.done as u64)
    }

    fn left(&self) -> u64 {
        (self.data.len() - self.done) as u64
    }

    fn copy(&mut self, memory: &DmaMemory, offset: u64, length: usize) -> Result<(), DmaFaultKind> {
        let part = &mut self.data[self.done..self.done + length];
        let copied = if self.write { memory.write(offset, part) } else { memory.read(offset, part) };
        if copied.is_err() && self.write {
            // Nobody knows how much of it was.
            self.written.push((self.at(), length as u64));
        }
        // Where the memory went away it is as if it were unmapped.
        copied.map_err(|_| DmaFaultKind::Unmapped)
    }
}

impl Ask {
    /// Under no lock.
    pub(super) fn perform(&self, transfer: &mut Transfer) -> Result<(), DmaFaultKind> {
        crate::lock_order::calling_out();
        transfer.copy(&self.memory, self.offset, self.length)
    }
}

impl DmaSpace {
    pub(super) fn map(&mut self, map: &DmaMap) -> Result<(), Errno> {
        let aligned = [map.iova, map.length, map.offset].iter().all(|value| value.is_multiple_of(PAGE_SIZE));
        let inside = map.offset.checked_add(map.length).is_some_and(|end| end <= map.memory.len());
        if map.length == 0 || !aligned || !inside || !(map.read || map.write) {
            return Err(Errno::INVAL);
        }
        let last = map.iova.checked_add(map.length - 1).ok_or(Errno::INVAL)?;
        if self.maps.range(..=last).next_back().is_some_and(|(_, before)| last_of(before) >= map.iova) {
            return Err(Errno::EXIST);
        }
        self.maps.insert(map.iova, map.clone());
        Ok(())
    }

    pub(super) fn unmap(&mut self, iova: u64, length: u64) -> Result<(), Errno> {
        let last = length.checked_sub(1).and_then(|length| iova.checked_add(length)).ok_or(Errno::INVAL)?;
        let cut = |at: u64| {
            let before = self.maps.range(..at).next_back();
            before.is_some_and(|(_, map)| last_of(map) >= at)
        };
        if cut(iova) || last.checked_add(1).is_some_and(cut) {
            return Err(Errno::INVAL);
        }
        // Not `retain`: a client may have many.
        self.maps.extract_if(iova..=last, |_, _| true).for_each(drop);
        Ok(())
    }

    /// Goes on with a transfer until it is done, or somebody has to be asked: then [`Self::answered`] takes the answer. Parts
    /// that are not mapped are recorded and skipped; the others move, in ascending order. `stopped`: the device may not use the bus.
    pub(super) fn advance(&mut self, transfer: &mut Transfer, stopped: Option<DmaFaultKind>) -> Option<Ask> {
        if let Some(kind) = stopped {
            let length = transfer.left();
            self.moved(transfer, length as usize, Err(kind));
            return None;
        }
        while transfer.left() > 0 {
            let (at, left) = (transfer.at(), transfer.left());
            let found = self.maps.range(..=at).next_back().map(|(_, map)| map).filter(|map| last_of(map) >= at);
            let part = match found {
                Some(map) => left.min((last_of(map) - at).saturating_add(1)),
                None => left.min(self.maps.range(at..).next().map_or(left, |(next, _)| next - at)),
            } as usize;
            let moved = match found {
                None => Err(DmaFaultKind::Unmapped),
                Some(map) if !(if transfer.write { map.write } else { map.read }) => Err(DmaFaultKind::Denied),
                Some(map) => {
                    let offset = map.offset + (at - map.iova);
                    if map.memory.waits() {
                        return Some(Ask { memory: map.memory.clone(), offset, length: part });
                    }
                    transfer.copy(&map.memory, offset, part)
                }
            };
            self.moved(transfer, part, moved);
        }
        None
    }

    /// What became of the next `length` bytes.
    fn moved(&mut self, transfer: &mut Transfer, length: usize, moved: Result<(), DmaFaultKind>) {
        let (iova, bytes, write) = (transfer.at(), length as u64, transfer.write);
        match moved {
            Ok(()) if write => transfer.written.push((iova, bytes)),
            Ok(()) => {}
            Err(kind) => self.fault(DmaFault { kind, iova, length: bytes, write }),
        }
        transfer.done += length;
    }

    /// The answer to what [`Self::advance`] wanted to ask.
    pub(super) fn answered(&mut self, transfer: &mut Transfer, ask: &Ask, moved: Result<(), DmaFaultKind>) {
        self.moved(transfer, ask.length, moved);
    }

    pub(super) fn fault(&mut self, fault: DmaFault) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(fault);
        }
    }

    pub(super) fn faults(&self) -> Vec<DmaFault> {
        self.faults.clone()
    }
}

/// A map in the table is not empty and does not overflow.
fn last_of(map: &DmaMap) -> u64 {
    map.iova + (map.length - 1)
}
