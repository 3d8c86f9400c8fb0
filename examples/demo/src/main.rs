//! `cargo demo`: two host processes migrate a running device in front of your eyes.
//!
//! One program in three roles: the parent (`parent`), which asks for things as an operator would; a host process
//! (`child`), which embeds the production library; and the guest (`guest`), which runs inside a host process.

mod build;
mod child;
mod cli;
mod guest;
#[cfg(test)]
mod guest_tests;
mod kill;
mod layout;
mod parent;
mod platform;
mod process;
mod protocol;
mod story;
mod witness;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Role};
use crate::guest::Caught;

/// `cargo demo -- --option` and `cargo demo --option` mean the same: the alias has a `--` of its own.
fn arguments(given: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    given.enumerate().filter(|(at, argument)| *at != 1 || argument != "--").map(|(_, argument)| argument)
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    let done = match &cli.role {
        None => match &cli.demo.kill {
            Some(what) => kill::run(&cli.demo, what),
            None => parent::run(&cli.demo),
        },
        Some(Role::Host(args)) => child::run(args),
        Some(Role::Source(args)) => parent::run_source(args),
        Some(Role::Destination(args)) => parent::run_destination(args),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    match error.downcast_ref::<Caught>() {
        Some(caught) => eprintln!("demo: caught by the {caught}"),
        None => eprintln!("demo: {error:#}"),
    }
    ExitCode::FAILURE
}
