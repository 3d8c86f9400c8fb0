//! The host's services to a plug-in, over one device.
//!
//! **Owns** what the plug-in's calls and the mediated device share: the device, its VM's memory, the gate, irqs, scratch,
//! timers and the queue of what a hook asked for. **Must never** enter the gate (the caller holds a pass or the device
//! alone), nor call the plug-in. Locks: `requests`, `maps`, leaves.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use rustix::io::Errno;
use vfio_mediate_sdk::abi;

use super::config::ConfigFilter;
use super::gate::{Gate, Reason};
use super::irqs::Irqs;
use super::mediator::{HostCalls, IrqRequest, IrqRequestData, Request, ScratchMemory};
use super::scratch::Scratch;
use super::timers::{self, Delivery, Timers};
use super::watch::Watch;
use super::{MediatedDevice, lock};
use crate::device::{CONFIG_REGION, Device, DmaMap, IrqAction, IrqData, IrqInfo, IrqSet, RegionInfo};
use crate::lock_order::{self, Guard};
use crate::memory::{AddressSpace, IovaMapping, MemoryError};
use crate::sys::duplicate;

/// Requests that one device's hooks may have waiting.
const REQUESTS_MAX: usize = 64;
/// Longest wait between two looks at whether the caller has given up.
const WAIT_SLICE: Duration = Duration::from_millis(5);

/// What is to be done when the device can be had alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    Asked(Request),
    /// COMMAND or the power state was written past the filter: look at them.
    Recheck,
}

#[derive(Debug)]
pub struct Shared {
    pub device: Arc<dyn Device>,
    pub memory: Arc<AddressSpace>,
    pub gate: Gate,
    pub filter: ConfigFilter,
    /// The device's own regions and irqs, as they were at open; `None`: the index answers EINVAL
    pub regions: Vec<Option<RegionInfo>>,
    pub irq_infos: Vec<Option<IrqInfo>>,
    pub irqs: Arc<Irqs>,
    pub scratch: Scratch,
    pub timers: Arc<Timers>,
    /// The kernel's word about the device
    pub watch: Watch,
    /// Who this device is to its VM's address space
    pub holder: u64,
    /// Guest maps of this device, by iova
    pub maps: Mutex<BTreeMap<u64, IovaMapping>>,
    /// Vectors whose firing the plug-in wants to see: (index, start, count)
    pub interposed: OnceLock<Vec<(u32, u32, u32)>>,
    /// Set while the host wants every long call to come back
    pub cancel: AtomicBool,
    requests: Mutex<VecDeque<Task>>,
    /// COMMAND's memory bit counts: as the device's condition has it
    pub gated: AtomicBool,
    /// For the timer thread; set once the device exists
    pub owner: Arc<OnceLock<Weak<MediatedDevice>>>,
}

impl Shared {
    pub fn new(
        device: Arc<dyn Device>,
        memory: Arc<AddressSpace>,
        gate: Gate,
        filter: ConfigFilter,
        regions: Vec<Option<RegionInfo>>,
        irq_infos: Vec<Option<IrqInfo>>,
    ) -> Self {
        Self {
            device,
            holder: memory.holder(),
            memory,
            gate,
            filter,
            regions,
            irq_infos,
            irqs: Arc::default(),
            scratch: Scratch::default(),
            timers: Arc::default(),
            watch: Watch::default(),
            maps: Mutex::default(),
            interposed: OnceLock::new(),
            cancel: AtomicBool::new(false),
            requests: Mutex::default(),
            gated: AtomicBool::new(false),
            owner: Arc::default(),
        }
    }

    pub fn take_requests(&self) -> VecDeque<Task> {
        std::mem::take(&mut *lock(&self.requests))
    }

    pub fn queue(&self, task: Task) -> Result<(), Errno> {
        let mut requests = lock(&self.requests);
        // Asking twice for the same is asking once.
        if !requests.contains(&task) {
            // The one look that memory's gate may wait for has its place in any case.
            if requests.len() >= REQUESTS_MAX && task != Task::Recheck {
                return Err(Errno::NOSPC);
            }
            requests.push_back(task);
        }
        drop(requests);
        self.gate.raise_attention();
        Ok(())
    }

    pub fn maps(&self) -> Guard<'_, BTreeMap<u64, IovaMapping>> {
        lock(&self.maps)
    }

    pub fn mappings(&self) -> Vec<IovaMapping> {
        self.maps().values().copied().collect()
    }

    /// Gives the VM's memory back a map of this device. `last` is called when its dirt is complete, and its place in the log still
    /// its own.
    pub fn leave(&self, map: &IovaMapping, last: impl FnOnce()) -> Result<(), MemoryError> {
        match self.memory.ram() {
            Some(_) => {
                last();
                self.memory.leave(map);
                Ok(())
            }
            None => self.memory.leave_client(map, self.holder, last),
        }
    }

    fn is_interposed(&self, index: u32, vector: u32) -> bool {
        let all = self.interposed.get().map_or(&[][..], |all| all);
        all.iter()
            .any(|(at, start, count)| *at == index && vector.checked_sub(*start).is_some_and(|from| from < *count))
    }

    /// The host's own SET_IRQS: remembers the client's eventfds, and gives the device ours where a claim wants to see the
    /// vector fire. Indices beyond the device's own, and those that the host itself listens to, exist in the table only.
    pub fn default_set_irqs(&self, request: &IrqSet<'_>) -> Result<(), Errno> {
        lock_order::calling_out();
        let watched = self.watch.covers(request.index);
        let own = (request.index as usize) < self.irq_infos.len() && !watched;
        if watched && request.action != IrqAction::Trigger {
            return Err(Errno::NOTTY);
        }
        let to_device = |request: &IrqSet<'_>| match own {
            true => self.device.set_irqs(request).map_err(|error| error.errno),
            false => Ok(()),
        };
        match (request.action, request.data) {
            (IrqAction::Trigger, IrqData::EventFd(fds)) => {
                if fds.len() != request.count as usize || request.start.checked_add(request.count).is_none() {
                    return Err(Errno::INVAL);
                }
                let interposed = |vector| own && self.is_interposed(request.index, vector);
                let pending = self.irqs.prepare(request.index, request.start, fds, interposed)?;
                to_device(&IrqSet { data: IrqData::EventFd(&pending.device_fds()), ..*request })?;
                self.irqs.commit(pending);
                Ok(())
            }
            (IrqAction::Trigger, IrqData::None) if request.count == 0 => {
                to_device(request)?;
                self.irqs.clear(request.index);
                Ok(())
            }
            (IrqAction::Trigger, IrqData::Bool([false])) if watched => Ok(()),
            (IrqAction::Trigger, _) if !own => {
                for vector in request.start..request.start.saturating_add(request.count) {
                    self.irqs.signal((request.index, vector));
                }
                Ok(())
            }
            _ => to_device(request),
        }
    }

    /// Revoke first, then act, also where a hook acts. Whoever has the device alone takes the mappings away; under a pass others
    /// may be in the middle of an access through one, so that nothing is done.
    fn before_config_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if region == CONFIG_REGION && self.filter.resets(offset, data) {
            // The kernel would reset at once, under whoever is in the middle of an access: a hook asks for a reset instead.
            return Err(Errno::BUSY);
        }
        if region != CONFIG_REGION || !self.filter.disables(offset, data, self.gated.load(Ordering::Acquire)) {
            return Ok(());
        }
        let owner = self.owner.get().and_then(Weak::upgrade);
        if !self.gate.is_held() {
            return owner.map_or(Ok(()), |owner| owner.revoke_maps().map_err(|error| error.errno()));
        }
        // First, so that no mapping is made from here on; looking at what was left afterwards opens it again.
        self.gate.refuse_memory(Reason::MemoryDisabled);
        match owner.is_some_and(|owner| owner.has_live_maps()) {
            true => Err(Errno::BUSY),
            false => Ok(()),
        }
    }

    fn note_config_write(&self, region: u32, offset: u64, length: usize) -> Result<(), Errno> {
        if region == CONFIG_REGION && self.filter.may_disable(offset, length as u64) {
            self.queue(Task::Recheck)?;
        }
        Ok(())
    }

    fn timer_thread(&self) -> std::io::Result<std::thread::JoinHandle<()>> {
        let owner = Arc::clone(&self.owner);
        let device = Arc::clone(&self.device);
        let deliver = move |cookie| match owner.get().map(Weak::upgrade) {
            // Still opening: the device is published after the plug-in's `open`.
            None => Delivery::Later,
            Some(Some(owner)) => owner.timer_fired(cookie),
            Some(None) => Delivery::Done,
        };
        timers::spawn(&self.timers, move || device.clock().now(), deliver)
    }
}

impl Drop for Shared {
    /// After a failed open as well: nothing of ours stays mapped into a device that others may open again.
    fn drop(&mut self) {
        self.timers.stop();
        let scratch: Vec<(u64, Option<u64>)> =
            self.scratch.all().into_iter().map(|iova| (iova, self.scratch.length(iova))).collect();
        let mappings = self.mappings();
        let maps = mappings.iter().map(|map| (map.iova, Some(map.length)));
        for (iova, length) in scratch.into_iter().chain(maps) {
            if let Some(Err(error)) = length.map(|length| self.device.dma_unmap(iova, length)) {
                tracing::warn!(device = %self.device.identity().name, iova, %error, "unmapping at close");
            }
        }
        for map in &mappings {
            if let Err(error) = self.leave(map, || {}) {
                tracing::warn!(device = %self.device.identity().name, %error, "a client's memory is still being copied");
            }
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl HostCalls for Shared {
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        lock_order::calling_out();
        self.device.region_read(region, offset, data).map_err(|error| error.errno)
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        lock_order::calling_out();
        let noted = self.before_config_write(region, offset, data);
        let written = noted.and_then(|()| self.device.region_write(region, offset, data).map_err(|error| error.errno));
        self.note_config_write(region, offset, data.len()).and(written)
    }

    fn default_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.region_read(region, offset, data)
    }

    fn default_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.region_write(region, offset, data)
    }

    fn region_info(&self, index: u32) -> Result<abi::RegionInfo, Errno> {
        let info = self.regions.get(index as usize).and_then(Option::as_ref).ok_or(Errno::INVAL)?;
        let struct_size = size_of::<abi::RegionInfo>() as u32;
        Ok(abi::RegionInfo { struct_size, index, flags: info.flags, reserved: 0, size: info.size })
    }

    fn irq_info(&self, index: u32) -> Result<abi::IrqInfo, Errno> {
        let info = self.irq_infos.get(index as usize).and_then(Option::as_ref).ok_or(Errno::INVAL)?;
        let struct_size = size_of::<abi::IrqInfo>() as u32;
        Ok(abi::IrqInfo { struct_size, index, flags: info.flags, count: info.count })
    }

    fn set_irqs(&self, request: &IrqRequest<'_>) -> Result<(), Errno> {
        let action = match request.action {
            abi::IRQ_MASK => IrqAction::Mask,
            abi::IRQ_UNMASK => IrqAction::Unmask,
            abi::IRQ_TRIGGER => IrqAction::Trigger,
            _ => return Err(Errno::INVAL),
        };
        let IrqRequest { index, start, count, .. } = *request;
        let set = |data: IrqData<'_>| self.default_set_irqs(&IrqSet { index, start, count, action, data });
        match request.data {
            IrqRequestData::None => set(IrqData::None),
            IrqRequestData::Bool(bools) => {
                let bools: Vec<bool> = bools.iter().map(|value| *value != 0).collect();
                set(IrqData::Bool(&bools))
            }
            IrqRequestData::EventFd(raw) => {
                // Numbers, until they have been duplicated.
                let own = |fd: &i32| if *fd < 0 { Ok(None) } else { duplicate(*fd).map(|fd| Some(Arc::new(fd))) };
                let fds: Vec<_> = raw.iter().map(own).collect::<std::io::Result<_>>().map_err(|_| Errno::BADF)?;
                set(IrqData::EventFd(&borrowed(&fds)))
            }
        }
    }

    fn guest_read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        lock_order::calling_out();
        self.memory.read(iova, data).map_err(|_| Errno::FAULT)
    }

    fn guest_write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        lock_order::calling_out();
        self.memory.write(iova, data).map_err(|_| Errno::FAULT)
    }

    fn mark_dirty(&self, iova: u64, length: u64) -> Result<(), Errno> {
        self.memory.mark_dirty(iova, length).map_err(|_| Errno::FAULT)
    }

    fn scratch_alloc(&self, length: u64, address_bits: u32) -> Result<ScratchMemory, Errno> {
        let mut maps = self.memory.mappings();
        maps.extend(self.mappings());
        let (iova, memory) = self.scratch.reserve(length, address_bits, &self.device.iova_ranges(), &maps)?;
        let map = DmaMap { iova, length, memory: memory.clone().into(), offset: 0, read: true, write: true };
        if let Err(error) = self.device.dma_map(&map) {
            self.scratch.remove(iova);
            return Err(error.errno);
        }
        Ok(ScratchMemory { iova, length, address: memory.address() })
    }

    fn scratch_free(&self, iova: u64) -> Result<(), Errno> {
        let length = self.scratch.length(iova).ok_or(Errno::INVAL)?;
        // The device first: memory that it can still reach is not given back.
        self.device.dma_unmap(iova, length).map_err(|error| error.errno)?;
        self.scratch.remove(iova);
        Ok(())
    }

    fn irq_inject(&self, index: u32, vector: u32) -> Result<(), Errno> {
        self.irqs.signal((index, vector));
        Ok(())
    }

    fn request(&self, request: Request) -> Result<(), Errno> {
        self.queue(Task::Asked(request))
    }

    fn now(&self) -> u64 {
        nanoseconds(self.device.clock().now())
    }

    fn wait(&self, duration: u64, deadline: u64, cancelled: &dyn Fn() -> bool) -> Result<(), Errno> {
        let until = self.now().saturating_add(duration);
        loop {
            if cancelled() || self.cancel.load(Ordering::Relaxed) {
                return Err(Errno::CANCELED);
            }
            let now = self.now();
            if now >= until {
                return Ok(());
            }
            if now >= deadline {
                return Err(Errno::TIMEDOUT);
            }
            let left = Duration::from_nanos(until.min(deadline) - now);
            self.device.clock().wait(left.min(WAIT_SLICE));
        }
    }

    fn timer_arm(&self, cookie: u64, nanoseconds: u64) -> Result<(), Errno> {
        let due = self.device.clock().now().saturating_add(Duration::from_nanos(nanoseconds));
        self.timers.arm(cookie, due, || self.timer_thread())
    }

    fn timer_cancel(&self, cookie: u64) -> Result<(), Errno> {
        self.timers.cancel(cookie);
        Ok(())
    }
}

/// For re-arming: descriptors as a request holds them.
pub fn borrowed<'a>(fds: &'a [Option<Arc<std::os::fd::OwnedFd>>]) -> Vec<Option<BorrowedFd<'a>>> {
    use std::os::fd::AsFd;
    fds.iter().map(|fd| fd.as_ref().map(|fd| fd.as_fd())).collect()
}
