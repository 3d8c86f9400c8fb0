//! Calls of a plug-in's migration and dirty-tracking functions. Its answers are numbers until they have been looked at.
//!
//! The owner calls these functions of one device one at a time (mediation's lane sees to it).

use rustix::io::Errno;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

use super::{errno, status};
use crate::plugin::calls::{ArcFailed, CallFrame, PluginDirty, PluginMigration, Refusal, Saved};
use crate::plugin::tables::Exactness;

/// Most bytes of match data.
const MATCH_DATA_MAX: usize = 64 * 1024;
/// Most bytes of a refusal's reason.
const REASON_MAX: usize = 1024;

impl PluginMigration<'_> {
    pub fn flags(&self) -> MigrationFlags {
        self.flags
    }

    /// At most 64 KiB that describe the device for the other side.
    pub fn match_data(&self, frame: CallFrame<'_>) -> Result<Vec<u8>, Errno> {
        let Some(function) = self.ops.match_data else { return Ok(Vec::new()) };
        let mut buffer = vec![0; MATCH_DATA_MAX];
        let mut length = 0;
        let (state, data) = (self.device.state(), buffer.as_mut_ptr());
        // SAFETY: a function of the tables that `open` returned; the buffer has the capacity that it is told.
        status(self.device.call(frame, |ctx| unsafe { function(state, ctx, data, MATCH_DATA_MAX, &raw mut length) }))?;
        if length > MATCH_DATA_MAX {
            return Err(Errno::PROTO);
        }
        buffer.truncate(length);
        Ok(buffer)
    }

    /// Whether the other side's device can go on here. A plug-in that does not compare requires equal match data.
    pub fn check_match(&self, frame: CallFrame<'_>, theirs: &[u8]) -> Result<(), Refusal> {
        let Some(function) = self.ops.check_match else {
            let ours = self.match_data(frame).map_err(|errno| Refusal { errno, reason: "no match data".into() })?;
            let reason = "the two devices describe themselves differently".to_owned();
            return if ours == theirs { Ok(()) } else { Err(Refusal { errno: Errno::OPNOTSUPP, reason }) };
        };
        let mut text = vec![0; REASON_MAX];
        let mut reason = abi::Reason { text: text.as_mut_ptr(), capacity: REASON_MAX, length: 0 };
        let (state, data, length) = (self.device.state(), theirs.as_ptr(), theirs.len());
        // SAFETY: as above; data and reason outlive the call.
        let code = self.device.call(frame, |ctx| unsafe { function(state, ctx, data, length, &raw mut reason) });
        status(code).map_err(|errno| {
            text.truncate(reason.length.min(REASON_MAX));
            let reason: String = String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).collect();
            Refusal { errno, reason }
        })
    }

    /// One arc.
    pub fn set_state(&self, frame: CallFrame<'_>, from: DeviceState, to: DeviceState) -> Result<(), ArcFailed> {
        let Some(function) = self.ops.set_state else { return Err(ArcFailed { errno: Errno::NOSYS, actual: from }) };
        let (state, mut actual) = (self.device.state(), from.raw());
        // SAFETY: as above.
        let code =
            self.device.call(frame, |ctx| unsafe { function(state, ctx, from.raw(), to.raw(), &raw mut actual) });
        // A state that does not exist is not believed: the device must be reset.
        status(code)
            .map_err(|errno| ArcFailed { errno, actual: DeviceState::from_raw(actual).unwrap_or(DeviceState::Error) })
    }

    /// The next bytes of the state.
    pub fn save(&self, frame: CallFrame<'_>, buffer: &mut [u8]) -> Result<Saved, Errno> {
        let Some(function) = self.ops.save else { return Err(Errno::NOSYS) };
        let (state, data, capacity, mut bytes) = (self.device.state(), buffer.as_mut_ptr(), buffer.len(), 0);
        // SAFETY: as above; the buffer has the capacity that it is told.
        let code = self.device.call(frame, |ctx| unsafe { function(state, ctx, data, capacity, &raw mut bytes) });
        let end = match code {
            abi::SAVE_MORE => false,
            abi::SAVE_END => true,
            code => return Err(errno(code, Errno::PROTO)),
        };
        // More bytes than there was room for, or a stream that goes on for ever without any.
        if bytes > capacity || (bytes == 0 && capacity > 0 && !end) {
            return Err(Errno::PROTO);
        }
        Ok(Saved { bytes, end })
    }

    pub fn load(&self, frame: CallFrame<'_>, bytes: &[u8]) -> Result<(), Errno> {
        let Some(function) = self.ops.load else { return Err(Errno::NOSYS) };
        let (state, data, length) = (self.device.state(), bytes.as_ptr(), bytes.len());
        // SAFETY: as above.
        status(self.device.call(frame, |ctx| unsafe { function(state, ctx, data, length) }))
    }

    /// What is left, in bytes; unknown is `u64::MAX`.
    pub fn remaining(&self, frame: CallFrame<'_>) -> Result<abi::Remaining, Errno> {
        let mut remaining = abi::Remaining {
            struct_size: size_of::<abi::Remaining>() as u32,
            reserved: 0,
            initial_bytes: u64::MAX,
            dirty_bytes: u64::MAX,
            stop_copy_bytes: u64::MAX,
        };
        let Some(function) = self.ops.remaining else { return Ok(remaining) };
        let state = self.device.state();
        // SAFETY: as above.
        status(self.device.call(frame, |ctx| unsafe { function(state, ctx, &raw mut remaining) }))?;
        Ok(remaining)
    }
}

impl PluginDirty<'_> {
    pub fn exactness(&self) -> Exactness {
        self.exactness
    }

    pub fn start(&self, frame: CallFrame<'_>, ranges: &[abi::IovaRange], page_size: u64) -> Result<(), Errno> {
        let Some(function) = self.ops.start else { return Err(Errno::NOSYS) };
        let (state, first, count) = (self.device.state(), ranges.as_ptr(), ranges.len());
        // SAFETY: as above.
        status(self.device.call(frame, |ctx| unsafe { function(state, ctx, first, count, page_size) }))
    }

    /// Sets bits of `bitmap`, which must hold a bit for each page of the range.
    pub fn report(
        &self,
        frame: CallFrame<'_>,
        iova: u64,
        length: u64,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> Result<(), Errno> {
        let Some(function) = self.ops.report else { return Err(Errno::NOSYS) };
        let pages = length.checked_div(page_size).ok_or(Errno::INVAL)?;
        if (bitmap.len() as u64) < pages.div_ceil(64) || !length.is_multiple_of(page_size) {
            return Err(Errno::INVAL);
        }
        let (state, words) = (self.device.state(), bitmap.as_mut_ptr());
        // SAFETY: as above; the bitmap has a bit for each page.
        status(self.device.call(frame, |ctx| unsafe { function(state, ctx, iova, length, page_size, words) }))?;
        // Bits beyond the range are no pages of it, whatever the plug-in set there.
        if let (spare @ 1.., Some(last)) = (pages % 64, bitmap.get_mut((pages / 64) as usize)) {
            *last &= (1 << spare) - 1;
        }
        Ok(())
    }

    pub fn stop(&self, frame: CallFrame<'_>) {
        let Some(function) = self.ops.stop else { return };
        let state = self.device.state();
        self.device.call(frame, |ctx| {
            // SAFETY: as above.
            unsafe { function(state, ctx) };
            0
        });
    }
}
