//! Test a plug-in without hardware: a host that is a few hundred lines, a device that the test programs, a virtual clock.
//!
//! ```text
//! struct MyModel { .. }            impl Model for MyModel        the device, as its data sheet says
//! let host = FakeHost::new(MyModel::default(), 16 * 4096);       guest memory at iova 0
//! let device = host.open::<MyPlugin>(&TestIdentity { .. })?;     through the same shims as in a real host
//! device.write_u32(0, 0x80, 1)?;                                 what a client does: hooked where claimed
//! ```
//!
//! **Owns** the fake host's services, [`TestDevice`] (the opened device, with accesses routed by its claims), and the clock.
//! **Must never** be lenient where the real host is strict: it refuses what the ABI calls a broken contract, by a panic in
//! the test.
//!
//! Locks: one, around the model, the memory and the clock; held during a service, never during a call into the plug-in.
#![allow(unsafe_code)]

mod device;
mod services;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use device::{TestDevice, TestIdentity};

use crate::{Errno, Result};

/// A device, as the test programs it.
pub trait Model: Send + 'static {
    fn read(&mut self, bus: &mut Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    fn write(&mut self, bus: &mut Bus, region: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// Time has come to [`Bus::now`]: what was due happens.
    fn tick(&mut self, bus: &mut Bus);
}

/// What a model reaches: memory by DMA, its interrupts, the time.
pub struct Bus {
    now: Duration,
    memory: Vec<u8>,
    /// By iova; the vectors never move or shrink while they are here
    scratch: BTreeMap<u64, Box<[u8]>>,
    writes: Vec<(u64, u64)>,
    interrupts: VecDeque<(u32, u32)>,
}

impl Bus {
    pub fn now(&self) -> Duration {
        self.now
    }

    /// EFAULT where neither guest nor scratch memory is.
    pub fn dma_read(&mut self, iova: u64, data: &mut [u8]) -> Result<()> {
        data.copy_from_slice(self.find(iova, data.len())?);
        Ok(())
    }

    /// EFAULT as in [`Self::dma_read`]. Writes to guest memory are logged in [`FakeHost::device_writes`].
    pub fn dma_write(&mut self, iova: u64, data: &[u8]) -> Result<()> {
        self.find(iova, data.len())?.copy_from_slice(data);
        if iova < self.memory.len() as u64 {
            self.writes.push((iova, data.len() as u64));
        }
        Ok(())
    }

    pub fn interrupt(&mut self, index: u32, vector: u32) {
        self.interrupts.push_back((index, vector));
    }

    fn find(&mut self, iova: u64, length: usize) -> Result<&mut [u8]> {
        let (base, memory) = match self.scratch.range_mut(..=iova).next_back() {
            Some((base, memory)) => (*base, &mut memory[..]),
            None => (0, &mut self.memory[..]),
        };
        let offset = usize::try_from(iova - base).map_err(|_| Errno::EFAULT)?;
        let end = offset.checked_add(length).ok_or(Errno::EFAULT)?;
        memory.get_mut(offset..end).ok_or(Errno::EFAULT)
    }
}

/// The least of a host that a plug-in can live in.
pub struct FakeHost<M: Model> {
    shared: Box<Shared>,
    model: std::marker::PhantomData<fn() -> M>,
}

/// What services find behind `CallContext::host`.
pub(crate) struct Shared {
    machine: Mutex<Machine>,
    cancelled: AtomicBool,
    deadline: AtomicU64,
    dirty: Mutex<Vec<(u64, u64)>>,
    requests: Mutex<Vec<(u32, u64)>>,
    injected: Mutex<Vec<(u32, u32)>>,
    timers: Mutex<BTreeMap<u64, u64>>,
}

struct Machine {
    model: Box<dyn AnyModel>,
    bus: Bus,
}

trait AnyModel: Model {
    fn as_any(&mut self) -> &mut dyn std::any::Any;
}

impl<M: Model> AnyModel for M {
    fn as_any(&mut self) -> &mut dyn std::any::Any {
        self
    }
}

impl<M: Model> FakeHost<M> {
    /// A host with `memory` bytes of guest memory at iova 0, and the clock at 0.
    pub fn new(model: M, memory: usize) -> Self {
        let bus = Bus {
            now: Duration::ZERO,
            memory: vec![0; memory],
            scratch: BTreeMap::new(),
            writes: Vec::new(),
            interrupts: VecDeque::new(),
        };
        let shared = Box::new(Shared {
            machine: Mutex::new(Machine { model: Box::new(model), bus }),
            cancelled: AtomicBool::new(false),
            deadline: AtomicU64::new(u64::MAX),
            dirty: Mutex::default(),
            requests: Mutex::default(),
            injected: Mutex::default(),
            timers: Mutex::default(),
        });
        Self { shared, model: std::marker::PhantomData }
    }

    /// Looks at or changes the model and its bus behind the plug-in's back.
    pub fn with<R>(&self, look: impl FnOnce(&mut M, &mut Bus) -> R) -> R {
        let mut machine = self.shared.machine();
        let Machine { model, bus } = &mut *machine;
        match model.as_any().downcast_mut() {
            Some(model) => look(model, bus),
            None => unreachable!("`new` put an M there"),
        }
    }

    /// Lets time pass.
    pub fn advance(&self, duration: Duration) {
        self.shared.advance(duration);
    }

    pub fn now(&self) -> Duration {
        self.shared.machine().bus.now
    }

    /// Guest memory, `iova ..`, without going through the plug-in. Panics outside the memory.
    pub fn memory(&self, iova: u64, length: usize) -> Vec<u8> {
        let start = iova as usize;
        self.shared.machine().bus.memory[start..start + length].to_vec()
    }

    /// The guest's CPU stores. Panics outside the memory.
    pub fn store(&self, iova: u64, data: &[u8]) {
        let start = iova as usize;
        self.shared.machine().bus.memory[start..start + data.len()].copy_from_slice(data);
    }

    /// What the device wrote into guest memory since the last question: (iova, bytes).
    pub fn device_writes(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.shared.machine().bus.writes)
    }

    /// What the plug-in marked by `mark_dirty`, and the host for it by `guest_write`, since the last question.
    pub fn marked(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut lock(&self.shared.dirty))
    }

    /// What the plug-in requested since the last question: (`abi::REQUEST_*`, argument).
    pub fn requests(&self) -> Vec<(u32, u64)> {
        std::mem::take(&mut lock(&self.shared.requests))
    }

    /// Interrupts that the plug-in injected since the last question: (index, vector).
    pub fn injected(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut lock(&self.shared.injected))
    }

    /// Interrupts that the device raised since the last question: (index, vector).
    pub fn interrupts(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.shared.machine().bus.interrupts).into()
    }

    /// Cookies of armed timers, with the time at which each fires.
    pub fn timers(&self) -> Vec<(u64, Duration)> {
        lock(&self.shared.timers).iter().map(|(cookie, at)| (*cookie, Duration::from_nanos(*at))).collect()
    }

    /// Bytes of scratch memory that the plug-in holds.
    pub fn scratch_held(&self) -> usize {
        self.shared.machine().bus.scratch.values().map(|memory| memory.len()).sum()
    }

    /// Calls that follow see themselves cancelled.
    pub fn set_cancelled(&self, cancelled: bool) {
        self.shared.cancelled.store(cancelled, Ordering::SeqCst);
    }

    /// Calls that follow have this deadline.
    pub fn set_deadline(&self, deadline: Option<Duration>) {
        let nanoseconds = deadline.map_or(u64::MAX, |at| at.as_nanos() as u64);
        self.shared.deadline.store(nanoseconds, Ordering::SeqCst);
    }
}

impl Shared {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        lock(&self.machine)
    }

    fn advance(&self, duration: Duration) {
        let Machine { model, bus } = &mut *self.machine();
        bus.now += duration;
        model.tick(bus);
    }
}

/// A model that panicked in one test thread does not turn into a second panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: Model> fmt::Debug for FakeHost<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeHost").field("now", &self.now()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").field("now", &self.now).field("memory", &self.memory.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
