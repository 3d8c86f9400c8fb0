//! Mappings of a mediated device: revoked while its memory is disabled or it is reset, and back afterwards.
//!
//! **Owns** its cases, which need the device for themselves: they mediate it. Memory goes off and on as a guest does it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use rustix::io::Errno;
use vfio_mediate::device::{Area, CONFIG_REGION, Device, RegionCapability, RegionInfo};
use vfio_mediate::mediation::{Faults, MapOptions, MediatedDevice, RegionMap};
use vfio_mediate::memory::{AddressSpace, GuestRam};

use super::bench::PAGE;
use super::{Line, NotHere, Verdict};

const COMMAND: u64 = 4;
const COMMAND_MEMORY: u8 = 1 << 1;
const MMAP: u32 = 4;

type Run = fn(&MediatedDevice, u32, Area) -> Result<()>;

const CASES: [(&str, Run); 3] = [
    ("a mapping is revoked while memory is disabled", memory_disabled),
    ("a mapping is back after a reset", reset),
    ("who touches a revoked mapping waits until it is back", blocking),
];

/// Runs the cases, as [`super::run`]. The device is mediated by nobody, and closed afterwards.
pub fn run(device: &Arc<dyn Device>, filter: &str, mut report: impl FnMut(&Line<'_>)) -> Result<usize> {
    let memory = AddressSpace::new(GuestRam::new(PAGE)?);
    let mediated = MediatedDevice::with_mediator(Arc::clone(device), memory, Default::default(), |_| Ok(None))?;
    let identity = device.identity();
    let mut failures = 0;
    for (case, run) in CASES.iter().filter(|(case, _)| case.contains(filter)) {
        let result = match mappable(&mediated) {
            Some((region, area)) => run(&mediated, region, area),
            None => Err(NotHere("nothing of it can be mapped".to_owned()).into()),
        };
        let verdict = Verdict::of(result);
        failures += usize::from(verdict.is_failure());
        report(&Line { identity, case, verdict: &verdict });
    }
    Ok(failures)
}

/// The first page that may be mapped.
fn mappable(device: &MediatedDevice) -> Option<(u32, Area)> {
    let first = |info: RegionInfo| {
        let sparse = info.capabilities.iter().find_map(|capability| match capability {
            RegionCapability::SparseMmap(areas) => Some(areas.first().copied()),
            _ => None,
        });
        let area = sparse.unwrap_or(Some(Area { offset: 0, length: info.size }))?;
        (info.flags & MMAP != 0 && area.length >= PAGE).then_some((info.index, Area { length: PAGE, ..area }))
    };
    (0..CONFIG_REGION).filter_map(|index| device.region_info(index).ok()).find_map(first)
}

fn set_memory(device: &MediatedDevice, on: bool) -> Result<()> {
    let mut command = [0; 2];
    device.region_read(CONFIG_REGION, COMMAND, &mut command)?;
    command[0] = if on { command[0] | COMMAND_MEMORY } else { command[0] & !COMMAND_MEMORY };
    Ok(device.region_write(CONFIG_REGION, COMMAND, &command)?)
}

/// What the mapping shows is what a read gives.
fn agrees(device: &MediatedDevice, region: u32, area: Area, map: &RegionMap) -> Result<u32> {
    let mut data = [0; 4];
    device.region_read(region, area.offset, &mut data)?;
    let (mapped, read) = (map.load_u32(device, 0)?, u32::from_le_bytes(data));
    ensure!(mapped == read, "{mapped:#x} through the mapping, {read:#x} by a read");
    Ok(read)
}

fn is_eio<T>(result: std::result::Result<T, vfio_mediate::mediation::MediationError>) -> bool {
    result.is_err_and(|error| error.errno() == Errno::IO)
}

/// Off for a VF: its memory bit is not on the bus.
fn gated(device: &MediatedDevice) -> Result<()> {
    match device.identity().virtual_function {
        true => Err(NotHere("a VF's memory bit is not on the bus".to_owned()).into()),
        false => Ok(()),
    }
}

fn memory_disabled(device: &MediatedDevice, region: u32, area: Area) -> Result<()> {
    let map = device.region_map(region, area.offset, area.length)?;
    let before = agrees(device, region, area, &map)?;
    set_memory(device, false)?;
    let vf = device.identity().virtual_function;
    let (live, refused) = (map.is_live(), is_eio(map.load_u32(device, 0)));
    set_memory(device, true)?;
    ensure!(live == vf && refused != vf, "while disabled: live {live}, refused {refused}; a VF: {vf}");
    ensure!(agrees(device, region, area, &map)? == before, "the device came back as another");
    Ok(())
}

fn reset(device: &MediatedDevice, region: u32, area: Area) -> Result<()> {
    let map = device.region_map(region, area.offset, area.length)?;
    match device.reset() {
        Err(error) if error.errno() == Errno::NOTTY => {}
        done => done?,
    }
    // A reset may leave memory disabled.
    set_memory(device, true)?;
    agrees(device, region, area, &map)?;
    Ok(())
}

fn blocking(device: &MediatedDevice, region: u32, area: Area) -> Result<()> {
    gated(device)?;
    let options = MapOptions { faults: Faults::Block(Duration::from_secs(20)), ..MapOptions::default() };
    let map = match device.region_map_with(region, area.offset, area.length, options) {
        Err(error) if matches!(error.errno(), Errno::PERM | Errno::NOSYS) => {
            return Err(NotHere("this machine gives no userfaultfd".to_owned()).into());
        }
        map => map?,
    };
    let before = agrees(device, region, area, &map)?;
    set_memory(device, false)?;
    let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let read = std::thread::scope(|scope| -> Result<u32> {
        let reader = scope.spawn(|| {
            begun.store(true, Ordering::SeqCst);
            let read = map.touch_u32(0);
            done.store(true, Ordering::SeqCst);
            read
        });
        while !begun.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        let early = done.load(Ordering::SeqCst);
        set_memory(device, true)?;
        let read = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
        ensure!(!early, "a touch did not wait while memory was disabled");
        Ok(read)
    })?;
    ensure!(read == before, "{read:#x} after the wait, {before:#x} before");
    Ok(())
}
