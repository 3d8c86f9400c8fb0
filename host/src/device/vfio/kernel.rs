//! The kernel's calls by which a device is opened, behind the one seam through which each of them can be made to fail.
//!
//! **Must never** decide anything: their order, and what is undone, is [`super::iommu`]'s. No locks.

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{self, Errno};

use crate::sys::{IoSpace, vfio};

/// Each method is one step of opening.
pub(super) trait Kernel: std::fmt::Debug + Send + Sync {
    fn open_node(&self, path: &Path) -> io::Result<OwnedFd>;
    /// `VFIO_GROUP_FLAGS_*`
    fn group_status(&self, group: BorrowedFd<'_>) -> io::Result<u32>;
    fn group_set_container(&self, group: BorrowedFd<'_>, space: &IoSpace) -> io::Result<()>;
    /// Where none is chosen yet
    fn choose_type1v2(&self, space: &IoSpace) -> io::Result<()>;
    fn group_device_fd(&self, group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd>;
    /// The device's id in the iommufd. EINVAL for a container, which takes no cdev.
    fn bind_iommufd(&self, device: BorrowedFd<'_>, space: &IoSpace, token: Option<&[u8; 16]>) -> io::Result<u32>;
    fn attach(&self, device: BorrowedFd<'_>, space: &IoSpace) -> io::Result<()>;
}

/// Linux.
#[derive(Debug, Clone, Copy)]
pub(super) struct Real;

impl Kernel for Real {
    fn open_node(&self, path: &Path) -> io::Result<OwnedFd> {
        open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    }

    fn group_status(&self, group: BorrowedFd<'_>) -> io::Result<u32> {
        vfio::group_status(group)
    }

    fn group_set_container(&self, group: BorrowedFd<'_>, space: &IoSpace) -> io::Result<()> {
        vfio::group_set_container(group, space.fd())
    }

    fn choose_type1v2(&self, space: &IoSpace) -> io::Result<()> {
        if space.type1_info().is_ok() { Ok(()) } else { space.set_type1v2() }
    }

    fn group_device_fd(&self, group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
        vfio::group_device_fd(group, name)
    }

    fn bind_iommufd(&self, device: BorrowedFd<'_>, space: &IoSpace, token: Option<&[u8; 16]>) -> io::Result<u32> {
        space.ioas_id().ok_or(Errno::INVAL)?;
        vfio::bind_iommufd(device, space.fd(), token)
    }

    fn attach(&self, device: BorrowedFd<'_>, space: &IoSpace) -> io::Result<()> {
        let ioas_id = space.ioas_id().ok_or(Errno::INVAL)?;
        vfio::attach_iommufd_pt(device, ioas_id).map(drop)
    }
}
