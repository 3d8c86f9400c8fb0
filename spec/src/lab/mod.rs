//! The lab: a real Linux kernel with an IOMMU, vfio-pci, SR-IOV VFs and edu devices, emulated in seconds.
//!
//! **Owns** a folder with QEMU, a kernel and modules (made by `spec/lab/bootstrap` from Debian packages), the machines that
//! are booted from it, and the list of cases. **Must never** change the machine that it runs on.

pub mod cases;
mod initramfs;
mod machine;
mod power;
mod vfio_user;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

pub use machine::{Kind, Machine, Outcome, Share, boot, boot_pair};

/// A bootstrapped lab.
#[derive(Debug, Clone)]
pub struct Lab {
    /// QEMU, kernel, modules
    pub folder: PathBuf,
    /// `spec/lab` of the workspace
    pub scripts: PathBuf,
}

impl Lab {
    /// The lab in `folder`, made now if it is not there. Takes one to two minutes then, and says so.
    pub fn prepare(folder: &Path) -> anyhow::Result<Self> {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab");
        let status =
            Command::new(scripts.join("bootstrap")).arg(folder).status().context("running the lab's bootstrap")?;
        ensure!(status.success(), "the lab could not be made ({status})");
        let folder = folder.canonicalize().with_context(|| format!("{}", folder.display()))?;
        Ok(Self { folder, scripts })
    }

    pub fn versions(&self) -> anyhow::Result<String> {
        let text = std::fs::read_to_string(self.folder.join("versions")).context("the lab's versions")?;
        Ok(text.lines().collect::<Vec<_>>().join(", "))
    }
}
