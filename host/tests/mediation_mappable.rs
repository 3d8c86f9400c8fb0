//! Invariant 1, from outside: a hooked byte is never mmap-able. Whatever a plug-in claims, in whichever map, on whatever
//! boundary, with or without a file in place of its pages, and however it narrows what is told of the region: what can be
//! mapped is compared, page by page, with the naive rule.

mod mediation_support;

use std::sync::Arc;

use mediation_support::*;
use proptest::prelude::*;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;
use vfio_mediate::device::{Area, RegionCapability, RegionInfo};
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::mediation::mediator::{Claim, MmapAnswer};
use vfio_mediate::sys::{Seal, memfd};

const PAGES: u64 = BAR / PAGE;
/// What a file in place of pages is filled with; the device's own memory reads as zeroes.
const IN_PLACE: u8 = 0xaa;

/// Which of the claims are in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Normal,
    Tracking,
    Both,
}

fn claimed(offset: u64, length: u64, when: When, has_mmap: bool) -> Claim {
    let (normal, tracking) = (when != When::Tracking, when != When::Normal);
    Claim { normal, tracking, has_mmap, ..claim(0, offset, length) }
}

/// Claims that share a byte of one map are the plug-in's fault, and no device is opened: they are left out.
fn without_overlaps(claims: Vec<Claim>) -> Vec<Claim> {
    let mut kept: Vec<Claim> = Vec::new();
    for claim in claims {
        let clashes = |other: &Claim| {
            let together = (claim.normal && other.normal) || (claim.tracking && other.tracking);
            together && claim.offset < other.offset + other.length && other.offset < claim.offset + claim.length
        };
        if !kept.iter().any(clashes) {
            kept.push(claim);
        }
    }
    kept
}

fn open_with(device: &Arc<FakeDevice>, claims: &[Claim]) -> Arc<MediatedDevice> {
    open_script(device, |script| {
        script.claims = claims.to_vec();
        script.stand_in = Box::new(|| {
            let fd = memfd("in place", BAR, Seal::Size).unwrap();
            rustix::io::pwrite(&fd, &vec![IN_PLACE; BAR as usize], 0).unwrap();
            MmapAnswer::Instead { fd, offset: 0 }
        });
    })
    .unwrap()
}

/// What a page may be mapped as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapped {
    No,
    Device,
    InPlace,
}

/// The rule, byte by byte: a page is the device's if the device lets it be mapped and no byte of it is claimed, in either
/// map; a file's if it lies in a claim of both maps that has one, and no other claim has a byte of that claim's whole pages.
fn expected(areas: &[Area], claims: &[Claim], page: u64) -> Mapped {
    let claims_byte = |claim: &Claim, byte: u64| claim.offset <= byte && byte < claim.offset + claim.length;
    let whole_pages = |claim: &Claim| {
        (0..PAGES)
            .filter(|page| (page * PAGE..(page + 1) * PAGE).all(|byte| claims_byte(claim, byte)))
            .collect::<Vec<_>>()
    };
    let bytes = || page * PAGE..(page + 1) * PAGE;
    if !claims.iter().any(|claim| bytes().any(|byte| claims_byte(claim, byte))) {
        let own = areas.iter().any(|area| area.offset <= page * PAGE && (page + 1) * PAGE <= area.offset + area.length);
        return if own { Mapped::Device } else { Mapped::No };
    }
    for (position, claim) in claims.iter().enumerate() {
        let pages = whole_pages(claim);
        let others = claims.iter().enumerate().filter(|(other, _)| *other != position);
        let touched = |other: &Claim| {
            pages.iter().any(|page| (page * PAGE..(page + 1) * PAGE).any(|byte| claims_byte(other, byte)))
        };
        let alone = !others.into_iter().any(|(_, other)| touched(other));
        if claim.has_mmap && claim.normal && claim.tracking && alone && pages.contains(&page) {
            return Mapped::InPlace;
        }
    }
    Mapped::No
}

fn mapped(mediated: &MediatedDevice, page: u64) -> Mapped {
    match mediated.region_map(0, page * PAGE, PAGE) {
        Err(error) => {
            assert_eq!(error.errno(), Errno::NODEV, "{error}");
            Mapped::No
        }
        Ok(map) => {
            let mut data = vec![1; PAGE as usize];
            map.read(mediated, 0, &mut data).unwrap();
            assert!(data.iter().all(|byte| *byte == data[0]), "a page of two memories");
            if data[0] == IN_PLACE { Mapped::InPlace } else { Mapped::Device }
        }
    }
}

fn told(info: &RegionInfo) -> Vec<Area> {
    match info
        .capabilities
        .iter()
        .find_map(|each| if let RegionCapability::SparseMmap(areas) = each { Some(areas) } else { None })
    {
        Some(areas) => areas.clone(),
        None if info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0 => vec![Area { offset: 0, length: info.size }],
        None => Vec::new(),
    }
}

/// Page by page against the rule, in both maps; and what is told is what can be mapped.
fn check(areas: &[Area], claims: &[Claim]) {
    let device = Arc::new(FakeDevice { sparse: vec![areas.to_vec()], ..FakeDevice::new() });
    let mediated = open_with(&device, claims);
    for tracking in [false, true, false] {
        match tracking {
            true => _ = mediated.start_tracking().unwrap(),
            false => mediated.stop_tracking(),
        }
        let told = told(&mediated.region_info(0).unwrap());
        assert!(told.iter().all(|area| area.offset % PAGE == 0 && area.length % PAGE == 0), "{told:?}");
        assert!(told.windows(2).all(|pair| pair[0].offset + pair[0].length <= pair[1].offset), "overlap: {told:?}");
        for page in 0..PAGES {
            let wanted = expected(areas, claims, page);
            assert_eq!(mapped(&mediated, page), wanted, "page {page}, tracking: {tracking}, {claims:?}");
            let is_told =
                told.iter().any(|area| area.offset <= page * PAGE && (page + 1) * PAGE <= area.offset + area.length);
            assert_eq!(is_told, wanted != Mapped::No, "page {page}, tracking: {tracking}, {claims:?}");
        }
        // Across two of them, where the second is not to be mapped, or is another memory.
        for page in 0..PAGES - 1 {
            let (one, two) = (expected(areas, claims, page), expected(areas, claims, page + 1));
            let both = mediated.region_map(0, page * PAGE, 2 * PAGE);
            assert!(both.is_err() || (one == two && one != Mapped::No), "pages {page} and the next, {claims:?}");
        }
    }
}

const WHOLE: [Area; 1] = [Area { offset: 0, length: BAR }];

/// spec: LAYOUT-3
#[test]
fn a_claim_of_one_map_only_takes_its_pages_in_both() {
    for when in [When::Normal, When::Tracking, When::Both] {
        for (offset, length) in [
            (4 * PAGE, 1),
            (4 * PAGE - 1, 1),
            (4 * PAGE - 1, 2),
            (4 * PAGE, PAGE),
            (4 * PAGE, PAGE + 1),
            (4 * PAGE - 1, PAGE + 2),
        ] {
            check(&WHOLE, &[claimed(offset, length, when, false)]);
            check(&WHOLE, &[claimed(offset, length, when, true)]);
        }
    }
    check(
        &WHOLE,
        &[
            claimed(0, 8, When::Normal, false),
            claimed(0, 8, When::Tracking, false),
            claimed(BAR - 1, 1, When::Tracking, false),
        ],
    );
}

/// A file in place of a claim's pages, and another claim on one of its bytes, in the other map or beside it on the page.
///
/// spec: LAYOUT-3 LAYOUT-4
#[test]
fn a_page_with_bytes_of_two_claims_is_never_a_files() {
    let file = claimed(2 * PAGE, 4 * PAGE, When::Both, true);
    check(&WHOLE, &[file]);
    for (offset, length) in [(2 * PAGE - 1, 1), (6 * PAGE, 1), (6 * PAGE, PAGE)] {
        for has_mmap in [false, true] {
            check(&WHOLE, &[file, claimed(offset, length, When::Both, has_mmap)]);
        }
    }
    // Not on page boundaries: its first and last page have other bytes too.
    let ragged = claimed(2 * PAGE + 8, 4 * PAGE, When::Both, true);
    check(&WHOLE, &[ragged]);
    for (offset, length) in [(2 * PAGE, 8), (6 * PAGE + 8, 8), (6 * PAGE + 8, 2 * PAGE)] {
        check(&WHOLE, &[ragged, claimed(offset, length, When::Both, true)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// spec: LAYOUT-3 LAYOUT-4
    #[test]
    fn whatever_is_claimed_only_what_the_naive_rule_allows_can_be_mapped(
        mask in 1u32..1 << PAGES,
        claims in prop::collection::vec(
            (
                // About page boundaries, where it matters.
                (0..PAGES, -2i64..=2),
                prop_oneof![1u64..4, PAGE - 2..PAGE + 3, 1..4 * PAGE],
                prop_oneof![Just(When::Normal), Just(When::Tracking), Just(When::Both)],
                any::<bool>(),
            ),
            0..6,
        ),
    ) {
        let areas: Vec<Area> = (0..PAGES)
            .filter(|page| mask & 1 << page != 0)
            .map(|page| Area { offset: page * PAGE, length: PAGE })
            .collect();
        let claims = claims.into_iter().map(|((page, nudge), length, when, has_mmap)| {
            let offset = (page * PAGE).saturating_add_signed(nudge).min(BAR - 1);
            claimed(offset, length.min(BAR - offset), when, has_mmap)
        });
        check(&areas, &without_overlaps(claims.collect()));
    }
}
