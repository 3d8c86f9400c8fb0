//! `migrate`: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

use super::args::MigrateArgs;
use super::{CliError, print_json, print_line};
use crate::control::client::Client;
use crate::control::exit::Exit;
use crate::control::protocol::{Progress, Report, Request};

pub(super) fn run(args: &MigrateArgs, json: bool) -> Result<Exit, CliError> {
    let mut client = Client::connect(&args.control.control)?;
    let request = Request::Migrate { to: args.to.clone(), insecure: args.insecure, verify: args.verify };
    let mut view = View::new(json, std::io::stderr().is_terminal());
    let result = client.migrate_with(request, |progress| view.show(progress));
    view.end();
    let report = result?;
    if json {
        print_json(&json!({ "report": report }))?;
    } else {
        for line in told(&report) {
            print_line(&line)?;
        }
    }
    Ok(Exit::Done)
}

/// How progress is shown.
enum View {
    Json { last: Progress },
    Bar(ProgressBar),
    Lines { phase: String, round: u32 },
}

impl View {
    fn new(json: bool, terminal: bool) -> Self {
        match (json, terminal) {
            (true, _) => Self::Json { last: Progress::default() },
            (false, true) => {
                let bar = ProgressBar::new(0);
                let style = ProgressStyle::with_template("{spinner} {msg:28} [{bar:30}] {pos}/{len} pages {elapsed}");
                // The template is ours; should it be wrong, the default bar is shown.
                if let Ok(style) = style {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.enable_steady_tick(Duration::from_millis(100));
                Self::Bar(bar)
            }
            (false, false) => Self::Lines { phase: String::new(), round: 0 },
        }
    }

    fn show(&mut self, progress: &Progress) {
        let named = progress.phase.replace('_', " ");
        match self {
            Self::Json { last } => {
                // Signs of life are not news.
                if last != progress {
                    println!("{}", json!({ "progress": progress }));
                    last.clone_from(progress);
                }
            }
            Self::Bar(bar) => {
                // Of the round under way; a round that copies dirt again starts the bar anew.
                let round = progress.pages_left.max(bar.length().unwrap_or(0).min(progress.pages_total));
                if progress.pages_left > 0 {
                    bar.set_length(if progress.round <= 1 { progress.pages_total } else { round });
                }
                bar.set_position(bar.length().unwrap_or(0).saturating_sub(progress.pages_left));
                bar.set_message(format!("{named}, round {}, {}", progress.round, HumanBytes(progress.bytes)));
            }
            Self::Lines { phase, round } => {
                if *phase != progress.phase || *round != progress.round {
                    let at = progress.elapsed_ms as f64 / 1000.0;
                    let (sent, bytes) = (progress.pages_sent, HumanBytes(progress.bytes));
                    eprintln!("{at:8.3} s  {named}, round {}: {sent} pages sent, {bytes}", progress.round);
                    phase.clone_from(&progress.phase);
                    *round = progress.round;
                }
            }
        }
    }

    fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn number(report: &Report, name: &str) -> f64 {
    report.get(name).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN)
}

/// A report in a few lines.
pub(super) fn told(report: &Report) -> Vec<String> {
    let rounds = report.get("rounds").and_then(|rounds| rounds.as_array()).map_or(0, Vec::len);
    let count = |name: &str| report.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let id = report.get("migration_id").and_then(|id| id.as_str()).unwrap_or("?");
    let mut lines = vec![format!(
        "migration {id}: done in {:.1} s, {} pages ({} of them zero) in {rounds} rounds, {}",
        number(report, "total_ms") / 1000.0,
        count("pages_sent"),
        count("zero_pages"),
        HumanBytes(count("bytes")),
    )];
    let parts = report.get("downtime").and_then(|parts| parts.as_object());
    let parts: Vec<String> = parts
        .into_iter()
        .flatten()
        // A part of another part.
        .filter(|(name, _)| *name != "resume_at_destination")
        .filter_map(|(name, ms)| Some((name, ms.as_f64().filter(|ms| *ms >= 0.05)?)))
        .map(|(name, ms)| format!("{} {ms:.1}", name.replace('_', " ")))
        .collect();
    lines.push(format!("downtime {:.1} ms = {}", number(report, "downtime_ms"), parts.join(" + ")));
    for device in report.get("devices").and_then(|devices| devices.as_array()).into_iter().flatten() {
        let text = |name: &str| device.get(name).and_then(|value| value.as_str());
        let by = match (text("plugin"), text("plugin_version")) {
            (Some(plugin), Some(version)) => format!("plug-in {plugin} {version}"),
            (_, _) => "its own driver".to_owned(),
        };
        let bytes = device.get("state_bytes").and_then(serde_json::Value::as_u64).unwrap_or(0);
        lines.push(format!("device {}: {bytes} bytes of state, by {by}", text("name").unwrap_or("?")));
    }
    if let Some(verified) = report.get("verified").and_then(serde_json::Value::as_bool) {
        lines.push(format!("all of guest memory compared: {}", if verified { "equal" } else { "DIFFERENT" }));
    }
    lines
}
