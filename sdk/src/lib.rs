//! Write live-migration mediation plug-ins for passthrough VFIO devices.
#![allow(non_local_definitions)] // abi_stable's derive

pub mod abi;
pub mod layout;
pub mod state;
