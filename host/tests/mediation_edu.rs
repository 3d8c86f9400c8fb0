//! The simulated edu device under its real plug-in, loaded from its `.so`: hooks, dirty pages, and a move to another device.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_mediate::device::sim::{Edu, EduOptions, Time, VirtualClock};
use vfio_mediate::mediation::{MediatedDevice, Tracking};
use vfio_mediate::memory::{AddressSpace, GuestRam, IovaMapping};
use vfio_mediate::plugin::{Library, Limits, Registry};
use vfio_mediate_sdk::state::DeviceState;

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
const FACTORIAL: u64 = 0x08;
const BUFFER: u64 = 0x40000;
const LENGTH: usize = 256;

/// Builds the plug-in into this build's own target directory.
fn plugin() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "vfio-mediate-plugin-edu", "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success());
    target.join("debug/libvfio_mediate_plugin_edu.so")
}

struct Host {
    clock: Arc<VirtualClock>,
    edu: Arc<Edu>,
    device: Arc<MediatedDevice>,
}

impl Host {
    fn new(registry: &Registry) -> Self {
        let clock = VirtualClock::new();
        let edu = Edu::new(EduOptions { time: Time::Virtual(clock.clone()), ..EduOptions::default() }).unwrap();
        let memory = AddressSpace::new(GuestRam::new(PAGES * PAGE).unwrap());
        let device = MediatedDevice::open(edu.clone(), registry, memory).unwrap();
        let map = IovaMapping { iova: 0, length: PAGES * PAGE, ram_offset: 0, read: true, write: true };
        device.dma_map(map).unwrap();
        Self { clock, edu, device }
    }

    fn write(&self, register: u64, value: u32) {
        self.device.region_write(0, register, &value.to_le_bytes()).unwrap();
    }

    fn read(&self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.device.region_read(0, register, &mut value).unwrap();
        u32::from_le_bytes(value)
    }

    fn wide(&self, register: u64, value: u64) {
        self.device.region_write(0, register, &value.to_le_bytes()).unwrap();
    }

    fn dma(&self, source: u64, destination: u64, command: u64) {
        self.wide(0x80, source);
        self.wide(0x88, destination);
        self.wide(0x90, LENGTH as u64);
        self.wide(0x98, command);
    }

    fn ram(&self, offset: u64) -> Vec<u8> {
        let mut data = vec![0; LENGTH];
        self.device.memory().ram().unwrap().mapping().read(offset, &mut data).unwrap();
        data
    }

    fn drained(&self) -> Vec<u64> {
        let drain = self.device.memory().log().drain();
        let pages = drain.runs().flat_map(|run| run.first..run.first + run.count).collect();
        drain.commit();
        pages
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// spec: STATE-5 SAVED-1 TRACK-2
#[test]
fn an_edu_moves_to_another_device_with_its_hidden_buffer() {
    let registry = Registry::new();
    registry.register(Library::open(&plugin()).unwrap(), Limits { devices_max: 2 }).unwrap();
    let source = Host::new(&registry);
    assert_eq!(source.device.plugin().unwrap().name, "edu");
    source.device.region_write(7, 4, &[6, 0]).unwrap();

    // Into the hidden buffer, and a result that nobody can write.
    let pattern: Vec<u8> = (0..LENGTH).map(|at| (at * 7 + 3) as u8).collect();
    source.device.memory().ram().unwrap().mapping().write(PAGE, &pattern).unwrap();
    source.dma(PAGE, BUFFER, 1);
    source.write(FACTORIAL, 6);
    source.clock.advance(Duration::from_millis(150));
    assert_eq!(source.read(FACTORIAL), 720);
    assert_eq!(source.edu.hidden_buffer()[..LENGTH], pattern);

    // What it writes while tracked is dirty.
    assert!(matches!(source.device.start_tracking().unwrap(), Tracking::Plugin(_)));
    source.device.sync_dirty().unwrap();
    source.drained();
    source.dma(BUFFER, 3 * PAGE, 3);
    source.clock.advance(Duration::from_millis(150));
    source.device.sync_dirty().unwrap();
    assert!(source.drained().contains(&3));
    assert_eq!(source.ram(3 * PAGE), pattern);

    // One more is in flight when it is stopped.
    source.dma(BUFFER, 9 * PAGE, 3);
    source.device.set_state(DeviceState::StopCopy, soon()).unwrap();
    source.device.sync_dirty().unwrap();
    assert!(source.drained().contains(&9));
    assert_eq!(source.ram(9 * PAGE), pattern);
    let mut stream = Vec::new();
    let mut buffer = vec![0; 8192];
    loop {
        let saved = source.device.save(&mut buffer).unwrap();
        stream.extend_from_slice(&buffer[..saved.bytes]);
        if saved.end {
            break;
        }
    }

    let target = Host::new(&registry);
    target.device.check_match(&source.device.match_data().unwrap()).unwrap();
    target.device.set_state(DeviceState::Resuming, soon()).unwrap();
    for piece in stream.chunks(100) {
        target.device.load(piece).unwrap();
    }
    target.device.set_state(DeviceState::Running, soon()).unwrap();
    assert_eq!(target.edu.hidden_buffer(), source.edu.hidden_buffer());
    assert_eq!(target.read(FACTORIAL), 720);
    target.dma(BUFFER, 5 * PAGE, 3);
    target.clock.advance(Duration::from_millis(150));
    assert_eq!(target.ram(5 * PAGE), pattern);
    assert!(target.edu.dma_faults().is_empty() && source.edu.dma_faults().is_empty());
    source.device.stop_tracking();
    drop((source, target));
    assert!(registry.list().iter().all(|plugin| plugin.devices.is_empty()));
    registry.shutdown(soon()).unwrap();
}
