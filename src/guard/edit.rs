//! Changes to a manifest's text that keep everything else of it: comments, order, spacing. Text in, text out; that the guard is still
//! valid is for [`replace_manifest`](super::replace_manifest) to find.

use super::error::{GuardError, Location, shown};
use super::{GateCalibration, Guard, MANIFEST_FILE, MeasuredResult, OperatingPoint, Probe, location};
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, Value, value};

/// Keys that an intervention goes by, the first that it has.
const INTERVENTION_NAMES: [&str; 3] = ["name", "vector", "mapping"];

/// Sets what `calibrate` finds for the gate of that name: as its default, and as its figures of that quantization in place of older ones.
///
/// # Errors
/// Text that is not TOML, or no such gate.
pub fn set_gate_calibration(text: &str, gate: &str, found: &GateCalibration) -> Result<String, GuardError> {
    let GateCalibration { quantization, n_benign, mean, deviation, threshold, points } = found;
    let mut document = parse(text)?;
    let entry = named_entry(&mut document, "gate", &["name"], gate)?;
    let figures = [("threshold", *threshold), ("mean", *mean), ("deviation", *deviation)];
    for (key, number) in figures {
        set(entry, key, number.into());
    }
    if entry.get("calibration").is_none() {
        entry.insert("calibration", Item::ArrayOfTables(ArrayOfTables::new()));
    }
    let list = entry.get_mut("calibration").expect("it is there now");
    let mut points: Array = points.iter().map(point_table).collect();
    // One a line.
    points.iter_mut().for_each(|point| point.decor_mut().set_prefix("\n    "));
    points.set_trailing_comma(true);
    points.set_trailing("\n");
    let mut keys: Vec<(&str, Value)> =
        vec![("quantization", quantization.into()), ("n_benign", i64::try_from(*n_benign).unwrap_or(i64::MAX).into())];
    keys.extend(figures.map(|(key, number)| (key, number.into())));
    keys.push(("operating_point", points.into()));
    put(list, "calibration", |table| has(table, "quantization", quantization), keys)?;
    Ok(document.to_string())
}

fn point_table(point: &OperatingPoint) -> Value {
    let OperatingPoint { rate, threshold, fired, low, high, detection } = *point;
    let mut table = InlineTable::new();
    table.insert("rate", rate.into());
    table.insert("threshold", threshold.into());
    table.insert("fired", i64::try_from(fired).unwrap_or(i64::MAX).into());
    table.insert("low", low.into());
    table.insert("high", high.into());
    if let Some(detection) = detection {
        table.insert("detection", detection.into());
    }
    table.into()
}

/// Sets the thresholds that `guard`, which the text is of, has now: those of an operating point (see [`Guard::at_rate`]).
///
/// # Errors
/// Text that is not TOML, or not of that guard.
pub fn set_thresholds(text: &str, guard: &Guard) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    for gate in guard.gates() {
        let entry = named_entry(&mut document, "gate", &["name"], &gate.name)?;
        if let Some(threshold) = gate.threshold {
            set(entry, "threshold", threshold.into());
        }
        let mut tables = entry.get_mut("calibration").map(tables_of).unwrap_or_default();
        for known in &gate.calibrations {
            let table = tables.iter_mut().find(|table| has(&***table, "quantization", &known.quantization));
            if let Some(table) = table {
                set(&mut **table, "threshold", known.threshold.into());
            }
        }
    }
    Ok(document.to_string())
}

/// Sets the strength of an `add` in units of the `deviation` of benign projections along its vector.
///
/// # Errors
/// Text that is not TOML, or no such intervention.
pub fn set_strength_deviation(
    text: &str,
    intervention: &str,
    strength: f64,
    deviation: f64,
) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    let entry = named_entry(&mut document, "intervention", &INTERVENTION_NAMES, intervention)?;
    set(entry, "strength", strength.into());
    set(entry, "unit", "deviation".into());
    set(entry, "deviation", deviation.into());
    Ok(document.to_string())
}

/// Sets the strengths that `guard`, which the text is of, has now, in the units that they are in.
///
/// # Errors
/// Text that is not TOML, or not of that guard.
pub fn set_strengths(text: &str, guard: &Guard) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    for intervention in guard.interventions() {
        let entry = named_entry(&mut document, "intervention", &INTERVENTION_NAMES, &intervention.name)?;
        let now = entry
            .get("strength")
            .and_then(|written| written.as_float().or_else(|| written.as_integer().map(|whole| whole as f64)));
        if now.unwrap_or(1.0) as f32 != intervention.strength {
            set(entry, "strength", as_written(intervention.strength).into());
        }
    }
    Ok(document.to_string())
}

/// The number of the fewest digits that is read as this `f32`.
fn as_written(strength: f32) -> f64 {
    strength.to_string().parse().unwrap_or(f64::from(strength))
}

/// Sets the projection that an `ablate` leaves.
///
/// # Errors
/// Text that is not TOML, or no such intervention.
pub fn set_ablate_mean(text: &str, intervention: &str, mean: f64) -> Result<String, GuardError> {
    let mut document = parse(text)?;
    set(named_entry(&mut document, "intervention", &INTERVENTION_NAMES, intervention)?, "mean", mean.into());
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
    put(results, "result", same, entries)?;
    Ok(document.to_string())
}

/// Puts `entries` into the table of a list that is the `same`, where they replace all that is there, or into a new one at its end.
fn put(
    list: &mut Item,
    what: &str,
    same: impl Fn(&dyn TableLike) -> bool,
    entries: Vec<(&str, Value)>,
) -> Result<(), GuardError> {
    if let Some(table) = tables_of(list).into_iter().find(|table| same(&**table)) {
        let old: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
        for key in old.iter().filter(|key| entries.iter().all(|(kept, _)| kept != key)) {
            table.remove(key);
        }
        entries.into_iter().for_each(|(key, new)| set(table, key, new));
    } else if let Some(tables) = list.as_array_of_tables_mut() {
        tables.push(Table::from_iter(entries));
    } else if let Some(array) = list.as_array_mut() {
        array.push(InlineTable::from_iter(entries));
    } else {
        return Err(GuardError::value(format!("a list of tables named `{what}`"), list.type_name()));
    }
    Ok(())
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
