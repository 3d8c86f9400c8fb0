//! Conformance suites, the lab, and the tidy checks of vfio-mediate.

pub mod lab;
