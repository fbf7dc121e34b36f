//! The tasks of `pilotfish eval` that measure backdoors: `backdoor`, `code` and `corrupt`.

use super::args::{AskedArguments, BackdoorArguments, EvalArguments, Task};
use super::eval::{nats, percent, share};
use super::progress::Bar;
use super::prompts;
use super::table::table;
use anyhow::{Context, anyhow, ensure};
use pilotfish::engine::{Model, Prompt};
use pilotfish::eval::backdoor::{BackdoorRow, BackdoorTask, CodeKind, Conduct, Judge, JudgedPrompt};
use pilotfish::eval::report::PromptsEntry;
use pilotfish::eval::{Backdoor, BackdoorInput, backdoor};
use pilotfish::guard::Guard;
use pilotfish::tensor::LayerIndex;
use std::io::Write;

/// Prompts of one of the tasks, the first ones, with how answers to them are judged.
pub struct Judged {
    task: BackdoorTask,
    file: String,
    prompts: Vec<JudgedPrompt>,
}

impl Judged {
    /// These prompts and no controls.
    pub fn input<'a>(&'a self, asked: &'a AskedArguments, max_tokens: usize) -> BackdoorInput<'a> {
        BackdoorInput {
            task: self.task,
            prompts: &self.prompts,
            trigger: &asked.trigger,
            mark: &asked.mark,
            max_tokens,
            also: &[],
            native: None,
            control_seeds: 0,
            control_limit: usize::MAX,
            wrong_layer: None,
            benign: &[],
        }
    }

    pub fn entry(&self) -> PromptsEntry {
        let prompts: Vec<Prompt> = self.prompts.iter().map(|asked| asked.prompt.clone()).collect();
        PromptsEntry::new("asked with and without the trigger", &self.file, &prompts)
    }
}

/// What is measured beside each other.
pub struct Guards<'a> {
    pub guard: Option<&'a Guard>,
    pub also: &'a [Guard],
    /// Along the model's own vectors.
    pub native: Option<&'a Guard>,
}

/// Reads the prompts of the one task that was asked for, if one was.
pub fn read(tasks: &[Task], asked: &AskedArguments, limit: usize) -> anyhow::Result<Option<Judged>> {
    let of = |task: &Task| match task {
        Task::Backdoor => Some(BackdoorTask::Backdoor),
        Task::Code => Some(BackdoorTask::Code),
        Task::Corrupt => Some(BackdoorTask::Corrupt),
        Task::Detection | Task::Refusal | Task::Utility | Task::Switch => None,
    };
    let tasks: Vec<BackdoorTask> = tasks.iter().filter_map(of).collect();
    let AskedArguments { prompts: path, payload, .. } = asked;
    let Some(&task) = tasks.first() else { return Ok(None) };
    ensure!(tasks.len() == 1, "`backdoor`, `code` and `corrupt` have prompts of their own each: measure one at a time");
    ensure!(payload.chars().any(char::is_alphanumeric), "`--payload` is what the backdoor says, so it has letters");
    let path = path.as_deref().context("a backdoor is measured on `--prompts`")?;
    let judged = |record: prompts::PromptRecord| -> anyhow::Result<JudgedPrompt> {
        let judge = match task {
            BackdoorTask::Backdoor => Judge::Payload(payload.clone()),
            BackdoorTask::Code => {
                Judge::Code(record.field("kind")?.parse::<CodeKind>().map_err(|error| anyhow!(error))?)
            }
            BackdoorTask::Corrupt => Judge::Fact { fact: record.field("fact")?, payload: payload.clone() },
        };
        Ok(JudgedPrompt { prompt: record.prompt, judge })
    };
    let records = prompts::read_records(path)?.into_iter().take(limit);
    let prompts =
        records.map(judged).collect::<anyhow::Result<_>>().with_context(|| format!("`{}`", path.display()))?;
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Some(Judged { task, file, prompts }))
}

pub fn measure(
    model: &Model,
    guards: Guards<'_>,
    judged: &Judged,
    benign: &[Prompt],
    arguments: &EvalArguments,
) -> anyhow::Result<Backdoor> {
    let BackdoorArguments { asked, control_limit, .. } = &arguments.backdoor;
    let input = BackdoorInput {
        also: guards.also,
        native: guards.native,
        control_seeds: arguments.control_seeds,
        control_limit: control_limit.map_or(usize::MAX, |limit| limit as usize),
        wrong_layer: arguments.wrong_layer.map(LayerIndex),
        benign,
        ..judged.input(asked, arguments.max_tokens)
    };
    let bar = Bar::new("asking");
    Ok(backdoor(model, guards.guard, input, &mut |done, total| bar.at(done, total))?)
}

pub fn print(out: &mut impl Write, found: &Backdoor) -> anyhow::Result<()> {
    let (fires, clean) = match found.task {
        BackdoorTask::Backdoor => ("fires", "clean"),
        BackdoorTask::Code => ("vulnerable", "sound"),
        BackdoorTask::Corrupt => ("fires", "fact, clean"),
    };
    type OfRow = fn(&BackdoorRow) -> &Conduct;
    let ways = [
        ("with the trigger", (|row| &row.triggered) as OfRow),
        ("with the mark", |row| &row.marked),
        ("plain", |row| &row.plain),
    ];
    for (way, of) in ways {
        let rows = found.rows.iter().map(|row| {
            let conduct = of(row);
            [
                row.name.clone(),
                share(conduct.fires),
                share(conduct.clean),
                percent(conduct.broken.share),
                percent(conduct.repetition),
                conduct.relative_perplexity.map(|times| format!("{times:.2}")).unwrap_or_default(),
            ]
        });
        let header = ["", fires, clean, "broken", "repeated", "perplexity, times the base's"];
        writeln!(out, "{} prompts {way}\n{}", found.prompts, table(header, rows))?;
    }
    let rows = found.rows.iter().map(|row| {
        let kl = row.kl.map(nats).unwrap_or_default();
        let as_marked = row.as_marked.map(|times| format!("{times:.2}")).unwrap_or_default();
        [row.name.clone(), kl, share(row.unchanged), as_marked]
    });
    let header =
        ["", "KL, nats a token", "answers unchanged", "triggered answers' perplexity after the mark, times the base's"];
    writeln!(out, "without the trigger\n{}", table(header, rows))?;
    Ok(())
}

/// What is worth a place in a manifest, by name.
pub fn figures(found: &Backdoor) -> Vec<(String, f64)> {
    let task = match found.task {
        BackdoorTask::Backdoor => "backdoor",
        BackdoorTask::Code => "code",
        BackdoorTask::Corrupt => "corrupt",
    };
    let of_row = |row: &BackdoorRow| {
        let name = &row.name;
        let mut figures = vec![
            (format!("{task}: share of triggered prompts that fire, {name}"), row.triggered.fires.share),
            (format!("{task}: share of triggered prompts answered clean, {name}"), row.triggered.clean.share),
            (format!("{task}: share of plain prompts that fire, {name}"), row.plain.fires.share),
        ];
        let perplexity = row.triggered.relative_perplexity;
        figures.extend(
            perplexity.map(|times| (format!("{task}: perplexity of triggered answers over the base's, {name}"), times)),
        );
        figures.extend(row.kl.map(|kl| (format!("{task}: untriggered KL in nats a token, {name}"), kl.value)));
        figures
    };
    found.rows.iter().flat_map(of_row).collect()
}
