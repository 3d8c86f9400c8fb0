//! Write live-migration mediation plug-ins for passthrough VFIO devices.
//!
//! A plug-in implements [`Plugin`] and [`Device`], and, as its device needs, [`Migration`], [`DirtyTracking`] and [`Events`];
//! [`export_plugin!`] makes a library of it. `examples/first-plugin` is the shortest one, `plugins/edu` a whole one.
//!
//! [`abi`] is what crosses the boundary; everything else is the safe side of it, compiled into the plug-in.
#![allow(non_local_definitions)] // abi_stable's derive

pub mod abi;
mod access;
mod context;
mod device;
mod errno;
pub mod export;
mod hooks;
pub mod layout;
mod log;
pub mod record;
mod scratch;
mod shadow;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use abi::{DeviceMatch, IovaRange, IrqInfo, RegionInfo};
pub use access::{Access, Verdict};
pub use context::{Context, Origin};
pub use device::{
    ArcFailed, Device, DirtyBitmap, DirtyTracking, Event, Events, Exactness, Identity, Migration, Plugin, Probe,
    Refusal, Remaining, Saved,
};
pub use errno::{Errno, Result};
pub use hooks::{
    Claim, ExtraRegion, IrqAction, IrqClaim, IrqData, IrqRequest, Layout, Maps, MmapFile, MmapRange, Vector,
};
pub use scratch::{Scratch, ScratchGuard};
pub use shadow::Shadow;
