//! `resolve`: by a running host, or in the journal of one that does not run.

use serde_json::json;

use super::args::ResolveArgs;
use super::{CliError, print_json, print_line};
use crate::control::client::Client;
use crate::control::exit::Exit;
use crate::control::protocol::Run;
use crate::migration::journal::{FileStore, Journal, Resolution};
use crate::migration::wire::MigrationId;

pub(super) fn run(args: &ResolveArgs, json: bool) -> Result<Exit, CliError> {
    let run = if args.run.run_here { Run::Here } else { Run::There };
    let id = MigrationId::parse(&args.id).ok_or_else(|| {
        CliError::new(Exit::Usage, format!("--id {}: 32 hexadecimal digits, as `status` shows them", args.id))
    })?;
    let note = match &args.state_dir {
        Some(folder) => in_journal(folder, id, run)?,
        None => Client::connect(&args.control.control)?.resolve(&id.to_string(), run)?,
    };
    if json {
        print_json(&json!({ "done": note }))?;
    } else {
        print_line(&note)?;
    }
    Ok(Exit::Done)
}

/// The journal's lock keeps a running host's migrations away from here.
fn in_journal(folder: &std::path::Path, id: MigrationId, run: Run) -> Result<String, CliError> {
    if !folder.is_dir() {
        return Err(CliError::new(Exit::Refused, format!("{}: no such folder", folder.display())));
    }
    let store = FileStore::new(folder).map_err(|error| CliError::failed(format!("{}: {error}", folder.display())))?;
    let journal = Journal::open(&store, id)?;
    let mut journal =
        journal.ok_or_else(|| CliError::new(Exit::Refused, format!("{}: no journal {id}", folder.display())))?;
    let (resolution, note) = match run {
        Run::Here => (Resolution::RunHere, "the journal says now: the guest belongs to this host"),
        Run::There => (Resolution::RunThere, "the journal says now: the guest belongs to the other host"),
    };
    journal.resolve(resolution)?;
    Ok(note.to_owned())
}
