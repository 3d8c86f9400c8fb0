//! A migration as its followers see it, and the limits that the operator gave it.

use std::time::Instant;

use super::Embedder;
use crate::control::config::{Limits, OnStall};
use crate::control::protocol::Progress;
use crate::control::socket::Job;
use crate::migration::cause::{Phase, Role};
use crate::migration::driver::{self, Observer};
use crate::migration::policy::{self, Policy};
use crate::migration::wire::MigrationId;

/// Tells a job and the embedder what a migration does.
pub(super) struct Watch<'a> {
    pub(super) embedder: &'a dyn Embedder,
    pub(super) job: &'a Job,
    pub(super) pages_total: u64,
    pub(super) started: Instant,
}

/// A phase's name as reports write it.
fn name(phase: Phase) -> String {
    let value = serde_json::to_value(phase).ok();
    value.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

impl Watch<'_> {
    fn tell(&self, phase: Phase, progress: Option<driver::Progress>) {
        let before = self.job.latest().unwrap_or_default();
        self.job.tell(Progress {
            phase: name(phase),
            round: progress.map_or(before.round, |p| p.round),
            pages_sent: progress.map_or(before.pages_sent, |p| p.pages_sent),
            pages_left: progress.map_or(before.pages_left, |p| p.pages_left),
            pages_total: self.pages_total,
            bytes: progress.map_or(before.bytes, |p| p.bytes),
            elapsed_ms: self.started.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
        });
    }
}

impl Observer for Watch<'_> {
    fn phase(&self, _: MigrationId, role: Role, phase: Phase) {
        self.tell(phase, None);
        self.embedder.phase(role, phase);
    }

    fn progress(&self, _: MigrationId, _: Role, progress: driver::Progress) {
        self.tell(progress.phase, Some(progress));
    }
}

pub(super) fn policy(limits: &Limits) -> Policy {
    let default = Policy::default();
    Policy {
        downtime_ms_max: limits.downtime_ms_max.unwrap_or(default.downtime_ms_max),
        rounds_max: limits.rounds_max.unwrap_or(default.rounds_max),
        stalled_rounds_max: limits.stalled_rounds_max.unwrap_or(default.stalled_rounds_max),
        on_stall: limits.on_stall.map_or(default.on_stall, |choice| match choice {
            OnStall::Cancel => policy::OnStall::Cancel,
            OnStall::Force => policy::OnStall::Force,
        }),
        answer_ms_max: limits.answer_ms_max.unwrap_or(default.answer_ms_max),
        switchover_answer_ms_max: limits.switchover_answer_ms_max.unwrap_or(default.switchover_answer_ms_max),
        pause_ms_max: limits.pause_ms_max.unwrap_or(default.pause_ms_max),
        device_ms_max: limits.device_ms_max.unwrap_or(default.device_ms_max),
        record_ms_max: limits.record_ms_max.unwrap_or(default.record_ms_max),
        ..default
    }
}
