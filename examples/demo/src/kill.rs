//! SIGKILL at a phase: one of the two processes is held there and killed, and what is left must name exactly one owner.
//!
//! The judge looks only at what an operator has: the survivor's `status`, the journal that the killed process left, and
//! the witness. Right is: never two that run or may run the guest; and none only where somebody says "in doubt".

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use vfio_mediate::control::client::Client;
use vfio_mediate::control::protocol::Ownership;
use vfio_mediate::migration::journal::{FileStore, Standing, recover};

use crate::build;
use crate::cli::Demo;
use crate::parent::{PATIENCE, host_arguments, introduce, wait_rounds};
use crate::process::HostProcess;
use crate::protocol::Event;
use crate::story::Story;
use crate::witness::Witness;

/// How long the survivor may take to come to an end: its own deadlines, and its tries to settle.
const SURVIVOR_PATIENCE: Duration = Duration::from_secs(60);
/// How long a wrong runner is given to show itself.
const WATCH: Duration = Duration::from_millis(400);

/// `what` is SIDE:PHASE, the phase as reports name it.
pub fn run(demo: &Demo, what: &str) -> anyhow::Result<()> {
    let story = Story::begin();
    let (side, phase) = what.split_once(':').context("--kill takes SIDE:PHASE")?;
    let victim_is_source = match side {
        "source" => true,
        "destination" => false,
        _ => bail!("--kill takes source or destination, not {side:?}"),
    };
    let plugin = build::plugin(demo.load.plugin.as_deref())?;
    let folder = tempfile::tempdir().context("a folder for sockets and journals")?;
    let witness = Witness::listen((Ipv4Addr::LOCALHOST, 0).into()).context("the witness's socket")?;
    let start = |name: &'static str, device: &str, listen: bool, hold: bool| {
        let mut words = host_arguments(name, device, &demo.load, &plugin, folder.path(), witness.address());
        if listen {
            words.extend(["--listen".to_owned(), "127.0.0.1:0".to_owned()]);
        }
        if hold {
            words.extend(["--hold".to_owned(), phase.to_owned()]);
        }
        HostProcess::start(name, &folder.path().join(format!("{name}.sock")), &words)
    };
    let mut destination = start("destination", &demo.destination_device, true, !victim_is_source)?;
    let mut source = start("source", &demo.source_device, false, victim_is_source)?;
    let to = introduce(&story, &mut destination)?.listen.context("the destination told no address")?;
    introduce(&story, &mut source)?;
    wait_rounds(&mut source, demo.load.rounds)?;

    let mut client = Client::connect(&source.control).context("the source's control socket")?;
    // The answer is not what counts: the process that would give it may be the one that is killed.
    let asking = std::thread::spawn(move || client.migrate(&to.to_string(), false, |_| {}).map(|_| ()));
    let (victim, survivor) =
        if victim_is_source { (&mut source, &mut destination) } else { (&mut destination, &mut source) };
    victim.wait_for("hold", PATIENCE, |event| matches!(event, Event::Holding { .. }).then_some(()))?;
    victim.kill()?;
    story.tell(format!("the {side} was killed while {phase}"));

    let owner = settle(survivor)?;
    let journal = FileStore::new(folder.path().join(format!("{side}.state")))?;
    let standing = recover(&journal)?;
    let heard = witness.ask(|t| t.heartbeats);
    std::thread::sleep(WATCH);
    let beats = witness.ask(|t| t.heartbeats) > heard;
    if let Some(complaint) = witness.ask(|t| t.complaint.clone()) {
        bail!("witness oracle: {complaint}");
    }
    // A source that has no journal yet has never given its guest away.
    let victim_may_run = standing == Standing::MayRun || (victim_is_source && standing == Standing::Idle);
    let may_run = usize::from(owner == Ownership::Here) + usize::from(victim_may_run);
    let named = owner == Ownership::InDoubt || matches!(standing, Standing::InDoubt { .. });
    let verdict = format!("survivor: {owner:?}, journal of the killed {side}: {standing:?}, guest runs: {beats}");
    ensure!(may_run <= 1, "two owners: {verdict}");
    ensure!(may_run == 1 || named, "no owner, and nobody says so: {verdict}");
    ensure!(beats == (owner == Ownership::Here), "the guest does not do what the survivor says: {verdict}");
    story.conclude(&format!("ok  killed {side} while {phase}: {verdict}"));
    let _ = asking.join();
    Ok(())
}

/// Waits until the survivor has made up its mind: no migration under way, and an answer that stays.
fn settle(survivor: &HostProcess) -> anyhow::Result<Ownership> {
    let deadline = Instant::now() + SURVIVOR_PATIENCE;
    loop {
        let status = Client::connect(&survivor.control)?.status()?;
        if status.migration.is_none() {
            return Ok(status.guest);
        }
        ensure!(Instant::now() < deadline, "{} is still migrating: {}", survivor.side, status.explanation);
        // The host has its own deadlines; it is asked now and then.
        std::thread::sleep(Duration::from_millis(50));
    }
}
