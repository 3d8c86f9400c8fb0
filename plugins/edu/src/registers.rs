//! edu's programming model: offsets and bits of BAR 0, and the device's few commands.
//!
//! 4-byte accesses below 0x80, 4 or 8 bytes above. There is no reset of any kind.

use std::time::Duration;

use vfio_mediate_sdk::{Context, Errno, Result};

pub(crate) const BAR: u32 = 0;
pub(crate) const ID: u64 = 0x00;
/// Major and minor version in bits 31:16, 0xed in 7:0
pub(crate) const ID_VALUE: u32 = 0x0100_00ed;
/// Reads the complement of what was written
pub(crate) const LIVENESS: u64 = 0x04;
/// A write starts the computation; reads give the result
pub(crate) const FACTORIAL: u64 = 0x08;
pub(crate) const STATUS: u64 = 0x20;
pub(crate) const STATUS_COMPUTING: u32 = 0x01;
/// Raise an interrupt when the factorial is done
pub(crate) const STATUS_IRQ: u32 = 0x80;
pub(crate) const IRQ_STATUS: u64 = 0x24;
pub(crate) const IRQ_RAISE: u64 = 0x60;
pub(crate) const IRQ_ACK: u64 = 0x64;

/// The DMA registers: source, destination, count, command; 8 bytes each, ignored while a DMA runs.
pub(crate) const DMA: std::ops::Range<u64> = 0x80..0xa0;
pub(crate) const DMA_SRC: u64 = 0x80;
pub(crate) const DMA_DST: u64 = 0x88;
pub(crate) const DMA_COUNT: u64 = 0x90;
pub(crate) const DMA_COMMAND: u64 = 0x98;
/// Set to start, reads as set while the DMA runs
pub(crate) const RUN: u64 = 1;
/// From the buffer to memory
pub(crate) const TO_RAM: u64 = 2;

/// The buffer, in the device's address space; DMA alone reaches it.
pub(crate) const BUFFER: u64 = 0x4_0000;
pub(crate) const BUFFER_SIZE: usize = 4096;

const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
/// Memory and bus master
const COMMAND_ON: u16 = 0b110;

/// A DMA takes 100 ms and cannot be cancelled; ten times that is a device that hangs.
/// A DMA takes 100 ms on an idle machine; on one that is busy or emulated it may take many times that, and a migration should not fail for it.
const PATIENCE: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_millis(1);

/// The DMA registers' contents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct DmaRegisters {
    pub src: u64,
    pub dst: u64,
    pub count: u64,
    pub command: u64,
}

impl DmaRegisters {
    pub fn read(cx: &Context<'_>) -> Result<Self> {
        Ok(Self {
            src: cx.read_u64(BAR, DMA_SRC)?,
            dst: cx.read_u64(BAR, DMA_DST)?,
            count: cx.read_u64(BAR, DMA_COUNT)?,
            command: cx.read_u64(BAR, DMA_COMMAND)?,
        })
    }

    /// Guest memory that the device writes by this command: start and bytes.
    pub fn writes(&self) -> Option<(u64, u64)> {
        (self.command & (RUN | TO_RAM) == RUN | TO_RAM && self.count > 0).then_some((self.dst, self.count))
    }

    /// Brings the registers back while no DMA runs. What a finished command has left of itself cannot be written: a DMA
    /// of no bytes leaves it.
    pub fn restore(&self, cx: &Context<'_>) -> Result<()> {
        let left_over = self.command & !RUN;
        if cx.read_u64(BAR, DMA_COMMAND)? != left_over {
            // Both addresses are inside the buffer: whichever the direction makes the device's own is valid.
            run(cx, &Self { src: BUFFER, dst: BUFFER, count: 0, command: left_over | RUN })?;
        }
        cx.write_u64(BAR, DMA_SRC, self.src)?;
        cx.write_u64(BAR, DMA_DST, self.dst)?;
        cx.write_u64(BAR, DMA_COUNT, self.count)
    }
}

/// Whether a DMA runs.
pub(crate) fn is_running(cx: &Context<'_>) -> Result<bool> {
    Ok(cx.read_u64(BAR, DMA_COMMAND)? & RUN != 0)
}

/// Runs a DMA to its end.
pub(crate) fn run(cx: &Context<'_>, dma: &DmaRegisters) -> Result<()> {
    cx.write_u64(BAR, DMA_SRC, dma.src)?;
    cx.write_u64(BAR, DMA_DST, dma.dst)?;
    cx.write_u64(BAR, DMA_COUNT, dma.count)?;
    cx.write_u64(BAR, DMA_COMMAND, dma.command)?;
    wait_for_dma(cx)
}

/// Returns once no DMA runs.
pub(crate) fn wait_for_dma(cx: &Context<'_>) -> Result<()> {
    cx.poll_until(INTERVAL, PATIENCE, || Ok(!is_running(cx)?))
}

/// Returns once no factorial is being computed.
pub(crate) fn wait_for_factorial(cx: &Context<'_>) -> Result<()> {
    cx.poll_until(INTERVAL, PATIENCE, || Ok(cx.read_u32(BAR, STATUS)? & STATUS_COMPUTING == 0))
}

/// Runs `work` with memory and bus master enabled: a guest may have either off, and without the second DMA does nothing and
/// says so to nobody.
pub(crate) fn with_bus_master<R>(cx: &Context<'_>, work: impl FnOnce() -> Result<R>) -> Result<R> {
    let read = || {
        let mut bytes = [0; 2];
        cx.region_read(CONFIG, COMMAND, &mut bytes).map(|()| u16::from_le_bytes(bytes))
    };
    let before = read()?;
    if before & COMMAND_ON == COMMAND_ON {
        return work();
    }
    cx.region_write(CONFIG, COMMAND, &(before | COMMAND_ON).to_le_bytes())?;
    if read()? & COMMAND_ON != COMMAND_ON {
        return Err(Errno::EIO);
    }
    let result = work();
    // Unless the client, which may be running, has written it meanwhile.
    if read()? == before | COMMAND_ON {
        cx.region_write(CONFIG, COMMAND, &before.to_le_bytes())?;
    }
    result
}
