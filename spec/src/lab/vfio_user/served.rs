//! A host that serves one device, as an operator starts it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(20);

/// What a process holds, counted by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resources {
    pub fds: usize,
    pub maps: usize,
    /// Of them, maps of memory files: a client's memory
    pub memory_maps: usize,
    pub threads: usize,
}

/// Who used the device, by `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clients {
    pub attached: bool,
    pub gone: u64,
}

/// The process; killed if it is not stopped.
#[derive(Debug)]
pub(super) struct Served {
    process: Child,
    program: PathBuf,
    folder: tempfile::TempDir,
    log: Arc<Mutex<Vec<String>>>,
    /// What it says a VMM is to be started with
    pub qemu: Vec<String>,
}

impl Served {
    pub fn start(program: &Path, device: &str, plugin: &Path) -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for the host")?;
        let below = |name: &str| folder.path().join(name);
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(["run", "--json", "--device", device, "--plugin"])
            .arg(plugin)
            .arg("--socket")
            .arg(below("device.sock"))
            .arg("--control")
            .arg(below("control"))
            .arg("--state-dir")
            .arg(below("state"))
            .env("VFIO_MEDIATE_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}", program.display()))?;
        let output = process.stdout.take().context("the host's output")?;
        let errors = process.stderr.take().context("the host's log")?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        let (send, ready) = channel();
        std::thread::spawn(move || {
            // Whoever waits may be gone.
            BufReader::new(output).lines().map_while(Result::ok).for_each(|line| drop(send.send(line)));
        });
        let mut served = Self { process, program: program.to_owned(), folder, log, qemu: Vec::new() };
        let line = ready.recv_timeout(START).with_context(|| format!("not ready:\n{}", served.log().join("\n")))?;
        let line: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        let qemu = line["ready"]["devices"][0]["qemu"].as_str().with_context(|| format!("no command line: {line}"))?;
        served.qemu = words(qemu);
        Ok(served)
    }

    /// QEMU's arguments for a guest with memory that is shared, in MiB: the host's own line, but for the memory's size.
    pub fn shared_memory(&self, mib: u32) -> Vec<String> {
        let sized = |word: &String| match word.as_str() {
            "1G" => format!("{mib}M"),
            _ => word.replace("size=1G", &format!("size={mib}M")),
        };
        self.qemu.iter().map(sized).collect()
    }

    /// QEMU's arguments for the device alone: of the guest's memory nothing is shared.
    pub fn device(&self) -> Result<Vec<String>> {
        let at = self.qemu.iter().position(|word| word == "-device").context("the host's line names no device")?;
        Ok(self.qemu[at..].to_vec())
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Offsets that the witness was called for: how often they were read, and how often written.
    pub fn witnessed(&self) -> BTreeMap<u64, (u64, u64)> {
        let mut seen = BTreeMap::<u64, (u64, u64)>::new();
        for line in self.log().iter().filter(|line| line.contains("saw")) {
            let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
            let (Some(offset), Some(write)) = (field("offset=").and_then(|text| text.parse().ok()), field("write="))
            else {
                continue;
            };
            let count = seen.entry(offset).or_default();
            *(if write == "true" { &mut count.1 } else { &mut count.0 }) += 1;
        }
        seen
    }

    pub fn clients(&self) -> Result<Clients> {
        let control = self.folder.path().join("control");
        let output = Command::new(&self.program).args(["--json", "status", "--control"]).arg(control).output()?;
        ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
        let status: Value = serde_json::from_slice(&output.stdout)?;
        let served = &status["devices"][0]["served"];
        let attached = served["attached"].as_bool().with_context(|| format!("who is served: {status}"))?;
        let gone = served["clients_gone"].as_u64().with_context(|| format!("who was served: {status}"))?;
        Ok(Clients { attached, gone })
    }

    pub fn wait_for(&self, what: &str, condition: impl Fn(Clients) -> bool) -> Result<()> {
        let end = Instant::now() + END;
        while !condition(self.clients()?) {
            ensure!(Instant::now() < end, "{what}: not within {END:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub fn resources(&self) -> Result<Resources> {
        let process = PathBuf::from(format!("/proc/{}", self.process.id()));
        let count = |name: &str| Ok::<_, std::io::Error>(std::fs::read_dir(process.join(name))?.count());
        let text = std::fs::read_to_string(process.join("maps"))?;
        let (maps, memory_maps) = (text.lines().count(), text.lines().filter(|line| line.contains("/memfd:")).count());
        Ok(Resources { fds: count("fd")?, maps, memory_maps, threads: count("task")? })
    }

    /// What it holds, told: for a failure.
    pub fn holds(&self) -> String {
        let process = PathBuf::from(format!("/proc/{}", self.process.id()));
        let fds = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let mut lines: Vec<String> =
            fds.map(|fd| format!("fd {:?}", std::fs::read_link(fd.path()).unwrap_or_default())).collect();
        lines.extend(std::fs::read_to_string(process.join("maps")).unwrap_or_default().lines().map(str::to_owned));
        lines.join("\n")
    }

    /// In good order, by SIGTERM.
    pub fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.process.id()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.context("its id")?, rustix::process::Signal::TERM)?;
        let end = Instant::now() + END;
        loop {
            if let Some(status) = self.process.try_wait()? {
                ensure!(status.success(), "the host ended with {status}:\n{}", self.log().join("\n"));
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the host does not end:\n{}", self.log().join("\n"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Gone already, where it was stopped.
        let _killed = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// As a shell splits them: by spaces, but not within single quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in line.chars() {
        match (character, words.last_mut()) {
            ('\'', _) => quoted = !quoted,
            (' ', _) if !quoted => words.push(String::new()),
            (_, Some(word)) => word.push(character),
            (_, None) => {}
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn quotes_keep_words_together() {
        assert_eq!(words("-m 1G  -device '{\"a\": \"b c\"}'"), ["-m", "1G", "-device", "{\"a\": \"b c\"}"]);
    }
}
