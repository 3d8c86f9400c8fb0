//! DMA: what the device writes, and when it may.
//!
//! **Owns** the DMA registers: every access of the client to them, and every look of ours, happens under [`EduDevice::dma`]'s
//! lock, with the device's own access inside (`default_rw`, never `Forward`). So nobody changes the destination between our
//! look at it and the doorbell.
//!
//! *Why no page is lost.* A DMA to memory is known as `live` from its doorbell on, tracked or not. It stops being live only
//! when RUN was read as clear, which is after its last byte; then its bytes are marked a last time. While it is live, every
//! report marks all of it. A page handed out as clean was thus not written after the report that preceded its copy, or
//! the next report has it. Marked are whole ranges at every report, written or not: a superset.
//!
//! A doorbell that hits while RUN is set is ignored by the device, or not, when the DMA ends between our look and the
//! write. The address registers cannot have changed then (the device ignores them, too, and the lock keeps others out), so
//! the range is the one that is live already; only its direction may be new, and so the command is looked at as written.
//!
//! *States.* `Running`: doorbells pass. `Quiet` (RUNNING_P2P): the device starts nothing; one doorbell is deferred, reads as
//! running, and starts on the way back to RUNNING, or travels in the state and starts at the destination. `Stopped`: the
//! client has no business here.

use vfio_mediate_sdk::{Access, Context, DirtyBitmap, DirtyTracking, Errno, IovaRange, Result, Verdict};

use crate::registers::{self, BAR, DMA_COMMAND, DmaRegisters, RUN};
use crate::{EduDevice, lock};

/// What the client may do with the DMA registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Running,
    Quiet,
    Stopped,
}

#[derive(Debug)]
pub(crate) struct Dma {
    pub mode: Mode,
    /// Guest memory that the device may be writing: start and bytes
    live: Option<(u64, u64)>,
    /// A doorbell of the client that waits for RUNNING: the command. Not in `Running`.
    pub deferred: Option<u64>,
    /// The client's registers, while the device's hold something of ours
    pub borrowed: Option<DmaRegisters>,
}

impl Dma {
    pub fn new() -> Self {
        Self { mode: Mode::Running, live: None, deferred: None, borrowed: None }
    }

    /// Looks whether the live DMA has ended; if so, marks it for the last time. Returns whether a DMA runs.
    fn settle(&mut self, cx: &Context<'_>) -> Result<bool> {
        let running = registers::is_running(cx)?;
        if !running && let Some((iova, length)) = self.live {
            mark(cx, iova, length)?;
            self.live = None;
        }
        Ok(running)
    }

    /// Lets a command reach the device by `ring`, and knows what it writes.
    fn doorbell(&mut self, cx: &Context<'_>, command: u64, ring: impl FnOnce() -> Result<()>) -> Result<()> {
        self.settle(cx)?;
        let dma = DmaRegisters { command, ..DmaRegisters::read(cx)? };
        let writes = dma.writes();
        if let (Some(old), Some(new)) = (self.live, writes)
            && old != new
        {
            // The device let the registers change while it ran: not an edu. Better marked twice than not at all.
            mark(cx, old.0, old.1)?;
        }
        // Before the doorbell: an error of `ring` does not say that the device has not heard it.
        self.live = writes.or(self.live);
        ring()
    }

    /// A client's write.
    fn write(&mut self, cx: &Context<'_>, access: &mut Access<'_>) -> Result<()> {
        let command = match (access.length(), access.value()) {
            (4 | 8, Some(value)) => Some(value).filter(|value| access.offset() == DMA_COMMAND && value & RUN != 0),
            _ => return Err(Errno::EINVAL),
        };
        match (self.mode, command) {
            (Mode::Running, Some(command)) => self.doorbell(cx, command, || cx.default_rw(access)),
            (Mode::Running, None) => cx.default_rw(access),
            // As the device does while it runs.
            (Mode::Quiet, _) if self.deferred.is_some() || self.settle(cx)? => Ok(()),
            (Mode::Quiet, Some(command)) => {
                self.deferred = Some(command);
                Ok(())
            }
            (Mode::Quiet, None) => cx.default_rw(access),
            (Mode::Stopped, _) => Err(Errno::EIO),
        }
    }
}

/// Ignores what is not mapped: the device could not write there, either.
fn mark(cx: &Context<'_>, iova: u64, length: u64) -> Result<()> {
    match cx.mark_dirty(iova, length) {
        Err(Errno::EFAULT) => Ok(()),
        marked => marked,
    }
}

impl EduDevice {
    /// The hook of the DMA registers.
    pub(crate) fn dma(&self, cx: &Context<'_>, access: &mut Access<'_>) -> Verdict {
        self.dma_access(cx, access).into()
    }

    fn dma_access(&self, cx: &Context<'_>, access: &mut Access<'_>) -> Result<()> {
        let mut dma = lock(&self.dma)?;
        if access.is_write() {
            return dma.write(cx, access);
        }
        match dma.deferred {
            Some(command) if access.offset() == DMA_COMMAND => access.set_value(command),
            _ => cx.default_rw(access),
        }
    }

    /// Into `Quiet`, from any mode: when this returns, no DMA runs, and none starts until [`Self::run`].
    pub(crate) fn quiesce(&self, cx: &Context<'_>) -> Result<()> {
        // First the mode, then the wait: whatever rings from here on is deferred. Not under the lock: hooks must not wait.
        let before = std::mem::replace(&mut lock(&self.dma)?.mode, Mode::Quiet);
        let quiet = self.settle_after(cx, registers::wait_for_dma);
        if quiet.is_err() && before == Mode::Running {
            self.run(cx)?;
        }
        quiet
    }

    /// From `Quiet` into `Running`: a deferred doorbell rings.
    pub(crate) fn run(&self, cx: &Context<'_>) -> Result<()> {
        let mut dma = lock(&self.dma)?;
        if let Some(command) = dma.deferred {
            registers::with_bus_master(cx, || dma.doorbell(cx, command, || cx.write_u64(BAR, DMA_COMMAND, command)))?;
            dma.deferred = None;
        }
        dma.mode = Mode::Running;
        Ok(())
    }

    /// From `Quiet` into `Stopped`: nothing is computed and nothing moves any more.
    pub(crate) fn freeze(&self, cx: &Context<'_>) -> Result<()> {
        lock(&self.dma)?.mode = Mode::Stopped;
        let frozen = self.settle_after(cx, registers::wait_for_factorial);
        if frozen.is_err() {
            lock(&self.dma)?.mode = Mode::Quiet;
        }
        frozen
    }

    /// EBUSY when a DMA runs after the wait, which cannot be: the mode keeps doorbells away.
    fn settle_after(&self, cx: &Context<'_>, wait: impl Fn(&Context<'_>) -> Result<()>) -> Result<()> {
        registers::with_bus_master(cx, || {
            wait(cx)?;
            let running = lock(&self.dma)?.settle(cx)?;
            if running { Err(Errno::EBUSY) } else { Ok(()) }
        })
    }

    /// From `Stopped` into `Quiet`: the client finds its registers again.
    pub(crate) fn thaw(&self, cx: &Context<'_>) -> Result<()> {
        let borrowed = lock(&self.dma)?.borrowed;
        if let Some(registers) = borrowed {
            registers::with_bus_master(cx, || registers.restore(cx))?;
        }
        let mut dma = lock(&self.dma)?;
        dma.borrowed = None;
        dma.mode = Mode::Quiet;
        Ok(())
    }
}

impl DirtyTracking for EduDevice {
    /// Nothing to do: what is live is always known.
    fn start(&self, _: &Context<'_>, _: &[IovaRange], _: u64) -> Result<()> {
        Ok(())
    }

    fn report(&self, cx: &Context<'_>, bitmap: &mut DirtyBitmap<'_>) -> Result<()> {
        let mut dma = lock(&self.dma)?;
        if let Some((iova, length)) = dma.live {
            // Marked here for the asked range, and by `settle` everywhere if this was the last time: a report covers one
            // range of several.
            bitmap.mark(iova, length);
            dma.settle(cx)?;
        }
        Ok(())
    }

    fn stop(&self, _: &Context<'_>) {}
}
