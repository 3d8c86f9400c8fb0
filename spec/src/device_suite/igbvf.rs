//! Cases for a VF of an igb (82576).

use anyhow::{Result, ensure};

use super::bench::{MSIX, PAGE};
use super::{Bench, Case};

pub const ID: (u16, u16) = (0x8086, 0x10ca);

pub const CASES: &[Case] = &[
    Case { name: "STATUS says that it is a VF (bit 18)", run: status },
    Case { name: "mailbox memory keeps what is written", run: mailbox },
    Case { name: "registers through a mapping", run: mapped },
    Case { name: "MSI-X: three vectors, each its own eventfd", run: msix },
    Case { name: "a function-level reset disables the queues", run: after_reset },
];

const BAR: u32 = 0;
const MSIX_BAR: u32 = 3;
const STATUS: u64 = 0x8;
const STATUS_IS_VF: u32 = 1 << 18;
const MAILBOX_MEMORY: u64 = 0x800;
/// Transmit queue 0.
const TXDCTL: u64 = 0x3828;
const QUEUE_ENABLE: u32 = 1 << 25;
const EICS: u64 = 0x1520;
const EIMS: u64 = 0x1524;
const EIMC: u64 = 0x1528;
const EIAC: u64 = 0x152c;
const EICR: u64 = 0x1580;

fn status(bench: &Bench<'_>) -> Result<()> {
    let status = bench.read32(BAR, STATUS)?;
    ensure!(
        status & STATUS_IS_VF != 0,
        "STATUS is {status:#x}: this emulator does not show a VF's registers (QEMU 9.2.50 to 10.1.50)"
    );
    Ok(())
}

fn mailbox(bench: &Bench<'_>) -> Result<()> {
    for i in 0..16 {
        bench.write32(BAR, MAILBOX_MEMORY + 4 * i, 0xa5a5_0000 + i as u32)?;
    }
    for i in 0..16 {
        let value = bench.read32(BAR, MAILBOX_MEMORY + 4 * i)?;
        ensure!(value == 0xa5a5_0000 + i as u32, "word {i} is {value:#x}");
    }
    Ok(())
}

fn mapped(bench: &Bench<'_>) -> Result<()> {
    let size = bench.device.region_info(BAR)?.size;
    ensure!(size == 4 * PAGE, "BAR 0 has {size:#x} bytes");
    let mapping = bench.device.region_map(BAR, 0, size)?;
    let order = std::sync::atomic::Ordering::SeqCst;
    ensure!(mapping.load_u32(STATUS, order)? == bench.read32(BAR, STATUS)?, "STATUS through the mapping");
    mapping.store_u32(MAILBOX_MEMORY, 0x600d_cafe, order)?;
    ensure!(bench.read32(BAR, MAILBOX_MEMORY)? == 0x600d_cafe, "stored through the mapping, read by pread");
    Ok(())
}

/// spec: DEVIRQ-2
fn msix(bench: &Bench<'_>) -> Result<()> {
    let info = bench.device.irq_info(MSIX)?;
    ensure!(info.count == 3, "{info:?}");
    let table = bench.device.region_info(MSIX_BAR)?;
    ensure!(table.size == 4 * PAGE, "the MSI-X region: {table:?}");
    let result = bench.with_irqs::<3>(MSIX, |events| {
        // Cleared by the interrupt itself, or a second one never comes.
        bench.write32(BAR, EIAC, 7)?;
        bench.write32(BAR, EIMS, 7)?;
        for (i, event) in events.iter().enumerate() {
            for turn in 1..=2 {
                bench.write32(BAR, EICS, 1 << i)?;
                bench.wait_for(event, &format!("vector {i}, turn {turn}"))?;
            }
            for other in events {
                ensure!(other.read()? == 0, "cause {i} signalled another vector");
            }
        }
        Ok(())
    });
    bench.write32(BAR, EIMC, 7)?;
    bench.write32(BAR, EICR, 7)?;
    result
}

fn after_reset(bench: &Bench<'_>) -> Result<()> {
    let enabled = || Ok::<_, anyhow::Error>(bench.read32(BAR, TXDCTL)? & QUEUE_ENABLE != 0);
    bench.write32(BAR, TXDCTL, QUEUE_ENABLE)?;
    ensure!(enabled()?, "the queue's enable bit is kept");
    bench.device.reset()?;
    ensure!(!enabled()?, "the queue is still enabled after a reset");
    status(bench)
}
