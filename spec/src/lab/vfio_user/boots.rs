//! Stock QEMU boots Linux with a served edu, and a guest uses it.

use anyhow::{Context, Result, anyhow, ensure};

use super::served::Served;
use crate::lab::cases::{Case, Programs, Settings, Work};
use crate::lab::{Lab, Machine, boot};

/// Below what edu reaches by default.
pub(super) const MEMORY_MIB: u32 = 240;
/// Promises of `guest-edu`.
const GUEST: usize = 9;

pub(in crate::lab) fn edu() -> Case {
    Case {
        name: "vfio-user-edu",
        about: "stock QEMU on this machine boots Linux with a served edu: registers, DMA, MSI; a plug-in sees what it claims",
        work: Work::Here(run),
        least_ok: 4 * GUEST + 8,
    }
}

pub(in crate::lab) fn suite() -> Case {
    Case {
        name: "vfio-user-suite",
        about: "the device suite in a guest of stock QEMU, on a served edu behind the guest's own IOMMU",
        work: Work::Here(run_suite),
        least_ok: 40,
    }
}

/// The same suite that real edu devices pass in a lab machine: what that finds at the device, it must find here.
fn run_suite(lab: &Lab, programs: &Programs, _: &Settings, heard: &mut dyn FnMut(&str)) -> Result<()> {
    let host = Served::start(&programs.host, "sim:edu", &programs.plugin_witness)?;
    let mut machine =
        Machine::new("code=0; for open in group cdev; do device-suite edu $open $EDU0 || code=1; done; exit $code");
    machine.files = vec![programs.device_suite.clone()];
    (machine.vfs, machine.edus) = (0, 0);
    machine.qemu = host.qemu.clone();
    let told =
        boot(lab, &machine, heard).map_err(|error| anyhow!("{error:#}\nthe host's log:\n{}", host.log().join("\n")))?;
    ensure!(told.exit_code == 0, "the suite ended with {}\nthe host's log:\n{}", told.exit_code, host.log().join("\n"));
    host.stop()
}

fn run(lab: &Lab, programs: &Programs, _: &Settings, heard: &mut dyn FnMut(&str)) -> Result<()> {
    // What the emulator's own edu does is what every other has to do.
    guest(lab, programs, vec!["-device".into(), "edu".into()], "QEMU's own", heard)?;
    for (name, plugin) in [("witness", &programs.plugin_witness), ("edu", &programs.plugin_edu)] {
        let host = Served::start(&programs.host, "sim:edu", plugin)?;
        let told = served(lab, programs, &host, name, heard);
        told.map_err(|error| anyhow!("{error:#}\nthe host's log:\n{}", host.log().join("\n")))?;
        host.stop()?;
        heard(&format!("ok  sim edu: plug-in {name}: the host ends in good order"));
    }
    Ok(())
}

/// Two guests, one after the other.
fn served(lab: &Lab, programs: &Programs, host: &Served, plugin: &str, heard: &mut dyn FnMut(&str)) -> Result<()> {
    let how = format!("plug-in {plugin}, shared memory");
    let lines = guest(lab, programs, host.shared_memory(MEMORY_MIB), &how, heard)?;
    host.wait_for("its client is gone", |clients| !clients.attached && clients.gone == 1)?;
    if plugin == "witness" {
        compare(host, &lines)?;
        heard("ok  sim edu: the plug-in saw every access to what it claims, and no other");
    }
    let how = format!("plug-in {plugin}, DMA by messages");
    guest(lab, programs, host.device()?, &how, heard)?;
    host.wait_for("its client is gone", |clients| !clients.attached && clients.gone == 2)?;
    heard(&format!("ok  sim edu: plug-in {plugin}: the second client found a working device"));
    Ok(())
}

/// Boots a guest that uses the edu which `qemu` gives it; its lines, with `how` in them.
pub(super) fn guest(
    lab: &Lab,
    programs: &Programs,
    qemu: Vec<String>,
    how: &str,
    heard: &mut dyn FnMut(&str),
) -> Result<Vec<String>> {
    let mut machine = Machine::bare("guest-edu");
    machine.files = vec![programs.guest_edu.clone()];
    machine.memory_mib = MEMORY_MIB;
    machine.qemu = qemu;
    let told = boot(lab, &machine, |line| heard(&format!("{line} ({how})"))).with_context(|| how.to_owned())?;
    let kept = told.lines.iter().filter(|line| line.starts_with("ok ")).count();
    ensure!(told.exit_code == 0, "{how}: the guest ended with {}", told.exit_code);
    ensure!(kept == GUEST, "{how}: {kept} promises of {GUEST}");
    Ok(told.lines)
}

/// What the guest says that it stored, and what the plug-in was called for.
fn compare(host: &Served, lines: &[String]) -> Result<()> {
    let told = lines.iter().find_map(|line| line.strip_prefix("writes ")).context("the guest counts nothing")?;
    let seen = host.witnessed();
    let offsets: Vec<u64> = seen.keys().copied().collect();
    ensure!(offsets == [0x04, 0x60], "the plug-in was called for {offsets:#x?}");
    let writes = |offset| seen.get(&offset).map_or(0, |(_, writes)| *writes);
    let ours = format!("0x4: {}, 0x60: {}", writes(0x04), writes(0x60));
    ensure!(told == ours, "the guest stored {told}; the plug-in saw {ours}");
    let (reads, writes) = seen[&0x04];
    ensure!(reads == writes, "liveness was stored {writes} times and loaded {reads} times");
    Ok(())
}
