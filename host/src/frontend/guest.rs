//! A guest in a few lines: steps over memory and devices.
//!
//! **Owns** the loop around a guest's steps. **Must never** keep a variable of the guest's: what is to move with it lives in
//! its memory, and a guest that arrives finds everything there.
//!
//! ```text
//!   let machine = InProcess::paused(memory);
//!   let guest = Guest::new(&machine, devices);
//!   let running = guest.run("guest", |guest| {
//!       let count = guest.load_u64(0)?;
//!       guest.store_u64(0, count + 1)?;
//!       guest.write32(0, BAR, DOORBELL, 1)?;
//!       Ok(Next::Step)
//!   })?;
//! ```
//! Nothing runs before [`crate::mediation::VmmPort::resume`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use super::in_process::{GuestThread, InProcess, IrqLine};
use crate::mediation::{MediatedDevice, MediationError};
use crate::memory::{AddressSpace, MemoryError};
use crate::sys::{Mapping, MappingError};

/// What a guest could not do.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// An address outside its memory, or not aligned: the guest's own mistake
    #[error("guest memory")]
    Memory(#[from] MappingError),
    #[error("guest memory")]
    NoMemory(#[from] MemoryError),
    #[error("device {device}")]
    Device { device: usize, source: MediationError },
    #[error("there is no device {device}")]
    NoDevice { device: usize },
    /// The guest's own word
    #[error("{0}")]
    Other(String),
}

pub type Result<T> = std::result::Result<T, GuestError>;

/// What a step ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Step,
    /// The guest has nothing more to do
    Done,
}

/// A guest's view: its memory through the CPU's mapping, its devices by number.
#[derive(Debug, Clone)]
pub struct Guest {
    machine: Arc<InProcess>,
    devices: Vec<Arc<MediatedDevice>>,
}

impl Guest {
    pub fn new(machine: &Arc<InProcess>, devices: Vec<Arc<MediatedDevice>>) -> Self {
        Self { machine: Arc::clone(machine), devices }
    }

    pub fn memory(&self) -> &Arc<AddressSpace> {
        self.machine.memory()
    }

    /// All of its memory; offset 0 is guest-physical 0. Refused where the memory is its devices' clients'.
    pub fn ram(&self) -> Result<&Mapping> {
        Ok(self.machine.memory().own_ram()?.mapping())
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        Ok(self.ram()?.read(offset, data)?)
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        Ok(self.ram()?.write(offset, data)?)
    }

    /// Aligned, with acquire order.
    pub fn load_u64(&self, offset: u64) -> Result<u64> {
        Ok(self.ram()?.load_u64(offset, Ordering::Acquire)?)
    }

    /// Aligned, with release order.
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<()> {
        Ok(self.ram()?.store_u64(offset, value, Ordering::Release)?)
    }

    pub fn load_u32(&self, offset: u64) -> Result<u32> {
        Ok(self.ram()?.load_u32(offset, Ordering::Acquire)?)
    }

    pub fn store_u32(&self, offset: u64, value: u32) -> Result<()> {
        Ok(self.ram()?.store_u32(offset, value, Ordering::Release)?)
    }

    pub fn device(&self, device: usize) -> Result<&Arc<MediatedDevice>> {
        self.devices.get(device).ok_or(GuestError::NoDevice { device })
    }

    /// A little-endian register, as a driver reads it.
    pub fn read32(&self, device: usize, region: u32, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        let read = self.device(device)?.region_read(region, offset, &mut bytes);
        read.map_err(|source| GuestError::Device { device, source })?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub fn write32(&self, device: usize, region: u32, offset: u64, value: u32) -> Result<()> {
        self.write_register(device, region, offset, &value.to_le_bytes())
    }

    pub fn write64(&self, device: usize, region: u32, offset: u64, value: u64) -> Result<()> {
        self.write_register(device, region, offset, &value.to_le_bytes())
    }

    fn write_register(&self, device: usize, region: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.device(device)?.region_write(region, offset, bytes);
        written.map_err(|source| GuestError::Device { device, source })
    }

    /// Connects an interrupt vector.
    pub fn connect(&self, device: usize, index: u32, vector: u32) -> Result<IrqLine> {
        IrqLine::connect(self.device(device)?, index, vector).map_err(|source| GuestError::Device { device, source })
    }

    /// Runs a guest on a thread of its own: `step` again and again, never while the guest is paused. It ends when a step is
    /// the last one, fails, or the machine's guest is ended.
    pub fn run(
        &self,
        name: &str,
        step: impl FnMut(&Self) -> Result<Next> + Send + 'static,
    ) -> std::io::Result<JoinHandle<Result<()>>> {
        let (guest, thread) = (self.clone(), self.machine.attach());
        std::thread::Builder::new().name(name.to_owned()).spawn(move || guest.steps(&thread, step))
    }

    fn steps(&self, thread: &GuestThread, mut step: impl FnMut(&Self) -> Result<Next>) -> Result<()> {
        while thread.checkpoint() {
            if step(self)? == Next::Done {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::device::sim;
    use crate::mediation::VmmPort;
    use crate::memory::{GuestRam, IovaMapping, PAGE_SIZE};
    use crate::plugin::Registry;

    const LIVENESS: u64 = 4;

    fn machine() -> (Arc<InProcess>, Guest) {
        let memory = AddressSpace::new(GuestRam::new(4 * PAGE_SIZE).unwrap());
        let device = sim::open("sim:edu?clock=virtual").unwrap();
        let device = MediatedDevice::open(device, &Registry::new(), Arc::clone(&memory)).unwrap();
        let map = IovaMapping { iova: 0, length: 4 * PAGE_SIZE, ram_offset: 0, read: true, write: true };
        device.dma_map(map).unwrap();
        let machine = InProcess::paused(memory);
        let guest = Guest::new(&machine, vec![device]);
        (machine, guest)
    }

    /// Counts in its memory, and asks its device each time whether it lives.
    fn count(guest: &Guest) -> Result<Next> {
        let count = guest.load_u64(0)?;
        guest.write32(0, 0, LIVENESS, count as u32)?;
        if guest.read32(0, 0, LIVENESS)? != !(count as u32) {
            return Err(GuestError::Other(format!("the device is not alive at {count}")));
        }
        guest.store_u64(0, count + 1)?;
        Ok(Next::Step)
    }

    /// spec: GUEST-5
    #[test]
    fn a_guests_whole_state_is_in_its_memory_so_that_copying_it_goes_on_elsewhere() {
        let deadline = Instant::now() + Duration::from_secs(20);
        let (here, guest) = machine();
        let running = guest.run("guest", count).unwrap();
        assert_eq!(guest.load_u64(0).unwrap(), 0, "nothing runs before resume");
        here.resume().unwrap();
        while guest.load_u64(0).unwrap() < 100 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        here.pause(deadline).unwrap();
        let stopped = guest.load_u64(0).unwrap();

        let (there, arrived) = machine();
        let mut image = vec![0; (4 * PAGE_SIZE) as usize];
        guest.read(0, &mut image).unwrap();
        arrived.write(0, &image).unwrap();
        let goes_on = arrived.run("guest", count).unwrap();
        there.resume().unwrap();
        while arrived.load_u64(0).unwrap() < stopped + 100 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        assert_eq!(guest.load_u64(0).unwrap(), stopped, "the one here stands still");
        there.end();
        here.end();
        goes_on.join().unwrap().unwrap();
        running.join().unwrap().unwrap();
    }

    #[test]
    fn a_guests_mistake_ends_it_and_is_told() {
        let (machine, guest) = machine();
        machine.resume().unwrap();
        let outside = guest.run("guest", |guest| guest.store_u64(4 * PAGE_SIZE, 1).map(|()| Next::Step)).unwrap();
        assert!(matches!(outside.join().unwrap(), Err(GuestError::Memory(_))));
        let absent = guest.run("guest", |guest| guest.read32(1, 0, 0).map(|_| Next::Step)).unwrap();
        assert!(matches!(absent.join().unwrap(), Err(GuestError::NoDevice { device: 1 })));
        let beyond = guest.run("guest", |guest| guest.read32(0, 0, 1 << 20).map(|_| Next::Step)).unwrap();
        assert!(matches!(beyond.join().unwrap(), Err(GuestError::Device { device: 0, .. })));
        machine.pause(Instant::now() + Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn an_interrupt_that_is_waited_for_idly_is_not_taken() {
        let (_machine, guest) = machine();
        let line = guest.connect(0, 1, 0).unwrap();
        assert!(!line.wait_pending(Duration::ZERO).unwrap());
        line.repeat().unwrap();
        assert!(line.wait_pending(Duration::from_secs(20)).unwrap());
        assert!(line.wait_pending(Duration::ZERO).unwrap());
        assert_eq!((line.take().unwrap(), line.take().unwrap()), (1, 0));
    }
}
