//! A device opened by a plug-in, called as a host calls it: through the tables of the ABI.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::services::SERVICES;
use super::{FakeHost, Model, Shared, lock};
use crate::abi::{self, Bytes, CallContext, Opaque};
use crate::context::size32;
use crate::device::{ArcFailed, Plugin, Refusal, Remaining, Saved};
use crate::state::{DeviceState, MigrationFlags};
use crate::{Errno, Result};

/// Which device a plug-in is asked to open.
#[derive(Debug, Clone)]
pub struct TestIdentity {
    pub vendor_id: u16,
    pub device_id: u16,
    pub revision: u8,
    pub name: &'static str,
}

/// A device that a plug-in has opened. Dropped, it is closed and the plug-in retired.
pub struct TestDevice<'h> {
    shared: &'h Shared,
    plugin: abi::Plugin,
    plugin_state: Opaque,
    ops: abi::DeviceOps,
    map: u32,
}

// SAFETY: the tables are immutable and the plug-in's functions may be called from any thread, by the ABI.
unsafe impl Send for TestDevice<'_> {}
// SAFETY: as above; `&mut self` methods are the calls that the ABI wants one at a time.
unsafe impl Sync for TestDevice<'_> {}

impl<M: Model> FakeHost<M> {
    /// Probes and opens. `Ok(None)`: the plug-in declined.
    pub fn open<P: Plugin>(&self, identity: &TestIdentity) -> Result<Option<TestDevice<'_>>> {
        TestDevice::open(&self.shared, crate::export::plugin::<P>(), identity)
    }
}

// SAFETY of every call of a table's function below: the function, its `state` and its `data` come from one table, the
// context and the buffers live during the call.

impl<'h> TestDevice<'h> {
    fn open(shared: &'h Shared, plugin: abi::Plugin, identity: &TestIdentity) -> Result<Option<Self>> {
        let config = [0_u8; 256];
        let identity = abi::DeviceIdentity {
            struct_size: size32::<abi::DeviceIdentity>(),
            backend: abi::BACKEND_SIM,
            vendor_id: identity.vendor_id,
            device_id: identity.device_id,
            subsystem_vendor_id: 0,
            subsystem_device_id: 0,
            class_code: 0,
            revision: identity.revision,
            reserved: [0; 3],
            num_regions: 9,
            num_irqs: 5,
            name: Bytes::borrowed(identity.name.as_bytes()),
            config: Bytes::borrowed(&config),
        };
        let mut plugin_state = std::ptr::null_mut();
        if let Some(init) = plugin.init {
            // SAFETY: as above.
            Errno::check(unsafe { init(&raw const SERVICES, &raw mut plugin_state) })?;
        }
        // SAFETY: as above.
        let claimed =
            plugin.probe.map_or(abi::PROBE_CLAIM, |probe| unsafe { probe(plugin_state, &raw const identity) });
        let mut device = Self { shared, plugin, plugin_state, ops: no_ops(), map: abi::MAP_NORMAL };
        match claimed {
            abi::PROBE_CLAIM => {}
            abi::PROBE_DECLINE => return Ok(None),
            error => return Err(Errno::check(error).err().unwrap_or(Errno::EPROTO)),
        }
        let open = device.plugin.open.expect("a plug-in has `open`");
        let mut ops = no_ops();
        let ctx = device.context(abi::ORIGIN_HOST);
        // SAFETY: as above.
        Errno::check(unsafe { open(plugin_state, &raw const ctx, &raw const identity, &raw mut ops) })?;
        device.ops = ops;
        device.check_claims();
        Ok(Some(device))
    }

    fn context(&self, origin: u32) -> CallContext {
        CallContext {
            struct_size: size32::<CallContext>(),
            origin,
            services: &raw const SERVICES,
            host: std::ptr::from_ref(self.shared).cast(),
            deadline: self.shared.deadline.load(Ordering::SeqCst),
        }
    }

    /// The rules that a real host checks at open.
    fn check_claims(&self) {
        for (i, a) in self.claims().iter().enumerate() {
            assert!(a.length > 0, "an empty claim: {a:?}");
            assert!(a.maps != 0 && a.maps & !(abi::MAP_NORMAL | abi::MAP_TRACKING) == 0, "unknown maps: {a:?}");
            for b in &self.claims()[..i] {
                let apart = a.offset >= b.offset + b.length || b.offset >= a.offset + a.length;
                assert!(a.region != b.region || a.maps & b.maps == 0 || apart, "claims overlap: {a:?} {b:?}");
            }
        }
    }

    pub fn claims(&self) -> &[abi::RegionClaim] {
        // SAFETY: the table's own count.
        unsafe { table(self.ops.regions, self.ops.region_count) }
    }

    pub fn irq_claims(&self) -> &[abi::IrqClaim] {
        // SAFETY: the table's own count.
        unsafe { table(self.ops.irqs, self.ops.irq_count) }
    }

    /// Switches the trap map, as a host does around `start` and `stop`.
    pub fn set_map(&mut self, map: crate::Maps) {
        self.map = map.raw();
    }

    /// A client's read: cut at claims, in ascending order; the first error ends it.
    pub fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.access(region, offset, data, false)
    }

    /// A client's write.
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.access(region, offset, &mut data.to_vec(), true)
    }

    pub fn read_u32(&self, region: u32, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read(region, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub fn write_u32(&self, region: u32, offset: u64, value: u32) -> Result<()> {
        self.write(region, offset, &value.to_le_bytes())
    }

    pub fn read_u64(&self, region: u32, offset: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(region, offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub fn write_u64(&self, region: u32, offset: u64, value: u64) -> Result<()> {
        self.write(region, offset, &value.to_le_bytes())
    }

    fn access(&self, region: u32, mut offset: u64, mut data: &mut [u8], write: bool) -> Result<()> {
        while !data.is_empty() {
            let in_force = self.claims().iter().filter(|claim| claim.region == region && claim.maps & self.map != 0);
            let claim = in_force.clone().find(|claim| (claim.offset..claim.offset + claim.length).contains(&offset));
            let end = match claim {
                Some(claim) => claim.offset + claim.length,
                None => in_force.map(|claim| claim.offset).filter(|start| *start > offset).min().unwrap_or(u64::MAX),
            };
            let length = data.len().min(usize::try_from(end - offset).unwrap_or(usize::MAX));
            let (piece, rest) = data.split_at_mut(length);
            self.piece(claim, region, offset, piece, write)?;
            data = rest;
            offset += length as u64;
        }
        Ok(())
    }

    fn piece(
        &self,
        claim: Option<&abi::RegionClaim>,
        region: u32,
        offset: u64,
        data: &mut [u8],
        write: bool,
    ) -> Result<()> {
        let mut verdict = abi::VERDICT_FORWARD;
        // SAFETY: claims point at hooks that live until `close`.
        if let Some((claim, rw)) = claim.and_then(|claim| Some((claim, unsafe { claim.hooks.as_ref() }?.rw?))) {
            let mut access = abi::Access {
                struct_size: size32::<abi::Access>(),
                region,
                offset,
                length: data.len() as u64,
                data: data.as_mut_ptr(),
                write: write.into(),
                reserved: 0,
            };
            let ctx = self.context(abi::ORIGIN_CLIENT);
            // SAFETY: as above.
            verdict = unsafe { rw(self.ops.state, claim.data, &raw const ctx, &raw mut access) };
        }
        match verdict {
            abi::VERDICT_HANDLED => Ok(()),
            abi::VERDICT_FORWARD => {
                let super::Machine { model, bus } = &mut *self.shared.machine();
                if write { model.write(bus, region, offset, data) } else { model.read(bus, region, offset, data) }
            }
            denied => Err(Errno::check(denied).err().unwrap_or(Errno::EPROTO)),
        }
    }

    /// Sends an event, `abi::EVENT_*`.
    pub fn event(&mut self, kind: u32, args: [u64; 3]) -> Result<()> {
        let event = abi::Event { struct_size: size32::<abi::Event>(), kind, args };
        let ctx = self.context(abi::ORIGIN_HOST);
        // SAFETY: as above.
        self.ops
            .event
            .map_or(Ok(()), |call| Errno::check(unsafe { call(self.ops.state, &raw const ctx, &raw const event) }))
    }

    /// Lets time pass until the next armed timer fires, and sends its event. `false`: none is armed.
    pub fn fire_timer(&mut self) -> Result<bool> {
        let next = lock(&self.shared.timers).iter().map(|(cookie, at)| (*at, *cookie)).min();
        let Some((at, cookie)) = next else { return Ok(false) };
        lock(&self.shared.timers).remove(&cookie);
        let now = self.shared.machine().bus.now;
        self.shared.advance(Duration::from_nanos(at).saturating_sub(now));
        self.event(abi::EVENT_TIMER, [cookie, 0, 0]).map(|()| true)
    }

    // ---- migration

    fn migration(&self) -> &abi::MigrationOps {
        // SAFETY: the table lives until `close`.
        unsafe { self.ops.migration.as_ref() }.expect("the plug-in migrates this device")
    }

    pub fn migration_flags(&self) -> MigrationFlags {
        MigrationFlags::from_raw(self.migration().flags).expect("STOP_COPY and known flags")
    }

    pub fn match_data(&mut self) -> Result<Vec<u8>> {
        let mut buffer = vec![0; 64 << 10];
        let mut length = 0;
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.migration().match_data.expect("match_data");
        // SAFETY: as above.
        Errno::check(unsafe {
            call(self.ops.state, &raw const ctx, buffer.as_mut_ptr(), buffer.len(), &raw mut length)
        })?;
        buffer.truncate(length);
        Ok(buffer)
    }

    pub fn check_match(&mut self, data: &[u8]) -> Result<(), Refusal> {
        let mut text = vec![0; 256];
        let mut reason = abi::Reason { text: text.as_mut_ptr(), capacity: text.len(), length: 0 };
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.migration().check_match.expect("check_match");
        // SAFETY: as above.
        let status = unsafe { call(self.ops.state, &raw const ctx, data.as_ptr(), data.len(), &raw mut reason) };
        Errno::check(status).map_err(|errno| {
            text.truncate(reason.length);
            Refusal { errno, reason: String::from_utf8(text).expect("a reason is UTF-8") }
        })
    }

    /// One arc.
    pub fn set_state(&mut self, from: DeviceState, to: DeviceState) -> Result<(), ArcFailed> {
        let mut actual = from.raw();
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.migration().set_state.expect("set_state");
        // SAFETY: as above.
        let status = unsafe { call(self.ops.state, &raw const ctx, from.raw(), to.raw(), &raw mut actual) };
        let actual = DeviceState::from_raw(actual).expect("a state");
        Errno::check(status).map_err(|errno| ArcFailed { errno, actual })
    }

    /// Every arc from one state to another, as the host walks them.
    pub fn walk(&mut self, from: DeviceState, to: DeviceState) -> Result<(), ArcFailed> {
        let mut at = from;
        for next in crate::state::path(from, to, self.migration_flags()).expect("a path") {
            self.set_state(at, next)?;
            at = next;
        }
        Ok(())
    }

    pub fn save(&mut self, buffer: &mut [u8]) -> Result<Saved> {
        let mut bytes = 0;
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.migration().save.expect("save");
        // SAFETY: as above.
        let status = unsafe { call(self.ops.state, &raw const ctx, buffer.as_mut_ptr(), buffer.len(), &raw mut bytes) };
        match status {
            abi::SAVE_MORE => Ok(Saved { bytes, end: false }),
            abi::SAVE_END => Ok(Saved { bytes, end: true }),
            error => Err(Errno::check(error).err().unwrap_or(Errno::EPROTO)),
        }
    }

    /// The rest of the stream, pulled in pieces of `piece` bytes.
    pub fn save_all(&mut self, piece: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = vec![0; piece];
        loop {
            let saved = self.save(&mut buffer)?;
            all.extend(&buffer[..saved.bytes]);
            if saved.end {
                return Ok(all);
            }
        }
    }

    pub fn load(&mut self, data: &[u8]) -> Result<()> {
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.migration().load.expect("load");
        // SAFETY: as above.
        Errno::check(unsafe { call(self.ops.state, &raw const ctx, data.as_ptr(), data.len()) })
    }

    pub fn remaining(&mut self) -> Result<Remaining> {
        let mut left = abi::Remaining {
            struct_size: size32::<abi::Remaining>(),
            reserved: 0,
            initial_bytes: 0,
            dirty_bytes: 0,
            stop_copy_bytes: 0,
        };
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.migration().remaining.expect("remaining");
        // SAFETY: as above.
        Errno::check(unsafe { call(self.ops.state, &raw const ctx, &raw mut left) })?;
        Ok(Remaining {
            initial_bytes: left.initial_bytes,
            dirty_bytes: left.dirty_bytes,
            stop_copy_bytes: (left.stop_copy_bytes != u64::MAX).then_some(left.stop_copy_bytes),
        })
    }

    // ---- dirty tracking

    #[cfg(test)]
    pub(super) fn ops_dirty_is_null(&self) -> bool {
        self.ops.dirty.is_null()
    }

    fn dirty(&self) -> &abi::DirtyOps {
        // SAFETY: the table lives until `close`.
        unsafe { self.ops.dirty.as_ref() }.expect("the plug-in tracks this device's dirty pages")
    }

    /// Switches the map, then starts.
    pub fn start_tracking(&mut self, ranges: &[abi::IovaRange], page_size: u64) -> Result<()> {
        self.map = abi::MAP_TRACKING;
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.dirty().start.expect("start");
        // SAFETY: as above.
        let status = unsafe { call(self.ops.state, &raw const ctx, ranges.as_ptr(), ranges.len(), page_size) };
        Errno::check(status).inspect_err(|_| self.map = abi::MAP_NORMAL)
    }

    /// The pages of `iova .. iova + length` that are reported, or were marked meanwhile by `mark_dirty`: ascending indices.
    pub fn dirty_pages(&self, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>> {
        let pages = length / page_size;
        let mut words = vec![0_u64; pages.div_ceil(64) as usize];
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.dirty().report.expect("report");
        // SAFETY: as above.
        let status = unsafe { call(self.ops.state, &raw const ctx, iova, length, page_size, words.as_mut_ptr()) };
        Errno::check(status)?;
        for (start, bytes) in std::mem::take(&mut *lock(&self.shared.dirty)) {
            for page in start / page_size..=(start + bytes - 1) / page_size {
                if let Some(page) = page.checked_sub(iova / page_size).filter(|page| *page < pages) {
                    words[(page / 64) as usize] |= 1 << (page % 64);
                }
            }
        }
        assert!((pages..words.len() as u64 * 64).all(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 0));
        Ok((0..pages).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1).collect())
    }

    /// Stops, then switches the map.
    pub fn stop_tracking(&mut self) {
        let ctx = self.context(abi::ORIGIN_MIGRATION);
        let call = self.dirty().stop.expect("stop");
        // SAFETY: as above.
        unsafe { call(self.ops.state, &raw const ctx) };
        self.map = abi::MAP_NORMAL;
    }
}

impl Drop for TestDevice<'_> {
    fn drop(&mut self) {
        let ctx = self.context(abi::ORIGIN_HOST);
        if let Some(close) = self.ops.close {
            // SAFETY: as above; `&mut self`, so nothing else is in flight.
            unsafe { close(self.ops.state, &raw const ctx) };
        }
        // As the host does for what the plug-in left.
        self.shared.machine().bus.scratch.clear();
        if let Some(retire) = self.plugin.retire {
            // SAFETY: the last call.
            unsafe { retire(self.plugin_state) };
        }
    }
}

fn no_ops() -> abi::DeviceOps {
    abi::DeviceOps {
        struct_size: size32::<abi::DeviceOps>(),
        reserved: 0,
        state: std::ptr::null_mut(),
        regions: std::ptr::null(),
        region_count: 0,
        irqs: std::ptr::null(),
        irq_count: 0,
        extra_regions: std::ptr::null(),
        extra_region_count: 0,
        extra_irqs: std::ptr::null(),
        extra_irq_count: 0,
        migration: std::ptr::null(),
        dirty: std::ptr::null(),
        event: None,
        close: None,
    }
}

/// # Safety
/// `count` elements live at `ptr` during `'a`.
unsafe fn table<'a, T>(ptr: *const T, count: usize) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: by the caller.
    unsafe { std::slice::from_raw_parts(ptr, count) }
}

impl fmt::Debug for TestDevice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestDevice").field("claims", &self.claims()).finish_non_exhaustive()
    }
}
