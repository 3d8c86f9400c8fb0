//! Puts mutations beside the lines that they break.

use std::ops::Range;

use anyhow::{Context, ensure};

use super::{Mutation, VARIABLE};

/// The function that the copy has and the workspace has not.
pub fn switch() -> String {
    format!(
        "\n/// Whether this mutation is in force.\npub(crate) fn mutated(name: &str) -> bool {{\n    \
         static NAME: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();\n    \
         NAME.get_or_init(|| std::env::var(\"{VARIABLE}\").ok()).as_deref() == Some(name)\n}}\n"
    )
}

/// `source` with every mutation of `mutations` beside its key line. Each key must be found, once.
pub fn patched(source: &str, mutations: &[&Mutation]) -> anyhow::Result<String> {
    // Mutations of one line share a switch.
    let mut places: Vec<(Range<usize>, Vec<&Mutation>)> = Vec::new();
    for mutation in mutations {
        let place = find(source, mutation).with_context(|| format!("{:?} in {}", mutation.name, mutation.file))?;
        match places.iter_mut().find(|(other, _)| *other == place) {
            Some((_, same)) => same.push(mutation),
            None => places.push((place, vec![mutation])),
        }
    }
    places.sort_by_key(|(place, _)| place.start);
    for pair in places.windows(2) {
        ensure!(
            pair[0].0.end <= pair[1].0.start,
            "{:?} and {:?} break overlapping lines",
            pair[0].1[0].name,
            pair[1].1[0].name
        );
    }
    let (mut whole, mut at) = (String::new(), 0);
    for (place, mutations) in places {
        whole.push_str(&source[at..place.start]);
        whole.push_str(&switched(&source[place.clone()], &mutations));
        at = place.end;
    }
    whole.push_str(&source[at..]);
    Ok(whole)
}

/// A statement stays one; an expression is put into parentheses.
fn switched(key: &str, mutations: &[&Mutation]) -> String {
    let is_statement = key.ends_with([';', '}']);
    let (open, close) = if is_statement { ("", "") } else { ("(", ")") };
    let mut text = open.to_owned();
    for mutation in mutations {
        text.push_str(&format!("if crate::mutated({:?}) {{ {} }} else ", mutation.name, mutation.broken));
    }
    text + &format!("{{ {key} }}{close}")
}

/// Where the key is: after `within`, which stands once in the file, and before that function ends.
fn find(source: &str, mutation: &Mutation) -> anyhow::Result<Range<usize>> {
    let starts: Vec<usize> = source.match_indices(mutation.within).map(|(at, _)| at).collect();
    ensure!(starts.len() == 1, "{:?} stands {} times", mutation.within, starts.len());
    let line = source[..starts[0]].rfind('\n').map_or(0, |at| at + 1);
    let indent: String = source[line..].chars().take_while(|c| *c == ' ').collect();
    let end = source[starts[0]..].find(&format!("\n{indent}}}\n")).context("its end")? + starts[0];
    let function = &source[starts[0]..end];
    let found: Vec<Range<usize>> = function
        .char_indices()
        .filter_map(|(at, _)| Some(at..at + matches_at(&function[at..], mutation.key)?))
        .collect();
    ensure!(found.len() == 1, "the key line stands {} times within {:?}", found.len(), mutation.within);
    Ok(found[0].start + starts[0]..found[0].end + starts[0])
}

/// The length of `key` at the start of `text`; a blank is any run of blanks.
fn matches_at(text: &str, key: &str) -> Option<usize> {
    let (mut rest, mut key) = (text, key);
    while let Some(wanted) = key.chars().next() {
        if wanted.is_whitespace() {
            key = key.trim_start();
            let trimmed = rest.trim_start();
            if trimmed.len() == rest.len() {
                return None;
            }
            rest = trimmed;
        } else {
            rest = rest.strip_prefix(wanted)?;
            key = &key[wanted.len_utf8()..];
        }
    }
    Some(text.len() - rest.len())
}
