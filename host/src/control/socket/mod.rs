//! The control socket: how an operator's commands reach a running host.
//!
//! ```text
//!   command --line of JSON--> Server --Request--> Service (the host)
//!           <--line of JSON--        <--Answer--
//! ```
//! A UNIX socket, mode 0600, the same user or root only. Rules: `spec/control.md`.

pub mod client;
mod job;
mod line;
pub mod protocol;
mod server;

pub use job::{Job, News};
pub use server::{Answer, BindError, CLIENTS_MAX, Patience, Server, Service};
