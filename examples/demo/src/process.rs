//! One host process, as its parent sees it.
//!
//! **Owns** the child and both ends of its pipe; ends it when dropped. Events arrive on a thread of their own, so that no
//! child ever waits for its parent to read.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command as Process, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::guest::Caught;
use crate::protocol::{Command, Event};

#[derive(Debug)]
pub struct HostProcess {
    pub side: &'static str,
    pub control: PathBuf,
    child: Child,
    commands: ChildStdin,
    events: Receiver<Event>,
    /// The last progress that was told
    pub progress: (u64, u64, u64),
    /// Phases in the order in which they were told
    pub phases: Vec<String>,
}

impl HostProcess {
    /// Starts this program again as `demo host ...`.
    pub fn start(side: &'static str, control: &Path, arguments: &[String]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let mut child = Process::new(program)
            .arg("host")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting the {side} process"))?;
        let commands = child.stdin.take().context("the child's standard input")?;
        let output = child.stdout.take().context("the child's standard output")?;
        let (send, events) = channel();
        std::thread::Builder::new().name(format!("{side} events")).spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line)
                    .unwrap_or_else(|error| Event::Failed { what: format!("unreadable line {line:?}: {error}") });
                if send.send(event).is_err() {
                    return;
                }
            }
        })?;
        let control = control.to_path_buf();
        Ok(Self { side, control, child, commands, events, progress: (0, 0, 0), phases: Vec::new() })
    }

    pub fn tell(&mut self, command: &Command) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        self.commands.write_all(&line).with_context(|| format!("telling the {} process", self.side))
    }

    /// Waits for an event that `wanted` turns into something. Progress and phases are noted on the way; an oracle that
    /// speaks, a failure, or the process's end ends the wait with its error.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&Event) -> Option<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = match self.events.recv_timeout(left) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => bail!("{}: no {what} within {} s", self.side, patience.as_secs()),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait()?;
                    bail!("{}: the process ended ({status}) before {what}", self.side);
                }
            };
            self.note(&event)?;
            if let Some(found) = wanted(&event) {
                return Ok(found);
            }
        }
    }

    /// Takes what has arrived, without waiting.
    pub fn catch_up(&mut self) -> anyhow::Result<()> {
        while let Ok(event) = self.events.try_recv() {
            self.note(&event)?;
        }
        Ok(())
    }

    fn note(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Progress { rounds, stores, interrupts } => self.progress = (*rounds, *stores, *interrupts),
            Event::Phase { name } => self.phases.push(name.clone()),
            Event::Caught { oracle, what } => {
                let oracle = ["page", "device", "irq"].into_iter().find(|known| known == oracle).unwrap_or("guest");
                return Err(Caught { oracle, what: format!("{what} ({})", self.side) }.into());
            }
            Event::Failed { what } => bail!("{}: {what}", self.side),
            Event::Ready { .. }
            | Event::Running
            | Event::Holding { .. }
            | Event::Checked { .. }
            | Event::Dumped { .. } => {}
        }
        Ok(())
    }

    /// SIGKILL, and the wait for its end.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks the process to end in good order, and waits a while for it.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.tell(&Command::Stop)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                if !status.success() {
                    bail!("the {} process ended with {status}", self.side);
                }
                return Ok(());
            }
            // The pipe's end would tell too, but a child of the child could hold it open.
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("the {} process did not end within 10 s of being asked to", self.side)
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        // Already ended: nothing to do. Otherwise nobody is left who could use it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
