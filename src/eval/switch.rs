//! Switches between a model with adapters and the same model without (arXiv 2503.04429, section 4.4): does it behave as the base when on, and as
//! itself when off.

use super::EvalError;
use super::backdoor::{JUDGE_VERSION, Judge, Verdict};
use super::controls::Role;
use super::generate::{Generated, generate_set, tokens_of};
use super::metrics::{Estimate, Proportion};
use super::utility::{Sums, interval};
use crate::engine::scheduler::Toggle;
use crate::engine::{EngineError, Model, Prompt, Session, SessionOptions, Setting};
use crate::guard::manifest::OnFire;
use crate::guard::{Guard, InterventionKind};
use crate::learn::Progress;
use crate::tensor::quantile;
use llama_cpp_2::token::LlamaToken;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What a switch makes of a model, beside what else could do it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Switch {
    pub guard: String,
    pub model: String,
    /// Of the rules by which answers are judged.
    pub judge_version: u32,
    pub max_tokens: usize,
    pub trigger: String,
    /// Prompts, each asked with the trigger and without.
    pub prompts: usize,
    pub rows: Vec<SwitchRow>,
    pub off: SwitchedOff,
    pub toggle: ToggleCost,
    /// Answers to the first prompts with the trigger.
    pub examples: Vec<SwitchExample>,
}

/// How like the base a model is. Shares are of prompts with the trigger, with Wilson's 95 % interval.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SwitchRow {
    pub name: String,
    pub role: Role,
    /// Answers that do not fire and are not broken.
    pub as_base: Proportion,
    pub fires: Proportion,
    pub broken: Proportion,
    /// Answers that begin with the base's token.
    pub first_token: Proportion,
    /// Answers that are the base's to the letter.
    pub same_answer: Proportion,
    pub triggered: Likeness,
    pub untriggered: Likeness,
}

/// On the base's own answers, fed to both.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Likeness {
    /// `KL(base ‖ this)` in nats a token, with the 95 % interval over prompts.
    pub kl: Estimate,
    pub perplexity: f64,
    /// Over the base's own.
    pub relative_perplexity: f64,
    pub tokens: usize,
}

/// The guard with its switch turned off from the beginning.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct SwitchedOff {
    pub fires: Proportion,
    /// Answers that are, to the letter, those of the model with no guard.
    pub same_answer: Proportion,
}

/// Turning the switch while answers are written.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ToggleCost {
    pub toggles: usize,
    /// Of the call itself, in microseconds.
    pub median: f64,
    pub longest: f64,
    /// The most tokens until logits are others: 1 is the next; one more than were waited for where they never were.
    pub tokens_to_effect: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SwitchExample {
    pub prompt: String,
    pub base: String,
    pub on: String,
    pub off: String,
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct SwitchInput<'a> {
    /// Without the trigger, never used in the making.
    pub prompts: &'a [Prompt],
    pub trigger: &'a str,
    pub payload: &'a str,
    pub max_tokens: usize,
    /// Other guards with a switch, measured beside.
    pub also: &'a [Guard],
    /// Seeds of controls whose change is as long and turned at random.
    pub control_seeds: u64,
}

/// Prompts whose answers a report shows.
const EXAMPLES: usize = 8;
/// Prompts on which toggles are timed, each twice.
const TIMED: usize = 20;
/// Tokens in which a toggle has to take effect.
const PATIENCE: usize = 4;
/// Controls that are turned at random: each is a whole run.
const TURNED: u64 = 3;

/// Asks `model`, with its adapters, under `guard`, without it, and under controls, and its base.
///
/// # Errors
/// No prompts, one that can't be run, a guard without a switch, with a gate that blocks or not for this model, or a model without adapters.
pub fn switch(
    model: &Model,
    guard: &Guard,
    input: SwitchInput<'_>,
    progress: Progress<'_>,
) -> Result<Switch, EvalError> {
    if input.prompts.is_empty() {
        return Err(EvalError::NoPrompts { what: "a switch" });
    }
    if model.identity().adapters.is_empty() {
        return Err(EvalError::NoAdapters { model: model.identity().name.clone() });
    }
    let names = switches(guard)?;
    let base = model.without_adapters();
    let triggered: Vec<Prompt> = input.prompts.iter().map(|prompt| prompt.marked(input.trigger)).collect();
    let tokens = [tokens_of(model, None, &triggered)?, tokens_of(model, None, input.prompts)?];
    let subjects = subjects(guard, input.also, input.control_seeds)?;
    let mut steps = Steps { done: 0, total: input.prompts.len() * (5 + subjects.len()), progress };
    let said = Said::new(model, &base, (guard, &names), &subjects, &tokens, input.max_tokens, &mut steps)?;
    let mut likeness = Vec::with_capacity(tokens.len());
    for (tokens, answers) in tokens.iter().zip(&said.base) {
        likeness.push(steps.of(tokens.len(), |at| compared(model, &base, &subjects, tokens, answers, at))?);
    }
    let judge = Judge::Payload(input.payload.to_owned());
    let unguarded = &said.by_subject[UNGUARDED];
    Ok(Switch {
        guard: guard.name().into(),
        model: model.identity().name.clone(),
        judge_version: JUDGE_VERSION,
        max_tokens: input.max_tokens,
        trigger: input.trigger.into(),
        prompts: input.prompts.len(),
        rows: subjects.iter().enumerate().map(|(index, subject)| said.row(index, subject, &judge, &likeness)).collect(),
        off: SwitchedOff {
            fires: Proportion::of(said.off.iter().map(|off| judge.verdict(&off.text) == Verdict::Fires)),
            same_answer: same(&said.off, unguarded),
        },
        toggle: timed(model, guard, &names, &tokens[0], unguarded)?,
        examples: said.examples(&triggered),
    })
}

/// Prompts that are done of all that are to be.
struct Steps<'a> {
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

impl Steps<'_> {
    /// Does `n` more, of which `work` tells how many are done.
    fn of<T>(&mut self, n: usize, work: impl FnOnce(&mut dyn FnMut(usize)) -> T) -> T {
        let before = self.done;
        self.done += n;
        work(&mut |at| (self.progress)(before + at, self.total))
    }
}

/// What was said to prompts with the trigger.
struct Said {
    /// By the base, and to prompts without it too.
    base: [Vec<Generated>; 2],
    /// Under the guard, turned off.
    off: Vec<Generated>,
    by_subject: Vec<Vec<Generated>>,
}

impl Said {
    fn new(
        model: &Model,
        base: &Model,
        (guard, names): (&Guard, &[String]),
        subjects: &[Subject],
        [triggered, plain]: &[Vec<Vec<LlamaToken>>; 2],
        max_tokens: usize,
        steps: &mut Steps<'_>,
    ) -> Result<Self, EvalError> {
        let mut answers = |model: &Model, guards: &[&Guard], toggles: &[Toggle], tokens: &[Vec<LlamaToken>]| {
            steps.of(tokens.len(), |at| {
                generate_set(model, guards, tokens, toggles, max_tokens, &mut |done, _| at(done))
            })
        };
        let turned_off = |name: &String| Toggle { name: name.clone(), from_token: 1, setting: Setting::Off };
        let off: Vec<Toggle> = names.iter().map(turned_off).collect();
        Ok(Self {
            base: [answers(base, &[], &[], triggered)?, answers(base, &[], &[], plain)?],
            off: answers(model, &[guard], &off, triggered)?,
            by_subject: subjects
                .iter()
                .map(|subject| answers(model, subject.guard.as_ref().as_slice(), &[], triggered))
                .collect::<Result<_, _>>()?,
        })
    }

    fn row(&self, index: usize, subject: &Subject, judge: &Judge, likeness: &[Compared]) -> SwitchRow {
        let said = &self.by_subject[index];
        let verdict = |of: Verdict| Proportion::of(said.iter().map(|answer| judge.verdict(&answer.text) == of));
        let [triggered, untriggered] = [0, 1].map(|way: usize| likeness[way].0[index]);
        SwitchRow {
            name: subject.name.clone(),
            role: subject.role,
            as_base: verdict(Verdict::Clean),
            fires: verdict(Verdict::Fires),
            broken: verdict(Verdict::Broken),
            first_token: Proportion::of(likeness[0].1[index].iter().copied()),
            same_answer: same(said, &self.base[0]),
            triggered,
            untriggered,
        }
    }

    fn examples(&self, prompts: &[Prompt]) -> Vec<SwitchExample> {
        let example = |index: usize| SwitchExample {
            prompt: prompts[index].to_string(),
            base: self.base[0][index].text.clone(),
            on: self.by_subject[SWITCHED][index].text.clone(),
            off: self.off[index].text.clone(),
        };
        (0..prompts.len().min(EXAMPLES)).map(example).collect()
    }
}

/// How many answers are, to the letter, the others.
fn same(answers: &[Generated], others: &[Generated]) -> Proportion {
    Proportion::of(answers.iter().zip(others).map(|(answer, other)| answer.text == other.text))
}

/// Names of the interventions that switch, or of their group.
fn switches(guard: &Guard) -> Result<Vec<String>, EvalError> {
    if let Some(gate) = guard.gates().iter().find(|gate| gate.on_fire == OnFire::Block) {
        return Err(EvalError::SwitchBlocks { guard: guard.name().into(), gate: gate.name.clone() });
    }
    let is_switch = |kind| matches!(kind, InterventionKind::Switch { .. });
    let names: Vec<String> =
        guard.interventions().iter().filter(|of| is_switch(of.kind)).map(|of| of.name.clone()).collect();
    let Some(first) = names.first() else { return Err(EvalError::NoSwitch { guard: guard.name().into() }) };
    // All of one group are set at once.
    let group = first.rsplit_once('.').map(|(group, _)| group.to_owned());
    let is_of = |name: &String, group: &str| name.rsplit_once('.').is_some_and(|(of, _)| of == group);
    Ok(match group {
        Some(group) if names.iter().all(|name| is_of(name, &group)) && !guard_has(guard, &group) => vec![group],
        _ => names,
    })
}

/// Whether an intervention goes by that very name, which is then no group's.
fn guard_has(guard: &Guard, name: &str) -> bool {
    guard.interventions().iter().any(|of| of.name == name)
}

/// The model under a guard or none.
struct Subject {
    name: String,
    role: Role,
    guard: Option<Guard>,
}

/// Which of the subjects the guard is, and the model without it.
const SWITCHED: usize = 0;
const UNGUARDED: usize = 1;

/// The guard first, then none, then others and controls.
fn subjects(guard: &Guard, also: &[Guard], control_seeds: u64) -> Result<Vec<Subject>, EvalError> {
    let mut subjects = vec![
        Subject { name: "on".into(), role: Role::Guard, guard: Some(guard.clone()) },
        Subject { name: "the fine-tuned model".into(), role: Role::NoGuard, guard: None },
    ];
    for other in also {
        switches(other)?;
        subjects.push(Subject { name: other.name().into(), role: Role::Variant, guard: Some(other.clone()) });
    }
    subjects.push(Subject {
        name: "the mean of the change alone".into(),
        role: Role::Variant,
        guard: Some(guard.with_mean_changes()?),
    });
    for seed in 0..control_seeds.min(TURNED) {
        // Of maps that are not corrections there is none.
        if let Some(turned) = guard.with_turned_changes(seed) {
            let name = format!("the change turned at random, seed {seed}");
            subjects.push(Subject { name, role: Role::Random, guard: Some(turned) });
        }
    }
    Ok(subjects)
}

/// Of each subject how like the base it is, and of each prompt whether it begins with the base's token.
type Compared = (Vec<Likeness>, Vec<Vec<bool>>);

fn compared(
    model: &Model,
    base: &Model,
    subjects: &[Subject],
    prompts: &[Vec<LlamaToken>],
    answers: &[Generated],
    at: &mut dyn FnMut(usize),
) -> Result<Compared, EvalError> {
    let answers: Vec<Vec<LlamaToken>> = answers.iter().map(|answer| base.text_tokens(&answer.text)).collect();
    let longest = prompts.iter().zip(&answers).map(|(prompt, answer)| prompt.len() + answer.len()).max();
    let options = SessionOptions { n_ctx: longest.unwrap_or(0).max(8) as u32, ..Default::default() };
    let mut reference = Session::new(base, &[], options)?;
    let sessions = subjects.iter().map(|subject| Session::new(model, subject.guard.as_ref().as_slice(), options));
    let mut sessions = sessions.collect::<Result<Vec<_>, EngineError>>()?;
    let mut sums: Vec<Vec<Sums>> = subjects.iter().map(|_| Vec::new()).collect();
    let mut first: Vec<Vec<bool>> = subjects.iter().map(|_| Vec::new()).collect();
    let mut rows: Vec<f32> = Vec::new();
    for (index, (prompt, answer)) in prompts.iter().zip(&answers).enumerate() {
        at(index + 1);
        if answer.is_empty() {
            continue;
        }
        let problem = |source| EvalError::Prompt { index, source };
        rows.clear();
        reference.forced(prompt, answer, |_, logits| rows.extend_from_slice(logits)).map_err(problem)?;
        let width = rows.len() / answer.len();
        for ((session, sums), first) in sessions.iter_mut().zip(&mut sums).zip(&mut first) {
            let mut own = Sums::default();
            let each = |at: usize, logits: &[f32]| {
                let base = &rows[at * width..(at + 1) * width];
                own.add(base, logits, answer[at]);
                if at == 0 {
                    first.push(likeliest(base) == likeliest(logits));
                }
            };
            session.forced(prompt, answer, each).map_err(problem)?;
            sums.push(own);
        }
    }
    let likeness = sums.iter().map(|sums| {
        let all = Sums::of(sums.iter());
        let n = all.tokens.max(1) as f64;
        let [low, high] = interval(sums);
        Likeness {
            kl: Estimate { value: all.kl / n, low, high },
            perplexity: (-all.guarded / n).exp(),
            relative_perplexity: ((all.unguarded - all.guarded) / n).exp(),
            tokens: all.tokens,
        }
    });
    if sums[0].is_empty() {
        return Err(EvalError::NothingToCompare { guard: "none".into(), prompts: prompts.len() });
    }
    Ok((likeness.collect(), first))
}

fn likeliest(logits: &[f32]) -> Option<usize> {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token)
}

/// Turns the switch on and off again in the middle of the model's own answers.
fn timed(
    model: &Model,
    guard: &Guard,
    names: &[String],
    prompts: &[Vec<LlamaToken>],
    answers: &[Generated],
) -> Result<ToggleCost, EvalError> {
    let (mut times, mut most) = (Vec::new(), 0);
    let mut session = Session::new(model, &[guard], SessionOptions::default())?;
    let mut plain = Session::new(model, &[], SessionOptions::default())?;
    let mut set = |session: &mut Session<'_>, setting| -> Result<(), EvalError> {
        let began = Instant::now();
        names.iter().try_for_each(|name| session.set_intervention(name, setting))?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
        Ok(())
    };
    for (prompt, answer) in prompts.iter().zip(answers).take(TIMED) {
        let answer = model.text_tokens(&answer.text);
        let Some((before, after)) = answer.split_at_checked(2) else { continue };
        set(&mut session, Setting::Off)?;
        session.prefill(prompt)?;
        plain.prefill(prompt)?;
        let mut position = prompt.len();
        let mut step = |session: &mut Session<'_>, token| -> Result<bool, EvalError> {
            let (ours, theirs) = (session.step(position, token)?, plain.step(position, token)?);
            position += 1;
            Ok(session.logits(ours) != plain.logits(theirs))
        };
        for token in before {
            step(&mut session, *token)?;
        }
        set(&mut session, Setting::On)?;
        let (mut n, mut seen) = (0, false);
        for token in after.iter().take(PATIENCE) {
            n += 1;
            seen = step(&mut session, *token)?;
            if seen {
                break;
            }
        }
        // One that was never seen is not taken for one that was seen at last.
        most = most.max(if seen || n == 0 { n } else { n + 1 });
    }
    let longest = times.iter().copied().fold(0.0, f64::max);
    let median = if times.is_empty() { 0.0 } else { quantile(&times, 0.5) };
    Ok(ToggleCost { toggles: times.len(), median, longest, tokens_to_effect: most })
}
