//! Low power, of every device that has it.

use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Result, ensure};
use rustix::io::Errno;
use vfio_mediate::device::{Backend, CONFIG_REGION, Device, Feature, FeatureAccess, PowerState};
use vfio_mediate::mediation::{Limits, MediatedDevice};
use vfio_mediate::memory::{AddressSpace, GuestRam};
use vfio_mediate::sys::EventFd;

use super::bench::{PAGE, refused};
use super::{Bench, Case, NotHere};

pub const CASES: &[Case] = &[
    Case { name: "low power: entered once, suspended, left, entered again", run: entry_and_exit },
    Case { name: "low power: the wake-up is signalled once", run: wakeup },
    Case { name: "low power: D3hot, and back to D0", run: d3hot },
];

/// Of PCI configuration space.
const STATUS: usize = 0x06;
const HAS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES: usize = 0x34;
const POWER_CAPABILITY: u8 = 1;

fn needs_low_power(bench: &Bench<'_>) -> Result<()> {
    match bench.device.probe_feature(Feature::LowPowerEntry, FeatureAccess::Set) {
        true => Ok(()),
        false => Err(NotHere("it has no low power".to_owned()).into()),
    }
}

/// Awake, and answering.
fn is_awake(bench: &Bench<'_>) -> Result<()> {
    let power = bench.device.power()?;
    ensure!(!power.suspended && power.state == PowerState::D0, "{power:?}");
    let mut id = [0; 4];
    bench.device.region_read(CONFIG_REGION, 0, &mut id)?;
    ensure!(id[..] == bench.device.identity().config[..4], "its configuration space reads as {id:x?}");
    Ok(())
}

fn wait_suspended(bench: &Bench<'_>) -> Result<()> {
    bench.wait_until("it is suspended", || Ok(bench.device.power()?.suspended))
}

/// spec: POWER-1
fn entry_and_exit(bench: &Bench<'_>) -> Result<()> {
    needs_low_power(bench)?;
    let unused = EventFd::new()?;
    for _ in 0..2 {
        bench.device.low_power_exit()?;
        is_awake(bench)?;
        bench.device.low_power_entry(None)?;
        wait_suspended(bench)?;
        refused(bench.device.low_power_entry(None), Errno::INVAL, "a second entry")?;
        refused(bench.device.low_power_entry(Some(unused.as_fd())), Errno::INVAL, "a second entry with a wake-up")?;
        wait_suspended(bench)?;
        bench.device.low_power_exit()?;
        is_awake(bench)?;
    }
    bench.device.low_power_exit()?;
    ensure!(unused.read()? == 0, "a refused entry signalled");
    Ok(())
}

/// spec: POWER-2
fn wakeup(bench: &Bench<'_>) -> Result<()> {
    needs_low_power(bench)?;
    let wakeup = EventFd::new()?;
    for _ in 0..2 {
        bench.device.low_power_entry(Some(wakeup.as_fd()))?;
        wait_suspended(bench)?;
        ensure!(wakeup.read()? == 0, "signalled while it sleeps");
        bench.device.low_power_exit()?;
        ensure!(wakeup.read()? == 1, "not signalled, or more than once");
        bench.device.low_power_exit()?;
        is_awake(bench)?;
        ensure!(wakeup.read()? == 0, "signalled again");
    }
    Ok(())
}

/// Where the function has a power capability; others are suspended in D0.
///
/// spec: POWER-1
fn d3hot(bench: &Bench<'_>) -> Result<()> {
    needs_low_power(bench)?;
    let identity = bench.device.identity();
    if identity.backend != Backend::Sim && !has_power_capability(&identity.config) {
        return Err(NotHere("it has no power capability: it is suspended in D0".to_owned()).into());
    }
    bench.device.low_power_entry(None)?;
    wait_suspended(bench)?;
    let power = bench.device.power()?;
    ensure!(matches!(power.state, PowerState::D3Hot | PowerState::D3Cold), "suspended in {}", power.state);
    bench.device.low_power_exit()?;
    is_awake(bench)
}

/// The name of [`mediated`], as a case's.
pub const MEDIATED: &str = "low power through mediation: a request wakes it with a wake-up, and is EIO without";

/// What mediation makes of the device's low power. The device is had alone, and left awake.
pub fn mediated(device: Arc<dyn Device>) -> Result<()> {
    let bench = Bench::new(&*device)?;
    needs_low_power(&bench)?;
    let memory = AddressSpace::new(GuestRam::new(PAGE)?);
    let mediated = MediatedDevice::with_mediator(device.clone(), memory, Limits::default(), |_| Ok(None))?;
    let wakeup = EventFd::new()?;
    let mut id = [0; 4];
    for _ in 0..2 {
        mediated.low_power_entry(Some(wakeup.as_fd()))?;
        wait_suspended(&bench)?;
        ensure!(wakeup.read()? == 0, "signalled while it sleeps");
        mediated.region_read(CONFIG_REGION, 0, &mut id)?;
        mediated.region_read(CONFIG_REGION, 0, &mut id)?;
        ensure!(id[..] == device.identity().config[..4], "its configuration space reads as {id:x?}");
        ensure!(wakeup.read()? == 1 && mediated.entered().is_none(), "two requests are one wake-up");
        is_awake(&bench)?;
        mediated.low_power_entry(None)?;
        wait_suspended(&bench)?;
        let refused = mediated.region_read(CONFIG_REGION, 0, &mut id);
        ensure!(refused.as_ref().is_err_and(|error| error.errno() == Errno::IO), "without a wake-up: {refused:?}");
        ensure!(device.power()?.suspended, "a refused request woke it");
        mediated.low_power_exit()?;
        is_awake(&bench)?;
    }
    Ok(())
}

fn has_power_capability(config: &[u8]) -> bool {
    let byte = |at: usize| config.get(at).copied().unwrap_or(0);
    let mut at = if byte(STATUS) & HAS_CAPABILITIES != 0 { usize::from(byte(CAPABILITIES) & !3) } else { 0 };
    // 48 capabilities fill the space; a chain that loops ends there.
    for _ in 0..48 {
        match (at, byte(at)) {
            (0, _) => return false,
            (_, POWER_CAPABILITY) => return true,
            _ => at = usize::from(byte(at + 1) & !3),
        }
    }
    false
}
