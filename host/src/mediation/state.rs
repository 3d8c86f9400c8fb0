//! The device's migration: states, match data, save and load.
//!
//! The state is stored when an arc has succeeded; a failed arc stores where the device really is. A device with a plug-in
//! that migrates *and* a migration of its own goes through both: towards stopping the plug-in first, towards running the
//! device first.

use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags, next_step};

use super::config::COMMAND;
use super::device::MediatedDevice;
use super::error::{MediationError, Refusal, Result, StateError};
use super::gate::{Class, Reason};
use super::lock;
use super::mediator::{ArcFailed, MediatorMigration, Origin, Remaining, Saved};
use super::stream::{BUFFER_MIN, HEADER, HostState, Loader, Part, Saver, Sink};
use crate::device::{CONFIG_REGION, NativeMigration};

/// Version of the match data and of the stream's framing.
const FORMAT: u16 = 1;
/// Match data of a plug-in, in bytes.
const MATCH_MAX: usize = 64 << 10;
/// What the host saves of configuration space: cache line size and latency, BARs, ROM BAR, interrupt line, and at last
/// COMMAND, which switches on what the others have set up.
const SAVED: [(u64, usize); 5] = [(0x0c, 2), (0x10, 24), (0x30, 4), (0x3c, 1), (COMMAND, 2)];

/// The streams that are open.
#[derive(Debug, Default)]
pub struct Streams {
    save: Option<Saving>,
    load: Option<Loader>,
}

impl Streams {
    pub fn end(&mut self) {
        *self = Self::default();
    }
}

/// A saving stream, through PRE_COPY, PRE_COPY_P2P and STOP_COPY.
#[derive(Debug, Default)]
struct Saving {
    saver: Saver,
    /// The host part has been saved: in pre-copy, after stopping
    host_saved: (bool, bool),
    plugin_ended: bool,
    device_ended: bool,
    ended: bool,
}

/// Who migrates the device.
struct Backing<'a> {
    plugin: Option<Box<dyn MediatorMigration + 'a>>,
    native: Option<&'a dyn NativeMigration>,
    flags: MigrationFlags,
}

impl MediatedDevice {
    /// What the device can do, or why it cannot be migrated.
    pub fn migratable(&self) -> Result<MigrationFlags> {
        self.backing().map(|backing| backing.flags)
    }

    fn backing(&self) -> Result<Backing<'_>> {
        let plugin = self.plugin.as_ref().and_then(|plugin| plugin.migration());
        let native = self.device().migration();
        let flags = match (plugin.as_ref().map(|plugin| plugin.flags()), native.map(|native| native.flags())) {
            (Some(one), Some(other)) => {
                MigrationFlags { p2p: one.p2p && other.p2p, pre_copy: one.pre_copy && other.pre_copy }
            }
            (Some(flags), None) | (None, Some(flags)) => flags,
            (None, None) => {
                let reason = match &self.summary {
                    Some(plugin) => format!("plug-in {} does not save it, nor does its driver", plugin.name),
                    None => "no plug-in claims it, and its driver does not save it".to_owned(),
                };
                return Err(MediationError::Unmigratable { device: self.identity().name.clone(), reason });
            }
        };
        Ok(Backing { plugin, native, flags })
    }

    /// Walks to `target`, arc by arc, each with the device alone. On an error the device is in `actual`; asking for the state
    /// it is in does nothing.
    pub fn set_state(&self, target: DeviceState, deadline: Instant) -> std::result::Result<(), StateError> {
        let done = self.walk(target, deadline);
        self.attend();
        done
    }

    fn walk(&self, target: DeviceState, deadline: Instant) -> std::result::Result<(), StateError> {
        let failed = |from, to, source: MediationError| StateError {
            from,
            to,
            actual: self.state(),
            errno: source.errno(),
            source: Box::new(source),
        };
        let from = self.state();
        let _token = self.lane.enter(deadline).map_err(|error| failed(from, target, error.into()))?;
        self.walking.store(true, Ordering::Release);
        let walked = self.walk_in(target, deadline, &failed);
        self.walking.store(false, Ordering::Release);
        walked
    }

    fn walk_in(
        &self,
        target: DeviceState,
        deadline: Instant,
        failed: &dyn Fn(DeviceState, DeviceState, MediationError) -> StateError,
    ) -> std::result::Result<(), StateError> {
        let from = self.state();
        let backing = self.backing().map_err(|error| failed(from, target, error))?;
        loop {
            let from = self.state();
            if from == target {
                return Ok(());
            }
            let next = next_step(from, target, backing.flags)
                .map_err(|no_path| failed(from, target, MediationError::refused(no_path.to_string(), Errno::INVAL)))?;
            let arc = self.alone(Reason::StateArc, deadline, || self.arc(&backing, from, next, deadline));
            arc.map_err(|error| failed(from, next, error))?;
        }
    }

    /// One arc, with the device alone. The state is stored here and nowhere else, and only what is true.
    fn arc(&self, backing: &Backing<'_>, from: DeviceState, to: DeviceState, deadline: Instant) -> Result<()> {
        if from == DeviceState::Resuming {
            // Bad or short data fail the arc before anything of the device moves.
            lock(&self.streams).load.as_ref().map_or(Ok(()), Loader::finish)?;
        }
        if !to.is_running() {
            self.revoke_maps()?;
        }
        let moved = self.move_parts(backing, from, to, deadline);
        let now = match &moved {
            Ok(()) => to,
            Err((actual, _)) => *actual,
        };
        lock(&self.condition).state = now;
        let mut streams = lock(&self.streams);
        if !now.is_saving() {
            streams.save = None;
        } else if streams.save.is_none() {
            streams.save = Some(Saving::default());
        }
        match now {
            DeviceState::Resuming if from != DeviceState::Resuming => streams.load = Some(Loader::default()),
            DeviceState::Resuming => {}
            _ => streams.load = None,
        }
        drop(streams);
        if from == DeviceState::Resuming {
            self.look_at_command()?;
        }
        moved.map_err(|(_, error)| error)
    }

    fn move_parts(
        &self,
        backing: &Backing<'_>,
        from: DeviceState,
        to: DeviceState,
        deadline: Instant,
    ) -> std::result::Result<(), (DeviceState, MediationError)> {
        let plugin = || match &backing.plugin {
            None => Ok(()),
            Some(plugin) => {
                let refused = |ArcFailed { errno, actual }| (actual, MediationError::Plugin { what: "an arc", errno });
                plugin.set_state(self.frame_until(Origin::Migration, deadline), from, to).map_err(refused)
            }
        };
        let native = || match backing.native {
            None => Ok(()),
            Some(native) => native.set_state(to).map_err(|error| {
                // Unknown is worse than anything: only a reset helps.
                (native.state().unwrap_or(DeviceState::Error), MediationError::Device(error))
            }),
        };
        let both = backing.plugin.is_some() && backing.native.is_some();
        let stopping = !to.is_running() || !from.is_running();
        let second =
            |failed: (DeviceState, MediationError)| (if both { DeviceState::Error } else { failed.0 }, failed.1);
        if stopping && !to.is_running() {
            plugin()?;
            native().map_err(second)
        } else {
            native()?;
            plugin().map_err(second)
        }
    }

    /// Describes this device for the other side: the host's own part and the plug-in's.
    pub fn match_data(&self) -> Result<Vec<u8>> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                let backing = self.backing()?;
                let mut data = self.host_match();
                if let Some(plugin) = &backing.plugin {
                    let refused = |errno| MediationError::Plugin { what: "match data", errno };
                    let own = plugin.match_data(self.frame(Origin::Migration)).map_err(refused)?;
                    if own.len() > MATCH_MAX {
                        return Err(MediationError::PluginFault { what: format!("{} bytes of match data", own.len()) });
                    }
                    data.extend_from_slice(&own);
                }
                Ok(data)
            })
        })
    }

    /// Little-endian: length of this part, format, vendor, device, subsystem vendor, subsystem device (u16 each), class
    /// (u32), who migrates (bit 0 plug-in, bit 1 the device itself; u8), the plug-in's name (length u8, bytes).
    fn host_match(&self) -> Vec<u8> {
        let identity = self.identity();
        let mut data = vec![0; 2];
        for number in
            [FORMAT, identity.vendor_id, identity.device_id, identity.subsystem_vendor_id, identity.subsystem_device_id]
        {
            data.extend_from_slice(&number.to_le_bytes());
        }
        data.extend_from_slice(&identity.class_code.to_le_bytes());
        let plugin = self.plugin.as_ref().is_some_and(|plugin| plugin.migration().is_some());
        let native = self.device().migration().is_some();
        data.push(u8::from(plugin) | u8::from(native) << 1);
        let name = self.summary.as_ref().filter(|_| plugin).map_or("", |plugin| &plugin.name);
        data.push(name.len() as u8);
        data.extend_from_slice(name.as_bytes());
        let length = (data.len() as u16).to_le_bytes();
        data[..2].copy_from_slice(&length);
        data
    }

    /// Can a device that described itself so be loaded here? Asked at the destination before anything moves.
    pub fn check_match(&self, data: &[u8]) -> std::result::Result<(), Refusal> {
        let refuse = |reason: String, errno| Err(Refusal { reason, errno });
        let backing = match self.backing() {
            Ok(backing) => backing,
            Err(error) => return refuse(error.to_string(), error.errno()),
        };
        let ours = self.host_match();
        let length = data.first_chunk::<2>().map_or(0, |length| usize::from(u16::from_le_bytes(*length)));
        let Some((theirs, plugins)) = data.split_at_checked(length).filter(|_| length >= 2) else {
            return refuse("its description is cut short".to_owned(), Errno::BADMSG);
        };
        if let Some(reason) = differs(&ours, theirs) {
            return refuse(reason, Errno::NODEV);
        }
        let Some(plugin) = &backing.plugin else {
            return match plugins.is_empty() {
                true => Ok(()),
                false => refuse("its description has bytes of a plug-in".to_owned(), Errno::BADMSG),
            };
        };
        if plugins.len() > MATCH_MAX {
            return refuse(format!("{} bytes of match data", plugins.len()), Errno::BADMSG);
        }
        let busy = |error: MediationError| Refusal { reason: error.to_string(), errno: error.errno() };
        let _token = self.lane.enter(self.drain_deadline()).map_err(|error| busy(error.into()))?;
        self.awaken().map_err(busy)?;
        let mut answer = Ok(());
        let asked = self.with_pass(Class::Control, || {
            answer = plugin.check_match(self.frame(Origin::Migration), plugins);
            Ok(())
        });
        asked.map_err(busy)?;
        answer
    }

    /// Fills `buffer` (a few KiB at least) with the next bytes of the state. In PRE_COPY* `end` means nothing more for now; in
    /// STOP_COPY that the stream is whole.
    pub fn save(&self, buffer: &mut [u8]) -> Result<Saved> {
        if buffer.len() < BUFFER_MIN {
            return Err(MediationError::refused(format!("saving into {} bytes", buffer.len()), Errno::INVAL));
        }
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                let backing = self.backing()?;
                // Out of the lock while the plug-in is called; the lane keeps others away.
                let state = self.state();
                let Some(mut saving) = lock(&self.streams).save.take() else {
                    return Err(MediationError::WrongState { what: "saving", state });
                };
                let saved = self.save_in(&backing, &mut saving, state, buffer);
                lock(&self.streams).save = Some(saving);
                saved
            })
        })
    }

    fn save_in(
        &self,
        backing: &Backing<'_>,
        saving: &mut Saving,
        state: DeviceState,
        buffer: &mut [u8],
    ) -> Result<Saved> {
        let stopped = state == DeviceState::StopCopy;
        if saving.ended {
            return Ok(Saved { bytes: 0, end: true });
        }
        let host_saved = if stopped { &mut saving.host_saved.1 } else { &mut saving.host_saved.0 };
        if !*host_saved {
            let bytes = saving.saver.host(buffer, &self.host_state()?)?;
            *host_saved = true;
            if stopped {
                // The end of pre-copy was the end for then only.
                (saving.plugin_ended, saving.device_ended) = (false, false);
            }
            return Ok(Saved { bytes, end: false });
        }
        if let Some(plugin) = backing.plugin.as_ref().filter(|_| !saving.plugin_ended) {
            let room = saving.saver.opaque(buffer);
            let capacity = room.len();
            let refused = |errno| MediationError::Plugin { what: "saving", errno };
            let saved = plugin.save(self.frame(Origin::Migration), room).map_err(refused)?;
            if saved.bytes > capacity {
                return Err(MediationError::PluginFault {
                    what: format!("it saved {} of {capacity} bytes", saved.bytes),
                });
            }
            saving.plugin_ended = saved.end && stopped;
            if saved.bytes > 0 {
                return Ok(Saved { bytes: saving.saver.seal(buffer, Part::Plugin, saved.bytes), end: false });
            }
            if !saved.end {
                // A call that makes nothing and does not end would be asked for ever.
                return Err(MediationError::PluginFault { what: "it saves nothing and does not end".to_owned() });
            }
        }
        if let Some(native) = backing.native.filter(|_| !saving.device_ended) {
            let room = saving.saver.opaque(buffer);
            let bytes = native.read(room)?;
            saving.device_ended = bytes == 0 && stopped;
            if bytes > 0 {
                return Ok(Saved { bytes: saving.saver.seal(buffer, Part::Device, bytes), end: false });
            }
        }
        if !stopped {
            return Ok(Saved { bytes: 0, end: true });
        }
        saving.ended = true;
        Ok(Saved { bytes: saving.saver.end(buffer)?, end: true })
    }

    fn host_state(&self) -> Result<HostState> {
        let read = |(offset, length): (u64, usize)| {
            let mut bytes = vec![0; length];
            self.device().region_read(CONFIG_REGION, offset, &mut bytes)?;
            Ok((offset as u16, bytes))
        };
        SAVED.into_iter().map(read).collect()
    }

    /// Takes the next bytes of the state, cut anywhere. In RESUMING; leaving it for STOP checks that they were whole.
    pub fn load(&self, data: &[u8]) -> Result<()> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                let backing = self.backing()?;
                let state = self.state();
                let Some(mut loader) = lock(&self.streams).load.take() else {
                    return Err(MediationError::WrongState { what: "loading", state });
                };
                let loaded = loader.feed(data, &mut Target { mediated: self, backing: &backing });
                lock(&self.streams).load = Some(loader);
                loaded
            })
        })
    }

    /// What is left to send. The framing's own bytes are counted in `stop_copy_bytes`.
    pub fn remaining(&self) -> Result<Remaining> {
        self.in_lane(|| {
            self.with_pass(Class::Control, || {
                let backing = self.backing()?;
                let pre_copy = matches!(self.state(), DeviceState::PreCopy | DeviceState::PreCopyP2p);
                let mut sum =
                    Remaining { initial_bytes: 0, dirty_bytes: 0, stop_copy_bytes: (BUFFER_MIN + HEADER) as u64 };
                if let Some(plugin) = &backing.plugin {
                    let refused = |errno| MediationError::Plugin { what: "what remains", errno };
                    add(&mut sum, plugin.remaining(self.frame(Origin::Migration)).map_err(refused)?);
                }
                if let Some(native) = backing.native {
                    let info = if pre_copy { Some(native.precopy_info()?) } else { None };
                    let (initial_bytes, dirty_bytes) =
                        info.map_or((0, 0), |info| (info.initial_bytes, info.dirty_bytes));
                    add(&mut sum, Remaining { initial_bytes, dirty_bytes, stop_copy_bytes: native.stop_copy_bytes()? });
                }
                Ok(sum)
            })
        })
    }
}

/// Unknown (all ones) stays unknown.
fn add(sum: &mut Remaining, more: Remaining) {
    sum.initial_bytes = sum.initial_bytes.saturating_add(more.initial_bytes);
    sum.dirty_bytes = sum.dirty_bytes.saturating_add(more.dirty_bytes);
    sum.stop_copy_bytes = sum.stop_copy_bytes.saturating_add(more.stop_copy_bytes);
}

/// The first field in which two host parts differ, for people.
fn differs(ours: &[u8], theirs: &[u8]) -> Option<String> {
    const FIELDS: [(&str, usize, usize); 7] = [
        ("format", 2, 2),
        ("vendor", 4, 2),
        ("device", 6, 2),
        ("subsystem vendor", 8, 2),
        ("subsystem device", 10, 2),
        ("class", 12, 4),
        ("way of migrating", 16, 1),
    ];
    for (name, at, length) in FIELDS {
        let Some(field) = theirs.get(at..at + length) else { return Some("its description is cut short".to_owned()) };
        let own = &ours[at..at + length];
        if own != field {
            let number = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |number, byte| number << 8 | u32::from(*byte));
            return Some(format!("its {name} is {:#06x}, this device's {:#06x}", number(field), number(own)));
        }
    }
    if ours[17..] != theirs[17..] {
        let name = |data: &[u8]| String::from_utf8_lossy(data.get(18..).unwrap_or_default()).into_owned();
        return Some(format!("its plug-in is {:?}, this device's {:?}", name(theirs), name(ours)));
    }
    None
}

struct Target<'a> {
    mediated: &'a MediatedDevice,
    backing: &'a Backing<'a>,
}

impl Sink for Target<'_> {
    fn host(&mut self, state: HostState) -> Result<()> {
        let known = state.iter().map(|(offset, bytes)| (u64::from(*offset), bytes.len())).eq(SAVED);
        if !known {
            return Err(MediationError::Stream { what: "a host part of other fields".to_owned() });
        }
        for (offset, bytes) in state {
            let device = self.mediated.device();
            // The client's rights hold for a peer too.
            let mut current = vec![0; bytes.len()];
            device.region_read(CONFIG_REGION, u64::from(offset), &mut current)?;
            let mut merged = bytes;
            self.mediated.shared.filter.merge(u64::from(offset), &mut merged, &current);
            device.region_write(CONFIG_REGION, u64::from(offset), &merged)?;
        }
        Ok(())
    }

    fn opaque(&mut self, part: Part, data: &[u8]) -> Result<()> {
        match (part, &self.backing.plugin, self.backing.native) {
            (Part::Plugin, Some(plugin), _) => {
                let refused = |errno| MediationError::Plugin { what: "its saved state", errno };
                plugin.load(self.mediated.frame(Origin::Migration), data).map_err(refused)
            }
            (Part::Device, _, Some(native)) => Ok(native.write(data)?),
            _ => Err(MediationError::Stream { what: "a part that nobody here can load".to_owned() }),
        }
    }
}
