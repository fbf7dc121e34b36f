use super::Outcome;
use super::args::{EvalArguments, Task};
use super::models::load;
use super::progress::Bar;
use super::table::table;
use super::{guard, prompts};
use anyhow::Context;
use pilotfish::eval::{Detection, detection};
use pilotfish::guard::{MANIFEST_FILE, MeasuredResult, edit, replace_manifest};
use pilotfish::learn::Classes;
use std::io::Write;
use std::path::Path;

pub fn eval(arguments: EvalArguments) -> anyhow::Result<Outcome> {
    let Task::Detection = arguments.task;
    let positive = prompts::read(&arguments.positive)?;
    let negative = prompts::read(&arguments.negative)?;
    let native = match (&arguments.native_positive, &arguments.native_negative) {
        (Some(positive), Some(negative)) => Some((prompts::read(positive)?, prompts::read(negative)?)),
        _ => None,
    };
    let guard = guard::load_guard(&arguments.guard)?;
    let model = load(&arguments.model)?;
    let native = native.as_ref().map(|(positive, negative)| Classes { positive, negative });
    let report = {
        let bar = Bar::new("scoring");
        detection(&model, &guard, Classes { positive: &positive, negative: &negative }, native, &mut |done, total| {
            bar.at(done, total)
        })?
    };
    if let Some(on) = &arguments.record {
        record(&arguments.guard, &report, on)?;
    }
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(Outcome::Done);
    }
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let rows = report.rows.iter().map(|row| {
        [
            row.name.clone(),
            row.layer.to_string(),
            format!("{:.3}", row.auc),
            row.fired.map(|(positive, _)| percent(positive)).unwrap_or_default(),
            row.fired.map(|(_, negative)| percent(negative)).unwrap_or_default(),
        ]
    });
    writeln!(out, "{}", table(["", "layer", "AUC", "fires on positive", "fires on negative"], rows))?;
    writeln!(
        out,
        "guard `{}` on {}: {} positive, {} negative prompts",
        report.guard, report.model, report.n_positive, report.n_negative
    )?;
    Ok(Outcome::Done)
}

/// Adds the report's figures to the manifest, in place of older ones on the same data.
fn record(directory: &Path, report: &Detection, on: &str) -> anyhow::Result<()> {
    let path = directory.join(MANIFEST_FILE);
    let mut text = std::fs::read_to_string(&path).with_context(|| format!("can't read `{}`", path.display()))?;
    let mut add = |name: String, value: f64| -> anyhow::Result<()> {
        let result = MeasuredResult { name, value, on: on.to_owned(), command: None };
        text = edit::add_result(&text, &result)?;
        Ok(())
    };
    for row in &report.rows {
        add(format!("AUC, {}, layer {}", row.name, row.layer), row.auc)?;
        if let Some((positive, negative)) = row.fired {
            add(format!("share of positive prompts that fire, {}", row.name), positive)?;
            add(format!("share of negative prompts that fire, {}", row.name), negative)?;
        }
    }
    replace_manifest(directory, &text)?;
    Ok(())
}
