//! A device and a plug-in whose every answer a test decides, and which notice what must not happen.
#![allow(dead_code, missing_debug_implementations)]

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_mediate::device::*;
use vfio_mediate::mediation::mediator::{
    ArcFailed, CallFrame, Claim, Event, ExtraIrq, ExtraRegion, HostCalls, IrqClaim, Mediator, MediatorDirty,
    MediatorMigration, MmapAnswer, PluginSummary, Verdict,
};
use vfio_mediate::mediation::{Exactness, MediatedDevice, Refusal, Remaining, Result as MediationResult, Saved};
use vfio_mediate::memory::{AddressSpace, GuestRam, IovaMapping};
use vfio_mediate::sys::{Mapping, Seal, memfd};
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

pub const PAGE: u64 = 4096;
pub const BAR: u64 = 16 * PAGE;
pub const COMMAND: u64 = 4;
pub const CONFIG: u32 = CONFIG_REGION;
const RW: u32 = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;

/// Region 0: a mappable BAR of 16 pages; region 1: one byte; region 7: configuration space with a power capability at 0x40.
/// Irq index 2: four MSI-X vectors.
/// Called with the name of each step that the device is about to take.
pub struct Watcher(pub Box<dyn Fn(&'static str) + Send + Sync>);

impl Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

#[derive(Debug)]
pub struct FakeDevice {
    /// What a mapping of the BAR shows
    pub memory: OwnedFd,
    pub watcher: OnceLock<Watcher>,
    pub identity: Identity,
    pub bar: Mutex<Vec<u8>>,
    pub config: Mutex<Vec<u8>>,
    pub sparse: Vec<Vec<Area>>,
    pub fds: Mutex<HashMap<u32, OwnedFd>>,
    pub maps: Mutex<Vec<DmaMap>>,
    /// Nothing may arrive while it is set
    pub forbidden: AtomicBool,
    /// Accesses of the BAR while forbidden, while memory is disabled or in low power
    pub violations: AtomicU64,
    /// Calls of each kind that fail
    pub failing: Mutex<HashMap<&'static str, (ErrorKind, Errno)>>,
    pub resets: AtomicU64,
    pub bar_writes: AtomicU64,
    pub native: Option<FakeNative>,
    pub logging: Option<FakeLogging>,
    pub slow: bool,
}

impl FakeDevice {
    pub fn new() -> Self {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0xcd, 0xab]);
        config[4] = 0x02;
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40] = 0x01;
        let identity = Identity {
            name: "fake".to_owned(),
            backend: Backend::Sim,
            vendor_id: 0x1234,
            device_id: 0xabcd,
            subsystem_vendor_id: 1,
            subsystem_device_id: 2,
            class_code: 0x020000,
            revision: 0,
            virtual_function: false,
            config: config.clone(),
        };
        Self {
            memory: memfd("fake", BAR, Seal::Size).unwrap(),
            watcher: OnceLock::new(),
            identity,
            bar: Mutex::new(vec![0; BAR as usize]),
            config: Mutex::new(config),
            sparse: Vec::new(),
            fds: Mutex::default(),
            maps: Mutex::default(),
            forbidden: AtomicBool::new(false),
            violations: AtomicU64::new(0),
            failing: Mutex::default(),
            resets: AtomicU64::new(0),
            bar_writes: AtomicU64::new(0),
            native: None,
            logging: None,
            slow: false,
        }
    }

    pub fn fail(&self, what: &'static str, kind: ErrorKind, errno: Errno) {
        self.failing.lock().unwrap().insert(what, (kind, errno));
    }

    pub fn heal(&self) {
        self.failing.lock().unwrap().clear();
    }

    fn step(&self, what: &'static str) -> Result<()> {
        vfio_mediate::lock_order::calling_out();
        if let Some(watcher) = self.watcher.get() {
            (watcher.0)(what);
        }
        match self.failing.lock().unwrap().get(what) {
            Some((kind, errno)) => {
                Err(DeviceError { kind: *kind, device: "fake".to_owned(), what: what.to_owned(), errno: *errno })
            }
            None => Ok(()),
        }
    }

    pub fn command(&self) -> u16 {
        let config = self.config.lock().unwrap();
        u16::from_le_bytes([config[4], config[5]])
    }

    fn watch(&self) {
        let disabled = {
            let config = self.config.lock().unwrap();
            config[4] & 2 == 0 || config[0x44] & 3 != 0
        };
        if disabled || self.forbidden.load(Ordering::SeqCst) {
            self.violations.fetch_add(1, Ordering::SeqCst);
        }
        if self.slow {
            std::thread::yield_now();
            if self.forbidden.load(Ordering::SeqCst) {
                self.violations.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    fn refused(&self, errno: Errno) -> DeviceError {
        DeviceError::refused("fake", "request", errno)
    }

    fn range(&self, offset: u64, length: usize, size: u64) -> Result<std::ops::Range<usize>> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= size => Ok(offset as usize..end as usize),
            _ => Err(self.refused(Errno::INVAL)),
        }
    }
}

impl Device for FakeDevice {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo { flags: VFIO_DEVICE_FLAGS_PCI, num_regions: PCI_NUM_REGIONS, num_irqs: 5 }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo> {
        self.step("region_info")?;
        let (flags, size) = match index {
            0 => (RW | VFIO_REGION_INFO_FLAG_MMAP, BAR),
            1 => (RW, 1),
            CONFIG_REGION => (RW, 256),
            8 => return Err(self.refused(Errno::INVAL)),
            2..=6 => (0, 0),
            _ => return Err(self.refused(Errno::INVAL)),
        };
        let sparse = if index == 0 { self.sparse.clone() } else { Vec::new() };
        let capabilities = sparse.into_iter().map(RegionCapability::SparseMmap).collect();
        Ok(RegionInfo { index, flags, size, capabilities })
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let count = if index == 2 { 4 } else { 0 };
        Ok(IrqInfo { index, flags: 1, count })
    }

    fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        match index {
            CONFIG_REGION => {
                self.step("config_read")?;
                let range = self.range(offset, data.len(), 256)?;
                data.copy_from_slice(&self.config.lock().unwrap()[range]);
            }
            0 => {
                self.watch();
                self.step("bar_read")?;
                let range = self.range(offset, data.len(), BAR)?;
                data.copy_from_slice(&self.bar.lock().unwrap()[range]);
            }
            1 => {
                self.watch();
                self.range(offset, data.len(), 1)?;
                data.fill(0x11);
            }
            _ => return Err(self.refused(Errno::INVAL)),
        }
        Ok(())
    }

    fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        match index {
            CONFIG_REGION => {
                self.step("config_write")?;
                let range = self.range(offset, data.len(), 256)?;
                self.config.lock().unwrap()[range].copy_from_slice(data);
            }
            0 => {
                self.watch();
                self.step("bar_write")?;
                self.bar_writes.fetch_add(1, Ordering::SeqCst);
                let range = self.range(offset, data.len(), BAR)?;
                self.bar.lock().unwrap()[range].copy_from_slice(data);
            }
            _ => return Err(self.refused(Errno::INVAL)),
        }
        Ok(())
    }

    fn region_map(&self, index: u32, offset: u64, length: u64) -> Result<Arc<Mapping>> {
        if index != 0 {
            return Err(self.refused(Errno::NODEV));
        }
        self.step("region_map")?;
        Ok(Arc::new(Mapping::new(&self.memory, offset, length).unwrap()))
    }

    fn set_irqs(&self, request: &IrqSet<'_>) -> Result<()> {
        self.step("set_irqs")?;
        let mut fds = self.fds.lock().unwrap();
        match request.data {
            IrqData::EventFd(new) => {
                for (vector, fd) in (request.start..).zip(new) {
                    match fd {
                        Some(fd) => drop(fds.insert(vector, fd.try_clone_to_owned().unwrap())),
                        None => drop(fds.remove(&vector)),
                    }
                }
            }
            IrqData::None if request.count == 0 => fds.clear(),
            _ => {}
        }
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        self.step("reset")?;
        self.forbidden.store(true, Ordering::SeqCst);
        std::thread::yield_now();
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.forbidden.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn dma_map(&self, map: &DmaMap) -> Result<()> {
        self.step("dma_map")?;
        self.maps.lock().unwrap().push(map.clone());
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, length: u64) -> Result<()> {
        self.step("dma_unmap")?;
        self.maps.lock().unwrap().retain(|map| map.iova < iova || map.iova >= iova + length);
        Ok(())
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange { iova: 0, last: (1 << 40) - 1 }]
    }

    fn probe_feature(&self, _feature: Feature, _access: FeatureAccess) -> bool {
        false
    }

    fn migration(&self) -> Option<&dyn NativeMigration> {
        self.native.as_ref().map(|native| native as _)
    }

    fn dma_logging(&self) -> Option<&dyn NativeDmaLogging> {
        self.logging.as_ref().map(|logging| logging as _)
    }

    fn clock(&self) -> &dyn Clock {
        &RealClock
    }
}

/// Native migration whose state is the bytes `native`.
#[derive(Debug)]
pub struct FakeNative {
    pub state: Mutex<DeviceState>,
    pub data: Mutex<Vec<u8>>,
    pub loaded: Mutex<Vec<u8>>,
    pub fail_to: Mutex<Option<(DeviceState, DeviceState)>>,
}

impl FakeNative {
    pub fn new(data: &[u8]) -> Self {
        Self {
            state: Mutex::new(DeviceState::Running),
            data: Mutex::new(data.to_vec()),
            loaded: Mutex::default(),
            fail_to: Mutex::default(),
        }
    }
}

impl NativeMigration for FakeNative {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags { p2p: true, pre_copy: true }
    }

    fn set_state(&self, target: DeviceState) -> Result<()> {
        if let Some((to, actual)) = *self.fail_to.lock().unwrap()
            && to == target
        {
            *self.state.lock().unwrap() = actual;
            return Err(DeviceError::failed("fake", "arc", Errno::IO));
        }
        *self.state.lock().unwrap() = target;
        Ok(())
    }

    fn state(&self) -> Result<DeviceState> {
        Ok(*self.state.lock().unwrap())
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize> {
        let mut data = self.data.lock().unwrap();
        let length = data.len().min(buffer.len()).min(3);
        buffer[..length].copy_from_slice(&data[..length]);
        data.drain(..length);
        Ok(length)
    }

    fn write(&self, data: &[u8]) -> Result<()> {
        self.loaded.lock().unwrap().extend_from_slice(data);
        Ok(())
    }

    fn precopy_info(&self) -> Result<PrecopyInfo> {
        Ok(PrecopyInfo { initial_bytes: 1, dirty_bytes: 2 })
    }

    fn stop_copy_bytes(&self) -> Result<u64> {
        Ok(self.data.lock().unwrap().len() as u64)
    }
}

/// DMA logging that reports the pages of `dirty`, by iova.
#[derive(Debug, Default)]
pub struct FakeLogging {
    pub started: Mutex<Option<Vec<IovaRange>>>,
    pub dirty: Mutex<Vec<u64>>,
    pub fail_start: AtomicBool,
    pub fail_report: AtomicBool,
    /// The page size granted; 0: as asked for
    pub granted: AtomicU64,
}

impl NativeDmaLogging for FakeLogging {
    fn start(&self, ranges: &[IovaRange], page_size: u64) -> Result<u64> {
        if self.fail_start.load(Ordering::SeqCst) {
            return Err(DeviceError::refused("fake", "logging", Errno::TOOBIG));
        }
        *self.started.lock().unwrap() = Some(ranges.to_vec());
        match self.granted.load(Ordering::SeqCst) {
            0 => Ok(page_size),
            granted => Ok(granted),
        }
    }

    fn report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<()> {
        self.dirty.lock().unwrap().retain(|iova| {
            let inside = range.iova <= *iova && *iova <= range.last;
            if inside {
                let page = (iova - range.iova) / page_size;
                bitmap[(page / 64) as usize] |= 1 << (page % 64);
            }
            !inside
        });
        // A destructive read that fails has taken the bits with it.
        match self.fail_report.load(Ordering::SeqCst) {
            true => Err(DeviceError::failed("fake", "report", Errno::IO)),
            false => Ok(()),
        }
    }

    fn stop(&self) -> Result<()> {
        *self.started.lock().unwrap() = None;
        Ok(())
    }
}

type Access = dyn Fn(&dyn HostCalls, usize, u64, &mut [u8]) -> Verdict + Send + Sync;

type EventHook = dyn Fn(&dyn HostCalls, Event) -> std::result::Result<(), Errno> + Send + Sync;

/// A plug-in's device as a test scripts it.
pub struct Script {
    pub calls: Arc<dyn HostCalls>,
    pub claims: Vec<Claim>,
    pub irq_claims: Vec<IrqClaim>,
    pub extra_regions: Vec<ExtraRegion>,
    pub extra_irqs: Vec<ExtraIrq>,
    pub read: Box<Access>,
    pub write: Box<Access>,
    pub info: Box<dyn Fn(&mut abi::RegionInfo) -> Verdict + Send + Sync>,
    pub stand_in: Box<dyn Fn() -> MmapAnswer + Send + Sync>,
    pub fired: Box<dyn Fn(u32) -> Verdict + Send + Sync>,
    pub set_irqs: Box<dyn Fn(u32, u32) -> Verdict + Send + Sync>,
    pub event: Box<EventHook>,
    pub migration: Option<ScriptMigration>,
    pub dirty: Option<ScriptDirty>,
    pub closed: Option<Arc<AtomicU64>>,
}

impl Script {
    pub fn new(calls: Arc<dyn HostCalls>) -> Self {
        Self {
            calls,
            claims: Vec::new(),
            irq_claims: Vec::new(),
            extra_regions: Vec::new(),
            extra_irqs: Vec::new(),
            read: Box::new(|_, _, _, _| Verdict::Forward),
            write: Box::new(|_, _, _, _| Verdict::Forward),
            info: Box::new(|_| Verdict::Forward),
            stand_in: Box::new(|| MmapAnswer::NotMapped),
            fired: Box::new(|_| Verdict::Forward),
            set_irqs: Box::new(|_, _| Verdict::Forward),
            event: Box::new(|_, _| Ok(())),
            migration: None,
            dirty: None,
            closed: None,
        }
    }
}

impl Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("claims", &self.claims).finish_non_exhaustive()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if let Some(closed) = &self.closed {
            closed.fetch_add(1, Ordering::SeqCst);
        }
    }
}

pub fn claim(region: u32, offset: u64, length: u64) -> Claim {
    Claim {
        region,
        offset,
        length,
        normal: true,
        tracking: true,
        has_rw: true,
        has_region_info: false,
        has_mmap: false,
    }
}

impl Mediator for Script {
    fn plugin(&self) -> PluginSummary {
        PluginSummary { name: "script".to_owned(), version: "1.0.0".to_owned(), path: "none".to_owned() }
    }

    fn claims(&self) -> &[Claim] {
        &self.claims
    }

    fn irq_claims(&self) -> &[IrqClaim] {
        &self.irq_claims
    }

    fn extra_regions(&self) -> &[ExtraRegion] {
        &self.extra_regions
    }

    fn extra_irqs(&self) -> &[ExtraIrq] {
        &self.extra_irqs
    }

    fn read(&self, claim: usize, _frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        (self.read)(&*self.calls, claim, offset, data)
    }

    fn write(&self, claim: usize, _frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        (self.write)(&*self.calls, claim, offset, data)
    }

    fn extra_read(&self, index: usize, _region: u32, _frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        (self.read)(&*self.calls, 1000 + index, offset, data)
    }

    fn extra_write(&self, index: usize, _region: u32, _frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        (self.write)(&*self.calls, 1000 + index, offset, data)
    }

    fn region_info(&self, _claim: usize, _frame: CallFrame<'_>, info: &mut abi::RegionInfo) -> Verdict {
        (self.info)(info)
    }

    fn mmap(&self, _claim: usize, _frame: CallFrame<'_>, _offset: u64, _length: u64) -> MmapAnswer {
        (self.stand_in)()
    }

    fn extra_mmap(&self, _: usize, _: u32, _: CallFrame<'_>, _: u64, _: u64) -> MmapAnswer {
        (self.stand_in)()
    }

    fn irq_info(&self, _claim: usize, _frame: CallFrame<'_>, info: &mut abi::IrqInfo) -> Verdict {
        info.count = 2;
        Verdict::Handled
    }

    fn set_irqs(&self, _claim: usize, _frame: CallFrame<'_>, request: &IrqSet<'_>) -> Verdict {
        (self.set_irqs)(request.start, request.count)
    }

    fn fired(&self, _claim: usize, _frame: CallFrame<'_>, _index: u32, vector: u32) -> Verdict {
        (self.fired)(vector)
    }

    fn event(&self, _frame: CallFrame<'_>, event: Event) -> std::result::Result<(), Errno> {
        (self.event)(&*self.calls, event)
    }

    fn migration(&self) -> Option<Box<dyn MediatorMigration + '_>> {
        self.migration.as_ref().map(|migration| Box::new(migration) as _)
    }

    fn dirty(&self) -> Option<Box<dyn MediatorDirty + '_>> {
        self.dirty.as_ref().map(|dirty| Box::new(dirty) as _)
    }
}

/// A plug-in's migration whose state is the bytes of `data`.
#[derive(Default)]
pub struct ScriptMigration {
    pub data: Mutex<Vec<u8>>,
    pub loaded: Arc<Mutex<Vec<u8>>>,
    pub arcs: Arc<Mutex<Vec<(DeviceState, DeviceState)>>>,
    pub fail: Arc<Mutex<Option<(DeviceState, ArcFailed)>>>,
    pub on_arc: Option<Box<dyn Fn() + Send + Sync>>,
    pub refuse: Option<String>,
}

impl MediatorMigration for &ScriptMigration {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags { p2p: true, pre_copy: true }
    }

    fn match_data(&self, _frame: CallFrame<'_>) -> std::result::Result<Vec<u8>, Errno> {
        Ok(b"match".to_vec())
    }

    fn check_match(&self, _frame: CallFrame<'_>, data: &[u8]) -> std::result::Result<(), Refusal> {
        match &self.refuse {
            Some(reason) => Err(Refusal { reason: reason.clone(), errno: Errno::NODEV }),
            None if data == b"match" => Ok(()),
            None => Err(Refusal { reason: format!("{data:?}"), errno: Errno::NODEV }),
        }
    }

    fn set_state(
        &self,
        _frame: CallFrame<'_>,
        from: DeviceState,
        to: DeviceState,
    ) -> std::result::Result<(), ArcFailed> {
        if let Some(on_arc) = &self.on_arc {
            on_arc();
        }
        if let Some((at, failed)) = *self.fail.lock().unwrap()
            && at == to
        {
            return Err(failed);
        }
        self.arcs.lock().unwrap().push((from, to));
        Ok(())
    }

    fn save(&self, _frame: CallFrame<'_>, buffer: &mut [u8]) -> std::result::Result<Saved, Errno> {
        let mut data = self.data.lock().unwrap();
        let bytes = data.len().min(buffer.len()).min(5);
        buffer[..bytes].copy_from_slice(&data[..bytes]);
        data.drain(..bytes);
        Ok(Saved { bytes, end: data.is_empty() })
    }

    fn load(&self, _frame: CallFrame<'_>, data: &[u8]) -> std::result::Result<(), Errno> {
        self.loaded.lock().unwrap().extend_from_slice(data);
        Ok(())
    }

    fn remaining(&self, _frame: CallFrame<'_>) -> std::result::Result<Remaining, Errno> {
        Ok(Remaining { initial_bytes: 10, dirty_bytes: 20, stop_copy_bytes: u64::MAX })
    }
}

type Report = dyn Fn(u64, &mut [u64]) -> std::result::Result<(), Errno> + Send + Sync;

pub struct ScriptDirty {
    pub start: Box<dyn Fn() -> std::result::Result<(), Errno> + Send + Sync>,
    pub report: Box<Report>,
    pub stopped: Arc<AtomicU64>,
}

impl Default for ScriptDirty {
    fn default() -> Self {
        Self { start: Box::new(|| Ok(())), report: Box::new(|_, _| Ok(())), stopped: Arc::default() }
    }
}

impl MediatorDirty for &ScriptDirty {
    fn exactness(&self) -> Exactness {
        Exactness::Superset
    }

    fn start(&self, _: CallFrame<'_>, _: &[abi::IovaRange], _: u64) -> std::result::Result<(), Errno> {
        (self.start)()
    }

    fn report(&self, _: CallFrame<'_>, iova: u64, _: u64, _: u64, words: &mut [u64]) -> std::result::Result<(), Errno> {
        (self.report)(iova, words)
    }

    fn stop(&self, _: CallFrame<'_>) {
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

pub fn space() -> Arc<AddressSpace> {
    AddressSpace::new(GuestRam::new(256 * PAGE).unwrap())
}

pub fn map(iova: u64, pages: u64, ram_offset: u64) -> IovaMapping {
    IovaMapping { iova, length: pages * PAGE, ram_offset, read: true, write: true }
}

pub fn open_script(device: &Arc<FakeDevice>, script: impl FnOnce(&mut Script)) -> MediationResult<Arc<MediatedDevice>> {
    MediatedDevice::with_mediator(device.clone(), space(), Default::default(), |calls| {
        let mut made = Script::new(calls);
        script(&mut made);
        Ok(Some(Box::new(made)))
    })
}

pub fn open_plain(device: &Arc<FakeDevice>) -> Arc<MediatedDevice> {
    MediatedDevice::with_mediator(device.clone(), space(), Default::default(), |_| Ok(None)).unwrap()
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// An eventfd, and its number in the kernel, by which one sees whether any copy of it is open.
pub fn tell_tale() -> (u64, OwnedFd) {
    let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    (eventfd_id(&fd.as_raw_fd().to_string()).unwrap(), fd)
}

/// Whether this process holds no copy of it any more.
pub fn is_abandoned(id: &u64) -> bool {
    let open = std::fs::read_dir("/proc/self/fdinfo").unwrap();
    !open.filter_map(|file| eventfd_id(file.unwrap().file_name().to_str()?)).any(|other| other == *id)
}

fn eventfd_id(fd: &str) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    info.lines().find_map(|line| line.strip_prefix("eventfd-id:"))?.trim().parse().ok()
}

pub fn set_fd<'a>(start: u32, fds: &'a [Option<std::os::fd::BorrowedFd<'a>>]) -> IrqSet<'a> {
    let data = IrqData::EventFd(fds);
    IrqSet { index: 2, start, count: fds.len() as u32, action: IrqAction::Trigger, data }
}

pub fn borrow(fd: &OwnedFd) -> Option<std::os::fd::BorrowedFd<'_>> {
    Some(fd.as_fd())
}
