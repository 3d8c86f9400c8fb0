//! Performs the source machine's actions.

use std::borrow::Cow;

use crate::migration::cause::{Cause, Phase, Role};
use crate::migration::journal::{Journal, Mark, Store};
use crate::migration::policy::{Left, Policy};
use crate::migration::report::{DeviceReport, Downtime, Report};
use crate::migration::source::{Action, End, Event, Facts, Input, Source};
use crate::migration::transport::Transport;
use crate::migration::wire::{
    Capabilities, Digest, Direction, Encoder, Hello, MigrationId, PAGE_SIZE, Record, RunningDigest, STATE_MAX,
};

use super::connection::{Connection, Flow};
use super::doubt::{InDoubt, MigrationError, cause_of, ms_until, record_until};
use super::host::{DirtyDrain, SourceHost, SourceOffer};
use super::pages::{count, is_zero, next_run, page_hash};
use super::{Cancel, Observer, Progress, Step, Time};

/// Pages read, checked and sent at once: small enough to stay in a core's cache.
const BATCH_PAGES: u64 = 64;
const PAGE: usize = PAGE_SIZE as usize;

/// One migration out. Everything is borrowed: the embedding owns its guest.
#[derive(Clone)]
pub struct SourceJob<'h> {
    pub id: MigrationId,
    pub host: &'h dyn SourceHost,
    pub store: &'h dyn Store,
    pub policy: Policy,
    /// Compare all of memory after the switchover
    pub verify: bool,
    pub observer: &'h dyn Observer,
    pub cancel: &'h Cancel,
    pub time: &'h dyn Time,
}

impl std::fmt::Debug for SourceJob<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceJob").field("id", &self.id).field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Moves the guest to the host at the other end of `transport`.
pub fn migrate_out(job: SourceJob<'_>, transport: Box<dyn Transport>) -> Result<Report, MigrationError> {
    SourceDriver::new(job, transport).run()
}

/// After a restart: asks the destination about the migration that the journal has in doubt, or tells it that the guest
/// was kept. There is no guest in this process to resume; the outcome says what may be done.
pub fn settle_out(job: SourceJob<'_>, transport: Box<dyn Transport>) -> Result<Report, MigrationError> {
    SourceDriver::settling(job, transport)?.run()
}

fn doubt(job: &SourceJob<'_>, journal: Option<Journal>, cause: Cause) -> MigrationError {
    let peer = journal.as_ref().map_or(String::new(), |journal| journal.story().peer.clone());
    let doubt = InDoubt { id: job.id, role: Role::Source, peer, cause, journal, digest: None, facts: None };
    MigrationError::InDoubt(Box::new(doubt))
}

/// A part of a batch that is sent as one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    Zero {
        first: u64,
        count: u64,
    },
    /// Pages `from .. from + count` of the batch buffer
    Data {
        first: u64,
        from: usize,
        count: usize,
    },
}

/// Where the sending of a drain is.
#[derive(Debug, Default)]
struct Scan {
    /// Next page to look at
    next: u64,
    /// Dirty pages from there on
    left: u64,
    /// Zero pages found last and not sent yet: the next ones may follow on
    zero: Option<(u64, u64)>,
    segments: Vec<Segment>,
    /// Segments of the batch that were sent
    sent: usize,
    pages: u64,
    zero_pages: u64,
}

/// A migration out, step by step. [`Self::run`] is the loop; a simulation calls [`Self::step`] itself.
pub struct SourceDriver<'h> {
    job: SourceJob<'h>,
    machine: Source,
    connection: Connection,
    journal: Option<Journal>,
    offer: Option<SourceOffer>,
    action: Option<Action>,
    end: Option<End>,
    drain: Option<Box<dyn DirtyDrain + 'h>>,
    scan: Scan,
    batch: Vec<u8>,
    chunk: Vec<u8>,
    /// Of the chunk on its way
    chunk_state: Option<(usize, bool)>,
    state_bytes: Vec<u64>,
    hash: Option<(u64, RunningDigest)>,
    send_until_us: Option<u64>,
    stream_digest: Option<Digest>,
    pages_sent: u64,
    zero_pages: u64,
    phase: Option<Phase>,
    peer: String,
    bytes_before: u64,
}

impl std::fmt::Debug for SourceDriver<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceDriver").field("machine", &self.machine).finish_non_exhaustive()
    }
}

enum Performed {
    Event(Event<'static>),
    /// The record in the decoder's hands
    Received,
    Blocked(u64),
    Ended(End),
}

impl<'h> SourceDriver<'h> {
    pub fn new(job: SourceJob<'h>, transport: Box<dyn Transport>) -> Self {
        let machine = Source::new(job.policy.clone());
        Self::with_machine(job, transport, machine)
    }

    /// See [`settle_out`].
    pub fn settling(job: SourceJob<'h>, transport: Box<dyn Transport>) -> Result<Self, MigrationError> {
        let failed = |cause| MigrationError::Kept { cause, resumed: false, lost: Vec::new() };
        let mut journal = match Journal::open(job.store, job.id) {
            Ok(Some(journal)) => journal,
            Ok(None) => return Err(failed(Cause::Storage(format!("there is no journal {}", job.id)))),
            Err(error) => return Err(doubt(&job, None, cause_of(error))),
        };
        let digest = match journal.story().last {
            Mark::Committing { digest } => Some(digest),
            // Whatever had begun is gone with its process; once this is durable the destination may be told.
            Mark::Began => match journal.append(Mark::Kept) {
                Ok(()) => None,
                Err(error) => return Err(doubt(&job, Some(journal), cause_of(error))),
            },
            Mark::Kept => None,
            Mark::Moved | Mark::Prepared { .. } | Mark::Owned | Mark::Discarded => {
                return Err(failed(Cause::Storage(format!("journal {} has nothing to settle", job.id))));
            }
        };
        let machine = Source::settling(job.policy.clone(), digest, None);
        let mut driver = Self::with_machine(job, transport, machine);
        driver.journal = Some(journal);
        Ok(driver)
    }

    pub(super) fn with_machine(job: SourceJob<'h>, transport: Box<dyn Transport>, machine: Source) -> Self {
        let connection = Connection::new(transport, Direction::FromDestination, Some(job.id));
        let peer = connection.peer();
        Self {
            job,
            machine,
            connection,
            journal: None,
            offer: None,
            action: None,
            end: None,
            drain: None,
            scan: Scan::default(),
            batch: Vec::new(),
            chunk: Vec::new(),
            chunk_state: None,
            state_bytes: Vec::new(),
            hash: None,
            send_until_us: None,
            stream_digest: None,
            pages_sent: 0,
            zero_pages: 0,
            phase: None,
            peer,
            bytes_before: 0,
        }
    }

    /// Takes a doubt up again over a new connection.
    pub fn reconnect(
        job: SourceJob<'h>,
        transport: Box<dyn Transport>,
        doubt: InDoubt,
    ) -> Result<Self, MigrationError> {
        let digest = doubt.journal.as_ref().and_then(|journal| match journal.story().last {
            Mark::Committing { digest } => Some(digest),
            _ => None,
        });
        // A journal that could not be written says less than what was sent: the machine knew the digest.
        let machine = Source::settling(job.policy.clone(), digest.or(doubt.digest), doubt.facts.clone());
        if doubt.role != Role::Source || doubt.id != job.id {
            return Err(doubt.with(Cause::Internal("another migration's doubt".into())));
        }
        Ok(Self::from_doubt(job, transport, machine, doubt))
    }

    pub(super) fn from_doubt(
        job: SourceJob<'h>,
        transport: Box<dyn Transport>,
        machine: Source,
        doubt: InDoubt,
    ) -> Self {
        let mut driver = Self::with_machine(job, transport, machine);
        driver.journal = doubt.journal;
        driver
    }

    /// Runs to the end.
    pub fn run(mut self) -> Result<Report, MigrationError> {
        while self.step() != Step::Ended {}
        self.finish()
    }

    pub fn machine(&self) -> &Source {
        &self.machine
    }

    /// Performs one action, or as much of it as the link allows.
    pub fn step(&mut self) -> Step {
        if self.end.is_some() {
            return Step::Ended;
        }
        let performed = match self.action.clone() {
            None => Performed::Event(Event::Begin),
            Some(action) => self.perform(&action),
        };
        let now_us = self.job.time.now_us();
        let cancelled = self.job.cancel.is_cancelled();
        let event = match performed {
            Performed::Event(event) => event,
            Performed::Received => match self.connection.decoder.record() {
                Ok(Some(record)) => Event::Received(record),
                Ok(None) => Event::Failed(Cause::Internal("no record in hand".into())),
                Err(error) => Event::Failed(error.into()),
            },
            Performed::Blocked(_) if cancelled && self.machine.cancellable() => {
                self.connection.give_up();
                Event::Failed(Cause::Cancelled)
            }
            Performed::Blocked(until_us) if now_us >= until_us => {
                self.connection.give_up();
                Event::TimedOut
            }
            Performed::Blocked(until_us) => return Step::Blocked { until_us },
            Performed::Ended(end) => {
                self.end = Some(end);
                return Step::Ended;
            }
        };
        self.send_until_us = None;
        self.action = Some(self.machine.handle(Input { now_us, cancelled, event }));
        self.observe();
        Step::Progress
    }

    fn observe(&mut self) {
        let phase = self.machine.phase();
        if self.phase != Some(phase) {
            self.phase = Some(phase);
            self.job.observer.phase(self.job.id, Role::Source, phase);
        }
    }

    fn progress(&self) {
        let progress = Progress {
            phase: self.machine.phase(),
            round: self.machine.rounds().len() as u32 + 1,
            pages_sent: self.pages_sent,
            pages_left: self.scan.left,
            bytes: self.connection.bytes_out,
        };
        self.job.observer.progress(self.job.id, Role::Source, progress);
    }

    fn perform(&mut self, action: &Action) -> Performed {
        let now = self.job.time.now_us();
        let host = self.job.host;
        let done = |result: Result<(), Cause>| match result {
            Ok(()) => Performed::Event(Event::Done),
            Err(cause) => Performed::Event(Event::Failed(cause)),
        };
        match action {
            Action::Describe => self.describe(),
            Action::Journal(mark) => done(self.write_journal(*mark)),
            Action::SendHello => self.send_hello(),
            Action::Send(record) => match self.send(record) {
                Ok(Flow::Done) => Performed::Event(Event::Done),
                other => self.unsent(other),
            },
            Action::Wait { until_us } => match self.connection.receive(None) {
                Ok(Flow::Done) => Performed::Received,
                Ok(Flow::Blocked) => Performed::Blocked(*until_us),
                Err(cause) => Performed::Event(Event::Failed(cause)),
            },
            Action::StartTracking => done(host.start_tracking().map_err(Cause::from)),
            Action::StopTracking => {
                host.stop_tracking();
                Performed::Event(Event::Done)
            }
            Action::SyncDirty => done(host.sync_dirty().map_err(Cause::from)),
            Action::Estimate => self.estimate(),
            Action::Drain => self.take_drain(),
            Action::SendPages => self.send_pages(),
            Action::CommitDrain => {
                if let Some(drain) = self.drain.take() {
                    drain.commit();
                }
                self.scan = Scan::default();
                Performed::Event(Event::Done)
            }
            Action::RestoreDrain => {
                self.drain = None;
                self.scan = Scan::default();
                Performed::Event(Event::Done)
            }
            Action::SetState { device, target, until_us } => {
                done(host.set_state(*device, *target, ms_until(now, *until_us)).map_err(Cause::from))
            }
            Action::Restore { device, target, until_us } => {
                done(host.restore(*device, *target, ms_until(now, *until_us)).map_err(Cause::from))
            }
            Action::SendState { device, sequence } => self.send_state(*device, *sequence),
            Action::SendDigest => self.send_digest(),
            Action::PauseVmm { until_us } => done(host.pause(ms_until(now, *until_us)).map_err(Cause::from)),
            Action::ResumeVmm => done(host.resume().map_err(Cause::from)),
            Action::HashMemory => self.hash_memory(),
            Action::End(end) => Performed::Ended(end.clone()),
        }
    }

    fn send(&mut self, record: &Record<'_>) -> Result<Flow, Cause> {
        self.connection.send(record)
    }

    /// A send that is not done: blocked until its deadline, or failed. A peer that gave up may have said why.
    fn unsent(&mut self, result: Result<Flow, Cause>) -> Performed {
        match result {
            Ok(_) => {
                let now = self.job.time.now_us();
                let until = *self.send_until_us.get_or_insert(record_until(&self.job.policy, now));
                Performed::Blocked(until)
            }
            Err(cause @ Cause::Link(_)) => {
                let heard = matches!(self.connection.receive(None), Ok(Flow::Done));
                match self.connection.decoder.record() {
                    Ok(Some(Record::Aborted { .. })) if heard => Performed::Received,
                    _ => Performed::Event(Event::Failed(cause)),
                }
            }
            Err(cause) => Performed::Event(Event::Failed(cause)),
        }
    }

    fn describe(&mut self) -> Performed {
        let offer = match self.job.host.describe() {
            Ok(offer) => offer,
            Err(error) => return Performed::Event(Event::Failed(error.into())),
        };
        let facts = Facts {
            copier: offer.copier,
            pages: offer.pages,
            devices: offer.devices.iter().map(|device| device.flags).collect(),
            verify: self.job.verify,
        };
        self.state_bytes = vec![0; offer.devices.len()];
        self.offer = Some(offer);
        Performed::Event(Event::Described(facts))
    }

    fn write_journal(&mut self, mark: Mark) -> Result<(), Cause> {
        if mark == Mark::Began {
            let journal = Journal::begin(self.job.store, self.job.id, Role::Source, &self.peer).map_err(cause_of)?;
            self.journal = Some(journal);
            return Ok(());
        }
        let journal = self.journal.as_mut().ok_or(Cause::Storage("the journal was never begun".into()))?;
        journal.append(mark).map_err(cause_of)
    }

    fn send_hello(&mut self) -> Performed {
        let Some(offer) = &self.offer else {
            return Performed::Event(Event::Failed(Cause::Internal("nothing was described".into())));
        };
        let hello = Hello {
            capabilities: Capabilities::NONE,
            copier: offer.copier,
            verify: self.job.verify,
            page_size: PAGE_SIZE,
            pages: offer.pages,
            devices: offer.devices.iter().map(|device| device.offer.clone()).collect(),
        };
        match self.send(&Record::Hello(hello)) {
            Ok(Flow::Done) => Performed::Event(Event::Done),
            other => self.unsent(other),
        }
    }

    fn estimate(&mut self) -> Performed {
        let mut left = Left { dirty_pages: self.job.host.dirty_pages(), initial_bytes: 0, device_bytes: Some(0) };
        for device in 0..self.machine.facts().devices.len() {
            match self.job.host.remaining(device) {
                Ok(remaining) => {
                    left.initial_bytes = left.initial_bytes.saturating_add(remaining.initial_bytes);
                    left.device_bytes =
                        left.device_bytes.zip(remaining.stop_copy_bytes).and_then(|(a, b)| a.checked_add(b));
                }
                Err(error) => return Performed::Event(Event::Failed(error.into())),
            }
        }
        self.progress();
        Performed::Event(Event::Estimated(left))
    }

    fn take_drain(&mut self) -> Performed {
        match self.job.host.drain() {
            Ok(drain) => {
                let pages = count(drain.words());
                self.drain = Some(drain);
                self.scan = Scan { left: pages, ..Scan::default() };
                Performed::Event(Event::Drained { pages })
            }
            Err(error) => Performed::Event(Event::Failed(error.into())),
        }
    }

    /// Sends one batch: the next run of dirty pages, at most [`BATCH_PAGES`].
    fn send_pages(&mut self) -> Performed {
        if self.scan.segments.is_empty()
            && let Err(cause) = self.read_batch()
        {
            return Performed::Event(Event::Failed(cause));
        }
        while let Some(segment) = self.scan.segments.get(self.scan.sent).copied() {
            let record = match segment {
                Segment::Zero { first, count } => Record::ZeroPages { first, count },
                Segment::Data { first, from, count } => {
                    Record::Pages { first, data: Cow::Borrowed(&self.batch[from * PAGE..(from + count) * PAGE]) }
                }
            };
            match self.connection.send(&record) {
                Ok(Flow::Done) => self.scan.sent += 1,
                other => return self.unsent(other),
            }
        }
        let more = self.scan.zero.is_some() || self.next_run().is_some();
        let (pages, zero_pages) = (std::mem::take(&mut self.scan.pages), std::mem::take(&mut self.scan.zero_pages));
        self.scan.segments.clear();
        self.scan.sent = 0;
        self.pages_sent += pages;
        self.zero_pages += zero_pages;
        let bytes = self.connection.bytes_out - self.bytes_before;
        self.progress();
        Performed::Event(Event::PagesSent { pages, zero_pages, bytes, more })
    }

    fn next_run(&self) -> Option<(u64, u64)> {
        next_run(self.drain.as_ref()?.words(), self.scan.next, BATCH_PAGES)
    }

    /// Reads the next run and cuts it into segments.
    fn read_batch(&mut self) -> Result<(), Cause> {
        self.bytes_before = self.connection.bytes_out;
        let Some((first, count)) = self.next_run() else {
            self.flush_zero();
            return Ok(());
        };
        self.batch.resize(BATCH_PAGES as usize * PAGE, 0);
        let data = &mut self.batch[..count as usize * PAGE];
        self.job.host.read_pages(first, data)?;
        self.scan.next = first + count;
        self.scan.left = self.scan.left.saturating_sub(count);
        let mut from = 0;
        while from < count as usize {
            let zero = is_zero(&self.batch[from * PAGE..(from + 1) * PAGE]);
            let mut end = from + 1;
            while end < count as usize && is_zero(&self.batch[end * PAGE..(end + 1) * PAGE]) == zero {
                end += 1;
            }
            let (page, length) = (first + from as u64, end - from);
            match zero {
                true => self.add_zero(page, length as u64),
                false => {
                    self.flush_zero();
                    self.scan.segments.push(Segment::Data { first: page, from, count: length });
                    self.scan.pages += length as u64;
                }
            }
            from = end;
        }
        Ok(())
    }

    fn add_zero(&mut self, first: u64, count: u64) {
        match &mut self.scan.zero {
            Some((start, length)) if *start + *length == first => *length += count,
            _ => {
                self.flush_zero();
                self.scan.zero = Some((first, count));
            }
        }
    }

    fn flush_zero(&mut self) {
        if let Some((first, count)) = self.scan.zero.take() {
            self.scan.segments.push(Segment::Zero { first, count });
            self.scan.pages += count;
            self.scan.zero_pages += count;
        }
    }

    fn send_state(&mut self, device: usize, sequence: u64) -> Performed {
        let (bytes, end) = match self.chunk_state {
            Some(chunk) => chunk,
            None => {
                self.chunk.resize(STATE_MAX as usize, 0);
                match self.job.host.save(device, &mut self.chunk) {
                    Ok(saved) if saved.bytes <= self.chunk.len() => (saved.bytes, saved.end),
                    Ok(_) => {
                        let what = "saved more than it was given room for".into();
                        return Performed::Event(Event::Failed(Cause::Device { device, what }));
                    }
                    Err(error) => return Performed::Event(Event::Failed(error.into())),
                }
            }
        };
        self.chunk_state = Some((bytes, end));
        let last = end && self.machine.phase() == Phase::DeviceState;
        let data = Cow::Borrowed(&self.chunk[..bytes]);
        let record = Record::DeviceState { device: device as u32, last, sequence, data };
        match self.connection.send(&record) {
            Ok(Flow::Done) => {
                self.chunk_state = None;
                if let Some(total) = self.state_bytes.get_mut(device) {
                    *total += bytes as u64;
                }
                Performed::Event(Event::StateSent { bytes: bytes as u64, more: !end })
            }
            other => self.unsent(other),
        }
    }

    fn send_digest(&mut self) -> Performed {
        // The digest of what came before: taken once, however often the record has to be taken up again.
        let digest = self.stream_digest.or(self.connection.encoder.as_ref().map(Encoder::digest));
        let Some(digest) = digest else {
            return Performed::Event(Event::Failed(Cause::Internal("no stream to take the digest of".into())));
        };
        self.stream_digest = Some(digest);
        match self.connection.send(&Record::Digest { digest }) {
            Ok(Flow::Done) => Performed::Event(Event::Hashed { digest, more: false }),
            other => self.unsent(other),
        }
    }

    /// Some more of guest memory, which stands still.
    fn hash_memory(&mut self) -> Performed {
        let (mut next, mut digest) = self.hash.take().unwrap_or_default();
        let pages = self.machine.facts().pages;
        let count = BATCH_PAGES.min(pages - next);
        self.batch.resize(BATCH_PAGES as usize * PAGE, 0);
        let data = &mut self.batch[..count as usize * PAGE];
        if let Err(error) = self.job.host.read_pages(next, data) {
            return Performed::Event(Event::Failed(error.into()));
        }
        for page in data.chunks_exact(PAGE) {
            digest.update(&page_hash(page).to_le_bytes());
        }
        next += count;
        let more = next < pages;
        let event = Event::Hashed { digest: digest.value(), more };
        self.hash = more.then_some((next, digest));
        Performed::Event(event)
    }

    /// The result, once [`Self::step`] said [`Step::Ended`].
    pub fn finish(mut self) -> Result<Report, MigrationError> {
        match self.end.take() {
            Some(End::Moved { verified }) => Ok(self.report(verified)),
            Some(End::Kept { cause, resumed, lost }) => Err(MigrationError::Kept { cause, resumed, lost }),
            Some(End::InDoubt { cause }) => Err(self.doubt(cause)),
            None => Err(self.doubt(Cause::Internal("the driver was stopped".into()))),
        }
    }

    fn doubt(self, cause: Cause) -> MigrationError {
        let digest = self.machine.digest();
        let facts = self.offer.is_some() || self.machine.is_alive();
        let facts = facts.then(|| self.machine.facts().clone());
        let (id, role, peer, journal) = (self.job.id, Role::Source, self.peer, self.journal);
        MigrationError::InDoubt(Box::new(InDoubt { id, role, peer, cause, journal, digest, facts }))
    }

    fn report(&self, verified: Option<bool>) -> Report {
        let (times, resume_us) = self.machine.times();
        let downtime = Downtime::new(times, resume_us);
        let devices = self.offer.iter().flat_map(|offer| &offer.devices).zip(self.state_bytes.iter().copied());
        Report {
            migration_id: self.job.id.to_string(),
            role: Role::Source,
            rounds: self.machine.rounds().to_vec(),
            pages_sent: self.pages_sent,
            zero_pages: self.zero_pages,
            bytes: self.connection.bytes_out,
            downtime_ms: downtime.total(),
            downtime,
            total_ms: times.total_us() as f64 / 1000.0,
            devices: devices
                .map(|(device, state_bytes)| DeviceReport { state_bytes, ..device.report.clone() })
                .collect(),
            verified,
            digest: self.machine.digest().map_or(String::new(), |digest| digest.to_string()),
            process_id: std::process::id(),
        }
    }
}
