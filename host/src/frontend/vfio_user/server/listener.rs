//! Where clients of one device come: a socket at a path, or one that was inherited.
//!
//! **Owns** the file at the path. **Must never** take a path from a server that lives, remove a file that is not its own, or let
//! anybody but its owner connect.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with, sockopt,
};

/// Clients that may wait for the one that is served.
const BACKLOG: i32 = 16;

/// No clients can come.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("socket {}: another server listens there", .path.display())]
    InUse { path: PathBuf },
    #[error("socket {}: there is a file that is no socket", .path.display())]
    NoSocket { path: PathBuf },
    #[error("socket {}: {what}: {errno}", .path.display())]
    Path { path: PathBuf, what: &'static str, errno: Errno },
    #[error("the inherited descriptor is not a UNIX stream socket that listens")]
    NotListening,
}

#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// With the file's device and inode
    place: Option<(PathBuf, (u64, u64))>,
}

impl Listener {
    /// At a path, for this user alone. A socket there that nobody listens on is removed first.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let fail = |what| move |errno| ListenError::Path { path: path.to_owned(), what, errno };
        let address = SocketAddrUnix::new(path).map_err(fail("not a socket's path"))?;
        let socket = new_socket().map_err(fail("a socket"))?;
        // The file gets the socket's mode: it is never open to others, not even for a moment.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(fail("its mode"))?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path, &address)?;
                bind(&socket, &address).map_err(fail("binding"))?;
            }
            bound => bound.map_err(fail("binding"))?,
        }
        let place = identity(path).map(|identity| (path.to_owned(), identity));
        let listener = Self { socket, place };
        listen(&listener.socket, BACKLOG).map_err(fail("listening"))?;
        Ok(listener)
    }

    /// One that listens already, inherited from whoever started this process. Its path, if it has one, is not ours to remove.
    pub fn inherited(socket: OwnedFd) -> Result<Self, ListenError> {
        let listens = sockopt::socket_acceptconn(&socket).unwrap_or(false);
        let stream = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
        let unix = sockopt::socket_domain(&socket).is_ok_and(|family| family == AddressFamily::UNIX);
        // Somebody else may have it too, and take the client for which this one was woken.
        let waits_for_none = listens && stream && unix && rustix::io::ioctl_fionbio(&socket, true).is_ok();
        if waits_for_none { Ok(Self { socket, place: None }) } else { Err(ListenError::NotListening) }
    }

    pub fn path(&self) -> Option<&Path> {
        self.place.as_ref().map(|(path, _)| path.as_path())
    }

    /// The next client.
    pub fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.socket, SocketFlags::CLOEXEC)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, mine)) = &self.place
            && identity(path) == Some(*mine)
        {
            // Gone already is what is wanted.
            let _removed = std::fs::remove_file(path);
        }
    }
}

fn new_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let file = std::fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Of a server that was killed.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let fail = |what, errno| ListenError::Path { path: path.to_owned(), what, errno };
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Err(ListenError::NoSocket { path: path.to_owned() });
    }
    let probe = new_socket().map_err(|errno| fail("a socket", errno))?;
    rustix::io::ioctl_fionbio(&probe, true).map_err(|errno| fail("a socket", errno))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {
            let removed = std::fs::remove_file(path);
            removed.map_err(|error| fail("removing", Errno::from_io_error(&error).unwrap_or(Errno::IO)))
        }
        // A full backlog is one of somebody who listens.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse { path: path.to_owned() }),
        Err(errno) => Err(fail("asking who listens", errno)),
    }
}
