//! A device that a plug-in has opened: its tables, copied and checked, and the calls through them.
//!
//! The owner (mediation) upholds two rules that cannot be seen from here: no hook is in flight when an [`OpenDevice`] is
//! dropped, and migration and dirty-tracking functions are called one at a time.

use std::fmt;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_mediate_sdk::abi::{self, Opaque};
use vfio_mediate_sdk::state::MigrationFlags;

use super::services::with_context;
use super::{copy_sized, copy_whole, entries, errno, status};
use crate::plugin::calls::{
    CallFrame, HostCalls, IrqRequest, IrqRequestData, MmapAnswer, Origin, PluginDirty, PluginMigration, ProbeIdentity,
    Verdict,
};
use crate::plugin::error::OpenError;
use crate::plugin::registry::{PluginInfo, Reference};
use crate::plugin::tables::{Claim, Exactness, ExtraIrq, ExtraRegion, IrqClaim, check_overlap};

/// Largest region that a plug-in may add, in bytes: what VFIO's file offsets have room for.
const EXTRA_SIZE_MAX: u64 = 1 << 40;
/// Most vectors of an irq index that a plug-in adds: as many as MSI-X has.
const EXTRA_VECTORS_MAX: u32 = 2048;

/// One claim's hooks, and what they are handed.
#[derive(Debug, Clone, Copy)]
struct Hooked<H> {
    hooks: H,
    data: Opaque,
}

/// A device opened by a plug-in. Dropping it calls the plug-in's `close`, then gives the reference back.
pub struct OpenDevice {
    state: Opaque,
    ops: abi::DeviceOps,
    migration: Option<(abi::MigrationOps, MigrationFlags)>,
    dirty: Option<(abi::DirtyOps, Exactness)>,
    claims: Vec<Claim>,
    hooks: Vec<Hooked<abi::RegionHooks>>,
    irq_claims: Vec<IrqClaim>,
    irq_hooks: Vec<Hooked<abi::IrqHooks>>,
    extra_regions: Vec<ExtraRegion>,
    extra_hooks: Vec<Hooked<abi::RegionHooks>>,
    extra_irqs: Vec<ExtraIrq>,
    calls: Arc<dyn HostCalls>,
    /// Last: given back after `close` has returned
    reference: Reference,
}

// SAFETY: the raw pointers are the plug-in's own or point at tables that live until `close`; the ABI says that hooks may
// be called from any thread.
unsafe impl Send for OpenDevice {}
// SAFETY: as above; functions that the ABI does not allow concurrently are serialised by the owner.
unsafe impl Sync for OpenDevice {}

impl fmt::Debug for OpenDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OpenDevice({}, {} claims)", self.reference.card().info().name, self.claims.len())
    }
}

fn bytes_of(text: &[u8]) -> abi::Bytes {
    abi::Bytes::borrowed(text)
}

fn identity_of(identity: &ProbeIdentity<'_>) -> abi::DeviceIdentity {
    abi::DeviceIdentity {
        struct_size: size_of::<abi::DeviceIdentity>() as u32,
        backend: identity.backend,
        vendor_id: identity.vendor_id,
        device_id: identity.device_id,
        subsystem_vendor_id: identity.subsystem_vendor_id,
        subsystem_device_id: identity.subsystem_device_id,
        class_code: identity.class_code,
        revision: identity.revision,
        reserved: [0; 3],
        num_regions: identity.num_regions,
        num_irqs: identity.num_irqs,
        name: bytes_of(identity.name.as_bytes()),
        config: bytes_of(identity.config),
    }
}

/// A plug-in's global functions, as the registry calls them.
#[derive(Debug, Clone, Copy)]
pub struct Globals {
    table: abi::Plugin,
    state: Opaque,
}

// SAFETY: the table is of statics; the state is the plug-in's own, and the ABI lets its functions run on any thread.
unsafe impl Send for Globals {}
// SAFETY: as above.
unsafe impl Sync for Globals {}

impl Globals {
    /// Runs the plug-in's `init`.
    pub fn init(library: &super::Library) -> Result<Self, Errno> {
        let mut state: Opaque = std::ptr::null_mut();
        if let Some(init) = library.table().init {
            // SAFETY: a checked plug-in's function, called once, with the process's own table of services.
            status(unsafe { init(&raw const super::services::SERVICES, &raw mut state) })?;
        }
        Ok(Self { table: *library.table(), state })
    }

    /// Whether the plug-in claims the device; an error when it is the plug-in's and cannot be served.
    pub fn probe(&self, identity: &ProbeIdentity<'_>) -> Result<bool, Errno> {
        let Some(probe) = self.table.probe else { return Ok(true) };
        let identity = identity_of(identity);
        // SAFETY: a checked plug-in's function, with its own state.
        match unsafe { probe(self.state, &raw const identity) } {
            abi::PROBE_CLAIM => Ok(true),
            abi::PROBE_DECLINE => Ok(false),
            code => Err(errno(code, Errno::PROTO)),
        }
    }

    pub fn retire(&self) {
        if let Some(retire) = self.table.retire {
            // SAFETY: the last call of the plug-in; the registry makes it once.
            unsafe { retire(self.state) };
        }
    }
}

/// Opens a claimed device. On an error nothing stays open in the plug-in, and the reference is given back.
pub fn open_device(
    identity: &ProbeIdentity<'_>,
    calls: Arc<dyn HostCalls>,
    reference: Reference,
) -> Result<OpenDevice, OpenError> {
    let globals = *reference.member();
    let plugin = reference.card().info().name.clone();
    let failed = |errno| OpenError::Open { plugin: plugin.clone(), device: identity.name.to_owned(), errno };
    let Some(open) = globals.table.open else { return Err(failed(Errno::NOSYS)) };
    // SAFETY: integers and pointers only; the ABI says that `open` finds the structure zeroed.
    let mut ops: abi::DeviceOps = unsafe { std::mem::zeroed() };
    ops.struct_size = size_of::<abi::DeviceOps>() as u32;
    let raw_identity = identity_of(identity);
    let code = with_context(&*calls, CallFrame::new(Origin::Host), |ctx| {
        // SAFETY: a checked plug-in's function, with its own state, a live context and our structure.
        unsafe { open(globals.state, ctx, &raw const raw_identity, &raw mut ops) }
    });
    status(code).map_err(failed)?;
    let mut device = OpenDevice {
        state: ops.state,
        ops,
        migration: None,
        dirty: None,
        claims: Vec::new(),
        hooks: Vec::new(),
        irq_claims: Vec::new(),
        irq_hooks: Vec::new(),
        extra_regions: Vec::new(),
        extra_hooks: Vec::new(),
        extra_irqs: Vec::new(),
        calls,
        reference,
    };
    // From here on dropping `device` closes it in the plug-in, as it must when the tables are no good.
    match device.read_tables(identity) {
        Ok(()) => Ok(device),
        Err(what) => Err(OpenError::Malformed { plugin, device: identity.name.to_owned(), what }),
    }
}

impl OpenDevice {
    fn read_tables(&mut self, identity: &ProbeIdentity<'_>) -> Result<(), String> {
        let ops = self.ops;
        // SAFETY: lists that `open` returned live until `close`; each is checked as it is read.
        unsafe {
            for claim in entries(ops.regions, ops.region_count, "region claims")? {
                self.read_claim(&copy_whole(claim, "a region claim")?, identity)?;
            }
            for claim in entries(ops.irqs, ops.irq_count, "irq claims")? {
                self.read_irq_claim(&copy_whole(claim, "an irq claim")?, identity)?;
            }
            for extra in entries(ops.extra_regions, ops.extra_region_count, "extra regions")? {
                self.read_extra_region(&copy_whole(extra, "an extra region")?)?;
            }
            for extra in entries(ops.extra_irqs, ops.extra_irq_count, "extra irqs")? {
                self.read_extra_irq(&copy_whole(extra, "an extra irq")?)?;
            }
            if !ops.migration.is_null() {
                self.read_migration(copy_sized(ops.migration, "the migration table")?)?;
            }
            if !ops.dirty.is_null() {
                self.read_dirty(copy_sized(ops.dirty, "the dirty-tracking table")?)?;
            }
        }
        check_overlap(&self.claims)
    }

    /// # Safety
    /// The claim's hooks live until `close`.
    unsafe fn read_claim(&mut self, raw: &abi::RegionClaim, identity: &ProbeIdentity<'_>) -> Result<(), String> {
        let at = format!("the claim at {:#x} of region {}", raw.offset, raw.region);
        if raw.region >= identity.num_regions {
            return Err(format!("{at}: the device has {} regions", identity.num_regions));
        }
        if raw.length == 0 || raw.offset.checked_add(raw.length).is_none() {
            return Err(format!("{at}: a length of {:#x} makes no range", raw.length));
        }
        if raw.maps == 0 || raw.maps & !(abi::MAP_NORMAL | abi::MAP_TRACKING) != 0 {
            return Err(format!("{at}: maps {:#x}", raw.maps));
        }
        // SAFETY: by the caller.
        let hooks = unsafe { copy_sized(raw.hooks, "a claim's hooks") }?;
        self.claims.push(Claim {
            region: raw.region,
            offset: raw.offset,
            length: raw.length,
            normal: raw.maps & abi::MAP_NORMAL != 0,
            tracking: raw.maps & abi::MAP_TRACKING != 0,
            has_rw: hooks.rw.is_some(),
            has_region_info: hooks.region_info.is_some(),
            has_mmap: hooks.mmap.is_some(),
        });
        self.hooks.push(Hooked { hooks, data: raw.data });
        Ok(())
    }

    /// # Safety
    /// The claim's hooks live until `close`.
    unsafe fn read_irq_claim(&mut self, raw: &abi::IrqClaim, identity: &ProbeIdentity<'_>) -> Result<(), String> {
        let at = format!("the claim of irq {} from vector {}", raw.index, raw.start);
        if raw.index >= identity.num_irqs {
            return Err(format!("{at}: the device has {} irq indices", identity.num_irqs));
        }
        let Some(end) = raw.start.checked_add(raw.count).filter(|_| raw.count > 0) else {
            return Err(format!("{at}: a count of {}", raw.count));
        };
        let shares =
            |other: &IrqClaim| other.index == raw.index && raw.start < other.start + other.count && other.start < end;
        if self.irq_claims.iter().any(shares) {
            return Err(format!("{at} overlaps another"));
        }
        // SAFETY: by the caller.
        let hooks = unsafe { copy_sized(raw.hooks, "an irq claim's hooks") }?;
        self.irq_claims.push(IrqClaim {
            index: raw.index,
            start: raw.start,
            count: raw.count,
            has_irq_info: hooks.irq_info.is_some(),
            has_set_irqs: hooks.set_irqs.is_some(),
            has_fired: hooks.fired.is_some(),
        });
        self.irq_hooks.push(Hooked { hooks, data: raw.data });
        Ok(())
    }

    /// # Safety
    /// The region's hooks live until `close`.
    unsafe fn read_extra_region(&mut self, raw: &abi::ExtraRegion) -> Result<(), String> {
        // SAFETY: by the caller.
        let hooks = unsafe { copy_sized(raw.hooks, "an extra region's hooks") }?;
        if hooks.rw.is_none() {
            return Err("an extra region has no rw hook, and there is no device behind it".into());
        }
        if raw.size == 0 || raw.size > EXTRA_SIZE_MAX {
            return Err(format!("an extra region of {:#x} bytes", raw.size));
        }
        if raw.flags & !(VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE) != 0 {
            return Err(format!("an extra region with flags {:#x}", raw.flags));
        }
        self.extra_regions.push(ExtraRegion {
            flags: raw.flags,
            size: raw.size,
            type_: raw.type_,
            subtype: raw.subtype,
            has_mmap: hooks.mmap.is_some(),
        });
        self.extra_hooks.push(Hooked { hooks, data: raw.data });
        Ok(())
    }

    fn read_extra_irq(&mut self, raw: &abi::ExtraIrq) -> Result<(), String> {
        const FLAGS: u32 =
            VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED | VFIO_IRQ_INFO_NORESIZE;
        if raw.count == 0 || raw.count > EXTRA_VECTORS_MAX || raw.flags & !FLAGS != 0 {
            return Err(format!("an extra irq of {} vectors with flags {:#x}", raw.count, raw.flags));
        }
        self.extra_irqs.push(ExtraIrq { flags: raw.flags, count: raw.count });
        Ok(())
    }

    fn read_migration(&mut self, raw: abi::MigrationOps) -> Result<(), String> {
        let flags = MigrationFlags::from_raw(raw.flags).ok_or_else(|| format!("migration flags {:#x}", raw.flags))?;
        if raw.set_state.is_none() || raw.save.is_none() || raw.load.is_none() {
            return Err("the migration table lacks set_state, save or load".into());
        }
        self.migration = Some((raw, flags));
        Ok(())
    }

    fn read_dirty(&mut self, raw: abi::DirtyOps) -> Result<(), String> {
        let exactness = match raw.exactness {
            abi::DIRTY_EXACT => Exactness::Exact,
            abi::DIRTY_SUPERSET => Exactness::Superset,
            other => return Err(format!("dirty tracking of exactness {other}")),
        };
        if raw.start.is_none() || raw.report.is_none() || raw.stop.is_none() {
            return Err("the dirty-tracking table lacks start, report or stop".into());
        }
        self.dirty = Some((raw, exactness));
        Ok(())
    }

    pub fn plugin(&self) -> &PluginInfo {
        self.reference.card().info()
    }

    pub fn claims(&self) -> &[Claim] {
        &self.claims
    }

    pub fn irq_claims(&self) -> &[IrqClaim] {
        &self.irq_claims
    }

    pub fn extra_regions(&self) -> &[ExtraRegion] {
        &self.extra_regions
    }

    pub fn extra_irqs(&self) -> &[ExtraIrq] {
        &self.extra_irqs
    }

    pub(super) fn state(&self) -> Opaque {
        self.state
    }

    #[inline(always)]
    pub(super) fn call(&self, frame: CallFrame<'_>, call: impl FnOnce(*const abi::CallContext) -> i32) -> i32 {
        with_context(&*self.calls, frame, call)
    }

    // In each of its callers: what it is handed would go through the stack once more.
    #[inline(always)]
    fn rw(
        &self,
        hooked: &Hooked<abi::RegionHooks>,
        frame: CallFrame<'_>,
        (region, offset): (u32, u64),
        data: &mut [u8],
        write: bool,
    ) -> Verdict {
        let Some(rw) = hooked.hooks.rw else { return Verdict::Forward };
        let mut access = abi::Access {
            struct_size: size_of::<abi::Access>() as u32,
            region,
            offset,
            length: data.len() as u64,
            data: data.as_mut_ptr(),
            write: u32::from(write),
            reserved: 0,
        };
        // SAFETY: a hook of the tables that `open` returned, with its own state and data; the access lives until it returns.
        verdict(self.call(frame, |ctx| unsafe { rw(self.state, hooked.data, ctx, &raw mut access) }))
    }

    /// A read of `data.len()` bytes at `offset` of the region, which lies inside claim number `claim`. `data` comes zeroed.
    pub fn read(&self, claim: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        match (self.hooks.get(claim), self.claims.get(claim)) {
            (Some(hooked), Some(claim)) => self.rw(hooked, frame, (claim.region, offset), data, false),
            _ => Verdict::Deny(Errno::INVAL),
        }
    }

    /// A write; the hook may change `data` before it forwards.
    pub fn write(&self, claim: usize, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        match (self.hooks.get(claim), self.claims.get(claim)) {
            (Some(hooked), Some(claim)) => self.rw(hooked, frame, (claim.region, offset), data, true),
            _ => Verdict::Deny(Errno::INVAL),
        }
    }

    /// A read of extra region `extra`, which the client knows as `region`.
    pub fn extra_read(&self, extra: usize, region: u32, frame: CallFrame<'_>, offset: u64, data: &mut [u8]) -> Verdict {
        let Some(hooked) = self.extra_hooks.get(extra) else { return Verdict::Deny(Errno::INVAL) };
        self.rw(hooked, frame, (region, offset), data, false)
    }

    pub fn extra_write(
        &self,
        extra: usize,
        region: u32,
        frame: CallFrame<'_>,
        offset: u64,
        data: &mut [u8],
    ) -> Verdict {
        let Some(hooked) = self.extra_hooks.get(extra) else { return Verdict::Deny(Errno::INVAL) };
        self.rw(hooked, frame, (region, offset), data, true)
    }

    /// Lets the claim's hook narrow what the client is told. The caller checks that it only narrowed.
    pub fn claim_region_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::RegionInfo) -> Verdict {
        let Some(hooked) = self.hooks.get(claim) else { return Verdict::Deny(Errno::INVAL) };
        let Some(hook) = hooked.hooks.region_info else { return Verdict::Forward };
        info.struct_size = size_of::<abi::RegionInfo>() as u32;
        // SAFETY: as in `rw`.
        verdict(self.call(frame, |ctx| unsafe { hook(self.state, hooked.data, ctx, info) }))
    }

    pub fn claim_mmap(&self, claim: usize, frame: CallFrame<'_>, offset: u64, length: u64) -> MmapAnswer {
        match (self.hooks.get(claim), self.claims.get(claim)) {
            (Some(hooked), Some(claim)) => self.mmap(hooked, claim.region, frame, offset, length),
            _ => MmapAnswer::NotMapped,
        }
    }

    pub fn extra_mmap(&self, extra: usize, region: u32, frame: CallFrame<'_>, offset: u64, length: u64) -> MmapAnswer {
        self.extra_hooks.get(extra).map_or(MmapAnswer::NotMapped, |h| self.mmap(h, region, frame, offset, length))
    }

    fn mmap(
        &self,
        hooked: &Hooked<abi::RegionHooks>,
        region: u32,
        frame: CallFrame<'_>,
        offset: u64,
        length: u64,
    ) -> MmapAnswer {
        let Some(hook) = hooked.hooks.mmap else { return MmapAnswer::NotMapped };
        let mut request = abi::MmapRequest {
            struct_size: size_of::<abi::MmapRequest>() as u32,
            region,
            offset,
            length,
            fd: -1,
            reserved: 0,
            fd_offset: 0,
        };
        // SAFETY: as in `rw`.
        let code = self.call(frame, |ctx| unsafe { hook(self.state, hooked.data, ctx, &raw mut request) });
        if verdict(code) != Verdict::Handled || request.fd < 0 {
            return MmapAnswer::NotMapped;
        }
        // SAFETY: the plug-in says that this is a file of its own; a number that is not open fails to be duplicated.
        let fd = unsafe { BorrowedFd::borrow_raw(request.fd) };
        match fd.try_clone_to_owned() {
            Ok(fd) => MmapAnswer::Instead { fd, offset: request.fd_offset },
            Err(_) => MmapAnswer::NotMapped,
        }
    }

    pub fn irq_claim_info(&self, claim: usize, frame: CallFrame<'_>, info: &mut abi::IrqInfo) -> Verdict {
        let Some(hooked) = self.irq_hooks.get(claim) else { return Verdict::Deny(Errno::INVAL) };
        let Some(hook) = hooked.hooks.irq_info else { return Verdict::Forward };
        info.struct_size = size_of::<abi::IrqInfo>() as u32;
        // SAFETY: as in `rw`.
        verdict(self.call(frame, |ctx| unsafe { hook(self.state, hooked.data, ctx, info) }))
    }

    pub fn irq_claim_set(&self, claim: usize, frame: CallFrame<'_>, request: &IrqRequest<'_>) -> Verdict {
        let Some(hooked) = self.irq_hooks.get(claim) else { return Verdict::Deny(Errno::INVAL) };
        let Some(hook) = hooked.hooks.set_irqs else { return Verdict::Forward };
        let (kind, bools, fds): (u32, *const u8, *const RawFd) = match request.data {
            IrqRequestData::None => (abi::IRQ_DATA_NONE, std::ptr::null(), std::ptr::null()),
            IrqRequestData::Bool(bools) => (abi::IRQ_DATA_BOOL, bools.as_ptr(), std::ptr::null()),
            IrqRequestData::EventFd(fds) => (abi::IRQ_DATA_EVENTFD, std::ptr::null(), fds.as_ptr()),
        };
        let raw = abi::IrqRequest {
            struct_size: size_of::<abi::IrqRequest>() as u32,
            index: request.index,
            start: request.start,
            count: request.count,
            action: request.action,
            data_kind: kind,
            bools,
            fds,
        };
        // SAFETY: as in `rw`; the request's data outlive the call.
        verdict(self.call(frame, |ctx| unsafe { hook(self.state, hooked.data, ctx, &raw const raw) }))
    }

    pub fn irq_fired(&self, claim: usize, frame: CallFrame<'_>, index: u32, vector: u32) -> Verdict {
        let Some(hooked) = self.irq_hooks.get(claim) else { return Verdict::Deny(Errno::INVAL) };
        let Some(hook) = hooked.hooks.fired else { return Verdict::Forward };
        // SAFETY: as in `rw`.
        verdict(self.call(frame, |ctx| unsafe { hook(self.state, hooked.data, ctx, index, vector) }))
    }

    pub fn migration(&self) -> Option<PluginMigration<'_>> {
        self.migration.as_ref().map(|(ops, flags)| PluginMigration { device: self, ops, flags: *flags })
    }

    pub fn dirty(&self) -> Option<PluginDirty<'_>> {
        self.dirty.as_ref().map(|(ops, exactness)| PluginDirty { device: self, ops, exactness: *exactness })
    }

    /// Tells the plug-in that something happened (`abi::EVENT_*`). An error is the plug-in's refusal, where it may refuse.
    pub fn event(&self, frame: CallFrame<'_>, kind: u32, args: [u64; 3]) -> Result<(), Errno> {
        let Some(hook) = self.ops.event else { return Ok(()) };
        let event = abi::Event { struct_size: size_of::<abi::Event>() as u32, kind, args };
        // SAFETY: as in `rw`.
        let code = self.call(frame, |ctx| unsafe { hook(self.state, ctx, &raw const event) });
        if code < 0 { Err(errno(code, Errno::PROTO)) } else { Ok(()) }
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        if let Some(close) = self.ops.close {
            self.call(CallFrame::new(Origin::Host), |ctx| {
                // SAFETY: the last call for this device; its owner has seen to it that no hook is in flight.
                unsafe { close(self.state, ctx) };
                0
            });
        }
    }
}

fn verdict(code: i32) -> Verdict {
    match code {
        abi::VERDICT_HANDLED => Verdict::Handled,
        abi::VERDICT_FORWARD => Verdict::Forward,
        code => Verdict::Deny(errno(code, Errno::IO)),
    }
}
