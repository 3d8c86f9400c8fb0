use super::*;
use crate::memory::GuestRam;

const PAGES: u64 = 600;

struct Watched {
    ram: Arc<GuestRam>,
    dirt: CpuDirt,
    log: DirtyLog,
}

/// `None`, said aloud, where this machine has no CPU dirt: nothing can be shown there.
fn watched() -> Option<Watched> {
    if let Err(error) = CpuDirt::supported() {
        eprintln!("skipped: {error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
        return None;
    }
    let ram = GuestRam::new(PAGES * PAGE_SIZE).unwrap();
    let dirt = CpuDirt::new(Arc::clone(ram.mapping())).unwrap();
    let log = DirtyLog::new(PAGES);
    log.start();
    log.drain().commit();
    Some(Watched { ram, dirt, log })
}

impl Watched {
    fn collect(&self) -> Vec<u64> {
        self.dirt.collect(&self.log, 0).unwrap();
        let drain = self.log.drain();
        let pages = drain.bitmap().iter_ones().map(|page| page as u64).collect();
        drain.commit();
        pages
    }
}

/// spec: MEM-30
#[test]
fn stores_are_seen_once_each_on_fresh_and_on_populated_pages() {
    let Some(vm) = watched() else { return };
    // Half of the pages exist before; the others are still holes when they are armed.
    vm.ram.mapping().fill(0, PAGES / 2 * PAGE_SIZE, 1).unwrap();
    vm.dirt.arm().unwrap();
    assert!(vm.collect().is_empty());
    let written = [0, 1, 63, 64, 65, PAGES / 2 - 1, PAGES / 2, PAGES - 1];
    for page in written {
        vm.ram.mapping().write(page * PAGE_SIZE + PAGE_SIZE - 1, &[7]).unwrap();
    }
    assert_eq!(vm.collect(), written);
    assert!(vm.collect().is_empty());
    vm.ram.mapping().write(64 * PAGE_SIZE, &[8]).unwrap();
    assert_eq!(vm.collect(), [64]);
}

#[test]
fn more_runs_than_one_scan_holds_are_all_seen() {
    let ram = GuestRam::new(4096 * PAGE_SIZE).unwrap();
    if watched().is_none() {
        return;
    }
    let dirt = CpuDirt::new(Arc::clone(ram.mapping())).unwrap();
    let log = DirtyLog::new(5000);
    log.start();
    log.drain().commit();
    dirt.arm().unwrap();
    for page in (0..4096).step_by(2) {
        ram.mapping().fill(page * PAGE_SIZE, 1, 1).unwrap();
    }
    dirt.collect(&log, 900).unwrap();
    assert_eq!(log.count(), 2048);
    let drain = log.drain();
    assert!(drain.bitmap().iter_ones().all(|page| (900..900 + 4096).contains(&page) && page % 2 == 0));
    drain.commit();
}

/// spec: MEM-31
#[test]
fn writes_by_the_kernel_through_the_mapping_are_seen() {
    let Some(vm) = watched() else { return };
    vm.ram.mapping().fill(0, PAGES * PAGE_SIZE, 1).unwrap();
    vm.dirt.arm().unwrap();
    let (from, to) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut &to, &[9; 100]).unwrap();
    // A read(2) whose buffer is guest memory, across a page edge.
    let count = crate::sys::read_into(&from, vm.ram.mapping(), 5 * PAGE_SIZE - 50, 100).unwrap();
    assert_eq!(count, 100);
    assert_eq!(vm.collect(), [4, 5]);
}

/// spec: MEM-32
#[test]
fn writes_through_another_mapping_are_not_seen() {
    let Some(vm) = watched() else { return };
    vm.dirt.arm().unwrap();
    vm.ram.dma_mapping().fill(0, PAGE_SIZE, 1).unwrap();
    rustix::io::pwrite(vm.ram.fd(), b"x", PAGE_SIZE).unwrap();
    assert!(vm.collect().is_empty());
    let mut byte = [0];
    vm.ram.mapping().read(0, &mut byte).unwrap();
    assert_eq!(byte, [1]);
    // Reading what another mapping wrote is no write either.
    assert!(vm.collect().is_empty());
}

#[test]
fn threads_that_write_while_pages_are_collected_lose_none() {
    let Some(vm) = watched() else { return };
    vm.dirt.arm().unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut copy = vec![0; PAGES as usize];
    let take = |copy: &mut Vec<u64>| {
        for page in vm.collect() {
            copy[page as usize] =
                vm.ram.dma_mapping().load_u64(page * PAGE_SIZE, std::sync::atomic::Ordering::Relaxed).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..30_000_u64 {
                let at = round * 7 % PAGES * PAGE_SIZE;
                vm.ram.mapping().store_u64(at, round, std::sync::atomic::Ordering::Relaxed).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Release);
        });
        while !stop.load(std::sync::atomic::Ordering::Acquire) {
            take(&mut copy);
        }
    });
    take(&mut copy);
    for (page, value) in copy.iter().enumerate() {
        let at = page as u64 * PAGE_SIZE;
        assert_eq!(vm.ram.mapping().load_u64(at, std::sync::atomic::Ordering::Relaxed).unwrap(), *value);
    }
}

/// spec: MEM-33
#[test]
fn a_scan_that_fails_makes_the_whole_mapping_dirty() {
    let Some(vm) = watched() else { return };
    // The registration is gone, so that the scan refuses: as on a mapping that somebody replaced.
    let CpuDirt { protect, pagemap, mapping } = vm.dirt;
    drop(protect);
    let dirt = CpuDirt { protect: AsyncWriteProtect::open().unwrap(), pagemap, mapping };
    let log = DirtyLog::new(PAGES + 2);
    log.start();
    log.drain().commit();
    let error = dirt.collect(&log, 1).unwrap_err();
    assert!(matches!(error, MemoryError::CpuDirt(CpuDirtError::Scan(_))), "{error:?}");
    assert_eq!(log.drain().run_from(0), Some(crate::memory::PageRun { first: 1, count: PAGES }));
}

/// spec: MEM-34
#[test]
fn collecting_into_a_log_that_would_forget_is_refused_before_anything_is_read() {
    let Some(vm) = watched() else { return };
    vm.dirt.arm().unwrap();
    vm.ram.mapping().fill(3 * PAGE_SIZE, 1, 1).unwrap();
    let stopped = DirtyLog::new(PAGES);
    assert!(matches!(vm.dirt.collect(&stopped, 0), Err(MemoryError::NotTracking)));
    let small = DirtyLog::new(PAGES - 1);
    small.start();
    assert!(matches!(vm.dirt.collect(&small, 0), Err(MemoryError::OutOfRange { .. })));
    assert_eq!(vm.collect(), [3]);
}

#[test]
fn a_second_watcher_of_one_mapping_is_refused() {
    let Some(vm) = watched() else { return };
    let error = CpuDirt::new(Arc::clone(vm.ram.mapping())).unwrap_err();
    assert_eq!(error.errno(), Errno::BUSY);
    drop(vm.dirt);
    CpuDirt::new(Arc::clone(vm.ram.mapping())).unwrap();
}

/// spec: MEM-35
#[test]
fn discarded_pages_are_not_seen_until_they_are_written_again() {
    let Some(vm) = watched() else { return };
    vm.ram.mapping().fill(0, PAGES * PAGE_SIZE, 1).unwrap();
    vm.dirt.arm().unwrap();
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(vm.ram.fd(), punch, 2 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
    let mut byte = [1];
    vm.ram.mapping().read(2 * PAGE_SIZE, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert!(vm.collect().is_empty());
    vm.ram.mapping().fill(3 * PAGE_SIZE, 1, 1).unwrap();
    assert_eq!(vm.collect(), [3]);
}

/// Not a promise: prints what arming and collecting cost here. Run with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost_of_arming_and_collecting() {
    let Some(_) = watched() else { return };
    let pages = 256 << 10;
    let ram = GuestRam::new(pages * PAGE_SIZE).unwrap();
    ram.mapping().fill(0, pages * PAGE_SIZE, 1).unwrap();
    let dirt = CpuDirt::new(Arc::clone(ram.mapping())).unwrap();
    let log = DirtyLog::new(pages);
    log.start();
    let timed = |what: &str, run: &dyn Fn()| {
        let begun = std::time::Instant::now();
        run();
        eprintln!("{what}: {:?}", begun.elapsed());
    };
    timed("arm 1 GiB", &|| dirt.arm().unwrap());
    timed("collect, none", &|| dirt.collect(&log, 0).unwrap());
    for (what, every) in [("1 %", 100), ("100 %", 1)] {
        timed(&format!("store to {what}"), &|| {
            (0..pages).step_by(every).for_each(|page| ram.mapping().fill(page * PAGE_SIZE, 1, 2).unwrap());
        });
        timed(&format!("collect {what}"), &|| dirt.collect(&log, 0).unwrap());
    }
}
