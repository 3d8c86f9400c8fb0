//! Two hosts in one process, each with a little guest that keeps its devices busy and checks what they do.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_mediate::control::config::{Config, DeviceConfig, Draft, Limits, OnStall, OpenBy};
use vfio_mediate::control::host::{Embedder, Host, StartError};
use vfio_mediate::control::machine::Machine;
use vfio_mediate::control::protocol::{Failure, Ownership, Response};
use vfio_mediate::control::socket::{Job, News};
use vfio_mediate::frontend::in_process::{GuestThread, InProcess};
use vfio_mediate::mediation::{MediatedDevice, VmmError, VmmPort};
use vfio_mediate::memory::{CpuDirt, DirtyLog, PAGE_SIZE};
use vfio_mediate::migration::cause::{Phase, Role};

use crate::guest::Guest;

pub const PATIENCE: Duration = Duration::from_secs(30);
pub const MEMORY: u64 = 1 << 20;

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for something that must come.
pub fn until(what: &str, mut come: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !come() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The edu plug-in, built once.
pub fn edu_plugin() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| crate::plugins::build_plugin("vfio-mediate-plugin-edu")).clone()
}

/// How one host differs from the usual one.
#[derive(Debug, Clone)]
pub struct Setup {
    pub devices: Vec<&'static str>,
    pub plugin: bool,
    pub memory: u64,
    pub listen: bool,
    pub limits: Limits,
    /// Nobody can tell what the vCPUs write
    pub no_cpu_dirt: bool,
}

impl Setup {
    pub fn new(device: &'static str) -> Self {
        let limits = Limits {
            on_stall: Some(OnStall::Force),
            answer_ms_max: Some(3_000),
            switchover_answer_ms_max: Some(3_000),
            record_ms_max: Some(3_000),
            ..Limits::default()
        };
        let plugin = device.starts_with("sim:edu");
        let (devices, memory) = (vec![device], MEMORY);
        Self { devices, plugin, memory, listen: false, limits, no_cpu_dirt: false }
    }

    pub fn listening(self) -> Self {
        Self { listen: true, ..self }
    }

    fn config(&self, folder: &Path) -> Config {
        let draft = Draft {
            devices: self
                .devices
                .iter()
                .map(|name| DeviceConfig {
                    name: name.parse().unwrap(),
                    open: OpenBy::Auto,
                    vf_token: None,
                    serve: None,
                })
                .collect(),
            plugins: if self.plugin { vec![edu_plugin().into()] } else { Vec::new() },
            memory: Some(self.memory.to_string().parse().unwrap()),
            control_socket: Some(folder.join("socket")),
            state_dir: Some(folder.to_path_buf()),
            listen: self.listen.then(|| "127.0.0.1:0".to_owned()),
            limits: self.limits,
            ..Draft::default()
        };
        draft.finish().unwrap()
    }
}

type Hook = Box<dyn Fn(Role, Phase) + Send>;

/// The program around one host.
pub struct World {
    setup: Setup,
    vm: OnceLock<Arc<Vm>>,
    hook: Mutex<Option<Hook>>,
    pub phases: Mutex<Vec<(Role, Phase)>>,
    pub running: AtomicU32,
    pub gone: AtomicU32,
}

impl Embedder for World {
    fn vmm(&self, machine: &Machine) -> Result<Arc<dyn VmmPort>, String> {
        let vm = Vm::new(machine, &self.setup);
        self.vm.set(Arc::clone(&vm)).map_err(|_| "two machines".to_owned())?;
        Ok(vm)
    }

    fn phase(&self, role: Role, phase: Phase) {
        lock(&self.phases).push((role, phase));
        if let Some(hook) = &*lock(&self.hook) {
            hook(role, phase);
        }
    }

    fn running(&self) {
        self.running.fetch_add(1, Ordering::SeqCst);
    }

    fn gone(&self) {
        self.gone.fetch_add(1, Ordering::SeqCst);
    }
}

/// The VMM: a gate for the guest's thread, and the watch over what it stores.
pub struct Vm {
    machine: Arc<InProcess>,
    devices: Mutex<Vec<Arc<MediatedDevice>>>,
    setup: Setup,
    kernel_watches: bool,
    watching: AtomicBool,
    /// Memory as it was when the guest was let run the first time
    arrived: Mutex<Option<Vec<u8>>>,
    resumed: AtomicU32,
    thread: Mutex<Option<JoinHandle<Result<(), String>>>>,
}

impl Vm {
    fn new(machine: &Machine, setup: &Setup) -> Arc<Self> {
        Arc::new(Self {
            machine: InProcess::paused(Arc::clone(&machine.memory)),
            devices: Mutex::new(machine.devices.clone()),
            setup: setup.clone(),
            kernel_watches: CpuDirt::supported().is_ok(),
            watching: AtomicBool::new(false),
            arrived: Mutex::new(None),
            resumed: AtomicU32::new(0),
            thread: Mutex::new(None),
        })
    }

    pub fn ram(&self) -> Vec<u8> {
        let mapping = self.machine.memory().ram().unwrap().mapping();
        let mut bytes = vec![0; mapping.len() as usize];
        mapping.read(0, &mut bytes).unwrap();
        bytes
    }

    fn live(machine: &InProcess, devices: &[Arc<MediatedDevice>], thread: &GuestThread) -> Result<(), String> {
        if !thread.checkpoint() {
            return Ok(());
        }
        let guest = Guest { ram: machine.memory().ram().unwrap().mapping(), devices };
        guest.wake()?;
        while thread.checkpoint() {
            guest.step()?;
            // A guest that stores without end would be a benchmark.
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

impl VmmPort for Vm {
    fn pause(&self, deadline: Instant) -> Result<(), VmmError> {
        self.machine.pause(deadline)
    }

    fn resume(&self) -> Result<(), VmmError> {
        if self.resumed.fetch_add(1, Ordering::SeqCst) == 0 {
            *lock(&self.arrived) = Some(self.ram());
            let (thread, machine) = (self.machine.attach(), Arc::clone(&self.machine));
            let devices = lock(&self.devices).clone();
            let run = move || Self::live(&machine, &devices, &thread);
            *lock(&self.thread) = Some(std::thread::spawn(run));
        }
        self.machine.resume()
    }

    fn start_cpu_dirt(&self) -> Result<(), VmmError> {
        if self.setup.no_cpu_dirt {
            return Err(VmmError { what: "no source of CPU dirt".to_owned(), errno: Errno::NOTSUP });
        }
        self.watching.store(true, Ordering::SeqCst);
        if self.kernel_watches { self.machine.start_cpu_dirt() } else { Ok(()) }
    }

    fn sync_cpu_dirt(&self, log: &DirtyLog) -> Result<(), VmmError> {
        assert!(self.watching.load(Ordering::SeqCst));
        if self.kernel_watches {
            return self.machine.sync_cpu_dirt(log);
        }
        // A kernel that does not tell: the pages that the guest's program may store into.
        let pages = self.machine.memory().ram().unwrap().pages();
        crate::guest::cpu_pages(pages).for_each(|page| log.mark_pages(page, 1).unwrap());
        Ok(())
    }

    fn stop_cpu_dirt(&self) {
        self.watching.store(false, Ordering::SeqCst);
        self.machine.stop_cpu_dirt();
    }
}

/// One host and its world.
pub struct Side {
    pub host: Arc<Host>,
    pub world: Arc<World>,
    pub folder: Arc<tempfile::TempDir>,
}

impl Side {
    pub fn start(setup: Setup) -> Self {
        Self::start_in(setup, Arc::new(tempfile::tempdir().unwrap())).unwrap()
    }

    pub fn start_in(setup: Setup, folder: Arc<tempfile::TempDir>) -> Result<Self, StartError> {
        let config = setup.config(folder.path());
        let world = Arc::new(World {
            setup,
            vm: OnceLock::new(),
            hook: Mutex::new(None),
            phases: Mutex::new(Vec::new()),
            running: AtomicU32::new(0),
            gone: AtomicU32::new(0),
        });
        let host = Host::start(config, Arc::clone(&world) as Arc<dyn Embedder>)?;
        Ok(Self { host, world, folder })
    }

    pub fn address(&self) -> SocketAddr {
        self.host.listening().unwrap()
    }

    pub fn vm(&self) -> &Vm {
        self.world.vm.get().unwrap()
    }

    pub fn on_phase(&self, hook: impl Fn(Role, Phase) + Send + 'static) {
        *lock(&self.world.hook) = Some(Box::new(hook));
    }

    pub fn no_hook(&self) {
        lock(&self.world.hook).take();
    }

    fn guest(&self) -> Guest<'_> {
        Guest { ram: self.vm().machine.memory().ram().unwrap().mapping(), devices: &[] }
    }

    pub fn steps(&self) -> u64 {
        self.guest().steps()
    }

    /// Keeps the next migration out of its downtime until device 0 has written memory that was sent before.
    pub fn wait_for_dma_before_pausing(&self) {
        let world = Arc::downgrade(&self.world);
        self.on_phase(move |role, phase| {
            let Some(world) = world.upgrade().filter(|_| (role, phase) == (Role::Source, Phase::Pausing)) else {
                return;
            };
            let machine = &world.vm.get().unwrap().machine;
            let guest = Guest { ram: machine.memory().ram().unwrap().mapping(), devices: &[] };
            let before = guest.rungs();
            until("two DMAs", || guest.rungs() > before + 2);
        });
    }

    /// Whether the guest may execute here.
    pub fn runs(&self) -> bool {
        let vm = self.vm();
        vm.resumed.load(Ordering::SeqCst) > 0 && !vm.machine.is_paused()
    }

    pub fn ownership(&self) -> Ownership {
        self.host.ownership().0
    }

    #[track_caller]
    pub fn assert_runs(&self) {
        assert_eq!(self.ownership(), Ownership::Here, "{:?}", self.host.ownership());
        let before = (self.steps(), self.guest().rungs());
        until("the next step of guest and device", || {
            (self.steps() > before.0 + 3 && self.guest().rungs() > before.1 + 1) || self.guest_failed()
        });
        assert!(!self.guest_failed(), "{:?}", self.end_guest());
    }

    fn guest_failed(&self) -> bool {
        lock(&self.vm().thread).as_ref().is_some_and(JoinHandle::is_finished)
    }

    pub fn migrate(&self, to: SocketAddr) -> Result<serde_json::Value, Failure> {
        self.migrate_with(to, false)
    }

    pub fn migrate_with(&self, to: SocketAddr, verify: bool) -> Result<serde_json::Value, Failure> {
        wait(&*self.host.migrate(&to.to_string(), false, verify)?)
    }

    fn end_guest(&self) -> Result<(), String> {
        let vm = self.vm();
        vm.machine.end();
        match lock(&vm.thread).take() {
            Some(thread) => thread.join().unwrap(),
            None => Ok(()),
        }
    }

    /// Ends guest and host; tells where the state is, for a host that comes after.
    #[track_caller]
    pub fn stop(self) -> Arc<tempfile::TempDir> {
        self.end_guest().unwrap();
        lock(&self.vm().devices).clear();
        let begun = Instant::now();
        self.host.stop(begun + PATIENCE).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        Arc::clone(&self.folder)
    }
}

pub fn wait(job: &Job) -> Result<serde_json::Value, Failure> {
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut seen = 0;
    loop {
        match job.next(seen, Duration::from_secs(1)) {
            News::Progress { number, .. } => seen = number,
            News::End(Response::Migrated { report }) => return Ok(*report),
            News::End(Response::Error(failure)) => return Err(failure),
            News::End(other) => panic!("{other:?}"),
            News::Silence => assert!(Instant::now() < deadline, "the migration does not end"),
        }
    }
}

/// A first difference between two memories, by page.
pub fn difference(one: &[u8], other: &[u8]) -> Option<u64> {
    assert_eq!(one.len(), other.len());
    let pages = one.chunks(PAGE_SIZE as usize).zip(other.chunks(PAGE_SIZE as usize));
    pages.zip(0..).find(|((a, b), _)| a != b).map(|(_, page)| page)
}

/// The guest moved: memory is equal byte for byte, it runs there, it does not run here.
#[track_caller]
pub fn assert_moved(from: &Side, to: &Side) {
    until("the guest", || to.ownership() == Ownership::Here);
    assert_eq!(from.ownership(), Ownership::Elsewhere);
    assert!(!from.runs());
    assert_eq!(from.world.gone.load(Ordering::SeqCst), 1);
    until("running()", || to.world.running.load(Ordering::SeqCst) == 1);
    let arrived = lock(&to.vm().arrived).clone().unwrap();
    assert_eq!(difference(&from.vm().ram(), &arrived), None, "memory differs from this page on");
    to.assert_runs();
}

/// The guest moves, with its memory equal.
#[track_caller]
pub fn move_guest(from: &Side, to: &Side) -> serde_json::Value {
    let report = from.migrate(to.address()).unwrap();
    assert_moved(from, to);
    report
}
