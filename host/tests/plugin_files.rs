//! Files that are named as plug-ins: whatever they are, one line says what is wrong, and the process goes on.

mod support;

use std::path::{Path, PathBuf};

use support::*;
use vfio_mediate::plugin::{Library, LoadError};
use vfio_mediate_sdk::layout::ABI_FINGERPRINT;

fn refused(path: &Path) -> LoadError {
    let error = Library::open(path).err().unwrap_or_else(|| panic!("{} was taken", path.display()));
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "the path is missing: {text}");
    assert!(!text.contains("dlopen failed"), "the cause is missing: {text}");
    error
}

/// As [`refused`], for files that are told apart before anything of them is mapped.
fn not_a_library(path: &Path, word: &str) {
    let error = refused(path);
    let text = error.to_string();
    assert!(matches!(error, LoadError::NotALibrary { .. } | LoadError::Read { .. }), "{error:?}");
    assert!(text.contains(word) && text.lines().count() == 1, "{text}");
}

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// spec: LOAD-1
#[test]
fn files_of_other_kinds_are_refused_in_one_line() {
    not_a_library(&file("empty.so", b""), "empty");
    not_a_library(&file("text.so", b"#!/bin/sh\necho I am a plug-in\n"), "ELF");
    not_a_library(&folder(), "folder");
    not_a_library(&folder().join("never-there.so"), "No such file");
    not_a_library(Path::new("/dev/null"), "regular");
    not_a_library(&compile("program.so", "stranger.c", &["PROGRAM"], &["-no-pie"]), "shared library");
    not_a_library(&compile("pie.so", "stranger.c", &["PROGRAM"], &["-pie"]), "program");
    not_a_library(&compile("object.so", "stranger.c", &[], &["-c"]), "shared library");
    let mut bytes = std::fs::read(scripted("other-machine", &[])).unwrap();
    bytes[18] = 0xf7;
    not_a_library(&file("machine.so", &bytes), "another machine");
}

/// spec: LOAD-1
#[test]
fn a_fifo_is_not_waited_for() {
    let fifo = folder().join("fifo.so");
    let _ = std::fs::remove_file(&fifo);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    not_a_library(&fifo, "regular");
}

/// spec: LOAD-1
#[test]
fn a_file_beyond_the_cap_is_not_read() {
    let path = file("large.so", b"\x7fELF");
    std::fs::File::options().write(true).open(&path).unwrap().set_len((256 << 20) + 1).unwrap();
    not_a_library(&path, "256 MiB");
}

/// Cut at every size up to its first pages, then at every boundary of a page and around it.
///
/// spec: LOAD-2
#[test]
fn a_library_cut_short_anywhere_is_refused_and_never_a_signal() {
    let whole = std::fs::read(scripted("whole", &[])).unwrap();
    let near_page = |size: &usize| size % 4096 <= 1 || size % 4096 == 4095;
    let sizes = (0..whole.len()).filter(|size| *size < 1024 || near_page(size) || size % 61 == 0);
    for size in sizes.chain(whole.len() - 70..whole.len()) {
        not_a_library(&file("cut.so", &whole[..size]), "");
    }
    Library::open(&file("cut.so", &whole)).unwrap();
}

/// As a download leaves it that broke off in a preallocated file.
///
/// spec: LOAD-2
#[test]
fn a_library_whose_end_was_never_written_is_refused_and_never_a_signal() {
    let whole = std::fs::read(scripted("unwritten", &[])).unwrap();
    for written in (64..whole.len() - 64).step_by(509) {
        let mut bytes = whole[..written].to_vec();
        bytes.resize(whole.len(), 0);
        not_a_library(&file("unwritten-end.so", &bytes), "");
    }
}

/// spec: LOAD-3
#[test]
fn a_strangers_library_is_refused_before_its_constructors_run() {
    let mark = folder().join("stranger-ran");
    let _ = std::fs::remove_file(&mark);
    let constructor = format!("CONSTRUCTOR_FILE=\"{}\"", mark.display());
    let stranger = compile("stranger.so", "stranger.c", &[&constructor], &["-shared"]);
    let error = refused(&stranger);
    assert!(matches!(&error, LoadError::NotAPlugin { .. }), "{error:?}");
    assert!(error.to_string().contains("does not export vfio_mediate_plugin"), "{error}");
    assert!(!mark.exists(), "a stranger's constructor ran");
    // The same mark is set by a library that is loaded: the check above can fail.
    load(scripted("constructed", &[&constructor]));
    assert!(mark.exists());
}

/// spec: LOAD-3
#[test]
fn a_symbol_of_the_right_name_that_is_no_entry_is_refused() {
    for (name, how, word) in [
        ("function", "ENTRY_FUNCTION", "something else"),
        ("short", "ENTRY_SHORT=7", "something else"),
        ("magic", "MAGIC=0x1122334455667788", "0x1122334455667788"),
        ("hidden", "ENTRY_HIDDEN", "does not export"),
    ] {
        let error = refused(&scripted(name, &[how]));
        assert!(matches!(error, LoadError::NotAPlugin { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

/// spec: LOAD-4
#[test]
fn the_linkers_own_words_are_told_and_nothing_is_left_open() {
    let missing = compile("missing.so", "stranger.c", &["MISSING"], &["-shared"]);
    for _ in 0..3 {
        let error = refused(&missing);
        assert!(matches!(error, LoadError::Link { .. }), "{error:?}");
        assert!(error.to_string().contains("nobody_defines_this"), "{error}");
    }
    assert_eq!(copies_of("missing.so"), 0, "a failed load leaves its copy open");
    load(scripted("kept", &[]));
    assert_eq!(copies_of("kept.so"), 1, "a library's copy stays open, so that its number is never another's");
}

/// spec: LOAD-5
#[test]
fn other_versions_of_the_abi_are_refused_by_name_of_what_differs() {
    let older_entry = ["ENTRY_CUT", "ENTRY_SIZE=16"];
    for (name, macros, words) in [
        ("older", &["MAJOR=0"][..], &["an older one", "version 0.0", "this host has 1.0"][..]),
        ("newer", &["MAJOR=2", "MINOR=7"], &["a newer one", "version 2.7"]),
        ("small-entry", &["ENTRY_SIZE=40"], &["says 40"]),
        ("large-entry", &["ENTRY_SIZE=4096"], &["says 4096"]),
        ("cut-entry", &older_entry, &["has 16 bytes", "says 16"]),
        ("cut-lying", &["ENTRY_CUT"], &["has 16 bytes"]),
        (
            "fingerprint",
            &["FINGERPRINT=1"],
            &["fingerprint is 0x0000000000000001", &format!("{ABI_FINGERPRINT:#018x}")],
        ),
        ("flags", &["FLAGS=6"], &["unknown flags 0x6"]),
        ("foreign-header", &["RUST_HEADER_GARBAGE"], &["another abi_stable"]),
    ] {
        let error = refused(&scripted(name, macros));
        assert!(matches!(error, LoadError::Abi { .. }), "{name}: {error:?}");
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)) && text.lines().count() == 1, "{text}");
    }
    load(scripted("newer-minor", &["MINOR=9"]));
}

/// spec: LOAD-6
#[test]
fn a_plugin_that_describes_itself_badly_is_refused() {
    let long = format!("VERSION=\"{}\"", "1".repeat(65));
    for (name, macros, word) in [
        ("no-plugin", &["NO_PLUGIN"][..], "names no plug-in"),
        ("no-name", &["NAME=\"\""], "name"),
        ("bad-name", &["NAME=\"Scripted/..\""], "a-z"),
        ("no-version", &["VERSION=\"\""], "version"),
        ("long-version", &[&long], "65 bytes"),
        ("not-utf8", &["VERSION=\"\\xff\""], "UTF-8"),
        ("control", &["VENDOR=\"a\\nb\""], "control"),
        ("no-open", &["HAS_OPEN=0"], "no open"),
        ("table-size", &["PLUGIN_SIZE=0"], "0 bytes"),
        ("many-matches", &["MATCH_COUNT=1025"], "1025"),
        ("no-id", &["MATCH_DEVICE=0x10000"], "0x10000"),
    ] {
        let error = refused(&scripted(name, macros));
        assert!(matches!(error, LoadError::Malformed { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(word) && error.to_string().lines().count() == 1, "{error}");
    }
}

/// spec: LOAD-7
#[test]
fn a_loaded_library_does_not_depend_on_its_file_any_more() {
    let path = scripted("replaced", &[]);
    let (registry, _) = with_plugin(&path, ONE);
    std::fs::write(&path, b"").unwrap();
    let script = Script::new();
    let device = opened(&registry, "device", script);
    assert_eq!(device.claims().len(), 2);
}

/// The dynamic linker takes a name that it knows for the library that it knows.
///
/// spec: LOAD-7
#[test]
fn two_files_loaded_in_turn_are_two_libraries_even_with_one_soname() {
    let one =
        compile("same-1.so", "scripted.c", &["NAME=\"same\"", "VERSION=\"1.0.0\""], &["-shared", "-Wl,-soname,x.so"]);
    let two =
        compile("same-2.so", "scripted.c", &["NAME=\"same\"", "VERSION=\"2.0.0\""], &["-shared", "-Wl,-soname,x.so"]);
    for _ in 0..10 {
        assert_eq!(load(&one).version(), "1.0.0");
        assert_eq!(load(&two).version(), "2.0.0");
    }
}

/// spec: LOAD-8
#[test]
fn a_plugin_tells_who_it_is_and_whether_a_panic_ends_the_process() {
    let library = load(scripted("calm", &["VERSION=\"1.2.3\"", "VENDOR=\"Vendor, Inc.\""]));
    assert_eq!((library.name(), library.version(), library.vendor()), ("calm", "1.2.3", "Vendor, Inc."));
    assert!(!library.panic_aborts() && !library.is_rust());
    assert_eq!(library.matches().len(), 1);
    assert_eq!((library.matches()[0].vendor_id, library.matches()[0].device_id), (Some(VENDOR), None));
    assert!(load(scripted("aborting", &["FLAGS=VFIO_MEDIATE_ENTRY_PANIC_ABORTS"])).panic_aborts());
}
