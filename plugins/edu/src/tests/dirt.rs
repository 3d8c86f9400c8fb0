//! No page that the device writes is missed, and no DMA runs where none may.

use std::collections::BTreeSet;

use super::fake::DMA_TIME;
use super::*;

const STEP: Duration = Duration::from_millis(10);

fn pages(writes: &[(u64, u64)]) -> BTreeSet<u64> {
    writes.iter().flat_map(|(iova, length)| iova / 4096..=(iova + length - 1) / 4096).collect()
}

fn report(device: &TestDevice<'_>) -> BTreeSet<u64> {
    device.dirty_pages(ALL.iova, ALL.length, 4096).unwrap().into_iter().collect()
}

/// The mutant "marked only at the doorbell" dies here: the page is reported at every sync, and once after the last byte.
/// spec: EDU-DIRT
#[test]
fn a_running_dma_is_reported_at_every_sync_and_once_after() {
    let host = host();
    let mut device = open(&host);
    device.start_tracking(&[ALL], 4096).unwrap();
    assert_eq!(report(&device), BTreeSet::new());
    ring(&device, BUFFER, 0x8ffc, 8, RUN | TO_RAM);
    let straddles = BTreeSet::from([8, 9]);
    for _ in 0..5 {
        assert_eq!(report(&device), straddles);
        host.advance(STEP);
    }
    host.advance(DMA_TIME);
    assert_eq!(pages(&host.device_writes()), straddles);
    assert_eq!(report(&device), straddles);
    assert_eq!(report(&device), BTreeSet::new());
}

#[test]
fn a_dma_into_the_device_dirties_nothing() {
    let host = host();
    let mut device = open(&host);
    device.start_tracking(&[ALL], 4096).unwrap();
    ring(&device, 0x3000, BUFFER, 4096, RUN);
    assert_eq!(report(&device), BTreeSet::new());
    host.advance(DMA_TIME);
    assert_eq!(report(&device), BTreeSet::new());
}

#[test]
fn a_dma_that_began_before_tracking_is_known() {
    let host = host();
    let mut device = open(&host);
    ring(&device, BUFFER, 0x5000, 4096, RUN | TO_RAM);
    host.advance(STEP);
    device.start_tracking(&[ALL], 4096).unwrap();
    assert_eq!(report(&device), BTreeSet::from([5]));
    host.advance(DMA_TIME);
    assert_eq!(report(&device), BTreeSet::from([5]));
}

/// A report covers one range of several: that the DMA has ended is seen in one, and must not be lost for the others.
#[test]
fn a_dma_that_ends_during_the_report_of_another_range_is_marked() {
    let host = host();
    let mut device = open(&host);
    device.start_tracking(&[ALL], 4096).unwrap();
    ring(&device, BUFFER, 0x5000, 4096, RUN | TO_RAM);
    host.marked();
    host.advance(DMA_TIME);
    device.dirty_pages(0x20_000, 0x1000, 4096).unwrap();
    // The fake leaves out what `mark_dirty` said of other ranges, so ask the device what it would have marked.
    ring(&device, BUFFER, 0x6000, 4096, RUN | TO_RAM);
    host.advance(DMA_TIME);
    let live = device.dirty_pages(0x6000, 0x1000, 4096).unwrap();
    assert_eq!(live, [0]);
    assert_eq!(host.marked(), []);
}

/// A ring while the device runs is ignored by it; back-to-back rings each end with their pages marked.
#[test]
fn every_doorbell_of_a_burst_is_accounted_for() {
    let host = host();
    let mut device = open(&host);
    device.start_tracking(&[ALL], 4096).unwrap();
    let mut dirty = BTreeSet::new();
    for i in 0..40_u64 {
        ring(&device, BUFFER, i * 4096 + 4000, 200, RUN | TO_RAM);
        host.advance(Duration::from_millis(30));
        if i % 7 == 0 {
            dirty.extend(report(&device));
        }
    }
    host.advance(DMA_TIME);
    dirty.extend(report(&device));
    let written = pages(&host.device_writes());
    assert!(!written.is_empty() && written.is_subset(&dirty), "{written:?} {dirty:?}");
    assert!(host.with(|edu, _| edu.started) < 40, "some rings were ignored");
}

/// The model of a migration: pages are copied at each sync; after the stop the copy equals the source.
#[test]
fn what_is_copied_at_each_sync_is_the_memory_at_the_end() {
    let host = host();
    let mut device = busy(&host);
    device.start_tracking(&[ALL], 4096).unwrap();
    let mut copy = host.memory(0, RAM);
    let sync = |device: &TestDevice<'_>, copy: &mut Vec<u8>| {
        for page in report(device) {
            let start = page as usize * 4096;
            copy[start..start + 4096].copy_from_slice(&host.memory(start as u64, 4096));
        }
    };
    for i in 0..20_u64 {
        host.with(|edu, _| edu.buffer.fill(i as u8 + 1));
        ring(&device, BUFFER, (i * 3 % 50) * 4096 + 100, 4000, RUN | TO_RAM);
        for _ in 0..i % 13 {
            host.advance(STEP);
            sync(&device, &mut copy);
        }
    }
    host.with(|edu, _| edu.buffer.fill(0xee));
    ring(&device, BUFFER, 60 * 4096 - 8, 16, RUN | TO_RAM);
    device.walk(Running, Stop).unwrap();
    sync(&device, &mut copy);
    assert!(copy == host.memory(0, RAM), "a page was lost");
    device.walk(Stop, StopCopy).unwrap();
    assert!(copy == host.memory(0, RAM), "saving wrote guest memory");
}

#[test]
fn an_in_flight_dma_ends_before_the_device_is_quiet() {
    let host = host();
    let mut device = open(&host);
    ring(&device, BUFFER, 0x5000, 4096, RUN | TO_RAM);
    device.set_state(Running, RunningP2p).unwrap();
    assert!(!host.with(|edu, _| edu.is_moving()));
    assert!(host.now() >= DMA_TIME);
}

#[test]
fn a_dma_that_never_ends_leaves_the_device_running() {
    let host = host();
    let mut device = open(&host);
    ring(&device, BUFFER, 0x5000, 4096, RUN | TO_RAM);
    host.set_deadline(Some(Duration::from_millis(50)));
    let failed = device.set_state(Running, RunningP2p).unwrap_err();
    assert_eq!(failed, ArcFailed { errno: Errno::ETIMEDOUT, actual: Running });
    host.set_deadline(None);
    host.advance(DMA_TIME);
    ring(&device, BUFFER, 0x6000, 4096, RUN | TO_RAM);
    assert!(host.with(|edu, _| edu.is_moving()));
}

/// In RUNNING_P2P a doorbell waits, reads as running, and rings on the way back.
#[test]
fn a_doorbell_in_p2p_is_deferred_and_rings_later() {
    let host = host();
    let mut device = busy(&host);
    device.start_tracking(&[ALL], 4096).unwrap();
    report(&device);
    device.set_state(Running, RunningP2p).unwrap();
    let started = host.with(|edu, _| edu.started);
    ring(&device, BUFFER, 0x7000, 16, RUN | TO_RAM);
    assert_eq!(device.read_u64(BAR, DMA_COMMAND), Ok(RUN | TO_RAM));
    // Ignored, as a running device ignores it.
    ring(&device, BUFFER, 0x9000, 16, RUN | TO_RAM);
    assert_eq!(device.read_u64(BAR, DMA_DST), Ok(0x7000));
    host.advance(DMA_TIME * 2);
    assert_eq!(host.with(|edu, _| edu.started), started);
    device.set_state(RunningP2p, Running).unwrap();
    assert_eq!(host.with(|edu, _| edu.started), started + 1);
    assert_eq!(report(&device), BTreeSet::from([7]));
    host.advance(DMA_TIME);
    assert_eq!(device.read_u64(BAR, DMA_COMMAND), Ok(TO_RAM));
    assert_eq!(pages(&host.device_writes()), BTreeSet::from([7, 8, 9]));
}

/// spec: EDU-QUIET
#[test]
fn a_deferred_doorbell_travels_and_rings_at_the_destination() {
    let (a, b) = (host(), host());
    let (mut source, mut destination) = (busy(&a), open(&b));
    source.walk(Running, RunningP2p).unwrap();
    a.device_writes();
    ring(&source, BUFFER, 0x7000, 16, RUN | TO_RAM);
    source.walk(RunningP2p, StopCopy).unwrap();
    destination.walk(Running, Resuming).unwrap();
    destination.load(&source.save_all(4096).unwrap()).unwrap();
    destination.walk(Resuming, RunningP2p).unwrap();
    assert_eq!(destination.read_u64(BAR, DMA_COMMAND), Ok(RUN | TO_RAM));
    assert_eq!(b.device_writes(), []);
    destination.start_tracking(&[ALL], 4096).unwrap();
    destination.set_state(RunningP2p, Running).unwrap();
    assert_eq!(report(&destination), BTreeSet::from([7]));
    b.advance(DMA_TIME);
    assert_eq!(b.device_writes(), [(0x7000, 16)]);
    assert_eq!(a.device_writes(), [], "it rings on one side only");
}

/// Every state that does not run, by every path: nothing of the client's moves there.
/// spec: EDU-QUIET
#[test]
fn no_dma_of_the_client_runs_while_stopped() {
    for path in [vec![RunningP2p, Stop], vec![PreCopy, PreCopyP2p, StopCopy], vec![RunningP2p, PreCopyP2p, StopCopy]] {
        let host = host();
        let mut device = busy(&host);
        let mut at = Running;
        for next in path {
            ring(&device, BUFFER, 0x5000, 4096, RUN | TO_RAM);
            device.set_state(at, next).unwrap();
            at = next;
        }
        host.device_writes();
        assert_eq!(device.write_u64(BAR, DMA_COMMAND, RUN | TO_RAM), Err(Errno::EIO));
        host.advance(DMA_TIME * 3);
        assert_eq!(host.device_writes(), [], "{at}");
        device.walk(at, Running).unwrap();
        host.advance(DMA_TIME);
        assert_eq!(host.device_writes(), [(0x5000, 4096)], "the deferred one, from {at}");
    }
}

/// Doorbells from other threads while reports and arcs run: what was written was reported.
#[test]
fn doorbells_race_reports_and_arcs_and_no_page_is_lost() {
    let host = host();
    let mut device = open(&host);
    device.start_tracking(&[ALL], 4096).unwrap();
    let mut dirty = BTreeSet::new();
    {
        let (device, host) = (&device, &host);
        std::thread::scope(|scope| {
            let ringers: Vec<_> = (0..2_u64)
                .map(|who| {
                    scope
                        .spawn(move || (0..200).for_each(|i| ring(device, BUFFER, (who * 31 + i % 30) * 4096, 4096, 3)))
                })
                .collect();
            while ringers.iter().any(|ringer| !ringer.is_finished()) {
                host.advance(Duration::from_millis(35));
                dirty.extend(report(device));
            }
        });
    }
    device.walk(Running, Stop).unwrap();
    dirty.extend(report(&device));
    let written = pages(&host.device_writes());
    assert!(!written.is_empty() && written.is_subset(&dirty), "{written:?} {dirty:?}");
}

#[test]
fn wrong_arcs_are_refused() {
    let host = host();
    let mut device = open(&host);
    for (from, to) in [(Running, Stop), (Stop, PreCopy), (Resuming, StopCopy), (DeviceState::Error, Running)] {
        assert_eq!(device.set_state(from, to), Err(ArcFailed { errno: Errno::EINVAL, actual: from }));
    }
}
