//! The stable ABI between a host and a plug-in: plain `repr(C)`, the same for Rust and for C.
//!
//! **Owns** every structure, constant and function type that crosses the boundary, and nothing else. Version 1 of each
//! structure is frozen; growth comes through extensions asked for by a versioned id.
//! **Must never** hold a Rust-only type (`String`, `Vec`, trait objects, `Result`), nor an enum whose unknown values
//! would be undefined behaviour: numbers cross as integers and are parsed on the other side.
//!
//! Rules that hold for every function, unless its own contract says otherwise:
//! * *Status*: 0 is success, a negative number is `-errno`. Nothing else is an error, nothing else succeeds.
//! * *Ownership*: each side frees what it allocated. Pointers passed to a function live until it returns; pointers that
//!   a plug-in publishes in a table ([`Plugin`], [`DeviceOps`] and what they point to) live until `close` returns
//!   (device) or for ever (plug-in: the library is never unloaded).
//! * *Threads*: hooks may run concurrently with each other on any thread. `probe`, `open` and `close` of one device never
//!   overlap each other, nor any hook of that device. Functions of [`MigrationOps`] and [`DirtyOps`] of one device are
//!   called one at a time, and may overlap its hooks.
//! * *Re-entrancy*: a function may call any host service with the [`CallContext`] that it was given, and only on the
//!   thread that it was given to and before it returns. Services do not call hooks of the same device back.
//! * *Sizes first*: a structure that begins with `struct_size` is read up to the smaller of the two sizes; what is
//!   absent is null, and a null function means the default that its text names.

mod device;
mod entry;
mod hooks;
mod migration;
mod services;

pub use device::*;
pub use entry::*;
pub use hooks::*;
pub use migration::*;
pub use services::*;

use abi_stable::StableAbi;

/// Borrowed bytes: UTF-8 text without a terminating zero, or data. `ptr` may be null when `len` is 0.
#[repr(C)]
#[derive(Debug, Clone, Copy, StableAbi)]
pub struct Bytes {
    pub ptr: *const u8,
    pub len: usize,
}

impl Bytes {
    /// Borrows `text` without taking its lifetime along: whoever reads it relies on the rules above.
    pub const fn borrowed(text: &[u8]) -> Self {
        Self { ptr: text.as_ptr(), len: text.len() }
    }

    pub const EMPTY: Self = Self { ptr: std::ptr::null(), len: 0 };
}

/// A plug-in's own pointer, handed back to it untouched.
pub type Opaque = *mut std::ffi::c_void;
