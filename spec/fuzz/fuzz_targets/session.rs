//! `cargo fuzz run session` in `spec/`; what it does is in `spec/src/fuzz/session.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vfio_mediate_spec::fuzz::session::run(data));
