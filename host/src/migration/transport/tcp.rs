//! TCP, without Nagle's delay: small records are answered inside the downtime.

use std::io::{Error, ErrorKind, IoSlice, Read, Result, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::{TICK_MS, Transport};
use crate::sys::Mapping;

/// A connected socket.
#[derive(Debug)]
pub struct TcpTransport {
    stream: TcpStream,
    peer: String,
}

impl TcpTransport {
    pub fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(false)?;
        let tick = Some(Duration::from_millis(TICK_MS));
        stream.set_read_timeout(tick)?;
        stream.set_write_timeout(tick)?;
        let peer = stream.peer_addr()?.to_string();
        Ok(Self { stream, peer })
    }
}

/// Linux reports a socket's timeout as EAGAIN; EINTR says nothing about the socket.
fn plain<T>(result: Result<T>) -> Result<T> {
    result.map_err(|error| match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock | ErrorKind::Interrupted => ErrorKind::WouldBlock.into(),
        _ => error,
    })
}

impl Transport for TcpTransport {
    fn send(&mut self, parts: &[IoSlice<'_>]) -> Result<usize> {
        match plain(self.stream.write_vectored(parts))? {
            0 => Err(Error::from(ErrorKind::WriteZero)),
            count => Ok(count),
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize> {
        plain(self.stream.read(buffer))
    }

    fn receive_into(&mut self, memory: &Mapping, offset: u64, length: u64) -> Result<u64> {
        plain(memory.read_from(&self.stream, offset, length))
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}
