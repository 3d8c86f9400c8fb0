//! A simulated VM's list of VFIO files: it keeps the files open as KVM does, says what was asked of it, and fails where it is told to.
//!
//! **Owns** a descriptor of each file in its list. Locks: `state`, a leaf; not held while a caller's function runs.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::{self, Errno};

use super::VfioFiles;

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Add,
    Delete,
    /// The list was closed: the VM has ended
    Close,
}

/// Inside which file's call, and may itself do anything.
type Interloper = Box<dyn FnMut(Call) + Send>;

#[derive(Default)]
struct State {
    /// Device and inode say which file it is
    files: Vec<((u64, u64), OwnedFd)>,
    calls: Vec<Call>,
    refuse: Option<(Call, Errno)>,
    interloper: Option<Interloper>,
}

/// Looks into a [`SimFiles`] from outside, also after its end.
#[derive(Clone, Default)]
pub struct SimKvm(Arc<Mutex<State>>);

/// The list of one VM, for [`super::Vm::over`].
#[derive(Debug)]
pub struct SimFiles(SimKvm);

impl std::fmt::Debug for SimKvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimKvm").field("calls", &self.calls()).finish_non_exhaustive()
    }
}

impl SimKvm {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn files(&self) -> Box<SimFiles> {
        Box::new(SimFiles(self.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    /// How many files it has.
    pub fn count(&self) -> usize {
        self.state().files.len()
    }

    /// The next such call fails, and has done nothing.
    pub fn refuse_next(&self, call: Call, errno: Errno) {
        self.state().refuse = Some((call, errno));
    }

    /// Runs inside every call from now on, before the call does anything.
    pub fn inside_calls(&self, interloper: impl FnMut(Call) + Send + 'static) {
        self.state().interloper = Some(Box::new(interloper));
    }

    fn called(&self, call: Call) -> io::Result<()> {
        let mut state = self.state();
        state.calls.push(call);
        let refused = state.refuse.take_if(|(which, _)| *which == call);
        let interloper = state.interloper.take();
        drop(state);
        if let Some(mut interloper) = interloper {
            interloper(call);
            self.state().interloper.get_or_insert(interloper);
        }
        refused.map_or(Ok(()), |(_, errno)| Err(errno))
    }
}

fn identity(file: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino))
}

impl VfioFiles for SimFiles {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.0.called(Call::Add)?;
        let (which, kept) = (identity(file)?, rustix::io::fcntl_dupfd_cloexec(file, 0)?);
        let mut state = self.0.state();
        if state.files.iter().any(|(there, _)| *there == which) {
            return Err(Errno::EXIST);
        }
        state.files.push((which, kept));
        Ok(())
    }

    fn delete(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.0.called(Call::Delete)?;
        let which = identity(file)?;
        let mut state = self.0.state();
        let at = state.files.iter().position(|(there, _)| *there == which).ok_or(Errno::NOENT)?;
        let removed = state.files.swap_remove(at);
        drop(state);
        drop(removed);
        Ok(())
    }
}

impl Drop for SimFiles {
    fn drop(&mut self) {
        // A closed list has nothing to refuse.
        let _ = self.0.called(Call::Close);
        let files = std::mem::take(&mut self.0.state().files);
        drop(files);
    }
}
