//! In-process mappings against everything that takes the device away.
#![allow(unsafe_code)]

mod mediation_support;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mediation_support::*;
use rustix::io::Errno;
use vfio_mediate::device::sim::{Stateful, StatefulOptions};
use vfio_mediate::device::{Area, Device, ErrorKind, Identity, RegionCapability};
use vfio_mediate::mediation::mediator::Verdict;
use vfio_mediate::mediation::{Faults, MapOptions, MediatedDevice, RegionMap};
use vfio_mediate_sdk::state::DeviceState;

const SIGBUS: i32 = 7;
const CHILD: &str = "VFIO_MEDIATE_MAPS_CHILD";
/// The stateful model's memory, and where its mappable part begins.
const MEMORY: u32 = 2;
const MAPPABLE: u64 = PAGE;

fn toggle(mediated: &MediatedDevice, on: bool) {
    mediated.region_write(CONFIG, COMMAND, &[if on { 2 } else { 0 }, 0]).unwrap();
}

fn stateful() -> (Arc<Stateful>, Arc<MediatedDevice>) {
    let device = Stateful::new(StatefulOptions::default()).unwrap();
    let mediated = MediatedDevice::with_mediator(device.clone(), space(), Default::default(), |_| Ok(None)).unwrap();
    toggle(&mediated, true);
    (device, mediated)
}

fn errno<T: std::fmt::Debug>(result: Result<T, vfio_mediate::mediation::MediationError>) -> Errno {
    result.unwrap_err().errno()
}

/// One load by a raw pointer, as an embedder's own code makes it.
fn touch(map: &RegionMap) -> u32 {
    // SAFETY: the address is mapped as long as the map lives; what a revoked one does is what is tested.
    unsafe { AtomicU32::from_ptr(map.address() as *mut u32) }.load(Ordering::SeqCst)
}

fn block(at_most: Duration) -> MapOptions {
    MapOptions { faults: Faults::Block(at_most), ..MapOptions::default() }
}

/// The machine may give no userfaultfd to this user.
fn blocking_map(mediated: &MediatedDevice, index: u32, offset: u64) -> Option<Arc<RegionMap>> {
    match mediated.region_map_with(index, offset, PAGE, block(Duration::from_secs(60))) {
        Ok(map) => Some(map),
        Err(error) => {
            assert!(matches!(error.errno(), Errno::PERM | Errno::NOSYS), "{error}");
            None
        }
    }
}

/// Runs a test once more in a process of its own; how it died.
fn signal_of_child(test: &str) -> Option<i32> {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([test, "--exact", "--nocapture"]).env(CHILD, test).stdout(Stdio::null()).stderr(Stdio::null());
    child.status().unwrap().signal()
}

fn is_child(test: &str) -> bool {
    std::env::var_os(CHILD).is_some_and(|name| name == test)
}

/// What the device is asked to do finds no mapping, for each thing that takes it away; afterwards the mapping is back at
/// its place.
///
/// spec: MEMEN-1 MEMEN-4
#[test]
fn mappings_are_revoked_before_the_device_acts_and_put_back_afterwards() {
    type Act = fn(&MediatedDevice);
    let acts: [(&str, Act, Act); 4] = [
        ("config_write", |device| toggle(device, false), |device| toggle(device, true)),
        (
            "config_write",
            |device| device.region_write(CONFIG, 0x44, &[3, 0]).unwrap(),
            |device| device.region_write(CONFIG, 0x44, &[0, 0]).unwrap(),
        ),
        ("reset", |device| device.reset().unwrap(), |_| ()),
        (
            "arc",
            |device| device.set_state(DeviceState::Stop, soon()).unwrap(),
            |device| device.set_state(DeviceState::Running, soon()).unwrap(),
        ),
    ];
    for (step, act, undo) in acts {
        let arcs = Arc::new(Mutex::new(None::<Arc<RegionMap>>));
        let met = Arc::new(AtomicU64::new(0));
        let look = {
            let (arcs, met) = (arcs.clone(), met.clone());
            move || {
                if let Some(map) = &*arcs.lock().unwrap() {
                    met.fetch_add(1 + 100 * u64::from(map.is_live()), Ordering::SeqCst);
                }
            }
        };
        let device = Arc::new(FakeDevice::new());
        let on_arc = look.clone();
        let mediated = open_script(&device, |script| {
            let on_arc: Box<dyn Fn() + Send + Sync> = Box::new(on_arc);
            script.migration = Some(ScriptMigration { on_arc: Some(on_arc), ..ScriptMigration::default() });
        })
        .unwrap();
        let map = mediated.region_map(0, PAGE, PAGE).unwrap();
        map.store_u32(&mediated, 0, 0xabcd).unwrap();
        let address = map.address();
        *arcs.lock().unwrap() = Some(map.clone());
        let watcher = Watcher(Box::new(move |what| {
            if what == step {
                look()
            }
        }));
        device.watcher.set(watcher).unwrap();
        act(&mediated);
        // The way to STOP leads through RUNNING_P2P, where regions still answer.
        let expected = if step == "arc" { 101 + 1 } else { 1 };
        assert_eq!(met.load(Ordering::SeqCst), expected, "{step}: its last call meets no mapping");
        *arcs.lock().unwrap() = None;
        undo(&mediated);
        assert!(map.is_live());
        assert_eq!((map.address(), touch(&map), map.load_u32(&mediated, 0).unwrap()), (address, 0xabcd, 0xabcd));
    }
}

/// spec: MEMEN-1
#[test]
fn a_write_that_leaves_memory_enabled_revokes_nothing() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    let map = mediated.region_map(0, 0, PAGE).unwrap();
    let live = map.clone();
    let watcher = Watcher(Box::new(move |what| assert!(what != "config_write" || live.is_live())));
    device.watcher.set(watcher).unwrap();
    mediated.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
    mediated.region_write(CONFIG, 0x44, &[0, 1]).unwrap();
    assert!(map.is_live());
}

/// spec: MEMEN-1
#[test]
fn low_power_revokes_and_waking_up_restores() {
    let (_device, mediated) = stateful();
    let map = mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    map.store_u32(&mediated, 0, 7).unwrap();
    mediated.low_power_entry(None).unwrap();
    assert!(!map.is_live());
    assert_eq!(errno(map.load_u32(&mediated, 0)), Errno::IO);
    mediated.low_power_exit().unwrap();
    assert_eq!(map.load_u32(&mediated, 0).unwrap(), 7);
}

/// For a second: rw, checked accesses and information, in one thread.
///
/// spec: MEMEN-2
#[test]
fn a_second_of_disabled_memory_is_errors_at_once() {
    let (_device, mediated) = stateful();
    let map = mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    toggle(&mediated, false);
    let (begin, mut slowest, mut asked) = (Instant::now(), Duration::ZERO, 0u64);
    let mut data = [0; 4096];
    while begin.elapsed() < Duration::from_secs(1) {
        let asking = Instant::now();
        assert_eq!(errno(mediated.region_read(MEMORY, MAPPABLE, &mut data)), Errno::IO);
        assert_eq!(errno(mediated.region_write(MEMORY, MAPPABLE, &data)), Errno::IO);
        assert_eq!(errno(map.read(&mediated, 0, &mut data)), Errno::IO);
        assert_eq!(errno(map.store_u32(&mediated, 0, 1)), Errno::IO);
        assert_eq!(errno(mediated.region_map(MEMORY, MAPPABLE, PAGE)), Errno::IO);
        slowest = slowest.max(asking.elapsed());
        asked += 1;
    }
    // Five answers; the limit of a wait would be a second each.
    assert!(slowest < Duration::from_millis(500) && asked > 10, "{asked} times, {slowest:?} at worst");
    mediated.region_read(CONFIG, 0, &mut [0; 4]).unwrap();
}

/// spec: MEMEN-3
#[test]
fn a_raw_touch_while_memory_is_disabled_is_sigbus() {
    let test = "a_raw_touch_while_memory_is_disabled_is_sigbus";
    if !is_child(test) {
        return assert_eq!(signal_of_child(test), Some(SIGBUS));
    }
    let (_device, mediated) = stateful();
    let map = mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    touch(&map);
    toggle(&mediated, false);
    touch(&map);
}

/// spec: MEMEN-3 MEMEN-5
#[test]
fn a_raw_touch_after_the_device_was_closed_is_sigbus() {
    let test = "a_raw_touch_after_the_device_was_closed_is_sigbus";
    if !is_child(test) {
        return assert_eq!(signal_of_child(test), Some(SIGBUS));
    }
    let (_device, mediated) = stateful();
    let map = mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    touch(&map);
    drop(mediated);
    touch(&map);
}

/// spec: MEMEN-5
#[test]
fn a_mapping_ends_with_its_device_and_belongs_to_no_other() {
    let (_device, mediated) = stateful();
    let (_other_device, other) = stateful();
    let map = mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    assert_eq!(errno(map.load_u32(&other, 0)), Errno::INVAL);
    drop(mediated);
    assert!(!map.is_live());
    assert_eq!(errno(map.load_u32(&other, 0)), Errno::INVAL);
}

/// spec: MEMEN-6
#[test]
fn where_the_embedder_asked_for_it_a_touch_waits_until_memory_is_back() {
    let (_device, mediated) = stateful();
    let Some(map) = blocking_map(&mediated, MEMORY, MAPPABLE) else { return };
    map.store_u32(&mediated, 0, 1).unwrap();
    for round in 2..12 {
        toggle(&mediated, false);
        let (begun, seen) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                begun.store(true, Ordering::SeqCst);
                let value = touch(&map);
                seen.store(true, Ordering::SeqCst);
                assert_eq!(value, round - 1);
            });
            while !begun.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            for _ in 0..100 {
                thread::yield_now();
            }
            assert!(!seen.load(Ordering::SeqCst));
            // Checked accesses are errors all the same, at once.
            assert_eq!(errno(map.load_u32(&mediated, 0)), Errno::IO);
            toggle(&mediated, true);
        });
        map.store_u32(&mediated, 0, round).unwrap();
    }
}

/// spec: MEMEN-6
#[test]
fn a_wait_beyond_its_limit_is_sigbus() {
    let test = "a_wait_beyond_its_limit_is_sigbus";
    let (_device, mediated) = stateful();
    if !is_child(test) {
        if blocking_map(&mediated, MEMORY, MAPPABLE).is_some() {
            assert_eq!(signal_of_child(test), Some(SIGBUS));
        }
        return;
    }
    let map = mediated.region_map_with(MEMORY, MAPPABLE, PAGE, block(Duration::from_millis(10))).unwrap();
    toggle(&mediated, false);
    touch(&map);
}

fn claims(script: &mut Script) {
    // Page 2 in both maps, page 4 while tracking, page 6 normally.
    script.claims = vec![claim(0, 2 * PAGE, 4), claim(0, 4 * PAGE, 4), claim(0, 6 * PAGE, 4)];
    script.claims[1].normal = false;
    script.claims[2].tracking = false;
}

/// spec: MEMEN-7
#[test]
fn a_mapping_of_bytes_that_become_trapped_is_revoked_as_long_as_they_are() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, claims).unwrap();
    mediated.dma_map(map(0, 4, 0)).unwrap();
    let trapped = MapOptions { may_be_trapped: true, ..MapOptions::default() };
    let with = |page: u64| mediated.region_map_with(0, page * PAGE, PAGE, trapped);
    for page in [2, 6] {
        assert_eq!(errno(with(page)), Errno::NODEV, "trapped now");
    }
    for page in [2, 4, 6] {
        assert_eq!(errno(mediated.region_map(0, page * PAGE, PAGE)), Errno::NODEV, "trapped by either map");
    }
    let (while_normal, always) = (with(4).unwrap(), mediated.region_map(0, PAGE, PAGE).unwrap());
    mediated.start_tracking().unwrap();
    assert!(!while_normal.is_live() && always.is_live());
    assert_eq!(errno(while_normal.load_u32(&mediated, 0)), Errno::IO);
    let while_tracking = with(6).unwrap();
    // Being enabled again brings back what is not trapped.
    toggle(&mediated, false);
    assert!(![&while_normal, &while_tracking, &always].into_iter().any(|map| map.is_live()));
    toggle(&mediated, true);
    assert!(!while_normal.is_live() && while_tracking.is_live() && always.is_live());
    mediated.stop_tracking();
    assert!(while_normal.is_live() && !while_tracking.is_live() && always.is_live());
}

/// spec: MEMEN-4
#[test]
fn what_cannot_be_mapped_again_stays_an_error_until_it_can() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    let map = mediated.region_map(0, 0, PAGE).unwrap();
    toggle(&mediated, false);
    device.fail("region_map", ErrorKind::Failed, Errno::NOMEM);
    toggle(&mediated, true);
    mediated.region_read(0, 0, &mut [0]).unwrap();
    assert_eq!(errno(map.load_u32(&mediated, 0)), Errno::IO);
    device.heal();
    mediated.reset().unwrap();
    map.load_u32(&mediated, 0).unwrap();
}

#[test]
fn accesses_by_a_mapping_are_bounded_by_it() {
    let (_device, mediated) = stateful();
    let map = mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    assert_eq!((map.region(), map.area()), (MEMORY, Area { offset: MAPPABLE, length: PAGE }));
    map.write(&mediated, PAGE - 3, &[1, 2, 3]).unwrap();
    let mut data = [0; 3];
    mediated.region_read(MEMORY, MAPPABLE + PAGE - 3, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3]);
    for (offset, length) in [(PAGE - 2, 3), (PAGE, 1), (u64::MAX, 2)] {
        assert_eq!(errno(map.read(&mediated, offset, &mut vec![0; length])), Errno::INVAL);
        assert_eq!(errno(map.write(&mediated, offset, &vec![0; length])), Errno::INVAL);
    }
    assert_eq!(errno(map.load_u32(&mediated, 2)), Errno::INVAL);
}

/// spec: MEMEN-10
#[test]
fn a_hook_cannot_disable_memory_under_a_live_mapping() {
    let device = Arc::new(FakeDevice::new());
    let answers = Arc::new(Mutex::new(Vec::new()));
    let heard = answers.clone();
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.write = Box::new(move |calls, _, _, _| {
            heard.lock().unwrap().push(calls.region_write(CONFIG, COMMAND, &[0, 0]));
            Verdict::Handled
        });
    })
    .unwrap();
    let map = mediated.region_map(0, PAGE, PAGE).unwrap();
    mediated.region_write(0, 0, &[0]).unwrap();
    assert_eq!((device.command() & 2, map.is_live()), (2, true));
    map.load_u32(&mediated, 0).unwrap();
    drop(map);
    mediated.region_write(0, 0, &[0]).unwrap();
    assert_eq!(device.command() & 2, 0);
    assert_eq!(*answers.lock().unwrap(), [Err(Errno::BUSY), Ok(())]);
}

/// The memory is mapped, and is in no list yet, when a hook under another pass disables memory.
///
/// spec: MEMEN-13
#[test]
fn a_mapping_in_the_making_does_not_outlive_what_a_hook_disables() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.write = Box::new(move |calls, _, _, _| {
            calls.region_write(CONFIG, COMMAND, &[0, 0]).unwrap();
            Verdict::Handled
        });
    })
    .unwrap();
    let (at_map, reached) = mpsc::channel();
    let (at_map, fake) = (Mutex::new(at_map), Arc::downgrade(&device));
    let watcher = move |what| {
        if what == "region_map" {
            at_map.lock().unwrap().send(()).unwrap();
            // The other write ends when this pass has ended.
            while fake.upgrade().is_some_and(|fake| fake.command() & 2 != 0) {
                thread::yield_now();
            }
        }
    };
    device.watcher.set(Watcher(Box::new(watcher))).unwrap();
    thread::scope(|scope| {
        let map = scope.spawn(|| mediated.region_map(0, PAGE, PAGE));
        reached.recv().unwrap();
        mediated.region_write(0, 0, &[0]).unwrap();
        assert_eq!(errno(map.join().unwrap()), Errno::IO);
    });
}

/// A hook on COMMAND that clears the memory bit in the client's data.
///
/// spec: MEMEN-1
#[test]
fn what_a_hook_makes_of_the_clients_write_revokes_first_too() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(CONFIG, COMMAND, 2)];
        script.write = Box::new(|_, _, _, data| {
            data[0] &= !2;
            Verdict::Forward
        });
    })
    .unwrap();
    let map = mediated.region_map(0, 0, PAGE).unwrap();
    let seen = map.clone();
    let watcher = Watcher(Box::new(move |what| assert!(what != "config_write" || !seen.is_live())));
    device.watcher.set(watcher).unwrap();
    mediated.region_write(CONFIG, COMMAND, &[6, 0]).unwrap();
    assert_eq!(errno(map.load_u32(&mediated, 0)), Errno::IO);
}

/// spec: MEMEN-11
#[test]
fn a_vf_is_gated_by_its_power_state_and_not_by_its_memory_bit() {
    let vf = FakeDevice::new();
    let identity = Identity { virtual_function: true, ..vf.identity.clone() };
    let device = Arc::new(FakeDevice { identity, ..vf });
    let mediated = open_plain(&device);
    let map = mediated.region_map(0, 0, PAGE).unwrap();
    toggle(&mediated, false);
    assert_eq!(mediated.closed(), None);
    map.load_u32(&mediated, 0).unwrap();
    mediated.region_write(CONFIG, 0x44, &[3, 0]).unwrap();
    assert_eq!(errno(map.load_u32(&mediated, 0)), Errno::IO);
    assert_eq!(errno(mediated.region_read(1, 0, &mut [0])), Errno::IO);
    mediated.region_write(CONFIG, 0x44, &[0, 0]).unwrap();
    map.load_u32(&mediated, 0).unwrap();
}

/// A second process that maps every area that a client is offered: it reaches no byte that either map traps, whatever is in
/// force; and what is mapped by us it does not have.
///
/// spec: MEMEN-12
#[test]
fn another_process_is_offered_no_byte_that_may_be_trapped() {
    let test = "another_process_is_offered_no_byte_that_may_be_trapped";
    if is_child(test) {
        let memory =
            std::fs::OpenOptions::new().read(true).write(true).open(std::env::var_os("MEMORY").unwrap()).unwrap();
        for area in std::env::var("AREAS").unwrap().split_terminator(' ') {
            let (offset, length) = area.split_once('+').unwrap();
            let (offset, length): (u64, u64) = (offset.parse().unwrap(), length.parse().unwrap());
            vfio_mediate::sys::Mapping::new(&memory, offset, length).unwrap().fill(0, length, 0xff).unwrap();
        }
        return;
    }
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, claims).unwrap();
    let areas: String = match &mediated.region_info(0).unwrap().capabilities[..] {
        [RegionCapability::SparseMmap(areas)] => areas.iter().map(|a| format!("{}+{} ", a.offset, a.length)).collect(),
        other => panic!("{other:?}"),
    };
    let fd = std::os::fd::AsRawFd::as_raw_fd(&device.memory);
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([test, "--exact"]).env(CHILD, test).env("AREAS", areas).stdout(Stdio::null());
    child.env("MEMORY", format!("/proc/{}/fd/{fd}", std::process::id()));
    assert!(child.status().unwrap().success());
    let memory = device.region_map(0, 0, BAR).unwrap();
    for page in 0..BAR / PAGE {
        let mut bytes = vec![0; PAGE as usize];
        memory.read(page * PAGE, &mut bytes).unwrap();
        let expected = if [2, 4, 6].contains(&page) { 0 } else { 0xff };
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}");
    }
}

/// Readers of every kind against COMMAND.MEM. While memory is disabled the device's own memory holds what nobody may see.
///
/// spec: MEMEN-13
#[test]
fn nobody_reaches_the_device_while_memory_is_disabled_however_accesses_race() {
    const GOOD: u32 = 0x600d_600d;
    const POISON: u32 = 0xdead_dead;
    let (device, mediated) = stateful();
    let inside = device.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    inside.store_u32(0, GOOD, Ordering::SeqCst).unwrap();
    let map = mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
    let waiting = blocking_map(&mediated, MEMORY, MAPPABLE);
    let (done, through) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 3]);
    let check = |kind: usize, result: Result<u32, vfio_mediate::mediation::MediationError>| match result {
        Ok(value) => {
            assert_eq!(value, GOOD);
            through[kind].fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => assert!(matches!(error.errno(), Errno::IO | Errno::AGAIN), "{error}"),
    };
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let mut data = [0; 4];
                    let read = mediated.region_read(MEMORY, MAPPABLE, &mut data);
                    check(0, read.map(|()| u32::from_le_bytes(data)));
                    check(1, map.load_u32(&mediated, 0));
                }
            });
        }
        if let Some(waiting) = &waiting {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    check(2, Ok(touch(waiting)));
                }
            });
        }
        for _ in 0..300 {
            toggle(&mediated, false);
            inside.store_u32(0, POISON, Ordering::SeqCst).unwrap();
            thread::yield_now();
            inside.store_u32(0, GOOD, Ordering::SeqCst).unwrap();
            toggle(&mediated, true);
            thread::yield_now();
        }
        // Something must have got through, or nothing was shown.
        let kinds = if waiting.is_some() { &through[..] } else { &through[..2] };
        while kinds.iter().any(|count| count.load(Ordering::Relaxed) < 100) {
            thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// Mappings made and dropped while memory goes on and off.
///
/// spec: MEMEN-13
#[test]
fn mappings_that_come_and_go_are_revoked_like_those_that_stay() {
    let (_device, mediated) = stateful();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    match mediated.region_map(MEMORY, MAPPABLE, PAGE) {
                        Ok(map) => drop(map.load_u32(&mediated, 0)),
                        Err(error) => assert!(matches!(error.errno(), Errno::IO | Errno::AGAIN), "{error}"),
                    }
                }
            });
        }
        for _ in 0..100 {
            toggle(&mediated, false);
            mediated.reset().unwrap();
            toggle(&mediated, true);
        }
        done.store(true, Ordering::Relaxed);
    });
    let all: Vec<_> = (0..1024).map(|_| mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap()).collect();
    assert_eq!(errno(mediated.region_map(MEMORY, MAPPABLE, PAGE)), Errno::NOSPC);
    drop(all);
    mediated.region_map(MEMORY, MAPPABLE, PAGE).unwrap();
}

/// The copy of guest memory that a hook asks for faults, and the fault is not answered: nobody else waits for it.
///
/// spec: MEMEN-21
#[test]
fn a_page_fault_inside_a_copy_of_guest_memory_holds_nobody_up() {
    let (_device, elsewhere) = stateful();
    let Some(buffer) = blocking_map(&elsewhere, MEMORY, MAPPABLE) else { return };
    let address = buffer.address();
    let copying = Arc::new(AtomicBool::new(false));
    let begun = copying.clone();
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.write = Box::new(move |calls, _, _, _| {
            begun.store(true, Ordering::SeqCst);
            // SAFETY: a page that nobody else uses, mapped until the test ends.
            let data = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, PAGE as usize) };
            calls.guest_read(0, data).unwrap();
            Verdict::Handled
        });
    })
    .unwrap();
    mediated.dma_map(map(0, 4, 0)).unwrap();
    toggle(&elsewhere, false);
    thread::scope(|scope| {
        let write = scope.spawn(|| mediated.region_write(0, 0, &[0; 4]));
        while !copying.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        for round in 0..100 {
            mediated.region_read(0, 8, &mut [0; 8]).unwrap();
            mediated.region_write(CONFIG, 0x3c, &[1]).unwrap();
            mediated.region_info(0).unwrap();
            mediated.dma_map(map(8 * PAGE, 1, 8 * PAGE)).unwrap();
            mediated.memory().read(8 * PAGE, &mut [0; 8]).unwrap();
            mediated.dma_unmap(8 * PAGE, PAGE).unwrap();
            drop(mediated.region_map(0, PAGE, PAGE).unwrap());
            assert!(!write.is_finished(), "round {round}");
        }
        toggle(&elsewhere, true);
        write.join().unwrap().unwrap();
    });
}

/// spec: MEMEN-16
#[test]
fn a_failed_device_loses_its_mappings_with_the_last_access() {
    let device = Arc::new(FakeDevice::new());
    let (reached, go_on) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (there, wait) = (reached.clone(), go_on.clone());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.read = Box::new(move |_, _, _, _| {
            there.store(true, Ordering::SeqCst);
            while !wait.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            Verdict::Handled
        });
    })
    .unwrap();
    let map = mediated.region_map(0, PAGE, PAGE).unwrap();
    thread::scope(|scope| {
        let access = scope.spawn(|| mediated.region_read(0, 0, &mut [0; 4]));
        while !reached.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        mediated.fail(Errno::IO);
        assert!(map.is_live(), "another access may be using it");
        assert_eq!(errno(map.load_u32(&mediated, 0)), Errno::NODEV);
        go_on.store(true, Ordering::SeqCst);
        access.join().unwrap().unwrap();
    });
    assert!(!map.is_live());

    let idle = open_plain(&Arc::new(FakeDevice::new()));
    let map = idle.region_map(0, PAGE, PAGE).unwrap();
    idle.fail(Errno::IO);
    assert!(!map.is_live());
}
