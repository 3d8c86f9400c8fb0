//! The operator's side: configuration, control socket, commands, doctor, and [`Host`], which puts everything together.
pub mod address;
pub mod config;
pub mod exit;
pub mod host;
pub mod machine;
pub mod service;
pub mod socket;
pub mod units;

pub use socket::{client, protocol};
