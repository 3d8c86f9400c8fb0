//! The chain of capabilities behind a region's info: `struct vfio_info_cap_header` and what follows each.

use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE,
};

use super::{CAPABILITIES_MAX, Put, Reader, RegionInfo, Result, WireError, at_most, range};
use crate::device::{Area, RegionCapability};

const HEADER: usize = 8;
const CAP_SPARSE_MMAP: u16 = VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16;
const CAP_TYPE: u16 = VFIO_REGION_INFO_CAP_TYPE as u16;
const CAP_MSIX_MAPPABLE: u16 = VFIO_REGION_INFO_CAP_MSIX_MAPPABLE as u16;

/// Bytes of a chain of these, as [`write_capabilities`] lays them out.
pub fn capabilities_length(capabilities: &[RegionCapability]) -> usize {
    capabilities.iter().map(|capability| HEADER + data_length(capability).next_multiple_of(8)).sum()
}

fn data_length(capability: &RegionCapability) -> usize {
    match capability {
        RegionCapability::SparseMmap(areas) => 8 + areas.len() * 16,
        RegionCapability::Type { .. } => 8,
        RegionCapability::MsixMappable => 0,
        RegionCapability::Other { data, .. } => data.len(),
    }
}

/// Behind a [`RegionInfo`], in the order given; each begins at a multiple of 8.
pub fn write_capabilities(capabilities: &[RegionCapability], out: &mut Vec<u8>) -> Result<()> {
    at_most("capabilities", capabilities_length(capabilities) as u64, CAPABILITIES_MAX as u64)?;
    let mut offset = RegionInfo::LENGTH;
    for (position, capability) in capabilities.iter().enumerate() {
        let data = data_length(capability);
        let end = offset + HEADER + data.next_multiple_of(8);
        let (id, version) = match capability {
            RegionCapability::SparseMmap(_) => (CAP_SPARSE_MMAP, 1),
            RegionCapability::Type { .. } => (CAP_TYPE, 1),
            RegionCapability::MsixMappable => (CAP_MSIX_MAPPABLE, 1),
            RegionCapability::Other { id, version, .. } => (*id, *version),
        };
        out.u16(id);
        out.u16(version);
        let last = position + 1 == capabilities.len();
        out.u32(if last { 0 } else { end as u32 });
        write_data(capability, out);
        out.resize(out.len() + (end - offset - HEADER - data), 0);
        offset = end;
    }
    Ok(())
}

fn write_data(capability: &RegionCapability, out: &mut Vec<u8>) {
    match capability {
        RegionCapability::SparseMmap(areas) => {
            out.u32(areas.len() as u32);
            out.u32(0);
            for area in areas {
                out.u64(area.offset);
                out.u64(area.length);
            }
        }
        RegionCapability::Type { type_, subtype } => {
            out.u32(*type_);
            out.u32(*subtype);
        }
        RegionCapability::MsixMappable => {}
        RegionCapability::Other { data, .. } => out.extend_from_slice(data),
    }
}

/// Follows the chain that begins at `info.cap_offset`; `bytes` are what came behind the info. Linear: each capability
/// must lie behind the one before it.
pub fn parse_capabilities(info: &RegionInfo, bytes: &[u8]) -> Result<Vec<RegionCapability>> {
    at_most("capabilities", bytes.len() as u64, CAPABILITIES_MAX as u64)?;
    let mut found = Vec::new();
    let mut offset = info.cap_offset as usize;
    let mut earliest = RegionInfo::LENGTH;
    while offset != 0 {
        if offset < earliest || !offset.is_multiple_of(8) {
            return Err(WireError::Invalid("a capability chain that goes back"));
        }
        let here = bytes.get(offset - RegionInfo::LENGTH..);
        let here = here.ok_or(WireError::Invalid("a capability outside of its message"))?;
        let mut reader = Reader::new(here);
        let (id, version, next) = (reader.u16()?, reader.u16()?, reader.u32()? as usize);
        earliest = offset + HEADER;
        let end = if next == 0 { bytes.len() + RegionInfo::LENGTH } else { next };
        let length = end.checked_sub(earliest).ok_or(WireError::Invalid("a capability chain that goes back"))?;
        found.push(parse_data(id, version, reader.bytes(length)?, info.size)?);
        offset = next;
    }
    Ok(found)
}

fn parse_data(id: u16, version: u16, data: &[u8], region_size: u64) -> Result<RegionCapability> {
    let mut reader = Reader::new(data);
    match id {
        CAP_SPARSE_MMAP => {
            let count = reader.u32()? as usize;
            reader.u32()?;
            let areas = reader.bytes(count.saturating_mul(16))?;
            let mut areas = areas.chunks_exact(16).map(|area| {
                let mut reader = Reader::new(area);
                let (offset, length) = (reader.u64()?, reader.u64()?);
                range(offset, length)?;
                if offset.checked_add(length).is_none_or(|end| end > region_size) {
                    return Err(WireError::Invalid("an area outside of its region"));
                }
                Ok(Area { offset, length })
            });
            Ok(RegionCapability::SparseMmap(areas.by_ref().collect::<Result<_>>()?))
        }
        CAP_TYPE => Ok(RegionCapability::Type { type_: reader.u32()?, subtype: reader.u32()? }),
        CAP_MSIX_MAPPABLE => Ok(RegionCapability::MsixMappable),
        _ => Ok(RegionCapability::Other { id, version, data: data.to_vec() }),
    }
}
