//! What mediation costs an access, the gate included: through the mediated device against the device called directly.
//!
//! Goals: an access that nobody hooks +2 ns or less, a hooked one +10 ns or less. Run with
//! `cargo bench -p vfio-mediate --bench access`; needs gcc for the hook in C. It reports and does not judge: a busy machine
//! is no defect.

#[path = "../tests/mediation_support/mod.rs"]
mod mediation_support;

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::Criterion;
use mediation_support::{BAR, claim, space};
use vfio_mediate::device::*;
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::mediation::gate::{Class, Gate, Reason, Standing};
use vfio_mediate::mediation::mediator::Verdict;
use vfio_mediate::plugin::{Library, Limits, Registry};
use vfio_mediate::sys::Mapping;

/// A device whose registers cost next to nothing, so that what is around them shows.
#[derive(Debug)]
struct Registers {
    fake: mediation_support::FakeDevice,
    value: AtomicU64,
}

impl Device for Registers {
    fn identity(&self) -> &Identity {
        self.fake.identity()
    }

    fn info(&self) -> DeviceInfo {
        self.fake.info()
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo> {
        self.fake.region_info(index)
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        self.fake.irq_info(index)
    }

    fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        match index {
            0 | 1 if offset.saturating_add(data.len() as u64) <= BAR && data.len() == 8 => {
                data.copy_from_slice(&self.value.load(Ordering::Relaxed).to_le_bytes());
                Ok(())
            }
            _ => self.fake.region_read(index, offset, data),
        }
    }

    fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.fake.region_write(index, offset, data)
    }

    fn region_map(&self, index: u32, offset: u64, length: u64) -> Result<Arc<Mapping>> {
        self.fake.region_map(index, offset, length)
    }

    fn set_irqs(&self, request: &IrqSet<'_>) -> Result<()> {
        self.fake.set_irqs(request)
    }

    fn reset(&self) -> Result<()> {
        self.fake.reset()
    }

    fn dma_map(&self, map: &DmaMap) -> Result<()> {
        self.fake.dma_map(map)
    }

    fn dma_unmap(&self, iova: u64, length: u64) -> Result<()> {
        self.fake.dma_unmap(iova, length)
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        self.fake.iova_ranges()
    }

    fn probe_feature(&self, feature: Feature, access: FeatureAccess) -> bool {
        self.fake.probe_feature(feature, access)
    }

    fn migration(&self) -> Option<&dyn NativeMigration> {
        None
    }

    fn dma_logging(&self) -> Option<&dyn NativeDmaLogging> {
        None
    }

    fn clock(&self) -> &dyn Clock {
        &RealClock
    }
}

fn device() -> Arc<dyn Device> {
    Arc::new(Registers { fake: mediation_support::FakeDevice::new(), value: AtomicU64::new(7) })
}

const CLAIMED: u64 = 256;

fn scripted() -> Arc<MediatedDevice> {
    MediatedDevice::with_mediator(device(), space(), Default::default(), |calls| {
        let mut script = mediation_support::Script::new(calls);
        script.claims = vec![claim(0, 0, 64), claim(0, CLAIMED, 64)];
        script.read = Box::new(|_, _, offset, data| {
            data.fill(offset as u8);
            Verdict::Handled
        });
        Ok(Some(Box::new(script)))
    })
    .unwrap()
}

/// The same claims, by a plug-in in C that is compiled here, loaded and asked as any other.
fn in_c(registry: &Registry) -> Arc<MediatedDevice> {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("access_hook.{}.so", std::process::id()));
    let output = Command::new("gcc")
        .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC", "-I"])
        .arg(host.join("../spec/include"))
        .arg("-o")
        .arg(&library)
        .arg(host.join("benches/access_hook.c"))
        .output()
        .expect("a C compiler, gcc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let loaded = Library::open(&library).unwrap();
    std::fs::remove_file(&library).unwrap();
    registry.register(loaded, Limits { devices_max: 1 }).unwrap();
    let mediated = MediatedDevice::open(device(), registry, space()).unwrap();
    assert_eq!(mediated.plugin().unwrap().name, "access-hook");
    mediated
}

/// Who answers, where, and what that may cost beyond the device itself, in ns.
struct Case {
    name: &'static str,
    goal: Option<f64>,
    time: Box<dyn FnMut(u32) -> Duration>,
}

impl Case {
    /// `read` is inlined into the loop, as it is into a front-end's code.
    fn new(
        name: &'static str,
        goal: Option<f64>,
        read: impl Fn(u32, u64, &mut [u8]) + 'static,
        at: (u32, u64),
    ) -> Self {
        let time = move |iterations| {
            let mut data = [0; 8];
            let start = Instant::now();
            for _ in 0..iterations {
                read(black_box(at.0), black_box(at.1), black_box(&mut data));
            }
            start.elapsed()
        };
        Self { name, goal, time: Box::new(time) }
    }

    fn mediated(name: &'static str, goal: f64, device: &Arc<MediatedDevice>, at: (u32, u64)) -> Self {
        let device = device.clone();
        Self::new(name, Some(goal), move |index, offset, data| device.region_read(index, offset, data).unwrap(), at)
    }
}

fn cases(registry: &Registry) -> Vec<Case> {
    const DIRECTLY: &str = "the device, directly";
    let direct = black_box(device());
    let (script, c) = (scripted(), in_c(registry));
    let mut filled = [0; 8];
    c.region_read(0, CLAIMED, &mut filled).unwrap();
    assert_eq!(filled, [1; 8], "the hook in C answers");
    vec![
        Case::new(DIRECTLY, None, move |index, offset, data| direct.region_read(index, offset, data).unwrap(), (1, 0)),
        Case::mediated("mediated, region without claims", 2.0, &script, (1, 0)),
        Case::mediated("mediated, beside the claims of a region", 2.0, &script, (0, 128)),
        Case::mediated("mediated, hooked by a script", 10.0, &script, (0, CLAIMED)),
        Case::mediated("mediated, hooked by a plug-in in C", 10.0, &c, (0, CLAIMED)),
    ]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// All cases in turn, many short rounds, so that what else the machine does hits all of them alike: medians, and the median
/// of each round's difference to the device called directly.
fn access() {
    // `cargo test --benches` only wants to see it run.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { 2001 } else { 1 };
    const ITERATIONS: u32 = 10_000;
    let registry = Registry::new();
    let mut cases = cases(&registry);
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); cases.len()];
    for round in 0..=rounds {
        for (case, times) in cases.iter_mut().zip(&mut times) {
            let time = (case.time)(ITERATIONS).as_secs_f64() * 1e9 / f64::from(ITERATIONS);
            // The first warms up.
            if round != 0 {
                times.push(time);
            }
        }
    }
    println!("read of 8 bytes, medians of {rounds} rounds of {ITERATIONS}:");
    for (case, own) in cases.iter().zip(&times) {
        let more = median(own.iter().zip(&times[0]).map(|(time, direct)| time - direct).collect());
        let ratio = median(own.iter().zip(&times[0]).map(|(time, direct)| time / direct).collect());
        let goal = case.goal.map_or(String::new(), |goal| format!("  {more:+5.1} ns  x{ratio:.2}  (goal {goal:+} ns)"));
        println!("  {:40} {:5.1} ns{goal}", case.name, median(own.clone()));
    }
    drop(cases);
    registry.shutdown(Instant::now() + Duration::from_secs(5)).unwrap();
}

fn open_gate() -> Gate {
    let gate = Gate::new(Reason::NotBound);
    gate.close(Reason::NotBound, Instant::now() + Duration::from_secs(1)).unwrap().release(Standing::OPEN);
    gate
}

fn gate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gate");
    let gate = Arc::new(open_gate());
    group.bench_function("nothing (a load)", |bencher| {
        let word = AtomicU64::new(0);
        bencher.iter(|| black_box(&word).load(Ordering::Acquire));
    });
    group.bench_function("enter and leave", |bencher| {
        bencher.iter(|| drop(black_box(&gate).enter(Class::Memory).unwrap()));
    });
    let done = Arc::new(AtomicBool::new(false));
    let (other, ended) = (gate.clone(), done.clone());
    let neighbour = std::thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            drop(black_box(&other).enter(Class::Memory).unwrap());
        }
    });
    group.bench_function("enter and leave, another thread does too", |bencher| {
        bencher.iter(|| drop(black_box(&gate).enter(Class::Memory).unwrap()));
    });
    done.store(true, Ordering::Relaxed);
    neighbour.join().unwrap();
    group.bench_function("close and release", |bencher| {
        bencher.iter(|| {
            let deadline = Instant::now() + Duration::from_secs(1);
            gate.close(Reason::TableSwap, deadline).unwrap().release(Standing::OPEN);
        });
    });
    group.finish();
}

fn main() {
    access();
    let short = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    let mut criterion = short.configure_from_args();
    gate(&mut criterion);
    criterion.final_summary();
}
