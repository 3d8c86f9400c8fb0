//! Memory that clients bring: a block for each map.
//!
//! **Owns** the blocks, their places in the dirty log, and who holds them. **Must never** touch a file that can be cut off by a
//! plain copy, ask a client with a lock held, or give a block's place to another while somebody still copies.
//!
//! A block of a *file* is mapped once, whoever joins it. A block of *messages* has its clients' ways to ask, one for each holder:
//! each device asks its own client, and a hook asks them in turn until one answers.
//! States of a block: mapped, *retired* (not in the table any more; somebody may still copy), gone.
//! Locks: `places`, a leaf; it is taken after the table's lock is let go. `settled` is only waited with.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::client_file::{ClientFile, FileIdentity, Wanted};
use super::extents::Extents;
use super::space::{Access, AddressSpace, Entry, Kind, Maps, Piece, check_map, last_before};
use super::{DirtyLog, IovaMapping, MAPS_MAX, MemoryError, PAGE_SIZE, RAM_SIZE_MAX};
use crate::lock_order;
use crate::sys::{ClientAccess, DmaMemory};

/// Most maps of files in one space: each is a mapping of this process, of which the kernel gives 65,530.
const FILES_MAX: usize = 16_384;
/// How long an unmap waits for copies in flight. They wait for nobody, so that it is long.
const COPY_WAIT: Duration = Duration::from_secs(5);

/// What a client asks for: `length` bytes at `iova`, both multiples of a page. `read` and `write` say what a *device* may do.
#[derive(Debug)]
pub struct ClientMap {
    pub iova: u64,
    pub length: u64,
    pub read: bool,
    pub write: bool,
    pub source: ClientSource,
}

/// Where a client's memory is.
#[derive(Debug)]
pub enum ClientSource {
    /// In a file, from `offset` on, a multiple of a page
    File { fd: OwnedFd, offset: u64 },
    /// With the client
    Messages(Arc<dyn ClientAccess>),
}

/// A client's map that has been joined: what a device is given of it.
#[derive(Debug)]
pub struct Joined {
    pub map: IovaMapping,
    pub memory: DmaMemory,
    /// Where in `memory` the map begins
    pub offset: u64,
}

/// What is behind an entry of the table.
#[derive(Debug)]
pub(super) enum Backing {
    Ram,
    /// And who holds it
    File(Arc<Block>, Vec<u64>),
    /// With whoever holds it
    Messages(Vec<(u64, Arc<dyn ClientAccess>)>),
}

/// A client's file, mapped.
#[derive(Debug)]
pub(super) struct Block {
    identity: FileIdentity,
    memory: DmaMemory,
    inner: u64,
    /// Copies in flight. It only grows while the block is in the table, under the table's lock.
    copies: AtomicU32,
}

/// Places in the log.
#[derive(Debug)]
struct Places {
    free: Extents,
    files: usize,
    /// Not in the table any more. A place is free when nobody copies.
    retired: Vec<Retired>,
}

#[derive(Debug)]
struct Retired {
    map: IovaMapping,
    block: Option<Arc<Block>>,
}

impl Retired {
    fn is_settled(&self) -> bool {
        self.block.as_ref().is_none_or(|block| block.copies.load(Ordering::Acquire) == 0)
    }
}

/// What a space of clients has besides the table.
#[derive(Debug)]
pub(super) struct Clients {
    limit: u64,
    places: Mutex<Places>,
    settled: Mutex<()>,
    idle: Condvar,
    next_holder: AtomicU64,
}

/// A copy in flight.
struct Copying<'a> {
    clients: &'a Clients,
    block: Arc<Block>,
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        if self.block.copies.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Whoever waits has looked before this, and waits by now, or looks after it.
            drop(self.clients.settled());
            self.clients.idle.notify_all();
        }
    }
}

enum Source<'a> {
    File(Copying<'a>),
    Messages(Vec<Arc<dyn ClientAccess>>),
}

/// Part of a transfer.
struct Part<'a> {
    piece: Piece,
    /// From the map's first byte
    within: u64,
    iova: u64,
    source: Source<'a>,
}

impl Part<'_> {
    /// By file, or by the first client that answers.
    fn copy(&self, mut copy: impl FnMut(&DmaMemory, u64) -> Result<(), MemoryError>) -> Result<(), MemoryError> {
        match &self.source {
            Source::File(copying) => copy(&copying.block.memory, copying.block.inner + self.within),
            Source::Messages(clients) => {
                let mut result = Err(MemoryError::Unmapped { iova: self.iova });
                for access in clients {
                    let (iova, length) = (self.iova, self.piece.length);
                    result = copy(&DmaMemory::Messages { access: Arc::clone(access), iova, length }, 0);
                    if result.is_ok() {
                        break;
                    }
                }
                result
            }
        }
    }
}

impl Clients {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settled(&self) -> MutexGuard<'_, ()> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn full(&self, length: u64) -> MemoryError {
        MemoryError::NoRoom { length, limit: self.limit }
    }

    /// A place in the log, with a file or without.
    fn reserve(&self, length: u64, file: bool, log: &DirtyLog) -> Result<u64, MemoryError> {
        let mut places = self.places();
        let gone = places.sweep(log);
        let place = match file && places.files >= FILES_MAX {
            true => Err(MemoryError::TooManyMaps),
            false => places.free.take(length / PAGE_SIZE).ok_or_else(|| self.full(length)),
        };
        places.files += usize::from(file && place.is_ok());
        drop(places);
        // Unmapped under no lock.
        drop(gone);
        Ok(place? * PAGE_SIZE)
    }

    /// A place that was never used.
    fn give_back(&self, ram_offset: u64, length: u64, file: bool) {
        let mut places = self.places();
        places.free.give(ram_offset / PAGE_SIZE, length / PAGE_SIZE);
        places.files -= usize::from(file);
    }

    /// Entries that are not in the table any more. When this returns nobody copies from or to them; EBUSY where somebody does
    /// for so long that he is not waited for: their places stay taken until he ends.
    ///
    /// `last` is told of each when its dirt is complete, and its place still its own.
    pub(super) fn retire(
        &self,
        entries: Vec<Entry>,
        log: &DirtyLog,
        mut last: impl FnMut(&IovaMapping),
    ) -> Result<(), MemoryError> {
        let deadline = Instant::now() + COPY_WAIT;
        let mut result = Ok(());
        for entry in entries {
            let block = match entry.backing {
                Backing::File(block, _) => Some(block),
                _ => None,
            };
            if let Some(block) = &block
                && !self.wait(block, deadline)
            {
                result = Err(MemoryError::Busy { iova: entry.map.iova });
            }
            last(&entry.map);
            self.places().retired.push(Retired { map: entry.map, block });
        }
        let gone = self.places().sweep(log);
        // Unmapped under no lock.
        drop(gone);
        result
    }

    /// Whether nobody copies any more.
    fn wait(&self, block: &Block, deadline: Instant) -> bool {
        let mut settled = self.settled();
        while block.copies.load(Ordering::Acquire) != 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            settled = self.idle.wait_timeout(settled, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Places {
    /// Frees the places that nobody uses any more, clean.
    fn sweep(&mut self, log: &DirtyLog) -> Vec<Retired> {
        let gone: Vec<Retired> = self.retired.extract_if(.., |retired| retired.is_settled()).collect();
        for Retired { map, block } in &gone {
            let (first, count) = (map.ram_offset / PAGE_SIZE, map.length / PAGE_SIZE);
            log.clear_pages(first, count);
            self.free.give(first, count);
            self.files -= usize::from(block.is_some());
        }
        gone
    }
}

impl AddressSpace {
    /// Without memory of its own: clients bring it, `limit` bytes at most at a time (whole pages, up to [`RAM_SIZE_MAX`]). Its
    /// dirty log takes 32 KiB for each GiB of the limit, at once.
    pub fn of_clients(limit: u64) -> Arc<Self> {
        let pages = limit.min(RAM_SIZE_MAX) / PAGE_SIZE;
        let places = Places { free: Extents::new(pages), files: 0, retired: Vec::new() };
        let clients = Clients {
            limit: pages * PAGE_SIZE,
            places: Mutex::new(places),
            settled: Mutex::default(),
            idle: Condvar::new(),
            next_holder: AtomicU64::new(0),
        };
        Self::of(Kind::Clients(clients), pages)
    }

    fn clients(&self) -> Result<&Clients, MemoryError> {
        match &self.kind {
            Kind::Clients(clients) => Ok(clients),
            Kind::Ram(_) => Err(MemoryError::NoClients),
        }
    }

    /// A number for one who joins maps of clients.
    pub fn holder(&self) -> u64 {
        self.clients().map_or(0, |clients| clients.next_holder.fetch_add(1, Ordering::Relaxed))
    }

    /// Adds a client's map, or joins one that is there with the same addresses, rights and memory; memory that only messages
    /// reach is taken for the same. Each holder has a map once, and gives it back with [`Self::leave_client`].
    ///
    /// Refused: what no map may be (EINVAL, EOVERFLOW); an overlap, other memory or other rights, a second time (EEXIST); no room
    /// below the limit, or too many maps (ENOSPC); a file that is not taken (EINVAL, EACCES, or what mapping it gave).
    pub fn join_client(&self, wanted: ClientMap, holder: u64) -> Result<Joined, MemoryError> {
        let clients = self.clients()?;
        let ClientMap { iova, length, read, write, source } = wanted;
        let mut map = IovaMapping { iova, length, ram_offset: 0, read, write };
        check_map(&map)?;
        if length > clients.limit {
            return Err(clients.full(length));
        }
        // System calls under no lock. A file that joins another is mapped in vain.
        let backing = match source {
            ClientSource::File { fd, offset } => {
                let ClientFile { identity, memory, inner } = ClientFile::open(&fd, Wanted { offset, length, write })?;
                Backing::File(Arc::new(Block { identity, memory, inner, copies: AtomicU32::new(0) }), vec![holder])
            }
            ClientSource::Messages(access) => Backing::Messages(vec![(holder, access)]),
        };
        let file = matches!(backing, Backing::File(..));
        if let Some(joined) = join_in(&mut self.write_maps(), &map, &backing, holder)? {
            return Ok(joined);
        }
        map.ram_offset = clients.reserve(length, file, &self.log)?;
        let given = self.insert_client(map, backing, holder);
        if !matches!(&given, Ok(joined) if joined.map.ram_offset == map.ram_offset) {
            // Another was quicker.
            clients.give_back(map.ram_offset, length, file);
        }
        given
    }

    fn insert_client(&self, map: IovaMapping, backing: Backing, holder: u64) -> Result<Joined, MemoryError> {
        let joined = match &backing {
            Backing::File(block, _) => Joined { map, memory: block.memory.clone(), offset: block.inner },
            Backing::Messages(holders) => joined_messages(map, holders)?,
            Backing::Ram => return Err(MemoryError::NoClients),
        };
        let mut maps = self.write_maps();
        if let Some(joined) = join_in(&mut maps, &map, &backing, holder)? {
            drop(maps);
            return Ok(joined);
        }
        if maps.len() >= MAPS_MAX {
            return Err(MemoryError::TooManyMaps);
        }
        maps.insert(map.iova, Entry { map, others: 0, backing });
        Ok(joined)
    }

    /// Gives a map back; it goes when the last holder has given it back, and then nobody copies from or to it any more. EBUSY
    /// where that cannot be waited for: it is gone all the same. Nothing happens where it has been unmapped for all.
    ///
    /// `last` is called when what was written there, also by copies that were on their way, is in the log, and its place there is
    /// still its own. (What a client writes itself, because it was asked by a message, it knows.)
    pub fn leave_client(&self, map: &IovaMapping, holder: u64, last: impl FnOnce()) -> Result<(), MemoryError> {
        let clients = self.clients()?;
        let mut maps = self.write_maps();
        let Some(entry) = maps.get_mut(&map.iova).filter(|entry| entry.map == *map) else {
            drop(maps);
            last();
            return Ok(());
        };
        let mut left = Vec::new();
        let is_last = match &mut entry.backing {
            Backing::Ram => false,
            Backing::File(_, holders) => {
                holders.retain(|other| *other != holder);
                holders.is_empty()
            }
            Backing::Messages(holders) => {
                left.extend(holders.extract_if(.., |(other, _)| *other == holder));
                holders.is_empty()
            }
        };
        let gone = if is_last { maps.remove(&map.iova) } else { None };
        drop(maps);
        // The client's way to be asked ends under no lock.
        drop(left);
        let Some(gone) = gone else {
            // Others go on writing there, and what they write is reported to them.
            last();
            return Ok(());
        };
        let mut last = Some(last);
        clients.retire(vec![gone], &self.log, |_| {
            if let Some(last) = last.take() {
                last();
            }
        })
    }

    pub(super) fn read_clients(&self, iova: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        for part in self.parts(iova, data.len() as u64, Access::Read)? {
            let bytes = &mut data[part.piece.at as usize..][..part.piece.length as usize];
            part.copy(|memory, offset| Ok(memory.read(offset, bytes)?))?;
        }
        Ok(())
    }

    pub(super) fn write_clients(&self, iova: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut result = Ok(());
        for part in self.parts(iova, data.len() as u64, Access::Write)? {
            let Piece { at, ram_offset, length } = part.piece;
            if result.is_ok() {
                let bytes = &data[at as usize..][..length as usize];
                result = part.copy(|memory, offset| Ok(memory.write(offset, bytes)?));
            }
            // Also what failed: nobody knows how much of it was written.
            self.log.mark_bytes(ram_offset, length)?;
        }
        result
    }

    /// What covers a range, held so that no unmap returns before it is let go: each part is, once it has been dealt with. Nothing
    /// is touched and nobody asked yet.
    fn parts(&self, iova: u64, length: u64, access: Access) -> Result<Vec<Part<'_>>, MemoryError> {
        lock_order::calling_out();
        let clients = self.clients()?;
        let mut parts = Vec::new();
        self.look_up(iova, length, access, |piece, entry| {
            let source = match &entry.backing {
                Backing::Ram => return,
                Backing::File(block, _) => {
                    // Under the table's lock: who takes the entry out of it sees this copy.
                    block.copies.fetch_add(1, Ordering::AcqRel);
                    Source::File(Copying { clients, block: Arc::clone(block) })
                }
                Backing::Messages(holders) => {
                    Source::Messages(holders.iter().map(|(_, access)| Arc::clone(access)).collect())
                }
            };
            parts.push(Part { piece, within: piece.ram_offset - entry.map.ram_offset, iova: iova + piece.at, source });
        })?;
        // Files first: who waits for a client must not keep him from unmapping one.
        parts.sort_by_key(|part| matches!(part.source, Source::Messages(_)));
        Ok(parts)
    }
}

/// `None`: the addresses are free.
fn join_in(maps: &mut Maps, map: &IovaMapping, backing: &Backing, holder: u64) -> Result<Option<Joined>, MemoryError> {
    let IovaMapping { iova, length, .. } = *map;
    let Some(entry) = last_before(maps, iova, map.last()) else { return Ok(None) };
    let there = entry.map;
    if (there.iova, there.length) != (iova, length) {
        return Err(MemoryError::Overlap { iova, length, existing: there });
    }
    let other = Err(MemoryError::OtherMemory { iova, length });
    if (there.read, there.write) != (map.read, map.write) {
        return other;
    }
    Ok(Some(match (&mut entry.backing, backing) {
        (Backing::File(block, holders), Backing::File(file, _)) if block.identity == file.identity => {
            if holders.contains(&holder) {
                return other;
            }
            holders.push(holder);
            Joined { map: there, memory: block.memory.clone(), offset: block.inner }
        }
        (Backing::Messages(holders), Backing::Messages(joining)) => {
            if holders.iter().any(|(other, _)| *other == holder) {
                return other;
            }
            holders.extend(joining.iter().cloned());
            joined_messages(there, joining)?
        }
        _ => return other,
    }))
}

/// For the device of who joins: it asks its own client.
fn joined_messages(map: IovaMapping, joining: &[(u64, Arc<dyn ClientAccess>)]) -> Result<Joined, MemoryError> {
    let (_, access) = joining.first().ok_or(MemoryError::NoClients)?;
    let memory = DmaMemory::Messages { access: Arc::clone(access), iova: map.iova, length: map.length };
    Ok(Joined { map, memory, offset: 0 })
}

#[cfg(all(test, not(loom)))]
#[path = "clients_tests.rs"]
mod tests;
