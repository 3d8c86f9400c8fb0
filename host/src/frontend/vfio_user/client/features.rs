//! DEVICE_FEATURE and the migration data.

use std::os::fd::BorrowedFd;

use super::connection::{Ask, Reply};
use super::{Client, Error, Result};
use crate::device::Feature;
use crate::frontend::vfio_user::wire::{
    Command, DeviceFeature, LOGGING_RANGES_MAX, LoggingReport, LoggingStart, MigDataRead, MigDataWrite, MigrationState,
    Operation, PAGE_SIZE,
};

const COMMAND: Command = Command::DeviceFeature;

impl Client {
    /// Can all of these be done with the feature?
    pub fn probe(&self, feature: Feature, get: bool, set: bool) -> Result<bool> {
        match self.feature(feature, Operation::Probe { get, set }, &[], &[], 0, &mut []) {
            Ok(_) => Ok(true),
            Err(Error::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// `data` goes and comes back at its length; `more` bytes and then `into` come behind it.
    fn feature(
        &self,
        feature: Feature,
        operation: Operation,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        more: usize,
        into: &mut [u8],
    ) -> Result<Reply> {
        let same = data.len().min(24);
        let fixed = DeviceFeature::LENGTH + same + more;
        let argsz = DeviceFeature::LENGTH + data.len() + more + into.len();
        let mut request = Vec::with_capacity(DeviceFeature::LENGTH + data.len());
        DeviceFeature::write_head(argsz as u32, feature, operation, &mut request);
        request.extend_from_slice(data);
        let mut echo = vec![0; data.len() - same];
        let into = if echo.is_empty() { into } else { &mut echo };
        let room = into.len();
        let reply = self.ask(&Ask { fds, ..Ask::new(COMMAND, &request, fixed) }, into)?;
        let flags = DeviceFeature::LENGTH - 4..DeviceFeature::LENGTH;
        if reply.data != room || reply.fixed().get(flags.clone()) != request.get(flags) {
            return Err(self.wrong(COMMAND));
        }
        Ok(reply)
    }

    fn set_feature(&self, feature: Feature, data: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        self.feature(feature, Operation::Set, data, fds, 0, &mut [])
    }

    /// `VFIO_MIGRATION_*`
    pub fn migration_flags(&self) -> Result<u64> {
        let reply = self.feature(Feature::Migration, Operation::Get, &[], &[], 8, &mut [])?;
        Ok(u64_at(reply.fixed(), DeviceFeature::LENGTH))
    }

    pub fn migration_state(&self) -> Result<MigrationState> {
        let reply = self.feature(Feature::MigDeviceState, Operation::Get, &[], &[], 8, &mut [])?;
        let raw = u64_at(reply.fixed(), DeviceFeature::LENGTH) as u32;
        MigrationState::from_raw(raw).ok_or_else(|| self.wrong(COMMAND))
    }

    /// Complete when it returns. After an error ask for the state: the device may be in another one, or in ERROR, from which only
    /// a reset leads out.
    pub fn set_migration_state(&self, state: MigrationState) -> Result<()> {
        let mut data = [0; 8];
        data[..4].copy_from_slice(&state.raw().to_le_bytes());
        self.set_feature(Feature::MigDeviceState, &data, &[]).map(drop)
    }

    /// Begins to log which pages the device dirties; what it did before counts as dirty, and is not reported. No range: everything.
    /// Returns the page size that is logged by.
    pub fn logging_start(&self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64> {
        if ranges.len() > LOGGING_RANGES_MAX as usize {
            return Err(Error::Invalid("too many ranges"));
        }
        let mut data = Vec::new();
        LoggingStart::write(page_size, ranges, &mut data);
        let reply = self.set_feature(Feature::DmaLoggingStart, &data, &[])?;
        Ok(u64_at(reply.fixed(), DeviceFeature::LENGTH))
    }

    pub fn logging_stop(&self) -> Result<()> {
        self.set_feature(Feature::DmaLoggingStop, &[], &[]).map(drop)
    }

    /// Which pages have been dirtied since they were last reported: bit i is page i. The log is empty afterwards: a report that is
    /// lost is dirt that is lost, so after an error everything counts as dirty.
    pub fn logging_report(&self, report: &LoggingReport, bitmap: &mut Vec<u8>) -> Result<()> {
        let length = report_length(report).ok_or(Error::Invalid("a report's range, page size or length"))?;
        let mut data = Vec::with_capacity(LoggingReport::LENGTH);
        report.write(&mut data);
        bitmap.resize(length, 0);
        let reply = self.feature(Feature::DmaLoggingReport, Operation::Get, &data, &[], 0, bitmap.as_mut_slice())?;
        if reply.fixed().get(DeviceFeature::LENGTH..) != Some(&data) {
            return Err(self.wrong(COMMAND));
        }
        Ok(())
    }

    /// The device may rest until it is accessed again or [`Self::low_power_exit`]; with an eventfd it is told when it wakes.
    pub fn low_power_entry(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        match wakeup {
            None => self.set_feature(Feature::LowPowerEntry, &[], &[]),
            // The descriptor goes with the message; its number is not looked at.
            Some(fd) => self.set_feature(Feature::LowPowerEntryWithWakeup, &[0; 8], &[fd]),
        }
        .map(drop)
    }

    pub fn low_power_exit(&self) -> Result<()> {
        self.set_feature(Feature::LowPowerExit, &[], &[]).map(drop)
    }

    /// The device's state in STOP_COPY, or as it is for now in PRE_COPY. Fewer bytes than there is room for: there are no more.
    pub fn mig_data_read(&self, data: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        for piece in data.chunks_mut(self.agreed.data_xfer_size as usize) {
            let room = piece.len();
            let mut head = Vec::with_capacity(MigDataRead::LENGTH);
            MigDataRead { size: room as u32 }.write(&mut head);
            let reply = self.ask(&Ask::new(Command::MigDataRead, &head, MigDataRead::LENGTH), piece)?;
            if (u64_at(reply.fixed(), 0) >> 32) as usize != reply.data {
                return Err(self.wrong(Command::MigDataRead));
            }
            filled += reply.data;
            if reply.data < room {
                break;
            }
        }
        Ok(filled)
    }

    /// The next bytes of a state, in RESUMING.
    pub fn mig_data_write(&self, data: &[u8]) -> Result<()> {
        for piece in data.chunks(self.agreed.data_xfer_size as usize) {
            let mut head = Vec::with_capacity(MigDataRead::LENGTH);
            MigDataWrite::write_head(piece.len() as u32, &mut head);
            self.ask(&Ask { tail: piece, ..Ask::new(Command::MigDataWrite, &head, 0) }, &mut [])?;
        }
        Ok(())
    }
}

/// `None`: it cannot be asked for.
fn report_length(report: &LoggingReport) -> Option<usize> {
    let page = report.page_size;
    let ok = page >= PAGE_SIZE && page.is_power_of_two() && report.iova.is_multiple_of(page);
    report.iova.checked_add(report.length.checked_sub(1)?)?;
    let length = ok.then(|| report.bitmap_length())?;
    usize::try_from(length).ok().filter(|length| *length as u64 <= crate::frontend::vfio_user::wire::BITMAP_MAX)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let taken = bytes.get(at..).and_then(|rest| rest.first_chunk());
    taken.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
