//! Error numbers: what crosses the boundary instead of an error type.

use std::fmt;

/// A Linux error number, 1 to 4095, as `-errno` crosses the boundary.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(i32);

/// The result of everything that a host and a plug-in ask of each other.
pub type Result<T, E = Errno> = std::result::Result<T, E>;

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)+) => {
        impl Errno {
            $($(#[$doc])* pub const $name: Self = Self($number);)+

            fn name(self) -> Option<&'static str> {
                match self { $(Self::$name => Some(stringify!($name)),)+ _ => None }
            }
        }
    };
}

errnos! {
    /// Not allowed
    EPERM = 1,
    ENOENT = 2,
    /// The device failed, or cannot be reached
    EIO = 5,
    ENXIO = 6,
    E2BIG = 7,
    /// Not yet; try again
    EAGAIN = 11,
    ENOMEM = 12,
    EACCES = 13,
    /// No such guest memory
    EFAULT = 14,
    EBUSY = 16,
    EEXIST = 17,
    /// The device is gone
    ENODEV = 19,
    EINVAL = 22,
    /// The device has no such operation
    ENOTTY = 25,
    ENOSPC = 28,
    /// The buffer does not suffice
    ERANGE = 34,
    EPROTO = 71,
    /// Corrupt data
    EBADMSG = 74,
    EOVERFLOW = 75,
    EOPNOTSUPP = 95,
    ETIMEDOUT = 110,
    ECANCELED = 125,
}

impl Errno {
    pub const MAX: i32 = 4095;

    /// `None` unless `number` is in 1 to 4095.
    pub const fn new(number: i32) -> Option<Self> {
        if number >= 1 && number <= Self::MAX { Some(Self(number)) } else { None }
    }

    /// The positive number.
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// What a function of the ABI returns for this error.
    pub const fn status(self) -> i32 {
        -self.0
    }

    /// Parses the status of a function that has no answer but success. A status that is neither 0 nor `-errno` breaks
    /// the contract: EPROTO.
    pub(crate) fn check(status: i32) -> Result<()> {
        match status {
            0 => Ok(()),
            _ => Err(status.checked_neg().and_then(Self::new).unwrap_or(Self::EPROTO)),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: ABI-STATUS
    #[test]
    fn a_status_is_zero_or_minus_errno_and_nothing_else() {
        assert_eq!(Errno::check(0), Ok(()));
        assert_eq!(Errno::check(-1), Err(Errno::EPERM));
        assert_eq!(Errno::check(-4095).unwrap_err().raw(), 4095);
        for broken in [1, 2, -4096, i32::MIN, i32::MAX] {
            assert_eq!(Errno::check(broken), Err(Errno::EPROTO), "{broken}");
        }
    }

    #[test]
    fn errno_zero_does_not_exist() {
        assert_eq!(Errno::new(0), None);
        assert_eq!(Errno::new(1), Some(Errno::EPERM));
        assert_eq!(Errno::new(4095).map(Errno::raw), Some(4095));
        assert_eq!(Errno::new(4096), None);
        assert_eq!(Errno::EIO.status(), -5);
    }
}
