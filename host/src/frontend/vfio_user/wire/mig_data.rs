//! MIG_DATA_READ and MIG_DATA_WRITE: the device's state, as a stream.

use super::{Put, Reader, Result, WireError, at_least, at_most};

/// MIG_DATA_READ's request: up to `size` bytes, not 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigDataRead {
    pub size: u32,
}

impl MigDataRead {
    pub const LENGTH: usize = 8;

    pub fn parse(payload: &[u8], size_max: u32) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (argsz, size) = (reader.u32()?, reader.u32()?);
        reader.end()?;
        check(size, size_max)?;
        // Fewer bytes than asked for are the end of the data: a reply must never be short for lack of room.
        at_least(argsz, Self::LENGTH as u64 + u64::from(size))?;
        Ok(Self { size })
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u32(self.size.saturating_add(Self::LENGTH as u32));
        out.u32(self.size);
    }
}

fn check(size: u32, size_max: u32) -> Result<()> {
    at_most("size", u64::from(size), u64::from(size_max))?;
    if size == 0 { Err(WireError::Invalid("no migration data are asked for or given")) } else { Ok(()) }
}

/// MIG_DATA_WRITE's request, and MIG_DATA_READ's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigDataWrite<'a> {
    /// Empty only in a reply: the end
    pub data: &'a [u8],
}

impl<'a> MigDataWrite<'a> {
    pub fn parse(payload: &'a [u8], size_max: u32) -> Result<Self> {
        let data = Self::parse_reply(payload, size_max)?;
        check(data.data.len() as u32, size_max)?;
        Ok(data)
    }

    pub fn parse_reply(payload: &'a [u8], size_max: u32) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (argsz, size) = (reader.u32()?, reader.u32()?);
        at_most("size", u64::from(size), u64::from(size_max))?;
        at_least(argsz, MigDataRead::LENGTH as u64 + u64::from(size))?;
        Ok(Self { data: reader.exactly(size as usize)? })
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        Self::write_head(self.data.len() as u32, out);
        out.extend_from_slice(self.data);
    }

    /// What stands before `size` bytes of data.
    pub fn write_head(size: u32, out: &mut Vec<u8>) {
        out.u32(size.saturating_add(MigDataRead::LENGTH as u32));
        out.u32(size);
    }
}
