//! Cases for two devices whose own driver migrates them, as the kernel's mtty sample does.

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use vfio_mediate::device::{Device, IovaRange, NativeMigration};
use vfio_mediate_sdk::state::DeviceState;

use super::bench::PAGE;
use super::{NotHere, Verdict};

pub const MTTY_ID: (u16, u16) = (0x4348, 0x3253);
/// The model with native migration.
pub const STATEFUL_ID: (u16, u16) = (0x1234, 0x57a7);

/// A case over a source and a destination.
type PairCase = (&'static str, fn(&dyn Device, &dyn Device) -> Result<()>);

const CASES: &[PairCase] = &[
    ("every state is reached, and state() says so", walk),
    ("stop-copy moves the device's registers", stop_copy),
    ("pre-copy, then stop-copy, moves what changed in between", pre_copy),
    ("a stream cut short is refused, and a reset recovers", short_stream),
    ("a foreign stream is refused, and a reset recovers", foreign_stream),
    ("an arc that is not there is EINVAL and changes nothing", no_arc),
    ("leaving STOP_COPY closes the stream", closed_stream),
    ("dma logging: start, report, stop", dma_logging),
    ("dma logging refuses what it must", dma_logging_refusals),
];

/// Runs the cases whose name contains `filter` and hands each verdict to `report`. Returns the number of failures.
pub fn run(
    source: &dyn Device,
    destination: &dyn Device,
    filter: &str,
    mut report: impl FnMut(&'static str, &Verdict),
) -> usize {
    let mut failures = 0;
    for (name, case) in CASES.iter().filter(|(name, _)| name.contains(filter)) {
        let verdict = Verdict::of(case(source, destination).and_then(|()| both_run(source, destination)));
        for device in [source, destination] {
            if !device.migration().is_some_and(|own| own.state().is_ok_and(|state| state == DeviceState::Running)) {
                let _ = device.reset();
            }
        }
        failures += usize::from(verdict.is_failure());
        report(name, &verdict);
    }
    failures
}

fn own(device: &dyn Device) -> Result<&dyn NativeMigration> {
    device.migration().ok_or_else(|| NotHere("the device's driver has no migration".to_owned()).into())
}

fn both_run(source: &dyn Device, destination: &dyn Device) -> Result<()> {
    for device in [source, destination] {
        let state = own(device)?.state()?;
        ensure!(state == DeviceState::Running, "{} is left in {state}", device.identity().name);
    }
    Ok(())
}

fn go(device: &dyn Device, state: DeviceState) -> Result<()> {
    let own = own(device)?;
    own.set_state(state)?;
    let actual = own.state()?;
    ensure!(actual == state, "asked for {state}, is in {actual}");
    Ok(())
}

/// Reads the saving stream to its end, or to its end for now.
fn drain(device: &dyn Device) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    // An odd size, so that records are cut.
    let mut buffer = [0; 61];
    loop {
        match own(device)?.read(&mut buffer)? {
            0 => return Ok(data),
            read => data.extend(&buffer[..read]),
        }
        ensure!(data.len() < 1 << 20, "no device of these has that much state");
    }
}

/// Two bytes of the device's state that can be written and read back: a 16550's line control and scratch registers in
/// mtty's BAR 0, device memory in the model's BAR 2.
const PROBES: [u64; 2] = [3, 7];

fn probe_region(device: &dyn Device) -> u32 {
    let identity = device.identity();
    if (identity.vendor_id, identity.device_id) == MTTY_ID { 0 } else { 2 }
}

fn write_probes(device: &dyn Device, values: [u8; 2]) -> Result<()> {
    for (offset, value) in PROBES.into_iter().zip(values) {
        device.region_write(probe_region(device), offset, &[value])?;
    }
    Ok(())
}

fn ensure_probes(device: &dyn Device, values: [u8; 2]) -> Result<()> {
    for (offset, value) in PROBES.into_iter().zip(values) {
        let mut data = [0];
        device.region_read(probe_region(device), offset, &mut data)?;
        ensure!(data == [value], "{}: byte {offset} is {:#x}, not {value:#x}", device.identity().name, data[0]);
    }
    Ok(())
}

/// spec: NATIVE-1
fn walk(source: &dyn Device, _: &dyn Device) -> Result<()> {
    use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    let flags = own(source)?.flags();
    let tour =
        [PreCopy, PreCopyP2p, PreCopy, Running, RunningP2p, Stop, StopCopy, Stop, Resuming, Stop, RunningP2p, Running];
    // RESUMING without data is left by a path that validates: only by reset where the driver wants data.
    for state in tour.into_iter().filter(|state| flags.supports(*state) && *state != Resuming) {
        go(source, state).with_context(|| format!("to {state}"))?;
    }
    // Several arcs in one call: the driver walks.
    for state in [StopCopy, Running, Stop, Running] {
        go(source, state).with_context(|| format!("in one call to {state}"))?;
    }
    Ok(())
}

fn load(destination: &dyn Device, stream: &[u8]) -> Result<()> {
    go(destination, DeviceState::Resuming)?;
    for piece in stream.chunks(13) {
        own(destination)?.write(piece)?;
    }
    go(destination, DeviceState::Stop)?;
    go(destination, DeviceState::Running)
}

/// spec: NATIVE-2
fn stop_copy(source: &dyn Device, destination: &dyn Device) -> Result<()> {
    write_probes(source, [0x1b, 0x42])?;
    write_probes(destination, [0, 0])?;
    let estimate = own(source)?.stop_copy_bytes()?;
    go(source, DeviceState::StopCopy)?;
    let stream = drain(source)?;
    ensure!(stream.len() as u64 <= estimate, "{} bytes where {estimate} were estimated", stream.len());
    go(source, DeviceState::Running)?;
    load(destination, &stream)?;
    ensure_probes(destination, [0x1b, 0x42])
}

/// spec: NATIVE-2
fn pre_copy(source: &dyn Device, destination: &dyn Device) -> Result<()> {
    if !own(source)?.flags().pre_copy {
        return Err(NotHere("no pre-copy".to_owned()).into());
    }
    write_probes(source, [0x03, 0x11])?;
    write_probes(destination, [0, 0])?;
    match own(source)?.precopy_info() {
        Err(error) if error.errno == Errno::INVAL => {}
        other => bail!("PRECOPY_INFO outside PRE_COPY: {other:?}"),
    }
    go(source, DeviceState::PreCopy)?;
    let before = own(source)?.precopy_info()?;
    ensure!(before.initial_bytes > 0, "{before:?}");
    let mut stream = drain(source)?;
    ensure!(stream.len() as u64 >= before.initial_bytes, "{} bytes where {before:?}", stream.len());
    let after = own(source)?.precopy_info()?;
    ensure!(after.initial_bytes == 0, "{after:?} after all was read");
    // The device still runs.
    write_probes(source, [0x0b, 0x99])?;
    if own(source)?.flags().p2p {
        go(source, DeviceState::PreCopyP2p)?;
        own(source)?.precopy_info()?;
    }
    go(source, DeviceState::StopCopy)?;
    match own(source)?.precopy_info() {
        Err(error) if error.errno == Errno::INVAL => {}
        other => bail!("PRECOPY_INFO in STOP_COPY: {other:?}"),
    }
    stream.extend(drain(source)?);
    go(source, DeviceState::Running)?;
    load(destination, &stream)?;
    ensure_probes(destination, [0x0b, 0x99])
}

/// RESUMING with `stream` fails, at a write or at its end, and a reset brings the device back. After a refused write the
/// driver may well take the arc to STOP: whoever migrates ends at the first error.
fn refused_stream(destination: &dyn Device, stream: &[u8]) -> Result<()> {
    go(destination, DeviceState::Resuming)?;
    if own(destination)?.write(stream).is_ok() {
        ensure!(own(destination)?.set_state(DeviceState::Stop).is_err(), "accepted");
        let state = own(destination)?.state()?;
        ensure!(matches!(state, DeviceState::Resuming | DeviceState::Error), "refused, and in {state}");
    }
    destination.reset()?;
    let state = own(destination)?.state()?;
    ensure!(state == DeviceState::Running, "in {state} after a reset");
    Ok(())
}

fn saved(source: &dyn Device) -> Result<Vec<u8>> {
    go(source, DeviceState::StopCopy)?;
    let stream = drain(source);
    go(source, DeviceState::Running)?;
    stream
}

/// spec: NATIVE-3
fn short_stream(source: &dyn Device, destination: &dyn Device) -> Result<()> {
    let stream = saved(source)?;
    for cut in [1, stream.len() / 2, stream.len()] {
        let kept = &stream[..stream.len() - cut];
        refused_stream(destination, kept).with_context(|| format!("{} of {} bytes", kept.len(), stream.len()))?;
    }
    Ok(())
}

/// spec: NATIVE-3
fn foreign_stream(source: &dyn Device, destination: &dyn Device) -> Result<()> {
    let mut stream = saved(source)?;
    stream[0] ^= 0xff;
    refused_stream(destination, &stream)
}

fn no_arc(source: &dyn Device, _: &dyn Device) -> Result<()> {
    go(source, DeviceState::StopCopy)?;
    for (target, why) in [(DeviceState::PreCopy, "STOP_COPY to PRE_COPY"), (DeviceState::Error, "into ERROR")] {
        match own(source)?.set_state(target) {
            Err(error) if error.errno == Errno::INVAL => {}
            other => bail!("{why}: {other:?}"),
        }
        let state = own(source)?.state()?;
        ensure!(state == DeviceState::StopCopy, "{why} changed the state to {state}");
    }
    ensure!(!drain(source)?.is_empty(), "the stream was lost with the refused arc");
    go(source, DeviceState::Running)
}

/// spec: NATIVE-4
fn closed_stream(source: &dyn Device, _: &dyn Device) -> Result<()> {
    saved(source)?;
    match own(source)?.read(&mut [0; 16]) {
        Err(error) if error.errno == Errno::INVAL => Ok(()),
        other => bail!("reading the stream while RUNNING: {other:?}"),
    }
}

fn dma_logging(source: &dyn Device, _: &dyn Device) -> Result<()> {
    let Some(log) = source.dma_logging() else { return Err(NotHere("the driver does not log DMA".to_owned()).into()) };
    let range = IovaRange { iova: 0x10_0000, last: 0x10_0000 + 130 * PAGE - 1 };
    let granted = log.start(&[range], PAGE)?;
    ensure!(granted.is_power_of_two(), "granted a page size of {granted}");
    // Bits that are set stay set, whatever the device has to say.
    let mut bitmap = [u64::MAX, 0, 2];
    log.report(range, PAGE, &mut bitmap)?;
    ensure!(bitmap[0] == u64::MAX && bitmap[2] & 2 == 2, "the report cleared bits: {bitmap:x?}");
    log.stop()?;
    Ok(())
}

fn dma_logging_refusals(source: &dyn Device, _: &dyn Device) -> Result<()> {
    let Some(log) = source.dma_logging() else { return Err(NotHere("the driver does not log DMA".to_owned()).into()) };
    let page = |n: u64| IovaRange { iova: n * PAGE, last: n * PAGE + PAGE - 1 };
    ensure!(log.start(&[], PAGE).is_err(), "no ranges at all were accepted");
    ensure!(log.start(&[page(1), page(1)], PAGE).is_err(), "overlapping ranges were accepted");
    ensure!(log.start(&[IovaRange { iova: 1, last: PAGE }], PAGE).is_err(), "a misaligned range was accepted");
    let many: Vec<_> = (0..257).map(page).collect();
    match log.start(&many, PAGE) {
        Err(error) if error.errno == Errno::TOOBIG => {}
        other => bail!("257 ranges: {other:?}"),
    }
    log.start(&many[..256], PAGE).context("256 ranges")?;
    let whole = IovaRange { iova: 0, last: 256 * PAGE - 1 };
    ensure!(log.report(whole, PAGE, &mut [0; 3]).is_err(), "a bitmap one word too short was accepted");
    ensure!(log.report(whole, PAGE - 1, &mut [0; 8]).is_err(), "a page size of 4095 was accepted");
    ensure!(log.report(whole, 0, &mut [0; 8]).is_err(), "a page size of 0 was accepted");
    log.stop()?;
    Ok(())
}
