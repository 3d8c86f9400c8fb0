use std::result::Result;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use rustix::io::Errno;

use super::*;
use crate::device::{Area, Feature, RegionCapability};
use crate::frontend::vfio_user::wire::*;

mod bugs;
mod dma;
mod model;
mod requests;

/// A file descriptor that is counted while it is open.
#[derive(Debug)]
struct Fd<'a>(&'a AtomicUsize);

impl<'a> Fd<'a> {
    fn open(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Fd<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A device that notes what it is asked and answers simply.
#[derive(Debug, Default)]
struct Device<'a> {
    calls: Vec<String>,
    /// The answer to the call of this number
    fails: Option<(usize, Errno)>,
    irq_fds: Vec<Fd<'a>>,
    region_file: Option<Fd<'a>>,
    capabilities: Vec<RegionCapability>,
    mig_data: Vec<u8>,
}

impl Device<'_> {
    fn note(&mut self, call: String) -> Result<(), Errno> {
        self.calls.push(call);
        match self.fails {
            Some((number, errno)) if number == self.calls.len() => Err(errno),
            _ => Ok(()),
        }
    }
}

impl<'a> Backend for Device<'a> {
    type Fd = Fd<'a>;

    fn device_info(&mut self) -> Result<DeviceInfo, Errno> {
        self.note("info".into())?;
        Ok(DeviceInfo { flags: 3, num_regions: 9, num_irqs: 5 })
    }

    fn region_info(&mut self, index: u32) -> Result<RegionAnswer<Fd<'a>>, Errno> {
        self.note(format!("region {index}"))?;
        let file = self.region_file.take().map(|fd| (fd, 0x3000));
        Ok(RegionAnswer { flags: 3, size: 0x10_0000, capabilities: self.capabilities.clone(), file })
    }

    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno> {
        self.note(format!("irq {index}"))?;
        Ok(IrqInfo { flags: 9, index, count: 3 })
    }

    fn set_irqs(&mut self, request: &SetIrqs<'_>, fds: Vec<Fd<'a>>) -> Result<(), Errno> {
        let SetIrqs { index, start, count, action, .. } = *request;
        self.note(format!("irqs {index} {start}+{count} {action:?}, {} fds", fds.len()))?;
        self.irq_fds.extend(fds);
        Ok(())
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.iter_mut().enumerate().for_each(|(i, byte)| *byte = (offset + i as u64) as u8);
        self.note(format!("read {region} {offset:#x}+{}", data.len()))
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.note(format!("write {region} {offset:#x} {}", data.len()))
    }

    fn dma_map(&mut self, map: &DmaMap, fd: Option<Fd<'a>>) -> Result<(), Errno> {
        self.note(format!("map {:#x}+{:#x} {}", map.address, map.size, fd.is_some()))
    }

    fn dma_unmap(&mut self, map: &DmaMap, dirty: Option<(u64, &mut [u8])>) -> Result<(), Errno> {
        if let Some((_, bitmap)) = dirty {
            bitmap[0] = 0b101;
        }
        self.note(format!("unmap {:#x}+{:#x}", map.address, map.size))
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.note("reset".into())
    }

    fn probe(&mut self, feature: Feature, get: bool, set: bool) -> Result<(), Errno> {
        self.note(format!("probe {feature:?} {get} {set}"))
    }

    fn migration_flags(&mut self) -> Result<u64, Errno> {
        self.note("flags".into())?;
        Ok(7)
    }

    fn state(&mut self) -> Result<MigrationState, Errno> {
        self.note("state".into())?;
        Ok(MigrationState::PreCopy)
    }

    fn set_state(&mut self, state: MigrationState) -> Result<(), Errno> {
        self.note(format!("to {state:?}"))
    }

    fn mig_data_read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let count = buffer.len().min(self.mig_data.len());
        buffer[..count].copy_from_slice(&self.mig_data[..count]);
        self.mig_data.drain(..count);
        self.note(format!("save {}", buffer.len()))?;
        Ok(count)
    }

    fn mig_data_write(&mut self, data: &[u8]) -> Result<(), Errno> {
        self.note(format!("load {}", data.len()))
    }

    fn logging_start(&mut self, page_size: u64, ranges: LoggingRanges<'_>) -> Result<u64, Errno> {
        self.note(format!("log {page_size} {} {}", ranges.is_everything(), ranges.iter().count()))?;
        Ok(page_size.max(0x1_0000))
    }

    fn logging_stop(&mut self) -> Result<(), Errno> {
        self.note("log stop".into())
    }

    fn logging_report(&mut self, report: &LoggingReport, bitmap: &mut [u8]) -> Result<(), Errno> {
        bitmap.fill(0xff);
        self.note(format!("report {:#x}+{:#x} by {}", report.iova, report.length, report.page_size))
    }

    fn low_power_entry(&mut self, wakeup: Option<Fd<'a>>) -> Result<(), Errno> {
        self.note(format!("sleep {}", wakeup.is_some()))
    }

    fn low_power_exit(&mut self) -> Result<(), Errno> {
        self.note("wake".into())
    }
}

/// A session, its device, and what a driver does between them.
struct Bench<'a> {
    session: Session<Fd<'a>>,
    message: Message<Fd<'a>>,
    out: Output<Fd<'a>>,
    maps: Mutex<Maps>,
    device: Device<'a>,
    open: &'a AtomicUsize,
    served: Option<Served>,
}

/// A reply, as the client sees it.
#[derive(Debug)]
struct Answer {
    header: Header,
    payload: Vec<u8>,
    fds: usize,
}

impl Answer {
    fn errno(&self) -> Option<Errno> {
        match self.header.kind {
            MessageType::Reply { error } => error,
            other => panic!("{other:?}"),
        }
    }
}

fn request(id: u16, command: u16, no_reply: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let size = (16 + payload.len()) as u32;
    Header { id, command, size, kind: MessageType::Command { no_reply } }.write(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

fn reply(id: u16, command: Command, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header::reply(id, command.raw(), payload.len()).write(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn region_read(offset: u64, count: u32) -> Vec<u8> {
    let mut out = Vec::new();
    RegionAccess { offset, region: 0, count }.write(&mut out);
    out
}

fn dma_map(address: u64, size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    DmaMap { readable: true, writable: true, offset: 0, address, size }.write(&mut out);
    out
}

const JSON: &[u8] = br#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"write_multiple":true}}"#;

fn version(major: u8, minor: u8, json: &[u8]) -> Vec<u8> {
    request(0, 1, false, &[&[major, 0, minor, 0], json, &[0]].concat())
}

impl<'a> Bench<'a> {
    fn fresh(open: &'a AtomicUsize) -> Self {
        let (session, message, out) = (Session::new(), Message::new(), Output::default());
        Self { session, message, out, maps: Mutex::default(), device: Device::default(), open, served: None }
    }

    fn ready(open: &'a AtomicUsize) -> Self {
        let mut bench = Self::fresh(open);
        let answer = bench.ask(&version(0, 0, JSON), 0);
        assert_eq!(answer.errno(), None);
        bench
    }

    /// As one receive of the driver.
    fn receive(&mut self, bytes: &[u8], fds: usize) -> Result<(), Violation> {
        let space = self.session.space();
        assert!(space.len() >= bytes.len(), "{} of {}", space.len(), bytes.len());
        space[..bytes.len()].copy_from_slice(bytes);
        let open = self.open;
        self.session.received(bytes.len(), (0..fds).map(|_| Fd::open(open)))
    }

    /// Serves what waits; the replies.
    fn serve(&mut self) -> (Vec<Answer>, Option<Violation>) {
        let mut answers = Vec::new();
        loop {
            match self.session.next(&mut self.message, &mut self.out) {
                Next::Wait => return (answers, None),
                Next::Close(violation) => return (answers, Some(violation)),
                Next::Send => {}
                Next::Serve(negotiated) => {
                    let served = serve(&mut self.message, &negotiated, &self.maps, &mut self.device, &mut self.out);
                    assert_eq!(served == Served::Silent, self.out.concat().is_empty());
                    self.served = Some(served);
                }
            }
            let bytes = self.out.concat();
            let Some(head) = bytes.first_chunk() else { continue };
            let header = Header::parse(head);
            assert_eq!(header.size as usize, bytes.len());
            let (error, errno) = (bytes[8] & 0x20 != 0, &bytes[12..16]);
            assert_eq!(error, errno != [0; 4], "an error has an errno, and nothing else has");
            answers.push(Answer { header, payload: bytes[16..].to_vec(), fds: self.out.fds.len() });
        }
    }

    fn ask(&mut self, bytes: &[u8], fds: usize) -> Answer {
        self.receive(bytes, fds).unwrap();
        let (mut answers, violation) = self.serve();
        assert!(answers.len() == 1, "{answers:?} {violation:?}");
        answers.remove(0)
    }

    /// The errno of the only reply.
    fn errno(&mut self, command: Command, payload: &[u8], fds: usize) -> Option<Errno> {
        self.ask(&request(7, command.raw(), false, payload), fds).errno()
    }

    fn calls(&mut self) -> Vec<String> {
        std::mem::take(&mut self.device.calls)
    }
}

/// Messages that a client might send one after another: id and payload length of reads, and how many descriptors.
fn stream() -> impl Strategy<Value = Vec<(u16, usize, usize)>> {
    prop::collection::vec((any::<u16>(), 0_usize..300, 0_usize..3), 1..40)
}

proptest! {
    /// spec: VFU-5
    #[test]
    fn however_a_stream_is_cut_the_same_requests_come_out(messages in stream(), cuts in prop::collection::vec(1_usize..700, 1..50)) {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::ready(&open);
        let mut cuts = cuts.into_iter().cycle();
        let mut seen = Vec::new();
        for (id, length, fds) in &messages {
            let bytes = request(*id, 13, false, &vec![7; *length]);
            let mut rest = &bytes[..];
            let mut fds = *fds;
            while !rest.is_empty() {
                let count = cuts.next().unwrap().min(rest.len());
                bench.receive(&rest[..count], std::mem::take(&mut fds)).unwrap();
                rest = &rest[count..];
                if count % 3 == 0 {
                    while let Next::Serve(_) = bench.session.next(&mut bench.message, &mut bench.out) {
                        seen.push((bench.message.header.id, bench.message.payload().len(), bench.message.fds.len()));
                    }
                }
            }
        }
        while let Next::Serve(_) = bench.session.next(&mut bench.message, &mut bench.out) {
            seen.push((bench.message.header.id, bench.message.payload().len(), bench.message.fds.len()));
        }
        prop_assert_eq!(seen, messages);
        drop(bench);
        prop_assert_eq!(open.load(Ordering::SeqCst), 0);
    }

    /// spec: VFU-6
    #[test]
    fn no_bytes_make_a_session_panic_or_leak(chunks in prop::collection::vec((prop::collection::vec(prop_oneof![3 => Just(0_u8), 2 => 0_u8..32, 1 => any::<u8>()], 0..100), 0_usize..4), 1..30)) {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::ready(&open);
        for (bytes, fds) in chunks {
            let alive = bench.receive(&bytes, fds).is_ok();
            let (answers, closed) = bench.serve();
            let unanswered = |answer: &Answer| answer.errno().is_some_and(|errno| errno.raw_os_error() <= 0);
            prop_assert!(!answers.iter().any(unanswered));
            prop_assert!(alive || closed.is_some());
            if closed.is_some() {
                break;
            }
        }
        drop(bench);
        prop_assert_eq!(open.load(Ordering::SeqCst), 0);
    }

    /// Against a model that has a set of pages.
    /// spec: VFU-61
    #[test]
    fn maps_are_apart_and_unmapped_exactly(steps in prop::collection::vec((any::<bool>(), 0_u64..12, 1_u64..5), 1..60)) {
        let mut maps = Maps::default();
        let mut model: Vec<(u64, u64)> = Vec::new();
        for (add, page, count) in steps {
            if add {
                let map = DmaMap { readable: true, writable: page % 2 == 0, offset: 0, address: page << 12, size: count << 12 };
                let taken = model.iter().any(|(p, c)| (*p..p + c).any(|one| (page..page + count).contains(&one)));
                let expected = if taken { Err(Errno::EXIST) } else if model.len() == 4 { Err(Errno::NOSPC) } else { Ok(()) };
                prop_assert_eq!(maps.check(&map, 4), expected);
                if expected.is_ok() {
                    maps.insert(map);
                    model.push((page, count));
                }
            } else {
                let scope = UnmapScope::One { address: page << 12, size: count << 12 };
                let known = model.iter().position(|one| *one == (page, count));
                prop_assert_eq!(maps.find(scope).map(|found| found.len()), known.map(|_| 1).ok_or(Errno::NOENT));
                if let Some(position) = known {
                    model.remove(position);
                    maps.remove(page << 12);
                }
            }
            for (at, length) in [(page, 1), (page, count), (0, 16)] {
                let writable = |one: u64| model.iter().any(|(p, c)| p % 2 == 0 && (*p..p + c).contains(&one));
                let expected = (at..at + length).all(writable);
                prop_assert_eq!(maps.is_writable(at << 12, (length << 12) as u32), expected);
            }
        }
        prop_assert_eq!(maps.find(UnmapScope::All).unwrap().len(), model.len());
    }
}

/// spec: VFU-7
#[test]
fn a_message_that_cannot_be_framed_ends_the_session() {
    for (size, fatal) in [
        (0, true),
        (15, true),
        (16, false),
        (MESSAGE_MAX as u32, false),
        (MESSAGE_MAX as u32 + 1, true),
        (u32::MAX, true),
    ] {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::ready(&open);
        let mut bytes = Vec::new();
        Header { id: 1, command: 13, size, kind: MessageType::Command { no_reply: false } }.write(&mut bytes);
        assert_eq!(bench.receive(&bytes, 3).is_err(), fatal, "{size}");
        let (_, closed) = bench.serve();
        assert_eq!(closed.is_some(), fatal);
        assert!(!fatal || bench.session.space().is_empty());
        assert!(!fatal || open.load(Ordering::SeqCst) == 0, "descriptors are closed");
    }
}

/// spec: VFU-8
#[test]
fn more_descriptors_than_a_message_may_have_are_closed_and_the_message_refused() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let irqs = |count: u32| words(&[20, 0x24, 2, 0, count]);
    let most = MSG_FDS_MAX;
    assert_eq!(bench.errno(Command::DeviceSetIrqs, &irqs(most as u32), most), None);
    assert_eq!(open.load(Ordering::SeqCst), most, "they are the device's now");
    assert_eq!(bench.errno(Command::DeviceSetIrqs, &irqs(most as u32), most + 1), Some(Errno::INVAL));
    assert_eq!(open.load(Ordering::SeqCst), most);
    assert_eq!(bench.errno(Command::DeviceReset, &[], 0), None, "the next one is served");
}

/// spec: VFU-9
#[test]
fn descriptors_of_a_refused_request_are_closed() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    for (command, payload, fds) in [
        (Command::DeviceReset, vec![], 1),
        (Command::DmaMap, dma_map(0, 4096), 2),
        (Command::DmaMap, dma_map(1, 4096), 1),
        (Command::DeviceSetIrqs, words(&[20, 0x24, 2, 0, 3]), 2),
        (Command::RegionRead, region_read(0, 4), 5),
    ] {
        assert_eq!(bench.errno(command, &payload, fds), Some(Errno::INVAL), "{command:?}");
        assert_eq!(open.load(Ordering::SeqCst), 0, "{command:?}");
    }
    assert!(bench.calls().is_empty(), "the device was not asked");
    bench.device.fails = Some((1, Errno::BUSY));
    assert_eq!(bench.errno(Command::DmaMap, &dma_map(0, 4096), 1), Some(Errno::BUSY));
    assert_eq!((open.load(Ordering::SeqCst), bench.maps.lock().unwrap().len()), (0, 0));
}

/// spec: VFU-5
#[test]
fn pipelined_requests_keep_their_descriptors() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    // The kernel ends a receive behind the message that carries descriptors.
    let first = request(1, 8, false, &words(&[20, 0x21, 2, 0, 0]));
    let second = request(2, 8, false, &words(&[20, 0x24, 2, 0, 1]));
    bench.receive(&[first, second].concat(), 1).unwrap();
    let (answers, _) = bench.serve();
    assert!(answers.len() == 2 && answers.iter().all(|answer| answer.errno().is_none()));
    assert_eq!(bench.calls(), ["irqs 2 0+0 Trigger, 0 fds", "irqs 2 0+1 Trigger, 1 fds"]);
}

/// spec: VFU-24
#[test]
fn what_is_agreed_on_is_never_more_than_either_side_has() {
    let open = AtomicUsize::new(0);
    let agreed = |minor: u8, json: &str| {
        let mut bench = Bench::fresh(&open);
        let answer = bench.ask(&version(0, minor, json.as_bytes()), 0);
        assert_eq!(answer.errno(), None, "{json}");
        (Version::parse(&answer.payload).unwrap(), bench.session.negotiated().unwrap())
    };
    let (reply, negotiated) = agreed(0, "{}");
    assert_eq!((reply.major, reply.minor), (0, 0));
    let defaults = (Some(1), Some(DATA_XFER_MAX));
    assert_eq!((reply.capabilities.max_msg_fds, reply.capabilities.max_data_xfer_size), defaults);
    assert_eq!(reply.capabilities.write_multiple, None, "not proposed");
    assert!(!negotiated.write_multiple && reply.capabilities.migration.is_none());
    let all = r#"{"capabilities":{"max_msg_fds":255,"max_data_xfer_size":4294967295,"max_dma_maps":9,"pgsizes":2101248,"twin_socket":{"supported":true},"write_multiple":true,"migration":{"pgsize":4096,"max_bitmap_size":64}}}"#;
    let (reply, negotiated) = agreed(9, all);
    assert_eq!(reply.minor, 1);
    let capabilities = reply.capabilities;
    assert_eq!((capabilities.max_msg_fds, capabilities.max_data_xfer_size), (Some(64), Some(DATA_XFER_MAX)));
    assert_eq!((capabilities.max_dma_maps, capabilities.pgsizes), (Some(9), Some(4096)));
    assert_eq!((capabilities.twin_socket, capabilities.write_multiple), (None, Some(true)));
    assert_eq!(capabilities.migration, Some(MigrationCapability { pgsize: 4096, max_bitmap_size: Some(64) }));
    assert_eq!((negotiated.max_dma_maps, negotiated.client_msg_fds), (9, 255));
    assert_eq!(agreed(1, r#"{"capabilities":{"max_data_xfer_size":4096}}"#).1.max_data_xfer_size, 4096);
}

/// spec: VFU-25
#[test]
fn a_session_that_does_not_begin_with_an_agreed_version_is_answered_and_ends() {
    let reset = request(0, 13, false, &[]);
    let posted = request(0, 1, true, &[0, 0, 0, 0]);
    let pages = br#"{"capabilities":{"pgsizes":65536}}"#;
    let nothing = br#"{"capabilities":{"max_data_xfer_size":0}}"#;
    for (bytes, fds, errno) in [
        (version(1, 0, JSON), 0, Errno::PROTONOSUPPORT),
        (version(0, 0, b"{"), 0, Errno::INVAL),
        (version(0, 0, pages), 0, Errno::INVAL),
        (version(0, 0, nothing), 0, Errno::INVAL),
        (version(0, 0, JSON), 1, Errno::INVAL),
        (reset, 0, Errno::PROTO),
        (posted, 0, Errno::PROTO),
        (request(0, 1, false, &[0, 0, 0]), 0, Errno::INVAL),
    ] {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::fresh(&open);
        bench.receive(&[bytes, request(1, 13, false, &[])].concat(), 0).unwrap();
        if fds > 0 {
            bench = Bench::fresh(&open);
            bench.receive(&version(0, 0, JSON), fds).unwrap();
        }
        let (answers, closed) = bench.serve();
        assert_eq!(answers.iter().map(|answer| answer.errno()).collect::<Vec<_>>(), [Some(errno)]);
        assert_eq!(closed, Some(Violation::NoVersion));
        assert!(bench.calls().is_empty(), "what came behind is not served");
        assert_eq!(bench.receive(&[], 0), Err(Violation::Ended));
    }
}

/// spec: VFU-26
#[test]
fn before_a_version_no_long_message_is_waited_for() {
    let head = |size: usize| {
        let mut bytes = Vec::new();
        let kind = MessageType::Command { no_reply: false };
        Header { id: 0, command: 1, size: size as u32, kind }.write(&mut bytes);
        bytes
    };
    for (size, fatal) in [(VERSION_MESSAGE_MAX, false), (VERSION_MESSAGE_MAX + 1, true)] {
        let open = AtomicUsize::new(0);
        assert_eq!(Bench::fresh(&open).receive(&head(size), 0).is_err(), fatal);
        // Behind one that has not been looked at, anything may come.
        let mut bench = Bench::fresh(&open);
        bench.receive(&version(0, 0, JSON), 0).unwrap();
        assert!(bench.receive(&head(MESSAGE_MAX), 0).is_ok());
    }
}

/// spec: VFU-27
#[test]
fn a_second_version_is_refused_and_changes_nothing() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let before = bench.session.negotiated();
    assert_eq!(bench.ask(&version(0, 1, b"{}"), 0).errno(), Some(Errno::INVAL));
    assert_eq!(bench.session.negotiated(), before);
}

/// spec: VFU-10
#[test]
fn a_full_input_takes_no_more_until_requests_are_served() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let one = request(1, 13, false, &[]);
    let mut sent = 0;
    while !bench.session.space().is_empty() {
        bench.receive(&one, 0).unwrap();
        sent += 1;
    }
    assert_eq!(sent, REQUESTS_WAITING_MAX);
    assert_eq!(bench.serve().0.len(), sent);
    // By bytes: two of the longest, and nothing else.
    let long = request(1, 10, false, &vec![0; MESSAGE_MAX - 16]);
    bench.receive(&long, 0).unwrap();
    bench.receive(&long, 0).unwrap();
    assert!(bench.session.space().is_empty());
    assert_eq!(bench.serve().0.len(), 2);
    // By descriptors.
    let mut waiting = 0;
    while !bench.session.space().is_empty() {
        bench.receive(&request(1, 8, false, &words(&[20, 0x24, 0, 0, 64])), 64).unwrap();
        waiting += 64;
    }
    assert_eq!(waiting, FDS_WAITING_MAX);
    assert_eq!(bench.serve().0.len(), 4);
}
