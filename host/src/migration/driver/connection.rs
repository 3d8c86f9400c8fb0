//! One connection: records out, records in, neither ever half remembered.

use std::io::{ErrorKind, IoSlice};

use crate::migration::cause::Cause;
use crate::migration::transport::Transport;
use crate::migration::wire::{Decoder, Direction, Encoder, MigrationId, Record};

/// What sending or receiving came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Done,
    Blocked,
}

pub(super) struct Connection {
    transport: Box<dyn Transport>,
    pub(super) encoder: Option<Encoder>,
    pub(super) decoder: Decoder,
    /// Header and leading fields of the record on its way
    head: Vec<u8>,
    sent: usize,
    sending: bool,
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

    /// Receives until a record is in hand ([`Decoder::record`]).
    pub(super) fn receive(&mut self) -> Result<Flow, Cause> {
        loop {
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
}
