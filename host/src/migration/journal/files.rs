//! Journals as files: `<state directory>/<migration id>`, locked by flock, fsynced with their directory.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::{JOURNAL_MAX, Log, Store};

/// A state directory. One for each guest.
#[derive(Debug, Clone)]
pub struct FileStore {
    directory: PathBuf,
}

#[derive(Debug)]
struct FileLog(File);

impl FileStore {
    /// Makes the directory if need be, durably.
    pub fn new(directory: impl Into<PathBuf>) -> Result<Self> {
        let directory = directory.into();
        std::fs::create_dir_all(&directory)?;
        if let Some(parent) = directory.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_directory(parent)?;
        }
        Ok(Self { directory })
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory)?.sync_all()
}

/// Released when the file is closed, however the process ends.
fn lock(file: File) -> Result<File> {
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(errno) => Err(Error::from(errno)),
    }
}

fn read_capped(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(JOURNAL_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > JOURNAL_MAX {
        return Err(Error::new(ErrorKind::InvalidData, "the journal is too long"));
    }
    Ok(bytes)
}

impl Store for FileStore {
    fn create(&self, name: &str) -> Result<Box<dyn Log>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(self.path(name))?;
        let file = lock(file)?;
        file.sync_all()?;
        sync_directory(&self.directory)?;
        Ok(Box::new(FileLog(file)))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Log>> {
        let file = OpenOptions::new().read(true).write(true).open(self.path(name))?;
        Ok(Box::new(FileLog(lock(file)?)))
    }

    fn list(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for found in std::fs::read_dir(&self.directory)? {
            names.extend(found?.file_name().into_string());
        }
        Ok(names)
    }

    fn peek(&self, name: &str) -> Result<Vec<u8>> {
        read_capped(&mut File::open(self.path(name))?)
    }
}

impl Log for FileLog {
    fn read(&mut self) -> Result<Vec<u8>> {
        self.0.seek(SeekFrom::Start(0))?;
        read_capped(&mut self.0)
    }

    fn append(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.0.set_len(offset)?;
        self.0.seek(SeekFrom::Start(offset))?;
        self.0.write_all(bytes)?;
        self.0.sync_all()
    }
}
