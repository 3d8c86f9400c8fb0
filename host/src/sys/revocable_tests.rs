use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use super::*;

const PAGE: u64 = 4096;
const SIGBUS: i32 = 7;

/// Names the test that runs as a child process in order to die.
const CHILD: &str = "VFIO_MEDIATE_REVOCABLE_CHILD";

fn device(size: u64) -> (OwnedFd, Arc<Mapping>) {
    let fd = memfd("test", size, Seal::Size).unwrap();
    let mapping = Arc::new(Mapping::new(&fd, 0, size).unwrap());
    (fd, mapping)
}

fn again(fd: &OwnedFd, size: u64) -> Arc<Mapping> {
    Arc::new(Mapping::new(fd, 0, size).unwrap())
}

/// One load by a raw pointer, as an embedder's own code makes it.
fn touch(address: u64) -> u32 {
    // SAFETY: the tests' addresses are mapped, or the fault is what is tested.
    unsafe { AtomicU32::from_ptr(address as *mut u32) }.load(Ordering::SeqCst)
}

/// Runs this test once more in a process of its own; the signal that it died of.
fn signal_of_child(test: &str) -> Option<i32> {
    let name = format!("sys::revocable::tests::{test}");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([name.as_str(), "--exact", "--nocapture"]).env(CHILD, test);
    child.stdout(Stdio::null()).stderr(Stdio::null());
    child.status().unwrap().signal()
}

fn is_child(test: &str) -> bool {
    std::env::var_os(CHILD).is_some_and(|name| name == test)
}

#[test]
fn what_is_written_arrives_and_revoked_it_is_an_error_until_it_is_back() {
    let (fd, mapping) = device(2 * PAGE);
    let map = Revocable::new(mapping, Faults::Raise).unwrap();
    let (address, pattern) = (map.address(), (0..=255).collect::<Vec<u8>>());
    for offset in [0, 1, 2, 3, 5, 7, PAGE - 100] {
        map.write(offset, &pattern).unwrap();
        let mut data = [0; 256];
        map.read(offset, &mut data).unwrap();
        assert_eq!(data[..], pattern[..], "at {offset}");
    }
    map.store_u32(8, 0x1234_5678).unwrap();
    map.revoke().unwrap();
    map.revoke().unwrap();
    assert!(!map.is_live());
    assert!(matches!(map.read(0, &mut [0]), Err(RevocableError::Revoked)));
    assert!(matches!(map.store_u32(8, 1), Err(RevocableError::Revoked)));
    map.restore(again(&fd, 2 * PAGE)).unwrap();
    assert_eq!((map.address(), map.load_u32(8).unwrap(), touch(address + 8)), (address, 0x1234_5678, 0x1234_5678));
    assert!(map.restore(again(&fd, PAGE)).is_err(), "another size");
    map.end().unwrap();
    assert!(matches!(map.load_u32(8), Err(RevocableError::Revoked)));
    assert!(map.restore(again(&fd, 2 * PAGE)).is_err(), "ended for good");
}

#[test]
fn bounds_are_those_of_what_was_asked_for() {
    let (_fd, mapping) = device(PAGE);
    let map = Revocable::new(mapping, Faults::Raise).unwrap();
    for (offset, length, inside) in
        [(0, 4096, true), (1, 4096, false), (4095, 1, true), (4096, 0, true), (4096, 1, false)]
    {
        assert_eq!(map.read(offset, &mut vec![0; length]).is_ok(), inside, "{offset} {length}");
        assert_eq!(map.write(offset, &vec![0; length]).is_ok(), inside, "{offset} {length}");
    }
    assert!(map.read(u64::MAX, &mut [0; 2]).is_err());
    assert!(matches!(map.load_u32(2), Err(RevocableError::Misaligned { .. })));
    assert!(map.load_u32(4092).is_ok() && map.load_u32(4096).is_err());
}

/// A mapping that its device keeps is mapped once more.
#[test]
fn a_shared_mapping_stays_its_owners() {
    let (_fd, mapping) = device(PAGE);
    let map = Revocable::new(Arc::clone(&mapping), Faults::Raise).unwrap();
    map.store_u32(0, 7).unwrap();
    map.revoke().unwrap();
    assert_eq!(mapping.load_u32(0, Ordering::SeqCst).unwrap(), 7);
    drop(map);
    assert_eq!(mapping.load_u32(0, Ordering::SeqCst).unwrap(), 7);
}

#[test]
fn a_touch_of_a_revoked_range_is_sigbus() {
    let test = "a_touch_of_a_revoked_range_is_sigbus";
    if is_child(test) {
        let (_fd, mapping) = device(PAGE);
        let map = Revocable::new(mapping, Faults::Raise).unwrap();
        touch(map.address());
        map.revoke().unwrap();
        touch(map.address());
        return;
    }
    assert_eq!(signal_of_child(test), Some(SIGBUS));
}

#[test]
fn a_wait_that_takes_too_long_is_sigbus() {
    let test = "a_wait_that_takes_too_long_is_sigbus";
    if is_child(test) {
        let (_fd, mapping) = device(PAGE);
        let map = Revocable::new(mapping, Faults::Block(Duration::from_millis(20))).unwrap();
        map.revoke().unwrap();
        touch(map.address());
        return;
    }
    if blocking_is_possible() {
        assert_eq!(signal_of_child(test), Some(SIGBUS));
    }
}

fn blocking_is_possible() -> bool {
    let (_fd, mapping) = device(PAGE);
    Revocable::new(mapping, Faults::Block(Duration::from_secs(1))).is_ok()
}

#[test]
fn whoever_touches_a_blocking_range_waits_and_then_sees_the_device() {
    if !blocking_is_possible() {
        return;
    }
    let (fd, mapping) = device(PAGE);
    let map = Revocable::new(mapping, Faults::Block(Duration::from_secs(60))).unwrap();
    let address = map.address();
    for round in 1..=20_u32 {
        map.revoke().unwrap();
        // The device's own memory, behind the mapping's back.
        rustix::io::pwrite(&fd, &round.to_ne_bytes(), 0).unwrap();
        let (begun, seen) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    let value = touch(address);
                    assert_eq!(value, round);
                    seen.fetch_add(1, Ordering::SeqCst);
                });
            }
            let patience = Instant::now() + Duration::from_secs(20);
            while begun.load(Ordering::SeqCst) < 3 && Instant::now() < patience {
                std::thread::yield_now();
            }
            for _ in 0..50 {
                std::thread::yield_now();
            }
            assert_eq!(seen.load(Ordering::SeqCst), 0, "nobody goes on");
            map.restore(again(&fd, PAGE)).unwrap();
        });
        assert_eq!(seen.load(Ordering::SeqCst), 3);
    }
}

/// A range is never touched half-way: raw loads against revocations meet the device or wait.
#[test]
fn raw_loads_against_revocations_meet_nothing_but_the_device() {
    if !blocking_is_possible() {
        return;
    }
    let (fd, mapping) = device(PAGE);
    mapping.store_u32(0, 0xfeed, Ordering::SeqCst).unwrap();
    let map = Revocable::new(mapping, Faults::Block(Duration::from_secs(60))).unwrap();
    let (address, done) = (map.address(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(touch(address), 0xfeed);
                }
            });
        }
        for _ in 0..200 {
            map.revoke().unwrap();
            map.restore(again(&fd, PAGE)).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// What a child process would inherit could not be revoked there.
#[test]
fn a_forked_process_gets_nothing_of_it() {
    let (fd, mapping) = device(PAGE);
    let map = Revocable::new(mapping, Faults::Raise).unwrap();
    assert!(flags_at(map.address()).contains("dc"), "{}", flags_at(map.address()));
    map.revoke().unwrap();
    map.restore(again(&fd, PAGE)).unwrap();
    assert!(flags_at(map.address()).contains("dc"), "{}", flags_at(map.address()));
}

/// The `VmFlags` of the mapping that begins at this address.
fn flags_at(address: u64) -> String {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.starts_with(&format!("{address:x}-")));
    lines.find(|line| line.starts_with("VmFlags")).unwrap_or_default().to_owned()
}
