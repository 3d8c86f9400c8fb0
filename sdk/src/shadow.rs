//! Registers whose writes must be remembered, because the device does not give them back.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::access::Access;

const WRITTEN: u64 = 1 << 32;

/// The last values written to `N` 4-byte registers. Lock-free; hooks on any thread.
///
/// Two concurrent writes of one register race in the shadow as they race on the bus, and the shadow may pick the other
/// winner: where that matters, the hook forwards under a lock of its own.
#[derive(Debug)]
pub struct Shadow<const N: usize> {
    offsets: [u64; N],
    values: [AtomicU64; N],
}

impl<const N: usize> Shadow<N> {
    /// Registers at these byte offsets of a region.
    pub const fn new(offsets: [u64; N]) -> Self {
        Self { offsets, values: [const { AtomicU64::new(0) }; N] }
    }

    /// Remembers a 4-byte write that hits one of the registers.
    pub fn note(&self, access: &Access<'_>) {
        if let (true, Some(value), Some(i)) = (access.is_write(), access.value_u32(), self.index(access.offset())) {
            self.values[i].store(WRITTEN | u64::from(value), Ordering::Release);
        }
    }

    /// The last value written; `None` before the first, and for other offsets.
    pub fn get(&self, offset: u64) -> Option<u32> {
        let value = self.values[self.index(offset)?].load(Ordering::Acquire);
        (value & WRITTEN != 0).then_some(value as u32)
    }

    /// As if it had been written: for a restored state.
    pub fn set(&self, offset: u64, value: Option<u32>) {
        if let Some(i) = self.index(offset) {
            self.values[i].store(value.map_or(0, |value| WRITTEN | u64::from(value)), Ordering::Release);
        }
    }

    fn index(&self, offset: u64) -> Option<usize> {
        self.offsets.iter().position(|at| *at == offset)
    }
}
