//! A userfaultfd in asynchronous write-protect mode: the kernel itself clears the protection at the first write, and
//! nobody has to answer faults. Who was written is asked of [`super::Pagemap`].
//!
//! Source: `linux/userfaultfd.h`. The structures are written down here, since a machine's own headers may be older than
//! its kernel.

use std::io;
use std::os::fd::OwnedFd;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

use super::Mapping;

const UFFDIO: u8 = 0xAA;
const UFFD_API: u64 = 0xAA;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// Only faults that user code causes may be *handled*; in asynchronous mode none is, so that the kernel's own writes
/// are still tracked, and a user without privileges may open one.
const USER_MODE_ONLY: u32 = 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const API: Opcode = opcode::read_write::<Api>(UFFDIO, 0x3F);
const REGISTER: Opcode = opcode::read_write::<Register>(UFFDIO, 0x00);
const WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(UFFDIO, 0x06);

/// An open userfaultfd. When it is dropped the kernel forgets every protection that it set.
#[derive(Debug)]
pub struct AsyncWriteProtect {
    fd: OwnedFd,
}

impl AsyncWriteProtect {
    /// Opens one. EPERM or ENOSYS where the machine does not give it to this user, EINVAL where the kernel is too old.
    pub fn open() -> io::Result<Self> {
        let flags =
            UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: the call only makes a descriptor; what can upset other code is registering memory, see `protect`.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let features =
            FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the opcode's size is that of `Api`, which is plain integers that live during the call.
        unsafe { ioctl(&fd, Updater::<API, Api>::new(&mut api)) }?;
        Ok(Self { fd })
    }

    /// Puts a mapping of shared memory under this descriptor. EBUSY when it is already under another one.
    pub fn register(&self, mapping: &Mapping) -> io::Result<()> {
        let mut register = Register { range: range(mapping), mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: size as above. Registering in asynchronous mode never blocks an access to the range, so that code
        // which touches the mapping keeps working; the range is that of a live mapping.
        unsafe { ioctl(&self.fd, Updater::<REGISTER, Register>::new(&mut register)) }?;
        Ok(())
    }

    /// Write-protects every page of a registered mapping, populated or not: all of it is unwritten from now on.
    pub fn protect(&self, mapping: &Mapping) -> io::Result<()> {
        loop {
            let mut request = WriteProtect { range: range(mapping), mode: WRITEPROTECT_MODE_WP };
            // SAFETY: as in `register`.
            match unsafe { ioctl(&self.fd, Updater::<WRITEPROTECT, WriteProtect>::new(&mut request)) } {
                // The address space was changing (another thread forks or maps); the kernel asks for another try.
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }
}

fn range(mapping: &Mapping) -> Range {
    Range { start: mapping.address(), len: mapping.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_uapi() {
        assert_eq!([API, REGISTER, WRITEPROTECT], [0xC018_AA3F, 0xC020_AA00, 0xC018_AA06]);
    }
}
