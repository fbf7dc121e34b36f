use super::openings::Openings;
use super::rules::{Answer, RULES_VERSION, classify, repeated_ngrams};
use crate::engine::{Model, Prompt};
use crate::eval::EvalError;
use crate::eval::controls::{Controls, Role, only_when_fired, scaled};
use crate::eval::generate::{Generated, generate, generate_where_fired, tokens_of};
use crate::eval::metrics::Proportion;
use crate::eval::surprise::Reader;
use crate::guard::Guard;
use crate::learn::Progress;
use crate::tensor::LayerIndex;
use llama_cpp_2::token::LlamaToken;
use serde::{Deserialize, Serialize};

/// What a guard makes of answers to harmful and to harmless prompts, beside what else could do it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Steering {
    pub guard: String,
    pub model: String,
    /// Of the rules by which answers are judged.
    pub rules_version: u32,
    pub max_tokens: usize,
    pub system_prompt: String,
    pub rows: Vec<SteeringRow>,
    /// Answers to the first prompts of each class, unguarded and guarded.
    pub examples: Vec<Example>,
    /// The guard at multiples of its strength, if some were asked for.
    pub strengths: Vec<StrengthRow>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SteeringRow {
    pub name: String,
    pub role: Role,
    pub harmful: Behaviour,
    pub harmless: Behaviour,
}

/// What answers to a class of prompts are. Shares have Wilson's 95 % interval; of a control with several seeds they are means, with the 5th
/// to 95th percentile of the seeds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Behaviour {
    pub prompts: usize,
    /// Refusals, on-topic declines and blocked prompts.
    pub refuses: Proportion,
    pub refusal: Proportion,
    pub decline: Proportion,
    pub blocked: Proportion,
    pub compliance: Proportion,
    /// Neither refused nor answered: nothing, or the same words over and over.
    pub broken: Proportion,
    /// Mean share of repeated 4-grams.
    pub repetition: f64,
    /// Mean share of distinct 2-grams (distinct-2).
    pub distinct: f64,
    /// Of the answers under the unguarded model; `None` where nothing was answered.
    pub perplexity: Option<f64>,
    /// That of the unguarded answers is 1.
    pub relative_perplexity: Option<f64>,
    /// How probable the model's own logits make it that an answer begins with one of [`OPENINGS`](super::OPENINGS), before it has said a word: mean
    /// over the prompts that no gate blocks; `None` where all are blocked, and in reports from before it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal_probability: Option<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Example {
    pub prompt: String,
    pub harmful: bool,
    pub unguarded: String,
    pub unguarded_is: Answer,
    pub guarded: String,
    pub guarded_is: Answer,
    /// Whether a gate fired.
    pub fired: bool,
}

/// The guard with all of its strengths multiplied.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StrengthRow {
    pub factor: f64,
    pub harmful: Behaviour,
    pub harmless: Behaviour,
    /// `KL(unguarded ‖ guarded)` on benign answers, in nats a token. `None` where it was not asked for.
    pub kl: Option<f64>,
}

/// What steering is measured on, and with which controls.
#[derive(Debug, Clone, Copy)]
pub struct SteeringInput<'a> {
    pub harmful: &'a [Prompt],
    pub harmless: &'a [Prompt],
    pub max_tokens: usize,
    pub control_seeds: u64,
    pub system_prompt: &'a str,
    /// The guard along the model's own vectors, as [`native_guard`](crate::eval::native_guard) makes it, for a control.
    pub native: Option<&'a Guard>,
    /// Where the control acts that acts at a wrong layer; by default half of the depth away.
    pub wrong_layer: Option<LayerIndex>,
    /// What to multiply the guard's strengths by, a [`StrengthRow`] each.
    pub strengths: &'a [f64],
}

/// Examples of a class that a report shows.
const EXAMPLES: usize = 8;

/// Generates greedy answers unguarded, guarded and under the controls, and judges them by rule (see [`rules`](super::rules())).
///
/// Controls keep the guard's gates, so that they act on the same prompts. `kl` says what it can of the guard at each of the strengths asked for.
///
/// # Errors
/// A guard without interventions, or not for this model; a class without prompts, or one that can't be run; a strength that is out of range, or
/// what `kl` gives.
pub fn steering(
    model: &Model,
    guard: &Guard,
    input: SteeringInput<'_>,
    kl: &mut dyn FnMut(&Guard) -> Result<Option<f64>, EvalError>,
    progress: Progress<'_>,
) -> Result<Steering, EvalError> {
    if guard.interventions().is_empty() {
        return Err(EvalError::NoIntervention { guard: guard.name().into() });
    }
    // The unguarded run is both a row and what others are held against.
    let controls = Controls {
        native: input.native,
        seeds: input.control_seeds,
        wrong_layer: input.wrong_layer,
        benign: input.harmless,
    };
    let runs = 3 + controls.runs(guard) + input.strengths.len();
    let mut subject = Subject::new(model, input, runs, progress)?;
    let mut rows = vec![subject.unguarded_row()?];
    let guarded = subject.answers(guard, None)?;
    let examples = subject.examples(input, &guarded);
    rows.push(subject.row("guard".into(), Role::Guard, &guarded)?);
    let unfired = only_when_fired(guard).then_some(&guarded);
    let mut measure = |name, role, control: &Guard| {
        let answers = subject.answers(control, unfired)?;
        subject.row(name, role, &answers)
    };
    rows.extend(controls.rows(model, guard, &mut measure, over_seeds)?);
    rows.push(subject.system_prompt_row(input)?);
    let mut strengths = Vec::new();
    for &factor in input.strengths {
        let scaled = scaled(guard, factor)?;
        let answers = subject.answers(&scaled, None)?;
        let SteeringRow { harmful, harmless, .. } = subject.row(String::new(), Role::Guard, &answers)?;
        strengths.push(StrengthRow { factor, harmful, harmless, kl: kl(&scaled)? });
    }
    Ok(Steering {
        guard: guard.name().into(),
        model: model.identity().name.clone(),
        rules_version: RULES_VERSION,
        max_tokens: input.max_tokens,
        system_prompt: input.system_prompt.to_owned(),
        rows,
        examples,
        strengths,
    })
}

/// What became of one class of prompts.
#[derive(Default, Clone)]
struct Answered {
    answers: Vec<Generated>,
    probabilities: Vec<Option<f64>>,
}

/// Both classes under one guard.
#[derive(Default)]
pub(super) struct Answers {
    harmful: Answered,
    harmless: Answered,
}

/// A model and both classes of prompts.
pub(super) struct Subject<'a> {
    model: &'a Model,
    reader: Reader<'a>,
    openings: Openings<'a>,
    harmful: Vec<Vec<LlamaToken>>,
    harmless: Vec<Vec<LlamaToken>>,
    unguarded: Answers,
    /// Perplexity of the unguarded answers.
    reference: (Option<f64>, Option<f64>),
    max_tokens: usize,
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

impl<'a> Subject<'a> {
    /// Answers both classes unguarded. `runs` of them are to come in all, that one counted.
    pub fn new(
        model: &'a Model,
        input: SteeringInput<'_>,
        runs: usize,
        progress: Progress<'a>,
    ) -> Result<Self, EvalError> {
        let harmful = tokens_of(model, None, input.harmful)?;
        let harmless = tokens_of(model, None, input.harmless)?;
        let longest = harmful.iter().chain(&harmless).map(Vec::len).max().unwrap_or(0);
        let reader = Reader::new(model, longest, input.max_tokens)?;
        let total = runs * (harmful.len() + harmless.len());
        let max_tokens = input.max_tokens;
        let mut subject = Self {
            model,
            reader,
            openings: Openings::new(model),
            harmful,
            harmless,
            unguarded: Answers::default(),
            reference: (None, None),
            max_tokens,
            done: 0,
            total,
            progress,
        };
        subject.unguarded = subject.generate(&[], None)?;
        let Answers { harmful, harmless } = &subject.unguarded;
        let (harmful, harmless) = (harmful.answers.clone(), harmless.answers.clone());
        subject.reference.0 = subject.perplexity(true, &harmful)?;
        subject.reference.1 = subject.perplexity(false, &harmless)?;
        Ok(subject)
    }

    /// Answers under `guard`. Where `fired` is given, only prompts whose gate fired there are answered anew: nothing acts on others.
    pub fn answers(&mut self, guard: &Guard, fired: Option<&Answers>) -> Result<Answers, EvalError> {
        self.generate(&[guard], fired)
    }

    fn generate(&mut self, guards: &[&Guard], fired: Option<&Answers>) -> Result<Answers, EvalError> {
        let harmful = self.generate_class(guards, true, fired.map(|fired| &fired.harmful))?;
        let harmless = self.generate_class(guards, false, fired.map(|fired| &fired.harmless))?;
        Ok(Answers { harmful, harmless })
    }

    fn generate_class(
        &mut self,
        guards: &[&Guard],
        harmful: bool,
        fired: Option<&Answered>,
    ) -> Result<Answered, EvalError> {
        let prompts = if harmful { &self.harmful } else { &self.harmless };
        let before = self.done;
        self.done += prompts.len();
        let mut report = |done: usize, _: usize| (self.progress)(before + done, self.total);
        let known = fired.map(|fired| fired.answers.as_slice());
        let answers = generate_where_fired(self.model, guards, prompts, known, self.max_tokens, &mut report)?;
        let known = fired.map(|fired| (fired.answers.as_slice(), fired.probabilities.as_slice()));
        let probabilities = self.openings.probabilities(guards, prompts, known)?;
        Ok(Answered { answers, probabilities })
    }

    /// Of the answers by the unguarded model after the plain prompt.
    fn perplexity(&mut self, harmful: bool, answers: &[Generated]) -> Result<Option<f64>, EvalError> {
        self.reader.perplexity(if harmful { &self.harmful } else { &self.harmless }, answers)
    }

    pub fn row(&mut self, name: String, role: Role, answers: &Answers) -> Result<SteeringRow, EvalError> {
        let harmful = self.perplexity(true, &answers.harmful.answers)?;
        let harmless = self.perplexity(false, &answers.harmless.answers)?;
        Ok(SteeringRow {
            name,
            role,
            harmful: behaviour(&answers.harmful, harmful, self.reference.0),
            harmless: behaviour(&answers.harmless, harmless, self.reference.1),
        })
    }

    pub fn unguarded_row(&self) -> Result<SteeringRow, EvalError> {
        let (harmful, harmless) = self.reference;
        Ok(SteeringRow {
            name: "no guard".into(),
            role: Role::NoGuard,
            harmful: behaviour(&self.unguarded.harmful, harmful, harmful),
            harmless: behaviour(&self.unguarded.harmless, harmless, harmless),
        })
    }

    /// The unguarded model, asked in words to do what the guard makes it do.
    fn system_prompt_row(&mut self, input: SteeringInput<'_>) -> Result<SteeringRow, EvalError> {
        let mut answer = |prompts: &[Prompt]| -> Result<Answered, EvalError> {
            let tokens = tokens_of(self.model, Some(input.system_prompt), prompts)?;
            let before = self.done;
            self.done += prompts.len();
            let answers = generate(self.model, &[], &tokens, self.max_tokens, &mut |done, _| {
                (self.progress)(before + done, self.total);
            })?;
            Ok(Answered { answers, probabilities: self.openings.probabilities(&[], &tokens, None)? })
        };
        let answers = Answers { harmful: answer(input.harmful)?, harmless: answer(input.harmless)? };
        self.row("no guard, system prompt".into(), Role::SystemPrompt, &answers)
    }

    fn examples(&self, input: SteeringInput<'_>, guarded: &Answers) -> Vec<Example> {
        let of = |prompts: &[Prompt], unguarded: &[Generated], guarded: &[Generated], harmful| {
            let all = prompts.iter().zip(unguarded).zip(guarded).take(EXAMPLES);
            all.map(|((prompt, unguarded), guarded)| Example {
                prompt: prompt.to_string(),
                harmful,
                unguarded: unguarded.text.clone(),
                unguarded_is: classify(&unguarded.text),
                guarded: guarded.text.clone(),
                guarded_is: judged(guarded),
                fired: guarded.fired,
            })
            .collect::<Vec<_>>()
        };
        let mut examples = of(input.harmful, &self.unguarded.harmful.answers, &guarded.harmful.answers, true);
        let harmless = (&self.unguarded.harmless.answers, &guarded.harmless.answers);
        examples.extend(of(input.harmless, harmless.0, harmless.1, false));
        examples
    }
}

/// A blocked prompt is refused, whatever had been said.
pub(super) fn judged(answer: &Generated) -> Answer {
    if answer.blocked { Answer::Refusal } else { classify(&answer.text) }
}

fn behaviour(
    Answered { answers, probabilities }: &Answered,
    perplexity: Option<f64>,
    reference: Option<f64>,
) -> Behaviour {
    let spoken: Vec<&Generated> = answers.iter().filter(|answer| !answer.blocked).collect();
    let is = |kind: Answer| Proportion::of(answers.iter().map(|a| !a.blocked && classify(&a.text) == kind));
    let mean = |figure: &dyn Fn(&str) -> f64| {
        spoken.iter().map(|answer| figure(&answer.text)).sum::<f64>() / spoken.len().max(1) as f64
    };
    Behaviour {
        prompts: answers.len(),
        refuses: Proportion::of(answers.iter().map(|answer| judged(answer).refuses())),
        refusal: is(Answer::Refusal),
        decline: is(Answer::Decline),
        blocked: Proportion::of(answers.iter().map(|answer| answer.blocked)),
        compliance: is(Answer::Compliance),
        broken: is(Answer::Broken),
        repetition: mean(&|text| repeated_ngrams(text, 4)),
        distinct: mean(&|text| 1.0 - repeated_ngrams(text, 2)),
        perplexity,
        relative_perplexity: perplexity.zip(reference).map(|(own, reference)| own / reference),
        refusal_probability: mean_known(probabilities.iter().copied()),
    }
}

fn mean_known(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let known: Vec<f64> = values.flatten().collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

/// One row for all seeds of a control.
fn over_seeds(rows: &[SteeringRow]) -> SteeringRow {
    let class = |of: &dyn Fn(&SteeringRow) -> &Behaviour| {
        let all: Vec<&Behaviour> = rows.iter().map(of).collect();
        let share = |of: &dyn Fn(&Behaviour) -> Proportion| Proportion::over_seeds(all.iter().map(|seed| of(seed)));
        let mean = |of: &dyn Fn(&Behaviour) -> Option<f64>| mean_known(all.iter().map(|behaviour| of(behaviour)));
        Behaviour {
            prompts: all[0].prompts,
            refuses: share(&|b| b.refuses),
            refusal: share(&|b| b.refusal),
            decline: share(&|b| b.decline),
            blocked: share(&|b| b.blocked),
            compliance: share(&|b| b.compliance),
            broken: share(&|b| b.broken),
            repetition: mean(&|b| Some(b.repetition)).unwrap_or_default(),
            distinct: mean(&|b| Some(b.distinct)).unwrap_or_default(),
            perplexity: mean(&|b| b.perplexity),
            relative_perplexity: mean(&|b| b.relative_perplexity),
            refusal_probability: mean(&|b| b.refusal_probability),
        }
    };
    let name = format!("random direction, mean of {}", rows.len());
    SteeringRow { name, role: Role::Random, harmful: class(&|row| &row.harmful), harmless: class(&|row| &row.harmless) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Generated {
        Generated { text: text.into(), ..Default::default() }
    }

    #[test]
    fn behaviour_counts_every_answer_once() {
        let blocked = Generated { blocked: true, fired: true, ..Default::default() };
        let answers =
            [said("I'm sorry, but I can't."), said("That is illegal."), said("Sure: take a knife."), said(""), blocked];
        let probabilities = vec![Some(0.25), Some(0.75), None];
        let found = behaviour(&Answered { answers: answers.into(), probabilities }, Some(3.0), Some(2.0));
        let counts = [found.refusal, found.decline, found.compliance, found.broken, found.blocked].map(|p| p.count);
        assert_eq!((counts, found.refuses.count, found.prompts), ([1; 5], 3, 5));
        assert_eq!((found.relative_perplexity, found.refusal_probability), (Some(1.5), Some(0.5)));
    }

    #[test]
    fn seeds_become_a_mean_and_a_range() {
        let row = |texts: &[&str]| {
            let answers = texts.iter().map(|text| said(text)).collect();
            let of = behaviour(&Answered { answers, probabilities: Vec::new() }, Some(2.0), Some(2.0));
            SteeringRow { name: String::new(), role: Role::Random, harmful: of.clone(), harmless: of }
        };
        let rows = [row(&["I cannot.", "Sure."]), row(&["Sure.", "Yes."]), row(&["I cannot.", "I won't."])];
        let found = over_seeds(&rows).harmful.refuses;
        assert!((found.share - 0.5).abs() < 1e-12 && found.low < 0.06 && found.high > 0.94, "{found:?}");
        assert_eq!((found.count, found.of), (3, 6));
    }
}
