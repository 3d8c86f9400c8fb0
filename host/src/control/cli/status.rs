//! `status`, `cancel`, `stop`.

use serde_json::json;

use super::args::{ControlArgs, StopArgs};
use super::{CliError, migrate, power, print_json, print_line};
use crate::control::client::Client;
use crate::control::exit::Exit;
use crate::control::protocol::{LastMigration, Ownership, Status};
use crate::control::units::ByteSize;

pub(super) fn status(args: &ControlArgs, json: bool) -> Result<Exit, CliError> {
    let status = Client::connect(&args.control)?.status()?;
    if json {
        print_json(&status)?;
    } else {
        for line in told(&status) {
            print_line(&line)?;
        }
    }
    Ok(if status.guest == Ownership::InDoubt { Exit::InDoubt } else { Exit::Done })
}

fn told(status: &Status) -> Vec<String> {
    let guest = match status.guest {
        Ownership::Here => "here",
        Ownership::Elsewhere => "not here",
        Ownership::InDoubt => "IN DOUBT",
    };
    let mut lines = vec![
        format!("guest     {guest}: {}", status.explanation),
        format!("process   {}, version {}, up {} s", status.pid, status.program_version, status.uptime_ms / 1000),
        match status.memory_bytes {
            // A host that serves devices has none of its own.
            0 => "memory    its clients'".to_owned(),
            bytes => format!("memory    {}", ByteSize(bytes)),
        },
    ];
    if let Some(doubt) = &status.in_doubt {
        lines.push(format!("in doubt  migration {} with {}: {}", doubt.id, doubt.peer, doubt.explanation));
        lines.push(format!("          see `vfio-mediate resolve --help`; --id {}", doubt.id));
    }
    for device in &status.devices {
        let by =
            device.plugin.as_ref().map_or("no plug-in".to_owned(), |p| format!("plug-in {} {}", p.name, p.version));
        lines.push(format!("device    {} ({}, {}), {}, {by}", device.name, device.id, device.backend, device.state));
        if let Some(power) = device.power.as_ref().filter(|power| power.low_power || power.suspended == Some(true)) {
            lines.push(format!("          {}", power::told(power)));
        } else if let Some(why) = &device.closed {
            lines.push(format!("          refuses requests: {why}"));
        }
        if let Some(served) = &device.served {
            let client = match (served.attached, served.client_pid) {
                (false, _) => "no client".to_owned(),
                (true, None) => "a client".to_owned(),
                (true, Some(pid)) => format!("client: process {pid}"),
            };
            lines.push(format!("          served at {}, {client}, {} before", served.socket, served.clients_gone));
        }
        if let Some(why) = &device.unmigratable {
            lines.push(format!("          cannot be migrated: {why}"));
        }
    }
    for name in &status.released {
        lines.push(format!("released  {name}: the kernel wanted it back"));
    }
    for plugin in &status.plugins {
        lines.push(format!("plug-in   {} {} ({})", plugin.name, plugin.version, plugin.path));
    }
    if let Some(listen) = &status.listen {
        lines.push(format!("listens   {listen}"));
    }
    if let Some(progress) = &status.migration {
        lines.push(format!(
            "migrating {}, round {}, {} pages sent",
            progress.phase.replace('_', " "),
            progress.round,
            progress.pages_sent
        ));
    }
    match &status.last {
        None => {}
        Some(LastMigration::Failed { failure }) => lines.push(format!("last      failed: {failure}")),
        Some(LastMigration::Moved { report } | LastMigration::Arrived { report }) => {
            lines.extend(migrate::told(report).into_iter().map(|line| format!("last      {line}")));
        }
    }
    lines
}

fn done(note: &str, json: bool) -> Result<Exit, CliError> {
    if json {
        print_json(&json!({ "done": note }))?;
    } else if !note.is_empty() {
        print_line(note)?;
    }
    Ok(Exit::Done)
}

pub(super) fn cancel(args: &ControlArgs, json: bool) -> Result<Exit, CliError> {
    done(&Client::connect(&args.control)?.cancel()?, json)
}

pub(super) fn stop(args: &StopArgs, json: bool) -> Result<Exit, CliError> {
    done(&Client::connect(&args.control.control)?.stop(args.force)?, json)
}
