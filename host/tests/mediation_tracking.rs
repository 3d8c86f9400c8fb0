//! Dirty tracking through a mediated device.

mod mediation_support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mediation_support::*;
use proptest::prelude::*;
use rustix::io::Errno;
use vfio_mediate::device::sim::{Stateful, StatefulOptions, regs};
use vfio_mediate::mediation::{Exactness, MediatedDevice, Tracking};
use vfio_mediate::plugin::Registry;

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

/// A device whose log grants pages of `granted` bytes, of which maps are given as (iova page, pages, page of RAM).
fn stateful(granted: u64, maps: &[(u64, u64, u64)]) -> (Arc<Stateful>, Arc<MediatedDevice>) {
    let options = StatefulOptions { log_page_size: granted, ..StatefulOptions::default() };
    let device = Stateful::new(options).unwrap();
    let mediated = MediatedDevice::open(device.clone(), &Registry::new(), space()).unwrap();
    for (iova, pages, ram) in maps {
        mediated.dma_map(map(iova * PAGE, *pages, ram * PAGE)).unwrap();
    }
    mediated.region_write(CONFIG, COMMAND, &6u16.to_le_bytes()).unwrap();
    (device, mediated)
}

fn write_from_device(mediated: &MediatedDevice, iova: u64, length: u32) {
    mediated.region_write(0, regs::TARGET, &iova.to_le_bytes()).unwrap();
    mediated.region_write(0, regs::LENGTH, &length.to_le_bytes()).unwrap();
    mediated.region_write(0, regs::DOORBELL, &1u32.to_le_bytes()).unwrap();
}

/// The naive way: each byte written dirties every page of RAM that is mapped under the page of the log that it lies in.
fn expected(granted: u64, maps: &[(u64, u64, u64)], writes: &[(u64, u64)]) -> BTreeSet<u64> {
    let log_page = granted.max(PAGE);
    let mut dirty = BTreeSet::new();
    for (iova, length) in writes {
        for byte in (*iova..iova + length).step_by(64).chain([iova + length - 1]) {
            for page in byte / log_page * log_page / PAGE..(byte / log_page + 1) * log_page / PAGE {
                let map = maps.iter().find(|(first, pages, _)| (*first..first + pages).contains(&page));
                dirty.extend(map.map(|(first, _, ram)| ram + (page - first)));
            }
        }
    }
    dirty
}

fn dirty_pages(mediated: &MediatedDevice) -> BTreeSet<u64> {
    drained(mediated).into_iter().flat_map(|(first, count)| first..first + count).collect()
}

/// Two neighbouring maps whose border lies in the middle of a page of the log, and one apart.
const MAPS: [(u64, u64, u64); 3] = [(8, 5, 100), (13, 20, 0), (40, 3, 60)];

/// spec: TRACK-7
#[test]
fn a_granted_page_dirties_each_page_of_ram_that_it_covers_and_no_other() {
    for granted in [1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 64 << 10, 2 << 20] {
        let (_device, mediated) = stateful(granted, &MAPS);
        assert_eq!(mediated.start_tracking().unwrap(), Tracking::Native);
        drained(&mediated);
        for border in [8 * PAGE, 13 * PAGE, 16 * PAGE, 24 * PAGE, 33 * PAGE, 40 * PAGE, 43 * PAGE] {
            for (iova, length) in
                [(border - 1, 1), (border, 1), (border + 1, 1), (border - 1, 2), (border - 1, PAGE + 2)]
            {
                let mapped =
                    |iova: u64| MAPS.iter().any(|(first, pages, _)| (*first..first + pages).contains(&(iova / PAGE)));
                if !mapped(iova) || !mapped(iova + length - 1) {
                    continue;
                }
                write_from_device(&mediated, iova, length as u32);
                mediated.sync_dirty().unwrap();
                assert_eq!(
                    dirty_pages(&mediated),
                    expected(granted, &MAPS, &[(iova, length)]),
                    "{granted}: {length} at {iova:#x}"
                );
                mediated.sync_dirty().unwrap();
                assert!(drained(&mediated).is_empty(), "{granted}: told twice");
            }
        }
    }
}

/// The report that an unmap needs clears a page of the log that a neighbour shares.
///
/// spec: TRACK-5 TRACK-7
#[test]
fn a_map_taken_away_leaves_its_neighbours_dirt_where_it_is() {
    let (_device, mediated) = stateful(64 << 10, &MAPS);
    mediated.start_tracking().unwrap();
    drained(&mediated);
    write_from_device(&mediated, 14 * PAGE, 1);
    mediated.dma_unmap(8 * PAGE, 5 * PAGE).unwrap();
    mediated.sync_dirty().unwrap();
    assert_eq!(dirty_pages(&mediated), (100..105).chain(0..3).collect());
}

/// spec: TRACK-3 TRACK-7
#[test]
fn a_failed_report_dirties_the_whole_pages_of_the_log_that_it_touched() {
    let device = logging();
    device.logging.as_ref().unwrap().granted.store(64 << 10, Ordering::SeqCst);
    let mediated = open_plain(&device);
    for (iova, pages, ram) in MAPS {
        mediated.dma_map(map(iova * PAGE, pages, ram * PAGE)).unwrap();
    }
    mediated.start_tracking().unwrap();
    drained(&mediated);
    device.logging.as_ref().unwrap().fail_report.store(true, Ordering::SeqCst);
    mediated.dma_unmap(8 * PAGE, 5 * PAGE).unwrap();
    // Pages 0 to 15 are one page of the log: 13 to 15 are the neighbour's.
    assert_eq!(dirty_pages(&mediated), (100..105).chain(0..3).collect());
}

/// spec: TRACK-6 TRACK-7
#[test]
fn a_granted_size_that_is_no_page_s_is_refused_and_the_log_stopped() {
    for granted in [0, 3, 4095, 4097, (1 << 30) + 1, 1 << 31, 1 << 63, u64::MAX] {
        let (device, mediated) = stateful(granted, &MAPS);
        assert_eq!(mediated.start_tracking().unwrap_err().errno(), Errno::PROTO, "{granted}");
        assert!(!device.is_logging(), "{granted}");
        assert_eq!(mediated.sync_dirty().unwrap_err().errno(), Errno::INVAL);
    }
    for granted in [1, 1 << 29, 1 << 30] {
        let (device, mediated) = stateful(granted, &MAPS);
        assert_eq!(mediated.start_tracking().unwrap(), Tracking::Native, "{granted}");
        assert!(device.is_logging(), "{granted}");
    }
}

proptest! {
    // Nothing is kept beside the tree: a failure prints its whole case.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// spec: TRACK-2 TRACK-7
    #[test]
    fn every_granted_size_agrees_with_a_byte_by_byte_oracle(
        shift in 10u32..20,
        lengths in prop::collection::vec((0u64..3, 1u64..20), 1..6),
        writes in prop::collection::vec((any::<prop::sample::Index>(), 0..PAGE, 1u64..20_000), 1..8),
    ) {
        let (mut iova, mut ram, mut maps) = (3, 0, Vec::new());
        for (gap, pages) in lengths {
            iova += gap;
            maps.push((iova, pages, ram));
            (iova, ram) = (iova + pages, ram + pages);
        }
        let (_device, mediated) = stateful(1 << shift, &maps);
        mediated.start_tracking().unwrap();
        drained(&mediated);
        let mut done = Vec::new();
        for (index, offset, length) in writes {
            let (first, pages, _) = maps[index.index(maps.len())];
            let start = first * PAGE + offset.min(pages * PAGE - 1);
            let length = length.min((first + pages) * PAGE - start);
            write_from_device(&mediated, start, length as u32);
            done.push((start, length));
        }
        mediated.sync_dirty().unwrap();
        prop_assert_eq!(dirty_pages(&mediated), expected(1 << shift, &maps, &done));
        mediated.sync_dirty().unwrap();
        prop_assert!(drained(&mediated).is_empty());
    }
}
