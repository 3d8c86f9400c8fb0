//! The guest: all of its state is in RAM and in its devices, so that it goes on wherever they go, and says when they differ.
//!
//! | page | holds |
//! |---|---|
//! | 0 | its variables |
//! | 1 | the pattern that it lends to an edu |
//! | 8 + 8 d .. | pages that only device d writes |
//! | 64 .. | pages that it stores into itself |

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vfio_mediate::device::sim::regs as stateful;
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::memory::PAGE_SIZE;
use vfio_mediate::sys::Mapping;

const STEPS: u64 = 0;
const AWAKE: u64 = 8;
/// One for each device: how often it was rung, or where its DMA is.
const RUNGS: u64 = 16;
const PATTERN_PAGE: u64 = 1;
const DEVICE_PAGES: u64 = 8;
const CPU_FIRST: u64 = 64;
const EDU: u16 = 0x11e8;
const CONFIG: u32 = 7;
const BUFFER: u64 = 0x4_0000;
const DMA_BYTES: u64 = 1024;

/// Where the guest's program stores.
pub fn cpu_pages(pages: u64) -> impl Iterator<Item = u64> {
    [0, PATTERN_PAGE].into_iter().chain(CPU_FIRST..pages)
}

pub struct Guest<'a> {
    pub ram: &'a Mapping,
    pub devices: &'a [Arc<MediatedDevice>],
}

impl Guest<'_> {
    pub fn steps(&self) -> u64 {
        self.get(STEPS)
    }

    /// How often device 0 was put to work.
    pub fn rungs(&self) -> u64 {
        self.get(RUNGS)
    }

    fn get(&self, at: u64) -> u64 {
        self.ram.load_u64(at, Ordering::Acquire).unwrap()
    }

    fn set(&self, at: u64, value: u64) {
        self.ram.store_u64(at, value, Ordering::Release).unwrap();
    }

    /// A new guest sets its devices up; one that arrived finds them so.
    pub fn wake(&self) -> Result<(), String> {
        if self.get(AWAKE) != 0 {
            return Ok(());
        }
        let pattern: Vec<u8> = (0..PAGE_SIZE).map(|at| (at * 7 + 3) as u8).collect();
        self.ram.write(PATTERN_PAGE * PAGE_SIZE, &pattern).unwrap();
        for device in self.devices {
            device.region_write(CONFIG, 4, &6u16.to_le_bytes()).map_err(|error| error.to_string())?;
        }
        self.set(AWAKE, 1);
        Ok(())
    }

    pub fn step(&self) -> Result<(), String> {
        let step = self.get(STEPS) + 1;
        self.set(STEPS, step);
        let pages = self.ram.len() / PAGE_SIZE - CPU_FIRST;
        let page = CPU_FIRST + step.wrapping_mul(0x9e37_79b9_7f4a_7c15) % pages;
        self.set(page * PAGE_SIZE + step % 512 * 8, step);
        for (number, device) in self.devices.iter().enumerate() {
            let done = if device.identity().device_id == EDU {
                self.edu(number as u64, device)
            } else {
                self.stateful(number as u64, device)
            };
            done.map_err(|what| format!("device {number}, step {step}: {what}"))?;
        }
        Ok(())
    }

    fn page(number: u64, count: u64) -> u64 {
        DEVICE_PAGES + number * 8 + count % 8
    }

    fn read32(device: &MediatedDevice, offset: u64) -> Result<u32, String> {
        let mut bytes = [0; 4];
        device.region_read(0, offset, &mut bytes).map_err(|error| error.to_string())?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn write32(device: &MediatedDevice, offset: u64, value: u32) -> Result<(), String> {
        device.region_write(0, offset, &value.to_le_bytes()).map_err(|error| error.to_string())
    }

    fn write64(device: &MediatedDevice, offset: u64, value: u64) -> Result<(), String> {
        device.region_write(0, offset, &value.to_le_bytes()).map_err(|error| error.to_string())
    }

    /// One doorbell after the other: the page must be full of the doorbell's word once the device has counted it, and the
    /// device must not count what was never rung. While it may not use the bus it keeps the doorbell for later.
    fn stateful(&self, number: u64, device: &MediatedDevice) -> Result<(), String> {
        let rung = self.get(RUNGS + number * 8);
        let counted = u64::from(Self::read32(device, stateful::DOORBELLS)?);
        if counted < rung && counted + 1 == rung && Self::read32(device, stateful::PENDING)? <= 1 {
            return Ok(());
        }
        if counted != rung {
            return Err(format!("{counted} doorbells counted, {rung} rung"));
        }
        let pattern = 0x5000_0000 + number as u32;
        if let Some(last) = rung.checked_sub(1) {
            let (page, expected) = (Self::page(number, last), stateful::word(pattern, rung as u32));
            let found = self.ram.load_u32(page * PAGE_SIZE + 4092, Ordering::Acquire).unwrap();
            if found != expected {
                return Err(format!("page {page} holds {found:#x}, not {expected:#x}"));
            }
        }
        Self::write64(device, stateful::TARGET, Self::page(number, rung) * PAGE_SIZE)?;
        Self::write32(device, stateful::LENGTH, PAGE_SIZE as u32)?;
        Self::write32(device, stateful::PATTERN, pattern)?;
        Self::write32(device, stateful::DOORBELL, 1)?;
        self.set(RUNGS + number * 8, rung + 1);
        Ok(())
    }

    /// One DMA after the other: the pattern into the device, once; then out of its hidden buffer to page after page.
    fn edu(&self, number: u64, device: &MediatedDevice) -> Result<(), String> {
        if Self::read32(device, 0x98)? & 1 != 0 {
            return Ok(());
        }
        let done = self.get(RUNGS + number * 8);
        if done > 1 {
            let page = Self::page(number, done - 1);
            let mut found = [0; DMA_BYTES as usize];
            self.ram.read(page * PAGE_SIZE, &mut found).unwrap();
            let expected = (0..DMA_BYTES).map(|at| (at * 7 + 3) as u8);
            if !found.iter().copied().eq(expected) {
                return Err(format!("page {page} is not what the buffer held"));
            }
        }
        let (from, to, command) = match done {
            0 => (PATTERN_PAGE * PAGE_SIZE, BUFFER, 1),
            _ => (BUFFER, Self::page(number, done) * PAGE_SIZE, 3),
        };
        Self::write64(device, 0x80, from)?;
        Self::write64(device, 0x88, to)?;
        Self::write64(device, 0x90, DMA_BYTES)?;
        Self::write64(device, 0x98, command)?;
        self.set(RUNGS + number * 8, done + 1);
        Ok(())
    }
}
