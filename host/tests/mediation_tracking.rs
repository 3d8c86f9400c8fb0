//! Dirty tracking through a mediated device.

mod mediation_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::mediation::{Exactness, MediatedDevice, Tracking};

fn drained(mediated: &MediatedDevice) -> Vec<(u64, u64)> {
    let drain = mediated.memory().log().drain();
    let runs = drain.runs().map(|run| (run.first, run.count)).collect();
    drain.commit();
    runs
}

fn logging() -> Arc<FakeDevice> {
    Arc::new(FakeDevice { logging: Some(FakeLogging::default()), ..FakeDevice::new() })
}

fn dirty(device: &FakeDevice, iovas: &[u64]) {
    device.logging.as_ref().unwrap().dirty.lock().unwrap().extend_from_slice(iovas);
}

/// spec: TRACK-2
#[test]
fn the_devices_own_log_lands_on_the_pages_of_ram() {
    let device = logging();
    let mediated = open_plain(&device);
    mediated.dma_map(map(0x10_0000, 100, 3 * PAGE)).unwrap();
    mediated.dma_map(map(0x10_0000 + 100 * PAGE, 5, 200 * PAGE)).unwrap();
    assert_eq!(mediated.start_tracking().unwrap(), Tracking::Native);
    let ranges = device.logging.as_ref().unwrap().started.lock().unwrap().clone().unwrap();
    assert_eq!(ranges.len(), 1, "neighbours are one range");
    assert_eq!(drained(&mediated), [(0, 256)], "unknown is dirty");
    dirty(&device, &[0x10_0000, 0x10_0000 + 70 * PAGE, 0x10_0000 + 99 * PAGE, 0x10_0000 + 104 * PAGE]);
    mediated.sync_dirty().unwrap();
    assert_eq!(drained(&mediated), [(3, 1), (73, 1), (102, 1), (204, 1)]);
    mediated.sync_dirty().unwrap();
    assert!(drained(&mediated).is_empty());
    assert_eq!(mediated.start_tracking().unwrap_err().errno(), Errno::EXIST);
    mediated.stop_tracking();
    assert!(device.logging.as_ref().unwrap().started.lock().unwrap().is_none());
    assert_eq!(mediated.sync_dirty().unwrap_err().errno(), Errno::INVAL);
}

/// spec: TRACK-3
#[test]
fn a_failed_report_makes_its_whole_range_dirty() {
    let device = logging();
    let mediated = open_plain(&device);
    mediated.dma_map(map(0, 10, 0)).unwrap();
    mediated.start_tracking().unwrap();
    drained(&mediated);
    dirty(&device, &[PAGE]);
    device.logging.as_ref().unwrap().fail_report.store(true, Ordering::SeqCst);
    mediated.sync_dirty().unwrap();
    assert_eq!(drained(&mediated), [(0, 10)]);
}

/// spec: TRACK-4
#[test]
fn without_a_tracker_every_sync_marks_all_that_the_device_may_write() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    mediated.dma_map(map(0, 4, 0)).unwrap();
    mediated.dma_map(vfio_mediate::memory::IovaMapping { write: false, ..map(16 * PAGE, 4, 16 * PAGE) }).unwrap();
    assert_eq!(mediated.start_tracking().unwrap(), Tracking::Everything);
    drained(&mediated);
    for _ in 0..2 {
        mediated.sync_dirty().unwrap();
        assert_eq!(drained(&mediated), [(0, 4)]);
    }
}

/// spec: TRACK-5
#[test]
fn a_map_made_while_tracking_is_dirty_and_one_taken_away_leaves_its_dirt() {
    let device = logging();
    let mediated = open_plain(&device);
    mediated.dma_map(map(0, 4, 0)).unwrap();
    mediated.start_tracking().unwrap();
    drained(&mediated);
    mediated.dma_map(map(64 * PAGE, 2, 64 * PAGE)).unwrap();
    dirty(&device, &[PAGE]);
    mediated.dma_unmap(0, 4 * PAGE).unwrap();
    assert_eq!(drained(&mediated), [(1, 1)]);
    mediated.sync_dirty().unwrap();
    assert_eq!(drained(&mediated), [(64, 2)]);
    mediated.dma_unmap(64 * PAGE, 2 * PAGE).unwrap();
    assert_eq!(drained(&mediated), [(64, 2)]);
}

/// spec: TRACK-2
#[test]
fn the_plug_ins_report_and_the_devices_are_one_set() {
    let device = logging();
    let mediated = open_script(&device, |script| {
        script.dirty = Some(ScriptDirty {
            report: Box::new(|iova, words| {
                // The last bit lies beyond the range: nobody's page.
                words[0] |= 1 << (5 - iova / PAGE) | 1 << 63;
                Ok(())
            }),
            ..Default::default()
        });
    })
    .unwrap();
    mediated.dma_map(map(0, 10, 100 * PAGE)).unwrap();
    assert_eq!(mediated.start_tracking().unwrap(), Tracking::Native);
    drained(&mediated);
    dirty(&device, &[9 * PAGE]);
    mediated.sync_dirty().unwrap();
    assert_eq!(drained(&mediated), [(105, 1), (109, 1)]);
}

/// spec: TRACK-6
#[test]
fn a_start_that_fails_leaves_nothing_started() {
    let device = logging();
    device.logging.as_ref().unwrap().fail_start.store(true, Ordering::SeqCst);
    let refuse = Arc::new(AtomicBool::new(false));
    let stopped = Arc::default();
    let (ours, counted) = (refuse.clone(), Arc::clone(&stopped));
    let mediated = open_script(&device, |script| {
        let start = move || if ours.load(Ordering::SeqCst) { Err(Errno::NOMEM) } else { Ok(()) };
        script.dirty = Some(ScriptDirty { start: Box::new(start), stopped: counted, ..Default::default() });
        script.claims = vec![claim(0, 0, 4)];
        script.claims[0].normal = false;
        script.write = Box::new(|_, _, _, _| panic!("the tracking table holds"));
    })
    .unwrap();
    mediated.dma_map(map(0, 4, 0)).unwrap();
    assert_eq!(mediated.start_tracking().unwrap_err().errno(), Errno::TOOBIG);
    assert_eq!(stopped.load(Ordering::SeqCst), 1);
    mediated.region_write(0, 0, &[1]).unwrap();
    refuse.store(true, Ordering::SeqCst);
    assert_eq!(mediated.start_tracking().unwrap_err().errno(), Errno::NOMEM);
    assert_eq!(stopped.load(Ordering::SeqCst), 1);
    device.logging.as_ref().unwrap().fail_start.store(false, Ordering::SeqCst);
    refuse.store(false, Ordering::SeqCst);
    assert_eq!(mediated.start_tracking().unwrap(), Tracking::Native);
}

#[test]
fn a_plug_in_alone_tracks_with_its_declared_exactness_and_a_reset_loses_it() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| script.dirty = Some(ScriptDirty::default())).unwrap();
    mediated.dma_map(map(0, 4, 0)).unwrap();
    assert_eq!(mediated.start_tracking().unwrap(), Tracking::Plugin(Exactness::Superset));
    drained(&mediated);
    mediated.sync_dirty().unwrap();
    assert!(drained(&mediated).is_empty());
    mediated.reset().unwrap();
    mediated.sync_dirty().unwrap();
    assert_eq!(drained(&mediated), [(0, 4)]);
}
