//! Checks of the tree itself: what a reviewer would otherwise have to look for each time.

mod tree;

use std::collections::{BTreeMap, BTreeSet};

use tree::{files_with, root, shown, text};

/// Which modules a host module may name, besides itself.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("sys", &[][..]),
        ("memory", &["sys"][..]),
        ("kvm", &["sys"][..]),
        ("device", &["kvm", "sys"][..]),
        ("plugin", &["sys"][..]),
        ("mediation", &["plugin", "device", "memory", "sys"][..]),
        ("frontend", &["mediation", "plugin", "device", "memory", "sys"][..]),
        ("migration", &["mediation", "plugin", "device", "memory", "sys"][..]),
        ("control", &["frontend", "migration", "mediation", "plugin", "device", "memory", "kvm", "sys"][..]),
    ])
}

/// The host modules that a line of code names by `crate::`, grouped imports included.
fn named_modules(line: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in line.match_indices("crate::") {
        let rest = &line[at + "crate::".len()..];
        let group = rest.strip_prefix('{').map(|r| r.split('}').next().unwrap_or(r));
        for part in group.unwrap_or(rest).split(',') {
            let name: String = part.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !name.is_empty() {
                names.insert(name);
            }
            if group.is_none() {
                break;
            }
        }
    }
    names
}

#[test]
fn arrows_between_host_modules_point_downward() {
    let source = root().join("host/src");
    let mut wrong = Vec::new();
    for (module, may_name) in allowed() {
        for path in files_with("rs", &source.join(module)) {
            for (number, line) in text(&path).lines().enumerate() {
                let code = line.split("//").next().unwrap_or("");
                for name in named_modules(code) {
                    let known = allowed().contains_key(name.as_str());
                    if known && name != module && !may_name.contains(&name.as_str()) {
                        wrong.push(format!("{}:{}: {module} names {name}", shown(&path), number + 1));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "upward arrows:\n{}", wrong.join("\n"));
}

#[test]
fn the_arrow_check_sees_plain_and_grouped_imports() {
    assert_eq!(named_modules("use crate::control::Host;"), BTreeSet::from(["control".to_owned()]));
    let grouped = named_modules("use crate::{memory::X, control};");
    assert!(grouped.contains("control") && grouped.contains("memory"));
}

#[test]
fn every_host_module_has_its_arrows_declared() {
    for entry in std::fs::read_dir(root().join("host/src")).expect("host/src").flatten() {
        if entry.path().is_dir() {
            let name = entry.file_name().into_string().expect("UTF-8");
            assert!(allowed().contains_key(name.as_str()), "host/src/{name} is missing in the table of arrows");
        }
    }
}

/// Where `unsafe` may stand: the system-call layer, the plug-in FFI, the sdk's own side of the ABI.
fn may_be_unsafe(path: &str) -> bool {
    path.starts_with("host/src/sys/")
        || path.starts_with("host/src/plugin/ffi")
        || path.starts_with("sdk/src/")
        || path.contains("/tests/")
        || path.contains("/benches/")
}

#[test]
fn unsafe_code_is_allowed_only_in_its_homes() {
    let permission = concat!("allow(", "unsafe_code)");
    for path in files_with("rs", &root()) {
        let name = shown(&path);
        if !may_be_unsafe(&name) {
            assert!(
                !text(&path).contains(permission),
                "{name} permits unsafe code: only sys, plugin/ffi and the sdk may"
            );
        }
    }
}

#[test]
fn every_module_says_what_it_owns() {
    let mut silent = Vec::new();
    for folder in ["sdk/src", "host/src", "plugins", "examples", "spec/src"] {
        for path in files_with("rs", &root().join(folder)) {
            // A test file is headed by its parent.
            let is_tests = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
            if !is_tests && !text(&path).starts_with("//!") {
                silent.push(shown(&path));
            }
        }
    }
    assert!(silent.is_empty(), "files without a module header: {silent:#?}");
}

#[test]
fn no_file_holds_more_than_two_ideas() {
    const LINES_MAX: usize = 700;
    for path in files_with("rs", &root()) {
        let lines = text(&path).lines().count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines: split it", shown(&path));
    }
}

#[test]
fn no_unfinished_words() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:"), concat!("HA", "CK")];
    for extension in ["rs", "md", "toml", "sh", "py"] {
        for path in files_with(extension, &root()) {
            let content = text(&path);
            for word in words {
                assert!(!content.contains(word), "{} says {word}", shown(&path));
            }
        }
    }
}
