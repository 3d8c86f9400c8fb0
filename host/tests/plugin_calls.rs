//! Calls across the boundary: a careless plug-in gets an errno and an honest error message, never a wild access.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use support::*;
use vfio_mediate::plugin::*;
use vfio_mediate_sdk::abi;
use vfio_mediate_sdk::state::DeviceState;

struct Fixture {
    script: &'static Script,
    host: Arc<Host>,
    device: OpenDevice,
}

fn fixture(name: &str) -> Fixture {
    let (registry, _) = with_plugin(scripted(name, &[]), ONE);
    let (script, host) = (Script::new(), Arc::new(Host::default()));
    let device = open_with(&registry, "device", script, host.clone()).unwrap().unwrap();
    Fixture { script, host, device }
}

impl Fixture {
    /// What a service answered inside a read hook.
    fn deed(&self, deed: Deed, argument: u64) -> i32 {
        self.script.act(deed, argument);
        self.script.deed_status.store(12345, Ordering::SeqCst);
        assert_eq!(self.device.read(0, FRAME, 0, &mut [0; 8]), Verdict::Handled);
        self.script.deed_status.load(Ordering::SeqCst)
    }
}

fn negative(errno: Errno) -> i32 {
    -errno.raw_os_error()
}

/// spec: REG-14
#[test]
fn tables_that_break_a_rule_are_refused_by_name_and_closed() {
    let (registry, _) = with_plugin(scripted("spoiled", &[]), ONE);
    let script = Script::new();
    let words = [
        (1, "length"),
        (2, "length"),
        (3, "9 regions"),
        (4, "maps"),
        (5, "maps"),
        (6, "hooks is null"),
        (7, "0 bytes"),
        (8, "bytes, not"),
        (9, "overlap"),
        (10, "null or misaligned"),
        (11, "1025"),
        (12, "misaligned"),
        (13, "5 irq indices"),
        (14, "count"),
        (15, "count"),
        (16, "overlaps"),
        (17, "hooks is null"),
        (18, "rw hook"),
        (19, "0x0 bytes"),
        (20, "0xffffffffffffffff"),
        (21, "flags 0x4"),
        (22, "0 vectors"),
        (23, "vectors"),
        (24, "flags"),
        (25, "migration flags"),
        (26, "migration flags"),
        (27, "save"),
        (28, "0 bytes"),
        (29, "exactness 3"),
        (30, "report"),
        (31, "extra regions"),
    ];
    for (which, word) in words {
        script.spoiled.store(which, Ordering::SeqCst);
        let error = open(&registry, "device", script).unwrap_err();
        assert!(matches!(error, OpenError::Malformed { .. }), "{which}: {error:?}");
        assert!(error.to_string().contains(word), "{which}: {error}");
        assert_eq!((script.opens(), script.closes()), (which, which));
    }
    script.spoiled.store(0, Ordering::SeqCst);
    drop(opened(&registry, "device", script));
}

/// spec: REG-14
#[test]
fn good_tables_are_what_the_plugin_published() {
    let fixture = fixture("good-tables");
    let device = &fixture.device;
    let claim = |offset| Claim {
        region: 0,
        offset,
        length: 0x100,
        normal: true,
        tracking: true,
        has_rw: true,
        has_region_info: false,
        has_mmap: false,
    };
    assert_eq!(device.claims(), [claim(0), claim(0x100)]);
    assert_eq!(
        device.irq_claims().iter().map(|c| (c.index, c.start, c.count)).collect::<Vec<_>>(),
        [(2, 0, 3), (2, 3, 3)]
    );
    assert_eq!(device.extra_regions().iter().map(|e| (e.flags, e.size)).collect::<Vec<_>>(), [(3, 4096)]);
    assert_eq!(device.extra_irqs(), [ExtraIrq { flags: 1, count: 1 }]);
    let mut info = abi::RegionInfo { struct_size: 0, index: 0, flags: 0, reserved: 0, size: 0 };
    assert_eq!(device.claim_region_info(0, FRAME, &mut info), Verdict::Forward, "an absent hook is the default");
    assert!(matches!(device.claim_mmap(0, FRAME, 0, 4096), MmapAnswer::NotMapped));
    for wrong in [2, usize::MAX] {
        assert_eq!(device.read(wrong, FRAME, 0, &mut [0; 1]), Verdict::Deny(Errno::INVAL));
        assert_eq!(device.extra_read(wrong, 9, FRAME, 0, &mut [0; 1]), Verdict::Deny(Errno::INVAL));
        assert_eq!(device.irq_fired(wrong, FRAME, 2, 0), Verdict::Deny(Errno::INVAL));
    }
}

/// spec: REG-15
#[test]
fn a_verdict_that_is_none_denies_with_eio() {
    let fixture = fixture("garbage-verdict");
    for (answer, verdict) in [
        (0, Verdict::Handled),
        (1, Verdict::Forward),
        (2, Verdict::Deny(Errno::IO)),
        (i32::MAX, Verdict::Deny(Errno::IO)),
        (i32::MIN, Verdict::Deny(Errno::IO)),
        (-4096, Verdict::Deny(Errno::IO)),
        (-4095, Verdict::Deny(Errno::from_raw_os_error(4095))),
        (-1, Verdict::Deny(Errno::PERM)),
    ] {
        fixture.script.rw_answer.store(answer, Ordering::SeqCst);
        assert_eq!(fixture.device.read(0, FRAME, 0, &mut [0; 4]), verdict, "{answer}");
        assert_eq!(fixture.device.write(1, FRAME, 0x100, &mut [0; 4]), verdict, "{answer}");
        assert_eq!(fixture.device.extra_read(0, 9, FRAME, 0, &mut [0; 4]), verdict, "{answer}");
    }
    assert_eq!(fixture.device.irq_fired(0, FRAME, 2, 0), Verdict::Handled);
    assert_eq!(fixture.device.irq_fired(1, FRAME, 2, 3), Verdict::Deny(Errno::RANGE));
}

/// spec: REG-15
#[test]
fn what_a_hook_scribbles_over_its_request_is_not_believed() {
    let fixture = fixture("tamper");
    assert_eq!(fixture.deed(Deed::Tamper, 0), 0);
    fixture.script.act(Deed::Fill, 0x5a);
    let mut data = [0; 16];
    assert_eq!(fixture.device.read(0, FRAME, 0, &mut data), Verdict::Handled);
    assert_eq!(data, [0x5a; 16]);
}

/// spec: REG-16
#[test]
fn services_refuse_null_huge_and_wrapping_arguments_before_they_touch_anything() {
    let fixture = fixture("bad-arguments");
    let invalid = negative(Errno::INVAL);
    assert_eq!(fixture.deed(Deed::NullContext, 0), invalid);
    assert_eq!(fixture.deed(Deed::NullData, 0), invalid);
    assert_eq!(fixture.deed(Deed::Huge, (16 << 20) + 1), invalid);
    assert_eq!(fixture.deed(Deed::Huge, u64::MAX), invalid);
    assert_eq!(fixture.deed(Deed::Wrap, 0), invalid);
    assert_eq!(fixture.deed(Deed::ShortInfo, 0), invalid, "and nothing is written");
    assert_eq!(fixture.deed(Deed::BadIrqs, 0), negative(Errno::BADF));
    for length in [0, 1, 4095, 4097, (16 << 20) + 4096, u64::MAX] {
        assert_eq!(fixture.deed(Deed::Scratch, length), invalid, "{length}");
    }
    assert_eq!((fixture.host.writes.load(Ordering::SeqCst), fixture.host.scratches.load(Ordering::SeqCst)), (0, 0));
    for length in [4096, 16 << 20] {
        assert_eq!(fixture.deed(Deed::Scratch, length), 0);
    }
    assert_eq!(fixture.deed(Deed::Huge, 8), 0);
    assert_eq!(fixture.deed(Deed::Huge, 0), 0, "nothing is nothing");
}

/// spec: REG-16
#[test]
fn requests_that_are_none_are_refused() {
    let fixture = fixture("requests");
    let ask = |what: u32, arg: u32| fixture.deed(Deed::Request, u64::from(what) << 32 | u64::from(arg));
    for (what, arg) in [
        (0, 0),
        (4, 1),
        (abi::REQUEST_FAIL, 0),
        (abi::REQUEST_FAIL, 4096),
        (abi::REQUEST_MAP, 0),
        (abi::REQUEST_MAP, 3),
    ] {
        assert_eq!(ask(what, arg), negative(Errno::INVAL), "{what} {arg}");
    }
    assert!(fixture.host.requests.lock().unwrap().is_empty());
    assert_eq!(ask(abi::REQUEST_RESET, 0), 0);
    assert_eq!(ask(abi::REQUEST_FAIL, 4095), 0);
    assert_eq!(ask(abi::REQUEST_MAP, abi::MAP_TRACKING), 0);
    let made = fixture.host.requests.lock().unwrap().clone();
    assert_eq!(made, [Request::Reset, Request::Fail(Errno::from_raw_os_error(4095)), Request::Map(TrapMap::Tracking)]);
}

/// spec: REG-17
#[test]
fn a_context_is_good_inside_its_call_and_on_its_thread_only() {
    let fixture = fixture("contexts");
    let denied = negative(Errno::PERM);
    assert_eq!(fixture.deed(Deed::KeepContext, 0), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(fixture.deed(Deed::UseStale, 0), denied, "another thread's, and stale"));
    });
    assert_eq!(fixture.deed(Deed::Forged, 0), denied, "a copy is not the context");
    // While the call that it belongs to has not returned, on another thread.
    fixture.script.act(Deed::KeepContext, 0);
    fixture.script.close_gate();
    std::thread::scope(|scope| {
        let owner = scope.spawn(|| fixture.device.read(0, FRAME, 0, &mut [0; 8]));
        fixture.script.await_inside();
        assert_eq!(fixture.deed(Deed::UseStale, 0), denied, "alive, and another thread's");
        assert_eq!(fixture.host.reads.load(Ordering::SeqCst), 0);
        fixture.script.open_gate();
        owner.join().unwrap();
        assert_eq!(fixture.script.deed_status.load(Ordering::SeqCst), 0, "its own thread may");
    });
    assert_eq!(fixture.host.reads.load(Ordering::SeqCst), 1);
    assert_eq!(fixture.deed(Deed::Default, 0), 0);
    assert_eq!(fixture.host.defaults.load(Ordering::SeqCst), 1);
}

/// spec: REG-18
#[test]
fn a_mistake_of_the_hosts_own_inside_a_service_is_eio_and_not_the_end() {
    let fixture = fixture("host-panic");
    fixture.host.panics.store(true, Ordering::SeqCst);
    assert_eq!(fixture.deed(Deed::Default, 0), negative(Errno::IO));
    fixture.host.panics.store(false, Ordering::SeqCst);
    let mut data = [0; 8];
    fixture.script.act(Deed::Default, 0);
    assert_eq!(fixture.device.read(0, FRAME, 0x10, &mut data), Verdict::Handled);
    assert_eq!(data, [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17]);
}

#[test]
fn a_plugin_may_talk_as_it_likes() {
    assert_eq!(fixture("talker").deed(Deed::Log, 0), 0);
}

/// spec: REG-19
#[test]
fn lengths_and_states_that_a_plugin_returns_are_looked_at() {
    let fixture = fixture("lengths");
    let (script, migration) = (fixture.script, fixture.device.migration().unwrap());
    let mut buffer = [0; 16];
    for (answer, length, expected) in [
        (abi::SAVE_MORE, 16, Ok(Saved { bytes: 16, end: false })),
        (abi::SAVE_MORE, 1, Ok(Saved { bytes: 1, end: false })),
        (abi::SAVE_MORE, 0, Err(Errno::PROTO)),
        (abi::SAVE_END, 0, Ok(Saved { bytes: 0, end: true })),
        (abi::SAVE_END, 17, Err(Errno::PROTO)),
        (abi::SAVE_MORE, u64::MAX, Err(Errno::PROTO)),
        (2, 1, Err(Errno::PROTO)),
        (-5, u64::MAX, Err(Errno::IO)),
    ] {
        script.save_answer.store(answer, Ordering::SeqCst);
        script.save_length.store(length, Ordering::SeqCst);
        assert_eq!(migration.save(FRAME, &mut buffer), expected, "{answer} {length}");
    }
    for (length, expected) in [(0, Ok(0)), (4, Ok(4)), (64 << 10, Ok(64 << 10)), ((64 << 10) + 1, Err(Errno::PROTO))] {
        script.save_length.store(length, Ordering::SeqCst);
        assert_eq!(migration.match_data(FRAME).map(|data| data.len()), expected);
    }
    assert_eq!(migration.load(FRAME, &[0; 4]), Ok(()));
    assert_eq!(migration.load(FRAME, &[0; 5]), Err(Errno::PROTO));
    assert_eq!(migration.check_match(FRAME, &[]), Ok(()));
    let refusal = migration.check_match(FRAME, &[1]).unwrap_err();
    assert_eq!((refusal.errno, refusal.reason.as_str()), (Errno::OPNOTSUPP, "otherfirmware"));
    assert!(migration.check_match(FRAME, &[1, 2]).unwrap_err().reason.len() <= 1024, "a length beyond the buffer");
    assert_eq!(migration.remaining(FRAME).unwrap().stop_copy_bytes, u64::MAX, "unknown is not nothing");
    let arc = || migration.set_state(FRAME, DeviceState::Running, DeviceState::Stop);
    assert_eq!(arc(), Ok(()));
    for (answer, actual, errno, state) in [
        (-5, DeviceState::Running.raw(), Errno::IO, DeviceState::Running),
        (-5, 8, Errno::IO, DeviceState::Error),
        (1, u32::MAX, Errno::PROTO, DeviceState::Error),
    ] {
        script.set_state_answer.store(answer, Ordering::SeqCst);
        script.actual_state.store(actual, Ordering::SeqCst);
        assert_eq!(arc(), Err(ArcFailed { errno, actual: state }));
    }
}

/// spec: REG-19
#[test]
fn a_dirty_report_sets_no_bit_beyond_its_range_and_needs_room_for_each_page() {
    let fixture = fixture("report");
    let dirty = fixture.device.dirty().unwrap();
    assert_eq!(dirty.exactness(), Exactness::Superset);
    assert_eq!(dirty.start(FRAME, &[], 4096), Err(Errno::INVAL));
    dirty.start(FRAME, &[abi::IovaRange { iova: 0, length: 4096 }], 4096).unwrap();
    for pages in [1, 2, 63, 64, 65, 127, 128, 129] {
        let mut bitmap = vec![0; 4];
        dirty.report(FRAME, 0, pages * 4096, 4096, &mut bitmap).unwrap();
        let set: u64 = bitmap.iter().map(|word: &u64| u64::from(word.count_ones())).sum();
        assert_eq!(set, pages, "{bitmap:x?}");
    }
    let mut one = [0; 1];
    for (length, page_size) in [(65 * 4096, 4096), (4097, 4096), (4096, 0)] {
        assert_eq!(dirty.report(FRAME, 0, length, page_size, &mut one), Err(Errno::INVAL));
    }
    dirty.stop(FRAME);
}

/// spec: REG-19
#[test]
fn an_event_is_refused_by_a_negative_answer_only() {
    let fixture = fixture("events");
    assert_eq!(fixture.device.event(FRAME, abi::EVENT_RESET_PREPARE, [0; 3]), Err(Errno::BUSY));
    assert_eq!(fixture.device.event(FRAME, abi::EVENT_RESET_DONE, [0; 3]), Ok(()));
}

/// Hooks of one device on many threads at once: each has its own context, and the origin and deadline that it was given.
///
/// spec: REG-17
#[test]
fn hooks_run_side_by_side() {
    let fixture = fixture("side-by-side");
    fixture.script.act(Deed::Default, 0);
    let cancel = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (device, cancel) = (&fixture.device, &cancel);
            scope.spawn(move || {
                let frame = CallFrame { origin: Origin::Migration, deadline: thread, cancel: Some(cancel) };
                for round in 0..1000 {
                    let (mut data, offset) = ([0; 2], thread * 31 % 200 + round % 8);
                    assert_eq!(device.read(0, frame, offset, &mut data), Verdict::Handled);
                    assert_eq!(data, [offset as u8, offset as u8 + 1]);
                }
            });
        }
    });
    assert_eq!(fixture.host.defaults.load(Ordering::SeqCst), 8000);
}
