use proptest::prelude::*;
use rustix::io::Errno;

use super::*;
use crate::memory::GuestRam;

const P: u64 = PAGE_SIZE;
/// Of RAM, mapped twice and apart.
const PAGES: u64 = 200;
const FIRST: u64 = 37 * P;
const SECOND: u64 = 1000 * P;
/// Pages of the first map
const SPLIT: u64 = 130;

fn maps() -> [IovaMapping; 2] {
    let map = |iova, pages, ram_offset| IovaMapping { iova, length: pages * P, ram_offset, read: true, write: true };
    [map(FIRST, SPLIT, 0), map(SECOND, PAGES - SPLIT, SPLIT * P)]
}

fn space() -> Arc<AddressSpace> {
    let space = AddressSpace::new(GuestRam::new(PAGES * P).unwrap());
    maps().into_iter().for_each(|map| space.map(map).unwrap());
    space.log().start_clean();
    space
}

fn address(page: u64) -> u64 {
    if page < SPLIT { FIRST + page * P } else { SECOND + (page - SPLIT) * P }
}

fn dirty(space: &AddressSpace) -> Vec<u64> {
    let drain = space.log().drain();
    drain.bitmap().iter_ones().map(|page| page as u64).collect()
}

/// What a report is, page by page and bit by bit.
fn naive(dirty: &[bool], iova: u64, length: u64, page_size: u64, bytes: usize) -> (Vec<u8>, Vec<bool>) {
    let mut bitmap = vec![0; bytes];
    let mut left = dirty.to_vec();
    for (page, left) in left.iter_mut().enumerate() {
        let at = address(page as u64);
        if *left && at + P > iova && at < iova + length {
            let bit = (at - iova) / page_size;
            bitmap[bit as usize / 8] |= 1 << (bit % 8);
            *left = false;
        }
    }
    (bitmap, left)
}

#[derive(Debug, Clone)]
struct Ask {
    marks: Vec<u64>,
    iova: u64,
    length: u64,
    shift: u32,
    commits: bool,
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let starts = prop_oneof![0..200u64, 950..1100u64];
    let ask = (proptest::collection::vec(0..PAGES, 0..40), starts, 1..1200 * P, 12..26u32, any::<bool>());
    let ask =
        ask.prop_map(|(marks, start, length, shift, commits)| Ask { marks, iova: start * P, length, shift, commits });
    proptest::collection::vec(ask, 1..12)
}

proptest! {
    /// spec: MEM-45 VFU-76
    #[test]
    fn any_report_of_any_page_size_is_what_a_plain_list_says(asks in asks()) {
        let space = space();
        let mut pages = vec![false; PAGES as usize];
        for Ask { marks, iova, length, shift, commits } in asks {
            for page in marks {
                space.mark_dirty(address(page), 1).unwrap();
                pages[page as usize] = true;
            }
            let page_size = 1u64 << shift;
            let bits = length.div_ceil(page_size);
            // A bit that is set already stays set.
            let mut bitmap = vec![0; bits.div_ceil(8) as usize];
            let (expected, left) = naive(&pages, iova, length, page_size, bitmap.len());
            let mut report = Report::new(iova, length, page_size, &mut bitmap).unwrap();
            let mut taken = Taken::new(&space);
            maps().iter().for_each(|map| taken.take(map, &mut report));
            prop_assert_eq!(&bitmap, &expected);
            let gone = pages.iter().zip(&left).filter(|(before, after)| before != after).count();
            prop_assert_eq!(taken.count(), gone as u64);
            if commits {
                taken.commit();
                pages = left;
            } else {
                drop(taken);
            }
            let kept: Vec<u64> = (0..PAGES).filter(|page| pages[*page as usize]).collect();
            prop_assert_eq!(dirty(&space), kept);
        }
    }
}

/// spec: VFU-77
#[test]
fn reports_that_cannot_be_are_refused() {
    let mut bitmap = [0xA5; 2];
    let refused = [
        (P, 0, P, Errno::INVAL),
        (P + 1, P, P, Errno::INVAL),
        (P, P, P - 1, Errno::INVAL),
        (P, P, P / 2, Errno::INVAL),
        (P, P, 3 * P, Errno::INVAL),
        (P, P, 0, Errno::INVAL),
        // One bit too many for two bytes
        (P, 16 * P + 1, P, Errno::INVAL),
        (u64::MAX - P + 1, P + 1, P, Errno::OVERFLOW),
    ];
    for (iova, length, page_size, errno) in refused {
        let error = Report::new(iova, length, page_size, &mut bitmap).unwrap_err();
        assert_eq!(error.errno(), errno, "{iova:#x} {length:#x} {page_size:#x}");
    }
    for (iova, length, page_size) in
        [(P, 16 * P, P), (P, 1, P), (u64::MAX - P + 1, P, P), (0, u64::MAX, 1 << 63), (P, P, 1 << 63)]
    {
        Report::new(iova, length, page_size, &mut bitmap).unwrap();
    }
    assert_eq!(bitmap, [0xA5; 2]);
}

/// spec: MEM-45
#[test]
fn bits_that_are_set_stay_and_marks_that_come_meanwhile_are_not_taken() {
    let space = space();
    space.mark_dirty(FIRST + 9 * P, 1).unwrap();
    let mut bitmap = [0b1000_0000, 0];
    let mut taken = Taken::new(&space);
    taken.take(&maps()[0], &mut Report::new(FIRST, 16 * P, P, &mut bitmap).unwrap());
    assert_eq!(bitmap, [0b1000_0000, 0b10]);
    space.mark_dirty(FIRST + 9 * P, 1).unwrap();
    space.mark_dirty(FIRST + 10 * P, 1).unwrap();
    taken.commit();
    assert_eq!(dirty(&space), [9, 10]);
}

/// spec: MEM-46
#[test]
fn what_comes_back_into_a_stopped_log_is_forgotten() {
    let space = space();
    space.mark_dirty(FIRST, 1).unwrap();
    let mut taken = Taken::new(&space);
    taken.take(&maps()[0], &mut Report::new(FIRST, P, P, &mut [0]).unwrap());
    space.log().stop();
    drop(taken);
    assert!(space.log().is_empty());
}
