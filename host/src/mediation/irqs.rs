//! Irqs of one device: the client's eventfds, and ours in between where a plug-in wants to see a vector fire.
//!
//! **Owns** the client's eventfds (one per vector; replacing one closes the old) and the interposed ones, with the thread
//! that waits on them. **Must never** hold its lock while the device or the plug-in is called, nor change the table when the
//! device refused. Locks: `routes`, a leaf.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::lock_order::{Guard, lock};
use crate::sys::{is_eventfd, signal_shared};

/// Vectors of one device that the table keeps: MSI-X has 2048 at most.
const ROUTES_MAX: usize = 4096;

pub type Vector = (u32, u32);

/// Vectors of one index from `start` on, with what the device signals.
#[derive(Debug)]
pub struct Armed {
    pub index: u32,
    pub start: u32,
    pub fds: Vec<Option<Arc<OwnedFd>>>,
}

#[derive(Debug)]
struct Route {
    client: Arc<OwnedFd>,
    interposed: Option<Arc<OwnedFd>>,
}

#[derive(Debug, Default)]
pub struct Irqs {
    routes: Mutex<BTreeMap<Vector, Route>>,
    poller: Mutex<Option<Poller>>,
}

#[derive(Debug)]
struct Poller {
    stop: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

/// A change of eventfds that the device has still to accept.
#[derive(Debug)]
pub struct Pending {
    entries: Vec<(Vector, Option<Route>)>,
}

impl Pending {
    /// What the device is to be given, in the order of the vectors.
    pub fn device_fds(&self) -> Vec<Option<BorrowedFd<'_>>> {
        self.entries
            .iter()
            .map(|(_, route)| route.as_ref().map(|route| route.interposed.as_ref().unwrap_or(&route.client).as_fd()))
            .collect()
    }
}

impl Irqs {
    /// Duplicates the client's eventfds and makes ours for the vectors that are `interposed`. EINVAL for what is no eventfd.
    pub fn prepare(
        &self,
        index: u32,
        start: u32,
        fds: &[Option<BorrowedFd<'_>>],
        interposed: impl Fn(u32) -> bool,
    ) -> Result<Pending, Errno> {
        let mut entries = Vec::with_capacity(fds.len());
        for (vector, fd) in (start..).zip(fds) {
            let route = match fd {
                None => None,
                Some(fd) if !is_eventfd(*fd) => return Err(Errno::INVAL),
                Some(fd) => {
                    let client = Arc::new(fd.try_clone_to_owned().map_err(|_| Errno::MFILE)?);
                    let interposed = interposed(vector).then(new_eventfd).transpose()?.map(Arc::new);
                    Some(Route { client, interposed })
                }
            };
            entries.push(((index, vector), route));
        }
        if self.routes().len() + entries.len() > ROUTES_MAX {
            return Err(Errno::NOSPC);
        }
        Ok(Pending { entries })
    }

    /// The device has accepted the change. Old descriptors are closed here.
    pub fn commit(&self, pending: Pending) {
        let mut routes = self.routes();
        let mut old = Vec::new();
        for (vector, route) in pending.entries {
            old.extend(match route {
                Some(route) => routes.insert(vector, route),
                None => routes.remove(&vector),
            });
        }
        drop(routes);
        drop(old);
        self.wake();
    }

    /// The whole index was disabled.
    pub fn clear(&self, index: u32) {
        let mut routes = self.routes();
        let old: Vec<Route> =
            routes.extract_if((index, 0)..=(index, u32::MAX), |_, _| true).map(|(_, old)| old).collect();
        drop(routes);
        drop(old);
        self.wake();
    }

    /// Signals the client. True when it has an eventfd for this vector.
    pub fn signal(&self, vector: Vector) -> bool {
        let Some(client) = self.routes().get(&vector).map(|route| route.client.clone()) else { return false };
        signal_shared(client.as_fd());
        true
    }

    /// Indices with an eventfd.
    pub fn indices(&self) -> Vec<u32> {
        let mut indices: Vec<u32> = self.routes().keys().map(|(index, _)| *index).collect();
        indices.dedup();
        indices
    }

    /// Each index with its device-side eventfds, for re-arming after a reset.
    pub fn armed(&self) -> Vec<Armed> {
        let mut all: Vec<Armed> = Vec::new();
        for (&(index, vector), route) in self.routes().iter() {
            let fd = Some(route.interposed.as_ref().unwrap_or(&route.client).clone());
            match all.last_mut() {
                Some(armed) if armed.index == index => {
                    armed.fds.resize((vector - armed.start) as usize, None);
                    armed.fds.push(fd);
                }
                _ => all.push(Armed { index, start: vector, fds: vec![fd] }),
            }
        }
        all
    }

    /// Starts the thread that calls `fired` when an interposed eventfd was signalled. Once.
    pub fn start(self: &Arc<Self>, fired: impl Fn(Vector) + Send + 'static) -> Result<(), Errno> {
        let stop = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(new_eventfd()?);
        let (irqs, stopped, woken) = (Arc::downgrade(self), stop.clone(), wake.clone());
        let thread = std::thread::Builder::new().name("vfio-mediate-irq".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let Some(watched) = irqs.upgrade().map(|irqs| irqs.interposed()) else { break };
                for vector in wait(&woken, &watched) {
                    fired(vector);
                }
            }
        });
        let thread = thread.map_err(|_| Errno::AGAIN)?;
        *lock(&self.poller) = Some(Poller { stop, wake, thread });
        Ok(())
    }

    /// Ends the thread. Nothing fires afterwards, unless this *is* that thread, which then ends by itself.
    pub fn stop(&self) {
        let poller = lock(&self.poller).take();
        if let Some(poller) = poller {
            poller.stop.store(true, Ordering::Release);
            let _ = rustix::io::write(&*poller.wake, &1u64.to_ne_bytes());
            if poller.thread.thread().id() != std::thread::current().id() {
                // A panic of the thread has been reported where it happened.
                let _finished = poller.thread.join();
            }
        }
    }

    fn wake(&self) {
        if let Some(poller) = &*lock(&self.poller) {
            let _ = rustix::io::write(&*poller.wake, &1u64.to_ne_bytes());
        }
    }

    fn interposed(&self) -> Vec<(Vector, Arc<OwnedFd>)> {
        self.routes().iter().filter_map(|(vector, route)| Some((*vector, route.interposed.clone()?))).collect()
    }

    fn routes(&self) -> Guard<'_, BTreeMap<Vector, Route>> {
        lock(&self.routes)
    }
}

pub(super) fn new_eventfd() -> Result<OwnedFd, Errno> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
}

/// Waits for a wake-up or a vector, and returns the vectors that fired.
fn wait(wake: &OwnedFd, watched: &[(Vector, Arc<OwnedFd>)]) -> Vec<Vector> {
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(watched.iter().map(|(_, fd)| PollFd::new(&**fd, PollFlags::IN)));
    // EINTR: looked at again in the next round. Without a limit: `stop` and every change of routes wake it.
    if poll(&mut fds, None).is_err() {
        return Vec::new();
    }
    let mut counter = [0; 8];
    if !fds[0].revents().is_empty() {
        let _ = rustix::io::read(wake, &mut counter);
    }
    let fired = fds[1..].iter().zip(watched).filter(|(fd, _)| !fd.revents().is_empty());
    fired
        .map(|(_, (vector, fd))| {
            let _ = rustix::io::read(&**fd, &mut [0; 8]);
            *vector
        })
        .collect()
}
