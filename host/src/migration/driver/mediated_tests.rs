//! Memory alone, from one production host to another: received where it belongs, or through the file.

use std::io::IoSlice;
use std::time::{Duration, Instant};

use super::*;
use crate::memory::{DirtyLog, GuestRam};
use crate::migration::driver::{
    Cancel, DestinationJob, MigrationError, Monotonic, Silent, SourceJob, migrate_in, migrate_out,
};
use crate::migration::journal::MemoryStore;
use crate::migration::policy::Policy;
use crate::migration::transport::{MemoryTransport, Transport};
use crate::migration::wire::MigrationId;

const PAGES: u64 = 700;

/// A VM without vCPUs.
struct Still;

impl VmmPort for Still {
    fn pause(&self, _: Instant) -> std::result::Result<(), VmmError> {
        Ok(())
    }

    fn resume(&self) -> std::result::Result<(), VmmError> {
        Ok(())
    }

    fn start_cpu_dirt(&self) -> std::result::Result<(), VmmError> {
        Ok(())
    }

    fn sync_cpu_dirt(&self, _: &DirtyLog) -> std::result::Result<(), VmmError> {
        Ok(())
    }

    fn stop_cpu_dirt(&self) {}
}

fn memory() -> Arc<AddressSpace> {
    AddressSpace::new(GuestRam::new(PAGES * PAGE_SIZE).unwrap())
}

/// Every third page is zero; the others are told apart by their first words.
fn filled() -> Arc<AddressSpace> {
    let memory = memory();
    for page in (0..PAGES).filter(|page| page % 3 != 0) {
        let bytes: Vec<u8> = (0..PAGE_SIZE / 8).flat_map(|word| (page << 32 | word).to_le_bytes()).collect();
        memory.ram().unwrap().mapping().write(page * PAGE_SIZE, &bytes).unwrap();
    }
    memory
}

fn image(memory: &AddressSpace) -> Vec<u8> {
    let mut image = vec![0; memory.ram().unwrap().size() as usize];
    memory.ram().unwrap().mapping().read(0, &mut image).unwrap();
    image
}

/// Flips a bit of one byte of what is sent.
struct Damaged(MemoryTransport, usize);

impl Transport for Damaged {
    fn send(&mut self, parts: &[IoSlice<'_>]) -> std::io::Result<usize> {
        let Some(part) = parts.iter().find(|part| !part.is_empty()) else { return self.0.send(parts) };
        let sent = match self.1 {
            usize::MAX => return self.0.send(parts),
            0 => {
                let sent = self.0.send(&[IoSlice::new(&[part[0] ^ 1])])?;
                self.1 = usize::MAX;
                return Ok(sent);
            }
            left => self.0.send(&[IoSlice::new(&part[..part.len().min(left)])])?,
        };
        self.1 -= sent;
        Ok(sent)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.receive(buffer)
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

/// `damaged`: the byte of the source's stream that changes on its way.
fn run(
    from: &Arc<AddressSpace>,
    to: &MediatedHost,
    damaged: usize,
) -> (std::result::Result<(), MigrationError>, std::result::Result<(), MigrationError>) {
    let source = MediatedHost::new(Vec::new(), Arc::clone(from), Arc::new(Still), false);
    let (out, into, _) = MemoryTransport::pair(5000, Duration::from_millis(20));
    let (here, there) = (MemoryStore::default(), MemoryStore::default());
    let (cancel, time) = (Cancel::new(), Monotonic::new());
    // A machine under load is slow; how long it takes is not what is tested here.
    let policy = Policy { downtime_ms_max: 60_000, ..Policy::default() };
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (store, policy) = (&there, policy.clone());
            let job = DestinationJob { host: to, store, policy, observer: &Silent, cancel: &cancel, time: &time };
            migrate_in(job, Box::new(into)).map(drop)
        });
        let (id, policy) = (MigrationId::random().unwrap(), policy.clone());
        let observer = &Silent;
        let job =
            SourceJob { id, host: &source, store: &here, policy, verify: true, observer, cancel: &cancel, time: &time };
        let sent = migrate_out(job, Box::new(Damaged(out, damaged))).map(drop);
        (sent, receiver.join().unwrap())
    })
}

/// spec: STREAM-13
#[test]
fn memory_arrives_the_same_where_it_is_populated_and_where_it_is_not() {
    let from = filled();
    for populate in [true, false] {
        let to = memory();
        if populate {
            to.ram().unwrap().populate(|| false).unwrap();
        }
        let host = MediatedHost::new(Vec::new(), Arc::clone(&to), Arc::new(Still), true);
        assert_eq!(host.place(0, PAGES).unwrap().is_some(), populate);
        let (sent, arrived) = run(&from, &host, usize::MAX);
        sent.unwrap();
        arrived.unwrap();
        assert_eq!(image(&to), image(&from), "populated: {populate}");
    }
}

/// spec: STREAM-13
#[test]
fn a_place_lies_in_memory_or_is_refused() {
    let to = memory();
    to.ram().unwrap().populate(|| false).unwrap();
    let host = MediatedHost::new(Vec::new(), Arc::clone(&to), Arc::new(Still), true);
    assert!(host.place(PAGES - 1, 1).unwrap().is_some());
    for (first, count) in [(PAGES - 1, 2), (PAGES, 1), (u64::MAX, 1), (1, u64::MAX), (0, PAGES + 1)] {
        assert!(host.place(first, count).is_err(), "{first} {count}");
    }
}

/// spec: STREAM-13
#[test]
fn after_a_stream_that_failed_inside_its_pages_memory_is_not_called_fresh() {
    let from = filled();
    let to = memory();
    to.ram().unwrap().populate(|| false).unwrap();
    let host = MediatedHost::new(Vec::new(), Arc::clone(&to), Arc::new(Still), true);
    // HELLO and the first records are far shorter; the last page is far from here.
    let (sent, arrived) = run(&from, &host, 100_000);
    let first = to.ram().unwrap().mapping().load_u32(PAGE_SIZE + 8, Ordering::Acquire).unwrap();
    assert_eq!(first, 1, "pages before the damage were placed");
    assert!(matches!(arrived, Err(MigrationError::Discarded { .. })), "{arrived:?}");
    assert!(matches!(sent, Err(MigrationError::Kept { resumed: true, .. })), "{sent:?}");
    assert!(!host.shape().unwrap().fresh);
    // The next one finds garbage, and replaces all of it, pages of zeroes too.
    let (sent, arrived) = run(&from, &host, usize::MAX);
    sent.unwrap();
    arrived.unwrap();
    assert_eq!(image(&to), image(&from));
}
