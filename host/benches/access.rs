//! What mediation costs an access, the gate included: through the mediated device against the device called directly.
//!
//! Goals: an unhooked access +2 ns or less, a hooked one +10 ns or less. Run with `cargo bench -p vfio-mediate --bench access`.

#[path = "../tests/mediation_support/mod.rs"]
mod mediation_support;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use mediation_support::{BAR, claim, space};
use vfio_mediate::device::*;
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::mediation::gate::{Class, Gate, Reason, Standing};
use vfio_mediate::mediation::mediator::Verdict;
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

fn mediated() -> Arc<MediatedDevice> {
    MediatedDevice::with_mediator(device(), space(), Default::default(), |calls| {
        let mut script = mediation_support::Script::new(calls);
        script.claims = vec![claim(0, 0, 64), claim(0, 256, 64)];
        script.read = Box::new(|_, _, offset, data| {
            data.fill(offset as u8);
            Verdict::Handled
        });
        Ok(Some(Box::new(script)))
    })
    .unwrap()
}

fn access(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read of 8 bytes");
    let mut data = [0; 8];
    let direct = black_box(device());
    group.bench_function("the device, directly", |bencher| {
        bencher.iter(|| direct.region_read(black_box(1), black_box(0), &mut data).unwrap());
    });
    let mediated = mediated();
    group.bench_function("mediated, region without claims", |bencher| {
        bencher.iter(|| mediated.region_read(black_box(1), black_box(0), &mut data).unwrap());
    });
    group.bench_function("mediated, beside the claims of a region", |bencher| {
        bencher.iter(|| mediated.region_read(black_box(0), black_box(128), &mut data).unwrap());
    });
    group.bench_function("mediated, hooked", |bencher| {
        bencher.iter(|| mediated.region_read(black_box(0), black_box(256), &mut data).unwrap());
    });
    group.finish();
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

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = access, gate
}
criterion_main!(benches);
