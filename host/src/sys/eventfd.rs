//! Eventfds: how a device's interrupts arrive.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{self, Errno};

/// A counter in the kernel: [`signal`](Self::signal) adds, [`read`](Self::read) takes all of it. Non-blocking and closed
/// on exec.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Another handle to the same counter.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: io::fcntl_dupfd_cloexec(&self.fd, 3)? })
    }

    /// Adds `count`. EAGAIN when the counter would overflow, EINVAL for `u64::MAX`.
    pub fn signal(&self, count: u64) -> io::Result<()> {
        match io::retry_on_intr(|| io::write(&self.fd, &count.to_ne_bytes()))? {
            8 => Ok(()),
            _ => Err(Errno::IO),
        }
    }

    /// Takes the counter: how often it was signalled since the last read, 0 if not at all.
    pub fn read(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        match io::retry_on_intr(|| io::read(&self.fd, &mut bytes)) {
            Ok(8) => Ok(u64::from_ne_bytes(bytes)),
            Ok(_) => Err(Errno::IO),
            Err(Errno::AGAIN) => Ok(0),
            Err(errno) => Err(errno),
        }
    }

    /// Waits until the counter is not 0 and takes it; 0 when `deadline` has passed.
    pub fn wait(&self, deadline: Instant) -> io::Result<u64> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return self.read(),
                Ok(_) => match self.read()? {
                    0 => {} // another reader was faster
                    count => return Ok(count),
                },
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether it is an eventfd. Anything else that is taken for one may be ready for ever, or never take a write.
pub fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]")
}

/// Adds 1 to an eventfd that is shared with somebody who is not trusted: its counter may be full and its flags are his to change,
/// and then a plain write waits until he reads. A full counter is left as it is; whoever reads it has yet to be woken.
pub fn signal_shared(fd: BorrowedFd<'_>) {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let has_room = poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().contains(PollFlags::OUT);
    if has_room {
        // EAGAIN: it became full, and is not one that waits.
        let _full = io::write(fd, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn read_takes_every_signal_once() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.read().unwrap(), 0);
        event.signal(1).unwrap();
        event.try_clone().unwrap().signal(2).unwrap();
        assert_eq!(event.read().unwrap(), 3);
        assert_eq!(event.read().unwrap(), 0);
    }

    #[test]
    fn wait_returns_zero_only_after_its_deadline() {
        let event = EventFd::new().unwrap();
        let begin = Instant::now();
        assert_eq!(event.wait(begin + Duration::from_millis(5)).unwrap(), 0);
        assert!(begin.elapsed() >= Duration::from_millis(5));
        event.signal(7).unwrap();
        assert_eq!(event.wait(begin).unwrap(), 7, "a deadline in the past still takes what is there");
    }

    #[test]
    fn an_overflowing_signal_is_refused_and_loses_nothing() {
        let event = EventFd::new().unwrap();
        event.signal(u64::MAX - 1).unwrap();
        assert_eq!(event.signal(1), Err(Errno::AGAIN));
        assert_eq!(event.signal(u64::MAX), Err(Errno::INVAL));
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
    }

    #[test]
    fn a_full_shared_counter_is_waited_for_by_nobody() {
        let shared = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        io::write(&shared, &(u64::MAX - 2).to_ne_bytes()).unwrap();
        let mut counter = [0; 8];
        // One has room, the others have none: on a descriptor that blocks.
        (0..3).for_each(|_| signal_shared(shared.as_fd()));
        io::read(&shared, &mut counter).unwrap();
        assert_eq!(u64::from_ne_bytes(counter), u64::MAX - 1);
        signal_shared(shared.as_fd());
        io::read(&shared, &mut counter).unwrap();
        assert_eq!(u64::from_ne_bytes(counter), 1);
    }

    #[test]
    fn only_an_eventfd_is_one() {
        assert!(is_eventfd(EventFd::new().unwrap().as_fd()));
        let (read, write) = rustix::pipe::pipe().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for other in [read.as_fd(), write.as_fd(), null.as_fd()] {
            assert!(!is_eventfd(other));
        }
    }
}
