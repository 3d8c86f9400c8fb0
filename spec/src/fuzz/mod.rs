//! What the fuzz targets of `spec/fuzz` do with their bytes, and a way to run the same on stable Rust.
//!
//! **Owns** the two bodies ([`wire`], [`session`]), the seeds of their corpus, and a small seeded mutator. **Must never** depend on
//! a fuzzer: `spec/tests/fuzz_corpus.rs` runs it in `cargo test`, `cargo fuzz` runs it for as long as one likes.

mod mutate;
pub mod seeds;
pub mod session;
pub mod wire;

pub use mutate::Mutator;

/// One target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Of its fuzz target, and of its corpus' folder
    pub name: &'static str,
    /// Panics where a promise is broken
    pub run: fn(&[u8]),
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

pub const TARGETS: [Target; 2] = [
    Target { name: "wire", run: wire::run, seeds: seeds::wire },
    Target { name: "session", run: session::run, seeds: seeds::session },
];
