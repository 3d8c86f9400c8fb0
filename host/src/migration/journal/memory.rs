//! Journals in memory, which survive whatever the simulation kills, and fail as told.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Log, Store};

/// How an append goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StorageFault {
    /// Nothing is written
    Nothing,
    /// All but the last byte is written
    Torn,
    /// All is written, and yet the answer is an error
    Whole,
}

#[derive(Debug, Default)]
struct Disk {
    files: BTreeMap<String, Vec<u8>>,
    locked: Vec<String>,
    /// Faults of the next appends, in order; `None` lets one pass
    faults: Vec<Option<StorageFault>>,
}

/// A disk. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Disk>>);

#[derive(Debug)]
struct MemoryLog {
    disk: MemoryStore,
    name: String,
}

impl MemoryStore {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next appends go as listed; those after them succeed.
    pub fn plan(&self, faults: Vec<Option<StorageFault>>) {
        self.disk().faults = faults;
    }

    /// Puts bytes into a file, as damage does.
    pub fn overwrite(&self, name: &str, bytes: Vec<u8>) {
        self.disk().files.insert(name.to_owned(), bytes);
    }

    fn lock(&self, name: &str) -> Result<Box<dyn Log>> {
        let mut disk = self.disk();
        if disk.locked.iter().any(|locked| locked == name) {
            return Err(ErrorKind::WouldBlock.into());
        }
        disk.locked.push(name.to_owned());
        Ok(Box::new(MemoryLog { disk: self.clone(), name: name.to_owned() }))
    }
}

impl Store for MemoryStore {
    fn create(&self, name: &str) -> Result<Box<dyn Log>> {
        if self.disk().files.contains_key(name) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.disk().files.insert(name.to_owned(), Vec::new());
        self.lock(name)
    }

    fn open(&self, name: &str) -> Result<Box<dyn Log>> {
        if !self.disk().files.contains_key(name) {
            return Err(ErrorKind::NotFound.into());
        }
        self.lock(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(self.disk().files.keys().cloned().collect())
    }

    fn peek(&self, name: &str) -> Result<Vec<u8>> {
        self.disk().files.get(name).cloned().ok_or(ErrorKind::NotFound.into())
    }
}

impl Log for MemoryLog {
    fn read(&mut self) -> Result<Vec<u8>> {
        self.disk.peek(&self.name)
    }

    fn append(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut disk = self.disk.disk();
        let fault = if disk.faults.is_empty() { None } else { disk.faults.remove(0) };
        let file = disk.files.entry(self.name.clone()).or_default();
        let keep = match fault {
            None | Some(StorageFault::Whole) => bytes.len(),
            Some(StorageFault::Torn) => bytes.len().saturating_sub(1),
            Some(StorageFault::Nothing) => return Err(Error::other("injected: nothing written")),
        };
        file.truncate(usize::try_from(offset).map_err(Error::other)?);
        file.extend_from_slice(&bytes[..keep]);
        fault.map_or(Ok(()), |fault| Err(Error::other(format!("injected: {fault:?}"))))
    }
}

impl Drop for MemoryLog {
    fn drop(&mut self) {
        let mut disk = self.disk.disk();
        disk.locked.retain(|locked| *locked != self.name);
    }
}
