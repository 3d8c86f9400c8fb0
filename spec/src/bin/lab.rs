//! `cargo lab`: everything that simulation claims, confirmed on a real kernel.
//!
//! Makes the lab if it is not there, builds the programs, boots a machine per case, and prints one line per promise with
//! the device that it was kept on.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use serde_json::json;
use vfio_mediate_spec::lab::cases::{Case, Programs, Settings, Work, all};
use vfio_mediate_spec::lab::{Lab, Machine, Outcome, boot, boot_pair};

/// Runs the cases on a real kernel: an emulated machine with an IOMMU, vfio-pci, SR-IOV VFs and edu devices; with `--all` also those in
/// which stock QEMU boots guests with served devices, which take minutes.
///
/// Needs Debian packages (it names those that are missing), 3 GB of free space once, no KVM and no VFIO of this machine.
/// Exit code: 0 all cases passed, 1 a case failed, 2 wrong use.
#[derive(Debug, Parser)]
#[command(name = "cargo lab")]
struct Cli {
    /// Only the cases with these names
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Also the long cases, in which VMMs boot guests
    #[arg(long)]
    all: bool,
    /// Show the cases and end
    #[arg(long)]
    list: bool,
    /// One JSON object per case instead of text
    #[arg(long)]
    json: bool,
    /// Fewer rounds of what is repeated at random points
    #[arg(long)]
    quick: bool,
    /// What is random follows from it [default: another one each time, which is printed]
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Everything that the machines print
    #[arg(long, short)]
    verbose: bool,
    /// Run this script in a machine instead of the cases, and pass its output and exit code on
    #[arg(long, value_name = "SCRIPT")]
    script: Option<String>,
    /// Where the lab is kept [default: .cache/lab of the workspace]
    #[arg(long, env = "VFIO_MEDIATE_LAB", value_name = "DIR")]
    folder: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(vfio_mediate_spec::arguments(std::env::args_os()));
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("cargo lab: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<bool> {
    let started = Instant::now();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    let programs = build(workspace, cli.list)?;
    let cases = all(&programs);
    for name in &cli.only {
        ensure!(cases.iter().any(|case| case.name == name), "there is no case {name:?} (see --list)");
    }
    if cli.list {
        for case in &cases {
            let when = if case.is_long() { " (--all)" } else { "" };
            println!("{:15} {}{when}", case.name, case.about);
        }
        return Ok(true);
    }
    let folder = cli.folder.clone().unwrap_or_else(|| workspace.join(".cache/lab"));
    let lab = Lab::prepare(&folder)?;
    if !cli.json {
        println!("lab: {}", lab.versions()?);
    }
    if let Some(script) = &cli.script {
        let mut machine = Machine::new(script);
        machine.files =
            [programs.device_suite, programs.demo, programs.host, programs.plugin_edu, programs.plugin_witness].into();
        return Ok(boot(&lab, &machine, |line| println!("{line}"))?.exit_code == 0);
    }
    let seed = cli.seed.unwrap_or_else(a_seed);
    let settings = Settings { quick: cli.quick, seed };
    let (mut passed, mut failed) = (0, 0);
    let is_wanted = |case: &&Case| match &cli.only[..] {
        [] => cli.all || !case.is_long(),
        only => only.iter().any(|name| name == case.name),
    };
    for case in cases.iter().filter(is_wanted) {
        match run_case(&lab, case, &programs, &settings, cli) {
            Ok(()) => passed += 1,
            Err(error) => {
                failed += 1;
                println!("FAIL {}: {error:#}", case.name);
            }
        }
    }
    println!("lab: {passed} passed, {failed} failed, {:.0} s", started.elapsed().as_secs_f64());
    Ok(failed == 0)
}

fn a_seed() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |time| u64::from(time.subsec_nanos()))
}

fn run_case(lab: &Lab, case: &Case, programs: &Programs, settings: &Settings, cli: &Cli) -> anyhow::Result<()> {
    let started = Instant::now();
    // Shown again when the case fails: what came before the failure explains it.
    let heard = Mutex::new(Vec::new());
    let hear = |side: &str, line: &str| {
        let is_result = line.starts_with("ok ") || line.starts_with("FAIL");
        if cli.verbose || (is_result && !cli.json) {
            println!("{side}{line}");
        }
        heard.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(format!("{side}{line}"));
    };
    let ended = match &case.work {
        Work::One(machine) => boot(lab, machine, |line| hear("", line)).map(|outcome| vec![outcome]),
        Work::Pair(machine) => boot_pair(lab, machine, |side, line| hear(&format!("{side}: "), line)).map(Vec::from),
        Work::Here(work) => {
            let mut lines = Vec::new();
            let done = work(lab, programs, settings, &mut |line: &str| {
                hear("", line);
                lines.push(line.to_owned());
            });
            done.map(|()| vec![Outcome { exit_code: 0, lines }])
        }
    };
    let heard = heard.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let judged = ended.and_then(|outcomes| {
        let lines = || outcomes.iter().flat_map(|o| &o.lines);
        let ok = lines().filter(|line| line.starts_with("ok ")).count();
        if let Some(line) = lines().find(|line| line.starts_with("FAIL")) {
            bail!("{line}");
        }
        if let Some(outcome) = outcomes.iter().find(|o| o.exit_code != 0) {
            bail!("the script ended with {}", outcome.exit_code);
        }
        ensure!(ok >= case.least_ok, "{ok} promises kept, at least {} expected", case.least_ok);
        Ok(ok)
    });
    let seconds = started.elapsed().as_secs_f64();
    match judged {
        Ok(ok) if cli.json => {
            println!("{}", json!({ "case": case.name, "passed": true, "promises": ok, "seconds": seconds }));
            Ok(())
        }
        Ok(ok) => {
            println!("lab: {} passed: {ok} promises kept in {seconds:.0} s", case.name);
            Ok(())
        }
        Err(error) => {
            if !cli.verbose {
                heard.iter().for_each(|line| eprintln!("{line}"));
            }
            Err(error)
        }
    }
}

/// Builds what the machines run; they have no compiler.
fn build(workspace: &Path, only_name_them: bool) -> anyhow::Result<Programs> {
    let program = std::env::current_exe().context("finding this program")?;
    let folder = program.parent().context("the target folder")?;
    if !only_name_them {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.current_dir(workspace).args(["build", "--quiet", "--workspace", "--lib", "--bins"]);
        build.arg("--target-dir").arg(folder.parent().context("the target folder")?);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        ensure!(build.status().context("running cargo")?.success(), "the programs could not be built");
    }
    Ok(Programs {
        device_suite: folder.join("device-suite"),
        demo: folder.join("demo"),
        host: folder.join("vfio-mediate"),
        plugin_edu: folder.join("libvfio_mediate_plugin_edu.so"),
        plugin_witness: folder.join("libvfio_mediate_plugin_witness.so"),
        guest_edu: folder.join("guest-edu"),
        vf_mac: folder.join("vf-mac"),
    })
}
