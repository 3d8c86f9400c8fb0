//! The plug-in against a small edu of its own, through the shims that a host calls.

mod fake;

use std::time::Duration;

use fake::FakeEdu;
use vfio_mediate_sdk::state::DeviceState::{self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use vfio_mediate_sdk::testing::{FakeHost, TestDevice, TestIdentity};
use vfio_mediate_sdk::{ArcFailed, Errno, IovaRange, abi};

use super::*;
use crate::registers::*;

const RAM: usize = 64 * 4096;
const ALL: IovaRange = IovaRange { iova: 0, length: RAM as u64 };
const EDU: TestIdentity = TestIdentity { vendor_id: 0x1234, device_id: 0x11e8, revision: 0x10, name: "edu0" };

fn host() -> FakeHost<FakeEdu> {
    FakeHost::new(FakeEdu::new(), RAM)
}

fn open(host: &FakeHost<FakeEdu>) -> TestDevice<'_> {
    host.open::<Edu>(&EDU).unwrap().unwrap()
}

/// What a guest does to start a DMA.
fn ring(device: &TestDevice<'_>, src: u64, dst: u64, count: u64, command: u64) {
    device.write_u64(BAR, DMA_SRC, src).unwrap();
    device.write_u64(BAR, DMA_DST, dst).unwrap();
    device.write_u64(BAR, DMA_COUNT, count).unwrap();
    device.write_u64(BAR, DMA_COMMAND, command).unwrap();
}

/// A device with something in every corner: buffer, factorial, liveness, interrupts, a left-over command.
fn busy(host: &FakeHost<FakeEdu>) -> TestDevice<'_> {
    let device = open(host);
    let pattern: Vec<u8> = (0..4096_u32).map(|i| (i * 7 % 251) as u8).collect();
    host.store(0x3000, &pattern);
    ring(&device, 0x3000, BUFFER, 4096, RUN);
    host.advance(Duration::from_millis(100));
    ring(&device, BUFFER, 0x8ffc, 8, RUN | TO_RAM | 4);
    host.advance(Duration::from_millis(100));
    device.write_u32(BAR, STATUS, STATUS_IRQ).unwrap();
    device.write_u32(BAR, FACTORIAL, 10).unwrap();
    host.advance(Duration::from_millis(1));
    device.write_u32(BAR, LIVENESS, 0x1234_5678).unwrap();
    device.write_u32(BAR, IRQ_RAISE, 0x40).unwrap();
    device
}

/// All that a guest can see of a device, the buffer included.
fn visible(host: &FakeHost<FakeEdu>, device: &TestDevice<'_>) -> (Vec<u32>, Vec<u64>, Vec<u8>) {
    let small = [LIVENESS, FACTORIAL, STATUS, IRQ_STATUS].map(|at| device.read_u32(BAR, at).unwrap());
    let large = [DMA_SRC, DMA_DST, DMA_COUNT, DMA_COMMAND].map(|at| device.read_u64(BAR, at).unwrap());
    (small.into(), large.into(), host.with(|edu, _| edu.buffer.clone()))
}

fn migrate(source: &mut TestDevice<'_>, destination: &mut TestDevice<'_>, save: usize, load: usize) {
    destination.check_match(&source.match_data().unwrap()).unwrap();
    destination.walk(Running, Resuming).unwrap();
    source.walk(Running, StopCopy).unwrap();
    for piece in source.save_all(save).unwrap().chunks(load) {
        destination.load(piece).unwrap();
    }
    destination.walk(Resuming, Running).unwrap();
}

#[test]
fn another_device_is_declined_and_an_unknown_edu_refused() {
    let host = host();
    assert!(host.open::<Edu>(&TestIdentity { device_id: 0x11e9, ..EDU }).unwrap().is_none());
    host.with(|edu, _| edu.id = 0x0200_00ed);
    assert_eq!(host.open::<Edu>(&EDU).unwrap_err(), Errno::ENODEV);
}

#[test]
fn a_host_that_splits_8_byte_accesses_is_refused() {
    let host = host();
    host.with(|edu, _| edu.splits = true);
    assert_eq!(host.open::<Edu>(&EDU).unwrap_err(), Errno::EOPNOTSUPP);
}

#[test]
fn only_the_dma_registers_are_claimed() {
    let host = host();
    let device = open(&host);
    let claims: Vec<_> = device.claims().iter().map(|c| (c.region, c.offset, c.length, c.maps)).collect();
    assert_eq!(claims, [(BAR, 0x80, 0x20, abi::MAP_NORMAL | abi::MAP_TRACKING)]);
}

/// spec: EDU-STATE
#[test]
fn everything_visible_arrives_whatever_the_cuts() {
    for (save, load) in [(1, 4096), (4096, 1), (7, 13), (1 << 20, 1 << 20)] {
        let (a, b) = (host(), host());
        let mut source = busy(&a);
        let before = visible(&a, &source);
        assert_eq!(before.0, [!0x1234_5678, 3_628_800, STATUS_IRQ, 0x40 | 0x100 | 1]);
        assert_eq!(before.1, [BUFFER, 0x8ffc, 8, TO_RAM | 4]);
        let mut destination = open(&b);
        migrate(&mut source, &mut destination, save, load);
        assert_eq!(visible(&b, &destination), before);
        assert_eq!(b.device_writes(), [], "the destination's guest memory is not the device's to touch");
        assert_eq!(b.scratch_held(), 0);
    }
}

#[test]
fn there_and_back_again() {
    let (a, b) = (host(), host());
    let (mut left, mut right) = (busy(&a), open(&b));
    let before = visible(&a, &left);
    for _ in 0..3 {
        migrate(&mut left, &mut right, 512, 512);
        left.walk(StopCopy, Running).unwrap();
        migrate(&mut right, &mut left, 512, 512);
        right.walk(StopCopy, Running).unwrap();
    }
    assert_eq!(visible(&a, &left), before);
}

/// Cancelled after the buffer was taken out: the source goes on with the client's registers.
#[test]
fn a_cancelled_stop_copy_gives_the_client_its_registers_back() {
    let a = host();
    let mut source = busy(&a);
    let before = visible(&a, &source);
    source.walk(Running, StopCopy).unwrap();
    assert_ne!(visible(&a, &source).1, before.1, "the device's registers hold something of ours");
    // Twice: what is taken out the second time is the client's, not ours.
    source.walk(StopCopy, Stop).unwrap();
    source.walk(Stop, StopCopy).unwrap();
    source.walk(StopCopy, Running).unwrap();
    assert_eq!(visible(&a, &source), before);
}

#[test]
fn a_device_without_bus_master_keeps_its_buffer() {
    let (a, b) = (host(), host());
    let mut source = busy(&a);
    let mut destination = open(&b);
    let before = visible(&a, &source);
    a.with(|edu, _| edu.command = 0);
    b.with(|edu, _| edu.command = 2);
    migrate(&mut source, &mut destination, 4096, 4096);
    assert_eq!((a.with(|edu, _| edu.command), b.with(|edu, _| edu.command)), (0, 2));
    b.with(|edu, _| edu.command = 6);
    assert_eq!(visible(&b, &destination), before);
}

#[test]
fn a_dma_that_goes_elsewhere_fails_the_arc_and_loses_nothing() {
    let a = host();
    let mut source = busy(&a);
    let before = visible(&a, &source);
    a.with(|edu, _| edu.dma_mask = RAM as u64 - 1);
    source.walk(Running, Stop).unwrap();
    let failed = source.set_state(Stop, StopCopy).unwrap_err();
    assert_eq!(failed, ArcFailed { errno: Errno::EIO, actual: Stop });
    source.walk(Stop, Running).unwrap();
    assert_eq!(visible(&a, &source), before);

    let b = host();
    let mut destination = open(&b);
    b.with(|edu, _| edu.dma_mask = RAM as u64 - 1);
    destination.walk(Running, Stop).unwrap();
    let failed = destination.set_state(Stop, Resuming).unwrap_err();
    assert_eq!(failed, ArcFailed { errno: Errno::EIO, actual: Stop });
}

#[test]
fn the_default_mask_of_28_bits_is_enough_where_there_is_room() {
    let (a, b) = (host(), host());
    let mut source = busy(&a);
    let before = visible(&a, &source);
    let mut destination = open(&b);
    for host in [&a, &b] {
        host.with(|edu, _| edu.dma_mask = (1 << 28) - 1);
    }
    migrate(&mut source, &mut destination, 4096, 4096);
    assert_eq!(visible(&b, &destination), before);
    assert_eq!(b.device_writes(), []);
}

#[test]
fn identity_goes_out_in_pre_copy_and_is_refused_there() {
    let (a, b) = (host(), host());
    let (mut source, mut destination) = (busy(&a), open(&b));
    let before = visible(&a, &source);
    source.walk(Running, PreCopy).unwrap();
    let initial = source.remaining().unwrap().initial_bytes;
    let early = source.save_all(64).unwrap();
    assert_eq!(early.len() as u64, initial);
    assert_eq!(source.remaining().unwrap().initial_bytes, 0);
    assert_eq!(source.save_all(64).unwrap(), []);

    destination.walk(Running, Resuming).unwrap();
    destination.load(&early).unwrap();
    source.walk(PreCopy, StopCopy).unwrap();
    let rest = source.save_all(100).unwrap();
    assert_eq!((early.len() + rest.len()) as u64, source.remaining().unwrap().stop_copy_bytes.unwrap());
    destination.load(&rest).unwrap();
    destination.walk(Resuming, Running).unwrap();
    assert_eq!(visible(&b, &destination), before);

    let other = host();
    let mut refusing = open(&other);
    let mut newer = source.match_data().unwrap();
    newer[4] = 2;
    let refusal = refusing.check_match(&newer).unwrap_err();
    assert!(refusal.reason.contains("format 2"), "{}", refusal.reason);
    assert_eq!(refusing.check_match(&newer[..7]).unwrap_err().errno, Errno::EBADMSG);
    newer[4] = 1;
    newer[2] = 1;
    let refusal = refusing.check_match(&newer).unwrap_err();
    assert!(refusal.reason.contains("0x010000ed") && refusal.reason.contains("0x010100ed"), "{}", refusal.reason);
}

/// spec: EDU-REFUSE
#[test]
fn a_short_a_foreign_and_a_reordered_state_are_refused_before_the_device_is_touched() {
    let (a, b) = (host(), host());
    let (mut source, mut destination) = (busy(&a), open(&b));
    source.walk(Running, StopCopy).unwrap();
    let good = source.save_all(4096).unwrap();
    let identity = 20;
    let registers = identity + 60;
    let reordered = [&good[..identity], &good[registers..], &good[identity..registers]].concat();
    for bad in [&good[..good.len() - 1], &good[..0], &[0x5a; 64], &good[identity..], &reordered] {
        destination.walk(Running, Stop).unwrap();
        destination.walk(Stop, Resuming).unwrap();
        let untouched = visible(&b, &destination);
        let _ = destination.load(bad);
        let failed = destination.set_state(Resuming, Stop).unwrap_err();
        assert_eq!(failed.actual, Resuming);
        assert_eq!(visible(&b, &destination), untouched);
        // The host resets here; edu has none, so the test does as if.
        drop(std::mem::replace(&mut destination, open(&b)));
    }
}

mod dirt;
