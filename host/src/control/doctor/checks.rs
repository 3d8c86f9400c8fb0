//! One function for each thing that is looked at.

use std::fs;

use rustix::fs::{Access, access};

use super::{Finding, Level, Machine, Wanted};
use crate::control::config::{DeviceName, OpenBy};
use crate::control::units::ByteSize;
use crate::device::vfio::sysfs::{Severity, Sysfs};
use crate::memory::PAGE_SIZE;
use crate::migration::journal::{FileStore, Standing, recover};
use crate::plugin::Library;

/// First kernels with what is used: PAGEMAP_SCAN and asynchronous write-protection; VFIO character devices.
const CPU_DIRT_SINCE: (u32, u32) = (6, 7);
const CDEV_SINCE: (u32, u32) = (6, 6);

/// Locked besides guest memory: device regions and the kernel's own pages.
const MEMLOCK_SPARE: u64 = 64 << 20;

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

pub(super) fn kernel(machine: &Machine) -> Vec<Finding> {
    let mut findings = Vec::new();
    let finding = match version(&machine.kernel) {
        None => Finding::new("kernel", Level::Warn, format!("kernel {}: its version cannot be read", machine.kernel)),
        Some(found) if found >= CPU_DIRT_SINCE => {
            Finding::new("kernel", Level::Ok, format!("kernel {}", machine.kernel))
        }
        Some(found) => {
            let lacks =
                if found >= CDEV_SINCE { "CPU dirt tracking" } else { "CPU dirt tracking and VFIO character devices" };
            let (major, minor) = CPU_DIRT_SINCE;
            Finding::new("kernel", Level::Warn, format!("kernel {} is older than {lacks}", machine.kernel))
                .remedy(format!("run Linux {major}.{minor} or later"))
        }
    };
    findings.push(finding);
    if machine.page_size != PAGE_SIZE {
        let text = format!("pages of {} bytes: this host works with pages of {PAGE_SIZE} only", machine.page_size);
        findings.push(Finding::new("kernel", Level::Fail, text).remedy("run a kernel that was built with 4 KiB pages"));
    }
    findings
}

pub(super) fn cpu_dirt(machine: &Machine) -> Option<Finding> {
    Some(match &machine.cpu_dirt {
        Ok(()) => {
            Finding::new("cpu_dirt", Level::Ok, "the guest's own stores can be tracked (PAGEMAP_SCAN, userfaultfd)")
        }
        Err(why) => Finding::new(
            "cpu_dirt",
            Level::Fail,
            format!("the guest's own stores cannot be tracked, so its memory cannot be migrated: {why}"),
        )
        .remedy("run Linux 6.7 or later with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP")
        .remedy("in a container or under seccomp: allow userfaultfd and /proc/self/pagemap"),
    })
}

pub(super) fn membarrier(machine: &Machine) -> Option<Finding> {
    Some(if machine.membarrier {
        Finding::new("membarrier", Level::Ok, "device accesses are guarded without a fence (membarrier)")
    } else {
        Finding::new("membarrier", Level::Warn, "no expedited membarrier: each device access costs a full fence more")
            .remedy("allow membarrier(2) in the seccomp filter, or run a kernel with CONFIG_MEMBARRIER")
    })
}

fn wants_vfio(wanted: &Wanted) -> bool {
    wanted.devices.iter().any(|device| matches!(device.name, DeviceName::Vfio(_)))
}

/// The driver, the nodes and the groups that every real device needs. Without a real device in the configuration their
/// absence is worth knowing only.
pub(super) fn vfio(machine: &Machine, wanted: &Wanted) -> Vec<Finding> {
    let absent = if wants_vfio(wanted) { Level::Fail } else { Level::Warn };
    let path = |relative: &str| machine.root.join(relative);
    let mut findings = Vec::new();

    if path("sys/bus/pci/drivers/vfio-pci").exists() {
        findings.push(Finding::new("vfio", Level::Ok, "the driver vfio-pci is there"));
    } else {
        findings.push(Finding::new("vfio", absent, "the driver vfio-pci is not loaded").remedy("# modprobe vfio-pci"));
    }

    let groups = fs::read_dir(path("sys/kernel/iommu_groups")).map_or(0, Iterator::count);
    findings.push(match groups {
        0 => Finding::new("iommu", absent, "no IOMMU groups: the IOMMU is off or absent")
            .remedy("switch on VT-d or AMD-Vi in the firmware")
            .remedy("boot with intel_iommu=on (Intel); AMD's is on by default"),
        count => Finding::new("iommu", Level::Ok, format!("{count} IOMMU groups")),
    });

    let usable = |relative: &str| access(path(relative), Access::READ_OK | Access::WRITE_OK);
    let container = usable("dev/vfio/vfio");
    let iommufd = usable("dev/iommu");
    for (check, node, result, how, module) in [
        ("group", "/dev/vfio/vfio", container, "by group", "vfio_iommu_type1"),
        ("cdev", "/dev/iommu", iommufd, "by character device", "iommufd"),
    ] {
        let needed = wanted.devices.iter().any(|device| match (&device.name, device.open) {
            (DeviceName::Sim(_), _) => false,
            (DeviceName::Vfio(_), OpenBy::Auto) => container.is_err() && iommufd.is_err(),
            (DeviceName::Vfio(_), OpenBy::Group) => check == "group",
            (DeviceName::Vfio(_), OpenBy::Cdev) => check == "cdev",
        });
        let level = if needed { Level::Fail } else { Level::Warn };
        findings.push(match result {
            Ok(()) => Finding::new(check, Level::Ok, format!("{node} can be opened: devices can be used {how}")),
            Err(rustix::io::Errno::NOENT) => {
                Finding::new(check, level, format!("no {node}: devices cannot be used {how}"))
                    .remedy(format!("# modprobe {module}"))
            }
            Err(errno) => Finding::new(check, level, format!("{node}: {errno}: this user cannot use devices {how}"))
                .remedy(format!(
                    "run as root, or give this user {node} and the device's node below /dev/vfio (udev rule, chown)"
                )),
        });
    }
    findings
}

/// VFIO pins all guest memory that it maps, and counts it against the limit.
pub(super) fn memlock(machine: &Machine, wanted: &Wanted) -> Option<Finding> {
    let memory = wanted.memory?.bytes();
    if !wants_vfio(wanted) {
        return None;
    }
    let needed = memory.saturating_add(MEMLOCK_SPARE);
    Some(match machine.memlock {
        None => Finding::new("memlock", Level::Ok, "no limit on locked memory"),
        Some(_) if machine.memlock_exempt => {
            Finding::new("memlock", Level::Ok, "root may lock memory beyond the limit")
        }
        Some(limit) if limit >= needed => {
            Finding::new("memlock", Level::Ok, format!("{limit} bytes may be locked, {memory} are guest memory"))
        }
        Some(limit) => {
            let text = format!("{limit} bytes may be locked, guest memory of {} needs {needed}", ByteSize(memory));
            Finding::new("memlock", Level::Fail, text)
                .remedy(format!("# prlimit --pid $PPID --memlock={needed}   (this shell and what it starts)"))
                .remedy(format!(
                    "systemd: LimitMEMLOCK={needed}; login: memlock in /etc/security/limits.conf, in KiB: {}",
                    needed / 1024
                ))
        }
    })
}

pub(super) fn devices(sysfs: &Sysfs, wanted: &Wanted) -> Vec<Finding> {
    let mut findings = Vec::new();
    for device in &wanted.devices {
        match &device.name {
            DeviceName::Vfio(name) => findings.extend(sysfs.viability(name).into_iter().map(|found| Finding {
                check: "device",
                level: match found.severity {
                    Severity::Good => Level::Ok,
                    Severity::Note => Level::Warn,
                    Severity::Blocker => Level::Fail,
                },
                text: found.text,
                remedies: found.commands.iter().map(|command| format!("# {command}")).collect(),
            })),
            DeviceName::Sim(spec) => findings.push(match crate::device::sim::open(spec) {
                Ok(_) => Finding::new("device", Level::Ok, format!("{spec} is simulated and opens")),
                Err(error) => Finding::new("device", Level::Fail, crate::control::chain(&error)),
            }),
        }
    }
    findings
}

/// Each file is loaded, and not asked to do anything.
pub(super) fn plugins(wanted: &Wanted) -> Vec<Finding> {
    let check = |path| match Library::open(path) {
        Err(error) => Finding::new("plugin", Level::Fail, crate::control::chain(&error))
            .remedy(format!("$ vfio-mediate plugin check {}", path.display())),
        Ok(library) => {
            let text = format!("{} {} ({})", library.name(), library.version(), path.display());
            if library.panic_aborts() {
                Finding::new(
                    "plugin",
                    Level::Warn,
                    format!("{text} was built with panic=abort: a panic in it ends the host"),
                )
                .remedy("ask the vendor for a build with panic=unwind")
            } else {
                Finding::new("plugin", Level::Ok, text)
            }
        }
    };
    wanted.plugins.iter().map(|path| check(path.as_path())).collect()
}

/// Looks at the journals without taking part: nothing is created.
pub(super) fn state_dir(wanted: &Wanted) -> Option<Finding> {
    let directory = wanted.state_dir.as_ref()?;
    let shown = directory.display();
    if !directory.exists() {
        return Some(Finding::new("journal", Level::Ok, format!("{shown} does not exist yet: no migration so far")));
    }
    let standing = FileStore::new(directory).map_err(|error| error.to_string());
    let standing = standing.and_then(|store| recover(&store).map_err(|error| crate::control::chain(&error)));
    Some(match standing {
        Err(why) => Finding::new("journal", Level::Fail, format!("{shown}: {why}"))
            .remedy("make the folder readable and writable for the user that runs the host; never delete it"),
        Ok(Standing::InDoubt { id, peer, explanation }) => {
            let with = if peer.is_empty() { String::new() } else { format!(" with {peer}") };
            Finding::new("journal", Level::Fail, format!("{shown}: migration {id}{with} is in doubt: {explanation}"))
                .remedy("start both hosts: they settle it by themselves when they reach each other")
                .remedy("or see `vfio-mediate resolve --help`")
        }
        Ok(Standing::Idle) => Finding::new("journal", Level::Ok, format!("{shown}: no migration so far")),
        Ok(Standing::MayRun) => Finding::new("journal", Level::Ok, format!("{shown}: the guest belongs to this host")),
        Ok(Standing::MustNotRun) => Finding::new(
            "journal",
            Level::Ok,
            format!("{shown}: the guest belongs to another host; this one can receive it"),
        ),
    })
}
