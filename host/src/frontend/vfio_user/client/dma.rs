//! The guest's memory, as the device is told of it.

use std::os::fd::BorrowedFd;

use super::connection::Ask;
use super::{Client, Error, Result, lock};
use crate::frontend::vfio_user::wire::{
    BITMAP_MAX, BitmapRequest, Command, DmaMap, DmaUnmap, PAGE_SIZE, UnmapScope, bitmap_length,
};

impl Client {
    /// With a file the device reaches it directly; without one it asks for the bytes ([`super::GuestMemory`]), and does so from the
    /// moment that this is called.
    pub fn dma_map(&self, map: &DmaMap, file: Option<BorrowedFd<'_>>) -> Result<()> {
        let aligned = (map.address | map.size | file.map_or(0, |_| map.offset)).is_multiple_of(PAGE_SIZE);
        let ends = map.size.checked_sub(1).and_then(|more| map.address.checked_add(more));
        if !aligned || ends.is_none() || !(map.readable || map.writable) {
            return Err(Error::Invalid("a map is of whole pages, and readable or writable"));
        }
        {
            let mut maps = lock(&self.connection.maps);
            if maps.check(map, self.agreed.dma_maps).is_err() {
                return Err(Error::Invalid("a map over another one, or one too many"));
            }
            maps.insert(*map);
        }
        let mut request = Vec::new();
        map.write(&mut request);
        let fds = file.as_slice();
        let mapped = self.ask(&Ask { fds, ..Ask::new(Command::DmaMap, &request, 0) }, &mut []);
        if mapped.is_err() {
            lock(&self.connection.maps).remove(map.address);
        }
        mapped.map(drop)
    }

    /// Exactly one map. When this returns, the device does not reach it any more.
    pub fn dma_unmap(&self, address: u64, size: u64) -> Result<()> {
        self.unmap(&DmaUnmap { scope: UnmapScope::One { address, size }, bitmap: None }, &mut [])?;
        lock(&self.connection.maps).remove(address);
        Ok(())
    }

    /// As [`Self::dma_unmap`], and which of its pages the device has dirtied: bit i is page i.
    pub fn dma_unmap_dirty(&self, address: u64, size: u64, page_size: u64) -> Result<Vec<u8>> {
        let length = page_size.is_power_of_two().then(|| bitmap_length(size, page_size));
        let length = length.filter(|length| page_size >= PAGE_SIZE && *length <= BITMAP_MAX);
        let length = length.ok_or(Error::Invalid("the page size of a bitmap, or its length"))?;
        let mut bitmap = vec![0; length as usize];
        let asked = Some(BitmapRequest { page_size, size: length });
        self.unmap(&DmaUnmap { scope: UnmapScope::One { address, size }, bitmap: asked }, &mut bitmap)?;
        lock(&self.connection.maps).remove(address);
        Ok(bitmap)
    }

    /// Every map.
    pub fn dma_unmap_all(&self) -> Result<()> {
        self.unmap(&DmaUnmap { scope: UnmapScope::All, bitmap: None }, &mut [])?;
        *lock(&self.connection.maps) = Default::default();
        Ok(())
    }

    fn unmap(&self, unmap: &DmaUnmap, bitmap: &mut [u8]) -> Result<()> {
        let mut request = Vec::new();
        unmap.write(&mut request);
        let fixed = if unmap.bitmap.is_some() { DmaUnmap::LENGTH_WITH_BITMAP } else { DmaUnmap::LENGTH };
        let room = bitmap.len();
        let reply = self.ask(&Ask::new(Command::DmaUnmap, &request, fixed), bitmap)?;
        // All but argsz is as it was asked.
        if reply.data != room || reply.fixed().get(4..) != request.get(4..) {
            return Err(self.wrong(Command::DmaUnmap));
        }
        Ok(())
    }
}
