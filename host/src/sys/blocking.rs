//! Threads that wait in the kernel while a mapping is revoked: a userfaultfd whose missing pages are never filled.
//!
//! **Owns** the descriptor and a thread that takes its messages, and that ends the wait at its deadline. **Must never** fill
//! a page: what the waiting threads meet in the end is another mapping. Locks: none of its own; it only *tries* the range's
//! `state`, since whoever holds that may be waiting for this thread.
//!
//! A mapping of a BAR cannot be registered with a userfaultfd, and a range that is replaced by unregistered memory would be
//! touched before it is registered. So an anonymous stand-in is registered elsewhere and then moved over the range; the
//! kernel tells of the move, and goes on when the message has been taken.
//! Source: `linux/userfaultfd.h`.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous};

use super::EventFd;
use super::revocable::{Range, State};

const UFFDIO: u8 = 0xAA;
const UFFD_API: u64 = 0xAA;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;
/// `sizeof(struct uffd_msg)`
const MESSAGE: usize = 32;
/// Faults of system calls fail (EFAULT) instead of waiting, and no privilege is needed.
const USER_MODE_ONLY: u32 = 1;
/// Between two tries when the range is just being changed.
const AGAIN: Duration = Duration::from_millis(1);

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Addresses {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Addresses,
    mode: u64,
    ioctls: u64,
}

const API: Opcode = opcode::read_write::<Api>(UFFDIO, 0x3F);
const REGISTER: Opcode = opcode::read_write::<Register>(UFFDIO, 0x00);
const WAKE: Opcode = opcode::read::<Addresses>(UFFDIO, 0x02);

#[derive(Debug)]
pub(super) struct Blocker {
    fd: Arc<OwnedFd>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Blocker {
    pub(super) fn new(range: Arc<Range>, at_most: Duration) -> io::Result<Self> {
        let flags =
            UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: only makes a descriptor.
        let fd = Arc::new(unsafe { rustix::mm::userfaultfd(flags) }?);
        let mut api = Api { api: UFFD_API, features: FEATURE_EVENT_REMAP, ioctls: 0 };
        // SAFETY: the opcode's size is that of `Api`, plain integers that live during the call.
        unsafe { ioctl(&fd, Updater::<API, Api>::new(&mut api)) }?;
        let stop = Arc::new(EventFd::new()?);
        let (messages, stopped) = (Arc::clone(&fd), Arc::clone(&stop));
        let watch = move || watch(&messages, &stopped, &range, at_most);
        let thread = std::thread::Builder::new().name("vfio-mediate-map".to_owned()).spawn(watch)?;
        Ok(Self { fd, stop, thread: Some(thread) })
    }

    /// From now on whoever touches the range waits. The caller holds its state.
    pub(super) fn cover(&self, range: &Range, state: &mut State) -> io::Result<()> {
        let size = range.size();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: fresh memory at an address of the kernel's choice.
        let stand_in =
            unsafe { mmap_anonymous(std::ptr::null_mut(), size, protection, MapFlags::PRIVATE | MapFlags::NORESERVE) }?;
        let stand_in = NonNull::new(stand_in.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let unwound = |error: rustix::io::Errno| {
            // SAFETY: made above, and known to nobody.
            let _ = unsafe { rustix::mm::munmap(stand_in.as_ptr().cast(), size) };
            io::Error::from(error)
        };
        // SAFETY: changes nothing for this process.
        unsafe { madvise(stand_in.as_ptr().cast(), size, Advice::LinuxDontFork) }.map_err(unwound)?;
        let addresses = Addresses { start: stand_in.as_ptr() as u64, len: size as u64 };
        let mut register = Register { range: addresses, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: size as above; the range is a live mapping that nobody touches yet.
        unsafe { ioctl(&self.fd, Updater::<REGISTER, Register>::new(&mut register)) }.map_err(unwound)?;
        range.next_episode();
        // A failure leaves a covered or a lost range: the first may be covered again.
        range.move_here(stand_in, state)
    }

    /// Whoever waits looks again.
    pub(super) fn wake(&self, range: &Range) {
        wake(&self.fd, range);
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        // EAGAIN: it has been signalled already.
        let _ = self.stop.signal(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported where it happened.
            let _finished = thread.join();
        }
    }
}

fn wake(fd: &OwnedFd, range: &Range) {
    let mut addresses = Addresses { start: range.start() as u64, len: range.size() as u64 };
    // SAFETY: the opcode's size is that of `Addresses`. Waking a thread makes it touch its address again.
    if let Err(error) = unsafe { ioctl(fd, Updater::<WAKE, Addresses>::new(&mut addresses)) } {
        // The range is whole pages of ours: this cannot be.
        tracing::error!(%error, "waking threads that wait for a mapping");
    }
}

/// Since when somebody waits, and in which episode. Whoever waited in an earlier one was let go by its end, and has come back if
/// he waits now.
#[derive(Debug)]
struct Waiting {
    at_most: Duration,
    until: Option<(Instant, u64)>,
}

impl Waiting {
    fn new(at_most: Duration) -> Self {
        Self { at_most, until: None }
    }

    /// `begun`: since the last time a thread began to wait.
    fn look(&mut self, now: Instant, begun: bool, episode: u64) {
        self.until = self.until.filter(|(_, waited_in)| *waited_in == episode);
        if begun && self.until.is_none() {
            self.until = Some((now + self.at_most, episode));
        }
    }

    fn is_over(&self, now: Instant, episode: u64) -> bool {
        self.until.is_some_and(|(until, waited_in)| waited_in == episode && until <= now)
    }

    fn left(&self, now: Instant) -> Option<Duration> {
        self.until.map(|(until, _)| until.saturating_duration_since(now).max(AGAIN))
    }
}

/// The thread. Takes messages, so that moves go on; remembers since when somebody waits.
fn watch(fd: &OwnedFd, stop: &EventFd, range: &Range, at_most: Duration) {
    let mut waiting = Waiting::new(at_most);
    loop {
        let timeout = waiting.left(Instant::now()).and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::new(fd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "waiting for a userfaultfd");
                return;
            }
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        let begun = take_messages(fd);
        waiting.look(Instant::now(), begun, range.episode());
        let Some(mut state) = waiting.until.and_then(|_| range.try_state()) else { continue };
        if *state != State::Blocking {
            waiting.until = None;
        } else if waiting.is_over(Instant::now(), range.episode()) {
            match range.cover() {
                Ok(()) => {
                    *state = State::Raising;
                    waiting.until = None;
                    wake(fd, range);
                }
                Err(error) => tracing::warn!(%error, "ending the wait for a mapping"),
            }
        }
    }
}

/// True when a thread began to wait.
fn take_messages(fd: &OwnedFd) -> bool {
    let mut buffer = [0; 16 * MESSAGE];
    let mut waits = false;
    while let Ok(length @ 1..) = rustix::io::read(fd, &mut buffer) {
        waits |= buffer[..length].chunks(MESSAGE).any(|message| message[0] == EVENT_PAGEFAULT);
    }
    waits
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: MEMEN-6
    #[test]
    fn a_wait_is_measured_from_its_own_beginning_and_not_from_an_earlier_episodes() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut waiting = Waiting::new(Duration::from_secs(10));
        assert_eq!((waiting.left(at(0)), waiting.is_over(at(99), 1)), (None, false));
        waiting.look(at(0), true, 1);
        waiting.look(at(4), true, 1);
        assert_eq!(waiting.left(at(4)), Some(Duration::from_secs(6)), "the first one counts");
        assert!(!waiting.is_over(at(9), 1) && waiting.is_over(at(10), 1) && waiting.is_over(at(11), 1));
        assert_eq!(waiting.left(at(11)), Some(AGAIN));
        // It ended, and began again, while nobody looked.
        assert!(!waiting.is_over(at(10), 2));
        waiting.look(at(9), true, 2);
        assert!(!waiting.is_over(at(10), 2) && !waiting.is_over(at(18), 2) && waiting.is_over(at(19), 2));
        waiting.look(at(20), false, 3);
        assert_eq!(waiting.left(at(20)), None, "nobody waits");
    }

    #[test]
    fn numbers_are_those_of_the_uapi() {
        assert_eq!([API, REGISTER, WAKE], [0xC018_AA3F, 0xC020_AA00, 0x8010_AA02]);
    }
}
