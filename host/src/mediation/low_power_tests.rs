//! What only the inside can see of low power.

use std::os::fd::AsFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::VFIO_PCI_MSI_IRQ_INDEX;

use super::*;
use crate::device::sim::{Edu, EduOptions};
use crate::device::{IrqAction, IrqData, IrqSet};
use crate::mediation::Limits;
use crate::mediation::calls::Task;
use crate::mediation::gate::Standing;
use crate::memory::{AddressSpace, GuestRam};
use crate::sys::EventFd;

fn open(sim: &Arc<Edu>) -> Arc<MediatedDevice> {
    let memory = AddressSpace::new(GuestRam::new(1 << 20).unwrap());
    MediatedDevice::with_mediator(sim.clone(), memory, Limits::default(), |_| Ok(None)).unwrap()
}

/// spec: POWER-21
#[test]
fn an_irq_that_comes_meanwhile_reaches_the_client_and_wakes_nobody() {
    let sim = Edu::new(EduOptions::default()).unwrap();
    let device = open(&sim);
    let (event, wakeup) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let fds = [Some(event.as_fd())];
    let (index, action, data) = (VFIO_PCI_MSI_IRQ_INDEX, IrqAction::Trigger, IrqData::EventFd(&fds));
    device.set_irqs(&IrqSet { index, start: 0, count: 1, action, data }).unwrap();
    for wakeup in [None, Some(wakeup.as_fd())] {
        device.low_power_entry(wakeup).unwrap();
        device.irq_fired((index, 0));
        assert_eq!(event.read(), Ok(1));
        assert!(device.entered().is_some());
        device.low_power_exit().unwrap();
    }
    assert_eq!(sim.accesses_while_suspended(), 0);
}

/// A request that comes after the entry has attended, but before it has the device alone.
///
/// spec: POWER-21
#[test]
fn an_entry_leaves_no_request_behind() {
    let sim = Edu::new(EduOptions::default()).unwrap();
    let device = open(&sim);
    let deadline = Instant::now() + std::time::Duration::from_secs(30);
    std::thread::scope(|scope| {
        let turn = device.shared.gate.close(Reason::TableSwap, deadline).unwrap();
        let entry = scope.spawn(|| device.low_power_entry(None));
        // It has the lane, hence has attended, and waits for the turn.
        while device.lane.try_enter().is_some() {
            std::thread::yield_now();
        }
        device.shared.queue(Task::Recheck).unwrap();
        turn.release(Standing::OPEN);
        entry.join().unwrap().unwrap();
    });
    assert!(device.entered().is_some());
    assert!(!device.shared.gate.wants_attention(), "it would be attended to, and wake the device");
    assert_eq!(sim.accesses_while_suspended(), 0);
}
