//! Guest memory: RAM, the map from I/O virtual addresses to it, and which of its pages are dirty.
//!
//! **Owns** [`GuestRam`] (sealed shared memory, guest-physical 0 at offset 0) or the blocks that clients bring, the IOVA map of
//! one VM, the [`DirtyLog`] over their pages, what reports have [`Taken`] out of it, and the CPU's own dirt ([`CpuDirt`]).
//! **Must never** make a Rust reference to guest memory, lose a dirty page (unknown is dirty; a drain that is not
//! committed comes back), or ignore a mark that it cannot place: it is an error, after what could be placed is marked.
//! Locks: the IOVA map's, held to look addresses up and never while guest memory is touched. An access that has been
//! looked up may therefore still be copying when `unmap` returns: RAM outlives every map, so that it is harmless to
//! this process, and who must not see such a late write (mediation) keeps accesses out while it unmaps. A client's memory is not
//! harmless: there the last to leave a map waits for the copies in flight.
//! Addresses: *iova* is a device's view; *RAM offset* and *page* count from the start of RAM, or say where in the
//! log a client's map has its place. Rules: `spec/memory.md`.

mod atomic;
mod client_file;
mod clients;
mod cpu_dirt;
mod dirty_log;
mod drain;
mod error;
mod extents;
mod ram;
mod space;
mod taken;

pub use clients::{ClientMap, ClientSource, Joined};
pub use cpu_dirt::{CpuDirt, CpuDirtError};
pub use dirty_log::DirtyLog;
pub use drain::{Drain, PageRun};
pub use error::MemoryError;
pub use ram::{GuestRam, RAM_SIZE_MAX};
pub use space::{AddressSpace, IovaMapping, MAPS_MAX};
pub use taken::{Report, Taken};

pub use crate::sys::ClientAccess;

/// Bytes per page of the dirty log and granule of the IOVA map.
pub const PAGE_SIZE: u64 = 4096;
