//! REQ and ERR: what the kernel says to whoever holds the device, and who hears it.
//!
//! **Owns** the device's eventfds of those two indices, the thread that waits on them, and the observer. The client's own
//! eventfds of these indices stay in the host's table, and are signalled after the host has acted. **Must never** release
//! the device itself: others hold it; it says so, and refuses nothing that the device still does.
//!
//! | index | means | the host |
//! |---|---|---|
//! | `VFIO_PCI_REQ_IRQ_INDEX` | the device is to be unbound, and the kernel waits for it | tells the observer, once, and the client |
//! | `VFIO_PCI_ERR_IRQ_INDEX` | an uncorrectable error (AER) | fails the device, then tells both |
//!
//! States of the thread: *not started* (the device has neither index), *waiting*, *ended* by [`Watch::stop`], which joins it.
//! Locks: `thread`, `news`, leaves; the observer is called under none.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_IRQ_INFO_EVENTFD, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};

use super::device::MediatedDevice;
use super::error::{MediationError, Result};
use super::lock;
use crate::device::{Device, ErrorKind, IrqAction, IrqData, IrqInfo, IrqSet};
use crate::sys::EventFd;

/// What the kernel said about a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Notice {
    /// It is to be unbound from its driver, which waits until every reference to it is gone: let go of it.
    ReleaseRequested,
    /// It reported an uncorrectable error, and is failed: everything is refused.
    DeviceError,
}

/// Hears what the kernel says, on a thread of the host's, under none of its locks.
pub type Observer = dyn Fn(Notice) + Send + Sync;

#[derive(Default)]
pub struct Watch {
    lines: OnceLock<Vec<Line>>,
    thread: Mutex<Option<Running>>,
    news: Mutex<News>,
}

/// An index, and what the device signals for it.
#[derive(Debug)]
struct Line {
    index: u32,
    event: EventFd,
}

#[derive(Debug)]
struct Running {
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct News {
    observer: Option<Arc<Observer>>,
    /// In order
    heard: Vec<Notice>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("lines", &self.lines).finish_non_exhaustive()
    }
}

impl Watch {
    /// Takes the indices that the device has. One that it refuses is left alone: then nobody hears of it. After an error those
    /// that were taken are still to be given back.
    pub fn arm(&self, device: &dyn Device, infos: &[Option<IrqInfo>]) -> Result<()> {
        let mut lines = Vec::new();
        let armed = Self::arm_into(device, infos, &mut lines);
        let _once = self.lines.set(lines);
        armed
    }

    fn arm_into(device: &dyn Device, infos: &[Option<IrqInfo>], lines: &mut Vec<Line>) -> Result<()> {
        for index in [VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX] {
            let info = infos.get(index as usize).and_then(Option::as_ref);
            if info.is_none_or(|info| info.count != 1 || info.flags & VFIO_IRQ_INFO_EVENTFD == 0) {
                continue;
            }
            let event = EventFd::new().map_err(|errno| MediationError::refused("an eventfd", errno))?;
            let fds = [Some(event.as_fd())];
            match device.set_irqs(&one(index, 1, IrqData::EventFd(&fds))) {
                Ok(()) => lines.push(Line { index, event }),
                Err(error) if error.kind == ErrorKind::Refused => {
                    tracing::debug!(device = %device.identity().name, index, %error, "an irq index that is not watched");
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Gives the indices back. The device is awake and had alone.
    pub fn disarm(&self, device: &dyn Device) {
        for line in self.lines() {
            if let Err(error) = device.set_irqs(&one(line.index, 0, IrqData::None)) {
                tracing::debug!(device = %device.identity().name, index = line.index, %error, "disarming at close");
            }
        }
    }

    /// Whether the device's side of this index is the host's.
    pub fn covers(&self, index: u32) -> bool {
        self.lines().iter().any(|line| line.index == index)
    }

    fn lines(&self) -> &[Line] {
        self.lines.get().map_or(&[], |lines| lines)
    }

    /// Starts the thread, where there is something to wait for. `fired` gets the index.
    pub fn start(&self, fired: impl Fn(u32) + Send + 'static) -> Result<()> {
        if self.lines().is_empty() {
            return Ok(());
        }
        let refused = |errno| MediationError::refused("starting the thread that watches the device", errno);
        let wake = Arc::new(EventFd::new().map_err(refused)?);
        let own = |line: &Line| Ok(Line { index: line.index, event: line.event.try_clone()? });
        let lines: Vec<Line> = self.lines().iter().map(own).collect::<std::result::Result<_, _>>().map_err(refused)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, woken) = (stop.clone(), wake.clone());
        let thread = std::thread::Builder::new().name("vfio-mediate-watch".to_owned());
        let thread = thread.spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                match wait(&woken, &lines) {
                    Ok(heard) => heard.into_iter().for_each(&fired),
                    Err(errno) => {
                        tracing::error!(%errno, "the device is watched no more");
                        break;
                    }
                }
            }
        });
        let thread = thread.map_err(|_| refused(Errno::AGAIN))?;
        *lock(&self.thread) = Some(Running { stop, wake, thread });
        Ok(())
    }

    /// Ends the thread. Nothing is heard afterwards, unless this *is* that thread, which then ends by itself.
    pub fn stop(&self) {
        let Some(running) = lock(&self.thread).take() else { return };
        running.stop.store(true, Ordering::Release);
        // A full counter wakes as well.
        let _ = running.wake.signal(1);
        if running.thread.thread().id() != std::thread::current().id() {
            // A panic of the thread has been reported where it happened.
            let _finished = running.thread.join();
        }
    }

    /// To the observer, or kept until there is one. Each notice once.
    fn tell(&self, notice: Notice) {
        let observer = {
            let mut news = lock(&self.news);
            if news.heard.contains(&notice) {
                return;
            }
            news.heard.push(notice);
            news.observer.clone()
        };
        if let Some(observer) = observer {
            crate::lock_order::calling_out();
            observer(notice);
        }
    }
}

fn one(index: u32, count: u32, data: IrqData<'_>) -> IrqSet<'_> {
    IrqSet { index, start: 0, count, action: IrqAction::Trigger, data }
}

/// Waits for a wake-up or a line, and returns the indices that were signalled.
fn wait(wake: &EventFd, lines: &[Line]) -> std::result::Result<Vec<u32>, Errno> {
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(lines.iter().map(|line| PollFd::new(&line.event, PollFlags::IN)));
    // Without a limit: `stop` wakes it.
    match poll(&mut fds, None) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(Vec::new()),
        Err(errno) => return Err(errno),
    }
    let signalled = fds[1..].iter().zip(lines).filter(|(fd, _)| !fd.revents().is_empty());
    let taken = signalled.filter(|(_, line)| line.event.read().is_ok_and(|count| count > 0));
    Ok(taken.map(|(_, line)| line.index).collect())
}

impl MediatedDevice {
    /// Hands what the kernel says to `observer`, and at once what it has said already. A later one replaces it.
    pub fn observe(&self, observer: Arc<Observer>) {
        let (before, heard) = {
            let mut news = lock(&self.shared.watch.news);
            (news.observer.replace(Arc::clone(&observer)), news.heard.clone())
        };
        // Under no lock: it may hold the last reference to anything.
        drop(before);
        heard.into_iter().for_each(|notice| observer(notice));
    }

    /// What the kernel has said, in order.
    pub fn notices(&self) -> Vec<Notice> {
        lock(&self.shared.watch.news).heard.clone()
    }

    /// As if the kernel had said it; for an embedder that learns of it in another way.
    pub fn announce(&self, notice: Notice) {
        let index = match notice {
            Notice::DeviceError => VFIO_PCI_ERR_IRQ_INDEX,
            Notice::ReleaseRequested => VFIO_PCI_REQ_IRQ_INDEX,
        };
        self.line_fired(index);
    }

    pub(super) fn line_fired(&self, index: u32) {
        let notice = if index == VFIO_PCI_ERR_IRQ_INDEX {
            // First: whoever hears of it finds the device failed.
            self.fail(Errno::IO);
            Notice::DeviceError
        } else {
            Notice::ReleaseRequested
        };
        tracing::warn!(device = %self.identity().name, ?notice, "the kernel says");
        self.shared.irqs.signal((index, 0));
        self.shared.watch.tell(notice);
    }
}
