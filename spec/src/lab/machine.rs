//! One emulated machine: what it has, its boot, its end.
//!
//! States: prepared -> booting -> running its script -> ended ([`Ended`]). The log (ttyS0) tells which; its last line is
//! the machine's verdict. **Must never** leave an emulator behind: it is killed when its handle is dropped, the machine
//! ends itself after its time, and it dies with this process where setpriv is there to see to it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Lab;
use super::initramfs::Initramfs;

/// A directory of this host that the machine sees (9p, uncached: what is written stays, even if the machine dies).
#[derive(Debug, Clone)]
pub struct Share {
    pub host: PathBuf,
    pub guest: String,
}

/// What one boot has.
#[derive(Debug, Clone)]
pub struct Machine {
    /// igb VFs (up to 7) and edu devices (up to 8), all bound to vfio-pci; `$VF0`..., `$EDU0`... are their addresses
    pub vfs: u32,
    pub edus: u32,
    pub memory_mib: u32,
    pub cpus: u32,
    /// Boot and script together
    pub timeout: Duration,
    /// Kernel modules besides those for VFIO, igb and shares
    pub modules: Vec<String>,
    /// Programs and files, copied into `/lab`, which is in PATH; libraries come along
    pub files: Vec<PathBuf>,
    pub shares: Vec<Share>,
    pub environment: Vec<(String, String)>,
    /// A script for busybox's shell; its exit code is the machine's
    pub script: String,
    /// The network behind the PF, if any
    pub(super) network: Option<Network>,
}

#[derive(Debug, Clone)]
pub(super) struct Network {
    /// QEMU's `-netdev` without the id
    netdev: String,
    mac: String,
    address: String,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The script's exit code
    Exit(i32),
    /// The machine could not be prepared, for this reason
    Unusable(String),
    /// The emulator ended without a verdict: a crash of the machine's kernel, most likely
    Died,
    TimedOut,
}

/// What came out of a machine.
#[derive(Debug, Clone)]
pub struct Output {
    pub ended: Ended,
    /// The kernel's and init's log
    pub log: String,
    pub elapsed: Duration,
}

impl Machine {
    pub fn new(script: impl Into<String>) -> Self {
        Self {
            vfs: 2,
            edus: 2,
            memory_mib: 1024,
            cpus: 2,
            timeout: Duration::from_secs(100),
            modules: Vec::new(),
            files: Vec::new(),
            shares: Vec::new(),
            environment: Vec::new(),
            script: script.into(),
            network: None,
        }
    }

    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.push(path.into());
        self
    }

    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    pub fn share(mut self, host: impl Into<PathBuf>, guest: &str) -> Self {
        self.shares.push(Share { host: host.into(), guest: guest.to_owned() });
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn initramfs(&self, lab: &Lab) -> Result<Initramfs> {
        let mut tree = Initramfs::default();
        tree.directory("/tmp");
        tree.copy(&lab.directory.join("busybox"), "/bin/busybox")?;
        tree.file("/init", 0o755, std::fs::read(lab.sources.join("init"))?);
        tree.copy(&lab.sources.join("functions"), "/lab/functions")?;
        let modules = self.module_order(lab)?;
        for module in &modules {
            let file = format!("{module}.ko");
            tree.copy(&lab.directory.join("modules").join(&file), &format!("/lab/modules/{file}"))?;
        }
        tree.file("/lab/modules/order", 0o644, modules.iter().map(|module| format!("{module}\n")).collect::<String>());
        for file in &self.files {
            let name = file.file_name().with_context(|| format!("{}: no file name", file.display()))?;
            tree.copy(file, &format!("/lab/{}", name.to_string_lossy()))?;
        }
        let libraries = tree.copy_libraries(&self.files)?;
        tree.file("/lab/settings", 0o644, self.settings(libraries.into_iter().collect::<Vec<_>>().join(":")));
        tree.file("/lab/script", 0o644, self.script.clone());
        Ok(tree)
    }

    /// What init reads: variables of its own, and those that the script gets.
    fn settings(&self, library_path: String) -> String {
        let shares: Vec<String> =
            self.shares.iter().enumerate().map(|(i, share)| format!("share{i}:{}", share.guest)).collect();
        let address = self.network.as_ref().map_or("", |network| &network.address);
        let mut lines = vec![
            format!("vfs={}", self.vfs),
            format!("seconds={}", self.timeout.as_secs()),
            format!("pf_address={}", quoted(address)),
            format!("shares={}", quoted(&shares.join(" "))),
            format!("export LD_LIBRARY_PATH={}", quoted(&library_path)),
        ];
        lines.extend(self.environment.iter().map(|(name, value)| format!("export {name}={}", quoted(value))));
        lines.join("\n") + "\n"
    }

    /// Modules in load order, each after what it needs.
    fn module_order(&self, lab: &Lab) -> Result<Vec<String>> {
        let path = lab.directory.join("modules/order.txt");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let needs = |name: &str| {
            let line = text.lines().filter_map(|line| line.split_once(':')).find(|(module, _)| *module == name);
            line.map(|(_, needs)| needs).with_context(|| format!("the lab has no module {name}"))
        };
        let mut wanted = vec!["vfio_iommu_type1", "vfio_pci", "igb"];
        wanted.extend(if self.shares.is_empty() { &[][..] } else { &["9p", "9pnet_virtio"][..] });
        wanted.extend(self.modules.iter().map(String::as_str));
        let mut order: Vec<String> = Vec::new();
        for name in wanted {
            for module in needs(name)?.split_whitespace().chain([name]) {
                if !order.iter().any(|known| known == module) {
                    order.push(module.to_owned());
                }
            }
        }
        Ok(order)
    }

    fn qemu(&self, lab: &Lab, work: &Path) -> Command {
        let program = lab.directory.join("qemu/run");
        // setpriv: no emulator outlives a killed lab.
        let mut command = if Command::new("setpriv").arg("--version").stdout(Stdio::null()).status().is_ok() {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        let mut arg = |name: &str, value: &str| {
            command.arg(name).arg(value);
        };
        arg("-machine", "q35,usb=off,smbus=off");
        arg("-accel", "tcg,thread=multi");
        arg("-cpu", "max");
        arg("-smp", &self.cpus.to_string());
        arg("-m", &format!("{}M", self.memory_mib));
        arg("-display", "none");
        arg("-serial", &format!("file:{}", work.join("log").display()));
        arg("-chardev", "stdio,id=script,signal=off");
        arg("-serial", "chardev:script");
        arg("-kernel", &lab.directory.join("kernel").display().to_string());
        arg("-initrd", &work.join("initramfs").display().to_string());
        arg("-append", KERNEL_PARAMETERS);
        arg("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on");
        arg("-device", "pcie-root-port,id=port0,chassis=1,slot=1");
        let (netdev, mac) = match &self.network {
            Some(network) => (network.netdev.as_str(), network.mac.as_str()),
            None => ("hubport,hubid=0", "52:54:00:1a:b0:00"),
        };
        arg("-netdev", &format!("{netdev},id=net0"));
        arg("-device", &format!("igb,bus=port0,netdev=net0,mac={mac},romfile="));
        for i in 0..self.edus {
            // All address bits: by default edu drops those above 28, without an error.
            arg("-device", &format!("edu,addr={:#x},dma_mask=0xffffffffffffffff", 0x10 + i));
        }
        for (i, share) in self.shares.iter().enumerate() {
            let path = share.host.display().to_string().replace(',', ",,");
            arg("-virtfs", &format!("local,path={path},mount_tag=share{i},security_model=none"));
        }
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// For an IOMMU, and for speed: what an emulated machine need not calibrate, mitigate or tell.
const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet loglevel=4 panic=-1 intel_iommu=on tsc=reliable no_timer_check \
    random.trust_cpu=on mitigations=off nokaslr lsm=capability audit=0 cryptomgr.notests";

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A started emulator, killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots, and hands each line of the script's output to `on_line` as it comes.
pub fn boot(lab: &Lab, machine: &Machine, on_line: impl FnMut(&str)) -> Result<Output> {
    ensure!(machine.vfs <= 7 && machine.edus <= 8, "a machine has up to 7 VFs and 8 edu devices");
    let begin = Instant::now();
    let work = tempfile::Builder::new().prefix("vfio-lab.").tempdir()?;
    machine.initramfs(lab)?.write(std::io::BufWriter::new(File::create(work.path().join("initramfs"))?))?;
    let mut qemu = Running(machine.qemu(lab, work.path()).spawn().context("starting QEMU")?);
    let (lines, complaints) = (output_lines(&mut qemu.0)?, complaints(&mut qemu.0)?);
    let timed_out = pass_on(&lines, begin + machine.timeout, on_line);
    drop(qemu);
    let mut log = String::from_utf8_lossy(&std::fs::read(work.path().join("log")).unwrap_or_default()).into_owned();
    let verdict = verdict(&log);
    log.push_str(&complaints.join().unwrap_or_default());
    let ended = match verdict {
        Some(ended) => ended,
        None if timed_out => Ended::TimedOut,
        None => Ended::Died,
    };
    Ok(Output { ended, log, elapsed: begin.elapsed() })
}

/// The script's output, line by line. A thread empties the pipe at all times: what a full one does not take is lost.
fn output_lines(qemu: &mut Child) -> Result<mpsc::Receiver<String>> {
    let stdout = qemu.stdout.take().context("no pipe from QEMU")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line);
            if sender.send(text.trim_end_matches('\r').to_owned()).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}

/// What QEMU has to say itself (IOMMU faults, wrong options).
fn complaints(qemu: &mut Child) -> Result<std::thread::JoinHandle<String>> {
    let stderr = qemu.stderr.take().context("no pipe from QEMU")?;
    Ok(std::thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default()))
}

/// Until QEMU closes its output, or the deadline: true.
fn pass_on(lines: &mpsc::Receiver<String>, deadline: Instant, mut on_line: impl FnMut(&str)) -> bool {
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => on_line(&line),
            Err(mpsc::RecvTimeoutError::Disconnected) => return false,
            Err(mpsc::RecvTimeoutError::Timeout) => return true,
        }
    }
}

/// Init's last word.
fn verdict(log: &str) -> Option<Ended> {
    let word =
        log.lines().rev().find_map(|line| line.trim_end().strip_prefix("lab: ").filter(|word| *word != "ready"))?;
    if let Some(code) = word.strip_prefix("exit ") {
        return code.parse().ok().map(Ended::Exit);
    }
    word.strip_prefix("unusable: ").map(|why| Ended::Unusable(why.to_owned()))
}

/// Boots two machines, A and B, with their PFs joined (10.88.0.1 and .2). Each has `LAB_HOST` (A or B), `LAB_ADDRESS`,
/// `LAB_PEER` (the other's address) and the directory `/pair` in common; `meet` waits there for the other. `on_line` gets
/// the machine's letter with each line. The script should end with a `meet`, or one leaves while the other talks.
pub fn boot_pair(lab: &Lab, a: &Machine, b: &Machine, on_line: impl Fn(char, &str) + Sync) -> Result<(Output, Output)> {
    let work = tempfile::Builder::new().prefix("vfio-lab-pair.").tempdir()?;
    let common = work.path().join("common");
    std::fs::create_dir(&common)?;
    let socket = |name: char| work.path().join(name.to_string()).display().to_string();
    let joined = |machine: &Machine, me: (char, u32), peer: (char, u32)| {
        let address = |number: u32| format!("10.88.0.{number}");
        let mut machine = machine
            .clone()
            .share(&common, "/pair")
            .env("LAB_HOST", &me.0.to_string())
            .env("LAB_ADDRESS", &address(me.1))
            .env("LAB_PEER", &address(peer.1));
        machine.network = Some(Network {
            netdev: format!(
                "dgram,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                socket(me.0),
                socket(peer.0)
            ),
            mac: format!("52:54:00:1a:b0:0{}", me.1),
            address: format!("{}/24", address(me.1)),
        });
        machine
    };
    let (a, b) = (joined(a, ('A', 1), ('B', 2)), joined(b, ('B', 2), ('A', 1)));
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| boot(lab, &a, |line| on_line('A', line)));
        let b = boot(lab, &b, |line| on_line('B', line));
        (a.join(), b)
    });
    let a = a.map_err(|_| anyhow::anyhow!("the thread of machine A panicked"))?;
    Ok((a?, b?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_init_is_the_verdict() {
        assert_eq!(
            verdict("lab: ready\r\n[ 1.0] noise\r\nlab: exit 3\r\n[ 2.0] sysrq: Resetting\r\n"),
            Some(Ended::Exit(3))
        );
        assert_eq!(verdict("lab: unusable: module igb\n"), Some(Ended::Unusable("module igb".to_owned())));
        assert_eq!(verdict("lab: ready\nBUG: kernel"), None, "a machine that only became ready has no verdict");
        assert_eq!(verdict(""), None);
    }

    #[test]
    fn settings_survive_the_shell() {
        let machine = Machine::new("").env("ODD", "it's $HOME; `true`").share("/tmp", "/out");
        let settings = machine.settings(String::new());
        let script = format!("{settings}printf '%s|%s' \"$ODD\" \"$shares\"");
        let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "it's $HOME; `true`|share0:/out");
    }
}
