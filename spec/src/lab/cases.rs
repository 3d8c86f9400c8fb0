//! The lab's cases: each is one boot (or a pair), whose script prints one line per check.
//!
//! A line is `ok|skip|FAIL` and what was checked on which real device. A case passes when its machines end with exit code
//! 0, at least one line says ok, and none says FAIL. To add one: a function that makes the machine, and an entry in
//! [`all_cases`].

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::{Ended, Lab, Machine, Output, boot, boot_pair};

/// One case.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    /// One line
    pub about: &'static str,
    /// What it runs: (package, arguments of `cargo build`)
    pub builds: &'static [(&'static str, &'static [&'static str])],
    boots: Boots,
}

/// A case's machines, made from the directory that has the built programs.
#[derive(Debug, Clone, Copy)]
enum Boots {
    One(fn(&Path) -> Machine),
    /// Both machines run the same script; `$LAB_HOST` tells them apart
    Pair(fn(&Path) -> Machine),
}

const SUITE: &[(&str, &[&str])] = &[("vfio-mediate-spec", &["--bin", "device-suite"])];

/// In the order in which they run.
pub fn all_cases() -> Vec<Case> {
    vec![
        Case {
            name: "devices",
            about: "the device suite on an edu and an igb VF, by group and by cdev",
            builds: SUITE,
            boots: Boots::One(devices),
        },
        Case {
            name: "native",
            about: "two mtty devices migrate through the kernel's own migration v2; two edus share an address space",
            builds: SUITE,
            boots: Boots::One(native),
        },
        Case {
            name: "vf-token",
            about: "a VF of a PF on vfio-pci opens with the PF's token only",
            builds: SUITE,
            boots: Boots::One(vf_token),
        },
        Case {
            name: "two-machines",
            about: "two joined machines reach each other over their PFs, each with its devices",
            builds: SUITE,
            boots: Boots::Pair(two_machines),
        },
    ]
}

fn devices(programs: &Path) -> Machine {
    Machine { vfs: 1, edus: 1, ..Machine::new("device-suite $EDU0 $VF0") }.file(programs.join("device-suite"))
}

fn native(programs: &Path) -> Machine {
    let script = "
        . /lab/functions
        A=83d8f4f2-509f-382f-3c1e-e6bfe0fa1001
        B=83d8f4f2-509f-382f-3c1e-e6bfe0fa1002
        mtty $A $B || exit 3
        device-suite $A && device-suite --pairs $A $B $EDU0 $EDU1
    ";
    Machine { vfs: 0, ..Machine::new(script) }.module("mtty").file(programs.join("device-suite"))
}

fn vf_token(programs: &Path) -> Machine {
    let script = "
        . /lab/functions
        echo 1 >/sys/module/vfio_pci/parameters/enable_sriov
        bind $PF vfio-pci || exit 3
        device-suite --vf-token $PF
    ";
    Machine { vfs: 0, edus: 0, ..Machine::new(script) }.file(programs.join("device-suite"))
}

fn two_machines(programs: &Path) -> Machine {
    let script = "
        . /lab/functions
        meet up || exit 3
        ping -c 1 -W 10 $LAB_PEER >/dev/null || { echo \"FAIL $PF: no answer from $LAB_PEER\"; exit 1; }
        echo \"ok   pf $PF igb: $LAB_ADDRESS reaches $LAB_PEER\"
        device-suite --by cdev --case 'dma round trip' $EDU0
        code=$?
        meet down
        exit $code
    ";
    Machine { vfs: 1, edus: 1, cpus: 1, ..Machine::new(script) }.file(programs.join("device-suite"))
}

/// What one case gave.
#[derive(Debug, Serialize)]
pub struct Report {
    pub case: &'static str,
    pub passed: bool,
    pub seconds: f64,
    /// Why it failed, besides the lines that say FAIL
    pub failure: Option<String>,
    pub lines: Vec<ReportLine>,
    /// The machines' logs
    #[serde(skip)]
    pub logs: Vec<String>,
}

/// One line of a case's script.
#[derive(Debug, Clone, Serialize)]
pub struct ReportLine {
    /// A or B in a pair
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<char>,
    pub text: String,
}

impl ReportLine {
    fn says(&self, word: &str) -> bool {
        self.text.split_whitespace().next() == Some(word)
    }
}

impl std::fmt::Display for ReportLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.machine {
            // After the word, so that lines of pairs sort and grep as the others do.
            Some(machine) => match self.text.split_at_checked(4) {
                Some((word, rest)) => write!(f, "{word} {machine}{rest}"),
                None => write!(f, "{} {machine}", self.text),
            },
            None => f.write_str(&self.text),
        }
    }
}

/// Boots the case's machines and judges them. `on_line` gets each line as it comes.
pub fn run_case(lab: &Lab, case: &Case, programs: &Path, on_line: impl Fn(&ReportLine) + Sync) -> Result<Report> {
    let lines = Mutex::new(Vec::new());
    let take = |machine: Option<char>, text: &str| {
        let line = ReportLine { machine, text: text.to_owned() };
        on_line(&line);
        if let Ok(mut lines) = lines.lock() {
            lines.push(line);
        }
    };
    let outputs = match case.boots {
        Boots::One(machine) => vec![boot(lab, &machine(programs), |text| take(None, text))?],
        Boots::Pair(machine) => {
            let machine = machine(programs);
            let (a, b) = boot_pair(lab, &machine, &machine, |letter, text| take(Some(letter), text))?;
            vec![a, b]
        }
    };
    let lines = lines.into_inner().unwrap_or_default();
    let failure = failure(&outputs, &lines);
    let elapsed = outputs.iter().map(|output| output.elapsed).max().unwrap_or(Duration::ZERO);
    let logs = outputs.into_iter().map(|output| output.log).collect();
    Ok(Report { case: case.name, passed: failure.is_none(), seconds: elapsed.as_secs_f64(), failure, lines, logs })
}

fn failure(outputs: &[Output], lines: &[ReportLine]) -> Option<String> {
    for output in outputs {
        let why = match &output.ended {
            Ended::Exit(0) => continue,
            Ended::Exit(code) => format!("exit code {code}"),
            Ended::Unusable(why) => format!("the machine could not be prepared: {why}"),
            Ended::Died => "the machine died".to_owned(),
            Ended::TimedOut => format!("not done after {:.0} s", output.elapsed.as_secs_f64()),
        };
        return Some(why);
    }
    if lines.iter().any(|line| line.says("FAIL")) {
        return Some("a check failed".to_owned());
    }
    // A script that checked nothing has not passed.
    (!lines.iter().any(|line| line.says("ok"))).then(|| "no check was made".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(ended: Ended, texts: &[&str]) -> Option<String> {
        let output = Output { ended, log: String::new(), elapsed: Duration::ZERO };
        let line = |text: &&str| ReportLine { machine: None, text: (*text).to_owned() };
        failure(&[output], &texts.iter().map(line).collect::<Vec<_>>())
    }

    #[test]
    fn a_case_passes_only_with_a_check_that_says_ok_and_none_that_says_fail() {
        assert_eq!(judged(Ended::Exit(0), &["ok   cdev 0000:00:10.0 edu: id"]), None);
        assert!(judged(Ended::Exit(0), &[]).is_some());
        assert!(judged(Ended::Exit(0), &["skip everything"]).is_some());
        assert!(judged(Ended::Exit(0), &["ok   this", "FAIL that"]).is_some());
        assert!(judged(Ended::Exit(1), &["ok   this"]).is_some());
        assert!(judged(Ended::Died, &["ok   this"]).is_some());
    }
}
