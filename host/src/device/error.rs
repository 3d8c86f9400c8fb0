//! What can go wrong with a device, shaped by what a caller can do about it.

use rustix::io::Errno;

/// What a caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request was wrong or is not supported; the device is as it was.
    Refused,
    /// This access failed; the device may be used again.
    Failed,
    /// The device is gone or must be treated so; nothing will succeed until it is opened again.
    Lost,
}

/// An error of one device.
#[derive(Debug, Clone, thiserror::Error)]
#[error("device {device}: {what}: {errno}")]
pub struct DeviceError {
    pub kind: ErrorKind,
    /// PCI address, or the name of a simulated device
    pub device: String,
    /// What was tried, with region and offset where there are some
    pub what: String,
    pub errno: Errno,
}

impl DeviceError {
    pub fn refused(device: &str, what: impl Into<String>, errno: Errno) -> Self {
        Self { kind: ErrorKind::Refused, device: device.to_owned(), what: what.into(), errno }
    }

    pub fn failed(device: &str, what: impl Into<String>, errno: Errno) -> Self {
        Self { kind: ErrorKind::Failed, device: device.to_owned(), what: what.into(), errno }
    }

    pub fn lost(device: &str, what: impl Into<String>, errno: Errno) -> Self {
        Self { kind: ErrorKind::Lost, device: device.to_owned(), what: what.into(), errno }
    }
}
