//! QEMU is killed at random points, again and again, and one host serves them all.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::boots::{MEMORY_MIB, guest};
use super::loop_guest::{self, PAGE, TO};
use super::served::{Resources, Served};
use crate::lab::Lab;
use crate::lab::cases::{Case, Programs, Settings, Work};
use crate::lab::machine::qemu;

const ROUNDS: u64 = 100;
const ROUNDS_QUICK: u64 = 12;
/// In each such round the device is seen to work before the kill.
const WORKS: u64 = 10;
/// From QEMU's start to the guest's second DMA.
const PATIENCE: Duration = Duration::from_secs(30);
/// edu takes 100 ms for a DMA: one that was under way would have ended.
const LATE: Duration = Duration::from_millis(150);
/// After the end of a DMA that wrote: the next is under way, behind one that reads.
const UNDER_WAY: Duration = Duration::from_millis(150);
/// Until everything of a client is given back.
const TIDY: Duration = Duration::from_secs(5);
/// Of a process's own allocator; leaks would be one for each of many rounds.
const SPARE_MAPS: usize = 4;

pub(in crate::lab) fn kills() -> Case {
    Case {
        name: "vfio-user-kills",
        about: "QEMU is killed 100 times (--quick: 12) at random points of its life: no DMA afterwards, no leaks, the next start works",
        work: Work::Here(run),
        least_ok: 5,
    }
}

/// One QEMU with the guest that does DMA all the time; killed when dropped.
#[derive(Debug)]
struct Victim(Child);

impl Victim {
    fn start(lab: &Lab, image: &Path, arguments: &[String]) -> Result<Self> {
        let machine = "-nodefaults -no-user-config -display none -M q35,usb=off,smbus=off -accel tcg -cpu max";
        let process = qemu(lab)
            .args(machine.split_whitespace())
            .arg("-kernel")
            .arg(image)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("QEMU")?;
        Ok(Self(process))
    }

    /// The guest's memory, which outlives QEMU in our hands; none yet, or not shared.
    fn memory(&self) -> Option<File> {
        let folder = PathBuf::from(format!("/proc/{}/fd", self.0.id()));
        let is_memory = |path: &PathBuf| {
            std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:memory-backend"))
        };
        let path = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(is_memory)?;
        // Without creating anything, and only to look.
        File::open(path).ok()
    }

    /// By SIGKILL. An error if it was gone already, with what it said.
    fn kill(mut self) -> Result<()> {
        if let Some(status) = self.0.try_wait()? {
            let mut said = String::new();
            if let Some(mut errors) = self.0.stderr.take() {
                std::io::Read::read_to_string(&mut errors, &mut said)?;
            }
            anyhow::bail!("QEMU ended by itself ({status}): {said}");
        }
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Gone already, where it was killed.
        let _killed = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// What the device has written.
fn written(memory: &File) -> Result<Vec<u8>> {
    let mut page = vec![0; PAGE as usize];
    memory.read_exact_at(&mut page, TO.into())?;
    Ok(page)
}

fn rounds_done(page: &[u8]) -> u32 {
    page.first_chunk().map_or(0, |word| u32::from_le_bytes(*word))
}

/// Until the guest has done `rounds` of DMA.
fn wait_for_dma(victim: &Victim, rounds: u32) -> Result<File> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(memory) = victim.memory()
            && written(&memory).is_ok_and(|page| rounds_done(&page) >= rounds)
        {
            return Ok(memory);
        }
        ensure!(Instant::now() < end, "the guest's DMA does not get anywhere within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit.max(1)
    }
}

fn run(lab: &Lab, programs: &Programs, settings: &Settings, heard: &mut dyn FnMut(&str)) -> Result<()> {
    let host = Served::start(&programs.host, "sim:edu", &programs.plugin_edu)?;
    let killed = kill_many(lab, &host, settings, heard);
    killed.map_err(|error| anyhow!("{error:#}\nseed {}; the host's log:\n{}", settings.seed, last(&host.log(), 40)))?;
    guest(lab, programs, host.shared_memory(MEMORY_MIB), "after all kills", &mut |line| {
        if line.starts_with("FAIL") {
            heard(line);
        }
    })?;
    heard("ok  sim edu: after all kills a guest boots, and all of the device works");
    host.stop()?;
    heard("ok  sim edu: the host ends in good order");
    Ok(())
}

fn last(lines: &[String], count: usize) -> String {
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// What was seen in all rounds.
#[derive(Debug, Default)]
struct Tally {
    before_memory: u64,
    before_dma: u64,
    after_dma: u64,
    messages: u64,
    works: u64,
}

/// What the rounds have in common.
struct Bench<'a> {
    lab: &'a Lab,
    host: &'a Served,
    image: &'a Path,
    /// QEMU's arguments for memory that is shared, and for DMA by messages
    shared: &'a [String],
    messages: &'a [String],
}

fn kill_many(lab: &Lab, host: &Served, settings: &Settings, heard: &mut dyn FnMut(&str)) -> Result<()> {
    let rounds = if settings.quick { ROUNDS_QUICK } else { ROUNDS };
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("guest");
    std::fs::write(&image, loop_guest::image())?;
    let (shared, messages) = (host.shared_memory(64), host.device()?);

    let mut base = host.resources()?;
    // The first tells how long a start takes.
    let started = Instant::now();
    let victim = Victim::start(lab, &image, &shared)?;
    wait_for_dma(&victim, 1)?;
    let longest = started.elapsed() * 3 / 2;
    let memory = wait_for_dma(&victim, 2)?;
    std::thread::sleep(UNDER_WAY);
    victim.kill()?;
    host.wait_for("the first client is gone", |clients| !clients.attached && clients.gone == 1)?;
    no_dma_any_more(&memory)?;
    // The allocator's own maps come with the first client, and stay.
    tidy(host, Resources { maps: usize::MAX - SPARE_MAPS, ..base }).context("after the first client")?;
    base.maps = host.resources()?.maps;

    let bench = Bench { lab, host, image: &image, shared: &shared, messages: &messages };
    let mut random = Random(settings.seed | 1);
    let mut tally = Tally::default();
    for round in 1..=rounds {
        let seen = format!("round {round}");
        one(&bench, round, random.below(longest.as_micros() as u64), &mut tally).context(seen.clone())?;
        tidy(host, base).context(seen)?;
    }
    let (seed, most) = (settings.seed, longest.as_millis());
    heard(&format!(
        "ok  sim edu: {rounds} QEMUs killed within {most} ms, seed {seed}: {} before memory, {} before DMA, {} in DMA, {} with DMA by messages",
        tally.before_memory, tally.before_dma, tally.after_dma, tally.messages
    ));
    heard(&format!("ok  sim edu: no DMA after any of {} losses of a client in DMA", tally.after_dma));
    heard(&format!("ok  sim edu: after each loss the host held what it held before: {base:?}"));
    heard(&format!("ok  sim edu: {} starts after losses were seen to do DMA", tally.works));
    Ok(())
}

/// Starts a QEMU, and kills it after so many microseconds.
fn one(bench: &Bench<'_>, round: u64, micros: u64, tally: &mut Tally) -> Result<()> {
    let Bench { lab, host, image, shared, messages } = bench;
    if round % 4 == 3 {
        let victim = Victim::start(lab, image, messages)?;
        std::thread::sleep(Duration::from_micros(micros));
        victim.kill()?;
        tally.messages += 1;
        return host.wait_for("a killed client is gone", |clients| !clients.attached);
    }
    let victim = Victim::start(lab, image, shared)?;
    if round.is_multiple_of(WORKS) {
        wait_for_dma(&victim, 2)?;
        std::thread::sleep(UNDER_WAY);
        tally.works += 1;
    } else {
        std::thread::sleep(Duration::from_micros(micros));
    }
    let memory = victim.memory();
    victim.kill()?;
    host.wait_for("a killed client is gone", |clients| !clients.attached)?;
    let Some(memory) = memory else {
        tally.before_memory += 1;
        return Ok(());
    };
    if no_dma_any_more(&memory)? == 0 {
        tally.before_dma += 1;
    } else {
        tally.after_dma += 1;
    }
    Ok(())
}

/// The client is gone: what the device has written stays as it is. Rounds that were done.
fn no_dma_any_more(memory: &File) -> Result<u32> {
    let at_loss = written(memory).unwrap_or_default();
    std::thread::sleep(LATE);
    let later = written(memory).unwrap_or_default();
    let (before, after) = (rounds_done(&at_loss), rounds_done(&later));
    ensure!(later == at_loss, "the device wrote memory after the loss of its client: {before} rounds, then {after}");
    Ok(before)
}

/// Everything of the client is given back.
fn tidy(host: &Served, base: Resources) -> Result<()> {
    let end = Instant::now() + TIDY;
    loop {
        let now = host.resources()?;
        let exact = |held: Resources| (held.fds, held.threads, held.memory_maps);
        if exact(now) == exact(base) && now.maps <= base.maps + SPARE_MAPS {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the host held {base:?} before, and holds {now:?}:\n{}", host.holds());
        std::thread::sleep(Duration::from_millis(10));
    }
}
