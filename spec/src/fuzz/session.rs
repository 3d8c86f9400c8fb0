//! A session, fed with bytes that are cut in any way, and a device that watches what it is asked.
//!
//! ```text
//!  begin u8 (bit 0: VERSION was agreed on already), then steps: op u8, and what it needs
//!  op % 8:  0-3 receive: length u16, that many bytes; op / 8 % 8 descriptors (7: 65)      4 serve all      5 serve one
//!           6 ask the client (op / 8): 0 read, 1 write, 2 batch, 3 take a reply, 4 abandon; a parameter u8
//!           7 the right answer to the oldest question
//! ```
//! Descriptors are counted: in the end none is open.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Mutex;

use rustix::io::Errno;
use vfio_mediate::device::Feature;
use vfio_mediate::frontend::vfio_user::session::{
    Backend, Maps, Message, Next, OUTSTANDING_MAX, Output, RegionAnswer, Served, Session, Ticket, serve,
};
use vfio_mediate::frontend::vfio_user::wire::{
    DATA_XFER_MAX, DeviceInfo, DmaMap, IrqInfo, LoggingRanges, LoggingReport, MESSAGE_MAX, MSG_FDS_MAX, MigrationState,
    SetIrqs, SetIrqsData,
};

/// Counted while it is open.
#[derive(Debug)]
pub struct Fd(Rc<Cell<usize>>);

impl Fd {
    fn open(count: &Rc<Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Self(Rc::clone(count))
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A device that asserts what the protocol promises it.
#[derive(Debug)]
struct Device {
    open: Rc<Cell<usize>>,
    maps: Vec<DmaMap>,
    irqs: Vec<Fd>,
    calls: u32,
}

impl Device {
    /// Every seventh call fails.
    fn call(&mut self) -> Result<(), Errno> {
        self.calls += 1;
        if self.calls.is_multiple_of(7) { Err(Errno::IO) } else { Ok(()) }
    }
}

impl Backend for Device {
    type Fd = Fd;

    fn device_info(&mut self) -> Result<DeviceInfo, Errno> {
        self.call().map(|()| DeviceInfo { flags: 3, num_regions: 9, num_irqs: 5 })
    }

    fn region_info(&mut self, index: u32) -> Result<RegionAnswer<Fd>, Errno> {
        self.call()?;
        let file = index.is_multiple_of(2).then(|| (Fd::open(&self.open), 0));
        Ok(RegionAnswer { flags: 3, size: 4096, capabilities: Vec::new(), file })
    }

    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno> {
        self.call().map(|()| IrqInfo { flags: 1, index, count: 8 })
    }

    fn set_irqs(&mut self, request: &SetIrqs<'_>, fds: Vec<Fd>) -> Result<(), Errno> {
        let wanted = if request.data == SetIrqsData::EventFds { request.count as usize } else { 0 };
        assert_eq!(fds.len(), wanted);
        self.call()?;
        self.irqs = fds;
        Ok(())
    }

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        assert!(!data.is_empty() && data.len() <= DATA_XFER_MAX as usize);
        assert!(offset.checked_add(data.len() as u64 - 1).is_some());
        data.fill(0xa5);
        self.call()
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        assert!(!data.is_empty() && offset.checked_add(data.len() as u64 - 1).is_some());
        self.call()
    }

    fn dma_map(&mut self, map: &DmaMap, _fd: Option<Fd>) -> Result<(), Errno> {
        let last = |map: &DmaMap| map.address + (map.size - 1);
        assert!(self.maps.iter().all(|other| last(other) < map.address || last(map) < other.address), "an overlap");
        self.call()?;
        self.maps.push(*map);
        Ok(())
    }

    fn dma_unmap(&mut self, map: &DmaMap, dirty: Option<(u64, &mut [u8])>) -> Result<(), Errno> {
        let at = self.maps.iter().position(|other| other == map).expect("a map that was never made");
        if let Some((page_size, bitmap)) = dirty {
            assert!(bitmap.iter().all(|byte| *byte == 0));
            assert!(map.size.div_ceil(page_size) <= bitmap.len() as u64 * 8, "no room for all pages");
            bitmap.fill(0xff);
        }
        self.call()?;
        self.maps.swap_remove(at);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.call()
    }

    fn probe(&mut self, _feature: Feature, _get: bool, _set: bool) -> Result<(), Errno> {
        self.call()
    }

    fn migration_flags(&mut self) -> Result<u64, Errno> {
        self.call().map(|()| 7)
    }

    fn state(&mut self) -> Result<MigrationState, Errno> {
        self.call().map(|()| MigrationState::Running)
    }

    fn set_state(&mut self, _state: MigrationState) -> Result<(), Errno> {
        self.call()
    }

    fn mig_data_read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        assert!(!buffer.is_empty() && buffer.len() <= DATA_XFER_MAX as usize);
        self.call().map(|()| buffer.len() / 2)
    }

    fn mig_data_write(&mut self, data: &[u8]) -> Result<(), Errno> {
        assert!(!data.is_empty());
        self.call()
    }

    fn logging_start(&mut self, page_size: u64, ranges: LoggingRanges<'_>) -> Result<u64, Errno> {
        assert!(page_size.is_power_of_two() && page_size >= 4096);
        assert!(ranges.iter().all(|range| range.iova <= range.last));
        self.call().map(|()| page_size)
    }

    fn logging_stop(&mut self) -> Result<(), Errno> {
        self.call()
    }

    fn logging_report(&mut self, report: &LoggingReport, bitmap: &mut [u8]) -> Result<(), Errno> {
        assert!(bitmap.len() as u64 == report.bitmap_length() && bitmap.iter().all(|byte| *byte == 0));
        bitmap.fill(0xff);
        self.call()
    }

    fn low_power_entry(&mut self, _wakeup: Option<Fd>) -> Result<(), Errno> {
        self.call()
    }

    fn low_power_exit(&mut self) -> Result<(), Errno> {
        self.call()
    }
}

struct Bench {
    session: Session<Fd>,
    message: Message<Fd>,
    out: Output<Fd>,
    maps: Mutex<Maps>,
    device: Device,
    open: Rc<Cell<usize>>,
    /// Asked, and not yet taken or abandoned: the ticket and the request's bytes
    asked: VecDeque<(Ticket, Vec<u8>)>,
}

pub fn run(data: &[u8]) {
    let open = Rc::new(Cell::new(0));
    let device = Device { open: Rc::clone(&open), maps: Vec::new(), irqs: Vec::new(), calls: 0 };
    let mut bench = Bench {
        session: Session::new(),
        message: Message::new(),
        out: Output::default(),
        maps: Mutex::default(),
        device,
        open: Rc::clone(&open),
        asked: VecDeque::new(),
    };
    let Some((begin, mut rest)) = data.split_first() else { return };
    if begin & 1 == 1 {
        bench.receive(&[0, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], 0);
        bench.serve(usize::MAX);
        assert!(bench.session.negotiated().is_some());
    }
    while let Some((op, behind)) = rest.split_first() {
        rest = bench.step(*op, behind);
    }
    bench.serve(usize::MAX);
    let maps = bench.maps.lock().expect("nobody panicked with it").len();
    assert_eq!(maps, bench.device.maps.len(), "the session and the device disagree on what is mapped");
    drop(bench);
    assert_eq!(open.get(), 0, "a descriptor is still open");
}

impl Bench {
    fn step<'a>(&mut self, op: u8, rest: &'a [u8]) -> &'a [u8] {
        match op % 8 {
            0..=3 => {
                let Some((length, rest)) = rest.split_first_chunk::<2>() else { return &[] };
                let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
                let (bytes, rest) = rest.split_at(length);
                let fds = match op / 8 % 8 {
                    7 => MSG_FDS_MAX + 1,
                    fds => usize::from(fds),
                };
                self.receive(bytes, fds);
                rest
            }
            4 => {
                self.serve(usize::MAX);
                rest
            }
            5 => {
                self.serve(1);
                rest
            }
            6 => {
                let Some((parameter, rest)) = rest.split_first() else { return &[] };
                self.ask(op / 8, *parameter);
                rest
            }
            _ => {
                self.answer();
                rest
            }
        }
    }

    /// As one receive, or as many as it takes.
    fn receive(&mut self, mut bytes: &[u8], fds: usize) {
        let mut fds: Vec<Fd> = (0..fds).map(|_| Fd::open(&self.open)).collect();
        loop {
            let space = self.session.space();
            let count = space.len().min(bytes.len());
            if count == 0 {
                return;
            }
            let (now, later) = bytes.split_at(count);
            space[..count].copy_from_slice(now);
            if self.session.received(count, std::mem::take(&mut fds)).is_err() {
                assert!(self.session.space().is_empty(), "an ended session takes no more");
                return;
            }
            bytes = later;
        }
    }

    fn serve(&mut self, most: usize) {
        for _ in 0..most {
            match self.session.next(&mut self.message, &mut self.out) {
                Next::Wait | Next::Close(_) => return,
                Next::Send => self.reply(),
                Next::Serve(negotiated) => {
                    let no_reply = self.message.no_reply();
                    let served = serve(&mut self.message, &negotiated, &self.maps, &mut self.device, &mut self.out);
                    assert!(self.message.fds.is_empty());
                    assert_eq!(no_reply, served == Served::Silent);
                    if no_reply {
                        assert!(self.out.concat().is_empty() && self.out.fds.is_empty());
                    } else {
                        self.reply();
                    }
                }
            }
        }
    }

    /// The output answers the message: looked at as bytes.
    fn reply(&self) {
        let bytes = self.out.concat();
        let request = self.message.header;
        assert!(bytes.len() >= 16 && bytes.len() <= MESSAGE_MAX + 40, "{} bytes", bytes.len());
        assert_eq!(bytes[0..2], request.id.to_le_bytes());
        assert_eq!(bytes[2..4], request.command.to_le_bytes());
        assert_eq!(bytes[4..8], (bytes.len() as u32).to_le_bytes());
        let errno = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        match bytes[8] {
            0x21 => assert!(errno != 0 && bytes.len() == 16 && self.out.fds.is_empty()),
            flags => assert!(flags == 1 && errno == 0),
        }
        assert!(self.out.fds.len() <= 1);
    }

    fn ask(&mut self, what: u8, parameter: u8) {
        let address = u64::from(parameter) << 12;
        let count = u32::from(parameter) * 17;
        let mut out = Vec::new();
        let asked = match what {
            0 => self.session.dma_read(address, count, &mut out),
            1 => self.session.dma_write(address, &vec![7; count as usize], &mut out),
            2 => {
                let data = vec![9; count as usize];
                let mut writes = (0..u64::from(parameter)).map(|n| (n << 12, &data[..])).peekable();
                let batch = self.session.dma_write_batch(&mut writes);
                batch.map(|batch| {
                    assert_eq!(batch.ends.last(), Some(&batch.bytes.len()));
                    // The barrier is the last message.
                    out = batch.bytes[batch.bytes.len() - 32 - count as usize..].to_vec();
                    batch.barrier
                })
            }
            3 => {
                if let Some((ticket, request)) = self.asked.pop_front() {
                    match self.session.take_reply(ticket) {
                        None => self.asked.push_back((ticket, request)),
                        Some(Ok(data)) => assert!(data.is_empty() || request[2] == 11),
                        Some(Err(errno)) => assert!(errno.raw_os_error() > 0),
                    }
                }
                return;
            }
            _ => {
                if let Some((ticket, _)) = self.asked.pop_back() {
                    self.session.abandon(ticket);
                }
                return;
            }
        };
        match asked {
            Ok(ticket) => {
                assert!(self.session.negotiated().is_some() && self.asked.len() < OUTSTANDING_MAX);
                assert_eq!(out.len(), out[4..8].iter().rev().fold(0, |size, byte| size << 8 | usize::from(*byte)));
                self.asked.push_back((ticket, out));
            }
            Err(errno) => assert!(errno.raw_os_error() > 0),
        }
    }

    fn answer(&mut self) {
        let Some((_, request)) = self.asked.front() else { return };
        let mut bytes = request[..32].to_vec();
        if request[2] == 11 {
            let count = u32::from_le_bytes([request[24], request[25], request[26], request[27]]);
            bytes.resize(32 + count as usize, 0x5a);
        }
        let size = (bytes.len() as u32).to_le_bytes();
        bytes[4..8].copy_from_slice(&size);
        bytes[8] = 1;
        self.receive(&bytes, 0);
    }
}
