//! Migration of a device by its client: features, states, and the data as MIG_DATA_READ and MIG_DATA_WRITE carry them.
//!
//! **Owns** the head of the data, which says what device they are of, and bytes that did not fit into a read. **Must never** give a
//! short read before the end of the data, or let the state of one kind of device into another.
//!
//! The data: [`MAGIC`], the length of the match data (`u32`, little-endian), the match data, then the device's stream. The
//! receiving side checks the head before anything of the device is touched.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY};
use vfio_mediate_sdk::state::DeviceState;

use super::DeviceBackend;
use crate::device::{Feature, FeatureAccess};
use crate::frontend::vfio_user::wire::MigrationState;
use crate::mediation::MediatedDevice;

/// What the data begin with.
const MAGIC: [u8; 4] = *b"vfum";
const HEAD: usize = 8;
/// Most bytes of match data: the host's own and a plug-in's.
const MATCH_MAX: usize = 128 << 10;
/// A save is asked for so many bytes at least; what a read has no room for waits for the next one.
const SAVE_MIN: usize = 8 << 10;
/// A walk between states takes so long at most: clients give up on a request after 5 s.
const WALK_PATIENCE: Duration = Duration::from_secs(4);

/// The state that a client is told of. Where the device got stuck on a P2P state it still runs.
fn told(state: DeviceState) -> MigrationState {
    match state {
        DeviceState::Error => MigrationState::Error,
        DeviceState::Stop => MigrationState::Stop,
        DeviceState::Running | DeviceState::RunningP2p => MigrationState::Running,
        DeviceState::StopCopy => MigrationState::StopCopy,
        DeviceState::Resuming => MigrationState::Resuming,
        DeviceState::PreCopy | DeviceState::PreCopyP2p => MigrationState::PreCopy,
    }
}

/// `None`: it cannot be asked for.
fn asked(state: MigrationState) -> Option<DeviceState> {
    Some(match state {
        MigrationState::Error => return None,
        MigrationState::Stop => DeviceState::Stop,
        MigrationState::Running => DeviceState::Running,
        MigrationState::StopCopy => DeviceState::StopCopy,
        MigrationState::Resuming => DeviceState::Resuming,
        MigrationState::PreCopy => DeviceState::PreCopy,
    })
}

impl DeviceBackend {
    pub(super) fn probe_feature(&self, feature: Feature, get: bool, set: bool) -> Result<(), Errno> {
        let (can_get, can_set) = match feature {
            Feature::Migration => (self.device.migratable().is_ok(), false),
            Feature::MigDeviceState => (self.device.migratable().is_ok(), self.device.migratable().is_ok()),
            // Dirt is known of every device, if only that all may be dirty.
            Feature::DmaLoggingStart | Feature::DmaLoggingStop => (false, true),
            Feature::DmaLoggingReport => (true, false),
            Feature::LowPowerEntry | Feature::LowPowerEntryWithWakeup | Feature::LowPowerExit => {
                (false, self.device.has_feature(feature, FeatureAccess::Set))
            }
            _ => (false, false),
        };
        match (get, set) {
            (true, _) if !can_get => Err(Errno::NOTTY),
            (_, true) if !can_set => Err(Errno::NOTTY),
            // Asked for nothing: is it there?
            _ if can_get || can_set => Ok(()),
            _ => Err(Errno::NOTTY),
        }
    }

    pub(super) fn migration_bits(&self) -> Result<u64, Errno> {
        let flags = self.device.migratable().map_err(|error| error.errno())?;
        let pre_copy = if flags.pre_copy { VFIO_MIGRATION_PRE_COPY } else { 0 };
        Ok(u64::from(VFIO_MIGRATION_STOP_COPY | pre_copy))
    }

    pub(super) fn migration_state(&self) -> Result<MigrationState, Errno> {
        self.device.migratable().map_err(|error| error.errno())?;
        Ok(told(self.device.state()))
    }

    pub(super) fn walk_to(&mut self, state: MigrationState) -> Result<(), Errno> {
        let target = asked(state).ok_or(Errno::INVAL)?;
        let before = self.device.state();
        if before == DeviceState::Resuming && target != before {
            self.loading.finish()?;
        }
        let walked = self.device.set_state(target, Instant::now() + WALK_PATIENCE);
        let after = self.device.state();
        if !after.is_saving() {
            self.saving.forget();
        }
        if after != DeviceState::Resuming || before != DeviceState::Resuming {
            self.loading = Loading::default();
        }
        walked.map_err(|error| error.errno)
    }
}

/// The data on their way out.
#[derive(Debug, Default)]
pub struct Saving {
    begun: bool,
    /// Saved, and not yet read
    left: Vec<u8>,
    /// Of `left`, what has been read
    taken: usize,
}

impl Saving {
    /// The saving has ended.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Fills `buffer`; fewer bytes are the end of the data, in pre-copy for now.
    pub fn read(&mut self, device: &MediatedDevice, buffer: &mut [u8]) -> Result<usize, Errno> {
        if !device.state().is_saving() {
            return Err(Errno::INVAL);
        }
        if !self.begun {
            let description = device.match_data().map_err(|error| error.errno())?;
            let length = u32::try_from(description.len()).map_err(|_| Errno::OVERFLOW)?;
            self.left = [&MAGIC[..], &length.to_le_bytes(), &description].concat();
            self.taken = 0;
            self.begun = true;
        }
        let mut filled = self.take(buffer);
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let saved = if rest.len() >= SAVE_MIN {
                device.save(rest).inspect(|saved| filled += saved.bytes)
            } else {
                self.left.resize(SAVE_MIN, 0);
                let saved = device.save(&mut self.left);
                self.left.truncate(saved.as_ref().map_or(0, |saved| saved.bytes));
                self.taken = 0;
                filled += self.take(rest);
                saved
            };
            match saved {
                Ok(saved) if saved.end => break,
                Ok(_) => {}
                // What was saved before is the client's; it learns of the error with the next read.
                Err(_) if filled > 0 => return self.keep(buffer.get(..filled)),
                Err(error) => return Err(error.errno()),
            }
        }
        Ok(filled)
    }

    fn take(&mut self, into: &mut [u8]) -> usize {
        let left = self.left.get(self.taken..).unwrap_or(&[]);
        let count = left.len().min(into.len());
        into[..count].copy_from_slice(&left[..count]);
        self.taken += count;
        count
    }

    /// A short read would be taken for the end: the bytes wait, and the read fails.
    fn keep(&mut self, read: Option<&[u8]>) -> Result<usize, Errno> {
        let rest = self.left.split_off(self.taken.min(self.left.len()));
        self.left = [read.unwrap_or(&[]), &rest].concat();
        self.taken = 0;
        Err(Errno::IO)
    }
}

/// The data on their way in.
#[derive(Debug, Default)]
pub struct Loading {
    /// Of the head and the match data, until they are whole
    head: Vec<u8>,
    matched: bool,
}

impl Loading {
    /// The next bytes, cut anywhere. ENODEV: they are of another kind of device; EBADMSG: they are no such data.
    pub fn write(&mut self, device: &MediatedDevice, mut data: &[u8]) -> Result<(), Errno> {
        if device.state() != DeviceState::Resuming {
            return Err(Errno::INVAL);
        }
        while !self.matched {
            let need = self.need()?;
            let (part, rest) = data.split_at(data.len().min(need - self.head.len()));
            self.head.extend_from_slice(part);
            data = rest;
            if self.head.len() < need {
                return Ok(());
            }
            if self.need()? == need {
                let description = self.head.get(HEAD..).unwrap_or(&[]);
                device.check_match(description).map_err(|refusal| {
                    tracing::warn!(device = %device.identity().name, reason = %refusal.reason, "migration data");
                    refusal.errno
                })?;
                self.matched = true;
            }
        }
        if data.is_empty() {
            return Ok(());
        }
        device.load(data).map_err(|error| error.errno())
    }

    /// Bytes of the head, as far as it is known.
    fn need(&self) -> Result<usize, Errno> {
        let Some(head) = self.head.first_chunk::<HEAD>() else { return Ok(HEAD) };
        let [m0, m1, m2, m3, length @ ..] = *head;
        let length = u32::from_le_bytes(length) as usize;
        if [m0, m1, m2, m3] != MAGIC || length > MATCH_MAX {
            return Err(Errno::BADMSG);
        }
        Ok(HEAD + length)
    }

    /// The client says that these were all. A device that got nothing of its own finds that out by itself.
    fn finish(&self) -> Result<(), Errno> {
        if self.matched || self.head.is_empty() { Ok(()) } else { Err(Errno::BADMSG) }
    }
}
