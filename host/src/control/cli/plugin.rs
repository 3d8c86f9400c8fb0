//! `plugin info`, `plugin check`.

use std::path::Path;

use serde_json::json;

use super::args::PluginCommand;
use super::{CliError, print_json, print_line};
use crate::control::chain;
use crate::control::exit::Exit;
use crate::plugin::{DeviceMatch, Library, LoadError};

pub(super) fn run(command: PluginCommand, json: bool) -> Result<Exit, CliError> {
    match command {
        PluginCommand::Info { file } => info(&file, json),
        PluginCommand::Check { files } => {
            let mut exit = Exit::Done;
            for file in &files {
                if !check(file, json)? {
                    exit = Exit::Check;
                }
            }
            Ok(exit)
        }
    }
}

fn refused(error: &LoadError) -> CliError {
    CliError::new(Exit::Check, chain(error))
}

fn id(id: Option<u16>) -> String {
    id.map_or("*".to_owned(), |id| format!("{id:04x}"))
}

fn shown(wanted: &DeviceMatch) -> String {
    let device = format!("{}:{}", id(wanted.vendor_id), id(wanted.device_id));
    match (wanted.subsystem_vendor_id, wanted.subsystem_device_id) {
        (None, None) => device,
        (vendor, subsystem) => format!("{device} subsystem {}:{}", id(vendor), id(subsystem)),
    }
}

fn info(file: &Path, json: bool) -> Result<Exit, CliError> {
    let library = Library::open(file).map_err(|error| refused(&error))?;
    let matches: Vec<String> = library.matches().iter().map(shown).collect();
    if json {
        print_json(&json!({
            "name": library.name(), "version": library.version(), "vendor": library.vendor(),
            "path": library.path(), "rust": library.is_rust(), "panic_aborts": library.panic_aborts(),
            "devices": matches,
        }))?;
        return Ok(Exit::Done);
    }
    print_line(&format!("{} {} by {}", library.name(), library.version(), library.vendor()))?;
    print_line(&format!("  file      {}", library.path().display()))?;
    print_line(&format!("  language  {}", if library.is_rust() { "Rust" } else { "C" }))?;
    for wanted in &matches {
        print_line(&format!("  device    {wanted}"))?;
    }
    if library.panic_aborts() {
        print_line("  warning   built with panic=abort: a panic in it ends the host")?;
    }
    Ok(Exit::Done)
}

fn check(file: &Path, json: bool) -> Result<bool, CliError> {
    let result = Library::open(file);
    let good = result.is_ok();
    let text = match &result {
        Ok(library) => format!("{} {}", library.name(), library.version()),
        Err(error) => chain(error),
    };
    if json {
        print_json(&json!({ "path": file, "ok": good, "text": text }))?;
    } else {
        let shown = if good { format!("ok    {}: {text}", file.display()) } else { format!("FAIL  {text}") };
        print_line(&shown)?;
    }
    Ok(good)
}
