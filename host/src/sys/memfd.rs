//! Anonymous shared memory files: guest RAM, device memory of models, private copies of a plug-in's file.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

/// What nobody, this process included, can do to the file any more. A seal is never taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seal {
    /// Nothing yet; [`seal`] may follow.
    Open,
    /// The size is fixed: a mapping of the whole file can never fault with SIGBUS.
    Size,
    /// Size and contents are fixed. The kernel refuses this (EBUSY) while a writable mapping exists.
    Contents,
}

/// Makes a file of `size` zero bytes, close-on-exec, that has no name in any directory. `name` is shown in
/// `/proc/*/maps` only.
pub fn memfd(name: &str, size: u64, seals: Seal) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size)?;
    seal(&fd, seals)?;
    Ok(fd)
}

/// Seals a file made by [`memfd`] with [`Seal::Open`].
pub fn seal(fd: impl AsFd, seals: Seal) -> io::Result<()> {
    let size = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    match seals {
        Seal::Open => Ok(()),
        Seal::Size => Ok(rustix::fs::fcntl_add_seals(fd, size)?),
        Seal::Contents => Ok(rustix::fs::fcntl_add_seals(fd, size | SealFlags::WRITE)?),
    }
}

/// Writes all of `data` at `offset`. Pages that the file has no memory for yet are allocated without being zeroed first,
/// without a page fault, and with an error where a store through a mapping would end in SIGBUS.
pub fn write_at(fd: impl AsFd, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::pwrite(&fd, data, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                data = data.get(count..).unwrap_or(&[]);
                offset += count as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sized_memory_can_be_written_and_never_resized() {
        let fd = memfd("test", 8192, Seal::Size).unwrap();
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size, 8192);
        for size in [0, 8191, 8193] {
            assert_eq!(rustix::fs::ftruncate(&fd, size), Err(rustix::io::Errno::PERM));
        }
        assert_eq!(rustix::io::pwrite(&fd, b"x", 8191), Ok(1));
    }

    #[test]
    fn sealed_contents_cannot_be_written() {
        let fd = memfd("test", 0, Seal::Open).unwrap();
        assert_eq!(rustix::io::pwrite(&fd, b"abc", 0), Ok(3));
        seal(&fd, Seal::Contents).unwrap();
        assert_eq!(rustix::io::pwrite(&fd, b"x", 0), Err(rustix::io::Errno::PERM));
    }
}
