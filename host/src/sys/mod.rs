//! The system-call layer: file descriptors, mappings, eventfds, ioctls.
//!
//! **Owns** every `unsafe` block of the host outside the plug-in FFI. **Must never** know a device's meaning, keep a raw
//! fd without owning it, or make a Rust reference to memory that a guest or a device can write.
#![allow(unsafe_code)]

mod blocking;
mod dma_memory;
mod eventfd;
mod ioctl;
pub mod iommufd;
mod iospace;
pub mod kvm;
mod mapping;
mod membarrier;
mod memfd;
mod pagemap;
mod raw_fd;
mod revocable;
mod uffd;
pub mod vfio;

pub use dma_memory::{ClientAccess, DmaMemory};
pub use eventfd::{EventFd, is_eventfd, signal_shared};
pub use iospace::{IoMap, IoSpace};
pub use mapping::{Mapping, MappingError};
pub use membarrier::AsymmetricFence;
pub use memfd::{Seal, memfd, seal, write_at};
pub use pagemap::Pagemap;
#[cfg(all(test, not(loom)))]
pub(crate) use pagemap::read_into;
pub use raw_fd::duplicate;
pub use revocable::{Faults, Revocable, RevocableError};
pub use uffd::AsyncWriteProtect;
