//! The device suite over the models: what the lab asks of real devices by group and by cdev, asked here without them.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;
use vfio_mediate::device::Device;
use vfio_mediate::device::sim::{Edu, EduOptions, Fault, FaultPlan, Stateful, StatefulOptions, Time, VirtualClock};
use vfio_mediate_spec::device_suite::{self, Verdict};

fn virtual_time() -> Time {
    Time::Virtual(VirtualClock::new())
}

fn edu() -> Arc<Edu> {
    Edu::new(EduOptions { time: virtual_time(), dma_mask: u64::MAX, ..Default::default() }).expect("a model")
}

/// Runs the suite; panics with every line that is a failure. Returns the names of the cases that passed.
fn passed(device: &dyn Device) -> Vec<String> {
    let (mut passed, mut failed) = (Vec::new(), Vec::new());
    device_suite::run(device, "", |line| match line.verdict {
        Verdict::Passed => passed.push(line.case.to_owned()),
        Verdict::Skipped(_) => {}
        Verdict::Failed(_) => failed.push(line.to_string()),
    })
    .expect("a bench");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    passed
}

/// spec: DEV-1, DEV-2, DEV-3, DEV-4, DEV-5, DEVDMA-1, DEVDMA-3, DEVDMA-4, DEVDMA-5, DEVIRQ-1, DEVIRQ-2, DEVIRQ-3, DEVIRQ-4
#[test]
fn the_simulated_edu_keeps_the_promises_of_the_real_one() {
    let passed = passed(&*edu());
    let cases = device_suite::cases(edu().identity());
    let skipped: Vec<_> = cases.iter().map(|case| case.name).filter(|name| !passed.iter().any(|p| p == name)).collect();
    // It has nothing to mmap; the real one has.
    assert_eq!(skipped, ["registers through a mapping"]);
}

/// spec: DEV-1, DEV-2, DEV-3, DEV-4, DEV-5, DEVDMA-1, DEVDMA-3, DEVIRQ-1
#[test]
fn the_simulated_device_with_migration_keeps_every_device_s_promises() {
    let device = Stateful::new(StatefulOptions { time: virtual_time(), ..Default::default() }).expect("a model");
    assert!(passed(&*device).len() >= 10);
}

#[test]
fn a_filter_chooses_cases_by_name() {
    let mut names = Vec::new();
    let failures = device_suite::run(&*edu(), "factorial", |line| names.push(line.case.to_owned()));
    assert_eq!(failures.expect("a bench"), 0);
    assert_eq!(names, ["factorial"]);
}

fn pair_failures(one: &dyn Device, other: &dyn Device) -> Vec<String> {
    let mut failed = Vec::new();
    let mut cases = 0;
    device_suite::run_pair(one, other, "", |line| {
        cases += 1;
        if !matches!(line.verdict, Verdict::Passed) {
            failed.push(line.to_string());
        }
    })
    .expect("a bench");
    assert!(cases > 0, "no case for two of these");
    failed
}

/// spec: NATIVE-1, NATIVE-2, NATIVE-3, NATIVE-4
#[test]
fn native_migration_keeps_its_promises() {
    let device = || Stateful::new(StatefulOptions { time: virtual_time(), ..Default::default() }).expect("a model");
    let failed = pair_failures(&*device(), &*device());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// edu's default: 28 bits. That is a property, not a fault, and the suite says so.
#[test]
fn a_device_that_drops_address_bits_is_recognised() {
    let device = Edu::new(EduOptions { time: virtual_time(), ..Default::default() }).expect("a model");
    let mut unusual = Vec::new();
    device_suite::run(&*device, "dma", |line| {
        if !matches!(line.verdict, Verdict::Passed) {
            unusual.push(line.to_string());
        }
    })
    .expect("a bench");
    let expected = "skip sim sim:edu edu: dma round trip above 4 GiB (this device drops high address bits (dma_mask))";
    assert_eq!(unusual, [expected]);
}

/// A suite that passes everything proves nothing: an error injected at any one step of it is noticed, except in the
/// tidying after each case, which does what it can.
#[test]
fn an_error_at_any_step_of_a_case_is_noticed() {
    let run = |faults: &Arc<FaultPlan>| {
        let options =
            EduOptions { time: virtual_time(), dma_mask: u64::MAX, faults: faults.clone(), ..Default::default() };
        let device = Edu::new(options).expect("a model");
        let mut cases = 0;
        let failures = device_suite::run(&*device, "", |_| cases += 1);
        (failures.map_or(true, |failures| failures > 0), cases)
    };
    let counted = FaultPlan::none();
    let (noticed, cases) = run(&counted);
    assert!(!noticed && counted.steps() > 1000, "{} steps", counted.steps());
    let mut unnoticed = BTreeMap::new();
    for step in 0..counted.steps() {
        let faults = FaultPlan::at(step, Fault::Errno(Errno::IO));
        if !run(&faults).0 {
            *unnoticed.entry(faults.trace()[step as usize]).or_default() += 1;
        }
    }
    let tidying = [("dma unmap", 1), ("low power exit", 1), ("region read", 2), ("region write", 1), ("set irqs", 3)];
    let expected: BTreeMap<&str, i32> = tidying.into_iter().map(|(what, times)| (what, times * cases)).collect();
    let unnoticed: BTreeMap<&str, i32> =
        unnoticed.iter().map(|(what, times): (&&str, &i32)| (what.trim_start_matches("edu "), *times)).collect();
    assert_eq!(unnoticed, expected, "steps whose failure the suite did not notice, by kind");
}

/// As the lab on real devices.
///
/// spec: MEMEN-1 MEMEN-2 MEMEN-4
#[test]
fn mappings_of_the_simulated_device_are_revoked_and_come_back() {
    let device: Arc<dyn Device> =
        Stateful::new(StatefulOptions { time: virtual_time(), ..Default::default() }).expect("a model");
    let (mut passed, mut other) = (0, Vec::new());
    let report = |line: &device_suite::Line<'_>| match line.verdict {
        Verdict::Passed => passed += 1,
        _ => other.push(line.to_string()),
    };
    assert_eq!(device_suite::maps::run(&device, "", report).expect("mediation"), 0);
    // Waiting takes a userfaultfd.
    assert!(passed >= 2 && passed + other.len() == 3, "{other:?}");
}
