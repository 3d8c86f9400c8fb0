//! A model's interrupts, as vfio-pci delivers them: INTx as a level that is masked by being signalled, MSI as edges.
//!
//! States: *none*, *INTx*, *MSI*; INTx and MSI are never enabled together. REQ and ERR are apart.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_NUM_IRQS, VFIO_PCI_REQ_IRQ_INDEX,
};

use crate::device::{IrqAction, IrqData, IrqInfo, IrqSet};
use crate::sys::{is_eventfd, signal_shared};

pub(super) const NUM_IRQS: u32 = VFIO_PCI_NUM_IRQS;

#[derive(Debug, Default)]
enum Mode {
    #[default]
    None,
    Intx {
        eventfd: OwnedFd,
        masked: bool,
    },
    /// By vector
    Msi(Vec<Option<OwnedFd>>),
}

#[derive(Debug)]
pub(super) struct Irqs {
    msi_vectors: u32,
    mode: Mode,
    request: Option<OwnedFd>,
    /// ERR exists on PCI Express only
    express: bool,
    error: Option<OwnedFd>,
    /// The device asserts INTx
    level: bool,
    /// INTx was masked by being suspended, and by nobody else
    masked_by_suspend: bool,
    /// COMMAND.INTX_DISABLE
    intx_disabled: bool,
}

impl Irqs {
    pub(super) fn new(msi_vectors: u32) -> Self {
        Self {
            msi_vectors,
            mode: Mode::None,
            request: None,
            express: false,
            error: None,
            level: false,
            masked_by_suspend: false,
            intx_disabled: false,
        }
    }

    /// With the index that reports errors.
    pub(super) fn express(msi_vectors: u32) -> Self {
        Self { express: true, ..Self::new(msi_vectors) }
    }

    /// The kernel wants the device back. False when nobody listens.
    pub(super) fn raise_request(&self) -> bool {
        self.request.as_ref().inspect(|eventfd| signal(eventfd)).is_some()
    }

    /// The device reported an uncorrectable error. False when nobody listens.
    pub(super) fn raise_error(&self) -> bool {
        self.error.as_ref().inspect(|eventfd| signal(eventfd)).is_some()
    }

    pub(super) fn suspend(&mut self) {
        if let Mode::Intx { masked: masked @ false, .. } = &mut self.mode {
            *masked = true;
            self.masked_by_suspend = true;
        }
    }

    pub(super) fn resume(&mut self) {
        if std::mem::take(&mut self.masked_by_suspend)
            && let Mode::Intx { masked, .. } = &mut self.mode
        {
            *masked = false;
        }
        self.deliver_intx();
    }

    /// Whether INTx is enabled and masked, by whomever.
    pub(super) fn intx_masked(&self) -> bool {
        matches!(self.mode, Mode::Intx { masked: true, .. })
    }

    pub(super) fn info(&self, index: u32) -> Result<IrqInfo, Errno> {
        let (flags, count) = match index {
            VFIO_PCI_INTX_IRQ_INDEX => (VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED, 1),
            VFIO_PCI_MSI_IRQ_INDEX => (VFIO_IRQ_INFO_NORESIZE, self.msi_vectors),
            VFIO_PCI_MSIX_IRQ_INDEX => (VFIO_IRQ_INFO_NORESIZE, 0),
            VFIO_PCI_REQ_IRQ_INDEX => (VFIO_IRQ_INFO_NORESIZE, 1),
            VFIO_PCI_ERR_IRQ_INDEX if self.express => (VFIO_IRQ_INFO_NORESIZE, 1),
            _ => return Err(Errno::INVAL),
        };
        Ok(IrqInfo { index, flags: flags | VFIO_IRQ_INFO_EVENTFD, count })
    }

    pub(super) fn is_armed(&self) -> bool {
        !matches!(self.mode, Mode::None) || self.request.is_some() || self.error.is_some()
    }

    pub(super) fn msi_enabled(&self) -> bool {
        matches!(self.mode, Mode::Msi(_))
    }

    /// The device asserts its INTx, whoever has masked it.
    pub(super) fn level(&self) -> bool {
        self.level
    }

    /// The device raises or lowers its INTx.
    pub(super) fn set_level(&mut self, level: bool) {
        self.level = level;
        self.deliver_intx();
    }

    pub(super) fn set_intx_disabled(&mut self, disabled: bool) {
        self.intx_disabled = disabled;
        self.deliver_intx();
    }

    /// The device sends an MSI. Without an eventfd it goes nowhere.
    pub(super) fn send_msi(&self, vector: usize) {
        if let Mode::Msi(vectors) = &self.mode
            && let Some(Some(eventfd)) = vectors.get(vector)
        {
            signal(eventfd);
        }
    }

    /// `VFIO_DEVICE_SET_IRQS`.
    pub(super) fn set(&mut self, request: &IrqSet<'_>) -> Result<(), Errno> {
        let available = self.info(request.index)?.count;
        let end = request.start.checked_add(request.count).ok_or(Errno::INVAL)?;
        let entries = match request.data {
            IrqData::None => request.count as usize,
            IrqData::Bool(values) => values.len(),
            IrqData::EventFd(values) => values.len(),
        };
        if request.start >= available || end > available || entries != request.count as usize {
            return Err(Errno::INVAL);
        }
        let disable = request.count == 0 && matches!(request.data, IrqData::None);
        match (request.index, request.action) {
            (_, IrqAction::Trigger) if disable => self.disable(request.index),
            _ if request.count == 0 => Err(Errno::INVAL),
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Trigger) => self.trigger_intx(request.data),
            (VFIO_PCI_INTX_IRQ_INDEX, action) => self.mask_intx(action == IrqAction::Mask, request.data),
            (VFIO_PCI_MSI_IRQ_INDEX, IrqAction::Trigger) => self.trigger_msi(request.start as usize, end, request.data),
            (VFIO_PCI_REQ_IRQ_INDEX, IrqAction::Trigger) => trigger_one(&mut self.request, request.data),
            (VFIO_PCI_ERR_IRQ_INDEX, IrqAction::Trigger) => trigger_one(&mut self.error, request.data),
            _ => Err(Errno::NOTTY),
        }
    }

    fn disable(&mut self, index: u32) -> Result<(), Errno> {
        match (index, &self.mode) {
            (VFIO_PCI_REQ_IRQ_INDEX, _) => self.request = None,
            (VFIO_PCI_ERR_IRQ_INDEX, _) => self.error = None,
            (VFIO_PCI_INTX_IRQ_INDEX, Mode::Intx { .. }) | (VFIO_PCI_MSI_IRQ_INDEX, Mode::Msi(_)) => {
                self.mode = Mode::None;
            }
            (_, Mode::None) => {}
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    fn trigger_intx(&mut self, data: IrqData<'_>) -> Result<(), Errno> {
        match (data, &mut self.mode) {
            (IrqData::EventFd([Some(fd)]), Mode::None) => {
                self.mode = Mode::Intx { eventfd: duplicate(fd)?, masked: false };
                self.deliver_intx();
            }
            (IrqData::EventFd([Some(fd)]), Mode::Intx { eventfd, masked }) => {
                *eventfd = duplicate(fd)?;
                *masked = false;
                self.deliver_intx();
            }
            (IrqData::EventFd([None]), Mode::None | Mode::Intx { .. }) => self.mode = Mode::None,
            (IrqData::None | IrqData::Bool([true]), Mode::Intx { eventfd, .. }) => signal(eventfd),
            (IrqData::Bool([false]), Mode::Intx { .. }) => {}
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    fn mask_intx(&mut self, mask: bool, data: IrqData<'_>) -> Result<(), Errno> {
        let Mode::Intx { masked, .. } = &mut self.mode else { return Err(Errno::INVAL) };
        match data {
            IrqData::None | IrqData::Bool([true]) => *masked = mask,
            IrqData::Bool(_) => {}
            // An unmask eventfd needs somebody who waits for it: the models have nobody.
            IrqData::EventFd(_) => return Err(Errno::NOTTY),
        }
        self.deliver_intx();
        Ok(())
    }

    fn trigger_msi(&mut self, start: usize, end: u32, data: IrqData<'_>) -> Result<(), Errno> {
        match (data, &mut self.mode) {
            (IrqData::EventFd(fds), Mode::None) => {
                let mut vectors: Vec<Option<OwnedFd>> = (0..end).map(|_| None).collect();
                place(&mut vectors, start, fds)?;
                // Enabling MSI takes the pin away.
                self.level = false;
                self.mode = Mode::Msi(vectors);
            }
            (IrqData::EventFd(fds), Mode::Msi(vectors)) if end as usize <= vectors.len() => place(vectors, start, fds)?,
            (IrqData::None, Mode::Msi(vectors)) if end as usize <= vectors.len() => {
                vectors[start..end as usize].iter().flatten().for_each(signal);
            }
            (IrqData::Bool(values), Mode::Msi(vectors)) if end as usize <= vectors.len() => {
                let chosen = vectors[start..].iter().zip(values).filter(|(_, value)| **value);
                chosen.filter_map(|(eventfd, _)| eventfd.as_ref()).for_each(signal);
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    /// Signals an asserted, unmasked pin, and masks it until it is unmasked.
    fn deliver_intx(&mut self) {
        if let Mode::Intx { eventfd, masked: masked @ false } = &mut self.mode
            && self.level
            && !self.intx_disabled
        {
            signal(eventfd);
            *masked = true;
        }
    }
}

/// An index of one vector that is nobody's interrupt: REQ and ERR.
fn trigger_one(slot: &mut Option<OwnedFd>, data: IrqData<'_>) -> Result<(), Errno> {
    match data {
        IrqData::EventFd([fd]) => *slot = fd.as_ref().map(duplicate).transpose()?,
        IrqData::None | IrqData::Bool([true]) => slot.iter().for_each(signal),
        IrqData::Bool([false]) => {}
        _ => return Err(Errno::INVAL),
    }
    Ok(())
}

fn place(vectors: &mut [Option<OwnedFd>], start: usize, fds: &[Option<BorrowedFd<'_>>]) -> Result<(), Errno> {
    // Every duplicate exists before the first old one is dropped: a failure changes nothing.
    let fresh = fds.iter().map(|fd| fd.as_ref().map(duplicate).transpose()).collect::<Result<Vec<_>, _>>()?;
    for (slot, fd) in vectors[start..].iter_mut().zip(fresh) {
        *slot = fd;
    }
    Ok(())
}

fn duplicate(fd: &BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    if !is_eventfd(*fd) {
        return Err(Errno::INVAL);
    }
    fd.try_clone_to_owned().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))
}

fn signal(eventfd: &OwnedFd) {
    signal_shared(eventfd.as_fd());
}
