//! A guest of the lab: uses the edu that its machine has, without a driver, and says what it found.
//!
//! One line per promise, `ok|FAIL` first. It finds the device in sysfs, maps BAR 0 through `resource0`, gives the device its own
//! pages by their physical addresses, and takes MSIs on a vector whose handler does nothing but count. It knows nothing of
//! what is behind the device, so that the emulator's own edu is the oracle for every other.
//!
//! **Must never** run outside of a machine that is thrown away: it writes physical memory.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_mediate::sys::Mapping;

const PAGE: u64 = 4096;
const BAR_SIZE: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

const ID: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const IRQ_STATUS: u64 = 0x24;
const IRQ_RAISE: u64 = 0x60;
const IRQ_ACK: u64 = 0x64;
const DMA_SRC: u64 = 0x80;
const DMA_DST: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const RUN: u64 = 1;
const TO_RAM: u64 = 2;
const WITH_IRQ: u64 = 4;
const DMA_IRQ: u32 = 0x100;
const BUFFER: u64 = 0x4_0000;

/// Configuration space.
const COMMAND: u64 = 4;
const COMMAND_ON: u16 = 0b110;
const INTX_OFF: u16 = 1 << 10;
const CAPABILITIES: u64 = 0x34;
const CAPABILITY_MSI: u8 = 5;
/// The first processor's interrupt controller.
const MSI_ADDRESS: u32 = 0xfee0_0000;
/// KVM's notification vector: its handler counts, and does nothing else (`PIN` of /proc/interrupts).
const MSI_VECTOR: u16 = 0xf2;
const MSI_COUNTER: &str = "PIN:";

fn main() -> ExitCode {
    let mut guest = match Guest::find() {
        Ok(guest) => guest,
        Err(error) => {
            println!("FAIL edu: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let mut code = ExitCode::SUCCESS;
    for (what, step) in STEPS {
        match step(&mut guest) {
            Ok(()) => println!("ok  {} edu: {what}", guest.address),
            Err(error) => {
                println!("FAIL {} edu: {what}: {error:#}", guest.address);
                code = ExitCode::FAILURE;
                break;
            }
        }
    }
    // What was claimed by a mediator shows in its count; this is ours. Reads are not all here: a poll takes as many as it takes.
    let count = |offset| guest.writes.iter().filter(|at| **at == offset).count();
    println!("writes {LIVENESS:#x}: {}, {IRQ_RAISE:#x}: {}", count(LIVENESS), count(IRQ_RAISE));
    code
}

type Step = fn(&mut Guest) -> Result<()>;

const STEPS: [(&str, Step); 9] = [
    ("it is there, and its BAR can be mapped", Guest::identity),
    ("liveness answers the complement", Guest::liveness),
    ("factorials", Guest::factorial),
    ("what is stored as 8 bytes is loaded as 8 bytes", Guest::wide),
    ("a page into the device and out again", Guest::dma_page),
    ("a few bytes into the device and out again, and none beside them", Guest::dma_bytes),
    ("without bus master no DMA", Guest::dma_without_bus_master),
    ("an MSI for each that is raised", Guest::msi),
    ("an MSI at the end of a DMA, whose data are there by then", Guest::dma_msi),
];

struct Guest {
    address: String,
    folder: PathBuf,
    config: File,
    bar: Mapping,
    /// Two pages of guest memory, which need not be neighbours
    pages: [Page; 2],
    writes: Vec<u64>,
}

/// One page, and where it is.
struct Page {
    memory: Mapping,
    physical: u64,
}

impl Page {
    fn new() -> Result<Self> {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, PAGE)?;
        let memory = Mapping::new(&fd, 0, PAGE)?;
        memory.fill(0, PAGE, 0)?;
        let physical = physical(memory.address())?;
        Ok(Self { memory, physical })
    }

    fn read(&self) -> Result<Vec<u8>> {
        let mut data = vec![0; PAGE as usize];
        self.memory.read(0, &mut data)?;
        // It was the device's page all along.
        ensure!(physical(self.memory.address())? == self.physical, "the kernel moved the page: run it again");
        Ok(data)
    }
}

/// The physical address of a page of this process. Nothing pins it; nothing moves it either, in a machine with nothing to do.
fn physical(address: u64) -> Result<u64> {
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / PAGE * 8)?;
    let entry = u64::from_le_bytes(entry);
    let frame = entry & ((1 << 55) - 1);
    ensure!(entry >> 63 == 1 && frame != 0, "no page at {address:#x}: {entry:#x}");
    Ok(frame * PAGE)
}

fn pattern(seed: u64, length: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition()? {
        ensure!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn find() -> Result<PathBuf> {
    let is = |folder: &Path, name: &str, id: &str| fs::read_to_string(folder.join(name)).is_ok_and(|s| s.trim() == id);
    for entry in fs::read_dir("/sys/bus/pci/devices").context("sysfs")? {
        let folder = entry?.path();
        if is(&folder, "vendor", "0x1234") && is(&folder, "device", "0x11e8") {
            return Ok(folder);
        }
    }
    bail!("no 1234:11e8 on the bus")
}

/// How often the vector's handler ran, on all processors.
fn taken() -> Result<u64> {
    let text = fs::read_to_string("/proc/interrupts")?;
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(MSI_COUNTER));
    let line = line.with_context(|| format!("/proc/interrupts has no {MSI_COUNTER}"))?;
    Ok(line.split_whitespace().map_while(|word| word.parse::<u64>().ok()).sum())
}

impl Guest {
    fn find() -> Result<Self> {
        let folder = find()?;
        let address = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let open =
            |name: &str| OpenOptions::new().read(true).write(true).open(folder.join(name)).context(name.to_owned());
        open("enable")?.write_all(b"1").context("enabling the device")?;
        let bar = Mapping::new(open("resource0")?, 0, BAR_SIZE)?;
        let pages = [Page::new()?, Page::new()?];
        Ok(Self { address, config: open("config")?, bar, pages, folder, writes: Vec::new() })
    }

    fn read32(&self, offset: u64) -> Result<u32> {
        Ok(self.bar.load_u32(offset, Ordering::SeqCst)?)
    }

    /// A plain store: a stronger order would be an exchange, which is a load, too.
    fn write32(&mut self, offset: u64, value: u32) -> Result<()> {
        self.writes.push(offset);
        Ok(self.bar.store_u32(offset, value, Ordering::Release)?)
    }

    fn read64(&self, offset: u64) -> Result<u64> {
        Ok(self.bar.load_u64(offset, Ordering::SeqCst)?)
    }

    fn write64(&mut self, offset: u64, value: u64) -> Result<()> {
        self.writes.push(offset);
        Ok(self.bar.store_u64(offset, value, Ordering::Release)?)
    }

    fn config16(&self, offset: u64) -> Result<u16> {
        let mut data = [0; 2];
        self.config.read_exact_at(&mut data, offset)?;
        Ok(u16::from_le_bytes(data))
    }

    fn set_config16(&self, offset: u64, value: u16) -> Result<()> {
        Ok(self.config.write_all_at(&value.to_le_bytes(), offset)?)
    }

    fn set_bus_master(&self, on: bool) -> Result<()> {
        let others = self.config16(COMMAND)? & !COMMAND_ON;
        let command = others | INTX_OFF | if on { COMMAND_ON } else { 0b10 };
        self.set_config16(COMMAND, command)?;
        let kept = self.config16(COMMAND)?;
        ensure!(kept == command, "COMMAND is {kept:#x} after {command:#x}");
        Ok(())
    }

    // ---- the steps ------------------------------------------------------------------------------------------------

    fn identity(&mut self) -> Result<()> {
        let resource = fs::read_to_string(self.folder.join("resource"))?;
        let first = resource.lines().next().unwrap_or_default();
        ensure!(!first.starts_with("0x0000000000000000 "), "BAR 0 has no address: {first}");
        let id = self.read32(ID)?;
        ensure!(id == 0x0100_00ed, "its identification is {id:#x}");
        Ok(())
    }

    fn liveness(&mut self) -> Result<()> {
        for value in [0, 1, 0xdead_beef, u32::MAX] {
            self.write32(LIVENESS, value)?;
            let answer = self.read32(LIVENESS)?;
            ensure!(answer == !value, "{value:#x} was answered with {answer:#x}");
        }
        Ok(())
    }

    fn factorial(&mut self) -> Result<()> {
        for (n, expected) in [(0, 1), (1, 1), (5, 120), (12, 479_001_600), (13, 1_932_053_504)] {
            self.write32(FACTORIAL, n)?;
            wait_until("factorial", || Ok(self.read32(STATUS)? & 1 == 0))?;
            let result = self.read32(FACTORIAL)?;
            ensure!(result == expected, "{n}! is {result}, not {expected}");
        }
        Ok(())
    }

    fn wide(&mut self) -> Result<()> {
        for value in [0x0123_4567_89ab_cdef, 0] {
            self.write64(DMA_SRC, value)?;
            let kept = self.read64(DMA_SRC)?;
            ensure!(kept == value, "{value:#x} is loaded as {kept:#x}");
        }
        Ok(())
    }

    fn start(&mut self, source: u64, target: u64, count: u64, command: u64) -> Result<()> {
        self.write64(DMA_SRC, source)?;
        self.write64(DMA_DST, target)?;
        self.write64(DMA_COUNT, count)?;
        self.write64(DMA_COMMAND, RUN | command)
    }

    fn transfer(&mut self, source: u64, target: u64, count: u64, command: u64) -> Result<()> {
        self.start(source, target, count, command)?;
        wait_until("dma", || Ok(self.read64(DMA_COMMAND)? & RUN == 0))
    }

    fn dma_page(&mut self) -> Result<()> {
        let [from, to] = [self.pages[0].physical, self.pages[1].physical];
        self.set_bus_master(true)?;
        for seed in [1, 2] {
            let sent = pattern(seed, PAGE);
            self.pages[0].memory.write(0, &sent)?;
            self.transfer(from, BUFFER, PAGE, 0)?;
            self.transfer(BUFFER, to, PAGE, TO_RAM)?;
            ensure!(self.pages[1].read()? == sent, "the page came back different");
        }
        Ok(())
    }

    fn dma_bytes(&mut self) -> Result<()> {
        const BACK: usize = 100;
        let [from, to] = [self.pages[0].physical, self.pages[1].physical];
        for count in [1, 7, 1000] {
            let sent = pattern(count, count);
            self.pages[0].memory.write(3, &sent)?;
            self.pages[1].memory.fill(0, PAGE, 0xaa)?;
            self.transfer(from + 3, BUFFER + 5, count, 0)?;
            self.transfer(BUFFER + 5, to + BACK as u64, count, TO_RAM)?;
            let page = self.pages[1].read()?;
            let (before, rest) = page.split_at(BACK);
            let (received, behind) = rest.split_at(count as usize);
            ensure!(received == sent, "{count} bytes came back different");
            ensure!(before.iter().chain(behind).all(|byte| *byte == 0xaa), "{count} bytes: others were written");
        }
        Ok(())
    }

    fn dma_without_bus_master(&mut self) -> Result<()> {
        let to = self.pages[1].physical;
        self.pages[1].memory.fill(0, PAGE, 0x55)?;
        self.set_bus_master(false)?;
        self.transfer(BUFFER, to, PAGE, TO_RAM)?;
        self.set_bus_master(true)?;
        ensure!(self.pages[1].read()?.iter().all(|byte| *byte == 0x55), "the device wrote memory");
        Ok(())
    }

    /// Where the MSI capability is.
    fn msi_capability(&self) -> Result<u64> {
        let mut at = u64::from(self.config16(CAPABILITIES)? as u8 & 0xfc);
        // No list of capabilities is longer than what there is room for.
        for _ in 0..48 {
            ensure!(at != 0, "no MSI capability");
            let [id, next] = self.config16(at)?.to_le_bytes();
            if id == CAPABILITY_MSI {
                return Ok(at);
            }
            at = u64::from(next & 0xfc);
        }
        bail!("the list of capabilities has no end")
    }

    fn enable_msi(&self) -> Result<()> {
        let at = self.msi_capability()?;
        let control = self.config16(at + 2)?;
        let is_64_bit = control & 0x80 != 0;
        self.config.write_all_at(&MSI_ADDRESS.to_le_bytes(), at + 4)?;
        if is_64_bit {
            self.config.write_all_at(&[0; 4], at + 8)?;
        }
        self.set_config16(at + if is_64_bit { 12 } else { 8 }, MSI_VECTOR)?;
        self.set_config16(at + 2, control | 1)
    }

    fn expect_msi(&self, before: u64, what: &str) -> Result<()> {
        wait_until(what, || Ok(taken()? != before))?;
        // A second one would come as soon.
        std::thread::sleep(Duration::from_millis(50));
        let count = taken()? - before;
        ensure!(count == 1, "{what}: {count} interrupts");
        Ok(())
    }

    fn msi(&mut self) -> Result<()> {
        self.enable_msi()?;
        for value in [1, 0x40, 0x8000_0000] {
            let before = taken()?;
            self.write32(IRQ_RAISE, value)?;
            self.expect_msi(before, &format!("raised {value:#x}"))?;
            let status = self.read32(IRQ_STATUS)?;
            ensure!(status == value, "the interrupt status is {status:#x} after {value:#x}");
            self.write32(IRQ_ACK, value)?;
            ensure!(self.read32(IRQ_STATUS)? == 0, "still pending when acknowledged");
        }
        Ok(())
    }

    fn dma_msi(&mut self) -> Result<()> {
        let [from, to] = [self.pages[0].physical, self.pages[1].physical];
        let sent = pattern(77, PAGE);
        self.pages[0].memory.write(0, &sent)?;
        self.transfer(from, BUFFER, PAGE, 0)?;
        let before = taken()?;
        self.start(BUFFER, to, PAGE, TO_RAM | WITH_IRQ)?;
        wait_until("the interrupt of a DMA", || Ok(taken()? != before))?;
        ensure!(self.pages[1].read()? == sent, "the data were not there with the interrupt");
        let status = self.read32(IRQ_STATUS)?;
        ensure!(status == DMA_IRQ, "the interrupt status is {status:#x}");
        self.write32(IRQ_ACK, status)?;
        self.expect_no_more(before + 1)
    }

    fn expect_no_more(&self, expected: u64) -> Result<()> {
        std::thread::sleep(Duration::from_millis(50));
        let count = taken()?;
        ensure!(count == expected, "{} interrupts too many", count - expected);
        Ok(())
    }
}
