//! What carries a stream: bytes in order, both ways.
//!
//! **Owns** the seam between the driver and a carrier. **Must never** interpret a byte. A transport waits for at most a
//! tick, so that its user can look at deadlines and at the cancel token; no lock is held meanwhile.

mod memory;
mod tcp;

pub use memory::{LinkControl, MemoryTransport};
pub use tcp::TcpTransport;

use std::io::{IoSlice, Result};

/// Longest that one call may wait, in milliseconds.
pub const TICK_MS: u64 = 50;

/// A connection. Dropping it closes it.
pub trait Transport: Send {
    /// Sends some bytes of `parts`, at least one, and says how many. `WouldBlock`: not within a tick.
    fn send(&mut self, parts: &[IoSlice<'_>]) -> Result<usize>;

    /// Receives some bytes. `Ok(0)`: the other side has closed. `WouldBlock`: nothing within a tick.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize>;

    /// The other side, for people and journals.
    fn peer(&self) -> String;
}
