//! A client: how a VMM drives a device over vfio-user, its migration included.
//!
//! **Owns** a VMM's side of the protocol: what is agreed on, every command, the answers to the server's DMA. **Must never** trust a
//! server: every reply is checked against its request, and every length against what there is room for, before it is used.
//!
//! Calls block, each with a deadline, and may be made by many threads at a time; their requests are on their way together.
//!
//! ```no_run
//! use vfio_mediate::frontend::vfio_user::client::Client;
//! # fn main() -> Result<(), vfio_mediate::frontend::vfio_user::client::Error> {
//! let client = Client::connect("/run/device.sock".as_ref())?;
//! let mut id = [0; 4];
//! client.region_read(7, 0, &mut id)?;
//! # Ok(())
//! # }
//! ```

mod connection;
mod dma;
mod error;
mod features;
mod memory;
mod migrate;
mod reader;
mod regions;
#[cfg(test)]
mod tests;

pub use error::{Error, Failure, Result, Violation};
pub use memory::GuestMemory;
pub use migrate::{Guest, MigrateError, Migrated, Policy, migrate};
pub use regions::RegionAnswer;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use self::connection::{Ask, Connection, Reply};
use self::error::wrong;
use super::wire::{
    Capabilities, Command, DATA_XFER_MAX, MSG_FDS_MAX, MigrationCapability, PAGE_SIZE, VERSION_DATA_MAX, VERSION_MAJOR,
    VERSION_MINOR_MAX, Version,
};

/// How long a server may take for an answer, unless a client is told otherwise. QEMU is as patient.
pub const SERVER_PATIENCE: Duration = Duration::from_secs(5);

/// What an embedder chooses.
#[derive(Debug, Clone)]
pub struct Options {
    /// For the server to answer, or to take a message; then the connection ends
    pub patience: Duration,
    /// For a device's DMA to memory that was mapped without a file. `None`: it fails with EFAULT
    pub memory: Option<Arc<dyn GuestMemory>>,
}

impl Default for Options {
    fn default() -> Self {
        Self { patience: SERVER_PATIENCE, memory: None }
    }
}

/// What both sides can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    pub minor: u16,
    /// Most descriptors that the server takes in one message
    pub msg_fds: u32,
    /// Most bytes of data in one message, either way
    pub data_xfer_size: u32,
    pub dma_maps: u32,
    pub write_multiple: bool,
}

/// A connection to a device.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    agreed: Agreed,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    pub fn connect(path: &Path) -> Result<Self> {
        Self::connect_with(path, Options::default())
    }

    pub fn connect_with(path: &Path, options: Options) -> Result<Self> {
        Self::with(UnixStream::connect(path).map_err(Error::Connect)?, options)
    }

    /// A socket that is connected already.
    pub fn over(stream: UnixStream) -> Result<Self> {
        Self::with(stream, Options::default())
    }

    pub fn with(stream: UnixStream, options: Options) -> Result<Self> {
        let connection = Connection::new(OwnedFd::from(stream), options.patience, options.memory);
        let connection = connection.map_err(|errno| Error::Connect(errno.into()))?;
        let agreed = negotiate(&connection)?;
        Ok(Self { connection, agreed })
    }

    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// Why the connection is of no use any more, if it is.
    pub fn ended(&self) -> Option<Failure> {
        self.connection.ended()
    }

    /// Answers the device's DMA until `deadline`. Calls that wait do so by themselves; a VMM whose threads are all busy elsewhere
    /// has one that does only this.
    pub fn serve(&self, deadline: Instant) -> Result<()> {
        self.connection.serve(deadline).map_err(Error::Ended)
    }

    pub fn reset(&self) -> Result<()> {
        self.ask(&Ask::new(Command::DeviceReset, &[], 0), &mut []).map(drop)
    }

    /// A reply has exactly its fixed part at least.
    fn ask(&self, ask: &Ask<'_>, into: &mut [u8]) -> Result<Reply> {
        ask_over(&self.connection, ask, into)
    }

    /// A reply that does not answer what was asked: the connection ends.
    fn wrong(&self, command: Command) -> Error {
        Error::Ended(self.connection.end(Failure::Violation(Violation::WrongReply { command })))
    }

    fn checked<T>(&self, command: Command, parsed: super::wire::Result<T>) -> Result<T> {
        parsed.map_err(wrong(command)).map_err(|why| Error::Ended(self.connection.end(why)))
    }
}

impl AsFd for Client {
    /// To wait for requests of the server, which [`Client::serve`] then answers. Not to be read from.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.socket()
    }
}

fn ask_over(connection: &Connection, ask: &Ask<'_>, into: &mut [u8]) -> Result<Reply> {
    let command = ask.command;
    let reply = connection.ask(ask, into).map_err(Error::Ended)?;
    let reply = reply.map_err(|errno| Error::Refused { command, errno })?;
    if reply.fixed().len() != ask.fixed {
        let why = Failure::Violation(Violation::WrongReply { command });
        return Err(Error::Ended(connection.end(why)));
    }
    Ok(reply)
}

/// VERSION. A server that answers with more than was proposed is none that can be talked to.
fn negotiate(connection: &Connection) -> Result<Agreed> {
    let capabilities = Capabilities {
        max_msg_fds: Some(MSG_FDS_MAX as u32),
        max_data_xfer_size: Some(DATA_XFER_MAX),
        max_dma_maps: None,
        pgsizes: Some(PAGE_SIZE),
        twin_socket: None,
        write_multiple: Some(true),
        migration: Some(MigrationCapability { pgsize: PAGE_SIZE, max_bitmap_size: None }),
    };
    let proposed = Version { major: VERSION_MAJOR, minor: VERSION_MINOR_MAX, capabilities };
    let mut request = Vec::new();
    proposed.write(&mut request);
    let mut data = vec![0; 4 + VERSION_DATA_MAX];
    let reply = ask_over(connection, &Ask::new(Command::Version, &request, 0), &mut data)?;
    data.truncate(reply.data);
    let refused = |_: Errno| Error::Ended(connection.end(Failure::Violation(Violation::Version)));
    let answer = Version::parse(&data).map_err(|error| refused(error.errno()))?;
    let theirs = answer.capabilities;
    if answer.major != VERSION_MAJOR
        || answer.minor > VERSION_MINOR_MAX
        || theirs.max_data_xfer_size() == 0
        || theirs.pgsizes() & PAGE_SIZE == 0
    {
        return Err(refused(Errno::PROTO));
    }
    Ok(Agreed {
        minor: answer.minor,
        msg_fds: theirs.max_msg_fds().min(MSG_FDS_MAX as u32),
        data_xfer_size: theirs.max_data_xfer_size().min(DATA_XFER_MAX),
        dma_maps: theirs.max_dma_maps(),
        write_multiple: theirs.write_multiple == Some(true),
    })
}
