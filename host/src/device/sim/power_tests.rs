//! Low power of the models.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX;

use super::super::{DmaFaultKind, Edu, EduOptions, Sleep, Stateful, StatefulOptions, Time, VirtualClock, regs};
use crate::device::*;
use crate::sys::{EventFd, Mapping, Seal, memfd};

fn edu(sleep: Sleep) -> Arc<Edu> {
    Edu::new(EduOptions { sleep, time: Time::Virtual(VirtualClock::new()), ..EduOptions::default() }).unwrap()
}

fn errno<T>(result: Result<T>) -> Option<Errno> {
    result.err().map(|error| error.errno)
}

fn state(device: &dyn Device) -> (PowerState, bool) {
    let power = device.power().unwrap();
    (power.state, power.suspended)
}

/// spec: POWER-1
#[test]
fn a_second_entry_is_einval_and_exit_is_idempotent() {
    let awake = (PowerState::D0, false);
    for (sleep, asleep) in
        [(Sleep::D3Hot, (PowerState::D3Hot, true)), (Sleep::D3Cold, (PowerState::D3Cold, true)), (Sleep::Never, awake)]
    {
        let device = edu(sleep);
        for _ in 0..2 {
            assert_eq!(errno(device.low_power_exit()), None, "nothing to leave");
            assert_eq!(state(&*device), awake);
            device.low_power_entry(None).unwrap();
            assert_eq!(state(&*device), asleep);
            let wakeup = EventFd::new().unwrap();
            for again in [None, Some(wakeup.as_fd())] {
                assert_eq!(errno(device.low_power_entry(again)), Some(Errno::INVAL));
                assert_eq!(state(&*device), asleep);
            }
            device.low_power_exit().unwrap();
            device.low_power_exit().unwrap();
            assert_eq!(state(&*device), awake);
            assert_eq!(wakeup.read(), Ok(0));
        }
    }
}

/// spec: POWER-2
#[test]
fn the_wakeup_is_signalled_once_and_only_for_a_device_that_slept() {
    let wakeup = EventFd::new().unwrap();
    let device = edu(Sleep::D3Hot);
    // By its owner.
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    device.low_power_exit().unwrap();
    device.low_power_exit().unwrap();
    assert_eq!(wakeup.read(), Ok(1));
    // By another: that ends low power, and it may be entered again.
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    device.resume_by_another();
    device.resume_by_another();
    assert_eq!((state(&*device), wakeup.read()), ((PowerState::D0, false), Ok(1)));
    device.low_power_exit().unwrap();
    assert_eq!(wakeup.read(), Ok(0));
    // Without a wake-up another's visit changes nothing.
    device.low_power_entry(None).unwrap();
    device.resume_by_another();
    assert_eq!(state(&*device), (PowerState::D3Hot, true));
    device.low_power_exit().unwrap();
    assert_eq!(wakeup.read(), Ok(0));
    // Never suspended: nothing to wake up.
    let device = edu(Sleep::Never);
    device.low_power_entry(Some(wakeup.as_fd())).unwrap();
    device.resume_by_another();
    assert_eq!(errno(device.low_power_entry(None)), Some(Errno::INVAL), "nobody has ended it");
    device.low_power_exit().unwrap();
    assert_eq!(wakeup.read(), Ok(0));
}

/// spec: POWER-3
#[test]
fn a_pf_with_vfs_and_a_device_without_low_power_refuse_and_nothing_changes() {
    let pf = edu(Sleep::D3Hot);
    pf.enable_vfs(1);
    assert_eq!(errno(pf.low_power_entry(None)), Some(Errno::BUSY));
    assert_eq!(state(&*pf), (PowerState::D0, false));
    pf.enable_vfs(0);
    pf.low_power_entry(None).unwrap();

    let old = edu(Sleep::Unsupported);
    assert_eq!(errno(old.low_power_entry(None)), Some(Errno::NOTTY));
    assert_eq!(errno(old.low_power_exit()), Some(Errno::NOTTY));
    let features = [Feature::LowPowerEntry, Feature::LowPowerEntryWithWakeup, Feature::LowPowerExit];
    for feature in features {
        assert!(!old.probe_feature(feature, FeatureAccess::Set));
        assert!(pf.probe_feature(feature, FeatureAccess::Set) && !pf.probe_feature(feature, FeatureAccess::Get));
    }
}

/// spec: POWER-4
#[test]
fn intx_is_masked_while_suspended_and_unmasked_only_if_it_was_not_masked_before() {
    let device = edu(Sleep::D3Hot);
    let event = EventFd::new().unwrap();
    let intx =
        |action, data| device.set_irqs(&IrqSet { index: VFIO_PCI_INTX_IRQ_INDEX, start: 0, count: 1, action, data });
    let fds = [Some(event.as_fd())];
    intx(IrqAction::Trigger, IrqData::EventFd(&fds)).unwrap();
    for client_masked in [false, true, false] {
        let action = if client_masked { IrqAction::Mask } else { IrqAction::Unmask };
        intx(action, IrqData::None).unwrap();
        device.low_power_entry(None).unwrap();
        assert!(device.is_intx_masked());
        device.low_power_exit().unwrap();
        assert_eq!(device.is_intx_masked(), client_masked);
    }
}

/// spec: POWER-5
#[test]
fn a_suspended_model_counts_every_access_and_does_no_dma() {
    let clock = VirtualClock::new();
    let device =
        Edu::new(EduOptions { time: Time::Virtual(clock.clone()), sleep: Sleep::D3Hot, ..EduOptions::default() })
            .unwrap();
    let file = memfd("power", 4096, Seal::Size).unwrap();
    let memory = Arc::new(Mapping::new(&file, 0, 4096).unwrap());
    device
        .dma_map(&DmaMap { iova: 0, length: 4096, memory: memory.into(), offset: 0, read: true, write: true })
        .unwrap();
    device.region_write(CONFIG_REGION, 4, &6_u16.to_le_bytes()).unwrap();
    for (register, value) in [(0x80, 0x40000_u64), (0x88, 0), (0x90, 64), (0x98, 3)] {
        device.region_write(0, register, &value.to_le_bytes()).unwrap();
    }
    assert_eq!(device.accesses_while_suspended(), 0);
    device.low_power_entry(None).unwrap();
    let mut word = [0; 4];
    let accesses = [
        device.region_read(0, 0, &mut word),
        device.region_write(0, 4, &word),
        device.region_read(CONFIG_REGION, 0, &mut word),
        device.region_write(CONFIG_REGION, 4, &word[..2]),
        device.reset(),
    ];
    assert!(accesses.iter().all(|access| access.as_ref().is_err_and(|error| error.errno == Errno::IO)), "{accesses:?}");
    assert_eq!(device.accesses_while_suspended(), 5);
    device.clock().wait(std::time::Duration::from_millis(200));
    assert_eq!(device.dma_faults().iter().map(|fault| fault.kind).collect::<Vec<_>>(), [DmaFaultKind::Suspended]);
    device.low_power_exit().unwrap();
    device.region_read(0, 0x98, &mut word).unwrap();
    assert_eq!(device.accesses_while_suspended(), 5);

    // Without power nothing is kept.
    for (sleep, kept) in [(Sleep::D3Hot, 7), (Sleep::D3Cold, 0)] {
        let device = Stateful::new(StatefulOptions { sleep, ..StatefulOptions::default() }).unwrap();
        device.region_write(0, regs::PATTERN, &7_u32.to_le_bytes()).unwrap();
        device.low_power_entry(None).unwrap();
        device.low_power_exit().unwrap();
        device.region_read(0, regs::PATTERN, &mut word).unwrap();
        assert_eq!(u32::from_le_bytes(word), kept);
    }
}
