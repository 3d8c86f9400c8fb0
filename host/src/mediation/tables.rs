//! The two hook tables of a device: which claim a byte of a region belongs to, normally and while tracking.
//!
//! **Owns** the lookup. Built and checked once at open, never edited; which table holds is only changed by whoever has the
//! device alone. **Must never** lock or allocate in a lookup.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::error::MediationError;
use super::mediator::{Claim, TrapMap};

/// A claimed range: `start .. end` belongs to claim `claim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub start: u64,
    pub end: u64,
    pub claim: usize,
}

/// One table: the segments of each region whose accesses are hooked, ascending and disjoint.
#[derive(Debug)]
pub struct Table {
    regions: Box<[Region]>,
}

#[derive(Debug)]
pub struct Region {
    /// In bytes
    size: u64,
    segments: Box<[Segment]>,
}

/// The two tables, and which one holds. Lookups are made under a pass, so that the answer stays true until it ends.
#[derive(Debug)]
pub struct Tables {
    /// Bit i: no access of region i is hooked by the table that holds, and i is the device's own. A region beyond 63 is
    /// looked up instead.
    plain: AtomicU64,
    selector: AtomicUsize,
    tables: [Table; 2],
}

impl Tables {
    /// As [`Table::new`]. The normal one holds.
    pub fn new(claims: &[Claim], sizes: &[u64]) -> Result<Self, MediationError> {
        let table = |map| Table::new(claims, map, sizes);
        let tables = [table(TrapMap::Normal)?, table(TrapMap::Tracking)?];
        Ok(Self { plain: AtomicU64::new(tables[0].plain()), selector: AtomicUsize::new(0), tables })
    }

    pub fn map(&self) -> TrapMap {
        match self.selector.load(Ordering::Relaxed) {
            0 => TrapMap::Normal,
            _ => TrapMap::Tracking,
        }
    }

    /// The caller has the device alone; the gate orders this before every later access.
    pub fn select(&self, map: TrapMap) {
        let at = match map {
            TrapMap::Normal => 0,
            TrapMap::Tracking => 1,
        };
        self.selector.store(at, Ordering::Relaxed);
        self.plain.store(self.tables[at].plain(), Ordering::Relaxed);
    }

    /// True: accesses of this region go to the device. False says nothing.
    #[inline(always)]
    pub fn is_plain(&self, region: u32) -> bool {
        self.plain.load(Ordering::Relaxed).checked_shr(region).is_some_and(|bits| bits & 1 != 0)
    }

    /// One of the device's own regions, if the table that holds hooks anything of it.
    #[inline]
    pub fn hooked(&self, region: u32) -> Option<&Region> {
        self.tables[self.selector.load(Ordering::Relaxed) & 1].hooked(region)
    }
}

/// The piece of an access that lies in one claim or in none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub length: usize,
    pub claim: Option<usize>,
}

impl Table {
    /// `sizes`: bytes of each of the device's own regions. Claims outside them, empty ones and ones that overlap in this map
    /// are the plug-in's fault.
    pub fn new(claims: &[Claim], map: TrapMap, sizes: &[u64]) -> Result<Self, MediationError> {
        let mut regions: Vec<Vec<Segment>> = vec![Vec::new(); sizes.len()];
        for (index, claim) in claims.iter().enumerate() {
            let fault = |what: &str| {
                let text =
                    format!("{what}: {:#x} bytes at {:#x} of region {}", claim.length, claim.offset, claim.region);
                MediationError::PluginFault { what: text }
            };
            let size = sizes.get(claim.region as usize).copied().ok_or_else(|| fault("a claim of no region"))?;
            let end = claim.offset.checked_add(claim.length).filter(|end| *end <= size);
            let end = end.filter(|end| *end > claim.offset).ok_or_else(|| fault("a claim outside its region"))?;
            let holds = match map {
                TrapMap::Normal => claim.normal,
                TrapMap::Tracking => claim.tracking,
            };
            if !claim.normal && !claim.tracking {
                return Err(fault("a claim in neither map"));
            }
            if holds {
                regions[claim.region as usize].push(Segment { start: claim.offset, end, claim: index });
            }
        }
        for segments in &mut regions {
            segments.sort_unstable_by_key(|segment| segment.start);
            if let Some(pair) = segments.windows(2).find(|pair| pair[1].start < pair[0].end) {
                let claim = &claims[pair[1].claim];
                let what = format!("claims overlap at {:#x} of region {}", claim.offset, claim.region);
                return Err(MediationError::PluginFault { what });
            }
        }
        // Claims without an rw hook take the mapping away, not the access.
        for segments in &mut regions {
            segments.retain(|segment| claims[segment.claim].has_rw);
        }
        let region = |(segments, size): (Vec<_>, &u64)| Region { size: *size, segments: segments.into_boxed_slice() };
        Ok(Self { regions: regions.into_iter().zip(sizes).map(region).collect() })
    }

    fn plain(&self) -> u64 {
        let regions = self.regions.iter().take(64).enumerate();
        regions.filter(|(_, region)| region.segments.is_empty()).fold(0, |bits, (region, _)| bits | 1 << region)
    }

    #[inline]
    fn hooked(&self, region: u32) -> Option<&Region> {
        self.regions.get(region as usize).filter(|region| !region.segments.is_empty())
    }
}

/// So many segments are looked through in order: a processor guesses that better than it halves.
const FEW: usize = 8;

impl Region {
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The claim, or none, that a whole access lies in. `None` when it is empty, leaves the region or is not one piece.
    #[inline(always)]
    pub fn whole(&self, offset: u64, length: usize) -> Option<Option<usize>> {
        let end = offset.checked_add(length as u64).filter(|end| *end <= self.size && offset < *end)?;
        let from = if self.segments.len() <= FEW { 0 } else { after(&self.segments, offset) };
        match self.segments[from..].iter().find(|segment| segment.end > offset) {
            None => Some(None),
            Some(segment) if end <= segment.start => Some(None),
            Some(segment) => (segment.start <= offset && end <= segment.end).then_some(Some(segment.claim)),
        }
    }
}

/// How many segments end at or before `offset`.
#[inline]
fn after(segments: &[Segment], offset: u64) -> usize {
    segments.partition_point(|segment| segment.end <= offset)
}

/// The first piece of `length` bytes at `offset`.
#[inline]
pub fn first_piece(segments: &[Segment], offset: u64, length: usize) -> Piece {
    let at = after(segments, offset);
    let cut = |bound: u64| length.min(usize::try_from(bound - offset).unwrap_or(usize::MAX));
    match segments.get(at) {
        None => Piece { length, claim: None },
        Some(segment) if segment.start > offset => Piece { length: cut(segment.start), claim: None },
        Some(segment) => Piece { length: cut(segment.end), claim: Some(segment.claim) },
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(offset: u64, length: u64) -> Claim {
        Claim {
            region: 0,
            offset,
            length,
            normal: true,
            tracking: true,
            has_rw: true,
            has_region_info: false,
            has_mmap: false,
        }
    }

    /// spec: DISPATCH-1
    #[test]
    fn claims_that_cannot_be_right_are_the_plug_ins_fault() {
        let refused = |claims: &[Claim]| Table::new(claims, TrapMap::Normal, &[64, 0]).is_err();
        assert!(!refused(&[claim(0, 64)]));
        assert!(refused(&[claim(0, 65)]));
        assert!(refused(&[claim(64, 1)]));
        assert!(refused(&[claim(8, 0)]));
        assert!(refused(&[claim(u64::MAX, 2)]));
        assert!(refused(&[Claim { region: 1, ..claim(0, 1) }]));
        assert!(refused(&[Claim { region: 2, ..claim(0, 1) }]));
        assert!(refused(&[Claim { normal: false, tracking: false, ..claim(0, 1) }]));
        assert!(refused(&[claim(0, 8), claim(7, 1)]));
        assert!(!refused(&[claim(0, 8), claim(8, 1)]));
        // In different maps they may overlap.
        let (normal, tracking) = (Claim { tracking: false, ..claim(0, 8) }, Claim { normal: false, ..claim(0, 8) });
        assert!(!refused(&[normal, tracking]));
    }

    /// The quick answer and the lookup agree, for the regions that it knows and the first that it does not.
    #[test]
    fn plain_regions_are_those_without_segments_in_the_table_that_holds() {
        let only = |region, map| Claim {
            region,
            normal: map == TrapMap::Normal,
            tracking: map == TrapMap::Tracking,
            ..claim(0, 8)
        };
        let claims = [only(1, TrapMap::Normal), only(63, TrapMap::Tracking), only(64, TrapMap::Normal)];
        let tables = Tables::new(&claims, &[64; 66]).unwrap();
        for map in [TrapMap::Normal, TrapMap::Tracking, TrapMap::Normal] {
            tables.select(map);
            assert_eq!(tables.map(), map);
            for region in 0..64 {
                assert_eq!(tables.is_plain(region), tables.hooked(region).is_none(), "{region} of {map:?}");
            }
            assert!([64, 65, 66, u32::MAX].iter().all(|region| !tables.is_plain(*region)));
        }
        assert!([1, 64].iter().all(|region| tables.hooked(*region).is_some()));
        assert!([0, 63, 65, 66, u32::MAX].iter().all(|region| tables.hooked(*region).is_none()));
        // What is not the device's own is never plain.
        assert!(!Tables::new(&[], &[64; 2]).unwrap().is_plain(2));
    }

    proptest! {
        /// Byte by byte: each belongs to the claim that covers it, or to none.
        ///
        /// spec: DISPATCH-2
        #[test]
        fn pieces_agree_with_a_byte_by_byte_oracle(
            // Around the number of segments from which they are searched otherwise.
            cuts in prop::collection::btree_set(0u64..64, 0..24),
            held in any::<u32>(),
            offset in 0u64..64,
            length in 1usize..32,
        ) {
            let length = length.min(64 - offset as usize);
            let bounds: Vec<u64> = cuts.into_iter().chain([64]).collect();
            let claims: Vec<Claim> = bounds
                .windows(2)
                .enumerate()
                .filter(|(index, _)| held & 1 << index != 0)
                .map(|(_, pair)| claim(pair[0], pair[1] - pair[0]))
                .collect();
            let table = Table::new(&claims, TrapMap::Normal, &[64]).unwrap();
            let segments = table.hooked(0).map_or(&[][..], Region::segments);
            if let Some(region) = table.hooked(0) {
                let first = first_piece(segments, offset, length);
                prop_assert_eq!(region.whole(offset, length), (first.length == length).then_some(first.claim));
                prop_assert_eq!(region.whole(offset, 0), None);
                prop_assert_eq!(region.whole(offset, 65 - offset as usize), None);
                prop_assert_eq!(region.whole(u64::MAX, length), None);
            }
            let (mut at, mut left) = (offset, length);
            while left > 0 {
                let piece = first_piece(segments, at, left);
                prop_assert!(piece.length > 0 && piece.length <= left);
                for byte in at..at + piece.length as u64 {
                    let owner = claims.iter().position(|claim| (claim.offset..claim.offset + claim.length).contains(&byte));
                    prop_assert_eq!(piece.claim, owner);
                }
                at += piece.length as u64;
                left -= piece.length;
            }
        }
    }
}
