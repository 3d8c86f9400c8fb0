//! `cargo fuzz run wire` in `spec/`; what it does is in `spec/src/fuzz/wire.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vfio_mediate_spec::fuzz::wire::run(data));
