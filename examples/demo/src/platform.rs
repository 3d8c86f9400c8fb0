//! What the guest program stands on: RAM, one device's BAR 0, and its interrupt.
//!
//! Two implementations: the in-process front-end (`child`), and a device of a few lines for testing the oracles.

use std::time::Duration;

use vfio_mediate::sys::Mapping;

/// The guest's machine.
pub trait Platform {
    fn ram(&self) -> &Mapping;

    /// BAR 0, as the guest's driver would read it.
    fn read32(&self, offset: u64) -> anyhow::Result<u32>;
    fn write32(&self, offset: u64, value: u32) -> anyhow::Result<()>;
    fn write64(&self, offset: u64, value: u64) -> anyhow::Result<()>;

    /// Whether the interrupt fired, waiting at most `patience`; takes it.
    fn wait_irq(&self, patience: Duration) -> anyhow::Result<bool>;

    /// How long an interrupt may take before it counts as lost.
    fn irq_patience(&self) -> Duration;
}
