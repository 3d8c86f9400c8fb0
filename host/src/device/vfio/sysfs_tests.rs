//! A machine in a directory: what sysfs would say, and what we make of it.

use std::fs::{create_dir_all, write};
use std::os::unix::fs::symlink;

use super::*;

/// A machine in a directory: an IOMMU group 5 of two devices, and a mediated device in group 9.
struct Fake {
    root: tempfile::TempDir,
}

impl Fake {
    fn new() -> Self {
        let fake = Self { root: tempfile::tempdir().unwrap() };
        fake.device("pci", "0000:00:10.0", 5);
        fake.device("pci", "0000:00:11.0", 5);
        for node in ["dev/vfio/vfio", "dev/vfio/5", "dev/iommu"] {
            fake.file(node);
        }
        fake
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn file(&self, path: &str) {
        create_dir_all(self.path(path).parent().unwrap()).unwrap();
        write(self.path(path), "").unwrap();
    }

    fn device(&self, bus: &str, name: &str, group: u32) {
        let device = self.path(&format!("sys/bus/{bus}/devices/{name}"));
        let members = self.path(&format!("sys/kernel/iommu_groups/{group}/devices"));
        create_dir_all(&device).unwrap();
        create_dir_all(&members).unwrap();
        symlink(&device, members.join(name)).unwrap();
        symlink(self.path(&format!("sys/kernel/iommu_groups/{group}")), device.join("iommu_group")).unwrap();
    }

    fn bind(&self, bus: &str, name: &str, driver: &str) {
        let driver = self.path(&format!("sys/bus/{bus}/drivers/{driver}"));
        create_dir_all(&driver).unwrap();
        symlink(driver, self.path(&format!("sys/bus/{bus}/devices/{name}/driver"))).unwrap();
    }

    fn cdev(&self, name: &str, node: &str) {
        create_dir_all(self.path(&format!("sys/bus/pci/devices/{name}/vfio-dev/{node}"))).unwrap();
        self.file(&format!("dev/vfio/devices/{node}"));
    }

    fn sysfs(&self) -> Sysfs {
        Sysfs::below(self.root.path())
    }
}

fn texts(findings: &[Finding], severity: Severity) -> Vec<&str> {
    findings.iter().filter(|finding| finding.severity == severity).map(|finding| finding.text.as_str()).collect()
}

#[test]
fn a_bound_device_alone_in_its_group_has_no_blocker() {
    let fake = Fake::new();
    fake.bind("pci", "0000:00:10.0", "vfio-pci");
    fake.bind("pci", "0000:00:11.0", "pcieport");
    fake.cdev("0000:00:10.0", "vfio3");
    let sysfs = fake.sysfs();
    let findings = sysfs.viability("0000:00:10.0");
    assert_eq!(texts(&findings, Severity::Blocker), [""; 0]);
    assert_eq!(texts(&findings, Severity::Note), [""; 0]);
    assert_eq!(findings.len(), 4, "{findings:?}");
    assert_eq!(sysfs.group("0000:00:10.0").unwrap(), Some(5));
    assert_eq!(sysfs.cdev_node("0000:00:10.0").unwrap(), Some(fake.path("dev/vfio/devices/vfio3")));
    assert_eq!(sysfs.cdev_node("0000:00:11.0").unwrap(), None);
}

#[test]
fn a_foreign_driver_in_the_group_is_named_with_the_commands_that_help() {
    let fake = Fake::new();
    fake.bind("pci", "0000:00:10.0", "vfio-pci");
    fake.bind("pci", "0000:00:11.0", "e1000e");
    let sysfs = fake.sysfs();
    let findings = sysfs.viability("0000:00:10.0");
    assert_eq!(findings[0].severity, Severity::Blocker, "the most serious comes first");
    assert_eq!(findings[0].text, "0000:00:11.0 in group 5 is bound to e1000e; bind it to vfio-pci");
    let expected = [
        "modprobe vfio-pci",
        "echo vfio-pci > /sys/bus/pci/devices/0000:00:11.0/driver_override",
        "echo 0000:00:11.0 > /sys/bus/pci/devices/0000:00:11.0/driver/unbind",
        "echo 0000:00:11.0 > /sys/bus/pci/drivers_probe",
    ];
    assert_eq!(findings[0].commands, expected);
    assert_eq!(sysfs.foreign_members("0000:00:11.0", 5).unwrap(), [], "the device itself is not foreign");
}

#[test]
fn an_unbound_device_and_one_of_another_driver_are_blockers() {
    let fake = Fake::new();
    let findings = fake.sysfs().viability("0000:00:10.0");
    assert_eq!(texts(&findings, Severity::Blocker), ["0000:00:10.0 is bound to no driver"]);
    assert_eq!(findings[0].commands.len(), 3, "nothing to unbind from");
    fake.bind("pci", "0000:00:10.0", "igb");
    let findings = fake.sysfs().viability("0000:00:10.0");
    assert_eq!(texts(&findings, Severity::Blocker), ["0000:00:10.0 is bound to igb, not to vfio-pci"]);
}

#[test]
fn a_device_without_an_iommu_is_blocked() {
    let fake = Fake::new();
    std::fs::remove_file(fake.path("sys/bus/pci/devices/0000:00:10.0/iommu_group")).unwrap();
    fake.bind("pci", "0000:00:10.0", "vfio-pci");
    let findings = fake.sysfs().viability("0000:00:10.0");
    assert!(matches!(texts(&findings, Severity::Blocker)[..], [text] if text.contains("no IOMMU group")));
}

#[test]
fn a_mediated_device_is_found_by_its_uuid() {
    let fake = Fake::new();
    let uuid = "83d8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    fake.device("mdev", uuid, 9);
    fake.bind("mdev", uuid, "mtty");
    fake.file("dev/vfio/9");
    assert_eq!(fake.sysfs().group(uuid).unwrap(), Some(9));
    assert_eq!(texts(&fake.sysfs().viability(uuid), Severity::Blocker), [""; 0]);
}

#[test]
fn a_name_that_is_a_path_is_refused() {
    let fake = Fake::new();
    for name in ["", ".", "..", "../../etc", "/etc", "0000:00:10.0/driver", "0000:00:10.0\0", "..:"] {
        let error = fake.sysfs().device(name).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}");
    }
    assert_eq!(fake.sysfs().device("0000:00:12.0").unwrap_err().kind(), io::ErrorKind::NotFound);
    let findings = fake.sysfs().viability("0000:00:12.0");
    assert_eq!(texts(&findings, Severity::Blocker), ["0000:00:12.0: no such PCI or mdev device"]);
}

#[test]
fn power_and_enabled_vfs_are_the_kernels_record() {
    let fake = Fake::new();
    let (name, device) = ("0000:00:10.0", "sys/bus/pci/devices/0000:00:10.0");
    assert_eq!(fake.sysfs().enabled_vfs(name).unwrap(), None);
    assert!(fake.sysfs().power(name).is_err());
    for (state, status, power) in [
        ("D0", "active", Power { state: PowerState::D0, suspended: false }),
        ("D3hot", "suspended", Power { state: PowerState::D3Hot, suspended: true }),
        ("D3cold", "suspending", Power { state: PowerState::D3Cold, suspended: false }),
        ("error", "active", Power { state: PowerState::Unknown, suspended: false }),
    ] {
        create_dir_all(fake.path(&format!("{device}/power"))).unwrap();
        write(fake.path(&format!("{device}/power_state")), format!("{state}\n")).unwrap();
        write(fake.path(&format!("{device}/power/runtime_status")), format!("{status}\n")).unwrap();
        assert_eq!(fake.sysfs().power(name).unwrap(), power);
    }
    for (text, vfs) in [("0\n", Some(0)), ("7\n", Some(7))] {
        write(fake.path(&format!("{device}/sriov_numvfs")), text).unwrap();
        assert_eq!(fake.sysfs().enabled_vfs(name).unwrap(), vfs);
    }
    write(fake.path(&format!("{device}/sriov_numvfs")), "many\n").unwrap();
    assert!(fake.sysfs().enabled_vfs(name).is_err());
}

#[test]
fn a_vf_is_known_by_its_pf() {
    let fake = Fake::new();
    let name = "0000:00:10.0";
    assert!(!fake.sysfs().is_virtual_function(name).unwrap());
    std::os::unix::fs::symlink("../0000:00:0f.0", fake.path(&format!("sys/bus/pci/devices/{name}/physfn"))).unwrap();
    assert!(fake.sysfs().is_virtual_function(name).unwrap());
    assert!(fake.sysfs().is_virtual_function("0000:00:12.0").is_err(), "no such device");
}
