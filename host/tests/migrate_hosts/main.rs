//! Whole hosts migrate guests to each other: devices, plug-ins, journals and listeners as an embedder uses them, over
//! loopback. What is promised is in `spec/host.md`.

mod cancel;
mod doubt;
mod guest;
mod hostile;
mod moves;
mod proxy;
mod refusals;
mod support;

#[path = "../support/mod.rs"]
mod plugins;
