//! Whole hosts migrate guests to each other: devices, plug-ins, journals and listeners as an embedder uses them, over
//! loopback. What is promised is in `spec/host.md`.

mod cancel;
mod guest;
mod moves;
mod refusals;
mod support;

#[path = "../support/mod.rs"]
mod plugins;
