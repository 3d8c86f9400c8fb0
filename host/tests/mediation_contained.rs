//! A plug-in that misbehaves costs its own device, and nobody else's.

mod mediation_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::mediation::mediator::Verdict;
use vfio_mediate::mediation::{Limits, MediatedDevice};
use vfio_mediate_sdk::state::DeviceState;

/// Something that needs the device alone, and the errno that it ends with.
type Change = fn(&MediatedDevice) -> Errno;

const DRAIN: Duration = Duration::from_millis(100);

/// Its hook at 8 does not return while `blocked`; the one at 0 does nothing else than count.
fn open_blocking(device: &Arc<FakeDevice>, blocked: &Arc<AtomicBool>, inside: &Arc<AtomicU64>) -> Arc<MediatedDevice> {
    let limits = Limits { drain: DRAIN, access_wait: DRAIN };
    let (blocked, inside) = (Arc::clone(blocked), Arc::clone(inside));
    MediatedDevice::with_mediator(device.clone(), space(), limits, |calls| {
        let mut script = Script::new(calls);
        script.claims = vec![claim(0, 0, 8), claim(0, 8, 8)];
        script.read = Box::new(move |_, claim, _, _| {
            if claim == 1 {
                inside.fetch_add(1, Ordering::SeqCst);
                while blocked.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            }
            Verdict::Handled
        });
        Ok(Some(Box::new(script)))
    })
    .unwrap()
}

fn await_inside(inside: &AtomicU64) {
    let start = Instant::now();
    while inside.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "nobody came");
        std::thread::yield_now();
    }
}

/// While its hook hangs, others use the device and its neighbours; who wants it alone is told after the deadline, and from
/// then on it is failed, for everybody, at once and for good. When the hook returns at last its answer harms nobody.
///
/// spec: GATE-5
#[test]
fn a_hook_that_hangs_costs_its_device_after_a_deadline_and_no_other() {
    let reset = |device: &MediatedDevice| device.reset().unwrap_err().errno();
    let arc = |device: &MediatedDevice| device.set_state(DeviceState::Stop, Instant::now() + DRAIN).unwrap_err().errno;
    let table = |device: &MediatedDevice| device.start_tracking().unwrap_err().errno();
    let command = |device: &MediatedDevice| device.region_write(CONFIG, COMMAND, &[0, 0]).unwrap_err().errno();
    let changes: [(&str, Change); 4] = [("reset", reset), ("arc", arc), ("table", table), ("command", command)];
    for (name, change) in changes {
        let (blocked, inside) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        let device = Arc::new(FakeDevice { native: Some(FakeNative::new(b"state")), ..FakeDevice::new() });
        let mediated = open_blocking(&device, &blocked, &inside);
        let neighbour = open_plain(&Arc::new(FakeDevice::new()));
        std::thread::scope(|scope| {
            let hanging = scope.spawn(|| mediated.region_read(0, 8, &mut [0; 4]));
            await_inside(&inside);
            mediated.region_read(0, 0, &mut [0; 4]).unwrap();
            mediated.region_read(0, 0x100, &mut [0; 4]).unwrap();
            let start = Instant::now();
            assert_eq!(change(&mediated), Errno::TIMEDOUT, "{name}");
            assert!(start.elapsed() >= DRAIN, "{name}: sooner than its deadline");
            for _ in 0..2 {
                assert_eq!(mediated.region_read(0, 0x100, &mut [0; 4]).unwrap_err().errno(), Errno::NODEV, "{name}");
            }
            neighbour.region_read(0, 0, &mut [0; 4]).unwrap();
            neighbour.reset().unwrap();
            blocked.store(false, Ordering::SeqCst);
            hanging.join().unwrap().unwrap();
        });
        assert_eq!(mediated.region_read(0, 8, &mut [0; 4]).unwrap_err().errno(), Errno::NODEV, "{name}: it came back");
        assert_eq!(inside.load(Ordering::SeqCst), 1, "{name}: the hook of a failed device was called");
        assert_eq!(device.violations.load(Ordering::SeqCst), 0, "{name}");
    }
}
