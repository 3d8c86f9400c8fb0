//! The guest: a small program in RAM that keeps a device busy and checks every byte.
//!
//! **Owns** nothing but what [`crate::layout`] describes: all its variables are in guest RAM, so it goes on wherever its
//! RAM and its device go. **Must never** keep a variable that matters outside RAM, and never mends what it finds wrong:
//! an oracle that is not satisfied ends the run and is named.
//!
//! ```text
//!  FILL -> TO_DEVICE -> (irq) -> FROM_DEVICE -> (irq) -> COMPUTE -> (irq) -> FILL ...
//! ```
//! In every step it also stores CPU pages through plain pointers, at the rate that was asked for.

use std::fmt;
use std::time::{Duration, Instant};

use vfio_mediate::memory::PAGE_SIZE;

use crate::layout::{KIND_CPU, KIND_DMA, Places, SOURCE_PAGE, State, Word, pattern};
use crate::platform::Platform;

/// Where the program is: the value of [`Word::Phase`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Phase {
    /// Write a new source page
    Fill = 0,
    /// The device reads it; then an interrupt
    ToDevice = 1,
    /// The device writes it to a payload page; then an interrupt
    FromDevice = 2,
    /// The device computes a factorial; then an interrupt
    Compute = 3,
}

impl Phase {
    fn from_word(word: u64) -> Option<Self> {
        [Self::Fill, Self::ToDevice, Self::FromDevice, Self::Compute].into_iter().find(|phase| *phase as u64 == word)
    }
}

/// An oracle that was not satisfied.
#[derive(Debug)]
pub struct Caught {
    /// `page`, `device` or `irq`
    pub oracle: &'static str,
    pub what: String,
}

impl fmt::Display for Caught {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} oracle: {}", self.oracle, self.what)
    }
}

impl std::error::Error for Caught {}

fn caught(oracle: &'static str, what: impl Into<String>) -> anyhow::Error {
    Caught { oracle, what: what.into() }.into()
}

// edu's registers, all in BAR 0.
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const STATUS_BUSY: u32 = 0x01;
const STATUS_IRQ: u32 = 0x80;
const IRQ_STATUS: u64 = 0x24;
const IRQ_ACK: u64 = 0x64;
const IRQ_FACTORIAL: u32 = 0x001;
const IRQ_DMA: u32 = 0x100;
const DMA_SOURCE: u64 = 0x80;
const DMA_TARGET: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const DMA_RUN: u64 = 1;
const DMA_TO_RAM: u64 = 2;
const DMA_IRQ: u64 = 4;
const BUFFER: u64 = 0x40000;

/// How long an interrupt may take before it is lost. edu's DMA takes 100 ms; an emulated machine may take its time.
const IRQ_PATIENCE: Duration = Duration::from_secs(20);
/// Checked in passing after each DMA round.
const SAMPLE_PAGES: u64 = 16;

/// The running program.
#[derive(Debug)]
pub struct Guest<P> {
    platform: P,
    places: Places,
    seed: u64,
    /// CPU pages to dirty per second
    dirty_rate: u64,
    /// Not state: when this host began to pace the stores, and how many it has made since.
    paced_since: Instant,
    paced: u64,
    /// Not state: since when this host waits for the interrupt of the current phase.
    waiting_since: Option<Instant>,
}

impl<P: Platform> Guest<P> {
    /// Creates the guest in empty memory.
    pub fn create(platform: P, seed: u64, payload_pages: u64, dirty_rate: u64) -> anyhow::Result<Self> {
        State { ram: platform.ram() }.create(seed, payload_pages)?;
        let guest = Self::attach(platform, dirty_rate)?;
        guest.populate()?;
        guest.set_liveness(0x1234_5678)?;
        Ok(guest)
    }

    /// Goes on with the guest that is in memory already.
    pub fn attach(platform: P, dirty_rate: u64) -> anyhow::Result<Self> {
        let state = State { ram: platform.ram() };
        if !state.is_alive()? {
            return Err(caught("page", "no guest in this memory: its first page has no magic number"));
        }
        let (places, seed) = (state.places()?, state.get(Word::Seed)?);
        Ok(Self { platform, places, seed, dirty_rate, paced_since: Instant::now(), paced: 0, waiting_since: None })
    }

    fn state(&self) -> State<'_> {
        State { ram: self.platform.ram() }
    }

    /// Half of the CPU pages hold data from the start; the other half stays zero until the guest comes to it.
    fn populate(&self) -> anyhow::Result<()> {
        for page in (0..self.places.cpu_pages).step_by(2) {
            self.store_cpu_page(page)?;
        }
        Ok(())
    }

    fn store_cpu_page(&self, page: u64) -> anyhow::Result<()> {
        let state = self.state();
        let version = state.version(page)?.wrapping_add(1);
        let mut bytes = [0u8; PAGE_SIZE as usize];
        pattern(self.seed, KIND_CPU, page, u64::from(version), &mut bytes);
        self.platform.ram().write((self.places.cpu_first + page) * PAGE_SIZE, &bytes)?;
        state.set_version(page, version)?;
        state.add(Word::CpuWrites, 1)?;
        Ok(())
    }

    /// One step. Between steps the guest may be paused; no step waits longer than some milliseconds.
    pub fn step(&mut self) -> anyhow::Result<()> {
        self.dirty_some_pages()?;
        let phase = self.state().get(Word::Phase)?;
        match Phase::from_word(phase).ok_or_else(|| caught("page", format!("phase {phase} does not exist")))? {
            Phase::Fill => self.fill()?,
            Phase::ToDevice => {
                if self.interrupted(IRQ_DMA)? {
                    self.state().set(Word::Filled, 1)?;
                    self.start_dma_to_ram()?;
                }
            }
            Phase::FromDevice => {
                if self.interrupted(IRQ_DMA)? {
                    self.finish_round()?;
                    self.start_factorial()?;
                }
            }
            Phase::Compute => {
                if self.interrupted(IRQ_FACTORIAL)? {
                    self.check_factorial()?;
                    self.state().set(Word::Phase, Phase::Fill as u64)?;
                }
            }
        }
        self.state().add(Word::Step, 1)?;
        Ok(())
    }

    pub fn heartbeat(&self) -> anyhow::Result<u64> {
        self.state().get(Word::Step)
    }

    /// Progress for people: DMA round trips, CPU pages stored, interrupts taken.
    pub fn progress(&self) -> anyhow::Result<[u64; 3]> {
        let state = self.state();
        Ok([state.get(Word::Round)?, state.get(Word::CpuWrites)?, state.get(Word::Interrupts)?])
    }

    fn dirty_some_pages(&mut self) -> anyhow::Result<()> {
        let due = u128::from(self.dirty_rate) * self.paced_since.elapsed().as_micros() / 1_000_000;
        // A long pause is not made up for in one step.
        let behind = u64::try_from(due).unwrap_or(u64::MAX).saturating_sub(self.paced);
        for _ in 0..behind.min(256) {
            let page = self.state().random()? % self.places.cpu_pages;
            self.store_cpu_page(page)?;
        }
        self.paced += behind;
        Ok(())
    }

    fn round(&self) -> anyhow::Result<u64> {
        self.state().get(Word::Round)
    }

    fn dma_page(&self, round: u64) -> [u8; PAGE_SIZE as usize] {
        let mut bytes = [0u8; PAGE_SIZE as usize];
        pattern(self.seed, KIND_DMA, 0, round, &mut bytes);
        bytes
    }

    fn payload_address(&self, round: u64) -> u64 {
        (self.places.payload_first + round % self.places.payload_pages) * PAGE_SIZE
    }

    fn fill(&mut self) -> anyhow::Result<()> {
        let bytes = self.dma_page(self.round()?);
        self.platform.ram().write(SOURCE_PAGE * PAGE_SIZE, &bytes)?;
        self.start_dma(SOURCE_PAGE * PAGE_SIZE, BUFFER, DMA_RUN | DMA_IRQ, Phase::ToDevice)
    }

    fn start_dma_to_ram(&mut self) -> anyhow::Result<()> {
        let target = self.payload_address(self.round()?);
        self.start_dma(BUFFER, target, DMA_RUN | DMA_TO_RAM | DMA_IRQ, Phase::FromDevice)
    }

    fn start_dma(&mut self, source: u64, target: u64, command: u64, phase: Phase) -> anyhow::Result<()> {
        self.platform.write64(DMA_SOURCE, source)?;
        self.platform.write64(DMA_TARGET, target)?;
        self.platform.write64(DMA_COUNT, PAGE_SIZE)?;
        self.state().set(Word::Phase, phase as u64)?;
        self.waiting_since = None;
        self.platform.write64(DMA_COMMAND, command)
    }

    fn start_factorial(&mut self) -> anyhow::Result<()> {
        let number = 1 + self.round()? % 12;
        self.state().set(Word::Factorial, number)?;
        self.state().set(Word::Phase, Phase::Compute as u64)?;
        self.waiting_since = None;
        self.platform.write32(STATUS, STATUS_IRQ)?;
        self.platform.write32(FACTORIAL, number as u32)
    }

    /// Whether the device has raised `cause`; acknowledges it. The interrupt itself must arrive: a cause that stands in
    /// the register while no eventfd fires is a lost interrupt.
    fn interrupted(&mut self, cause: u32) -> anyhow::Result<bool> {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if !self.platform.wait_irq(Duration::from_millis(2))? {
            if since.elapsed() < IRQ_PATIENCE.min(self.platform.irq_patience()) {
                return Ok(false);
            }
            let standing = self.platform.read32(IRQ_STATUS)?;
            return Err(caught(
                "irq",
                format!(
                    "no interrupt for {} ms, the device's irq status is {standing:#x}",
                    since.elapsed().as_millis()
                ),
            ));
        }
        let status = self.platform.read32(IRQ_STATUS)?;
        if status & cause == 0 {
            // A migration may repeat an interrupt; it must not lose one.
            return Ok(false);
        }
        self.platform.write32(IRQ_ACK, status & cause)?;
        self.state().add(Word::Interrupts, 1)?;
        self.waiting_since = None;
        Ok(true)
    }

    fn finish_round(&mut self) -> anyhow::Result<()> {
        let round = self.round()?;
        self.check_payload(round)?;
        self.check_liveness()?;
        self.set_liveness(round as u32 ^ 0x5a5a_5a5a)?;
        for _ in 0..SAMPLE_PAGES {
            let page = self.state().random()? % self.places.cpu_pages;
            self.check_cpu_page(page)?;
        }
        self.state().set(Word::Round, round + 1)
    }

    fn set_liveness(&self, value: u32) -> anyhow::Result<()> {
        self.platform.write32(LIVENESS, value)?;
        self.state().set(Word::Liveness, u64::from(value))
    }

    fn check_liveness(&self) -> anyhow::Result<()> {
        let expected = !(self.state().get(Word::Liveness)? as u32);
        let found = self.platform.read32(LIVENESS)?;
        if found != expected {
            return Err(caught("device", format!("liveness register is {found:#010x}, was left at {expected:#010x}")));
        }
        Ok(())
    }

    fn check_factorial(&self) -> anyhow::Result<()> {
        let number = self.state().get(Word::Factorial)?;
        if number == 0 || self.platform.read32(STATUS)? & STATUS_BUSY != 0 {
            return Ok(());
        }
        let expected: u64 = (1..=number).product();
        let found = self.platform.read32(FACTORIAL)?;
        if u64::from(found) != expected {
            return Err(caught("device", format!("factorial of {number} is {expected}, the device says {found}")));
        }
        Ok(())
    }

    fn check_payload(&self, round: u64) -> anyhow::Result<()> {
        let address = self.payload_address(round);
        let mut found = [0u8; PAGE_SIZE as usize];
        self.platform.ram().read(address, &mut found)?;
        if let Some(at) = first_difference(&found, &self.dma_page(round)) {
            return Err(caught("page", format!("payload of round {round} at {address:#x} differs from byte {at} on")));
        }
        Ok(())
    }

    fn check_cpu_page(&self, page: u64) -> anyhow::Result<()> {
        let version = self.state().version(page)?;
        let mut expected = [0u8; PAGE_SIZE as usize];
        if version > 0 {
            pattern(self.seed, KIND_CPU, page, u64::from(version), &mut expected);
        }
        let mut found = [0u8; PAGE_SIZE as usize];
        let address = (self.places.cpu_first + page) * PAGE_SIZE;
        self.platform.ram().read(address, &mut found)?;
        if let Some(at) = first_difference(&found, &expected) {
            return Err(caught(
                "page",
                format!("guest page at {address:#x}, version {version}, differs from byte {at} on"),
            ));
        }
        Ok(())
    }

    /// Checks every byte that has a known value: all CPU pages, all payload pages, the device's registers. Returns how
    /// many pages were checked.
    pub fn check_everything(&self) -> anyhow::Result<u64> {
        for page in 0..self.places.cpu_pages {
            self.check_cpu_page(page)?;
        }
        let rounds = self.round()?;
        // The page of the current round may be half-way: the device is writing it.
        let first = (rounds + 1).saturating_sub(self.places.payload_pages);
        for round in first..rounds {
            self.check_payload(round)?;
        }
        self.check_liveness()?;
        if self.state().get(Word::Phase)? != Phase::Compute as u64 {
            self.check_factorial()?;
        }
        Ok(self.places.cpu_pages + (rounds - first.min(rounds)))
    }
}

fn first_difference(found: &[u8], expected: &[u8]) -> Option<usize> {
    found.iter().zip(expected).position(|(a, b)| a != b)
}
