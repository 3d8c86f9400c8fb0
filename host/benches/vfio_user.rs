//! What a message costs beyond the socket that carries it: our client and our server against a bare socket that carries messages of
//! the same lengths, in turn, on one CPU. Only the ratios and differences within one run mean anything.
//!
//! There are two bare sockets: one that receives a message as a whole, which is the least there can be, and one that receives a header and
//! then what the header says, as one must who knows messages' lengths by their headers alone and keeps no buffer.
//!
//! Goals: a read of 4 bytes +0.5 us or less; 1 MiB by REGION_READ and MIG_DATA at 0.75 of the bare socket's throughput or more;
//! 300,000 small writes a second of the device to its client's memory, in bulk. `cargo bench -p vfio-mediate --bench vfio_user`.

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use vfio_mediate::device::*;
use vfio_mediate::frontend::vfio_user::backend::Options as ServerOptions;
use vfio_mediate::frontend::vfio_user::client::{Client, GuestMemory, Options};
use vfio_mediate::frontend::vfio_user::server::serve_client;
use vfio_mediate::frontend::vfio_user::session::Session;
use vfio_mediate::frontend::vfio_user::wire::{
    DmaMap as WireMap, HEADER_LENGTH, Header, LoggingReport, MigrationState, PAGE_SIZE,
};
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::memory::AddressSpace;
use vfio_mediate::plugin::Registry;
use vfio_mediate::sys::{Mapping, Seal, memfd};
use vfio_mediate_sdk::state::{DeviceState, MigrationFlags};

const MIB: usize = 1 << 20;
const MEMORY: u64 = 1 << 30;

/// A device whose registers and state cost a copy, so that what is around them shows.
#[derive(Debug)]
struct Registers {
    identity: Identity,
    bytes: Vec<u8>,
    state: Mutex<DeviceState>,
    left: AtomicU64,
}

impl Device for Registers {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo { flags: 2, num_regions: PCI_NUM_REGIONS, num_irqs: 5 }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo> {
        let size = match index {
            2 => MIB as u64,
            CONFIG_REGION => 256,
            _ => 0,
        };
        Ok(RegionInfo { index, flags: if size > 0 { 3 } else { 0 }, size, capabilities: Vec::new() })
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo> {
        Ok(IrqInfo { index, flags: 1, count: 0 })
    }

    fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let from = if index == CONFIG_REGION { &self.identity.config } else { &self.bytes };
        data.copy_from_slice(&from[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&self, _: u32, _: u64, data: &[u8]) -> Result<()> {
        black_box(data);
        Ok(())
    }

    fn region_map(&self, _: u32, _: u64, _: u64) -> Result<Arc<Mapping>> {
        Err(DeviceError::refused("bench", "a map", Errno::NODEV))
    }

    fn set_irqs(&self, _: &IrqSet<'_>) -> Result<()> {
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }

    fn dma_map(&self, _: &DmaMap) -> Result<()> {
        Ok(())
    }

    fn dma_unmap(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange { iova: 0, last: u64::MAX }]
    }

    fn probe_feature(&self, feature: Feature, _: FeatureAccess) -> bool {
        matches!(
            feature,
            Feature::Migration
                | Feature::MigDeviceState
                | Feature::DmaLoggingStart
                | Feature::DmaLoggingStop
                | Feature::DmaLoggingReport
        )
    }

    fn migration(&self) -> Option<&dyn NativeMigration> {
        Some(self)
    }

    fn dma_logging(&self) -> Option<&dyn NativeDmaLogging> {
        Some(self)
    }

    fn clock(&self) -> &dyn Clock {
        &RealClock
    }
}

impl NativeMigration for Registers {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags { p2p: false, pre_copy: false }
    }

    fn set_state(&self, target: DeviceState) -> Result<()> {
        *self.state.lock().unwrap() = target;
        Ok(())
    }

    fn state(&self) -> Result<DeviceState> {
        Ok(*self.state.lock().unwrap())
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize> {
        // Not where the buffer lies in its page: processors are slow at copies to a little behind the same offset.
        let from = &self.bytes[2048..];
        let count = buffer.len().min(from.len());
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn write(&self, data: &[u8]) -> Result<()> {
        self.left.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn precopy_info(&self) -> Result<PrecopyInfo> {
        Err(DeviceError::refused("bench", "pre-copy", Errno::INVAL))
    }

    fn stop_copy_bytes(&self) -> Result<u64> {
        Ok(MIB as u64)
    }
}

/// Every 64th page is dirty.
impl NativeDmaLogging for Registers {
    fn start(&self, _: &[IovaRange], page_size: u64) -> Result<u64> {
        Ok(page_size)
    }

    fn report(&self, _: IovaRange, _: u64, bitmap: &mut [u64]) -> Result<()> {
        bitmap.iter_mut().for_each(|word| *word |= 1);
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        Ok(())
    }
}

fn device() -> Arc<MediatedDevice> {
    let mut config = vec![0; 256];
    config[..4].copy_from_slice(&[0x34, 0x12, 1, 0]);
    config[4] = 6;
    let identity = Identity {
        name: "bench".into(),
        backend: Backend::Sim,
        vendor_id: 0x1234,
        device_id: 1,
        subsystem_vendor_id: 0,
        subsystem_device_id: 0,
        class_code: 0xff00,
        revision: 0,
        virtual_function: false,
        config,
    };
    let state = Mutex::new(DeviceState::Running);
    let device = Registers { identity, bytes: vec![7; MIB + 4096], state, left: AtomicU64::new(0) };
    MediatedDevice::open(Arc::new(device), &Registry::new(), AddressSpace::of_clients(4 << 30)).unwrap()
}

fn client() -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = device();
    std::thread::spawn(move || serve_client(&device, OwnedFd::from(theirs), ServerOptions::default()));
    Client::over(ours).unwrap()
}

/// The other end of a bare socket: for every `asked` bytes `answered` ones.
struct Bare {
    stream: UnixStream,
    out: Vec<u8>,
    into: Vec<u8>,
    header: usize,
}

impl Bare {
    fn new(asked: usize, answered: usize) -> Self {
        Self::of(asked, answered, 0)
    }

    /// Each message's header is received by itself.
    fn by_header(asked: usize, answered: usize) -> Self {
        Self::of(asked, answered, HEADER_LENGTH)
    }

    fn of(asked: usize, answered: usize, header: usize) -> Self {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let (mut into, out) = (vec![0; asked], vec![1; answered]);
            while receive(&mut theirs, &mut into, header).is_ok() && theirs.write_all(&out).is_ok() {}
        });
        Self { stream: ours, out: vec![0; asked], into: vec![0; answered], header }
    }

    fn round(&mut self) {
        self.stream.write_all(&self.out).unwrap();
        receive(&mut self.stream, &mut self.into, self.header).unwrap();
    }
}

fn receive(stream: &mut UnixStream, into: &mut [u8], header: usize) -> std::io::Result<()> {
    let (header, rest) = into.split_at_mut(header);
    stream.read_exact(header)?;
    stream.read_exact(rest)
}

type Step<'a> = Box<dyn FnMut() + 'a>;

struct Case<'a> {
    name: &'static str,
    /// Times in one round
    times: u32,
    /// Bytes of each, where throughput is what counts
    bytes: usize,
    ours: Step<'a>,
    bare: Option<Step<'a>>,
    goal: &'static str,
}

/// On one CPU nobody waits but for the other, so that what both have of it is all the time there is; what else the machine does
/// is not counted.
fn cpu_time() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

fn timed(times: u32, step: &mut Step<'_>) -> f64 {
    let start = cpu_time();
    (0..times).for_each(|_| step());
    (cpu_time() - start) / f64::from(times)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(case: &mut Case<'_>, rounds: usize) {
    let (mut ours, mut bare, mut more, mut ratio) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let own = timed(case.times, &mut case.ours);
        let other = case.bare.as_mut().map(|bare| timed(case.times, bare));
        // The first warms up.
        if round == 0 {
            continue;
        }
        ours.push(own);
        if let Some(other) = other {
            bare.push(other);
            more.push(own - other);
            ratio.push(other / own);
        }
    }
    let own = median(&mut ours) * 1e6;
    print!("  {:36} {own:9.2} us", case.name);
    if case.bytes > 0 {
        print!("  {:5.2} GiB/s", case.bytes as f64 / own * 1e6 / (1u64 << 30) as f64);
    }
    if case.bare.is_some() {
        let (bare, more, ratio) = (median(&mut bare) * 1e6, median(&mut more) * 1e6, median(&mut ratio));
        print!("  bare {bare:8.2} us  {more:+7.2} us  x{ratio:.2}");
    }
    println!("  {}", case.goal);
}

/// A client's memory, reached by messages; counts what comes.
#[derive(Debug, Default)]
struct Touched {
    bytes: Mutex<Vec<u8>>,
    count: AtomicU64,
}

impl GuestMemory for Touched {
    fn read(&self, _: u64, data: &mut [u8]) -> std::result::Result<(), Errno> {
        data.fill(0);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> std::result::Result<(), Errno> {
        let mut bytes = self.bytes.lock().unwrap();
        bytes[address as usize..][..data.len()].copy_from_slice(data);
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The server's batches, of 8 bytes to each page, into our client's memory: writes a second.
fn touches(total: usize) -> f64 {
    const PAGES: u64 = 4096;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut session: Session<OwnedFd> = Session::new();
        let mut message = vfio_mediate::frontend::vfio_user::session::Message::new();
        let mut out = vfio_mediate::frontend::vfio_user::session::Output::default();
        // VERSION, the map, and one request that is not answered before all touches are done.
        let mut ids = Vec::new();
        while ids.len() < 2 {
            let count = theirs.read(session.space()).unwrap();
            session.received(count, []).unwrap();
            loop {
                use vfio_mediate::frontend::vfio_user::session::Next;
                match session.next(&mut message, &mut out) {
                    Next::Send => theirs.write_all(&out.concat()).unwrap(),
                    Next::Serve(_) => {
                        ids.push((message.header.id, message.header.command));
                        if ids.len() == 1 {
                            let reply = Header::reply(message.header.id, message.header.command, 0);
                            theirs.write_all(&reply.to_bytes()).unwrap();
                        }
                    }
                    Next::Wait => break,
                    Next::Close(why) => panic!("{why}"),
                }
            }
        }
        let start = cpu_time();
        let data = [1; 8];
        let mut writes = (0..total as u64).map(|n| (n % PAGES * PAGE_SIZE, &data[..])).peekable();
        while writes.peek().is_some() {
            let batch = session.dma_write_batch(&mut writes).unwrap();
            let mut begin = 0;
            for end in batch.ends {
                theirs.write_all(&batch.bytes[begin..end]).unwrap();
                begin = end;
            }
            while session.take_reply(batch.barrier).is_none() {
                let count = theirs.read(session.space()).unwrap();
                session.received(count, []).unwrap();
            }
        }
        let rate = total as f64 / (cpu_time() - start);
        let (id, command) = ids[1];
        theirs.write_all(&Header::reply(id, command, 0).to_bytes()).unwrap();
        rate
    });
    let memory = Arc::new(Touched { bytes: Mutex::new(vec![0; (PAGES * PAGE_SIZE) as usize]), ..Touched::default() });
    let answers: Arc<dyn GuestMemory> = memory.clone();
    let options = Options { memory: Some(answers), patience: Duration::from_secs(60) };
    let client = Client::with(ours, options).unwrap();
    let map = WireMap { readable: true, writable: true, offset: 0, address: 0, size: PAGES * PAGE_SIZE };
    client.dma_map(&map, None).unwrap();
    client.reset().unwrap();
    assert_eq!(memory.count.load(Ordering::Relaxed), total as u64);
    server.join().unwrap()
}

fn on_one_cpu() {
    let allowed = sched_getaffinity(None).unwrap();
    let one = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap_or(0);
    let mut set = CpuSet::new();
    set.set(one);
    // The threads to come inherit it.
    sched_setaffinity(None, &set).unwrap();
}

fn main() {
    // `cargo test --benches` only wants to see it run.
    let real = std::env::args().any(|argument| argument == "--bench");
    let (rounds, scale) = if real { (101, 200) } else { (1, 1) };
    on_one_cpu();
    let client = client();
    let head = HEADER_LENGTH + 16;
    let (mut read, mut write) = (Bare::new(head, head + 4), Bare::new(head + 4, head));
    let mut read_by_header = Bare::by_header(head, head + 4);
    let mut long = vec![0; MIB];
    let mut bare_long = Bare::new(head, head + MIB);
    let file = memfd("guest", MEMORY, Seal::Size).unwrap();
    let map = WireMap { readable: true, writable: true, offset: 0, address: 0, size: 2 * MIB as u64 };
    let mut bare_map = Bare::new(HEADER_LENGTH + 32, HEADER_LENGTH);
    let mut cases = vec![
        Case {
            name: "read of 4 bytes",
            times: scale,
            bytes: 0,
            ours: Box::new(|| client.region_read(2, 0, black_box(&mut [0; 4])).unwrap()),
            bare: Some(Box::new(|| read.round())),
            goal: "",
        },
        Case {
            name: "  the same, bare by header and rest",
            times: scale,
            bytes: 0,
            ours: Box::new(|| client.region_read(2, 0, black_box(&mut [0; 4])).unwrap()),
            bare: Some(Box::new(|| read_by_header.round())),
            goal: "(goal +0.5 us)",
        },
        Case {
            name: "write of 4 bytes",
            times: scale,
            bytes: 0,
            ours: Box::new(|| client.region_write(2, 0, &[1; 4]).unwrap()),
            bare: Some(Box::new(|| write.round())),
            goal: "",
        },
        Case {
            name: "100 posted writes of 4 bytes, a read",
            times: scale.div_ceil(20),
            bytes: 0,
            ours: Box::new(|| {
                (0..100).for_each(|_| client.region_post(2, 0, &[1; 4]).unwrap());
                client.region_read(2, 0, &mut [0; 4]).unwrap();
            }),
            bare: None,
            goal: "",
        },
        Case {
            name: "read of 1 MiB",
            times: scale.div_ceil(20),
            bytes: MIB,
            ours: Box::new(|| client.region_read(2, 0, &mut long).unwrap()),
            bare: Some(Box::new(|| bare_long.round())),
            goal: "(goal x0.75)",
        },
        Case {
            name: "DMA_MAP and DMA_UNMAP of 2 MiB, a file",
            times: scale.div_ceil(4),
            bytes: 0,
            ours: Box::new(|| {
                client.dma_map(&map, Some(file.as_fd())).unwrap();
                client.dma_unmap(0, map.size).unwrap();
            }),
            bare: Some(Box::new(|| (0..2).for_each(|_| bare_map.round()))),
            goal: "",
        },
    ];
    println!("client and server on one CPU, time of that CPU, medians of {rounds} rounds:");
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let is_wanted = |case: &&mut Case<'_>| wanted.as_ref().is_none_or(|wanted| case.name.contains(wanted));
    cases.iter_mut().filter(is_wanted).for_each(|case| report(case, rounds));
    drop(cases);
    if wanted.is_some() {
        return;
    }
    dirty(&client, &file, rounds, scale);
    migration(&client, rounds, scale);
    let mut rates: Vec<f64> =
        (0..if real { 5 } else { 1 }).map(|_| touches(if real { 300_000 } else { 100 })).collect();
    println!("  writes of 8 bytes to a client's pages in bulk: {:.0} a second  (goal 300000)", median(&mut rates));
}

fn dirty(client: &Client, file: &OwnedFd, rounds: usize, scale: u32) {
    let map = WireMap { readable: true, writable: true, offset: 0, address: 0, size: MEMORY };
    client.dma_map(&map, Some(file.as_fd())).unwrap();
    client.logging_start(PAGE_SIZE, &[(0, MEMORY)]).unwrap();
    let mut bitmap = Vec::new();
    let asked = LoggingReport { iova: 0, length: MEMORY, page_size: PAGE_SIZE };
    let bits = asked.bitmap_length() as usize;
    let mut bare = Bare::new(HEADER_LENGTH + 32, HEADER_LENGTH + 32 + bits);
    let mut case = Case {
        name: "dirty report of 1 GiB",
        times: scale.div_ceil(4),
        bytes: 0,
        ours: Box::new(|| client.logging_report(&asked, &mut bitmap).unwrap()),
        bare: Some(Box::new(|| bare.round())),
        goal: "",
    };
    report(&mut case, rounds);
    drop(case);
    client.logging_stop().unwrap();
    client.dma_unmap_all().unwrap();
}

fn migration(client: &Client, rounds: usize, scale: u32) {
    let head = HEADER_LENGTH + 8;
    let mut data = vec![0; MIB];
    client.set_migration_state(MigrationState::StopCopy).unwrap();
    // What tells whose state it is, which the destination wants to see first.
    let mut first = vec![0; MIB];
    client.mig_data_read(&mut first).unwrap();
    let mut bare = Bare::new(head, head + MIB);
    let mut case = Case {
        name: "MIG_DATA_READ of 1 MiB",
        times: scale.div_ceil(20),
        bytes: MIB,
        ours: Box::new(|| assert_eq!(client.mig_data_read(&mut data).unwrap(), MIB)),
        bare: Some(Box::new(|| bare.round())),
        goal: "(goal x0.75)",
    };
    report(&mut case, rounds);
    drop(case);
    client.set_migration_state(MigrationState::Stop).unwrap();
    client.set_migration_state(MigrationState::Resuming).unwrap();
    client.mig_data_write(&first).unwrap();
    let mut bare = Bare::new(head + MIB, HEADER_LENGTH);
    let mut case = Case {
        name: "MIG_DATA_WRITE of 1 MiB",
        times: scale.div_ceil(20),
        bytes: MIB,
        ours: Box::new(|| client.mig_data_write(&data).unwrap()),
        bare: Some(Box::new(|| bare.round())),
        goal: "(goal x0.75)",
    };
    report(&mut case, rounds);
}
