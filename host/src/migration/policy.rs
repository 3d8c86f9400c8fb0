//! How long to wait, and when to stop pre-copying. Pure arithmetic over what was measured.

use super::wire::PAGE_SIZE;

/// What to do when pre-copy does not get anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnStall {
    /// Give up; the guest stays
    Cancel,
    /// Switch over, whatever the downtime
    Force,
}

/// Limits of one migration. Times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Policy {
    /// Switch over once the estimate is not above this
    pub downtime_ms_max: u64,
    /// Added to the estimate: what a switchover costs apart from bytes
    pub switchover_fixed_ms: u64,
    /// Pre-copy rounds, at least 1
    pub rounds_max: u32,
    /// Rounds in a row that leave at least 95 % of the dirt of the round before
    pub stalled_rounds_max: u32,
    pub on_stall: OnStall,
    /// For an answer while the guest runs
    pub answer_ms_max: u64,
    /// For READY and for COMMITTED, while it does not
    pub switchover_answer_ms_max: u64,
    /// For the VMM to pause the guest
    pub pause_ms_max: u64,
    /// For one state change of one device
    pub device_ms_max: u64,
    /// For one record to leave or arrive whole
    pub record_ms_max: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            downtime_ms_max: 300,
            switchover_fixed_ms: 5,
            rounds_max: 30,
            stalled_rounds_max: 3,
            on_stall: OnStall::Cancel,
            answer_ms_max: 30_000,
            switchover_answer_ms_max: 10_000,
            pause_ms_max: 5_000,
            device_ms_max: 10_000,
            record_ms_max: 30_000,
        }
    }
}

/// What is left to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    pub dirty_pages: u64,
    /// Bytes that a device wants sent and loaded before the switchover
    pub initial_bytes: u64,
    /// Bytes of stop-copy state of all devices; `None`: at least one does not know
    pub device_bytes: Option<u64>,
}

/// After a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Again,
    SwitchOver,
    /// Over a limit, and [`OnStall::Cancel`]
    Stalled(String),
}

/// What the rounds so far have shown.
#[derive(Debug, Clone, Default)]
pub struct Convergence {
    bytes: u64,
    us: u64,
    dirty_before: Option<u64>,
    stalled_rounds: u32,
}

impl Convergence {
    /// A round brought `bytes` over in `us` microseconds, acknowledgement included.
    pub fn round(&mut self, bytes: u64, us: u64) {
        // Round 1 carries nearly everything and sets the rate; short rounds measure latency, not bandwidth.
        self.bytes = self.bytes.saturating_add(bytes);
        self.us = self.us.saturating_add(us);
    }

    /// The downtime if the guest stopped now, in milliseconds. `None`: unknown, which is never short enough.
    pub fn downtime_ms(&self, policy: &Policy, left: Left) -> Option<u64> {
        let bytes = left.dirty_pages.checked_mul(u64::from(PAGE_SIZE))?.checked_add(left.device_bytes?)?;
        if bytes == 0 {
            return Some(policy.switchover_fixed_ms);
        }
        if self.bytes == 0 {
            return None;
        }
        let us = u128::from(bytes) * u128::from(self.us.max(1)) / u128::from(self.bytes);
        u64::try_from(us.div_ceil(1000)).ok()?.checked_add(policy.switchover_fixed_ms)
    }

    /// `rounds` are done and `left` is left.
    pub fn decide(&mut self, policy: &Policy, rounds: u32, left: Left) -> Verdict {
        let estimate = self.downtime_ms(policy, left);
        if left.initial_bytes == 0 && estimate.is_some_and(|ms| ms <= policy.downtime_ms_max) {
            return Verdict::SwitchOver;
        }
        let stalled = self.dirty_before.is_some_and(|before| {
            u128::from(left.dirty_pages) * 100 >= u128::from(before) * 95 && left.dirty_pages > 0
        });
        self.stalled_rounds = if stalled { self.stalled_rounds + 1 } else { 0 };
        self.dirty_before = Some(left.dirty_pages);
        let over = if rounds >= policy.rounds_max {
            format!("{rounds} rounds done")
        } else if self.stalled_rounds >= policy.stalled_rounds_max {
            format!("{} rounds in a row left as much dirt as they found", self.stalled_rounds)
        } else {
            return Verdict::Again;
        };
        match policy.on_stall {
            OnStall::Force => Verdict::SwitchOver,
            OnStall::Cancel => Verdict::Stalled(match estimate {
                Some(ms) => format!("{over}, estimated downtime {ms} ms (at most {})", policy.downtime_ms_max),
                None => format!("{over}, downtime cannot be estimated"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(dirty_pages: u64) -> Left {
        Left { dirty_pages, initial_bytes: 0, device_bytes: Some(0) }
    }

    /// 4096 bytes a millisecond: a page takes 1 ms.
    fn measured() -> Convergence {
        let mut convergence = Convergence::default();
        convergence.round(4096 * 1000, 1_000_000);
        convergence
    }

    /// spec: MIGRATION-20
    #[test]
    fn switches_over_at_the_estimate_and_not_above_it() {
        let policy = Policy { downtime_ms_max: 100, switchover_fixed_ms: 5, ..Policy::default() };
        for (pages, verdict) in [(94, Verdict::SwitchOver), (95, Verdict::SwitchOver), (96, Verdict::Again)] {
            assert_eq!(measured().decide(&policy, 1, left(pages)), verdict, "{pages} pages");
        }
    }

    /// spec: MIGRATION-21
    #[test]
    fn unknown_device_size_unsent_initial_bytes_and_unknown_bandwidth_never_converge() {
        let policy = Policy::default();
        let unknown = Left { device_bytes: None, ..left(0) };
        assert_eq!(measured().decide(&policy, 1, unknown), Verdict::Again);
        let initial = Left { initial_bytes: 1, ..left(0) };
        assert_eq!(measured().decide(&policy, 1, initial), Verdict::Again);
        assert_eq!(Convergence::default().decide(&policy, 0, left(1)), Verdict::Again);
        let overflow = Left { device_bytes: Some(u64::MAX), ..left(u64::MAX) };
        assert_eq!(measured().decide(&policy, 1, overflow), Verdict::Again);
    }

    /// spec: MIGRATION-22
    #[test]
    fn the_round_limit_cancels_or_forces_as_configured() {
        let mut policy = Policy { rounds_max: 3, ..Policy::default() };
        assert_eq!(measured().decide(&policy, 2, left(1 << 30)), Verdict::Again);
        assert!(matches!(measured().decide(&policy, 3, left(1 << 30)), Verdict::Stalled(_)));
        policy.on_stall = OnStall::Force;
        assert_eq!(measured().decide(&policy, 3, left(1 << 30)), Verdict::SwitchOver);
    }

    #[test]
    fn rounds_without_progress_are_a_stall_and_progress_starts_the_count_anew() {
        let policy = Policy { stalled_rounds_max: 2, rounds_max: 100, ..Policy::default() };
        let mut convergence = measured();
        for pages in [1_000_000, 950_000, 900_000, 855_000, 800_000] {
            assert_eq!(convergence.decide(&policy, 1, left(pages)), Verdict::Again, "{pages}");
            if pages == 950_000 {
                assert_eq!(convergence.stalled_rounds, 1);
            }
        }
        assert_eq!(convergence.decide(&policy, 1, left(800_000)), Verdict::Again);
        assert!(matches!(convergence.decide(&policy, 1, left(800_000)), Verdict::Stalled(_)));
    }
}
