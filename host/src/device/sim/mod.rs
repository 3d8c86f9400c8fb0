//! Models of devices behind the same trait as real ones: deterministic, and able to fail on demand.
//!
//! * [`Edu`]: QEMU's edu device as vfio-pci shows it: hidden state, DMA that takes 100 ms, no reset, no migration of its
//!   own. What a plug-in drives here it drives unchanged on the real one.
//! * [`Stateful`]: a device of our own with *native* migration v2 and DMA logging, as a variant driver gives them.
//!
//! **Owns** the models, their clocks ([`Time`]) and the [`FaultPlan`]. **Must never** be kinder than the real device: no
//! DMA without bus master, none outside a map, no completion before its time, none after `dma_unmap` has returned.
//! Locks: one mutex per device over its whole state, never held while waiting or while a clock's listeners run. The
//! virtual clock's own order: `turn`, then `state`; then a device's mutex.

mod bus;
mod clock;
mod config;
mod dma;
mod edu;
mod edu_model;
mod fault;
mod irq;
mod power;
mod spec;
mod stateful;
mod stateful_log;
mod stateful_stream;

pub use clock::{Time, VirtualClock};
pub use dma::{DmaFault, DmaFaultKind};
pub use edu::{Edu, EduOptions};
pub use fault::{Fault, FaultPlan};
pub use power::Sleep;
pub use spec::{SpecError, open};
pub use stateful::{Stateful, StatefulOptions, regs};
