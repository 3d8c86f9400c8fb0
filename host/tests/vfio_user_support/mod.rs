//! A served device, and a client that says exactly what a test wants.
#![allow(dead_code, missing_debug_implementations)]

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use vfio_mediate::device::{Device, sim};
use vfio_mediate::frontend::vfio_user::backend::Options;
use vfio_mediate::frontend::vfio_user::server::{Listener, Server};
use vfio_mediate::frontend::vfio_user::wire::{Command, DmaAccess, HEADER_LENGTH, Header, MessageType};
use vfio_mediate::mediation::MediatedDevice;
use vfio_mediate::memory::AddressSpace;
use vfio_mediate::plugin::Registry;

pub const CONFIG: u32 = 7;

/// As [`until`], before it is a failure.
pub const LONG: Duration = Duration::from_secs(30);

pub fn simulated(spec: &str) -> Arc<MediatedDevice> {
    mediated(sim::open(spec).unwrap())
}

pub fn mediated(device: Arc<dyn Device>) -> Arc<MediatedDevice> {
    in_space(device, &AddressSpace::of_clients(1 << 30))
}

/// Of a VM that has others.
pub fn in_space(device: Arc<dyn Device>, memory: &Arc<AddressSpace>) -> Arc<MediatedDevice> {
    MediatedDevice::open(device, &Registry::new(), Arc::clone(memory)).unwrap()
}

/// A device behind a socket.
pub struct Served {
    pub device: Arc<MediatedDevice>,
    pub server: Server,
    pub path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Served {
    pub fn new(device: Arc<MediatedDevice>, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.sock");
        let listener = Listener::bind(&path).unwrap();
        let server = Server::start(Arc::clone(&device), listener, options).unwrap();
        Self { device, server, path, _folder: folder }
    }

    pub fn simulated(spec: &str) -> Self {
        Self::new(simulated(spec), Options::default())
    }

    /// Connected, with a version agreed on.
    pub fn client(&self) -> Raw {
        Raw::connect(&self.path).agreed()
    }

    /// Waits until `count` clients have been served and are gone.
    pub fn await_gone(&self, count: u64) {
        until("the client is gone", || self.server.clients().served == count);
    }
}

/// Waits for something that must come, however slow the machine is.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "waited for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A message that came.
#[derive(Debug, PartialEq, Eq)]
pub struct Got {
    pub header: Header,
    pub payload: Vec<u8>,
}

impl Got {
    /// The payload, or the errno.
    pub fn outcome(&self) -> Result<&[u8], i32> {
        match self.header.kind {
            MessageType::Reply { error: Some(errno) } => Err(errno.raw_os_error()),
            MessageType::Reply { error: None } => Ok(&self.payload),
            MessageType::Command { .. } | MessageType::Unknown(_) => panic!("no reply: {self:?}"),
        }
    }
}

pub fn message(id: u16, command: Command, payload: &[u8], no_reply: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header::command(id, command, payload.len(), no_reply).write(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

/// `offset: u64, region: u32, count: u32`, then `data`.
pub fn access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &region.to_le_bytes(), &count.to_le_bytes(), data].concat()
}

pub fn dma_map(address: u64, size: u64) -> Vec<u8> {
    let numbers = [0, address, size].map(u64::to_le_bytes).concat();
    [&32u32.to_le_bytes()[..], &3u32.to_le_bytes(), &numbers].concat()
}

/// A client's memory that is reached by messages: from `base` on.
pub struct Memory {
    pub base: u64,
    pub bytes: Vec<u8>,
    /// Requests of the server
    pub asked: u64,
}

impl Memory {
    pub fn new(base: u64, size: usize) -> Self {
        Self { base, bytes: vec![0; size], asked: 0 }
    }

    /// `None`: nothing is to be answered.
    pub fn answer(&mut self, got: &Got) -> Option<Vec<u8>> {
        let MessageType::Command { no_reply } = got.header.kind else { return None };
        self.asked += 1;
        let mut reply = Vec::new();
        if got.header.command == Command::DmaRead.raw() {
            let access = DmaAccess::parse(&got.payload, 1 << 20).unwrap();
            access.write(&mut reply);
            reply.extend_from_slice(&self.bytes[(access.address - self.base) as usize..][..access.count as usize]);
        } else {
            let (access, data) = DmaAccess::parse_with_data(&got.payload, 1 << 20).unwrap();
            access.write(&mut reply);
            self.bytes[(access.address - self.base) as usize..][..data.len()].copy_from_slice(data);
        }
        let mut bytes = Header::reply(got.header.id, got.header.command, reply.len()).to_bytes().to_vec();
        bytes.extend(reply);
        (!no_reply).then_some(bytes)
    }
}

pub struct Raw {
    pub stream: UnixStream,
    id: u16,
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        Self { stream, id: 0 }
    }

    pub fn agreed(mut self) -> Self {
        let version =
            [&[0, 0, 1, 0][..], b"{\"capabilities\":{\"max_msg_fds\":16,\"write_multiple\":true}}\0"].concat();
        self.call(Command::Version, &version).outcome().unwrap();
        self
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn send_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut room = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(128))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = sendmsg(self.stream.as_fd(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    pub fn receive(&mut self) -> Got {
        self.try_receive().expect("a message")
    }

    /// One message that comes alone, with its descriptors.
    pub fn receive_with(&mut self) -> (Got, Vec<OwnedFd>) {
        let mut room = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let mut bytes = vec![0; 64 * 1024];
        let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
        let count = recvmsg(self.stream.as_fd(), &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let header = Header::parse(bytes.first_chunk().unwrap());
        assert_eq!(header.size as usize, count);
        (Got { header, payload: bytes[HEADER_LENGTH..count].to_vec() }, fds)
    }

    /// `None`: the server has closed it.
    pub fn try_receive(&mut self) -> Option<Got> {
        let mut head = [0; HEADER_LENGTH];
        self.stream.read_exact(&mut head).ok()?;
        let header = Header::parse(&head);
        let mut payload = vec![0; header.size as usize - HEADER_LENGTH];
        self.stream.read_exact(&mut payload).ok()?;
        Some(Got { header, payload })
    }

    pub fn next_id(&mut self) -> u16 {
        self.id = self.id.wrapping_add(1);
        self.id
    }

    pub fn call(&mut self, command: Command, payload: &[u8]) -> Got {
        self.call_with(command, payload, &[])
    }

    pub fn call_with(&mut self, command: Command, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Got {
        let id = self.next_id();
        let bytes = message(id, command, payload, false);
        if fds.is_empty() {
            self.send(&bytes)
        } else {
            self.send_with(&bytes, fds)
        }
        let got = self.receive();
        assert_eq!((got.header.id, got.header.command), (id, command.raw()));
        got
    }

    /// As [`Self::call`]; the server's requests are answered meanwhile, from `memory`.
    pub fn call_answering(&mut self, command: Command, payload: &[u8], memory: &mut Memory) -> Got {
        let id = self.next_id();
        self.send(&message(id, command, payload, false));
        loop {
            let got = self.receive();
            match memory.answer(&got) {
                Some(reply) => self.send(&reply),
                None if matches!(got.header.kind, MessageType::Command { .. }) => {}
                None => return got,
            }
        }
    }

    /// Of everything, readable and writable; with a file, or by messages.
    pub fn map(&mut self, address: u64, size: u64, file: Option<BorrowedFd<'_>>) -> Result<(), i32> {
        let payload = dma_map(address, size);
        let fds: Vec<_> = file.into_iter().collect();
        self.call_with(Command::DmaMap, &payload, &fds).outcome().map(drop)
    }

    pub fn unmap(&mut self, address: u64, size: u64) -> Result<(), i32> {
        let payload = [&24u32.to_le_bytes()[..], &0u32.to_le_bytes(), &address.to_le_bytes(), &size.to_le_bytes()];
        self.call(Command::DmaUnmap, &payload.concat()).outcome().map(drop)
    }

    /// Memory and bus mastering on.
    pub fn enable(&mut self) {
        self.write(CONFIG, 4, &6u16.to_le_bytes()).unwrap();
    }

    /// `feature` with GET (1) or SET (2), and its data; what comes back behind the 8 bytes of the head.
    pub fn feature(&mut self, feature: u32, operation: u32, data: &[u8], room: u32) -> Result<Vec<u8>, i32> {
        let head = [8 + data.len() as u32 + room, feature | operation << 16];
        let payload = [&head[0].to_le_bytes()[..], &head[1].to_le_bytes(), data].concat();
        let got = self.call(Command::DeviceFeature, &payload);
        got.outcome().map(|payload| payload[8..].to_vec())
    }

    /// The bytes, or the errno.
    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, i32> {
        let got = self.call(Command::RegionRead, &access(region, offset, count, &[]));
        got.outcome().map(|payload| payload[16..].to_vec())
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), i32> {
        let payload = access(region, offset, data.len() as u32, data);
        self.call(Command::RegionWrite, &payload).outcome().map(drop)
    }

    /// Without an answer.
    pub fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        let id = self.next_id();
        self.send(&message(id, Command::RegionWrite, &access(region, offset, data.len() as u32, data), true));
    }

    /// The server has ended the connection: after what is left to read nothing comes.
    pub fn assert_closed(&mut self) {
        while self.try_receive().is_some() {}
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(count) => assert_eq!(count, 0),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}

/// Open descriptors and threads of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub fds: usize,
    pub threads: usize,
    pub maps: usize,
}

impl Held {
    pub fn now() -> Self {
        let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        // Of files and devices: what the allocator does is its own business.
        let maps = maps.lines().filter(|line| line.contains("memfd")).count();
        Self { fds: count("/proc/self/fd"), threads: count("/proc/self/task"), maps }
    }
}
