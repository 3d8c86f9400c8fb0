//! Registrations, opens, accesses, unregistrations and shutdowns against each other: only documented answers, balanced
//! counts, and nothing that runs after it was retired.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use rustix::io::Errno;
use support::*;
use vfio_mediate::plugin::{Limits, OpenError, RegisterError, Registry, UnregisterError, Verdict};

/// What an open may answer while plug-ins come and go.
fn check_open(error: &OpenError) {
    let expected = match error {
        OpenError::Registering { .. } => Errno::AGAIN,
        OpenError::Withdrawn { .. } | OpenError::ShuttingDown => Errno::NODEV,
        OpenError::TooMany { .. } => Errno::USERS,
        other => panic!("not in this race: {other:?}"),
    };
    assert_eq!(error.errno(), expected);
}

/// Opens and uses devices until told to stop; how many it got.
fn use_devices(registry: &Registry, script: &'static Script, stop: &AtomicBool) -> u32 {
    let mut got = 0;
    while !stop.load(Ordering::Relaxed) {
        match open(registry, "device", script) {
            Ok(Some(device)) => {
                got += 1;
                assert_eq!(device.read(0, FRAME, 0, &mut [0; 4]), Verdict::Handled);
                assert_eq!(device.write(1, FRAME, 0x100, &mut [0; 4]), Verdict::Handled);
            }
            Ok(None) => {}
            Err(error) => check_open(&error),
        }
    }
    got
}

/// spec: REG-9 REG-10
#[test]
fn registrations_and_opens_race_and_every_count_balances() {
    let (registry, script, stop) = (Registry::new(), Script::new(), AtomicBool::new(false));
    let paths: Vec<_> = (0..2).map(|each| scripted(&format!("race-{each}"), &[])).collect();
    let retired = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let openers: Vec<_> = (0..3).map(|_| scope.spawn(|| use_devices(&registry, script, &stop))).collect();
        let registrars: Vec<_> = paths
            .iter()
            .map(|path| {
                let (registry, retired) = (&registry, &retired);
                scope.spawn(move || {
                    for round in 0..30 {
                        let id = registry.register(load(path), Limits { devices_max: 1 + round % 3 }).unwrap();
                        // Now and then too soon: it drains, and is waited for again.
                        let deadline = if round % 2 == 0 { Instant::now() } else { soon() };
                        match registry.unregister(id, deadline) {
                            Ok(()) => {}
                            Err(UnregisterError::Busy { .. }) => registry.unregister(id, soon()).unwrap(),
                            Err(error) => panic!("{error}"),
                        }
                        retired.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        registrars.into_iter().for_each(|thread| thread.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        let got: u32 = openers.into_iter().map(|thread| thread.join().unwrap()).sum();
        assert_eq!(script.opens(), got);
    });
    assert_eq!((script.opens(), script.after_retire()), (script.closes(), 0));
    assert!(
        script.retires() <= retired.load(Ordering::Relaxed),
        "one that nobody was probed by does not know the script"
    );
    assert!(registry.list().is_empty());
}

/// spec: REG-11
#[test]
fn a_shutdown_against_opens_and_registrations_leaves_nothing() {
    let path = scripted("shutdown-race", &[]);
    for _ in 0..15 {
        let (registry, script, stop) = (Registry::new(), Script::new(), AtomicBool::new(false));
        registry.register(load(&path), MANY).unwrap();
        std::thread::scope(|scope| {
            let openers: Vec<_> = (0..2).map(|_| scope.spawn(|| use_devices(&registry, script, &stop))).collect();
            let registering = scope.spawn(|| match registry.register(load(scripted("shutdown-late", &[])), ONE) {
                Ok(_) | Err(RegisterError::ShuttingDown) => {}
                Err(error) => panic!("{error}"),
            });
            registry.shutdown(soon()).unwrap();
            assert!(registry.list().is_empty());
            stop.store(true, Ordering::Relaxed);
            openers.into_iter().for_each(|thread| assert!(thread.join().is_ok()));
            registering.join().unwrap();
            assert!(registry.list().is_empty());
        });
        assert_eq!((script.opens(), script.after_retire()), (script.closes(), 0));
    }
}

/// spec: REG-6
#[test]
fn the_limit_holds_when_many_open_at_once() {
    let (registry, _) = with_plugin(scripted("crowded", &[]), Limits { devices_max: 3 });
    let script = Script::new();
    let (now_open, refused) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    match open(&registry, "device", script) {
                        Ok(Some(device)) => {
                            assert!(now_open.fetch_add(1, Ordering::SeqCst) < 3, "more than the limit");
                            now_open.fetch_sub(1, Ordering::SeqCst);
                            drop(device);
                        }
                        Ok(None) => panic!("nobody claimed it"),
                        Err(error) => {
                            assert!(matches!(error, OpenError::TooMany { .. }), "{error}");
                            refused.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                }
            });
        }
    });
    assert_eq!(script.opens() + refused.load(Ordering::SeqCst), 12_000);
    assert_eq!(script.opens(), script.closes());
    assert!(registry.list()[0].devices.is_empty());
    drop(Arc::clone(&registry));
}

/// Several threads want the same name at once, while devices are opened: one has it, the others are told that it is taken,
/// and after each round it is free again.
///
/// spec: REG-3 REG-9
#[test]
fn one_of_many_registrations_of_a_name_has_it_and_the_others_are_eexist() {
    let path = scripted("wanted", &[]);
    let (registry, script, stop) = (Registry::new(), Script::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| use_devices(&registry, script, &stop));
        for _ in 0..20 {
            let registering: Vec<_> = (0..3).map(|_| scope.spawn(|| registry.register(load(&path), ONE))).collect();
            let mut ids = Vec::new();
            for answer in registering.into_iter().map(|thread| thread.join().unwrap()) {
                match answer {
                    Ok(id) => ids.push(id),
                    Err(error) => assert_eq!(error.errno(), Errno::EXIST, "{error}"),
                }
            }
            assert_eq!(ids.len(), 1, "nobody unregistered in between");
            registry.unregister(ids[0], soon()).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(opener.join().unwrap(), script.opens());
    });
    assert_eq!((script.opens(), script.after_retire()), (script.closes(), 0));
    assert!(registry.list().is_empty());
}

/// Everything against everything: the same name by two threads, opens under a limit, unregistrations, and a shutdown.
///
/// spec: REG-3 REG-6 REG-8 REG-11
#[test]
fn all_at_once_gets_only_documented_answers_and_leaves_nothing() {
    let path = scripted("everything", &[]);
    for _ in 0..8 {
        let (registry, script, stop) = (Registry::new(), Script::new(), AtomicBool::new(false));
        let come_and_go = || {
            loop {
                match registry.register(load(&path), ONE) {
                    // Another thread may have been told to shut it down, or the same unregistration.
                    Ok(id) => registry.unregister(id, soon()).unwrap(),
                    Err(RegisterError::Duplicate { .. }) => std::thread::yield_now(),
                    Err(RegisterError::ShuttingDown) => break,
                    Err(error) => panic!("{error}"),
                }
            }
        };
        std::thread::scope(|scope| {
            let openers: Vec<_> = (0..2).map(|_| scope.spawn(|| use_devices(&registry, script, &stop))).collect();
            let registrars: Vec<_> = (0..2).map(|_| scope.spawn(come_and_go)).collect();
            eventually(|| script.closes() >= 3);
            registry.shutdown(soon()).unwrap();
            assert!(registry.list().is_empty());
            registrars.into_iter().for_each(|thread| thread.join().unwrap());
            stop.store(true, Ordering::Relaxed);
            openers.into_iter().for_each(|thread| _ = thread.join().unwrap());
        });
        assert_eq!((script.opens(), script.after_retire()), (script.closes(), 0));
        assert!(registry.list().is_empty());
    }
}
