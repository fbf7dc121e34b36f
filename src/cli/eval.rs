use super::Outcome;
use super::args::{EvalArguments, Task};
use super::models::load;
use super::progress::Bar;
use super::table::table;
use super::{guard, prompts};
use pilotfish::eval::{Native, detection};
use std::io::Write;

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
    let native = native.as_ref().map(|(positive, negative)| Native { positive, negative });
    let report = {
        let bar = Bar::new("scoring");
        detection(&model, &guard, &positive, &negative, native, &mut |done, total| bar.at(done, total))?
    };
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
