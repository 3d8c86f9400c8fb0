//! A connection whose first record must come soon: a host takes one migration at a time, and whoever connects and says
//! nothing would keep the next source waiting.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::time::{Duration, Instant};

use crate::migration::transport::Transport;
use crate::migration::wire::HEADER_LENGTH;
use crate::sys::Mapping;

/// For the first record to arrive whole, however long answers may take later.
pub(super) const GREETING_PATIENCE: Duration = Duration::from_secs(5);

/// Where the payload's length is in a record's header, u32.
const LENGTH_AT: usize = 8;

#[derive(Debug)]
pub(super) struct Greeting<T> {
    link: T,
    /// `None`: the first record is here
    deadline: Option<Instant>,
    length: [u8; 4],
    received: usize,
}

impl<T: Transport> Greeting<T> {
    pub(super) fn new(link: T, deadline: Instant) -> Self {
        Self { link, deadline: Some(deadline), length: [0; 4], received: 0 }
    }

    /// Only to know when the first record ends; whether it is one is the decoder's to say.
    fn look(&mut self, bytes: &[u8]) {
        for (at, byte) in (self.received..HEADER_LENGTH).zip(bytes) {
            if let Some(slot) = at.checked_sub(LENGTH_AT).and_then(|at| self.length.get_mut(at)) {
                *slot = *byte;
            }
        }
        self.received = self.received.saturating_add(bytes.len());
        let length = u32::from_le_bytes(self.length) as usize;
        if self.received >= HEADER_LENGTH && self.received - HEADER_LENGTH >= length {
            self.deadline = None;
        }
    }
}

impl<T: Transport> Transport for Greeting<T> {
    fn send(&mut self, parts: &[IoSlice<'_>]) -> Result<usize> {
        self.link.send(parts)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let Some(deadline) = self.deadline else { return self.link.receive(buffer) };
        if Instant::now() >= deadline {
            return Err(Error::new(ErrorKind::ConnectionAborted, "nobody greeted in time"));
        }
        let count = self.link.receive(buffer)?;
        self.look(buffer.get(..count).unwrap_or(&[]));
        Ok(count)
    }

    fn receive_into(&mut self, memory: &Mapping, offset: u64, length: u64) -> Result<u64> {
        match self.deadline {
            None => self.link.receive_into(memory, offset, length),
            // Nobody has memory to place anything into before he was greeted.
            Some(_) => Err(ErrorKind::Unsupported.into()),
        }
    }

    fn peer(&self) -> String {
        self.link.peer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one byte at a time, and then nothing.
    struct Slow(Vec<u8>);

    impl Transport for Slow {
        fn send(&mut self, _: &[IoSlice<'_>]) -> Result<usize> {
            Err(ErrorKind::Unsupported.into())
        }

        fn receive(&mut self, buffer: &mut [u8]) -> Result<usize> {
            if self.0.is_empty() {
                return Err(ErrorKind::WouldBlock.into());
            }
            buffer[0] = self.0.remove(0);
            Ok(1)
        }

        fn peer(&self) -> String {
            String::new()
        }
    }

    /// spec: HOST-11
    #[test]
    fn the_deadline_ends_with_the_last_byte_of_the_first_record_and_not_before() {
        let mut record = vec![0; HEADER_LENGTH + 258];
        record[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&258u32.to_le_bytes());
        for (sent, over) in [(0, true), (HEADER_LENGTH, true), (record.len() - 1, true), (record.len(), false)] {
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut greeting = Greeting::new(Slow(record[..sent].to_vec()), deadline);
            for _ in 0..sent {
                assert_eq!(greeting.receive(&mut [0; 8]).unwrap(), 1);
            }
            assert_eq!(greeting.deadline.is_some(), over, "{sent}");
            greeting.deadline = greeting.deadline.map(|_| Instant::now());
            let kind = greeting.receive(&mut [0; 8]).unwrap_err().kind();
            assert_eq!(kind == ErrorKind::ConnectionAborted, over, "{sent}");
        }
    }
}
