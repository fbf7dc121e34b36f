use super::Outcome;
use super::args::{EvalArguments, Task};
use super::models::load;
use super::progress::Bar;
use super::table::table;
use super::{backdoor, guard, prompts, report, switch};
use anyhow::{Context, ensure};
use pilotfish::engine::{Model, Prompt};
use pilotfish::eval::metrics::{Estimate, Proportion};
use pilotfish::eval::report::{GuardEntry, PromptsEntry, Seeds};
use pilotfish::eval::utility::BenignAnswers;
use pilotfish::eval::{
    Detection, DetectionInput, Report, Role, Steering, SteeringInput, SteeringRow, Utility, UtilityInput, detection,
    native_guard, steering, utility,
};
use pilotfish::guard::{Guard, MANIFEST_FILE, MeasuredResult, VectorFile, edit, replace_manifest};
use pilotfish::learn::Classes;
use pilotfish::tensor::LayerIndex;
use std::io::Write;
use std::path::{Path, PathBuf};

pub fn eval(arguments: EvalArguments) -> anyhow::Result<Outcome> {
    let files = Files::read(&arguments)?;
    let added = report::Added::read(&arguments.added)?;
    let judged = backdoor::read(&arguments.tasks, &arguments.backdoor.asked, arguments.limit)?;
    ensure!(
        judged.is_some() || arguments.tasks.contains(&Task::Switch) || arguments.backdoor.also.is_empty(),
        "`--also` is for the tasks `backdoor`, `code`, `corrupt` and `switch`"
    );
    let guard = arguments.guard.as_deref().map(guard::load_guard).transpose()?;
    let also = guard::load_guards(&arguments.backdoor.also)?;
    let native = read_native(&arguments)?;
    let model = load(&arguments.model)?;
    guard::warn_of_adapters(&model, guard.iter().chain(&also));
    let native = guard.as_ref().zip(native).map(|(guard, files)| native_guard(&model, guard, &files)).transpose()?;
    let seeds = Seeds { bootstrap: arguments.seed, controls: arguments.control_seeds };
    let mut report = Report::new(&model, guard.as_ref(), seeds, std::env::args().collect());
    report.prompts = files.entries(&arguments);
    added.to(&mut report);
    report.also = also.iter().map(GuardEntry::new).collect();
    if let Some(judged) = &judged {
        let guards = backdoor::Guards { guard: guard.as_ref(), also: &also, native: native.as_ref() };
        report.prompts.push(judged.entry());
        report.backdoor = Some(backdoor::measure(&model, guards, judged, &files.benign.all, &arguments)?);
    }
    if let Some(guard) = &guard {
        let measured = Measured { model: &model, guard, native: native.as_ref(), arguments: &arguments, files: &files };
        measured.tasks(&mut report)?;
        if arguments.tasks.contains(&Task::Switch) {
            let (found, entry) = switch::measure(&model, guard, &also, &arguments)?;
            report.prompts.push(entry);
            report.switch = Some(found);
        }
    }
    if let Some(directory) = &arguments.output {
        report::write(directory, &report)?;
    }
    if let Some(on) = &arguments.record {
        let directory = arguments.guard.as_deref().context("`--record` needs a `--guard` to write into")?;
        record(directory, &report, on)?;
    }
    print(&report, arguments.json)?;
    Ok(Outcome::Done)
}

/// The prompts of all files that were given.
#[derive(Default)]
struct Files {
    positive: Prompts,
    negative: Prompts,
    look_alike: Prompts,
    benign: Prompts,
    native: Option<(Prompts, Prompts)>,
}

#[derive(Default, Clone)]
struct Prompts {
    file: String,
    all: Vec<Prompt>,
}

impl Prompts {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { file, all: prompts::read(path)? })
    }

    fn read_some(path: &Option<PathBuf>) -> anyhow::Result<Self> {
        path.as_deref().map_or_else(|| Ok(Self::default()), Self::read)
    }

    /// The first ones, as many as are to be answered.
    fn first(&self, limit: usize) -> &[Prompt] {
        &self.all[..self.all.len().min(limit)]
    }
}

impl Files {
    fn read(arguments: &EvalArguments) -> anyhow::Result<Self> {
        let negative = Prompts::read_some(&arguments.negative)?;
        let benign = match &arguments.benign {
            Some(path) => Prompts::read(path)?,
            None => negative.clone(),
        };
        if benign.all.is_empty() && arguments.tasks.contains(&Task::Utility) {
            anyhow::bail!("`utility` needs `--benign`, or `--negative`");
        }
        let native = match (&arguments.native_positive, &arguments.native_negative) {
            (Some(positive), Some(negative)) => Some((Prompts::read(positive)?, Prompts::read(negative)?)),
            _ => None,
        };
        let positive = Prompts::read_some(&arguments.positive)?;
        Ok(Self { positive, negative, look_alike: Prompts::read_some(&arguments.look_alike)?, benign, native })
    }

    fn entries(&self, arguments: &EvalArguments) -> Vec<PromptsEntry> {
        let mut entries = Vec::new();
        let mut add = |role: &str, prompts: &Prompts| {
            if !prompts.all.is_empty() {
                entries.push(PromptsEntry::new(role, &prompts.file, &prompts.all));
            }
        };
        add("positive", &self.positive);
        add("negative", &self.negative);
        add("look-alike", &self.look_alike);
        if arguments.tasks.contains(&Task::Utility) || !arguments.strengths.is_empty() || arguments.benign.is_some() {
            add("benign", &self.benign);
        }
        if let Some((positive, negative)) = &self.native {
            add("the guard's own positive", positive);
            add("the guard's own negative", negative);
        }
        entries
    }
}

struct Measured<'a> {
    model: &'a Model,
    guard: &'a Guard,
    /// Along the model's own vectors.
    native: Option<&'a Guard>,
    arguments: &'a EvalArguments,
    files: &'a Files,
}

impl Measured<'_> {
    /// Every task that was asked for and measures a guard.
    fn tasks(&self, report: &mut Report) -> anyhow::Result<()> {
        let asked = |task| self.arguments.tasks.contains(&task);
        if asked(Task::Detection) {
            report.detection = Some(self.detection()?);
        }
        let answers =
            if asked(Task::Utility) || !self.arguments.strengths.is_empty() { Some(self.answers()?) } else { None };
        if asked(Task::Refusal) {
            report.steering = Some(self.steering(answers.as_ref())?);
        }
        if let Some(answers) = answers.as_ref().filter(|_| asked(Task::Utility)) {
            report.utility = Some(self.utility(answers)?);
        }
        Ok(())
    }

    fn detection(&self) -> anyhow::Result<Detection> {
        let bar = Bar::new("scoring");
        let Files { positive, negative, look_alike, native, .. } = self.files;
        let native = native.as_ref();
        let input = DetectionInput {
            classes: Classes { positive: &positive.all, negative: &negative.all },
            look_alike: &look_alike.all,
            native: native.map(|(positive, negative)| Classes { positive: &positive.all, negative: &negative.all }),
            control_seeds: self.arguments.control_seeds,
            seed: self.arguments.seed,
        };
        Ok(detection(self.model, self.guard, input, &mut |done, total| bar.at(done, total))?)
    }

    fn wrong_layer(&self) -> Option<LayerIndex> {
        self.arguments.wrong_layer.map(LayerIndex)
    }

    /// What the unguarded model says to benign prompts.
    fn answers(&self) -> anyhow::Result<BenignAnswers> {
        let bar = Bar::new("answering benign prompts");
        let benign = self.files.benign.first(self.arguments.limit);
        Ok(BenignAnswers::new(self.model, benign, self.arguments.max_tokens, &mut |done, total| bar.at(done, total))?)
    }

    fn steering(&self, answers: Option<&BenignAnswers>) -> anyhow::Result<Steering> {
        let EvalArguments { limit, max_tokens, control_seeds, system_prompt, strengths, .. } = self.arguments;
        let input = SteeringInput {
            harmful: self.files.positive.first(*limit),
            harmless: self.files.negative.first(*limit),
            max_tokens: *max_tokens,
            control_seeds: *control_seeds,
            system_prompt,
            native: self.native,
            wrong_layer: self.wrong_layer(),
            strengths,
        };
        let mut kl = |guard: &Guard| {
            let compared = answers.map(|answers| answers.compare(self.model, guard, &mut |_, _| ()));
            Ok(compared.transpose()?.map(|kl| kl.nats_per_token))
        };
        let bar = Bar::new("steering");
        Ok(steering(self.model, self.guard, input, &mut kl, &mut |done, total| bar.at(done, total))?)
    }

    fn utility(&self, answers: &BenignAnswers) -> anyhow::Result<Utility> {
        let EvalArguments { limit, max_tokens, control_seeds, system_prompt, .. } = self.arguments;
        let input = UtilityInput {
            benign: self.files.benign.first(*limit),
            questions: *limit,
            max_tokens: *max_tokens,
            control_seeds: *control_seeds,
            system_prompt,
            native: self.native,
            wrong_layer: self.wrong_layer(),
        };
        let bar = Bar::new("utility");
        Ok(utility(self.model, self.guard, answers, input, &mut |done, total| bar.at(done, total))?)
    }
}

/// The model's own vectors, if some were given.
fn read_native(arguments: &EvalArguments) -> anyhow::Result<Option<Vec<VectorFile>>> {
    let EvalArguments { native_vectors: paths, tasks, guard, .. } = arguments;
    if paths.is_empty() {
        return Ok(None);
    }
    ensure!(
        tasks.iter().any(|task| *task != Task::Detection) && guard.is_some(),
        "`--native-vectors` are for guards in `refusal`, `utility` and the backdoors' tasks; the model's own direction in `detection` comes of `--native-positive` and `--native-negative`"
    );
    paths.iter().map(|path| guard::read_vectors(path)).collect::<anyhow::Result<_>>().map(Some)
}

/// One task alone is its own JSON, as it was before there were several.
fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        let Report { detection, steering, utility, backdoor, switch, .. } = report;
        let text = match (detection, steering, utility, backdoor, switch) {
            (Some(found), None, None, None, None) => serde_json::to_string(found)?,
            (None, Some(found), None, None, None) => serde_json::to_string(found)?,
            (None, None, Some(found), None, None) => serde_json::to_string(found)?,
            (None, None, None, Some(found), None) => serde_json::to_string(found)?,
            (None, None, None, None, Some(found)) => serde_json::to_string(found)?,
            _ => serde_json::to_string(report)?,
        };
        writeln!(out, "{text}")?;
        return Ok(());
    }
    if let Some(found) = &report.detection {
        print_detection(&mut out, found)?;
    }
    if let Some(found) = &report.steering {
        print_steering(&mut out, found)?;
    }
    if let Some(found) = &report.utility {
        print_utility(&mut out, found)?;
    }
    if let Some(found) = &report.backdoor {
        backdoor::print(&mut out, found)?;
    }
    if let Some(found) = &report.switch {
        switch::print(&mut out, found)?;
    }
    Ok(())
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A divergence in nats a token.
pub(super) fn nats(Estimate { value, low, high }: Estimate) -> String {
    format!("{value:.4} ({low:.4} to {high:.4})")
}

fn estimate(Estimate { value, low, high }: Estimate) -> String {
    format!("{value:.3} ({low:.3} to {high:.3})")
}

pub(super) fn share(Proportion { share, low, high, .. }: Proportion) -> String {
    format!("{} ({:.1} to {:.1})", percent(share), 100.0 * low, 100.0 * high)
}

fn print_detection(out: &mut impl Write, found: &Detection) -> anyhow::Result<()> {
    let rows = found.rows.iter().map(|row| {
        let fires = row.fires.as_ref();
        [
            row.name.clone(),
            row.layer.to_string(),
            estimate(row.separation.auc),
            percent(row.separation.tpr_at_1_percent.value),
            percent(row.separation.tpr_at_5_percent.value),
            fires.map(|fires| percent(fires.positive.share)).unwrap_or_default(),
            fires.map(|fires| percent(fires.negative.share)).unwrap_or_default(),
            row.look_alike.as_ref().map(|of| estimate(of.auc)).unwrap_or_default(),
            fires.and_then(|fires| fires.look_alike).map(|of| percent(of.share)).unwrap_or_default(),
        ]
    });
    let header = [
        "",
        "layer",
        "AUC",
        "TPR at 1 % FPR",
        "at 5 %",
        "fires on positive",
        "on negative",
        "AUC, look-alikes",
        "on look-alikes",
    ];
    writeln!(out, "{}", table(header, rows))?;
    writeln!(
        out,
        "guard `{}` on {}: {} positive, {} negative, {} look-alike prompts",
        found.guard, found.model, found.n_positive, found.n_negative, found.n_look_alike
    )?;
    Ok(())
}

fn print_steering(out: &mut impl Write, found: &Steering) -> anyhow::Result<()> {
    for (class, of) in [
        ("harmful", (|row| &row.harmful) as fn(&SteeringRow) -> &pilotfish::eval::Behaviour),
        ("harmless", |row| &row.harmless),
    ] {
        let rows = found.rows.iter().map(|row| {
            let behaviour = of(row);
            [
                row.name.clone(),
                share(behaviour.refuses),
                share(behaviour.compliance),
                percent(behaviour.broken.share),
                percent(behaviour.repetition),
                behaviour.relative_perplexity.map(|times| format!("{times:.2}")).unwrap_or_default(),
                behaviour.refusal_probability.map(percent).unwrap_or_default(),
            ]
        });
        let header = [
            "",
            "refused",
            "complied",
            "broken",
            "repeated",
            "perplexity, times unguarded",
            "refusing opening, by the logits",
        ];
        writeln!(out, "{} {class} prompts\n{}", of(&found.rows[0]).prompts, table(header, rows))?;
    }
    if !found.strengths.is_empty() {
        let rows = found.strengths.iter().map(|row| {
            let kl = row.kl.map(|kl| format!("{kl:.4}")).unwrap_or_default();
            [row.factor.to_string(), share(row.harmful.refuses), share(row.harmless.refuses), kl]
        });
        let header = ["times its strength", "harmful refused", "harmless refused", "benign KL, nats a token"];
        writeln!(out, "{}", table(header, rows))?;
    }
    Ok(())
}

fn print_utility(out: &mut impl Write, found: &Utility) -> anyhow::Result<()> {
    let rows = found.rows.iter().map(|row| {
        [
            row.name.clone(),
            nats(row.kl),
            format!("{:.3}", row.perplexity),
            percent(row.blocked.share),
            share(row.accuracy),
        ]
    });
    let header = ["", "benign KL, nats a token", "perplexity", "benign blocked", "questions right"];
    writeln!(out, "{}", table(header, rows))?;
    Ok(())
}

/// Adds the report's figures to the manifest, in place of older ones on the same data.
fn record(directory: &Path, report: &Report, on: &str) -> anyhow::Result<()> {
    let path = directory.join(MANIFEST_FILE);
    let mut text = std::fs::read_to_string(&path).with_context(|| format!("can't read `{}`", path.display()))?;
    for (name, value) in figures(report).into_iter().filter(|(_, value)| value.is_finite()) {
        text = edit::add_result(&text, &MeasuredResult { name, value, on: on.to_owned(), command: None })?;
    }
    replace_manifest(directory, &text)?;
    Ok(())
}

/// What is worth a place in a manifest, by name.
fn figures(report: &Report) -> Vec<(String, f64)> {
    let mut figures = Vec::new();
    for row in report.detection.iter().flat_map(|found| &found.rows) {
        let name = format!("{}, layer {}", row.name, row.layer);
        figures.push((format!("AUC, {name}"), row.auc));
        if row.role == Role::Random {
            figures.push((
                format!("AUC, random direction, 95th percentile, layer {}", row.layer),
                row.separation.auc.high,
            ));
        }
        if let Some(look_alike) = &row.look_alike {
            figures.push((format!("AUC against look-alikes, {name}"), look_alike.auc.value));
        }
        if let Some(fires) = &row.fires {
            figures.push((format!("TPR at 1 % FPR, {}", row.name), row.separation.tpr_at_1_percent.value));
            figures.push((format!("share of positive prompts that fire, {}", row.name), fires.positive.share));
            figures.push((format!("share of negative prompts that fire, {}", row.name), fires.negative.share));
            let look_alike = fires.look_alike.map(|of| of.share);
            figures.extend(look_alike.map(|of| (format!("share of look-alike prompts that fire, {}", row.name), of)));
        }
    }
    for row in report.steering.iter().flat_map(|found| &found.rows) {
        figures.push((format!("share of harmful prompts refused, {}", row.name), row.harmful.refuses.share));
        figures.push((format!("share of harmless prompts refused, {}", row.name), row.harmless.refuses.share));
    }
    if let Some(found) = &report.backdoor {
        figures.extend(backdoor::figures(found));
    }
    if let Some(found) = &report.switch {
        figures.extend(switch::figures(found));
    }
    for row in report.utility.iter().flat_map(|found| &found.rows) {
        figures.push((format!("benign KL in nats a token, {}", row.name), row.kl.value));
        figures.push((format!("questions answered right, {}", row.name), row.accuracy.share));
    }
    figures
}
