//! The control socket's server.
//!
//! **Owns** the socket file, the thread that accepts and one thread per client, [`CLIENTS_MAX`] at most. **Must never** let
//! another user in, keep a client that sends nothing, or wait for a client while something of the host's waits.
//! Lock: `clients`, held to count and to cut connections, never while reading, writing or serving.
//!
//! Two hosts at one path: the socket has a lock file beside it, held as long as the server lives; with the lock in hand
//! a socket file that is there is a dead host's, and is replaced.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::job::{Job, News};
use super::line::{LineError, Lines};
use super::protocol::{Failure, FailureCode, REQUEST_MAX, Request, RequestLine, Response, ResponseLine, VERSION};
use crate::sys::EventFd;

/// Most clients at a time.
pub const CLIENTS_MAX: usize = 16;

/// What a request is answered with.
pub enum Answer {
    Now(Response),
    /// Progress as it comes, then the job's end
    Follow(Arc<Job>),
    /// The response, and once it is on its way, this
    Then(Response, Box<dyn FnOnce() + Send>),
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Now(response) => f.debug_tuple("Now").field(response).finish(),
            Self::Follow(job) => f.debug_tuple("Follow").field(job).finish(),
            Self::Then(response, _) => f.debug_tuple("Then").field(response).finish_non_exhaustive(),
        }
    }
}

/// What the socket serves.
pub trait Service: Send + Sync + 'static {
    /// Called on a client's thread, from several at a time.
    fn answer(&self, request: Request) -> Answer;
}

/// A socket that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("another host serves {} (it holds {}): stop it, or choose another --control", .socket.display(), .lock.display())]
    InUse { socket: PathBuf, lock: PathBuf },
    #[error("{what} {}: {source}", .path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// How long clients may take; tests take less.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a whole request, from the last response on
    pub request: Duration,
    /// For the client to take a response
    pub response: Duration,
    /// Between signs of life to a client that follows a job
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { request: Duration::from_secs(10), response: Duration::from_secs(10), silence: Duration::from_secs(1) }
    }
}

/// The serving socket. Dropped, it is gone, and every connection with it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
    path: PathBuf,
    _lock: File,
}

#[derive(Debug)]
struct Shared {
    stop: EventFd,
    clients: Mutex<Clients>,
    left: Condvar,
    patience: Patience,
}

#[derive(Debug, Default)]
struct Clients {
    stopping: bool,
    next: u64,
    /// A handle to each connection, to cut it
    connected: Vec<(u64, UnixStream)>,
}

impl Server {
    pub fn start(path: &Path, service: Arc<dyn Service>, patience: Patience) -> Result<Self, BindError> {
        let lock = lock_file(path)?;
        let listener = bind(path)?;
        let fail = |what, source: io::Error| BindError::Io { what, path: path.to_owned(), source };
        let stop = EventFd::new().map_err(|errno| fail("making an eventfd for", errno.into()))?;
        let shared = Arc::new(Shared { stop, clients: Mutex::default(), left: Condvar::new(), patience });
        let ours = Arc::clone(&shared);
        let accepting = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept_all(&ours, &listener, &service))
            .map_err(|source| fail("starting a thread for", source))?;
        Ok(Self { shared, accepting: Some(accepting), path: path.to_owned(), _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An eventfd of our own with room for one more count: it cannot fail.
        let _signalled = self.shared.stop.signal(1);
        if let Some(accepting) = self.accepting.take() {
            let _ended = accepting.join();
        }
        // The lock is still held: it is our file, or an operator removed it.
        let _gone = std::fs::remove_file(&self.path);
        let mut clients = self.shared.clients();
        clients.stopping = true;
        for (_, stream) in &clients.connected {
            let _cut = stream.shutdown(Shutdown::Both);
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while !clients.connected.is_empty() && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            clients = self.shared.left.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place among the clients, until the guard is dropped.
    fn enter(self: &Arc<Self>, stream: &UnixStream) -> Option<Place> {
        let mut clients = self.clients();
        if clients.stopping || clients.connected.len() >= CLIENTS_MAX {
            return None;
        }
        let handle = stream.try_clone().ok()?;
        clients.next += 1;
        let number = clients.next;
        clients.connected.push((number, handle));
        Some(Place { shared: Arc::clone(self), number })
    }
}

struct Place {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.clients().connected.retain(|(number, _)| *number != self.number);
        self.shared.left.notify_all();
    }
}

/// The folder, for this user only where it is made, and the lock beside the socket.
fn lock_file(socket: &Path) -> Result<File, BindError> {
    let folder = socket.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| BindError::Io { what: "creating", path: folder.to_owned(), source })?;
    }
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let fail = |what, source| BindError::Io { what, path: path.clone(), source };
    let mut options = File::options();
    // Never followed through a link that somebody else put there.
    options.write(true).create(true).mode(0o600).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    let file = options.open(&path).map_err(|source| fail("opening", source))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(BindError::InUse { socket: socket.to_owned(), lock: path }),
        Err(errno) => Err(fail("locking", errno.into())),
    }
}

/// The socket appears at its path with its final mode: it is bound beside it and renamed.
fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let fail = |what, source| BindError::Io { what, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            return Err(fail("will not replace what is no socket:", io::ErrorKind::AlreadyExists.into()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail("looking at", error)),
    }
    let aside = path.with_file_name(format!(".c{}", std::process::id()));
    let _left_over = std::fs::remove_file(&aside);
    let listener = UnixListener::bind(&aside).map_err(|source| fail("binding beside", source))?;
    let placed = std::fs::set_permissions(&aside, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&aside, path));
    if let Err(source) = placed {
        let _gone = std::fs::remove_file(&aside);
        return Err(fail("placing", source));
    }
    listener.set_nonblocking(true).map_err(|source| fail("preparing", source))?;
    Ok(listener)
}

fn accept_all(shared: &Arc<Shared>, listener: &UnixListener, service: &Arc<dyn Service>) {
    loop {
        let mut ready = [PollFd::new(&shared.stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        if let Err(errno) = poll(&mut ready, None)
            && errno != Errno::INTR
        {
            tracing::error!(%errno, "the control socket's poll failed; it serves nobody any more");
            return;
        }
        if !ready[0].revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => admit(shared, stream, service),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, "accepting a control client");
                // Out of descriptors, most likely: some client's end frees one. Not a wait for luck, a brake.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// Whether a process of user `peer` may command a host of user `own`.
fn may_command(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

fn admit(shared: &Arc<Shared>, stream: UnixStream, service: &Arc<dyn Service>) {
    let own = rustix::process::geteuid().as_raw();
    match rustix::net::sockopt::socket_peercred(&stream) {
        Ok(peer) if may_command(peer.uid.as_raw(), own) => {}
        Ok(_) | Err(_) => return, // closed without a word
    }
    if stream.set_nonblocking(false).is_err() {
        return;
    }
    let Some(place) = shared.enter(&stream) else {
        let failure =
            Failure::new(FailureCode::TooManyClients, format!("{CLIENTS_MAX} clients are served, try again later"));
        // A fresh connection's buffer takes one line; nobody waits here.
        let _told = respond(&mut Lines::new(stream, REQUEST_MAX), Response::Error(failure), Duration::from_millis(100));
        return;
    };
    let (shared, service) = (Arc::clone(shared), Arc::clone(service));
    let client = std::thread::Builder::new().name("control client".to_owned());
    let spawned = client.spawn(move || {
        let place = place;
        serve(&shared, stream, &*service);
        drop(place);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for a control client");
    }
}

fn respond(lines: &mut Lines, response: Response, patience: Duration) -> Result<(), LineError> {
    let line = ResponseLine { version: VERSION, response };
    let mut text = serde_json::to_vec(&line).map_err(io::Error::from)?;
    text.push(b'\n');
    lines.send(&text, patience)
}

/// One client, until it leaves, errs or is cut. What it was told does not arrive only where the connection is gone.
fn serve(shared: &Shared, stream: UnixStream, service: &dyn Service) {
    let mut lines = Lines::new(stream, REQUEST_MAX);
    loop {
        let deadline = Instant::now() + shared.patience.request;
        let (answer, last) = match lines.next(Some(deadline)) {
            Ok(Some(line)) => match parse(&line) {
                Ok(request) => (service.answer(request), false),
                Err(failure) => (Answer::Now(Response::Error(failure)), false),
            },
            Ok(None) | Err(LineError::Io(_)) => return,
            Err(error) => {
                let failure = Failure::new(FailureCode::BadRequest, error.to_string());
                (Answer::Now(Response::Error(failure)), true)
            }
        };
        let sent = match answer {
            Answer::Now(response) => respond(&mut lines, response, shared.patience.response),
            Answer::Follow(job) => follow(shared, &mut lines, &job),
            Answer::Then(response, then) => {
                let sent = respond(&mut lines, response, shared.patience.response);
                then();
                sent
            }
        };
        if last || sent.is_err() {
            return;
        }
    }
}

fn parse(line: &[u8]) -> Result<Request, Failure> {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let bad = |error: serde_json::Error| Failure::new(FailureCode::BadRequest, format!("not a request: {error}"));
    let Versioned { version } = serde_json::from_slice(line).map_err(bad)?;
    if version != VERSION {
        let message = format!("this host speaks version {VERSION} of the control protocol, not {version}");
        return Err(Failure::new(FailureCode::Version, message));
    }
    let line: RequestLine = serde_json::from_slice(line).map_err(bad)?;
    Ok(line.request)
}

fn follow(shared: &Shared, lines: &mut Lines, job: &Job) -> Result<(), LineError> {
    let mut seen = 0;
    let mut latest = None;
    loop {
        match job.next(seen, shared.patience.silence) {
            News::Progress { number, progress } => {
                seen = number;
                respond(lines, Response::Progress(progress.clone()), shared.patience.response)?;
                latest = Some(progress);
            }
            News::End(response) => return respond(lines, response, shared.patience.response),
            // Repeated, so that a client that went away is noticed and its place is free again.
            News::Silence => {
                let progress = latest.clone().unwrap_or_default();
                respond(lines, Response::Progress(progress), shared.patience.response)?;
            }
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
