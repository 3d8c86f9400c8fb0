//! `cargo prove`: the loom models pass, and each fails when its key line is broken.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use vfio_mediate_spec::prove::{Copy, MUTATIONS, Models, Mutation, break_one, unproven};

/// Runs the loom models, then breaks the code in each of the ways that `spec/src/prove/mutations.rs` lists and requires that
/// the model of that line fails.
///
/// Exit code: 0 all models pass and all mutations are noticed, 1 otherwise, 2 wrong use.
#[derive(Debug, Parser)]
#[command(name = "cargo prove")]
struct Cli {
    /// Only the mutations whose name or model has this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Show the mutations and end
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse_from(vfio_mediate_spec::arguments(std::env::args_os()))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("cargo prove: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<bool> {
    let wanted = |mutation: &&Mutation| {
        cli.only.as_ref().is_none_or(|text| mutation.name.contains(text) || mutation.model.contains(text))
    };
    let mutations: Vec<&Mutation> = MUTATIONS.iter().filter(wanted).collect();
    if cli.list {
        mutations.iter().for_each(|mutation| println!("{:34} {}", mutation.name, mutation.model));
        return Ok(true);
    }
    let started = Instant::now();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    let target = workspace.join("target/loom");
    if cli.only.is_none() {
        Models::build(workspace, &target)?.pass()?;
    }
    let copy = Copy::refresh(workspace, &target.join("mutated"))?;
    let models = Models::build(&copy.folder, &target)?;
    let mut wrong = unproven(&models.names, MUTATIONS);
    wrong.iter().for_each(|line| println!("FAIL {line}"));
    wrong.extend(break_all(&models, &mutations));
    println!(
        "prove: {} models, {} mutations, {} wrong, {:.0} s",
        models.names.len(),
        mutations.len(),
        wrong.len(),
        started.elapsed().as_secs_f64()
    );
    Ok(wrong.is_empty())
}

/// One line each, as they end; those that were not noticed are returned.
fn break_all(models: &Models, mutations: &[&Mutation]) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut missed = Vec::new();
        while let Some(mutation) = mutations.get(next.fetch_add(1, Ordering::Relaxed)) {
            match break_one(models, mutation) {
                Ok(failure) => println!(
                    "ok {}, broken by {:?}, fails in {:.1} s: {}",
                    mutation.model,
                    mutation.name,
                    failure.took.as_secs_f64(),
                    failure.said
                ),
                Err(error) => {
                    println!("FAIL {}, broken by {:?}: {error:#}", mutation.model, mutation.name);
                    missed.push(mutation.name.to_owned());
                }
            }
        }
        missed
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(worker)).collect();
        let lost = |_| vec!["a worker of the proof itself".to_owned()];
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_else(lost)).collect()
    })
}
