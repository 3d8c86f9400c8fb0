//! The lab: machines with an IOMMU, an igb NIC with VFs, and edu devices, booted in seconds under a real kernel.
//!
//! **Owns** the images' place and their making ([`Lab`]), the machines ([`boot`], [`boot_pair`]) and the cases.
//! QEMU emulates everything, so neither hardware nor KVM nor root is needed.
//!
//! ```text
//! spec/lab/bootstrap  once: QEMU, kernel, modules, busybox from Debian's packages     -> Lab
//! Machine             what one boot has: devices, files, shares, a script
//! boot                cpio archive -> QEMU; ttyS0 = log, ttyS1 = the script's output  -> Output
//! ```

mod cases;
mod initramfs;
mod machine;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

pub use cases::{Case, Report, ReportLine, all_cases, run_case};
pub use machine::{Ended, Machine, Output, Share, boot, boot_pair};

/// What machines are booted from.
#[derive(Debug, Clone)]
pub struct Lab {
    /// What `bootstrap` made
    directory: PathBuf,
    /// `spec/lab`: what the machines' init and functions are copied from
    sources: PathBuf,
}

impl Lab {
    /// `$VFIO_MEDIATE_LAB`, else `.cache/lab` in the workspace.
    pub fn default_directory() -> PathBuf {
        match std::env::var_os("VFIO_MEDIATE_LAB") {
            Some(directory) => PathBuf::from(directory),
            None => workspace().join(".cache/lab"),
        }
    }

    /// Makes the lab where it is not there yet, which takes about 90 s and 500 MB of download. `progress` gets a line for
    /// each step.
    pub fn ready(directory: &Path, mut progress: impl FnMut(&str)) -> Result<Self> {
        let sources = workspace().join("spec/lab");
        let mut child = Command::new("bash")
            .arg(sources.join("bootstrap"))
            .arg(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting bash")?;
        let stderr = child.stderr.take().context("no pipe from the bootstrap")?;
        for line in BufReader::new(stderr).lines() {
            progress(&line?);
        }
        ensure!(child.wait()?.success(), "the lab could not be made in {}", directory.display());
        Ok(Self { directory: directory.to_owned(), sources })
    }

    /// Versions of kernel and QEMU, for people.
    pub fn versions(&self) -> String {
        std::fs::read_to_string(self.directory.join("versions")).unwrap_or_default().trim().replace('\n', ", ")
    }
}

/// Where this crate's sources are.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Builds binaries and plug-ins of the workspace, in the profile and target directory that this program was built in.
/// `packages` as (package, its `--bin` or `--lib` or `--bins`). Returns the directory that has them.
pub fn build(targets: &[(&str, &[&str])]) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let output = here.parent().context("this program has no directory")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    for (package, what) in targets {
        let mut command = Command::new(&cargo);
        command.current_dir(workspace()).args(["build", "--quiet", "--package", package]).args(*what);
        if output.file_name().is_some_and(|name| name == "release") {
            command.arg("--release");
        }
        ensure!(command.status()?.success(), "building {package} failed");
    }
    Ok(output.to_path_buf())
}
