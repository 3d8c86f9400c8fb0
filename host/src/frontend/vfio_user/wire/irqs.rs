//! DEVICE_SET_IRQS.

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK,
};

use super::{IRQ_VECTORS_MAX, MSG_FDS_MAX, Put, Reader, Result, WireError, at_least, at_most};
use crate::device::IrqAction;

/// One byte for each vector, as they came; every number but 0 is true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bools<'a>(&'a [u8]);

impl<'a> Bools<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn iter(self) -> impl Iterator<Item = bool> + 'a {
        self.0.iter().map(|byte| *byte != 0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetIrqsData<'a> {
    None,
    /// One for each vector
    Bool(Bools<'a>),
    /// The message's file descriptors, one for each vector
    EventFds,
    /// Every vector loses its eventfd
    NoEventFds,
}

/// DEVICE_SET_IRQS. With `count` 0, `start` 0, TRIGGER and no data the whole index is disabled; otherwise `count` is
/// not 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub action: IrqAction,
    pub data: SetIrqsData<'a>,
}

impl<'a> SetIrqs<'a> {
    pub const LENGTH: usize = 20;

    pub fn parse(payload: &'a [u8], fds: usize) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (argsz, flags) = (reader.u32()?, reader.u32()?);
        let (index, start, count) = (reader.u32()?, reader.u32()?, reader.u32()?);
        at_least(argsz, Self::LENGTH as u64)?;
        let action = match flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
            VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
            VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
            VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(WireError::Invalid("SET_IRQS needs exactly one action")),
        };
        if flags & !(VFIO_IRQ_SET_ACTION_TYPE_MASK | VFIO_IRQ_SET_DATA_TYPE_MASK) != 0 {
            return Err(WireError::Invalid("flags of SET_IRQS"));
        }
        at_most("vectors", u64::from(count), u64::from(IRQ_VECTORS_MAX))?;
        if start.checked_add(count).is_none() {
            return Err(WireError::Invalid("vectors beyond the last number"));
        }
        let bytes = reader.rest();
        let data = match flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
            VFIO_IRQ_SET_DATA_NONE => SetIrqsData::None,
            VFIO_IRQ_SET_DATA_BOOL => SetIrqsData::Bool(Bools(Reader::new(bytes).exactly(count as usize)?)),
            VFIO_IRQ_SET_DATA_EVENTFD if fds == 0 => SetIrqsData::NoEventFds,
            VFIO_IRQ_SET_DATA_EVENTFD if fds == count as usize => SetIrqsData::EventFds,
            VFIO_IRQ_SET_DATA_EVENTFD => return Err(WireError::Fds { found: fds, most: count as usize }),
            _ => return Err(WireError::Invalid("SET_IRQS needs exactly one kind of data")),
        };
        let disable = start == 0 && action == IrqAction::Trigger && data == SetIrqsData::None;
        if count == 0 && !disable {
            return Err(WireError::Invalid("SET_IRQS of no vector"));
        }
        if !matches!(data, SetIrqsData::Bool(_)) {
            Reader::new(bytes).end()?;
        }
        let fds_max = if data == SetIrqsData::EventFds { MSG_FDS_MAX } else { 0 };
        if fds > fds_max {
            return Err(WireError::Fds { found: fds, most: fds_max });
        }
        Ok(Self { index, start, count, action, data })
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        let action = match self.action {
            IrqAction::Mask => VFIO_IRQ_SET_ACTION_MASK,
            IrqAction::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            IrqAction::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        };
        let (data, bytes) = match self.data {
            SetIrqsData::None => (VFIO_IRQ_SET_DATA_NONE, &[][..]),
            SetIrqsData::Bool(bools) => (VFIO_IRQ_SET_DATA_BOOL, bools.0),
            SetIrqsData::EventFds | SetIrqsData::NoEventFds => (VFIO_IRQ_SET_DATA_EVENTFD, &[][..]),
        };
        out.u32((Self::LENGTH + bytes.len()) as u32);
        out.u32(action | data);
        out.u32(self.index);
        out.u32(self.start);
        out.u32(self.count);
        out.extend_from_slice(bytes);
    }
}
