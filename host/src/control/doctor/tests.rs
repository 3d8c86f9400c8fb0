//! Machines that are folders, and what the doctor says about them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;
use crate::control::config::{DeviceName, OpenBy};
use crate::control::units::ByteSize;

/// A machine on which everything is as it should be, with one device bound to vfio-pci, alone in group 7.
fn healthy(root: &Path) -> Machine {
    let device = root.join("sys/bus/pci/devices/0000:00:10.0");
    for folder in ["sys/bus/pci/drivers/vfio-pci", "sys/kernel/iommu_groups/7/devices", "dev/vfio/devices"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::create_dir_all(device.join("vfio-dev/vfio0")).unwrap();
    symlink(root.join("sys/bus/pci/drivers/vfio-pci"), device.join("driver")).unwrap();
    symlink(root.join("sys/kernel/iommu_groups/7"), device.join("iommu_group")).unwrap();
    symlink(&device, root.join("sys/kernel/iommu_groups/7/devices/0000:00:10.0")).unwrap();
    for node in ["dev/vfio/vfio", "dev/vfio/7", "dev/iommu", "dev/vfio/devices/vfio0"] {
        fs::write(root.join(node), "").unwrap();
    }
    Machine {
        root: root.to_owned(),
        kernel: "6.12.48+deb13-amd64".to_owned(),
        page_size: 4096,
        memlock: None,
        memlock_exempt: false,
        cpu_dirt: Ok(()),
        membarrier: true,
    }
}

fn wanted() -> Wanted {
    let name = DeviceName::Vfio("0000:00:10.0".to_owned());
    Wanted {
        devices: vec![DeviceConfig { name, open: OpenBy::Auto, vf_token: None, serve: None }],
        memory: Some(MemorySize::new(ByteSize(1 << 30)).unwrap()),
        ..Wanted::default()
    }
}

fn of<'a>(findings: &'a [Finding], check: &str) -> Vec<&'a Finding> {
    findings.iter().filter(|finding| finding.check == check).collect()
}

fn levels(findings: &[Finding], check: &str) -> Vec<Level> {
    of(findings, check).iter().map(|finding| finding.level).collect()
}

/// spec: CONTROL-30
#[test]
fn a_healthy_machine_has_nothing_to_do() {
    let root = tempfile::tempdir().unwrap();
    let findings = examine(&healthy(root.path()), &wanted());
    assert_eq!(worst(&findings), Level::Ok, "{findings:#?}");
    assert!(findings.iter().all(|finding| finding.remedies.is_empty()));
    assert!(findings.len() >= 10, "{findings:#?}");
}

/// spec: CONTROL-31
#[test]
fn an_empty_machine_fails_for_a_real_device_and_is_worth_knowing_for_a_simulated_one() {
    let root = tempfile::tempdir().unwrap();
    let machine = Machine { root: root.path().to_owned(), ..healthy(tempfile::tempdir().unwrap().path()) };
    let findings = examine(&machine, &wanted());
    for check in ["vfio", "iommu", "group", "cdev", "device"] {
        assert!(levels(&findings, check).contains(&Level::Fail), "{check}: {findings:#?}");
    }
    let sim = DeviceConfig { name: "sim:edu".parse().unwrap(), open: OpenBy::Auto, vf_token: None, serve: None };
    let findings = examine(&machine, &Wanted { devices: vec![sim], ..wanted() });
    assert_eq!(worst(&findings), Level::Warn, "{findings:#?}");
}

/// spec: CONTROL-32
#[test]
fn whatever_is_not_ok_says_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    let machine = Machine {
        root: root.path().to_owned(),
        kernel: "5.10.0".to_owned(),
        page_size: 65536,
        memlock: Some(65536),
        cpu_dirt: Err("no userfaultfd".to_owned()),
        membarrier: false,
        ..healthy(tempfile::tempdir().unwrap().path())
    };
    let file = root.path().join("plug-in.so");
    fs::write(&file, "no ELF").unwrap();
    let findings = examine(&machine, &Wanted { plugins: vec![file], ..wanted() });
    for finding in findings.iter().filter(|finding| finding.level != Level::Ok && finding.check != "device") {
        assert!(!finding.remedies.is_empty(), "{finding:#?}");
    }
    for check in ["kernel", "cpu_dirt", "memlock", "plugin"] {
        assert!(levels(&findings, check).contains(&Level::Fail), "{check}: {findings:#?}");
    }
}

#[test]
fn the_memory_lock_limit_is_judged_at_its_edge() {
    let root = tempfile::tempdir().unwrap();
    let machine = healthy(root.path());
    let needed = (1 << 30) + (64 << 20);
    for (memlock, level) in [(needed - 1, Level::Fail), (needed, Level::Ok), (needed + 1, Level::Ok)] {
        let machine = Machine { memlock: Some(memlock), ..machine.clone() };
        assert_eq!(levels(&examine(&machine, &wanted()), "memlock"), [level], "{memlock}");
    }
    let exempt = Machine { memlock: Some(0), memlock_exempt: true, ..machine };
    assert_eq!(levels(&examine(&exempt, &wanted()), "memlock"), [Level::Ok]);
}

#[test]
fn a_device_of_another_driver_gets_its_binding_commands_shown() {
    let root = tempfile::tempdir().unwrap();
    let machine = healthy(root.path());
    let driver = root.path().join("sys/bus/pci/devices/0000:00:10.0/driver");
    fs::remove_file(&driver).unwrap();
    symlink(root.path().join("sys/bus/pci/drivers/e1000e"), &driver).unwrap();
    let findings = examine(&machine, &wanted());
    let device = of(&findings, "device").into_iter().find(|finding| finding.level == Level::Fail).unwrap();
    assert!(device.remedies.iter().all(|remedy| remedy.starts_with("# ")), "{device:#?}");
    assert!(device.remedies.iter().any(|remedy| remedy.contains("driver_override")), "{device:#?}");
}

#[test]
fn kernels_are_compared_as_numbers() {
    let root = tempfile::tempdir().unwrap();
    for (kernel, level) in
        [("6.6.99", Level::Warn), ("6.7", Level::Ok), ("6.10.1", Level::Ok), ("10.0", Level::Ok), ("odd", Level::Warn)]
    {
        let machine = Machine { kernel: kernel.to_owned(), root: root.path().to_owned(), ..Machine::this() };
        assert_eq!(levels(&examine(&machine, &Wanted::default()), "kernel")[0], level, "{kernel}");
    }
}

#[test]
fn a_state_folder_is_looked_at_and_not_made() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("state");
    let wanted = Wanted { state_dir: Some(folder.clone()), ..Wanted::default() };
    let machine = healthy(root.path());
    assert_eq!(levels(&examine(&machine, &wanted), "journal"), [Level::Ok]);
    assert!(!folder.exists());
    fs::create_dir(&folder).unwrap();
    // A journal that nobody can read: in doubt, not empty.
    fs::write(folder.join("0123456789abcdef0123456789abcdef"), [0xff; 100]).unwrap();
    let findings = examine(&machine, &wanted);
    assert_eq!(levels(&findings, "journal"), [Level::Fail], "{findings:#?}");
}
