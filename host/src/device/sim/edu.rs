//! The edu device (1234:11e8) as vfio-pci shows it.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FLAGS_PCI, VFIO_PCI_NUM_REGIONS};

use super::bus::{self, Bus, Function, plain_region};
use super::clock::{Alarm, Tick, Time};
use super::config::{Ids, PciConfig, SIZE};
use super::dma::{DmaFault, DmaFaultKind, Transfer};
use super::edu_model::{Effect, Model};
use super::fault::FaultPlan;
use super::irq::{Irqs, NUM_IRQS};
use super::power::{Sleep, is_low_power};
use crate::device::{
    CONFIG_REGION, Clock, Device, DeviceInfo, DmaMap, Feature, FeatureAccess, Identity, IovaRange, IrqInfo, IrqSet,
    NativeDmaLogging, NativeMigration, Power, RegionInfo, Result,
};
use crate::sys::Mapping;

/// BAR0: registers, 1 MiB.
const BARS: [(usize, u32); 1] = [(0, 1 << 20)];

const IDS: Ids = Ids {
    vendor: 0x1234,
    device: 0x11E8,
    subsystem_vendor: 0x1AF4,
    subsystem: 0x1100,
    class: 0x00_FF00,
    revision: 0x10,
};

/// How to make an [`Edu`].
#[derive(Debug, Clone)]
pub struct EduOptions {
    /// The device's name in errors
    pub name: String,
    /// Bus addresses are ANDed with it, silently: 28 bits by default, as the real one
    pub dma_mask: u64,
    pub time: Time,
    pub faults: Arc<FaultPlan>,
    /// What low power makes of it
    pub sleep: Sleep,
}

impl Default for EduOptions {
    fn default() -> Self {
        Self {
            name: "sim:edu".to_owned(),
            dma_mask: (1 << 28) - 1,
            time: Time::Real,
            faults: FaultPlan::none(),
            sleep: Sleep::default(),
        }
    }
}

/// A simulated edu device.
///
/// Registers, interrupts (INTx, one MSI), a 4 KiB buffer that only DMA reaches, and a DMA engine that takes 100 ms of the
/// device's time, during which its registers cannot be written and it cannot be stopped. No reset (ENOTTY), nothing to
/// mmap, no migration. Where the real model stops its whole machine (a transfer outside the buffer), this one records a
/// [`DmaFault`] of kind [`DmaFaultKind::OutsideBuffer`], moves nothing, and completes the command as usual.
#[derive(Debug)]
pub struct Edu {
    // First: its thread is gone before the rest.
    alarm: Alarm,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    function: Function,
    dma_mask: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bus: Bus,
    model: Model,
    /// How often power was lost
    powered: u64,
}

impl Edu {
    /// EAGAIN (Failed) when the timer thread of real time cannot be started.
    pub fn new(options: EduOptions) -> Result<Arc<Self>> {
        let config = PciConfig::new(IDS, &BARS);
        let function = Function::new(options.name, IDS, &config, options.time, options.faults);
        let state =
            Mutex::new(State { bus: Bus::new(config, Irqs::new(1), options.sleep), model: Model::new(), powered: 0 });
        let inner = Arc::new(Inner { function, dma_mask: options.dma_mask, state });
        let target: Arc<dyn Tick> = Arc::clone(&inner) as _;
        let alarm = Alarm::new(&inner.function.time, "sim-edu", target)
            .map_err(|_| inner.function.failed("starting the timer thread", Errno::AGAIN))?;
        Ok(Arc::new(Self { alarm, inner }))
    }

    /// The first transfers, up to 1024, that were refused, in order.
    pub fn dma_faults(&self) -> Vec<DmaFault> {
        self.inner.state().bus.dma.faults()
    }

    /// Accesses that came to the suspended device, or were in flight when it was suspended: always 0, unless somebody did
    /// not keep them away.
    pub fn accesses_while_suspended(&self) -> u64 {
        self.inner.function.watch.violations()
    }

    /// Plays a PF with so many VFs enabled.
    pub fn enable_vfs(&self, vfs: u32) {
        self.inner.state().bus.power.vfs = vfs;
    }

    /// Another user of the machine needs the device, as when its configuration space is looked at through sysfs.
    pub fn resume_by_another(&self) {
        let mut state = self.inner.state();
        let lost = state.bus.resumed_by_another(&self.inner.function.watch);
        state.woke(lost);
    }

    /// Whether INTx is enabled and masked, by whomever.
    pub fn is_intx_masked(&self) -> bool {
        self.inner.state().bus.irqs.intx_masked()
    }

    /// The kernel wants the device back (its REQ irq). False when nobody listens.
    pub fn raise_request(&self) -> bool {
        self.inner.state().bus.irqs.raise_request()
    }

    /// The hidden buffer, which no access to the device shows: for a test's oracle only.
    pub fn hidden_buffer(&self) -> Vec<u8> {
        self.inner.state().model.buffer.to_vec()
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Without power the registers were lost, and with them what the device was at.
    fn woke(&mut self, power_lost: bool) {
        if power_lost {
            self.powered += 1;
            self.model = Model::new();
            self.bus.irqs.set_level(false);
        }
    }

    fn apply(&mut self, effect: Effect) {
        let msi = self.bus.irqs.msi_enabled();
        match effect {
            Effect::Raise if msi => self.bus.irqs.send_msi(0),
            Effect::Raise => self.bus.irqs.set_level(true),
            Effect::Lower if !msi => self.bus.irqs.set_level(false),
            Effect::Lower | Effect::None => {}
        }
    }
}

impl Inner {
    /// The bytes, then the run bit, then the interrupt. The engine is busy meanwhile; power that is lost ends its work.
    fn finish_dma(&self, now: Duration) {
        let mut state = self.state();
        let Some(dma) = state.model.take_due_dma(now) else { return };
        let (iova, powered) = (dma.iova & self.dma_mask, state.powered);
        match dma.buffer_range() {
            Some(range) => {
                let data = state.model.buffer[range.clone()].to_vec();
                let mut transfer = match dma.to_memory {
                    true => Transfer::to_memory(iova, data),
                    false => Transfer::from_memory(iova, data),
                };
                state = bus::transfer(state, || self.state(), |state| &mut state.bus, |_, _| {}, &mut transfer);
                if state.powered != powered {
                    return;
                }
                if !dma.to_memory {
                    state.model.buffer[range].copy_from_slice(transfer.data());
                }
            }
            None => state.bus.dma.fault(DmaFault {
                kind: DmaFaultKind::OutsideBuffer,
                iova: dma.local,
                length: dma.count,
                write: dma.to_memory,
            }),
        }
        let effect = state.model.finish_dma();
        state.apply(effect);
    }
}

impl Tick for Inner {
    fn next_due(&self) -> Option<Duration> {
        if self.function.is_lost() { None } else { self.state().model.next_due() }
    }

    fn tick(&self, now: Duration) {
        let mut state = self.state();
        let effect = state.model.finish_factorial(now);
        state.apply(effect);
        drop(state);
        self.finish_dma(now);
    }
}

impl Device for Edu {
    fn identity(&self) -> &Identity {
        &self.inner.function.identity
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo { flags: VFIO_DEVICE_FLAGS_PCI, num_regions: VFIO_PCI_NUM_REGIONS, num_irqs: NUM_IRQS }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo> {
        let function = &self.inner.function;
        function.step("edu region info")?;
        plain_region(index, &BARS).ok_or_else(|| function.refused(format!("region {index}"), Errno::INVAL))
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let function = &self.inner.function;
        function.step("edu irq info")?;
        self.inner.state().bus.irqs.info(index).map_err(|errno| function.refused(format!("irq index {index}"), errno))
    }

    fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let function = &self.inner.function;
        let _access = function.access("edu region read")?;
        match index {
            CONFIG_REGION => {
                function.check(index, offset, data.len(), SIZE as u64)?;
                self.inner.state().bus.config_read(offset, data);
            }
            0 => {
                function.check(index, offset, data.len(), u64::from(BARS[0].1))?;
                let state = self.inner.state();
                if !state.bus.memory_enabled() {
                    return Err(function.failed("memory is disabled", Errno::IO));
                }
                for (at, part) in Accesses::new(offset, data.len()) {
                    let value = state.model.read(at, part.len()).to_le_bytes();
                    let width = part.len();
                    data[part].copy_from_slice(&value[..width]);
                }
            }
            _ => return Err(function.refused(format!("reading region {index}"), Errno::INVAL)),
        }
        Ok(())
    }

    fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        let function = &self.inner.function;
        let _access = function.access("edu region write")?;
        match index {
            CONFIG_REGION => {
                function.check(index, offset, data.len(), SIZE as u64)?;
                self.inner.state().bus.config_write(offset, data);
            }
            0 => {
                function.check(index, offset, data.len(), u64::from(BARS[0].1))?;
                let now = function.time.clock().now();
                let mut state = self.inner.state();
                if !state.bus.memory_enabled() {
                    return Err(function.failed("memory is disabled", Errno::IO));
                }
                for (at, part) in Accesses::new(offset, data.len()) {
                    let mut value = [0; 8];
                    let width = part.len();
                    value[..width].copy_from_slice(&data[part]);
                    let effect = state.model.write(at, width, u64::from_le_bytes(value), now);
                    state.apply(effect);
                }
                drop(state);
                self.alarm.ring();
            }
            _ => return Err(function.refused(format!("writing region {index}"), Errno::INVAL)),
        }
        Ok(())
    }

    fn region_map(&self, index: u32, _offset: u64, _length: u64) -> Result<Arc<Mapping>> {
        self.inner.function.step("edu region map")?;
        Err(self.inner.function.refused(format!("mapping region {index}"), Errno::NODEV))
    }

    fn set_irqs(&self, request: &IrqSet<'_>) -> Result<()> {
        let function = &self.inner.function;
        let _access = function.access("edu set irqs")?;
        let index = request.index;
        self.inner.state().bus.set_irqs(request).map_err(|errno| function.refused(format!("irq index {index}"), errno))
    }

    fn reset(&self) -> Result<()> {
        let _access = self.inner.function.access("edu reset")?;
        Err(self.inner.function.refused("reset", Errno::NOTTY))
    }

    fn dma_map(&self, map: &DmaMap) -> Result<()> {
        let function = &self.inner.function;
        function.step("edu dma map")?;
        let what = || format!("mapping {:#x} bytes at {:#x}", map.length, map.iova);
        self.inner.state().bus.dma.map(map).map_err(|errno| function.refused(what(), errno))
    }

    fn dma_unmap(&self, iova: u64, length: u64) -> Result<()> {
        let function = &self.inner.function;
        function.step("edu dma unmap")?;
        let what = || format!("unmapping {length:#x} bytes at {iova:#x}");
        self.inner.state().bus.dma.unmap(iova, length).map_err(|errno| function.refused(what(), errno))
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange { iova: 0, last: u64::MAX }]
    }

    fn probe_feature(&self, feature: Feature, access: FeatureAccess) -> bool {
        is_low_power(feature, access) && self.inner.state().bus.power.is_supported()
    }

    fn migration(&self) -> Option<&dyn NativeMigration> {
        None
    }

    fn dma_logging(&self) -> Option<&dyn NativeDmaLogging> {
        None
    }

    fn low_power_entry(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        let function = &self.inner.function;
        function.step("edu low power entry")?;
        let entered = self.inner.state().bus.low_power_entry(&function.watch, wakeup);
        entered.map_err(|errno| function.refused("low power", errno))
    }

    fn low_power_exit(&self) -> Result<()> {
        let function = &self.inner.function;
        function.step("edu low power exit")?;
        let mut state = self.inner.state();
        let lost = state.bus.low_power_exit(&function.watch).map_err(|errno| function.refused("low power", errno))?;
        state.woke(lost);
        Ok(())
    }

    fn power(&self) -> Result<Power> {
        Ok(self.inner.state().bus.power.power())
    }

    fn clock(&self) -> &dyn Clock {
        self.inner.function.time.clock()
    }
}

/// Cuts a transfer into the accesses that vfio-pci makes of it: ascending, each 8, 4, 2 or 1 bytes wide and aligned to its
/// width.
pub(super) struct Accesses {
    base: u64,
    done: usize,
    length: usize,
}

impl Accesses {
    pub(super) fn new(offset: u64, length: usize) -> Self {
        Self { base: offset, done: 0, length }
    }
}

impl Iterator for Accesses {
    /// The access's address, and its bytes in the caller's buffer
    type Item = (u64, std::ops::Range<usize>);

    fn next(&mut self) -> Option<Self::Item> {
        let (at, left) = (self.base + self.done as u64, self.length - self.done);
        let fits = |width: &usize| *width <= left && at.is_multiple_of(*width as u64);
        let width = [8, 4, 2, 1].into_iter().find(fits)?;
        let part = self.done..self.done + width;
        self.done += width;
        Some((at, part))
    }
}

#[cfg(all(test, not(loom)))]
#[path = "edu_tests.rs"]
mod tests;
