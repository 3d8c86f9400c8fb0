//! The VMM's side of a migration, which front-ends implement and migration calls.

use std::time::Instant;

use rustix::io::Errno;

use crate::memory::DirtyLog;

/// The VMM did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the VMM: {what}: {errno}")]
pub struct VmmError {
    pub what: String,
    pub errno: Errno,
}

/// What a migration needs of the VMM. Calls come one at a time.
pub trait VmmPort: Send + Sync {
    /// Stops the vCPUs; none runs when this returns. On an error they run on, all of them.
    fn pause(&self, deadline: Instant) -> Result<(), VmmError>;

    /// Lets the vCPUs run.
    fn resume(&self) -> Result<(), VmmError>;

    /// Begins to record what the vCPUs write. ENOTSUP where there is no source of CPU dirt: the host may not copy memory
    /// then.
    fn start_cpu_dirt(&self) -> Result<(), VmmError>;

    /// ORs what the vCPUs have written since the last call into `log`. On an error everything has been marked dirty.
    fn sync_cpu_dirt(&self, log: &DirtyLog) -> Result<(), VmmError>;

    fn stop_cpu_dirt(&self);
}
