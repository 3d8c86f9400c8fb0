//! The calls of `linux/kvm.h` that the host uses: a VM's device of type VFIO, and what a test needs to have a VM at all. Its
//! structures are written out here: a bindings crate for six calls would be the larger thing to read.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io;
use rustix::ioctl::{Opcode, opcode};

use super::ioctl::with_opcode;

/// `KVMIO`.
const KVMIO: u8 = 0xae;
const CREATE_VM: Opcode = opcode::none(KVMIO, 0x01);
const CREATE_DEVICE: Opcode = opcode::read_write::<CreateDevice>(KVMIO, 0xe0);
const SET_DEVICE_ATTR: Opcode = opcode::write::<DeviceAttr>(KVMIO, 0xe1);
const HAS_DEVICE_ATTR: Opcode = opcode::write::<DeviceAttr>(KVMIO, 0xe3);

/// `KVM_DEV_TYPE_VFIO`.
const DEV_TYPE_VFIO: u32 = 4;
/// `KVM_DEV_VFIO_FILE`, the group of attributes that was `KVM_DEV_VFIO_GROUP` before Linux 6.6.
const DEV_VFIO_FILE: u32 = 1;
/// `KVM_DEV_VFIO_FILE_ADD`, `KVM_DEV_VFIO_GROUP_ADD` before.
const DEV_VFIO_FILE_ADD: u64 = 1;
/// `KVM_DEV_VFIO_FILE_DEL`, `KVM_DEV_VFIO_GROUP_DEL` before.
const DEV_VFIO_FILE_DEL: u64 = 2;

/// `struct kvm_create_device`.
#[repr(C)]
struct CreateDevice {
    type_: u32,
    /// Out
    fd: u32,
    flags: u32,
}

/// `struct kvm_device_attr`.
#[repr(C)]
struct DeviceAttr {
    flags: u32,
    group: u32,
    attr: u64,
    /// Of the attribute's value in this process
    addr: u64,
}

/// A VM of the default type, from an open `/dev/kvm`. It is this process's: calls on it from another one are EIO.
pub fn create_vm(kvm: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the handler takes a number, the machine's type.
    let raw = unsafe { with_opcode(kvm, CREATE_VM, std::ptr::null_mut()) }?;
    // SAFETY: the call succeeded, so this is a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The VM's device of type VFIO, of which it has one at most (EBUSY). It keeps the VM alive while it is open.
pub fn create_vfio_device(vm: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut call = CreateDevice { type_: DEV_TYPE_VFIO, fd: u32::MAX, flags: 0 };
    // SAFETY: the handler reads and writes a kvm_create_device.
    unsafe { with_opcode(vm, CREATE_DEVICE, (&raw mut call).cast()) }?;
    // SAFETY: the call succeeded, so this is a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(call.fd.cast_signed()) })
}

/// Whether `device` is a VM's device of type VFIO.
pub fn is_vfio_device(device: BorrowedFd<'_>) -> io::Result<()> {
    let mut call = DeviceAttr { flags: 0, group: DEV_VFIO_FILE, attr: DEV_VFIO_FILE_ADD, addr: 0 };
    // SAFETY: the handler reads a kvm_device_attr, and with HAS no value.
    unsafe { with_opcode(device, HAS_DEVICE_ATTR, (&raw mut call).cast()) }.map(drop)
}

/// Tells the VM of a VFIO group or device file. EEXIST when it has it. KVM keeps the file open until it is deleted.
pub fn vfio_file_add(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    vfio_file(device, DEV_VFIO_FILE_ADD, file)
}

/// ENOENT when the VM does not have the file. Any descriptor of the same open file will do.
pub fn vfio_file_delete(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    vfio_file(device, DEV_VFIO_FILE_DEL, file)
}

fn vfio_file(device: BorrowedFd<'_>, attr: u64, file: BorrowedFd<'_>) -> io::Result<()> {
    let fd: i32 = file.as_raw_fd();
    let mut call = DeviceAttr { flags: 0, group: DEV_VFIO_FILE, attr, addr: (&raw const fd) as u64 };
    // SAFETY: the handler reads a kvm_device_attr and the i32 that it points to, which lives until the call has returned.
    unsafe { with_opcode(device, SET_DEVICE_ATTR, (&raw mut call).cast()) }.map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::io::Errno;

    use super::*;

    /// The sizes are part of each opcode; taken from `linux/kvm.h`.
    #[test]
    fn structures_have_the_uapi_s_sizes() {
        assert_eq!(size_of::<CreateDevice>(), 12);
        assert_eq!(size_of::<DeviceAttr>(), 24);
    }

    #[test]
    fn opcodes_are_the_uapi_s() {
        assert_eq!(CREATE_VM, 0xae01);
        assert_eq!(CREATE_DEVICE, 0xc00c_aee0);
        assert_eq!(SET_DEVICE_ATTR, 0x4018_aee1);
        assert_eq!(HAS_DEVICE_ATTR, 0x4018_aee3);
    }

    #[test]
    fn what_is_no_kvm_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(create_vm(file.as_fd()).unwrap_err(), Errno::NOTTY);
        assert_eq!(create_vfio_device(file.as_fd()).unwrap_err(), Errno::NOTTY);
        assert_eq!(is_vfio_device(file.as_fd()).unwrap_err(), Errno::NOTTY);
        assert_eq!(vfio_file_add(file.as_fd(), file.as_fd()).unwrap_err(), Errno::NOTTY);
    }
}
