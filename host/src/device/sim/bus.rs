//! What every model shares: who it is, whether it still lives, and its side of the PCI bus.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_ROM_REGION_INDEX, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use super::config::{
    COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_MEMORY, Ids, PciConfig, SIZE, STATUS, STATUS_INTX,
};
use super::dma::{Ask, DmaFaultKind, DmaSpace, Transfer};
use super::irq::Irqs;
use super::power::{PowerModel, Resumed, Touch, Watch};
use super::{Fault, FaultPlan, Sleep, Time};
use crate::device::{Backend, CONFIG_REGION, DeviceError, Identity, IrqSet, RegionInfo, Result};

pub(super) const READ_WRITE: u32 = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;

/// The part of a model that does not change, and its one-way road to being lost.
#[derive(Debug)]
pub(super) struct Function {
    pub(super) identity: Identity,
    pub(super) time: Time,
    faults: Arc<FaultPlan>,
    lost: AtomicBool,
    /// Accesses, and those that a suspended device got
    pub(super) watch: Watch,
}

impl Function {
    pub(super) fn new(name: String, ids: Ids, config: &PciConfig, time: Time, faults: Arc<FaultPlan>) -> Self {
        let identity = Identity {
            name,
            backend: Backend::Sim,
            vendor_id: ids.vendor,
            device_id: ids.device,
            subsystem_vendor_id: ids.subsystem_vendor,
            subsystem_device_id: ids.subsystem,
            class_code: ids.class,
            revision: ids.revision,
            virtual_function: false,
            config: config.bytes().to_vec(),
        };
        Self { identity, time, faults, lost: AtomicBool::new(false), watch: Watch::default() }
    }

    /// Asks the plan before an operation. Not to be called with the device's lock held: a delay waits here.
    pub(super) fn step(&self, what: &'static str) -> Result<()> {
        crate::lock_order::calling_out();
        let fault = self.faults.step(what);
        if fault == Some(Fault::Lose) {
            self.lost.store(true, Ordering::SeqCst);
        }
        if self.is_lost() {
            return Err(DeviceError::lost(&self.identity.name, what, Errno::NODEV));
        }
        match fault {
            Some(Fault::Errno(errno)) => Err(self.failed(what, errno)),
            Some(Fault::Delay(duration)) => {
                self.time.clock().wait(duration);
                Ok(())
            }
            Some(Fault::Lose) | None => Ok(()),
        }
    }

    /// As [`Self::step`], for an operation that needs the device itself: it is in flight until the answer is dropped. EIO
    /// while the device is suspended; nobody should have asked.
    pub(super) fn access(&self, what: &'static str) -> Result<Touch<'_>> {
        self.step(what)?;
        self.watch.begin().ok_or_else(|| self.failed(format!("{what} of a suspended device"), Errno::IO))
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    pub(super) fn refused(&self, what: impl Into<String>, errno: Errno) -> DeviceError {
        DeviceError::refused(&self.identity.name, what, errno)
    }

    pub(super) fn failed(&self, what: impl Into<String>, errno: Errno) -> DeviceError {
        DeviceError::failed(&self.identity.name, what, errno)
    }

    /// Checks that an access lies inside a region of `size` bytes.
    pub(super) fn check(&self, index: u32, offset: u64, length: usize, size: u64) -> Result<()> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(self.refused(format!("{length} bytes at {offset:#x} of region {index}"), Errno::INVAL)),
        }
    }
}

/// Config space, interrupts and memory of a model: the part that changes. A model keeps it under its mutex.
#[derive(Debug)]
pub(super) struct Bus {
    pub(super) config: PciConfig,
    pub(super) irqs: Irqs,
    pub(super) dma: DmaSpace,
    pub(super) power: PowerModel,
}

impl Bus {
    pub(super) fn new(config: PciConfig, irqs: Irqs, sleep: Sleep) -> Self {
        Self { config, irqs, dma: DmaSpace::default(), power: PowerModel::new(sleep) }
    }

    /// INTx is masked for the time, if it was not: a suspended function cannot take its pin back.
    pub(super) fn low_power_entry(
        &mut self,
        watch: &Watch,
        wakeup: Option<BorrowedFd<'_>>,
    ) -> std::result::Result<(), Errno> {
        self.power.enter(wakeup)?;
        if self.power.is_suspended() {
            self.irqs.suspend();
            watch.falls_asleep();
        }
        Ok(())
    }

    /// True when the device has lost what it held.
    pub(super) fn low_power_exit(&mut self, watch: &Watch) -> std::result::Result<bool, Errno> {
        let resumed = self.power.exit()?;
        Ok(self.resumed(watch, resumed))
    }

    /// As [`Self::low_power_exit`].
    pub(super) fn resumed_by_another(&mut self, watch: &Watch) -> bool {
        let resumed = self.power.resumed_by_another();
        self.resumed(watch, resumed)
    }

    fn resumed(&mut self, watch: &Watch, resumed: Resumed) -> bool {
        if resumed != Resumed::Nothing {
            watch.wakes();
            self.irqs.resume();
        }
        resumed == Resumed::PowerLost
    }

    pub(super) fn memory_enabled(&self) -> bool {
        self.config.command() & COMMAND_MEMORY != 0
    }

    /// The caller has checked the range against [`SIZE`].
    pub(super) fn config_read(&self, offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.config.bytes()[offset as usize..][..data.len()]);
        // A driver that shares its interrupt looks here whether it is its own device's.
        let status = STATUS.checked_sub(offset).and_then(|at| data.get_mut(at as usize));
        if let Some(status) = status.filter(|_| self.irqs.level()) {
            *status |= STATUS_INTX;
        }
    }

    pub(super) fn config_write(&mut self, offset: u64, data: &[u8]) {
        self.config.write(offset as usize, data);
        self.irqs.set_intx_disabled(self.config.command() & COMMAND_INTX_DISABLE != 0);
    }

    pub(super) fn set_irqs(&mut self, request: &IrqSet<'_>) -> std::result::Result<(), Errno> {
        self.irqs.set(request)?;
        self.config.set_msi_enabled(self.irqs.msi_enabled());
        Ok(())
    }

    /// Goes on with a DMA, as [`DmaSpace::advance`], if the device is a bus master; otherwise the rest of it is a fault.
    pub(super) fn advance(&mut self, transfer: &mut Transfer) -> Option<Ask> {
        let suspended = self.power.is_suspended();
        let master = self.config.command() & COMMAND_BUS_MASTER != 0;
        let stopped = match (suspended, master) {
            (true, _) => Some(DmaFaultKind::Suspended),
            (false, false) => Some(DmaFaultKind::BusMasterOff),
            (false, true) => None,
        };
        self.dma.advance(transfer, stopped)
    }
}

/// A DMA from begin to end, of a model whose lock the caller holds: it is let go while a client is asked, and taken again. `moved` is
/// called whenever bytes have moved, before anybody else can look.
pub(super) fn transfer<'a, T>(
    mut state: MutexGuard<'a, T>,
    lock: impl Fn() -> MutexGuard<'a, T>,
    bus: impl Fn(&mut T) -> &mut Bus,
    moved: impl Fn(&mut T, &Transfer),
    transfer: &mut Transfer,
) -> MutexGuard<'a, T> {
    while let Some(ask) = bus(&mut state).advance(transfer) {
        moved(&mut state, transfer);
        drop(state);
        let answer = ask.perform(transfer);
        state = lock();
        bus(&mut state).dma.answered(transfer, &ask, answer);
    }
    moved(&mut state, transfer);
    state
}

/// A region that only reads and writes; `None` beyond the last index of a PCI device without VGA.
pub(super) fn plain_region(index: u32, bars: &[(usize, u32)]) -> Option<RegionInfo> {
    let bar = bars.iter().find(|(bar, _)| *bar == index as usize);
    let size = match (bar, index) {
        (Some((_, size)), _) => u64::from(*size),
        (None, CONFIG_REGION) => SIZE as u64,
        (None, 0..=VFIO_PCI_ROM_REGION_INDEX) => 0,
        _ => return None,
    };
    let flags = if size == 0 { 0 } else { READ_WRITE };
    Some(RegionInfo { index, flags, size, capabilities: Vec::new() })
}
