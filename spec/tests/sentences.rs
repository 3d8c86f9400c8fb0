//! Every normative sentence of `spec/*.md` has a test that is *run*, and every id that a test names is a sentence's.
//!
//! How it knows: `cargo test` is asked for the test programs of the whole workspace (they are there, or are built), and each
//! program for the tests that it has and those that it ignores. An id counts only when it is named directly above a function
//! whose program lists it and does not ignore it. A comment that looks like a test, a test in a file that no module names, one
//! behind a `cfg` that is off, and one that is ignored are in no such list. The loom models are in no program of `cargo test`:
//! those count that `cargo prove` breaks, and it fails for a mutation whose model it does not find and run. Cases of the
//! device suite count when the suite's list has them, since `cargo lab` and `tests/device_suite.rs` run the whole list.

mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use tree::{files_with, root, shown, text};
use vfio_mediate_spec::prove::MUTATIONS;

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

/// A function that is written as a test, and the ids in the comment lines directly above it.
#[derive(Debug, PartialEq, Eq)]
struct Written {
    name: String,
    ids: BTreeSet<String>,
}

/// What a source seems to have. Whether any of it is run is asked of the programs.
fn written_tests(source: &str) -> Vec<Written> {
    let mut tests = Vec::new();
    let (mut ids, mut is_test) = (BTreeSet::new(), false);
    for line in source.lines().map(str::trim) {
        if let Some(comment) = line.strip_prefix("//") {
            if let Some((_, list)) = comment.split_once("spec:") {
                let words = list.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '-'));
                ids.extend(words.filter(|word| is_id(word)).map(str::to_owned));
            }
        } else if line.starts_with("#[") {
            is_test |= line.contains("test]") || line.contains("test(");
        } else if let Some((_, rest)) = line.split_once("fn ") {
            if is_test {
                let name = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                tests.push(Written { name, ids: std::mem::take(&mut ids) });
            }
            ids.clear();
            is_test = false;
        } else if !line.is_empty() {
            ids.clear();
            is_test = false;
        }
    }
    tests
}

/// A test program: the source that it begins with, and the tests that it runs, by their full names.
#[derive(Debug)]
struct Program {
    source: PathBuf,
    run: Vec<String>,
}

impl Program {
    /// The folder below which its modules lie.
    fn folder(&self) -> &Path {
        self.source.parent().expect("a source has a folder")
    }

    /// Tests of this name in modules that lie where `path` does: of a source in `a/b/`, below the module `a::b`.
    fn runs(&self, path: &Path, name: &str) -> usize {
        let Some(below) = path.strip_prefix(self.folder()).ok().and_then(Path::parent) else { return 0 };
        let module: String = below.iter().map(|part| format!("{}::", part.to_string_lossy())).collect();
        let is_it = |test: &&String| test.starts_with(&module) && test.rsplit("::").next() == Some(name);
        self.run.iter().filter(is_it).count()
    }
}

/// Every test program of the workspace, as cargo names them, for this test's own profile and target folder.
fn programs() -> Vec<Program> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("below the target folder");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["test", "--offline", "--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    cargo.arg("--manifest-path").arg(root().join("Cargo.toml")).arg("--target-dir").arg(target);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let built = cargo.output().expect("cargo");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let program = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        if message["profile"]["test"] != true {
            return None;
        }
        let source = PathBuf::from(message["target"]["src_path"].as_str()?);
        let program = PathBuf::from(message["executable"].as_str()?);
        let ignored = listed(&program, &["--ignored"]);
        let run = listed(&program, &[]).into_iter().filter(|test| !ignored.contains(test)).collect();
        Some(Program { source, run })
    };
    String::from_utf8_lossy(&built.stdout).lines().filter_map(program).collect()
}

/// What the program itself says that it has.
fn listed(program: &Path, arguments: &[&str]) -> Vec<String> {
    let output = Command::new(program).args(["--list", "--format=terse"]).args(arguments).output().expect("a program");
    assert!(output.status.success(), "{} does not list its tests", program.display());
    let output = String::from_utf8_lossy(&output.stdout);
    output.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// Whether a test of `path` is run: by the program that begins with this source, or by one to whose modules it belongs.
/// `written`: how often the name is written below this source's folder, of which each must be run.
fn is_run(programs: &[Program], path: &Path, name: &str, written: usize) -> bool {
    let own = programs.iter().find(|program| program.source == path);
    match own {
        Some(program) => program.run.iter().any(|test| test.rsplit("::").next() == Some(name)),
        None => programs.iter().any(|program| program.runs(path, name) >= written),
    }
}

/// Whether it is a model that `cargo prove` runs, and breaks.
fn is_proven(name: &str) -> bool {
    MUTATIONS.iter().any(|mutation| mutation.model == name)
}

/// A source without its line comments.
fn code(source: &str) -> String {
    source.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// Ids named above a case of the device suite that a list of the suite has.
fn ids_of_lab_cases() -> BTreeSet<String> {
    let suite: Vec<String> = files_with("rs", &root().join("spec/src/device_suite")).iter().map(|p| text(p)).collect();
    let whole = code(&suite.concat());
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
fn ids_belong_to_the_test_function_below_them() {
    let source = "/// spec: A-1, A-2\n#[test]\nfn a() {}\n/// spec: A-3\nfn b() {}\n// spec: A-4\n\n#[test]\n#[ignore]\nfn c() {}\n";
    let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
    let a = Written { name: "a".to_owned(), ids: ids(&["A-1", "A-2"]) };
    let c = Written { name: "c".to_owned(), ids: ids(&["A-4"]) };
    assert_eq!(written_tests(source), [a, c]);
}

/// What looks like a test in the text, and is none to the program.
#[test]
fn only_tests_that_a_program_lists_and_does_not_ignore_are_run() {
    let program = |source: &str, run: &[&str]| Program {
        source: source.into(),
        run: run.iter().map(|test| (*test).to_owned()).collect(),
    };
    let programs =
        [program("/h/src/lib.rs", &["a::tests::x", "b::c::tests::y"]), program("/h/tests/t.rs", &["inner::z"])];
    let is_run = |path: &str, name: &str, written| is_run(&programs, Path::new(path), name, written);
    assert!(is_run("/h/src/a.rs", "x", 1) && is_run("/h/src/a/tests.rs", "x", 1) && is_run("/h/src/b/c.rs", "y", 1));
    assert!(!is_run("/h/src/b/other.rs", "x", 1), "of the same name, elsewhere");
    assert!(!is_run("/h/src/a/tests.rs", "x", 2), "one of the two is not run");
    assert!(is_run("/h/tests/t.rs", "z", 1) && !is_run("/h/tests/t.rs", "x", 1) && !is_run("/h/tests/u.rs", "x", 1));
}

/// A test that is ignored, and one behind a `cfg` that is off, are not in the lists that the programs give.
#[test]
#[ignore = "it is here to be ignored"]
fn ignored_on_purpose() {}

#[cfg(any())]
#[test]
fn behind_a_cfg_on_purpose() {}

/* A test in a comment:
#[test]
fn in_a_comment_on_purpose() {}
*/

#[test]
fn every_normative_sentence_has_a_test_that_is_run_and_every_named_id_exists() {
    let (declared, programs) = (declared_ids(), programs());
    assert!(programs.len() > 10, "cargo named {} test programs", programs.len());
    let this = root().join("spec/tests/sentences.rs");
    for name in ["ignored_on_purpose", "behind_a_cfg_on_purpose", "in_a_comment_on_purpose"] {
        assert!(text(&this).contains(&format!("fn {name}()")) && !is_run(&programs, &this, name, 1), "{name} counts");
    }
    assert!(is_run(&programs, &this, "ids_belong_to_the_test_function_below_them", 1));

    let (mut tested, mut named, mut idle) = (ids_of_lab_cases(), BTreeSet::new(), Vec::new());
    let sources: Vec<PathBuf> = ["sdk", "host", "plugins", "examples", "spec"]
        .iter()
        .flat_map(|folder| files_with("rs", &root().join(folder)))
        .filter(|path| *path != this)
        .collect();
    let written: Vec<_> = sources.iter().map(|path| (path, written_tests(&text(path)))).collect();
    // The same name may stand in two files of a folder; then each must be run.
    let mut times: BTreeMap<(&Path, &str), usize> = BTreeMap::new();
    for (path, tests) in &written {
        let folder = path.parent().expect("a source has a folder");
        tests.iter().for_each(|test| *times.entry((folder, &test.name)).or_default() += 1);
    }
    for (path, tests) in &written {
        let folder = path.parent().expect("a source has a folder");
        for test in tests.iter().filter(|test| !test.ids.is_empty()) {
            named.extend(test.ids.iter().cloned());
            if is_proven(&test.name) || is_run(&programs, path, &test.name, times[&(folder, test.name.as_str())]) {
                tested.extend(test.ids.iter().cloned());
            } else {
                idle.push(format!("{}: {}", shown(path), test.name));
            }
        }
    }
    let untested: Vec<_> = declared.iter().filter(|(id, _)| !tested.contains(*id)).collect();
    assert!(untested.is_empty(), "sentences without a test that is run: {untested:#?}\nnot run: {idle:#?}");
    named.extend(tested);
    let unknown: Vec<_> = named.iter().filter(|id| !declared.contains_key(*id)).collect();
    assert!(unknown.is_empty(), "tests name sentences that no page of spec/ has: {unknown:#?}");
    assert!(idle.is_empty(), "tests that name sentences and are not run: {idle:#?}");
}
