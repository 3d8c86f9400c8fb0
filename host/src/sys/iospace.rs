//! I/O address spaces: a type1 container or an iommufd's IOAS, and the memory that devices reach through them.
//!
//! **Owns** the kernel's handle and a reference to every mapped block of memory, so that what a device can write stays
//! mapped in this process for as long. **Must never** drop that reference before the kernel has unmapped.
//! Several devices of one VM share a space: the first map of a range reaches the kernel, equal maps of other devices
//! join it, and it is unmapped when the last has left.
//!
//! States of an entry: `busy` while the kernel maps or unmaps it, else mapped.
//! Locks: `entries`, never held across an ioctl; whoever meets a busy entry waits for it, with a deadline.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::{self, Errno};
use vfio_bindings::bindings::vfio::*;

use super::ioctl::{with_pointer, with_value};
use super::{Mapping, iommufd, vfio};

const CHECK_EXTENSION: u8 = VFIO_BASE as u8 + 1;
const SET_IOMMU: u8 = VFIO_BASE as u8 + 2;
const GET_API_VERSION: u8 = VFIO_BASE as u8;
const IOMMU_GET_INFO: u8 = VFIO_BASE as u8 + 12;
const IOMMU_MAP_DMA: u8 = VFIO_BASE as u8 + 13;
const IOMMU_UNMAP_DMA: u8 = VFIO_BASE as u8 + 14;

/// How long to wait for another thread's map or unmap of the same range. Pinning takes about a second for 100 GiB.
const BUSY_WAIT: Duration = Duration::from_secs(60);

/// Memory to be mapped: `length` bytes of `memory` from `offset`, at `iova`.
#[derive(Debug, Clone)]
pub struct IoMap {
    pub iova: u64,
    pub length: u64,
    pub memory: Arc<Mapping>,
    pub offset: u64,
    pub read: bool,
    pub write: bool,
}

impl IoMap {
    fn last(&self) -> u64 {
        self.iova + (self.length - 1)
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.iova, self.length, self.offset, self.read, self.write)
            == (other.iova, other.length, other.offset, other.read, other.write)
            && self.memory.address() == other.memory.address()
    }
}

#[derive(Debug)]
enum Handle {
    Container(OwnedFd),
    Ioas {
        iommufd: OwnedFd,
        id: u32,
    },
    /// Tests of the table
    #[cfg(test)]
    Fake(Mutex<Vec<(u64, u64)>>),
}

#[derive(Debug)]
struct Entry {
    map: IoMap,
    users: Vec<u64>,
    busy: bool,
}

/// An I/O address space with the memory mapped into it.
#[derive(Debug)]
pub struct IoSpace {
    handle: Handle,
    entries: Mutex<BTreeMap<u64, Entry>>,
    settled: Condvar,
}

impl IoSpace {
    /// Over an open `/dev/vfio/vfio`. EPROTO for another API version, EOPNOTSUPP without type1v2.
    pub fn container(container: OwnedFd) -> io::Result<Self> {
        // SAFETY: takes no argument.
        let version = unsafe { with_value(container.as_fd(), GET_API_VERSION, 0) }?;
        if u32::try_from(version) != Ok(VFIO_API_VERSION) {
            return Err(Errno::PROTO);
        }
        // SAFETY: takes a number.
        let type1v2 = unsafe { with_value(container.as_fd(), CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU as usize) }?;
        if type1v2 == 0 {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(Self::new(Handle::Container(container)))
    }

    /// A new IOAS of an open `/dev/iommu`.
    pub fn ioas(fd: OwnedFd) -> io::Result<Self> {
        let id = iommufd::ioas_alloc(fd.as_fd())?;
        Ok(Self::new(Handle::Ioas { iommufd: fd, id }))
    }

    /// A space of nothing, for tests of those who open devices into one.
    #[cfg(test)]
    pub fn fake() -> Self {
        Self::new(Handle::Fake(Mutex::default()))
    }

    fn new(handle: Handle) -> Self {
        Self { handle, entries: Mutex::default(), settled: Condvar::new() }
    }

    /// Container or iommufd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.handle {
            Handle::Container(fd) | Handle::Ioas { iommufd: fd, .. } => fd.as_fd(),
            #[cfg(test)]
            Handle::Fake(_) => unreachable!("a fake has no fd"),
        }
    }

    /// The IOAS's id; `None` for a container.
    pub fn ioas_id(&self) -> Option<u32> {
        match &self.handle {
            Handle::Ioas { id, .. } => Some(*id),
            _ => None,
        }
    }

    /// Container: chooses type1v2. After the first group has joined, and again when all had left.
    pub fn set_type1v2(&self) -> io::Result<()> {
        // SAFETY: takes a number.
        unsafe { with_value(self.fd(), SET_IOMMU, VFIO_TYPE1v2_IOMMU as usize) }.map(drop)
    }

    /// Container: `VFIO_IOMMU_GET_INFO`, with the capability chain behind the structure.
    pub fn type1_info(&self) -> io::Result<(vfio_iommu_type1_info, Vec<u8>)> {
        let header = |argsz| vfio_iommu_type1_info { argsz, ..Default::default() };
        vfio::with_chain(self.fd(), IOMMU_GET_INFO, header, |info| info.argsz)
    }

    /// Maps for `user`. EEXIST when the range overlaps a map that is not equal, or that this user has already.
    pub fn map(&self, user: u64, map: &IoMap) -> io::Result<()> {
        let inside = map.offset.checked_add(map.length).is_some_and(|end| end <= map.memory.len());
        if map.length == 0 || map.iova.checked_add(map.length - 1).is_none() || !inside || !(map.read || map.write) {
            return Err(Errno::INVAL);
        }
        let mut entries = self.lock_settled(map.iova, map.last())?;
        let mut overlaps = overlapping_mut(&mut entries, map.iova, map.last());
        match (overlaps.next(), overlaps.next()) {
            (None, _) => {}
            (Some(entry), None) if entry.map.is_same(map) && !entry.users.contains(&user) => {
                entry.users.push(user);
                return Ok(());
            }
            _ => return Err(Errno::EXIST),
        }
        drop(overlaps);
        entries.insert(map.iova, Entry { map: map.clone(), users: vec![user], busy: true });
        drop(entries);

        let result = self.kernel_map(map);
        let mut entries = self.lock();
        match &result {
            Ok(()) => {
                if let Some(entry) = entries.get_mut(&map.iova) {
                    entry.busy = false;
                }
            }
            Err(_) => drop(entries.remove(&map.iova)),
        }
        self.settled.notify_all();
        result
    }

    /// Takes `user` out of its maps inside the range; what nobody uses any more is unmapped. EINVAL, and nothing
    /// happens, when one of the user's maps is cut.
    pub fn unmap(&self, user: u64, iova: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Err(Errno::INVAL);
        }
        let last = iova.checked_add(length - 1).ok_or(Errno::INVAL)?;
        self.leave(user, iova, last)
    }

    /// Takes `user` out of all its maps: its device is being closed.
    pub fn forget(&self, user: u64) -> io::Result<()> {
        self.leave(user, 0, u64::MAX)
    }

    fn leave(&self, user: u64, iova: u64, last: u64) -> io::Result<()> {
        let mut entries = self.lock_settled(iova, last)?;
        let mine = |entry: &Entry| entry.users.contains(&user);
        if overlapping_mut(&mut entries, iova, last).any(|e| mine(e) && (e.map.iova < iova || e.map.last() > last)) {
            return Err(Errno::INVAL);
        }
        let mut leaving = Vec::new();
        for entry in overlapping_mut(&mut entries, iova, last).filter(|entry| mine(entry)) {
            if entry.users.len() > 1 {
                entry.users.retain(|other| *other != user);
            } else {
                entry.busy = true;
                leaving.push((entry.map.iova, entry.map.length));
            }
        }
        drop(entries);
        self.finish_unmap(leaving)
    }

    fn finish_unmap(&self, leaving: Vec<(u64, u64)>) -> io::Result<()> {
        let mut outcome = Ok(());
        for (iova, length) in leaving {
            let result = self.kernel_unmap(iova, length);
            let mut entries = self.lock();
            match result {
                Ok(()) => drop(entries.remove(&iova)),
                // Still mapped, so the memory stays referenced.
                Err(errno) => {
                    if let Some(entry) = entries.get_mut(&iova) {
                        entry.busy = false;
                    }
                    outcome = outcome.and(Err(errno));
                }
            }
            self.settled.notify_all();
        }
        outcome
    }

    fn kernel_map(&self, map: &IoMap) -> io::Result<()> {
        let vaddr = map.memory.address() + map.offset;
        match &self.handle {
            Handle::Container(fd) => {
                let flags = if map.read { VFIO_DMA_MAP_FLAG_READ } else { 0 }
                    | if map.write { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
                let argsz = size_of::<vfio_iommu_type1_dma_map>() as u32;
                let mut call = vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova: map.iova, size: map.length };
                // SAFETY: the handler reads the structure. The memory is a `Mapping`, which has no Rust references, and the
                // entry that the caller inserted keeps it mapped until `kernel_unmap` has succeeded.
                unsafe { with_pointer(fd.as_fd(), IOMMU_MAP_DMA, &raw mut call) }.map(drop)
            }
            Handle::Ioas { iommufd, id } => {
                let access = (map.read, map.write);
                // SAFETY: as above.
                unsafe { iommufd::ioas_map(iommufd.as_fd(), *id, vaddr, map.length, map.iova, access) }
            }
            #[cfg(test)]
            Handle::Fake(kernel) => fake::map(kernel, map),
        }
    }

    fn kernel_unmap(&self, iova: u64, length: u64) -> io::Result<()> {
        match &self.handle {
            Handle::Container(fd) => {
                let argsz = std::mem::offset_of!(vfio_iommu_type1_dma_unmap, data) as u32;
                let mut call = vfio_iommu_type1_dma_unmap { argsz, iova, size: length, ..Default::default() };
                // SAFETY: the handler reads and writes argsz bytes of the structure.
                unsafe { with_pointer(fd.as_fd(), IOMMU_UNMAP_DMA, &raw mut call) }?;
                if call.size == length { Ok(()) } else { Err(Errno::INVAL) }
            }
            Handle::Ioas { iommufd, id } => iommufd::ioas_unmap(iommufd.as_fd(), *id, iova, length),
            #[cfg(test)]
            Handle::Fake(kernel) => fake::unmap(kernel, iova, length),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        // Nothing panics while it is held; a poisoned table is still a true one.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table, once no entry in the range is busy. EBUSY after [`BUSY_WAIT`].
    fn lock_settled(&self, iova: u64, last: u64) -> io::Result<MutexGuard<'_, BTreeMap<u64, Entry>>> {
        let deadline = Instant::now() + BUSY_WAIT;
        let mut entries = self.lock();
        while overlapping_mut(&mut entries, iova, last).any(|entry| entry.busy) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::BUSY);
            }
            entries = self.settled.wait_timeout(entries, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(entries)
    }
}

/// Entries that share an address with `iova ..= last`, descending.
fn overlapping_mut(entries: &mut BTreeMap<u64, Entry>, iova: u64, last: u64) -> impl Iterator<Item = &mut Entry> {
    // Disjoint and ascending: the first one that ends before `iova` ends the walk.
    entries.range_mut(..=last).rev().map(|(_, entry)| entry).take_while(move |entry| entry.map.last() >= iova)
}

#[cfg(test)]
mod fake {
    use super::*;

    pub fn map(kernel: &Mutex<Vec<(u64, u64)>>, map: &IoMap) -> io::Result<()> {
        let mut kernel = kernel.lock().unwrap();
        assert!(kernel.iter().all(|(iova, length)| iova + (length - 1) < map.iova || *iova > map.last()));
        if map.iova == 0xbad_0000 {
            return Err(Errno::NOSPC);
        }
        kernel.push((map.iova, map.length));
        Ok(())
    }

    pub fn unmap(kernel: &Mutex<Vec<(u64, u64)>>, iova: u64, length: u64) -> io::Result<()> {
        let mut kernel = kernel.lock().unwrap();
        let before = kernel.len();
        kernel.retain(|entry| *entry != (iova, length));
        if kernel.len() + 1 == before { Ok(()) } else { Err(Errno::NOENT) }
    }
}

#[cfg(test)]
#[path = "iospace_tests.rs"]
mod tests;
