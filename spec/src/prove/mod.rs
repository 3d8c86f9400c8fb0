//! `cargo prove`: the loom models hold, and each of them fails when the line that it is there for is broken.
//!
//! **Owns** a copy of the workspace below `target/`, in which every mutation of [`mutations`] stands beside the line that it
//! breaks, off unless an environment variable names it: one build serves them all. **Must never** change the workspace, nor
//! take a failure for another reason than the one expected as a proof.
//!
//! ```text
//!   the workspace  -- cargo test, --cfg loom -->  every model passes
//!   its copy       -- one build -->  for each mutation: its model fails, saying what it should; a hang proves nothing
//! ```
//! A model that no mutation breaks fails the program: it would pass whatever the code did.

mod copy;
mod mutations;
mod patch;
mod run;

pub use copy::Copy;
pub use mutations::{MUTATIONS, Mutation};
pub use patch::patched;
pub use run::{Failure, Models, break_one};

/// Names the mutation that is in force.
pub const VARIABLE: &str = "VFIO_MEDIATE_MUTATION";

/// Models whose names no mutation has, and names of mutations that no model has, each told in one line.
pub fn unproven(models: &[String], mutations: &[Mutation]) -> Vec<String> {
    let short = |model: &String| model.rsplit("::").next().unwrap_or_default().to_owned();
    let models: Vec<String> = models.iter().map(short).collect();
    let mut wrong = Vec::new();
    for model in &models {
        if !mutations.iter().any(|mutation| mutation.model == model) {
            wrong.push(format!("no mutation breaks {model}"));
        }
    }
    for mutation in mutations {
        if models.iter().filter(|model| *model == mutation.model).count() != 1 {
            wrong.push(format!("{}: there is no one model {}", mutation.name, mutation.model));
        }
    }
    wrong
}

#[cfg(test)]
mod tests;
