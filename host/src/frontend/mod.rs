//! Front-ends: how a guest, or the VMM that runs it, sees mediated devices.

pub mod guest;
pub mod in_process;
pub mod vfio_user;
