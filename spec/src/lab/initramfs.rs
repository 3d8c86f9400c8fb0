//! A machine's file system: a cpio archive in the newc format.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Path (without the leading slash) to mode and contents. Directories come into being with what is in them.
#[derive(Debug, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Initramfs {
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        let mut end = 0;
        while end < path.len() {
            end = path[end + 1..].find('/').map_or(path.len(), |next| end + 1 + next);
            self.entries.entry(path[..end].to_owned()).or_insert((DIRECTORY, Vec::new()));
        }
    }

    pub fn file(&mut self, path: &str, mode: u32, contents: impl Into<Vec<u8>>) {
        let path = path.trim_start_matches('/');
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.entries.insert(path.to_owned(), (FILE | mode, contents.into()));
    }

    pub fn copy(&mut self, source: &Path, path: &str) -> Result<()> {
        let context = || format!("{} for the lab's machine", source.display());
        let mode = source.metadata().with_context(context)?.permissions().mode() & 0o777;
        self.file(path, mode, std::fs::read(source).with_context(context)?);
        Ok(())
    }

    /// Copies the shared libraries that `programs` need, the loader included, to the places where they are here.
    /// Returns their directories, for LD_LIBRARY_PATH: a machine has no loader cache.
    pub fn copy_libraries(&mut self, programs: &[PathBuf]) -> Result<BTreeSet<String>> {
        let mut directories = BTreeSet::new();
        for program in programs.iter().filter(|program| is_elf(program)) {
            let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
            let listing = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(!listing.contains("not found"), "{}: libraries are missing here:\n{listing}", program.display());
            // "libc.so.6 => /lib/libc.so.6 (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)"
            for library in listing.split_whitespace().filter(|word| word.starts_with('/')) {
                self.copy(Path::new(library), library)?;
                directories.extend(library.rsplit_once('/').map(|(directory, _)| directory.to_owned()));
            }
        }
        Ok(directories)
    }

    /// Writes the archive.
    pub fn write(&self, mut out: impl Write) -> Result<()> {
        let mut inode = 0;
        let mut entry = |path: &str, mode: u32, device: (u32, u32), contents: &[u8]| -> Result<()> {
            inode += 1;
            let size = u32::try_from(contents.len()).with_context(|| format!("/{path} is too large for cpio"))?;
            let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, path.len() as u32 + 1, 0];
            let mut head = String::from("070701");
            for field in fields {
                head.push_str(&format!("{field:08x}"));
            }
            head.push_str(path);
            head.push('\0');
            out.write_all(head.as_bytes())?;
            out.write_all(&[0; 3][..padding(head.len())])?;
            out.write_all(contents)?;
            out.write_all(&[0; 3][..padding(contents.len())])?;
            Ok(())
        };
        for (path, (mode, contents)) in &self.entries {
            entry(path, *mode, (0, 0), contents)?;
        }
        // What the kernel gives to init as its standard files.
        entry("dev", DIRECTORY, (0, 0), &[])?;
        entry("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
        entry("TRAILER!!!", 0, (0, 0), &[])
    }
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == *b"\x7fELF"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in an archive, with the contents of files.
    fn parse(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let mut at = 0;
        while at < archive.len() {
            let field = |n: usize| {
                let text = std::str::from_utf8(&archive[at + 6 + 8 * n..at + 14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            assert_eq!(&archive[at..at + 6], b"070701");
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(archive[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            found.push((name, mode as u32, archive[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
        found
    }

    #[test]
    fn an_archive_has_what_was_put_in_and_parents_come_first() {
        let mut tree = Initramfs::default();
        tree.file("/a/b/c", 0o755, "abc");
        tree.file("d", 0o644, "12345");
        tree.directory("/tmp");
        let mut archive = Vec::new();
        tree.write(&mut archive).unwrap();
        let entries = parse(&archive);
        let names: Vec<&str> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "d", "tmp", "dev", "dev/console", "TRAILER!!!"]);
        assert_eq!(entries[2], ("a/b/c".to_owned(), FILE | 0o755, b"abc".to_vec()));
        assert_eq!(entries[3].2, b"12345");
        assert!(archive.len().is_multiple_of(4));
    }
}
