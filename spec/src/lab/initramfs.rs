//! A cpio archive in the newc format: the lab machine's whole file system.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;

#[derive(Debug, Default)]
pub struct Initramfs {
    /// Path without a leading slash, to mode and contents. Ordered, so that a folder comes before what is in it.
    entries: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Initramfs {
    fn put(&mut self, path: &str, mode: u32, contents: Vec<u8>) {
        let path = path.trim_matches('/');
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].to_owned()).or_insert((DIRECTORY, Vec::new()));
        }
        self.entries.insert(path.to_owned(), (mode, contents));
    }

    pub fn directory(&mut self, path: &str) {
        self.put(path, DIRECTORY, Vec::new());
    }

    pub fn text(&mut self, path: &str, text: &str) {
        self.put(path, FILE | 0o755, text.as_bytes().to_vec());
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.put(path, SYMLINK, target.as_bytes().to_vec());
    }

    pub fn file(&mut self, source: &Path, path: &str) -> io::Result<()> {
        let mode = std::fs::metadata(source)?.permissions().mode() & 0o777;
        self.put(path, FILE | mode | 0o500, std::fs::read(source)?);
        Ok(())
    }

    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut inode = 0;
        let mut entry = |out: &mut dyn Write, path: &str, mode: u32, contents: &[u8], device: (u32, u32)| {
            inode += 1;
            // ino, mode, uid, gid, nlink, mtime, filesize, dev (2), rdev (2), namesize, check
            let fields =
                [inode, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, device.0, device.1, path.len() as u32 + 1, 0];
            let mut head = b"070701".to_vec();
            for field in fields {
                write!(head, "{field:08x}")?;
            }
            head.extend_from_slice(path.as_bytes());
            head.push(0);
            pad(&mut head);
            out.write_all(&head)?;
            out.write_all(contents)?;
            out.write_all(&[0; 3][..contents.len().wrapping_neg() % 4])
        };
        for (path, (mode, contents)) in &self.entries {
            entry(out, path, *mode, contents, (0, 0))?;
        }
        // The kernel opens it for the first process before anything can be mounted.
        entry(out, "dev/console", CHARACTER_DEVICE, &[], (5, 1))?;
        entry(out, "TRAILER!!!", 0, &[], (0, 0))
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::Initramfs;

    #[test]
    fn every_header_and_every_content_begins_on_four_bytes() {
        for length in 0..9 {
            let mut tree = Initramfs::default();
            tree.directory("dev");
            tree.text("a/b", &"x".repeat(length));
            let mut archive = Vec::new();
            tree.write(&mut archive).unwrap();
            let magics: Vec<usize> =
                archive.windows(6).enumerate().filter(|(_, w)| *w == b"070701").map(|(at, _)| at).collect();
            // a, a/b, dev, dev/console, trailer
            assert_eq!(magics.len(), 5);
            assert!(magics.iter().all(|at| at.is_multiple_of(4)), "{magics:?}");
        }
    }

    #[test]
    fn the_folders_above_a_file_come_before_it() {
        let mut tree = Initramfs::default();
        tree.text("/x/y/z", "");
        let names: Vec<&String> = tree.entries.keys().collect();
        assert_eq!(names, ["x", "x/y", "x/y/z"]);
    }
}
