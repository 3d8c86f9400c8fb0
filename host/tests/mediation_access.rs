//! Accesses, what a client is told, irqs and DMA maps of a mediated device.

mod mediation_support;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use mediation_support::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vfio_mediate::device::*;
use vfio_mediate::mediation::gate::Reason;
use vfio_mediate::mediation::mediator::{ExtraRegion, IrqClaim, MmapAnswer, Request, Verdict};
use vfio_mediate::mediation::{MediatedDevice, MediationError, Remedy};
use vfio_mediate::sys::{Seal, memfd};
use vfio_mediate_sdk::abi;

/// spec: DISPATCH-2 DISPATCH-4
#[test]
fn an_access_that_straddles_claims_goes_ascending_and_reports_what_was_done() {
    let device = Arc::new(FakeDevice::new());
    let order = Arc::new(Mutex::new(Vec::new()));
    let ours = order.clone();
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 12, 4), claim(0, 4, 4)];
        script.read = Box::new(move |_, claim, offset, data| {
            ours.lock().unwrap().push((claim, offset, data.len()));
            data.fill(0xc0 + claim as u8);
            Verdict::Handled
        });
        script.write = Box::new(|_, claim, _, data| {
            data.fill(7);
            if claim == 0 { Verdict::Deny(Errno::PERM) } else { Verdict::Forward }
        });
    })
    .unwrap();
    device.region_write(0, 0, &[1; 32]).unwrap();
    let mut data = [0; 18];
    mediated.region_read(0, 0, &mut data).unwrap();
    assert_eq!(data, [1, 1, 1, 1, 0xc1, 0xc1, 0xc1, 0xc1, 1, 1, 1, 1, 0xc0, 0xc0, 0xc0, 0xc0, 1, 1]);
    assert_eq!(*order.lock().unwrap(), [(1, 4, 4), (0, 12, 4)]);
    let error = mediated.region_write(0, 2, &[9; 20]).unwrap_err();
    assert_eq!((error.errno(), error.bytes_done(), error.remedy()), (Errno::PERM, 10, Remedy::Change));
    let mut now = [0; 16];
    device.region_read(0, 0, &mut now).unwrap();
    assert_eq!(now, [1, 1, 9, 9, 7, 7, 7, 7, 9, 9, 9, 9, 1, 1, 1, 1]);
    assert_eq!(mediated.region_read(0, BAR - 1, &mut [0; 2]).unwrap_err().errno(), Errno::INVAL);
    assert_eq!(mediated.region_read(0, u64::MAX, &mut [0; 2]).unwrap_err().errno(), Errno::INVAL);
}

/// spec: CONFIG-2
#[test]
fn disabled_memory_is_not_reached_and_answers_eio_until_it_is_enabled() {
    let device = Arc::new(FakeDevice::new());
    let events = Arc::new(Mutex::new(Vec::new()));
    let ours = events.clone();
    let mediated = open_script(&device, |script| {
        script.event = Box::new(move |_, event| {
            ours.lock().unwrap().push((event.kind, event.args[0]));
            Ok(())
        });
    })
    .unwrap();
    mediated.region_write(CONFIG, COMMAND, &[0x04, 0]).unwrap();
    assert_eq!(mediated.region_read(0, 0, &mut [0]).unwrap_err().errno(), Errno::IO);
    assert_eq!(mediated.closed(), Some(Reason::MemoryDisabled));
    mediated.region_read(CONFIG, 0, &mut [0; 4]).unwrap();
    mediated.region_write(CONFIG, COMMAND, &[0x02, 0]).unwrap();
    mediated.region_read(0, 0, &mut [0]).unwrap();
    // Out of D0 and back.
    mediated.region_write(CONFIG, 0x44, &[3, 0]).unwrap();
    assert_eq!(mediated.region_write(0, 0, &[0]).unwrap_err().errno(), Errno::IO);
    mediated.region_write(CONFIG, 0x44, &[0, 0]).unwrap();
    mediated.region_write(0, 0, &[0]).unwrap();
    assert_eq!(*events.lock().unwrap(), [(abi::EVENT_BUS_MASTER, 1), (abi::EVENT_BUS_MASTER, 0)]);
    assert_eq!(device.violations.load(Ordering::SeqCst), 0);
}

/// A plug-in that writes COMMAND past the filter is found out before the next access.
#[test]
fn command_written_by_the_plug_in_itself_closes_the_gate_too() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.write = Box::new(|calls, _, _, _| {
            calls.region_write(CONFIG, COMMAND, &[0, 0]).unwrap();
            Verdict::Handled
        });
    })
    .unwrap();
    mediated.region_write(0, 0, &[0]).unwrap();
    assert_eq!(mediated.region_read(0, 8, &mut [0]).unwrap_err().errno(), Errno::IO);
    assert_eq!(device.violations.load(Ordering::SeqCst), 0);
}

/// spec: INFO-2
#[test]
fn information_hooks_may_only_narrow() {
    for (size, flags, accepted) in
        [(BAR, 7, true), (BAR - PAGE, 3, true), (BAR - PAGE, 7, true), (BAR + 1, 7, false), (BAR, 15, false)]
    {
        let device = Arc::new(FakeDevice::new());
        let mediated = open_script(&device, |script| {
            script.claims = vec![claim(0, 8 * PAGE, 4)];
            script.claims[0].has_region_info = true;
            script.info = Box::new(move |info| {
                (info.size, info.flags) = (size, flags);
                Verdict::Handled
            });
        })
        .unwrap();
        let info = mediated.region_info(0);
        // What a client is not told of it cannot map either.
        let maps = |offset| mediated.region_map(0, offset, PAGE).map_err(|error| error.errno()).err();
        let refused = |ok: bool| if ok { None } else { Some(if accepted { Errno::NODEV } else { Errno::IO }) };
        assert_eq!(maps(0), refused(accepted && flags == 7), "{size:#x} {flags:#x}");
        assert_eq!(maps(BAR - PAGE), refused(accepted && flags == 7 && size == BAR), "{size:#x} {flags:#x}");
        assert_eq!(info.is_ok(), accepted, "{size:#x} {flags:#x}");
        match info {
            Ok(info) if flags == 3 => assert!(info.capabilities.is_empty() && info.flags == 3),
            Ok(info) => assert_eq!(info.size, size),
            Err(error) => assert!(matches!(error, MediationError::PluginFault { .. })),
        }
    }
}

/// spec: LAYOUT-4
#[test]
fn an_mmap_hook_gives_a_file_in_place_of_the_claimed_pages() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, PAGE, 2 * PAGE), claim(0, 8 * PAGE, PAGE)];
        script.claims[0].has_mmap = true;
        script.claims[1].has_mmap = true;
        // In one map only: the page could not be taken back.
        script.claims[1].tracking = false;
        script.stand_in = Box::new(|| {
            let fd = memfd("stand-in", 2 * PAGE, Seal::Size).unwrap();
            rustix::io::pwrite(&fd, b"stand-in", PAGE).unwrap();
            MmapAnswer::Instead { fd, offset: 0 }
        });
    })
    .unwrap();
    let mapping = mediated.region_map(0, 2 * PAGE, PAGE).unwrap();
    let mut data = [0; 8];
    mapping.read(&mediated, 0, &mut data).unwrap();
    assert_eq!(&data, b"stand-in");
    assert_eq!(mediated.region_map(0, 8 * PAGE, PAGE).unwrap_err().errno(), Errno::NODEV);
    let areas = match &mediated.region_info(0).unwrap().capabilities[..] {
        [RegionCapability::SparseMmap(areas)] => areas.clone(),
        other => panic!("{other:?}"),
    };
    let total: u64 = areas.iter().map(|area| area.length).sum();
    assert_eq!(total, BAR - PAGE);
}

/// An extra region of two pages, with a file of `size` bytes behind its mmap hook.
fn extra_with_file(seal: Seal, size: u64, offset: u64) -> vfio_mediate::mediation::Result<Arc<MediatedDevice>> {
    open_script(&Arc::new(FakeDevice::new()), move |script| {
        script.extra_regions = vec![ExtraRegion { flags: 3, size: 2 * PAGE + 1, type_: 5, subtype: 6, has_mmap: true }];
        script.stand_in = Box::new(move || {
            let fd = memfd("extra", size, seal).unwrap();
            rustix::io::pwrite(&fd, b"behind", offset).unwrap();
            MmapAnswer::Instead { fd, offset }
        });
    })
}

/// spec: LAYOUT-5
#[test]
fn an_extra_regions_whole_pages_are_mapped_from_its_file() {
    let mediated = extra_with_file(Seal::Size, 3 * PAGE, PAGE).unwrap();
    let index = mediated.info().num_regions - 1;
    let info = mediated.region_info(index).unwrap();
    assert_ne!(info.flags & vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP, 0);
    let sparse = RegionCapability::SparseMmap(vec![Area { offset: 0, length: 2 * PAGE }]);
    assert!(info.capabilities.contains(&sparse), "the last byte is no whole page: {info:?}");
    let mut data = [0; 6];
    mediated.region_map(index, 0, 2 * PAGE).unwrap().read(&mediated, 0, &mut data).unwrap();
    assert_eq!(&data, b"behind");
    for (offset, length) in [(PAGE, 2 * PAGE), (2 * PAGE, PAGE), (3 * PAGE, PAGE)] {
        assert_eq!(mediated.region_map(index, offset, length).unwrap_err().errno(), Errno::NODEV);
    }
}

/// spec: LAYOUT-6
#[test]
fn a_file_that_could_fault_a_client_is_refused_at_open() {
    extra_with_file(Seal::Size, 2 * PAGE, 0).unwrap();
    for (seal, size, offset) in [
        (Seal::Open, 2 * PAGE, 0),        // could be cut short later
        (Seal::Size, 2 * PAGE - 1, 0),    // ends inside the last page
        (Seal::Size, 2 * PAGE, PAGE),     // too short from its offset on
        (Seal::Size, 3 * PAGE, PAGE + 1), // not on a page
    ] {
        let error = extra_with_file(seal, size, offset).unwrap_err();
        assert!(matches!(error, MediationError::PluginFault { .. }), "{seal:?} {size} {offset}: {error}");
    }
}

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

fn signalled(fd: &OwnedFd, within: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
    poll(&mut fds, Some(&timeout)).unwrap() == 1
}

/// spec: IRQ-2
#[test]
fn an_interposed_vector_is_seen_first_and_reaches_the_client_unless_it_is_taken() {
    let device = Arc::new(FakeDevice::new());
    let (sender, seen) = mpsc::channel();
    let sender = Mutex::new(sender);
    let mediated = open_script(&device, |script| {
        script.irq_claims =
            vec![IrqClaim { index: 2, start: 0, count: 2, has_irq_info: true, has_set_irqs: false, has_fired: true }];
        script.fired = Box::new(move |vector| {
            sender.lock().unwrap().send(vector).unwrap();
            if vector == 0 { Verdict::Handled } else { Verdict::Forward }
        });
    })
    .unwrap();
    let clients: Vec<OwnedFd> = (0..3).map(|_| new_eventfd()).collect();
    let fds: Vec<_> = clients.iter().map(borrow).collect();
    mediated.set_irqs(&set_fd(0, &fds)).unwrap();
    assert_eq!(mediated.irq_info(2).unwrap().count, 2);
    for vector in 0..3 {
        rustix::io::write(&device.fds.lock().unwrap()[&vector], &1u64.to_ne_bytes()).unwrap();
        if vector < 2 {
            assert_eq!(seen.recv_timeout(Duration::from_secs(10)).unwrap(), vector);
        }
    }
    assert!(signalled(&clients[1], Duration::from_secs(10)));
    assert!(signalled(&clients[2], Duration::from_secs(10)));
    assert!(!signalled(&clients[0], Duration::ZERO));
    mediated.host_calls().irq_inject(2, 0).unwrap();
    assert!(signalled(&clients[0], Duration::ZERO));
    mediated.host_calls().irq_inject(2, 3).unwrap();
    drop(mediated);
}

#[test]
fn vectors_that_a_hook_handles_do_not_reach_the_device() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        script.irq_claims =
            vec![IrqClaim { index: 2, start: 1, count: 1, has_irq_info: false, has_set_irqs: true, has_fired: false }];
        script.set_irqs = Box::new(|start, count| {
            assert_eq!((start, count), (1, 1));
            Verdict::Handled
        });
    })
    .unwrap();
    let clients: Vec<OwnedFd> = (0..4).map(|_| new_eventfd()).collect();
    let fds: Vec<_> = clients.iter().map(borrow).collect();
    mediated.set_irqs(&set_fd(0, &fds)).unwrap();
    let mut given: Vec<u32> = device.fds.lock().unwrap().keys().copied().collect();
    given.sort_unstable();
    assert_eq!(given, [0, 2, 3]);
    let five: Vec<_> = (0..5).map(|_| None).collect();
    assert_eq!(mediated.set_irqs(&set_fd(0, &five)).unwrap_err().errno(), Errno::INVAL);
    assert_eq!(mediated.set_irqs(&set_fd(u32::MAX, &five[..1])).unwrap_err().errno(), Errno::INVAL);
}

/// spec: DMA-1
#[test]
fn a_map_that_fails_at_any_step_leaves_nothing_behind() {
    let device = Arc::new(FakeDevice::new());
    let refuse = Arc::new(AtomicU64::new(0));
    let ours = refuse.clone();
    let mediated = open_script(&device, |script| {
        script.event =
            Box::new(move |_, event| match event.kind == abi::EVENT_DMA_MAP && ours.load(Ordering::SeqCst) == 1 {
                true => Err(Errno::NOSPC),
                false => Ok(()),
            });
    })
    .unwrap();
    let empty = || mediated.memory().mappings().is_empty() && device.maps.lock().unwrap().is_empty();
    device.fail("dma_map", ErrorKind::Refused, Errno::NOMEM);
    assert_eq!(mediated.dma_map(map(0, 4, 0)).unwrap_err().errno(), Errno::NOMEM);
    assert!(empty());
    device.heal();
    refuse.store(1, Ordering::SeqCst);
    assert_eq!(mediated.dma_map(map(0, 4, 0)).unwrap_err().errno(), Errno::NOSPC);
    assert!(empty());
    refuse.store(0, Ordering::SeqCst);
    mediated.dma_map(map(0, 4, 0)).unwrap();
    mediated.dma_map(map(0, 4, 0)).unwrap();
    assert_eq!(device.maps.lock().unwrap().len(), 1);
    assert_eq!(mediated.dma_map(map(2 * PAGE, 4, 0)).unwrap_err().errno(), Errno::EXIST);
    assert_eq!(mediated.dma_unmap(PAGE, 8 * PAGE).unwrap_err().errno(), Errno::INVAL);
    mediated.dma_unmap(0, 4 * PAGE).unwrap();
    assert!(empty());
}

/// spec: DMA-2
#[test]
fn a_map_that_devices_share_goes_with_the_last_of_them() {
    let vm = space();
    let device = || Arc::new(FakeDevice::new());
    let open = |device: &Arc<FakeDevice>| {
        MediatedDevice::with_mediator(device.clone(), vm.clone(), Default::default(), |_| Ok(None)).unwrap()
    };
    let (one, two, three) = (device(), device(), device());
    let (first, second, third) = (open(&one), open(&two), open(&three));
    for mediated in [&first, &first, &second] {
        mediated.dma_map(map(0, 4, 0)).unwrap();
    }
    // Not the same map: refused, and the others keep theirs.
    assert_eq!(third.dma_map(map(0, 4, PAGE)).unwrap_err().errno(), Errno::EXIST);
    three.fail("dma_map", ErrorKind::Refused, Errno::NOMEM);
    assert_eq!(third.dma_map(map(0, 4, 0)).unwrap_err().errno(), Errno::NOMEM);
    first.dma_unmap(0, 4 * PAGE).unwrap();
    assert!(one.maps.lock().unwrap().is_empty());
    assert_eq!(vm.mappings(), [map(0, 4, 0)], "the second device still has it");
    vm.read(PAGE, &mut [0; 8]).unwrap();
    // Closing a device gives its maps back.
    drop(second);
    assert!(vm.mappings().is_empty() && two.maps.lock().unwrap().is_empty());
}

/// spec: SCRATCH-1
#[test]
fn a_guest_map_over_scratch_memory_is_refused() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |_| {}).unwrap();
    let scratch = mediated.host_calls().scratch_alloc(2 * PAGE, 28).unwrap();
    assert_eq!(mediated.dma_map(map(scratch.iova + PAGE, 1, 0)).unwrap_err().errno(), Errno::EXIST);
    mediated.dma_map(map(scratch.iova - PAGE, 1, 0)).unwrap();
    mediated.host_calls().scratch_free(scratch.iova).unwrap();
    assert_eq!(mediated.host_calls().scratch_free(scratch.iova).unwrap_err(), Errno::INVAL);
    mediated.dma_map(map(scratch.iova, 1, 0)).unwrap();
    drop(mediated);
    assert!(device.maps.lock().unwrap().is_empty());
}

#[test]
fn a_timer_fires_once_and_a_cancelled_one_never() {
    let device = Arc::new(FakeDevice::new());
    let (sender, fired) = mpsc::channel();
    let sender = Mutex::new(sender);
    let mediated = open_script(&device, |script| {
        // Before the device exists.
        script.calls.timer_arm(1, 0).unwrap();
        script.event = Box::new(move |_, event| {
            sender.lock().unwrap().send(event.args[0]).unwrap();
            Ok(())
        });
    })
    .unwrap();
    let calls = mediated.host_calls();
    assert_eq!(fired.recv_timeout(Duration::from_secs(10)).unwrap(), 1);
    for cookie in 0..16 {
        calls.timer_arm(cookie, 3_600_000_000_000).unwrap();
    }
    assert_eq!(calls.timer_arm(16, 1).unwrap_err(), Errno::NOSPC);
    calls.timer_cancel(3).unwrap();
    calls.timer_arm(16, 1).unwrap();
    assert_eq!(fired.recv_timeout(Duration::from_secs(10)).unwrap(), 16);
    drop(mediated);
    assert!(fired.try_recv().is_err());
}

#[test]
fn a_wait_ends_at_its_deadline_or_when_it_is_called_off() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_plain(&device);
    let calls = mediated.host_calls();
    assert_eq!(calls.wait(u64::MAX, calls.now() + 1_000_000, &|| false).unwrap_err(), Errno::TIMEDOUT);
    assert_eq!(calls.wait(u64::MAX, u64::MAX, &|| true).unwrap_err(), Errno::CANCELED);
    calls.wait(1000, u64::MAX, &|| false).unwrap();
}

#[test]
fn a_device_that_its_plug_in_fails_answers_enodev() {
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| {
        script.claims = vec![claim(0, 0, 4)];
        script.write = Box::new(|calls, _, _, _| {
            calls.request(Request::Fail(Errno::IO)).unwrap();
            Verdict::Handled
        });
    })
    .unwrap();
    mediated.region_write(0, 0, &[0]).unwrap();
    let gone = mediated.region_read(0, 8, &mut [0]).unwrap_err();
    assert_eq!((gone.errno(), gone.remedy()), (Errno::NODEV, Remedy::Lost));
    assert_eq!(mediated.reset().unwrap_err().errno(), Errno::NODEV);
}
