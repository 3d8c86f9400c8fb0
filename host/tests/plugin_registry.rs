//! The registry with real libraries: who gets a device, who is counted, and when a plug-in may go.

mod support;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use support::*;
use vfio_mediate::plugin::{Limits, OpenError, PluginState, RegisterError, Registry, UnregisterError, Verdict};

fn states(registry: &Registry) -> Vec<(String, PluginState, usize)> {
    registry.list().into_iter().map(|info| (info.version, info.state, info.devices.len())).collect()
}

/// RFC: a mediator that declined made the open fail, and was counted all the same.
///
/// spec: REG-4
#[test]
fn rfc_defect_1_declining_is_not_failing_and_is_not_counted() {
    let (registry, id) = with_plugin(scripted("decliner", &[]), ONE);
    let script = Script::declining();
    for _ in 0..3 {
        assert!(open(&registry, "device", script).unwrap().is_none());
    }
    assert_eq!((script.probes(), script.opens()), (3, 0));
    assert_eq!(states(&registry), [("1.0.0".into(), PluginState::Published, 0)]);
    registry.unregister(id, Instant::now()).unwrap();
    assert_eq!(script.retires(), 1);
}

/// RFC: counts were never dropped on release, and unregistration dropped somebody else's.
///
/// spec: REG-7
#[test]
fn rfc_defect_2_references_balance_over_a_hundred_thousand_opens() {
    let (registry, id) = with_plugin(scripted("balance", &[]), ONE);
    let script = Script::new();
    for round in 0..100_000 {
        let device = opened(&registry, "device", script);
        if round % 10_000 == 0 {
            assert_eq!(states(&registry), [("1.0.0".into(), PluginState::Published, 1)]);
        }
        drop(device);
    }
    assert_eq!((script.opens(), script.closes()), (100_000, 100_000));
    assert_eq!(states(&registry), [("1.0.0".into(), PluginState::Published, 0)]);
    registry.unregister(id, Instant::now()).unwrap();
    assert_eq!((script.retires(), script.after_retire()), (1, 0));
}

/// RFC: the list's lock was held across the callback, so that a callback that came back deadlocked.
///
/// spec: REG-10
#[test]
fn rfc_defect_3_no_lock_is_held_while_a_plugin_runs() {
    let (registry, id) = with_plugin(scripted("reentrant", &[]), MANY);
    let script = Script::new();
    script.close_gate();
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| opened(&registry, "slow", script));
        script.await_inside();
        // Inside the plug-in's `open`: everything else goes on.
        assert_eq!(registry.list()[0].devices, ["slow"]);
        let other = registry.register(load(scripted("reentrant-other", &[])), ONE).unwrap();
        registry.unregister(other, soon()).unwrap();
        let busy = registry.unregister(id, Instant::now()).unwrap_err();
        assert!(matches!(&busy, UnregisterError::Busy { holders, .. } if holders == &["slow"]), "{busy}");
        script.open_gate();
        // The last reference goes inside a `close`, which retires the plug-in there.
        drop(opening.join().unwrap());
    });
    assert_eq!((script.closes(), script.retires(), script.after_retire()), (1, 1, 0));
    assert!(registry.list().is_empty());
}

/// RFC: a handle was validated, the lock dropped, then the handle used. Here what was looked up is held.
///
/// spec: REG-8 REG-9
#[test]
fn rfc_defect_4_a_plugin_stays_while_a_hook_sleeps_and_runs_nothing_afterwards() {
    let (registry, id) = with_plugin(scripted("sleeper", &[]), MANY);
    let script = Script::new();
    let device = opened(&registry, "0000:01:00.0", script);
    script.close_gate();
    std::thread::scope(|scope| {
        let hook = scope.spawn(|| {
            let verdict = device.read(0, FRAME, 0, &mut [0; 4]);
            drop(device);
            verdict
        });
        script.await_inside();
        let start = Instant::now();
        let busy = registry.unregister(id, start + Duration::from_millis(20)).unwrap_err();
        assert!(start.elapsed() >= Duration::from_millis(20), "the deadline was not waited for");
        assert_eq!((busy.errno(), script.retires()), (Errno::BUSY, 0));
        assert_eq!(busy.to_string(), "plug-in sleeper is still in use by 0000:01:00.0");
        assert_eq!(states(&registry), [("1.0.0".into(), PluginState::Draining, 1)]);
        let late = open(&registry, "late", script).unwrap_err();
        assert!(matches!(late, OpenError::Withdrawn { .. }) && late.errno() == Errno::NODEV, "{late}");
        script.open_gate();
        registry.unregister(id, soon()).unwrap();
        hook.join().unwrap();
    });
    assert_eq!((script.closes(), script.retires(), script.after_retire()), (1, 1, 0));
    registry.unregister(id, Instant::now()).unwrap();
    assert!(matches!(Registry::new().unregister(id, soon()), Err(UnregisterError::Unknown)));
    assert!(open(&registry, "later", script).unwrap().is_none(), "nobody is left: plain passthrough");
}

/// spec: REG-2
#[test]
fn the_first_of_two_plugins_in_the_operators_order_has_the_device() {
    let registry = Registry::new();
    for name in ["first-of-two", "second-of-two"] {
        registry.register(load(scripted(name, &[])), MANY).unwrap();
    }
    let script = Script::new();
    let device = opened(&registry, "device", script);
    assert_eq!((device.plugin().name.as_str(), script.probes()), ("first-of-two", 1));
}

/// Collects what this thread logs.
#[derive(Debug, Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn logged(run: impl FnOnce()) -> Vec<String> {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, run);
    let bytes = lines.0.lock().unwrap();
    String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()
}

/// spec: REG-2 LOAD-8
#[test]
fn claims_declines_and_other_matches_are_logged_once_per_open_and_nothing_by_accesses() {
    let registry = Registry::new();
    let script = Script::new();
    let lines = logged(|| {
        for name in ["log-claims", "log-matches"] {
            registry.register(load(scripted(name, &["FLAGS=VFIO_MEDIATE_ENTRY_PANIC_ABORTS"])), MANY).unwrap();
        }
    });
    assert_eq!(
        lines.iter().filter(|line| line.contains("WARN") && line.contains("panic=abort")).count(),
        2,
        "{lines:?}"
    );
    let lines = logged(|| {
        let device = opened(&registry, "device", script);
        for _ in 0..10 {
            assert_eq!(device.read(0, FRAME, 0, &mut [0; 4]), Verdict::Handled);
        }
    });
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("log-claims") && lines[0].contains("also_matching=[\"log-matches\"]"), "{lines:?}");
    let lines = logged(|| assert!(open(&registry, "device", Script::declining()).unwrap().is_none()));
    assert_eq!(lines.iter().filter(|line| line.contains("declines")).count(), 2, "{lines:?}");
}

/// spec: REG-4
#[test]
fn after_a_decliner_the_next_is_asked() {
    let registry = Registry::new();
    let declining = registry.register(load(scripted("declines", &["MATCH_DEVICE=2"])), MANY).unwrap();
    registry.register(load(scripted("claims", &[])), MANY).unwrap();
    let script = Script::new();
    let device = opened(&registry, "device", script);
    assert_eq!(device.plugin().name, "claims");
    assert_eq!(script.probes(), 1, "a plug-in whose list does not have the device is not asked");
    registry.unregister(declining, Instant::now()).unwrap();
}

/// spec: REG-5
#[test]
fn a_failing_probe_fails_the_open_and_counts_nothing() {
    let registry = Registry::new();
    for name in ["prober", "never-asked"] {
        registry.register(load(scripted(name, &[])), ONE).unwrap();
    }
    let script = Script::new();
    for (answer, errno) in
        [(-19, Errno::NODEV), (-4095, Errno::from_raw_os_error(4095)), (7, Errno::PROTO), (i32::MIN, Errno::PROTO)]
    {
        script.probe_answer.store(answer, Ordering::SeqCst);
        let error = open(&registry, "device", script).unwrap_err();
        assert!(matches!(&error, OpenError::Probe { plugin, .. } if plugin == "prober"), "{error}");
        assert_eq!(error.errno(), errno);
    }
    assert_eq!((script.probes(), script.opens()), (4, 0));
    assert!(registry.list().iter().all(|info| info.devices.is_empty()));
}

/// spec: REG-6
#[test]
fn an_instance_is_refunded_by_every_way_in_which_an_open_fails() {
    let (registry, _) = with_plugin(scripted("refunds", &[]), ONE);
    let script = Script::new();
    for answer in [-12, 9, i32::MIN] {
        script.open_answer.store(answer, Ordering::SeqCst);
        let error = open(&registry, "device", script).unwrap_err();
        assert!(matches!(error, OpenError::Open { .. }), "{error}");
        assert_eq!(script.closes(), 0, "what was not opened is not closed");
    }
    script.open_answer.store(0, Ordering::SeqCst);
    script.spoiled.store(1, Ordering::SeqCst);
    let error = open(&registry, "device", script).unwrap_err();
    assert!(matches!(error, OpenError::Malformed { .. }), "{error}");
    assert_eq!(script.closes(), 1, "what was opened and is no good is closed");
    script.spoiled.store(0, Ordering::SeqCst);
    drop(opened(&registry, "device", script));
}

/// spec: REG-6
#[test]
fn the_limit_counts_devices_and_neither_probes_nor_declined_devices() {
    let limits = Limits { devices_max: 2 };
    let (registry, _) = with_plugin(scripted("limited", &[]), limits);
    let (script, declined) = (Script::new(), Script::declining());
    let devices = [opened(&registry, "one", script), opened(&registry, "two", script)];
    assert!(open(&registry, "not mine", declined).unwrap().is_none(), "at its limit it still declines");
    let error = open(&registry, "three", script).unwrap_err();
    assert!(matches!(error, OpenError::TooMany { limit: 2, .. }) && error.errno() == Errno::USERS, "{error}");
    assert_eq!(script.opens(), 2);
    drop(devices);
    drop(opened(&registry, "three", script));
}

/// spec: REG-3
#[test]
fn a_name_and_version_is_registered_once_and_again_after_it_has_gone() {
    let path = scripted("once", &[]);
    let (registry, id) = with_plugin(&path, ONE);
    let error = registry.register(load(&path), ONE).unwrap_err();
    assert!(matches!(error, RegisterError::Duplicate { .. }) && error.errno() == Errno::EXIST, "{error}");
    let script = Script::new();
    let device = opened(&registry, "device", script);
    registry.unregister(id, Instant::now()).unwrap_err();
    registry.register(load(&path), ONE).unwrap_err();
    drop(device);
    assert_eq!(script.retires(), 1, "it went with its last device, with nobody waiting");
    assert!(registry.list().is_empty(), "what has retired is not listed");
    let again = registry.register(load(&path), ONE).unwrap();
    assert_ne!(again, id);
    drop(opened(&registry, "device", script));
    assert_eq!(script.after_retire(), 0, "a file loaded again is a library of its own");
}

/// spec: REG-12
#[test]
fn the_next_version_loads_beside_the_old_one_and_takes_over_when_that_is_unregistered() {
    let old_version = scripted("upgrade", &[]);
    let (registry, old) = with_plugin(&old_version, MANY);
    let script = Script::new();
    let kept = opened(&registry, "kept", script);
    let newer = compile("upgrade-2.so", "scripted.c", &["NAME=\"upgrade\"", "VERSION=\"2.0.0\""], &["-shared"]);
    registry.register(load(newer), MANY).unwrap();
    assert_eq!(kept.plugin().version, "1.0.0", "what is open stays where it is");
    assert_eq!(opened(&registry, "between", script).plugin().version, "1.0.0", "the older one is first in order");
    let busy = registry.unregister(old, Instant::now()).unwrap_err();
    assert_eq!(busy.errno(), Errno::BUSY);
    let moved = opened(&registry, "moved", script);
    assert_eq!(moved.plugin().version, "2.0.0");
    assert_eq!(kept.read(0, FRAME, 0, &mut [0; 1]), Verdict::Handled, "the old one still serves");
    drop(kept);
    registry.unregister(old, Instant::now()).unwrap();
    assert_eq!(states(&registry), [("2.0.0".into(), PluginState::Published, 1)]);
}

/// spec: REG-12
#[test]
fn a_plugin_that_is_registered_later_affects_only_later_opens() {
    let registry = Registry::new();
    let script = Script::new();
    assert!(open(&registry, "early", script).unwrap().is_none());
    registry.register(load(scripted("later", &[])), MANY).unwrap();
    assert_eq!((script.probes(), script.opens()), (0, 0));
    drop(opened(&registry, "late", script));
}

/// spec: REG-1
#[test]
fn a_device_that_a_plugin_in_registration_matches_is_to_be_tried_again() {
    let fifo = folder().join("init-fifo");
    let _ = std::fs::remove_file(&fifo);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let registry = Registry::new();
    let library = load(scripted("slow-init", &[&format!("INIT_FIFO=\"{}\"", fifo.display()), "MATCH_DEVICE=1"]));
    let script = Script::new();
    std::thread::scope(|scope| {
        let registering = scope.spawn(|| registry.register(library, ONE));
        // Opens once `init` has opened its end.
        let other_end = std::fs::File::options().write(true).open(&fifo).unwrap();
        assert!(registry.list().is_empty(), "not before init is done");
        let error = open(&registry, "device", script).unwrap_err();
        assert!(matches!(error, OpenError::Registering { .. }) && error.errno() == Errno::AGAIN, "{error}");
        registry.register(load(scripted("quick-init", &[])), ONE).unwrap();
        assert_eq!(opened(&registry, "device", script).plugin().name, "quick-init", "somebody else claims it");
        let shutdown = registry.shutdown(Instant::now()).unwrap_err();
        assert_eq!(shutdown.to_string(), "plug-in slow-init is still in use by its own init");
        drop(other_end);
        let refused = registering.join().unwrap().unwrap_err();
        assert!(matches!(refused, RegisterError::ShuttingDown) && refused.errno() == Errno::NODEV, "{refused}");
    });
    registry.shutdown(Instant::now()).unwrap();
}

/// spec: REG-13
#[test]
fn a_plugin_whose_init_fails_is_not_registered_and_its_name_is_free() {
    let registry = Registry::new();
    for (name, answer, errno) in [("sulking", "-12", Errno::NOMEM), ("confused", "1", Errno::PROTO)] {
        let path = scripted(name, &[&format!("INIT_ANSWER={answer}")]);
        for _ in 0..2 {
            let error = registry.register(load(&path), ONE).unwrap_err();
            assert!(matches!(error, RegisterError::Init { .. }) && error.errno() == errno, "{error}");
        }
    }
    assert!(registry.list().is_empty());
}

/// spec: REG-11
#[test]
fn a_shutdown_refuses_everything_says_who_is_left_and_ends_when_that_is_closed() {
    let (registry, _) = with_plugin(scripted("staying", &[]), MANY);
    registry.register(load(scripted("leaving", &["MATCH_DEVICE=7"])), MANY).unwrap();
    let script = Script::new();
    let device = opened(&registry, "0000:02:00.0", script);
    let busy = registry.shutdown(Instant::now()).unwrap_err();
    assert_eq!(busy.to_string(), "plug-in staying is still in use by 0000:02:00.0");
    assert_eq!(registry.list().len(), 1, "who could go has gone");
    let error = open(&registry, "late", script).unwrap_err();
    assert!(matches!(error, OpenError::ShuttingDown) && error.errno() == Errno::NODEV);
    let error = registry.register(load(scripted("after-shutdown", &[])), ONE).unwrap_err();
    assert!(matches!(error, RegisterError::ShuttingDown));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| registry.shutdown(soon()));
        drop(device);
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(script.retires(), 1);
}

/// spec: REG-9
#[test]
fn two_unregistrations_at_once_retire_once_and_both_end() {
    let (registry, id) = with_plugin(scripted("twice", &[]), MANY);
    let script = Script::new();
    let device = opened(&registry, "device", script);
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| registry.unregister(id, soon()))).collect();
        eventually(|| registry.list().iter().all(|info| info.state == PluginState::Draining));
        drop(device);
        waiting.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    });
    assert_eq!((script.retires(), script.after_retire()), (1, 0));
    drop(Arc::clone(&registry));
}
