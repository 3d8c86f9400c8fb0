//! Ioeventfds: an eventfd whose signal is one write to a region, as a guest's doorbell.
//!
//! **Owns** the eventfds and the thread that waits on them, which begins with the first. **Must never** wait for a device whose
//! memory is disabled, that is stopped or asleep, nor wake one: a kick that comes then is dropped, silently, as on the bus.
//! Locks: `state`, a leaf; held while a signal is taken, which does not wait, so that none is taken of an eventfd that is not watched any more.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::device::MediatedDevice;
use super::error::{MediationError, Result, unboxed};
use super::gate::Class;
use super::irqs::new_eventfd;
use crate::device::CONFIG_REGION;
use crate::lock_order::lock;
use crate::sys::is_eventfd;

/// As vfio-pci: ioeventfds of one device.
const IOEVENTFDS_MAX: usize = 1000;

/// What a kick writes: `width` bytes (1, 2, 4 or 8) of `value`, little-endian, at an offset of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kick {
    pub region: u32,
    pub offset: u64,
    pub width: u32,
    pub value: u64,
}

#[derive(Debug, Default)]
pub struct IoEventFds {
    state: Mutex<State>,
}

type Watched = (Kick, Arc<OwnedFd>);

#[derive(Debug, Default)]
struct State {
    watched: Vec<Watched>,
    poller: Option<Poller>,
    stopped: bool,
}

#[derive(Debug)]
struct Poller {
    stop: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl IoEventFds {
    fn watched(&self) -> Vec<Watched> {
        lock(&self.state).watched.clone()
    }

    /// Takes what was signalled, unless it is watched no more.
    fn take(&self, (kick, fd): &Watched) -> bool {
        let state = lock(&self.state);
        let is_watched = state.watched.iter().any(|(other, its)| other == kick && Arc::ptr_eq(its, fd));
        is_watched && take(fd)
    }

    /// None is watched any more.
    pub fn clear(&self) {
        let mut state = lock(&self.state);
        let old = std::mem::take(&mut state.watched);
        wake_up(&state);
        drop(state);
        drop(old);
    }

    /// Ends the thread. Nothing is written afterwards, unless this *is* that thread, which then ends by itself.
    pub fn stop(&self) {
        let (poller, watched) = {
            let mut state = lock(&self.state);
            state.stopped = true;
            (state.poller.take(), std::mem::take(&mut state.watched))
        };
        drop(watched);
        if let Some(poller) = poller {
            poller.stop.store(true, Ordering::Release);
            let _ = rustix::io::write(&*poller.wake, &1u64.to_ne_bytes());
            if poller.thread.thread().id() != std::thread::current().id() {
                // A panic of the thread has been reported where it happened.
                let _finished = poller.thread.join();
            }
        }
    }
}

impl MediatedDevice {
    /// As `VFIO_DEVICE_IOEVENTFD`: from now on each signal of `fd` is `kick`'s write, through the hooks; without `fd` no more.
    /// Several signals may be one write. The descriptor is duplicated.
    ///
    /// EINVAL for a descriptor that is no eventfd, a width that is none, an offset that is not aligned to it, a write outside the region or to configuration
    /// space; EEXIST when the same kick is there, ENODEV when one that is not is taken away, ENOSPC for too many.
    pub fn set_ioeventfd(&self, kick: Kick, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.with_pass(Class::Control, || {
            self.check_kick(kick)?;
            let refused = |errno| MediationError::refused(format!("an ioeventfd of region {}", kick.region), errno);
            match fd {
                Some(fd) if !is_eventfd(fd) => Err(refused(Errno::INVAL)),
                Some(fd) => {
                    let fd = fd.try_clone_to_owned().map_err(|_| refused(Errno::MFILE))?;
                    self.add_ioeventfd(kick, Arc::new(fd)).map_err(refused)
                }
                None => self.remove_ioeventfd(kick).map_err(refused),
            }
        })
    }

    fn check_kick(&self, kick: Kick) -> Result<()> {
        let size = self.region_size(kick.region);
        let end = kick.offset.checked_add(u64::from(kick.width));
        let fits = matches!(kick.width, 1 | 2 | 4 | 8) && kick.offset.is_multiple_of(u64::from(kick.width));
        match kick.region != CONFIG_REGION && fits && end.is_some_and(|end| end <= size) {
            true => Ok(()),
            false => Err(MediationError::refused(format!("an ioeventfd of {kick:?}"), Errno::INVAL)),
        }
    }

    fn add_ioeventfd(&self, kick: Kick, fd: Arc<OwnedFd>) -> std::result::Result<(), Errno> {
        let wake = Arc::new(new_eventfd()?);
        let mut state = lock(&self.ioeventfds.state);
        if state.stopped {
            return Err(Errno::NODEV);
        }
        if state.watched.iter().any(|(other, _)| *other == kick) {
            return Err(Errno::EXIST);
        }
        if state.watched.len() >= IOEVENTFDS_MAX {
            return Err(Errno::NOSPC);
        }
        if state.poller.is_none() {
            let stop = Arc::new(AtomicBool::new(false));
            let thread = self.ioeventfd_thread(Arc::clone(&stop), Arc::clone(&wake)).map_err(|_| Errno::AGAIN)?;
            state.poller = Some(Poller { stop, wake, thread });
        }
        state.watched.push((kick, fd));
        wake_up(&state);
        Ok(())
    }

    fn remove_ioeventfd(&self, kick: Kick) -> std::result::Result<(), Errno> {
        let mut state = lock(&self.ioeventfds.state);
        let at = state.watched.iter().position(|(other, _)| *other == kick).ok_or(Errno::NODEV)?;
        let old = state.watched.remove(at);
        wake_up(&state);
        drop(state);
        drop(old);
        Ok(())
    }

    fn ioeventfd_thread(&self, stop: Arc<AtomicBool>, wake: Arc<OwnedFd>) -> std::io::Result<JoinHandle<()>> {
        let (owner, all) = (Arc::clone(&self.shared.owner), Arc::downgrade(&self.ioeventfds));
        std::thread::Builder::new().name("vfio-mediate-kick".to_owned()).spawn(move || {
            while !stop.load(Ordering::Acquire) {
                let Some(watched) = all.upgrade().map(|all| all.watched()) else { break };
                for ready in wait(&wake, &watched) {
                    let taken = all.upgrade().is_some_and(|all| all.take(ready));
                    if let Some(device) = owner.get().and_then(std::sync::Weak::upgrade).filter(|_| taken) {
                        device.kick(ready.0);
                    }
                }
            }
        })
    }

    /// What is refused is dropped, and nobody is told, as on the bus.
    fn kick(&self, kick: Kick) {
        let bytes = kick.value.to_le_bytes();
        let data = bytes.get(..kick.width as usize).unwrap_or(&bytes);
        let written =
            self.with_own_pass(Class::Memory, || self.write_in(kick.region, kick.offset, data).map_err(unboxed));
        if let Err(error) = written {
            tracing::debug!(device = %self.identity().name, ?kick, %error, "a kick was dropped");
        }
    }
}

/// Waits for a wake-up or a signal, and returns what was signalled.
fn wait<'a>(wake: &OwnedFd, watched: &'a [Watched]) -> Vec<&'a Watched> {
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(watched.iter().map(|(_, fd)| PollFd::new(&**fd, PollFlags::IN)));
    // EINTR: looked at again in the next round. Without a limit: `stop` and every change wake it.
    if poll(&mut fds, None).is_err() {
        return Vec::new();
    }
    if !fds[0].revents().is_empty() {
        take(wake);
    }
    let ready = fds[1..].iter().zip(watched).filter(|(fd, _)| !fd.revents().is_empty());
    ready.map(|(_, watched)| watched).collect()
}

/// Takes what was signalled, if nobody else did. Not a plain read: the client's descriptor may be one that blocks.
fn take(fd: &OwnedFd) -> bool {
    let mut counter = [0; 8];
    let buffers = &mut [std::io::IoSliceMut::new(&mut counter)];
    // No offset: an eventfd has no position.
    matches!(preadv2(fd, buffers, u64::MAX, ReadWriteFlags::NOWAIT), Ok(8))
}

fn wake_up(state: &State) {
    if let Some(poller) = &state.poller {
        let _ = rustix::io::write(&*poller.wake, &1u64.to_ne_bytes());
    }
}
