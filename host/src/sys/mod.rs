//! The system-call layer: file descriptors, mappings, eventfds, ioctls.
//!
//! **Owns** every `unsafe` block of the host outside the plug-in FFI. **Must never** know a device's meaning, keep a raw
//! fd without owning it, or make a Rust reference to memory that a guest or a device can write.
#![allow(unsafe_code)]

mod mapping;
mod memfd;
mod pagemap;
mod uffd;

pub use mapping::{Mapping, MappingError};
pub use memfd::{Seal, memfd, seal};
pub use pagemap::Pagemap;
#[cfg(all(test, not(loom)))]
pub(crate) use pagemap::read_into;
pub use uffd::AsyncWriteProtect;
