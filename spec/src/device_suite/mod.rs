//! One suite for every [`Device`]: real ones by group and by cdev (in the lab), and the models (in `cargo test`).
//!
//! **Owns** the cases, their bench, and which devices each applies to. A case leaves the device as it found it: nothing
//! mapped, no interrupt set, bus master off. **Must never** know how a device was opened, or read a real clock: waiting
//! is the device's clock's, so that a model is not waited for.

mod bench;
mod edu;
mod generic;
mod igbvf;
pub mod kvm;
pub mod maps;
mod migration;
mod power;

use std::fmt;

use anyhow::Result;
use vfio_mediate::device::{Backend, Device, Identity};

pub use bench::Bench;

/// A promise that a device keeps.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub run: fn(&Bench<'_>) -> Result<()>,
}

/// Returned as an error by a case that does not apply to this device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotHere(pub String);

/// How a case ended.
#[derive(Debug)]
pub enum Verdict {
    Passed,
    /// It does not apply, for this reason
    Skipped(String),
    Failed(anyhow::Error),
}

impl Verdict {
    /// Of what a case returned.
    pub fn of(result: Result<()>) -> Self {
        match result {
            Ok(()) => Self::Passed,
            Err(error) => match error.downcast::<NotHere>() {
                Ok(NotHere(reason)) => Self::Skipped(reason),
                Err(error) => Self::Failed(error),
            },
        }
    }

    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed(_))
    }
}

/// The line of one case: `ok   cdev 0000:00:10.0 edu: dma round trip`.
#[derive(Debug)]
pub struct Line<'a> {
    pub identity: &'a Identity,
    pub case: &'a str,
    pub verdict: &'a Verdict,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.identity.backend {
            Backend::VfioGroup => "group",
            Backend::VfioCdev => "cdev",
            Backend::Sim => "sim",
        };
        let word = match self.verdict {
            Verdict::Passed => "ok",
            Verdict::Skipped(_) => "skip",
            Verdict::Failed(_) => "FAIL",
        };
        write!(f, "{word:4} {how} {} {}: {}", self.identity.name, kind(self.identity), self.case)?;
        match self.verdict {
            Verdict::Passed => Ok(()),
            Verdict::Skipped(reason) => write!(f, " ({reason})"),
            Verdict::Failed(error) => write!(f, ": {error:#}"),
        }
    }
}

/// What the suite calls a device of this identity.
pub fn kind(identity: &Identity) -> &'static str {
    match (identity.vendor_id, identity.device_id) {
        edu::ID => "edu",
        igbvf::ID => "igbvf",
        migration::MTTY_ID => "mtty",
        migration::STATEFUL_ID => "stateful",
        (0x8086, 0x10c9) => "igb",
        (0x1b36, 0x0010) => "nvme",
        (0x1af4, 0x1041) => "virtio-net",
        _ => "device",
    }
}

/// The cases that apply to a device of this identity.
pub fn cases(identity: &Identity) -> Vec<Case> {
    let specific: &[Case] = match (identity.vendor_id, identity.device_id) {
        edu::ID => edu::CASES,
        igbvf::ID => igbvf::CASES,
        _ => &[],
    };
    generic::CASES.iter().chain(power::CASES).chain(specific).copied().collect()
}

/// Runs every case whose name contains `filter`, and hands each result to `report`. Returns the number of failures.
pub fn run(device: &dyn Device, filter: &str, mut report: impl FnMut(&Line<'_>)) -> Result<usize> {
    let bench = Bench::new(device)?;
    let mut failures = 0;
    for case in cases(device.identity()).iter().filter(|case| case.name.contains(filter)) {
        let verdict = Verdict::of((case.run)(&bench).and_then(|()| bench.is_tidy()));
        bench.tidy();
        failures += usize::from(verdict.is_failure());
        report(&Line { identity: device.identity(), case: case.name, verdict: &verdict });
    }
    Ok(failures)
}

/// Runs the cases of two devices of one VM: migration from one to the other for those whose own
/// driver does it and whose state the suite knows (mtty, the stateful model), shared memory for edu. As [`run`] otherwise; lines carry the first device.
pub fn run_pair(
    one: &dyn Device,
    other: &dyn Device,
    filter: &str,
    mut report: impl FnMut(&Line<'_>),
) -> Result<usize> {
    let identity = one.identity();
    if matches!(kind(identity), "mtty" | "stateful") {
        return Ok(migration::run(one, other, filter, |case, verdict| report(&Line { identity, case, verdict })));
    }
    let case = "two devices of one VM share their memory";
    if kind(identity) != "edu" || !case.contains(filter) {
        return Ok(0);
    }
    let bench = Bench::new(one)?;
    let verdict = Verdict::of(edu::shared_memory(&bench, other));
    bench.tidy();
    report(&Line { identity, case, verdict: &verdict });
    Ok(usize::from(verdict.is_failure()))
}
