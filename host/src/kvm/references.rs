//! The reference protocol: who keeps a VM, which VFIO files it has been told of, and who takes them back. Apart from what it
//! protects, so that its interleavings can be explored.
//!
//! **Owns** every count. **Must never** call KVM, or let the last reference to anything go, under its lock: both may come back here.
//!
//! ```text
//!   a file:  (absent) -- first take --> ADDING -- added --> ADDED -- last put --> REMOVING -- deleted --> (absent)
//!               ^                         | refused           | the VM ends: whoever ends it deletes every file
//!               +-------------------------+-------------------+
//!   the VM:  holders > 0 -- the last holder lets go --> ending (that thread deletes the files, then closes) --> ended
//! ```
//! A *holder* keeps the VM: its owner, whoever asked to pin it, and each call on it for as long as it lasts. A file's
//! [`Reference`] is not a holder: an open device does not keep a VM that nobody wants any more.
//! Locks: `table`, a leaf.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(loom)]
use loom::thread::{self, ThreadId};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, PoisonError};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use rustix::io::{self, Errno};

/// How long to wait for another thread's call about the same file, or for the end of the VM. KVM does either at once.
const CALL_WAIT: Duration = Duration::from_secs(5);

/// A VM's list of VFIO files (`KVM_DEV_VFIO_FILE`). Dropped when the VM has ended, which closes it.
pub trait FileList {
    /// A group or a device, open
    type File: std::fmt::Debug;

    fn add(&self, file: &Self::File) -> io::Result<()>;
    fn delete(&self, file: &Self::File) -> io::Result<()>;
}

/// Why there is no reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The VM has ended, or is ending
    Gone,
    /// Another thread's call about this file did not end in time
    Busy,
    /// KVM said no
    Kernel(Errno),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Adding,
    Added,
    Removing,
}

#[derive(Debug)]
struct Entry<F> {
    file: Arc<F>,
    users: u32,
    life: Life,
}

#[derive(Debug)]
struct Table<K: FileList> {
    /// There until the VM ends
    list: Option<Arc<K>>,
    files: Vec<Entry<K::File>>,
    ending: Option<ThreadId>,
}

/// One VM's references.
#[derive(Debug)]
pub struct References<K: FileList> {
    /// Never rises from 0
    holders: AtomicU32,
    /// Nothing of it is left in KVM. Set under the lock.
    ended: AtomicBool,
    table: Mutex<Table<K>>,
    changed: Condvar,
}

/// Keeps the VM. The last one to be dropped ends it there and then: deletes its files and closes it.
#[derive(Debug)]
pub struct Holder<K: FileList>(Arc<References<K>>);

/// One user of a file that the VM has been told of. The last one to be dropped takes the file back; afterwards KVM has the file
/// no more, whoever deleted it.
#[derive(Debug)]
pub struct Reference<K: FileList> {
    references: Arc<References<K>>,
    file: Arc<K::File>,
    pin: Option<Holder<K>>,
}

impl<F> Entry<F> {
    fn is(&self, file: &Arc<F>) -> bool {
        Arc::ptr_eq(&self.file, file)
    }
}

impl<K: FileList> Table<K> {
    fn find(&mut self, file: &Arc<K::File>) -> Option<&mut Entry<K::File>> {
        self.files.iter_mut().find(|entry| entry.is(file))
    }

    /// While somebody holds the VM it has not ended.
    fn list(&self) -> Arc<K> {
        Arc::clone(self.list.as_ref().expect("a held VM has not ended"))
    }
}

impl<K: FileList> References<K> {
    /// A VM that is held once: by its owner.
    pub fn begin(list: K) -> Holder<K> {
        let table = Table { list: Some(Arc::new(list)), files: Vec::new(), ending: None };
        Holder(Arc::new(Self {
            holders: AtomicU32::new(1),
            ended: AtomicBool::new(false),
            table: Mutex::new(table),
            changed: Condvar::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Table<K>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the VM, unless it is ending: a count that has been 0 stays 0.
    pub fn try_hold(self: &Arc<Self>) -> Option<Holder<K>> {
        let up = |holders: u32| if holders == 0 { None } else { holders.checked_add(1) };
        self.holders.fetch_update(Ordering::Acquire, Ordering::Relaxed, up).ok()?;
        Some(Holder(Arc::clone(self)))
    }

    /// Whether the VM has ended, and all its files have been taken back.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// A reference to `file`; the first one tells the VM of it. On an error nothing has changed. With `pins` it holds the VM as
    /// well, for as long as it lives.
    pub fn take(self: &Arc<Self>, file: &Arc<K::File>, pins: bool) -> Result<Reference<K>, Refused> {
        // Dropped at the end, under no lock: it may be the last one by then.
        let holder = self.try_hold().ok_or(Refused::Gone)?;
        if let Some(list) = self.enter(file)? {
            let added = list.add(file);
            self.settle(file, added.is_ok().then_some(Life::Added));
            added.map_err(Refused::Kernel)?;
        }
        Ok(Reference { references: Arc::clone(self), file: Arc::clone(file), pin: pins.then_some(holder) })
    }

    /// Counts one more user. Returns the list if the file has to be added first.
    fn enter(&self, file: &Arc<K::File>) -> Result<Option<Arc<K>>, Refused> {
        let deadline = Instant::now() + CALL_WAIT;
        let mut table = self.lock();
        loop {
            match table.find(file) {
                None => {
                    table.files.push(Entry { file: Arc::clone(file), users: 1, life: Life::Adding });
                    return Ok(Some(table.list()));
                }
                Some(entry) if entry.life == Life::Added => {
                    entry.users += 1;
                    return Ok(None);
                }
                Some(_) => table = self.wait(table, deadline).ok_or(Refused::Busy)?,
            }
        }
    }

    /// A call about the file has ended: it lives on so, or is absent.
    fn settle(&self, file: &Arc<K::File>, life: Option<Life>) {
        let mut table = self.lock();
        match life {
            Some(life) => table.find(file).into_iter().for_each(|entry| entry.life = life),
            None => table.files.retain(|entry| !entry.is(file)),
        }
        drop(table);
        self.changed.notify_all();
    }

    /// One user less. `held`: the caller holds the VM, so that it does not end meanwhile.
    fn leave(&self, file: &Arc<K::File>, held: bool) {
        let mut table = self.lock();
        let last = table.find(file).is_none_or(|entry| {
            entry.users -= 1;
            entry.users == 0
        });
        if !last {
            return;
        }
        if !held {
            // Whoever ends the VM deletes the file; its owner is about to close it, and may open it again at once.
            return self.wait_ended(table);
        }
        table.find(file).into_iter().for_each(|entry| entry.life = Life::Removing);
        let list = table.list();
        drop(table);
        if let Err(errno) = list.delete(file) {
            tracing::error!(%errno, "KVM does not let a VFIO file go; it stays open until the VM has ended");
        }
        self.settle(file, None);
    }

    fn wait_ended<'a>(&'a self, mut table: MutexGuard<'a, Table<K>>) {
        let deadline = Instant::now() + CALL_WAIT;
        // The thread that ends the VM may close devices on its way; it would wait for itself.
        while !self.has_ended() && table.ending != Some(thread::current().id()) {
            match self.wait(table, deadline) {
                Some(again) => table = again,
                None => return tracing::error!("a VM does not end; its VFIO files stay open until it has"),
            }
        }
    }

    fn wait<'a>(&'a self, table: MutexGuard<'a, Table<K>>, deadline: Instant) -> Option<MutexGuard<'a, Table<K>>> {
        let left = deadline.saturating_duration_since(Instant::now());
        // loom has no time: a wait ends only when somebody wakes it.
        if left.is_zero() && !cfg!(loom) {
            return None;
        }
        Some(match self.changed.wait_timeout(table, left) {
            Ok((table, _)) => table,
            Err(poisoned) => poisoned.into_inner().0,
        })
    }

    /// By whoever let the last holder go. No call is under way, since each has a holder, and none begins.
    fn end(&self) {
        let mut table = self.lock();
        table.ending = Some(thread::current().id());
        let list = table.list.take();
        let files = std::mem::take(&mut table.files);
        drop(table);
        for entry in files {
            if let Some(Err(errno)) = list.as_ref().map(|list| list.delete(&entry.file)) {
                tracing::error!(%errno, "KVM does not let a VFIO file go; it stays open until the VM has ended");
            }
        }
        drop(list);
        let table = self.lock();
        self.ended.store(true, Ordering::Release);
        drop(table);
        self.changed.notify_all();
    }
}

impl<K: FileList> Holder<K> {
    pub fn references(&self) -> &Arc<References<K>> {
        &self.0
    }
}

impl<K: FileList> Drop for Holder<K> {
    fn drop(&mut self) {
        if self.0.holders.fetch_sub(1, Ordering::Release) == 1 {
            // What the others did comes before the end.
            fence(Ordering::Acquire);
            self.0.end();
        }
    }
}

impl<K: FileList> Drop for Reference<K> {
    fn drop(&mut self) {
        // Dropped under no lock: it may be the last one by then.
        let holder = self.pin.take().or_else(|| self.references.try_hold());
        self.references.leave(&self.file, holder.is_some());
    }
}

#[cfg(all(test, loom))]
#[path = "references_loom.rs"]
mod loom_tests;
#[cfg(all(test, not(loom)))]
#[path = "references_tests.rs"]
mod tests;
