//! Eventfds that a client chose to hurt.

mod mediation_support;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use mediation_support::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};
use vfio_mediate::device::sim::{Edu, EduOptions};
use vfio_mediate::device::{IrqAction, IrqData, IrqSet};
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::mediation::mediator::ExtraIrq;

const FULL: u64 = u64::MAX - 1;
/// The first index behind the fake device's own.
const EXTRA: u32 = 5;

fn edu() -> Arc<MediatedDevice> {
    let device = Edu::new(EduOptions::default()).unwrap();
    MediatedDevice::with_mediator(device, space(), Default::default(), |_| Ok(None)).unwrap()
}

fn trigger(mediated: &MediatedDevice, index: u32, data: IrqData<'_>) -> Result<(), Errno> {
    let set = IrqSet { index, start: 0, count: 1, action: IrqAction::Trigger, data };
    mediated.set_irqs(&set).map_err(|error| error.errno())
}

fn arm(mediated: &MediatedDevice, index: u32, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    trigger(mediated, index, IrqData::EventFd(&[Some(fd)]))
}

/// Full, and its writers wait.
fn full() -> OwnedFd {
    let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&fd, &FULL.to_ne_bytes()).unwrap();
    fd
}

fn counter(fd: &OwnedFd) -> u64 {
    let mut counter = [0; 8];
    rustix::io::read(fd, &mut counter).unwrap();
    u64::from_ne_bytes(counter)
}

/// spec: IRQ-3
#[test]
fn what_is_no_eventfd_is_refused_and_changes_nothing() {
    let (read, write) = rustix::pipe::pipe().unwrap();
    let null = std::fs::File::options().write(true).open("/dev/null").unwrap();
    let mediated = edu();
    for index in [VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX] {
        let good = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        arm(&mediated, index, good.as_fd()).unwrap();
        for wrong in [read.as_fd(), write.as_fd(), null.as_fd()] {
            assert_eq!(arm(&mediated, index, wrong), Err(Errno::INVAL), "index {index}");
        }
        trigger(&mediated, index, IrqData::None).unwrap();
        assert_eq!(counter(&good), 1, "index {index}");
        trigger(&mediated, index, IrqData::EventFd(&[None])).unwrap();
    }
    assert_eq!(mediated.low_power_entry(Some(write.as_fd())).unwrap_err().errno(), Errno::INVAL);
}

/// spec: IRQ-3
#[test]
fn a_full_eventfd_holds_nobody_up() {
    let mediated = edu();
    for index in [VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX] {
        let client = full();
        arm(&mediated, index, client.as_fd()).unwrap();
        trigger(&mediated, index, IrqData::None).unwrap();
        assert_eq!(counter(&client), FULL);
        trigger(&mediated, index, IrqData::None).unwrap();
        assert_eq!(counter(&client), 1, "index {index}");
        trigger(&mediated, index, IrqData::EventFd(&[None])).unwrap();
    }
    // A plug-in's vector, which the host signals itself.
    let device = Arc::new(FakeDevice::new());
    let mediated = open_script(&device, |script| script.extra_irqs = vec![ExtraIrq { flags: 1, count: 1 }]).unwrap();
    let client = full();
    arm(&mediated, EXTRA, client.as_fd()).unwrap();
    trigger(&mediated, EXTRA, IrqData::None).unwrap();
    assert_eq!(counter(&client), FULL);
}
