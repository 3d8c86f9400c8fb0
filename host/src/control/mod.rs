//! The operator's side: configuration, control socket, commands, doctor, and the host that puts everything together.
//!
//! **Owns** what a person or a script says to a host ([`cli`], [`socket`], [`config`]) and whose guest it is ([`host`]). **Must
//! never** let the guest run against the journal's word, take an address beyond loopback without the operator's, or let a
//! client hold up a migration.
//!
//! ```text
//!   cli --lines of JSON--> socket --Request--> service --> host --> machine (devices, memory, plug-ins)
//!                                                           |------> migration (out, in), journal
//!                                                           '------> embedder (the VMM)
//! ```
//! Locks: `host`'s state and machine, `socket`'s clients and jobs: leaves, none taken under another.

pub mod address;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod exit;
pub mod host;
pub mod machine;
pub mod service;
pub mod socket;
pub mod units;

pub use socket::{client, protocol};

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // A transparent error repeats its source.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
