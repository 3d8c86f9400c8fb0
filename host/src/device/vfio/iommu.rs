//! The I/O address space of one VM's devices: a container for devices opened by group, an iommufd for those by cdev.
//!
//! **Owns** the container or iommufd, and the group fds. **Must never** leave a group open that no device needs.
//! Locks: `groups`, taken only to open and to close a device. It is held across joining, choosing the IOMMU and leaving on
//! purpose: they are one step each for the other devices of the VM. KVM's references are taken and put outside it: the last
//! one ends a VM, which may close devices.
//!
//! ```text
//!   by group:  open the node, join (counted) --+                                   +-- GET_DEVICE_FD
//!                                              +-- KVM learns of the file -- then -+
//!   by cdev:   open the node ------------------+                                   +-- BIND_IOMMUFD, ATTACH
//! ```
//! Closing goes back the same way; KVM keeps a file open until it has been taken back, so that comes first.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::{self, Errno};
use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_VIABLE, vfio_iommu_type1_info};

use super::caps;
use super::kernel::{Kernel, Real};
use crate::device::{Backend, IovaRange};
use crate::kvm;
use crate::sys::{IoMap, IoSpace, iommufd};

/// What an operator may have to do before the failure goes away; `errno` is the kernel's.
#[derive(Debug)]
pub(super) struct IommuError {
    pub what: String,
    pub errno: Errno,
}

fn because<T>(result: io::Result<T>, what: impl FnOnce() -> String) -> Result<T, IommuError> {
    result.map_err(|errno| IommuError { what: what(), errno })
}

/// Shared by the devices of one VM (`Options::iommu`): each DMA map reaches the kernel once.
#[derive(Debug)]
pub struct Iommu {
    space: IoSpace,
    kernel: Box<dyn Kernel>,
    groups: Mutex<BTreeMap<u32, Group>>,
    next_user: AtomicU64,
}

/// Closed with its last device. The kernel takes a group out of the container when its fd is closed.
#[derive(Debug)]
struct Group {
    fd: Arc<OwnedFd>,
    devices: u32,
    /// That knows it; one VM at a time
    vm: Option<kvm::Handle>,
    /// Devices that were opened for it
    of_vm: u32,
}

/// Another device of the group is this VM's, or nobody's.
fn is_of(group: &Group, vm: Option<&kvm::Handle>) -> bool {
    match (&group.vm, vm) {
        (Some(theirs), Some(ours)) => theirs.is_same_vm(ours) || theirs.has_ended(),
        _ => true,
    }
}

/// A device's place in the address space. Dropped after the device's fd: KVM lets the file go, the maps leave, then the group.
#[derive(Debug)]
pub(super) struct Membership {
    kvm: Option<kvm::Reference>,
    /// That the device was opened for
    vm: Option<kvm::Handle>,
    iommu: Arc<Iommu>,
    user: u64,
    group: Option<u32>,
    /// The device's id in the iommufd
    device_id: Option<u32>,
}

/// The one way in, by group and by cdev: KVM learns of the file, then `open` makes a device of it. What fails leaves KVM without it.
fn introduced<T>(
    vm: Option<&kvm::Handle>,
    file: &Arc<OwnedFd>,
    open: impl FnOnce() -> Result<T, IommuError>,
) -> Result<(T, Option<kvm::Reference>), IommuError> {
    let reference = vm.map(|vm| vm.take(file)).transpose().map_err(|error| match error {
        kvm::KvmError::Refused { what, errno } => IommuError { what, errno },
        other => IommuError { what: other.to_string(), errno: other.errno() },
    })?;
    Ok((open()?, reference))
}

impl Iommu {
    /// A container (`/dev/vfio/vfio`), for devices opened by group.
    pub fn container() -> io::Result<Arc<Self>> {
        Ok(Self::new(IoSpace::container(Real.open_node(Path::new("/dev/vfio/vfio"))?)?, Box::new(Real)))
    }

    /// An iommufd (`/dev/iommu`) with one IOAS, for devices opened by cdev.
    pub fn iommufd() -> io::Result<Arc<Self>> {
        Ok(Self::new(IoSpace::ioas(Real.open_node(Path::new("/dev/iommu"))?)?, Box::new(Real)))
    }

    pub(super) fn new(space: IoSpace, kernel: Box<dyn Kernel>) -> Arc<Self> {
        Arc::new(Self { space, kernel, groups: Mutex::default(), next_user: AtomicU64::new(0) })
    }

    /// Which devices may share it.
    pub fn backend(&self) -> Backend {
        if self.space.ioas_id().is_some() { Backend::VfioCdev } else { Backend::VfioGroup }
    }

    fn groups(&self) -> MutexGuard<'_, BTreeMap<u32, Group>> {
        // Nothing panics while it is held.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn member(self: &Arc<Self>, group: Option<u32>, device_id: Option<u32>, vm: Option<&kvm::Handle>) -> Membership {
        Membership {
            kvm: None,
            vm: vm.cloned(),
            iommu: self.clone(),
            user: self.next_user.fetch_add(1, Ordering::Relaxed),
            group,
            device_id,
        }
    }

    /// Opens the group's node, joins it to the container, and opens the device `name` (as GET_DEVICE_FD takes it).
    pub(super) fn open_by_group(
        self: &Arc<Self>,
        number: u32,
        node: &Path,
        name: &CStr,
        vm: Option<&kvm::Handle>,
        unviable: impl FnOnce() -> String,
    ) -> Result<(Arc<OwnedFd>, Membership), IommuError> {
        // Dropped in the reverse order: the group is left last, and closed with its last device.
        let mut membership;
        let group;
        (group, membership) = self.enter_group(number, node, vm, unviable)?;
        let (device, reference) = introduced(vm, &group, || {
            because(self.kernel.group_device_fd(group.as_fd(), name), || {
                format!("group {number} does not hand the device out")
            })
        })?;
        membership.kvm = reference;
        Ok((Arc::new(device), membership))
    }

    /// The group, opened and joined by its first device; the membership counts.
    fn enter_group(
        self: &Arc<Self>,
        number: u32,
        node: &Path,
        vm: Option<&kvm::Handle>,
        unviable: impl FnOnce() -> String,
    ) -> Result<(Arc<OwnedFd>, Membership), IommuError> {
        let mut groups = self.groups();
        if groups.get(&number).is_some_and(|group| !is_of(group, vm)) {
            let what = format!("group {number} has a device that was opened for another VM");
            return Err(IommuError { what, errno: Errno::INVAL });
        }
        let group = match groups.remove(&number) {
            Some(group) => group,
            None => Group { fd: Arc::new(self.join(number, node, unviable)?), devices: 0, vm: None, of_vm: 0 },
        };
        let fd = Arc::clone(&group.fd);
        let (vm_now, of_vm) = match (vm, group.vm) {
            (Some(ours), Some(theirs)) if theirs.is_same_vm(ours) => (Some(theirs), group.of_vm + 1),
            (Some(ours), _) => (Some(ours.clone()), 1),
            (None, theirs) => (theirs, group.of_vm),
        };
        groups.insert(number, Group { fd: group.fd, devices: group.devices + 1, vm: vm_now, of_vm });
        drop(groups);
        Ok((fd, self.member(Some(number), None, vm)))
    }

    fn join(&self, number: u32, node: &Path, unviable: impl FnOnce() -> String) -> Result<OwnedFd, IommuError> {
        let group = because(self.kernel.open_node(node), || match node.exists() {
            true => format!("opening {} (in use by another process, or no permission)", node.display()),
            false => format!("no {}: is the device bound to a VFIO driver?", node.display()),
        })?;
        let flags =
            because(self.kernel.group_status(group.as_fd()), || format!("asking group {number} for its status"))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(IommuError {
                what: format!("group {number} is not viable: {}", unviable()),
                errno: Errno::PERM,
            });
        }
        because(self.kernel.group_set_container(group.as_fd(), &self.space), || {
            format!("joining group {number} to the container")
        })?;
        // The first group chooses; a container whose groups have all left has to choose again.
        because(self.kernel.choose_type1v2(&self.space), || "choosing the type1v2 IOMMU".to_owned())?;
        Ok(group)
    }

    /// Opens the device's node, binds it to the iommufd and attaches it to the address space.
    pub(super) fn open_by_cdev(
        self: &Arc<Self>,
        node: &Path,
        token: Option<&[u8; 16]>,
        vm: Option<&kvm::Handle>,
    ) -> Result<(Arc<OwnedFd>, Membership), IommuError> {
        let device = Arc::new(because(self.kernel.open_node(node), || format!("opening {}", node.display()))?);
        let (device_id, reference) = introduced(vm, &device, || {
            let device_id = because(self.kernel.bind_iommufd(device.as_fd(), &self.space, token), || {
                "binding to the iommufd (EBUSY: it is open by group, or by another process)".to_owned()
            })?;
            because(self.kernel.attach(device.as_fd(), &self.space), || "attaching to the address space".to_owned())?;
            Ok(device_id)
        })?;
        let mut membership = self.member(None, Some(device_id), None);
        membership.kvm = reference;
        Ok((device, membership))
    }

    fn leave_group(&self, number: u32, vm: Option<&kvm::Handle>) {
        let mut groups = self.groups();
        let mut unknown = None;
        if let Some(group) = groups.get_mut(&number) {
            group.devices -= 1;
            if vm.zip(group.vm.as_ref()).is_some_and(|(ours, theirs)| theirs.is_same_vm(ours)) {
                group.of_vm -= 1;
                if group.of_vm == 0 {
                    unknown = group.vm.take();
                }
            }
            if group.devices == 0 {
                groups.remove(&number);
            }
        }
        drop(groups);
        drop(unknown);
    }
}

impl Membership {
    pub fn map(&self, map: &IoMap) -> io::Result<()> {
        self.iommu.space.map(self.user, map)
    }

    pub fn unmap(&self, iova: u64, length: u64) -> io::Result<()> {
        self.iommu.space.unmap(self.user, iova, length)
    }

    pub fn iommu(&self) -> &Arc<Iommu> {
        &self.iommu
    }

    /// What may be mapped, given the devices in the space now. A container names nothing while all its devices have an
    /// emulated IOMMU (mdev): then everything may.
    pub fn iova_ranges(&self) -> io::Result<Vec<IovaRange>> {
        let space = &self.iommu.space;
        if let Some(ioas_id) = space.ioas_id() {
            let ranges = iommufd::ioas_iova_ranges(space.fd(), ioas_id)?;
            return Ok(ranges.iter().map(|range| IovaRange { iova: range.start, last: range.last }).collect());
        }
        let (info, answer) = space.type1_info()?;
        let ranges = caps::iova_ranges(&answer, size_of::<vfio_iommu_type1_info>(), info.cap_offset);
        Ok(match ranges.map_err(|_| Errno::PROTO)? {
            Some(ranges) => ranges.into_iter().map(|(iova, last)| IovaRange { iova, last }).collect(),
            None => vec![IovaRange { iova: 0, last: u64::MAX }],
        })
    }

    /// Whether the IOMMU in front of the device can track dirty pages: `Ok(false)` where the kernel says it cannot.
    /// Only an iommufd can be asked; a container tracks no dirt in hardware.
    pub fn iommu_tracks_dirt(&self) -> io::Result<bool> {
        let space = &self.iommu.space;
        let (Some(device), Some(ioas)) = (self.device_id, space.ioas_id()) else { return Ok(false) };
        match iommufd::hw_capabilities(space.fd(), device) {
            Ok(capabilities) if capabilities & iommufd::HW_CAP_DIRTY_TRACKING == 0 => return Ok(false),
            // An emulated IOMMU has no hardware to ask.
            Err(Errno::NOENT | Errno::INVAL | Errno::OPNOTSUPP) => return Ok(false),
            other => other?,
        };
        iommufd::probe_dirty_tracking(space.fd(), device, ioas).map(|()| true)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        // First: KVM keeps the file open as well. And with no lock held: the VM may end by it.
        drop(self.kvm.take());
        if let Err(errno) = self.iommu.space.forget(self.user) {
            tracing::error!(%errno, "unmapping a closed device's memory; it stays referenced until the VM's I/O space is closed");
        }
        if let Some(group) = self.group {
            self.iommu.leave_group(group, self.vm.as_ref());
        }
    }
}

#[cfg(all(test, not(loom)))]
#[path = "open_tests.rs"]
mod tests;
