//! Cases of devices that are served over vfio-user: stock QEMU on this machine and in an emulated one.
//!
//! **Owns** the hosts that serve, their machines, and what is looked at from outside: the plug-in's log, the process's
//! resources, the guest's memory file. **Must never** use anything of the server but what an operator has: command line, ready
//! line, `status`, signals.

mod boots;
mod kills;
mod loop_guest;
mod nested;
mod served;

pub(super) use boots::{edu, suite};
pub(super) use kills::kills;
pub(super) use nested::nested;
