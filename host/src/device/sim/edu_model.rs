//! The edu device's registers and engines, without bus, clock or locks: time and memory come in, effects go out.
//!
//! States of each engine (factorial, DMA): *idle*, *busy until*. A busy engine cannot be cancelled.
//! Source: QEMU's `hw/misc/edu`, as its documentation and behaviour give it.

use std::time::Duration;

/// The hidden buffer as the DMA engine addresses it.
pub(super) const BUFFER_START: u64 = 0x4_0000;
pub(super) const BUFFER_SIZE: usize = 4096;
pub(super) const DMA_TIME: Duration = Duration::from_millis(100);
/// The real one computes in a thread of its own, in no time that anybody promises.
pub(super) const FACTORIAL_TIME: Duration = Duration::from_micros(10);

const ID: u32 = 0x0100_00ED;
const STATUS_COMPUTING: u32 = 0x01;
const STATUS_IRQ_WHEN_DONE: u32 = 0x80;
const IRQ_FACTORIAL: u32 = 0x001;
const IRQ_DMA: u32 = 0x100;
const COMMAND_RUN: u64 = 1;
const COMMAND_TO_MEMORY: u64 = 2;
const COMMAND_IRQ: u64 = 4;
/// Below this only 4-byte accesses are answered.
const WIDE_FROM: u64 = 0x80;
/// What an access of a wrong width or to no register reads.
const NOTHING: u64 = u64::MAX;

#[derive(Debug, Clone)]
pub(super) struct Model {
    liveness: u32,
    factorial: u32,
    status: u32,
    irq_status: u32,
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
    pub(super) buffer: Box<[u8; BUFFER_SIZE]>,
    factorial_due: Option<Duration>,
    dma_due: Option<Duration>,
}

/// What the device does to its interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// Causes were added, and there are some: an MSI, or the pin goes up
    Raise,
    /// No cause is left: the pin goes down
    Lower,
}

/// A finished DMA, to be performed by whoever has the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dma {
    /// Into the device's buffer, or out of it
    pub(super) to_memory: bool,
    /// Bus address, before the mask
    pub(super) iova: u64,
    /// The device's side
    pub(super) local: u64,
    pub(super) count: u64,
}

impl Dma {
    /// Where in the buffer, if all of the transfer lies inside it.
    pub(super) fn buffer_range(&self) -> Option<std::ops::Range<usize>> {
        let start = self.local.checked_sub(BUFFER_START)?;
        let end = start.checked_add(self.count).filter(|end| *end <= BUFFER_SIZE as u64)?;
        Some(start as usize..end as usize)
    }
}

impl Model {
    pub(super) fn new() -> Self {
        Self {
            liveness: 0,
            factorial: 0,
            status: 0,
            irq_status: 0,
            source: 0,
            destination: 0,
            count: 0,
            command: 0,
            buffer: Box::new([0; BUFFER_SIZE]),
            factorial_due: None,
            dma_due: None,
        }
    }

    /// One access of `width` bytes (1, 2, 4 or 8), aligned to it.
    pub(super) fn read(&self, offset: u64, width: usize) -> u64 {
        match width {
            4 => {}
            8 if offset >= WIDE_FROM => {}
            8 => return NOTHING,
            // Narrower than the device's bus side takes at all: it never hears of them, and the bus reads 0.
            _ => return 0,
        }
        match offset {
            0x00 => u64::from(ID),
            0x04 => u64::from(self.liveness),
            0x08 => u64::from(self.factorial),
            0x20 => u64::from(self.status),
            0x24 => u64::from(self.irq_status),
            0x80 => self.source,
            0x88 => self.destination,
            0x90 => self.count,
            0x98 => self.command,
            _ => NOTHING,
        }
    }

    /// One access, as in [`Self::read`]. A 4-byte write to a 64-bit register clears its upper half.
    pub(super) fn write(&mut self, offset: u64, width: usize, value: u64, now: Duration) -> Effect {
        if !(width == 4 || width == 8 && offset >= WIDE_FROM) {
            return Effect::None;
        }
        let low = value as u32;
        match offset {
            0x04 => self.liveness = !low,
            0x08 if self.status & STATUS_COMPUTING == 0 => {
                self.factorial = low;
                self.status |= STATUS_COMPUTING;
                self.factorial_due = Some(now + FACTORIAL_TIME);
            }
            0x20 => self.status = self.status & !STATUS_IRQ_WHEN_DONE | low & STATUS_IRQ_WHEN_DONE,
            0x60 => return self.raise(low),
            0x64 => return self.lower(low),
            // Nothing of the engine may be written while it runs.
            _ if self.command & COMMAND_RUN != 0 => {}
            0x80 => self.source = value,
            0x88 => self.destination = value,
            0x90 => self.count = value,
            // A command without the run bit is ignored as a whole.
            0x98 if value & COMMAND_RUN != 0 => {
                self.command = value;
                self.dma_due = Some(now + DMA_TIME);
            }
            _ => {}
        }
        Effect::None
    }

    pub(super) fn next_due(&self) -> Option<Duration> {
        [self.factorial_due, self.dma_due].into_iter().flatten().min()
    }

    /// Finishes a factorial that is due.
    pub(super) fn finish_factorial(&mut self, now: Duration) -> Effect {
        if self.factorial_due.is_none_or(|due| due > now) {
            return Effect::None;
        }
        self.factorial_due = None;
        self.factorial = factorial(self.factorial);
        self.status &= !STATUS_COMPUTING;
        if self.status & STATUS_IRQ_WHEN_DONE != 0 { self.raise(IRQ_FACTORIAL) } else { Effect::None }
    }

    /// The transfer that is due, once: the caller performs it before [`Self::finish_dma`], and the engine is busy so long.
    pub(super) fn take_due_dma(&mut self, now: Duration) -> Option<Dma> {
        self.dma_due.take_if(|due| *due <= now)?;
        let to_memory = self.command & COMMAND_TO_MEMORY != 0;
        let (iova, local) = if to_memory { (self.destination, self.source) } else { (self.source, self.destination) };
        Some(Dma { to_memory, iova, local, count: self.count })
    }

    pub(super) fn finish_dma(&mut self) -> Effect {
        self.dma_due = None;
        self.command &= !COMMAND_RUN;
        if self.command & COMMAND_IRQ != 0 { self.raise(IRQ_DMA) } else { Effect::None }
    }

    fn raise(&mut self, causes: u32) -> Effect {
        self.irq_status |= causes;
        if self.irq_status != 0 { Effect::Raise } else { Effect::None }
    }

    fn lower(&mut self, causes: u32) -> Effect {
        self.irq_status &= !causes;
        if self.irq_status == 0 { Effect::Lower } else { Effect::None }
    }
}

/// Modulo 2^32. 34! is the first that is a multiple of it, and every later one is too.
fn factorial(value: u32) -> u32 {
    if value >= 34 { 0 } else { (1..=value).fold(1, u32::wrapping_mul) }
}
