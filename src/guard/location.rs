//! From a key to its line in a manifest and back. Only errors ask, so the text is parsed again for each.

use super::error::{GuardError, Location, shown};
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// `reason`, at `key` of the manifest `text`. Where the key is not there, the line is that of the table it is missing from.
pub(super) fn at_key(file: &str, text: &str, key: &str, reason: Box<GuardError>) -> GuardError {
    let offset = DeTable::parse(text).ok().map_or(0, |document| offset_of(document.get_ref(), key));
    let at = Location { file: shown(file), line: line_at(text, offset), key: Some(key.to_owned()) };
    GuardError::Manifest { at, reason }
}

/// What the TOML reader says, with the key that it is about.
pub(super) fn of_toml_error(file: &str, text: &str, error: &toml::de::Error) -> GuardError {
    let span = error.span().unwrap_or(0..0);
    // What is missing from the whole document has an empty span at its start.
    let key = DeTable::parse(text).ok().filter(|_| !span.is_empty()).and_then(|document| {
        let mut best = None;
        innermost(document.get_ref(), "", &span, &mut best);
        best.map(|(_, key)| shown(&key))
    });
    let at = Location { file: shown(file), line: line_at(text, span.start), key };
    GuardError::Manifest { at, reason: Box::new(GuardError::Syntax { reason: shown(error.message()) }) }
}

/// The line, from 1, of byte `offset`.
pub(super) fn line_at(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

fn offset_of(table: &DeTable<'_>, key: &str) -> usize {
    let mut offset = 0;
    let mut table = Some(table);
    for step in key.split('.') {
        let (name, index) = match step.split_once('[') {
            Some((name, index)) => (name, index.trim_end_matches(']').parse::<usize>().ok()),
            None => (step, None),
        };
        let Some((found, value)) = table.and_then(|table| table.get_key_value(name)) else { break };
        offset = found.span().start;
        let element = index.and_then(|index| value.get_ref().as_array()?.get(index));
        if let Some(element) = element {
            offset = element.span().start;
        }
        table = element.unwrap_or(value).get_ref().as_table();
    }
    offset
}

/// The key of the shortest key or value that holds `span`.
fn innermost(table: &DeTable<'_>, prefix: &str, span: &Range<usize>, best: &mut Option<(usize, String)>) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
        consider(&name.span(), &key, span, best);
        innermost_of_value(value, &key, span, best);
    }
}

fn innermost_of_value(
    value: &Spanned<DeValue<'_>>,
    key: &str,
    span: &Range<usize>,
    best: &mut Option<(usize, String)>,
) {
    consider(&value.span(), key, span, best);
    match value.get_ref() {
        DeValue::Table(table) => innermost(table, key, span, best),
        DeValue::Array(elements) => {
            for (index, element) in elements.iter().enumerate() {
                innermost_of_value(element, &format!("{key}[{index}]"), span, best);
            }
        }
        _ => {}
    }
}

fn consider(candidate: &Range<usize>, key: &str, span: &Range<usize>, best: &mut Option<(usize, String)>) {
    let holds = candidate.start <= span.start && span.end <= candidate.end && !candidate.is_empty();
    // A later candidate of the same size is the deeper one: `[[vector]]` is the list and its first element.
    if holds && best.as_ref().is_none_or(|(size, _)| candidate.len() <= *size) {
        *best = Some((candidate.len(), key.to_owned()));
    }
}
