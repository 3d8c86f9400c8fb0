//! The demo from outside: starts the host processes, asks for the migration as an operator would, and judges.
//!
//! **Owns** the two processes, the witness and the temporary folder. **Must never** look into the hosts by other ways than
//! an operator has: their control sockets, and the lines that they print.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::json;
use vfio_mediate::control::client::Client;

use crate::build;
use crate::cli::{Demo, DestinationArgs, Load, SourceArgs};
use crate::guest::Caught;
use crate::process::HostProcess;
use crate::protocol::{Command, Event, Plugin};
use crate::story::{Story, grouped, mebibytes};
use crate::witness::{Runner, Witness};

/// How long a host may take to come up, and a guest to come to a given round. An emulated machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a host told when it came up.
#[derive(Debug, Clone)]
pub struct Introduction {
    pid: u32,
    device: String,
    backend: String,
    plugin: Option<Plugin>,
    pub listen: Option<SocketAddr>,
}

/// The demo proper: both hosts on this machine.
pub fn run(demo: &Demo) -> anyhow::Result<()> {
    let story = Story::begin();
    let plugin = build::plugin(demo.load.plugin.as_deref())?;
    let folder = tempfile::tempdir().context("a folder for sockets and journals")?;
    let witness = Witness::listen((Ipv4Addr::LOCALHOST, 0).into()).context("the witness's socket")?;
    if let Some(dump) = &demo.dump {
        std::fs::create_dir_all(dump).with_context(|| format!("creating {}", dump.display()))?;
    }

    let start = |side: &'static str, device: &str, listen: Option<SocketAddr>| {
        let mut words = host_arguments(side, device, &demo.load, &plugin, folder.path(), witness.address());
        if let Some(listen) = listen {
            words.extend(["--listen".to_owned(), listen.to_string()]);
        }
        if let Some(dump) = &demo.dump {
            words.extend(["--dump".to_owned(), dump.join(format!("{side}.ram")).display().to_string()]);
        }
        if let Some(fault) = demo.fault {
            let name = clap::ValueEnum::to_possible_value(&fault).context("a fault without a name")?;
            words.extend(["--break".to_owned(), name.get_name().to_owned()]);
        }
        HostProcess::start(side, &folder.path().join(format!("{side}.sock")), &words)
    };
    let mut destination = start("destination", &demo.destination_device, Some((Ipv4Addr::LOCALHOST, 0).into()))?;
    let mut source = start("source", &demo.source_device, None)?;
    let there = introduce(&story, &mut destination)?;
    let here = introduce(&story, &mut source)?;
    let to = there.listen.context("the destination told no address")?;

    warm_up(&story, &mut source, demo.load.rounds, &demo.load.memory)?;
    story.tell(format!("migrating over TCP to {to} while the guest runs"));
    let report = migrate(&source, to, false)?;
    tell_report(&story, &report);

    let checked = judge_arrival(&story, &mut destination, demo.load.rounds)?;
    // The witness first: a source that goes on is a worse thing than whatever it then complains about.
    judge_runners(
        &witness,
        &[Runner { pid: here.pid, is_destination: false }, Runner { pid: there.pid, is_destination: true }],
    )?;
    source.catch_up()?;
    story.tell(format!(
        "witness: {} heartbeats, first from process {}, then only from {}",
        grouped(witness.ask(|t| t.heartbeats)),
        here.pid,
        there.pid
    ));
    if let Some(path) = &demo.report {
        write_report(path, &report, &here, &there, &destination, checked)?;
        story.tell(format!("report written to {}", path.display()));
    }
    destination.stop()?;
    source.stop()?;
    story.conclude("verified: the device and its guest moved, and nothing was lost");
    Ok(())
}

/// Only the source, for two machines.
pub fn run_source(args: &SourceArgs) -> anyhow::Result<()> {
    let story = Story::begin();
    let plugin = build::plugin(args.load.plugin.as_deref())?;
    let folder = tempfile::tempdir().context("a folder for sockets and journals")?;
    let mut words = host_arguments("source", &args.device, &args.load, &plugin, folder.path(), args.witness);
    if args.insecure {
        words.push("--insecure".to_owned());
    }
    let mut source = HostProcess::start("source", &folder.path().join("source.sock"), &words)?;
    let here = introduce(&story, &mut source)?;
    warm_up(&story, &mut source, args.load.rounds, &args.load.memory)?;
    story.tell(format!("migrating over TCP to {} while the guest runs", args.to));
    let report = migrate(&source, args.to, args.insecure)?;
    tell_report(&story, &report);
    if let Some(path) = &args.report {
        let text = serde_json::to_vec_pretty(&json!({ "source": side_json(&here), "migration": report }))?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    source.stop()?;
    story.conclude("sent: the guest runs on the other machine");
    Ok(())
}

/// Only the destination, for two machines.
pub fn run_destination(args: &DestinationArgs) -> anyhow::Result<()> {
    let story = Story::begin();
    let plugin = build::plugin(args.load.plugin.as_deref())?;
    let folder = tempfile::tempdir().context("a folder for sockets and journals")?;
    let witness = Witness::listen(args.witness).context("the witness's socket")?;
    let mut words = host_arguments("destination", &args.device, &args.load, &plugin, folder.path(), witness.address());
    words.extend(["--listen".to_owned(), args.listen.to_string()]);
    if args.insecure {
        words.push("--insecure".to_owned());
    }
    let mut destination = HostProcess::start("destination", &folder.path().join("destination.sock"), &words)?;
    introduce(&story, &mut destination)?;
    judge_arrival(&story, &mut destination, args.load.rounds)?;
    let runners = witness.ask(|t| (t.runners.clone(), t.complaint.clone()));
    if let (_, Some(complaint)) = &runners {
        return Err(Caught { oracle: "witness", what: complaint.clone() }.into());
    }
    ensure!(runners.0.len() == 2, "the witness heard {} runners, not two one after the other", runners.0.len());
    destination.stop()?;
    story.conclude("verified: the guest arrived with its device, and nothing was lost");
    Ok(())
}

pub fn host_arguments(
    side: &str,
    device: &str,
    load: &Load,
    plugin: &Path,
    folder: &Path,
    witness: SocketAddr,
) -> Vec<String> {
    let mut words = Vec::new();
    let mut give = |name: &str, value: String| words.extend([name.to_owned(), value]);
    give("--device", device.to_owned());
    give("--plugin", plugin.display().to_string());
    give("--control", folder.join(format!("{side}.sock")).display().to_string());
    give("--state", folder.join(format!("{side}.state")).display().to_string());
    give("--witness", witness.to_string());
    give("--memory", load.memory.clone());
    give("--dirty-rate", load.dirty_rate.to_string());
    give("--seed", load.seed.to_string());
    give("--open", load.open.name().to_owned());
    words
}

pub fn introduce(story: &Story, process: &mut HostProcess) -> anyhow::Result<Introduction> {
    let host = process.wait_for("sign of life", PATIENCE, |event| match event {
        Event::Ready { pid, device, backend, plugin, listen } => Some((
            Introduction {
                pid: *pid,
                device: device.clone(),
                backend: backend.clone(),
                plugin: plugin.clone(),
                listen: None,
            },
            listen.clone(),
        )),
        _ => None,
    })?;
    let (mut host, listen) = host;
    host.listen = listen.map(|text| text.parse()).transpose().context("the host's listening address")?;
    let mediator = match &host.plugin {
        Some(plugin) => format!("plug-in {} {}", plugin.name, plugin.version),
        None => "no plug-in".to_owned(),
    };
    story
        .tell(format!("{}: process {}, device {} ({}), {mediator}", process.side, host.pid, host.device, host.backend));
    Ok(host)
}

fn warm_up(story: &Story, source: &mut HostProcess, rounds: u64, memory: &str) -> anyhow::Result<()> {
    wait_rounds(source, rounds)?;
    let (rounds, stores, interrupts) = source.progress;
    story.tell(format!(
        "guest: {rounds} DMA round trips, {interrupts} interrupts, {} pages stored by the CPU, {memory} of memory",
        grouped(stores)
    ));
    Ok(())
}

pub fn wait_rounds(process: &mut HostProcess, rounds: u64) -> anyhow::Result<()> {
    process.wait_for("progress of the guest", PATIENCE, |event| match event {
        Event::Progress { rounds: done, .. } if *done >= rounds => Some(()),
        _ => None,
    })
}

/// The same request that `vfio-mediate migrate` makes.
fn migrate(source: &HostProcess, to: SocketAddr, insecure: bool) -> anyhow::Result<serde_json::Value> {
    let mut client = Client::connect(&source.control).context("the source's control socket")?;
    let report = client.migrate(&to.to_string(), insecure, |_| {})?;
    Ok(serde_json::to_value(report)?)
}

fn number(report: &serde_json::Value, name: &str) -> f64 {
    report.get(name).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN)
}

fn tell_report(story: &Story, report: &serde_json::Value) {
    for round in report.get("rounds").and_then(|r| r.as_array()).into_iter().flatten() {
        let last = if number(round, "dirty_left") == 0.0 { "" } else { ", dirty again meanwhile: " };
        let left = if last.is_empty() { String::new() } else { grouped(number(round, "dirty_left") as u64) };
        story.tell(format!(
            "round {}: {} pages ({} of zeroes), {} in {:.0} ms{last}{left}",
            number(round, "round"),
            grouped(number(round, "pages") as u64),
            grouped(number(round, "zero_pages") as u64),
            mebibytes(number(round, "bytes") as u64),
            number(round, "ms"),
        ));
    }
    let parts: Vec<String> = report
        .get("downtime")
        .and_then(|parts| parts.as_object())
        .map(|parts| {
            parts
                .iter()
                .filter_map(|(name, ms)| ms.as_f64().map(|ms| (name, ms)))
                // A part of `resume`, not one beside it.
                .filter(|(name, ms)| *ms >= 0.05 && *name != "resume_at_destination")
                .map(|(name, ms)| format!("{} {ms:.1}", name.trim_end_matches("_ms").replace('_', " ")))
                .collect()
        })
        .unwrap_or_default();
    story.tell(format!("downtime {:.1} ms = {}", number(report, "downtime_ms"), parts.join(" + ")));
}

/// The guest has arrived, goes on, and finds every byte where it left it.
fn judge_arrival(story: &Story, destination: &mut HostProcess, more_rounds: u64) -> anyhow::Result<u64> {
    // The guest may have looked around before its host says that it runs.
    let (mut runs, mut checked) = (false, None);
    let pages = destination.wait_for("arrival of the guest, and its check", PATIENCE, |event| {
        match event {
            Event::Running => runs = true,
            Event::Checked { pages } => checked = Some(*pages),
            _ => {}
        }
        checked.filter(|_| runs)
    })?;
    story.tell(format!("destination: guest arrived, {} pages and the device's registers are right", grouped(pages)));
    let arrived_with = destination.wait_for("progress of the guest", PATIENCE, |event| match event {
        Event::Progress { rounds, .. } => Some(*rounds),
        _ => None,
    })?;
    wait_rounds(destination, arrived_with + more_rounds)?;
    destination.tell(&Command::Check)?;
    let pages = destination.wait_for("final check", PATIENCE, |event| match event {
        Event::Checked { pages } => Some(*pages),
        _ => None,
    })?;
    let (rounds, stores, interrupts) = destination.progress;
    story.tell(format!(
        "destination: guest went on to {rounds} DMA round trips, {interrupts} interrupts, {} stores; {} pages right again",
        grouped(stores),
        grouped(pages)
    ));
    Ok(pages)
}

fn judge_runners(witness: &Witness, expected: &[Runner]) -> anyhow::Result<()> {
    witness.ask(|testimony| {
        if let Some(complaint) = &testimony.complaint {
            return Err(Caught { oracle: "witness", what: complaint.clone() }.into());
        }
        if testimony.runners != expected {
            bail!("the witness heard processes {:?}, expected {expected:?}", testimony.runners);
        }
        Ok(())
    })
}

fn side_json(side: &Introduction) -> serde_json::Value {
    json!({ "pid": side.pid, "device": side.device, "backend": side.backend })
}

fn write_report(
    path: &Path,
    report: &serde_json::Value,
    here: &Introduction,
    there: &Introduction,
    destination: &HostProcess,
    checked: u64,
) -> anyhow::Result<()> {
    let (rounds, stores, interrupts) = destination.progress;
    let mut whole = json!({
        "verified": true,
        "plugin": there.plugin.as_ref().map(|p| json!({ "name": p.name, "version": p.version, "path": p.path })),
        "source": side_json(here),
        "destination": side_json(there),
        "guest": { "dma_rounds": rounds, "cpu_stores": stores, "interrupts": interrupts, "pages_checked": checked },
    });
    let fields = whole.as_object_mut().context("an object")?;
    for (name, value) in report.as_object().context("the migration's report is no object")? {
        fields.entry(name.clone()).or_insert_with(|| value.clone());
    }
    let text = serde_json::to_vec_pretty(&whole)?;
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
