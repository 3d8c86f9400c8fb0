//! A client's file, looked at before anything of it is used.
//!
//! **Owns** the decision which files are taken, and how they are touched. **Must never** trust a file for its size: only a seal
//! keeps a client from cutting it off, and then no plain copy may touch it. Nor may it take a file whose pages somebody in
//! another process has to bring (FUSE, a network): a copy would wait for him.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SealFlags};
use rustix::io::Errno;

use super::{MemoryError, PAGE_SIZE};
use crate::sys::{DmaMemory, Mapping};

/// `linux/magic.h`: file systems whose pages are the kernel's own.
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58F6;
const HUGETLBFS: i64 = 0x9584_58F6;
const LOCAL: [i64; 6] = [
    TMPFS,
    RAMFS,
    HUGETLBFS,
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
];

/// Which memory a file is: equal for every descriptor of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    offset: u64,
}

/// Memory of a file, mapped.
#[derive(Debug)]
pub(super) struct ClientFile {
    pub(super) identity: FileIdentity,
    pub(super) memory: DmaMemory,
    /// Where in `memory` the client's part begins; it is not 0 where the file is mapped in larger pages
    pub(super) inner: u64,
}

/// What is asked of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) write: bool,
}

impl ClientFile {
    /// Refused: what is no regular file of a local file system (directories, devices, pipes, sockets, a descriptor without
    /// access), an offset that is no multiple of a page, bytes beyond the end of the file, and a file that this descriptor
    /// or a seal keeps from being read or, where devices are to write, written.
    pub(super) fn open(fd: &OwnedFd, wanted: Wanted) -> Result<Self, MemoryError> {
        let refused = |why: &'static str, errno: Errno| MemoryError::File { why, errno };
        let unknown = |errno| refused("it cannot be asked what it is", errno);
        let flags = rustix::fs::fcntl_getfl(fd).map_err(unknown)?;
        if flags.contains(OFlags::PATH) {
            return Err(refused("it is open as a path only", Errno::INVAL));
        }
        // Before the size: what a seal found here has fixed, is fixed when the size is asked for.
        let seals = rustix::fs::fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
        let stat = rustix::fs::fstat(fd).map_err(unknown)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused("it is no regular file", Errno::INVAL));
        }
        let system = rustix::fs::fstatfs(fd).map_err(unknown)?.f_type as i64 & 0xFFFF_FFFF;
        if !LOCAL.contains(&system) {
            return Err(refused("its file system is none of tmpfs, hugetlbfs, ext4, xfs, btrfs", Errno::INVAL));
        }
        let access = flags & OFlags::ACCMODE;
        if access == OFlags::WRONLY {
            return Err(refused("it is open for writing only", Errno::ACCESS));
        }
        let unwritable = access == OFlags::RDONLY || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        if wanted.write && unwritable {
            return Err(refused("it cannot be written, and devices are to write it", Errno::ACCESS));
        }
        let size = stat.st_size.cast_unsigned();
        let end = wanted.offset.checked_add(wanted.length);
        let Some(end) = end.filter(|end| *end <= size && wanted.offset.is_multiple_of(PAGE_SIZE)) else {
            return Err(MemoryError::OutsideFile { offset: wanted.offset, length: wanted.length, size });
        };
        // hugetlbfs maps whole pages of its own size, which is the file's block size.
        let huge = if system == HUGETLBFS { stat.st_blksize.cast_unsigned() } else { PAGE_SIZE };
        if !huge.is_power_of_two() {
            return Err(refused("its pages have no size", Errno::INVAL));
        }
        let start = wanted.offset & !(huge - 1);
        let length = end.next_multiple_of(huge) - start;
        let mapping = match wanted.write {
            true => Mapping::new(fd, start, length)?,
            false => Mapping::read_only(fd, start, length)?,
        };
        // A huge page that is punched out may never come back: its file is not fixed by any seal.
        let fixed = seals.contains(SealFlags::SHRINK) && system != HUGETLBFS;
        let memory = match Arc::new(mapping) {
            mapping if fixed && wanted.write => DmaMemory::Mapped(mapping),
            mapping => DmaMemory::Guarded(mapping),
        };
        let identity = FileIdentity { device: stat.st_dev, inode: stat.st_ino, offset: wanted.offset };
        Ok(Self { identity, memory, inner: wanted.offset - start })
    }
}
