//! The operator's side: configuration, control socket, commands, doctor, and the host that puts everything together.

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
