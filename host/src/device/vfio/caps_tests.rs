//! Chains as the kernel makes them, and as it never should.

use proptest::prelude::*;

use super::*;

const INFO: usize = 32;

/// An answer of `INFO` zero bytes and then these capabilities, chained in order.
fn answer(capabilities: &[(u16, u16, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = vec![0; INFO];
    for (i, (id, version, data)) in capabilities.iter().enumerate() {
        let next = bytes.len() + HEADER + data.len();
        let next = if i + 1 == capabilities.len() { 0 } else { next as u32 };
        bytes.extend(id.to_ne_bytes());
        bytes.extend(version.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes.extend(data);
    }
    bytes
}

fn list(pairs: &[(u64, u64)]) -> Vec<u8> {
    let mut data = (pairs.len() as u32).to_ne_bytes().to_vec();
    data.extend([0; 4]);
    for (a, b) in pairs {
        data.extend(a.to_ne_bytes());
        data.extend(b.to_ne_bytes());
    }
    data
}

fn sparse(areas: &[(u64, u64)]) -> Vec<u8> {
    answer(&[(CAP_SPARSE_MMAP, 1, list(areas))])
}

fn parse(bytes: &[u8], size: u64) -> Result<Vec<RegionCapability>, ChainError> {
    region_capabilities(bytes, INFO, INFO as u32, size)
}

#[test]
fn every_kind_of_capability_is_parsed_in_the_chain_s_order() {
    let type_ = [7u32.to_ne_bytes(), 9u32.to_ne_bytes()].concat();
    let bytes = answer(&[
        (CAP_MSIX_MAPPABLE, 1, vec![]),
        (CAP_TYPE, 1, type_),
        (77, 3, vec![1, 2, 3, 4]),
        (CAP_SPARSE_MMAP, 1, list(&[(0x2000, 0x1000), (0, 0x1000)])),
    ]);
    let expected = [
        RegionCapability::MsixMappable,
        RegionCapability::Type { type_: 7, subtype: 9 },
        RegionCapability::Other { id: 77, version: 3, data: vec![1, 2, 3, 4] },
        RegionCapability::SparseMmap(vec![Area { offset: 0x2000, length: 0x1000 }, Area { offset: 0, length: 0x1000 }]),
    ];
    assert_eq!(parse(&bytes, 0x4000).unwrap(), expected);
    assert_eq!(region_capabilities(&bytes, INFO, 0, 0x4000).unwrap(), [], "offset 0 is no chain");
}

#[test]
fn a_newer_version_is_kept_and_not_guessed_at() {
    let bytes = answer(&[(CAP_SPARSE_MMAP, 2, list(&[(0, 0x1000)]))]);
    assert!(matches!(parse(&bytes, 0x1000).unwrap()[..], [RegionCapability::Other { id: 1, version: 2, .. }]));
}

/// spec: CAPS-1
#[test]
fn a_chain_that_comes_back_is_refused() {
    for target in [INFO, INFO + HEADER, INFO + 4] {
        let mut bytes = answer(&[(9, 1, vec![]), (8, 1, vec![])]);
        bytes[INFO + HEADER + 4..].copy_from_slice(&(target as u32).to_ne_bytes());
        let offset = target as u32;
        assert_eq!(parse(&bytes, 0), Err(ChainError::Loop { offset }), "next {target:#x}");
    }
}

/// spec: CAPS-1
#[test]
fn a_capability_outside_the_answer_is_refused_at_the_boundary() {
    let bytes = vec![0; INFO + HEADER];
    assert!(region_capabilities(&bytes, INFO, INFO as u32, 0).is_ok());
    for first in [4, INFO as u32 - 4, INFO as u32 + 4, u32::MAX - 3, u32::MAX - 7] {
        let refused = region_capabilities(&bytes, INFO, first, 0);
        assert_eq!(refused, Err(ChainError::OutOfBounds { offset: first, length: bytes.len() }), "{first:#x}");
    }
    let bytes = vec![0; INFO + HEADER + 4];
    assert_eq!(region_capabilities(&bytes, INFO, 34, 0), Err(ChainError::Misaligned { offset: 34 }));
}

#[test]
fn a_list_cut_short_is_refused_whatever_its_count_claims() {
    let whole = sparse(&[(0, 0x1000), (0x1000, 0x1000)]);
    assert!(parse(&whole, 0x2000).is_ok());
    let truncated = Err(ChainError::Truncated { id: CAP_SPARSE_MMAP, offset: INFO as u32 });
    for cut in [1, 16, 32, 40] {
        assert_eq!(parse(&whole[..whole.len() - cut], 0x2000), truncated, "{cut} bytes cut");
    }
    let mut huge = whole;
    huge[INFO + HEADER..INFO + HEADER + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert_eq!(parse(&huge, 0x2000), truncated);
    let short_type = answer(&[(CAP_TYPE, 1, vec![0; 4])]);
    assert_eq!(parse(&short_type, 0), Err(ChainError::Truncated { id: CAP_TYPE, offset: INFO as u32 }));
}

/// spec: CAPS-2
#[test]
fn sparse_areas_that_overlap_or_leave_the_region_are_refused() {
    assert!(parse(&sparse(&[(0x1000, 0x1000), (0, 0x1000)]), 0x2000).is_ok());
    assert!(parse(&sparse(&[]), 0).is_ok(), "nothing may be mapped: an answer, not an error");
    type Pair = (u64, u64);
    let wrong: [(&[Pair], Pair); 5] = [
        (&[(0, 0x1001), (0x1000, 0x1000)], (0x1000, 0x1000)),
        (&[(0, 0x1000), (0, 0x1000)], (0, 0x1000)),
        (&[(0x1000, 0x1001)], (0x1000, 0x1001)),
        (&[(0x1000, 0)], (0x1000, 0)),
        (&[(u64::MAX, 1)], (u64::MAX, 1)),
    ];
    for (areas, (offset, length)) in wrong {
        assert_eq!(parse(&sparse(areas), 0x2000), Err(ChainError::BadArea { offset, length }), "{areas:x?}");
    }
}

#[test]
fn iova_ranges_ascend_or_are_refused() {
    let answer_of = |ranges: &[(u64, u64)]| answer(&[(CAP_IOVA_RANGE, 1, list(ranges))]);
    let get = |ranges: &[(u64, u64)]| iova_ranges(&answer_of(ranges), INFO, INFO as u32);
    let good = [(0, 0xfedf_ffff), (0xfef0_0000, u64::MAX)];
    assert_eq!(get(&good).unwrap().unwrap(), good);
    assert!(get(&[(0, 5), (5, 6)]).is_err());
    assert!(get(&[(1, 0)]).is_err());
    assert_eq!(iova_ranges(&[0; INFO], INFO, 0), Ok(None));
}

proptest! {
    /// spec: CAPS-1
    #[test]
    fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..256), first in any::<u32>(), size in any::<u64>()) {
        for first in [first, first % 256, 32] {
            let _ = region_capabilities(&bytes, INFO, first, size);
            let _ = iova_ranges(&bytes, INFO, first);
        }
    }

    /// Chains whose links are small numbers: most stay inside, many loop.
    #[test]
    fn any_links_give_an_answer(links in prop::collection::vec(0u32..48, 48), first in 0u32..48) {
        let bytes: Vec<u8> = links.iter().flat_map(|link| (link * 4).to_ne_bytes()).collect();
        if let Ok(capabilities) = chain(&bytes, 0, first * 4) {
            prop_assert!(capabilities.len() <= bytes.len() / HEADER);
        }
    }

    #[test]
    fn what_was_chained_is_found_again(data in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..8), 0..6)) {
        let capabilities: Vec<(u16, u16, Vec<u8>)> = data
            .into_iter()
            .map(|words| (1000, 1, words.iter().flat_map(|word| [*word; 4]).collect()))
            .collect();
        let bytes = answer(&capabilities);
        let first = if capabilities.is_empty() { 0 } else { INFO as u32 };
        let found = region_capabilities(&bytes, INFO, first, 0).unwrap();
        let expected: Vec<_> = capabilities
            .into_iter()
            .map(|(id, version, data)| RegionCapability::Other { id, version, data })
            .collect();
        prop_assert_eq!(found, expected);
    }
}
