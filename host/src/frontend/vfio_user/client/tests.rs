use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::result::Result;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;
use crate::frontend::vfio_user::wire::{
    DmaAccess, DmaMap, HEADER_LENGTH, Header, LoggingReport, MessageType, RegionAccess,
};

/// A server that does what a test says, and nothing by itself.
struct Hostile {
    stream: UnixStream,
}

impl Hostile {
    fn take(&mut self) -> (Header, Vec<u8>) {
        let mut head = [0; HEADER_LENGTH];
        self.stream.read_exact(&mut head).unwrap();
        let header = Header::parse(&head);
        let mut payload = vec![0; header.size as usize - HEADER_LENGTH];
        self.stream.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    fn say(&mut self, header: Header, payload: &[u8]) {
        let _gone = self.stream.write_all(&[&header.to_bytes()[..], payload].concat());
    }

    fn reply(&mut self, to: &Header, payload: &[u8]) {
        self.say(Header::reply(to.id, to.command, payload.len()), payload);
    }

    fn reply_with(&mut self, to: &Header, payload: &[u8], fds: usize) {
        let bytes = [&Header::reply(to.id, to.command, payload.len()).to_bytes()[..], payload].concat();
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut room = [std::mem::MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(128))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        let fds = vec![null.as_fd(); fds];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&self.stream, &[std::io::IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    fn agree(&mut self) {
        let (version, _) = self.take();
        assert_eq!(version.command, Command::Version.raw());
        self.reply(&version, b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"write_multiple\":true}}\0");
    }
}

#[derive(Debug)]
struct Counted(AtomicU64);

impl GuestMemory for Counted {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.fill(address as u8);
        Ok(())
    }

    fn write(&self, _address: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// A client of a server that runs `acts` after the handshake.
fn against<T: Send + 'static>(
    patience_ms: u64,
    acts: impl FnOnce(&mut Hostile) -> T + Send + 'static,
) -> (Client, JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut server = Hostile { stream: theirs };
        server.agree();
        let result = acts(&mut server);
        // Until the client has seen all of it.
        let mut rest = Vec::new();
        let _end = server.stream.read_to_end(&mut rest);
        result
    });
    let memory: Arc<dyn GuestMemory> = Arc::new(Counted(AtomicU64::new(0)));
    let options = Options { patience: Duration::from_millis(patience_ms), memory: Some(memory) };
    (Client::with(ours, options).unwrap(), server)
}

const LONG_MS: u64 = 30_000;

fn read4(client: &Client) -> super::Result<[u8; 4]> {
    let mut data = [0; 4];
    client.region_read(0, 16, &mut data).map(|()| data)
}

fn violation(error: Error) -> Violation {
    match error {
        Error::Ended(Failure::Violation(violation)) => violation,
        other => panic!("no violation: {other:?}"),
    }
}

/// spec: VFU-100
#[test]
fn replies_that_do_not_answer_end_the_connection() {
    let good = RegionAccess { offset: 16, region: 0, count: 4 }.bytes();
    type Act = Box<dyn FnOnce(&mut Hostile, Header) + Send>;
    let cases: Vec<(&str, Act)> = vec![
        (
            "another id",
            Box::new(move |s, h| s.say(Header::reply(h.id ^ 1, h.command, 20), &[&good[..], &[1; 4]].concat())),
        ),
        ("another command", Box::new(move |s, h| s.say(Header::reply(h.id, 17, 20), &[&good[..], &[1; 4]].concat()))),
        ("one byte less", Box::new(move |s, h| s.reply(&h, &[&good[..], &[1; 3]].concat()))),
        ("one byte more", Box::new(move |s, h| s.reply(&h, &[&good[..], &[1; 5]].concat()))),
        ("less than the fixed part", Box::new(move |s, h| s.reply(&h, &good[..15]))),
        ("nothing", Box::new(|s, h| s.reply(&h, &[]))),
        ("another offset", Box::new(|s, h| s.reply(&h, &[&[0; 16][..], &[1; 4]].concat()))),
        ("a size below the header's", Box::new(|s, h| s.say(Header { size: 15, ..h }, &[]))),
        ("a size of 4 GiB", Box::new(|s, h| s.say(Header { size: u32::MAX, ..h }, &[]))),
        ("of no type", Box::new(|s, h| s.say(Header { kind: MessageType::Unknown(3), size: 16, ..h }, &[]))),
        ("a descriptor", Box::new(move |s, h| s.reply_with(&h, &[&good[..], &[1; 4]].concat(), 1))),
        ("100 descriptors", Box::new(move |s, h| s.reply_with(&h, &[&good[..], &[1; 4]].concat(), 100))),
    ];
    for (what, act) in cases {
        let (client, server) = against(LONG_MS, move |server| {
            let (header, _) = server.take();
            act(server, header);
        });
        let failed = read4(&client).expect_err(what);
        violation(failed);
        assert!(
            matches!(read4(&client), Err(Error::Ended(Failure::Violation(_)))),
            "{what}: nothing is asked any more"
        );
        drop(client);
        server.join().unwrap();
    }
}

/// spec: VFU-100
#[test]
fn a_reply_twice_and_replies_to_nothing_end_the_connection() {
    let (client, server) = against(LONG_MS, |server| {
        let (header, payload) = server.take();
        let payload = [&payload[..], &[1; 4]].concat();
        server.reply(&header, &payload);
        server.reply(&header, &payload);
    });
    // The second one is seen now or with the next request, which it does not answer.
    let outcome = read4(&client).and_then(|_| read4(&client));
    assert_eq!(violation(outcome.unwrap_err()), Violation::Unsolicited);
    drop(client);
    server.join().unwrap();
}

/// spec: VFU-101
#[test]
fn silence_and_half_an_answer_end_in_a_bounded_time() {
    for bytes in [0, 1, 15, 16, 20, 31, 35] {
        let (client, server) = against(200, move |server| {
            let (header, payload) = server.take();
            let reply = [&Header::reply(header.id, header.command, 20).to_bytes()[..], &payload, &[1; 4]].concat();
            server.stream.write_all(&reply[..bytes]).unwrap();
        });
        let before = Instant::now();
        assert!(matches!(read4(&client), Err(Error::Ended(Failure::Unanswered))), "{bytes}");
        assert!(before.elapsed() < Duration::from_secs(10));
        drop(client);
        server.join().unwrap();
    }
}

/// spec: VFU-101
#[test]
fn a_server_that_reads_nothing_is_given_up() {
    let (client, server) = against(300, |_| std::thread::sleep(Duration::from_millis(1500)));
    let data = vec![0; 1 << 20];
    let ended = (0..100).find_map(|_| client.region_post(0, 0, &data).err());
    assert!(matches!(ended, Some(Error::Ended(Failure::Unanswered))));
    drop(client);
    server.join().unwrap();
}

/// spec: VFU-101
#[test]
fn a_server_that_is_gone_is_told_at_once() {
    let (client, server) = against(LONG_MS, |server| {
        server.take();
        server.stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert!(matches!(read4(&client), Err(Error::Ended(Failure::Closed))));
    assert_eq!(client.ended(), Some(Failure::Closed));
    server.join().unwrap();
}

/// spec: VFU-102
#[test]
fn the_servers_errno_is_the_callers_and_the_connection_goes_on() {
    let (client, server) = against(LONG_MS, |server| {
        let (header, _) = server.take();
        server.say(Header::error(header.id, header.command, Errno::NODEV), &[]);
        let (header, payload) = server.take();
        server.reply(&header, &[&payload[..], &[5; 4]].concat());
    });
    assert_eq!(read4(&client).unwrap_err().refusal(), Some(Errno::NODEV));
    assert_eq!(read4(&client).unwrap(), [5; 4]);
    drop(client);
    server.join().unwrap();
}

fn dma(command: Command, id: u16, address: u64, count: u32, data: &[u8], no_reply: bool) -> Vec<u8> {
    let mut bytes = Header::command(id, command, DmaAccess::LENGTH + data.len(), no_reply).to_bytes().to_vec();
    DmaAccess { address, count }.write(&mut bytes);
    bytes.extend_from_slice(data);
    bytes
}

/// spec: VFU-103
#[test]
fn the_servers_dma_is_answered_while_a_request_with_the_same_id_is_in_flight() {
    let (client, server) = against(LONG_MS, |server| {
        let (header, _) = server.take();
        server.reply(&header, &[]);
        let (header, payload) = server.take();
        // The same id and, for the write, the whole batch before it.
        for _ in 0..1000 {
            server.stream.write_all(&dma(Command::DmaWrite, header.id, 0x2000, 8, &[1; 8], true)).unwrap();
        }
        server.stream.write_all(&dma(Command::DmaRead, header.id, 0x1007, 3, &[], false)).unwrap();
        let (answer, data) = server.take();
        assert_eq!((answer.id, answer.kind), (header.id, MessageType::Reply { error: None }));
        assert_eq!(data[16..], [7; 3]);
        let mut errors = Vec::new();
        for message in [
            dma(Command::DmaRead, 1, 0xfff, 2, &[], false),
            dma(Command::DmaWrite, 2, 0x2fff, 2, &[0; 2], false),
            dma(Command::DmaRead, 3, 0x1000, 0, &[], false),
            dma(Command::DmaRead, 3, 0x1000, (1 << 20) + 1, &[], false),
            dma(Command::RegionRead, 4, 0x1000, 1, &[], false),
            Header { command: 99, ..Header::command(5, Command::Version, 0, false) }.to_bytes().to_vec(),
        ] {
            server.stream.write_all(&message).unwrap();
            let (header, _) = server.take();
            let MessageType::Reply { error: Some(errno) } = header.kind else { panic!("{header:?}") };
            errors.push(errno);
        }
        server.reply(&header, &[&payload[..], &[9; 4]].concat());
        errors
    });
    client.dma_map(&DmaMap { readable: true, writable: true, offset: 0, address: 0x1000, size: 0x2000 }, None).unwrap();
    assert_eq!(read4(&client).unwrap(), [9; 4]);
    drop(client);
    let errors = server.join().unwrap();
    assert_eq!(errors, [Errno::FAULT, Errno::FAULT, Errno::INVAL, Errno::TOOBIG, Errno::NOSYS, Errno::NOSYS]);
}

/// spec: VFU-104
#[test]
fn memory_that_was_not_mapped_or_not_so_is_not_reached() {
    let (client, server) = against(LONG_MS, |server| {
        for _ in 0..2 {
            let (header, _) = server.take();
            server.reply(&header, &[]);
        }
        let (header, payload) = server.take();
        let mut refused = Vec::new();
        for message in [
            dma(Command::DmaWrite, 1, 0x1000, 4, &[1; 4], false),
            dma(Command::DmaRead, 2, 0x5000, 4, &[], false),
            dma(Command::DmaRead, 3, 0, 4, &[], false),
        ] {
            server.stream.write_all(&message).unwrap();
            refused.push(matches!(server.take().0.kind, MessageType::Reply { error: Some(Errno::FAULT) }));
        }
        server.reply(&header, &[&payload[..], &[9; 4]].concat());
        let (header, payload) = server.take();
        server.reply(&header, &payload);
        let (header, payload) = server.take();
        server.stream.write_all(&dma(Command::DmaRead, 3, 0x1000, 4, &[], false)).unwrap();
        refused.push(matches!(server.take().0.kind, MessageType::Reply { error: Some(Errno::FAULT) }));
        server.reply(&header, &[&payload[..], &[9; 4]].concat());
        refused
    });
    let map = |address, readable| DmaMap { readable, writable: !readable, offset: 0, address, size: 0x1000 };
    client.dma_map(&map(0x1000, true), None).unwrap();
    client.dma_map(&map(0x5000, false), None).unwrap();
    read4(&client).unwrap();
    client.dma_unmap(0x1000, 0x1000).unwrap();
    read4(&client).unwrap();
    drop(client);
    assert_eq!(server.join().unwrap(), [true; 4]);
}

/// spec: VFU-105
#[test]
fn requests_of_many_threads_are_in_flight_together_and_may_be_answered_in_any_order() {
    const THREADS: usize = 16;
    let (client, server) = against(LONG_MS, |server| {
        for _ in 0..50 {
            let mut requests: Vec<_> = (0..THREADS).map(|_| server.take()).collect();
            requests.reverse();
            for (header, payload) in requests {
                let offset = u64::from_le_bytes(payload[..8].try_into().unwrap());
                let count = u32::from_le_bytes(payload[12..16].try_into().unwrap()) as usize;
                server.reply(&header, &[&payload[..], &vec![offset as u8; count]].concat());
            }
        }
    });
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let client = &client;
            scope.spawn(move || {
                // Some short, some so long that they are received where they belong.
                let mut data = vec![0; if thread % 4 == 0 { 100_000 } else { 8 }];
                for round in 0..50 {
                    client.region_read(0, (thread * 50 + round) as u64, &mut data).unwrap();
                    assert!(data.iter().all(|byte| *byte == (thread * 50 + round) as u8));
                }
            });
        }
    });
    drop(client);
    server.join().unwrap();
}

/// spec: VFU-103
#[test]
fn a_server_that_asks_for_more_and_more_and_takes_no_answer_is_disconnected() {
    let (client, server) = against(2000, |server| {
        let (header, _) = server.take();
        server.reply(&header, &[]);
        server.take();
        let ask = dma(Command::DmaRead, 1, 0x10_0000, 1 << 20, &[], false);
        while server.stream.write_all(&ask).is_ok() {}
    });
    let map = DmaMap { readable: true, writable: true, offset: 0, address: 0x10_0000, size: 1 << 20 };
    client.dma_map(&map, None).unwrap();
    let failed = read4(&client).unwrap_err();
    assert!(matches!(failed, Error::Ended(Failure::Violation(Violation::Flood) | Failure::Unanswered)), "{failed:?}");
    drop(client);
    server.join().unwrap();
}

/// spec: VFU-106
#[test]
fn versions_that_cannot_be_agreed_on_are_refused() {
    for answer in [
        &b"\x01\0\0\0{}\0"[..],
        b"\0\0\x02\0{}\0",
        b"\0\0",
        b"\0\0\x01\0{\"capabilities\":{\"max_data_xfer_size\":0}}\0",
        b"\0\0\x01\0{\"capabilities\":{\"pgsizes\":8192}}\0",
        b"\0\0\x01\0nonsense\0",
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut server = Hostile { stream: theirs };
            let (header, _) = server.take();
            server.reply(&header, answer);
        });
        assert!(matches!(Client::over(ours), Err(Error::Ended(Failure::Violation(_)))), "{answer:?}");
        server.join().unwrap();
    }
    for answer in [&b"\0\0\0\0"[..], b"\0\0\x01\0{}"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut server = Hostile { stream: theirs };
            let (header, _) = server.take();
            server.reply(&header, answer);
        });
        let client = Client::over(ours).unwrap();
        assert_eq!(client.agreed().msg_fds, 1, "the protocol's default");
        assert!(!client.agreed().write_multiple);
        server.join().unwrap();
    }
}

/// spec: VFU-107
#[test]
fn calls_that_cannot_be_right_are_not_sent() {
    let (client, server) = against(LONG_MS, |_| {});
    let map = |address, size| DmaMap { readable: true, writable: true, offset: 0, address, size };
    let report =
        |iova, length, page_size| client.logging_report(&LoggingReport { iova, length, page_size }, &mut Vec::new());
    for outcome in [
        client.region_read(0, 0, &mut []),
        client.region_write(0, 0, &[]),
        client.region_write_multi(&[]).map(drop),
        client.dma_map(&map(0, 0), None),
        client.dma_map(&map(1, 4096), None),
        client.dma_map(&map(0, 4097), None),
        client.dma_map(&map(u64::MAX - 4095, 8192), None),
        client.dma_unmap_dirty(0, 4096, 0).map(drop),
        client.dma_unmap_dirty(0, 4096, 2048).map(drop),
        report(0, 0, 4096),
        report(0, 4096, 0),
        report(0, 4096, 6000),
        report(2048, 4096, 4096),
        report(u64::MAX - 4095, 4097, 4096),
        report(0, (8 << 20) * 4096 + 1, 4096),
    ] {
        assert!(matches!(outcome, Err(Error::Invalid(_))), "{outcome:?}");
    }
    let rest = std::thread::spawn(move || drop(client));
    rest.join().unwrap();
    server.join().unwrap();
}
