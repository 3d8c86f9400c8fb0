//! The two hook tables of a device: which claim a byte of a region belongs to, normally and while tracking.
//!
//! **Owns** the lookup. Built and checked once at open, never edited; an atomic index says which table holds, and is only
//! changed by whoever has the device alone. **Must never** lock or allocate in a lookup.

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
    regions: Box<[Box<[Segment]>]>,
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
        Ok(Self { regions: regions.into_iter().map(Vec::into_boxed_slice).collect() })
    }

    /// The segments of a region; none for regions that are not the device's own.
    #[inline]
    pub fn segments(&self, region: u32) -> &[Segment] {
        self.regions.get(region as usize).map_or(&[], |segments| segments)
    }
}

/// The first piece of `length` bytes at `offset`.
#[inline]
pub fn first_piece(segments: &[Segment], offset: u64, length: usize) -> Piece {
    let at = segments.partition_point(|segment| segment.end <= offset);
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

    proptest! {
        /// Byte by byte: each belongs to the claim that covers it, or to none.
        ///
        /// spec: DISPATCH-2
        #[test]
        fn pieces_agree_with_a_byte_by_byte_oracle(
            cuts in prop::collection::btree_set(0u64..64, 0..8),
            held in any::<u8>(),
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
            let (mut at, mut left) = (offset, length);
            while left > 0 {
                let piece = first_piece(table.segments(0), at, left);
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
