use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::*;
use crate::memory::{Report, Taken};
use crate::sys::{Mapping, Seal, memfd};

const P: u64 = PAGE_SIZE;
const IOVA: u64 = 0x4000_0000;

fn space(pages: u64) -> Arc<AddressSpace> {
    let space = AddressSpace::of_clients(pages * P);
    space.begin_log();
    space
}

fn open_memfd(pages: u64) -> OwnedFd {
    memfd("client", pages * P, Seal::Open).unwrap()
}

fn sealed(pages: u64) -> OwnedFd {
    memfd("client", pages * P, Seal::Size).unwrap()
}

fn copy(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().unwrap()
}

fn file(fd: &OwnedFd, iova: u64, pages: u64, offset: u64) -> ClientMap {
    let source = ClientSource::File { fd: copy(fd), offset };
    ClientMap { iova, length: pages * P, read: true, write: true, source }
}

fn by_messages(access: &Arc<Asked>, iova: u64, pages: u64) -> ClientMap {
    let source = ClientSource::Messages(Arc::clone(access) as _);
    ClientMap { iova, length: pages * P, read: true, write: true, source }
}

fn errno(result: Result<Joined, MemoryError>) -> Errno {
    result.unwrap_err().errno()
}

fn dirty(space: &AddressSpace) -> Vec<u64> {
    let drain = space.log().drain();
    let pages = drain.bitmap().iter_ones().map(|page| page as u64).collect();
    drain.commit();
    pages
}

/// A client that has its memory to itself, and may refuse.
#[derive(Debug)]
struct Asked {
    memory: Mapping,
    first: u64,
    asked: AtomicU64,
    refuses: AtomicBool,
}

impl Asked {
    fn new(first: u64, pages: u64) -> Arc<Self> {
        let memory = Mapping::new(sealed(pages), 0, pages * P).unwrap();
        Arc::new(Self { memory, first, asked: AtomicU64::new(0), refuses: AtomicBool::new(false) })
    }

    fn answer(&self) -> Result<(), Errno> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.refuses.load(Ordering::SeqCst) { Err(Errno::NOTCONN) } else { Ok(()) }
    }
}

impl ClientAccess for Asked {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.answer()?;
        self.memory.read(iova - self.first, data).map_err(|_| Errno::FAULT)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.answer()?;
        self.memory.write(iova - self.first, data).map_err(|_| Errno::FAULT)
    }
}

/// spec: VFU-70
#[test]
fn a_files_bytes_are_the_clients_and_writes_are_marked() {
    for (fd, direct) in [(sealed(8), true), (open_memfd(8), false)] {
        let space = space(64);
        let joined = space.join_client(file(&fd, IOVA, 4, 3 * P), 1).unwrap();
        assert_eq!(matches!(joined.memory, DmaMemory::Mapped(_)), direct);
        rustix::io::pwrite(&fd, b"client", 4 * P).unwrap();
        let mut seen = [0; 6];
        space.read(IOVA + P, &mut seen).unwrap();
        assert_eq!(&seen, b"client");
        joined.memory.read(joined.offset + P, &mut seen).unwrap();
        assert_eq!(&seen, b"client");
        space.write(IOVA + 2 * P - 2, b"host").unwrap();
        rustix::io::pread(&fd, &mut seen[..4], 5 * P - 2).unwrap();
        assert_eq!(&seen[..4], b"host");
        let first = joined.map.ram_offset / P;
        assert_eq!(dirty(&space), [first + 1, first + 2]);
        // Beyond the map, though not beyond the file.
        assert_eq!(space.read(IOVA + 4 * P - 1, &mut seen).unwrap_err().errno(), Errno::FAULT);
        assert_eq!(space.write(IOVA - 1, &seen).unwrap_err().errno(), Errno::FAULT);
        assert!(dirty(&space).is_empty());
    }
}

/// spec: VFU-70
#[test]
fn a_transfer_crosses_blocks_or_moves_nothing() {
    let space = space(64);
    let (one, other, asked) = (sealed(1), open_memfd(1), Asked::new(IOVA + 2 * P, 1));
    space.join_client(file(&one, IOVA, 1, 0), 1).unwrap();
    space.join_client(file(&other, IOVA + P, 1, 0), 1).unwrap();
    space.join_client(by_messages(&asked, IOVA + 2 * P, 1), 1).unwrap();
    let data: Vec<u8> = (0..3 * P).map(|at| (at % 253) as u8).collect();
    space.write(IOVA, &data).unwrap();
    let mut back = vec![0; data.len()];
    space.read(IOVA, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(dirty(&space), [0, 1, 2]);
    asked.asked.store(0, Ordering::SeqCst);
    assert_eq!(space.write(IOVA, &vec![1; 3 * P as usize + 1]).unwrap_err().errno(), Errno::FAULT);
    space.read(IOVA, &mut back).unwrap();
    assert_eq!(back, data, "nothing was written");
    assert_eq!(asked.asked.load(Ordering::SeqCst), 1, "nor was anybody asked but for the read");
}

/// spec: VFU-71
#[test]
fn what_is_no_file_to_be_mapped_is_refused() {
    let space = space(64);
    let open = |path: &str, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let refused = [
        ("a directory", open("/", OFlags::RDONLY)),
        ("/dev/zero", open("/dev/zero", OFlags::RDWR)),
        ("/dev/null", open("/dev/null", OFlags::RDWR)),
        ("a file of the kernel's", open("/proc/self/maps", OFlags::RDONLY)),
        ("a file of sysfs", open("/sys/kernel/mm/transparent_hugepage/enabled", OFlags::RDONLY)),
        ("a pipe", pipe),
        ("a socket", socket.into()),
        ("an eventfd", event),
        ("a path", open("/proc/self/exe", OFlags::PATH)),
        ("an empty file", open_memfd(0)),
        ("a short file", memfd("short", P - 1, Seal::Size).unwrap()),
    ];
    for (what, fd) in &refused {
        for write in [false, true] {
            let map = ClientMap { write, ..file(fd, IOVA, 1, 0) };
            assert_eq!(errno(space.join_client(map, 1)), Errno::INVAL, "{what}");
        }
    }
    let fd = sealed(4);
    for (pages, offset) in [(5, 0), (1, 4 * P), (4, P), (1, 1), (1, P - 1), (1, u64::MAX - P + 1), (1, 1 << 62)] {
        assert_eq!(errno(space.join_client(file(&fd, IOVA, pages, offset), 1)), Errno::INVAL, "{pages} {offset:#x}");
    }
    assert!(space.mappings().is_empty());
    space.join_client(file(&fd, IOVA, 4, 0), 1).unwrap();
}

/// spec: VFU-72
#[test]
fn a_file_gives_no_more_than_its_descriptor_and_its_seals_do() {
    let space = space(64);
    let again = |fd: &OwnedFd, flags: OFlags| {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd()));
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    };
    let fd = sealed(2);
    rustix::io::pwrite(&fd, b"rom", 0).unwrap();
    let (reader, writer) = (again(&fd, OFlags::RDONLY), again(&fd, OFlags::WRONLY));
    assert_eq!(errno(space.join_client(file(&reader, IOVA, 2, 0), 1)), Errno::ACCESS);
    assert_eq!(errno(space.join_client(file(&writer, IOVA, 2, 0), 1)), Errno::ACCESS);
    let rom = ClientMap { write: false, ..file(&reader, IOVA, 2, 0) };
    let joined = space.join_client(rom, 1).unwrap();
    let mut seen = [0; 3];
    space.read(IOVA, &mut seen).unwrap();
    assert_eq!(&seen, b"rom");
    assert_eq!(space.write(IOVA, b"x").unwrap_err().errno(), Errno::ACCESS);
    // Whoever asked no table: an error, and no signal.
    assert!(joined.memory.write(joined.offset, b"x").is_err());
    // A descriptor that may write does not make a map that may not.
    let rom = ClientMap { write: false, ..file(&fd, IOVA + 2 * P, 2, 0) };
    assert!(space.join_client(rom, 1).unwrap().memory.write(0, b"x").is_err());
    for seals in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let fd = open_memfd(2);
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        assert_eq!(errno(space.join_client(file(&fd, IOVA + 8 * P, 2, 0), 1)), Errno::ACCESS);
        let rom = ClientMap { write: false, ..file(&fd, IOVA + 8 * P, 2, 0) };
        let joined = space.join_client(rom, 1).unwrap();
        space.leave_client(&joined.map, 1, || {}).unwrap();
    }
}

/// spec: VFU-73
#[test]
fn a_file_that_is_cut_off_is_an_error_and_no_signal() {
    let space = space(64);
    let fd = open_memfd(16);
    let joined = space.join_client(file(&fd, IOVA, 16, 0), 1).unwrap();
    let mut data = vec![0x5A; 16 * P as usize];
    space.write(IOVA, &data).unwrap();
    assert_eq!(dirty(&space).len(), 16);
    rustix::fs::ftruncate(&fd, 4 * P).unwrap();
    assert_eq!(space.read(IOVA + 4 * P, &mut [0]).unwrap_err().errno(), Errno::FAULT);
    assert_eq!(space.write(IOVA + 15 * P, &[1]).unwrap_err().errno(), Errno::FAULT);
    assert_eq!(dirty(&space), [15], "unknown is dirty");
    assert_eq!(space.read(IOVA, &mut data).unwrap_err().errno(), Errno::FAULT);
    space.read(IOVA, &mut data[..4 * P as usize]).unwrap();
    assert!(joined.memory.write(8 * P, &[1]).is_err());
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size as u64, 4 * P, "nor does it grow again");
    rustix::fs::ftruncate(&fd, 16 * P).unwrap();
    space.write(IOVA + 15 * P, &[1]).unwrap();
}

/// spec: VFU-73
#[test]
fn copies_race_with_a_client_who_cuts_his_file_off() {
    let space = space(64);
    let fd = open_memfd(64);
    space.join_client(file(&fd, IOVA, 64, 0), 1).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for size in (0..4000).map(|at| at * 37 % 65) {
                rustix::fs::ftruncate(&fd, size * P).unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        let mut data = vec![1; 64 * P as usize];
        let (mut done, mut failed) = (0, 0);
        loop {
            for result in [space.write(IOVA, &data), space.read(IOVA, &mut data)] {
                *(if result.is_ok() { &mut done } else { &mut failed }) += 1;
            }
            if stop.load(Ordering::SeqCst) {
                break;
            }
        }
        assert!(done + failed > 0);
    });
}

/// spec: VFU-74
#[test]
fn the_same_memory_is_joined_and_any_other_is_refused() {
    let space = space(64);
    let (fd, other) = (sealed(8), sealed(8));
    let first = space.join_client(file(&fd, IOVA, 4, P), 1).unwrap();
    let second = space.join_client(file(&fd, IOVA, 4, P), 2).unwrap();
    assert_eq!(first.map, second.map);
    let address = |joined: &Joined| joined.memory.mapping().unwrap().address();
    assert_eq!(address(&first), address(&second), "mapped once");
    let asked = Asked::new(IOVA, 4);
    let refused = [
        file(&other, IOVA, 4, P),
        file(&fd, IOVA, 4, 0),
        file(&fd, IOVA, 3, P),
        file(&fd, IOVA + P, 3, 2 * P),
        file(&fd, IOVA - P, 2, 0),
        ClientMap { write: false, ..file(&fd, IOVA, 4, P) },
        by_messages(&asked, IOVA, 4),
    ];
    for map in refused {
        assert_eq!(errno(space.join_client(map, 3)), Errno::EXIST);
    }
    assert_eq!(space.mappings(), [first.map]);
    space.leave_client(&first.map, 1, || {}).unwrap();
    space.write(IOVA, &[1]).unwrap();
    space.leave_client(&first.map, 2, || {}).unwrap();
    assert_eq!(space.write(IOVA, &[1]).unwrap_err().errno(), Errno::FAULT);
    // Not there any more: nothing happens.
    space.leave_client(&first.map, 2, || {}).unwrap();
    let third = space.join_client(file(&other, IOVA, 4, P), 3).unwrap();
    // It may have the first one's place; who has left does not take it away.
    space.leave_client(&first.map, 1, || {}).unwrap();
    assert_eq!(space.mappings(), [third.map]);
    assert_eq!(errno(space.join_client(file(&other, IOVA, 4, P), 3)), Errno::EXIST);
}

/// spec: VFU-75
#[test]
fn messages_go_to_whoever_answers_and_each_device_has_its_own_client() {
    let space = space(64);
    let (one, other) = (Asked::new(IOVA, 4), Asked::new(IOVA, 4));
    let first = space.join_client(by_messages(&one, IOVA, 4), 1).unwrap();
    let second = space.join_client(by_messages(&other, IOVA, 4), 2).unwrap();
    assert_eq!(errno(space.join_client(by_messages(&one, IOVA, 4), 1)), Errno::EXIST);
    second.memory.write(2 * P, b"second").unwrap();
    let mut seen = [0; 6];
    other.memory.read(2 * P, &mut seen).unwrap();
    assert_eq!(&seen, b"second");
    assert_eq!(one.asked.load(Ordering::SeqCst), 0);
    space.write(IOVA + P, b"either").unwrap();
    one.memory.read(P, &mut seen).unwrap();
    assert_eq!(&seen, b"either");
    one.refuses.store(true, Ordering::SeqCst);
    space.write(IOVA + P, b"theirs").unwrap();
    other.memory.read(P, &mut seen).unwrap();
    assert_eq!(&seen, b"theirs");
    other.refuses.store(true, Ordering::SeqCst);
    dirty(&space);
    assert_eq!(space.write(IOVA + P, b"nobody").unwrap_err().errno(), Errno::NOTCONN);
    assert_eq!(dirty(&space), [1], "unknown is dirty");
    assert!(first.memory.read(4 * P - 1, &mut [0; 2]).is_err(), "beyond the map");
    other.refuses.store(false, Ordering::SeqCst);
    space.leave_client(&first.map, 1, || {}).unwrap();
    assert_eq!(Arc::strong_count(&one), 2, "only what its device was given is left");
    space.read(IOVA, &mut seen).unwrap();
    space.leave_client(&second.map, 2, || {}).unwrap();
    assert!(space.mappings().is_empty());
}

/// A client that maps and unmaps while it is asked.
#[derive(Debug)]
struct Nested {
    space: Arc<AddressSpace>,
    fd: OwnedFd,
}

impl ClientAccess for Nested {
    fn read(&self, _: u64, data: &mut [u8]) -> Result<(), Errno> {
        let joined = self.space.join_client(file(&self.fd, IOVA + 16 * P, 1, 0), 7).map_err(|error| error.errno())?;
        self.space.write(IOVA + 16 * P, &[9]).map_err(|error| error.errno())?;
        data.fill(9);
        self.space.leave_client(&joined.map, 7, || {}).map_err(|error| error.errno())
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::NODEV)
    }
}

/// spec: VFU-75
#[test]
fn a_client_is_asked_with_nothing_locked() {
    let space = space(64);
    let nested = Arc::new(Nested { space: Arc::clone(&space), fd: open_memfd(1) });
    let source = ClientSource::Messages(nested);
    space.join_client(ClientMap { iova: IOVA, length: P, read: true, write: true, source }, 1).unwrap();
    let mut seen = [0; 4];
    space.read(IOVA, &mut seen).unwrap();
    assert_eq!(seen, [9; 4]);
    assert_eq!(space.write(IOVA, &seen).unwrap_err().errno(), Errno::NODEV);
}

/// A client that unmaps the file beside what it is asked for.
#[derive(Debug)]
struct Unmapping {
    space: Arc<AddressSpace>,
}

impl ClientAccess for Unmapping {
    fn read(&self, _: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.fill(1);
        self.space.unmap(IOVA + P, P).map(drop).map_err(|error| error.errno())
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.read(iova, &mut vec![0; data.len()])
    }
}

/// spec: VFU-75
#[test]
fn a_client_that_is_asked_may_unmap_the_rest_of_the_transfer() {
    let (space, fd) = (space(8), open_memfd(1));
    let source = ClientSource::Messages(Arc::new(Unmapping { space: Arc::clone(&space) }));
    space.join_client(ClientMap { iova: IOVA, length: P, read: true, write: true, source }, 1).unwrap();
    for _ in 0..2 {
        space.join_client(file(&fd, IOVA + P, 1, 0), 1).unwrap();
        let begun = Instant::now();
        space.read(IOVA + P - 4, &mut [0; 8]).unwrap();
        space.join_client(file(&fd, IOVA + P, 1, 0), 1).unwrap();
        space.write(IOVA + P - 4, &[7; 8]).unwrap();
        assert!(begun.elapsed() < COPY_WAIT, "nobody waited");
    }
    let mut seen = [0; 5];
    rustix::io::pread(&fd, &mut seen, 0).unwrap();
    assert_eq!(seen, [7, 7, 7, 7, 0]);
}

/// spec: MEM-43
#[test]
fn the_limit_holds_and_what_is_given_back_is_room_again() {
    let space = space(16);
    let fd = sealed(32);
    assert_eq!(errno(space.join_client(file(&fd, IOVA, 17, 0), 1)), Errno::NOSPC);
    let huge = ClientMap { length: 1 << 50, ..file(&fd, IOVA, 1, 0) };
    assert_eq!(errno(space.join_client(huge, 1)), Errno::NOSPC);
    let one = space.join_client(file(&fd, IOVA, 16, 0), 1).unwrap();
    // Joining needs no room.
    space.join_client(file(&fd, IOVA, 16, 0), 2).unwrap();
    let asked = Asked::new(0, 1);
    assert_eq!(errno(space.join_client(by_messages(&asked, 0, 1), 1)), Errno::NOSPC);
    space.leave_client(&one.map, 1, || {}).unwrap();
    space.leave_client(&one.map, 2, || {}).unwrap();
    space.write(IOVA, &[1]).unwrap_err();
    for at in 0..16 {
        space.join_client(file(&fd, IOVA + at * 2 * P, 1, at * P), 1).unwrap();
    }
    assert_eq!(errno(space.join_client(file(&fd, 0, 1, 0), 1)), Errno::NOSPC);
    let removed = space.unmap(0, u64::MAX).unwrap();
    assert_eq!(removed.len(), 16);
    space.join_client(file(&fd, IOVA, 16, 0), 1).unwrap();
    // No more than can be counted, and none of no bytes.
    assert_eq!(AddressSpace::of_clients(u64::MAX >> 30).log().pages(), (u64::MAX >> 30) / P);
    let none = AddressSpace::of_clients(P - 1);
    assert_eq!(errno(none.join_client(file(&fd, IOVA, 1, 0), 1)), Errno::NOSPC);
}

/// spec: MEM-43
#[test]
fn a_place_comes_back_clean() {
    let space = space(4);
    let fd = sealed(4);
    let joined = space.join_client(file(&fd, IOVA, 4, 0), 1).unwrap();
    space.write(IOVA, &vec![1; 4 * P as usize]).unwrap();
    space.leave_client(&joined.map, 1, || {}).unwrap();
    let joined = space.join_client(file(&fd, IOVA, 3, 0), 1).unwrap();
    assert!(dirty(&space).is_empty());
    space.mark_dirty(IOVA + 2 * P, 1).unwrap();
    assert_eq!(dirty(&space), [joined.map.ram_offset / P + 2]);
}

/// spec: MEM-42
#[test]
fn a_space_is_the_hosts_or_the_clients() {
    let ours = AddressSpace::new(crate::memory::GuestRam::new(4 * P).unwrap());
    assert_eq!(errno(ours.join_client(file(&sealed(1), IOVA, 1, 0), 1)), Errno::INVAL);
    assert!(ours.own_ram().is_ok());
    let theirs = space(4);
    let map = IovaMapping { iova: 0, length: P, ram_offset: 0, read: true, write: true };
    assert!(theirs.ram().is_none());
    assert!(matches!(theirs.own_ram(), Err(MemoryError::NoRam)));
    assert!(matches!(theirs.map(map), Err(MemoryError::NoRam)));
    assert!(matches!(theirs.join(map), Err(MemoryError::NoRam)));
    for map in [
        ClientMap { length: 0, ..file(&sealed(4), IOVA, 1, 0) },
        ClientMap { length: P + 1, ..file(&sealed(4), IOVA, 1, 0) },
        ClientMap { iova: 1, ..file(&sealed(4), IOVA, 1, 0) },
        ClientMap { read: false, write: false, ..file(&sealed(4), IOVA, 1, 0) },
    ] {
        assert_eq!(errno(theirs.join_client(map, 1)), Errno::INVAL);
    }
    let end = ClientMap { iova: u64::MAX - P + 1, ..file(&sealed(4), IOVA, 2, 0) };
    assert_eq!(errno(theirs.join_client(end, 1)), Errno::OVERFLOW);
    let last = ClientMap { iova: u64::MAX - P + 1, ..file(&sealed(4), IOVA, 1, 0) };
    theirs.join_client(last, 1).unwrap();
    theirs.write(u64::MAX, &[1]).unwrap();
}

/// spec: MEM-41
#[test]
fn the_log_of_clients_begins_clean_and_ends_with_the_last() {
    let space = AddressSpace::of_clients(8 * P);
    let fd = sealed(8);
    space.join_client(file(&fd, IOVA, 8, 0), 1).unwrap();
    space.write(IOVA, &[1]).unwrap();
    space.begin_log();
    assert!(space.log().is_tracking() && space.log().is_empty());
    space.write(IOVA, &[1]).unwrap();
    space.begin_log();
    assert_eq!(space.log().count(), 1, "another's begin loses nothing");
    space.end_log();
    space.write(IOVA + P, &[1]).unwrap();
    assert_eq!(space.log().count(), 2);
    space.end_log();
    assert!(!space.log().is_tracking() && space.log().is_empty());
    space.begin_log();
    assert!(space.log().is_tracking() && space.log().is_empty());
}

/// spec: MEM-40
#[test]
fn nobody_copies_any_more_when_a_map_has_gone() {
    for fd in [sealed(256), open_memfd(256)] {
        let space = space(1024);
        for round in 0..40u8 {
            let joined = space.join_client(file(&fd, IOVA, 256, 0), 1).unwrap();
            let writing = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let writers: Vec<_> = (0..3)
                    .map(|writer| {
                        let (space, writing) = (&space, &writing);
                        scope.spawn(move || {
                            let data = vec![round.wrapping_mul(3) + writer; 256 * P as usize];
                            while space.write(IOVA, &data).is_ok() {
                                writing.store(true, Ordering::SeqCst);
                            }
                        })
                    })
                    .collect();
                while !writing.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                space.leave_client(&joined.map, 1, || {}).unwrap();
                // It is the client's again.
                let (mark, mut seen) = (vec![0xEE; 256 * P as usize], vec![0; 256 * P as usize]);
                rustix::io::pwrite(&fd, &mark, 0).unwrap();
                writers.into_iter().for_each(|writer| writer.join().unwrap());
                rustix::io::pread(&fd, &mut seen, 0).unwrap();
                assert!(seen == mark, "round {round}");
            });
        }
    }
}

/// Copies that are on their way while a map goes: either nothing of them is there, or the last report has them.
///
/// spec: VFU-77
#[test]
fn what_is_written_while_a_map_goes_is_told_with_it() {
    const PAGES: u64 = 256;
    let fd = sealed(PAGES);
    for round in 0..100 {
        rustix::io::pwrite(&fd, &vec![0; (PAGES * P) as usize], 0).unwrap();
        let space = space(1024);
        let joined = space.join_client(file(&fd, IOVA, PAGES, 0), 1).unwrap();
        let writing = AtomicBool::new(false);
        let mut bitmap = [0; (PAGES / 8) as usize];
        let mut report = Report::new(IOVA, PAGES * P, P, &mut bitmap).unwrap();
        let mut taken = Taken::new(&space);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut pages = (0..PAGES).cycle();
                while pages.next().is_some_and(|page| space.write(IOVA + page * P, &[1]).is_ok()) {
                    writing.store(true, Ordering::SeqCst);
                }
            });
            while !writing.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            space.leave_client(&joined.map, 1, || taken.take(&joined.map, &mut report)).unwrap();
        });
        taken.commit();
        for page in 0..PAGES {
            let mut byte = [0];
            rustix::io::pread(&fd, &mut byte, page * P).unwrap();
            let told = bitmap[(page / 8) as usize] >> (page % 8) & 1;
            assert!(byte[0] <= told, "round {round}: page {page} was written, and not told");
        }
    }
}

/// Where the machine has huge pages.
#[test]
fn a_part_of_a_huge_page_is_mapped_with_the_whole_of_it() {
    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(fd) = rustix::fs::memfd_create("huge", flags) else { return };
    rustix::fs::ftruncate(&fd, 2 * HUGE).unwrap();
    let space = space(4096);
    match space.join_client(file(&fd, IOVA, 200, HUGE - 100 * P), 1) {
        Ok(joined) => {
            assert_eq!((joined.offset, joined.memory.len()), (HUGE - 100 * P, 2 * HUGE));
            space.write(IOVA + 100 * P - 1, b"ab").unwrap();
            let whole = Mapping::new(&fd, 0, 2 * HUGE).unwrap();
            let mut seen = [0; 2];
            whole.read(HUGE - 1, &mut seen).unwrap();
            assert_eq!(&seen, b"ab");
            space.leave_client(&joined.map, 1, || {}).unwrap();
        }
        // None are set aside.
        Err(error) => assert_eq!(error.errno(), Errno::NOMEM),
    }
    assert!(space.mappings().is_empty());
}
