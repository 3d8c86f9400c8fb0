//! Which bytes of a region a client may map: the device's mappable areas minus every claim, on page boundaries.
//!
//! **Owns** the arithmetic of areas. **Must never** leave a hooked byte mappable (invariant 1): a claim of *either* trap map
//! takes its pages away for the device's whole life, since a mapping that was handed out cannot be taken back from another
//! process when the map is switched. Pure.

use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;

use crate::device::{Area, RegionCapability, RegionInfo};
use crate::memory::PAGE_SIZE;

/// A device's description of a region that cannot be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("region {region} has two sparse-mmap capabilities")]
    DuplicateCapability { region: u32 },
    #[error("region {region}: the mappable area of {:#x} bytes at {:#x} is empty or not on page boundaries", .area.length, .area.offset)]
    Misaligned { region: u32, area: Area },
    #[error("region {region}: the mappable area of {:#x} bytes at {:#x} lies outside {size:#x} bytes", .area.length, .area.offset)]
    Outside { region: u32, area: Area, size: u64 },
    #[error("region {region}: mappable areas overlap at {:#x}", .area.offset)]
    Overlap { region: u32, area: Area },
    #[error("region {region}: sparse areas without the mmap flag")]
    NotMappable { region: u32 },
}

/// The areas that the device itself allows to map: ascending and disjoint, each on page boundaries, except that the last may
/// end where the region ends.
pub fn device_areas(info: &RegionInfo) -> Result<Vec<Area>, LayoutError> {
    let region = info.index;
    let mut sparse = info.capabilities.iter().filter_map(|capability| match capability {
        RegionCapability::SparseMmap(areas) => Some(areas),
        _ => None,
    });
    let areas = sparse.next();
    if sparse.next().is_some() {
        return Err(LayoutError::DuplicateCapability { region });
    }
    let mappable = info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
    match areas {
        None if mappable && info.size != 0 => Ok(vec![Area { offset: 0, length: info.size }]),
        None => Ok(Vec::new()),
        Some(areas) if !mappable && !areas.is_empty() => Err(LayoutError::NotMappable { region }),
        Some(areas) => validated(info, areas),
    }
}

fn validated(info: &RegionInfo, areas: &[Area]) -> Result<Vec<Area>, LayoutError> {
    let (region, size) = (info.index, info.size);
    let mut sorted = areas.to_vec();
    sorted.sort_unstable();
    let mut end = 0;
    for &area in &sorted {
        let Some(area_end) = area.offset.checked_add(area.length).filter(|end| *end <= size) else {
            return Err(LayoutError::Outside { region, area, size });
        };
        let whole_pages = area.offset.is_multiple_of(PAGE_SIZE)
            && (area.length.is_multiple_of(PAGE_SIZE) || area_end == size)
            && area.length != 0;
        if !whole_pages {
            return Err(LayoutError::Misaligned { region, area });
        }
        if area.offset < end {
            return Err(LayoutError::Overlap { region, area });
        }
        end = area_end;
    }
    Ok(sorted)
}

/// `areas` (ascending, disjoint) without any page that `claims` touch. What is left is on page boundaries.
pub fn subtract(areas: &[Area], claims: &[Area]) -> Vec<Area> {
    let mut taken: Vec<(u64, u64)> =
        claims.iter().filter(|claim| claim.length != 0).map(|claim| pages_of(*claim)).collect();
    taken.sort_unstable();
    let mut left = Vec::new();
    for area in areas {
        let area_end = area.offset.saturating_add(area.length);
        let mut from = area.offset;
        for &(start, end) in &taken {
            if end <= from || start >= area_end {
                continue;
            }
            push(&mut left, from, start);
            from = end;
        }
        push(&mut left, from, area_end);
    }
    left
}

/// First byte of the first page, and the first byte after the last.
fn pages_of(claim: Area) -> (u64, u64) {
    let last = claim.offset.saturating_add(claim.length - 1);
    let start = claim.offset & !(PAGE_SIZE - 1);
    (start, (last | (PAGE_SIZE - 1)).saturating_add(1))
}

fn push(areas: &mut Vec<Area>, from: u64, to: u64) {
    if from < to {
        areas.push(Area { offset: from, length: to - from });
    }
}

/// Whether `wanted` lies wholly inside one of `areas`, or inside several that touch.
pub fn contains(areas: &[Area], wanted: Area) -> bool {
    let Some(end) = wanted.offset.checked_add(wanted.length).filter(|end| *end > wanted.offset) else {
        return false;
    };
    let mut at = wanted.offset;
    for area in areas {
        if area.offset <= at && at < area.offset.saturating_add(area.length) {
            at = area.offset.saturating_add(area.length);
            if at >= end {
                return true;
            }
        }
    }
    false
}

#[cfg(all(test, not(loom)))]
#[path = "layout_tests.rs"]
mod tests;
