//! The model against the edu device's programming model, row by row.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::device::sim::{Fault, VirtualClock};
use crate::device::{ErrorKind, IrqAction, IrqData};
use crate::sys::{Seal, memfd};

const MS: Duration = Duration::from_millis(1);
const PAGE: u64 = 4096;
const IOVA: u64 = 0x10_0000;

struct Rig {
    edu: Arc<Edu>,
    clock: Arc<VirtualClock>,
    memory: Arc<Mapping>,
    faults: Arc<FaultPlan>,
}

/// Four pages at [`IOVA`], bus master on.
fn rig() -> Rig {
    rig_with(EduOptions::default().dma_mask)
}

fn rig_with(dma_mask: u64) -> Rig {
    let (clock, faults) = (VirtualClock::new(), FaultPlan::none());
    let time = Time::Virtual(Arc::clone(&clock));
    let edu = Edu::new(EduOptions { dma_mask, time, faults: Arc::clone(&faults), ..EduOptions::default() }).unwrap();
    let fd = memfd("edu-test", 4 * PAGE, Seal::Size).unwrap();
    let memory = Arc::new(Mapping::new(&fd, 0, 4 * PAGE).unwrap());
    let rig = Rig { edu, clock, memory, faults };
    rig.map(IOVA, 0, 4 * PAGE, true, true).unwrap();
    rig.edu.region_write(CONFIG_REGION, 4, &[0x06, 0x00]).unwrap();
    rig
}

impl Rig {
    fn map(&self, iova: u64, offset: u64, length: u64, read: bool, write: bool) -> Result<()> {
        let memory = Arc::clone(&self.memory);
        self.edu.dma_map(&DmaMap { iova, length, memory: memory.into(), offset, read, write })
    }

    fn r4(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.edu.region_read(0, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn r8(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.edu.region_read(0, offset, &mut data).unwrap();
        u64::from_le_bytes(data)
    }

    fn w4(&self, offset: u64, value: u32) {
        self.edu.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    fn w8(&self, offset: u64, value: u64) {
        self.edu.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    fn start_dma(&self, source: u64, destination: u64, count: u64, command: u32) {
        self.w8(0x80, source);
        self.w8(0x88, destination);
        self.w8(0x90, count);
        self.w4(0x98, command);
    }

    fn dma(&self, source: u64, destination: u64, count: u64, command: u32) {
        self.start_dma(source, destination, count, command);
        self.clock.advance(100 * MS);
        assert_eq!(self.r4(0x98) & 1, 0);
    }

    fn irq(&self, index: u32) -> OwnedFd {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        self.set_irq(index, &[Some(fd.as_fd())]).unwrap();
        fd
    }

    fn set_irq(&self, index: u32, fds: &[Option<std::os::fd::BorrowedFd<'_>>]) -> Result<()> {
        self.irqs(index, fds.len() as u32, IrqAction::Trigger, IrqData::EventFd(fds))
    }

    fn irqs(&self, index: u32, count: u32, action: IrqAction, data: IrqData<'_>) -> Result<()> {
        self.edu.set_irqs(&IrqSet { index, start: 0, count, action, data })
    }
}

/// Signals since the last call.
fn signals(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(errno) => {
            assert_eq!(errno, Errno::AGAIN);
            0
        }
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T>) -> (ErrorKind, Errno) {
    let error = result.unwrap_err();
    (error.kind, error.errno)
}

const REFUSED: (ErrorKind, Errno) = (ErrorKind::Refused, Errno::INVAL);

/// spec: SIM-1
#[test]
fn identification_liveness_and_unlisted_registers() {
    let rig = rig();
    assert_eq!(rig.r4(0x00), 0x0100_00ED);
    rig.w4(0x00, 1);
    assert_eq!(rig.r4(0x00), 0x0100_00ED);
    for value in [0, 1, 0x1234_5678, u32::MAX] {
        rig.w4(0x04, value);
        assert_eq!(rig.r4(0x04), !value);
    }
    for offset in [0x0C, 0x1C, 0x28, 0x60, 0x64, 0x7C, 0x84, 0x9C, 0xA0, 0x4_0000, 0x4_0FFC, 0xF_FFFC] {
        assert_eq!(rig.r4(offset), u32::MAX, "{offset:#x}");
    }
}

/// spec: SIM-2
#[test]
fn access_widths_are_four_below_0x80_and_four_or_eight_above() {
    let rig = rig();
    rig.w4(0x04, 5);
    assert_eq!(rig.r8(0x00), u64::MAX);
    rig.w8(0x00, 0);
    assert_eq!(rig.r4(0x04), !5);
    // Bytes and words never reach the device.
    let mut narrow = [0xAA; 2];
    rig.edu.region_read(0, 0x04, &mut narrow).unwrap();
    assert_eq!(narrow, [0, 0]);
    rig.edu.region_write(0, 0x04, &[1, 1]).unwrap();
    assert_eq!(rig.r4(0x04), !5);
    rig.w8(0x80, 0x1122_3344_5566_7788);
    assert_eq!((rig.r8(0x80), rig.r4(0x80)), (0x1122_3344_5566_7788, 0x5566_7788));
    // Four bytes are the whole new value.
    rig.w4(0x80, 9);
    assert_eq!(rig.r8(0x80), 9);
    // A transfer is cut into aligned accesses: 4 at 0x7C, 8 at 0x80, 4 at 0x88.
    rig.w8(0x88, 0x0102_0304);
    let mut long = [0; 16];
    rig.edu.region_read(0, 0x7C, &mut long).unwrap();
    assert_eq!(long, [255, 255, 255, 255, 9, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1]);
}

/// spec: SIM-3
#[test]
fn factorial_is_busy_ignores_a_second_input_and_then_has_the_result() {
    let rig = rig();
    for (input, result) in [(0, 1), (1, 1), (5, 120), (12, 479_001_600), (13, 1_932_053_504), (33, 1 << 31), (34, 0)] {
        rig.w4(0x08, input);
        assert_eq!(rig.r4(0x20) & 1, 1);
        assert_eq!(rig.r4(0x08), input);
        rig.w4(0x08, 7);
        rig.clock.advance(MS);
        assert_eq!((rig.r4(0x20) & 1, rig.r4(0x08)), (0, result), "{input}!");
    }
    rig.w4(0x08, u32::MAX);
    rig.clock.advance(MS);
    assert_eq!(rig.r4(0x08), 0);
}

/// spec: SIM-4
#[test]
fn status_lets_bit_7_be_written_alone_and_it_asks_for_an_interrupt() {
    let rig = rig();
    let msi = rig.irq(1);
    rig.w4(0x20, 0xFFFF_FFFF);
    assert_eq!(rig.r4(0x20), 0x80);
    rig.w4(0x08, 3);
    assert_eq!(rig.r4(0x20), 0x81);
    rig.clock.advance(MS);
    assert_eq!((rig.r4(0x20), rig.r4(0x24), signals(&msi)), (0x80, 1, 1));
    rig.w4(0x64, 1);
    rig.w4(0x20, 0x7F);
    assert_eq!(rig.r4(0x20), 0);
    rig.w4(0x08, 3);
    rig.clock.advance(MS);
    assert_eq!((rig.r4(0x24), signals(&msi)), (0, 0));
}

/// spec: SIM-5
#[test]
fn raise_adds_causes_acknowledge_takes_them() {
    let rig = rig();
    let msi = rig.irq(1);
    rig.w4(0x60, 0x30);
    rig.w4(0x60, 0x01);
    assert_eq!((rig.r4(0x24), signals(&msi)), (0x31, 2));
    rig.w4(0x24, 0);
    rig.w4(0x64, 0x11);
    assert_eq!((rig.r4(0x24), signals(&msi)), (0x20, 0));
    rig.w4(0x64, u32::MAX);
    rig.w4(0x60, 0);
    assert_eq!((rig.r4(0x24), signals(&msi)), (0, 0));
}

/// spec: SIM-6
#[test]
fn intx_is_a_level_that_masks_itself() {
    let rig = rig();
    let intx = rig.irq(0);
    rig.w4(0x60, 1);
    rig.w4(0x60, 2);
    assert_eq!(signals(&intx), 1);
    rig.irqs(0, 1, IrqAction::Unmask, IrqData::None).unwrap();
    assert_eq!(signals(&intx), 1);
    rig.w4(0x64, 3);
    rig.irqs(0, 1, IrqAction::Unmask, IrqData::Bool(&[true])).unwrap();
    assert_eq!(signals(&intx), 0);
    rig.irqs(0, 1, IrqAction::Mask, IrqData::None).unwrap();
    rig.w4(0x60, 1);
    assert_eq!(signals(&intx), 0);
    rig.irqs(0, 1, IrqAction::Unmask, IrqData::None).unwrap();
    assert_eq!(signals(&intx), 1);
    // COMMAND.INTX_DISABLE holds it back, and lets it go.
    rig.edu.region_write(CONFIG_REGION, 4, &[0x06, 0x04]).unwrap();
    rig.irqs(0, 1, IrqAction::Unmask, IrqData::None).unwrap();
    assert_eq!(signals(&intx), 0);
    rig.edu.region_write(CONFIG_REGION, 4, &[0x06, 0x00]).unwrap();
    assert_eq!(signals(&intx), 1);
    // An eventfd that comes while the pin is up is signalled at once.
    rig.irqs(0, 0, IrqAction::Trigger, IrqData::None).unwrap();
    assert_eq!(signals(&rig.irq(0)), 1);
}

/// spec: SIM-14
#[test]
fn the_status_register_shows_intx_whoever_masks_it() {
    let rig = rig();
    let _intx = rig.irq(0);
    let shown = |offset: u64, length: usize| {
        let mut data = vec![0; length];
        rig.edu.region_read(CONFIG_REGION, offset, &mut data).unwrap();
        data[(6 - offset) as usize] & 8 != 0
    };
    for (offset, length) in [(6, 1), (6, 2), (4, 4), (0, 7)] {
        assert!(!shown(offset, length));
    }
    rig.w4(0x60, 1);
    rig.edu.region_write(CONFIG_REGION, 4, &[0x06, 0x04]).unwrap();
    for (offset, length) in [(6, 1), (6, 2), (4, 4), (0, 7)] {
        assert!(shown(offset, length));
    }
    let mut neighbours = [0; 6];
    rig.edu.region_read(CONFIG_REGION, 0, &mut neighbours).unwrap();
    assert_eq!(neighbours[4..], [0x06, 0x04]);
    rig.w4(0x64, 1);
    assert!(!shown(6, 2));
}

#[test]
fn irq_requests_that_vfio_refuses_are_refused() {
    let rig = rig();
    let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let one = [Some(fd.as_fd())];
    let two = [Some(fd.as_fd()), None];
    assert_eq!(errno(rig.set_irq(1, &two)), REFUSED);
    assert_eq!(errno(rig.set_irq(2, &one)), REFUSED);
    assert_eq!(errno(rig.set_irq(3, &one)), REFUSED);
    assert_eq!(errno(rig.set_irq(5, &one)), REFUSED);
    assert_eq!(errno(rig.irqs(1, 2, IrqAction::Trigger, IrqData::EventFd(&one))), REFUSED);
    assert_eq!(errno(rig.irqs(1, 1, IrqAction::Trigger, IrqData::None)), REFUSED);
    assert_eq!(errno(rig.irqs(1, 1, IrqAction::Mask, IrqData::None)).1, Errno::NOTTY);
    assert_eq!(errno(rig.irqs(0, 1, IrqAction::Unmask, IrqData::None)), REFUSED);
    rig.set_irq(1, &one).unwrap();
    assert_eq!(errno(rig.set_irq(0, &one)), REFUSED);
    rig.irqs(1, 1, IrqAction::Trigger, IrqData::Bool(&[true])).unwrap();
    rig.irqs(1, 1, IrqAction::Trigger, IrqData::Bool(&[false])).unwrap();
    rig.irqs(1, 1, IrqAction::Trigger, IrqData::None).unwrap();
    assert_eq!(signals(&fd), 2);
    rig.set_irq(1, &[None]).unwrap();
    rig.w4(0x60, 1);
    assert_eq!(signals(&fd), 0);
    assert_eq!(rig.edu.irq_info(3).map_err(|error| error.errno), Err(Errno::INVAL));
    let counts = [0, 1, 2, 4].map(|index| rig.edu.irq_info(index).unwrap().count);
    assert_eq!(counts, [1, 1, 0, 1]);
}

/// spec: SIM-7
#[test]
fn dma_goes_both_ways_after_a_hundred_milliseconds_and_not_before() {
    let rig = rig();
    let msi = rig.irq(1);
    rig.memory.write(0, b"into the buffer").unwrap();
    rig.start_dma(IOVA, 0x4_0010, 15, 1 | 4);
    rig.clock.advance(100 * MS - Duration::from_nanos(1));
    assert_eq!((rig.r4(0x98), signals(&msi)), (5, 0));
    assert_eq!(rig.edu.hidden_buffer()[0x10..0x1F], [0; 15]);
    rig.clock.advance(Duration::from_nanos(1));
    assert_eq!((rig.r4(0x98), signals(&msi), rig.r4(0x24)), (4, 1, 0x100));
    assert_eq!(&rig.edu.hidden_buffer()[0x10..0x1F], b"into the buffer");
    // And out, across a page edge.
    rig.dma(0x4_0010, IOVA + PAGE - 5, 15, 1 | 2);
    let mut back = [0; 15];
    rig.memory.read(PAGE - 5, &mut back).unwrap();
    assert_eq!((&back, signals(&msi)), (b"into the buffer", 0));
    assert_eq!(rig.edu.dma_faults(), []);
}

/// spec: SIM-8
#[test]
fn a_running_dma_ignores_its_registers_and_reads_memory_at_its_end() {
    let rig = rig();
    rig.memory.write(0, b"old").unwrap();
    rig.start_dma(IOVA, 0x4_0000, 3, 1);
    for (offset, value) in [(0x80, IOVA + PAGE), (0x88, 0x4_0100), (0x90, 1), (0x98, 3)] {
        rig.w8(offset, value);
    }
    assert_eq!([0x80, 0x88, 0x90, 0x98].map(|offset| rig.r8(offset)), [IOVA, 0x4_0000, 3, 1]);
    rig.memory.write(0, b"new").unwrap();
    rig.clock.advance(100 * MS);
    assert_eq!(&rig.edu.hidden_buffer()[..3], b"new");
    // Without the run bit a command is ignored; the others stay as they were.
    rig.w4(0x98, 6);
    assert_eq!(rig.r4(0x98), 0);
    // Left-over bits come from a transfer of no bytes.
    rig.dma(0, 0x4_0000, 0, 1 | 2 | 4);
    assert_eq!(rig.r4(0x98), 6);
}

/// spec: SIM-9
#[test]
fn a_transfer_outside_the_buffer_moves_nothing_and_completes() {
    let rig = rig();
    rig.memory.fill(0, 4 * PAGE, 7).unwrap();
    let wrong = [(0x4_0000, PAGE + 1), (0x4_0001, PAGE), (0x3_FFFF, 1), (0x4_1000, 1), (0, 4), (0x4_0000, u64::MAX)];
    for (local, count) in wrong {
        rig.dma(IOVA, local, count, 1);
        rig.dma(local, IOVA, count, 1 | 2);
    }
    assert_eq!(rig.edu.hidden_buffer(), [0; 4096]);
    assert_eq!(rig.memory.load_u32(0, std::sync::atomic::Ordering::Relaxed).unwrap(), 0x0707_0707);
    let faults = rig.edu.dma_faults();
    assert_eq!(faults.len(), 2 * wrong.len());
    assert!(faults.iter().all(|fault| fault.kind == DmaFaultKind::OutsideBuffer));
    // The edges themselves are inside.
    rig.dma(IOVA, 0x4_0000, PAGE, 1);
    rig.dma(IOVA, 0x4_1000, 0, 1);
    assert_eq!(rig.edu.hidden_buffer(), [7; 4096]);
    assert_eq!(rig.edu.dma_faults().len(), 2 * wrong.len());
}

/// spec: SIM-10
#[test]
fn addresses_are_clamped_silently_to_the_mask() {
    let rig = rig();
    rig.memory.write(0, b"x").unwrap();
    rig.dma(0xFFFF_0000_0000 | IOVA, 0x4_0000, 1, 1);
    assert_eq!(rig.edu.hidden_buffer()[0], b'x');
    let wide = rig_with(u64::MAX);
    wide.dma(0xFFFF_0000_0000 | IOVA, 0x4_0000, 1, 1);
    assert_eq!(wide.edu.hidden_buffer()[0], 0);
    wide.map(0xFFFF_0000_0000, 0, PAGE, true, true).unwrap();
    wide.memory.write(0, b"y").unwrap();
    wide.dma(0xFFFF_0000_0000, 0x4_0000, 1, 1);
    assert_eq!(wide.edu.hidden_buffer()[0], b'y');
}

/// spec: SIM-11
#[test]
fn unmapped_forbidden_and_masterless_dma_is_a_fault_and_moves_nothing() {
    let rig = rig();
    rig.map(0x20_0000, 0, PAGE, true, false).unwrap();
    rig.map(0x30_0000, PAGE, PAGE, false, true).unwrap();
    rig.memory.fill(0, 4 * PAGE, 7).unwrap();
    rig.dma(0x50_0000, 0x4_0000, 8, 1);
    rig.dma(0x4_0000, 0x20_0000, 8, 1 | 2);
    rig.dma(0x30_0000, 0x4_0000, 8, 1);
    rig.edu.region_write(CONFIG_REGION, 4, &[0x02, 0x00]).unwrap();
    rig.dma(0x4_0000, IOVA, 8, 1 | 2);
    rig.dma(IOVA, 0x4_0000, 8, 1);
    let fault = |kind, iova, write| DmaFault { kind, iova, length: 8, write };
    assert_eq!(
        rig.edu.dma_faults(),
        [
            fault(DmaFaultKind::Unmapped, 0x50_0000, false),
            fault(DmaFaultKind::Denied, 0x20_0000, true),
            fault(DmaFaultKind::Denied, 0x30_0000, false),
            fault(DmaFaultKind::BusMasterOff, IOVA, true),
            fault(DmaFaultKind::BusMasterOff, IOVA, false),
        ]
    );
    assert_eq!(rig.edu.hidden_buffer(), [0; 4096]);
    let mut all = vec![0; 4 * PAGE as usize];
    rig.memory.read(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 7));
}

#[test]
fn the_mapped_parts_of_a_transfer_move_and_the_hole_is_a_fault() {
    let rig = rig();
    rig.edu.dma_unmap(IOVA, 4 * PAGE).unwrap();
    rig.map(IOVA, 0, PAGE, true, true).unwrap();
    rig.map(IOVA + PAGE, 3 * PAGE, PAGE, true, true).unwrap();
    rig.memory.fill(0, PAGE, 1).unwrap();
    rig.memory.fill(3 * PAGE, PAGE, 2).unwrap();
    rig.dma(IOVA + 2 * PAGE - 4, 0x4_0000, 12, 1);
    rig.dma(IOVA + PAGE - 4, 0x4_0010, 8, 1);
    assert_eq!(rig.edu.hidden_buffer()[..12], [2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.edu.hidden_buffer()[16..24], [1, 1, 1, 1, 2, 2, 2, 2]);
    let hole = DmaFault { kind: DmaFaultKind::Unmapped, iova: IOVA + 2 * PAGE, length: 8, write: false };
    assert_eq!(rig.edu.dma_faults(), [hole]);
}

/// spec: SIM-12
#[test]
fn maps_refuse_overlaps_and_unmaps_refuse_cuts() {
    let rig = rig();
    assert_eq!(errno(rig.map(IOVA + 3 * PAGE, 0, PAGE, true, true)).1, Errno::EXIST);
    assert_eq!(errno(rig.map(IOVA - PAGE, 0, 2 * PAGE, true, true)).1, Errno::EXIST);
    for (iova, offset, length) in
        [(0, 0, 0), (1, 0, PAGE), (0, PAGE, 4 * PAGE), (0, 1, PAGE), (u64::MAX - PAGE + 1, 0, 2 * PAGE)]
    {
        assert_eq!(errno(rig.map(iova, offset, length, true, true)), REFUSED);
    }
    assert_eq!(errno(rig.map(0, 0, PAGE, false, false)), REFUSED);
    rig.map(u64::MAX - PAGE + 1, 0, PAGE, true, true).unwrap();
    for (iova, length) in [(IOVA, PAGE), (IOVA + PAGE, 3 * PAGE), (IOVA - PAGE, 2 * PAGE), (IOVA, 0), (IOVA, u64::MAX)]
    {
        assert_eq!(errno(rig.edu.dma_unmap(iova, length)), REFUSED, "{iova:#x} {length:#x}");
    }
    rig.edu.dma_unmap(0, IOVA).unwrap();
    rig.edu.dma_unmap(IOVA, u64::MAX - IOVA + 1).unwrap();
    rig.map(IOVA, 0, PAGE, true, true).unwrap();
    rig.dma(u64::MAX - PAGE + 1, 0x4_0000, 1, 1);
    assert_eq!(rig.edu.dma_faults().len(), 1);
}

/// spec: SIM-13
#[test]
fn it_is_shown_as_vfio_pci_shows_it_and_has_no_reset() {
    let rig = rig();
    let identity = rig.edu.identity();
    assert_eq!((identity.vendor_id, identity.device_id, identity.class_code), (0x1234, 0x11E8, 0xFF00));
    assert_eq!(rig.edu.info(), DeviceInfo { flags: VFIO_DEVICE_FLAGS_PCI, num_regions: 9, num_irqs: 5 });
    let sizes: Vec<_> = (0..9).map(|index| rig.edu.region_info(index).map_or(u64::MAX, |info| info.size)).collect();
    assert_eq!(sizes, [1 << 20, 0, 0, 0, 0, 0, 0, 256, u64::MAX]);
    assert_eq!(errno(rig.edu.reset()), (ErrorKind::Refused, Errno::NOTTY));
    assert_eq!(errno(rig.edu.region_map(0, 0, PAGE)), (ErrorKind::Refused, Errno::NODEV));
    for (index, offset, length) in [(0, 0xF_FFFD, 4), (0, u64::MAX, 1), (7, 253, 4), (1, 0, 1), (8, 0, 1), (9, 0, 1)] {
        assert_eq!(errno(rig.edu.region_read(index, offset, &mut vec![0; length])), REFUSED);
        assert_eq!(errno(rig.edu.region_write(index, offset, &vec![0; length])), REFUSED);
    }
    // BAR sizing, read-only ids, the MSI capability.
    let config = |offset, length| {
        let mut data = vec![0; length];
        rig.edu.region_read(CONFIG_REGION, offset, &mut data).unwrap();
        data
    };
    rig.edu.region_write(CONFIG_REGION, 0, &[0xFF; 4]).unwrap();
    rig.edu.region_write(CONFIG_REGION, 0x10, &[0xFF; 8]).unwrap();
    assert_eq!(config(0, 4), [0x34, 0x12, 0xE8, 0x11]);
    assert_eq!(config(0x10, 8), [0, 0, 0xF0, 0xFF, 0, 0, 0, 0]);
    assert_eq!((config(0x34, 1), config(0x40, 4)), (vec![0x40], vec![5, 0, 0x80, 0]));
    let _msi = rig.irq(1);
    assert_eq!(config(0x42, 1), [0x81]);
    // Memory off: the BAR is not there, config space is.
    rig.edu.region_write(CONFIG_REGION, 4, &[0, 0]).unwrap();
    assert_eq!(errno(rig.edu.region_read(0, 0, &mut [0; 4])), (ErrorKind::Failed, Errno::IO));
}

/// spec: SIM-20
#[test]
fn a_fault_plan_counts_and_fails_the_step_it_names() {
    let rig = rig();
    let before = rig.faults.steps();
    rig.r4(0);
    rig.w4(4, 1);
    assert_eq!(rig.faults.steps(), before + 2);
    assert_eq!(rig.faults.trace()[before as usize..], ["edu region read", "edu region write"]);
    rig.faults.add_next(Fault::Errno(Errno::IO));
    assert_eq!(errno(rig.edu.region_write(0, 4, &[0; 4])), (ErrorKind::Failed, Errno::IO));
    assert_eq!(rig.r4(4), !1);
    rig.faults.add_next(Fault::Delay(100 * MS));
    let now = rig.edu.clock().now();
    rig.r4(0);
    assert_eq!(rig.edu.clock().now() - now, 100 * MS);
    // A device that is lost stays lost, and does no DMA any more.
    rig.memory.fill(0, PAGE, 9).unwrap();
    rig.start_dma(IOVA, 0x4_0000, 8, 1);
    rig.faults.add_next(Fault::Lose);
    assert_eq!(errno(rig.edu.region_read(0, 0, &mut [0; 4])).0, ErrorKind::Lost);
    assert_eq!(errno(rig.edu.region_read(0, 0, &mut [0; 4])).0, ErrorKind::Lost);
    rig.clock.advance(200 * MS);
    assert_eq!(rig.edu.hidden_buffer()[..8], [0; 8]);
    assert_eq!(rig.faults.injected(), 3);
}

/// spec: SIM-21
#[test]
fn a_virtual_clock_performs_events_in_the_order_of_their_time() {
    let clock = VirtualClock::new();
    let fd = memfd("edu-test", PAGE, Seal::Size).unwrap();
    let memory = Arc::new(Mapping::new(&fd, 0, PAGE).unwrap());
    let edus: Vec<_> = (0..2)
        .map(|_| {
            let time = Time::Virtual(Arc::clone(&clock));
            let edu = Edu::new(EduOptions { time, ..EduOptions::default() }).unwrap();
            edu.region_write(CONFIG_REGION, 4, &[0x06, 0x00]).unwrap();
            let map = DmaMap {
                iova: 0,
                length: PAGE,
                memory: Arc::clone(&memory).into(),
                offset: 0,
                read: true,
                write: true,
            };
            edu.dma_map(&map).unwrap();
            edu
        })
        .collect();
    let start = |edu: &Edu, source: u64, destination: u64, command: u64| {
        for (offset, value) in [(0x80, source), (0x88, destination), (0x90, 1), (0x98, command)] {
            edu.region_write(0, offset, &value.to_le_bytes()).unwrap();
        }
    };
    memory.write(0, &[5]).unwrap();
    // The second device reads byte 0 at 100 ms, the first overwrites it at 101 ms.
    start(&edus[1], 0, 0x4_0000, 1);
    clock.advance(MS);
    start(&edus[0], 0x4_0000, 0, 3);
    clock.wait(Duration::from_secs(10));
    assert_eq!((edus[1].hidden_buffer()[0], memory.load_u32(0, std::sync::atomic::Ordering::Relaxed).unwrap()), (5, 0));
    assert_eq!(clock.now(), Duration::from_secs(10) + MS);
}

/// spec: SIM-22
#[test]
fn real_time_completes_by_itself_and_not_early() {
    let edu = Edu::new(EduOptions::default()).unwrap();
    let irq = eventfd(0, EventfdFlags::empty()).unwrap();
    let data = [Some(irq.as_fd())];
    let (action, data) = (IrqAction::Trigger, IrqData::EventFd(&data));
    edu.set_irqs(&IrqSet { index: 1, start: 0, count: 1, action, data }).unwrap();
    let begun = edu.clock().now();
    edu.region_write(0, 0x98, &5_u64.to_le_bytes()).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&irq, &mut count).unwrap();
    assert!(edu.clock().now() - begun >= 100 * MS);
    edu.region_write(0, 0x20, &0x80_u32.to_le_bytes()).unwrap();
    edu.region_write(0, 0x08, &5_u32.to_le_bytes()).unwrap();
    rustix::io::read(&irq, &mut count).unwrap();
    let mut result = [0; 4];
    edu.region_read(0, 0x08, &mut result).unwrap();
    assert_eq!(result, [120, 0, 0, 0]);
    // Dropped with a DMA in flight: the thread ends at once, and no DMA happens after.
    edu.region_write(0, 0x98, &5_u64.to_le_bytes()).unwrap();
    let begun = std::time::Instant::now();
    drop(edu);
    assert!(begun.elapsed() < 90 * MS);
}
