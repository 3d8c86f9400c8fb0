//! Plug-ins: loading, matching, references, and calls into them.
//!
//! **Owns** the dynamic libraries, the copies of their tables, and the counts that decide when a plug-in may retire.
//! **Must never** run code of a plug-in under one of its locks, after its last reference has gone, or before its entry
//! was checked; and never believes a number that a plug-in returned without looking at it.
//!
//! ```text
//!  file -> elf::check -> sealed copy -> dlopen -> entry and layout checked = Library
//!  Library -> Registry::register (init) -> PUBLISHED -> unregister -> DRAINING -> last device closed -> RETIRED
//! ```
//! Locks: the roster's (a leaf; never held across a call into a plug-in).

mod calls;
mod elf;
mod error;
mod ffi;
mod registry;
mod roster;
mod tables;

pub use calls::{
    ArcFailed, CallFrame, HostCalls, IrqRequest, IrqRequestData, MmapAnswer, Origin, PluginDirty, PluginMigration,
    ProbeIdentity, Refusal, Request, Saved, ScratchMemory, TrapMap, Verdict,
};
pub use error::{LoadError, OpenError, RegisterError, UnregisterError};
pub use ffi::{Library, OpenDevice};
pub use registry::{Limits, PluginId, PluginInfo, PluginState, Registry};
pub use tables::{Claim, DeviceMatch, Exactness, ExtraIrq, ExtraRegion, IrqClaim};
