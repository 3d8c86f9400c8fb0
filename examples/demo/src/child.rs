//! One host process: the production library with a guest inside.
//!
//! **Owns** the guest's thread and what it is told to break. **Must never** do what the library does: devices, plug-ins,
//! memory, journal, migration and control socket are `vfio_mediate::control`'s.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use vfio_mediate::control::config::Draft;
use vfio_mediate::control::host::{Embedder, Host};
use vfio_mediate::control::machine::Machine;
use vfio_mediate::control::service::{HostService, STOP_PATIENCE, backend_name};
use vfio_mediate::control::socket::{Patience, Server};
use vfio_mediate::frontend::in_process::{GuestThread, InProcess, IrqLine};
use vfio_mediate::mediation::{MediatedDevice, VmmError, VmmPort};
use vfio_mediate::memory::{AddressSpace, DirtyLog};
use vfio_mediate::migration::cause::{Phase, Role};
use vfio_mediate::sys::Mapping;

use crate::cli::{Fault, HostArgs};
use crate::guest::{Caught, Guest};
use crate::platform::Platform;
use crate::protocol::{Command, Event, Plugin};
use crate::witness::Heart;

/// edu has one interrupt: MSI, `VFIO_PCI_MSI_IRQ_INDEX`.
const MSI: u32 = 1;
const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
/// Memory space and bus master.
const COMMAND_ON: u16 = 0x6;
const PAYLOAD_PAGES: u64 = 16;
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

fn tell(event: &Event) {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    // A parent that has gone needs no news.
    let _ = std::io::stdout().lock().write_all(&line);
}

pub fn run(args: &HostArgs) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter).init();
    let outcome = serve(args);
    if let Err(error) = &outcome {
        tell(&Event::Failed { what: format!("{error:#}") });
    }
    outcome
}

fn serve(args: &HostArgs) -> anyhow::Result<()> {
    let mut draft = Draft {
        plugins: args.load.plugin.iter().cloned().map(Into::into).collect(),
        memory: Some(args.load.memory.parse()?),
        control_socket: Some(args.control.clone()),
        state_dir: Some(args.state.clone()),
        listen: args.listen.map(|address| address.to_string()),
        insecure: args.insecure,
        ..Draft::default()
    };
    draft.devices.push(vfio_mediate::control::config::DeviceConfig {
        name: args.device.parse()?,
        open: match args.load.open {
            crate::cli::Open::Auto => vfio_mediate::control::config::OpenBy::Auto,
            crate::cli::Open::Group => vfio_mediate::control::config::OpenBy::Group,
            crate::cli::Open::Cdev => vfio_mediate::control::config::OpenBy::Cdev,
        },
        vf_token: None,
        serve: None,
    });
    // A guest on an emulated machine, or one that dirties fast, may take longer than an operator would like.
    draft.limits.on_stall = Some(vfio_mediate::control::config::OnStall::Force);
    let config = draft.finish()?;

    let ends = Arc::new(End::default());
    let embedder = Arc::new(DemoEmbedder { args: args.clone(), vmm: OnceLock::new() });
    let host = Host::start(config, Arc::<DemoEmbedder>::clone(&embedder) as Arc<dyn Embedder>)?;
    let ended = Arc::clone(&ends);
    let server =
        Server::start(&args.control, HostService::new(Arc::clone(&host), move || ended.come()), Patience::default())?;
    let vmm = embedder.vmm.get().context("the machine was never made")?;
    introduce(&host, vmm);
    let (commanded, asked) = (Arc::clone(&ends), Arc::clone(vmm));
    std::thread::Builder::new().name("commands".into()).spawn(move || obey(&asked, &commanded))?;
    ends.wait();
    drop(server);
    vmm.machine.end();
    host.stop(Instant::now() + STOP_PATIENCE).map_err(|failure| anyhow::anyhow!("{failure}"))
}

/// The end of this process, when somebody asks for it.
#[derive(Debug, Default)]
struct End {
    come: Mutex<bool>,
    changed: Condvar,
}

impl End {
    fn come(&self) {
        *self.come.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut come = self.come.lock().unwrap_or_else(PoisonError::into_inner);
        while !*come {
            come = self.changed.wait(come).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn introduce(host: &Host, vmm: &DemoVmm) {
    let identity = vmm.device.identity();
    tell(&Event::Ready {
        pid: std::process::id(),
        device: identity.name.clone(),
        backend: backend_name(identity.backend).to_owned(),
        plugin: vmm.device.plugin().map(|p| Plugin { name: p.name, version: p.version, path: p.path }),
        listen: host.listening().map(|address| address.to_string()),
    });
}

/// Commands of the parent. Its end of the pipe closed means that it has gone: so does this process.
fn obey(vmm: &DemoVmm, ends: &End) {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match serde_json::from_str(&line) {
            Ok(Command::Check) => vmm.check.store(true, Ordering::Release),
            Ok(Command::Stop) => break,
            Err(error) => tell(&Event::Failed { what: format!("command {line:?}: {error}") }),
        }
    }
    ends.come();
}

#[derive(Debug)]
struct DemoEmbedder {
    args: HostArgs,
    vmm: OnceLock<Arc<DemoVmm>>,
}

impl Embedder for DemoEmbedder {
    fn vmm(&self, machine: &Machine) -> Result<Arc<dyn VmmPort>, String> {
        let device = machine.devices.first().ok_or("the demo needs a device")?;
        // Before any state is loaded: an interrupt that was pending at the source is raised while the device starts here.
        let irq = IrqLine::connect(device, MSI, 0).map_err(|error| format!("connecting the interrupt: {error}"))?;
        let vmm = Arc::new(DemoVmm {
            machine: InProcess::paused(Arc::clone(&machine.memory)),
            device: Arc::clone(device),
            irq: Mutex::new(Some(irq)),
            args: self.args.clone(),
            started: AtomicBool::new(false),
            check: Arc::default(),
        });
        self.vmm.set(Arc::clone(&vmm)).map_err(|_| "two machines in one process".to_owned())?;
        Ok(vmm)
    }

    fn phase(&self, _role: Role, phase: Phase) {
        let name = phase_name(phase);
        tell(&Event::Phase { name: name.clone() });
        if self.args.hold.as_deref() == Some(&name) {
            tell(&Event::Holding { name });
            loop {
                // Until this process is killed: that is what holding is for.
                std::thread::park();
            }
        }
    }

    fn running(&self) {
        tell(&Event::Running);
    }

    fn gone(&self) {
        let Some(vmm) = self.vmm.get() else { return };
        if let Some(path) = &self.args.dump {
            vmm.dump(path);
        }
        if self.args.fault == Some(Fault::Commit) {
            // The fault that must never happen: the source goes on although the destination took over.
            if let Err(error) = vmm.machine.resume() {
                tell(&Event::Failed { what: error.to_string() });
            }
        }
    }
}

/// A phase as reports name it.
pub fn phase_name(phase: Phase) -> String {
    serde_json::to_value(phase).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The in-process front-end, with the demo's guest on it.
#[derive(Debug)]
struct DemoVmm {
    machine: Arc<InProcess>,
    device: Arc<MediatedDevice>,
    /// Until the guest's thread takes it
    irq: Mutex<Option<IrqLine>>,
    args: HostArgs,
    started: AtomicBool,
    /// The parent wants every byte checked
    check: Arc<AtomicBool>,
}

impl VmmPort for DemoVmm {
    fn pause(&self, deadline: Instant) -> Result<(), VmmError> {
        self.machine.pause(deadline)
    }

    fn resume(&self) -> Result<(), VmmError> {
        if !self.started.swap(true, Ordering::AcqRel) {
            let failed = |error: anyhow::Error| VmmError {
                what: format!("starting the guest: {error:#}"),
                errno: rustix::io::Errno::IO,
            };
            self.start_guest().map_err(failed)?;
        }
        self.machine.resume()
    }

    fn start_cpu_dirt(&self) -> Result<(), VmmError> {
        self.machine.start_cpu_dirt()
    }

    fn sync_cpu_dirt(&self, log: &DirtyLog) -> Result<(), VmmError> {
        self.machine.sync_cpu_dirt(log)
    }

    fn stop_cpu_dirt(&self) {
        self.machine.stop_cpu_dirt();
    }
}

impl DemoVmm {
    fn dump(&self, path: &PathBuf) {
        match write_image(self.machine.memory().ram().expect("RAM of its own").mapping(), path) {
            Ok(bytes) => tell(&Event::Dumped { path: path.display().to_string(), bytes }),
            Err(error) => tell(&Event::Failed { what: format!("{}: {error:#}", path.display()) }),
        }
    }

    /// The guest's thread, still waiting at its first checkpoint. A guest that arrived is found in memory; otherwise a
    /// new one is made.
    fn start_guest(&self) -> anyhow::Result<()> {
        let arrived = self.args.listen.is_some();
        if let (true, Some(path)) = (arrived, &self.args.dump) {
            self.dump(path);
        }
        if !arrived {
            let mut command = [0; 2];
            self.device.region_read(CONFIG, COMMAND, &mut command)?;
            let command = u16::from_le_bytes(command) | COMMAND_ON;
            self.device.region_write(CONFIG, COMMAND, &command.to_le_bytes())?;
        }
        let irq = self.irq.lock().unwrap_or_else(PoisonError::into_inner).take();
        let platform = HostPlatform {
            memory: Arc::clone(self.machine.memory()),
            device: Arc::clone(&self.device),
            irq: irq.filter(|_| self.args.fault != Some(Fault::Irq) || !arrived),
        };
        if arrived {
            self.damage()?;
        }
        let heart = Heart::new(self.args.witness, arrived)?;
        let thread = self.machine.attach();
        let (args, check) = (self.args.clone(), Arc::clone(&self.check));
        std::thread::Builder::new().name("guest".into()).spawn(move || {
            if let Err(error) = live(platform, &args, arrived, &thread, &heart, &check) {
                tell(&match error.downcast_ref::<Caught>() {
                    Some(caught) => Event::Caught { oracle: caught.oracle.to_owned(), what: caught.what.clone() },
                    None => Event::Failed { what: format!("{error:#}") },
                });
            }
        })?;
        Ok(())
    }

    /// What `--break` asks for, at the destination.
    fn damage(&self) -> anyhow::Result<()> {
        let ram = self.machine.memory().ram().expect("RAM of its own").mapping();
        match self.args.fault {
            Some(Fault::Page) => {
                let address = crate::layout::State { ram }.places()?.cpu_first * vfio_mediate::memory::PAGE_SIZE;
                let mut byte = [0];
                ram.read(address + 99, &mut byte)?;
                ram.write(address + 99, &[byte[0] ^ 1])?;
            }
            Some(Fault::Device) => self.device.region_write(BAR0, 4, &0u32.to_le_bytes())?,
            Some(Fault::Irq | Fault::Commit) | None => {}
        }
        Ok(())
    }
}

/// The guest's life on this host: from its first checkpoint until it is ended.
fn live(
    platform: HostPlatform,
    args: &HostArgs,
    arrived: bool,
    thread: &GuestThread,
    heart: &Heart,
    check: &AtomicBool,
) -> anyhow::Result<()> {
    // Nothing of the guest is touched before it may run.
    if !thread.checkpoint() {
        return Ok(());
    }
    let mut guest = if arrived {
        let guest = Guest::attach(platform, args.load.dirty_rate)?;
        tell(&Event::Checked { pages: guest.check_everything()? });
        guest
    } else {
        Guest::create(platform, args.load.seed, PAYLOAD_PAGES, args.load.dirty_rate)?
    };
    let mut told = Instant::now();
    while thread.checkpoint() {
        heart.beat(guest.heartbeat()?);
        guest.step()?;
        if check.swap(false, Ordering::AcqRel) {
            tell(&Event::Checked { pages: guest.check_everything()? });
        }
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            let [rounds, stores, interrupts] = guest.progress()?;
            tell(&Event::Progress { rounds, stores, interrupts });
        }
    }
    Ok(())
}

/// RAM by plain stores, the device by way of its mediation, the interrupt by an eventfd.
#[derive(Debug)]
struct HostPlatform {
    memory: Arc<AddressSpace>,
    device: Arc<MediatedDevice>,
    /// `None`: somebody forgot to connect it
    irq: Option<IrqLine>,
}

impl Platform for HostPlatform {
    fn ram(&self) -> &Mapping {
        self.memory.ram().expect("RAM of its own").mapping()
    }

    fn read32(&self, offset: u64) -> anyhow::Result<u32> {
        let mut bytes = [0; 4];
        self.device.region_read(BAR0, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn write32(&self, offset: u64, value: u32) -> anyhow::Result<()> {
        Ok(self.device.region_write(BAR0, offset, &value.to_le_bytes())?)
    }

    fn write64(&self, offset: u64, value: u64) -> anyhow::Result<()> {
        Ok(self.device.region_write(BAR0, offset, &value.to_le_bytes())?)
    }

    fn wait_irq(&self, patience: Duration) -> anyhow::Result<bool> {
        match &self.irq {
            Some(line) => Ok(line.wait(patience)? > 0),
            None => {
                std::thread::sleep(patience);
                Ok(false)
            }
        }
    }

    fn irq_patience(&self) -> Duration {
        // edu's DMA takes 100 ms, and a migration may stretch that; an emulated machine is slower still.
        Duration::from_secs(10)
    }
}

fn write_image(ram: &Mapping, path: &PathBuf) -> anyhow::Result<u64> {
    let file = std::fs::File::create(path).context("creating the image")?;
    let mut out = std::io::BufWriter::new(file);
    let mut chunk = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < ram.len() {
        let length = chunk.len().min((ram.len() - offset) as usize);
        ram.read(offset, &mut chunk[..length])?;
        out.write_all(&chunk[..length])?;
        offset += length as u64;
    }
    out.flush()?;
    Ok(offset)
}
