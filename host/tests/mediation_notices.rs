//! REQ and ERR: what the kernel says about a device, and who hears it.

mod mediation_support;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use mediation_support::*;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX as ERR, VFIO_PCI_REQ_IRQ_INDEX as REQ};
use vfio_mediate::device::sim::{Edu, EduOptions, Stateful, StatefulOptions};
use vfio_mediate::device::{Device, IrqAction, IrqData, IrqSet};
use vfio_mediate::mediation::gate::Reason;
use vfio_mediate::mediation::{Limits, MediatedDevice, Notice};
use vfio_mediate::sys::EventFd;
use vfio_mediate_sdk::abi;

const LONG: Duration = Duration::from_secs(30);

fn stateful() -> Arc<Stateful> {
    Stateful::new(StatefulOptions::default()).unwrap()
}

fn plain(device: Arc<dyn Device>) -> Arc<MediatedDevice> {
    MediatedDevice::with_mediator(device, space(), Limits::default(), |_| Ok(None)).unwrap()
}

fn heard(device: &MediatedDevice) -> mpsc::Receiver<Notice> {
    let (tell, told) = mpsc::channel();
    device.observe(Arc::new(move |notice| tell.send(notice).unwrap()));
    told
}

fn irq(device: &MediatedDevice, index: u32, event: &EventFd) {
    let fds = [Some(event.as_fd())];
    let data = IrqData::EventFd(&fds);
    device.set_irqs(&IrqSet { index, start: 0, count: 1, action: IrqAction::Trigger, data }).unwrap();
}

/// spec: POWER-30
#[test]
fn a_request_for_release_is_told_once_and_refuses_nothing() {
    let sim = stateful();
    let device = plain(sim.clone());
    let client = EventFd::new().unwrap();
    irq(&device, REQ, &client);
    let told = heard(&device);
    assert!(sim.raise_request());
    assert_eq!(told.recv_timeout(LONG), Ok(Notice::ReleaseRequested));
    assert_eq!(client.wait(Instant::now() + LONG), Ok(1), "the client hears it too");
    assert_eq!(device.closed(), None);
    // The kernel repeats it while it waits; so does the client's eventfd.
    assert!(sim.raise_request());
    assert_eq!(client.wait(Instant::now() + LONG), Ok(1));
    assert!(told.try_recv().is_err());
    // Who asks later is told as well.
    assert_eq!(heard(&device).recv_timeout(LONG), Ok(Notice::ReleaseRequested));
    assert_eq!(device.notices(), [Notice::ReleaseRequested]);
}

/// spec: POWER-31
#[test]
fn an_error_fails_the_device_before_anybody_hears_of_it() {
    let sim = stateful();
    let failures = Arc::new(AtomicU64::new(0));
    let counted = failures.clone();
    let opened = MediatedDevice::with_mediator(sim.clone(), space(), Limits::default(), |calls| {
        let mut script = Script::new(calls);
        script.event = Box::new(move |_, event| {
            if event.kind == abi::EVENT_DEVICE_ERROR {
                assert_eq!(event.args[0], Errno::IO.raw_os_error() as u64);
                counted.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        Ok(Some(Box::new(script)))
    });
    let device = opened.unwrap();
    let client = EventFd::new().unwrap();
    irq(&device, ERR, &client);
    let seen = Arc::new(Mutex::new(None));
    let (tell, told) = mpsc::channel();
    let (weak, noted) = (Arc::downgrade(&device), seen.clone());
    device.observe(Arc::new(move |notice| {
        *noted.lock().unwrap() = weak.upgrade().map(|device| device.closed());
        tell.send(notice).unwrap();
    }));
    assert!(sim.raise_error());
    assert_eq!(told.recv_timeout(LONG), Ok(Notice::DeviceError));
    assert_eq!(*seen.lock().unwrap(), Some(Some(Reason::Failed)));
    assert_eq!(client.wait(Instant::now() + LONG), Ok(1));
    assert_eq!(failures.load(Ordering::SeqCst), 1);
    assert_eq!(device.region_read(CONFIG, 0, &mut [0; 4]).unwrap_err().errno(), Errno::NODEV);
}

/// spec: POWER-32
#[test]
fn the_clients_eventfds_of_these_indices_are_the_hosts_to_signal() {
    let sim = stateful();
    let device = plain(sim.clone());
    let told = heard(&device);
    for index in [ERR, REQ] {
        let client = EventFd::new().unwrap();
        let set = |action, count, data| device.set_irqs(&IrqSet { index, start: 0, count, action, data });
        irq(&device, index, &client);
        // Loopback reaches the client, and is no word of the kernel's.
        set(IrqAction::Trigger, 1, IrqData::None).unwrap();
        set(IrqAction::Trigger, 1, IrqData::Bool(&[true])).unwrap();
        set(IrqAction::Trigger, 1, IrqData::Bool(&[false])).unwrap();
        assert_eq!(client.read(), Ok(2));
        assert_eq!(set(IrqAction::Mask, 1, IrqData::None).unwrap_err().errno(), Errno::NOTTY);
        // A client that disables its own disables only that.
        set(IrqAction::Trigger, 0, IrqData::None).unwrap();
        set(IrqAction::Trigger, 1, IrqData::None).unwrap();
        assert_eq!(client.read(), Ok(0));
    }
    assert!(told.try_recv().is_err());
    device.reset().unwrap();
    assert!(sim.raise_request(), "the host listens on");
    assert_eq!(told.recv_timeout(LONG), Ok(Notice::ReleaseRequested));
}

/// spec: POWER-33
#[test]
fn the_watch_ends_with_the_device_even_from_its_own_thread() {
    // By another thread: joined, and the device's indices are free again.
    let sim = stateful();
    drop(plain(sim.clone()));
    assert!(!sim.raise_request() && !sim.raise_error(), "nobody listens any more");
    // By its own: the observer holds the last reference, and lets go of it.
    let device = plain(sim.clone());
    let (done, ended) = mpsc::channel();
    let last = Arc::new(Mutex::new(None));
    let held = last.clone();
    let observer = move |_| {
        drop(held.lock().unwrap().take());
        done.send(()).unwrap();
    };
    device.observe(Arc::new(observer));
    *last.lock().unwrap() = Some(device);
    assert!(sim.raise_request());
    ended.recv_timeout(LONG).unwrap();
    let until = Instant::now() + LONG;
    while sim.raise_request() {
        assert!(Instant::now() < until, "the device was not let go");
        std::thread::yield_now();
    }
    // A conventional PCI function has no ERR.
    let edu = Edu::new(EduOptions::default()).unwrap();
    let device = plain(edu.clone());
    assert_eq!(device.irq_info(ERR).unwrap_err().errno(), Errno::INVAL);
    assert!(edu.raise_request());
}

/// spec: POWER-30 POWER-31
#[test]
fn a_suspended_device_is_heard_as_well_and_sleeps_on() {
    let sim = stateful();
    let device = plain(sim.clone());
    let told = heard(&device);
    device.low_power_entry(None).unwrap();
    assert!(sim.raise_request());
    assert_eq!(told.recv_timeout(LONG), Ok(Notice::ReleaseRequested));
    assert_eq!(device.closed(), Some(Reason::Suspended));
    assert!(sim.raise_error());
    assert_eq!(told.recv_timeout(LONG), Ok(Notice::DeviceError));
    assert_eq!(device.closed(), Some(Reason::Failed));
    drop(device);
    let until = Instant::now() + LONG;
    // The thread that told us may be the last to let go.
    while sim.power().unwrap().suspended {
        assert!(Instant::now() < until, "resumed before it was closed");
        std::thread::yield_now();
    }
    assert_eq!(sim.accesses_while_suspended(), 0);
}
