use proptest::prelude::*;
use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_READ;

use super::*;

const PAGE: u64 = PAGE_SIZE;

fn area(offset: u64, length: u64) -> Area {
    Area { offset, length }
}

fn region(size: u64, areas: Option<Vec<Area>>) -> RegionInfo {
    let flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_MMAP;
    let capabilities = areas.into_iter().map(RegionCapability::SparseMmap).collect();
    RegionInfo { index: 2, flags, size, capabilities }
}

/// spec: LAYOUT-1
#[test]
fn without_a_sparse_capability_the_whole_region_or_nothing_is_mappable() {
    assert_eq!(device_areas(&region(3 * PAGE, None)).unwrap(), [area(0, 3 * PAGE)]);
    let plain = RegionInfo { flags: VFIO_REGION_INFO_FLAG_READ, ..region(3 * PAGE, None) };
    assert!(device_areas(&plain).unwrap().is_empty());
    assert!(device_areas(&region(0, None)).unwrap().is_empty());
}

/// The RFC's areas: a page that was trapped through one area stayed mapped through the other.
///
/// spec: LAYOUT-2
#[test]
fn rfc_defect_8_overlapping_or_misaligned_sparse_areas_are_refused() {
    let refused = |areas: &[Area]| device_areas(&region(8 * PAGE, Some(areas.to_vec()))).unwrap_err();
    assert!(matches!(refused(&[area(0, 2 * PAGE), area(PAGE, PAGE)]), LayoutError::Overlap { .. }));
    assert!(matches!(refused(&[area(PAGE, PAGE), area(0, PAGE + 1)]), LayoutError::Misaligned { .. }));
    assert!(matches!(refused(&[area(0, PAGE - 1)]), LayoutError::Misaligned { .. }));
    assert!(matches!(refused(&[area(1, PAGE)]), LayoutError::Misaligned { .. }));
    assert!(matches!(refused(&[area(0, 0)]), LayoutError::Misaligned { .. }));
    assert!(matches!(refused(&[area(7 * PAGE, PAGE + 1)]), LayoutError::Outside { .. }));
    assert!(matches!(refused(&[area(u64::MAX - PAGE + 1, 2 * PAGE)]), LayoutError::Outside { .. }));
    assert_eq!(
        device_areas(&region(8 * PAGE, Some(vec![area(PAGE, PAGE), area(0, PAGE)]))).unwrap(),
        [area(0, PAGE), area(PAGE, PAGE)]
    );
    let mut twice = region(8 * PAGE, Some(vec![area(0, PAGE)]));
    twice.capabilities.push(RegionCapability::SparseMmap(vec![area(PAGE, PAGE)]));
    assert_eq!(device_areas(&twice).unwrap_err(), LayoutError::DuplicateCapability { region: 2 });
    let unmappable = RegionInfo { flags: VFIO_REGION_INFO_FLAG_READ, ..region(PAGE, Some(vec![area(0, PAGE)])) };
    assert_eq!(device_areas(&unmappable).unwrap_err(), LayoutError::NotMappable { region: 2 });
}

/// spec: LAYOUT-3
#[test]
fn a_claim_takes_the_pages_that_it_touches_and_no_other() {
    let whole = [area(0, 4 * PAGE)];
    for (claim, left) in [
        (area(PAGE, PAGE), vec![area(0, PAGE), area(2 * PAGE, 2 * PAGE)]),
        (area(PAGE, PAGE - 1), vec![area(0, PAGE), area(2 * PAGE, 2 * PAGE)]),
        (area(PAGE, PAGE + 1), vec![area(0, PAGE), area(3 * PAGE, PAGE)]),
        (area(PAGE - 1, 1), vec![area(PAGE, 3 * PAGE)]),
        (area(PAGE - 1, 2), vec![area(2 * PAGE, 2 * PAGE)]),
        (area(4 * PAGE - 1, 1), vec![area(0, 3 * PAGE)]),
        (area(0, 4 * PAGE), vec![]),
        (area(u64::MAX, 1), vec![area(0, 4 * PAGE)]),
    ] {
        assert_eq!(subtract(&whole, &[claim]), left, "{claim:?}");
    }
}

#[test]
fn containment_crosses_areas_that_touch_and_not_holes() {
    let areas = [area(0, PAGE), area(PAGE, PAGE), area(3 * PAGE, PAGE)];
    assert!(contains(&areas, area(0, 2 * PAGE)));
    assert!(contains(&areas, area(3 * PAGE, PAGE)));
    assert!(!contains(&areas, area(PAGE, 2 * PAGE)));
    assert!(!contains(&areas, area(3 * PAGE, PAGE + 1)));
    assert!(!contains(&areas, area(0, 0)));
    assert!(!contains(&areas, area(u64::MAX, 2)));
}

const PAGES: u64 = 24;

proptest! {
    /// Page by page: left over is what an area covers and no claim touches.
    ///
    /// spec: LAYOUT-3
    #[test]
    fn subtraction_agrees_with_a_page_by_page_oracle(
        mask in 0u32..1 << PAGES,
        claims in prop::collection::vec((0..PAGES * PAGE, 1..6 * PAGE), 0..6),
        tail in 1..=PAGE,
    ) {
        let size = (PAGES - 1) * PAGE + tail;
        let areas: Vec<Area> = (0..PAGES)
            .filter(|page| mask & 1 << page != 0)
            .map(|page| area(page * PAGE, PAGE.min(size - page * PAGE)))
            .collect();
        let claims: Vec<Area> = claims.into_iter().map(|(offset, length)| area(offset, length)).collect();
        let left = subtract(&device_areas(&region(size, Some(areas))).unwrap(), &claims);
        for page in 0..PAGES {
            let (start, end) = (page * PAGE, ((page + 1) * PAGE).min(size));
            let hooked = claims.iter().any(|claim| claim.offset < (page + 1) * PAGE && claim.offset + claim.length > start);
            let expected = mask & 1 << page != 0 && !hooked;
            prop_assert_eq!(contains(&left, area(start, end - start)), expected, "page {}", page);
            let touched = left.iter().any(|area| area.offset < end && area.offset + area.length > start);
            prop_assert_eq!(touched, expected, "page {}", page);
        }
        prop_assert!(left.is_sorted());
    }
}
