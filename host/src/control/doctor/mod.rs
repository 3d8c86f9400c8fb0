//! Can this machine do it, and what is to be done about the rest?
//!
//! **Owns** the checks. Each gives findings: as it should be, worth knowing, or in the way, the last two with what to do.
//! **Must never** change the machine: commands are shown, not run.
//!
//! What the checks look at comes in from outside ([`Machine`]), so that every finding is tested on machines that are folders.

mod checks;

use std::path::PathBuf;

use serde::Serialize;

use super::config::{DeviceConfig, MemorySize};
use crate::device::vfio::sysfs::Sysfs;
use crate::memory::CpuDirt;
use crate::sys::AsymmetricFence;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Ok,
    /// Works, with less than there could be
    Warn,
    /// What was asked for will not work
    Fail,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check, in one word
    pub check: &'static str,
    pub level: Level,
    pub text: String,
    /// What to do, in order; a command begins with `# ` (as root) or `$ `
    pub remedies: Vec<String>,
}

impl Finding {
    fn new(check: &'static str, level: Level, text: impl Into<String>) -> Self {
        Self { check, level, text: text.into(), remedies: Vec::new() }
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedies.push(remedy.into());
        self
    }
}

/// What the machine says about itself.
#[derive(Debug, Clone)]
pub struct Machine {
    /// `/`, or where tests keep a machine's `sys` and `dev`
    pub root: PathBuf,
    /// As `uname -r` has it
    pub kernel: String,
    pub page_size: u64,
    /// `RLIMIT_MEMLOCK`, soft, in bytes; `None`: no limit
    pub memlock: Option<u64>,
    /// The user may lock memory beyond the limit
    pub memlock_exempt: bool,
    /// Why the CPU's stores cannot be tracked
    pub cpu_dirt: Result<(), String>,
    pub membarrier: bool,
}

impl Machine {
    /// The one that this runs on. CPU dirt is tried out, not guessed.
    pub fn this() -> Self {
        let cpu_dirt = CpuDirt::supported().map_err(|error| super::chain(&error));
        Self {
            root: PathBuf::from("/"),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            page_size: rustix::param::page_size() as u64,
            memlock: rustix::process::getrlimit(rustix::process::Resource::Memlock).current,
            memlock_exempt: rustix::process::geteuid().is_root(),
            cpu_dirt,
            membarrier: AsymmetricFence::get() == AsymmetricFence::Membarrier,
        }
    }
}

/// What the operator means to do; what is left out is not checked.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub devices: Vec<DeviceConfig>,
    pub plugins: Vec<PathBuf>,
    pub memory: Option<MemorySize>,
    pub state_dir: Option<PathBuf>,
}

/// All findings, in the order in which they are best read.
pub fn examine(machine: &Machine, wanted: &Wanted) -> Vec<Finding> {
    let sysfs = Sysfs::below(&machine.root);
    let mut findings = checks::kernel(machine);
    findings.extend(checks::cpu_dirt(machine));
    findings.extend(checks::membarrier(machine));
    findings.extend(checks::vfio(machine, wanted));
    findings.extend(checks::memlock(machine, wanted));
    findings.extend(checks::devices(&sysfs, wanted));
    findings.extend(checks::plugins(wanted));
    findings.extend(checks::state_dir(wanted));
    findings
}

/// The most serious level; Ok for no findings.
pub fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
