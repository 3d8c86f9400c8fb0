use std::collections::BTreeMap;

use proptest::prelude::*;
use rustix::io::Errno;

use super::*;

const P: u64 = PAGE_SIZE;

fn rw(iova: u64, length: u64, ram_offset: u64) -> IovaMapping {
    IovaMapping { iova, length, ram_offset, read: true, write: true }
}

fn space(pages: u64) -> Arc<AddressSpace> {
    let space = AddressSpace::new(GuestRam::new(pages * P).unwrap());
    space.log().start();
    space.log().drain().commit();
    space
}

fn dirty(space: &AddressSpace) -> Vec<u64> {
    let drain = space.log().drain();
    let pages = drain.bitmap().iter_ones().map(|page| page as u64).collect();
    drain.commit();
    pages
}

#[test]
fn ram_is_whole_pages_of_sealed_zeros() {
    for size in [0, 1, P - 1, P + 1, RAM_MAX + P, u64::MAX] {
        assert!(matches!(GuestRam::new(size), Err(MemoryError::RamSize { size: named }) if named == size));
    }
    let ram = GuestRam::new(3 * P).unwrap();
    assert_eq!((ram.size(), ram.pages()), (3 * P, 3));
    assert_eq!(rustix::fs::ftruncate(ram.fd(), P), Err(Errno::PERM));
    ram.mapping().write(2 * P, b"cpu").unwrap();
    let mut seen = [0; 3];
    ram.dma_mapping().read(2 * P, &mut seen).unwrap();
    assert_eq!(&seen, b"cpu");
}

const RAM_MAX: u64 = crate::memory::RAM_SIZE_MAX;

/// spec: MEM-1
#[test]
fn maps_that_cannot_be_are_refused_and_change_nothing() {
    let space = space(16);
    space.map(rw(16 * P, 4 * P, 4 * P)).unwrap();
    let refused = [
        (rw(0, 0, 0), Errno::INVAL),
        (rw(1, P, 0), Errno::INVAL),
        (rw(0, P - 1, 0), Errno::INVAL),
        (rw(0, P + 1, 0), Errno::INVAL),
        (rw(0, P, 512), Errno::INVAL),
        (rw(u64::MAX - P + 1, 2 * P, 0), Errno::OVERFLOW),
        (rw(0, P, 16 * P), Errno::INVAL),
        (rw(0, 2 * P, 15 * P), Errno::INVAL),
        (rw(0, P, u64::MAX - P + 1), Errno::INVAL),
        (IovaMapping { read: false, write: false, ..rw(0, P, 0) }, Errno::INVAL),
        // Overlaps: same, inside, around, first page, last page.
        (rw(16 * P, 4 * P, 4 * P), Errno::EXIST),
        (rw(17 * P, P, 0), Errno::EXIST),
        (rw(15 * P, 6 * P, 0), Errno::EXIST),
        (rw(15 * P, 2 * P, 0), Errno::EXIST),
        (rw(19 * P, 2 * P, 0), Errno::EXIST),
    ];
    for (map, errno) in refused {
        assert_eq!(space.map(map).unwrap_err().errno(), errno, "{map:?}");
    }
    assert_eq!(space.mappings(), [rw(16 * P, 4 * P, 4 * P)]);
    // The neighbours, the last page of all addresses, and the same RAM twice are fine.
    for map in [rw(15 * P, P, 0), rw(20 * P, P, 0), rw(u64::MAX - P + 1, P, 15 * P), rw(0, 16 * P - P, 0)] {
        space.map(map).unwrap();
    }
    let error = space.map(rw(16 * P, P, 0)).unwrap_err();
    assert!(matches!(error, MemoryError::Overlap { existing, .. } if existing == rw(16 * P, 4 * P, 4 * P)));
}

/// spec: MEM-2
#[test]
fn unmap_removes_whole_maps_and_never_cuts_one() {
    let space = space(16);
    let maps = [rw(0, 2 * P, 0), rw(2 * P, 2 * P, 2 * P), rw(8 * P, P, 8 * P), rw(u64::MAX - P + 1, P, 9 * P)];
    maps.into_iter().for_each(|map| space.map(map).unwrap());
    for (iova, length) in [(P, 3 * P), (0, 3 * P), (0, 1), (P, P), (8 * P, P - 1), (8 * P + 1, P)] {
        let error = space.unmap(iova, length).unwrap_err();
        assert!(matches!(error, MemoryError::Cut { .. }), "{iova:#x} {length:#x}: {error}");
        assert_eq!(error.errno(), Errno::INVAL);
    }
    assert_eq!(space.unmap(0, 0).unwrap_err().errno(), Errno::INVAL);
    assert_eq!(space.unmap(P, u64::MAX).unwrap_err().errno(), Errno::OVERFLOW);
    assert_eq!(space.mappings(), maps);
    assert_eq!(space.unmap(4 * P, 4 * P).unwrap(), []);
    assert_eq!(space.unmap(0, 5 * P).unwrap(), maps[..2]);
    assert_eq!(space.unmap(8 * P, u64::MAX - 8 * P + 1).unwrap(), maps[2..]);
    assert_eq!(space.mappings(), []);
}

/// spec: MEM-3
#[test]
fn accesses_cross_adjacent_maps_and_are_all_or_nothing() {
    let space = space(16);
    // Six neighbours, backwards in RAM: more pieces than fit without allocating.
    for page in 0..6 {
        space.map(rw(page * P, P, (10 - page) * P)).unwrap();
    }
    let data: Vec<u8> = (0..5 * P + 2).map(|byte| byte as u8).collect();
    space.write(P / 2, &data[..(5 * P) as usize]).unwrap();
    let mut back = vec![0; (5 * P) as usize];
    space.read(P / 2, &mut back).unwrap();
    assert_eq!(back, data[..(5 * P) as usize]);
    assert_eq!(dirty(&space), [5, 6, 7, 8, 9, 10]);

    // One byte too many at the end, or a hole in the middle: nothing is written, nothing is marked, nothing is read.
    space.unmap(3 * P, P).unwrap();
    for (iova, named) in [(P, 3 * P), (6 * P - 1, 6 * P), (7 * P, 7 * P), (u64::MAX, u64::MAX)] {
        let length = if iova == u64::MAX { 1 } else { 3 * P as usize };
        let error = space.write(iova, &vec![0xEE; length]).unwrap_err();
        assert!(matches!(error, MemoryError::Unmapped { iova } if iova == named), "{error}");
        assert_eq!(error.errno(), Errno::FAULT);
        assert!(space.read(iova, &mut vec![0; length]).is_err());
    }
    assert!(dirty(&space).is_empty());
    let mut back = vec![0; (P * 3 / 2) as usize];
    space.read(P / 2, &mut back).unwrap();
    assert_eq!(back, data[..(P * 3 / 2) as usize]);
    assert_eq!(space.write(u64::MAX, &[1, 2]).unwrap_err().errno(), Errno::OVERFLOW);
    // Nothing at all is everywhere possible.
    space.write(3 * P, &[]).unwrap();
    space.read(u64::MAX, &mut []).unwrap();
}

/// spec: MEM-4
#[test]
fn access_rights_are_those_of_every_map_that_is_touched() {
    let space = space(4);
    space.map(rw(0, P, 0)).unwrap();
    space.map(IovaMapping { write: false, ..rw(P, P, P) }).unwrap();
    space.map(IovaMapping { read: false, ..rw(2 * P, P, 2 * P) }).unwrap();
    assert!(matches!(space.write(P - 1, &[1, 1]), Err(MemoryError::Denied { iova }) if iova == P));
    assert!(matches!(space.read(2 * P - 1, &mut [0; 2]), Err(MemoryError::Denied { iova }) if iova == 2 * P));
    assert_eq!(space.write(P, &[1]).unwrap_err().errno(), Errno::ACCESS);
    assert!(dirty(&space).is_empty());
    space.read(P - 1, &mut [0; 2]).unwrap();
    space.write(3 * P - 1, &[1]).unwrap();
    // Marking asks nobody.
    space.mark_dirty(0, 3 * P).unwrap();
    assert_eq!(dirty(&space), [0, 1, 2]);
}

/// spec: MEM-5
#[test]
fn marks_of_partly_mapped_ranges_mark_the_rest_and_fail() {
    let space = space(8);
    space.map(rw(P, P, 0)).unwrap();
    space.map(rw(3 * P, P, 5 * P)).unwrap();
    space.map(rw(u64::MAX - P + 1, P, 7 * P)).unwrap();
    for (iova, length, expected) in [
        (0, 5 * P, &[0, 5][..]),
        (P, P + 1, &[0]),
        (2 * P, P + 1, &[5]),
        (P, u64::MAX, &[0, 5, 7]),
        (u64::MAX, 2, &[7]),
        (2 * P, P, &[]),
    ] {
        assert!(space.mark_dirty(iova, length).is_err(), "{iova:#x}");
        assert_eq!(dirty(&space), expected, "{iova:#x}");
    }
    space.mark_dirty(u64::MAX, 1).unwrap();
    space.mark_dirty(2 * P - 1, 1).unwrap();
    space.mark_dirty(2 * P, 0).unwrap();
    assert_eq!(dirty(&space), [0, 7]);
}

/// spec: MEM-6
#[test]
fn a_report_that_cannot_be_understood_makes_its_range_dirty() {
    let space = space(130);
    space.map(rw(0, 130 * P, 0)).unwrap();
    let wrong: [(u64, u64, u64, &[u64]); 7] = [
        (0, 130 * P, P, &[0, 0]),
        (0, 130 * P, P, &[0, 0, 0b100]),
        (0, 130 * P, P, &[0, 0, 0, 1]),
        (0, 130 * P, 0, &[0, 0, 0]),
        (0, 130 * P, P + 1, &[0, 0, 0]),
        (P, P, 2 * P, &[0]),
        (P, 64 * P, P, &[]),
    ];
    for (iova, length, page_size, bitmap) in wrong {
        let error = space.mark_bitmap(iova, length, page_size, bitmap).unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL);
        let (first, count) = (iova / P, length / P);
        assert_eq!(dirty(&space), (first..first + count).collect::<Vec<_>>());
    }
    space.mark_bitmap(0, 130 * P, P, &[1, 1 << 63, 0b11, 0]).unwrap();
    assert_eq!(dirty(&space), [0, 127, 128, 129]);
    space.mark_bitmap(0, 0, P, &[]).unwrap();
    assert!(dirty(&space).is_empty());
}

/// spec: MEM-7
#[test]
fn reports_of_unmapped_pages_are_an_error_only_when_they_are_dirty() {
    let space = space(8);
    space.map(rw(P, P, 6 * P)).unwrap();
    for page_size in [P, P / 4] {
        let bits = P / page_size;
        let page = |page: u64| ((1 << bits) - 1) << (page * bits);
        space.mark_bitmap(0, 4 * P, page_size, &[page(1)]).unwrap();
        assert_eq!(dirty(&space), [6]);
        let error = space.mark_bitmap(0, 4 * P, page_size, &[page(1) | page(2)]).unwrap_err();
        assert_eq!(error.errno(), Errno::FAULT);
        assert_eq!(dirty(&space), [6]);
    }
}

#[test]
fn the_last_map_that_is_allowed_is_the_65535th() {
    let space = space(1);
    for index in 0..MAPS_MAX as u64 {
        space.map(rw(index * P, P, 0)).unwrap();
    }
    assert_eq!(space.map(rw(MAPS_MAX as u64 * P, P, 0)).unwrap_err().errno(), Errno::NOSPC);
    space.unmap(0, P).unwrap();
    space.map(rw(MAPS_MAX as u64 * P, P, 0)).unwrap();
}

proptest! {
    /// Oracle: a table from IOVA page to RAM page.
    #[test]
    fn reports_mark_what_a_page_table_would(
        maps in prop::collection::vec((0..40u64, 1..6u64, 0..60u64), 0..12),
        first in 0..40u64, count in 0..40u64, cut in 0..4096u64,
        shift in 10..15u32, words in prop::collection::vec(any::<u64>() , 3),
    ) {
        let space = space(70);
        let mut table = BTreeMap::new();
        for (iova, length, ram) in maps {
            if space.map(rw(iova * P, length * P, ram * P)).is_ok() {
                table.extend((0..length).map(|page| (iova + page, ram + page)));
            }
        }
        let page_size = 1_u64 << shift;
        let (iova, length) = (first * page_size, (count * page_size).saturating_sub(cut));
        let bits = length.div_ceil(page_size);
        let words: Vec<u64> = (0..3u64).map(|index| {
            let valid = bits.saturating_sub(index * 64).min(64);
            if valid == 64 { words[index as usize] } else { words[index as usize] & ((1 << valid) - 1) }
        }).collect();
        let mut expected = std::collections::BTreeSet::new();
        let mut unmapped = false;
        for bit in (0..bits).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 != 0) {
            let (from, to) = (iova + bit * page_size, iova + ((bit + 1) * page_size).min(length));
            for page in from / P..to.div_ceil(P) {
                match table.get(&page) {
                    Some(ram) => { expected.insert(*ram); }
                    None => unmapped = true,
                }
            }
        }
        let result = space.mark_bitmap(iova, length, page_size, &words);
        prop_assert_eq!(dirty(&space), expected.into_iter().collect::<Vec<_>>());
        prop_assert_eq!(result.is_err(), unmapped);
    }
}
