//! What a model may reach, and what it tried to reach in vain.

use std::collections::BTreeMap;

use rustix::io::Errno;

use crate::device::DmaMap;

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

/// A transfer that an IOMMU, or the device itself, refused. No byte of it moved.
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

/// Bytes that a device moves: into its own buffer, or out of it.
pub(super) enum Transfer<'a> {
    FromMemory(&'a mut [u8]),
    ToMemory(&'a [u8]),
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
        self.maps.retain(|at, _| *at < iova || *at > last);
        Ok(())
    }

    /// Moves bytes at `iova`. Parts that are not mapped are recorded and skipped; the others move, in ascending order.
    /// Returns the ranges (iova, length) that were written.
    pub(super) fn transfer(&mut self, iova: u64, mut bytes: Transfer<'_>) -> Vec<(u64, u64)> {
        let (length, write) = match &bytes {
            Transfer::FromMemory(data) => (data.len() as u64, false),
            Transfer::ToMemory(data) => (data.len() as u64, true),
        };
        let mut written = Vec::new();
        let mut done = 0;
        while done < length {
            // The bus wraps at 2^64, and so does a device's address counter.
            let at = iova.wrapping_add(done);
            let left = length - done;
            let found = self.maps.range(..=at).next_back().map(|(_, map)| map).filter(|map| last_of(map) >= at);
            let part = match found {
                Some(map) => left.min(last_of(map) - at + 1),
                None => left.min(self.maps.range(at..).next().map_or(left, |(next, _)| next - at)),
            };
            let range = done as usize..(done + part) as usize;
            let moved = match (found, &mut bytes) {
                (None, _) => Err(DmaFaultKind::Unmapped),
                (Some(map), Transfer::FromMemory(_)) if !map.read => Err(DmaFaultKind::Denied),
                (Some(map), Transfer::ToMemory(_)) if !map.write => Err(DmaFaultKind::Denied),
                (Some(map), Transfer::FromMemory(data)) => {
                    let moved = map.memory.read(map.offset + (at - map.iova), &mut data[range]);
                    moved.map_err(|_| DmaFaultKind::Unmapped)
                }
                (Some(map), Transfer::ToMemory(data)) => {
                    let moved = map.memory.write(map.offset + (at - map.iova), &data[range]);
                    moved.map_err(|_| DmaFaultKind::Unmapped)
                }
            };
            match moved {
                Ok(()) if write => written.push((at, part)),
                Ok(()) => {}
                Err(kind) => self.fault(DmaFault { kind, iova: at, length: part, write }),
            }
            done += part;
        }
        written
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
