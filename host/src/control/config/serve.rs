//! Devices that other processes use over vfio-user, as the operator configures them.
//!
//! **Must never** serve some devices of a machine and not others: one host is one VM's.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{ConfigError, DeviceConfig, check_socket_path};
use crate::control::units::ByteSize;

/// Where a device's clients connect: `PATH`, or `fd:N`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServeAt {
    Path(PathBuf),
    /// A socket that listens already, inherited from whoever started the process
    Inherited(i32),
}

impl FromStr for ServeAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("fd:") {
            None if text.is_empty() => Err("a path, or fd:N".to_owned()),
            None => Ok(Self::Path(text.into())),
            Some(number) => {
                let number = number.parse().ok().filter(|number| *number > 2);
                number.map(Self::Inherited).ok_or_else(|| format!("{text:?}: write fd:3, or a higher number"))
            }
        }
    }
}

impl std::fmt::Display for ServeAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Inherited(number) => write!(f, "fd:{number}"),
        }
    }
}

/// How one device is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeConfig {
    pub at: ServeAt,
    /// The client gets the device's own file, to map its regions: trusted like this host. Refused with claims
    pub share_device_fd: bool,
    /// Stores need no answer (clients post them as long as no region can be mapped). `None`: unless a region can be mapped
    pub posted_writes: Option<bool>,
}

impl ServeConfig {
    pub fn at(at: ServeAt) -> Self {
        Self { at, share_device_fd: false, posted_writes: None }
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if let ServeAt::Path(path) = &self.at {
            check_socket_path(path).map_err(|what| ("socket", what))?;
        }
        if self.share_device_fd && self.posted_writes == Some(true) {
            let what = "clients post no stores to a device that they can map: choose one of share_device_fd and \
                        posted_writes";
            return Err(("posted_writes", what.to_owned()));
        }
        if !self.share_device_fd && self.posted_writes == Some(false) {
            let what = "clients post stores to a device that they cannot map: false needs share_device_fd = true";
            return Err(("posted_writes", what.to_owned()));
        }
        Ok(())
    }
}

/// What only all devices together can be asked. Whether they are served.
pub(super) fn check(devices: &[DeviceConfig], memory: Option<ByteSize>, listen: bool) -> Result<bool, ConfigError> {
    let whole = |key, what: String| ConfigError::Whole { key, what };
    let served = devices.iter().filter_map(|device| device.serve.as_ref()).count();
    if served == 0 {
        return Ok(false);
    }
    if let Some(device) = devices.iter().find(|device| device.serve.is_none()) {
        let what = format!("{} has none: one VM uses all devices of a host, or none", device.name);
        return Err(whole("socket", what));
    }
    if memory.is_some() {
        let what = "the VM that uses the devices brings its own: remove it, or the sockets";
        return Err(whole("memory", what.to_owned()));
    }
    if listen {
        let what = "the guest of a served device is moved by its VMM: remove it, or the sockets";
        return Err(whole("listen", what.to_owned()));
    }
    let mut seen = std::collections::BTreeSet::new();
    for serve in devices.iter().filter_map(|device| device.serve.as_ref()) {
        serve.check().map_err(|(key, what)| whole(key, what))?;
        if !seen.insert(serve.at.to_string()) {
            return Err(whole("socket", format!("{} is given twice", serve.at)));
        }
    }
    Ok(true)
}

/// Relative paths start at the file's folder.
pub(super) fn below(folder: &Path, at: ServeAt) -> ServeAt {
    match at {
        ServeAt::Path(path) => ServeAt::Path(folder.join(path)),
        inherited @ ServeAt::Inherited(_) => inherited,
    }
}
