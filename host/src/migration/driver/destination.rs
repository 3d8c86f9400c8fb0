//! Performs the destination machine's actions.

use crate::migration::cause::{Cause, Phase, Role};
use crate::migration::destination::{Action, Destination, End, Event, Input};
use crate::migration::journal::{Journal, Mark, Store};
use crate::migration::policy::Policy;
use crate::migration::report::{DeviceReport, Downtime, Report};
use crate::migration::source::Facts;
use crate::migration::transport::Transport;
use crate::migration::wire::{
    Capabilities, Digest, Direction, Hello, MemoryCopier, MigrationId, PAGE_SIZE, Record, RefuseCode, RunningDigest,
};

use super::connection::{Connection, Flow};
use super::doubt::{InDoubt, MigrationError, cause_of, ms_until, record_until};
use super::host::{DestinationHost, DestinationShape};
use super::pages::page_hash;
use super::{Cancel, Observer, Progress, Step, Time};

const PAGE: usize = PAGE_SIZE as usize;

/// One migration in. Everything is borrowed: the embedding owns what will be the guest.
#[derive(Clone)]
pub struct DestinationJob<'h> {
    pub host: &'h dyn DestinationHost,
    pub store: &'h dyn Store,
    pub policy: Policy,
    pub observer: &'h dyn Observer,
    pub cancel: &'h Cancel,
    pub time: &'h dyn Time,
}

impl std::fmt::Debug for DestinationJob<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DestinationJob").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Receives a guest from the host at the other end of `transport`; it runs when this returns `Ok`. A source that comes
/// back to settle an old migration is answered from the journal: nothing of that one is in this process.
pub fn migrate_in(job: DestinationJob<'_>, transport: Box<dyn Transport>) -> Result<Report, MigrationError> {
    DestinationDriver::new(job, transport).run()
}

/// Answers a source that settles an old migration, of which nothing is in this process; refuses a new one.
pub fn settle_in(job: DestinationJob<'_>, transport: Box<dyn Transport>) -> Result<Report, MigrationError> {
    let machine = Destination::settling(job.policy.clone(), None);
    DestinationDriver::with_machine(job, transport, machine, None).run()
}

enum Performed {
    Event(Event<'static>),
    /// The record in the decoder's hands
    Received,
    Blocked(u64),
    Ended(End),
}

/// A migration in, step by step. [`Self::run`] is the loop; a simulation calls [`Self::step`] itself.
pub struct DestinationDriver<'h> {
    job: DestinationJob<'h>,
    machine: Destination,
    connection: Connection,
    journal: Option<Journal>,
    shape: Option<DestinationShape>,
    action: Option<Action>,
    end: Option<End>,
    /// One bit for each page of fresh memory that has been written
    written: Vec<u64>,
    /// Hash of each page as it is in memory, if all of it is to be compared
    hashes: Vec<u64>,
    read_back: Vec<u8>,
    state_bytes: Vec<u64>,
    send_until_us: Option<u64>,
    phase: Option<Phase>,
    peer: String,
}

impl std::fmt::Debug for DestinationDriver<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DestinationDriver").field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl<'h> DestinationDriver<'h> {
    pub fn new(job: DestinationJob<'h>, transport: Box<dyn Transport>) -> Self {
        let machine = Destination::new(job.policy.clone());
        Self::with_machine(job, transport, machine, None)
    }

    fn with_machine(
        job: DestinationJob<'h>,
        transport: Box<dyn Transport>,
        machine: Destination,
        id: Option<MigrationId>,
    ) -> Self {
        let connection = Connection::new(transport, Direction::FromSource, id);
        let peer = connection.peer();
        Self {
            job,
            machine,
            connection,
            journal: None,
            shape: None,
            action: None,
            end: None,
            written: Vec::new(),
            hashes: Vec::new(),
            read_back: Vec::new(),
            state_bytes: Vec::new(),
            send_until_us: None,
            phase: None,
            peer,
        }
    }

    /// Takes a doubt up again over a new connection from its source.
    pub fn reconnect(
        job: DestinationJob<'h>,
        transport: Box<dyn Transport>,
        doubt: InDoubt,
    ) -> Result<Self, MigrationError> {
        if doubt.role != Role::Destination {
            return Err(doubt.with(Cause::Internal("a source's doubt".into())));
        }
        let held =
            doubt.digest.zip(doubt.facts.clone()).map(|(digest, facts)| (digest, Facts { verify: false, ..facts }));
        let machine = Destination::settling(job.policy.clone(), held);
        Ok(Self::from_doubt(job, transport, machine, doubt))
    }

    pub(super) fn from_doubt(
        job: DestinationJob<'h>,
        transport: Box<dyn Transport>,
        machine: Destination,
        doubt: InDoubt,
    ) -> Self {
        let mut driver = Self::with_machine(job, transport, machine, Some(doubt.id));
        driver.journal = doubt.journal;
        driver
    }

    /// Runs to the end.
    pub fn run(mut self) -> Result<Report, MigrationError> {
        while self.step() != Step::Ended {}
        self.finish()
    }

    pub fn machine(&self) -> &Destination {
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

    fn id(&self) -> MigrationId {
        self.connection.decoder.id().unwrap_or(MigrationId([0; 16]))
    }

    fn observe(&mut self) {
        let phase = self.machine.phase();
        if self.phase != Some(phase) {
            self.phase = Some(phase);
            self.job.observer.phase(self.id(), Role::Destination, phase);
        }
    }

    fn progress(&self) {
        let (pages_sent, _) = self.machine.pages();
        let phase = self.machine.phase();
        let bytes = self.connection.bytes_in;
        let progress = Progress { phase, round: self.machine.round(), pages_sent, pages_left: 0, bytes };
        self.job.observer.progress(self.id(), Role::Destination, progress);
    }

    fn perform(&mut self, action: &Action) -> Performed {
        let now = self.job.time.now_us();
        let host = self.job.host;
        let done = |result: Result<(), Cause>| match result {
            Ok(()) => Performed::Event(Event::Done),
            Err(cause) => Performed::Event(Event::Failed(cause)),
        };
        match action {
            Action::Wait { until_us } => match self.receive() {
                Ok(Flow::Done) => Performed::Received,
                Ok(Flow::Blocked) => Performed::Blocked(*until_us),
                Err(cause) => Performed::Event(Event::Failed(cause)),
            },
            Action::Match => self.match_offer(),
            Action::Recall => self.recall(),
            Action::Journal(mark) => done(self.write_journal(*mark)),
            Action::Send(record) => {
                if matches!(record, Record::RoundAck { .. }) {
                    self.progress();
                }
                match self.connection.send(record) {
                    Ok(Flow::Done) => Performed::Event(Event::Done),
                    Ok(Flow::Blocked) => {
                        Performed::Blocked(*self.send_until_us.get_or_insert(record_until(&self.job.policy, now)))
                    }
                    Err(cause) => Performed::Event(Event::Failed(cause)),
                }
            }
            Action::SetState { device, target, until_us } => {
                done(host.set_state(*device, *target, ms_until(now, *until_us)).map_err(Cause::from))
            }
            Action::WritePages => done(self.write_pages()),
            Action::PlacedPages { first, count } => done(self.wrote(*first, *count)),
            Action::ZeroPages { first, count } => done(self.zero_pages(*first, *count)),
            Action::LoadState { device } => done(self.load_state(*device)),
            Action::Compare => {
                let digest = self.connection.decoder.digest_before();
                Performed::Event(Event::Hashed { digest, more: false })
            }
            Action::Discard { device } => done(host.discard(*device).map_err(Cause::from)),
            Action::ResumeVmm => done(host.resume().map_err(Cause::from)),
            Action::HashMemory => {
                let mut digest = RunningDigest::new();
                self.hashes.iter().for_each(|hash| digest.update(&hash.to_le_bytes()));
                Performed::Event(Event::Hashed { digest: digest.value(), more: false })
            }
            Action::End(end) => Performed::Ended(end.clone()),
        }
    }

    fn receive(&mut self) -> Result<Flow, Cause> {
        let (machine, host) = (&self.machine, self.job.host);
        let placer = |first, count| match machine.would_take(first, count) {
            true => host.place(first, count).map_err(Cause::from),
            false => Ok(None),
        };
        self.connection.receive(Some(&placer))
    }

    fn match_offer(&mut self) -> Performed {
        let shape = match self.job.host.shape() {
            Ok(shape) => shape,
            // The source's operator needs the reason as much as ours.
            Err(error) => {
                let (code, reason) = match Cause::from(error) {
                    Cause::Refused { code, reason } => (code, reason),
                    other => (RefuseCode::Busy, other.to_string()),
                };
                return Performed::Event(Event::Matched(Err((code, reason))));
            }
        };
        let matched = match self.connection.decoder.record() {
            Ok(Some(Record::Hello(hello))) => match_hello(&hello, &shape, self.job.host),
            _ => return Performed::Event(Event::Failed(Cause::Internal("no HELLO in hand".into()))),
        };
        if let Ok(facts) = &matched {
            let pages = usize::try_from(facts.pages).unwrap_or(usize::MAX);
            if shape.fresh {
                self.written = vec![0; pages.div_ceil(64)];
            }
            if facts.verify {
                self.hashes = vec![page_hash(&[0; PAGE]); pages];
            }
            self.state_bytes = vec![0; facts.devices.len()];
        }
        self.shape = Some(shape);
        Performed::Event(Event::Matched(matched))
    }

    fn recall(&mut self) -> Performed {
        if self.journal.is_none() {
            match Journal::open(self.job.store, self.id()) {
                Ok(journal) => self.journal = journal,
                Err(error) => return Performed::Event(Event::Failed(cause_of(error))),
            }
        }
        let story = self.journal.as_ref().map(Journal::story).filter(|story| story.role == Role::Destination);
        Performed::Event(Event::Recalled(story.map(|story| story.last)))
    }

    fn write_journal(&mut self, mark: Mark) -> Result<(), Cause> {
        if mark == Mark::Began {
            let begun = Journal::begin(self.job.store, self.id(), Role::Destination, &self.peer);
            self.journal = Some(begun.map_err(cause_of)?);
            return Ok(());
        }
        let journal = self.journal.as_mut().ok_or(Cause::Storage("the journal was never begun".into()))?;
        journal.append(mark).map_err(cause_of)
    }

    fn write_pages(&mut self) -> Result<(), Cause> {
        let Some(Record::Pages { first, data }) = self.connection.decoder.record()? else {
            return Err(Cause::Internal("no PAGES in hand".into()));
        };
        self.job.host.write_pages(first, &data)?;
        let count = (data.len() / PAGE) as u64;
        self.wrote(first, count)
    }

    /// These pages are in memory.
    fn wrote(&mut self, first: u64, count: u64) -> Result<(), Cause> {
        for page in first..first + count {
            if let Some(word) = self.written.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
        self.hash_written(first, count)
    }

    /// Compares what is in memory, not what was on its way there.
    fn hash_written(&mut self, first: u64, count: u64) -> Result<(), Cause> {
        if self.hashes.is_empty() {
            return Ok(());
        }
        self.read_back.resize(PAGE, 0);
        for page in first..first + count {
            self.job.host.read_pages(page, &mut self.read_back)?;
            self.hashes[page as usize] = page_hash(&self.read_back);
        }
        Ok(())
    }

    /// Fresh memory is zero already: writing it would only use it up.
    fn zero_pages(&mut self, first: u64, count: u64) -> Result<(), Cause> {
        let fresh = |page: u64| self.written.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 0);
        let end = first + count;
        let mut page = first;
        while page < end {
            let mut stop = page;
            while stop < end && !fresh(stop) {
                stop += 1;
            }
            if stop > page {
                self.job.host.zero_pages(page, stop - page)?;
            }
            page = stop + 1;
        }
        self.hash_written(first, count)
    }

    fn load_state(&mut self, device: usize) -> Result<(), Cause> {
        let Some(Record::DeviceState { data, .. }) = self.connection.decoder.record()? else {
            return Err(Cause::Internal("no DEVICE_STATE in hand".into()));
        };
        if !data.is_empty() {
            self.job.host.load(device, &data)?;
        }
        if let Some(total) = self.state_bytes.get_mut(device) {
            *total += data.len() as u64;
        }
        Ok(())
    }

    /// The result, once [`Self::step`] said [`Step::Ended`].
    pub fn finish(mut self) -> Result<Report, MigrationError> {
        match self.end.take() {
            Some(End::Owned { verified, resumed, lost }) => match (resumed, lost.is_empty()) {
                (true, true) => Ok(self.report(verified)),
                (_, _) => {
                    let what =
                        format!("the guest is here, but not all of it could be started (devices lost: {lost:?})");
                    Err(MigrationError::Kept { cause: Cause::Vmm(what), resumed, lost })
                }
            },
            Some(End::Answered { outcome }) => Err(MigrationError::Answered { outcome }),
            Some(End::Discarded { cause }) => Err(MigrationError::Discarded { cause }),
            Some(End::InDoubt { cause }) => Err(self.doubt(cause)),
            None => Err(self.doubt(Cause::Internal("the driver was stopped".into()))),
        }
    }

    fn doubt(self, cause: Cause) -> MigrationError {
        let (digest, facts) = (self.machine.digest(), self.machine.facts().cloned());
        let (id, role, peer, journal) = (self.id(), Role::Destination, self.peer, self.journal);
        MigrationError::InDoubt(Box::new(InDoubt { id, role, peer, cause, journal, digest, facts }))
    }

    fn report(&self, verified: Option<bool>) -> Report {
        let times = self.machine.times();
        let (pages_sent, zero_pages) = self.machine.pages();
        let devices = self.shape.iter().flat_map(|shape| &shape.devices).zip(self.state_bytes.iter().copied());
        Report {
            migration_id: self.id().to_string(),
            role: Role::Destination,
            rounds: Vec::new(),
            pages_sent,
            zero_pages,
            bytes: self.connection.bytes_in,
            downtime_ms: 0.0,
            downtime: Downtime { resume: times.us(Phase::Resuming) as f64 / 1000.0, ..Downtime::default() },
            total_ms: times.total_us() as f64 / 1000.0,
            devices: devices.map(|((_, report), state_bytes)| DeviceReport { state_bytes, ..report.clone() }).collect(),
            verified,
            digest: self.machine.digest().map_or(String::new(), |digest: Digest| digest.to_string()),
            process_id: std::process::id(),
        }
    }
}

/// What this host and the offered guest have to agree on, before anything moves.
fn match_hello(
    hello: &Hello<'_>,
    shape: &DestinationShape,
    host: &dyn DestinationHost,
) -> Result<Facts, (RefuseCode, String)> {
    let refuse = |reason: String| Err((RefuseCode::Shape, reason));
    let unknown = hello.capabilities.required & !Capabilities::KNOWN;
    if unknown != 0 {
        return refuse(format!("capabilities {unknown:#x} are not known here"));
    }
    if hello.page_size != PAGE_SIZE {
        return refuse(format!("pages of {} bytes; here they have {PAGE_SIZE}", hello.page_size));
    }
    let copier = |copier| match copier {
        MemoryCopier::Host => "the host",
        MemoryCopier::Vmm => "the VMM",
    };
    if hello.copier != shape.copier {
        let (there, here) = (copier(hello.copier), copier(shape.copier));
        return refuse(format!("memory is copied by {there} there, by {here} here"));
    }
    if hello.pages != shape.pages {
        return refuse(format!("a memory of {} pages there, of {} here", hello.pages, shape.pages));
    }
    if hello.devices.len() != shape.devices.len() {
        return refuse(format!("{} devices there, {} here", hello.devices.len(), shape.devices.len()));
    }
    for (index, offer) in hello.devices.iter().enumerate() {
        if let Err(reason) = host.check_match(index, offer) {
            return Err((RefuseCode::Device, format!("device {index} ({}): {reason}", offer.name)));
        }
    }
    let devices = shape.devices.iter().map(|(flags, _)| *flags).collect();
    Ok(Facts { copier: hello.copier, pages: hello.pages, devices, verify: hello.verify })
}
