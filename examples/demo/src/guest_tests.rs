//! Each oracle is shown to catch what it is there for, on a device of a few lines.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use vfio_mediate::memory::{GuestRam, PAGE_SIZE};
use vfio_mediate::sys::Mapping;

use crate::guest::{Caught, Guest};
use crate::layout::State;
use crate::platform::Platform;

/// An edu that does its DMA at once, with one fault to choose.
#[derive(Debug, Default)]
struct Faults {
    lose_irq: Cell<bool>,
    wrong_factorial: Cell<bool>,
    wrong_liveness: Cell<bool>,
    short_dma: Cell<bool>,
}

#[derive(Debug)]
struct Fake {
    ram: Arc<GuestRam>,
    registers: RefCell<std::collections::BTreeMap<u64, u64>>,
    buffer: RefCell<Vec<u8>>,
    irq: Cell<bool>,
    faults: std::rc::Rc<Faults>,
}

impl Fake {
    fn register(&self, offset: u64) -> u64 {
        self.registers.borrow().get(&offset).copied().unwrap_or(0)
    }

    fn set(&self, offset: u64, value: u64) {
        self.registers.borrow_mut().insert(offset, value);
    }

    fn raise(&self, cause: u64) {
        self.set(0x24, self.register(0x24) | cause);
        self.irq.set(!self.faults.lose_irq.get());
    }

    fn dma(&self, command: u64) {
        let length = if self.faults.short_dma.get() { PAGE_SIZE - 1 } else { self.register(0x90) } as usize;
        let mut buffer = self.buffer.borrow_mut();
        if command & 2 == 0 {
            self.ram.mapping().read(self.register(0x80), &mut buffer[..length]).unwrap();
        } else {
            self.ram.mapping().write(self.register(0x88), &buffer[..length]).unwrap();
        }
        self.raise(0x100);
    }
}

impl Platform for Fake {
    fn ram(&self) -> &Mapping {
        self.ram.mapping()
    }

    fn read32(&self, offset: u64) -> anyhow::Result<u32> {
        let fault = match offset {
            0x04 => self.faults.wrong_liveness.get(),
            0x08 => self.faults.wrong_factorial.get(),
            _ => false,
        };
        Ok(self.register(offset) as u32 ^ u32::from(fault))
    }

    fn write32(&self, offset: u64, value: u32) -> anyhow::Result<()> {
        match offset {
            0x04 => self.set(0x04, u64::from(!value)),
            0x08 => {
                self.set(0x08, (1..=u64::from(value)).product());
                self.raise(0x001);
            }
            0x64 => self.set(0x24, self.register(0x24) & !u64::from(value)),
            _ => self.set(offset, u64::from(value)),
        }
        Ok(())
    }

    fn write64(&self, offset: u64, value: u64) -> anyhow::Result<()> {
        self.set(offset, value);
        if offset == 0x98 {
            self.dma(value);
        }
        Ok(())
    }

    fn wait_irq(&self, _patience: Duration) -> anyhow::Result<bool> {
        Ok(self.irq.replace(false))
    }

    fn irq_patience(&self) -> Duration {
        Duration::from_millis(20)
    }
}

fn machine() -> (Arc<GuestRam>, std::rc::Rc<Faults>, Guest<Fake>) {
    let ram = GuestRam::new(64 * PAGE_SIZE).unwrap();
    let faults = std::rc::Rc::new(Faults::default());
    let fake = Fake {
        ram: Arc::clone(&ram),
        registers: RefCell::default(),
        buffer: RefCell::new(vec![0; PAGE_SIZE as usize]),
        irq: Cell::new(false),
        faults: std::rc::Rc::clone(&faults),
    };
    (ram, faults, Guest::create(fake, 42, 4, 100_000).unwrap())
}

/// Runs until something is caught, for at most `steps`.
fn run(guest: &mut Guest<Fake>, steps: usize) -> Option<&'static str> {
    for _ in 0..steps {
        if let Err(error) = guest.step() {
            return Some(error.downcast_ref::<Caught>().expect("an oracle").oracle);
        }
        std::thread::yield_now();
    }
    None
}

/// Steps until the oracle of a lost interrupt may speak: it has a deadline, so time must pass.
fn run_for(guest: &mut Guest<Fake>, duration: Duration) -> Option<&'static str> {
    let end = std::time::Instant::now() + duration;
    while std::time::Instant::now() < end {
        if let Some(oracle) = run(guest, 1) {
            return Some(oracle);
        }
    }
    None
}

#[test]
fn a_healthy_machine_satisfies_every_oracle() {
    let (_ram, _faults, mut guest) = machine();
    assert_eq!(run(&mut guest, 400), None);
    let [rounds, stores, interrupts] = guest.progress().unwrap();
    assert!(rounds > 50 && stores > 0 && interrupts >= 3 * rounds, "{rounds} {stores} {interrupts}");
    assert!(guest.check_everything().unwrap() > 8);
}

#[test]
fn the_page_oracle_catches_one_changed_bit_of_ram() {
    let (ram, _faults, mut guest) = machine();
    run(&mut guest, 40);
    let address = State { ram: ram.mapping() }.places().unwrap().cpu_first * PAGE_SIZE;
    let mut byte = [0];
    ram.mapping().read(address + 4095, &mut byte).unwrap();
    ram.mapping().write(address + 4095, &[byte[0] ^ 0x80]).unwrap();
    let error = guest.check_everything().unwrap_err();
    assert_eq!(error.downcast_ref::<Caught>().unwrap().oracle, "page");
}

#[test]
fn the_page_oracle_catches_a_dma_that_is_one_byte_short() {
    let (_ram, faults, mut guest) = machine();
    faults.short_dma.set(true);
    assert_eq!(run(&mut guest, 400), Some("page"));
}

#[test]
fn the_device_oracle_catches_a_wrong_register() {
    for fault in [|f: &Faults| f.wrong_factorial.set(true), |f: &Faults| f.wrong_liveness.set(true)] {
        let (_ram, faults, mut guest) = machine();
        fault(&faults);
        assert_eq!(run(&mut guest, 400), Some("device"));
    }
}

#[test]
fn the_irq_oracle_catches_a_lost_interrupt() {
    let (_ram, faults, mut guest) = machine();
    faults.lose_irq.set(true);
    assert_eq!(run_for(&mut guest, Duration::from_secs(5)), Some("irq"));
}

#[test]
fn a_guest_goes_on_from_its_memory_alone() {
    let (ram, faults, mut guest) = machine();
    run(&mut guest, 40);
    let before = guest.progress().unwrap();
    drop(guest);
    let fake = Fake {
        ram,
        registers: RefCell::default(),
        buffer: RefCell::new(vec![0; PAGE_SIZE as usize]),
        irq: Cell::new(true),
        faults,
    };
    let guest = Guest::attach(fake, 0).unwrap();
    assert_eq!(guest.progress().unwrap(), before);
}
