//! Capability chains behind VFIO's info structures.
//!
//! **Owns** the parsing of `struct vfio_info_cap_header` chains. Total: any bytes give capabilities or an error, in time
//! linear in their number. **Must never** read outside the answer or follow a chain that returns to itself.

use crate::device::{Area, RegionCapability};

/// `struct vfio_info_cap_header`: id u16, version u16, next u32.
const HEADER: usize = 8;
/// The most capabilities of one chain; the kernel has five kinds.
const CHAIN_MAX: usize = 64;

const CAP_SPARSE_MMAP: u16 = vfio_bindings::bindings::vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16;
const CAP_TYPE: u16 = vfio_bindings::bindings::vfio::VFIO_REGION_INFO_CAP_TYPE as u16;
const CAP_MSIX_MAPPABLE: u16 = vfio_bindings::bindings::vfio::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE as u16;
const CAP_IOVA_RANGE: u16 = vfio_bindings::bindings::vfio::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE as u16;

/// A chain that is none. The kernel's fault, or a bug here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("capability at {offset:#x} of an answer of {length} bytes")]
    OutOfBounds { offset: u32, length: usize },
    #[error("capability at {offset:#x} is not aligned")]
    Misaligned { offset: u32 },
    #[error("the capability chain comes back to {offset:#x}")]
    Loop { offset: u32 },
    #[error("capability {id} at {offset:#x} is cut short")]
    Truncated { id: u16, offset: u32 },
    #[error("more than {CHAIN_MAX} capabilities")]
    TooMany,
    #[error("sparse mmap area {offset:#x}+{length:#x} is empty, overlaps another or lies outside the region")]
    BadArea { offset: u64, length: u64 },
    #[error("IOVA range {start:#x}..={last:#x} is empty, overlaps another or is out of order")]
    BadRange { start: u64, last: u64 },
}

/// One capability: what the header says, and the bytes up to the next capability or the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability<'a> {
    pub id: u16,
    pub version: u16,
    offset: u32,
    pub data: &'a [u8],
}

/// Follows the chain that begins `first` bytes into `answer`, whose own structure has `header` bytes; 0 is no chain.
pub fn chain(answer: &[u8], header: usize, first: u32) -> Result<Vec<Capability<'_>>, ChainError> {
    let mut found: Vec<(u32, u16, u16)> = Vec::new();
    let mut offset = first;
    while offset != 0 {
        let at = offset as usize;
        if at < header || at.checked_add(HEADER).is_none_or(|end| end > answer.len()) {
            return Err(ChainError::OutOfBounds { offset, length: answer.len() });
        }
        if !at.is_multiple_of(4) {
            return Err(ChainError::Misaligned { offset });
        }
        if found.iter().any(|(seen, ..)| seen.abs_diff(offset) < HEADER as u32) {
            return Err(ChainError::Loop { offset });
        }
        if found.len() == CHAIN_MAX {
            return Err(ChainError::TooMany);
        }
        found.push((offset, u16_at(answer, at), u16_at(answer, at + 2)));
        offset = u32_at(answer, at + 4);
    }
    let end_of = |offset: u32| {
        let next = found.iter().map(|(other, ..)| *other).filter(|other| *other > offset).min();
        next.map_or(answer.len(), |next| next as usize)
    };
    let capability = |&(offset, id, version): &(u32, u16, u16)| Capability {
        id,
        version,
        offset,
        data: &answer[offset as usize + HEADER..end_of(offset)],
    };
    Ok(found.iter().map(capability).collect())
}

/// A region's capabilities. `size` is the region's.
pub fn region_capabilities(
    answer: &[u8],
    header: usize,
    first: u32,
    size: u64,
) -> Result<Vec<RegionCapability>, ChainError> {
    chain(answer, header, first)?.into_iter().map(|capability| region_capability(capability, size)).collect()
}

fn region_capability(capability: Capability<'_>, size: u64) -> Result<RegionCapability, ChainError> {
    let Capability { id, version, offset, data } = capability;
    let truncated = ChainError::Truncated { id, offset };
    match (id, version) {
        (CAP_SPARSE_MMAP, 1) => {
            let pairs = pairs(data).ok_or(truncated)?;
            Ok(RegionCapability::SparseMmap(areas(&pairs, size)?))
        }
        (CAP_TYPE, 1) if data.len() < 8 => Err(truncated),
        (CAP_TYPE, 1) => Ok(RegionCapability::Type { type_: u32_at(data, 0), subtype: u32_at(data, 4) }),
        (CAP_MSIX_MAPPABLE, _) => Ok(RegionCapability::MsixMappable),
        _ => Ok(RegionCapability::Other { id, version, data: data.to_vec() }),
    }
}

fn areas(pairs: &[(u64, u64)], size: u64) -> Result<Vec<Area>, ChainError> {
    let areas: Vec<Area> = pairs.iter().map(|&(offset, length)| Area { offset, length }).collect();
    let mut sorted = areas.clone();
    sorted.sort_unstable();
    let mut free_from = 0;
    for Area { offset, length } in sorted {
        match offset.checked_add(length) {
            Some(end) if length > 0 && offset >= free_from && end <= size => free_from = end,
            _ => return Err(ChainError::BadArea { offset, length }),
        }
    }
    Ok(areas)
}

/// `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE` as (first, last), ascending; `None` where the kernel names none.
pub fn iova_ranges(answer: &[u8], header: usize, first: u32) -> Result<Option<Vec<(u64, u64)>>, ChainError> {
    let chain = chain(answer, header, first)?;
    let Some(capability) = chain.iter().find(|capability| capability.id == CAP_IOVA_RANGE) else {
        return Ok(None);
    };
    let Capability { id, offset, data, .. } = *capability;
    let ranges = pairs(data).ok_or(ChainError::Truncated { id, offset })?;
    let mut before: Option<u64> = None;
    for &(start, last) in &ranges {
        if start > last || before.is_some_and(|before| start <= before) {
            return Err(ChainError::BadRange { start, last });
        }
        before = Some(last);
    }
    Ok(Some(ranges))
}

/// `count: u32, reserved: u32, count x (u64, u64)`: the shape of both lists. `None` when it is cut short.
fn pairs(data: &[u8]) -> Option<Vec<(u64, u64)>> {
    let count = u32_at(data.get(..8)?, 0) as usize;
    // The length bounds the allocation: no more pairs than bytes.
    let body = data.get(8..8usize.checked_add(count.checked_mul(16)?)?)?;
    Some(body.chunks_exact(16).map(|pair| (u64_at(pair, 0), u64_at(pair, 8))).collect())
}

// The callers have checked the bounds.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

#[cfg(test)]
#[path = "caps_tests.rs"]
mod tests;
