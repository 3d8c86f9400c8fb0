use std::os::fd::AsFd;

use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::device::sim::Fault;
use crate::device::{DeviceError, ErrorKind, IrqAction, IrqData};

const IOVA: u64 = 0x1_0000;

struct Rig {
    device: Arc<Stateful>,
    ram: Arc<Mapping>,
    faults: Arc<FaultPlan>,
}

/// 64 pages at [`IOVA`], bus master on.
fn rig() -> Rig {
    let faults = FaultPlan::none();
    let options = StatefulOptions { faults: Arc::clone(&faults), ..StatefulOptions::default() };
    let device = Stateful::new(options).unwrap();
    let fd = memfd("stateful-test", 64 * PAGE_SIZE, Seal::Size).unwrap();
    let ram = Arc::new(Mapping::new(&fd, 0, 64 * PAGE_SIZE).unwrap());
    let (length, memory) = (64 * PAGE_SIZE, Arc::clone(&ram));
    device.dma_map(&DmaMap { iova: IOVA, length, memory: memory.into(), offset: 0, read: true, write: true }).unwrap();
    device.region_write(CONFIG_REGION, 4, &[0x06, 0]).unwrap();
    Rig { device, ram, faults }
}

impl Rig {
    fn get(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.device.region_read(0, register, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn set(&self, register: u64, value: u32) {
        self.device.region_write(0, register, &value.to_le_bytes()).unwrap();
    }

    fn doorbell(&self, target: u64, length: u32, pattern: u32) {
        self.device.region_write(0, regs::TARGET, &target.to_le_bytes()).unwrap();
        self.set(regs::LENGTH, length);
        self.set(regs::PATTERN, pattern);
        self.set(regs::DOORBELL, 1);
    }

    fn ram_word(&self, offset: u64) -> u32 {
        self.ram.load_u32(offset, std::sync::atomic::Ordering::Relaxed).unwrap()
    }

    fn go(&self, state: DeviceState) {
        self.device.set_state(state).unwrap();
        assert_eq!(self.device_state(), state);
    }

    fn device_state(&self) -> DeviceState {
        NativeMigration::state(&*self.device).unwrap()
    }

    /// The rest of the stream, read in pieces of 1000 bytes.
    fn save(&self) -> Vec<u8> {
        let mut stream = Vec::new();
        let mut buffer = [0; 1000];
        loop {
            match self.device.read(&mut buffer).unwrap() {
                0 => return stream,
                count => stream.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn load(&self, stream: &[u8], piece: usize) -> Result<()> {
        stream.chunks(piece).try_for_each(|piece| self.device.write(piece))
    }

    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY_SIZE];
        self.device.memory.read(0, &mut bytes).unwrap();
        bytes
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> (ErrorKind, Errno) {
    let DeviceError { kind, errno, .. } = result.unwrap_err();
    (kind, errno)
}

const REFUSED: (ErrorKind, Errno) = (ErrorKind::Refused, Errno::INVAL);

#[test]
fn a_doorbell_writes_memory_and_sends_an_msi_when_asked() {
    let rig = rig();
    let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let fds = [Some(fd.as_fd())];
    let (action, data) = (IrqAction::Trigger, IrqData::EventFd(&fds));
    rig.device.set_irqs(&IrqSet { index: 1, start: 0, count: 1, action, data }).unwrap();
    assert_eq!(rig.get(regs::ID), regs::ID_VALUE);
    rig.doorbell(IOVA + 4096, 12, 100);
    assert_eq!([4092, 4096, 4104, 4108].map(|offset| rig.ram_word(offset)), [0, 101, 101, 0]);
    rig.set(regs::IRQ_ENABLE, 1);
    rig.doorbell(IOVA, 4, 100);
    assert_eq!((rig.ram_word(0), rig.get(regs::DOORBELLS)), (102, 2));
    let mut count = [0; 8];
    rustix::io::read(&fd, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    rig.set(regs::LENGTH, u32::MAX);
    assert_eq!(rig.get(regs::LENGTH), regs::LENGTH_MAX);
    rig.doorbell(0, 4, 0);
    assert_eq!(rig.device.dma_faults().len(), 1);
}

#[test]
fn memory_can_be_mapped_except_its_first_page() {
    let rig = rig();
    let info = rig.device.region_info(2).unwrap();
    assert_eq!(info.capabilities, [RegionCapability::SparseMmap(vec![MAPPABLE])]);
    assert_eq!(info.flags & VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_MMAP);
    let end = MEMORY_SIZE as u64;
    for (offset, length) in [(0, 4096), (0, end), (4096, end), (4097, 4096), (4096, 0), (end, 4096), (4096, u64::MAX)] {
        assert_eq!(kind(rig.device.region_map(2, offset, length)), REFUSED, "{offset:#x} {length:#x}");
    }
    assert_eq!(kind(rig.device.region_map(0, 0, 4096)), (ErrorKind::Refused, Errno::NODEV));
    let map = rig.device.region_map(2, 4096, end - 4096).unwrap();
    map.write(0, b"mapped").unwrap();
    let mut seen = [0; 6];
    rig.device.region_read(2, 4096, &mut seen).unwrap();
    assert_eq!(&seen, b"mapped");
}

/// spec: SIM-30
#[test]
fn state_moves_through_pre_copy_while_memory_changes() {
    let (source, destination) = (rig(), rig());
    source.doorbell(IOVA, 8, 7);
    source.device.region_write(2, 0, &[1; 9000]).unwrap();
    source.go(PreCopy);
    let info = source.device.precopy_info().unwrap();
    let first_copy = 8 + 16 * (8 + 4 + 4096);
    assert_eq!(info, PrecopyInfo { initial_bytes: first_copy, dirty_bytes: 0 });
    let mut stream = source.save();
    assert_eq!(stream.len() as u64, first_copy);
    assert_eq!(source.device.precopy_info().unwrap(), PrecopyInfo { initial_bytes: 0, dirty_bytes: 0 });
    // Changes through the mmap and through the region, while the device goes on working.
    let map = source.device.region_map(2, 4096, 4096).unwrap();
    map.write(100, &[2]).unwrap();
    source.device.region_write(2, 65535, &[3]).unwrap();
    source.doorbell(IOVA, 8, 7);
    assert_eq!(source.device.precopy_info().unwrap(), PrecopyInfo { initial_bytes: 0, dirty_bytes: 2 * 4108 });
    stream.extend(source.save());
    map.write(101, &[4]).unwrap();
    source.go(StopCopy);
    assert_eq!(kind(source.device.precopy_info()), REFUSED);
    stream.extend(source.save());
    assert_eq!(source.device.read(&mut [0; 10]).unwrap(), 0);
    source.go(Stop);

    destination.go(Resuming);
    destination.load(&stream, 777).unwrap();
    destination.go(Running);
    assert_eq!(destination.memory(), source.memory());
    assert_eq!(destination.get(regs::DOORBELLS), 2);
    destination.set(regs::DOORBELL, 1);
    assert_eq!(destination.ram_word(0), regs::word(7, 3));
}

#[test]
fn state_moves_by_stop_copy_alone_in_single_bytes() {
    let (source, destination) = (rig(), rig());
    source.device.region_write(2, 12345, &[9; 100]).unwrap();
    source.go(StopCopy);
    let stream = source.save();
    assert_eq!(stream.len() as u64, source.device.stop_copy_bytes().unwrap());
    destination.go(Resuming);
    destination.load(&stream, 1).unwrap();
    destination.go(Stop);
    assert_eq!(destination.memory(), source.memory());
}

/// spec: SIM-31
#[test]
fn no_dma_leaves_a_device_that_is_quiescent_or_stopped_and_none_is_forgotten() {
    let (source, destination) = (rig(), rig());
    source.doorbell(IOVA, 4, 10);
    source.go(RunningP2p);
    source.set(regs::DOORBELL, 1);
    source.set(regs::DOORBELL, 1);
    assert_eq!((source.ram_word(0), source.get(regs::PENDING)), (11, 2));
    source.go(StopCopy);
    // A stopped device reads as ones and ignores writes; config space answers.
    source.set(regs::DOORBELL, 1);
    source.device.region_write(2, 0, &[1]).unwrap();
    assert_eq!((source.get(regs::PENDING), source.memory()[0]), (u32::MAX, 0));
    let mut id = [0; 2];
    source.device.region_read(CONFIG_REGION, 0, &mut id).unwrap();
    assert_eq!(id, [0x34, 0x12]);
    let stream = source.save();
    destination.go(Resuming);
    destination.load(&stream, 4096).unwrap();
    destination.go(RunningP2p);
    assert_eq!(destination.ram_word(0), 0);
    destination.go(Running);
    assert_eq!((source.ram_word(0), destination.ram_word(0)), (11, 13));
    // Going back instead performs them at the source.
    source.go(Running);
    assert_eq!(source.ram_word(0), 13);
}

/// spec: SIM-32
#[test]
fn data_that_does_not_load_leaves_the_device_in_error_until_a_reset() {
    let source = rig();
    source.go(StopCopy);
    let good = source.save();
    let mut streams = vec![Vec::new(), good[..good.len() - 1].to_vec(), [good.clone(), vec![0]].concat()];
    for at in [0, 4, 8, 12, 16, 20, good.len() - 1, good.len() - 12, good.len() - 5000] {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        streams.push(bad);
    }
    // A huge length is refused when it is read, not believed.
    streams.push([&good[..12], &u32::MAX.to_le_bytes(), &good[16..]].concat());
    for stream in streams {
        let device = rig();
        device.device.region_write(2, 0, b"before").unwrap();
        device.go(Resuming);
        let loaded = device.load(&stream, 512);
        let finished = device.device.set_state(Stop);
        assert!(loaded.is_err() || finished.is_err());
        assert_eq!(device.device_state(), Error);
        assert_eq!(&device.memory()[..6], b"before");
        assert_eq!(kind(device.device.set_state(Running)), REFUSED);
        device.device.reset().unwrap();
        assert_eq!((device.device_state(), device.memory()[0]), (Running, 0));
    }
}

#[test]
fn states_that_no_path_reaches_are_refused_and_streams_end_with_their_states() {
    let rig = rig();
    assert_eq!(kind(rig.device.set_state(Error)), REFUSED);
    assert_eq!(kind(rig.device.read(&mut [0; 1])), REFUSED);
    assert_eq!(kind(rig.device.write(&[0])), REFUSED);
    rig.go(PreCopyP2p);
    rig.go(Running);
    assert_eq!(kind(rig.device.read(&mut [0; 1])), REFUSED);
    rig.go(StopCopy);
    assert_eq!(kind(rig.device.set_state(PreCopy)), REFUSED);
    assert_eq!(rig.device_state(), StopCopy);
    rig.go(Resuming);
    assert_eq!(kind(rig.device.read(&mut [0; 1])), REFUSED);
    rig.device.reset().unwrap();
    assert_eq!(kind(rig.device.write(&[0])), REFUSED);
    assert_eq!(rig.device_state(), Running);
}

/// spec: SIM-33
#[test]
fn an_arc_that_fails_leaves_the_state_before_it() {
    // PRE_COPY to RESUMING: RUNNING, RUNNING_P2P, STOP, RESUMING.
    let expected = [PreCopy, PreCopy, Running, RunningP2p, Stop];
    for (step, state) in expected.into_iter().enumerate() {
        let rig = rig();
        rig.go(PreCopy);
        rig.faults.add(rig.faults.steps() + step as u64, Fault::Errno(Errno::IO));
        assert_eq!(kind(rig.device.set_state(Resuming)), (ErrorKind::Failed, Errno::IO));
        assert_eq!(rig.device_state(), state);
        assert_eq!(rig.faults.injected(), 1);
    }
}

/// spec: SIM-34
#[test]
fn logging_reports_the_pages_that_were_written_once_each() {
    let rig = rig();
    let log: &dyn NativeDmaLogging = &*rig.device;
    let range = |first: u64, last: u64| IovaRange { iova: IOVA + first * 4096, last: IOVA + last * 4096 - 1 };
    assert_eq!(log.start(&[range(0, 8), range(16, 64)], 4096).unwrap(), 4096);
    rig.doorbell(IOVA + 4095, 2, 0);
    rig.doorbell(IOVA + 7 * 4096, 8192, 0);
    rig.doorbell(IOVA + 63 * 4096 + 4095, 1, 0);
    let report = |range, page_size| {
        let mut words = [1 << 40];
        log.report(range, page_size, &mut words).map(|()| words[0] & !(1 << 40))
    };
    assert_eq!(report(range(0, 8), 4096).unwrap(), 0b1000_0011);
    assert_eq!(report(range(0, 8), 4096).unwrap(), 0);
    assert_eq!(report(range(60, 64), 8192).unwrap(), 0b10);
    // Page 8 was written outside the ranges, where nobody knows.
    assert_eq!(kind(report(range(8, 9), 4096)), REFUSED);
    assert_eq!(kind(report(range(0, 9), 4096)), REFUSED);
    // A failed report has destroyed what it read.
    rig.doorbell(IOVA, 1, 0);
    rig.faults.add_next(Fault::Errno(Errno::IO));
    assert_eq!(kind(report(range(0, 8), 4096)), (ErrorKind::Failed, Errno::IO));
    assert_eq!(report(range(0, 8), 4096).unwrap(), 0);
    log.stop().unwrap();
    assert_eq!(kind(log.stop()), REFUSED);
    assert_eq!(kind(report(range(0, 8), 4096)), REFUSED);
}

#[test]
fn logging_refuses_what_the_kernel_refuses() {
    let rig = rig();
    let log: &dyn NativeDmaLogging = &*rig.device;
    let range = |iova, last| IovaRange { iova, last };
    let many = |count: u64| (0..count).map(|at| range(at * 8192, at * 8192 + 4095)).collect::<Vec<_>>();
    assert_eq!(kind(log.start(&many(257), 4096)).1, Errno::TOOBIG);
    for (ranges, page_size) in [
        (vec![], 4096),
        (vec![range(0, 4095)], 2048),
        (vec![range(0, 4095)], 4097),
        (vec![range(1, 4095)], 4096),
        (vec![range(0, 4094)], 4096),
        (vec![range(0, 4095)], 8192),
        (vec![range(4096, 0)], 4096),
        (vec![range(0, 8191), range(4096, 12287)], 4096),
    ] {
        assert_eq!(kind(log.start(&ranges, page_size)), REFUSED, "{ranges:?}");
    }
    log.start(&many(256), 4096).unwrap();
    assert_eq!(kind(log.start(&many(1), 4096)), REFUSED);
    log.stop().unwrap();
    assert_eq!(kind(log.start(&[range(0, u64::MAX)], 4096)).1, Errno::OVERFLOW);
    log.start(&[range(0, u64::MAX - 4096)], 4096).unwrap();
    assert_eq!(kind(log.report(range(0, 65 * 4096 - 1), 4096, &mut [0])), REFUSED);
    assert_eq!(kind(log.report(range(0, 4095), 1024, &mut [0])), REFUSED);
    log.report(range(0, 64 * 4096 - 1), 4096, &mut [0]).unwrap();
}

#[test]
fn names_open_devices_and_wrong_names_say_what_is_right() {
    use crate::device::sim::{SpecError, open};
    for spec in ["sim:edu", "sim:edu?dma_mask=0xffffffffffffffff", "sim:edu?clock=virtual&dma_mask=255", "sim:stateful"]
    {
        assert_eq!(open(spec).unwrap().identity().name, spec);
    }
    assert!(open("sim:stateful?clock=real").unwrap().migration().is_some());
    assert!(open("sim:edu").unwrap().migration().is_none());
    assert!(matches!(open("0000:00:01.0"), Err(SpecError::NotSim { .. })));
    assert!(matches!(open("sim:nvme"), Err(SpecError::UnknownModel { .. })));
    assert!(matches!(open("sim:edu?mask=1"), Err(SpecError::UnknownOption { .. })));
    assert!(matches!(open("sim:stateful?dma_mask=1"), Err(SpecError::UnknownOption { .. })));
    for value in ["", "x", "0x", "-1", "0x10000000000000000"] {
        assert!(matches!(open(&format!("sim:edu?dma_mask={value}")), Err(SpecError::BadValue { .. })), "{value}");
    }
    assert!(matches!(open("sim:edu?clock=sun"), Err(SpecError::BadValue { .. })));
}

/// Moves a device's state; the source is stopped before the destination runs.
fn migrate(source: &Stateful, destination: &Stateful) -> Result<()> {
    let mut buffer = [0; 8192];
    let mut copy = || -> Result<()> {
        loop {
            match source.read(&mut buffer)? {
                0 => return Ok(()),
                count => destination.write(&buffer[..count])?,
            }
        }
    };
    source.set_state(PreCopy)?;
    destination.set_state(Resuming)?;
    copy()?;
    source.set_state(StopCopy)?;
    copy()?;
    source.set_state(Stop)?;
    destination.set_state(Running)
}

/// spec: SIM-35
#[test]
fn a_fault_at_every_step_of_a_migration_is_met_once_and_can_be_undone() {
    let pair = |faults: &Arc<FaultPlan>| {
        [(); 2].map(|()| {
            let options = StatefulOptions { faults: Arc::clone(faults), ..StatefulOptions::default() };
            Stateful::new(options).unwrap()
        })
    };
    let count = FaultPlan::none();
    let [source, destination] = pair(&count);
    migrate(&source, &destination).unwrap();
    let steps = count.steps();
    assert!(steps > 20, "{steps}");
    for fault in [Fault::Errno(Errno::IO), Fault::Lose] {
        for step in 0..steps {
            let faults = FaultPlan::at(step, fault);
            let [source, destination] = pair(&faults);
            let error = migrate(&source, &destination).unwrap_err();
            assert_eq!((faults.injected(), faults.steps()), (1, step + 1), "{:?}", faults.trace());
            let expected = if fault == Fault::Lose { ErrorKind::Lost } else { ErrorKind::Failed };
            assert_eq!(error.kind, expected);
            // What only failed can be undone: the source goes on, the destination is cleaned by a reset.
            if fault != Fault::Lose {
                source.set_state(Running).unwrap();
                destination.reset().unwrap();
            }
        }
    }
}
