//! KVM and the devices of its VMs: an embedder hands a VM over, and each VFIO file that the host opens for it is made known to it
//! (`KVM_DEV_VFIO_FILE_ADD`) before the device is opened or bound, and taken back (`_DEL`) when the last user has closed.
//!
//! **Owns** the VM's KVM device of type VFIO, of which a VM has one. **Must never** keep a VM that nobody asked to keep: a
//! [`Handle`], and a device that was opened with one, do not, unless the handle is [pinning](Handle::pinning).
//!
//! The VM is the embedder's [`Vm`]: dropping it is the VM's exit, and from then on a reference is refused with [`KvmError::Gone`].
//! KVM's own device holds the VM (`kvm_get_kvm`), so a VM whose fd is closed lives until its `Vm` is dropped. The kernel's VFIO
//! holds it, too, for a device that was opened while its file was known, until that device is closed.
//! States and locks: those of [`references`].

pub mod references;
pub mod sim;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::{self, Errno};

use self::references::{FileList, Holder, References, Refused};
use crate::sys::kvm;

/// What can go wrong, shaped by what the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvmError {
    /// Open without a VM, or not at all.
    #[error("the VM has ended")]
    Gone,
    /// Try again.
    #[error("another thread's call about this file takes too long")]
    Busy,
    /// The descriptor, the file or the kernel does not do.
    #[error("{what}: {errno}")]
    Refused { what: String, errno: Errno },
}

impl KvmError {
    pub fn errno(&self) -> Errno {
        match self {
            Self::Gone => Errno::NODEV,
            Self::Busy => Errno::AGAIN,
            Self::Refused { errno, .. } => *errno,
        }
    }
}

/// A VM's list of VFIO files: KVM's, or a simulated one.
pub trait VfioFiles: std::fmt::Debug + Send + Sync {
    /// EEXIST when it is there.
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()>;
    /// ENOENT when it is not.
    fn delete(&self, file: BorrowedFd<'_>) -> io::Result<()>;
}

type Files = Box<dyn VfioFiles>;

impl FileList for Files {
    type File = OwnedFd;

    fn add(&self, file: &OwnedFd) -> io::Result<()> {
        (**self).add(file.as_fd())
    }

    fn delete(&self, file: &OwnedFd) -> io::Result<()> {
        (**self).delete(file.as_fd())
    }
}

/// `KVM_DEV_TYPE_VFIO` of one VM.
#[derive(Debug)]
struct KvmVfioDevice(OwnedFd);

impl VfioFiles for KvmVfioDevice {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        kvm::vfio_file_add(self.0.as_fd(), file)
    }

    fn delete(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        kvm::vfio_file_delete(self.0.as_fd(), file)
    }
}

/// An embedder's VM. Dropping it is the VM's exit: its VFIO files are taken back and KVM's device is closed, by this thread or by the
/// one whose call is still under way. Devices stay open.
#[derive(Debug)]
pub struct Vm(Holder<Files>);

/// A VM to open devices with. Does not keep it.
#[derive(Debug, Clone)]
pub struct Handle {
    references: Arc<References<Files>>,
    pins: bool,
}

/// One open device's part in a VM's knowledge of its file. Dropped before the file is closed, under no lock.
#[derive(Debug)]
pub struct Reference {
    /// Only dropped
    _reference: references::Reference<Files>,
}

impl Vm {
    /// Over a VM's fd, which stays the caller's. Makes the VM's KVM device of type VFIO. The VM must be of this process.
    pub fn new(vm: BorrowedFd<'_>) -> Result<Self, KvmError> {
        let device =
            kvm::create_vfio_device(vm).map_err(|errno| KvmError::Refused { what: no_device(errno), errno })?;
        Ok(Self::over(Box::new(KvmVfioDevice(device))))
    }

    /// Over the KVM device of type VFIO that the VMM has made itself. A duplicate will do.
    pub fn with_device(device: OwnedFd) -> Result<Self, KvmError> {
        kvm::is_vfio_device(device.as_fd()).map_err(|errno| KvmError::Refused {
            what: "the descriptor is no KVM device of type VFIO".to_owned(),
            errno,
        })?;
        Ok(Self::over(Box::new(KvmVfioDevice(device))))
    }

    /// Over any list of files.
    pub fn over(files: Box<dyn VfioFiles>) -> Self {
        Self(References::begin(files))
    }

    pub fn handle(&self) -> Handle {
        Handle { references: Arc::clone(self.0.references()), pins: false }
    }
}

fn no_device(errno: Errno) -> String {
    let why = match errno {
        Errno::BUSY => " (the VMM has made one itself: hand that over)",
        Errno::IO => " (the VM is another process's, or dead)",
        Errno::NOTTY => " (the descriptor is no VM)",
        Errno::NODEV => " (this kernel's KVM has no support for VFIO)",
        _ => "",
    };
    format!("KVM_CREATE_DEVICE of type VFIO{why}")
}

impl Handle {
    /// As this one, but a device that is opened with it keeps the VM until it is closed.
    pub fn pinning(&self) -> Self {
        Self { pins: true, ..self.clone() }
    }

    /// Whether both are of one VM.
    pub fn is_same_vm(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.references, &other.references)
    }

    /// Whether the VM has ended, and all its files have been taken back.
    pub fn has_ended(&self) -> bool {
        self.references.has_ended()
    }

    /// Makes a group or a device file known to the VM, or counts one more user if it is.
    pub fn take(&self, file: &Arc<OwnedFd>) -> Result<Reference, KvmError> {
        let taken = self.references.take(file, self.pins);
        let reference = taken.map_err(|refused| match refused {
            Refused::Gone => KvmError::Gone,
            Refused::Busy => KvmError::Busy,
            Refused::Kernel(errno) => KvmError::Refused { what: not_added(errno), errno },
        })?;
        Ok(Reference { _reference: reference })
    }
}

fn not_added(errno: Errno) -> String {
    let why = match errno {
        Errno::IO => " (the VM is another process's, or dead)",
        Errno::EXIST => " (the VMM has added it itself)",
        Errno::INVAL => " (no VFIO file, or a device file on a kernel before 6.6)",
        _ => "",
    };
    format!("KVM_DEV_VFIO_FILE_ADD{why}")
}
