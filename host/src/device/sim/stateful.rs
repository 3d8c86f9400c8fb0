//! A device with native migration v2 and DMA logging, as a variant driver gives them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags, path};

use super::bus::{self, Bus, Function, plain_region};
use super::clock::Time;
use super::config::{Ids, PciConfig, SIZE};
use super::dma::{DmaFault, Transfer};
use super::edu::Accesses;
use super::fault::FaultPlan;
use super::irq::{Irqs, NUM_IRQS};
use super::power::{Sleep, is_low_power};
use super::stateful_log::Log;
use super::stateful_stream::{FULL, Loading, MEMORY_SIZE, REGISTERS_PAYLOAD, Saving};
use crate::device::{
    Area, CONFIG_REGION, Clock, Device, DeviceInfo, DmaMap, Feature, FeatureAccess, Identity, IovaRange, IrqInfo,
    IrqSet, NativeDmaLogging, NativeMigration, Power, PrecopyInfo, RegionCapability, RegionInfo, Result,
};
use crate::sys::{Mapping, Seal, memfd};

/// Registers of BAR0, and what they mean. Accesses of 4 bytes, or 8 at a multiple of 8.
pub mod regs {
    /// Read-only: [`ID_VALUE`]
    pub const ID: u64 = 0x00;
    /// Doorbells that have been performed; read-only, state
    pub const DOORBELLS: u64 = 0x04;
    /// 64 bits: the IOVA that a doorbell writes to
    pub const TARGET: u64 = 0x08;
    /// Bytes that a doorbell writes, at most [`LENGTH_MAX`]; more is cut to it
    pub const LENGTH: u64 = 0x10;
    pub const PATTERN: u64 = 0x14;
    /// Any write fills `[TARGET, + LENGTH)` with [`word`], at once in RUNNING and PRE_COPY. In RUNNING_P2P and
    /// PRE_COPY_P2P it is kept, and performed when the device may use the bus again.
    pub const DOORBELL: u64 = 0x18;
    /// Bit 0: send MSI 0 after each doorbell performed
    pub const IRQ_ENABLE: u64 = 0x1C;
    /// Doorbells that are kept; read-only, state
    pub const PENDING: u64 = 0x20;

    pub const ID_VALUE: u32 = 0x0100_57A7;
    pub const LENGTH_MAX: u32 = 64 << 10;
    /// Doorbells beyond it are not kept.
    pub const PENDING_MAX: u32 = 64;

    /// The little-endian word with which doorbell `number` (the first is 1) fills memory.
    pub const fn word(pattern: u32, number: u32) -> u32 {
        pattern.wrapping_add(number)
    }
}

/// BAR0 registers; BAR2 memory, of which all but the first page can be mapped.
const BARS: [(usize, u32); 2] = [(0, 4096), (2, MEMORY_SIZE as u32)];
const MEMORY_BAR: u32 = 2;
const MAPPABLE: Area = Area { offset: 4096, length: MEMORY_SIZE as u64 - 4096 };
const FLAGS: MigrationFlags = MigrationFlags { p2p: true, pre_copy: true };
pub(super) const PAGE_SIZE: u64 = 4096;

const IDS: Ids =
    Ids { vendor: 0x1234, device: 0x57A7, subsystem_vendor: 0x1234, subsystem: 0x0001, class: 0x00_FF00, revision: 1 };

/// How to make a [`Stateful`].
#[derive(Debug, Clone)]
pub struct StatefulOptions {
    /// The device's name in errors
    pub name: String,
    pub time: Time,
    pub faults: Arc<FaultPlan>,
    /// What low power makes of it
    pub sleep: Sleep,
    /// The page size that its log grants, whatever is asked for
    pub log_page_size: u64,
}

impl Default for StatefulOptions {
    fn default() -> Self {
        Self {
            name: "sim:stateful".to_owned(),
            time: Time::Real,
            faults: FaultPlan::none(),
            sleep: Sleep::default(),
            log_page_size: PAGE_SIZE,
        }
    }
}

/// A simulated device with every optional migration state, a pre-copy stream, a dirty log of its own and a reset.
///
/// [`regs`] are BAR0; BAR2 is 64 KiB of device memory that belongs to its state. In STOP, STOP_COPY, RESUMING and ERROR
/// both BARs read as ones and ignore writes, config space works as always. Data that does not load leaves it in ERROR,
/// which only a reset ends. An arc that a [`FaultPlan`] fails leaves it in the state before that arc.
#[derive(Debug)]
pub struct Stateful {
    pub(super) function: Function,
    memory_fd: std::os::fd::OwnedFd,
    memory: Mapping,
    pub(super) log_page_size: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default, Clone)]
struct Registers {
    doorbells: u32,
    target: u64,
    length: u32,
    pattern: u32,
    irq_enable: u32,
    pending: u32,
}

#[derive(Debug)]
pub(super) struct State {
    bus: Bus,
    registers: Registers,
    device_state: DeviceState,
    saving: Option<Saving>,
    loading: Option<Loading>,
    pub(super) log: Option<Log>,
}

impl Stateful {
    /// ENOMEM (Failed) when there is no memory for BAR2.
    pub fn new(options: StatefulOptions) -> Result<Arc<Self>> {
        let config = PciConfig::new(IDS, &BARS);
        let function = Function::new(options.name, IDS, &config, options.time, options.faults);
        let size = MEMORY_SIZE as u64;
        let no_memory = || function.failed("making device memory", Errno::NOMEM);
        let memory_fd = memfd("sim-stateful", size, Seal::Size).map_err(|_| no_memory())?;
        let memory = Mapping::new(&memory_fd, 0, size).map_err(|_| no_memory())?;
        let state = State {
            bus: Bus::new(config, Irqs::express(1), options.sleep),
            registers: Registers::default(),
            device_state: DeviceState::Running,
            saving: None,
            loading: None,
            log: None,
        };
        let log_page_size = options.log_page_size;
        Ok(Arc::new(Self { function, memory_fd, memory, log_page_size, state: Mutex::new(state) }))
    }

    /// Whether its dirty log has been started.
    pub fn is_logging(&self) -> bool {
        self.state().log.is_some()
    }

    /// Whether a saving or a resuming stream is open.
    pub fn is_streaming(&self) -> bool {
        let state = self.state();
        state.saving.is_some() || state.loading.is_some()
    }

    /// Whether any interrupt has an eventfd, or is enabled.
    pub fn is_armed(&self) -> bool {
        self.state().bus.irqs.is_armed()
    }

    /// Accesses that came to the suspended device, or were in flight when it was suspended: always 0, unless somebody did
    /// not keep them away.
    pub fn accesses_while_suspended(&self) -> u64 {
        self.function.watch.violations()
    }

    /// The kernel wants the device back (its REQ irq). False when nobody listens.
    pub fn raise_request(&self) -> bool {
        self.state().bus.irqs.raise_request()
    }

    /// The device reports an uncorrectable error (AER, its ERR irq). False when nobody listens.
    pub fn raise_error(&self) -> bool {
        self.state().bus.irqs.raise_error()
    }

    /// The first transfers, up to 1024, that were refused, in order.
    pub fn dma_faults(&self) -> Vec<DmaFault> {
        self.state().bus.dma.faults()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Performs kept doorbells. The lock is let go while a client is asked.
    fn perform_doorbells<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while let Some(mut transfer) = state.next_doorbell() {
            let mark = |state: &mut State, transfer: &Transfer| {
                if let Some(log) = &mut state.log {
                    transfer.written().iter().for_each(|(iova, length)| log.mark(*iova, *length));
                }
            };
            state = bus::transfer(state, || self.state(), |state| &mut state.bus, mark, &mut transfer);
            if state.registers.irq_enable != 0 {
                state.bus.irqs.send_msi(0);
            }
        }
        state
    }

    fn check_bar(&self, index: u32, offset: u64, length: usize) -> Result<()> {
        let bar = BARS.iter().find(|(bar, _)| *bar == index as usize);
        let (_, size) = bar.ok_or_else(|| self.function.refused(format!("access to region {index}"), Errno::INVAL))?;
        self.function.check(index, offset, length, u64::from(*size))?;
        if self.state().bus.memory_enabled() {
            return Ok(());
        }
        Err(self.function.failed("memory is disabled", Errno::IO))
    }

    fn memory_error(&self, error: crate::sys::MappingError) -> crate::device::DeviceError {
        self.function.failed(error.to_string(), Errno::IO)
    }
}

impl Registers {
    fn read(&self, offset: u64, width: usize) -> u64 {
        match (offset, width) {
            (regs::ID, 4) => u64::from(regs::ID_VALUE),
            (regs::DOORBELLS, 4) => u64::from(self.doorbells),
            (regs::TARGET, 4 | 8) => self.target,
            (0x0C, 4) => self.target >> 32,
            (regs::LENGTH, 4) => u64::from(self.length),
            (regs::PATTERN, 4) => u64::from(self.pattern),
            (regs::IRQ_ENABLE, 4) => u64::from(self.irq_enable),
            (regs::PENDING, 4) => u64::from(self.pending),
            _ => u64::MAX,
        }
    }

    /// Whether the write was a doorbell.
    fn write(&mut self, offset: u64, width: usize, value: u64) -> bool {
        match (offset, width) {
            (regs::TARGET, 8) => self.target = value,
            (regs::TARGET, 4) => self.target = self.target >> 32 << 32 | value,
            (0x0C, 4) => self.target = self.target & u64::from(u32::MAX) | value << 32,
            (regs::LENGTH, 4) => self.length = (value as u32).min(regs::LENGTH_MAX),
            (regs::PATTERN, 4) => self.pattern = value as u32,
            (regs::IRQ_ENABLE, 4) => self.irq_enable = value as u32 & 1,
            (regs::DOORBELL, 4) => {
                self.pending = (self.pending + 1).min(regs::PENDING_MAX);
                return true;
            }
            _ => {}
        }
        false
    }

    fn pack(&self) -> [u8; REGISTERS_PAYLOAD] {
        let mut bytes = [0; REGISTERS_PAYLOAD];
        bytes[..8].copy_from_slice(&self.target.to_le_bytes());
        let words = [self.doorbells, self.length, self.pattern, self.irq_enable, self.pending];
        for (slot, word) in bytes[8..].chunks_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn unpack(bytes: &[u8; REGISTERS_PAYLOAD]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self {
            target: u64::from(word(0)) | u64::from(word(4)) << 32,
            doorbells: word(8),
            length: word(12).min(regs::LENGTH_MAX),
            pattern: word(16),
            irq_enable: word(20) & 1,
            pending: word(24).min(regs::PENDING_MAX),
        }
    }
}

impl State {
    /// The BARs answer.
    fn responds(&self) -> bool {
        self.device_state.is_running()
    }

    /// The next kept doorbell, if there is one and the device may use the bus now.
    fn next_doorbell(&mut self) -> Option<Transfer> {
        if !matches!(self.device_state, DeviceState::Running | DeviceState::PreCopy) || self.registers.pending == 0 {
            return None;
        }
        self.registers.pending -= 1;
        self.registers.doorbells = self.registers.doorbells.wrapping_add(1);
        let word = regs::word(self.registers.pattern, self.registers.doorbells);
        let bytes = word.to_le_bytes().into_iter().cycle().take(self.registers.length as usize).collect();
        Some(Transfer::to_memory(self.registers.target, bytes))
    }

    /// One arc of the state machine.
    fn arc(&mut self, to: DeviceState, memory: &Mapping) -> std::result::Result<(), Errno> {
        use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
        match (self.device_state, to) {
            (Running, PreCopy) | (RunningP2p, PreCopyP2p) => self.saving = Some(Saving::begin(memory)?),
            (Stop, StopCopy) | (PreCopyP2p, StopCopy) => {
                let mut saving = match self.saving.take() {
                    Some(saving) => saving,
                    None => Saving::begin(memory)?,
                };
                saving.finish(memory, &self.registers.pack())?;
                self.saving = Some(saving);
            }
            (PreCopy, Running) | (PreCopyP2p, RunningP2p) | (StopCopy, Stop) => self.saving = None,
            (Stop, Resuming) => self.loading = Some(Loading::new()),
            (Resuming, Stop) => {
                // Taken first: whatever happens, the stream is over.
                let loading = self.loading.take().ok_or(Errno::IO)?;
                if let Err(errno) = self.load(&loading, memory) {
                    self.device_state = DeviceState::Error;
                    return Err(errno);
                }
            }
            _ => {}
        }
        self.device_state = to;
        Ok(())
    }

    fn load(&mut self, loading: &Loading, memory: &Mapping) -> std::result::Result<(), Errno> {
        let (bytes, registers) = loading.finish()?;
        memory.write(0, bytes).map_err(|_| Errno::IO)?;
        self.registers = Registers::unpack(registers);
        Ok(())
    }
}

impl Device for Stateful {
    fn identity(&self) -> &Identity {
        &self.function.identity
    }

    fn info(&self) -> DeviceInfo {
        let flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
        DeviceInfo { flags, num_regions: VFIO_PCI_NUM_REGIONS, num_irqs: NUM_IRQS }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo> {
        self.function.step("stateful region info")?;
        let info = plain_region(index, &BARS);
        let mut info = info.ok_or_else(|| self.function.refused(format!("region {index}"), Errno::INVAL))?;
        if index == MEMORY_BAR {
            info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
            info.capabilities.push(RegionCapability::SparseMmap(vec![MAPPABLE]));
        }
        Ok(info)
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        self.function.step("stateful irq info")?;
        let info = self.state().bus.irqs.info(index);
        info.map_err(|errno| self.function.refused(format!("irq index {index}"), errno))
    }

    fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let _access = self.function.access("stateful region read")?;
        if index == CONFIG_REGION {
            self.function.check(index, offset, data.len(), SIZE as u64)?;
            self.state().bus.config_read(offset, data);
            return Ok(());
        }
        self.check_bar(index, offset, data.len())?;
        let state = self.state();
        if !state.responds() {
            data.fill(0xFF);
        } else if index == MEMORY_BAR {
            self.memory.read(offset, data).map_err(|error| self.memory_error(error))?;
        } else {
            for (at, part) in Accesses::new(offset, data.len()) {
                let width = part.len();
                data[part].copy_from_slice(&state.registers.read(at, width).to_le_bytes()[..width]);
            }
        }
        Ok(())
    }

    fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        let _access = self.function.access("stateful region write")?;
        if index == CONFIG_REGION {
            self.function.check(index, offset, data.len(), SIZE as u64)?;
            self.state().bus.config_write(offset, data);
            return Ok(());
        }
        self.check_bar(index, offset, data.len())?;
        let mut state = self.state();
        if !state.responds() {
            return Ok(());
        }
        if index == MEMORY_BAR {
            return self.memory.write(offset, data).map_err(|error| self.memory_error(error));
        }
        for (at, part) in Accesses::new(offset, data.len()) {
            let mut value = [0; 8];
            let width = part.len();
            value[..width].copy_from_slice(&data[part]);
            if state.registers.write(at, width, u64::from_le_bytes(value)) {
                state = self.perform_doorbells(state);
            }
        }
        Ok(())
    }

    fn region_map(&self, index: u32, offset: u64, length: u64) -> Result<Arc<Mapping>> {
        let _access = self.function.access("stateful region map")?;
        let what = || format!("mapping {length} bytes at {offset:#x} of region {index}");
        if index != MEMORY_BAR {
            return Err(self.function.refused(what(), Errno::NODEV));
        }
        let end = offset.checked_add(length).filter(|end| *end <= MAPPABLE.offset + MAPPABLE.length);
        if offset < MAPPABLE.offset || end.is_none() || length == 0 || !offset.is_multiple_of(PAGE_SIZE) {
            return Err(self.function.refused(what(), Errno::INVAL));
        }
        let mapping = Mapping::new(&self.memory_fd, offset, length);
        Ok(Arc::new(mapping.map_err(|_| self.function.failed(what(), Errno::NOMEM))?))
    }

    fn region_file(&self, index: u32) -> Option<(BorrowedFd<'_>, u64)> {
        (index == MEMORY_BAR).then(|| (self.memory_fd.as_fd(), 0))
    }

    fn set_irqs(&self, request: &IrqSet<'_>) -> Result<()> {
        let _access = self.function.access("stateful set irqs")?;
        let done = self.state().bus.set_irqs(request);
        done.map_err(|errno| self.function.refused(format!("irq index {}", request.index), errno))
    }

    /// Registers and memory are zero, the state RUNNING, streams and logging gone, bus master off; maps and irqs stay.
    fn reset(&self) -> Result<()> {
        let _access = self.function.access("stateful reset")?;
        let mut state = self.state();
        state.registers = Registers::default();
        state.bus.config = PciConfig::new(IDS, &BARS);
        let msi = state.bus.irqs.msi_enabled();
        state.bus.config.set_msi_enabled(msi);
        state.bus.irqs.set_intx_disabled(false);
        (state.saving, state.loading, state.log) = (None, None, None);
        state.device_state = DeviceState::Running;
        self.memory.fill(0, MEMORY_SIZE as u64, 0).map_err(|error| self.memory_error(error))
    }

    fn dma_map(&self, map: &DmaMap) -> Result<()> {
        self.function.step("stateful dma map")?;
        let what = || format!("mapping {:#x} bytes at {:#x}", map.length, map.iova);
        self.state().bus.dma.map(map).map_err(|errno| self.function.refused(what(), errno))
    }

    fn dma_unmap(&self, iova: u64, length: u64) -> Result<()> {
        self.function.step("stateful dma unmap")?;
        let what = || format!("unmapping {length:#x} bytes at {iova:#x}");
        self.state().bus.dma.unmap(iova, length).map_err(|errno| self.function.refused(what(), errno))
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange { iova: 0, last: u64::MAX }]
    }

    fn probe_feature(&self, feature: Feature, access: FeatureAccess) -> bool {
        matches!(
            (feature, access),
            (Feature::MigDeviceState, _)
                | (Feature::Migration | Feature::MigDataSize | Feature::DmaLoggingReport, FeatureAccess::Get)
                | (Feature::DmaLoggingStart | Feature::DmaLoggingStop, FeatureAccess::Set)
        ) || is_low_power(feature, access) && self.state().bus.power.is_supported()
    }

    fn migration(&self) -> Option<&dyn NativeMigration> {
        Some(self)
    }

    fn dma_logging(&self) -> Option<&dyn NativeDmaLogging> {
        Some(self)
    }

    fn low_power_entry(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        self.function.step("stateful low power entry")?;
        let entered = self.state().bus.low_power_entry(&self.function.watch, wakeup);
        entered.map_err(|errno| self.function.refused("low power", errno))
    }

    /// Without power its registers and memory were lost.
    fn low_power_exit(&self) -> Result<()> {
        self.function.step("stateful low power exit")?;
        let mut state = self.state();
        let exited = state.bus.low_power_exit(&self.function.watch);
        if exited.map_err(|errno| self.function.refused("low power", errno))? {
            state.registers = Registers::default();
            self.memory.fill(0, MEMORY_SIZE as u64, 0).map_err(|error| self.memory_error(error))?;
        }
        Ok(())
    }

    fn power(&self) -> Result<Power> {
        Ok(self.state().bus.power.power())
    }

    fn clock(&self) -> &dyn Clock {
        self.function.time.clock()
    }
}

impl NativeMigration for Stateful {
    fn flags(&self) -> MigrationFlags {
        FLAGS
    }

    fn set_state(&self, target: DeviceState) -> Result<()> {
        let _access = self.function.access("stateful set state")?;
        let from = self.state().device_state;
        let arcs = path(from, target, FLAGS).map_err(|error| self.function.refused(error.to_string(), Errno::INVAL))?;
        for to in arcs {
            self.function.step("stateful arc")?;
            let mut state = self.state();
            let from = state.device_state;
            state.arc(to, &self.memory).map_err(|errno| self.function.failed(format!("{from} to {to}"), errno))?;
            drop(self.perform_doorbells(state));
        }
        Ok(())
    }

    fn state(&self) -> Result<DeviceState> {
        self.function.step("stateful state")?;
        Ok(Stateful::state(self).device_state)
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize> {
        let _access = self.function.access("stateful save")?;
        let mut state = Stateful::state(self);
        let no_stream = || self.function.refused("reading without a saving stream", Errno::INVAL);
        let saving = state.saving.as_mut().ok_or_else(no_stream)?;
        if saving.is_empty() && !saving.is_finished() {
            saving.queue_changes(&self.memory).map_err(|errno| self.function.failed("reading device memory", errno))?;
        }
        Ok(saving.take(buffer))
    }

    fn write(&self, data: &[u8]) -> Result<()> {
        let _access = self.function.access("stateful load")?;
        let mut state = Stateful::state(self);
        let no_stream = || self.function.refused("writing without a resuming stream", Errno::INVAL);
        let loading = state.loading.as_mut().ok_or_else(no_stream)?;
        loading.write(data).map_err(|errno| self.function.failed("device state that is not this device's", errno))
    }

    fn precopy_info(&self) -> Result<PrecopyInfo> {
        let _access = self.function.access("stateful precopy info")?;
        let state = Stateful::state(self);
        let saving = match (&state.saving, state.device_state) {
            (Some(saving), DeviceState::PreCopy | DeviceState::PreCopyP2p) => saving,
            _ => return Err(self.function.refused("pre-copy info outside pre-copy", Errno::INVAL)),
        };
        let remaining = saving.remaining(&self.memory);
        let (initial_bytes, dirty_bytes) =
            remaining.map_err(|errno| self.function.failed("reading device memory", errno))?;
        Ok(PrecopyInfo { initial_bytes, dirty_bytes })
    }

    fn stop_copy_bytes(&self) -> Result<u64> {
        self.function.step("stateful data size")?;
        Ok(FULL)
    }
}

#[cfg(all(test, not(loom)))]
#[path = "stateful_tests.rs"]
mod tests;
