//! Mediation.
mod config;
mod error;
pub mod gate;
mod layout;
pub use error::{MediationError, Refusal, Remedy, Result, StateError};
