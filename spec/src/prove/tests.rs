use std::path::Path;

use super::*;

const SOURCE: &str = "impl A {\n    fn first(&self) {\n        fence();\n        self.go(\n            1,\n        );\n    }\n\n    \
                      fn second(&self) {\n        fence();\n    }\n}\n";

fn mutation(within: &'static str, key: &'static str, broken: &'static str) -> Mutation {
    Mutation { name: "m", file: "a.rs", within, key, broken, model: "loom_a", says: "" }
}

#[test]
fn a_key_is_found_in_its_function_only_and_blanks_are_alike() {
    let text = patched(SOURCE, &[&mutation("fn second(", "fence();", "")]).unwrap();
    assert!(
        text.contains("fn second(&self) {\n        if crate::mutated(\"m\") {  } else { fence(); }\n    }"),
        "{text}"
    );
    let text = patched(SOURCE, &[&mutation("fn first(", "self.go( 1, );", "stop();")]).unwrap();
    assert!(
        text.contains("if crate::mutated(\"m\") { stop(); } else { self.go(\n            1,\n        ); }"),
        "{text}"
    );
    let text = patched(SOURCE, &[&mutation("fn first(", "1", "2")]).unwrap();
    assert!(text.contains("(if crate::mutated(\"m\") { 2 } else { 1 }),"), "{text}");
}

#[test]
fn a_key_that_is_gone_or_ambiguous_is_an_error() {
    for (within, key) in
        [("fn first(", "absent();"), ("fn third(", "fence();"), ("fn ", "fence();"), ("fn first(", "f")]
    {
        patched(SOURCE, &[&mutation(within, key, "")]).unwrap_err();
    }
    let overlapping = [mutation("fn first(", "self.go( 1, );", ""), mutation("fn first(", "1", "2")];
    patched(SOURCE, &overlapping.iter().collect::<Vec<_>>()).unwrap_err();
}

#[test]
fn two_mutations_of_one_line_stand_beside_each_other() {
    let one = mutation("fn second(", "fence();", "a();");
    let two = Mutation { name: "n", broken: "b();", ..one };
    let text = patched(SOURCE, &[&one, &two]).unwrap();
    let wanted = "if crate::mutated(\"m\") { a(); } else if crate::mutated(\"n\") { b(); } else { fence(); }";
    assert!(text.contains(wanted), "{text}");
}

/// Without a build: the code has moved on, and the list has not.
#[test]
fn every_mutation_finds_its_line_in_the_code_as_it_is() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for mutation in MUTATIONS {
        let source = std::fs::read_to_string(workspace.join(mutation.file)).unwrap();
        let here: Vec<&Mutation> = MUTATIONS.iter().filter(|other| other.file == mutation.file).collect();
        patched(&source, &here).unwrap();
        let names = MUTATIONS.iter().filter(|other| other.name == mutation.name).count();
        assert_eq!(names, 1, "{} is there twice", mutation.name);
    }
}

#[test]
fn a_model_without_a_mutation_and_a_mutation_without_a_model_are_told() {
    let models = ["gate::loom_tests::loom_a".to_owned(), "loom_b".to_owned()];
    let other = Mutation { model: "loom_c", ..mutation("", "", "") };
    assert!(unproven(&models[..1], &[mutation("", "", "")]).is_empty());
    assert_eq!(
        unproven(&models, &[mutation("", "", ""), other]),
        ["no mutation breaks loom_b", "m: there is no one model loom_c"]
    );
}
