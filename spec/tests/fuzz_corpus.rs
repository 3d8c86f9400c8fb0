//! What the fuzz targets have found, and what they begin with, again in each `cargo test`; and a bounded run of mutations of it.
//!
//! `VFU_FUZZ_SEED` and `VFU_FUZZ_ROUNDS` choose the run; the seed is printed. `VFU_WRITE_CORPUS=1` writes the seeds of
//! `spec/src/fuzz/seeds.rs` into the corpus' folders. An input that fails is written to `target/fuzz-failure-<target>` and belongs
//! into the corpus, once it is understood, under a name that says what it is.

use std::path::PathBuf;

use vfio_mediate_spec::fuzz::{Mutator, TARGETS, Target};

const SEED: u64 = 20_261_121;
const ROUNDS: u64 = 20_000;

fn folder(target: &Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name)
}

fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let mut inputs: Vec<_> = std::fs::read_dir(folder(target))
        .expect("a folder of the corpus")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            (name, std::fs::read(path).expect("an input"))
        })
        .collect();
    inputs.sort();
    inputs
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text}")))
}

#[test]
fn each_seed_is_in_the_corpus() {
    for target in &TARGETS {
        let folder = folder(target);
        for (name, seed) in (target.seeds)() {
            if std::env::var_os("VFU_WRITE_CORPUS").is_some() {
                std::fs::create_dir_all(&folder).expect("a folder");
                std::fs::write(folder.join(name), &seed).expect("an input");
            }
            let there = std::fs::read(folder.join(name)).unwrap_or_default();
            assert_eq!(there, seed, "{}/{name}: VFU_WRITE_CORPUS=1 writes it", target.name);
        }
    }
}

/// spec: VFU-2
/// spec: VFU-6
#[test]
fn every_input_of_the_corpus_is_harmless() {
    for target in &TARGETS {
        for (name, input) in corpus(target) {
            println!("{}/{name}", target.name);
            (target.run)(&input);
        }
    }
}

/// spec: VFU-2
/// spec: VFU-6
#[test]
fn mutations_of_the_corpus_are_harmless() {
    let (seed, rounds) = (number("VFU_FUZZ_SEED", SEED), number("VFU_FUZZ_ROUNDS", ROUNDS));
    println!("VFU_FUZZ_SEED={seed} VFU_FUZZ_ROUNDS={rounds}");
    for target in &TARGETS {
        let mut mutator = Mutator::new(seed);
        let mut inputs: Vec<Vec<u8>> = corpus(target).into_iter().map(|(_, input)| input).collect();
        for _ in 0..rounds {
            let (at, other) = (mutator.below(inputs.len()), mutator.below(inputs.len()));
            let mut input = inputs[at].clone();
            mutator.mutate(&mut input, &inputs[other].clone());
            let run = std::panic::catch_unwind(|| (target.run)(&input));
            if let Err(panic) = run {
                let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-failure-{}", target.name));
                std::fs::write(&path, &input).expect("the failing input");
                println!("{}: VFU_FUZZ_SEED={seed}, the input is in {}", target.name, path.display());
                std::panic::resume_unwind(panic);
            }
            // Some live on, so that changes add up.
            if mutator.below(50) == 0 {
                inputs[at] = input;
            }
        }
    }
}
