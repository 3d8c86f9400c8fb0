//! Descriptors that arrive as numbers, from a plug-in.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// A descriptor of our own for the file that `number` names now. EBADF where it names none.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(rustix::io::Errno::BADF.raw_os_error()));
    }
    // SAFETY: the number is not -1 and only used for the duplication, which fails if it is not open. Whether it is the file
    // that its sender meant is the sender's business.
    unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_an_open_number_is_duplicated() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_ne!(duplicate(file.as_raw_fd()).unwrap().as_raw_fd(), file.as_raw_fd());
        assert!(duplicate(-1).is_err());
        assert!(duplicate(RawFd::MAX).is_err());
    }
}
