//! `doctor`.

use serde_json::json;

use super::args::DoctorArgs;
use super::{CliError, print_json, print_line};
use crate::control::config::{ConfigError, MemorySize, default_state_dir};
use crate::control::doctor::{Finding, Level, Machine, Wanted, examine, worst};
use crate::control::exit::Exit;

pub(super) fn run(args: &DoctorArgs, json: bool) -> Result<Exit, CliError> {
    let draft = args.machine.draft()?;
    let memory = draft.memory.map(MemorySize::new).transpose();
    let wanted = Wanted {
        devices: draft.devices,
        plugins: draft.plugins.into_iter().map(|plugin| plugin.path).collect(),
        memory: memory.map_err(|what| ConfigError::Whole { key: "memory", what })?,
        state_dir: Some(draft.state_dir.unwrap_or_else(default_state_dir)),
    };
    let findings = examine(&Machine::this(), &wanted);
    if json {
        print_json(&json!({ "findings": findings, "worst": worst(&findings) }))?;
    } else {
        for finding in &findings {
            show(finding)?;
        }
        print_line(match worst(&findings) {
            Level::Ok => "everything is as it should be",
            Level::Warn => "it will work, with less than there could be",
            Level::Fail => "what is marked FAIL will not work",
        })?;
    }
    Ok(if worst(&findings) == Level::Fail { Exit::Check } else { Exit::Done })
}

fn show(finding: &Finding) -> Result<(), CliError> {
    let level = match finding.level {
        Level::Ok => "ok  ",
        Level::Warn => "warn",
        Level::Fail => "FAIL",
    };
    print_line(&format!("{level}  {}", finding.text))?;
    for remedy in &finding.remedies {
        print_line(&format!("        {remedy}"))?;
    }
    Ok(())
}
