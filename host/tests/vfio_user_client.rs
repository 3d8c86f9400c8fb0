//! Our client and our server: a device used, moved from one server to another, lost and found again.

#[allow(dead_code)]
mod cli_support;
mod vfio_user_support;

use std::collections::BTreeSet;
use std::io::{BufRead, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_mediate::device::{IrqAction, IrqData, IrqSet, sim};
use vfio_mediate::frontend::vfio_user::backend::Options as ServerOptions;
use vfio_mediate::frontend::vfio_user::client::{Client, Guest, GuestMemory, MigrateError, Options, Policy, migrate};
use vfio_mediate::frontend::vfio_user::wire::{DmaMap, LoggingReport, MigrationState, SingleWrite};
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::memory::AddressSpace;
use vfio_mediate::plugin::{Library, Limits, Registry};
use vfio_mediate::sys::{EventFd, Seal, memfd};
use vfio_user_support::{CONFIG, LONG, Served, until};

const PAGE: u64 = 4096;
/// Of the guests here: 64 pages, that begin somewhere.
const BASE: u64 = 0x10_0000;
const SIZE: u64 = 64 * PAGE;

fn map() -> DmaMap {
    DmaMap { readable: true, writable: true, offset: 0, address: BASE, size: SIZE }
}

fn enable(client: &Client) {
    client.region_write(CONFIG, 4, &6u16.to_le_bytes()).unwrap();
}

/// A guest's memory that the device reaches by messages.
#[derive(Debug, Default)]
struct Pages(Mutex<Vec<u8>>);

impl Pages {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; SIZE as usize])))
    }
}

impl GuestMemory for Pages {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.0.lock().unwrap()[(address - BASE) as usize..][..data.len()]);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.lock().unwrap()[(address - BASE) as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// One side of a migration: a client, and its guest's memory in a file or behind messages.
struct Side {
    client: Client,
    file: Option<std::fs::File>,
    pages: Arc<Pages>,
}

impl Side {
    fn new(path: &Path, in_file: bool) -> Self {
        Self::over(UnixStream::connect(path).unwrap(), in_file)
    }

    fn over(stream: UnixStream, in_file: bool) -> Self {
        let pages = Pages::new();
        let memory: Arc<dyn GuestMemory> = pages.clone();
        let client = Client::with(stream, Options { memory: Some(memory), ..Options::default() }).unwrap();
        let file = in_file.then(|| std::fs::File::from(memfd("guest", SIZE, Seal::Size).unwrap()));
        client.dma_map(&map(), file.as_ref().map(AsFd::as_fd)).unwrap();
        Self { client, file, pages }
    }

    fn all(&self) -> Vec<u8> {
        match &self.file {
            Some(file) => {
                let mut all = vec![0; SIZE as usize];
                file.read_exact_at(&mut all, 0).unwrap();
                all
            }
            None => self.pages.0.lock().unwrap().clone(),
        }
    }

    fn put(&self, address: u64, data: &[u8]) {
        match &self.file {
            Some(file) => file.write_all_at(data, address - BASE).unwrap(),
            None => self.pages.write(address, data).unwrap(),
        }
    }
}

/// A doorbell of sim:stateful: `length` bytes at `target` become `pattern` and the doorbell's number.
fn ring(client: &Client, target: u64, length: u32, pattern: u32) {
    client.region_write(0, 0x08, &target.to_le_bytes()).unwrap();
    client.region_write(0, 0x10, &length.to_le_bytes()).unwrap();
    client.region_write(0, 0x14, &pattern.to_le_bytes()).unwrap();
    client.region_write(0, 0x18, &1u32.to_le_bytes()).unwrap();
}

/// What memory must be, by doorbells alone.
struct Oracle {
    memory: Vec<u8>,
    doorbells: u32,
}

impl Oracle {
    fn ring(&mut self, client: &Client, target: u64, length: u32, pattern: u32) {
        ring(client, target, length, pattern);
        self.doorbells += 1;
        let word = pattern.wrapping_add(self.doorbells).to_le_bytes();
        let range = (target - BASE) as usize..(target - BASE) as usize + length as usize;
        self.memory[range].iter_mut().enumerate().for_each(|(at, byte)| *byte = word[at % 4]);
    }
}

/// A guest whose device goes on writing whatever is copied meanwhile.
struct Busy<'a> {
    source: &'a Side,
    destination: &'a Side,
    oracle: Oracle,
    /// Doorbells that are still to be rung
    left: u32,
    paused: bool,
    resumed: bool,
    copied: BTreeSet<u64>,
    /// The copy of this number fails
    fails_at: Option<u32>,
    copies: u32,
}

impl<'a> Busy<'a> {
    fn new(source: &'a Side, destination: &'a Side, left: u32) -> Self {
        let oracle = Oracle { memory: source.all(), doorbells: 0 };
        let (paused, resumed, copied) = Default::default();
        Self { source, destination, oracle, left, paused, resumed, copied, fails_at: None, copies: 0 }
    }
}

impl Guest for Busy<'_> {
    fn memory(&self) -> Vec<(u64, u64)> {
        vec![(BASE, SIZE)]
    }

    fn copy(&mut self, address: u64, length: u64) -> std::io::Result<()> {
        self.copies += 1;
        if self.fails_at == Some(self.copies) {
            return Err(std::io::Error::other("the test's failure"));
        }
        let all = self.source.all();
        let range = (address - BASE) as usize..(address - BASE + length) as usize;
        self.destination.put(address, &all[range]);
        self.copied.extend((address / PAGE)..(address + length) / PAGE);
        for _ in 0..self.left.min(3).min(if self.paused { 0 } else { 3 }) {
            self.left -= 1;
            let page = u64::from(self.left * 7) % 60;
            self.oracle.ring(&self.source.client, BASE + page * PAGE + 100, 5000, 0x1000 + self.left);
        }
        Ok(())
    }

    fn pause(&mut self) -> std::io::Result<()> {
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) {
        self.resumed = true;
    }
}

const POLICY: Policy = Policy { rounds_max: 8, dirty_bytes_max: PAGE };

/// spec: VFU-108
#[test]
fn a_device_and_all_that_it_writes_move_from_one_server_to_another() {
    for in_file in [true, false] {
        let (from, to) = (Served::simulated("sim:stateful"), Served::simulated("sim:stateful"));
        let (source, destination) = (Side::new(&from.path, in_file), Side::new(&to.path, in_file));
        enable(&source.client);
        source.client.region_write(2, 4096, &[0xa5; 50_000]).unwrap();
        source.put(BASE + 40 * PAGE, b"of the guest");
        let mut guest = Busy::new(&source, &destination, 30);
        let done = migrate(&source.client, &destination.client, &mut guest, &POLICY).unwrap();
        assert!(guest.paused && !guest.resumed && guest.left == 0, "{done:?}");
        assert!(done.rounds > 1 && done.memory_bytes > SIZE && done.data_bytes > 50_000, "{done:?}");

        assert!(source.all() == guest.oracle.memory, "the source is as the oracle says");
        assert!(destination.all() == guest.oracle.memory, "and so is the destination");
        let moved = &destination.client;
        assert_eq!(moved.migration_state().unwrap(), MigrationState::Running);
        assert_eq!(source.client.migration_state().unwrap(), MigrationState::Stop);
        let mut memory = vec![0; 50_000];
        moved.region_read(2, 4096, &mut memory).unwrap();
        assert!(memory.iter().all(|byte| *byte == 0xa5));
        let mut doorbells = [0; 4];
        moved.region_read(0, 4, &mut doorbells).unwrap();
        assert_eq!(u32::from_le_bytes(doorbells), 30);
        // It goes on there.
        let mut oracle = Oracle { memory: destination.all(), doorbells: 30 };
        oracle.ring(moved, BASE + 4, 8192, 77);
        assert!(destination.all() == oracle.memory);
    }
}

/// spec: VFU-109
#[test]
fn a_migration_that_fails_before_the_commit_leaves_the_source_running_wherever_it_fails() {
    let mut failed = 0;
    for fails_at in 1.. {
        let (from, to) = (Served::simulated("sim:stateful"), Served::simulated("sim:stateful"));
        let (source, destination) = (Side::new(&from.path, true), Side::new(&to.path, true));
        enable(&source.client);
        let mut guest = Busy::new(&source, &destination, 9);
        guest.fails_at = Some(fails_at);
        match migrate(&source.client, &destination.client, &mut guest, &POLICY) {
            Ok(_) => break,
            Err(error) => assert!(matches!(error, MigrateError::Guest(_)), "{error}"),
        }
        failed += 1;
        assert_eq!(guest.resumed, guest.paused);
        assert_eq!(source.client.migration_state().unwrap(), MigrationState::Running);
        assert_eq!(destination.client.migration_state().unwrap(), MigrationState::Running, "as after a reset");
        let mut oracle = Oracle { memory: source.all(), doorbells: guest.oracle.doorbells };
        oracle.ring(&source.client, BASE, 64, 5);
        assert!(source.all() == oracle.memory);
        // And the next attempt works.
        let mut guest = Busy::new(&source, &destination, 0);
        migrate(&source.client, &destination.client, &mut guest, &POLICY).unwrap();
        assert!(destination.all() == oracle.memory);
    }
    assert!(failed > 2);

    let (from, to) = (Served::simulated("sim:stateful"), Served::simulated("sim:stateful"));
    let (source, destination) = (Side::new(&from.path, true), Side::new(&to.path, true));
    drop(to);
    let mut guest = Busy::new(&source, &destination, 0);
    let lost = migrate(&source.client, &destination.client, &mut guest, &POLICY).unwrap_err();
    assert!(matches!(lost, MigrateError::Destination(_)), "{lost}");
    assert_eq!(source.client.migration_state().unwrap(), MigrationState::Running);
}

/// A way to `path` that ends right behind the request to run, which the server may or may not have got.
fn cut_at_commit(path: &Path, arrives: bool) -> UnixStream {
    let (ours, mut near) = UnixStream::pair().unwrap();
    let mut far = UnixStream::connect(path).unwrap();
    let (mut replies, mut back) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    std::thread::spawn(move || std::io::copy(&mut replies, &mut back));
    std::thread::spawn(move || {
        // MIG_DEVICE_STATE, SET, RUNNING.
        let commit = [2u32 | 2 << 16, 2].map(u32::to_le_bytes).concat();
        loop {
            let mut message = vec![0; 16];
            if near.read_exact(&mut message).is_err() {
                return;
            }
            let size = u32::from_le_bytes(message[4..8].try_into().unwrap()) as usize;
            message.resize(size, 0);
            near.read_exact(&mut message[16..]).unwrap();
            let is_commit = message[2] == 16 && message.get(20..28) == Some(&commit[..]);
            if is_commit {
                near.shutdown(Shutdown::Both).unwrap();
            }
            if !is_commit || arrives {
                far.write_all(&message).unwrap();
            }
            if is_commit {
                return far.shutdown(Shutdown::Write).unwrap();
            }
        }
    });
    ours
}

/// spec: VFU-109
#[test]
fn a_commit_whose_answer_is_lost_is_in_doubt_and_nobody_is_resumed() {
    for arrives in [true, false] {
        let (from, to) = (Served::simulated("sim:stateful"), Served::simulated("sim:stateful"));
        let (source, destination) = (Side::new(&from.path, false), Side::over(cut_at_commit(&to.path, arrives), false));
        let mut guest = Busy::new(&source, &destination, 0);
        let error = migrate(&source.client, &destination.client, &mut guest, &POLICY).unwrap_err();
        assert!(matches!(error, MigrateError::InDoubt(_)), "{error}");
        assert!(guest.paused && !guest.resumed);
        assert_eq!(source.client.migration_state().unwrap(), MigrationState::Stop);
        // Whoever asks the destination knows.
        let again = Client::connect(&to.path).unwrap();
        let state = again.migration_state().unwrap();
        assert_eq!(state, if arrives { MigrationState::Running } else { MigrationState::Resuming });
    }
}

fn edu(registry: &Registry) -> Served {
    let device = sim::open("sim:edu").unwrap();
    let device = MediatedDevice::open(device, registry, AddressSpace::of_clients(1 << 30)).unwrap();
    Served::new(device, ServerOptions::default())
}

fn transfer(client: &Client, source: u64, destination: u64, command: u32) {
    for (register, value) in [(0x80, source), (0x88, destination), (0x90, 256)] {
        client.region_write(0, register, &u64::to_le_bytes(value)).unwrap();
    }
    client.region_write(0, 0x98, &command.to_le_bytes()).unwrap();
    until("the transfer is done", || {
        let mut status = [0; 4];
        client.region_read(0, 0x98, &mut status).unwrap();
        status[0] & 1 == 0
    });
}

/// spec: VFU-108
#[test]
fn a_device_that_only_its_plug_in_can_move_moves() {
    const BUFFER: u64 = 0x40000;
    let registry = Registry::new();
    registry.register(Library::open(&cli_support::plugin()).unwrap(), Limits { devices_max: 2 }).unwrap();
    {
        let (from, to) = (edu(&registry), edu(&registry));
        let (source, destination) = (Side::new(&from.path, true), Side::new(&to.path, true));
        enable(&source.client);
        source.put(BASE, &[0x5a; 256]);
        transfer(&source.client, BASE, BUFFER, 1);
        transfer(&source.client, BUFFER, BASE + 9 * PAGE, 3);
        let mut guest = Busy::new(&source, &destination, 0);
        migrate(&source.client, &destination.client, &mut guest, &POLICY).unwrap();
        assert!(source.all() == destination.all());
        assert_eq!(destination.all()[9 * PAGE as usize..][..256], [0x5a; 256]);
        // The buffer inside of the device has come along.
        transfer(&destination.client, BUFFER, BASE + 20 * PAGE, 3);
        assert_eq!(destination.all()[20 * PAGE as usize..][..256], [0x5a; 256]);
    }
    registry.shutdown(Instant::now() + LONG).unwrap();
}

/// spec: VFU-107
#[test]
fn every_command_reaches_the_device() {
    let served = Served::simulated("sim:stateful");
    let side = Side::new(&served.path, true);
    let client = &side.client;
    let info = client.device_info().unwrap();
    assert!(info.num_regions >= 9 && info.num_irqs >= 3);
    let region = client.region_info(2).unwrap();
    assert!(region.size > 0 && region.file.is_none());
    assert_eq!(client.irq_info(1).unwrap().count, 1);
    assert!(client.region_info(99).is_err() && client.irq_info(99).is_err());
    enable(client);

    let event = EventFd::new().unwrap();
    let fds = [Some(event.as_fd())];
    let msi = |data| IrqSet { index: 1, start: 0, count: 1, action: IrqAction::Trigger, data };
    client.set_irqs(&msi(IrqData::EventFd(&fds))).unwrap();
    client.set_irqs(&msi(IrqData::Bool(&[true]))).unwrap();
    assert_eq!(event.wait(Instant::now() + LONG).unwrap(), 1);
    client.set_irqs(&msi(IrqData::EventFd(&[None]))).unwrap();
    client.set_irqs(&IrqSet { count: 0, ..msi(IrqData::None) }).unwrap();

    let writes: Vec<_> = (0..4u8).map(|n| SingleWrite::new(4096 + 8 * u64::from(n), 2, &[n; 8]).unwrap()).collect();
    assert_eq!(client.region_write_multi(&writes).unwrap(), 4);
    client.region_post(2, 4096 + 24, &[9; 8]).unwrap();
    let mut data = [0; 32];
    client.region_read(2, 4096, &mut data).unwrap();
    assert_eq!(data[8..16], [1; 8]);
    assert_eq!(data[24..], [9; 8], "what was posted is done first");

    assert_eq!(client.logging_start(PAGE, &[(BASE, SIZE)]).unwrap(), PAGE);
    ring(client, BASE + 3 * PAGE, 4, 0);
    let mut bitmap = Vec::new();
    let report = LoggingReport { iova: BASE, length: SIZE, page_size: PAGE };
    client.logging_report(&report, &mut bitmap).unwrap();
    assert_eq!(bitmap, [8, 0, 0, 0, 0, 0, 0, 0]);
    client.logging_report(&report, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0; 8]);
    ring(client, BASE + 63 * PAGE, 4, 0);
    assert_eq!(client.dma_unmap_dirty(BASE, SIZE, PAGE).unwrap(), [0, 0, 0, 0, 0, 0, 0, 0x80]);
    client.logging_stop().unwrap();
    client.dma_map(&map(), None).unwrap();
    assert!(client.dma_unmap(BASE, PAGE).is_err());
    client.dma_unmap_all().unwrap();
    assert_eq!(client.dma_unmap(BASE, SIZE).unwrap_err().refusal(), Some(Errno::NOENT));
    client.low_power_entry(None).unwrap();
    client.low_power_exit().unwrap();
    client.reset().unwrap();
    assert!(client.ended().is_none());
}

const VICTIM: &str = "VFIO_USER_CLIENT_VICTIM";

/// Only for the next test, which runs it in a process of its own and kills that.
#[test]
fn the_client_that_is_killed() {
    let Some(path) = std::env::var_os(VICTIM) else { return };
    let (path, round) = path.to_str().unwrap().rsplit_once(':').map(|(path, round)| (path.to_owned(), round)).unwrap();
    let round: u8 = round.parse().unwrap();
    let side = Side::new(Path::new(&path), round.is_multiple_of(2));
    // A client that is lost leaves no bus mastering behind; all else is as it was.
    enable(&side.client);
    side.client.region_write(2, 8192, &[round; 16]).unwrap();
    ring(&side.client, BASE, 8, 0);
    println!("\nready");
    loop {
        side.client.region_post(2, 0, &[round; 4096]).unwrap();
        ring(&side.client, BASE + PAGE, 4096, 1);
    }
}

/// spec: VFU-107
#[test]
fn a_client_that_is_killed_without_a_reset_comes_back_to_the_same_state() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let host = cli_support::Host::start(&["--device", "sim:stateful", "--socket", path.to_str().unwrap()]);
    let mut doorbells_before = 0;
    for round in 1..=6u8 {
        let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_client_that_is_killed", "--nocapture"])
            .env(VICTIM, format!("{}:{round}", path.display()))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufReader::new(victim.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line == "ready"), "it came as far as its loop");
        victim.kill().unwrap();
        victim.wait().unwrap();

        let client = Client::connect(&path).unwrap();
        let mut data = [0; 16];
        client.region_read(2, 8192, &mut data).unwrap();
        assert_eq!(data, [round; 16], "as it left it");
        let mut doorbells = [0; 4];
        client.region_read(0, 4, &mut doorbells).unwrap();
        let doorbells = u32::from_le_bytes(doorbells);
        assert!(doorbells > doorbells_before, "nobody has reset it");
        doorbells_before = doorbells;
    }
    drop(host);
}

/// spec: VFU-105
#[test]
fn many_threads_use_one_device_while_it_uses_their_memory() {
    let served = Served::simulated("sim:stateful");
    let side = Side::new(&served.path, false);
    enable(&side.client);
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let side = &side;
            scope.spawn(move || {
                let mut data = vec![0; 3000];
                for round in 0..50 {
                    let at = 4096 + u64::from(thread) * 4096;
                    side.client.region_write(2, at, &vec![thread ^ round; 3000]).unwrap();
                    side.client.region_read(2, at, &mut data).unwrap();
                    assert!(data.iter().all(|byte| *byte == thread ^ round));
                    if thread == 0 {
                        ring(&side.client, BASE + u64::from(round) * PAGE, 4096, 1);
                    }
                }
            });
        }
        scope.spawn(|| side.client.serve(Instant::now() + Duration::from_millis(300)).unwrap());
    });
    let all = side.all();
    assert!((0..50).all(|page| all[page * 4096..][..4] != [0; 4]));
}
