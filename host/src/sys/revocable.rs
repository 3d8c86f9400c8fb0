//! A mapping of device memory at an address that stays, which can be taken back and put back.
//!
//! **Owns** the address range. What lies there is replaced as a whole, in one step of the kernel's: whoever touches it by a
//! raw pointer meets the device, or what [`Faults`] says, and nothing in between. **Must never** leave the range free while
//! the handle lives, for somebody else's memory would land there.
//!
//! ```text
//!   LIVE -- revoke --> REVOKED -- restore --> LIVE        end: from either, for good
//! ```
//! The owner sees to it that no access through the methods here is in flight when he revokes: such an access would meet the
//! fault itself. Locks: `state`, a leaf, held across the system calls that replace the range.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap, mprotect, mremap, mremap_fixed, munmap,
};

use super::blocking::Blocker;
use super::{Mapping, Seal, memfd};

/// Kept small enough that `usize` arithmetic on it is never near the edge.
const LENGTH_MAX: u64 = 1 << 46;

/// What a thread meets that touches a revoked range by a raw pointer. A system call that is given the address fails with
/// EFAULT in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Faults {
    /// SIGBUS, as from a mapping that the kernel's VFIO has taken back.
    #[default]
    Raise,
    /// The thread waits in the kernel until the mapping is back, then goes on as if nothing had been. When the first one has
    /// waited for this long all of them get SIGBUS, and so do others until the mapping is back.
    Block(Duration),
}

/// Why an access or a change did not take place.
#[derive(Debug, thiserror::Error)]
pub enum RevocableError {
    #[error("the mapping is revoked")]
    Revoked,
    #[error("{length} bytes at {offset:#x} lie outside a mapping of {size} bytes")]
    OutOfBounds { offset: u64, length: u64, size: u64 },
    #[error("{length} bytes at {offset:#x} are not aligned to their size")]
    Misaligned { offset: u64, length: u64 },
    #[error(transparent)]
    Os(#[from] io::Error),
}

type Result<T> = std::result::Result<T, RevocableError>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Live,
    /// Whoever touches it waits
    Blocking,
    /// Whoever touches it gets SIGBUS
    Raising,
    /// As `Raising`, for good
    Ended,
    /// A failed system call let go of the range: it is nobody's of ours
    Lost,
}

/// The addresses, shared with the thread that looks after those who wait.
#[derive(Debug)]
pub(super) struct Range {
    start: NonNull<u8>,
    /// As asked for
    length: u64,
    /// Whole pages
    size: usize,
    state: Mutex<State>,
    /// The state is LIVE
    live: AtomicBool,
    /// Times that it began to block: a wait is measured within one of them
    episode: AtomicU64,
}

// SAFETY: `start` is an address of shared memory that this struct owns; it is only read and written volatile.
unsafe impl Send for Range {}
// SAFETY: as above; concurrent accesses race on the device's memory only, never on a Rust object.
unsafe impl Sync for Range {}

/// See the module's text. Dropped, the addresses are free again.
#[derive(Debug)]
pub struct Revocable {
    // First: its thread is gone before the range.
    blocker: Option<Blocker>,
    range: Arc<Range>,
}

impl Revocable {
    /// Takes a mapping's place. With [`Faults::Block`] EPERM or ENOSYS where the machine gives no userfaultfd.
    pub fn new(mapping: Arc<Mapping>, faults: Faults) -> io::Result<Self> {
        // Nothing that a revocation needs may be missing when it comes.
        nothing()?;
        let length = mapping.len();
        if length > LENGTH_MAX {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let (start, size) = sole(mapping)?;
        let (state, live) = (Mutex::new(State::Live), AtomicBool::new(true));
        let range = Arc::new(Range { start, length, size, state, live, episode: AtomicU64::new(0) });
        range.keep_from_children()?;
        let blocker = match faults {
            Faults::Raise => None,
            Faults::Block(at_most) => Some(Blocker::new(Arc::clone(&range), at_most)?),
        };
        Ok(Self { blocker, range })
    }

    /// The first byte's address, constant. What a touch of it meets while the mapping is revoked says [`Faults`].
    pub fn address(&self) -> u64 {
        self.range.start.as_ptr() as u64
    }

    pub fn len(&self) -> u64 {
        self.range.length
    }

    pub fn is_empty(&self) -> bool {
        self.range.length == 0
    }

    pub fn is_live(&self) -> bool {
        self.range.live.load(Ordering::Acquire)
    }

    /// Takes the mapping back: once this has returned no thread of this process reaches the device through it. An error
    /// says that it is still there.
    pub fn revoke(&self) -> io::Result<()> {
        let mut state = self.range.state();
        if *state != State::Live {
            return Ok(());
        }
        self.range.live.store(false, Ordering::Release);
        if let Some(blocker) = &self.blocker {
            match blocker.cover(&self.range, &mut state) {
                Ok(()) => {
                    *state = State::Blocking;
                    return Ok(());
                }
                Err(_) if *state == State::Lost => return Ok(()),
                // Nobody can wait; but the device is out of reach all the same.
                Err(error) => tracing::warn!(%error, "a revoked mapping raises SIGBUS instead of blocking"),
            }
        }
        let covered = self.range.cover();
        match covered {
            Ok(()) => *state = State::Raising,
            Err(_) => self.range.live.store(true, Ordering::Release),
        }
        covered
    }

    /// Puts the device's memory back: `mapping` is a fresh mapping of the same bytes.
    pub fn restore(&self, mapping: Arc<Mapping>) -> io::Result<()> {
        if mapping.len() != self.range.length {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (from, size) = sole(mapping)?;
        let mut state = self.range.state();
        if !matches!(*state, State::Blocking | State::Raising) {
            unmap(from, size);
            return match *state {
                State::Live => Ok(()),
                _ => Err(io::ErrorKind::NotConnected.into()),
            };
        }
        self.range.move_here(from, &mut state)?;
        if let Err(error) = self.range.keep_from_children() {
            self.range.cover()?;
            *state = State::Raising;
            return Err(error);
        }
        *state = State::Live;
        self.range.live.store(true, Ordering::Release);
        drop(state);
        self.wake();
        Ok(())
    }

    /// Takes the mapping back for good. Whoever waits gets SIGBUS.
    pub fn end(&self) -> io::Result<()> {
        let mut state = self.range.state();
        if matches!(*state, State::Ended | State::Lost) {
            return Ok(());
        }
        self.range.cover()?;
        self.range.live.store(false, Ordering::Release);
        *state = State::Ended;
        drop(state);
        self.wake();
        Ok(())
    }

    fn wake(&self) {
        if let Some(blocker) = &self.blocker {
            blocker.wake(&self.range);
        }
    }

    /// Copies out by accesses of 8, 4, 2 or 1 bytes, ascending, each aligned to its width.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let start = self.range.at(offset, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            // SAFETY: `done < data.len()`, which `at` has checked to lie inside.
            let from = unsafe { start.add(done) };
            let left = &mut data[done..];
            done += match width(from, left.len()) {
                // SAFETY: in bounds, and aligned by the choice of the width. The mapping stays: `self` owns it.
                8 => put(left, unsafe { from.cast::<u64>().read_volatile() }.to_ne_bytes()),
                // SAFETY: as above.
                4 => put(left, unsafe { from.cast::<u32>().read_volatile() }.to_ne_bytes()),
                // SAFETY: as above.
                2 => put(left, unsafe { from.cast::<u16>().read_volatile() }.to_ne_bytes()),
                // SAFETY: as above.
                _ => put(left, [unsafe { from.read_volatile() }]),
            };
        }
        Ok(())
    }

    /// Copies in; as [`Self::read`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let start = self.range.at(offset, data.len() as u64)?;
        let mut rest = data;
        while let Some(&byte) = rest.first() {
            // SAFETY: what has been written lies inside, as `at` has checked, and at least one byte is left.
            let to = unsafe { start.add(data.len() - rest.len()) };
            let step = width(to, rest.len());
            let (now, later) = rest.split_at(step);
            match *now {
                // SAFETY: in bounds, and aligned by the choice of the width.
                [a, b, c, d, e, f, g, h] => unsafe {
                    to.cast::<u64>().write_volatile(u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
                },
                // SAFETY: as above.
                [a, b, c, d] => unsafe { to.cast::<u32>().write_volatile(u32::from_ne_bytes([a, b, c, d])) },
                // SAFETY: as above.
                [a, b] => unsafe { to.cast::<u16>().write_volatile(u16::from_ne_bytes([a, b])) },
                // SAFETY: as above.
                _ => unsafe { to.write_volatile(byte) },
            }
            rest = later;
        }
        Ok(())
    }

    /// One 32-bit load, as a register access.
    pub fn load_u32(&self, offset: u64) -> Result<u32> {
        let from = self.range.aligned(offset, 4)?;
        // SAFETY: in bounds and aligned.
        Ok(unsafe { from.cast::<u32>().read_volatile() })
    }

    /// As by a raw pointer: one 32-bit load that asks nobody, and meets what [`Faults`] says where the mapping is revoked.
    pub fn touch_u32(&self, offset: u64) -> Result<u32> {
        let (length, size) = (4, self.range.length);
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(RevocableError::OutOfBounds { offset, length, size });
        }
        // SAFETY: `offset <= size`, the length of the range.
        let from = unsafe { self.range.start.as_ptr().add(offset as usize) };
        if !(from as u64).is_multiple_of(length) {
            return Err(RevocableError::Misaligned { offset, length });
        }
        if *self.range.state() == State::Lost {
            return Err(RevocableError::Revoked);
        }
        // SAFETY: in bounds and aligned, and the range is ours: a fault is a signal, and what is read is the device's.
        Ok(unsafe { from.cast::<u32>().read_volatile() })
    }

    pub fn store_u32(&self, offset: u64, value: u32) -> Result<()> {
        let to = self.range.aligned(offset, 4)?;
        // SAFETY: in bounds and aligned.
        unsafe { to.cast::<u32>().write_volatile(value) };
        Ok(())
    }
}

impl Range {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the thread that must not wait for whoever waits for it.
    pub(super) fn try_state(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    pub(super) fn episode(&self) -> u64 {
        self.episode.load(Ordering::Relaxed)
    }

    /// Under the state's lock, whenever it begins to block.
    pub(super) fn next_episode(&self) {
        self.episode.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    fn at(&self, offset: u64, length: u64) -> Result<*mut u8> {
        let size = self.length;
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(RevocableError::OutOfBounds { offset, length, size });
        }
        if !self.live.load(Ordering::Acquire) {
            return Err(RevocableError::Revoked);
        }
        // SAFETY: `offset <= size`, the length of the range.
        Ok(unsafe { self.start.as_ptr().add(offset as usize) })
    }

    fn aligned(&self, offset: u64, length: u64) -> Result<*mut u8> {
        let pointer = self.at(offset, length)?;
        if (pointer as u64).is_multiple_of(length) {
            Ok(pointer)
        } else {
            Err(RevocableError::Misaligned { offset, length })
        }
    }

    /// Puts the end of an empty file there: a touch is SIGBUS. Where even that fails, nothing may be touched (SIGSEGV).
    pub(super) fn cover(&self) -> io::Result<()> {
        let (start, size) = (self.start.as_ptr().cast(), self.size);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range is ours, and nobody holds references to what is mapped there; it is replaced as a whole.
        let covered = unsafe { mmap(start, size, ProtFlags::READ | ProtFlags::WRITE, flags, nothing()?, 0) };
        if covered.is_ok() {
            return Ok(());
        }
        // SAFETY: as above.
        Ok(unsafe { mprotect(start, size, MprotectFlags::empty()) }?)
    }

    /// Moves a mapping of the same size to this range, in place of what is there.
    pub(super) fn move_here(&self, from: NonNull<u8>, state: &mut State) -> io::Result<()> {
        let start = self.start.as_ptr();
        // SAFETY: `from` is a mapping of this size that the caller owns and gives away; the range is ours.
        let moved =
            unsafe { mremap_fixed(from.as_ptr().cast(), self.size, self.size, MremapFlags::MAYMOVE, start.cast()) };
        let Err(error) = moved else { return Ok(()) };
        unmap(from, self.size);
        // What was here may be gone, and the range free for anybody.
        let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE;
        // SAFETY: without replacing anything.
        match unsafe { mmap(start.cast(), self.size, ProtFlags::READ, flags, nothing()?, 0) } {
            Ok(_) => *state = State::Raising,
            // Still as it was, in whole or in part; or somebody else's: then it must not be touched any more.
            Err(_) => *state = State::Lost,
        }
        Err(error.into())
    }

    /// A process that this one forks would keep what is revoked here.
    fn keep_from_children(&self) -> io::Result<()> {
        // SAFETY: changes nothing for this process.
        Ok(unsafe { madvise(self.start.as_ptr().cast(), self.size, Advice::LinuxDontFork) }?)
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if *self.state() != State::Lost {
            unmap(self.start, self.size);
        }
    }
}

fn unmap(start: NonNull<u8>, size: usize) {
    // SAFETY: the caller owns the range and forgets it. A failure leaves it mapped, which harms nobody.
    let _ = unsafe { munmap(start.as_ptr().cast(), size) };
}

/// A file without bytes: beyond its end there is nothing but SIGBUS. Made before the first mapping, kept for ever.
fn nothing() -> io::Result<BorrowedFd<'static>> {
    static NOTHING: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(fd) = NOTHING.get() {
        return Ok(fd.as_fd());
    }
    let made = memfd("vfio-mediate-revoked", 0, Seal::Size)?;
    Ok(NOTHING.get_or_init(|| made).as_fd())
}

/// The address and size of a mapping that is nobody else's; of one that is shared, a second one of the same memory.
fn sole(mapping: Arc<Mapping>) -> io::Result<(NonNull<u8>, usize)> {
    match Arc::try_unwrap(mapping) {
        Ok(mapping) => Ok(mapping.into_range()),
        Err(shared) => {
            let (start, size) = shared.range();
            // SAFETY: an old size of 0 maps shared memory once more, and leaves the first one as it is.
            let second = unsafe { mremap(start.as_ptr().cast(), 0, size, MremapFlags::MAYMOVE) }?;
            let second = NonNull::new(second.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
            Ok((second, size))
        }
    }
}

/// The widest access at this address that is aligned and fits.
fn width(at: *mut u8, left: usize) -> usize {
    let fits = |width: &usize| *width <= left && (at as usize).is_multiple_of(*width);
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

fn put<const N: usize>(data: &mut [u8], bytes: [u8; N]) -> usize {
    data[..N].copy_from_slice(&bytes);
    N
}

#[cfg(all(test, not(loom)))]
#[path = "revocable_tests.rs"]
mod tests;
