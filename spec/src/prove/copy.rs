//! The copy of the workspace that mutations live in.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::{MUTATIONS, Mutation, patch};

/// A copy below the workspace's `target/`.
#[derive(Debug)]
pub struct Copy {
    pub folder: PathBuf,
}

/// The member whose models are proven.
const LIBRARY: &str = "host/src/lib.rs";
/// What a workspace's members are not.
const NOT_COPIED: [&str; 1] = ["target"];

impl Copy {
    /// Brings the copy up to date. Files that have not changed are left alone, so that cargo builds only what has.
    pub fn refresh(workspace: &Path, folder: &Path) -> anyhow::Result<Self> {
        let mut kept = Vec::new();
        for entry in std::fs::read_dir(workspace).context("the workspace")?.flatten() {
            let name = entry.file_name();
            let shown = name.to_string_lossy();
            let wanted = entry.path().join("Cargo.toml").exists()
                || ["plugins", "examples"].contains(&&*shown)
                || shown.starts_with("Cargo.");
            if wanted {
                copy(workspace, Path::new(&name), folder, &mut kept)?;
            }
        }
        remove_others(folder, &kept)?;
        Ok(Self { folder: folder.to_owned() })
    }
}

fn copy(workspace: &Path, name: &Path, folder: &Path, kept: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let from = workspace.join(name);
    if from.is_dir() {
        std::fs::create_dir_all(folder.join(name))?;
        for entry in std::fs::read_dir(&from)?.flatten() {
            let child = entry.file_name();
            let shown = child.to_string_lossy();
            if !NOT_COPIED.contains(&&*shown) && !shown.starts_with('.') {
                copy(workspace, &name.join(&child), folder, kept)?;
            }
        }
        return Ok(());
    }
    let mut bytes = std::fs::read(&from).with_context(|| format!("{}", from.display()))?;
    if name == Path::new("Cargo.toml") {
        bytes = renamed(&String::from_utf8(bytes).context("the workspace's manifest")?)?.into_bytes();
    }
    let here: Vec<&Mutation> = MUTATIONS.iter().filter(|mutation| Path::new(mutation.file) == name).collect();
    if !here.is_empty() || name == Path::new(LIBRARY) {
        let source = String::from_utf8(bytes).with_context(|| format!("{}", from.display()))?;
        let mut source = patch::patched(&source, &here)?;
        if name == Path::new(LIBRARY) {
            // What a mutation leaves unused is nobody's business.
            source = format!("#![allow(warnings)]\n{source}{}", patch::switch());
        }
        bytes = source.into_bytes();
    }
    let to = folder.join(name);
    if std::fs::read(&to).is_ok_and(|before| before == bytes) {
        kept.push(to);
        return Ok(());
    }
    std::fs::write(&to, bytes).with_context(|| format!("{}", to.display()))?;
    kept.push(to);
    Ok(())
}

/// The manifest with another version in it: cargo tells packages apart by name and version, wherever they lie, and would
/// take what it built of the one tree for the other's.
fn renamed(manifest: &str) -> anyhow::Result<String> {
    let (before, after) =
        manifest.split_once("[workspace.package]\nversion = \"").context("the workspace's version")?;
    let (version, rest) = after.split_once('"').context("the workspace's version")?;
    Ok(format!("{before}[workspace.package]\nversion = \"{version}+mutated\"{rest}"))
}

/// What the workspace no longer has.
fn remove_others(folder: &Path, kept: &[PathBuf]) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            remove_others(&path, kept)?;
        } else if !kept.contains(&path) {
            std::fs::remove_file(&path)?;
        }
    }
    ensure!(!kept.is_empty(), "nothing was copied");
    Ok(())
}
