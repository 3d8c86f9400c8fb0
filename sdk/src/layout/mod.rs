//! How the two sides of the boundary find out that they were compiled against the same ABI.
//!
//! **Owns** the layout of version 1 in three forms: abi_stable's ([`root_layout`], for Rust plug-ins), a list of names,
//! sizes and offsets ([`structs`], for the golden file and the C header), and a number over that list
//! ([`ABI_FINGERPRINT`], for C plug-ins). **Must never** run code of the library that it judges: a header is data.
//!
//! A Rust plug-in's [`Entry::rust_header`] points at [`RUST_HEADER`] of *its own* copy of this crate, and the host reads
//! it with [`read_header`]. What comes back is compared with the host's own [`root_layout`] in both directions
//! (`check_layout_compatibility_with_globals(a, b, &CheckingGlobals::new())`): nothing here is a prefix type, so one
//! direction should do, but the price is a millisecond at load. The error values point into the plug-in: format at once.
//!
//! The comparison descends through pointers and through parameters of function pointers, so [`AbiRoot`] reaches every
//! structure (a test says so). It also compares the version of the crate that defines a type; that is not the ABI's
//! version ([`ABI_MAJOR`](crate::abi::ABI_MAJOR) is), and the host leaves `AbiInstability::PackageVersion` out of the verdict.
#![allow(unsafe_code)]

mod fields;

use std::ffi::c_void;

use abi_stable::StableAbi;
use abi_stable::library::AbiHeader;
use abi_stable::type_layout::TypeLayout;

pub use fields::{ABI_FINGERPRINT, FieldLayout, StructLayout, structs};

use crate::abi::Entry;

/// The root of abi_stable's comparison: everything that crosses the boundary is reachable from the entry.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct AbiRoot {
    pub entry: *const Entry,
}

/// What [`Entry::rust_header`] points at.
#[repr(C)]
#[derive(Debug)]
pub struct RustHeader {
    /// Says which abi_stable wrote the rest; frozen by abi_stable
    pub abi_stable: AbiHeader,
    /// To be read only when `abi_stable` is valid here
    pub layout: &'static TypeLayout,
}

/// This copy's header. Each cdylib has its own.
pub static RUST_HEADER: RustHeader = RustHeader { abi_stable: AbiHeader::VALUE, layout: root_layout() };

/// [`RUST_HEADER`] as the entry holds it.
pub const fn rust_header() -> *const c_void {
    (&raw const RUST_HEADER).cast()
}

/// The layout of the ABI as this copy of the crate was compiled.
pub const fn root_layout() -> &'static TypeLayout {
    <AbiRoot as StableAbi>::LAYOUT
}

/// [`ABI_FINGERPRINT`], as a function for those who want to compute with it at run time.
pub const fn fingerprint() -> u64 {
    ABI_FINGERPRINT
}

/// Why a header says nothing about a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("the plug-in's header is null")]
    Null,
    #[error("the plug-in's header is not aligned")]
    Misaligned,
    /// Compiled with another abi_stable, or no abi_stable header at all.
    #[error("the plug-in was compiled with another abi_stable (its layout version is {major}.{minor})")]
    OtherAbiStable { major: u32, minor: u32 },
}

/// Reads the layout out of a plug-in's header. Runs nothing of the plug-in.
///
/// # Safety
/// `header` is null, or points at memory that is readable for `size_of::<RustHeader>()` bytes and stays so for ever (the
/// library is never unloaded); if its first bytes are a valid [`AbiHeader`], the rest was written by this module's
/// [`RUST_HEADER`] as compiled into that library.
pub unsafe fn read_header(header: *const c_void) -> Result<&'static TypeLayout, HeaderError> {
    let header = header.cast::<RustHeader>();
    if header.is_null() {
        return Err(HeaderError::Null);
    }
    if !header.is_aligned() {
        return Err(HeaderError::Misaligned);
    }
    // SAFETY: readable, by the caller; `AbiHeader` is integers only, so any bytes are one.
    let abi_stable = unsafe { (&raw const (*header).abi_stable).read() };
    if !abi_stable.is_valid() {
        return Err(HeaderError::OtherAbiStable { major: abi_stable.abi_major, minor: abi_stable.abi_minor });
    }
    // SAFETY: written by `RUST_HEADER` of the same abi_stable, by the caller; a static's reference lives as long as the
    // library, which is for ever.
    Ok(unsafe { (*header).layout })
}

#[cfg(test)]
mod tests;
