//! What the device has, its registers and its interrupts.

use std::os::fd::{BorrowedFd, OwnedFd};

use super::connection::Ask;
use super::{Client, Error, Result};
use crate::device::{IrqAction, IrqData, IrqSet, RegionCapability};
use crate::frontend::vfio_user::wire::{
    Bools, CAPABILITIES_MAX, Command, DeviceInfo, IRQ_VECTORS_MAX, IrqInfo, RegionAccess, RegionInfo, SetIrqs,
    SetIrqsData, SingleWrite, WRITE_MULTI_MAX, WriteMulti, parse_capabilities,
};

/// A region, as the server describes it.
#[derive(Debug)]
pub struct RegionAnswer {
    /// `VFIO_REGION_INFO_FLAG_*`
    pub flags: u32,
    /// In bytes
    pub size: u64,
    pub capabilities: Vec<RegionCapability>,
    /// To be mapped, and where in it the region begins, in bytes. Map the areas of the sparse capability; all, if it has none
    pub file: Option<(OwnedFd, u64)>,
}

impl Client {
    pub fn device_info(&self) -> Result<DeviceInfo> {
        let mut request = Vec::new();
        DeviceInfo { flags: 0, num_regions: 0, num_irqs: 0 }.write(&mut request);
        let reply = self.ask(&Ask::new(Command::DeviceGetInfo, &request, DeviceInfo::LENGTH), &mut [])?;
        self.checked(Command::DeviceGetInfo, DeviceInfo::parse(reply.fixed()))
    }

    /// Asked for once with little room, and again with as much as is needed.
    pub fn region_info(&self, index: u32) -> Result<RegionAnswer> {
        const COMMAND: Command = Command::DeviceGetRegionInfo;
        let mut room = 4096;
        for _ in 0..2 {
            let mut request = Vec::new();
            let argsz = (RegionInfo::LENGTH + room) as u32;
            RegionInfo { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 }.write(&mut request);
            let mut data = vec![0; room];
            let ask = Ask { fds_max: 1, ..Ask::new(COMMAND, &request, RegionInfo::LENGTH) };
            let mut reply = self.ask(&ask, &mut data)?;
            data.truncate(reply.data);
            let (info, _) = self.checked(COMMAND, RegionInfo::parse(reply.fixed()))?;
            if info.index != index {
                return Err(self.wrong(COMMAND));
            }
            let need = info.argsz as usize - RegionInfo::LENGTH;
            if need > room && need <= CAPABILITIES_MAX {
                room = need;
                continue;
            }
            let capabilities = self.checked(COMMAND, parse_capabilities(&info, &data))?;
            let file = reply.fds.pop().map(|fd| (fd, info.offset));
            return Ok(RegionAnswer { flags: info.flags, size: info.size, capabilities, file });
        }
        Err(self.wrong(COMMAND))
    }

    pub fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        let mut request = Vec::new();
        IrqInfo { flags: 0, index, count: 0 }.write(&mut request);
        let reply = self.ask(&Ask::new(Command::DeviceGetIrqInfo, &request, IrqInfo::LENGTH), &mut [])?;
        let info = self.checked(Command::DeviceGetIrqInfo, IrqInfo::parse(reply.fixed()))?;
        if info.index == index { Ok(info) } else { Err(self.wrong(Command::DeviceGetIrqInfo)) }
    }

    fn data_max(&self) -> usize {
        self.agreed.data_xfer_size as usize
    }

    /// Fills all of `data`, by as many messages as it takes; after an error part of it may be filled.
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if data.is_empty() {
            return Err(Error::Invalid("an empty read"));
        }
        let mut at = offset;
        for piece in data.chunks_mut(self.data_max()) {
            let head = RegionAccess { offset: at, region, count: piece.len() as u32 }.bytes();
            let count = piece.len();
            let reply = self.ask(&Ask::new(Command::RegionRead, &head, RegionAccess::LENGTH), piece)?;
            if reply.data != count || reply.fixed() != head {
                return Err(self.wrong(Command::RegionRead));
            }
            at = at.wrapping_add(count as u64);
        }
        Ok(())
    }

    /// Returns when the device has it.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.pieces(region, offset, data, |head, piece| {
            let ask = Ask { tail: piece, ..Ask::new(Command::RegionWrite, head, RegionAccess::LENGTH) };
            let reply = self.ask(&ask, &mut [])?;
            if reply.fixed() == head { Ok(()) } else { Err(self.wrong(Command::RegionWrite)) }
        })
    }

    /// Returns when it is on its way: done in order, before whatever is asked next, and nobody is told if it fails.
    pub fn region_post(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.pieces(region, offset, data, |head, piece| {
            self.connection.post(Command::RegionWrite, head, piece).map_err(Error::Ended)
        })
    }

    fn pieces(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
        mut write: impl FnMut(&[u8], &[u8]) -> Result<()>,
    ) -> Result<()> {
        if data.is_empty() {
            return Err(Error::Invalid("an empty write"));
        }
        let mut at = offset;
        for piece in data.chunks(self.data_max()) {
            write(&RegionAccess { offset: at, region, count: piece.len() as u32 }.bytes(), piece)?;
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Many small writes in one message. How many were done before one failed; an error only if none was.
    pub fn region_write_multi(&self, writes: &[SingleWrite]) -> Result<usize> {
        if !self.agreed.write_multiple {
            return Err(Error::Invalid("the server has no WRITE_MULTI"));
        }
        if writes.is_empty() || writes.len() as u64 > WRITE_MULTI_MAX {
            return Err(Error::Invalid("a WRITE_MULTI of no write, or of too many"));
        }
        let mut request = Vec::new();
        WriteMulti::write_request(writes, &mut request);
        let reply = self.ask(&Ask::new(Command::RegionWriteMulti, &request, 8), &mut [])?;
        let done = self.checked(Command::RegionWriteMulti, WriteMulti::parse_reply(reply.fixed()))? as usize;
        if done <= writes.len() { Ok(done) } else { Err(self.wrong(Command::RegionWriteMulti)) }
    }

    /// `VFIO_DEVICE_SET_IRQS`. Many eventfds go in as many messages as the server's limit needs; of one message all are set or
    /// none is.
    pub fn set_irqs(&self, set: &IrqSet<'_>) -> Result<()> {
        let IrqSet { index, start, count, action, data } = *set;
        if count > IRQ_VECTORS_MAX || start.checked_add(count).is_none() {
            return Err(Error::Invalid("too many vectors"));
        }
        match data {
            IrqData::None => self.irqs(&SetIrqs { index, start, count, action, data: SetIrqsData::None }, &[]),
            IrqData::Bool(bools) => {
                let bytes: Vec<u8> = bools.iter().map(|set| u8::from(*set)).collect();
                if bytes.len() != count as usize {
                    return Err(Error::Invalid("one bool for each vector"));
                }
                let data = SetIrqsData::Bool(Bools::new(&bytes));
                self.irqs(&SetIrqs { index, start, count, action, data }, &[])
            }
            IrqData::EventFd(fds) if fds.len() == count as usize => self.eventfds(index, start, action, fds),
            IrqData::EventFd(_) => Err(Error::Invalid("one eventfd for each vector")),
        }
    }

    /// In runs of vectors that have an eventfd, and of those that lose theirs.
    fn eventfds(&self, index: u32, start: u32, action: IrqAction, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let mut at = start;
        for run in fds.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let most = if run.first().is_some_and(Option::is_some) { self.agreed.msg_fds.max(1) } else { u32::MAX };
            for part in run.chunks(most as usize) {
                let fds: Vec<BorrowedFd<'_>> = part.iter().flatten().copied().collect();
                let data = if fds.is_empty() { SetIrqsData::NoEventFds } else { SetIrqsData::EventFds };
                let count = part.len() as u32;
                self.irqs(&SetIrqs { index, start: at, count, action, data }, &fds)?;
                at += count;
            }
        }
        Ok(())
    }

    fn irqs(&self, set: &SetIrqs<'_>, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut request = Vec::new();
        set.write(&mut request);
        self.ask(&Ask { fds, ..Ask::new(Command::DeviceSetIrqs, &request, 0) }, &mut []).map(drop)
    }
}
