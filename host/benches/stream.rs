//! Throughput of the migration stream over loopback TCP, as a ratio to a bare `write`/`read` loop of the same run.
//!
//! Both sides are the production ones: [`migrate_out`] and [`migrate_in`] over [`MediatedHost`], checksums and digest on,
//! every page random, the destination's memory fresh: made for this run and never written. As a host that awaits a guest
//! does, it is populated before the source comes (as devices' DMA maps would, too); what that costs is a line of its own, and so
//! is the stream into memory that is not. What is measured is the first round, acknowledgement included. The bare loop moves as many bytes through a socket pair of the
//! same kind, from and into one buffer that stays in the cache. Runs alternate, so that a busy machine hits all alike.
//!
//! More figures say where the rest goes: storing into fresh memory and writing it through its file, both without any
//! stream; the stream into memory that has been written before; and what the receiver leaves to the guest: a store to
//! each page after the stream, since memory that came in through the file is in no page table yet.
//!
//! `cargo bench -p vfio-mediate --bench stream [-- MEBIBYTES [RUNS]]`; goal: 0.6.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use vfio_mediate::mediation::{VmmError, VmmPort};
use vfio_mediate::memory::{AddressSpace, DirtyLog, GuestRam};
use vfio_mediate::migration::driver::{
    Cancel, DestinationJob, MediatedHost, Monotonic, Silent, SourceJob, migrate_in, migrate_out,
};
use vfio_mediate::migration::journal::MemoryStore;
use vfio_mediate::migration::policy::Policy;
use vfio_mediate::migration::transport::TcpTransport;
use vfio_mediate::migration::wire::MigrationId;

const CHUNK: usize = 256 * 1024;
const MIB: u64 = 1024 * 1024;

/// A VM without vCPUs: nothing is written while it migrates.
struct Still;

impl VmmPort for Still {
    fn pause(&self, _: Instant) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn start_cpu_dirt(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn sync_cpu_dirt(&self, _: &DirtyLog) -> Result<(), VmmError> {
        Ok(())
    }

    fn stop_cpu_dirt(&self) {}
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let address = listener.local_addr().expect("the port's address");
    let out = TcpStream::connect(address).expect("loopback connects");
    let (into, _) = listener.accept().expect("loopback connects");
    (out, into)
}

fn host(memory: Arc<AddressSpace>, fresh: bool) -> MediatedHost {
    MediatedHost::new(Vec::new(), memory, Arc::new(Still), fresh)
}

fn space(bytes: u64) -> Arc<AddressSpace> {
    AddressSpace::new(GuestRam::new(bytes).expect("memory for the benchmark"))
}

/// Seconds of the bare loop.
fn bare(bytes: u64) -> f64 {
    let (mut out, mut into) = sockets();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let chunk = vec![0xa5; CHUNK];
            for _ in 0..bytes / CHUNK as u64 {
                out.write_all(&chunk).expect("loopback writes");
            }
        });
        let mut chunk = vec![0; CHUNK];
        let mut left = bytes;
        while left > 0 {
            left -= into.read(&mut chunk).expect("loopback reads") as u64;
        }
    });
    begin.elapsed().as_secs_f64()
}

/// Writes all of it once; seconds.
fn touch(memory: &AddressSpace) -> f64 {
    let chunk = vec![0x5a; CHUNK];
    let begin = Instant::now();
    for offset in (0..memory.ram().expect("RAM of its own").size()).step_by(CHUNK) {
        memory.ram().expect("RAM of its own").mapping().write(offset, &chunk).expect("inside guest memory");
    }
    begin.elapsed().as_secs_f64()
}

/// Writes all of it once through the file; seconds.
fn write_file(memory: &AddressSpace) -> f64 {
    let chunk = vec![0x5a; CHUNK];
    let begin = Instant::now();
    for offset in (0..memory.ram().expect("RAM of its own").size()).step_by(CHUNK) {
        memory.ram().expect("RAM of its own").write_fresh(offset, &chunk).expect("inside guest memory");
    }
    begin.elapsed().as_secs_f64()
}

/// What a host does while it awaits a guest; seconds.
fn populate(memory: &AddressSpace) -> f64 {
    let begin = Instant::now();
    memory.ram().expect("RAM of its own").populate(|| false).expect("memory for the benchmark");
    begin.elapsed().as_secs_f64()
}

/// Stores one byte to each page; seconds.
fn first_access(memory: &AddressSpace) -> f64 {
    let begin = Instant::now();
    for offset in (0..memory.ram().expect("RAM of its own").size()).step_by(4096) {
        memory.ram().expect("RAM of its own").mapping().write(offset, &[1]).expect("inside guest memory");
    }
    begin.elapsed().as_secs_f64()
}

/// Seconds of the stream's first round.
fn stream(source: &MediatedHost, memory: Arc<AddressSpace>, fresh: bool) -> f64 {
    let (out, into) = sockets();
    let bytes = memory.ram().expect("RAM of its own").size();
    let destination = host(memory, fresh);
    let (here, there) = (MemoryStore::default(), MemoryStore::default());
    let (cancel, time) = (Cancel::new(), Monotonic::new());
    let report = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let job = DestinationJob {
                host: &destination,
                store: &there,
                policy: Policy::default(),
                observer: &Silent,
                cancel: &cancel,
                time: &time,
            };
            migrate_in(job, Box::new(TcpTransport::new(into).expect("a connected socket"))).expect("it arrives")
        });
        let job = SourceJob {
            id: MigrationId::random().expect("random numbers"),
            host: source,
            store: &here,
            policy: Policy::default(),
            verify: false,
            observer: &Silent,
            cancel: &cancel,
            time: &time,
        };
        let report = migrate_out(job, Box::new(TcpTransport::new(out).expect("a connected socket"))).expect("it goes");
        receiver.join().expect("the receiver does not panic");
        report
    });
    assert_eq!(report.pages_sent * 4096, bytes);
    report.rounds[0].ms / 1000.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse::<u64>().ok());
    let bytes = numbers.next().unwrap_or(512) * MIB;
    let runs = numbers.next().unwrap_or(7);
    let memory = space(bytes);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chunk = vec![0; CHUNK];
    for offset in (0..bytes).step_by(CHUNK) {
        for word in chunk.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        memory.ram().expect("RAM of its own").mapping().write(offset, &chunk).expect("inside guest memory");
    }
    let source = host(memory, false);
    let (mut bares, mut fresh, mut touched, mut copies, mut ratios) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut files, mut accesses, mut populated, mut unpopulated) = (vec![], vec![], vec![], vec![]);
    for _ in 0..runs {
        bares.push(bare(bytes));
        let memory = space(bytes);
        populated.push(populate(&memory));
        fresh.push(stream(&source, memory, true));
        ratios.push(bares[bares.len() - 1] / fresh[fresh.len() - 1]);
        let memory = space(bytes);
        unpopulated.push(stream(&source, Arc::clone(&memory), true));
        accesses.push(first_access(&memory));
        drop(memory);
        files.push(write_file(&space(bytes)));
        let memory = space(bytes);
        copies.push(touch(&memory));
        touched.push(stream(&source, memory, false));
    }
    let bare = median(bares);
    let line = |what: &str, seconds: f64| {
        let rate = bytes as f64 / seconds / (1u64 << 30) as f64;
        println!("{what:42} {rate:6.2} GiB/s {:6.2} of bare", bare / seconds);
    };
    println!("medians of {runs} runs of {} MiB", bytes / MIB);
    line("bare write/read loop", bare);
    line("stream into fresh memory, first round", median(fresh));
    line("populating that memory, before it", median(populated));
    line("stream into memory not populated", median(unpopulated));
    line("stream into touched memory, first round", median(touched));
    line("stores into fresh memory, no stream", median(copies));
    line("writes of fresh memory's file, no stream", median(files));
    line("one store to each page after the stream", median(accesses));
    println!("ratio {:.2} (median of the runs' own ratios; goal 0.60)", median(ratios));
}
