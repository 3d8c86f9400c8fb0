//! Conformance suites, the lab, and the tidy checks of vfio-mediate.

pub mod device_suite;
pub mod fuzz;
pub mod lab;
pub mod prove;

use std::ffi::OsString;

/// `cargo lab -- --option` and `cargo lab --option` mean the same: the alias has a `--` of its own.
pub fn arguments(given: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    given.enumerate().filter(|(at, argument)| *at != 1 || argument != "--").map(|(_, argument)| argument)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_separator_in_first_place_is_the_aliases() {
        let seen = |given: &[&str]| -> Vec<OsString> { arguments(given.iter().map(OsString::from)).collect() };
        assert_eq!(seen(&["lab", "--", "--list"]), ["lab", "--list"]);
        assert_eq!(seen(&["lab", "--list"]), ["lab", "--list"]);
        assert_eq!(seen(&["lab", "--script", "--"]), ["lab", "--script", "--"]);
        assert_eq!(seen(&["lab", "--", "--"]), ["lab", "--"]);
        assert_eq!(seen(&["--"]), ["--"]);
    }
}
