//! Sockets and threads: what brings requests to a device and replies back.
//!
//! **Owns** one thread for each served device, which accepts its clients one after another and serves them. **Must never** let
//! one client hold up another device's, serve two clients at a time, or leave anything of a client behind that is gone.
//!
//! ```text
//!  WAITING -- a client connects --> SERVING -- it is gone, or breaks the rules --> device let go of it --> WAITING
//!     '------------ stop, within a bounded time, from either ------------> ENDED (path removed, thread gone)
//! ```
//! Locks: `current`, a leaf; `link`'s.

mod connection;
mod link;
mod listener;
pub(super) mod socket;

pub use connection::serve_client;
pub(super) use link::Link;
pub use link::{CLIENT_PATIENCE, Failure};
pub use listener::{ListenError, Listener};

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::backend::{DeviceBackend, Options};
use crate::mediation::MediatedDevice;
use crate::sys::EventFd;

/// Who uses a served device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Clients {
    pub attached: bool,
    /// Process that connected, where the kernel says it
    pub pid: Option<i32>,
    /// Clients that were served and are gone
    pub served: u64,
}

#[derive(Debug, Default)]
struct Current {
    link: Option<Arc<Link>>,
    clients: Clients,
    stopping: bool,
}

#[derive(Debug)]
struct Shared {
    current: Mutex<Current>,
    stop: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device that is served. Dropped, it is not any more: the client is disconnected, the path removed.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// From now on clients can connect.
    pub fn start(device: Arc<MediatedDevice>, listener: Listener, options: Options) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { current: Mutex::default(), stop: EventFd::new()? });
        let ours = Arc::clone(&shared);
        let serve = move || serve_all(&ours, &device, &listener, options);
        let thread = std::thread::Builder::new().name("vfio-user".to_owned()).spawn(serve)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub fn clients(&self) -> Clients {
        lock(&self.shared.current).clients
    }

    /// Disconnects the client and ends, in a bounded time: whatever waits for the client does not any more.
    pub fn stop(&mut self) {
        let link = {
            let mut current = lock(&self.shared.current);
            current.stopping = true;
            current.link.clone()
        };
        if let Some(link) = link {
            link.end(Failure::Stopped);
        }
        // It cannot be full.
        let _signalled = self.shared.stop.signal(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a served device panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve_all(shared: &Shared, device: &Arc<MediatedDevice>, listener: &Listener, options: Options) {
    let mut backend = DeviceBackend::new(Arc::clone(device), options);
    let name = device.identity().name.clone();
    while wait_for_client(shared, listener, &mut backend) {
        let socket = match listener.accept() {
            Ok(socket) => socket,
            // Gone again, or nobody's fault that lasts.
            Err(Errno::CONNABORTED | Errno::INTR | Errno::AGAIN) => continue,
            Err(errno) => {
                tracing::error!(device = %name, %errno, socket = ?listener.path().map(Path::display), "accepting");
                // Descriptors may be free again when some client has gone.
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        serve_one(shared, &mut backend, socket);
    }
}

/// After an accept that failed for lack of something.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Between two tries to let go of a client that is lost.
const SETTLE_PAUSE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// False: it is time to end.
fn wait_for_client(shared: &Shared, listener: &Listener, backend: &mut DeviceBackend) -> bool {
    loop {
        if lock(&shared.current).stopping {
            return false;
        }
        let mut ready = [PollFd::new(&shared.stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        // What the device has not let go of is not left to the next client, who may never come.
        let pause = backend.owes().then_some(&SETTLE_PAUSE);
        match poll(&mut ready, pause) {
            Ok(0) => backend.settle(),
            Ok(_) if !ready[1].revents().is_empty() => return !lock(&shared.current).stopping,
            // EINTR: once more.
            _ => {}
        }
    }
}

fn serve_one(shared: &Shared, backend: &mut DeviceBackend, socket: OwnedFd) {
    let pid = rustix::net::sockopt::socket_peercred(&socket).ok().map(|peer| peer.pid.as_raw_nonzero().get());
    let link = Link::new(socket, backend.options().patience);
    {
        let mut current = lock(&shared.current);
        if current.stopping {
            return;
        }
        current.link = Some(Arc::clone(&link));
        current.clients = Clients { attached: true, pid, ..current.clients };
    }
    let name = backend.device().identity().name.clone();
    tracing::info!(device = %name, pid, "a client");
    let why = connection::run(backend, &link);
    {
        let mut current = lock(&shared.current);
        current.link = None;
        current.clients = Clients { attached: false, pid: None, served: current.clients.served + 1 };
    }
    tracing::info!(device = %name, pid, %why, unsolicited = link.unsolicited_replies(), "the client is gone");
}
