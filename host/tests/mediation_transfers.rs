//! Long transfers, in the middle of which memory is disabled.

mod mediation_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::mediation::mediator::{HostCalls, Verdict};

fn toggle(mediated: &MediatedDevice, on: bool) {
    mediated.region_write(CONFIG, COMMAND, &[if on { 2 } else { 0 }, 0]).unwrap();
}

/// A hook in the middle of 4 KiB: another thread's disabling waits for the whole transfer.
///
/// spec: MEMEN-8
#[test]
fn a_transfer_that_was_let_in_is_whole_before_memory_is_disabled() {
    let device = Arc::new(FakeDevice::new());
    let (reached, go_on) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (there, wait) = (reached.clone(), go_on.clone());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 2048, 4)];
        script.read = Box::new(move |_, _, _, data| {
            there.store(true, Ordering::SeqCst);
            while !wait.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            data.fill(0xaa);
            Verdict::Handled
        });
    })
    .unwrap();
    thread::scope(|scope| {
        let transfer = scope.spawn(|| {
            let mut data = [0x55; 4096];
            mediated.region_read(0, 0, &mut data).map(|()| data)
        });
        while !reached.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        let disabling = scope.spawn(|| toggle(&mediated, false));
        // Until it stands at the gate.
        while mediated.closed().is_none() {
            thread::yield_now();
        }
        go_on.store(true, Ordering::SeqCst);
        let data = transfer.join().unwrap().unwrap();
        disabling.join().unwrap();
        assert!(data[..2048].iter().all(|byte| *byte == 0) && data[2048..2052] == [0xaa; 4] && data[4095] == 0);
    });
    let refused = mediated.region_read(0, 0, &mut [0; 4096]).unwrap_err();
    assert_eq!((refused.errno(), refused.bytes_done()), (Errno::IO, 0));
    assert_eq!(device.violations.load(Ordering::SeqCst), 0);
}

/// spec: MEMEN-9
#[test]
fn a_transfer_in_which_a_hook_disables_memory_says_how_much_of_it_was_done() {
    for write in [false, true] {
        let device = Arc::new(FakeDevice::new());
        let mediated = open_script(&device, |script| {
            script.claims = vec![claim(0, 2048, 4)];
            let disable: fn(&dyn HostCalls) -> Verdict = |calls| {
                calls.region_write(CONFIG, COMMAND, &[0, 0]).unwrap();
                Verdict::Handled
            };
            script.read = Box::new(move |calls, _, _, _| disable(calls));
            script.write = Box::new(move |calls, _, _, _| disable(calls));
        })
        .unwrap();
        let mut data = [0; 4096];
        let cut = match write {
            false => mediated.region_read(0, 0, &mut data),
            true => mediated.region_write(0, 0, &data),
        };
        let cut = cut.unwrap_err();
        assert_eq!((cut.errno(), cut.bytes_done()), (Errno::IO, 2052));
        assert_eq!(mediated.region_read(0, 0, &mut [0]).unwrap_err().errno(), Errno::IO);
        toggle(&mediated, true);
        mediated.region_read(0, 0, &mut [0]).unwrap();
        assert_eq!(device.violations.load(Ordering::SeqCst), 0);
    }
}
