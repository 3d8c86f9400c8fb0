//! What carries a stream: bytes in order, both ways.
//!
//! **Owns** the seam between the driver and a carrier. **Must never** interpret a byte. A transport waits for at most a
//! tick, so that its user can look at deadlines and at the cancel token; no lock is held meanwhile.

mod memory;
mod tcp;

pub use memory::{LinkControl, MemoryTransport};
pub use tcp::TcpTransport;

use std::io::{IoSlice, Result};

use crate::sys::Mapping;

/// Longest that one call may wait, in milliseconds.
pub const TICK_MS: u64 = 50;

/// A connection. Dropping it closes it.
pub trait Transport: Send {
    /// Sends some bytes of `parts`, at least one, and says how many. `WouldBlock`: not within a tick.
    fn send(&mut self, parts: &[IoSlice<'_>]) -> Result<usize>;

    /// Receives some bytes. `Ok(0)`: the other side has closed. `WouldBlock`: nothing within a tick.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize>;

    /// As [`Self::receive`], into memory that is no Rust object.
    fn receive_into(&mut self, memory: &Mapping, offset: u64, length: u64) -> Result<u64> {
        let mut buffer = [0; 16 * 1024];
        let most = buffer.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        let count = self.receive(&mut buffer[..most])?;
        memory.write(offset, &buffer[..count]).map_err(std::io::Error::other)?;
        Ok(count as u64)
    }

    /// The other side, for people and journals.
    fn peer(&self) -> String;
}
