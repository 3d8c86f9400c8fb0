//! Save and restore.
//!
//! **Owns** the blob: records IDENTITY, REGISTERS, BUFFER, in this order, each mandatory. IDENTITY goes out in PRE_COPY, so
//! that a destination which cannot load refuses while the source still runs; all the rest is STOP_COPY's.
//!
//! *The buffer* is read by a DMA to scratch memory, which overwrites the DMA registers: those are read before, and brought
//! back when the device leaves STOP for running (a failed migration goes on where it was). The scratch page is filled with
//! numbers that no device writes by chance: if they are still there, the DMA went elsewhere.
//!
//! *The factorial's result* cannot be written, but an input that gives it can: modulo 2^32 there are 35 results (34! is 0,
//! and so are all that follow), so no write of the client needs to be remembered for it.
//!
//! *Interrupts*: pending causes are raised again at the destination, as is the one of a left-over command with its
//! interrupt bit: a client may see one interrupt more, never one less.

use vfio_mediate_sdk::record::{Next, Record, StreamReader, StreamWriter, Taken};
use vfio_mediate_sdk::state::DeviceState::{self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use vfio_mediate_sdk::{ArcFailed, Context, Errno, Migration, Refusal, Remaining, Result, Saved, ScratchGuard};

use crate::registers::{
    self, BAR, BUFFER, BUFFER_SIZE, DmaRegisters, FACTORIAL, IRQ_ACK, IRQ_RAISE, IRQ_STATUS, LIVENESS, RUN, STATUS,
    STATUS_IRQ, TO_RAM,
};
use crate::{EduDevice, lock};

/// Of REGISTERS and BUFFER as they are now.
const FORMAT: u32 = 1;
const IDENTITY: u16 = 1;
const REGISTERS: u16 = 2;
const BUFFER_RECORD: u16 = 3;

/// The open stream, if there is one.
#[derive(Debug)]
pub(crate) enum Stream {
    None,
    Saving(Saving),
    Loading(Box<Loading>),
}

#[derive(Debug)]
pub(crate) struct Saving {
    writer: StreamWriter,
    identity: Option<Record>,
    /// Once in STOP_COPY: what is left, last first
    captured: Option<Vec<Record>>,
}

#[derive(Debug)]
pub(crate) struct Loading {
    reader: StreamReader,
    state: Loaded,
}

#[derive(Debug, Default)]
struct Loaded {
    identity: bool,
    registers: Option<Registers>,
    buffer: Option<Vec<u8>>,
}

/// What the device gives back when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Registers {
    liveness: u32,
    result: u32,
    status: u32,
    irq_status: u32,
    /// With RUN set when the command is deferred
    dma: DmaRegisters,
}

impl Registers {
    fn record(&self) -> Record {
        let Self { liveness, result, status, irq_status, dma } = *self;
        Record::mandatory(REGISTERS)
            .u32(liveness)
            .u32(result)
            .u32(status)
            .u32(irq_status)
            .u64(dma.src)
            .u64(dma.dst)
            .u64(dma.count)
            .u64(dma.command)
    }

    fn parse(record: &Record) -> Result<Self> {
        let mut fields = record.fields();
        let registers = Self {
            liveness: fields.u32()?,
            result: fields.u32()?,
            status: fields.u32()?,
            irq_status: fields.u32()?,
            dma: DmaRegisters { src: fields.u64()?, dst: fields.u64()?, count: fields.u64()?, command: fields.u64()? },
        };
        fields.end()?;
        // Refused here, while the stream can still be refused.
        factorial_input(registers.result)?;
        Ok(registers)
    }
}

fn identity_bytes(id: u32) -> Record {
    Record::mandatory(IDENTITY).u32(id).u32(FORMAT)
}

fn check_identity(own: u32, record: &Record) -> Result<(), Refusal> {
    let parse = || {
        let mut fields = record.fields();
        let found = (fields.u32()?, fields.u32()?);
        fields.end().map(|()| found)
    };
    let (id, format) = parse().map_err(|errno| Refusal { errno, reason: "the match data are not an edu's".into() })?;
    if id != own {
        return Err(Refusal::differs(format!("the source is an edu of id {id:#010x}, this one's is {own:#010x}")));
    }
    if format != FORMAT {
        return Err(Refusal::differs(format!("the source's state has format {format}, this plug-in knows {FORMAT}")));
    }
    Ok(())
}

/// The smallest input with this result. EBADMSG when there is none.
fn factorial_input(result: u32) -> Result<u32> {
    let mut factorial = 1_u32;
    for input in 0..=34_u32 {
        factorial = factorial.wrapping_mul(input.max(1));
        if factorial == result {
            return Ok(input);
        }
    }
    Err(Errno::EBADMSG)
}

/// Numbers that no device writes by chance: other ones for each place and time.
fn sentinel(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).take(BUFFER_SIZE / 8).flatten().collect()
}

/// A page that the device reaches. An edu started with the default `dma_mask` cuts addresses to 28 bits and nothing says so;
/// where guest memory leaves no room below, the device must have been started with a wider one.
fn scratch<'a>(cx: &Context<'a>) -> Result<ScratchGuard<'a>> {
    match cx.scratch_below(BUFFER_SIZE as u64, 28) {
        Err(Errno::ENOSPC) => cx.scratch(BUFFER_SIZE as u64),
        scratch => scratch,
    }
}

/// Moves the hidden buffer out to `content`, or in from it, through scratch memory. What `content` holds on the way out is
/// what the scratch memory is filled with.
fn move_buffer(cx: &Context<'_>, content: &mut [u8], command: u64) -> Result<()> {
    let mut scratch = scratch(cx)?;
    scratch.write(cx, 0, content)?;
    let (src, dst) = if command & TO_RAM != 0 { (BUFFER, scratch.iova()) } else { (scratch.iova(), BUFFER) };
    if let Err(errno) = registers::run(cx, &DmaRegisters { src, dst, count: BUFFER_SIZE as u64, command }) {
        // The DMA may still be under way: the memory stays until `close`.
        let _ = scratch.keep();
        return Err(errno);
    }
    scratch.read(cx, 0, content)
}

/// The hidden buffer, out. EIO when the DMA did not arrive.
fn read_buffer(cx: &Context<'_>) -> Result<Vec<u8>> {
    let sentinel = sentinel(cx.now().as_nanos() as u64);
    let mut content = sentinel.clone();
    move_buffer(cx, &mut content, RUN | TO_RAM)?;
    if content == sentinel {
        tracing::error!("the device's DMA does not reach scratch memory; was it started with a dma_mask wide enough?");
        return Err(Errno::EIO);
    }
    Ok(content)
}

/// Whether the device reaches scratch memory both ways, while its buffer does not matter. Where addresses are cut off, both
/// ways go wrong alike, and what was read elsewhere is written back there.
fn check_reach(cx: &Context<'_>) -> Result<()> {
    registers::wait_for_dma(cx)?;
    let mut probe = sentinel(cx.now().as_nanos() as u64 ^ u64::MAX);
    let sent = probe.clone();
    let mut scratch = scratch(cx)?;
    let iova = scratch.iova();
    let run = |src, dst, command| registers::run(cx, &DmaRegisters { src, dst, count: BUFFER_SIZE as u64, command });
    let moved = scratch
        .write(cx, 0, &probe)
        .and_then(|()| run(iova, BUFFER, RUN))
        .and_then(|()| scratch.write(cx, 0, &[0; BUFFER_SIZE]))
        .and_then(|()| run(BUFFER, iova, RUN | TO_RAM));
    if let Err(errno) = moved {
        let _ = scratch.keep();
        return Err(errno);
    }
    scratch.read(cx, 0, &mut probe)?;
    if probe != sent {
        tracing::error!("the device's DMA does not reach scratch memory; was it started with a dma_mask wide enough?");
        return Err(Errno::EIO);
    }
    Ok(())
}

impl EduDevice {
    /// Reads the whole state of a stopped device.
    fn capture(&self, cx: &Context<'_>) -> Result<Vec<Record>> {
        let (borrowed, deferred) = {
            let dma = lock(&self.dma)?;
            (dma.borrowed, dma.deferred)
        };
        let mut own = match borrowed {
            Some(registers) => registers,
            None => DmaRegisters::read(cx)?,
        };
        // First this, then the DMA that overwrites them.
        lock(&self.dma)?.borrowed = Some(own);
        own.command = deferred.unwrap_or(own.command);
        let registers = Registers {
            // Reads the complement of what was written.
            liveness: !cx.read_u32(BAR, LIVENESS)?,
            result: cx.read_u32(BAR, FACTORIAL)?,
            status: cx.read_u32(BAR, STATUS)?,
            irq_status: cx.read_u32(BAR, IRQ_STATUS)?,
            dma: own,
        };
        factorial_input(registers.result)?;
        let buffer = read_buffer(cx)?;
        Ok(vec![Record::mandatory(BUFFER_RECORD).bytes(&buffer), registers.record()])
    }

    /// Writes a whole state to a stopped device.
    fn restore(&self, cx: &Context<'_>, saved: &Registers, buffer: &mut [u8]) -> Result<()> {
        registers::wait_for_dma(cx)?;
        // No interrupt for what we do here.
        cx.write_u32(BAR, STATUS, 0)?;
        registers::wait_for_factorial(cx)?;
        cx.write_u32(BAR, FACTORIAL, factorial_input(saved.result)?)?;
        registers::wait_for_factorial(cx)?;
        if cx.read_u32(BAR, FACTORIAL)? != saved.result {
            return Err(Errno::EIO);
        }
        cx.write_u32(BAR, LIVENESS, saved.liveness)?;
        move_buffer(cx, buffer, RUN)?;
        let deferred = Some(saved.dma.command).filter(|command| command & RUN != 0);
        // A deferred command overwrites what is left over of an older one.
        let command = if deferred.is_some() { 0 } else { saved.dma.command };
        DmaRegisters { command, ..saved.dma }.restore(cx)?;
        cx.write_u32(BAR, IRQ_ACK, cx.read_u32(BAR, IRQ_STATUS)?)?;
        cx.write_u32(BAR, STATUS, saved.status & STATUS_IRQ)?;
        if saved.irq_status != 0 {
            cx.write_u32(BAR, IRQ_RAISE, saved.irq_status)?;
        }
        let mut dma = lock(&self.dma)?;
        dma.deferred = deferred;
        dma.borrowed = None;
        Ok(())
    }

    fn begin_saving(&self) -> Result<()> {
        let identity = Some(identity_bytes(self.id));
        *lock(&self.stream)? = Stream::Saving(Saving { writer: StreamWriter::default(), identity, captured: None });
        Ok(())
    }

    fn begin_stop_copy(&self, cx: &Context<'_>) -> Result<()> {
        let captured = registers::with_bus_master(cx, || self.capture(cx))?;
        match &mut *lock(&self.stream)? {
            Stream::Saving(saving) => {
                saving.captured = Some(captured);
                Ok(())
            }
            Stream::None | Stream::Loading(_) => Err(Errno::EIO),
        }
    }

    fn close_stream(&self) -> Result<()> {
        *lock(&self.stream)? = Stream::None;
        Ok(())
    }

    fn begin_resuming(&self, cx: &Context<'_>) -> Result<()> {
        registers::with_bus_master(cx, || check_reach(cx))?;
        // The longest record is the buffer.
        let reader = StreamReader::new(BUFFER_SIZE);
        *lock(&self.stream)? = Stream::Loading(Box::new(Loading { reader, state: Loaded::default() }));
        Ok(())
    }

    fn end_resuming(&self, cx: &Context<'_>) -> Result<(), ArcFailed> {
        // As long as the device is untouched, it stays where it is.
        let refused = |errno| ArcFailed { errno, actual: Resuming };
        let stream = std::mem::replace(&mut *lock(&self.stream).map_err(refused)?, Stream::None);
        let Stream::Loading(loading) = stream else { return Err(refused(Errno::EBADMSG)) };
        loading.reader.finish().map_err(refused)?;
        let Loaded { identity: true, registers: Some(registers), buffer: Some(mut buffer) } = loading.state else {
            return Err(refused(Errno::EBADMSG));
        };
        registers::with_bus_master(cx, || self.restore(cx, &registers, &mut buffer))
            .map_err(|errno| ArcFailed { errno, actual: DeviceState::Error })
    }
}

impl Loaded {
    fn take(&mut self, id: u32, record: &Record) -> Result<Taken> {
        match record.kind {
            IDENTITY if !self.identity => {
                check_identity(id, record).map_err(|refusal| {
                    tracing::error!("{}", refusal.reason);
                    refusal.errno
                })?;
                self.identity = true;
            }
            REGISTERS if self.identity && self.registers.is_none() => {
                self.registers = Some(Registers::parse(record)?);
            }
            BUFFER_RECORD if self.registers.is_some() && self.buffer.is_none() => {
                let mut fields = record.fields();
                self.buffer = Some(fields.bytes(BUFFER_SIZE)?.to_vec());
                fields.end()?;
            }
            IDENTITY | REGISTERS | BUFFER_RECORD => return Err(Errno::EBADMSG),
            _ => return Ok(Taken::Unknown),
        }
        Ok(Taken::Known)
    }
}

impl Saving {
    fn next(&mut self) -> Next {
        if let Some(identity) = self.identity.take() {
            return Next::Record(identity);
        }
        match &mut self.captured {
            None => Next::Pause,
            Some(left) => left.pop().map_or(Next::End, Next::Record),
        }
    }
}

impl Migration for EduDevice {
    fn match_data(&self, _: &Context<'_>) -> Result<Vec<u8>> {
        Ok(identity_bytes(self.id).payload)
    }

    fn check_match(&self, _: &Context<'_>, data: &[u8]) -> Result<(), Refusal> {
        check_identity(self.id, &Record::mandatory(IDENTITY).bytes(data))
    }

    fn set_state(&self, cx: &Context<'_>, from: DeviceState, to: DeviceState) -> Result<(), ArcFailed> {
        let stays = |errno| ArcFailed { errno, actual: from };
        match (from, to) {
            (Running, RunningP2p) | (PreCopy, PreCopyP2p) => self.quiesce(cx).map_err(stays),
            (RunningP2p, Running) | (PreCopyP2p, PreCopy) => self.run(cx).map_err(stays),
            (Running, PreCopy) | (RunningP2p, PreCopyP2p) => self.begin_saving().map_err(stays),
            (PreCopy, Running) | (PreCopyP2p, RunningP2p) | (StopCopy, Stop) => self.close_stream().map_err(stays),
            (RunningP2p, Stop) => self.freeze(cx).map_err(stays),
            (Stop, RunningP2p) => self.thaw(cx).map_err(stays),
            (Stop, StopCopy) => self
                .begin_saving()
                .and_then(|()| self.begin_stop_copy(cx))
                .or_else(|errno| self.close_stream().and(Err(errno)))
                .map_err(stays),
            (PreCopyP2p, StopCopy) => {
                self.freeze(cx).map_err(stays)?;
                self.begin_stop_copy(cx)
                    .or_else(|errno| self.close_stream().and(Err(errno)))
                    .map_err(|errno| ArcFailed { errno, actual: Stop })
            }
            (Stop, Resuming) => self.begin_resuming(cx).map_err(stays),
            (Resuming, Stop) => self.end_resuming(cx),
            // Not an arc of the state machine for these flags.
            _ => Err(stays(Errno::EINVAL)),
        }
    }

    fn save(&self, _: &Context<'_>, buffer: &mut [u8]) -> Result<Saved> {
        match &mut *lock(&self.stream)? {
            Stream::Saving(saving) => {
                // Out of the struct for the call: the writer asks the rest of it.
                let mut writer = std::mem::take(&mut saving.writer);
                let saved = writer.fill(buffer, || Ok(saving.next()));
                saving.writer = writer;
                saved
            }
            Stream::None | Stream::Loading(_) => Err(Errno::EINVAL),
        }
    }

    fn load(&self, _: &Context<'_>, data: &[u8]) -> Result<()> {
        match &mut *lock(&self.stream)? {
            Stream::Loading(loading) => {
                let Loading { reader, state } = &mut **loading;
                reader.feed(data, |record| state.take(self.id, record))
            }
            Stream::None | Stream::Saving(_) => Err(Errno::EINVAL),
        }
    }

    fn remaining(&self, _: &Context<'_>) -> Result<Remaining> {
        let whole = identity_bytes(0).encoded_length();
        let initial = match &*lock(&self.stream)? {
            Stream::Saving(saving) => saving.identity.as_ref().map_or(0, Record::encoded_length),
            Stream::None | Stream::Loading(_) => whole,
        };
        Ok(Remaining { initial_bytes: initial as u64, dirty_bytes: 0, stop_copy_bytes: Some(STOP_COPY_BYTES) })
    }
}

/// IDENTITY, REGISTERS, BUFFER and the end, each with its header of 12 bytes.
const STOP_COPY_BYTES: u64 = (12 + 8) + (12 + 48) + (12 + BUFFER_SIZE as u64) + (12 + 4);
