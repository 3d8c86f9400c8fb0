//! The table of maps over a kernel that only keeps a list.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

const PAGE: u64 = 4096;

fn memory(pages: u64) -> Arc<Mapping> {
    let fd = memfd_create("iospace", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    Arc::new(Mapping::new(&fd, 0, pages * PAGE).unwrap())
}

fn space() -> IoSpace {
    IoSpace::new(Handle::Fake(Mutex::default()))
}

fn kernel(space: &IoSpace) -> Vec<(u64, u64)> {
    let Handle::Fake(kernel) = &space.handle else { unreachable!() };
    let mut maps = kernel.lock().unwrap().clone();
    maps.sort_unstable();
    maps
}

fn map(memory: &Arc<Mapping>, iova: u64, length: u64) -> IoMap {
    IoMap { iova, length, memory: memory.clone(), offset: 0, read: true, write: true }
}

/// spec: DEVDMA-1
#[test]
fn overlapping_maps_are_refused_and_adjacent_ones_are_not() {
    let (space, memory) = (space(), memory(4));
    space.map(1, &map(&memory, 4 * PAGE, 2 * PAGE)).unwrap();
    for (iova, length) in [(4, 2), (3, 2), (5, 1), (5, 2), (3, 4)] {
        assert_eq!(space.map(1, &map(&memory, iova * PAGE, length * PAGE)), Err(Errno::EXIST), "{iova} {length}");
    }
    space.map(1, &map(&memory, 3 * PAGE, PAGE)).unwrap();
    space.map(1, &map(&memory, 6 * PAGE, PAGE)).unwrap();
    assert_eq!(kernel(&space).len(), 3);
}

#[test]
fn a_map_that_cannot_be_is_refused_before_the_kernel_sees_it() {
    let (space, memory) = (space(), memory(2));
    for wrong in [
        map(&memory, 0, 0),
        map(&memory, 0, 3 * PAGE),
        map(&memory, u64::MAX - PAGE + 2, PAGE),
        IoMap { offset: PAGE + 1, ..map(&memory, 0, PAGE) },
        IoMap { offset: u64::MAX, ..map(&memory, 0, PAGE) },
        IoMap { read: false, write: false, ..map(&memory, 0, PAGE) },
    ] {
        assert_eq!(space.map(1, &wrong), Err(Errno::INVAL), "{wrong:?}");
    }
    assert!(kernel(&space).is_empty());
    // The last page of the address space is no overflow.
    space.map(1, &map(&memory, u64::MAX - PAGE + 1, PAGE)).unwrap();
    space.forget(1).unwrap();
    assert!(kernel(&space).is_empty());
}

/// spec: DEVDMA-2
#[test]
fn devices_of_one_vm_map_once_and_the_last_one_unmaps() {
    let (space, memory) = (space(), memory(4));
    let range = map(&memory, 0, 4 * PAGE);
    space.map(1, &range).unwrap();
    space.map(2, &range).unwrap();
    assert_eq!(kernel(&space), [(0, 4 * PAGE)]);
    assert_eq!(space.map(2, &range), Err(Errno::EXIST), "one device maps a range once");
    assert_eq!(
        space.map(3, &IoMap { write: false, ..range.clone() }),
        Err(Errno::EXIST),
        "an unequal map does not join"
    );
    space.unmap(1, 0, 4 * PAGE).unwrap();
    assert_eq!(kernel(&space), [(0, 4 * PAGE)]);
    space.forget(2).unwrap();
    assert!(kernel(&space).is_empty());
    assert_eq!(Arc::strong_count(&memory), 2, "only the test and `range` still hold the memory");
}

/// spec: DEVDMA-3
#[test]
fn an_unmap_that_cuts_a_map_changes_nothing() {
    let (space, memory) = (space(), memory(4));
    space.map(1, &map(&memory, 0, PAGE)).unwrap();
    space.map(1, &map(&memory, PAGE, 2 * PAGE)).unwrap();
    for (iova, length) in [(0, 2 * PAGE), (0, 3 * PAGE - 1), (1, 3 * PAGE - 1), (2 * PAGE, PAGE), (0, 0)] {
        assert_eq!(space.unmap(1, iova, length), Err(Errno::INVAL), "{iova:#x} {length:#x}");
    }
    assert_eq!(space.unmap(1, 2, u64::MAX), Err(Errno::INVAL), "past the end of the address space");
    assert_eq!(kernel(&space).len(), 2);
    space.unmap(1, 0, 3 * PAGE).unwrap();
    assert!(kernel(&space).is_empty());
}

#[test]
fn a_map_that_the_kernel_refuses_leaves_no_entry() {
    let (space, memory) = (space(), memory(1));
    assert_eq!(space.map(1, &map(&memory, 0xbad_0000, PAGE)), Err(Errno::NOSPC));
    assert_eq!(Arc::strong_count(&memory), 1);
    assert_eq!(space.map(1, &map(&memory, 0xbad_0000, PAGE)), Err(Errno::NOSPC), "and not EEXIST");
}

#[test]
fn memory_stays_referenced_while_it_is_mapped() {
    let (space, memory) = (space(), memory(1));
    space.map(1, &map(&memory, 0, PAGE)).unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    space.unmap(1, 0, PAGE).unwrap();
    assert_eq!(Arc::strong_count(&memory), 1);
}
