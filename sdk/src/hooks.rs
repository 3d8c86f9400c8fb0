//! Which bytes and vectors of a device a plug-in claims, and with which hooks.
//!
//! **Owns** [`Layout`], which `open` fills in once; nothing of it changes afterwards. A hook that was not asked for is null
//! in the table, so it costs nothing.
//!
//! *Contract of every hook*: on any thread, concurrently with every other function of the device but `close`; state lives
//! behind atomics or locks of the plug-in's own. Which device states it may see is said where it is asked for. A panic
//! denies the access with EIO and is logged.
#![allow(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::abi;
use crate::access::{Access, Verdict};
use crate::context::{Context, size32};
use crate::device::{Device, DirtyTracking, Events, Exactness, Migration};
use crate::state::MigrationFlags;
use crate::{Errno, Result};

/// In which of the two trap maps a claim holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Maps(u32);

impl Maps {
    /// Normal running
    pub const NORMAL: Self = Self(abi::MAP_NORMAL);
    /// While dirty pages are tracked
    pub const TRACKING: Self = Self(abi::MAP_TRACKING);
    /// Always
    pub const BOTH: Self = Self(abi::MAP_NORMAL | abi::MAP_TRACKING);

    pub const fn raw(self) -> u32 {
        self.0
    }
}

type Rw<D> = dyn Fn(&D, &Context<'_>, &mut Access<'_>) -> Verdict + Send + Sync;
type RegionInfo<D> = dyn Fn(&D, &Context<'_>, &mut abi::RegionInfo) -> Result<()> + Send + Sync;
type Mmap<D> = dyn for<'d> Fn(&'d D, &Context<'_>, MmapRange) -> Option<MmapFile<'d>> + Send + Sync;
type IrqInfo<D> = dyn Fn(&D, &Context<'_>, &mut abi::IrqInfo) -> Result<()> + Send + Sync;
type SetIrqs<D> = dyn Fn(&D, &Context<'_>, &IrqRequest<'_>) -> Verdict + Send + Sync;
type Fired<D> = dyn Fn(&D, &Context<'_>, Vector) -> Verdict + Send + Sync;

/// Bytes of a claim that a client wants to map; on page boundaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmapRange {
    pub region: u32,
    pub offset: u64,
    pub length: u64,
}

/// A file that is mapped in place of the device. The host duplicates it.
#[derive(Debug, Clone, Copy)]
pub struct MmapFile<'a> {
    pub fd: BorrowedFd<'a>,
    /// Page-aligned
    pub offset: u64,
}

/// One interrupt vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vector {
    pub index: u32,
    pub vector: u32,
}

/// The hooks of a claim or of an extra region.
pub(crate) struct RegionHookSet<D> {
    pub(crate) rw: Option<Box<Rw<D>>>,
    pub(crate) region_info: Option<Box<RegionInfo<D>>>,
    pub(crate) mmap: Option<Box<Mmap<D>>>,
}

/// The hooks of claimed vectors.
pub(crate) struct IrqHookSet<D> {
    pub(crate) irq_info: Option<Box<IrqInfo<D>>>,
    pub(crate) set_irqs: Option<Box<SetIrqs<D>>>,
    pub(crate) fired: Option<Box<Fired<D>>>,
}

/// A claimed byte range of one region. Its bytes are never mapped to a client, whether it has hooks or not.
pub struct Claim<D> {
    pub(crate) region: u32,
    pub(crate) range: Range<u64>,
    pub(crate) maps: Maps,
    pub(crate) hooks: RegionHookSet<D>,
}

impl<D: Device> Claim<D> {
    /// Bytes `range` of `region`, in both maps, until [`Self::in_maps`] says otherwise. In one map, claims of one region do
    /// not overlap.
    pub fn new(region: u32, range: Range<u64>) -> Self {
        Self { region, range, maps: Maps::BOTH, hooks: RegionHookSet { rw: None, region_info: None, mmap: None } }
    }

    pub fn in_maps(mut self, maps: Maps) -> Self {
        self.maps = maps;
        self
    }

    /// Called for every access to a byte of the claim, cut to the claim. In RUNNING, RUNNING_P2P, PRE_COPY and
    /// PRE_COPY_P2P; for configuration space after the permission filter, and in STOP and RESUMING too.
    pub fn rw(mut self, hook: impl Fn(&D, &Context<'_>, &mut Access<'_>) -> Verdict + Send + Sync + 'static) -> Self {
        self.hooks.rw = Some(Box::new(hook));
        self
    }

    /// May narrow what the client is told of the region. Any state.
    pub fn region_info(
        mut self,
        hook: impl Fn(&D, &Context<'_>, &mut abi::RegionInfo) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.region_info = Some(Box::new(hook));
        self
    }

    /// May give a file to be mapped in place of the device's bytes; `None`: not mapped. Any state.
    pub fn mmap(
        mut self,
        hook: impl for<'d> Fn(&'d D, &Context<'_>, MmapRange) -> Option<MmapFile<'d>> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.mmap = Some(Box::new(hook));
        self
    }
}

/// Claimed vectors of one irq index.
pub struct IrqClaim<D> {
    pub(crate) index: u32,
    pub(crate) vectors: Range<u32>,
    pub(crate) hooks: IrqHookSet<D>,
}

impl<D: Device> IrqClaim<D> {
    pub fn new(index: u32, vectors: Range<u32>) -> Self {
        Self { index, vectors, hooks: IrqHookSet { irq_info: None, set_irqs: None, fired: None } }
    }

    /// May narrow what the client is told. Any state.
    pub fn irq_info(
        mut self,
        hook: impl Fn(&D, &Context<'_>, &mut abi::IrqInfo) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.irq_info = Some(Box::new(hook));
        self
    }

    /// Called for a `VFIO_DEVICE_SET_IRQS` that touches the vectors. Any state.
    pub fn set_irqs(
        mut self,
        hook: impl Fn(&D, &Context<'_>, &IrqRequest<'_>) -> Verdict + Send + Sync + 'static,
    ) -> Self {
        self.hooks.set_irqs = Some(Box::new(hook));
        self
    }

    /// A vector fired: `Handled` swallows it, `Forward` passes it on. Puts the host between the device and the client.
    pub fn fired(mut self, hook: impl Fn(&D, &Context<'_>, Vector) -> Verdict + Send + Sync + 'static) -> Self {
        self.hooks.fired = Some(Box::new(hook));
        self
    }
}

/// A region that the plug-in adds: there is no device behind it, so it is made with its `rw` hook.
pub struct ExtraRegion<D> {
    pub(crate) flags: u32,
    pub(crate) size: u64,
    pub(crate) type_: u32,
    pub(crate) subtype: u32,
    pub(crate) hooks: RegionHookSet<D>,
}

impl<D: Device> ExtraRegion<D> {
    /// `flags` as `VFIO_REGION_INFO_FLAG_READ | WRITE`, `size` in bytes, `type_` and `subtype` for the region-type
    /// capability. `rw` as in [`Claim::rw`], in any state; `Forward` denies, as nobody is behind it.
    pub fn new(
        flags: u32,
        size: u64,
        (type_, subtype): (u32, u32),
        rw: impl Fn(&D, &Context<'_>, &mut Access<'_>) -> Verdict + Send + Sync + 'static,
    ) -> Self {
        let hooks = RegionHookSet { rw: Some(Box::new(rw) as Box<Rw<D>>), region_info: None, mmap: None };
        Self { flags, size, type_, subtype, hooks }
    }
}

/// What a plug-in does for one device, filled in by [`Plugin::open`](crate::Plugin::open).
pub struct Layout<D: Device> {
    num_regions: u32,
    num_irqs: u32,
    pub(crate) claims: Vec<Claim<D>>,
    pub(crate) irqs: Vec<IrqClaim<D>>,
    pub(crate) extra_regions: Vec<ExtraRegion<D>>,
    pub(crate) extra_irqs: Vec<abi::ExtraIrq>,
    pub(crate) migration: Option<abi::MigrationOps>,
    pub(crate) dirty: Option<abi::DirtyOps>,
    pub(crate) event: Option<EventFn>,
    device: PhantomData<fn() -> D>,
}

pub(crate) type EventFn =
    unsafe extern "C" fn(state: abi::Opaque, ctx: *const abi::CallContext, event: *const abi::Event) -> i32;

impl<D: Device> Layout<D> {
    pub(crate) fn new(num_regions: u32, num_irqs: u32) -> Self {
        Self {
            num_regions,
            num_irqs,
            claims: Vec::new(),
            irqs: Vec::new(),
            extra_regions: Vec::new(),
            extra_irqs: Vec::new(),
            migration: None,
            dirty: None,
            event: None,
            device: PhantomData,
        }
    }

    pub fn claim(&mut self, claim: Claim<D>) -> &mut Self {
        self.claims.push(claim);
        self
    }

    pub fn claim_irqs(&mut self, claim: IrqClaim<D>) -> &mut Self {
        self.irqs.push(claim);
        self
    }

    /// Returns the region's index, which stays for the device's life.
    pub fn extra_region(&mut self, region: ExtraRegion<D>) -> u32 {
        self.extra_regions.push(region);
        self.num_regions + self.extra_regions.len() as u32 - 1
    }

    /// `flags` as `VFIO_IRQ_INFO_*`. Returns the irq index, which stays for the device's life.
    pub fn extra_irq(&mut self, flags: u32, count: u32) -> u32 {
        self.extra_irqs.push(abi::ExtraIrq { struct_size: size32::<abi::ExtraIrq>(), flags, count, reserved: 0 });
        self.num_irqs + self.extra_irqs.len() as u32 - 1
    }

    /// The device's state is saved and restored by its [`Migration`].
    pub fn migration(&mut self, flags: MigrationFlags) -> &mut Self
    where
        D: Migration,
    {
        self.migration = Some(crate::export::migration_ops::<D>(flags));
        self
    }

    /// The device's dirty pages are known to its [`DirtyTracking`].
    pub fn dirty_tracking(&mut self, exactness: Exactness) -> &mut Self
    where
        D: DirtyTracking,
    {
        self.dirty = Some(crate::export::dirty_ops::<D>(exactness));
        self
    }

    /// The device's [`Events`] is told.
    pub fn events(&mut self) -> &mut Self
    where
        D: Events,
    {
        self.event = Some(crate::export::event::<D>);
        self
    }
}

/// `VFIO_IRQ_SET_ACTION_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqAction {
    Mask,
    Unmask,
    Trigger,
}

/// Data of a [`IrqRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqData<'a> {
    None,
    /// One a vector, 0 or 1
    Bools(&'a [u8]),
    /// One a vector, -1 for none. They stay the host's.
    EventFds(&'a [i32]),
}

/// A `VFIO_DEVICE_SET_IRQS` that touches claimed vectors.
#[derive(Debug)]
pub struct IrqRequest<'a> {
    raw: &'a abi::IrqRequest,
    action: IrqAction,
}

impl<'a> IrqRequest<'a> {
    /// EINVAL for what version 1 does not know.
    ///
    /// # Safety
    /// `raw` and the `count` elements of its data live during `'a`.
    pub(crate) unsafe fn from_raw(raw: *const abi::IrqRequest) -> Result<Self> {
        // SAFETY: by the caller.
        let raw = unsafe { &*raw };
        let action = match raw.action {
            abi::IRQ_MASK => IrqAction::Mask,
            abi::IRQ_UNMASK => IrqAction::Unmask,
            abi::IRQ_TRIGGER => IrqAction::Trigger,
            _ => return Err(Errno::EINVAL),
        };
        let data = match raw.data_kind {
            abi::IRQ_DATA_NONE => true,
            abi::IRQ_DATA_BOOL => !raw.bools.is_null(),
            abi::IRQ_DATA_EVENTFD => !raw.fds.is_null(),
            _ => false,
        };
        let valid = data && raw.struct_size as usize >= size_of::<abi::IrqRequest>();
        if valid { Ok(Self { raw, action }) } else { Err(Errno::EINVAL) }
    }

    pub(crate) fn as_raw(&self) -> *const abi::IrqRequest {
        self.raw
    }

    /// VFIO irq index.
    pub fn index(&self) -> u32 {
        self.raw.index
    }

    pub fn start(&self) -> u32 {
        self.raw.start
    }

    /// With 0, [`IrqAction::Trigger`] and no data the whole index is disabled.
    pub fn count(&self) -> u32 {
        self.raw.count
    }

    pub fn action(&self) -> IrqAction {
        self.action
    }

    pub fn data(&self) -> IrqData<'a> {
        let count = self.raw.count as usize;
        match self.raw.data_kind {
            // SAFETY: `count` elements, by `from_raw`, which also saw that the pointer is not null.
            abi::IRQ_DATA_BOOL => IrqData::Bools(unsafe { std::slice::from_raw_parts(self.raw.bools, count) }),
            // SAFETY: as above.
            abi::IRQ_DATA_EVENTFD => IrqData::EventFds(unsafe { std::slice::from_raw_parts(self.raw.fds, count) }),
            _ => IrqData::None,
        }
    }
}

impl<D> fmt::Debug for Claim<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "claim of {:#x?} of region {}, {:?}", self.range, self.region, self.maps)
    }
}

impl<D> fmt::Debug for IrqClaim<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "claim of vectors {:?} of irq {}", self.vectors, self.index)
    }
}

impl<D> fmt::Debug for ExtraRegion<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region of {:#x} bytes, type {:#x}.{:#x}", self.size, self.type_, self.subtype)
    }
}

impl<D: Device> fmt::Debug for Layout<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layout").field("claims", &self.claims).field("irqs", &self.irqs).finish_non_exhaustive()
    }
}
