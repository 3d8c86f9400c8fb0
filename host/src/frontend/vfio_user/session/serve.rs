//! From a request to the backend's call to the reply's bytes.
//!
//! **Owns** what each request means: which call it is, what is checked before, what the reply is, and the errno of every
//! refusal. **Must never** hold a lock while the backend works, reply to a request that wants no reply, or leave a
//! descriptor open that a refused request brought.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
};

use super::{Maps, Message, Negotiated, Output, Put};
use crate::device::{Feature, RegionCapability};
use crate::frontend::vfio_user::wire::{
    DeviceFeature, DeviceInfo, DmaMap, DmaUnmap, FeatureCall, HEADER_LENGTH, IrqInfo, LoggingRanges, LoggingReport,
    MessageType, MigDataRead, MigDataWrite, MigrationState, RegionInfo, Request, SetIrqs, SetIrqsData, WriteMulti,
    capabilities_length, write_capabilities,
};

/// Of a region, what a client is told.
#[derive(Debug)]
pub struct RegionAnswer<F> {
    /// `VFIO_REGION_INFO_FLAG_*` without CAPS; MMAP only with a file
    pub flags: u32,
    pub size: u64,
    pub capabilities: Vec<RegionCapability>,
    /// To be mapped by the client, and where in it the region begins. Every page of it can be reached by the client,
    /// whatever the areas say.
    pub file: Option<(F, u64)>,
}

/// The device, as the protocol calls it. Every argument keeps the protocol's rules; whether the device has that region,
/// vector or address is the backend's to say. Errors are answered as they are.
pub trait Backend {
    type Fd;

    fn device_info(&mut self) -> Result<DeviceInfo, Errno>;
    fn region_info(&mut self, index: u32) -> Result<RegionAnswer<Self::Fd>, Errno>;
    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno>;
    /// `fds`: one for each vector where the data are eventfds, else empty.
    fn set_irqs(&mut self, request: &SetIrqs<'_>, fds: Vec<Self::Fd>) -> Result<(), Errno>;
    /// Fills all of `data`, which is not empty.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;
    /// Overlaps no map. Without a file the memory is reached by messages only.
    fn dma_map(&mut self, map: &DmaMap, fd: Option<Self::Fd>) -> Result<(), Errno>;
    /// Exactly one of the maps. Afterwards no DMA reaches it. `dirty`: bits of `page_size` bytes each, to be ORed into zeros.
    fn dma_unmap(&mut self, map: &DmaMap, dirty: Option<(u64, &mut [u8])>) -> Result<(), Errno>;
    fn reset(&mut self) -> Result<(), Errno>;
    /// Can all of these be done?
    fn probe(&mut self, feature: Feature, get: bool, set: bool) -> Result<(), Errno>;
    /// `VFIO_MIGRATION_*`; P2P is not passed on.
    fn migration_flags(&mut self) -> Result<u64, Errno>;
    fn state(&mut self) -> Result<MigrationState, Errno>;
    /// Complete when it returns.
    fn set_state(&mut self, state: MigrationState) -> Result<(), Errno>;
    /// Bytes put into `buffer`; fewer than it holds only at the end of the data.
    fn mig_data_read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno>;
    fn mig_data_write(&mut self, data: &[u8]) -> Result<(), Errno>;
    /// The page size that is logged by, in bytes.
    fn logging_start(&mut self, page_size: u64, ranges: LoggingRanges<'_>) -> Result<u64, Errno>;
    fn logging_stop(&mut self) -> Result<(), Errno>;
    /// ORs the dirty pages of any range into `bitmap`, which is zeros; bit i is page i of the report's size. What was taken
    /// from the log comes back into it unless [`Served::Report`] follows and that reply is sent in full.
    fn logging_report(&mut self, report: &LoggingReport, bitmap: &mut [u8]) -> Result<(), Errno>;
    fn low_power_entry(&mut self, wakeup: Option<Self::Fd>) -> Result<(), Errno>;
    fn low_power_exit(&mut self) -> Result<(), Errno>;
}

fn lock(maps: &Mutex<Maps>) -> MutexGuard<'_, Maps> {
    maps.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a request has left to do.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// No reply is wanted. What a report took out of the dirty log, if it was one, must go back.
    Silent,
    /// The output is to be sent.
    Reply,
    /// The output is to be sent, and has dirty pages that were taken out of the log: once it is sent in full they are the
    /// client's; if that fails they must go back.
    Report,
}

/// Serves one request. `out` is the reply; empty if none is wanted.
pub fn serve<B: Backend>(
    message: &mut Message<B::Fd>,
    negotiated: &Negotiated,
    maps: &Mutex<Maps>,
    backend: &mut B,
    out: &mut Output<B::Fd>,
) -> Served {
    let fds = std::mem::take(&mut message.fds);
    out.begin();
    let done = Call { negotiated, maps, backend, out }.run(message, fds);
    match done {
        _ if message.no_reply() => {
            out.clear();
            Served::Silent
        }
        Ok(served) => {
            out.finish(message);
            served
        }
        Err(errno) => {
            out.error(message, errno);
            Served::Reply
        }
    }
}

struct Call<'a, B: Backend> {
    negotiated: &'a Negotiated,
    maps: &'a Mutex<Maps>,
    backend: &'a mut B,
    out: &'a mut Output<B::Fd>,
}

impl<B: Backend> Call<'_, B> {
    fn run(mut self, message: &Message<B::Fd>, fds: Vec<B::Fd>) -> Result<Served, Errno> {
        if message.fds_refused || !matches!(message.header.kind, MessageType::Command { .. }) {
            return Err(Errno::INVAL);
        }
        let (payload, most) = (message.payload(), self.negotiated.max_data_xfer_size);
        let request = Request::parse(message.header.command, payload, fds.len(), most);
        let request = request.map_err(|error| error.errno())?;
        let served = match request {
            Request::DmaUnmap(DmaUnmap { bitmap: Some(_), .. })
            | Request::DeviceFeature(DeviceFeature { call: FeatureCall::LoggingReport(_), .. }) => Served::Report,
            _ => Served::Reply,
        };
        match request {
            // Only once.
            Request::Version(_) => Err(Errno::INVAL),
            Request::DmaMap(map) => self.dma_map(map, fds),
            Request::DmaUnmap(unmap) => self.dma_unmap(unmap),
            Request::DeviceGetInfo => self.backend.device_info().map(|info| info.write(&mut self.out.bytes)),
            Request::DeviceGetRegionInfo { index, argsz } => self.region_info(index, argsz),
            // The stores come as messages: there is nothing to be had in advance.
            Request::DeviceGetRegionIoFds { .. } => Err(Errno::OPNOTSUPP),
            Request::DeviceGetIrqInfo { index } => {
                self.backend.irq_info(index).map(|info| info.write(&mut self.out.bytes))
            }
            Request::DeviceSetIrqs(request) => {
                debug_assert_eq!(fds.is_empty(), request.data != SetIrqsData::EventFds);
                self.backend.set_irqs(&request, fds)
            }
            Request::RegionRead(access) => {
                access.write(&mut self.out.bytes);
                let data = self.out.room(access.count as usize);
                self.backend.region_read(access.region, access.offset, data)
            }
            Request::RegionWrite(write) => {
                write.access().write(&mut self.out.bytes);
                self.backend.region_write(write.region, write.offset, write.data)
            }
            Request::DeviceReset => self.backend.reset(),
            Request::RegionWriteMulti(writes) => self.write_multi(writes),
            Request::DeviceFeature(feature) => self.feature(&feature, payload, fds),
            Request::MigDataRead(read) => self.mig_data_read(read),
            Request::MigDataWrite(write) => self.backend.mig_data_write(write.data),
        }?;
        Ok(served)
    }

    fn dma_map(&mut self, map: DmaMap, mut fds: Vec<B::Fd>) -> Result<(), Errno> {
        lock(self.maps).check(&map, self.negotiated.max_dma_maps)?;
        self.backend.dma_map(&map, fds.pop())?;
        // One thread serves a client: nobody has mapped anything meanwhile.
        lock(self.maps).insert(map);
        Ok(())
    }

    fn dma_unmap(&mut self, unmap: DmaUnmap) -> Result<(), Errno> {
        let found = lock(self.maps).find(unmap.scope)?;
        let bits = unmap.bitmap.map_or(0, |bitmap| bitmap.size as usize);
        unmap.write_reply(bits, &mut self.out.bytes);
        let bitmap = self.out.room(bits);
        bitmap.fill(0);
        for map in found {
            let dirty = unmap.bitmap.map(|asked| (asked.page_size, &mut *bitmap));
            self.backend.dma_unmap(&map, dirty)?;
            lock(self.maps).remove(map.address);
        }
        Ok(())
    }

    fn region_info(&mut self, index: u32, argsz: u32) -> Result<(), Errno> {
        let answer = self.backend.region_info(index)?;
        let capabilities = capabilities_length(&answer.capabilities);
        let length = u32::try_from(RegionInfo::LENGTH + capabilities).map_err(|_| Errno::IO)?;
        let fits = length <= argsz;
        let mut flags = answer.flags & !(VFIO_REGION_INFO_FLAG_CAPS | VFIO_REGION_INFO_FLAG_MMAP);
        if capabilities > 0 {
            flags |= VFIO_REGION_INFO_FLAG_CAPS;
        }
        if answer.file.is_some() {
            flags |= VFIO_REGION_INFO_FLAG_MMAP;
        }
        // Also where the chain does not fit and the kernel says 0: with CAPS, QEMU takes 0 for an error and gives up.
        let cap_offset = if capabilities > 0 { RegionInfo::LENGTH as u32 } else { 0 };
        let offset = answer.file.as_ref().map_or(0, |(_, offset)| *offset);
        RegionInfo { argsz: length, flags, index, cap_offset, size: answer.size, offset }.write(&mut self.out.bytes);
        if fits {
            // A client asks again with room for all; it takes one descriptor for a region, and only once.
            write_capabilities(&answer.capabilities, &mut self.out.bytes).map_err(|_| Errno::IO)?;
            self.out.fds.extend(answer.file.map(|(fd, _)| fd));
        }
        Ok(())
    }

    /// How many were done: an error only if the first was not.
    fn write_multi(&mut self, writes: WriteMulti<'_>) -> Result<(), Errno> {
        if !self.negotiated.write_multiple {
            return Err(Errno::OPNOTSUPP);
        }
        let mut done = 0;
        for write in writes.iter() {
            match self.backend.region_write(write.region, write.offset, write.data()) {
                Ok(()) => done += 1,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        self.out.bytes.u64(done);
        Ok(())
    }

    fn mig_data_read(&mut self, read: MigDataRead) -> Result<(), Errno> {
        MigDataWrite::write_head(0, &mut self.out.bytes);
        let room = read.size as usize;
        let count = self.backend.mig_data_read(self.out.room(room))?;
        if count > room {
            return Err(Errno::IO);
        }
        self.out.shorten(room, count);
        let mut head = Vec::with_capacity(MigDataRead::LENGTH);
        MigDataWrite::write_head(count as u32, &mut head);
        self.out.bytes[HEADER_LENGTH..HEADER_LENGTH + head.len()].copy_from_slice(&head);
        Ok(())
    }

    fn feature(&mut self, feature: &DeviceFeature<'_>, payload: &[u8], mut fds: Vec<B::Fd>) -> Result<(), Errno> {
        // The reply begins with, and mostly is, the request's payload.
        self.out.bytes.extend_from_slice(payload);
        let data = HEADER_LENGTH + DeviceFeature::LENGTH;
        match feature.call {
            FeatureCall::Probe { feature, get, set } => return self.backend.probe(feature, get, set),
            FeatureCall::GetMigration => {
                let known = u64::from(VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY);
                self.out.bytes.u64(self.backend.migration_flags()? & known);
            }
            FeatureCall::GetState => {
                self.out.bytes.u32(self.backend.state()?.raw());
                self.out.bytes.u32(0);
            }
            FeatureCall::SetState(state) => self.backend.set_state(state)?,
            FeatureCall::LowPowerEntry => self.backend.low_power_entry(None)?,
            FeatureCall::LowPowerEntryWithWakeup => {
                let wakeup = fds.pop().ok_or(Errno::INVAL)?;
                self.backend.low_power_entry(Some(wakeup))?;
            }
            FeatureCall::LowPowerExit => self.backend.low_power_exit()?,
            FeatureCall::LoggingStart(start) => {
                let page_size = self.backend.logging_start(start.page_size, start.ranges)?;
                self.out.bytes[data..data + 8].copy_from_slice(&page_size.to_le_bytes());
            }
            FeatureCall::LoggingStop => self.backend.logging_stop()?,
            FeatureCall::LoggingReport(report) => {
                let bitmap = self.out.room(report.bitmap_length() as usize);
                bitmap.fill(0);
                self.backend.logging_report(&report, bitmap)?;
                clear_behind(bitmap, report.pages());
            }
        }
        let length = (self.out.bytes.len() + self.out.bulk().len() - HEADER_LENGTH) as u32;
        self.out.bytes[HEADER_LENGTH..HEADER_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        Ok(())
    }
}

/// Bits that have no page are zero.
fn clear_behind(bitmap: &mut [u8], pages: u64) {
    let whole = usize::try_from(pages / 8).unwrap_or(usize::MAX);
    if let Some((first, behind)) = bitmap.get_mut(whole..).and_then(|rest| rest.split_first_mut()) {
        *first &= (1 << (pages % 8)) - 1;
        behind.fill(0);
    }
}
