//! The byte stream in which [`super::Stateful`] carries its state. Opaque to everybody else.
//!
//! Little-endian. A header (magic, version), then records (kind u32, payload length u32, payload): PAGE (page number u32,
//! 4096 bytes; a later one replaces an earlier one), REGISTERS (once), END (CRC-32 of all bytes before the record).

use crc32fast::Hasher;
use rustix::io::Errno;

use crate::sys::Mapping;

pub(super) const MEMORY_SIZE: usize = 64 << 10;
const PAGE: usize = 4096;
const HEADER: [u8; 8] = *b"VMSF\x01\0\0\0";
const KIND_PAGE: u32 = 1;
const KIND_REGISTERS: u32 = 2;
const KIND_END: u32 = 3;
const RECORD: usize = 8;
const PAGE_PAYLOAD: usize = 4 + PAGE;
pub(super) const REGISTERS_PAYLOAD: usize = 40;

/// Bytes of a stream that carries every page once.
pub(super) const FULL: u64 =
    (HEADER.len() + MEMORY_SIZE / PAGE * (RECORD + PAGE_PAYLOAD) + RECORD + REGISTERS_PAYLOAD + RECORD + 4) as u64;

/// The saving side: what has been queued and not read yet.
#[derive(Debug)]
pub(super) struct Saving {
    queue: Vec<u8>,
    read: usize,
    /// Of the queue, bytes that belong to the first copy
    initial: usize,
    /// Device memory as it was last queued
    shadow: Vec<u8>,
    crc: Hasher,
    finished: bool,
}

impl Saving {
    /// Queues the header and every page.
    pub(super) fn begin(memory: &Mapping) -> Result<Self, Errno> {
        let mut saving = Self {
            queue: Vec::new(),
            read: 0,
            initial: 0,
            shadow: snapshot(memory)?,
            crc: Hasher::new(),
            finished: false,
        };
        saving.put(&HEADER);
        for page in 0..MEMORY_SIZE / PAGE {
            saving.put_page(page);
        }
        saving.initial = saving.queue.len();
        Ok(saving)
    }

    /// Queues the pages that differ from what was queued last.
    pub(super) fn queue_changes(&mut self, memory: &Mapping) -> Result<(), Errno> {
        let now = snapshot(memory)?;
        let changed: Vec<usize> = self.changed(&now).collect();
        self.shadow = now;
        changed.into_iter().for_each(|page| self.put_page(page));
        Ok(())
    }

    /// Queues the rest; nothing follows.
    pub(super) fn finish(&mut self, memory: &Mapping, registers: &[u8; REGISTERS_PAYLOAD]) -> Result<(), Errno> {
        self.queue_changes(memory)?;
        self.put_record(KIND_REGISTERS, &[registers]);
        let crc = self.crc.clone().finalize();
        self.put_record(KIND_END, &[&crc.to_le_bytes()]);
        self.finished = true;
        Ok(())
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    pub(super) fn is_empty(&self) -> bool {
        self.read == self.queue.len()
    }

    /// Takes up to `buffer.len()` queued bytes.
    pub(super) fn take(&mut self, buffer: &mut [u8]) -> usize {
        let left = &self.queue[self.read..];
        let count = left.len().min(buffer.len());
        buffer[..count].copy_from_slice(&left[..count]);
        self.read += count;
        if self.is_empty() {
            (self.queue, self.read, self.initial) = (Vec::new(), 0, 0);
        }
        count
    }

    /// Bytes of the first copy, and of later ones, that have not been read, changed pages included.
    pub(super) fn remaining(&self, memory: &Mapping) -> Result<(u64, u64), Errno> {
        let initial = self.initial.saturating_sub(self.read);
        let queued = self.queue.len() - self.read - initial;
        let changed = self.changed(&snapshot(memory)?).count() * (RECORD + PAGE_PAYLOAD);
        Ok((initial as u64, (queued + changed) as u64))
    }

    fn changed(&self, now: &[u8]) -> impl Iterator<Item = usize> {
        let pages = self.shadow.chunks(PAGE).zip(now.chunks(PAGE)).enumerate();
        pages.filter(|(_, (old, new))| old != new).map(|(page, _)| page)
    }

    fn put_page(&mut self, page: usize) {
        let bytes = self.shadow[page * PAGE..][..PAGE].to_vec();
        self.put_record(KIND_PAGE, &[&(page as u32).to_le_bytes(), &bytes]);
    }

    fn put_record(&mut self, kind: u32, payload: &[&[u8]]) {
        let length: usize = payload.iter().map(|part| part.len()).sum();
        self.put(&kind.to_le_bytes());
        self.put(&(length as u32).to_le_bytes());
        payload.iter().for_each(|part| self.put(part));
    }

    fn put(&mut self, bytes: &[u8]) {
        self.crc.update(bytes);
        self.queue.extend_from_slice(bytes);
    }
}

fn snapshot(memory: &Mapping) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; MEMORY_SIZE];
    memory.read(0, &mut bytes).map_err(|_| Errno::IO)?;
    Ok(bytes)
}

/// The resuming side: parses as bytes arrive, holds at most one record, and applies nothing before the end.
#[derive(Debug)]
pub(super) struct Loading {
    partial: Vec<u8>,
    started: bool,
    memory: Vec<u8>,
    registers: Option<[u8; REGISTERS_PAYLOAD]>,
    crc: Hasher,
    ended: bool,
    bad: bool,
}

impl Loading {
    pub(super) fn new() -> Self {
        Self {
            partial: Vec::new(),
            started: false,
            memory: vec![0; MEMORY_SIZE],
            registers: None,
            crc: Hasher::new(),
            ended: false,
            bad: false,
        }
    }

    /// EINVAL for bytes that are no stream of ours; the load has then failed for good.
    pub(super) fn write(&mut self, data: &[u8]) -> Result<(), Errno> {
        let mut left = data;
        while !self.bad && !left.is_empty() {
            let taken = self.wanted().min(left.len());
            self.partial.extend_from_slice(&left[..taken]);
            left = &left[taken..];
            if taken == 0 || self.parse().is_err() {
                self.bad = true;
            }
        }
        if self.bad { Err(Errno::INVAL) } else { Ok(()) }
    }

    /// Memory and registers, if the stream was whole.
    pub(super) fn finish(&self) -> Result<(&[u8], &[u8; REGISTERS_PAYLOAD]), Errno> {
        match &self.registers {
            Some(registers) if self.ended && !self.bad => Ok((&self.memory, registers)),
            _ => Err(Errno::INVAL),
        }
    }

    /// Bytes until something can be parsed; 0 after the end.
    fn wanted(&self) -> usize {
        let size = match (self.started, self.ended) {
            (_, true) => 0,
            (false, _) => HEADER.len(),
            (true, _) => RECORD + self.record().map_or(0, |(_, length)| length),
        };
        size - self.partial.len()
    }

    /// Kind and payload length of the record that is arriving. A length that its kind does not have counts as 0, and
    /// [`Self::parse`] refuses it: nothing is allocated for it.
    fn record(&self) -> Option<(u32, usize)> {
        let (kind, rest) = self.partial.split_first_chunk::<4>()?;
        let (length, _) = rest.split_first_chunk::<4>()?;
        let (kind, length) = (u32::from_le_bytes(*kind), u32::from_le_bytes(*length) as usize);
        let expected = match kind {
            KIND_PAGE => PAGE_PAYLOAD,
            KIND_REGISTERS => REGISTERS_PAYLOAD,
            KIND_END => 4,
            _ => return Some((kind, 0)),
        };
        Some((kind, if length == expected { length } else { 0 }))
    }

    fn parse(&mut self) -> Result<(), Errno> {
        if self.wanted() != 0 {
            return Ok(());
        }
        let record = self.record();
        let bytes = std::mem::take(&mut self.partial);
        if !self.started {
            self.started = true;
            self.crc.update(&bytes);
            return if bytes == HEADER { Ok(()) } else { Err(Errno::INVAL) };
        }
        let (kind, _) = record.ok_or(Errno::INVAL)?;
        match (kind, &bytes[RECORD..]) {
            (KIND_PAGE, [p0, p1, p2, p3, data @ ..]) => {
                let page = u32::from_le_bytes([*p0, *p1, *p2, *p3]) as usize;
                let target = self.memory.chunks_mut(PAGE).nth(page).ok_or(Errno::INVAL)?;
                target.copy_from_slice(data);
            }
            (KIND_REGISTERS, registers) if self.registers.is_none() => {
                self.registers = Some(registers.try_into().map_err(|_| Errno::INVAL)?);
            }
            (KIND_END, crc) if crc == self.crc.clone().finalize().to_le_bytes() => self.ended = true,
            _ => return Err(Errno::INVAL),
        }
        self.crc.update(&bytes);
        Ok(())
    }
}
