//! What is beside the measurements in a report, and `pilotfish report`, which draws one anew.

use super::args::{AddedArguments, ReportArguments};
use super::{Outcome, learn};
use anyhow::Context;
use pilotfish::eval::backdoor::LayerSweep;
use pilotfish::eval::{RefusalSweep, Report};
use pilotfish::learn::Survey;
use std::path::Path;

const JSON: &str = "report.json";
const PAGE: &str = "report.html";

/// Draws the page of a report that was written before, with what is to be added.
pub fn report(arguments: ReportArguments) -> anyhow::Result<Outcome> {
    let path = arguments.report.join(JSON);
    let mut report = Report::from_json(&read(&path)?).with_context(|| format!("`{}`", path.display()))?;
    Added::read(&arguments.added)?.to(&mut report);
    write(arguments.output.as_deref().unwrap_or(&arguments.report), &report)?;
    Ok(Outcome::Done)
}

/// What other commands have written for a report to show.
#[derive(Default)]
pub struct Added {
    of_backdoors: Vec<LayerSweep>,
    of_refusals: Vec<RefusalSweep>,
    survey: Option<Survey>,
}

impl Added {
    pub fn read(arguments: &AddedArguments) -> anyhow::Result<Self> {
        let mut added = Self::default();
        arguments.sweep.iter().try_for_each(|path| added.read_sweep(path))?;
        added.survey = arguments.survey.as_deref().map(read_survey).transpose()?;
        Ok(added)
    }

    fn read_sweep(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = read(path)?;
        let mut parse = || -> serde_json::Result<()> {
            let value: serde_json::Value = serde_json::from_str(&text)?;
            // Only one of a backdoor has a task.
            if value.get("task").is_some() {
                self.of_backdoors.push(serde_json::from_value(value)?);
            } else {
                self.of_refusals.push(serde_json::from_value(value)?);
            }
            Ok(())
        };
        parse().with_context(|| format!("`{}` is no sweep that `pilotfish sweep` wrote", path.display()))
    }

    /// Adds to what `report` shows; what it has already it keeps once.
    pub fn to(self, report: &mut Report) {
        fn join<T: PartialEq>(known: &mut Vec<T>, added: Vec<T>) {
            for one in added {
                if !known.contains(&one) {
                    known.push(one);
                }
            }
        }
        join(&mut report.sweeps, self.of_backdoors);
        join(&mut report.refusal_sweeps, self.of_refusals);
        report.survey = self.survey.or(report.survey.take());
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("can't read `{}`", path.display()))
}

fn read_survey(path: &Path) -> anyhow::Result<Survey> {
    serde_json::from_str(&read(path)?)
        .with_context(|| format!("`{}` is no survey that `map --survey` wrote", path.display()))
}

pub fn write(directory: &Path, report: &Report) -> anyhow::Result<()> {
    for (name, text) in [(PAGE, report.to_html()?), (JSON, report.to_json())] {
        learn::write(&directory.join(name), text.as_bytes())?;
    }
    eprintln!("wrote {} and {JSON}", directory.join(PAGE).display());
    Ok(())
}
