//! What can go wrong with a plug-in, shaped by what its operator can do about it.

use std::path::PathBuf;

use rustix::io::Errno;

/// A file is not a plug-in that this host can load. One line each, layout differences one line per leaf.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("plug-in {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    /// Not a shared library of this machine, or a damaged one. Nothing of it was run or mapped.
    #[error("plug-in {path}: {what}")]
    NotALibrary { path: PathBuf, what: String },
    /// The dynamic linker refused it.
    #[error("plug-in {path}: cannot be loaded: {what}")]
    Link { path: PathBuf, what: String },
    /// A library, but without our entry.
    #[error("plug-in {path}: not a vfio-mediate plug-in: {what}")]
    NotAPlugin { path: PathBuf, what: String },
    /// A plug-in of another version of the ABI: build it against this host's sdk.
    #[error("plug-in {path}: built for another ABI: {what}")]
    Abi { path: PathBuf, what: String },
    /// The plug-in's own tables break a rule.
    #[error("plug-in {path}: {what}")]
    Malformed { path: PathBuf, what: String },
}

/// A library was not registered; nothing of it stays but its mapping.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    #[error("plug-in {name} {version} is registered already")]
    Duplicate { name: String, version: String },
    #[error("plug-in {name}: its init failed: {errno}")]
    Init { name: String, errno: Errno },
    #[error("the host is shutting down")]
    ShuttingDown,
}

impl RegisterError {
    pub fn errno(&self) -> Errno {
        match self {
            Self::Duplicate { .. } => Errno::EXIST,
            Self::Init { errno, .. } => *errno,
            Self::ShuttingDown => Errno::NODEV,
        }
    }
}

/// A device was not opened through a plug-in.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The plug-in says that the device is its own, and that it cannot serve it.
    #[error("plug-in {plugin} cannot serve {device}: probe failed: {errno}")]
    Probe { plugin: String, device: String, errno: Errno },
    #[error("plug-in {plugin} cannot open {device}: {errno}")]
    Open { plugin: String, device: String, errno: Errno },
    /// The tables that `open` returned break a rule of the ABI.
    #[error("plug-in {plugin}, device {device}: {what}")]
    Malformed { plugin: String, device: String, what: String },
    #[error("plug-in {plugin} serves {limit} devices already, which is its limit")]
    TooMany { plugin: String, limit: u32 },
    /// Try again: a plug-in that matches the device is not ready yet, and nobody before it claims the device.
    #[error("plug-in {plugin}, which matches {device}, is being registered")]
    Registering { plugin: String, device: String },
    /// A plug-in that matches the device is on its way out, and nobody else claims the device. Without it the device would
    /// not be mediated; once it is gone that is what an open asks for.
    #[error("plug-in {plugin}, which matches {device}, is being unregistered")]
    Withdrawn { plugin: String, device: String },
    /// The registry was shut down.
    #[error("the host is shutting down")]
    ShuttingDown,
}

impl OpenError {
    pub fn errno(&self) -> Errno {
        match self {
            Self::Probe { errno, .. } | Self::Open { errno, .. } => *errno,
            Self::Malformed { .. } => Errno::PROTO,
            Self::TooMany { .. } => Errno::USERS,
            Self::Registering { .. } => Errno::AGAIN,
            Self::Withdrawn { .. } | Self::ShuttingDown => Errno::NODEV,
        }
    }
}

/// A plug-in was not retired.
#[derive(Debug, thiserror::Error)]
pub enum UnregisterError {
    /// A number that this registry never gave.
    #[error("no such plug-in")]
    Unknown,
    /// It takes no new devices, and retires as soon as these are closed.
    #[error("plug-in {plugin} is still in use by {}", holders.join(", "))]
    Busy { plugin: String, holders: Vec<String> },
}

impl UnregisterError {
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unknown => Errno::NOENT,
            Self::Busy { .. } => Errno::BUSY,
        }
    }
}
