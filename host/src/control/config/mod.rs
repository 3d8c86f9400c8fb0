//! What the operator wants: a TOML file, flags over it, and one checked [`Config`].
//!
//! **Owns** the file's grammar ([`file`]) and the rules that a whole configuration keeps ([`Draft::finish`]). **Must never**
//! guess: an unknown key, a wrong unit, a device named twice and a missing memory size are errors that name file, line and
//! key, and say what to write.

mod file;
mod serve;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::address::{self, AddressError};
use super::units::ByteSize;
use crate::device::vfio::VfToken;
use crate::memory::{PAGE_SIZE, RAM_SIZE_MAX};

pub use serve::{ServeAt, ServeConfig};

/// Most devices of one host. The stream's own limit is not lower.
pub const DEVICES_MAX: usize = 64;
/// Most plug-ins of one host.
pub const PLUGINS_MAX: usize = 64;
/// Most devices of one plug-in, unless the operator says less.
pub const PLUGIN_DEVICES_MAX: u32 = 256;
/// Largest configuration file, in bytes.
pub const FILE_MAX: u64 = 1 << 20;
/// Longest time that may be configured: a day.
pub const MS_MAX: u64 = 86_400_000;
/// Most pre-copy rounds that may be configured.
pub const ROUNDS_MAX: u32 = 10_000;
/// `sun_path` of a UNIX socket, without its end.
const SOCKET_PATH_MAX: usize = 107;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {source}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: larger than {FILE_MAX} bytes: not a configuration of this program", .path.display())]
    TooLarge { path: PathBuf },
    /// One place in the file.
    #[error("{}:{line}: {key}: {what}", .path.display())]
    Wrong { path: PathBuf, line: usize, key: String, what: String },
    /// Nothing in the file and no flag said it, or both together do not make sense.
    #[error("{key}: {what}")]
    Whole { key: &'static str, what: String },
}

/// How a real device is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OpenBy {
    /// By its own character device and iommufd where the kernel has them, by group otherwise
    #[default]
    Auto,
    /// By IOMMU group and container
    Group,
    /// By character device and iommufd
    Cdev,
}

/// What is written for a device: `vfio:ADDRESS`, `vfio:UUID`, `sim:MODEL`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// A PCI address in full, lower case, or a mediated device's UUID
    Vfio(String),
    /// As [`crate::device::sim::open`] takes it, with its `sim:`
    Sim(String),
}

/// Text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no device: write vfio:0000:00:10.0 (a PCI address in full), vfio:UUID (an mdev) or sim:edu")]
pub struct BadDeviceName(String);

impl FromStr for DeviceName {
    type Err = BadDeviceName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadDeviceName(text.to_owned());
        match text.split_once(':') {
            Some(("vfio", name)) if is_pci_address(name) || is_uuid(name) => Ok(Self::Vfio(name.to_ascii_lowercase())),
            Some(("sim", model)) if !model.is_empty() && model.chars().all(|c| c.is_ascii_graphic()) => {
                Ok(Self::Sim(text.to_owned()))
            }
            _ => Err(bad()),
        }
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vfio(name) => write!(f, "vfio:{name}"),
            Self::Sim(spec) => f.write_str(spec),
        }
    }
}

/// `dddd:bb:dd.f`, hexadecimal; a domain may have more digits.
fn is_pci_address(text: &str) -> bool {
    let hex = |part: &str, lengths: std::ops::RangeInclusive<usize>| {
        lengths.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit())
    };
    let mut parts = text.split(':');
    let (Some(domain), Some(bus), Some(slot), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let Some((device, function)) = slot.split_once('.') else { return false };
    let device_fits = u8::from_str_radix(device, 16).is_ok_and(|device| device < 32);
    let function_fits = matches!(function.as_bytes(), [b'0'..=b'7']);
    hex(domain, 4..=8) && hex(bus, 2..=2) && hex(device, 2..=2) && device_fits && function_fits
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// A device to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    pub name: DeviceName,
    /// Without meaning for a simulated device
    pub open: OpenBy,
    /// Never with a simulated device
    pub vf_token: Option<VfToken>,
    /// Over vfio-user; for all devices of a host, or for none
    pub serve: Option<ServeConfig>,
}

/// A plug-in to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginConfig {
    pub path: PathBuf,
    /// Devices that it may have open at once, 1 to [`PLUGIN_DEVICES_MAX`]; one more is refused (EUSERS)
    pub devices_max: u32,
}

impl From<PathBuf> for PluginConfig {
    fn from(path: PathBuf) -> Self {
        Self { path, devices_max: PLUGIN_DEVICES_MAX }
    }
}

/// Guest memory in bytes: a positive multiple of the page size, not more than the host supports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize(u64);

impl MemorySize {
    pub fn new(size: ByteSize) -> Result<Self, String> {
        match size.0 {
            0 => Err("guest memory cannot be empty".to_owned()),
            bytes if bytes > RAM_SIZE_MAX => Err(format!("{size} is more than {}", ByteSize(RAM_SIZE_MAX))),
            bytes if bytes % PAGE_SIZE != 0 => Err(format!("{size} is not a multiple of the page size {PAGE_SIZE}")),
            bytes => Ok(Self(bytes)),
        }
    }

    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// Least bandwidth that a migration may be limited to, in bytes per second: below it, deadlines would strike first.
pub const BANDWIDTH_MIN: u64 = 64 << 10;

/// Bytes per second, written as a size: 100M. At least [`BANDWIDTH_MIN`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth(u64);

impl Bandwidth {
    pub fn bytes_per_second(self) -> u64 {
        self.0
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ByteSize(bytes) = text.parse().map_err(|error: super::units::BadQuantity| error.to_string())?;
        let too_slow = || format!("{text} a second is less than {}", ByteSize(BANDWIDTH_MIN));
        if bytes >= BANDWIDTH_MIN { Ok(Self(bytes)) } else { Err(too_slow()) }
    }
}

/// What to do when pre-copy does not get anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnStall {
    /// Give up; the guest stays
    Cancel,
    /// Switch over, whatever the downtime
    Force,
}

/// Limits of migrations; what is `None` is the migration module's default. Times in milliseconds, 1 to [`MS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    pub downtime_ms_max: Option<u64>,
    /// Of one migration out; `None`: as fast as the link
    pub bandwidth_max: Option<Bandwidth>,
    pub rounds_max: Option<u32>,
    pub stalled_rounds_max: Option<u32>,
    pub on_stall: Option<OnStall>,
    pub answer_ms_max: Option<u64>,
    pub switchover_answer_ms_max: Option<u64>,
    pub pause_ms_max: Option<u64>,
    pub device_ms_max: Option<u64>,
    pub record_ms_max: Option<u64>,
}

/// One host's whole configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    pub devices: Vec<DeviceConfig>,
    /// In the operator's order: the first that claims a device has it
    pub plugins: Vec<PluginConfig>,
    /// `None`: the devices are served, and their clients bring the memory
    pub memory: Option<MemorySize>,
    pub control_socket: PathBuf,
    /// The migration journal's folder; one host at a time
    pub state_dir: PathBuf,
    /// Take a guest in from this address; without it a new guest starts here
    pub listen: Option<std::net::SocketAddr>,
    pub insecure: bool,
    pub limits: Limits,
}

/// A configuration in the making: the file first, then flags, then [`Self::finish`].
#[derive(Debug, Clone, Default)]
pub struct Draft {
    pub devices: Vec<DeviceConfig>,
    pub plugins: Vec<PluginConfig>,
    pub memory: Option<ByteSize>,
    pub control_socket: Option<PathBuf>,
    pub state_dir: Option<PathBuf>,
    pub listen: Option<String>,
    pub insecure: bool,
    pub limits: Limits,
}

impl Draft {
    /// Reads a file. Relative paths in it start at the file's folder.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        file::read(path)
    }

    /// As [`Self::read`], from text; `path` is what errors name and relative paths start at.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        file::parse(path, text)
    }

    /// Checks what only the whole can be asked.
    pub fn finish(self) -> Result<Config, ConfigError> {
        let whole = |key, what: String| ConfigError::Whole { key, what };
        if self.devices.is_empty() {
            let what = "no device: write --device vfio:0000:00:10.0, or a [[devices]] table in the file";
            return Err(whole("devices", what.to_owned()));
        }
        if self.devices.len() > DEVICES_MAX {
            return Err(whole("devices", format!("{} devices, at most {DEVICES_MAX}", self.devices.len())));
        }
        if self.plugins.len() > PLUGINS_MAX {
            return Err(whole("plugins", format!("{} plug-ins, at most {PLUGINS_MAX}", self.plugins.len())));
        }
        if let Some(twice) = first_duplicate(&self.devices) {
            return Err(whole("devices", format!("{twice} is listed twice")));
        }
        if let Some(device) = self.devices.iter().find(|d| d.vf_token.is_some() && matches!(d.name, DeviceName::Sim(_)))
        {
            return Err(whole("vf_token", format!("{} is simulated and takes no VF token", device.name)));
        }
        let served = serve::check(&self.devices, self.memory, self.listen.is_some())?;
        if self.memory.is_none() && !served {
            let what = "no size: write --memory 256M, or memory = \"256M\" in the file";
            return Err(whole("memory", what.to_owned()));
        }
        let memory = self.memory.map(MemorySize::new).transpose().map_err(|what| whole("memory", what))?;
        let listen = self.listen.as_deref().map(|text| address::listen(text, self.insecure)).transpose();
        let listen = listen.map_err(|error: AddressError| whole("listen", error.to_string()))?;
        let control_socket = self.control_socket.unwrap_or_else(default_control_socket);
        check_socket_path(&control_socket).map_err(|what| whole("control_socket", what))?;
        Ok(Config {
            devices: self.devices,
            plugins: self.plugins,
            memory,
            control_socket,
            state_dir: self.state_dir.unwrap_or_else(default_state_dir),
            listen,
            insecure: self.insecure,
            limits: self.limits,
        })
    }
}

/// A real device can be opened once only; two simulated ones of the same kind are two devices.
fn first_duplicate(devices: &[DeviceConfig]) -> Option<&DeviceName> {
    let mut seen = std::collections::BTreeSet::new();
    devices.iter().map(|device| &device.name).find(|name| match name {
        DeviceName::Vfio(address) => !seen.insert(address),
        DeviceName::Sim(_) => false,
    })
}

fn check_socket_path(path: &Path) -> Result<(), String> {
    let length = path.as_os_str().len();
    if path.file_name().is_none() {
        return Err(format!("{} is no file name", path.display()));
    }
    if length > SOCKET_PATH_MAX {
        return Err(format!("{length} bytes long, a UNIX socket's path has at most {SOCKET_PATH_MAX}"));
    }
    Ok(())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// An absolute folder that an environment variable names; anything else counts as unset, as XDG has it.
fn folder_of(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Where host and commands meet when nobody says: `/run` for root, the user's own folders otherwise.
pub fn default_control_socket() -> PathBuf {
    let run = if is_root() { Some(PathBuf::from("/run")) } else { folder_of("XDG_RUNTIME_DIR") };
    run.map_or_else(default_state_dir, |run| run.join("vfio-mediate")).join("control.sock")
}

/// Where the journal lives when nobody says. Without a home it is root's folder, which will say no.
pub fn default_state_dir() -> PathBuf {
    let home_state = || folder_of("HOME").map(|home| home.join(".local/state"));
    let own = if is_root() { None } else { folder_of("XDG_STATE_HOME").or_else(home_state) };
    own.unwrap_or_else(|| PathBuf::from("/var/lib")).join("vfio-mediate")
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
