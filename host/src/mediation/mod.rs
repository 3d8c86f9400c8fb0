//! Mediation: a passthrough device, the plug-in that claimed it, and its VM's memory, as one device.
//!
//! **Owns** [`MediatedDevice`], the only thing that the layers above see: who may reach the device ([`gate`]), which accesses
//! go to hooks, what may be mapped, what a client may change in configuration space, the walk through the migration
//! states, and the union of the dirt that device and plug-in report. **Must never** call a plug-in or a device under a
//! lock, let an access in that the gate refuses, or call a page clean on doubt.
//!
//! ```text
//!   front-end, migration                 timers, irqs
//!          |                                  |
//!          v                                  v
//!   MediatedDevice -- gate: a pass ---> hook table ---> plug-in --- HostCalls ---+
//!          |                                  |  FORWARD, unhooked               |
//!          +--- gate: alone (arcs, reset, ----+--------> Device <----------------+
//!               COMMAND, table switch)
//! ```
//!
//! What a hook must not do itself (reset, fail, switch tables) it asks for; the request is queued and done by the first
//! thread that leaves the gate without holding another pass.
//!
//! Lock order: none of this module's locks is held while another is taken, or while anything outside is called. The order of
//! *rights* is: `lane` (one state, dirty or DMA operation at a time) before the gate's turn before `events`. Debug builds
//! check both ([`crate::lock_order`]).

mod access;
mod calls;
mod change;
mod client_lost;
mod closing;
mod config;
mod device;
mod dma;
mod error;
pub mod gate;
mod info;
mod ioeventfd;
mod irqs;
mod lane;
mod layout;
mod loaded;
mod low_power;
mod maps;
pub mod mediator;
mod open;
mod scratch;
mod state;
mod stream;
mod tables;
mod timers;
mod tracking;
mod vmm;
mod watch;

pub use device::{Limits, MediatedDevice};
pub use error::{MediationError, Refusal, Remedy, Result, StateError};
pub use ioeventfd::Kick;
pub use low_power::Entered;
pub use maps::{MapOptions, RegionMap};
pub use mediator::{Exactness, PluginSummary, Remaining, Saved};
pub use tracking::Tracking;
pub use vmm::{VmmError, VmmPort};
pub use watch::{Notice, Observer};

pub use crate::sys::Faults;

use crate::lock_order::lock;
