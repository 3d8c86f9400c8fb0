//! Two ends in one process, with bounded buffers, and a control that breaks the link in every way a network does.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, IoSlice, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Transport;

#[derive(Debug, Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    /// The writer or the reader is gone, or the link was cut
    closed: bool,
    /// What is written from now on never arrives, and no error tells
    lost: bool,
    /// Flip a bit in the next byte written
    corrupt: bool,
}

#[derive(Debug)]
struct Shared {
    /// Source to destination, destination to source
    pipes: Mutex<[Pipe; 2]>,
    changed: Condvar,
    capacity: usize,
}

impl Shared {
    fn pipes(&self) -> MutexGuard<'_, [Pipe; 2]> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One end.
#[derive(Debug)]
pub struct MemoryTransport {
    shared: Arc<Shared>,
    /// Index of the pipe that this end writes
    end: usize,
    wait: Duration,
}

/// Breaks a link.
#[derive(Debug, Clone)]
pub struct LinkControl(Arc<Shared>);

impl LinkControl {
    /// Nothing passes any more. What is on its way is lost; both ends notice.
    pub fn cut(&self) {
        for pipe in self.0.pipes().iter_mut() {
            pipe.bytes.clear();
            pipe.closed = true;
        }
        self.0.changed.notify_all();
    }

    /// What end `end` (0: first of the pair) sends from now on is lost, and nobody notices.
    pub fn lose(&self, end: usize) {
        self.0.pipes()[end].lost = true;
    }

    /// Damages the next byte that end `end` sends.
    pub fn corrupt(&self, end: usize) {
        self.0.pipes()[end].corrupt = true;
    }
}

impl MemoryTransport {
    /// `capacity`: bytes under way in each direction. `wait`: how long a call may wait for the other end; zero in a
    /// simulation that runs both ends in one thread.
    pub fn pair(capacity: usize, wait: Duration) -> (Self, Self, LinkControl) {
        let pipes = Mutex::new([Pipe::default(), Pipe::default()]);
        let shared = Arc::new(Shared { pipes, changed: Condvar::new(), capacity: capacity.max(1) });
        let end = |end| Self { shared: Arc::clone(&shared), end, wait };
        (end(0), end(1), LinkControl(Arc::clone(&shared)))
    }

    /// Waits until `ready`, for at most `self.wait`.
    fn lock(&self, ready: impl Fn(&[Pipe; 2]) -> bool) -> MutexGuard<'_, [Pipe; 2]> {
        let guard = self.shared.pipes();
        if self.wait.is_zero() {
            return guard;
        }
        let waited = self.shared.changed.wait_timeout_while(guard, self.wait, |pipes| !ready(pipes));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Transport for MemoryTransport {
    fn send(&mut self, parts: &[IoSlice<'_>]) -> Result<usize> {
        let (end, capacity) = (self.end, self.shared.capacity);
        let mut pipes = self.lock(|pipes| pipes[end].closed || pipes[end].bytes.len() < capacity);
        let pipe = &mut pipes[end];
        if pipe.closed {
            return Err(Error::from(ErrorKind::BrokenPipe));
        }
        let room = capacity.saturating_sub(pipe.bytes.len());
        let mut sent = 0;
        for part in parts {
            let count = part.len().min(room - sent);
            if !pipe.lost {
                let start = pipe.bytes.len();
                pipe.bytes.extend(&part[..count]);
                if count > 0 && std::mem::take(&mut pipe.corrupt) {
                    pipe.bytes[start] ^= 0x10;
                }
            }
            sent += count;
        }
        if sent == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.shared.changed.notify_all();
        Ok(sent)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let end = 1 - self.end;
        let mut pipes = self.lock(|pipes| pipes[end].closed || !pipes[end].bytes.is_empty());
        let pipe = &mut pipes[end];
        let count = pipe.bytes.len().min(buffer.len());
        if count == 0 {
            return if pipe.closed { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        for (to, from) in buffer.iter_mut().zip(pipe.bytes.drain(..count)) {
            *to = from;
        }
        self.shared.changed.notify_all();
        Ok(count)
    }

    fn peer(&self) -> String {
        format!("memory end {}", 1 - self.end)
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        let mut pipes = self.shared.pipes();
        // What was written before may still be read; nothing more can be written either way.
        pipes[0].closed = true;
        pipes[1].closed = true;
        self.shared.changed.notify_all();
    }
}
