//! The two ways into a device: its IOMMU group, and its character device.
//!
//! **Must never** leave half a device open: what was opened is closed on every failure. Errors say what to do.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::iommu::{Iommu, IommuError, Membership};
use super::sysfs::{Severity, Sysfs, foreign_text};
use super::token::VfToken;
use crate::device::{Backend, DeviceError, Result};
use crate::kvm;

/// How to open.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The VM's address space, shared by its devices; its own if `None`. Of the same kind as the opener.
    pub iommu: Option<Arc<Iommu>>,
    /// For a VF whose PF is on vfio-pci as well
    pub vf_token: Option<VfToken>,
    /// The VM that is to know the device's file, from before it is opened or bound until it is closed
    pub kvm: Option<kvm::Handle>,
}

fn refused(name: &str, what: impl std::fmt::Display, errno: Errno) -> DeviceError {
    DeviceError::refused(name, format!("open: {what}"), errno)
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::INVAL, Errno::from_raw_os_error)
}

/// The shared address space, or a new one of the right kind.
fn iommu(name: &str, options: &Options, backend: Backend) -> Result<Arc<Iommu>> {
    let (node, module, new): (_, _, fn() -> _) = match backend {
        Backend::VfioGroup => ("/dev/vfio/vfio", "vfio_iommu_type1", Iommu::container),
        Backend::VfioCdev => ("/dev/iommu", "iommufd", Iommu::iommufd),
        Backend::Sim => return Err(refused(name, "a simulated device is not opened through VFIO", Errno::INVAL)),
    };
    match &options.iommu {
        Some(iommu) if iommu.backend() == backend => Ok(iommu.clone()),
        Some(_) => Err(refused(name, "the VM's other devices are opened the other way (group or cdev)", Errno::INVAL)),
        None => new().map_err(|errno| refused(name, format!("{node} (is the module {module} loaded?)"), errno)),
    }
}

/// What sysfs finds against the device, in one line; `fallback` when it finds nothing.
fn blockers(sysfs: &Sysfs, name: &str, fallback: String) -> String {
    let findings = sysfs.viability(name);
    let blockers: Vec<String> = findings
        .into_iter()
        .filter(|finding| finding.severity == Severity::Blocker)
        .map(|finding| finding.text)
        .collect();
    if blockers.is_empty() { fallback } else { blockers.join("; ") }
}

pub(super) fn by_group(name: &str, options: &Options) -> Result<(Arc<OwnedFd>, Membership)> {
    let sysfs = Sysfs::default();
    let group = sysfs.group(name).map_err(|error| refused(name, &error, errno_of(&error)))?;
    let Some(group) = group else {
        return Err(refused(name, blockers(&sysfs, name, "no IOMMU group".to_owned()), Errno::NODEV));
    };
    let full_name = match &options.vf_token {
        Some(token) => format!("{name} vf_token={token}"),
        None => name.to_owned(),
    };
    let c_name = CString::new(full_name).map_err(|_| refused(name, "the name has a zero byte", Errno::INVAL))?;
    let unviable = || {
        let members = sysfs.foreign_members(name, group).unwrap_or_default();
        let texts: Vec<String> = members.iter().map(|member| foreign_text(group, member)).collect();
        if texts.is_empty() {
            "a member is bound to a driver that does DMA of its own".to_owned()
        } else {
            texts.join("; ")
        }
    };
    let iommu = iommu(name, options, Backend::VfioGroup)?;
    iommu
        .open_by_group(group, &sysfs.group_node(group), &c_name, options.kvm.as_ref(), unviable)
        .map_err(|error| explain(&sysfs, name, options, error))
}

pub(super) fn by_cdev(name: &str, options: &Options) -> Result<(Arc<OwnedFd>, Membership)> {
    let sysfs = Sysfs::default();
    let node = sysfs.cdev_node(name).map_err(|error| refused(name, &error, errno_of(&error)))?;
    let Some(node) = node else {
        let fallback = "no vfio-dev entry in sysfs: this kernel has no VFIO character devices".to_owned();
        return Err(refused(name, blockers(&sysfs, name, fallback), Errno::NODEV));
    };
    let iommu = iommu(name, options, Backend::VfioCdev)?;
    let token = options.vf_token.as_ref().map(VfToken::as_bytes);
    iommu.open_by_cdev(&node, token, options.kvm.as_ref()).map_err(|error| explain(&sysfs, name, options, error))
}

/// Adds to the kernel's errno what it usually means here.
fn explain(sysfs: &Sysfs, name: &str, options: &Options, error: IommuError) -> DeviceError {
    let IommuError { what, errno } = error;
    let found = blockers(sysfs, name, String::new());
    let why = match errno {
        _ if !found.is_empty() && !what.contains("not viable") => format!(" ({found})"),
        Errno::ACCESS if options.vf_token.is_none() => " (its PF is on vfio-pci: a VF token is needed)".to_owned(),
        Errno::ACCESS => " (the VF token is not the PF's)".to_owned(),
        Errno::INVAL | Errno::TOOBIG | Errno::OPNOTSUPP if options.vf_token.is_some() => {
            " (a VF token is given and the device takes none, or this kernel takes none this way)".to_owned()
        }
        _ => String::new(),
    };
    refused(name, format!("{what}{why}"), errno)
}
