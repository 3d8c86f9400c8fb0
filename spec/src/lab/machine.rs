//! One emulated machine: what is in it, how it is started, what it said.
//!
//! **Owns** the QEMU process, which ends with this one. The machine's serial port 1 is the case's output, port 0 the
//! console, on which its first process gives the verdict.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::Lab;
use super::initramfs::Initramfs;

/// What is in a machine besides what its case adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An IOMMU, an igb with VFs, edu devices, all of them but the PF on vfio-pci
    Passthrough,
    /// Nothing, and no modules but those that the case names
    Bare,
}

/// A folder of this machine, and where it is mounted.
#[derive(Debug, Clone)]
pub struct Share {
    pub folder: PathBuf,
    pub place: String,
    pub read_only: bool,
}

/// What a case wants of its machine.
#[derive(Debug, Clone)]
pub struct Machine {
    pub kind: Kind,
    /// Runs in the machine's shell with the devices' names in its environment: PF, PF_NET, VF0 .., EDU0 ..
    pub script: String,
    /// Host files to be found in /case; the libraries that they need come along
    pub files: Vec<PathBuf>,
    /// Modules beyond those that every machine loads
    pub modules: Vec<&'static str>,
    pub vfs: u32,
    pub edus: u32,
    pub memory_mib: u32,
    pub timeout: Duration,
    /// Further QEMU arguments
    pub qemu: Vec<String>,
    pub shares: Vec<Share>,
    pub environment: Vec<(String, String)>,
    /// The PF's netdev without its id, the PF's MAC and, for a pair, its address
    pub network: (String, String, String),
}

impl Machine {
    pub fn new(script: impl Into<String>) -> Self {
        Self {
            kind: Kind::Passthrough,
            script: script.into(),
            files: Vec::new(),
            modules: Vec::new(),
            vfs: 1,
            edus: 2,
            memory_mib: 1024,
            timeout: Duration::from_secs(120),
            qemu: Vec::new(),
            shares: Vec::new(),
            environment: Vec::new(),
            network: ("hubport,hubid=0".into(), "52:54:00:aa:00:01".into(), String::new()),
        }
    }

    /// A guest, with nothing in it but what `qemu` adds.
    pub fn bare(script: impl Into<String>) -> Self {
        Self { kind: Kind::Bare, vfs: 0, edus: 0, memory_mib: 256, ..Self::new(script) }
    }

    fn modules(&self) -> impl Iterator<Item = &str> {
        let own: &[&str] = if self.kind == Kind::Passthrough { &MODULES } else { &[] };
        let shares: &[&str] = if self.shares.is_empty() { &[] } else { &["9p", "9pnet_virtio"] };
        own.iter().chain(&self.modules).chain(shares).copied()
    }
}

/// How a machine ended.
#[derive(Debug)]
pub struct Outcome {
    pub exit_code: i32,
    pub lines: Vec<String>,
}

const MODULES: [&str; 3] = ["vfio_iommu_type1", "vfio_pci", "igb"];

/// Boots, runs the script, and returns what it printed. Each line is given to `heard` as it comes.
pub fn boot(lab: &Lab, machine: &Machine, mut heard: impl FnMut(&str)) -> anyhow::Result<Outcome> {
    let work = tempfile::tempdir().context("a folder for the machine's files")?;
    let initrd = work.path().join("initrd");
    write_initramfs(lab, machine, &initrd)?;
    let mut qemu = qemu(lab)
        .args(arguments(lab, machine, &initrd))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting QEMU (setpriv is in util-linux)")?;
    let output = qemu.stdout.take().context("QEMU's output")?;
    let console = qemu.stderr.take().context("QEMU's console")?;
    let (send, lines) = channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if send.send(text).is_err() {
                return;
            }
        }
    });
    let console = std::thread::spawn(move || {
        let mut text = Vec::new();
        // A broken pipe ends the console; what was read counts.
        let _ = BufReader::new(console).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });

    let deadline = Instant::now() + machine.timeout;
    let mut printed = Vec::new();
    let mut timed_out = false;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                heard(&line);
                printed.push(line);
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                timed_out = true;
                break;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    // Already gone, or to be ended now.
    let _ = qemu.kill();
    qemu.wait()?;
    drop(lines);
    let _ = reader.join();
    let console = console.join().unwrap_or_default();
    match verdict(&console) {
        Some(Ok(exit_code)) => Ok(Outcome { exit_code, lines: printed }),
        Some(Err(why)) => bail!("the machine could not be prepared: {why}\n{}", last_lines(&console, 20)),
        None if timed_out => bail!("no end after {} s\n{}", machine.timeout.as_secs(), last_lines(&console, 20)),
        None => bail!("the machine died\n{}", last_lines(&console, 30)),
    }
}

/// The lab's QEMU, which must not outlive the lab, however the lab ends.
pub(super) fn qemu(lab: &Lab) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(lab.folder.join("qemu/run"));
    command
}

/// A machine's whole file system, for a machine that something else starts.
pub(super) fn write_initramfs(lab: &Lab, machine: &Machine, path: &Path) -> anyhow::Result<()> {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    initramfs(lab, machine)?.write(&mut file)?;
    Ok(std::io::Write::flush(&mut file)?)
}

fn verdict(console: &str) -> Option<Result<i32, String>> {
    let said = console.lines().filter_map(|line| line.trim().strip_prefix("LAB ")).next_back()?;
    Some(match said.strip_prefix("exit ").map(str::parse) {
        Some(Ok(code)) => Ok(code),
        _ => Err(said.to_owned()),
    })
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn initramfs(lab: &Lab, machine: &Machine) -> anyhow::Result<Initramfs> {
    let mut tree = Initramfs::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "root", "case"] {
        tree.directory(folder);
    }
    let busybox = lab.folder.join("busybox");
    tree.file(&busybox, "bin/busybox")?;
    let applets = Command::new(&busybox).arg("--list").output().context("busybox --list")?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|name| *name != "busybox") {
        tree.symlink(&format!("bin/{applet}"), "busybox");
    }
    tree.file(&lab.scripts.join("init"), "init")?;
    tree.file(&lab.scripts.join("functions"), "lab/functions")?;

    let order = std::fs::read_to_string(lab.folder.join("load-order")).context("the lab's load order")?;
    let needs: HashMap<&str, &str> = order.lines().filter_map(|line| line.split_once(": ")).collect();
    let mut load: Vec<&str> = Vec::new();
    for module in machine.modules() {
        let before = needs.get(module).with_context(|| format!("the lab has no module {module}"))?;
        for name in before.split_whitespace().chain([module]) {
            if !load.contains(&name) {
                load.push(name);
                tree.file(&lab.folder.join(format!("modules/{name}.ko")), &format!("lab/modules/{name}.ko"))?;
            }
        }
    }
    tree.text("lab/load", &load.join("\n"));

    for file in &machine.files {
        let name = file.file_name().and_then(|n| n.to_str()).with_context(|| format!("{}: no name", file.display()))?;
        tree.file(file, &format!("case/{name}")).with_context(|| format!("{}", file.display()))?;
        for library in libraries(file)? {
            tree.file(&library, &library.to_string_lossy())?;
        }
    }
    tree.text("case/script", &format!(". /lab/functions\n{}", machine.script));
    tree.text("lab/settings", &settings(machine));
    Ok(tree)
}

fn settings(machine: &Machine) -> String {
    let shares: Vec<String> =
        machine.shares.iter().enumerate().map(|(n, share)| format!("share{n}:{}", share.place)).collect();
    let mut text = format!("vfs={}\naddress='{}'\nshares='{}'\n", machine.vfs, machine.network.2, shares.join(" "));
    for (name, value) in &machine.environment {
        text.push_str(&format!("export {name}='{value}'\n"));
    }
    text
}

/// The shared libraries that an ELF file needs, its loader included, as `ldd` names them.
fn libraries(file: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut magic = [0; 4];
    let is_elf = std::fs::File::open(file)?.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF";
    if !is_elf {
        return Ok(Vec::new());
    }
    let listing = Command::new("ldd").arg(file).output().context("ldd")?;
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    ensure!(!listing.contains("not found"), "{}: libraries are missing:\n{listing}", file.display());
    Ok(listing
        .lines()
        .filter_map(|line| line.split(" => ").last())
        .filter_map(|line| line.trim().split(" (0x").next())
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

const KERNEL: &str = "console=ttyS0 panic=-1 quiet loglevel=4 tsc=reliable no_timer_check random.trust_cpu=on mitigations=off \
                      nokaslr lsm=capability audit=0 cryptomgr.notests";

fn arguments(lab: &Lab, machine: &Machine, initrd: &Path) -> Vec<String> {
    let mut words: Vec<String> = [
        "-nodefaults -no-user-config -display none -no-reboot",
        "-M q35,usb=off,smbus=off -accel tcg,thread=multi -cpu max -smp 2",
        "-serial file:/dev/stderr -chardev stdio,id=case,signal=off -serial chardev:case",
    ]
    .iter()
    .flat_map(|line| line.split_whitespace().map(str::to_owned))
    .collect();
    let mut kernel = KERNEL.to_owned();
    if machine.kind == Kind::Passthrough {
        kernel.push_str(" intel_iommu=on");
        passthrough(machine, &mut words);
    }
    let mut give = |name: &str, value: String| words.extend([name.to_owned(), value]);
    give("-m", machine.memory_mib.to_string());
    give("-kernel", lab.folder.join("vmlinux").display().to_string());
    give("-initrd", initrd.display().to_string());
    give("-append", kernel);
    for (n, share) in machine.shares.iter().enumerate() {
        let path = share.folder.display().to_string().replace(',', ",,");
        let read_only = if share.read_only { ",readonly=on" } else { "" };
        give("-virtfs", format!("local,path={path},mount_tag=share{n},security_model=none{read_only}"));
    }
    words.extend(machine.qemu.iter().cloned());
    words
}

/// The devices of such a machine.
fn passthrough(machine: &Machine, words: &mut Vec<String>) {
    let mut device = |value: String| words.extend(["-device".to_owned(), value]);
    device("intel-iommu,intremap=on,caching-mode=on,device-iotlb=on".to_owned());
    device("pcie-root-port,id=port0,chassis=1,slot=1".to_owned());
    let (netdev, mac, _) = &machine.network;
    device(format!("igb,bus=port0,netdev=net0,mac={mac},romfile="));
    for n in 0..machine.edus {
        device(format!("edu,addr={:#x}", 0x10 + n));
    }
    words.extend(["-netdev".to_owned(), format!("{netdev},id=net0")]);
}

/// Boots two machines whose PFs are joined, and runs `script` in both, with SIDE (A or B), OWN and PEER (addresses) in
/// its environment and /pair as a folder that both share.
pub fn boot_pair(lab: &Lab, machine: &Machine, heard: impl Fn(&str, &str) + Sync) -> anyhow::Result<[Outcome; 2]> {
    let work = tempfile::tempdir().context("a folder for the pair")?;
    let shared = work.path().join("pair");
    std::fs::create_dir(&shared)?;
    let wire = |side: &str| work.path().join(format!("wire.{side}")).display().to_string();
    let prepare = |side: &str, other: &str, own: u8, peer: u8| {
        let mut half = machine.clone();
        let netdev =
            format!("dgram,local.type=unix,local.path={},remote.type=unix,remote.path={}", wire(side), wire(other));
        half.network = (netdev, format!("52:54:00:aa:00:{own:02x}"), format!("10.77.0.{own}"));
        half.shares.push(Share { folder: shared.clone(), place: "/pair".into(), read_only: false });
        half.environment.extend([
            ("SIDE".to_owned(), side.to_owned()),
            ("OWN".to_owned(), format!("10.77.0.{own}")),
            ("PEER".to_owned(), format!("10.77.0.{peer}")),
        ]);
        half
    };
    let (a, b) = (prepare("A", "B", 1, 2), prepare("B", "A", 2, 1));
    let heard = &heard;
    std::thread::scope(|scope| {
        let first = scope.spawn(move || boot(lab, &a, |line| heard("A", line)));
        let second = boot(lab, &b, |line| heard("B", line));
        let first = first.join().map_err(|_| anyhow::anyhow!("the thread of machine A panicked"))?;
        Ok([first.context("machine A")?, second.context("machine B")?])
    })
}

#[cfg(test)]
mod tests {
    use super::verdict;

    #[test]
    fn the_last_verdict_on_the_console_counts() {
        assert_eq!(verdict("noise\r\nLAB exit 3\r\n"), Some(Ok(3)));
        assert_eq!(verdict("LAB broken: module x\n"), Some(Err("broken: module x".into())));
        assert_eq!(verdict("panic\n"), None);
    }
}
