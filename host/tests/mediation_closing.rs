//! Closing a device in the middle of everything: nothing stays started in it.

mod mediation_support;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use mediation_support::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};
use vfio_mediate::device::sim::{Fault, FaultPlan, Stateful, StatefulOptions, regs};
use vfio_mediate::device::{IrqAction, IrqData, IrqSet, NativeMigration};
use vfio_mediate::mediation::gate::Reason;
use vfio_mediate::mediation::{Limits, MediatedDevice, Tracking};
use vfio_mediate::plugin::Registry;
use vfio_mediate_sdk::state::DeviceState::{self, *};

fn stateful(faults: &Arc<FaultPlan>) -> Arc<Stateful> {
    Stateful::new(StatefulOptions { faults: Arc::clone(faults), ..StatefulOptions::default() }).unwrap()
}

fn opened(device: &Arc<Stateful>) -> Arc<MediatedDevice> {
    let mediated = MediatedDevice::open(device.clone(), &Registry::new(), space()).unwrap();
    mediated.dma_map(map(0, 16, 0)).unwrap();
    mediated.region_write(CONFIG, COMMAND, &6u16.to_le_bytes()).unwrap();
    mediated
}

fn arm(mediated: &MediatedDevice) {
    for index in [VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ERR_IRQ_INDEX] {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let fds = [borrow(&fd)];
        let set = IrqSet { index, start: 0, count: 1, action: IrqAction::Trigger, data: IrqData::EventFd(&fds) };
        mediated.set_irqs(&set).unwrap();
    }
}

fn is_running(state: DeviceState) -> bool {
    matches!(state, Running | RunningP2p | PreCopy | PreCopyP2p)
}

/// What the device says of itself, which nobody else can know.
fn assert_nothing_started(device: &Stateful, during: &str) {
    assert!(!device.is_logging(), "{during}: its log goes on");
    assert!(!device.is_streaming(), "{during}: a stream stays open");
    assert!(!device.is_armed(), "{during}: an interrupt stays armed");
}

/// spec: CLOSE-1
#[test]
fn a_device_closed_in_any_state_has_nothing_started_and_runs_only_if_it_ran() {
    for tracking in [false, true] {
        for state in [Running, RunningP2p, PreCopy, PreCopyP2p, StopCopy, Stop, Resuming] {
            let during = format!("closed in {state}, tracking: {tracking}");
            let device = stateful(&FaultPlan::none());
            let mediated = opened(&device);
            arm(&mediated);
            if tracking {
                assert_eq!(mediated.start_tracking().unwrap(), Tracking::Native);
                assert!(device.is_logging());
            }
            mediated.set_state(state, soon()).unwrap();
            if state == PreCopy || state == StopCopy {
                mediated.save(&mut vec![0; 64 << 10]).unwrap();
            }
            assert!(device.is_armed() && device.is_streaming() == (state.is_saving() || state == Resuming));
            drop(mediated);
            assert_nothing_started(&device, &during);
            let after = NativeMigration::state(&*device).unwrap();
            // Half-loaded state is reset away, and a device fresh from a reset runs: with nothing mapped, and no bus master.
            assert!(is_running(after) == is_running(state) || state == Resuming, "{during}: it is in {after}");
            // Somebody else may have it now.
            let again = opened(&device);
            again.region_write(0, regs::TARGET, &0u64.to_le_bytes()).ok();
            again.start_tracking().unwrap();
            drop(again);
            assert_nothing_started(&device, "the next one");
        }
    }
}

/// A step of closing that fails does not keep the others from being done.
///
/// spec: CLOSE-1
#[test]
fn one_step_of_closing_that_fails_leaves_only_its_own_behind() {
    let busy = |faults: &Arc<FaultPlan>| {
        let device = stateful(faults);
        let mediated = opened(&device);
        arm(&mediated);
        mediated.start_tracking().unwrap();
        mediated.set_state(PreCopy, soon()).unwrap();
        (device, mediated)
    };
    let counted = FaultPlan::none();
    let (device, mediated) = busy(&counted);
    let before = counted.steps();
    drop(mediated);
    assert_nothing_started(&device, "nothing failed");
    let names = counted.trace();
    for step in before..counted.steps() {
        let faults = FaultPlan::at(step, Fault::Errno(rustix::io::Errno::IO));
        let (device, mediated) = busy(&faults);
        drop(mediated);
        let left = [device.is_logging(), device.is_streaming(), device.is_armed()];
        let count = left.iter().filter(|left| **left).count();
        assert!(count <= 1, "{} failed, and {left:?} stay", names[step as usize]);
    }
}

/// spec: CLOSE-1
#[test]
fn the_plug_ins_log_is_stopped_before_it_is_closed() {
    let device = Arc::new(FakeDevice { logging: Some(FakeLogging::default()), ..FakeDevice::new() });
    let (stopped, closed) = (Arc::default(), Arc::default());
    let (ours, own) = (Arc::clone(&stopped), Arc::clone(&closed));
    let mediated = open_script(&device, |script| {
        script.dirty = Some(ScriptDirty { stopped: ours, ..Default::default() });
        script.closed = Some(own);
    })
    .unwrap();
    mediated.dma_map(map(0, 4, 0)).unwrap();
    mediated.start_tracking().unwrap();
    drop(mediated);
    assert_eq!((stopped.load(Ordering::SeqCst), closed.load(Ordering::SeqCst)), (1, 1));
    assert!(device.logging.as_ref().unwrap().started.lock().unwrap().is_none());
    assert!(device.maps.lock().unwrap().is_empty());
}

/// spec: OPEN-2
#[test]
fn an_open_that_fails_at_any_step_leaves_nothing_started() {
    let open = |faults: &Arc<FaultPlan>| {
        let device = stateful(faults);
        let opened = MediatedDevice::open(device.clone(), &Registry::new(), space());
        (device, opened)
    };
    let counted = FaultPlan::none();
    let (_device, opened) = open(&counted);
    let steps = counted.steps();
    drop(opened.unwrap());
    for step in 0..steps {
        let (device, opened) = open(&FaultPlan::at(step, Fault::Errno(rustix::io::Errno::IO)));
        let name = counted.trace()[step as usize];
        if opened.is_err() {
            assert_nothing_started(&device, name);
        }
        drop(opened);
        assert_nothing_started(&device, name);
    }
}

/// A device that somebody has alone is not let go under him: nothing has changed, and who asks again gets it.
///
/// spec: CLOSE-2
#[test]
fn letting_go_of_a_busy_device_changes_nothing_and_may_be_asked_again() {
    let device = Arc::new(FakeDevice::new());
    let (at_reset, reached) = mpsc::channel();
    let (go_on, wait) = mpsc::channel::<()>();
    let (at_reset, wait) = (Mutex::new(at_reset), Mutex::new(wait));
    let watcher = move |what| {
        if what == "reset" {
            at_reset.lock().unwrap().send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
        }
    };
    device.watcher.set(Watcher(Box::new(watcher))).unwrap();
    let limits = Limits { drain: Duration::from_millis(50), ..Limits::default() };
    let opened = MediatedDevice::with_mediator(device.clone(), space(), limits, |_| Ok(None));
    let mediated = opened.unwrap();
    let map = mediated.region_map(0, 0, PAGE).unwrap();
    thread::scope(|scope| {
        let reset = scope.spawn(|| mediated.reset());
        reached.recv().unwrap();
        assert_eq!(mediated.let_go().unwrap_err().errno(), Errno::BUSY);
        assert!(!mediated.has_failed() && mediated.closed() != Some(Reason::Closed));
        go_on.send(()).unwrap();
        reset.join().unwrap().unwrap();
    });
    assert!(map.is_live());
    mediated.region_read(0, 0, &mut [0; 4]).unwrap();
    mediated.let_go().unwrap();
    assert!(!map.is_live());
    assert_eq!(mediated.region_read(0, 0, &mut [0; 4]).unwrap_err().errno(), Errno::NODEV);
    mediated.let_go().unwrap();
}

/// An access that does not end fails the device; its mappings are taken when nobody is in the middle of one.
///
/// spec: CLOSE-2
#[test]
fn letting_go_under_an_access_that_does_not_end_fails_the_device_and_takes_nothing_from_under_it() {
    let device = Arc::new(FakeDevice::new());
    let (at_read, reached) = mpsc::channel();
    let (go_on, wait) = mpsc::channel::<()>();
    let (at_read, wait) = (Mutex::new(at_read), Mutex::new(wait));
    let watcher = move |what| {
        if what == "bar_read" {
            at_read.lock().unwrap().send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
        }
    };
    device.watcher.set(Watcher(Box::new(watcher))).unwrap();
    let limits = Limits { drain: Duration::from_millis(50), ..Limits::default() };
    let opened = MediatedDevice::with_mediator(device.clone(), space(), limits, |_| Ok(None));
    let mediated = opened.unwrap();
    let map = mediated.region_map(0, 0, PAGE).unwrap();
    thread::scope(|scope| {
        let access = scope.spawn(|| mediated.region_read(0, 0, &mut [0; 4]));
        reached.recv().unwrap();
        mediated.let_go().unwrap_err();
        assert!(mediated.has_failed() && map.is_live());
        go_on.send(()).unwrap();
        access.join().unwrap().unwrap();
    });
    assert!(!map.is_live());
}
