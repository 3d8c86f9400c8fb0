//! Cases for QEMU's edu device, real (on vfio-pci) or modelled.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::io::Errno;
use vfio_mediate::device::{Device, IrqAction, IrqData};
use vfio_mediate::sys::EventFd;

use super::bench::{INTX, MSI, PAGE, PAGES, refused};
use super::{Bench, Case, NotHere};

pub const ID: (u16, u16) = (0x1234, 0x11e8);

pub const CASES: &[Case] = &[
    Case { name: "id register", run: id },
    Case { name: "liveness answers the complement", run: liveness },
    Case { name: "factorial", run: factorial },
    Case { name: "registers through a mapping", run: mapped },
    Case { name: "8-byte registers, whole and in halves", run: wide_registers },
    Case { name: "dma round trip", run: dma_round_trip },
    Case { name: "dma round trip above 4 GiB", run: dma_high },
    Case { name: "dma of 1 byte and across a page", run: dma_sizes },
    Case { name: "dma waits for bus master", run: dma_without_bus_master },
    Case { name: "dma does not reach unmapped memory", run: dma_unmapped },
    Case { name: "dma does not write read-only memory", run: dma_read_only },
    Case { name: "interrupt by MSI", run: msi },
    Case { name: "interrupt by INTx, masked until unmasked", run: intx },
    Case { name: "interrupt at the end of a dma", run: dma_interrupt },
    Case { name: "interrupts triggered by software", run: software_trigger },
    Case { name: "no interrupt after its eventfd is taken away", run: removed_eventfd },
];

const BAR: u32 = 0;
const REG_ID: u64 = 0x00;
const REG_LIVENESS: u64 = 0x04;
const REG_FACTORIAL: u64 = 0x08;
const REG_STATUS: u64 = 0x20;
const REG_IRQ_STATUS: u64 = 0x24;
const REG_IRQ_RAISE: u64 = 0x60;
const REG_IRQ_ACK: u64 = 0x64;
const REG_DMA_SRC: u64 = 0x80;
const REG_DMA_DST: u64 = 0x88;
const REG_DMA_COUNT: u64 = 0x90;
const REG_DMA_COMMAND: u64 = 0x98;
const DMA_RUN: u64 = 1;
const DMA_TO_RAM: u64 = 2;
const DMA_IRQ: u64 = 4;
const DMA_IRQ_STATUS: u32 = 0x100;
/// The device's own buffer, as DMA addresses it.
const BUFFER: u64 = 0x40000;
const IOVA: u64 = 0x10_0000;

fn id(bench: &Bench<'_>) -> Result<()> {
    let id = bench.read32(BAR, REG_ID)?;
    ensure!(id == 0x0100_00ed, "{id:#x}");
    Ok(())
}

fn liveness(bench: &Bench<'_>) -> Result<()> {
    for value in [0, 1, 0xdead_beef, u32::MAX] {
        bench.write32(BAR, REG_LIVENESS, value)?;
        let answer = bench.read32(BAR, REG_LIVENESS)?;
        ensure!(answer == !value, "{value:#x} was answered with {answer:#x}");
    }
    Ok(())
}

fn factorial(bench: &Bench<'_>) -> Result<()> {
    for (n, expected) in [(0, 1), (1, 1), (5, 120), (12, 479_001_600), (13, 1_932_053_504)] {
        bench.write32(BAR, REG_FACTORIAL, n)?;
        bench.wait_until("factorial", || Ok(bench.read32(BAR, REG_STATUS)? & 1 == 0))?;
        let result = bench.read32(BAR, REG_FACTORIAL)?;
        ensure!(result == expected, "{n}! is {result}, not {expected}");
    }
    Ok(())
}

fn mapped(bench: &Bench<'_>) -> Result<()> {
    let mapping = match bench.device.region_map(BAR, 0, PAGE) {
        Ok(mapping) => mapping,
        Err(error) if error.errno == Errno::NODEV => {
            return Err(NotHere("the region cannot be mapped".to_owned()).into());
        }
        Err(error) => return Err(error.into()),
    };
    ensure!(mapping.load_u32(REG_ID, Ordering::SeqCst)? == 0x0100_00ed, "id through the mapping");
    mapping.store_u32(REG_LIVENESS, 0x1234_5678, Ordering::SeqCst)?;
    let answer = bench.read32(BAR, REG_LIVENESS)?;
    ensure!(answer == !0x1234_5678, "stored through the mapping, read by pread: {answer:#x}");
    Ok(())
}

fn wide_registers(bench: &Bench<'_>) -> Result<()> {
    bench.write64(BAR, REG_DMA_SRC, 0x1122_3344_5566_7788)?;
    let value = bench.read64(BAR, REG_DMA_SRC)?;
    ensure!(value == 0x1122_3344_5566_7788, "8 bytes whole: {value:#x}");
    // edu takes a 4-byte write of an 8-byte register as the whole register.
    bench.write32(BAR, REG_DMA_SRC, 0x99aa_bbcc)?;
    let value = bench.read64(BAR, REG_DMA_SRC)?;
    ensure!(value as u32 == 0x99aa_bbcc, "4 bytes: {value:#x}");
    bench.write64(BAR, REG_DMA_SRC, 0)
}

/// Starts a transfer.
fn start(bench: &Bench<'_>, source: u64, target: u64, count: u64, command: u64) -> Result<()> {
    bench.write64(BAR, REG_DMA_SRC, source)?;
    bench.write64(BAR, REG_DMA_DST, target)?;
    bench.write64(BAR, REG_DMA_COUNT, count)?;
    bench.write64(BAR, REG_DMA_COMMAND, DMA_RUN | command)
}

fn finish(bench: &Bench<'_>) -> Result<()> {
    bench.wait_until("dma", || Ok(bench.read64(BAR, REG_DMA_COMMAND)? & DMA_RUN == 0))
}

fn transfer(bench: &Bench<'_>, source: u64, target: u64, count: u64, command: u64) -> Result<()> {
    start(bench, source, target, count, command)?;
    finish(bench)
}

/// From the memory's byte 0 into the device, and back to byte `back`.
fn round_trip(bench: &Bench<'_>, iova: u64, seed: u64, count: u64, back: u64) -> Result<()> {
    let sent = Bench::pattern(seed, count as usize);
    bench.memory.write(0, &sent)?;
    bench.memory.fill(back - 1, count + 2, 0xaa)?;
    bench.set_bus_master(true)?;
    transfer(bench, iova, BUFFER, count, 0)?;
    transfer(bench, BUFFER, iova + back, count, DMA_TO_RAM)?;
    bench.set_bus_master(false)?;
    let received = bench.peek(back, count as usize)?;
    ensure!(received == sent, "{count} bytes by way of the device came back different");
    let around = (bench.peek(back - 1, 1)?, bench.peek(back + count, 1)?);
    ensure!(around == (vec![0xaa], vec![0xaa]), "the transfer wrote beyond its {count} bytes");
    Ok(())
}

fn dma_round_trip(bench: &Bench<'_>) -> Result<()> {
    bench.with_dma(IOVA, || round_trip(bench, IOVA, 1, PAGE, 3 * PAGE))
}

/// A device with fewer address bits drops the rest without an error (28 are edu's default): memory at the shortened
/// address shows which kind this is.
fn dma_high(bench: &Bench<'_>) -> Result<()> {
    let (high, low) = ((1 << 32) + IOVA, IOVA);
    if !bench.device.iova_ranges().iter().any(|range| range.iova <= high && range.last >= high + PAGES * PAGE) {
        return Err(NotHere("the IOMMU ends below".to_owned()).into());
    }
    let half = PAGES / 2;
    bench.memory.fill(half * PAGE, half * PAGE, 0x33)?;
    bench.device.dma_map(&bench.dma(high, 0, half))?;
    bench.device.dma_map(&bench.dma(low, half, 1))?;
    let result = round_trip(bench, high, 2, PAGE, 3 * PAGE);
    bench.memory.fill(0, PAGE, 0x44)?;
    bench.memory.fill(half * PAGE, PAGE, 0x44)?;
    bench.set_bus_master(true)?;
    transfer(bench, BUFFER, high, PAGE, DMA_TO_RAM)?;
    bench.set_bus_master(false)?;
    let is_written =
        |offset| Ok::<_, anyhow::Error>(bench.peek(offset, PAGE as usize)?.iter().any(|byte| *byte != 0x44));
    let dropped = !is_written(0)? && is_written(half * PAGE)?;
    bench.device.dma_unmap(high, half * PAGE)?;
    bench.device.dma_unmap(low, PAGE)?;
    if dropped {
        return Err(NotHere("this device drops high address bits (dma_mask)".to_owned()).into());
    }
    result
}

fn dma_sizes(bench: &Bench<'_>) -> Result<()> {
    bench.with_dma(IOVA, || {
        for (count, back) in [(1, 4 * PAGE - 1), (2, 4 * PAGE - 1), (PAGE - 1, 4 * PAGE + 1)] {
            round_trip(bench, IOVA, count, count, back)?;
        }
        Ok(())
    })
}

/// What the memory's first page is after the device has tried to write it: the pattern, or as before.
fn attempt(bench: &Bench<'_>, bus_master: bool, iova: u64) -> Result<bool> {
    bench.memory.fill(0, PAGE, 0x55)?;
    bench.set_bus_master(bus_master)?;
    transfer(bench, BUFFER, iova, PAGE, DMA_TO_RAM)?;
    bench.set_bus_master(false)?;
    Ok(bench.peek(0, PAGE as usize)?.iter().any(|byte| *byte != 0x55))
}

/// Fills the device's buffer with something that is not 0x55.
fn fill_buffer(bench: &Bench<'_>) -> Result<()> {
    bench.memory.fill(0, PAGE, 0x77)?;
    bench.set_bus_master(true)?;
    transfer(bench, IOVA, BUFFER, PAGE, 0)?;
    bench.set_bus_master(false)
}

/// spec: DEVDMA-4
fn dma_without_bus_master(bench: &Bench<'_>) -> Result<()> {
    bench.with_dma(IOVA, || {
        fill_buffer(bench)?;
        ensure!(!attempt(bench, false, IOVA)?, "the device wrote without being bus master");
        ensure!(attempt(bench, true, IOVA)?, "and as bus master it did not");
        Ok(())
    })
}

/// spec: DEVDMA-5
fn dma_unmapped(bench: &Bench<'_>) -> Result<()> {
    bench.with_dma(IOVA, || {
        fill_buffer(bench)?;
        ensure!(attempt(bench, true, IOVA)?, "while mapped the device writes");
        Ok(())
    })?;
    ensure!(!attempt(bench, true, IOVA)?, "after dma_unmap had returned the device wrote the memory");
    Ok(())
}

fn dma_read_only(bench: &Bench<'_>) -> Result<()> {
    bench.with_dma(IOVA, || fill_buffer(bench))?;
    let map = vfio_mediate::device::DmaMap { write: false, ..bench.dma(IOVA, 0, 1) };
    bench.device.dma_map(&map)?;
    let wrote = attempt(bench, true, IOVA);
    bench.device.dma_unmap(IOVA, PAGE)?;
    ensure!(!wrote?, "the device wrote memory that was mapped for reading only");
    Ok(())
}

fn acknowledge(bench: &Bench<'_>) -> Result<()> {
    let pending = bench.read32(BAR, REG_IRQ_STATUS)?;
    bench.write32(BAR, REG_IRQ_ACK, pending)?;
    let left = bench.read32(BAR, REG_IRQ_STATUS)?;
    ensure!(left == 0, "interrupt status {left:#x} after acknowledging {pending:#x}");
    Ok(())
}

/// spec: DEVIRQ-2
fn msi(bench: &Bench<'_>) -> Result<()> {
    let info = bench.device.irq_info(MSI)?;
    ensure!(info.count == 1, "{info:?}");
    bench.with_irqs(MSI, |[event]| {
        for value in [1, 0x10, 0x1000] {
            bench.write32(BAR, REG_IRQ_RAISE, value)?;
            bench.wait_for(event, "MSI")?;
            ensure!(bench.read32(BAR, REG_IRQ_STATUS)? == value, "interrupt status");
            acknowledge(bench)?;
        }
        bench.ensure_silent(event, "after the last acknowledgement")
    })
}

/// spec: DEVIRQ-3
fn intx(bench: &Bench<'_>) -> Result<()> {
    let info = bench.device.irq_info(INTX)?;
    ensure!(info.count == 1, "{info:?}");
    let unmask = || bench.set_irqs(INTX, 0, 1, IrqAction::Unmask, IrqData::None);
    bench.with_irqs(INTX, |[event]| {
        bench.write32(BAR, REG_IRQ_RAISE, 2)?;
        bench.wait_for(event, "INTx")?;
        ensure!(bench.asserts_intx()?, "STATUS does not show the interrupt, which a guest's driver asks");
        bench.ensure_silent(event, "masked with its first interrupt, and still asserted")?;
        unmask()?;
        bench.wait_for(event, "a level that is still asserted when unmasked")?;
        acknowledge(bench)?;
        unmask()?;
        bench.ensure_silent(event, "acknowledged and unmasked")?;
        ensure!(!bench.asserts_intx()?, "STATUS shows an interrupt that was acknowledged");
        bench.set_irqs(INTX, 0, 1, IrqAction::Mask, IrqData::None)?;
        bench.write32(BAR, REG_IRQ_RAISE, 4)?;
        bench.ensure_silent(event, "masked by us")?;
        unmask()?;
        bench.wait_for(event, "what came while masked")?;
        acknowledge(bench)?;
        Ok(unmask()?)
    })
}

fn dma_interrupt(bench: &Bench<'_>) -> Result<()> {
    bench.with_dma(IOVA, || {
        bench.with_irqs(MSI, |[event]| {
            start(bench, IOVA, BUFFER, 64, DMA_IRQ)?;
            bench.wait_for(event, "the end of the dma")?;
            finish(bench)?;
            let status = bench.read32(BAR, REG_IRQ_STATUS)?;
            ensure!(status == DMA_IRQ_STATUS, "interrupt status {status:#x}");
            acknowledge(bench)
        })
    })
}

fn software_trigger(bench: &Bench<'_>) -> Result<()> {
    bench.with_irqs(MSI, |[event]| {
        bench.set_irqs(MSI, 0, 1, IrqAction::Trigger, IrqData::Bool(&[true]))?;
        ensure!(event.read()? == 1, "TRIGGER with a true value signals");
        bench.set_irqs(MSI, 0, 1, IrqAction::Trigger, IrqData::Bool(&[false]))?;
        ensure!(event.read()? == 0, "TRIGGER with a false value does not");
        bench.set_irqs(MSI, 0, 1, IrqAction::Trigger, IrqData::None)?;
        ensure!(event.read()? == 1, "TRIGGER without data signals");
        Ok(())
    })
}

/// spec: DEVIRQ-4
fn removed_eventfd(bench: &Bench<'_>) -> Result<()> {
    bench.with_irqs(MSI, |[event]| {
        bench.set_irqs(MSI, 0, 1, IrqAction::Trigger, IrqData::EventFd(&[None]))?;
        bench.write32(BAR, REG_IRQ_RAISE, 1)?;
        bench.device.clock().wait(Duration::from_millis(20));
        bench.ensure_silent(event, "its eventfd was removed")?;
        acknowledge(bench)?;
        // Another eventfd takes over, and the old one stays silent.
        let second = EventFd::new()?;
        bench.set_events(MSI, std::slice::from_ref(&second))?;
        bench.write32(BAR, REG_IRQ_RAISE, 1)?;
        bench.wait_for(&second, "the new eventfd")?;
        ensure!(event.read()? == 0, "the old eventfd was signalled");
        acknowledge(bench)
    })
}

/// Two devices of one VM in one address space: each maps, the kernel maps once, and each leaves for itself.
///
/// spec: DEVDMA-2
pub fn shared_memory(one: &Bench<'_>, other: &dyn Device) -> Result<()> {
    // The same memory, seen by the other device.
    let other = Bench { device: other, memory: one.memory.clone() };
    let map = one.dma(IOVA, 0, PAGES);
    one.device.dma_map(&map)?;
    other.device.dma_map(&map)?;
    refused(other.device.dma_map(&map), Errno::EXIST, "the same map a second time")?;
    refused(other.device.dma_map(&one.dma(IOVA, 1, 1)), Errno::EXIST, "other memory at the same place")?;
    round_trip(one, IOVA, 10, PAGE, 3 * PAGE)?;
    round_trip(&other, IOVA, 11, PAGE, 3 * PAGE)?;
    one.device.dma_unmap(map.iova, map.length)?;
    round_trip(&other, IOVA, 12, PAGE, 3 * PAGE)?;
    other.device.dma_unmap(map.iova, map.length)?;
    ensure!(!attempt(&other, true, IOVA)?, "after both had unmapped a device wrote the memory");
    Ok(())
}
