//! Lines over a stream socket: each with a cap on its length and a deadline for all of it.
//!
//! **Must never** hold more than a line's cap, or let a peer that sends a byte now and then keep a thread for ever: the
//! deadline is the whole line's.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Why there is no line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// What follows is not aligned: close
    #[error("a line longer than {0} bytes")]
    TooLong(usize),
    #[error("no whole line in time")]
    TimedOut,
    #[error("the connection ended inside a line")]
    Cut,
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Debug)]
pub struct Lines {
    stream: UnixStream,
    /// Received and not yet handed out; at most one line's cap and one read more
    pending: Vec<u8>,
    max: usize,
}

impl Lines {
    /// `max` counts the line end.
    pub fn new(stream: UnixStream, max: usize) -> Self {
        Self { stream, pending: Vec::new(), max }
    }

    /// The next line without its end; `None` when the peer has ended its side between lines.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Vec<u8>>, LineError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.pending[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + end;
                if end >= self.max {
                    return Err(LineError::TooLong(self.max));
                }
                let rest = self.pending.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.pop();
                return Ok(Some(line));
            }
            searched = self.pending.len();
            if searched >= self.max {
                return Err(LineError::TooLong(self.max));
            }
            if self.fill(deadline)? == 0 {
                return if self.pending.is_empty() { Ok(None) } else { Err(LineError::Cut) };
            }
        }
    }

    fn fill(&mut self, deadline: Option<Instant>) -> Result<usize, LineError> {
        let mut chunk = [0; 4096];
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(LineError::TimedOut);
            }
            self.stream.set_read_timeout(left)?;
            match self.stream.read(&mut chunk) {
                Ok(count) => {
                    self.pending.extend_from_slice(&chunk[..count]);
                    return Ok(count);
                }
                Err(error) if is_timeout(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends one line, whole, within `patience`.
    pub fn send(&mut self, line: &[u8], patience: Duration) -> Result<(), LineError> {
        let deadline = Instant::now() + patience;
        let mut rest = line;
        while !rest.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LineError::TimedOut);
            }
            self.stream.set_write_timeout(Some(left))?;
            match self.stream.write(rest) {
                Ok(0) => return Err(LineError::Cut),
                Ok(count) => rest = &rest[count..],
                Err(error) if is_timeout(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(max: usize) -> (UnixStream, Lines) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Lines::new(theirs, max))
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(10))
    }

    #[test]
    fn a_line_is_taken_at_its_cap_and_refused_above() {
        for (length, fits) in [(0, true), (14, true), (15, true), (16, false), (17, false), (5000, false)] {
            let (mut ours, mut lines) = pair(16);
            ours.write_all(&vec![b'x'; length]).unwrap();
            ours.write_all(b"\n").unwrap();
            match lines.next(soon()) {
                Ok(Some(line)) => assert!(fits && line.len() == length, "{length}"),
                other => assert!(!fits && matches!(other, Err(LineError::TooLong(16))), "{length}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_endless_line_is_refused_without_being_kept() {
        let (mut ours, mut lines) = pair(64);
        let writer = std::thread::spawn(move || while ours.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(matches!(lines.next(soon()), Err(LineError::TooLong(64))));
        assert!(lines.pending.len() <= 64 + 4096, "{}", lines.pending.len());
        drop(lines);
        writer.join().unwrap();
    }

    #[test]
    fn lines_arrive_however_they_are_cut() {
        let text = b"one\n\ntwo and more\nthree\n";
        for cut in 0..text.len() {
            let (mut ours, mut lines) = pair(64);
            let (first, second) = text.split_at(cut);
            ours.write_all(first).unwrap();
            let writer = std::thread::spawn(move || ours.write_all(second).unwrap());
            for expected in [&b"one"[..], b"", b"two and more", b"three"] {
                assert_eq!(lines.next(soon()).unwrap().unwrap(), expected, "cut at {cut}");
            }
            writer.join().unwrap();
            assert!(lines.next(soon()).unwrap().is_none());
        }
    }

    #[test]
    fn a_byte_now_and_then_does_not_extend_the_deadline() {
        let (mut ours, mut lines) = pair(1 << 20);
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let writer = std::thread::spawn(move || {
            while stopped
                .recv_timeout(Duration::from_millis(2))
                .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                let _ = ours.write_all(b"x");
            }
        });
        let begin = Instant::now();
        assert!(matches!(lines.next(Some(begin + Duration::from_millis(50))), Err(LineError::TimedOut)));
        assert!(begin.elapsed() >= Duration::from_millis(50));
        drop(stop);
        writer.join().unwrap();
    }

    #[test]
    fn an_end_inside_a_line_is_told_apart_from_an_end_between_lines() {
        let (mut ours, mut lines) = pair(64);
        ours.write_all(b"whole\nhalf").unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(lines.next(soon()).unwrap().unwrap(), b"whole");
        assert!(matches!(lines.next(soon()), Err(LineError::Cut)));
    }

    #[test]
    fn a_peer_that_does_not_read_is_given_up() {
        let (_ours, mut lines) = pair(64);
        let line = vec![b'x'; 16 << 20];
        assert!(matches!(lines.send(&line, Duration::from_millis(20)), Err(LineError::TimedOut)));
    }
}
