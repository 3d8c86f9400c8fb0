//! Questions to a device and its answers, in VFIO's words.

use std::os::fd::BorrowedFd;

use crate::sys::DmaMemory;

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
pub const CONFIG_REGION: u32 = 7;
/// `VFIO_PCI_NUM_REGIONS`: a plain PCI device's region indices lie below.
pub const PCI_NUM_REGIONS: u32 = 9;

/// How the device was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    VfioGroup,
    VfioCdev,
    Sim,
}

/// Which device this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// PCI address, mdev UUID, or a simulated device's name
    pub name: String,
    pub backend: Backend,
    pub vendor_id: u16,
    pub device_id: u16,
    pub subsystem_vendor_id: u16,
    pub subsystem_device_id: u16,
    /// Base class, subclass and programming interface in bits 23:0
    pub class_code: u32,
    pub revision: u8,
    /// An SR-IOV VF. Its COMMAND.MEMORY is no bit of the bus: its memory is governed by its PF's VF MSE, and the bit that the
    /// kernel shows in its place is virtual.
    pub virtual_function: bool,
    /// The first 256 bytes (or as many as there are) of configuration space, as they were at open
    pub config: Vec<u8>,
}

/// `struct vfio_device_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`
    pub flags: u32,
    pub num_regions: u32,
    pub num_irqs: u32,
}

/// A byte range of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Area {
    pub offset: u64,
    pub length: u64,
}

/// `struct vfio_region_info` with its capabilities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    pub index: u32,
    /// `VFIO_REGION_INFO_FLAG_*` without CAPS
    pub flags: u32,
    pub size: u64,
    pub capabilities: Vec<RegionCapability>,
}

/// One entry of a region's capability chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegionCapability {
    SparseMmap(Vec<Area>),
    Type {
        type_: u32,
        subtype: u32,
    },
    MsixMappable,
    /// Kept, so that a newer kernel's capability is shown and not lost.
    Other {
        id: u16,
        version: u16,
        data: Vec<u8>,
    },
}

/// `struct vfio_irq_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    pub index: u32,
    /// `VFIO_IRQ_INFO_*`
    pub flags: u32,
    pub count: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqAction {
    Mask,
    Unmask,
    Trigger,
}

/// Data of a `VFIO_DEVICE_SET_IRQS`.
#[derive(Debug, Clone, Copy)]
pub enum IrqData<'a> {
    None,
    Bool(&'a [bool]),
    /// `None` removes the vector's eventfd (-1)
    EventFd(&'a [Option<BorrowedFd<'a>>]),
}

/// `struct vfio_irq_set`. With `count` 0, TRIGGER and no data the whole index is disabled.
#[derive(Debug, Clone, Copy)]
pub struct IrqSet<'a> {
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub action: IrqAction,
    pub data: IrqData<'a>,
}

/// Memory for the device, kept alive until it is unmapped.
#[derive(Debug, Clone)]
pub struct DmaMap {
    pub iova: u64,
    pub length: u64,
    pub memory: DmaMemory,
    /// Byte offset inside `memory`
    pub offset: u64,
    pub read: bool,
    pub write: bool,
}

/// I/O virtual addresses, `iova .. iova + length`, in bytes; `length` is not 0 and the end does not overflow, except
/// that a range may end at 2^64, which `last` expresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IovaRange {
    pub iova: u64,
    /// The last address, inclusive
    pub last: u64,
}

/// `VFIO_DEVICE_FEATURE_*` numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Feature {
    PciVfToken = 0,
    Migration = 1,
    MigDeviceState = 2,
    LowPowerEntry = 3,
    LowPowerEntryWithWakeup = 4,
    LowPowerExit = 5,
    DmaLoggingStart = 6,
    DmaLoggingStop = 7,
    DmaLoggingReport = 8,
    MigDataSize = 9,
    BusMaster = 10,
    DmaBuf = 11,
    MigPrecopyInfoV2 = 12,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureAccess {
    Get,
    Set,
}

/// The power state of a PCI function, as the kernel (or the model) knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PowerState {
    D0,
    D1,
    D2,
    /// The function's power management holds it; it answers configuration space only
    D3Hot,
    /// Without power
    D3Cold,
    /// The kernel does not say
    Unknown,
}

impl std::fmt::Display for PowerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::D0 => "D0",
            Self::D1 => "D1",
            Self::D2 => "D2",
            Self::D3Hot => "D3hot",
            Self::D3Cold => "D3cold",
            Self::Unknown => "unknown",
        })
    }
}

/// Where a device's power is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Power {
    pub state: PowerState,
    /// Suspended by runtime power management. A function without a power capability is suspended in D0.
    pub suspended: bool,
}

/// `struct vfio_precopy_info`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrecopyInfo {
    pub initial_bytes: u64,
    pub dirty_bytes: u64,
}
