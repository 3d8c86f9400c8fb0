//! Conformance: suites that any implementation can be put on, the lab that puts the real ones on, and tidy checks.

pub mod device_suite;
pub mod lab;
