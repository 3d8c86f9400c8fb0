//! What sysfs says about a device: its driver, its group, the group's other members, its nodes below `/dev`.
//!
//! **Owns** the look-ups and [`Sysfs::viability`]. Reads only; binding a device to vfio-pci is the operator's act, and
//! what it takes is returned as commands. **Must never** write below `/sys`.

use std::io;
use std::path::{Path, PathBuf};

use crate::device::{Power, PowerState};

/// Reads `/sys` and `/dev`, or the same below another root in tests.
#[derive(Debug, Clone)]
pub struct Sysfs {
    root: PathBuf,
}

/// How much a [`Finding`] matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be
    Good,
    /// One of the two ways of opening is not there, or something is worth knowing
    Note,
    /// The device cannot be opened
    Blocker,
}

/// One thing found about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    /// One line
    pub text: String,
    /// Shell commands that the operator can run as root to mend it, in order
    pub commands: Vec<String>,
}

/// A device that shares an IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    pub name: String,
    pub driver: Option<String>,
}

/// Drivers that share a group with VFIO devices: they claim no DMA ownership (PCIe ports, pci-stub).
const HARMLESS_DRIVERS: [&str; 3] = ["pcieport", "pci-stub", "shpchp"];

impl Default for Sysfs {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

impl Sysfs {
    /// With `sys` and `dev` below `root`.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// The device's directory: a PCI device by its address, or a mediated device (mdev) by its UUID. NotFound with the
    /// reason otherwise.
    pub fn device(&self, name: &str) -> io::Result<PathBuf> {
        let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_hexdigit() || matches!(c, ':' | '.' | '-'));
        if !plain || name.starts_with('.') {
            let wanted = "not a PCI address (0000:00:10.0) or an mdev's UUID";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, wanted));
        }
        for bus in ["pci", "mdev"] {
            let path = self.path(format!("sys/bus/{bus}/devices/{name}"));
            if path.exists() {
                return Ok(path);
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, "no such PCI or mdev device"))
    }

    /// The driver that the device is bound to.
    pub fn driver(&self, name: &str) -> io::Result<Option<String>> {
        link_name(&self.device(name)?.join("driver"))
    }

    /// The device's IOMMU group; `None` without an IOMMU.
    pub fn group(&self, name: &str) -> io::Result<Option<u32>> {
        let Some(text) = link_name(&self.device(name)?.join("iommu_group"))? else { return Ok(None) };
        let not_a_number = |_| io::Error::new(io::ErrorKind::InvalidData, format!("IOMMU group {text} is no number"));
        text.parse().map(Some).map_err(not_a_number)
    }

    /// The members of a group with their drivers, by name.
    pub fn members(&self, group: u32) -> io::Result<Vec<Member>> {
        let mut members = Vec::new();
        for entry in std::fs::read_dir(self.path(format!("sys/kernel/iommu_groups/{group}/devices")))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let driver = link_name(&entry.path().join("driver"))?;
            members.push(Member { name, driver });
        }
        members.sort();
        Ok(members)
    }

    /// Members other than `name` that keep the group from being used: bound to a driver that does DMA of its own.
    pub fn foreign_members(&self, name: &str, group: u32) -> io::Result<Vec<Member>> {
        let foreign = |driver: &String| !is_vfio(driver) && !HARMLESS_DRIVERS.contains(&driver.as_str());
        let mut members = self.members(group)?;
        members.retain(|member| member.name != name && member.driver.as_ref().is_some_and(foreign));
        Ok(members)
    }

    /// Whether it is an SR-IOV VF: only those have a PF.
    pub fn is_virtual_function(&self, name: &str) -> io::Result<bool> {
        Ok(link_name(&self.device(name)?.join("physfn"))?.is_some())
    }

    /// VFs of this PF that are enabled; `None` for a device that has none to enable.
    pub fn enabled_vfs(&self, name: &str) -> io::Result<Option<u32>> {
        let text = match std::fs::read_to_string(self.device(name)?.join("sriov_numvfs")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let wrong = |_| io::Error::new(io::ErrorKind::InvalidData, "sriov_numvfs is no number");
        text.trim().parse().map(Some).map_err(wrong)
    }

    /// The kernel's own record of the device's power: reading it resumes nothing. NotFound for a device that is not on the PCI
    /// bus.
    pub fn power(&self, name: &str) -> io::Result<Power> {
        let device = self.device(name)?;
        let state = match std::fs::read_to_string(device.join("power_state"))?.trim() {
            "D0" => PowerState::D0,
            "D1" => PowerState::D1,
            "D2" => PowerState::D2,
            "D3hot" => PowerState::D3Hot,
            "D3cold" => PowerState::D3Cold,
            _ => PowerState::Unknown,
        };
        let status = std::fs::read_to_string(device.join("power/runtime_status"))?;
        Ok(Power { state, suspended: status.trim() == "suspended" })
    }

    /// `/dev/vfio/N` of a group.
    pub fn group_node(&self, group: u32) -> PathBuf {
        self.path(format!("dev/vfio/{group}"))
    }

    /// `/dev/vfio/devices/vfioN` of the device; `None` where the kernel has no cdevs or no VFIO driver is bound.
    pub fn cdev_node(&self, name: &str) -> io::Result<Option<PathBuf>> {
        let directory = self.device(name)?.join("vfio-dev");
        let mut entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(entry) = entries.next() else { return Ok(None) };
        Ok(Some(self.path("dev/vfio/devices").join(entry?.file_name())))
    }

    /// Everything that speaks for or against opening the device, most serious first. Says what to do; does nothing.
    pub fn viability(&self, name: &str) -> Vec<Finding> {
        let mut findings = self.look_at(name).unwrap_or_else(|error| vec![blocker(format!("{name}: {error}"), vec![])]);
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        findings
    }

    fn look_at(&self, name: &str) -> io::Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let is_mdev = self.device(name)?.starts_with(self.path("sys/bus/mdev"));
        match self.driver(name)? {
            // On the mdev bus every driver is a VFIO driver.
            Some(driver) if is_mdev || is_vfio(&driver) => findings.push(good(format!("{name} is bound to {driver}"))),
            Some(driver) => {
                findings.push(blocker(format!("{name} is bound to {driver}, not to vfio-pci"), bind(name, true)));
            }
            None if is_mdev => findings.push(blocker(format!("{name} is bound to no driver"), vec![])),
            None => findings.push(blocker(format!("{name} is bound to no driver"), bind(name, false))),
        }
        match self.group(name)? {
            None => findings.push(blocker(
                format!("{name} has no IOMMU group: the IOMMU is off or absent (firmware setting, intel_iommu=on or amd_iommu=on)"),
                vec![],
            )),
            Some(group) => {
                findings.push(good(format!("{name} is in IOMMU group {group}")));
                for member in self.foreign_members(name, group)? {
                    findings.push(blocker(foreign_text(group, &member), bind(&member.name, true)));
                }
                let container = self.path("dev/vfio/vfio");
                findings.push(node("by group", &[container, self.group_node(group)]));
            }
        }
        let iommufd = self.path("dev/iommu");
        match self.cdev_node(name)? {
            Some(cdev) => findings.push(node("by cdev", &[iommufd, cdev])),
            None => findings.push(note(format!("{name} has no cdev: it can be opened by group only"))),
        }
        Ok(findings)
    }
}

/// Why a group is not viable, in one line.
pub fn foreign_text(group: u32, member: &Member) -> String {
    let driver = member.driver.as_deref().unwrap_or("no driver");
    format!("{} in group {group} is bound to {driver}; bind it to vfio-pci", member.name)
}

/// Commands that bind a PCI device to vfio-pci, whatever has it now.
pub fn bind(name: &str, bound: bool) -> Vec<String> {
    let device = format!("/sys/bus/pci/devices/{name}");
    let mut commands = vec!["modprobe vfio-pci".to_owned(), format!("echo vfio-pci > {device}/driver_override")];
    if bound {
        commands.push(format!("echo {name} > {device}/driver/unbind"));
    }
    commands.push(format!("echo {name} > /sys/bus/pci/drivers_probe"));
    commands
}

/// vfio-pci and its variants (mlx5_vfio_pci, xe-vfio-pci...).
fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

fn good(text: String) -> Finding {
    Finding { severity: Severity::Good, text, commands: vec![] }
}

fn note(text: String) -> Finding {
    Finding { severity: Severity::Note, text, commands: vec![] }
}

fn blocker(text: String, commands: Vec<String>) -> Finding {
    Finding { severity: Severity::Blocker, text, commands }
}

/// One of the two ways of opening: the nodes it takes.
fn node(how: &str, paths: &[PathBuf]) -> Finding {
    use rustix::fs::{Access, access};
    for path in paths {
        let shown = path.display();
        match access(path, Access::READ_OK | Access::WRITE_OK) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOENT) => return note(format!("cannot be opened {how}: there is no {shown}")),
            Err(errno) => return note(format!("cannot be opened {how} by this user: {shown}: {errno}")),
        }
    }
    let last = paths.last().map(|path| path.display().to_string()).unwrap_or_default();
    good(format!("can be opened {how} ({last})"))
}

/// The name of what a symbolic link points to; `None` when there is no link.
fn link_name(link: &Path) -> io::Result<Option<String>> {
    match std::fs::read_link(link) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[path = "sysfs_tests.rs"]
mod tests;
