//! A host that mediates passthrough VFIO devices through vendor plug-ins and live-migrates them.
//!
//! Modules, arrows only downward: `control -> {frontend, migration} -> mediation -> {plugin, device, memory} -> kvm -> sys`.

pub mod control;
pub mod device;
pub mod frontend;
pub mod kvm;
#[doc(hidden)]
pub mod lock_order;
pub mod mediation;
pub mod memory;
pub mod migration;
pub mod plugin;
pub mod sys;
