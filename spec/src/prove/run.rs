//! Builds the models and runs them.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::{Mutation, VARIABLE};

/// A broken protocol fails within seconds; one that takes longer proves nothing.
const PATIENCE: Duration = Duration::from_secs(180);

/// The test program that has the models.
#[derive(Debug)]
pub struct Models {
    pub program: PathBuf,
    /// Full names of the models
    pub names: Vec<String>,
}

/// How a broken model failed.
#[derive(Debug)]
pub struct Failure {
    pub took: Duration,
    /// Its panic, in one line
    pub said: String,
}

impl Models {
    /// Builds the host's unit tests of `workspace` for loom, into `target`.
    pub fn build(workspace: &Path, target: &Path) -> anyhow::Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        let built = Command::new(cargo)
            .current_dir(workspace)
            .args([
                "test",
                "--quiet",
                "-p",
                "vfio-mediate",
                "--lib",
                "--no-run",
                "--message-format=json-render-diagnostics",
            ])
            .env("RUSTFLAGS", format!("{flags} --cfg loom").trim())
            .env("CARGO_TARGET_DIR", target)
            .stderr(Stdio::inherit())
            .output()
            .context("running cargo")?;
        ensure!(built.status.success(), "the models of {} do not build", workspace.display());
        let program = String::from_utf8_lossy(&built.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
            .next_back()
            .context("cargo names no test program")?;
        let listed = Command::new(&program).args(["loom_", "--list", "--format=terse"]).output()?;
        let names: Vec<String> = String::from_utf8_lossy(&listed.stdout)
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .map(str::to_owned)
            .collect();
        ensure!(!names.is_empty(), "{} has no models", program.display());
        Ok(Self { program, names })
    }

    /// Runs every model, unbroken; all of them must pass.
    pub fn pass(&self) -> anyhow::Result<()> {
        let status = Command::new(&self.program).arg("loom_").env_remove(VARIABLE).status()?;
        ensure!(status.success(), "a model fails on the code as it is");
        Ok(())
    }
}

/// Runs the mutation's model with it in force. An error: it was not noticed, or not in the way that it should be.
pub fn break_one(models: &Models, mutation: &Mutation) -> anyhow::Result<Failure> {
    let ends = format!("::{}", mutation.model);
    let name = models.names.iter().find(|name| name.ends_with(&ends)).context("there is no such model")?;
    let started = Instant::now();
    let mut child = Command::new(&models.program)
        // Nothing is captured: a panic during a panic would take what was said with it.
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(VARIABLE, mutation.name)
        .env_remove("RUST_BACKTRACE")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("running the model")?;
    let mut pipe = child.stderr.take().context("its output")?;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            bail!("it was still running after {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let took = started.elapsed();
    let output = reader.join().map_err(|_| anyhow::anyhow!("reading its output"))??;
    ensure!(!status.success(), "the model passes all the same");
    let said = panic_line(&output);
    ensure!(output.contains(mutation.says), "it failed, but not by {:?}: {said}", mutation.says);
    Ok(Failure { took, said })
}

/// The first panic's message.
fn panic_line(output: &str) -> String {
    let mut lines = output.lines().skip_while(|line| !line.contains("panicked at"));
    lines.nth(1).unwrap_or_else(|| output.lines().next_back().unwrap_or_default()).trim().to_owned()
}
