//! `cargo lab`: real VFIO on a real kernel, without hardware, KVM or root.
//!
//! Makes the lab where it is not there yet (`$VFIO_MEDIATE_LAB`, else `.cache/lab`), builds what the cases run, boots
//! each case's machine and prints a line for every check with the real device that it was made on.
//! Exit codes: 0 all passed, 1 a case failed, 2 wrong use, or the lab or a program could not be made.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Parser;
use vfio_mediate_spec::lab::{Case, Lab, Report, all_cases, build, run_case};

#[derive(Debug, Parser)]
#[command(name = "cargo lab", about = "Runs the cases on real VFIO, in emulated machines")]
struct Arguments {
    /// Only the cases with these names (see --list)
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Show the cases and end
    #[arg(long)]
    list: bool,
    /// A report as JSON instead of lines
    #[arg(long)]
    json: bool,
    /// Keep each machine's log in this directory
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Where the lab is or is to be made
    #[arg(long, value_name = "DIR", default_value_os_t = Lab::default_directory())]
    lab: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for case in all_cases() {
            println!("{:14} {}", case.name, case.about);
        }
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn chosen(only: &[String]) -> Result<Vec<Case>> {
    let all = all_cases();
    if let Some(unknown) = only.iter().find(|name| !all.iter().any(|case| case.name == name.as_str())) {
        bail!("no case is called {unknown}; --list shows them");
    }
    Ok(all.into_iter().filter(|case| only.is_empty() || only.iter().any(|name| name == case.name)).collect())
}

fn run(arguments: &Arguments) -> Result<bool> {
    let begin = Instant::now();
    let cases = chosen(&arguments.only)?;
    let lab = Lab::ready(&arguments.lab, |line| eprintln!("{line}"))?;
    status("building what the cases run");
    let mut targets: Vec<_> = cases.iter().flat_map(|case| case.builds).copied().collect();
    targets.sort_unstable();
    targets.dedup();
    let programs = build(&targets)?;
    if !arguments.json {
        println!("{}", lab.versions());
    }
    let mut reports = Vec::new();
    for case in &cases {
        status(&format!("{}: {}", case.name, case.about));
        let report = run_case(&lab, case, &programs, |line| {
            if !arguments.json {
                status("");
                println!("{line}");
            }
        })?;
        keep_logs(arguments, &report)?;
        status("");
        tell(&report, arguments.json);
        reports.push(report);
    }
    let passed = reports.iter().all(|report| report.passed);
    let seconds = begin.elapsed().as_secs_f64();
    if arguments.json {
        let whole =
            serde_json::json!({ "passed": passed, "seconds": seconds, "versions": lab.versions(), "cases": reports });
        println!("{}", serde_json::to_string_pretty(&whole)?);
    } else {
        let failed = reports.iter().filter(|report| !report.passed).count();
        let checks: usize = reports.iter().map(|report| report.lines.len()).sum();
        println!("{} cases, {failed} failed, {checks} checks, {seconds:.0} s", reports.len());
    }
    Ok(passed)
}

fn tell(report: &Report, json: bool) {
    match &report.failure {
        _ if json => {}
        None => println!("     {} passed in {:.0} s", report.case, report.seconds),
        Some(failure) => println!("FAIL {}: {failure} ({:.0} s)", report.case, report.seconds),
    }
    if report.passed {
        return;
    }
    for log in &report.logs {
        let lines: Vec<&str> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(30)..] {
            eprintln!("     | {line}");
        }
    }
}

fn keep_logs(arguments: &Arguments, report: &Report) -> Result<()> {
    let Some(directory) = &arguments.logs else { return Ok(()) };
    std::fs::create_dir_all(directory)?;
    for (i, log) in report.logs.iter().enumerate() {
        std::fs::write(directory.join(format!("{}.{i}.log", report.case)), log)?;
    }
    Ok(())
}

/// A line that the next one replaces, on a terminal only.
fn status(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        // A status line is worth no error.
        let _ = write!(stderr, "\r\x1b[K{text}");
        let _ = stderr.flush();
    }
}
