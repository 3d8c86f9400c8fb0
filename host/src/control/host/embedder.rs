//! The program around a host.

use std::sync::Arc;
use std::time::Instant;

use crate::control::machine::Machine;
use crate::kvm;
use crate::mediation::{VmmError, VmmPort};
use crate::memory::DirtyLog;
use crate::migration::cause::{Phase, Role};

/// Brings the VMM, and watches. Every method may be called from any thread of the host's, under none of its locks.
pub trait Embedder: Send + Sync + 'static {
    /// The VM that is to know the devices' VFIO files, asked for before any is opened. The embedder keeps the [`kvm::Vm`] and drops it
    /// when the VM exits. None where there is no KVM, or where the VMM cannot be reached: devices work without.
    fn kvm(&self) -> Option<kvm::Handle> {
        None
    }

    /// Makes the VMM for this machine. Its guest must not run before [`VmmPort::resume`]. On a host that awaits a guest, guest
    /// memory must not be written before that either: a page that the source has as zeroes is not sent into memory that
    /// was never written.
    fn vmm(&self, machine: &Machine) -> Result<Arc<dyn VmmPort>, String>;

    /// A phase of a migration begins; whoever blocks here holds the migration.
    fn phase(&self, role: Role, phase: Phase);

    /// The guest is here and runs.
    fn running(&self);

    /// The guest is gone for good.
    fn gone(&self);

    /// A device reported an uncorrectable error and refuses everything. The guest's part of it is the embedder's.
    fn device_failed(&self, _device: &str) {}

    /// The kernel wanted a device back: the host has let go of it. An embedder that holds it too has to let go as well.
    fn device_released(&self, _device: &str) {}
}

/// No guest: devices are open and can be moved, nobody uses them.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoGuest;

/// The VMM of no guest.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct IdleVmm;

impl VmmPort for IdleVmm {
    fn pause(&self, _: Instant) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    // Nobody stores into this memory but the host and the devices, which mark what they write.
    fn start_cpu_dirt(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn sync_cpu_dirt(&self, _: &DirtyLog) -> Result<(), VmmError> {
        Ok(())
    }

    fn stop_cpu_dirt(&self) {}
}

impl Embedder for NoGuest {
    fn vmm(&self, _: &Machine) -> Result<Arc<dyn VmmPort>, String> {
        Ok(Arc::new(IdleVmm))
    }

    fn phase(&self, _: Role, _: Phase) {}

    fn running(&self) {}

    fn gone(&self) {}
}
