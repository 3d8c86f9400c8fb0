//! What the cases stand on: a device, memory for its DMA, registers, waiting.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vfio_mediate::device::{CONFIG_REGION, Device, DeviceError, DmaMap, ErrorKind, IrqAction, IrqData, IrqSet};
use vfio_mediate::sys::{EventFd, Mapping};

pub const PAGE: u64 = 4096;
/// Pages of a bench's memory.
pub const PAGES: u64 = 16;
/// How long a device may take for anything, on its own clock. An emulated one on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// PCI configuration space: the command register, and its bus master bit.
const COMMAND: u64 = 4;
pub const BUS_MASTER: u16 = 1 << 2;

const STATUS: u64 = 6;
const STATUS_INTX: u16 = 1 << 3;

/// INTx, MSI and MSI-X, as `VFIO_PCI_*_IRQ_INDEX`.
pub const INTX: u32 = 0;
pub const MSI: u32 = 1;
pub const MSIX: u32 = 2;

/// A device under test.
#[derive(Debug)]
pub struct Bench<'a> {
    pub device: &'a dyn Device,
    /// [`PAGES`] pages, which no case finds in a known state
    pub memory: Arc<Mapping>,
}

impl<'a> Bench<'a> {
    pub fn new(device: &'a dyn Device) -> Result<Self> {
        let fd = memfd_create("device-suite", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, PAGES * PAGE)?;
        Ok(Self { device, memory: Arc::new(Mapping::new(&fd, 0, PAGES * PAGE)?) })
    }

    // ---- registers ------------------------------------------------------------------------------------------------

    pub fn read32(&self, region: u32, offset: u64) -> Result<u32> {
        let mut data = [0; 4];
        self.device.region_read(region, offset, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    pub fn write32(&self, region: u32, offset: u64, value: u32) -> Result<()> {
        Ok(self.device.region_write(region, offset, &value.to_le_bytes())?)
    }

    pub fn read64(&self, region: u32, offset: u64) -> Result<u64> {
        let mut data = [0; 8];
        self.device.region_read(region, offset, &mut data)?;
        Ok(u64::from_le_bytes(data))
    }

    pub fn write64(&self, region: u32, offset: u64, value: u64) -> Result<()> {
        Ok(self.device.region_write(region, offset, &value.to_le_bytes())?)
    }

    pub fn command(&self) -> Result<u16> {
        let mut data = [0; 2];
        self.device.region_read(CONFIG_REGION, COMMAND, &mut data)?;
        Ok(u16::from_le_bytes(data))
    }

    pub fn write_command(&self, command: u16) -> Result<()> {
        Ok(self.device.region_write(CONFIG_REGION, COMMAND, &command.to_le_bytes())?)
    }

    /// Whether STATUS shows an INTx that is asserted.
    pub fn asserts_intx(&self) -> Result<bool> {
        let mut data = [0; 2];
        self.device.region_read(CONFIG_REGION, STATUS, &mut data)?;
        Ok(u16::from_le_bytes(data) & STATUS_INTX != 0)
    }

    pub fn set_bus_master(&self, on: bool) -> Result<()> {
        let command = if on { self.command()? | BUS_MASTER } else { self.command()? & !BUS_MASTER };
        self.write_command(command)?;
        ensure!(self.is_bus_master()? == on, "COMMAND does not keep its bus master bit");
        Ok(())
    }

    pub fn is_bus_master(&self) -> Result<bool> {
        Ok(self.command()? & BUS_MASTER != 0)
    }

    // ---- waiting --------------------------------------------------------------------------------------------------

    /// Until `condition` holds, by the device's own clock.
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
        let clock = self.device.clock();
        let end = clock.now() + PATIENCE;
        while !condition()? {
            ensure!(clock.now() < end, "{what}: not within {PATIENCE:?}");
            clock.wait(Duration::from_millis(2));
        }
        Ok(())
    }

    /// One or more signals, within the bench's patience.
    pub fn wait_for(&self, event: &EventFd, what: &str) -> Result<u64> {
        let mut count = 0;
        self.wait_until(what, || {
            count = event.read()?;
            Ok(count > 0)
        })?;
        Ok(count)
    }

    /// No signal for a while in which one would have come.
    pub fn ensure_silent(&self, event: &EventFd, what: &str) -> Result<()> {
        self.device.clock().wait(Duration::from_millis(50));
        let count = event.read()?;
        ensure!(count == 0, "{what}: {count} signals");
        Ok(())
    }

    // ---- memory ---------------------------------------------------------------------------------------------------

    /// `pages` pages of the bench's memory from `first`, at `iova`, for reading and writing.
    pub fn dma(&self, iova: u64, first: u64, pages: u64) -> DmaMap {
        let (offset, length) = (first * PAGE, pages * PAGE);
        DmaMap { iova, length, memory: self.memory.clone().into(), offset, read: true, write: true }
    }

    /// Runs `body` with all of the memory mapped at `iova`.
    pub fn with_dma<T>(&self, iova: u64, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.device.dma_map(&self.dma(iova, 0, PAGES))?;
        let result = body();
        self.device.dma_unmap(iova, PAGES * PAGE).context("unmapping what the case mapped")?;
        result
    }

    /// Different bytes at every place, different for every seed.
    pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    pub fn peek(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; length];
        self.memory.read(offset, &mut data)?;
        Ok(data)
    }

    // ---- interrupts -----------------------------------------------------------------------------------------------

    /// One eventfd per vector from 0.
    pub fn set_events(&self, index: u32, events: &[EventFd]) -> Result<()> {
        let fds: Vec<_> = events.iter().map(|event| Some(event.as_fd())).collect();
        let data = IrqData::EventFd(&fds);
        Ok(self.set_irqs(index, 0, events.len() as u32, IrqAction::Trigger, data)?)
    }

    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        count: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> Result<(), DeviceError> {
        self.device.set_irqs(&IrqSet { index, start, count, action, data })
    }

    pub fn disable_irq(&self, index: u32) -> Result<(), DeviceError> {
        self.set_irqs(index, 0, 0, IrqAction::Trigger, IrqData::None)
    }

    /// Runs `body` with `N` vectors of `index` on eventfds and bus master on (MSI is a write of the device's).
    pub fn with_irqs<const N: usize>(&self, index: u32, body: impl FnOnce(&[EventFd; N]) -> Result<()>) -> Result<()> {
        let mut events = Vec::with_capacity(N);
        for _ in 0..N {
            events.push(EventFd::new()?);
        }
        let Ok(events) = <[EventFd; N]>::try_from(events) else { bail!("eventfds") };
        self.set_events(index, &events)?;
        self.set_bus_master(true)?;
        let result = body(&events);
        self.set_bus_master(false)?;
        self.disable_irq(index).context("disabling the interrupts that the case set")?;
        result
    }

    // ---- order ----------------------------------------------------------------------------------------------------

    /// Whether a case left what it promised to take away.
    pub fn is_tidy(&self) -> Result<()> {
        ensure!(!self.is_bus_master()?, "the case left bus master on");
        Ok(())
    }

    /// After a case that failed half way; what cannot be mended shows in the next case.
    pub fn tidy(&self) {
        // Where there is none, and from a case that ended in order, it does nothing.
        let _ = self.device.low_power_exit();
        let _ = self.set_bus_master(false);
        for index in [INTX, MSI, MSIX] {
            let _ = self.disable_irq(index);
        }
        for range in self.device.iova_ranges() {
            let length = (range.last - range.iova).saturating_add(1);
            let _ = self.device.dma_unmap(range.iova, length);
        }
    }
}

/// The refusal that a case is after: this errno, and the device as it was.
pub fn refused<T: std::fmt::Debug>(result: Result<T, DeviceError>, errno: Errno, what: &str) -> Result<()> {
    match result {
        Ok(value) => bail!("{what}: not refused but {value:?}"),
        Err(error) => {
            ensure!(error.errno == errno, "{what}: expected {errno}, got: {error}");
            ensure!(error.kind == ErrorKind::Refused, "{what}: {errno} is {:?}, not a refusal", error.kind);
            Ok(())
        }
    }
}
