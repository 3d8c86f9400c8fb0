//! REGION_READ, REGION_WRITE and REGION_WRITE_MULTI.

use super::{Put, Reader, Result, WRITE_MULTI_MAX, WireError, at_most, range};

/// `count` bytes at `offset` of a region, not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionAccess {
    pub offset: u64,
    pub region: u32,
    pub count: u32,
}

impl RegionAccess {
    pub const LENGTH: usize = 16;

    fn take(reader: &mut Reader<'_>, count_max: u32) -> Result<Self> {
        let access = Self { offset: reader.u64()?, region: reader.u32()?, count: reader.u32()? };
        at_most("count", u64::from(access.count), u64::from(count_max))?;
        range(access.offset, u64::from(access.count))?;
        Ok(access)
    }

    /// REGION_READ's request and REGION_WRITE's reply.
    pub fn parse(payload: &[u8], count_max: u32) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let access = Self::take(&mut reader, count_max)?;
        reader.end()?;
        Ok(access)
    }

    /// REGION_READ's reply.
    pub fn parse_with_data(payload: &[u8], count_max: u32) -> Result<(Self, &[u8])> {
        let mut reader = Reader::new(payload);
        let access = Self::take(&mut reader, count_max)?;
        Ok((access, reader.exactly(access.count as usize)?))
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes());
    }

    /// As they are written.
    pub fn bytes(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.region.to_le_bytes());
        bytes[12..].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }
}

/// REGION_WRITE's request; `data` is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionWrite<'a> {
    pub offset: u64,
    pub region: u32,
    pub data: &'a [u8],
}

impl<'a> RegionWrite<'a> {
    pub fn parse(payload: &'a [u8], count_max: u32) -> Result<Self> {
        let (access, data) = RegionAccess::parse_with_data(payload, count_max)?;
        Ok(Self { offset: access.offset, region: access.region, data })
    }

    pub fn access(&self) -> RegionAccess {
        RegionAccess { offset: self.offset, region: self.region, count: self.data.len() as u32 }
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        self.access().write(out);
        out.extend_from_slice(self.data);
    }
}

/// One of a WRITE_MULTI's writes: 1 to 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SingleWrite {
    pub offset: u64,
    pub region: u32,
    count: u8,
    data: [u8; 8],
}

impl SingleWrite {
    pub const LENGTH: usize = 24;

    /// `None` unless `data` has 1 to 8 bytes.
    pub fn new(offset: u64, region: u32, data: &[u8]) -> Option<Self> {
        let mut bytes = [0; 8];
        bytes.get_mut(..data.len()).filter(|_| !data.is_empty())?.copy_from_slice(data);
        range(offset, data.len() as u64).ok()?;
        Some(Self { offset, region, count: data.len() as u8, data: bytes })
    }

    pub fn data(&self) -> &[u8] {
        &self.data[..usize::from(self.count)]
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let (offset, region, count) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let data = reader.bytes(8)?.get(..count as usize);
        let write = data.and_then(|data| Self::new(offset, region, data));
        write.ok_or(WireError::Invalid("a single write is of 1 to 8 bytes"))
    }
}

/// REGION_WRITE_MULTI's request: 1 to [`WRITE_MULTI_MAX`] writes, each of which has been looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteMulti<'a>(&'a [u8]);

impl<'a> WriteMulti<'a> {
    pub fn parse(payload: &'a [u8]) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let count = reader.u64()?;
        at_most("writes", count, WRITE_MULTI_MAX)?;
        if count == 0 {
            return Err(WireError::Invalid("a WRITE_MULTI without a write"));
        }
        let writes = reader.exactly(count as usize * SingleWrite::LENGTH)?;
        writes.chunks_exact(SingleWrite::LENGTH).try_for_each(|write| SingleWrite::parse(write).map(drop))?;
        Ok(Self(writes))
    }

    pub fn iter(self) -> impl Iterator<Item = SingleWrite> + 'a {
        // All of them were parsed once.
        self.0.chunks_exact(SingleWrite::LENGTH).filter_map(|write| SingleWrite::parse(write).ok())
    }

    /// A request with these.
    pub fn write_request(writes: &[SingleWrite], out: &mut Vec<u8>) {
        out.u64(writes.len() as u64);
        for write in writes {
            out.u64(write.offset);
            out.u32(write.region);
            out.u32(u32::from(write.count));
            out.extend_from_slice(&write.data);
        }
    }

    /// How many of the writes were done.
    pub fn parse_reply(payload: &[u8]) -> Result<u64> {
        let mut reader = Reader::new(payload);
        let count = reader.u64()?;
        reader.end()?;
        at_most("writes", count, WRITE_MULTI_MAX)?;
        Ok(count)
    }
}
