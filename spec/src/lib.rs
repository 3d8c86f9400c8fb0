//! Conformance suites, the lab, and the tidy checks of vfio-mediate.

pub mod device_suite;
pub mod lab;
pub mod prove;
