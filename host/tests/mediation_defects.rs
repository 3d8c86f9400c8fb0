//! The defects of the RFC that this project descends from, each as a promise of the mediated device. Numbers as in the
//! facts; the registry's side of 1 to 4 is tested there.

mod mediation_support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::device::*;
use vfio_mediate::mediation::mediator::{ArcFailed, ExtraRegion, Request, Verdict};
use vfio_mediate::mediation::{MediatedDevice, MediationError};
use vfio_mediate_sdk::state::DeviceState;

/// spec: OPEN-1
#[test]
fn rfc_defect_1_declining_is_not_failing() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    assert_eq!(mediated.plugin(), None);
    mediated.region_write(0, 8, &[1, 2]).unwrap();
    let mut data = [0; 2];
    mediated.region_read(0, 8, &mut data).unwrap();
    assert_eq!(data, [1, 2]);
}

/// spec: OPEN-2
#[test]
fn rfc_defect_2_every_open_is_closed_once_also_when_a_later_step_fails() {
    let device = Arc::new(FakeDevice::new());
    let closed = Arc::new(AtomicU64::new(0));
    for round in 1..=100 {
        let opened = open_script(&device, |script| {
            script.closed = Some(closed.clone());
            script.calls.scratch_alloc(PAGE, 0).unwrap();
            if round % 2 == 0 {
                // Refused: it lies outside its region.
                script.claims = vec![claim(0, BAR, 1)];
            }
        });
        assert_eq!(opened.is_ok(), round % 2 == 1);
        drop(opened);
        assert_eq!(closed.load(Ordering::SeqCst), round);
        assert!(device.maps.lock().unwrap().is_empty(), "scratch memory stays mapped");
    }
}

/// A hook that asks for a reset neither deadlocks nor has the device reset under its feet.
///
/// spec: GATE-6
#[test]
fn rfc_defect_3_a_hook_may_call_back_and_what_it_asks_for_comes_afterwards() {
    let device = Arc::new(FakeDevice::new());
    let inside = Arc::new(Mutex::new(Vec::new()));
    let (seen, watched) = (inside.clone(), device.clone());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 8)];
        script.write = Box::new(move |calls, _, _, _| {
            let mut back = [0; 4];
            calls.region_read(0, 16, &mut back).unwrap();
            calls.request(Request::Reset).unwrap();
            calls.request(Request::Reset).unwrap();
            seen.lock().unwrap().push(watched.resets.load(Ordering::SeqCst));
            Verdict::Handled
        });
    })
    .unwrap();
    mediated.region_write(0, 0, &[1]).unwrap();
    assert_eq!(*inside.lock().unwrap(), [0]);
    assert_eq!(device.resets.load(Ordering::SeqCst), 1);
}

/// spec: STATE-1
#[test]
fn rfc_defect_5_a_failed_transition_stores_where_the_device_is_and_says_so() {
    let device = Arc::new(FakeDevice::new());
    let fail = Arc::new(Mutex::new(None));
    let ours = fail.clone();
    let mediated = open_script(&device, |script| {
        script.migration = Some(ScriptMigration { fail: ours, ..Default::default() });
    })
    .unwrap();
    *fail.lock().unwrap() =
        Some((DeviceState::Stop, ArcFailed { errno: Errno::BUSY, actual: DeviceState::RunningP2p }));
    let error = mediated.set_state(DeviceState::StopCopy, soon()).unwrap_err();
    assert_eq!((error.errno, error.actual, error.to), (Errno::BUSY, DeviceState::RunningP2p, DeviceState::Stop));
    assert_eq!(mediated.state(), DeviceState::RunningP2p);
    *fail.lock().unwrap() = Some((DeviceState::Stop, ArcFailed { errno: Errno::IO, actual: DeviceState::Error }));
    assert_eq!(mediated.set_state(DeviceState::Stop, soon()).unwrap_err().actual, DeviceState::Error);
    assert_eq!(mediated.set_state(DeviceState::Running, soon()).unwrap_err().errno, Errno::INVAL);
    *fail.lock().unwrap() = None;
    mediated.reset().unwrap();
    assert_eq!(mediated.state(), DeviceState::Running);
    mediated.set_state(DeviceState::StopCopy, soon()).unwrap();
}

/// spec: DISPATCH-3
#[test]
fn rfc_defect_6_a_small_object_neither_overflows_nor_leaks() {
    let device = Arc::new(FakeDevice::new());
    let lengths = Arc::new(Mutex::new(Vec::new()));
    let seen = lengths.clone();
    let mediated = open_script(&device, |script| {
        script.extra_regions = vec![ExtraRegion { flags: 3, size: 1, type_: 1, subtype: 2, has_mmap: false }];
        script.claims = vec![claim(0, 0, 1)];
        // Says that it did it all, and leaves the bytes alone.
        script.read = Box::new(move |_, _, _, data| {
            seen.lock().unwrap().push(data.len());
            Verdict::Handled
        });
    })
    .unwrap();
    let mut data = [0xaa; 4];
    for (offset, length) in [(0, 4), (0, 2), (1, 1), (u64::MAX, 2)] {
        let refused = mediated.region_read(9, offset, &mut data[..length]).unwrap_err();
        assert_eq!(refused.errno(), Errno::INVAL);
        assert_eq!(mediated.region_write(9, offset, &data[..length]).unwrap_err().errno(), Errno::INVAL);
    }
    assert!(lengths.lock().unwrap().is_empty());
    mediated.region_read(9, 0, &mut data[..1]).unwrap();
    assert_eq!(data, [0, 0xaa, 0xaa, 0xaa]);
    // A claim of one byte sees one byte of a longer access.
    device.region_write(0, 0, &[1, 2, 3, 4]).unwrap();
    mediated.region_read(0, 0, &mut data).unwrap();
    assert_eq!(data, [0, 2, 3, 4]);
    assert_eq!(*lengths.lock().unwrap(), [1, 1]);
}

/// spec: IRQ-1
#[test]
fn rfc_defect_7_a_replaced_eventfd_is_closed() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    let (first_read, first) = tell_tale();
    let (second_read, second) = tell_tale();
    mediated.set_irqs(&set_fd(1, &[borrow(&first)])).unwrap();
    drop(first);
    assert!(!is_abandoned(&first_read));
    mediated.set_irqs(&set_fd(1, &[borrow(&second)])).unwrap();
    assert!(is_abandoned(&first_read));
    drop(second);
    // What the device refuses changes nothing.
    device.fail("set_irqs", ErrorKind::Refused, Errno::INVAL);
    mediated.set_irqs(&set_fd(1, &[None])).unwrap_err();
    assert!(!is_abandoned(&second_read));
    device.heal();
    mediated.set_irqs(&set_fd(1, &[None])).unwrap();
    assert!(is_abandoned(&second_read));
}

/// spec: LAYOUT-2 LAYOUT-3
#[test]
fn rfc_defect_8_a_trapped_page_is_mapped_through_no_area() {
    let area = |offset, length| Area { offset, length };
    let overlapping = FakeDevice { sparse: vec![vec![area(0, 2 * PAGE), area(PAGE, PAGE)]], ..FakeDevice::new() };
    let opened = MediatedDevice::with_mediator(Arc::new(overlapping), space(), Default::default(), |_| Ok(None));
    assert_eq!(opened.unwrap_err().errno(), Errno::INVAL);

    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        // Trapped while tracking only: nobody could take the page back then.
        script.claims = vec![mediation_support::claim(0, 2 * PAGE + 8, 4)];
        script.claims[0].normal = false;
    })
    .unwrap();
    let info = mediated.region_info(0).unwrap();
    let sparse = vec![area(0, 2 * PAGE), area(3 * PAGE, BAR - 3 * PAGE)];
    assert_eq!(info.capabilities, [RegionCapability::SparseMmap(sparse)]);
    assert_eq!(mediated.region_map(0, 2 * PAGE, PAGE).unwrap_err().errno(), Errno::NODEV);
    assert_eq!(mediated.region_map(0, PAGE, 2 * PAGE).unwrap_err().errno(), Errno::NODEV);
    mediated.region_map(0, 0, 2 * PAGE).unwrap();
}

/// spec: INFO-1
#[test]
fn rfc_defect_9_every_region_is_reachable_under_its_own_index() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        let extra = |subtype, size| ExtraRegion { flags: 3, size, type_: 5, subtype, has_mmap: false };
        script.extra_regions = vec![extra(1, 8), extra(2, 16)];
        script.read = Box::new(|_, claim, _, data| {
            data.fill(claim as u8);
            Verdict::Handled
        });
    })
    .unwrap();
    assert_eq!(mediated.info().num_regions, 11);
    for index in 0..mediated.info().num_regions {
        match mediated.region_info(index) {
            Ok(info) => assert_eq!(info.index, index),
            Err(error) => assert_eq!((index, error.errno()), (8, Errno::INVAL)),
        }
    }
    for (index, subtype, size, byte) in [(9, 1, 8, 1000_u32 as u8), (10, 2, 16, 1001_u32 as u8)] {
        let info = mediated.region_info(index).unwrap();
        assert_eq!((info.size, info.capabilities), (size, vec![RegionCapability::Type { type_: 5, subtype }]));
        let mut data = [0];
        mediated.region_read(index, 0, &mut data).unwrap();
        assert_eq!(data, [byte]);
    }
    assert_eq!(mediated.region_info(11).unwrap_err().errno(), Errno::INVAL);
    assert_eq!(mediated.region_read(11, 0, &mut [0]).unwrap_err().errno(), Errno::INVAL);
}

/// Writers run while tracking begins. Once the plug-in has begun to count, no write may reach the device unseen.
///
/// spec: TRACK-1
#[test]
fn rfc_defect_10_no_write_is_lost_between_the_trap_and_the_start() {
    let device = Arc::new(FakeDevice::new());
    let begun = Arc::new(AtomicBool::new(false));
    let hooked = Arc::new(AtomicU64::new(0));
    let raw_at_start = Arc::new(AtomicU64::new(0));
    let (ours, counted, at_start, watched) = (begun.clone(), hooked.clone(), raw_at_start.clone(), device.clone());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, PAGE)];
        script.claims[0].normal = false;
        script.write = Box::new(move |_, _, _, _| {
            counted.fetch_add(1, Ordering::SeqCst);
            Verdict::Handled
        });
        let start = move || {
            // Every write that reached the device did so before this.
            at_start.store(watched.bar_writes.load(Ordering::SeqCst), Ordering::SeqCst);
            ours.store(true, Ordering::SeqCst);
            Ok(())
        };
        script.dirty = Some(ScriptDirty { start: Box::new(start), ..Default::default() });
    })
    .unwrap();
    mediated.dma_map(map(0, 16, 0)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3)
        .map(|_| {
            let (mediated, stop) = (mediated.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut count = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    mediated.region_write(0, 16, &[1]).unwrap();
                    count += 1;
                }
                count
            })
        })
        .collect();
    while device.bar_writes.load(Ordering::SeqCst) < 100 {
        std::thread::yield_now();
    }
    mediated.start_tracking().unwrap();
    let after = hooked.load(Ordering::SeqCst);
    while hooked.load(Ordering::SeqCst) < after + 100 {
        std::thread::yield_now();
    }
    stop.store(true, Ordering::SeqCst);
    let written: u64 = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
    let raw = device.bar_writes.load(Ordering::SeqCst);
    assert!(begun.load(Ordering::SeqCst));
    assert_eq!(raw, raw_at_start.load(Ordering::SeqCst), "a write reached the device unseen after the start");
    assert_eq!(raw + hooked.load(Ordering::SeqCst), written, "a write was lost");
    mediated.stop_tracking();
    mediated.region_write(0, 16, &[1]).unwrap();
    assert_eq!(device.bar_writes.load(Ordering::SeqCst), raw + 1);
}

/// spec: CONFIG-1
#[test]
fn rfc_defect_11_a_hook_sees_configuration_writes_after_the_permission_filter() {
    let device = Arc::new(FakeDevice::new());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let ours = seen.clone();
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(CONFIG, 0, 0x40)];
        script.write = Box::new(move |_, _, offset, data| {
            ours.lock().unwrap().push((offset, data.to_vec()));
            Verdict::Forward
        });
    })
    .unwrap();
    mediated.region_write(CONFIG, 0, &[0xff; 4]).unwrap();
    assert!(seen.lock().unwrap().is_empty(), "a read-only write reached the hook");
    mediated.region_write(CONFIG, COMMAND, &[0xff, 0xff, 0xff, 0xff]).unwrap();
    assert_eq!(*seen.lock().unwrap(), [(4, vec![0x47, 0x05, 0x10, 0xf9])]);
    let mut ids = [0; 4];
    mediated.region_read(CONFIG, 0, &mut ids).unwrap();
    assert_eq!(ids, [0x34, 0x12, 0xcd, 0xab]);
    assert_eq!(device.command(), 0x0547);
    let beyond = mediated.region_write(CONFIG, 255, &[0, 0]).unwrap_err();
    assert!(matches!(beyond, MediationError::Refused { errno: Errno::INVAL, .. }), "{beyond}");
}
