//! Accesses against everything that closes the gate, with a device that notices what must not happen.

mod mediation_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::mediation::mediator::Verdict;
use vfio_mediate_sdk::state::DeviceState;

const ROUNDS: u64 = 150;

fn accessor(mediated: Arc<MediatedDevice>, done: Arc<AtomicBool>, through: Arc<AtomicU64>, offset: u64) {
    let mut data = [0; 4];
    while !done.load(Ordering::Relaxed) {
        for result in [mediated.region_read(0, offset, &mut data), mediated.region_write(0, offset, &data)] {
            match result {
                Ok(()) => drop(through.fetch_add(1, Ordering::Relaxed)),
                Err(error) => assert!(matches!(error.errno(), Errno::IO | Errno::AGAIN), "{error}"),
            }
        }
        mediated.region_read(CONFIG, 0, &mut data).unwrap();
    }
}

/// Each kind of change runs in a thread of its own, against accesses of hooked and unhooked bytes.
///
/// spec: GATE-1 GATE-2 CONFIG-2 STATE-4
#[test]
fn no_access_arrives_while_it_is_forbidden() {
    let device = Arc::new(FakeDevice { slow: true, ..FakeDevice::new() });
    let hooked = Arc::new(AtomicU64::new(0));
    let counted = hooked.clone();
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 64)];
        script.write = Box::new(move |_, _, _, _| {
            counted.fetch_add(1, Ordering::Relaxed);
            Verdict::Forward
        });
        script.migration = Some(ScriptMigration::default());
    })
    .unwrap();
    mediated.dma_map(map(0, 4, 0)).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let through = Arc::new(AtomicU64::new(0));
    let accessors: Vec<_> = [0, 8, 128, 4096]
        .map(|offset| {
            let (mediated, done, through) = (mediated.clone(), done.clone(), through.clone());
            thread::spawn(move || accessor(mediated, done, through, offset))
        })
        .into();
    let changes: [fn(&MediatedDevice); 4] = [
        |device| device.reset().unwrap(),
        |device| {
            device.region_write(CONFIG, COMMAND, &[0, 0]).unwrap();
            device.region_write(CONFIG, COMMAND, &[2, 0]).unwrap();
        },
        |device| {
            device.start_tracking().unwrap();
            device.sync_dirty().unwrap();
            device.stop_tracking();
        },
        |device| {
            // A reset in between may have taken it back to RUNNING, which is fine.
            let soon = || Instant::now() + Duration::from_secs(30);
            device.set_state(DeviceState::Stop, soon()).unwrap();
            thread::yield_now();
            device.set_state(DeviceState::Running, soon()).unwrap();
        },
    ];
    let changers: Vec<_> = changes
        .map(|change| {
            let mediated = mediated.clone();
            thread::spawn(move || (0..ROUNDS).for_each(|_| change(&mediated)))
        })
        .into();
    for changer in changers {
        changer.join().unwrap();
    }
    // Something must have got through, or nothing was shown.
    mediated.region_write(CONFIG, COMMAND, &[2, 0]).unwrap();
    let before = through.load(Ordering::Relaxed);
    while through.load(Ordering::Relaxed) < before + 100 || hooked.load(Ordering::Relaxed) == 0 {
        thread::yield_now();
    }
    done.store(true, Ordering::Relaxed);
    for accessor in accessors {
        accessor.join().unwrap();
    }
    assert_eq!(device.violations.load(Ordering::SeqCst), 0);
    assert!(device.resets.load(Ordering::SeqCst) > 0);
}

/// Devices opened and closed while their interrupts and timers fire.
#[test]
fn closing_against_timers_and_interrupts_ends() {
    for _ in 0..50 {
        let device = Arc::new(FakeDevice::new());
        let mediated = open_script(&device, |script| {
            for cookie in 0..8 {
                script.calls.timer_arm(cookie, cookie * 50_000).unwrap();
            }
            script.irq_claims = vec![vfio_mediate::mediation::mediator::IrqClaim {
                index: 2,
                start: 0,
                count: 1,
                has_irq_info: false,
                has_set_irqs: false,
                has_fired: true,
            }];
            script.event = Box::new(|calls, _| calls.timer_arm(9, 0));
        })
        .unwrap();
        let (_read, client) = tell_tale();
        mediated.set_irqs(&set_fd(0, &[borrow(&client)])).unwrap();
        rustix::io::write(&device.fds.lock().unwrap()[&0], &1u64.to_ne_bytes()).unwrap();
        thread::yield_now();
        drop(mediated);
    }
}
