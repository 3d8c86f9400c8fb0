//! The demo's two real processes: the whole run, every fault that it can be told to make, and SIGKILL at every phase.

use std::path::PathBuf;
use std::process::{Command, Output};

/// Small memory: what is tried here does not depend on its size.
const SMALL: [&str; 6] = ["--memory", "8M", "--dirty-rate", "300", "--rounds", "1"];

fn demo(arguments: &[&str]) -> Output {
    // As `cargo demo -- ...` calls it: the alias ends in a separator of its own.
    Command::new(env!("CARGO_BIN_EXE_demo")).arg("--").args(SMALL).args(arguments).output().expect("the demo starts")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    // Left over from an earlier run, or not there.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder of our own");
    folder
}

/// spec: DEMO-1, DEMO-2
#[test]
fn a_running_device_moves_and_both_images_are_equal() {
    let folder = folder("whole");
    let report = folder.join("r.json");
    let dump = folder.join("images");
    let output = demo(&["--report", report.to_str().unwrap(), "--dump", dump.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(report["verified"], true);
    assert_ne!(report["source"]["pid"], report["destination"]["pid"]);
    assert_eq!(report["plugin"]["name"], "edu");
    assert!(report["plugin"]["path"].as_str().unwrap().ends_with(".so"));
    assert!(!report["rounds"].as_array().unwrap().is_empty());
    assert!(report["pages_sent"].as_u64().unwrap() >= 2048, "every page goes at least once");
    let parts: f64 = report["downtime"]
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "resume_at_destination")
        .map(|(_, ms)| ms.as_f64().unwrap())
        .sum();
    let whole = report["downtime_ms"].as_f64().unwrap();
    assert!((parts - whole).abs() < 0.01, "the parts ({parts}) are the downtime ({whole})");
    let source = std::fs::read(dump.join("source.ram")).unwrap();
    let destination = std::fs::read(dump.join("destination.ram")).unwrap();
    assert_eq!(source.len(), 8 << 20);
    assert!(source == destination, "RAM at the switchover differs");
}

/// spec: DEMO-3
#[test]
fn each_fault_is_caught_by_its_own_oracle() {
    for (fault, oracle) in [("page", "page"), ("device", "device"), ("irq", "irq"), ("commit", "witness")] {
        let output = demo(&["--break", fault]);
        assert_eq!(output.status.code(), Some(1), "{fault}: {}", said(&output));
        let wanted = format!("caught by the {oracle} oracle");
        assert!(said(&output).contains(&wanted), "{fault}: {}", said(&output));
    }
}

fn survives(side: &str, phases: &[&str]) {
    for phase in phases {
        let output = demo(&["--kill", &format!("{side}:{phase}")]);
        let text = said(&output);
        assert!(output.status.success() && text.contains("ok  killed"), "{side} at {phase}: {text}");
    }
}

/// spec: DEMO-4
#[test]
fn killing_the_source_at_any_phase_never_leaves_two_owners() {
    survives("source", &["negotiating", "pre_copy", "pausing", "stopping", "last_drain", "last_pages"]);
    survives("source", &["device_state", "digest", "committing", "resuming", "finishing"]);
}

/// spec: DEMO-4
#[test]
fn killing_the_destination_at_any_phase_never_leaves_two_owners() {
    survives(
        "destination",
        &["negotiating", "pre_copy", "device_state", "digest", "committing", "resuming", "finishing"],
    );
}
