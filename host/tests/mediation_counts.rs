//! Plug-ins' counts seen from whole mediated devices: every step of an open fails once, limits are errors with a number, and
//! what a plug-in adds keeps its index.

mod mediation_support;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mediation_support::{FakeDevice, PAGE, claim, open_script};
use rustix::io::Errno;
use support::build_plugin;
use vfio_mediate::device::sim::{Edu, EduOptions, Fault, FaultPlan, Time, VirtualClock};
use vfio_mediate::mediation::mediator::{ExtraRegion, Verdict};
use vfio_mediate::mediation::{MediatedDevice, Result};
use vfio_mediate::memory::{AddressSpace, GuestRam};
use vfio_mediate::plugin::{Library, Limits, Registry};

/// The edu plug-in, which may have one device.
fn edu_registry() -> Arc<Registry> {
    let registry = Registry::new();
    let library = Library::open(&build_plugin("vfio-mediate-plugin-edu")).unwrap();
    registry.register(library, Limits { devices_max: 1 }).unwrap();
    registry
}

fn open_edu(registry: &Registry, faults: &Arc<FaultPlan>) -> Result<Arc<MediatedDevice>> {
    let time = Time::Virtual(VirtualClock::new());
    let edu = Edu::new(EduOptions { time, faults: Arc::clone(faults), ..EduOptions::default() }).unwrap();
    let memory = AddressSpace::new(GuestRam::new(16 * PAGE).unwrap());
    MediatedDevice::open(edu, registry, memory)
}

fn devices_open(registry: &Registry) -> usize {
    registry.list()[0].devices.len()
}

/// spec: REG-6 OPEN-2
#[test]
fn an_open_that_fails_at_any_step_gives_its_instance_back() {
    let registry = edu_registry();
    let counted = FaultPlan::none();
    drop(open_edu(&registry, &counted).unwrap());
    let steps = counted.steps();
    assert!(steps > 10, "{steps} steps");
    let mut failed = 0;
    for step in 0..steps {
        for fault in [Fault::Errno(Errno::IO), Fault::Lose] {
            let opened = open_edu(&registry, &FaultPlan::at(step, fault));
            failed += u64::from(opened.is_err());
            assert_eq!(devices_open(&registry), usize::from(opened.is_ok()), "step {step}, {fault:?}");
            drop(opened);
            assert_eq!(devices_open(&registry), 0, "step {step}, {fault:?}");
        }
    }
    assert!(failed > 0, "no step of opening mattered");
    drop(open_edu(&registry, &FaultPlan::none()).expect("the one instance is there"));
}

/// spec: REG-6
#[test]
fn a_device_beyond_the_limit_is_eusers_and_one_may_follow_when_another_was_closed() {
    let registry = edu_registry();
    let first = open_edu(&registry, &FaultPlan::none()).unwrap();
    for _ in 0..3 {
        let error = open_edu(&registry, &FaultPlan::none()).unwrap_err();
        assert_eq!(error.errno(), Errno::USERS, "{error}");
        assert!(error.to_string().contains("which is its limit"), "{error}");
        assert_eq!(devices_open(&registry), 1);
    }
    drop(first);
    drop(open_edu(&registry, &FaultPlan::none()).unwrap());
    assert_eq!(devices_open(&registry), 0);
}

/// spec: INFO-1
#[test]
fn added_regions_answer_for_their_indices_while_everything_else_moves() {
    let device = Arc::new(FakeDevice::new());
    let extra = |subtype, size| ExtraRegion { flags: 3, size, type_: 5, subtype, has_mmap: false };
    let open = || {
        open_script(&device, |script| {
            script.claims = vec![claim(0, 0, 8)];
            script.extra_regions = (1..=3).map(|subtype| extra(subtype, u64::from(subtype) * 16)).collect();
            script.read = Box::new(|_, claim, _, data| {
                data.fill(claim as u8);
                Verdict::Handled
            });
        })
        .unwrap()
    };
    let mediated = open();
    let first = mediated.info().num_regions - 3;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut asked = 0;
                    while !stop.load(Ordering::Relaxed) || asked == 0 {
                        for at in 0..3 {
                            let info = mediated.region_info(first + at).unwrap();
                            assert_eq!((info.index, info.size), (first + at, u64::from(at + 1) * 16));
                            let mut byte = [0];
                            mediated.region_read(first + at, 0, &mut byte).unwrap();
                            assert_eq!(byte, [(1000 + at) as u8], "another region's hook");
                        }
                        asked += 1;
                    }
                    asked
                })
            })
            .collect();
        // Tables are switched, the device is reset, and others of its kind come and go.
        for _ in 0..50 {
            mediated.start_tracking().unwrap();
            mediated.stop_tracking();
            mediated.reset().unwrap();
            assert_eq!(open().info().num_regions, first + 3);
        }
        stop.store(true, Ordering::Relaxed);
        asking.into_iter().for_each(|thread| assert!(thread.join().unwrap() > 0));
    });
}
