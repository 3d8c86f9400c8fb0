//! The binary's commands.
//!
//! **Owns** what a person types and reads. **Must never** do what a library caller could not: each command is a few lines over
//! [`super::client`], [`super::doctor`], [`super::host`]. Results go to standard output, progress and logs to standard error;
//! with `--json` everything goes to standard output, one object a line.

mod args;
mod device;
mod doctor;
mod failure;
mod migrate;
mod plugin;
mod power;
mod resolve;
mod run;
mod status;

use std::process::ExitCode;

use clap::Parser;

pub use args::{Cli, Command};
pub use failure::CliError;

use super::exit::Exit;

/// The whole program.
pub fn main() -> ExitCode {
    // Usage errors end the process here, with clap's own code, which is ours: 2.
    let cli = Cli::parse();
    let json = cli.json;
    match execute(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            error.show(json);
            error.exit.into()
        }
    }
}

fn execute(cli: Cli) -> Result<Exit, CliError> {
    let json = cli.json;
    match cli.command {
        Command::Run(args) => run::run(*args, json),
        Command::Plugin(args) => plugin::run(args, json),
        Command::Device(args) => device::run(args, json),
        Command::Migrate(args) => migrate::run(&args, json),
        Command::Status(args) => status::status(&args, json),
        Command::Cancel(args) => status::cancel(&args, json),
        Command::Power(args) => power::run(&args, json),
        Command::Stop(args) => status::stop(&args, json),
        Command::Resolve(args) => resolve::run(&args, json),
        Command::Doctor(args) => doctor::run(&args, json),
    }
}

/// One object on one line of standard output.
fn print_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    let line = serde_json::to_string(value).map_err(|error| CliError::failed(error.to_string()))?;
    print_line(&line)
}

/// A line of standard output. A reader that has gone (`| head`) is not an error of ours to explain.
fn print_line(line: &str) -> Result<(), CliError> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| CliError::failed(format!("standard output: {error}"))),
    }
}
