//! Devices over memory that their clients bring: DMA, dirty reports, and a client who is lost.

mod mediation_support;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::device::sim::{DmaFaultKind, Edu, EduOptions, Stateful, StatefulOptions, Time, VirtualClock, regs};
use vfio_mediate::device::{Backend, IrqAction, IrqData, IrqSet};
use vfio_mediate::mediation::{MediatedDevice, Tracking};
use vfio_mediate::memory::{AddressSpace, ClientAccess, ClientMap, ClientSource};
use vfio_mediate::plugin::Registry;
use vfio_mediate::sys::{Mapping, Seal, memfd};
use vfio_mediate_sdk::state::DeviceState;

const IOVA: u64 = 0x20_0000;
const BUFFER: u64 = 0x4_0000;
const DMA_TIME: Duration = Duration::from_millis(100);

fn space() -> Arc<AddressSpace> {
    AddressSpace::of_clients(1 << 30)
}

fn pages(count: u64, seals: Seal) -> OwnedFd {
    memfd("client", count * PAGE, seals).unwrap()
}

fn file(fd: &OwnedFd, iova: u64, pages: u64, offset: u64) -> ClientMap {
    let source = ClientSource::File { fd: fd.try_clone().unwrap(), offset };
    ClientMap { iova, length: pages * PAGE, read: true, write: true, source }
}

fn seen(fd: &OwnedFd, offset: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    rustix::io::pread(fd, &mut bytes, offset).unwrap();
    bytes
}

/// A client that is asked for its memory. While it is, it looks at the device, as a VMM's other thread does.
#[derive(Debug)]
struct Client {
    memory: Mapping,
    first: u64,
    asked: AtomicU64,
    gone: AtomicBool,
    device: OnceLock<Weak<MediatedDevice>>,
}

impl Client {
    fn new(first: u64, count: u64) -> Arc<Self> {
        let memory = Mapping::new(pages(count, Seal::Size), 0, count * PAGE).unwrap();
        Arc::new(Self {
            memory,
            first,
            asked: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            device: OnceLock::new(),
        })
    }

    fn map(self: &Arc<Self>) -> ClientMap {
        let source = ClientSource::Messages(Arc::clone(self) as _);
        ClientMap { iova: self.first, length: self.memory.len(), read: true, write: true, source }
    }

    fn asked(&self) -> Result<(), Errno> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            device.region_read(CONFIG, 0, &mut [0; 4]).map_err(|error| error.errno())?;
        }
        if self.gone.load(Ordering::SeqCst) { Err(Errno::NOTCONN) } else { Ok(()) }
    }
}

impl ClientAccess for Client {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.asked()?;
        self.memory.read(iova - self.first, data).map_err(|_| Errno::FAULT)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.asked()?;
        self.memory.write(iova - self.first, data).map_err(|_| Errno::FAULT)
    }
}

struct Host {
    clock: Arc<VirtualClock>,
    edu: Arc<Edu>,
    device: Arc<MediatedDevice>,
}

impl Host {
    fn new(memory: &Arc<AddressSpace>) -> Self {
        let clock = VirtualClock::new();
        let edu = Edu::new(EduOptions { time: Time::Virtual(clock.clone()), ..EduOptions::default() }).unwrap();
        let device = MediatedDevice::open(edu.clone(), &Registry::new(), Arc::clone(memory)).unwrap();
        device.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
        Self { clock, edu, device }
    }

    fn wide(&self, register: u64, value: u64) {
        self.device.region_write(0, register, &value.to_le_bytes()).unwrap();
    }

    fn start(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.wide(0x80, source);
        self.wide(0x88, destination);
        self.wide(0x90, count);
        self.wide(0x98, command);
    }

    fn dma(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.start(source, destination, count, command);
        self.clock.advance(DMA_TIME);
    }

    fn is_busy(&self) -> bool {
        let mut command = [0; 8];
        self.device.region_read(0, 0x98, &mut command).unwrap();
        command[0] & 1 != 0
    }
}

/// spec: VFU-70
#[test]
fn a_simulated_device_reaches_files_sealed_or_not() {
    for seals in [Seal::Size, Seal::Open] {
        let host = Host::new(&space());
        let fd = pages(4, seals);
        host.device.dma_map_client(file(&fd, IOVA, 3, PAGE)).unwrap();
        rustix::io::pwrite(&fd, b"frommemy", 2 * PAGE).unwrap();
        host.dma(IOVA + PAGE, BUFFER, 8, 1);
        host.dma(BUFFER, IOVA + 3 * PAGE - 8, 8, 3);
        assert_eq!(&seen(&fd, 4 * PAGE - 8), b"frommemy");
        host.device.dma_unmap(IOVA, 3 * PAGE).unwrap();
        host.dma(BUFFER, IOVA, 8, 3);
        assert_eq!(seen(&fd, PAGE), [0; 8]);
        assert_eq!(host.edu.dma_faults()[0].kind, DmaFaultKind::Unmapped);
        assert!(host.device.memory().mappings().is_empty());
    }
}

/// spec: VFU-75
#[test]
fn a_simulated_device_asks_a_client_with_nothing_of_its_own_locked() {
    let host = Host::new(&space());
    let client = Client::new(IOVA, 2);
    let fd = pages(1, Seal::Size);
    client.device.set(Arc::downgrade(&host.device)).unwrap();
    host.device.dma_map_client(client.map()).unwrap();
    host.device.dma_map_client(file(&fd, IOVA + 2 * PAGE, 1, 0)).unwrap();
    client.memory.write(2 * PAGE - 4, b"abcd").unwrap();
    rustix::io::pwrite(&fd, b"efgh", 0).unwrap();
    host.dma(IOVA + 2 * PAGE - 4, BUFFER, 8, 1);
    assert_eq!(&host.edu.hidden_buffer()[..8], b"abcdefgh");
    host.dma(BUFFER, IOVA, 8, 3);
    let mut bytes = [0; 8];
    client.memory.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"abcdefgh");
    assert_eq!(client.asked.load(Ordering::SeqCst), 2);
    assert!(!host.is_busy() && host.edu.dma_faults().is_empty());
    client.gone.store(true, Ordering::SeqCst);
    host.dma(BUFFER, IOVA, 8, 3);
    assert!(!host.is_busy());
    assert_eq!(host.edu.dma_faults()[0].kind, DmaFaultKind::Unmapped);
}

/// spec: VFU-75
#[test]
fn a_doorbells_dma_by_messages_is_written_and_logged() {
    let client = Client::new(IOVA, 8);
    let (_device, mediated) = stateful(&space());
    client.device.set(Arc::downgrade(&mediated)).unwrap();
    mediated.dma_map_client(client.map()).unwrap();
    assert_eq!(mediated.start_tracking().unwrap(), Tracking::Native);
    ring(&mediated, IOVA + 5 * PAGE, 4, 40);
    let mut word = [0; 4];
    client.memory.read(5 * PAGE, &mut word).unwrap();
    assert_eq!(u32::from_le_bytes(word), regs::word(40, 1));
    assert_eq!(report(&mediated, IOVA, 8), [5]);
}

/// spec: VFU-73
#[test]
fn a_file_cut_off_under_a_devices_dma_is_a_fault_of_the_device() {
    let host = Host::new(&space());
    let fd = pages(4, Seal::Open);
    host.device.dma_map_client(file(&fd, IOVA, 4, 0)).unwrap();
    host.start(BUFFER, IOVA + 2 * PAGE, 8, 3);
    rustix::fs::ftruncate(&fd, PAGE).unwrap();
    host.clock.advance(DMA_TIME);
    host.dma(IOVA + 3 * PAGE, BUFFER, 8, 1);
    assert_eq!(host.edu.dma_faults().len(), 2);
    assert!(!host.is_busy());
    host.dma(BUFFER, IOVA, 8, 3);
    assert_eq!(host.edu.dma_faults().len(), 2, "what is there is still reached");
}

/// spec: VFU-74
#[test]
fn devices_of_one_vm_share_what_their_clients_bring() {
    let memory = space();
    let (one, other) = (Host::new(&memory), Host::new(&memory));
    let (fd, foreign) = (pages(4, Seal::Size), pages(4, Seal::Size));
    one.device.dma_map_client(file(&fd, IOVA, 4, 0)).unwrap();
    let refused = other.device.dma_map_client(file(&foreign, IOVA, 4, 0)).unwrap_err();
    assert_eq!(refused.errno(), Errno::EXIST);
    assert!(refused.to_string().contains("other memory"), "{refused}");
    other.device.dma_map_client(file(&fd, IOVA, 4, 0)).unwrap();
    assert_eq!(other.device.dma_map_client(file(&fd, IOVA, 4, 0)).unwrap_err().errno(), Errno::EXIST);
    one.device.client_lost().unwrap();
    assert_eq!(memory.mappings().len(), 1);
    rustix::io::pwrite(&fd, b"bothofus", 0).unwrap();
    other.dma(IOVA, BUFFER, 8, 1);
    assert_eq!(&other.edu.hidden_buffer()[..8], b"bothofus");
    drop(other);
    assert!(memory.mappings().is_empty(), "a device that is closed leaves its maps");
}

/// spec: VFU-74
#[test]
fn a_client_cannot_cover_a_plug_ins_memory() {
    let device = Arc::new(FakeDevice::new());
    let calls = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&calls);
    let mediated = MediatedDevice::with_mediator(device.clone(), space(), Default::default(), |services| {
        *kept.lock().unwrap() = Some(services.clone());
        Ok(Some(Box::new(Script::new(services))))
    })
    .unwrap();
    let services = calls.lock().unwrap().clone().unwrap();
    let scratch = services.scratch_alloc(PAGE, 32).unwrap();
    let fd = pages(4, Seal::Size);
    let over = mediated.dma_map_client(file(&fd, scratch.iova - PAGE, 3, 0)).unwrap_err();
    assert_eq!(over.errno(), Errno::EXIST);
    assert!(mediated.memory().mappings().is_empty());
    mediated.dma_map_client(file(&fd, scratch.iova - 4 * PAGE, 4, 0)).unwrap();
    // Hooks reach it.
    services.guest_write(scratch.iova - PAGE, b"hook").unwrap();
    assert_eq!(&seen(&fd, 3 * PAGE)[..4], b"hook");
    services.guest_read(scratch.iova, &mut [0]).unwrap_err();
    // Of the services that outlive the device nobody asks here.
    drop(services);
    *calls.lock().unwrap() = None;
}

/// spec: VFU-79
#[test]
fn a_real_device_gets_no_memory_without_a_file_but_a_rom_may_stand_there() {
    let mut device = FakeDevice::new();
    device.identity.backend = Backend::VfioCdev;
    let device = Arc::new(device);
    let mediated = MediatedDevice::with_mediator(device.clone(), space(), Default::default(), |_| Ok(None)).unwrap();
    let rom = Client::new(0xfffc_0000, 64);
    mediated.dma_map_client(rom.map()).unwrap();
    assert!(device.maps.lock().unwrap().is_empty(), "the device cannot reach it");
    mediated.memory().write(0xfffc_0000, b"rom").unwrap();
    assert_eq!(rom.asked.load(Ordering::SeqCst), 1);
    for (count, fits) in [(256, true), (257, false)] {
        let ram = Client::new(IOVA, count);
        match mediated.dma_map_client(ram.map()) {
            Ok(()) => assert!(fits),
            Err(error) => {
                assert!(!fits);
                assert_eq!(error.errno(), Errno::OPNOTSUPP);
                assert!(error.to_string().contains("memory-backend-memfd"), "{error}");
            }
        }
        let _unmapped = mediated.dma_unmap(IOVA, count * PAGE);
    }
    let fd = pages(300, Seal::Size);
    mediated.dma_map_client(file(&fd, IOVA, 300, 0)).unwrap();
    {
        let maps = device.maps.lock().unwrap();
        assert_eq!(maps.len(), 1);
        assert_eq!((maps[0].iova, maps[0].length, maps[0].offset), (IOVA, 300 * PAGE, 0));
        assert!(maps[0].memory.mapping().is_some(), "something to pin");
    }
    mediated.dma_unmap(0, u64::MAX).unwrap();
    assert!(mediated.memory().mappings().is_empty() && device.maps.lock().unwrap().is_empty());
}

#[test]
fn a_device_that_refuses_a_clients_map_leaves_nothing_behind() {
    let device = Arc::new(FakeDevice::new());
    let memory = space();
    let mediated =
        MediatedDevice::with_mediator(device.clone(), Arc::clone(&memory), Default::default(), |_| Ok(None)).unwrap();
    device.fail("dma_map", vfio_mediate::device::ErrorKind::Refused, Errno::NOMEM);
    let fd = pages(1, Seal::Open);
    assert_eq!(mediated.dma_map_client(file(&fd, IOVA, 1, 0)).unwrap_err().errno(), Errno::NOMEM);
    assert!(memory.mappings().is_empty());
    device.heal();
    mediated.dma_map_client(file(&fd, IOVA, 1, 0)).unwrap();
}

fn stateful(memory: &Arc<AddressSpace>) -> (Arc<Stateful>, Arc<MediatedDevice>) {
    let options = StatefulOptions { time: Time::Virtual(VirtualClock::new()), ..StatefulOptions::default() };
    let device = Stateful::new(options).unwrap();
    let mediated = MediatedDevice::open(device.clone(), &Registry::new(), Arc::clone(memory)).unwrap();
    mediated.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
    (device, mediated)
}

fn ring(mediated: &MediatedDevice, target: u64, length: u32, pattern: u32) {
    mediated.region_write(0, regs::TARGET, &target.to_le_bytes()).unwrap();
    mediated.region_write(0, regs::LENGTH, &length.to_le_bytes()).unwrap();
    mediated.region_write(0, regs::PATTERN, &pattern.to_le_bytes()).unwrap();
    mediated.region_write(0, regs::DOORBELL, &1u32.to_le_bytes()).unwrap();
}

/// Bits of a report of 4096-byte pages that is committed.
fn report(mediated: &MediatedDevice, iova: u64, count: u64) -> Vec<u64> {
    let mut bitmap = vec![0; count.div_ceil(8) as usize];
    mediated.dirty_report(iova, count * PAGE, PAGE, &mut bitmap).unwrap().commit();
    set(&bitmap)
}

fn set(bitmap: &[u8]) -> Vec<u64> {
    (0..bitmap.len() as u64 * 8).filter(|bit| bitmap[(bit / 8) as usize] >> (bit % 8) & 1 != 0).collect()
}

/// spec: VFU-76
#[test]
fn reports_are_of_any_range_begin_clean_and_can_be_taken_back() {
    let (_device, mediated) = stateful(&space());
    let fd = pages(64, Seal::Open);
    mediated.dma_map_client(file(&fd, IOVA, 32, 0)).unwrap();
    // A hole of 16 pages
    mediated.dma_map_client(file(&fd, IOVA + 48 * PAGE, 32, 32 * PAGE)).unwrap();
    let mut bitmap = [0; 16];
    let refused = mediated.dirty_report(IOVA, PAGE, PAGE, &mut bitmap).unwrap_err();
    assert_eq!(refused.errno(), Errno::INVAL, "nobody tracks");
    ring(&mediated, IOVA, 4, 1);
    mediated.start_tracking().unwrap();
    assert!(report(&mediated, 0, 1000).is_empty(), "it begins clean");
    ring(&mediated, IOVA + 31 * PAGE - 2, 4, 1);
    ring(&mediated, IOVA + 50 * PAGE, 3 * PAGE as u32, 1);
    mediated.memory().write(IOVA + 79 * PAGE, b"hook").unwrap();
    // Dropped: a reply that was not sent.
    for _ in 0..2 {
        bitmap.fill(0);
        let taken = mediated.dirty_report(IOVA, 80 * PAGE, PAGE, &mut bitmap).unwrap();
        assert_eq!(set(&bitmap), [30, 31, 50, 51, 52, 79]);
        assert_eq!(taken.count(), 6);
        drop(taken);
    }
    // Coarser, from below the first map to beyond the last; and not what lies outside.
    bitmap.fill(0);
    drop(mediated.dirty_report(IOVA - 4 * PAGE, 84 * PAGE, 16 * PAGE, &mut bitmap).unwrap());
    assert_eq!(set(&bitmap), [2, 3, 5]);
    assert_eq!(report(&mediated, IOVA + 31 * PAGE, 20), [0, 19]);
    assert_eq!(report(&mediated, IOVA, 80), [30, 51, 52, 79]);
    assert!(report(&mediated, IOVA, 80).is_empty());
    mediated.stop_tracking();
    // What was not told by then is not told any more.
    mediated.start_tracking().unwrap();
    ring(&mediated, IOVA, 4, 1);
    mediated.stop_tracking();
    mediated.start_tracking().unwrap();
    assert!(report(&mediated, IOVA, 80).is_empty());
}

/// spec: VFU-77
#[test]
fn an_unmap_tells_what_was_written_last() {
    let (_device, mediated) = stateful(&space());
    let fd = pages(64, Seal::Size);
    mediated.dma_map_client(file(&fd, IOVA, 16, 0)).unwrap();
    let mut bitmap = [0; 2];
    let refused = mediated.dma_unmap_dirty(IOVA, 16 * PAGE, PAGE, &mut bitmap).unwrap_err();
    assert_eq!((refused.errno(), mediated.memory().mappings().len()), (Errno::INVAL, 1), "nobody tracks");
    mediated.start_tracking().unwrap();
    ring(&mediated, IOVA + 7 * PAGE, 4, 1);
    mediated.memory().write(IOVA + 15 * PAGE, b"hook").unwrap();
    for (page_size, room) in [(PAGE, 1), (PAGE / 2, 2), (3 * PAGE, 2)] {
        let refused = mediated.dma_unmap_dirty(IOVA, 16 * PAGE, page_size, &mut bitmap[..room]).unwrap_err();
        assert_eq!((refused.errno(), mediated.memory().mappings().len()), (Errno::INVAL, 1));
    }
    let cut = mediated.dma_unmap_dirty(IOVA, 15 * PAGE, PAGE, &mut bitmap).unwrap_err();
    assert_eq!((cut.errno(), bitmap), (Errno::INVAL, [0; 2]));
    mediated.dma_unmap_dirty(IOVA, 16 * PAGE, PAGE, &mut bitmap).unwrap().commit();
    assert_eq!(set(&bitmap), [7, 15]);
    assert!(mediated.memory().mappings().is_empty());
    assert!(report(&mediated, IOVA, 16).is_empty(), "what is not mapped reads as clean");
    // In the middle of tracking: unknown is dirty.
    mediated.dma_map_client(file(&fd, IOVA + (1 << 30), 2, 0)).unwrap();
    assert_eq!(report(&mediated, IOVA + (1 << 30), 8), [0, 1]);
}

/// spec: VFU-77
#[test]
fn an_unmap_that_was_not_told_leaves_its_dirt_to_the_other_device() {
    let memory = space();
    let ((_one, first), (_other, second)) = (stateful(&memory), stateful(&memory));
    let fd = pages(16, Seal::Size);
    for mediated in [&first, &second] {
        mediated.dma_map_client(file(&fd, IOVA, 16, 0)).unwrap();
        mediated.start_tracking().unwrap();
    }
    ring(&first, IOVA + 3 * PAGE, 4, 1);
    let mut bitmap = [0; 2];
    drop(first.dma_unmap_dirty(IOVA, 16 * PAGE, PAGE, &mut bitmap).unwrap());
    assert_eq!(set(&bitmap), [3]);
    first.stop_tracking();
    assert_eq!(report(&second, IOVA, 16), [3]);
}

/// spec: VFU-77
#[test]
fn a_device_that_nobody_tracks_is_dirty_where_it_may_write() {
    let host = Host::new(&space());
    let fd = pages(8, Seal::Size);
    host.device.dma_map_client(file(&fd, IOVA, 4, 0)).unwrap();
    let rom = ClientMap { write: false, ..file(&fd, IOVA + 4 * PAGE, 4, 4 * PAGE) };
    host.device.dma_map_client(rom).unwrap();
    assert_eq!(host.device.start_tracking().unwrap(), Tracking::Everything);
    assert_eq!(report(&host.device, IOVA, 8), [0, 1, 2, 3]);
    assert_eq!(report(&host.device, IOVA + 2 * PAGE, 8), [0, 1]);
}

/// spec: VFU-78
#[test]
fn a_dma_that_was_under_way_does_not_write_after_its_client_is_lost() {
    for seals in [Seal::Size, Seal::Open] {
        let host = Host::new(&space());
        let fd = pages(4, seals);
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        host.device.dma_map_client(file(&fd, IOVA, 4, 0)).unwrap();
        let fds = [borrow(&event)];
        let data = IrqData::EventFd(&fds);
        host.device.set_irqs(&IrqSet { index: 1, start: 0, count: 1, action: IrqAction::Trigger, data }).unwrap();
        rustix::io::pwrite(&fd, b"original", 0).unwrap();
        host.dma(IOVA, BUFFER, 8, 1);
        rustix::io::pwrite(&fd, &[0; 8], 0).unwrap();
        // With an interrupt at its end
        host.start(BUFFER, IOVA, 8, 7);
        assert!(host.is_busy());
        host.device.client_lost().unwrap();
        host.clock.advance(2 * DMA_TIME);
        assert_eq!(seen(&fd, 0), [0; 8]);
        assert!(host.device.memory().mappings().is_empty());
        assert_eq!(host.edu.dma_faults()[0].kind, DmaFaultKind::BusMasterOff);
        assert_eq!(rustix::io::read(&event, &mut [0; 8]), Err(Errno::AGAIN), "his eventfd is nobody's");
        let mut command = [0; 2];
        host.device.region_read(CONFIG, COMMAND, &mut command).unwrap();
        assert_eq!(command, [2, 0], "memory is enabled as before, bus mastering is not");
        // The next one finds the buffer, brings memory of his own to the same place, and turns the bus on.
        let next = pages(4, seals);
        host.device.dma_map_client(file(&next, IOVA, 4, 0)).unwrap();
        host.device.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
        host.dma(BUFFER, IOVA, 8, 3);
        assert_eq!((&seen(&next, 0), seen(&fd, 0)), (b"original", [0; 8]));
        // Again, and with nothing to do.
        host.device.client_lost().unwrap();
        host.device.client_lost().unwrap();
    }
}

/// spec: VFU-78
#[test]
fn a_lost_client_leaves_his_dirt_and_the_devices_state() {
    let memory = space();
    let ((device, mediated), (_other, witness)) = (stateful(&memory), stateful(&memory));
    let fd = pages(16, Seal::Size);
    for mediated in [&mediated, &witness] {
        mediated.dma_map_client(file(&fd, IOVA, 16, 0)).unwrap();
        mediated.start_tracking().unwrap();
    }
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let fds = [borrow(&event)];
    let data = IrqData::EventFd(&fds);
    mediated.set_irqs(&IrqSet { index: 1, start: 0, count: 1, action: IrqAction::Trigger, data }).unwrap();
    let irq_enable = 1u32.to_le_bytes();
    mediated.region_write(0, regs::IRQ_ENABLE, &irq_enable).unwrap();
    ring(&mediated, IOVA + 9 * PAGE, 4, 77);
    mediated.set_state(DeviceState::StopCopy, soon()).unwrap();
    mediated.client_lost().unwrap();
    assert!(!device.is_logging() && !mediated.is_tracking());
    assert_eq!(mediated.state(), DeviceState::StopCopy);
    assert!(memory.log().is_tracking(), "the other client's goes on");
    assert_eq!(report(&witness, IOVA, 16), [9]);
    mediated.set_state(DeviceState::Running, soon()).unwrap();
    let _heard = rustix::io::read(&event, &mut [0; 8]).unwrap();
    ring(&mediated, IOVA, 4, 77);
    assert_eq!(rustix::io::read(&event, &mut [0; 8]), Err(Errno::AGAIN), "his eventfd is nobody's");
    assert!(device.dma_faults().iter().all(|fault| fault.kind == DmaFaultKind::BusMasterOff));
    let mut pattern = [0; 4];
    mediated.region_read(0, regs::PATTERN, &mut pattern).unwrap();
    assert_eq!(u32::from_le_bytes(pattern), 77);
    witness.client_lost().unwrap();
    assert!(!memory.log().is_tracking());
}

/// spec: VFU-78
#[test]
fn whatever_fails_when_a_client_is_lost_the_rest_is_done() {
    let device = Arc::new(FakeDevice::new());
    let memory = space();
    let mediated =
        MediatedDevice::with_mediator(device.clone(), Arc::clone(&memory), Default::default(), |_| Ok(None)).unwrap();
    let fd = pages(4, Seal::Open);
    for at in 0..4 {
        mediated.dma_map_client(file(&fd, IOVA + 2 * at * PAGE, 1, at * PAGE)).unwrap();
    }
    mediated.fail(Errno::IO);
    // It refuses everything, and lets go of the memory all the same.
    mediated.client_lost().unwrap();
    assert!(memory.mappings().is_empty() && device.maps.lock().unwrap().is_empty());
}

/// spec: VFU-78
#[test]
fn a_device_that_does_not_unmap_keeps_its_map_until_it_is_asked_again() {
    let device = Arc::new(FakeDevice::new());
    let memory = space();
    let mediated =
        MediatedDevice::with_mediator(device.clone(), Arc::clone(&memory), Default::default(), |_| Ok(None)).unwrap();
    let fd = pages(4, Seal::Open);
    mediated.dma_map_client(file(&fd, IOVA, 4, 0)).unwrap();
    mediated.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
    device.fail("dma_unmap", vfio_mediate::device::ErrorKind::Failed, Errno::IO);
    assert_eq!(mediated.client_lost().unwrap_err().errno(), Errno::IO);
    assert_eq!((memory.mappings().len(), device.command() & 4), (1, 0));
    device.heal();
    mediated.client_lost().unwrap();
    assert!(memory.mappings().is_empty() && device.maps.lock().unwrap().is_empty());
}
