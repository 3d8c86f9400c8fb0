//! Two hosts, a guest and a link, all in one thread and one virtual time; everything may fail where it is told to.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use vfio_mediate::migration::driver::{
    DestinationHost, DestinationShape, DirtyDrain, HostError, OfferedDevice, Remaining, Saved, SourceHost, SourceOffer,
    Time,
};
use vfio_mediate::migration::report::DeviceReport;
use vfio_mediate::migration::wire::{DeviceOffer, MemoryCopier, PAGE_SIZE};
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags, path};

pub const PAGES: u64 = 70;
const PAGE: usize = PAGE_SIZE as usize;

/// Splitmix64: small, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[derive(Debug, Default)]
pub struct VirtualTime(pub AtomicU64);

impl Time for VirtualTime {
    fn now_us(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How the next operation of a host fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpFault {
    /// It did not happen
    Refused,
    /// It happened half: a device is in ERROR, a VMM paused and yet an error
    Half,
}

#[derive(Debug)]
struct Device {
    flags: MigrationFlags,
    state: DeviceState,
    /// The guest has set it to work: it counts, and writes its count to guest memory
    programmed: bool,
    count: u64,
    /// State bytes loaded so far
    loaded: Vec<u8>,
    /// Saved in this stream: bytes of pre-copy, bytes of stop-copy
    saved: usize,
    pre_copied: bool,
    /// Pages written and not yet reported
    dirty: Vec<u64>,
}

#[derive(Debug)]
struct Inner {
    ram: Vec<u8>,
    log: Vec<u64>,
    tracking: bool,
    running: bool,
    devices: Vec<Device>,
    fault: Option<OpFault>,
    crashed: bool,
    /// A broken tracker: what the guest writes is not logged
    forgetful: bool,
    /// The log as it was when tracking stopped
    last_log: Option<Vec<u64>>,
}

/// One host.
#[derive(Debug)]
pub struct SimHost(Mutex<Inner>);

/// What the guest should see, wherever it runs.
#[derive(Debug, Clone)]
pub struct Truth {
    pub ram: Vec<u8>,
    counts: Vec<u64>,
}

/// A snapshot that goes back unless committed.
#[derive(Debug)]
struct SimDrain<'a> {
    host: &'a SimHost,
    words: Vec<u64>,
    committed: bool,
}

impl DirtyDrain for SimDrain<'_> {
    fn words(&self) -> &[u64] {
        &self.words
    }

    fn commit(mut self: Box<Self>) {
        self.committed = true;
    }
}

impl Drop for SimDrain<'_> {
    fn drop(&mut self) {
        if !self.committed {
            let mut inner = self.host.inner();
            inner.log.iter_mut().zip(&self.words).for_each(|(log, word)| *log |= word);
        }
    }
}

/// State of a device as bytes: long enough to need several chunks of a small buffer.
fn state_bytes(count: u64) -> Vec<u8> {
    count.to_le_bytes().into_iter().cycle().take(40).collect()
}

impl SimHost {
    /// `guest`: with a running guest and working devices, or empty.
    pub fn new(flags: &[MigrationFlags], guest: bool) -> Self {
        let device = |flags: &MigrationFlags| Device {
            flags: *flags,
            state: DeviceState::Running,
            programmed: guest,
            count: 0,
            loaded: Vec::new(),
            saved: 0,
            pre_copied: false,
            dirty: Vec::new(),
        };
        Self(Mutex::new(Inner {
            ram: vec![0; PAGES as usize * PAGE],
            log: vec![0; PAGES.div_ceil(64) as usize],
            tracking: false,
            running: guest,
            devices: flags.iter().map(device).collect(),
            fault: None,
            crashed: false,
            forgetful: false,
            last_log: None,
        }))
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn truth(&self) -> Truth {
        let inner = self.inner();
        Truth { ram: inner.ram.clone(), counts: inner.devices.iter().map(|device| device.count).collect() }
    }

    pub fn arm(&self, fault: OpFault) {
        self.inner().fault = Some(fault);
    }

    pub fn disarm(&self) {
        self.inner().fault = None;
    }

    /// From now on writes of the guest are not logged.
    pub fn forget(&self) {
        self.inner().forgetful = true;
    }

    /// The process is gone, and with it memory, devices and guest.
    pub fn crash(&self) {
        let mut inner = self.inner();
        inner.crashed = true;
        inner.running = false;
        inner.devices.iter_mut().for_each(|device| device.programmed = false);
    }

    pub fn is_crashed(&self) -> bool {
        self.inner().crashed
    }

    /// Whether the guest executes here.
    pub fn runs(&self) -> bool {
        self.inner().running
    }

    /// Whether a device works for the guest here.
    pub fn device_runs(&self) -> bool {
        self.inner().devices.iter().any(|device| device.programmed && device.state.is_running())
    }

    /// Guest and devices do some work, here if they run here; checked against the truth before.
    pub fn work(&self, random: &mut Random, truth: &mut Truth) {
        let mut inner = self.inner();
        let Inner { ram, log, tracking, running, devices, forgetful, .. } = &mut *inner;
        if *running {
            assert_eq!(ram[..8], truth.ram[..8], "the guest goes on with an old heartbeat");
            let beat = u64::from_le_bytes(ram[..8].try_into().expect("8 bytes")) + 1;
            let page = 1 + random.below(PAGES - 1 - devices.len() as u64) as usize;
            let at = page * PAGE + random.below(PAGE as u64) as usize;
            // Half of the writes make a page zero again.
            let value = if random.below(2) == 0 { 0 } else { random.next() as u8 };
            for memory in [&mut *ram, &mut truth.ram] {
                memory[..8].copy_from_slice(&beat.to_le_bytes());
                if value == 0 {
                    memory[page * PAGE..(page + 1) * PAGE].fill(0);
                }
                memory[at] = value;
            }
            if *tracking && !*forgetful {
                log[0] |= 1;
                log[page / 64] |= 1 << (page % 64);
            }
        }
        for (index, device) in devices.iter_mut().enumerate() {
            if !device.programmed || !device.state.is_running() {
                continue;
            }
            assert_eq!(device.count, truth.counts[index], "device {index} goes on from an old state");
            device.count += 1;
            truth.counts[index] += 1;
            let page = PAGES as usize - 1 - index;
            for memory in [&mut *ram, &mut truth.ram] {
                memory[page * PAGE..page * PAGE + 8].copy_from_slice(&device.count.to_le_bytes());
            }
            device.dirty.push(page as u64);
        }
    }

    /// The whole guest is as it should be, devices in `lost` excepted.
    pub fn assert_truth(&self, truth: &Truth, lost: &[usize]) {
        let inner = self.inner();
        for page in 0..PAGES as usize {
            let at = page * PAGE..(page + 1) * PAGE;
            assert!(inner.ram[at.clone()] == truth.ram[at], "page {page} differs from the truth");
        }
        for (index, device) in inner.devices.iter().enumerate().filter(|(index, _)| !lost.contains(index)) {
            assert_eq!(device.count, truth.counts[index], "device {index}");
        }
    }

    /// Tracking has just stopped on a guest that goes on here: every page that was not dirty then is in `peer`'s memory
    /// as it is here. (Nothing works between that step and this check.)
    pub fn assert_no_dirt_lost(&self, peer: &Self) {
        let Some(log) = self.inner().last_log.take() else { return };
        if !self.runs() || peer.is_crashed() {
            return;
        }
        let (here, there) = (self.inner(), peer.inner());
        for page in 0..PAGES as usize {
            let known = log[page / 64] >> (page % 64) & 1 == 1;
            let at = page * PAGE..(page + 1) * PAGE;
            assert!(known || here.ram[at.clone()] == there.ram[at], "page {page} is neither dirty nor at the peer");
        }
    }

    /// Takes a fault for this operation, if one is armed.
    fn fault(&self, what: &str) -> Result<(), String> {
        match self.inner().fault.take() {
            Some(fault) => Err(format!("injected {fault:?} at {what}")),
            None => Ok(()),
        }
    }

    fn change(&self, device: usize, target: DeviceState) -> Result<(), HostError> {
        let mut inner = self.inner();
        let fault = inner.fault.take();
        let subject = &mut inner.devices[device];
        let error = |what: String| HostError::Device { device, what };
        match fault {
            Some(OpFault::Refused) => return Err(error(format!("injected at {target}"))),
            Some(OpFault::Half) => {
                subject.state = DeviceState::Error;
                return Err(error(format!("injected at {target}: ERROR")));
            }
            None => {}
        }
        for step in path(subject.state, target, subject.flags).map_err(|no_path| error(no_path.to_string()))? {
            if subject.state == DeviceState::Resuming {
                let count = subject.loaded.get(..8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
                let count = count.filter(|count| subject.loaded == state_bytes(*count));
                subject.count = count.ok_or_else(|| error(format!("bad state: {:?}", subject.loaded)))?;
                subject.programmed = true;
            }
            if !subject.state.is_saving() && step.is_saving() {
                subject.saved = 0;
                subject.pre_copied = false;
            }
            if step == DeviceState::Resuming {
                subject.loaded.clear();
            }
            subject.state = step;
        }
        Ok(())
    }

    fn read(&self, first: u64, data: &mut [u8]) -> Result<(), HostError> {
        self.fault("read_pages").map_err(HostError::Memory)?;
        let at = first as usize * PAGE;
        data.copy_from_slice(&self.inner().ram[at..at + data.len()]);
        Ok(())
    }

    fn report(index: usize) -> DeviceReport {
        DeviceReport { name: format!("sim{index}"), ..DeviceReport::default() }
    }
}

impl SourceHost for SimHost {
    fn describe(&self) -> Result<SourceOffer, HostError> {
        self.fault("describe").map_err(HostError::Refused)?;
        let inner = self.inner();
        let devices = inner.devices.iter().enumerate().map(|(index, device)| OfferedDevice {
            offer: DeviceOffer {
                name: format!("sim{index}").into(),
                flags: device.flags.raw(),
                match_data: b"sim".as_slice().into(),
            },
            flags: device.flags,
            report: Self::report(index),
        });
        Ok(SourceOffer { copier: MemoryCopier::Host, pages: PAGES, devices: devices.collect() })
    }

    fn start_tracking(&self) -> Result<(), HostError> {
        self.fault("start_tracking").map_err(HostError::Memory)?;
        let mut inner = self.inner();
        inner.tracking = true;
        for page in 0..PAGES {
            inner.log[(page / 64) as usize] |= 1 << (page % 64);
        }
        Ok(())
    }

    fn stop_tracking(&self) {
        let mut inner = self.inner();
        if !std::mem::take(&mut inner.tracking) {
            return;
        }
        let mut log = inner.log.clone();
        for page in inner.devices.iter().flat_map(|device| &device.dirty) {
            log[(page / 64) as usize] |= 1 << (page % 64);
        }
        inner.last_log = Some(log);
    }

    fn sync_dirty(&self) -> Result<(), HostError> {
        self.fault("sync_dirty").map_err(HostError::Memory)?;
        let mut inner = self.inner();
        let Inner { devices, log, .. } = &mut *inner;
        for page in devices.iter_mut().flat_map(|device| device.dirty.drain(..)) {
            log[(page / 64) as usize] |= 1 << (page % 64);
        }
        Ok(())
    }

    fn dirty_pages(&self) -> u64 {
        self.inner().log.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn drain(&self) -> Result<Box<dyn DirtyDrain + '_>, HostError> {
        self.fault("drain").map_err(HostError::Memory)?;
        let mut inner = self.inner();
        let empty = vec![0; inner.log.len()];
        let words = std::mem::replace(&mut inner.log, empty);
        Ok(Box::new(SimDrain { host: self, words, committed: false }))
    }

    fn read_pages(&self, first: u64, data: &mut [u8]) -> Result<(), HostError> {
        self.read(first, data)
    }

    fn set_state(&self, device: usize, target: DeviceState, _: u64) -> Result<(), HostError> {
        self.change(device, target)
    }

    fn restore(&self, device: usize, target: DeviceState, _: u64) -> Result<(), HostError> {
        self.change(device, target)
    }

    fn save(&self, device: usize, buffer: &mut [u8]) -> Result<Saved, HostError> {
        let failed = |what| HostError::Device { device, what };
        self.fault("save").map_err(failed)?;
        let mut inner = self.inner();
        let subject = &mut inner.devices[device];
        match subject.state {
            // Pre-copy brings an empty prefix once: the format is one stream.
            DeviceState::PreCopy => {
                subject.pre_copied = true;
                Ok(Saved { bytes: 0, end: true })
            }
            DeviceState::StopCopy => {
                let state = state_bytes(subject.count);
                let rest = &state[subject.saved..];
                let bytes = rest.len().min(16).min(buffer.len());
                buffer[..bytes].copy_from_slice(&rest[..bytes]);
                subject.saved += bytes;
                Ok(Saved { bytes, end: subject.saved == state.len() })
            }
            state => Err(failed(format!("save in {state}"))),
        }
    }

    fn remaining(&self, device: usize) -> Result<Remaining, HostError> {
        self.fault("remaining").map_err(|what| HostError::Device { device, what })?;
        let subject = &self.inner().devices[device];
        let initial = u64::from(subject.flags.pre_copy && !subject.pre_copied);
        Ok(Remaining { initial_bytes: initial, stop_copy_bytes: Some(40) })
    }

    fn pause(&self, _: u64) -> Result<(), HostError> {
        let mut inner = self.inner();
        match inner.fault.take() {
            Some(OpFault::Refused) => return Err(HostError::Vmm("injected: does not pause".into())),
            Some(OpFault::Half) => {
                inner.running = false;
                return Err(HostError::Vmm("injected: pauses, and says that it did not".into()));
            }
            None => inner.running = false,
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), HostError> {
        self.fault("resume").map_err(HostError::Vmm)?;
        self.inner().running = true;
        Ok(())
    }
}

impl DestinationHost for SimHost {
    fn shape(&self) -> Result<DestinationShape, HostError> {
        self.fault("shape").map_err(HostError::Refused)?;
        let inner = self.inner();
        let devices = inner.devices.iter().enumerate().map(|(index, device)| (device.flags, Self::report(index)));
        Ok(DestinationShape { copier: MemoryCopier::Host, pages: PAGES, fresh: true, devices: devices.collect() })
    }

    fn check_match(&self, _: usize, offer: &DeviceOffer<'_>) -> Result<(), String> {
        self.fault("check_match")?;
        if offer.match_data.as_ref() == b"sim" { Ok(()) } else { Err("not a sim".into()) }
    }

    fn set_state(&self, device: usize, target: DeviceState, _: u64) -> Result<(), HostError> {
        self.change(device, target)
    }

    fn discard(&self, device: usize) -> Result<(), HostError> {
        let mut inner = self.inner();
        inner.devices[device].state = DeviceState::Running;
        inner.devices[device].programmed = false;
        match inner.fault.take() {
            Some(_) => Err(HostError::Device { device, what: "injected at discard".into() }),
            None => Ok(()),
        }
    }

    fn load(&self, device: usize, data: &[u8]) -> Result<(), HostError> {
        self.fault("load").map_err(|what| HostError::Device { device, what })?;
        self.inner().devices[device].loaded.extend_from_slice(data);
        Ok(())
    }

    fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), HostError> {
        self.fault("write_pages").map_err(HostError::Memory)?;
        let at = first as usize * PAGE;
        self.inner().ram[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero_pages(&self, first: u64, count: u64) -> Result<(), HostError> {
        self.fault("zero_pages").map_err(HostError::Memory)?;
        let at = first as usize * PAGE..(first + count) as usize * PAGE;
        self.inner().ram[at].fill(0);
        Ok(())
    }

    fn read_pages(&self, first: u64, data: &mut [u8]) -> Result<(), HostError> {
        self.read(first, data)
    }

    fn resume(&self) -> Result<(), HostError> {
        self.fault("resume").map_err(HostError::Vmm)?;
        self.inner().running = true;
        Ok(())
    }
}
