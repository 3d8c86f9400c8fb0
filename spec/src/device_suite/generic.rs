//! Cases for any PCI device.

use anyhow::{Result, ensure};
use rustix::io::Errno;
use vfio_mediate::device::{CONFIG_REGION, Feature, FeatureAccess, IrqAction, IrqData, RegionCapability};
use vfio_mediate::sys::EventFd;

use super::bench::{BUS_MASTER, PAGE, PAGES, refused};
use super::{Bench, Case, NotHere};

pub const CASES: &[Case] = &[
    Case { name: "regions answer as GET_INFO counts them", run: regions },
    Case { name: "irqs answer as GET_INFO counts them", run: irqs },
    Case { name: "configuration space is the identity's, by every width", run: config },
    Case { name: "read-only configuration bytes stay", run: read_only_config },
    Case { name: "accesses outside a region are EINVAL, at the boundary", run: outside },
    Case { name: "bus master is kept", run: bus_master },
    Case { name: "features are there or not, consistently", run: features },
    Case { name: "reset, or a clear ENOTTY", run: reset },
    Case { name: "wrong SET_IRQS are refused", run: wrong_irqs },
    Case { name: "dma maps: first and last page, overlap, cut, again", run: dma_maps },
    Case { name: "dma maps that cannot be are refused", run: dma_refusals },
];

/// `VFIO_REGION_INFO_FLAG_*`.
const READ: u32 = 1;
const WRITE: u32 = 2;
const MMAP: u32 = 4;
/// `VFIO_DEVICE_FLAGS_RESET`, `VFIO_DEVICE_FLAGS_PCI`.
const HAS_RESET: u32 = 1;
const IS_PCI: u32 = 2;

/// spec: DEV-1
fn regions(bench: &Bench<'_>) -> Result<()> {
    let info = bench.device.info();
    ensure!(info.flags & IS_PCI != 0 && info.num_regions > CONFIG_REGION, "{info:?}");
    for index in 0..info.num_regions {
        let region = match bench.device.region_info(index) {
            Ok(region) => region,
            // An index without a region, as VGA of most devices.
            Err(error) if error.errno == Errno::INVAL && index != CONFIG_REGION => continue,
            Err(error) => return Err(error.into()),
        };
        ensure!(region.index == index, "{region:?}");
        let mappable = region.flags & MMAP != 0;
        ensure!(!mappable || region.flags & READ != 0, "mappable but not readable: {region:?}");
        for capability in &region.capabilities {
            let RegionCapability::SparseMmap(areas) = capability else { continue };
            ensure!(mappable, "sparse mmap of a region that cannot be mapped: {region:?}");
            for area in areas {
                let aligned = area.offset.is_multiple_of(PAGE) && area.length.is_multiple_of(PAGE);
                ensure!(aligned && area.offset + area.length <= region.size, "{area:?} of {region:?}");
            }
        }
    }
    let config = bench.device.region_info(CONFIG_REGION)?;
    ensure!(config.flags & (READ | WRITE) == READ | WRITE && config.size >= 64, "{config:?}");
    for index in [info.num_regions, u32::MAX] {
        refused(bench.device.region_info(index), Errno::INVAL, "the region after the last")?;
    }
    Ok(())
}

/// spec: DEV-1
fn irqs(bench: &Bench<'_>) -> Result<()> {
    let info = bench.device.info();
    let mut vectors = 0;
    for index in 0..info.num_irqs {
        match bench.device.irq_info(index) {
            Ok(irq) => {
                ensure!(irq.index == index, "{irq:?}");
                vectors += irq.count;
            }
            Err(error) => ensure!(error.errno == Errno::INVAL, "{error}"),
        }
    }
    ensure!(vectors > 0, "no interrupt at all");
    refused(bench.device.irq_info(info.num_irqs), Errno::INVAL, "the irq after the last")
}

/// spec: DEV-2
fn config(bench: &Bench<'_>) -> Result<()> {
    let identity = bench.device.identity();
    let mut whole = vec![0; identity.config.len()];
    bench.device.region_read(CONFIG_REGION, 0, &mut whole)?;
    let word = |at: usize| u16::from_le_bytes([whole[at], whole[at + 1]]);
    ensure!((word(0), word(2)) == (identity.vendor_id, identity.device_id), "ids {:x?}", &whole[..4]);
    ensure!(
        (word(0x2c), word(0x2e)) == (identity.subsystem_vendor_id, identity.subsystem_device_id),
        "subsystem ids {:x?}",
        &whole[0x2c..0x30]
    );
    ensure!(whole[8] == identity.revision && whole[9..12] == identity.class_code.to_le_bytes()[..3], "class, revision");
    for width in [1, 2, 4] {
        let mut pieces = vec![0; 64];
        for (i, piece) in pieces.chunks_mut(width).enumerate() {
            bench.device.region_read(CONFIG_REGION, (i * width) as u64, piece)?;
        }
        ensure!(pieces == whole[..64], "{width} bytes at a time differ: {pieces:x?} and {:x?}", &whole[..64]);
    }
    Ok(())
}

fn read_only_config(bench: &Bench<'_>) -> Result<()> {
    let before = bench.read32(CONFIG_REGION, 0)?;
    bench.write32(CONFIG_REGION, 0, !before)?;
    let after = bench.read32(CONFIG_REGION, 0)?;
    ensure!(before == after, "the ids were {before:#x} and became {after:#x}");
    Ok(())
}

/// spec: DEV-3
fn outside(bench: &Bench<'_>) -> Result<()> {
    let mut data = [0; 4];
    for index in [0, CONFIG_REGION] {
        let size = bench.device.region_info(index)?.size;
        ensure!(size >= 8, "region {index} has {size} bytes");
        bench.device.region_read(index, (size - 4) & !3, &mut data[..1])?;
        for offset in [size - 3, size - 1, size, size + 4, u64::MAX - 3, u64::MAX] {
            let what = format!("region {index} at {offset:#x} of {size:#x}");
            refused(bench.device.region_read(index, offset, &mut data), Errno::INVAL, &format!("reading {what}"))?;
            refused(bench.device.region_write(index, offset, &data), Errno::INVAL, &format!("writing {what}"))?;
        }
    }
    let beyond = bench.device.info().num_regions;
    refused(bench.device.region_read(beyond, 0, &mut data), Errno::INVAL, "reading the region after the last")?;
    refused(bench.device.region_write(u32::MAX, 0, &data), Errno::INVAL, "writing no region")
}

fn bus_master(bench: &Bench<'_>) -> Result<()> {
    bench.write_command(bench.command()? | BUS_MASTER)?;
    if !bench.is_bus_master()? {
        return Err(NotHere("COMMAND has no bus master bit".to_owned()).into());
    }
    bench.set_bus_master(false)
}

/// spec: DEV-4
fn features(bench: &Bench<'_>) -> Result<()> {
    let probe = |feature, access| bench.device.probe_feature(feature, access);
    let migrates = probe(Feature::Migration, FeatureAccess::Get) && probe(Feature::MigDeviceState, FeatureAccess::Set);
    ensure!(bench.device.migration().is_some() == migrates, "migration() and the MIGRATION feature disagree");
    let logs =
        probe(Feature::DmaLoggingStart, FeatureAccess::Set) && probe(Feature::DmaLoggingReport, FeatureAccess::Get);
    ensure!(bench.device.dma_logging().is_some() == logs, "dma_logging() and the DMA_LOGGING features disagree");
    ensure!(!probe(Feature::Migration, FeatureAccess::Set), "the MIGRATION feature cannot be set");
    ensure!(!probe(Feature::DmaLoggingStop, FeatureAccess::Get), "DMA_LOGGING_STOP cannot be got");
    Ok(())
}

/// spec: DEV-5
fn reset(bench: &Bench<'_>) -> Result<()> {
    match bench.device.reset() {
        Ok(()) => config(bench),
        // mdev drivers reset without saying that they can; what says that it can does.
        Err(error) if bench.device.info().flags & HAS_RESET == 0 => {
            refused::<()>(Err(error), Errno::NOTTY, "reset of a device that has none")
        }
        Err(error) => Err(error.into()),
    }
}

/// spec: DEVIRQ-1
fn wrong_irqs(bench: &Bench<'_>) -> Result<()> {
    let device = bench.device;
    let (none, trigger) = (IrqData::None, IrqAction::Trigger);
    for index in 0..device.info().num_irqs {
        let info = match device.irq_info(index) {
            Ok(info) => info,
            Err(error) if error.errno == Errno::INVAL => continue,
            Err(error) => return Err(error.into()),
        };
        let what = |how: &str| format!("irq {index} of {} vectors: {how}", info.count);
        let event = EventFd::new()?;
        let one = [Some(std::os::fd::AsFd::as_fd(&event))];
        let beyond = bench.set_irqs(index, info.count, 1, trigger, IrqData::EventFd(&one));
        refused(beyond, Errno::INVAL, &what("the vector after the last"))?;
        refused(bench.set_irqs(index, u32::MAX, 1, trigger, none), Errno::INVAL, &what("start overflows"))?;
        refused(bench.set_irqs(index, 0, 1, trigger, IrqData::EventFd(&[])), Errno::INVAL, &what("no data"))?;
        refused(bench.set_irqs(index, 0, 1, trigger, IrqData::Bool(&[true; 2])), Errno::INVAL, &what("too much data"))?;
    }
    refused(bench.set_irqs(device.info().num_irqs, 0, 1, trigger, none), Errno::INVAL, "the irq after the last")
}

/// spec: DEVDMA-1, DEVDMA-3
fn dma_maps(bench: &Bench<'_>) -> Result<()> {
    let device = bench.device;
    let ranges = device.iova_ranges();
    ensure!(!ranges.is_empty(), "no IOVA may be mapped");
    ensure!(ranges.windows(2).all(|pair| pair[0].last < pair[1].iova), "not ascending and disjoint: {ranges:x?}");
    for range in &ranges {
        ensure!(range.iova <= range.last, "{range:x?}");
        let (first, last) = (range.iova.next_multiple_of(PAGE), (range.last - (PAGE - 1)) & !(PAGE - 1));
        for iova in [first, last] {
            device.dma_map(&bench.dma(iova, 0, 1))?;
            device.dma_unmap(iova, PAGE)?;
        }
    }
    let iova = 0x10_0000;
    device.dma_map(&bench.dma(iova, 0, 4))?;
    for (at, pages) in [(0, 4), (3, 1), (1, 2), (0, 5)] {
        refused(
            device.dma_map(&bench.dma(iova + at * PAGE, 4, pages)),
            Errno::EXIST,
            &format!("{pages} pages over page {at}"),
        )?;
    }
    device.dma_map(&bench.dma(iova - PAGE, 8, 1))?;
    device.dma_map(&bench.dma(iova + 4 * PAGE, 9, 1))?;
    for (at, pages) in [(0, 1), (1, 3), (1, 2), (3, 1), (3, 2)] {
        let what = format!("unmapping {pages} pages of a map from page {at}");
        refused(device.dma_unmap(iova + at * PAGE, pages * PAGE), Errno::INVAL, &what)?;
    }
    // All three, with a page of nothing on either side.
    device.dma_unmap(iova - 2 * PAGE, 8 * PAGE)?;
    device.dma_map(&bench.dma(iova - PAGE, 0, 6))?;
    device.dma_unmap(iova - PAGE, 6 * PAGE)?;
    Ok(())
}

fn dma_refusals(bench: &Bench<'_>) -> Result<()> {
    let device = bench.device;
    let good = bench.dma(0x10_0000, 0, 1);
    let mut wrong = vec![
        ("no length", vfio_mediate::device::DmaMap { length: 0, ..good.clone() }),
        ("an unaligned IOVA", vfio_mediate::device::DmaMap { iova: 0x10_0001, ..good.clone() }),
        ("an unaligned length", vfio_mediate::device::DmaMap { length: PAGE - 1, ..good.clone() }),
        ("an end that overflows", vfio_mediate::device::DmaMap { iova: u64::MAX - PAGE + 2, ..good.clone() }),
        ("more than the memory", vfio_mediate::device::DmaMap { length: (PAGES + 1) * PAGE, ..good.clone() }),
        ("neither read nor write", vfio_mediate::device::DmaMap { read: false, write: false, ..good.clone() }),
    ];
    // The page after a range's end, where that is not the end of everything.
    let holes = device.iova_ranges().into_iter().filter(|range| range.last < u64::MAX - PAGE);
    wrong.extend(holes.map(|range| ("a hole in the IOVA ranges", bench.dma(range.last + 1, 0, 1))));
    for (what, map) in wrong {
        refused(device.dma_map(&map), Errno::INVAL, &format!("mapping {what} ({:#x})", map.iova))?;
    }
    refused(device.dma_unmap(0x10_0000, 0), Errno::INVAL, "unmapping no length")?;
    refused(device.dma_unmap(PAGE, u64::MAX), Errno::INVAL, "unmapping beyond the end")?;
    device.dma_map(&good)?;
    device.dma_unmap(good.iova, good.length)?;
    Ok(())
}
