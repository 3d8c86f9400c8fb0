//! DMA_MAP, DMA_UNMAP, and the server's DMA_READ and DMA_WRITE.

use super::{BITMAP_MAX, PAGE_SIZE, Put, Reader, Result, WireError, at_least, at_most, bitmap_length, range};

const MAP_READ: u32 = 1 << 0;
const MAP_WRITE: u32 = 1 << 1;
/// `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`
const UNMAP_GET_DIRTY_BITMAP: u32 = 1 << 0;
/// `VFIO_DMA_UNMAP_FLAG_ALL`
const UNMAP_ALL: u32 = 1 << 1;

/// DMA_MAP: `size` bytes from `address` on, page-aligned, not empty, at least readable or writable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaMap {
    pub readable: bool,
    pub writable: bool,
    /// In the message's file, in bytes; without meaning where there is none
    pub offset: u64,
    pub address: u64,
    pub size: u64,
}

impl DmaMap {
    pub const LENGTH: usize = 32;

    pub fn parse(payload: &[u8], fds: usize) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        let map = Self {
            readable: flags & MAP_READ != 0,
            writable: flags & MAP_WRITE != 0,
            offset: reader.u64()?,
            address: reader.u64()?,
            size: reader.u64()?,
        };
        reader.end()?;
        at_least(argsz, Self::LENGTH as u64)?;
        if flags & !(MAP_READ | MAP_WRITE) != 0 || flags == 0 {
            return Err(WireError::Invalid("flags of a DMA map"));
        }
        range(map.address, map.size)?;
        if !(map.address | map.size).is_multiple_of(PAGE_SIZE) {
            return Err(WireError::Invalid("a DMA map that does not begin and end with a page"));
        }
        if fds > 0 {
            range(map.offset, map.size)?;
            if !map.offset.is_multiple_of(PAGE_SIZE) {
                return Err(WireError::Invalid("a DMA map whose file offset is not aligned"));
            }
        }
        Ok(map)
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u32(Self::LENGTH as u32);
        out.u32(if self.readable { MAP_READ } else { 0 } | if self.writable { MAP_WRITE } else { 0 });
        out.u64(self.offset);
        out.u64(self.address);
        out.u64(self.size);
    }
}

/// Which maps go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnmapScope {
    /// Exactly this one, not empty
    One {
        address: u64,
        size: u64,
    },
    All,
}

/// The dirty bitmap that is asked for with an unmap, as in version 0.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapRequest {
    /// A power of two, at least 4096
    pub page_size: u64,
    /// Bytes that the client has for it; not less than it needs, at most [`BITMAP_MAX`]
    pub size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaUnmap {
    pub scope: UnmapScope,
    pub bitmap: Option<BitmapRequest>,
}

impl DmaUnmap {
    pub const LENGTH: usize = 24;
    /// With the bitmap's fields, without its bits
    pub const LENGTH_WITH_BITMAP: usize = 40;

    pub fn parse(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        let (address, size) = (reader.u64()?, reader.u64()?);
        at_least(argsz, Self::LENGTH as u64)?;
        let (all, with_bitmap) = (flags & UNMAP_ALL != 0, flags & UNMAP_GET_DIRTY_BITMAP != 0);
        if flags & !(UNMAP_ALL | UNMAP_GET_DIRTY_BITMAP) != 0 || all && with_bitmap {
            return Err(WireError::Invalid("flags of a DMA unmap"));
        }
        if all && (address, size) != (0, 0) {
            return Err(WireError::Invalid("an unmap of everything that names a range"));
        }
        let scope = if all {
            UnmapScope::All
        } else {
            range(address, size)?;
            UnmapScope::One { address, size }
        };
        let bitmap = if with_bitmap { Some(bitmap_request(&mut reader, argsz, size)?) } else { None };
        reader.end()?;
        Ok(Self { scope, bitmap })
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        let bitmap = self.bitmap.map_or(0, |bitmap| 16 + bitmap.size);
        out.u32(u32::try_from(Self::LENGTH as u64 + bitmap).unwrap_or(u32::MAX));
        self.write_fields(out);
    }

    /// The reply's fixed part; the bitmap's bits, if any were asked for, come behind it.
    pub fn write_reply(&self, bits: usize, out: &mut Vec<u8>) {
        let fields = if self.bitmap.is_some() { Self::LENGTH_WITH_BITMAP } else { Self::LENGTH };
        out.u32(u32::try_from(fields + bits).unwrap_or(u32::MAX));
        self.write_fields(out);
    }

    fn write_fields(&self, out: &mut Vec<u8>) {
        let (all, address, size) = match self.scope {
            UnmapScope::All => (UNMAP_ALL, 0, 0),
            UnmapScope::One { address, size } => (0, address, size),
        };
        out.u32(all | if self.bitmap.is_some() { UNMAP_GET_DIRTY_BITMAP } else { 0 });
        out.u64(address);
        out.u64(size);
        if let Some(bitmap) = self.bitmap {
            out.u64(bitmap.page_size);
            out.u64(bitmap.size);
        }
    }
}

fn bitmap_request(reader: &mut Reader<'_>, argsz: u32, length: u64) -> Result<BitmapRequest> {
    let (page_size, size) = (reader.u64()?, reader.u64()?);
    if page_size < PAGE_SIZE || !page_size.is_power_of_two() {
        return Err(WireError::Invalid("page size of a bitmap"));
    }
    at_most("bitmap", size, BITMAP_MAX)?;
    if size < bitmap_length(length, page_size) {
        return Err(WireError::Invalid("a bitmap that is too small for its range"));
    }
    at_least(argsz, DmaUnmap::LENGTH_WITH_BITMAP as u64 + size)?;
    Ok(BitmapRequest { page_size, size })
}

/// What DMA_READ and DMA_WRITE begin with, and their replies: `count` bytes from `address` on, not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaAccess {
    pub address: u64,
    pub count: u32,
}

impl DmaAccess {
    pub const LENGTH: usize = 16;

    fn take(reader: &mut Reader<'_>, count_max: u32) -> Result<Self> {
        let (address, count) = (reader.u64()?, reader.u64()?);
        at_most("count", count, u64::from(count_max))?;
        range(address, count)?;
        // Not above `count_max`, hence in range.
        Ok(Self { address, count: count as u32 })
    }

    /// The request of DMA_READ, and the reply of DMA_WRITE.
    pub fn parse(payload: &[u8], count_max: u32) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let access = Self::take(&mut reader, count_max)?;
        reader.end()?;
        Ok(access)
    }

    /// The reply of DMA_WRITE. The protocol's text has its count in 4 bytes; clients send 8.
    pub fn parse_write_reply(payload: &[u8], count_max: u32) -> Result<Self> {
        if payload.len() != 12 {
            return Self::parse(payload, count_max);
        }
        let mut long = [0; Self::LENGTH];
        long[..12].copy_from_slice(payload);
        Self::parse(&long, count_max)
    }

    /// The request of DMA_WRITE, and the reply of DMA_READ: `count` bytes of data behind it.
    pub fn parse_with_data(payload: &[u8], count_max: u32) -> Result<(Self, &[u8])> {
        let mut reader = Reader::new(payload);
        let access = Self::take(&mut reader, count_max)?;
        Ok((access, reader.exactly(access.count as usize)?))
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u64(self.address);
        out.u64(u64::from(self.count));
    }
}
