//! The fault sweep: production machines, drivers, journals and wire over simulated hosts. Pass one counts the steps of
//! each side; pass two fails at every step, on each side, with each kind of fault. After each run an oracle that has
//! watched guest, memory and devices all along says whether two ran, none may, or something was lost.

mod cases;
mod sim;

use std::sync::atomic::Ordering;
use std::time::Duration;

use sim::{OpFault, Random, SimHost, Truth, VirtualTime};
use vfio_mediate::migration::cause::{Phase, Role};
use vfio_mediate::migration::driver::{
    Cancel, DestinationDriver, DestinationJob, MigrationError, Silent, SourceDriver, SourceJob, Step,
};
use vfio_mediate::migration::journal::{MemoryStore, Standing, StorageFault, recover};
use vfio_mediate::migration::policy::{OnStall, Policy};
use vfio_mediate::migration::report::Report;
use vfio_mediate::migration::transport::{LinkControl, MemoryTransport};
use vfio_mediate::migration::wire::MigrationId;
use vfio_mediate_sdk::state::MigrationFlags;

const ID: MigrationId = MigrationId([7; 16]);
const PLAIN: MigrationFlags = MigrationFlags { p2p: false, pre_copy: false };
const FULL: MigrationFlags = MigrationFlags { p2p: true, pre_copy: true };
const P2P: MigrationFlags = MigrationFlags { p2p: true, pre_copy: false };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Crash,
    Cut,
    /// What this side sends from now on is lost
    Lose,
    Corrupt,
    Storage(StorageFault),
    /// This append is written and yet fails; those after it are not written
    DiskDies,
    /// This append and those after it
    StorageForGood(StorageFault),
    Op(OpFault),
    Cancel,
}

const FAULTS: [Fault; 14] = [
    Fault::DiskDies,
    Fault::Crash,
    Fault::Cut,
    Fault::Lose,
    Fault::Corrupt,
    Fault::Storage(StorageFault::Nothing),
    Fault::Storage(StorageFault::Torn),
    Fault::Storage(StorageFault::Whole),
    Fault::StorageForGood(StorageFault::Nothing),
    Fault::StorageForGood(StorageFault::Torn),
    Fault::StorageForGood(StorageFault::Whole),
    Fault::Op(OpFault::Refused),
    Fault::Op(OpFault::Half),
    Fault::Cancel,
];

#[derive(Debug, Clone, Copy)]
struct Planned {
    side: Role,
    step: u64,
    fault: Fault,
}

/// One host with its disk.
struct Side {
    host: SimHost,
    store: MemoryStore,
    cancel: Cancel,
}

impl Side {
    fn new(flags: &[MigrationFlags], guest: bool) -> Self {
        Self { host: SimHost::new(flags, guest), store: MemoryStore::default(), cancel: Cancel::new() }
    }
}

/// What stands still while drivers borrow it (hosts change behind their own locks).
struct Harness {
    source: Side,
    destination: Side,
    time: VirtualTime,
    policy: Policy,
    verify: bool,
}

/// What the oracle knows.
struct Oracle {
    random: Random,
    truth: Truth,
    phases: Vec<Phase>,
}

#[allow(clippy::large_enum_variant)] // a handful of them exist at a time
enum Ending {
    Crashed,
    Ended(Result<Report, MigrationError>),
}

impl Ending {
    fn in_doubt(&self) -> bool {
        matches!(self, Self::Ended(Err(MigrationError::InDoubt(_))))
    }

    fn lost(&self) -> Vec<usize> {
        match self {
            Self::Ended(Err(MigrationError::Kept { lost, .. })) => lost.clone(),
            _ => Vec::new(),
        }
    }
}

impl std::fmt::Debug for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Crashed => f.write_str("crashed"),
            Self::Ended(Ok(_)) => f.write_str("moved"),
            Self::Ended(Err(error)) => write!(f, "{error}"),
        }
    }
}

fn inject(side: &Side, link: &LinkControl, end: usize, fault: Fault) -> bool {
    match fault {
        Fault::Crash => {
            side.host.crash();
            return true;
        }
        Fault::Cut => link.cut(),
        Fault::Lose => link.lose(end),
        Fault::Corrupt => link.corrupt(end),
        Fault::Storage(fault) => side.store.plan(vec![Some(fault)]),
        Fault::DiskDies => {
            let mut plan = vec![Some(StorageFault::Nothing); 100];
            plan[0] = Some(StorageFault::Whole);
            side.store.plan(plan);
        }
        Fault::StorageForGood(fault) => side.store.plan(vec![Some(fault); 100]),
        Fault::Op(fault) => side.host.arm(fault),
        Fault::Cancel => side.cancel.cancel(),
    }
    false
}

impl Harness {
    fn new(flags: &[MigrationFlags], seed: u64, verify: bool) -> (Self, Oracle) {
        let policy = Policy {
            rounds_max: 4,
            on_stall: OnStall::Force,
            downtime_ms_max: 0,
            switchover_fixed_ms: 1,
            ..Policy::default()
        };
        let (source, destination) = (Side::new(flags, true), Side::new(flags, false));
        let truth = source.host.truth();
        let mut oracle = Oracle { random: Random(seed), truth, phases: Vec::new() };
        for _ in 0..20 {
            source.host.work(&mut oracle.random, &mut oracle.truth);
        }
        (Self { source, destination, time: VirtualTime::default(), policy, verify }, oracle)
    }

    fn source_job(&self) -> SourceJob<'_> {
        SourceJob {
            id: ID,
            host: &self.source.host,
            store: &self.source.store,
            policy: self.policy.clone(),
            verify: self.verify,
            observer: &Silent,
            cancel: &self.source.cancel,
            time: &self.time,
        }
    }

    fn destination_job(&self) -> DestinationJob<'_> {
        DestinationJob {
            host: &self.destination.host,
            store: &self.destination.store,
            policy: self.policy.clone(),
            observer: &Silent,
            cancel: &self.destination.cancel,
            time: &self.time,
        }
    }

    fn never_two(&self) {
        let (source, destination) = (&self.source.host, &self.destination.host);
        assert!(!(source.runs() && destination.runs()), "two guests run");
        assert!(!(source.device_runs() && destination.device_runs()), "devices work on both sides");
        assert!(!(source.runs() && destination.device_runs()), "guest here, device there");
        assert!(!(destination.runs() && source.device_runs()), "guest there, device here");
    }

    /// Drives both ends to their ends. `fair`: in turn; else as the seed says.
    fn drive(
        &self,
        oracle: &mut Oracle,
        source: SourceDriver<'_>,
        destination: DestinationDriver<'_>,
        link: &LinkControl,
        faults: &[Planned],
        fair: bool,
    ) -> Outcome {
        let (mut source, mut destination) = (Some(source), Some(destination));
        let (mut ended_source, mut ended_destination) = (None, None);
        let mut steps = (0, 0);
        let planned = |side: Role, end: usize, step: u64| {
            let of = if side == Role::Source { &self.source } else { &self.destination };
            let due = faults.iter().filter(|planned| planned.side == side && planned.step == step);
            // Not `any`: every fault that is due happens.
            due.map(|planned| inject(of, link, end, planned.fault)).fold(false, std::ops::BitOr::bitor)
        };
        let (mut told_source, mut told_destination) = (None, None);
        for turn in 0_u64.. {
            assert!(turn < 100_000, "the drivers do not end");
            let mut waits = Vec::new();
            let (first, second) =
                if fair { (true, true) } else { (oracle.random.below(2) == 0, oracle.random.below(2) == 0) };
            if first && let Some(mut driver) = source.take() {
                // A fault belongs to a step, not to each attempt at it.
                let crashed = told_source.replace(steps.0) != Some(steps.0) && planned(Role::Source, 0, steps.0);
                match if crashed { Step::Ended } else { driver.step() } {
                    Step::Ended if crashed => ended_source = Some(Ending::Crashed),
                    Step::Ended => ended_source = Some(Ending::Ended(driver.finish())),
                    step => {
                        match step {
                            Step::Blocked { until_us } => waits.push(until_us),
                            _ => steps.0 += 1,
                        }
                        let phase = driver.machine().phase();
                        if oracle.phases.last() != Some(&phase) {
                            oracle.phases.push(phase);
                        }
                        source = Some(driver);
                    }
                }
                self.source.host.assert_no_dirt_lost(&self.destination.host);
            }
            if second && let Some(mut driver) = destination.take() {
                let told = told_destination.replace(steps.1) != Some(steps.1);
                let crashed = told && planned(Role::Destination, 1, steps.1);
                match if crashed { Step::Ended } else { driver.step() } {
                    Step::Ended if crashed => ended_destination = Some(Ending::Crashed),
                    Step::Ended => ended_destination = Some(Ending::Ended(driver.finish())),
                    step => {
                        match step {
                            Step::Blocked { until_us } => waits.push(until_us),
                            _ => steps.1 += 1,
                        }
                        destination = Some(driver);
                    }
                }
            }
            self.never_two();
            for side in [&self.source, &self.destination] {
                if oracle.random.below(3) == 0 {
                    side.host.work(&mut oracle.random, &mut oracle.truth);
                }
            }
            if source.is_none() && destination.is_none() {
                break;
            }
            // Time passes a little with every turn, and jumps once everybody waits.
            self.time.0.fetch_add(10, Ordering::Relaxed);
            let open = usize::from(source.is_some()) + usize::from(destination.is_some());
            if waits.len() == open {
                self.time.0.fetch_max(waits.iter().min().copied().unwrap_or(0), Ordering::Relaxed);
            }
        }
        let source = ended_source.expect("the loop ends when both have");
        let destination = ended_destination.expect("the loop ends when both have");
        Outcome { source, destination, steps }
    }

    fn migrate(&self, oracle: &mut Oracle, faults: &[Planned], fair: bool) -> Outcome {
        let (left, right, link) = MemoryTransport::pair(9000, Duration::ZERO);
        let source = SourceDriver::new(self.source_job(), Box::new(left));
        let destination = DestinationDriver::new(self.destination_job(), Box::new(right));
        self.drive(oracle, source, destination, &link, faults, fair)
    }

    fn quiet(&self) {
        for side in [&self.source, &self.destination] {
            side.host.disarm();
            side.store.plan(Vec::new());
        }
    }

    /// Connects both sides anew, each with what it has: a doubt, or its journal after a restart.
    fn settle(&self, oracle: &mut Oracle, outcome: Outcome, faults: &[Planned]) -> Outcome {
        let (left, right, link) = MemoryTransport::pair(9000, Duration::ZERO);
        let source = match outcome.source {
            Ending::Ended(Err(MigrationError::InDoubt(doubt))) => {
                SourceDriver::reconnect(self.source_job(), Box::new(left), *doubt)
            }
            Ending::Crashed | Ending::Ended(_) => SourceDriver::settling(self.source_job(), Box::new(left)),
        };
        let source = match source {
            Ok(source) => source,
            // Nothing to settle: there is no journal, or it says all there is to say.
            Err(error) => {
                return Outcome { source: Ending::Ended(Err(error)), ..outcome_of(outcome.destination) };
            }
        };
        let destination = match outcome.destination {
            Ending::Ended(Err(MigrationError::InDoubt(doubt))) => {
                DestinationDriver::reconnect(self.destination_job(), Box::new(right), *doubt).expect("its own doubt")
            }
            Ending::Crashed | Ending::Ended(_) => DestinationDriver::new(self.destination_job(), Box::new(right)),
        };
        self.drive(oracle, source, destination, &link, faults, true)
    }

    /// Whether the guest belongs to a side: as it says itself, or as its journal says after a restart.
    fn owns(&self, role: Role, ending: &Ending) -> bool {
        let side = if role == Role::Source { &self.source } else { &self.destination };
        if side.host.is_crashed() {
            let standing = recover(&side.store).expect("memory does not fail to be read");
            // A source that died before its journal began has always had the guest.
            return standing == Standing::MayRun || (role == Role::Source && standing == Standing::Idle);
        }
        matches!(
            (role, ending),
            (Role::Source, Ending::Ended(Err(MigrationError::Kept { .. })))
                | (Role::Destination, Ending::Ended(Ok(_) | Err(MigrationError::Kept { .. })))
        )
    }

    fn doubtful(&self, role: Role, ending: &Ending) -> bool {
        let side = if role == Role::Source { &self.source } else { &self.destination };
        let standing = recover(&side.store).expect("memory does not fail to be read");
        ending.in_doubt() || (side.host.is_crashed() && matches!(standing, Standing::InDoubt { .. }))
    }

    /// Exactly one owner, and what it owns is the truth.
    fn assert_settled(&self, oracle: &mut Oracle, outcome: &Outcome) {
        let here = self.owns(Role::Source, &outcome.source);
        let there = self.owns(Role::Destination, &outcome.destination);
        assert!(here != there, "owners: source {here}, destination {there}: {outcome:?}");
        let (owner, ending) =
            if here { (&self.source, &outcome.source) } else { (&self.destination, &outcome.destination) };
        if !owner.host.is_crashed() {
            owner.host.assert_truth(&oracle.truth, &ending.lost());
            for _ in 0..5 {
                owner.host.work(&mut oracle.random, &mut oracle.truth);
            }
            self.never_two();
        }
    }

    /// A source that went on with its guest owns it after a later crash, too: whatever its journal has to ask, the answer
    /// does not give the guest away.
    fn assert_kept_for_good(&self, oracle: &mut Oracle, outcome: Outcome) {
        if !self.source.host.runs() {
            return;
        }
        self.source.host.crash();
        let outcome = Outcome { source: Ending::Crashed, ..outcome };
        if self.doubtful(Role::Source, &outcome.source) {
            let settled = self.settle(oracle, outcome, &[]);
            assert!(!self.owns(Role::Destination, &settled.destination), "an old guest runs: {settled:?}");
        }
        assert!(self.owns(Role::Source, &Ending::Crashed), "the source does not know that it kept the guest");
    }

    /// Every promise, whatever happened: settled at once, or in doubt by name and settled by reconnecting.
    fn assert_promises(&self, oracle: &mut Oracle, outcome: Outcome) {
        self.quiet();
        let here = self.owns(Role::Source, &outcome.source);
        let there = self.owns(Role::Destination, &outcome.destination);
        assert!(!(here && there), "two owners: {outcome:?}");
        let doubt =
            self.doubtful(Role::Source, &outcome.source) || self.doubtful(Role::Destination, &outcome.destination);
        assert!(here || there || doubt, "no owner and no doubt: {outcome:?}");
        if !doubt {
            self.assert_settled(oracle, &outcome);
            return self.assert_kept_for_good(oracle, outcome);
        }
        let told = format!("{outcome:?}");
        let (kept, moved) = (here, there);
        let destination_report = there.then(|| outcome.destination.lost());
        let settled = self.settle(oracle, outcome, &[]);
        let now_here = kept || self.owns(Role::Source, &settled.source);
        let now_there = moved || self.owns(Role::Destination, &settled.destination);
        assert!(
            now_here != now_there,
            "after settling {told}: source {now_here}, destination {now_there}: {settled:?}"
        );
        assert!(!settled.source.in_doubt() && !settled.destination.in_doubt(), "{told} stays in doubt: {settled:?}");
        let owner = if now_here { &self.source } else { &self.destination };
        if !owner.host.is_crashed() {
            let lost = if now_here { settled.source.lost() } else { destination_report.unwrap_or_default() };
            owner.host.assert_truth(&oracle.truth, &lost);
        }
        self.never_two();
    }
}

struct Outcome {
    source: Ending,
    destination: Ending,
    steps: (u64, u64),
}

fn outcome_of(destination: Ending) -> Outcome {
    Outcome { source: Ending::Crashed, destination, steps: (0, 0) }
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "source: {:?}; destination: {:?}", self.source, self.destination)
    }
}

/// Says which case it was when an assertion inside fails.
struct Case(String);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("case: {}", self.0);
        }
    }
}

fn sweep(flags: &[MigrationFlags], verify: bool) {
    let (harness, mut oracle) = Harness::new(flags, 1, verify);
    let outcome = harness.migrate(&mut oracle, &[], true);
    assert!(matches!(outcome.destination, Ending::Ended(Ok(_))), "{outcome:?}");
    let steps = outcome.steps;
    harness.assert_promises(&mut oracle, outcome);
    assert!(steps.0 > 30 && steps.1 > 30, "{steps:?}");
    for (side, count) in [(Role::Source, steps.0), (Role::Destination, steps.1)] {
        for step in 0..=count {
            for fault in FAULTS {
                let _case = Case(format!("{side} step {step} of {count}: {fault:?}, devices {flags:?}"));
                let (harness, mut oracle) = Harness::new(flags, 1, verify);
                let outcome = harness.migrate(&mut oracle, &[Planned { side, step, fault }], true);
                harness.assert_promises(&mut oracle, outcome);
            }
        }
    }
}

/// spec: MIGRATION-1, MIGRATION-2, MIGRATION-3, MIGRATION-4
#[test]
fn every_fault_at_every_step_leaves_one_owner_or_a_named_doubt() {
    sweep(&[PLAIN], false);
}

/// spec: MIGRATION-1, MIGRATION-2, MIGRATION-3, MIGRATION-4
#[test]
fn every_fault_at_every_step_with_several_devices_and_verification() {
    sweep(&[FULL, P2P], true);
}

/// spec: MIGRATION-1
#[test]
fn random_interleavings_with_random_faults_keep_every_promise() {
    for seed in 0..600 {
        let mut plan = Random(seed);
        let flags: &[&[MigrationFlags]] = &[&[], &[PLAIN], &[FULL], &[FULL, P2P], &[P2P, P2P, FULL]];
        let flags = flags[plan.below(flags.len() as u64) as usize];
        let faults: Vec<Planned> = (0..plan.below(4))
            .map(|_| Planned {
                side: if plan.below(2) == 0 { Role::Source } else { Role::Destination },
                step: plan.below(90),
                fault: FAULTS[plan.below(FAULTS.len() as u64) as usize],
            })
            .collect();
        let _case = Case(format!("seed {seed}: {faults:?}, devices {flags:?}"));
        let (harness, mut oracle) = Harness::new(flags, seed, plan.below(2) == 0);
        let outcome = harness.migrate(&mut oracle, &faults, false);
        harness.assert_promises(&mut oracle, outcome);
    }
}
