//! One connection: records out, records in, neither ever half remembered.

use std::io::{ErrorKind, IoSlice};
use std::sync::Arc;

use crate::migration::cause::Cause;
use crate::migration::transport::Transport;
use crate::migration::wire::{Decoder, Direction, Encoder, MigrationId, Record};
use crate::sys::Mapping;

/// What sending or receiving came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Done,
    Blocked,
}

/// Where pages go: bytes from `offset` on.
#[derive(Debug, Clone)]
pub struct Place {
    pub memory: Arc<Mapping>,
    pub offset: u64,
}

/// Pages, as first and count, that are about to come. `None`: they go through the decoder's buffer.
pub(super) type Placer<'a> = dyn Fn(u64, u64) -> Result<Option<Place>, Cause> + 'a;

/// Bytes hashed at once: what stays in the first level of a cache.
const LOOK: usize = 4096;

pub(super) struct Connection {
    transport: Box<dyn Transport>,
    pub(super) encoder: Option<Encoder>,
    pub(super) decoder: Decoder,
    /// Header and leading fields of the record on its way
    head: Vec<u8>,
    sent: usize,
    sending: bool,
    /// Where the pages on their way go, and how far they have come
    place: Option<(Place, u64)>,
    /// Placed data pass through here to be hashed: nobody has a reference to guest memory
    look: Box<[u8]>,
    /// A record was left half sent: nothing that follows would be understood
    broken: bool,
    pub(super) bytes_out: u64,
    pub(super) bytes_in: u64,
}

fn link(error: &std::io::Error) -> Cause {
    Cause::Link(error.to_string())
}

impl Connection {
    /// `id`: `None` at a destination, which learns it from the first record.
    pub(super) fn new(transport: Box<dyn Transport>, from: Direction, id: Option<MigrationId>) -> Self {
        Self {
            transport,
            encoder: id.map(Encoder::new),
            decoder: Decoder::new(from, id),
            head: Vec::new(),
            sent: 0,
            sending: false,
            place: None,
            look: vec![0; LOOK].into_boxed_slice(),
            broken: false,
            bytes_out: 0,
            bytes_in: 0,
        }
    }

    pub(super) fn peer(&self) -> String {
        self.transport.peer()
    }

    /// Gives up the record on its way, and with it the stream, unless it never began.
    pub(super) fn give_up(&mut self) {
        self.broken |= self.sending;
        self.sending = false;
    }

    /// Starts to send a record; goes on with it if one is on its way. `record` is the same until [`Flow::Done`].
    pub(super) fn send(&mut self, record: &Record<'_>) -> Result<Flow, Cause> {
        if !self.sending {
            if self.broken {
                return Err(Cause::Link("the stream was left inside a record".into()));
            }
            let encoder = self.encoder.as_mut().ok_or(Cause::Internal("nobody to send to yet".into()))?;
            encoder.encode(record, &mut self.head)?;
            self.sending = true;
            self.sent = 0;
        }
        let total = self.head.len() + record.body().len();
        while self.sent < total {
            let head = self.head.get(self.sent..).unwrap_or(&[]);
            let body = record.body().get(self.sent.saturating_sub(self.head.len())..).unwrap_or(&[]);
            match self.transport.send(&[IoSlice::new(head), IoSlice::new(body)]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Flow::Blocked),
                Err(error) => {
                    self.give_up();
                    return Err(link(&error));
                }
            }
        }
        self.sending = false;
        self.bytes_out += total as u64;
        Ok(Flow::Done)
    }

    /// Receives until a record is in hand ([`Decoder::record`]). `placer` says where the data of pages may go directly.
    pub(super) fn receive(&mut self, placer: Option<&Placer<'_>>) -> Result<Flow, Cause> {
        loop {
            if let (Some((first, count)), Some(placer)) = (self.decoder.pages_ahead(), placer)
                && let Some(place) = placer(first, count)?
            {
                self.decoder.place();
                self.place = Some((place, 0));
            }
            if let Some(left) = self.decoder.left_to_place() {
                match self.receive_placed(left as u64)? {
                    Some(false) => continue,
                    Some(true) => return Ok(Flow::Done),
                    None => return Ok(Flow::Blocked),
                }
            }
            let space = self.decoder.space();
            let count = match self.transport.receive(space) {
                Ok(0) => {
                    self.decoder.end()?;
                    return Err(Cause::Link("closed by the other side".into()));
                }
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Flow::Blocked),
                Err(error) => return Err(link(&error)),
            };
            self.bytes_in += count as u64;
            if self.decoder.advance(count)? && self.decoder.record()?.is_some() {
                if self.encoder.is_none() {
                    self.encoder = self.decoder.id().map(Encoder::new);
                }
                return Ok(Flow::Done);
            }
        }
    }

    /// Some more of the pages on their way. True: that was all; `None`: nothing within a tick.
    fn receive_placed(&mut self, left: u64) -> Result<Option<bool>, Cause> {
        let Some((place, done)) = &mut self.place else {
            return Err(Cause::Internal("pages without a place".into()));
        };
        let count = match self.transport.receive_into(&place.memory, place.offset + *done, left) {
            Ok(0) => return Err(Cause::Link("closed by the other side, inside a record".into())),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(link(&error)),
        };
        self.bytes_in += count;
        let (begin, end) = (place.offset + *done, place.offset + *done + count);
        *done += count;
        let mut complete = false;
        for at in (begin..end).step_by(LOOK) {
            let part = &mut self.look[..LOOK.min((end - at) as usize)];
            place.memory.read(at, part).map_err(|error| Cause::Memory(error.to_string()))?;
            complete = self.decoder.placed(part)?;
        }
        if complete {
            self.place = None;
        }
        Ok(Some(complete))
    }
}
