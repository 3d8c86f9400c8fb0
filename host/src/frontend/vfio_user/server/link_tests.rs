use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{scope, spawn};

use super::*;
use crate::frontend::vfio_user::wire::{Command, DmaAccess, HEADER_LENGTH, Header, MessageType};

const PATIENCE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(200);

fn read_message(stream: &mut UnixStream) -> Option<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_LENGTH];
    stream.read_exact(&mut head).ok()?;
    let header = Header::parse(&head);
    let mut payload = vec![0; header.size as usize - HEADER_LENGTH];
    stream.read_exact(&mut payload).ok()?;
    Some((header, payload))
}

fn command(id: u16, command: Command, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header::command(id, command, payload.len(), false).write(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

/// A connection whose version has been agreed on, with 64 KiB a message.
fn connected(patience: Duration) -> (Arc<Link>, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let link = Link::new(ours.into(), patience);
    let version = [&[0, 0, 1, 0][..], b"{\"capabilities\":{\"max_data_xfer_size\":65536}}\0"].concat();
    theirs.write_all(&command(1, Command::Version, &version)).unwrap();
    let (mut message, mut out) = (Message::new(), Output::default());
    assert_eq!(link.next(&mut message, &mut out), Ok(Next::Send));
    link.reply(&out).unwrap();
    read_message(&mut theirs).unwrap();
    (link, theirs)
}

/// Memory of a client, which answers DMA until the connection ends. Byte `a` holds `a * 7` until it is written.
#[derive(Default)]
struct Memory {
    written: BTreeMap<u64, u8>,
    asked: u64,
}

impl Memory {
    fn get(&self, address: u64) -> u8 {
        *self.written.get(&address).unwrap_or(&(address as u8).wrapping_mul(7))
    }

    fn answer(&mut self, header: &Header, payload: &[u8]) -> Option<Vec<u8>> {
        let MessageType::Command { no_reply } = header.kind else { return None };
        self.asked += 1;
        let mut reply = Vec::new();
        let read = header.command == Command::DmaRead.raw();
        let access = if read {
            let access = DmaAccess::parse(payload, 1 << 20).unwrap();
            access.write(&mut reply);
            let bytes = (access.address..).take(access.count as usize).map(|address| self.get(address));
            reply.extend(bytes.collect::<Vec<_>>());
            access
        } else {
            let (access, data) = DmaAccess::parse_with_data(payload, 1 << 20).unwrap();
            self.written.extend((access.address..).zip(data.iter().copied()));
            access.write(&mut reply);
            access
        };
        assert!(access.count > 0);
        let mut bytes = Header::reply(header.id, header.command, reply.len()).to_bytes().to_vec();
        bytes.extend(reply);
        (!no_reply).then_some(bytes)
    }

    fn serve(mut self, mut stream: UnixStream) -> Self {
        while let Some((header, payload)) = read_message(&mut stream) {
            if let Some(reply) = self.answer(&header, &payload)
                && stream.write_all(&reply).is_err()
            {
                break;
            }
        }
        self
    }
}

fn pattern(address: u64, count: usize) -> Vec<u8> {
    (address..).take(count).map(|address| (address as u8).wrapping_mul(7)).collect()
}

/// spec: VFU-89
#[test]
fn memory_is_read_and_written_while_the_server_waits_for_requests_and_while_it_does_not() {
    for server_waits in [true, false] {
        let (link, theirs) = connected(PATIENCE);
        let client = spawn(move || Memory::default().serve(theirs));
        let server = server_waits.then(|| {
            let link = Arc::clone(&link);
            spawn(move || link.next(&mut Message::new(), &mut Output::default()))
        });
        // Longer than a message may be.
        let mut data = vec![0; 200_000];
        link.dma_read(5, &mut data).unwrap();
        assert_eq!(data, pattern(5, data.len()));
        link.dma_write(100, &[1; 70_000]).unwrap();
        let mut back = [0; 4];
        link.dma_read(98, &mut back).unwrap();
        assert_eq!(back, [(98u8).wrapping_mul(7), (99u8).wrapping_mul(7), 1, 1]);
        link.end(Failure::Stopped);
        client.join().unwrap();
        if let Some(server) = server {
            assert_eq!(server.join().unwrap(), Err(Failure::Stopped));
        }
    }
}

/// spec: VFU-89
#[test]
fn many_threads_ask_at_once_and_each_gets_its_own_answer() {
    let (link, theirs) = connected(PATIENCE);
    let client = spawn(move || Memory::default().serve(theirs));
    scope(|scope| {
        for thread in 0..8u64 {
            let link = &link;
            scope.spawn(move || {
                for round in 0..200u64 {
                    let address = thread * 1000 + round;
                    let mut data = vec![0; 1 + (round as usize * 37) % 5000];
                    link.dma_read(address, &mut data).unwrap();
                    assert_eq!(data, pattern(address, data.len()));
                }
            });
        }
        // Requests of the client, meanwhile: none. The server is in and out of its receive.
    });
    link.end(Failure::Stopped);
    assert_eq!(client.join().unwrap().asked, 8 * 200);
}

/// spec: VFU-90
#[test]
fn a_clients_requests_do_not_hold_up_the_devices_memory() {
    let (link, mut theirs) = connected(PATIENCE);
    // As many as can wait in a buffer, and more than one receive brings.
    let read = command(7, Command::RegionRead, &[0; 16]);
    let client = spawn(move || {
        for _ in 0..300 {
            theirs.write_all(&read).unwrap();
        }
        Memory::default().serve(theirs)
    });
    let (mut message, mut out) = (Message::new(), Output::default());
    for _ in 0..300 {
        // The one that serves asks itself, in the middle of a request.
        assert!(matches!(link.next(&mut message, &mut out), Ok(Next::Serve(_))));
        let mut data = [0; 16];
        link.dma_read(3, &mut data).unwrap();
        assert_eq!(data[..], pattern(3, 16));
    }
    link.end(Failure::Stopped);
    assert_eq!(client.join().unwrap().asked, 300);
}

/// spec: VFU-90
#[test]
fn a_server_takes_requests_that_came_while_others_wait_for_memory() {
    let (link, mut theirs) = connected(PATIENCE);
    let device = {
        let link = Arc::clone(&link);
        spawn(move || link.dma_read(0, &mut [0; 4]))
    };
    let (header, payload) = read_message(&mut theirs).unwrap();
    // The client answers only once its own request has been: whoever waits for it must not keep that from the server.
    theirs.write_all(&command(9, Command::RegionRead, &[0; 16])).unwrap();
    let mut message = Message::new();
    assert!(matches!(link.next(&mut message, &mut Output::default()), Ok(Next::Serve(_))));
    theirs.write_all(&Memory::default().answer(&header, &payload).unwrap()).unwrap();
    device.join().unwrap().unwrap();
}

/// spec: VFU-91
#[test]
fn a_client_that_does_not_answer_is_disconnected_and_so_is_everybody_who_waits() {
    let (link, theirs) = connected(SHORT);
    let server = {
        let link = Arc::clone(&link);
        spawn(move || link.next(&mut Message::new(), &mut Output::default()))
    };
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            let link = Arc::clone(&link);
            spawn(move || link.dma_read(0, &mut [0; 4]))
        })
        .collect();
    for waiting in waiting {
        assert_eq!(waiting.join().unwrap(), Err(Errno::NOTCONN));
    }
    assert_eq!(server.join().unwrap(), Err(Failure::Unanswered));
    assert_eq!(link.dma_write(0, &[1]), Err(Errno::NOTCONN), "and later ones at once");
    drop(theirs);
}

/// spec: VFU-91
#[test]
fn a_client_that_goes_while_it_is_asked_ends_the_wait() {
    for server_waits in [true, false] {
        let (link, mut theirs) = connected(PATIENCE);
        let server = server_waits.then(|| {
            let link = Arc::clone(&link);
            spawn(move || link.next(&mut Message::new(), &mut Output::default()))
        });
        let device = {
            let link = Arc::clone(&link);
            spawn(move || link.dma_write(0, &[9; 40_000]))
        };
        // In the middle of the request.
        theirs.read_exact(&mut [0; 100]).unwrap();
        drop(theirs);
        assert_eq!(device.join().unwrap(), Err(Errno::NOTCONN));
        assert!(server.is_none_or(|server| server.join().unwrap() == Err(Failure::Closed)));
    }
}

/// spec: VFU-92
#[test]
fn bulk_writes_arrive_in_order_and_are_done_when_the_call_returns() {
    let (link, theirs) = connected(PATIENCE);
    let client = spawn(move || Memory::default().serve(theirs));
    let data: Vec<Vec<u8>> = (0..3000).map(|number| vec![number as u8; 1 + number % 900]).collect();
    let writes = data.iter().enumerate().map(|(number, data)| (number as u64 * 500, data.as_slice()));
    let mut expected = Memory::default();
    writes.clone().for_each(|(address, data)| expected.written.extend((address..).zip(data.iter().copied())));
    link.dma_write_many(writes).unwrap();
    let mut back = vec![0; 1000];
    link.dma_read(2999 * 500, &mut back).unwrap();
    let last: Vec<u8> = (2999 * 500..).take(1000).map(|address| expected.get(address)).collect();
    assert_eq!(back, last);
    link.end(Failure::Stopped);
    assert!(client.join().unwrap().written == expected.written);
}

/// spec: VFU-92
#[test]
fn messages_of_many_threads_are_never_split() {
    let (link, mut theirs) = connected(PATIENCE);
    scope(|scope| {
        for thread in 0..4u8 {
            let link = &link;
            scope.spawn(move || {
                let mut out = Output::default();
                for round in 0..300usize {
                    // Longer than the socket's buffer now and then: it is sent in pieces.
                    let length = if round % 50 == 0 { 400_000 } else { round };
                    out.clear();
                    Header::reply(u16::from(thread), 9, length).write(&mut out.bytes);
                    out.bytes.resize(HEADER_LENGTH + length, thread);
                    link.reply(&out).unwrap();
                }
            });
        }
        for _ in 0..4 * 300 {
            let (header, payload) = read_message(&mut theirs).unwrap();
            assert!(payload.iter().all(|byte| u16::from(*byte) == header.id));
        }
    });
}

/// spec: VFU-48
#[test]
fn requests_that_fill_the_room_end_the_connection_only_where_nobody_can_make_room() {
    // The server itself waits for memory: nobody takes the requests.
    let (link, mut theirs) = connected(PATIENCE);
    let flood = spawn(move || {
        let post = command(7, Command::RegionWrite, &[0; 16 + 60_000]);
        while theirs.write_all(&post).is_ok() {}
        theirs
    });
    let (mut message, mut out) = (Message::new(), Output::default());
    assert!(matches!(link.next(&mut message, &mut out), Ok(Next::Serve(_))));
    assert_eq!(link.dma_read(0, &mut [0; 4]), Err(Errno::NOTCONN));
    assert_eq!(link.next(&mut message, &mut out), Err(Failure::Violation(Violation::Flood)));
    flood.join().unwrap();

    // A thread of the device waits, and the server goes on: however many requests come.
    let (link, mut theirs) = connected(PATIENCE);
    let device = {
        let link = Arc::clone(&link);
        spawn(move || link.dma_read(0, &mut [0; 4]))
    };
    let (header, payload) = read_message(&mut theirs).unwrap();
    let client = spawn(move || {
        let post = command(7, Command::RegionWrite, &[0; 16 + 60_000]);
        for _ in 0..100 {
            theirs.write_all(&post).unwrap();
        }
        theirs.write_all(&Memory::default().answer(&header, &payload).unwrap()).unwrap();
        theirs
    });
    for _ in 0..100 {
        assert!(matches!(link.next(&mut message, &mut out), Ok(Next::Serve(_))));
    }
    device.join().unwrap().unwrap();
    client.join().unwrap();
}
