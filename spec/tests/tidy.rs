//! Checks of the tree itself: what a reviewer would otherwise have to look for each time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("spec has a parent").to_path_buf()
}

fn files_with(extension: &str, below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![below.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("readable folder").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() {
                if name != "target" && !name.to_string_lossy().starts_with('.') {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

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

/// Ids of the normative sentences: `[AREA-12]` at the start of a list item in a page of `spec/`.
fn declared_ids() -> BTreeMap<String, String> {
    let mut ids = BTreeMap::new();
    for path in files_with("md", &root().join("spec")) {
        for line in text(&path).lines() {
            let item = line.trim_start().trim_start_matches(['-', '*', ' ']);
            let Some(id) = item.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(id, _)| id) else {
                continue;
            };
            if is_id(id) {
                let before = ids.insert(id.to_owned(), shown(&path));
                assert!(
                    before.is_none(),
                    "{id} is declared twice: {} and {}",
                    shown(&path),
                    before.unwrap_or_default()
                );
            }
        }
    }
    ids
}

fn is_id(word: &str) -> bool {
    word.rsplit_once('-').is_some_and(|(area, number)| {
        !area.is_empty()
            && area.chars().all(|c| c.is_ascii_uppercase() || c == '-' || c.is_ascii_digit())
            && !number.is_empty()
            && number.chars().all(|c| c.is_ascii_digit())
    })
}

/// Ids named by `spec:` in the comment lines directly above a test that runs.
fn tested_ids(source: &str) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    let mut pending = BTreeSet::new();
    let (mut is_test, mut ignored) = (false, false);
    for line in source.lines().map(str::trim) {
        if let Some(comment) = line.strip_prefix("//") {
            if let Some((_, list)) = comment.split_once("spec:") {
                pending.extend(
                    list.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '-'))
                        .filter(|w| is_id(w))
                        .map(str::to_owned),
                );
            }
        } else if line.starts_with("#[") {
            is_test |= line.contains("test]") || line.contains("test(");
            ignored |= line.contains("ignore");
        } else if line.contains("fn ") {
            if is_test && !ignored {
                ids.append(&mut pending);
            }
            pending.clear();
            (is_test, ignored) = (false, false);
        } else if !line.is_empty() {
            pending.clear();
            (is_test, ignored) = (false, false);
        }
    }
    ids
}

/// Ids named above a case of the device suite that the suite's own list has: the lab runs those on real devices.
fn ids_of_lab_cases() -> BTreeSet<String> {
    let suite: Vec<String> = files_with("rs", &root().join("spec/src/device_suite")).iter().map(|p| text(p)).collect();
    let whole = suite.concat();
    let mut ids = BTreeSet::new();
    for source in &suite {
        let mut pending: Vec<String> = Vec::new();
        for line in source.lines().map(str::trim) {
            if let Some((_, list)) = line.strip_prefix("///").and_then(|comment| comment.split_once("spec:")) {
                pending.extend(list.split([',', ' ']).filter(|word| is_id(word)).map(str::to_owned));
            } else if let Some((_, rest)) = line.split_once("fn ") {
                let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                // Once where it is defined, and once more where it is listed.
                if whole.matches(name.as_str()).count() > 1 {
                    ids.extend(pending.drain(..));
                }
                pending.clear();
            }
        }
    }
    ids
}

#[test]
fn a_sentence_counts_as_tested_only_above_a_test_that_runs() {
    let source = "/// spec: A-1, A-2\n#[test]\nfn a() {}\n/// spec: A-3\nfn b() {}\n// spec: A-4\n#[test]\n#[ignore]\nfn c() {}\n";
    assert_eq!(tested_ids(source), BTreeSet::from(["A-1".to_owned(), "A-2".to_owned()]));
}

#[test]
fn every_normative_sentence_has_a_test_and_every_named_id_exists() {
    let declared = declared_ids();
    let mut tested = BTreeSet::new();
    for folder in ["sdk", "host", "plugins", "examples", "spec"] {
        for path in files_with("rs", &root().join(folder)) {
            if !path.ends_with("tests/tidy.rs") {
                tested.append(&mut tested_ids(&text(&path)));
            }
        }
    }
    tested.append(&mut ids_of_lab_cases());
    let untested: Vec<_> = declared.iter().filter(|(id, _)| !tested.contains(*id)).collect();
    assert!(untested.is_empty(), "sentences without a test: {untested:#?}");
    let unknown: Vec<_> = tested.iter().filter(|id| !declared.contains_key(*id)).collect();
    assert!(unknown.is_empty(), "tests name sentences that no page of spec/ has: {unknown:#?}");
}
