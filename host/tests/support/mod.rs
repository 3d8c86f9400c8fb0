//! Plug-ins for tests: built here, in C by the C compiler and in Rust by cargo, and driven from here.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_mediate::plugin::{
    CallFrame, HostCalls, IrqRequest, Library, Limits, OpenDevice, OpenError, Origin, PluginId, ProbeIdentity,
    Registry, Request, ScratchMemory,
};
use vfio_mediate_sdk::abi;

pub const VENDOR: u16 = 0x1af4;

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// A folder of this test program's own.
pub fn folder() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(program.file_name().unwrap());
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Builds a package of the workspace that has a `cdylib`, offline, with this test's own profile and target directory, and
/// tells where the library is.
pub fn build_plugin(package: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--offline", "--message-format=json-render-diagnostics", "--package", package]);
    cargo.arg("--manifest-path").arg(root().join("Cargo.toml")).arg("--target-dir").arg(target);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let output = cargo.output().expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let library = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let id = message.get("package_id")?.as_str()?;
        if !id.contains(package) {
            return None;
        }
        let files = message.get("filenames")?.as_array()?;
        files.iter().filter_map(|file| file.as_str()).find(|file| file.ends_with(".so")).map(PathBuf::from)
    };
    let output = String::from_utf8_lossy(&output.stdout);
    output.lines().find_map(library).unwrap_or_else(|| panic!("{package} has no shared library:\n{output}"))
}

/// Compiles C into `name`, with macros (`NAME` or `NAME=value`) and further arguments.
pub fn compile(name: &str, source: impl AsRef<Path>, macros: &[&str], arguments: &[&str]) -> PathBuf {
    let file = folder().join(name);
    // Another thread or process may be loading it, or building the same.
    static BUILDS: AtomicU32 = AtomicU32::new(0);
    let build = BUILDS.fetch_add(1, Ordering::Relaxed);
    let fresh = folder().join(format!("{name}.{}.{build}", std::process::id()));
    let output = Command::new("gcc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-I"])
        .arg(root().join("spec/include"))
        .args(macros.iter().map(|each| format!("-D{each}")))
        .args(arguments)
        .arg(root().join("host/tests/plugins_src").join(source))
        .arg("-o")
        .arg(&fresh)
        .output()
        .expect("a C compiler, gcc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&fresh, &file).unwrap();
    file
}

/// The scripted plug-in with other macros; `name` is also the plug-in's.
pub fn scripted(name: &str, macros: &[&str]) -> PathBuf {
    let own = format!("NAME=\"{name}\"");
    let has_name = macros.iter().any(|each| each.starts_with("NAME="));
    let all: Vec<&str> = macros.iter().copied().chain((!has_name).then_some(own.as_str())).collect();
    compile(&format!("{name}.so"), "scripted.c", &all, &["-shared"])
}

pub fn load(path: impl AsRef<Path>) -> Library {
    Library::open(path.as_ref()).unwrap_or_else(|error| panic!("{error}"))
}

/// What the scripted plug-in is told, and what it tells. In step with `struct script` of `scripted.c`, which ends the test
/// when the sizes differ.
#[repr(C)]
#[derive(Debug)]
pub struct Script {
    size: u64,
    pub probe_answer: AtomicI32,
    pub open_answer: AtomicI32,
    pub rw_answer: AtomicI32,
    pub set_state_answer: AtomicI32,
    pub actual_state: AtomicU32,
    pub save_answer: AtomicI32,
    pub save_length: AtomicU64,
    pub spoiled: AtomicU32,
    pub deed: AtomicU32,
    pub argument: AtomicU64,
    pub deed_status: AtomicI32,
    pub closed_gate: AtomicU32,
    pub inside: AtomicU32,
    pub probes: AtomicU32,
    pub opens: AtomicU32,
    pub closes: AtomicU32,
    pub accesses: AtomicU32,
    pub retires: AtomicU32,
    pub after_retire: AtomicU32,
    pub stale_context: AtomicU64,
}

/// `deed` of the script, as `scripted.c` numbers them.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub enum Deed {
    None,
    KeepContext,
    UseStale,
    NullContext,
    NullData,
    Huge,
    Wrap,
    Forged,
    Scratch,
    ShortInfo,
    BadIrqs,
    Default,
    Fill,
    Log,
    Request,
    Tamper,
}

impl Script {
    /// Claims, opens, and handles every access. Lives for ever: a plug-in remembers it.
    pub fn new() -> &'static Self {
        Box::leak(Box::new(Self {
            size: size_of::<Self>() as u64,
            probe_answer: AtomicI32::new(abi::PROBE_CLAIM),
            open_answer: AtomicI32::new(0),
            rw_answer: AtomicI32::new(abi::VERDICT_HANDLED),
            set_state_answer: AtomicI32::new(0),
            actual_state: AtomicU32::new(0),
            save_answer: AtomicI32::new(0),
            save_length: AtomicU64::new(0),
            spoiled: AtomicU32::new(0),
            deed: AtomicU32::new(0),
            argument: AtomicU64::new(0),
            deed_status: AtomicI32::new(0),
            closed_gate: AtomicU32::new(0),
            inside: AtomicU32::new(0),
            probes: AtomicU32::new(0),
            opens: AtomicU32::new(0),
            closes: AtomicU32::new(0),
            accesses: AtomicU32::new(0),
            retires: AtomicU32::new(0),
            after_retire: AtomicU32::new(0),
            stale_context: AtomicU64::new(0),
        }))
    }

    pub fn declining() -> &'static Self {
        let script = Self::new();
        script.probe_answer.store(abi::PROBE_DECLINE, Ordering::SeqCst);
        script
    }

    /// What the plug-in finds it by.
    fn config(&'static self) -> [u8; 8] {
        (std::ptr::from_ref(self).expose_provenance() as u64).to_ne_bytes()
    }

    pub fn probes(&self) -> u32 {
        self.probes.load(Ordering::SeqCst)
    }

    pub fn opens(&self) -> u32 {
        self.opens.load(Ordering::SeqCst)
    }

    pub fn closes(&self) -> u32 {
        self.closes.load(Ordering::SeqCst)
    }

    pub fn retires(&self) -> u32 {
        self.retires.load(Ordering::SeqCst)
    }

    pub fn after_retire(&self) -> u32 {
        self.after_retire.load(Ordering::SeqCst)
    }

    pub fn close_gate(&self) {
        self.closed_gate.store(1, Ordering::SeqCst);
    }

    pub fn open_gate(&self) {
        self.closed_gate.store(0, Ordering::SeqCst);
    }

    /// Returns once somebody waits in front of the gate.
    pub fn await_inside(&self) {
        eventually(|| self.inside.load(Ordering::SeqCst) > 0);
    }

    pub fn act(&self, deed: Deed, argument: u64) {
        self.argument.store(argument, Ordering::SeqCst);
        self.deed.store(deed as u32, Ordering::SeqCst);
    }
}

/// Waits for something that will happen, as long as it takes; a minute says that it will not.
pub fn eventually(happened: impl Fn() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never happened");
        std::thread::yield_now();
    }
}

pub const FRAME: CallFrame<'static> = CallFrame::new(Origin::Client);
pub const ONE: Limits = Limits { devices_max: 1 };
pub const MANY: Limits = Limits { devices_max: u32::MAX };

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// A device of nine regions and five irq indices.
pub fn identity<'a>(name: &'a str, config: &'a [u8]) -> ProbeIdentity<'a> {
    ProbeIdentity {
        name,
        backend: abi::BACKEND_SIM,
        vendor_id: VENDOR,
        device_id: 1,
        subsystem_vendor_id: 0,
        subsystem_device_id: 0,
        class_code: 0x02_0000,
        revision: 0,
        num_regions: 9,
        num_irqs: 5,
        config,
    }
}

pub fn open(registry: &Registry, name: &str, script: &'static Script) -> Result<Option<OpenDevice>, OpenError> {
    open_with(registry, name, script, Arc::new(Host::default()))
}

pub fn open_with(
    registry: &Registry,
    name: &str,
    script: &'static Script,
    host: Arc<Host>,
) -> Result<Option<OpenDevice>, OpenError> {
    registry.open(&identity(name, &script.config()), host)
}

pub fn opened(registry: &Registry, name: &str, script: &'static Script) -> OpenDevice {
    open(registry, name, script).unwrap_or_else(|error| panic!("{error}")).expect("a plug-in claims it")
}

/// A registry with one plug-in.
pub fn with_plugin(path: impl AsRef<Path>, limits: Limits) -> (Arc<Registry>, PluginId) {
    let registry = Registry::new();
    let id = registry.register(load(path), limits).unwrap();
    (registry, id)
}

/// How many copies of a library of this name are open in this process.
pub fn copies_of(name: &str) -> usize {
    let link = format!("/memfd:{name} (deleted)");
    let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    all.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new(&link))).count()
}

/// Host services over a region that reads as its offsets; counts what is asked.
#[derive(Debug, Default)]
pub struct Host {
    pub reads: AtomicU32,
    pub writes: AtomicU32,
    pub defaults: AtomicU32,
    pub scratches: AtomicU32,
    pub requests: std::sync::Mutex<Vec<Request>>,
    pub panics: std::sync::atomic::AtomicBool,
}

impl HostCalls for Host {
    fn region_read(&self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        assert!(!self.panics.load(Ordering::SeqCst), "the host's own mistake");
        self.reads.fetch_add(1, Ordering::SeqCst);
        for (at, byte) in (offset..).zip(data) {
            *byte = at as u8;
        }
        Ok(())
    }

    fn region_write(&self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn default_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.defaults.fetch_add(1, Ordering::SeqCst);
        self.region_read(region, offset, data)
    }

    fn default_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.defaults.fetch_add(1, Ordering::SeqCst);
        self.region_write(region, offset, data)
    }

    fn region_info(&self, index: u32) -> Result<abi::RegionInfo, Errno> {
        Ok(abi::RegionInfo { struct_size: 0, index, flags: 3, reserved: 0, size: 0x1000 })
    }

    fn irq_info(&self, index: u32) -> Result<abi::IrqInfo, Errno> {
        Ok(abi::IrqInfo { struct_size: 0, index, flags: 1, count: 1 })
    }

    fn set_irqs(&self, _request: &IrqRequest<'_>) -> Result<(), Errno> {
        Ok(())
    }

    fn guest_read(&self, _iova: u64, _data: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::FAULT)
    }

    fn guest_write(&self, _iova: u64, _data: &[u8]) -> Result<(), Errno> {
        Err(Errno::FAULT)
    }

    fn mark_dirty(&self, _iova: u64, _length: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn scratch_alloc(&self, length: u64, _address_bits: u32) -> Result<ScratchMemory, Errno> {
        self.scratches.fetch_add(1, Ordering::SeqCst);
        Ok(ScratchMemory { iova: 0x1_0000, length, address: 0 })
    }

    fn scratch_free(&self, _iova: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn irq_inject(&self, _index: u32, _vector: u32) -> Result<(), Errno> {
        Ok(())
    }

    fn request(&self, request: Request) -> Result<(), Errno> {
        self.requests.lock().unwrap().push(request);
        Ok(())
    }

    fn now(&self) -> u64 {
        0
    }

    fn wait(&self, _nanoseconds: u64, _deadline: u64, _cancelled: &dyn Fn() -> bool) -> Result<(), Errno> {
        Ok(())
    }

    fn timer_arm(&self, _cookie: u64, _nanoseconds: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn timer_cancel(&self, _cookie: u64) -> Result<(), Errno> {
        Ok(())
    }
}
