//! edu as its data sheet says, as small as the tests allow.

use std::time::Duration;

use vfio_mediate_sdk::testing::{Bus, Model};
use vfio_mediate_sdk::{Errno, Result};

pub(super) const DMA_TIME: Duration = Duration::from_millis(100);
const FACTORIAL_TIME: Duration = Duration::from_micros(10);

#[derive(Debug)]
pub(super) struct FakeEdu {
    pub id: u32,
    /// PCI COMMAND
    pub command: u16,
    pub dma_mask: u64,
    /// 8-byte accesses arrive as two of 4
    pub splits: bool,
    pub buffer: Vec<u8>,
    liveness: u32,
    result: u32,
    computing: Option<(Duration, u32)>,
    status: u32,
    irq_status: u32,
    dma: [u64; 4],
    done_at: Option<Duration>,
    /// DMAs that were started
    pub started: usize,
}

impl FakeEdu {
    pub fn new() -> Self {
        Self {
            id: 0x0100_00ed,
            command: 6,
            dma_mask: u64::MAX,
            splits: false,
            buffer: vec![0; 4096],
            liveness: 0,
            result: 0,
            computing: None,
            status: 0,
            irq_status: 0,
            dma: [0; 4],
            done_at: None,
            started: 0,
        }
    }

    pub fn is_moving(&self) -> bool {
        self.done_at.is_some()
    }

    fn raise(&mut self, bus: &mut Bus, bits: u32) {
        self.irq_status |= bits;
        bus.interrupt(1, 0);
    }

    fn finish_dma(&mut self, bus: &mut Bus) {
        let [src, dst, count, command] = self.dma;
        let count = count as usize;
        self.dma[3] &= !1;
        if self.command & 4 != 0 {
            let inside = |at: u64| usize::try_from(at.wrapping_sub(0x4_0000)).ok().filter(|at| at + count <= 4096);
            if command & 2 != 0 {
                if let Some(at) = inside(src) {
                    let _ = bus.dma_write(dst & self.dma_mask, &self.buffer[at..at + count]);
                }
            } else if let Some(at) = inside(dst) {
                let _ = bus.dma_read(src & self.dma_mask, &mut self.buffer[at..at + count]);
            }
        }
        if command & 4 != 0 {
            self.raise(bus, 0x100);
        }
    }
}

impl Model for FakeEdu {
    fn read(&mut self, _: &mut Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region == 7 {
            assert_eq!(offset, 4);
            data.copy_from_slice(&self.command.to_le_bytes());
            return Ok(());
        }
        if self.command & 2 == 0 {
            return Err(Errno::EIO);
        }
        let value = match (offset, data.len()) {
            (0x00, 4) => self.id.into(),
            (0x04, 4) => self.liveness.into(),
            (0x08, 4) => self.result.into(),
            (0x20, 4) => (self.status | u32::from(self.computing.is_some())).into(),
            (0x24, 4) => self.irq_status.into(),
            (0x80 | 0x88 | 0x90 | 0x98, 4 | 8) => self.dma[(offset as usize - 0x80) / 8],
            _ => u64::MAX,
        };
        let value = if self.splits { value | 0xffff_ffff << 32 } else { value };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn write(&mut self, bus: &mut Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region == 7 {
            self.command = u16::from_le_bytes(data.try_into().unwrap());
            return Ok(());
        }
        if self.command & 2 == 0 {
            return Err(Errno::EIO);
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let value = if self.splits { value & 0xffff_ffff } else { value };
        match (offset, data.len()) {
            (0x04, 4) => self.liveness = !(value as u32),
            (0x08, 4) if self.computing.is_none() => self.computing = Some((bus.now() + FACTORIAL_TIME, value as u32)),
            (0x20, 4) => self.status = value as u32 & 0x80,
            (0x60, 4) => self.raise(bus, value as u32),
            (0x64, 4) => self.irq_status &= !(value as u32),
            (0x80 | 0x88 | 0x90, 4 | 8) if self.done_at.is_none() => self.dma[(offset as usize - 0x80) / 8] = value,
            (0x98, 4 | 8) if self.done_at.is_none() && value & 1 != 0 => {
                self.dma[3] = value;
                self.done_at = Some(bus.now() + DMA_TIME);
                self.started += 1;
            }
            _ => {}
        }
        Ok(())
    }

    fn tick(&mut self, bus: &mut Bus) {
        if let Some((_, input)) = self.computing.filter(|(at, _)| *at <= bus.now()) {
            self.computing = None;
            self.result = (1..=input).take(40).fold(1, u32::wrapping_mul);
            if self.status & 0x80 != 0 {
                self.raise(bus, 1);
            }
        }
        if self.done_at.is_some_and(|at| at <= bus.now()) {
            self.done_at = None;
            self.finish_dma(bus);
        }
    }
}
