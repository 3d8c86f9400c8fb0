//! What a migration did: rounds, bytes, and where the time went.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::cause::{Phase, Role};

/// One pre-copy round; the last one is sent while the guest stands still.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// From 1
    pub round: u32,
    pub drained_pages: u64,
    /// Sent, zero pages included
    pub pages: u64,
    pub zero_pages: u64,
    /// On the stream, device state included
    pub bytes: u64,
    pub device_bytes: u64,
    pub ms: f64,
    /// Dirty again when the round was over
    pub dirty_left: u64,
}

impl RoundReport {
    pub(crate) fn count(&mut self, pages: u64, zero_pages: u64, bytes: u64) {
        self.pages += pages;
        self.zero_pages += zero_pages;
        self.bytes += bytes;
    }
}

/// Microseconds spent in each phase.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Times {
    us: BTreeMap<Phase, u64>,
    last_us: Option<u64>,
}

impl Times {
    /// Everything since the last call was spent in `phase`.
    pub(crate) fn advance(&mut self, phase: Phase, now_us: u64) {
        let spent = self.last_us.map_or(0, |last| now_us.saturating_sub(last));
        *self.us.entry(phase).or_default() += spent;
        self.last_us = Some(now_us);
    }

    pub fn us(&self, phase: Phase) -> u64 {
        self.us.get(&phase).copied().unwrap_or(0)
    }

    pub fn total_us(&self) -> u64 {
        self.us.values().sum()
    }
}

/// The downtime in its parts, in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    pub pause: f64,
    pub device_stop: f64,
    pub last_drain: f64,
    pub last_pages: f64,
    pub device_state: f64,
    /// The digest compared, and the destination's devices leaving RESUMING, where they judge what they were given
    pub validation: f64,
    /// Journal and COMMIT
    pub commit: f64,
    /// From COMMIT sent to COMMITTED received: the destination's journal, devices and guest, and one round trip
    pub resume: f64,
    /// Of which the destination spent this starting devices and guest, by its own clock
    pub resume_at_destination: f64,
}

impl Downtime {
    pub(crate) fn new(times: &Times, resume_us: u64) -> Self {
        let ms = |phase| times.us(phase) as f64 / 1000.0;
        Self {
            pause: ms(Phase::Pausing),
            device_stop: ms(Phase::Stopping),
            last_drain: ms(Phase::LastDrain),
            last_pages: ms(Phase::LastPages),
            device_state: ms(Phase::DeviceState),
            validation: ms(Phase::Digest),
            commit: ms(Phase::Committing),
            resume: ms(Phase::Resuming),
            resume_at_destination: resume_us as f64 / 1000.0,
        }
    }

    pub fn total(&self) -> f64 {
        let before = self.pause + self.device_stop + self.last_drain + self.last_pages;
        before + self.device_state + self.validation + self.commit + self.resume
    }
}

/// A device that moved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    pub name: String,
    /// `None`: the kernel's driver migrated it
    pub plugin: Option<String>,
    pub plugin_version: Option<String>,
    pub plugin_path: Option<String>,
    /// Bytes of device state, pre-copy included
    pub state_bytes: u64,
}

/// Of a migration that ended with the guest at the destination.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// 32 hexadecimal digits
    pub migration_id: String,
    pub role: Role,
    pub rounds: Vec<RoundReport>,
    pub pages_sent: u64,
    pub zero_pages: u64,
    /// On the stream, in this side's view
    pub bytes: u64,
    /// Of the guest, as the source sees it; 0 at the destination, which cannot know
    pub downtime_ms: f64,
    pub downtime: Downtime,
    pub total_ms: f64,
    pub devices: Vec<DeviceReport>,
    /// All of memory was compared: `None` if not asked for
    pub verified: Option<bool>,
    /// xxh3-128 of the stream
    pub digest: String,
    pub process_id: u32,
}
