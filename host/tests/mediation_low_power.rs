//! Low power of a mediated device: who may sleep when, who wakes it, and that nobody touches it meanwhile.

mod mediation_support;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mediation_support::*;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX as INTX;
use vfio_mediate::device::sim::{Edu, EduOptions, Fault, FaultPlan, Sleep, Stateful, StatefulOptions, regs};
use vfio_mediate::device::{Device, IrqAction, IrqData, IrqSet};
use vfio_mediate::mediation::gate::Reason;
use vfio_mediate::mediation::mediator::{Request, Verdict};
use vfio_mediate::mediation::{Limits, MediatedDevice};
use vfio_mediate::sys::EventFd;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::DeviceState::{self, *};

const ID: u64 = 0;

fn edu(sleep: Sleep) -> Arc<Edu> {
    Edu::new(EduOptions { sleep, ..EduOptions::default() }).unwrap()
}

fn stateful() -> Arc<Stateful> {
    Stateful::new(StatefulOptions::default()).unwrap()
}

fn plain(device: Arc<dyn Device>) -> Arc<MediatedDevice> {
    MediatedDevice::with_mediator(device, space(), Limits::default(), |_| Ok(None)).unwrap()
}

fn scripted(device: Arc<dyn Device>, limits: Limits, script: impl FnOnce(&mut Script)) -> Arc<MediatedDevice> {
    let opened = MediatedDevice::with_mediator(device, space(), limits, |calls| {
        let mut made = Script::new(calls);
        script(&mut made);
        Ok(Some(Box::new(made)))
    });
    opened.unwrap()
}

fn read(device: &MediatedDevice, region: u32, offset: u64) -> Result<u32, Errno> {
    let mut word = [0; 4];
    device.region_read(region, offset, &mut word).map_err(|error| error.errno())?;
    Ok(u32::from_le_bytes(word))
}

fn errno<T: std::fmt::Debug>(result: vfio_mediate::mediation::Result<T>) -> Errno {
    result.unwrap_err().errno()
}

fn is_suspended(device: &MediatedDevice) -> bool {
    device.power().unwrap().suspended
}

/// spec: POWER-10
#[test]
fn entry_does_not_count_itself_as_busy_and_is_einval_twice() {
    let sim = edu(Sleep::D3Hot);
    let device = plain(sim.clone());
    let wakeup = EventFd::new().unwrap();
    for wakeup in [None, Some(wakeup.as_fd())] {
        device.low_power_exit().unwrap();
        device.low_power_entry(wakeup).unwrap();
        assert_eq!(device.entered().map(|entered| entered.wakeup), Some(wakeup.is_some()));
        assert!(is_suspended(&device));
        assert_eq!(errno(device.low_power_entry(None)), Errno::INVAL);
        assert!(is_suspended(&device), "a refused entry wakes nobody");
        device.low_power_exit().unwrap();
        assert!(!is_suspended(&device));
        device.low_power_exit().unwrap();
        assert_eq!(read(&device, 0, ID), Ok(0x0100_00ed));
    }
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-10
#[test]
fn an_access_in_flight_makes_entry_busy_and_nothing_else() {
    let sim = edu(Sleep::D3Hot);
    let (told, inside) = mpsc::channel();
    let (go_on, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let limits = Limits { access_wait: Duration::from_millis(20), ..Limits::default() };
    let device = scripted(sim.clone(), limits, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.read = Box::new(move |_, _, _, _| {
            told.send(()).unwrap();
            held.lock().unwrap().recv().unwrap();
            Verdict::Forward
        });
    });
    let reader = {
        let device = device.clone();
        thread::spawn(move || read(&device, 0, ID))
    };
    inside.recv().unwrap();
    assert_eq!(errno(device.low_power_entry(None)), Errno::BUSY);
    assert_eq!((device.closed(), is_suspended(&device)), (None, false));
    go_on.send(()).unwrap();
    assert_eq!(reader.join().unwrap(), Ok(0x0100_00ed), "the access in flight was not cut off");
    device.low_power_entry(None).unwrap();
    assert!(is_suspended(&device));
}

/// spec: POWER-10
#[test]
fn an_entry_that_the_device_refuses_changes_nothing() {
    let sim = edu(Sleep::D3Hot);
    let device = plain(sim.clone());
    sim.enable_vfs(2);
    assert_eq!(errno(device.low_power_entry(None)), Errno::BUSY);
    assert_eq!((device.closed(), read(&device, 0, ID)), (None, Ok(0x0100_00ed)));
    let old = plain(edu(Sleep::Unsupported));
    assert_eq!(errno(old.low_power_entry(None)), Errno::NOTTY);
    assert_eq!(errno(old.low_power_exit()), Errno::NOTTY);
    assert_eq!((old.closed(), read(&old, 0, ID)), (None, Ok(0x0100_00ed)));
}

/// Readers of regions and of configuration space, through hooks and past them, against entry and exit in a loop.
///
/// spec: POWER-11
#[test]
fn no_access_reaches_the_device_while_it_is_suspended_however_they_race() {
    let sim = edu(Sleep::D3Hot);
    let device = scripted(sim.clone(), Limits::default(), |script| {
        script.claims = vec![claim(0, 0, 64)];
        script.read = Box::new(|calls, _, offset, data| match calls.default_read(0, offset, data) {
            Ok(()) => Verdict::Handled,
            Err(errno) => Verdict::Deny(errno),
        });
    });
    let done = Arc::new(AtomicBool::new(false));
    let (through, refused) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|number| {
            let (device, done) = (device.clone(), done.clone());
            let (through, refused) = (through.clone(), refused.clone());
            thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let result = match number {
                        0 => read(&device, 0, ID),
                        1 => read(&device, 0, 0x80),
                        2 => read(&device, CONFIG, 0),
                        _ => device.region_write(CONFIG, COMMAND, &[6, 0]).map(|()| 0).map_err(|error| error.errno()),
                    };
                    match result {
                        Ok(_) => through.fetch_add(1, Ordering::Relaxed),
                        Err(errno) => {
                            assert_eq!(errno, Errno::IO);
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                    };
                }
            })
        })
        .collect();
    let wakeup = EventFd::new().unwrap();
    let (mut rounds, mut woken) = (0, 0);
    let until = soon();
    // Until each has been seen often enough, whatever the machine's load.
    while rounds < 300 || through.load(Ordering::Relaxed) < 1000 || refused.load(Ordering::Relaxed) < 100 {
        let with_wakeup = rounds % 2 == 0;
        device.low_power_entry(with_wakeup.then(|| wakeup.as_fd())).unwrap();
        if rounds % 3 == 0 {
            thread::yield_now();
        }
        device.low_power_exit().unwrap();
        let signals = wakeup.read().unwrap();
        assert_eq!(signals, u64::from(with_wakeup), "one sleep, one signal");
        woken += signals;
        rounds += 1;
        assert!(Instant::now() < until, "{rounds} rounds, {through:?} through, {refused:?} refused");
    }
    done.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().unwrap());
    assert_eq!(woken, u64::div_ceil(rounds, 2));
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-12
#[test]
fn without_a_wakeup_every_request_is_eio_at_once_and_wakes_nobody() {
    let sim = edu(Sleep::D3Hot);
    let device = plain(sim.clone());
    device.low_power_entry(None).unwrap();
    let begun = Instant::now();
    let irqs = IrqSet { index: INTX, start: 0, count: 1, action: IrqAction::Mask, data: IrqData::None };
    for errno in [
        read(&device, 0, ID).unwrap_err(),
        read(&device, CONFIG, 0).unwrap_err(),
        errno(device.region_write(0, 4, &[0; 4])),
        errno(device.region_write(CONFIG, COMMAND, &[6, 0])),
        errno(device.region_write(CONFIG, 0x3c, &[6])),
        errno(device.set_irqs(&irqs)),
        errno(device.region_map(0, 0, 4096)),
        errno(device.region_info(0)),
        errno(device.irq_info(0)),
    ] {
        assert_eq!(errno, Errno::IO);
    }
    assert!(begun.elapsed() < Limits::default().access_wait, "it does not wait for what does not end by itself");
    assert_eq!((device.closed(), is_suspended(&device)), (Some(Reason::Suspended), true));
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-13
#[test]
fn with_a_wakeup_the_first_access_wakes_the_device_and_that_is_once() {
    let sim = edu(Sleep::D3Hot);
    let device = plain(sim.clone());
    let wakeup = EventFd::new().unwrap();
    let requests: [fn(&MediatedDevice); 4] = [
        |device| assert_eq!(read(device, 0, ID), Ok(0x0100_00ed)),
        |device| assert_eq!(read(device, CONFIG, 0), Ok(0x11e8_1234)),
        |device| device.region_write(CONFIG, COMMAND, &[6, 0]).unwrap(),
        |device| _ = device.irq_info(0).unwrap(),
    ];
    for request in requests {
        device.low_power_entry(Some(wakeup.as_fd())).unwrap();
        assert_eq!(wakeup.read(), Ok(0));
        request(&device);
        request(&device);
        assert_eq!(wakeup.read(), Ok(1), "two wakes, one signal");
        assert_eq!((device.entered(), is_suspended(&device)), (None, false));
        device.low_power_exit().unwrap();
        assert_eq!(wakeup.read(), Ok(0));
    }
    // Another woke it up already: the access finds it awake, and nothing is signalled twice.
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    sim.resume_by_another();
    assert_eq!((wakeup.read(), read(&device, 0, ID)), (Ok(1), Ok(0x0100_00ed)));
    assert_eq!((device.entered(), wakeup.read()), (None, Ok(0)));
    assert_eq!(sim.accesses_while_suspended(), 0);

    let restless = plain(edu(Sleep::Never));
    restless.low_power_entry(Some(wakeup.as_fd())).unwrap();
    assert_eq!(read(&restless, 0, ID), Ok(0x0100_00ed));
    assert_eq!((restless.entered(), wakeup.read()), (None, Ok(0)), "never suspended, no signal");
}

/// spec: POWER-13
#[test]
fn who_was_told_of_the_end_of_low_power_may_enter_it_again() {
    let sim = edu(Sleep::D3Hot);
    let device = plain(sim.clone());
    let wakeup = EventFd::new().unwrap();
    for round in 0..3 {
        device.low_power_entry(Some(wakeup.as_fd())).unwrap();
        assert_eq!(errno(device.low_power_entry(Some(wakeup.as_fd()))), Errno::INVAL, "it is in low power");
        sim.resume_by_another();
        assert_eq!((wakeup.read(), is_suspended(&device)), (Ok(1), false), "round {round}");
    }
    device.low_power_entry(None).unwrap();
    sim.resume_by_another();
    assert_eq!(errno(device.low_power_entry(None)), Errno::INVAL, "without a wake-up it is suspended again by itself");
    device.low_power_exit().unwrap();
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-13
#[test]
fn racing_accesses_wake_the_device_together_and_signal_once() {
    let sim = edu(Sleep::D3Hot);
    let device = plain(sim.clone());
    let wakeup = EventFd::new().unwrap();
    for _ in 0..50 {
        device.low_power_entry(Some(wakeup.as_fd())).unwrap();
        thread::scope(|scope| {
            for region in [0, CONFIG, 0, CONFIG] {
                let device = &device;
                scope.spawn(move || read(device, region, 0).unwrap());
            }
        });
        assert_eq!(wakeup.read(), Ok(1));
    }
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-14
#[test]
fn a_mapping_is_unusable_until_the_exit_and_then_shows_what_the_device_has() {
    for (sleep, kept) in [(Sleep::D3Hot, 7), (Sleep::D3Cold, 0)] {
        let sim = Stateful::new(StatefulOptions { sleep, ..StatefulOptions::default() }).unwrap();
        let device = plain(sim.clone());
        let map = device.region_map(2, PAGE, PAGE).unwrap();
        let address = map.address();
        map.store_u32(&device, 0, 7).unwrap();
        device.low_power_entry(None).unwrap();
        assert!(!map.is_live());
        assert_eq!(errno(map.load_u32(&device, 0)), Errno::IO);
        assert_eq!(errno(map.store_u32(&device, 0, 8)), Errno::IO);
        device.low_power_exit().unwrap();
        assert_eq!((map.is_live(), map.address()), (true, address));
        assert_eq!(map.load_u32(&device, 0).unwrap(), kept, "what the device has, not what it had");
        // With a wake-up, an access by the mapping's own methods is a request like any other.
        let wakeup = EventFd::new().unwrap();
        device.low_power_entry(Some(wakeup.as_fd())).unwrap();
        assert!(!map.is_live());
        assert_eq!(map.load_u32(&device, 0).unwrap(), kept);
        assert_eq!((wakeup.read(), map.is_live()), (Ok(1), true));
        // An entry that is refused puts it back.
        device.set_state(PreCopy, soon()).unwrap();
        assert_eq!(errno(device.low_power_entry(None)), Errno::BUSY);
        assert!(map.is_live());
        assert_eq!(sim.accesses_while_suspended(), 0);
    }
}

/// spec: POWER-15
#[test]
fn intx_that_the_client_masked_stays_masked() {
    let sim = edu(Sleep::D3Hot);
    let device = plain(sim.clone());
    let event = EventFd::new().unwrap();
    let fds = [Some(event.as_fd())];
    let intx = |action, data| device.set_irqs(&IrqSet { index: INTX, start: 0, count: 1, action, data }).unwrap();
    intx(IrqAction::Trigger, IrqData::EventFd(&fds));
    for (action, masked) in [(IrqAction::Mask, true), (IrqAction::Unmask, false)] {
        intx(action, IrqData::None);
        device.low_power_entry(None).unwrap();
        device.low_power_exit().unwrap();
        assert_eq!(sim.is_intx_masked(), masked);
        // A level that is raised now arrives only if the client wants it.
        device.region_write(0, 0x60, &1_u32.to_le_bytes()).unwrap();
        assert_eq!(event.read(), Ok(u64::from(!masked)));
        device.region_write(0, 0x64, &1_u32.to_le_bytes()).unwrap();
    }
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-16
#[test]
fn a_device_is_resumed_before_it_is_closed_or_its_client_is_gone() {
    let sim = edu(Sleep::D3Hot);
    let wakeup = EventFd::new().unwrap();
    let answers = Arc::new(Mutex::new(Vec::new()));
    let heard = answers.clone();
    let device = scripted(sim.clone(), Limits::default(), |script| {
        script.event = Box::new(move |calls, event| {
            let mut word = [0; 4];
            heard.lock().unwrap().push((event.kind, calls.region_read(0, ID, &mut word)));
            Ok(())
        });
    });
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    device.client(false).unwrap();
    assert_eq!((device.entered(), wakeup.read()), (None, Ok(1)));
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    drop(device);
    assert_eq!(wakeup.read(), Ok(1));
    assert!(!sim.power().unwrap().suspended);
    let expected = [abi::EVENT_POWER, abi::EVENT_POWER, abi::EVENT_CLIENT_DETACH, abi::EVENT_POWER, abi::EVENT_POWER];
    assert_eq!(*answers.lock().unwrap(), expected.map(|kind| (kind, Ok(()))), "each time the device answered");
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-17
#[test]
fn migration_leaves_low_power_before_it_leaves_running() {
    let wakeup = EventFd::new().unwrap();
    let migrations: [fn(&MediatedDevice); 5] = [
        |device| device.set_state(Stop, soon()).unwrap(),
        |device| device.set_state(PreCopy, soon()).unwrap(),
        |device| drop(device.match_data().unwrap()),
        |device| _ = device.start_tracking().unwrap(),
        |device| _ = device.remaining().unwrap(),
    ];
    for migrate in migrations {
        for with_wakeup in [false, true] {
            let sim = stateful();
            let device = plain(sim.clone());
            device.dma_map(map(0, 4, 0)).unwrap();
            device.region_write(0, regs::PATTERN, &7_u32.to_le_bytes()).unwrap();
            device.low_power_entry(with_wakeup.then(|| wakeup.as_fd())).unwrap();
            assert!(is_suspended(&device));
            migrate(&device);
            assert_eq!((device.entered(), is_suspended(&device)), (None, false));
            assert_eq!(wakeup.read(), Ok(u64::from(with_wakeup)));
            assert_eq!(sim.accesses_while_suspended(), 0);
        }
    }
    // The state that it is in asks nothing of it.
    let device = plain(stateful());
    device.low_power_entry(None).unwrap();
    device.set_state(Running, soon()).unwrap();
    assert!(is_suspended(&device));
}

/// spec: POWER-17
#[test]
fn guest_memory_that_comes_and_goes_finds_the_device_awake() {
    let sim = stateful();
    let device = plain(sim.clone());
    device.low_power_entry(None).unwrap();
    device.dma_map(map(0, 4, 0)).unwrap();
    assert_eq!(device.entered(), None);
    device.low_power_entry(None).unwrap();
    device.dma_unmap(0, 4 * PAGE).unwrap();
    assert_eq!(device.entered(), None);
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-18
#[test]
fn a_reset_ends_low_power_first() {
    let wakeup = EventFd::new().unwrap();
    for with_wakeup in [false, true] {
        let sim = stateful();
        let device = plain(sim.clone());
        device.region_write(0, regs::PATTERN, &7_u32.to_le_bytes()).unwrap();
        device.low_power_entry(with_wakeup.then(|| wakeup.as_fd())).unwrap();
        device.reset().unwrap();
        assert_eq!(wakeup.read(), Ok(u64::from(with_wakeup)));
        assert_eq!((device.entered(), device.state()), (None, DeviceState::Running));
        assert_eq!(read(&device, 0, regs::PATTERN), Ok(0), "it was reset");
        assert_eq!(sim.accesses_while_suspended(), 0);
    }
}

/// spec: POWER-19
#[test]
fn a_device_that_is_being_migrated_does_not_go_to_sleep() {
    let device = plain(stateful());
    for state in [PreCopy, Stop, Resuming] {
        device.set_state(state, soon()).unwrap();
        assert_eq!(errno(device.low_power_entry(None)), Errno::BUSY, "{state}");
    }
    device.set_state(Stop, soon()).unwrap_err();
    device.reset().unwrap();
    device.start_tracking().unwrap();
    assert_eq!(errno(device.low_power_entry(None)), Errno::BUSY);
    device.stop_tracking();
    device.low_power_entry(None).unwrap();
}

/// spec: POWER-20
#[test]
fn the_plugin_is_told_while_the_device_answers() {
    let sim = edu(Sleep::D3Hot);
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    let device = scripted(sim.clone(), Limits::default(), |script| {
        script.event = Box::new(move |calls, event| {
            let mut word = [0; 4];
            let answered = calls.region_read(0, ID, &mut word);
            heard.lock().unwrap().push((event.kind, event.args[0], answered));
            // Its answer refuses nothing.
            Err(Errno::PERM)
        });
    });
    device.low_power_entry(None).unwrap();
    assert_eq!(read(&device, 0, ID), Err(Errno::IO));
    device.low_power_exit().unwrap();
    sim.enable_vfs(1);
    assert_eq!(errno(device.low_power_entry(None)), Errno::BUSY);
    let power = |entering| (abi::EVENT_POWER, entering, Ok(()));
    assert_eq!(*told.lock().unwrap(), [power(1), power(0), power(1), power(0)]);
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-21
#[test]
fn what_hooks_asked_for_is_done_before_and_timers_wait() {
    let sim = stateful();
    let fired = Arc::new(AtomicU64::new(0));
    let (counted, outer) = (fired.clone(), sim.clone());
    let device = scripted(sim.clone(), Limits::default(), |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.read = Box::new(|calls, _, _, _| {
            calls.timer_arm(1, 1_000_000).unwrap();
            Verdict::Handled
        });
        script.event = Box::new(move |_, event| {
            if event.kind == abi::EVENT_TIMER {
                assert!(!outer.power().unwrap().suspended);
                counted.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
    });
    device.region_write(0, regs::PATTERN, &7_u32.to_le_bytes()).unwrap();
    read(&device, 0, 0).unwrap();
    let before = fired.load(Ordering::SeqCst);
    // As from a thread of the plug-in's own: nobody who leaves the gate has looked yet.
    device.host_calls().request(Request::Reset).unwrap();
    let wakeup = EventFd::new().unwrap();
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    let asleep = fired.load(Ordering::SeqCst);
    thread::sleep(Duration::from_millis(20)); // longer than the timer's time
    assert!(is_suspended(&device), "neither a request nor a timer wakes it");
    assert_eq!(fired.load(Ordering::SeqCst), asleep);
    device.low_power_exit().unwrap();
    let until = soon();
    while fired.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < until, "the timer fires once the device is awake ({before} before)");
        thread::yield_now();
    }
    assert_eq!(read(&device, 0, regs::PATTERN), Ok(0), "the reset came before the sleep");
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// spec: POWER-22
#[test]
fn a_device_that_does_not_resume_stays_refused_until_it_does() {
    let faults = FaultPlan::none();
    let options = EduOptions { faults: faults.clone(), ..EduOptions::default() };
    let sim = Edu::new(options).unwrap();
    let device = plain(sim.clone());
    let wakeup = EventFd::new().unwrap();
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    faults.add_next(Fault::Errno(Errno::IO));
    assert_eq!(errno(device.low_power_exit()), Errno::IO);
    assert_eq!(device.closed(), Some(Reason::Suspended));
    faults.add_next(Fault::Errno(Errno::IO));
    assert_eq!(read(&device, 0, ID), Err(Errno::IO));
    assert_eq!(wakeup.read(), Ok(0));
    assert_eq!((read(&device, 0, ID), wakeup.read()), (Ok(0x0100_00ed), Ok(1)));
    // One that is gone is gone.
    device.low_power_entry(None).unwrap();
    faults.add_next(Fault::Lose);
    assert_eq!(errno(device.low_power_exit()), Errno::NODEV);
    assert_eq!(device.closed(), Some(Reason::Failed));
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// Everything that may be asked of a device at once, and each of it may wake it.
///
/// spec: POWER-11
#[test]
fn whatever_else_is_done_meanwhile_nothing_reaches_a_suspended_device() {
    let sim = stateful();
    let device = plain(sim.clone());
    device.dma_map(map(0, 4, 0)).unwrap();
    let mapping = device.region_map(2, PAGE, PAGE).unwrap();
    let done = AtomicBool::new(false);
    let entries = AtomicU64::new(0);
    let tolerable =
        |errno: Errno| assert!([Errno::IO, Errno::BUSY, Errno::AGAIN, Errno::INVAL].contains(&errno), "{errno}");
    let wakeup = EventFd::new().unwrap();
    let work: [Box<dyn Fn(u64) + Sync>; 7] = [
        Box::new(|_| _ = read(&device, 0, ID).map_err(tolerable)),
        Box::new(|_| _ = mapping.load_u32(&device, 0).map_err(|error| tolerable(error.errno()))),
        Box::new(|round| {
            let command = if round % 2 == 0 { [0, 0] } else { [6, 0] };
            let _ = device.region_write(CONFIG, COMMAND, &command).map_err(|error| tolerable(error.errno()));
        }),
        Box::new(|round| {
            let entered = device.low_power_entry((round % 2 == 0).then(|| wakeup.as_fd()));
            entries.fetch_add(u64::from(entered.is_ok()), Ordering::Relaxed);
            let _ = entered.map_err(|error| tolerable(error.errno()));
        }),
        Box::new(|round| match round % 8 {
            0 => device.reset().unwrap(),
            1 => device.low_power_exit().unwrap(),
            _ => thread::yield_now(),
        }),
        Box::new(|round| {
            let target = [PreCopy, Stop, Running, Running, Running, Running][(round % 6) as usize];
            // A reset in between may leave no path.
            let _ = device.set_state(target, soon()).map_err(|error| tolerable(error.errno));
        }),
        Box::new(|round| match round % 2 {
            0 => device.dma_unmap(0, 4 * PAGE).unwrap(),
            _ => device.dma_map(map(0, 4, 0)).unwrap(),
        }),
    ];
    thread::scope(|scope| {
        for work in &work {
            let done = &done;
            scope.spawn(move || {
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    work(round);
                    round += 1;
                }
            });
        }
        let until = soon();
        while entries.load(Ordering::Relaxed) < 200 && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(entries.load(Ordering::Relaxed) >= 200, "{entries:?} entries");
    assert_ne!(device.closed(), Some(Reason::Failed));
    assert_eq!(sim.accesses_while_suspended(), 0);
    device.low_power_exit().unwrap();
    device.reset().unwrap();
    device.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
    assert_eq!(read(&device, 0, ID), Ok(regs::ID_VALUE));
}
