//! What can go wrong between a client and its server.

use rustix::io::Errno;

use crate::frontend::vfio_user::wire::{Command, WireError};

/// The server does not keep to the protocol; the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("a message of {size} bytes")]
    Size { size: u32 },
    #[error("descriptors that nobody asked for, or more than can be taken")]
    Descriptors,
    #[error("a reply to nothing that is waited for")]
    Unsolicited,
    #[error("a reply to {command:?} that does not answer it")]
    WrongReply { command: Command },
    #[error("a message that is neither command nor reply")]
    Kind,
    #[error("more requests than can wait for an answer")]
    Flood,
    #[error("no version that can be agreed on")]
    Version,
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("the server closed it")]
    Closed,
    #[error("{0}")]
    Violation(Violation),
    #[error("sending: {0}")]
    Send(Errno),
    #[error("receiving: {0}")]
    Receive(Errno),
    #[error("the server did not answer in time")]
    Unanswered,
}

/// Why a call failed, by what its caller can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device or its server says no; the connection goes on
    #[error("{command:?}: {errno}")]
    Refused { command: Command, errno: Errno },
    /// Connect again: the server keeps the device's state
    #[error("the connection has ended: {0}")]
    Ended(Failure),
    /// The caller's mistake; nothing was sent
    #[error("{0}")]
    Invalid(&'static str),
    #[error("no connection: {0}")]
    Connect(#[source] std::io::Error),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What the server said, if it was asked and refused.
    pub fn refusal(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Ended(_) | Self::Invalid(_) | Self::Connect(_) => None,
        }
    }
}

/// A reply whose bytes are no answer.
pub(super) fn wrong(command: Command) -> impl Fn(WireError) -> Failure {
    move |_| Failure::Violation(Violation::WrongReply { command })
}
