//! The outside witness: hears the heartbeats of every runner and never believes in two.
//!
//! **Owns** a UDP socket on which a running guest reports each step: which process runs it, and its step number, which
//! lives in guest RAM and therefore migrates. **Must never** take part in the migration: it only listens.
//!
//! Two runners show themselves in one of two ways: a number is heard twice (both went on from the same memory), or a
//! process is heard again after another one took over from it.

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Process number, side, step number.
const DATAGRAM: usize = 4 + 1 + 8;

/// Sends heartbeats; lost ones do no harm.
#[derive(Debug)]
pub struct Heart {
    socket: UdpSocket,
    runner: Runner,
}

/// Which process of which side: two machines may give two processes the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runner {
    pub pid: u32,
    pub is_destination: bool,
}

impl std::fmt::Display for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.pid, if self.is_destination { "destination" } else { "source" })
    }
}

impl Heart {
    /// The heart of this process.
    pub fn new(witness: SocketAddr, is_destination: bool) -> std::io::Result<Self> {
        let any: SocketAddr = if witness.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(witness)?;
        // A full buffer must not stop the guest: a heartbeat is dropped instead.
        socket.set_nonblocking(true)?;
        Ok(Self { socket, runner: Runner { pid: std::process::id(), is_destination } })
    }

    pub fn beat(&self, step: u64) {
        let mut datagram = [0u8; DATAGRAM];
        datagram[..4].copy_from_slice(&self.runner.pid.to_le_bytes());
        datagram[4] = u8::from(self.runner.is_destination);
        datagram[5..].copy_from_slice(&step.to_le_bytes());
        // No witness is a matter for the demo's end, not for the guest.
        let _ = self.socket.send(&datagram);
    }
}

/// What was heard, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Testimony {
    /// Runners in the order in which they took over
    pub runners: Vec<Runner>,
    pub heartbeats: u64,
    pub complaint: Option<String>,
    heard: HashSet<u64>,
}

impl Testimony {
    fn hear(&mut self, runner: Runner, step: u64) {
        self.heartbeats += 1;
        if !self.heard.insert(step) {
            self.complain(format!("step {step} ran twice, the second time in process {runner}"));
        }
        match self.runners.iter().position(|known| *known == runner) {
            None => self.runners.push(runner),
            Some(place) if place + 1 == self.runners.len() => {}
            Some(_) => self.complain(format!("process {runner} runs again after another took over")),
        }
    }

    fn complain(&mut self, what: String) {
        self.complaint.get_or_insert(what);
    }
}

/// The listening side.
#[derive(Debug)]
pub struct Witness {
    address: SocketAddr,
    testimony: Arc<Mutex<Testimony>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Witness {
    pub fn listen(on: SocketAddr) -> std::io::Result<Self> {
        let socket = UdpSocket::bind(on)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let address = socket.local_addr()?;
        let testimony = Arc::new(Mutex::new(Testimony::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (heard, stopped) = (Arc::clone(&testimony), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("witness".into()).spawn(move || {
            let mut datagram = [0u8; DATAGRAM];
            while !stopped.load(Ordering::Acquire) {
                let Ok(DATAGRAM) = socket.recv(&mut datagram) else { continue };
                let [a, b, c, d, side, step @ ..] = datagram;
                let runner = Runner { pid: u32::from_le_bytes([a, b, c, d]), is_destination: side != 0 };
                lock(&heard).hear(runner, u64::from_le_bytes(step));
            }
        })?;
        Ok(Self { address, testimony, stop, thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What has been heard so far.
    pub fn ask<T>(&self, question: impl FnOnce(&Testimony) -> T) -> T {
        question(&lock(&self.testimony))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic in the listener has been printed; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{Runner, Testimony};

    const A: Runner = Runner { pid: 1, is_destination: false };
    const B: Runner = Runner { pid: 1, is_destination: true };

    fn heard(beats: &[(Runner, u64)]) -> Testimony {
        let mut testimony = Testimony::default();
        for (runner, step) in beats {
            testimony.hear(*runner, *step);
        }
        testimony
    }

    #[test]
    fn one_runner_after_the_other_is_fine() {
        let testimony = heard(&[(A, 1), (A, 2), (B, 3), (B, 4)]);
        assert_eq!(testimony.complaint, None);
        assert_eq!(testimony.runners, [A, B]);
    }

    #[test]
    fn a_source_that_runs_on_after_the_destination_started_is_seen() {
        assert!(heard(&[(A, 1), (B, 2), (A, 3)]).complaint.is_some());
    }

    #[test]
    fn the_same_step_in_two_processes_is_seen() {
        assert!(heard(&[(A, 1), (A, 2), (B, 2)]).complaint.is_some());
    }
}
