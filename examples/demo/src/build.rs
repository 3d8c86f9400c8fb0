//! The plug-in's .so: given, beside this program, or built from the workspace.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

const PACKAGE: &str = "vfio-mediate-plugin-edu";
const FILE: &str = "libvfio_mediate_plugin_edu.so";

/// Where the plug-in is. Builds it when the demo runs from its workspace, since cargo does not build a shared library
/// only because a program will open it later.
pub fn plugin(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_path_buf());
    }
    let program = std::env::current_exe().context("finding this program")?;
    let beside = program.parent().context("the program's folder")?.join(FILE);
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    // Cargo sets CARGO for what it runs; elsewhere only a library that lies beside the program counts.
    let Some(cargo) = std::env::var_os("CARGO") else {
        if beside.exists() {
            return Ok(beside);
        }
        bail!("no plug-in beside {}: give one with --plugin FILE", program.display());
    };
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--package", PACKAGE, "--manifest-path"]).arg(&manifest);
    let target = program.parent().and_then(Path::parent).context("the target folder")?;
    build.arg("--target-dir").arg(target);
    if program.parent().is_some_and(|folder| folder.ends_with("release")) {
        build.arg("--release");
    }
    let status = build.status().context("running cargo")?;
    if !status.success() {
        bail!("cargo could not build {PACKAGE} ({status})");
    }
    if !beside.exists() {
        bail!("cargo built {PACKAGE}, but {} is not there", beside.display());
    }
    Ok(beside)
}
