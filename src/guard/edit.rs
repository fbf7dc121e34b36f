//! Changes to a manifest's text that keep everything else of it: comments, order, spacing. Text in, text out; that the guard is still
//! valid is for [`replace_manifest`](super::replace_manifest) to find.

use super::error::{GuardError, Location, shown};
use super::{MANIFEST_FILE, MeasuredResult, Probe, location};
use toml_edit::{ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, Value, value};

/// Sets what `calibrate` finds for the gate of that name: mean and standard deviation of benign projections, and the threshold in these
/// deviations.
///
/// # Errors
/// Text that is not TOML, or no such gate.
pub fn set_gate_calibration(
    text: &str,
    gate: &str,
    mean: f64,
    deviation: f64,
    threshold: f64,
) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    let entry = named_entry(&mut document, "gate", &["name"], gate)?;
    for (key, number) in [("threshold", threshold), ("mean", mean), ("deviation", deviation)] {
        set(entry, key, number.into());
    }
    Ok(document.to_string())
}

/// Sets the projection that an `ablate` leaves.
///
/// # Errors
/// Text that is not TOML, or no such intervention.
pub fn set_ablate_mean(text: &str, intervention: &str, mean: f64) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    set(named_entry(&mut document, "intervention", &["name", "vector"], intervention)?, "mean", mean.into());
    Ok(document.to_string())
}

/// Sets the probe, in place of any other.
///
/// # Errors
/// Text that is not TOML, or no table `target`.
pub fn set_probe(text: &str, probe: &Probe) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    let target = document.get_mut("target").and_then(Item::as_table_like_mut);
    let target = target.ok_or_else(|| GuardError::Missing { why: "the manifest has no table `target`".to_owned() })?;
    let Probe { prompt, vector, layer, mean_norm, projection, spread, tolerance } = probe;
    let entries: [(&str, Value); 7] = [
        ("prompt", prompt.into()),
        ("vector", vector.into()),
        ("layer", i64::from(layer.0).into()),
        ("mean_norm", (*mean_norm).into()),
        ("projection", (*projection).into()),
        ("spread", (*spread).into()),
        ("tolerance", (*tolerance).into()),
    ];
    match target.get_mut("probe").and_then(Item::as_table_like_mut) {
        Some(table) => entries.into_iter().for_each(|(key, new)| set(table, key, new)),
        None => {
            target.insert("probe", value(InlineTable::from_iter(entries)));
        }
    }
    Ok(document.to_string())
}

/// Adds a measured result, in place of one with the same `name` and `on`.
///
/// # Errors
/// Text that is not TOML, or `result` that is no list of tables.
pub fn add_result(text: &str, result: &MeasuredResult) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    let MeasuredResult { name, value: figure, on, command } = result;
    let mut entries: Vec<(&str, Value)> = vec![("name", name.into()), ("value", (*figure).into()), ("on", on.into())];
    entries.extend(command.iter().map(|command| ("command", command.into())));

    let results = document.entry("result").or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
    let same = |table: &dyn TableLike| has(table, "name", name) && has(table, "on", on);
    let there = tables_of(results).into_iter().find(|table| same(*table));
    if let Some(table) = there {
        if command.is_none() {
            table.remove("command");
        }
        entries.into_iter().for_each(|(key, new)| set(table, key, new));
    } else if let Some(tables) = results.as_array_of_tables_mut() {
        tables.push(Table::from_iter(entries));
    } else if let Some(array) = results.as_array_mut() {
        array.push(InlineTable::from_iter(entries));
    } else {
        return Err(GuardError::value("a list of tables named `result`", results.type_name()));
    }
    Ok(document.to_string())
}

fn parse(text: &str) -> Result<DocumentMut, GuardError> {
    text.parse().map_err(|error: toml_edit::TomlError| {
        let line = location::line_at(text, error.span().map_or(0, |span| span.start));
        let reason = Box::new(GuardError::Syntax { reason: shown(error.message()) });
        GuardError::Manifest { at: Location { file: MANIFEST_FILE.to_owned(), line, key: None }, reason }
    })
}

/// The table of the list `what` that goes by `name`: under the first of `keys` that it has.
fn named_entry<'a>(
    document: &'a mut DocumentMut,
    what: &'static str,
    keys: &[&str],
    name: &str,
) -> Result<&'a mut dyn TableLike, GuardError> {
    let name_of = |table: &dyn TableLike| {
        let name = keys.iter().find_map(|key| table.get(key))?.as_str()?;
        Some(name.to_owned())
    };
    let tables: Vec<_> = document.get_mut(what).map(tables_of).unwrap_or_default();
    let known: Vec<String> = tables.iter().filter_map(|table| name_of(*table)).collect();
    let found = tables.into_iter().find(|table| name_of(*table).as_deref() == Some(name));
    found.ok_or_else(|| GuardError::unknown(what, name, known.iter()))
}

/// Tables of a list that is written `[[name]]` or `name = [{ … }]`.
fn tables_of(list: &mut Item) -> Vec<&mut dyn TableLike> {
    match list {
        Item::ArrayOfTables(tables) => tables.iter_mut().map(|table| table as &mut dyn TableLike).collect(),
        Item::Value(Value::Array(array)) => {
            array.iter_mut().filter_map(Value::as_inline_table_mut).map(|table| table as &mut dyn TableLike).collect()
        }
        _ => Vec::new(),
    }
}

fn has(table: &dyn TableLike, key: &str, text: &str) -> bool {
    table.get(key).and_then(Item::as_str) == Some(text)
}

/// Sets a value and keeps the comment behind the one that was there.
fn set(table: &mut dyn TableLike, key: &str, mut new: Value) {
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            *new.decor_mut() = old.decor().clone();
            *old = new;
        }
        None => {
            table.insert(key, Item::Value(new));
        }
    }
}
