//! Mediation.
pub mod gate;
