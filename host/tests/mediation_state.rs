//! Migration states, match data, save and load of a mediated device.

mod mediation_support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::device::ErrorKind;
use vfio_mediate::mediation::mediator::ArcFailed;
use vfio_mediate::mediation::{MediatedDevice, MediationError};
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::DeviceState::{self, *};

const BUFFER: usize = 4096;

fn save_all(device: &MediatedDevice) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = vec![0; BUFFER];
    for _ in 0..10_000 {
        let saved = device.save(&mut buffer).unwrap();
        all.extend_from_slice(&buffer[..saved.bytes]);
        if saved.end {
            return all;
        }
    }
    panic!("the stream does not end");
}

fn with_plugin(device: &Arc<FakeDevice>, data: &[u8]) -> (Arc<MediatedDevice>, Arc<Mutex<Vec<u8>>>) {
    let loaded = Arc::new(Mutex::new(Vec::new()));
    let ours = loaded.clone();
    let mediated = open_script(device, |script| {
        script.migration =
            Some(ScriptMigration { data: Mutex::new(data.to_vec()), loaded: ours, ..Default::default() });
    })
    .unwrap();
    (mediated, loaded)
}

/// spec: STATE-2
#[test]
fn a_device_that_nobody_can_save_is_refused_with_the_reason() {
    let device = Arc::new(FakeDevice::new());
    let plain = open_plain(&device);
    let error = plain.migratable().unwrap_err();
    assert!(matches!(&error, MediationError::Unmigratable { .. }) && error.errno() == Errno::NOTTY, "{error}");
    let failed = plain.set_state(Stop, soon()).unwrap_err();
    assert_eq!((failed.errno, failed.actual), (Errno::NOTTY, Running));
    let silent = open_script(&device, |_| {}).unwrap();
    assert!(silent.migratable().unwrap_err().to_string().contains("script"));
}

/// spec: STATE-3
#[test]
fn the_path_is_walked_arc_by_arc_and_the_same_state_is_none() {
    let device = Arc::new(FakeDevice::new());
    let arcs = Arc::new(Mutex::new(Vec::new()));
    let ours = arcs.clone();
    let mediated = open_script(&device, |script| {
        script.migration = Some(ScriptMigration { arcs: ours, ..Default::default() });
    })
    .unwrap();
    mediated.set_state(Running, soon()).unwrap();
    assert!(arcs.lock().unwrap().is_empty());
    mediated.set_state(StopCopy, soon()).unwrap();
    assert_eq!(*arcs.lock().unwrap(), [(Running, RunningP2p), (RunningP2p, Stop), (Stop, StopCopy)]);
    assert_eq!(mediated.set_state(PreCopy, soon()).unwrap_err().errno, Errno::INVAL);
    assert_eq!(mediated.set_state(Error, soon()).unwrap_err().errno, Errno::INVAL);
}

/// spec: STATE-4
#[test]
fn a_stopped_device_answers_configuration_and_information_and_no_region() {
    let device = Arc::new(FakeDevice::new());
    let (mediated, _) = with_plugin(&device, b"");
    for (state, answers) in [(PreCopy, true), (PreCopyP2p, true), (StopCopy, false), (Stop, false), (Resuming, false)] {
        mediated.set_state(state, soon()).unwrap();
        assert_eq!(mediated.region_read(0, 0, &mut [0]).is_ok(), answers, "{state}");
        assert_eq!(mediated.region_write(0, 0, &[0]).is_ok(), answers, "{state}");
        mediated.region_read(CONFIG, 0, &mut [0; 4]).unwrap();
        mediated.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
        mediated.region_info(0).unwrap();
        assert_eq!(mediated.region_read(0, 0, &mut [0]).is_ok(), answers, "after COMMAND in {state}");
    }
    assert_eq!(mediated.region_read(0, 0, &mut [0]).unwrap_err().errno(), Errno::IO);
    mediated.reset().unwrap();
    mediated.region_read(0, 0, &mut [0]).unwrap();
}

/// spec: SAVED-1 STATE-5
#[test]
fn what_one_device_saves_another_loads_host_part_plug_in_and_native() {
    let source = Arc::new(FakeDevice { native: Some(FakeNative::new(b"native state")), ..FakeDevice::new() });
    let (from, _) = with_plugin(&source, b"plug-in state");
    from.region_write(CONFIG, COMMAND, &[6, 4]).unwrap();
    from.region_write(CONFIG, 0x10, &[0x00, 0x00, 0xf0, 0xfe]).unwrap();
    let target = Arc::new(FakeDevice { native: Some(FakeNative::new(b"")), ..FakeDevice::new() });
    let (to, loaded) = with_plugin(&target, b"");
    to.check_match(&from.match_data().unwrap()).unwrap();

    from.set_state(PreCopy, soon()).unwrap();
    let remaining = from.remaining().unwrap();
    assert_eq!((remaining.initial_bytes, remaining.dirty_bytes, remaining.stop_copy_bytes), (11, 22, u64::MAX));
    let mut stream = save_all(&from);
    // It changes while it runs: the last host part holds.
    from.region_write(CONFIG, 0x3c, &[0x0b]).unwrap();
    from.set_state(StopCopy, soon()).unwrap();
    stream.extend(save_all(&from));
    assert_eq!(from.save(&mut [0; BUFFER]).unwrap().bytes, 0);

    to.set_state(Resuming, soon()).unwrap();
    for piece in stream.chunks(7) {
        to.load(piece).unwrap();
    }
    to.set_state(Running, soon()).unwrap();
    assert_eq!(*loaded.lock().unwrap(), b"plug-in state");
    assert_eq!(*target.native.as_ref().unwrap().loaded.lock().unwrap(), b"native state");
    let mut config = [0; 0x40];
    to.region_read(CONFIG, 0, &mut config).unwrap();
    assert_eq!((target.command(), config[0x3c], &config[0x10..0x14]), (0x0406, 0x0b, &[0, 0, 0xf0, 0xfe][..]));
    to.region_read(0, 0, &mut [0]).unwrap();
}

/// spec: STATE-6
#[test]
fn short_and_foreign_streams_fail_the_arc_and_leave_the_device_resuming() {
    let device = Arc::new(FakeDevice::new());
    let (from, _) = with_plugin(&device, b"state");
    from.set_state(StopCopy, soon()).unwrap();
    let stream = save_all(&from);
    let target = Arc::new(FakeDevice::new());
    let (to, _) = with_plugin(&target, b"");
    for cut in [0, 1, 20, stream.len() - 1] {
        to.set_state(Resuming, soon()).unwrap();
        to.load(&stream[..cut]).unwrap();
        let error = to.set_state(Stop, soon()).unwrap_err();
        assert_eq!((error.errno, error.actual), (Errno::BADMSG, Resuming), "cut at {cut}");
        to.reset().unwrap();
    }
    // A native part where nobody loads one.
    let native = Arc::new(FakeDevice { native: Some(FakeNative::new(b"x")), ..FakeDevice::new() });
    let foreign = open_plain(&native);
    foreign.set_state(StopCopy, soon()).unwrap();
    to.set_state(Resuming, soon()).unwrap();
    assert_eq!(to.load(&save_all(&foreign)).unwrap_err().errno(), Errno::BADMSG);
    assert_eq!(to.load(&stream).unwrap_err().errno(), Errno::BADMSG);
    assert!(matches!(from.load(&stream).unwrap_err(), MediationError::WrongState { .. }));
    to.reset().unwrap();
    assert!(matches!(to.save(&mut [0; BUFFER]).unwrap_err(), MediationError::WrongState { .. }));
    assert_eq!(to.save(&mut [0; 16]).unwrap_err().errno(), Errno::INVAL);
}

/// spec: STATE-7
#[test]
fn another_device_is_refused_with_the_field_that_differs() {
    let device = Arc::new(FakeDevice::new());
    let (mediated, _) = with_plugin(&device, b"");
    let ours = mediated.match_data().unwrap();
    mediated.check_match(&ours).unwrap();
    let mut other = FakeDevice::new();
    other.identity.device_id = 0x1111;
    let (other, _) = with_plugin(&Arc::new(other), b"");
    let refusal = mediated.check_match(&other.match_data().unwrap()).unwrap_err();
    assert!(refusal.reason.contains("device is 0x1111"), "{refusal}");
    let native = open_plain(&Arc::new(FakeDevice { native: Some(FakeNative::new(b"")), ..FakeDevice::new() }));
    assert!(mediated.check_match(&native.match_data().unwrap()).unwrap_err().reason.contains("way of migrating"));
    for cut in 0..ours.len() {
        mediated.check_match(&ours[..cut]).unwrap_err();
    }
    assert!(open_plain(&device).check_match(&ours).is_err());
    let refusing = open_script(&device, |script| {
        script.migration = Some(ScriptMigration { refuse: Some("old firmware".to_owned()), ..Default::default() });
    });
    assert_eq!(refusing.unwrap().check_match(&ours).unwrap_err().reason, "old firmware");
}

/// spec: STATE-1
#[test]
fn a_failed_native_arc_reports_where_the_device_says_it_is() {
    let device = Arc::new(FakeDevice { native: Some(FakeNative::new(b"")), ..FakeDevice::new() });
    let mediated = open_plain(&device);
    let native = device.native.as_ref().unwrap();
    *native.fail_to.lock().unwrap() = Some((Stop, RunningP2p));
    let error = mediated.set_state(StopCopy, soon()).unwrap_err();
    assert_eq!((error.errno, error.actual, mediated.state()), (Errno::IO, RunningP2p, RunningP2p));
    mediated.region_read(0, 0, &mut [0]).unwrap();
}

/// spec: STATE-8
#[test]
fn recovery_goes_back_or_resets_and_then_restores_command_and_interrupts() {
    let device = Arc::new(FakeDevice::new());
    let fail = Arc::new(Mutex::new(None));
    let ours = fail.clone();
    let mediated = open_script(&device, |script| {
        script.migration = Some(ScriptMigration { fail: ours, ..Default::default() });
    })
    .unwrap();
    mediated.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
    let (_read, client) = tell_tale();
    mediated.set_irqs(&set_fd(3, &[borrow(&client)])).unwrap();
    // It can still be brought back.
    *fail.lock().unwrap() = Some((Stop, ArcFailed { errno: Errno::IO, actual: RunningP2p }));
    mediated.set_state(StopCopy, soon()).unwrap_err();
    assert_eq!(mediated.recover(Running, soon()).unwrap(), Running);
    assert_eq!(device.resets.load(Ordering::SeqCst), 0);
    // It cannot.
    *fail.lock().unwrap() = Some((Stop, ArcFailed { errno: Errno::IO, actual: Error }));
    mediated.set_state(StopCopy, soon()).unwrap_err();
    device.config.lock().unwrap()[4] = 0;
    device.fds.lock().unwrap().clear();
    assert_eq!(mediated.recover(Running, soon()).unwrap(), Running);
    assert_eq!(device.resets.load(Ordering::SeqCst), 1);
    assert_eq!(device.command(), 6);
    assert!(device.fds.lock().unwrap().contains_key(&3));
    mediated.region_read(0, 0, &mut [0]).unwrap();
}

/// spec: STATE-9
#[test]
fn a_reset_during_a_transition_comes_after_it() {
    let device = Arc::new(FakeDevice::new());
    let owner: Arc<OnceLock<Weak<MediatedDevice>>> = Arc::default();
    let (ours, watched) = (owner.clone(), device.clone());
    let during = Arc::new(AtomicU64::new(u64::MAX));
    let seen = during.clone();
    let on_arc = move || {
        if let Some(mediated) = ours.get().and_then(Weak::upgrade) {
            // From another thread, while the arc is under way.
            std::thread::spawn(move || mediated.reset().unwrap()).join().unwrap();
            seen.store(watched.resets.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    };
    let mediated = open_script(&device, |script| {
        script.migration = Some(ScriptMigration { on_arc: Some(Box::new(on_arc)), ..Default::default() });
    })
    .unwrap();
    owner.set(Arc::downgrade(&mediated)).unwrap();
    mediated.set_state(PreCopy, soon()).unwrap();
    assert_eq!(during.load(Ordering::SeqCst), 0);
    assert_eq!(device.resets.load(Ordering::SeqCst), 1);
    assert_eq!(mediated.state(), DeviceState::Running);
}

#[test]
fn a_plug_in_may_refuse_a_reset_and_a_device_without_one_says_so() {
    let device = Arc::new(FakeDevice::new());
    let refusing = open_script(&device, |script| {
        script.event =
            Box::new(|_, event| if event.kind == abi::EVENT_RESET_PREPARE { Err(Errno::BUSY) } else { Ok(()) });
    })
    .unwrap();
    assert_eq!(refusing.reset().unwrap_err().errno(), Errno::BUSY);
    assert_eq!(device.resets.load(Ordering::SeqCst), 0);
    refusing.region_read(0, 0, &mut [0]).unwrap();
    drop(refusing);
    let plain = open_plain(&device);
    device.fail("reset", ErrorKind::Refused, Errno::NOTTY);
    assert_eq!(plain.reset().unwrap_err().errno(), Errno::NOTTY);
    plain.region_read(0, 0, &mut [0]).unwrap();
}
