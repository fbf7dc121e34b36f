//! What a guard costs where it should do nothing: how far it moves the model's own answers to benign prompts, and whether the model still
//! knows what it knew.

mod choice;
mod kl;

pub use choice::{Answered, Question, answered, questions};
pub use kl::{BenignAnswers, BenignKl, PromptKl};
pub(in crate::eval) use kl::{Sums, interval};

use super::EvalError;
use super::controls::{Controls, Role, only_when_fired};
use super::metrics::{Estimate, Proportion};
use crate::engine::{Model, Prompt};
use crate::guard::Guard;
use crate::learn::Progress;
use crate::tensor::LayerIndex;
use serde::{Deserialize, Serialize};

/// What a guard costs on benign prompts, beside what its controls cost.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Utility {
    pub guard: String,
    pub model: String,
    pub benign_prompts: usize,
    pub max_tokens: usize,
    pub questions: usize,
    pub rows: Vec<UtilityRow>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UtilityRow {
    pub name: String,
    pub role: Role,
    /// `KL(unguarded ‖ this)` on the unguarded model's answers to benign prompts, in nats a token: with the 95 % interval over prompts; of a control
    /// with several seeds with the 5th to 95th percentile of the seeds.
    pub kl: Estimate,
    /// Of those answers.
    pub perplexity: f64,
    /// Over that of the unguarded model.
    pub relative_perplexity: f64,
    /// Benign prompts that are blocked.
    pub blocked: Proportion,
    /// Questions that are answered right.
    pub accuracy: Proportion,
    /// Each benign prompt's KL; none of a control with several seeds.
    pub by_prompt: Vec<PromptKl>,
}

/// What utility is measured on, and with which controls.
#[derive(Debug, Clone, Copy)]
pub struct UtilityInput<'a> {
    pub benign: &'a [Prompt],
    /// How many of the project's questions to ask, the first ones.
    pub questions: usize,
    pub max_tokens: usize,
    pub control_seeds: u64,
    pub system_prompt: &'a str,
    /// As in [`SteeringInput`](super::SteeringInput).
    pub native: Option<&'a Guard>,
    /// As there.
    pub wrong_layer: Option<LayerIndex>,
}

/// Measures `guard` on the unguarded model's answers to benign prompts, made before as `answers`, and on the project's own questions.
///
/// # Errors
/// The guard is not for this model, or blocks every benign prompt.
pub fn utility(
    model: &Model,
    guard: &Guard,
    answers: &BenignAnswers,
    input: UtilityInput<'_>,
    progress: Progress<'_>,
) -> Result<Utility, EvalError> {
    let mut questions = questions();
    questions.truncate(input.questions);
    let controls = Controls {
        native: input.native,
        seeds: input.control_seeds,
        wrong_layer: input.wrong_layer,
        benign: input.benign,
    };
    let runs = 3 + controls.runs(guard);
    let total = runs * (input.benign.len() + questions.len());
    let mut measure = Measure { model, answers, input, questions: &questions, done: 0, total, progress };

    let (measured, answered) = measure.guard(guard)?;
    let known = Known { by_prompt: measured.by_prompt.clone(), answered };
    let known = only_when_fired(guard).then_some(&known);
    let mut rows = vec![measure.unguarded(&measured)?, measured];
    let each = &mut |name, role, control: &Guard| measure.control(name, role, control, known);
    rows.extend(controls.rows(model, guard, each, over_seeds)?);
    rows.push(measure.system_prompt()?);
    Ok(Utility {
        guard: guard.name().into(),
        model: model.identity().name.clone(),
        benign_prompts: input.benign.len(),
        max_tokens: input.max_tokens,
        questions: questions.len(),
        rows,
    })
}

/// What the guard did, of which its controls do the same where no gate fired.
struct Known {
    by_prompt: Vec<PromptKl>,
    answered: Vec<Answered>,
}

struct Measure<'a> {
    model: &'a Model,
    answers: &'a BenignAnswers,
    input: UtilityInput<'a>,
    questions: &'a [Question],
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

impl Measure<'_> {
    /// As many steps as prompts and questions for every row.
    fn steps(&mut self, n: usize) -> impl FnMut(usize, usize) + '_ {
        let before = self.done;
        self.done += n;
        move |done, _| (self.progress)(before + done, self.total)
    }

    fn guard(&mut self, guard: &Guard) -> Result<(UtilityRow, Vec<Answered>), EvalError> {
        let (model, answers, questions) = (self.model, self.answers, self.questions);
        let kl = answers.compare(model, guard, &mut self.steps(self.input.benign.len()))?;
        let answered = answered(model, Some(guard), None, questions, &mut self.steps(questions.len()))?;
        Ok((self.row("guard".into(), Role::Guard, kl, &answered), answered))
    }

    fn control(
        &mut self,
        name: String,
        role: Role,
        control: &Guard,
        known: Option<&Known>,
    ) -> Result<UtilityRow, EvalError> {
        let (model, answers, questions) = (self.model, self.answers, self.questions);
        let by_prompt = known.map_or(&[][..], |known| &known.by_prompt);
        let kl = answers.compare_control(model, control, by_prompt, &mut self.steps(self.input.benign.len()))?;
        let mut all = known.map_or_else(Vec::new, |known| known.answered.clone());
        // Without knowledge every question is asked.
        all.resize(questions.len(), Answered { right: false, fired: true });
        let again: Vec<usize> = (0..all.len()).filter(|index| all[*index].fired).collect();
        let asked: Vec<Question> = again.iter().map(|index| questions[*index].clone()).collect();
        let new = answered(model, Some(control), None, &asked, &mut self.steps(questions.len()))?;
        again.into_iter().zip(new).for_each(|(index, answered)| all[index] = answered);
        Ok(self.row(name, role, kl, &all))
    }

    fn system_prompt(&mut self) -> Result<UtilityRow, EvalError> {
        let (model, answers, questions) = (self.model, self.answers, self.questions);
        let system = self.input.system_prompt;
        let kl = answers.compare_system(model, system, &mut self.steps(self.input.benign.len()))?;
        let answered = answered(model, None, Some(system), questions, &mut self.steps(questions.len()))?;
        Ok(self.row("no guard, system prompt".into(), Role::SystemPrompt, kl, &answered))
    }

    /// No guard is no distance from itself: only the questions are asked.
    fn unguarded(&mut self, guarded: &UtilityRow) -> Result<UtilityRow, EvalError> {
        let (model, questions) = (self.model, self.questions);
        let answered = answered(model, None, None, questions, &mut self.steps(questions.len()))?;
        Ok(UtilityRow {
            name: "no guard".into(),
            role: Role::NoGuard,
            kl: Estimate { value: 0.0, low: 0.0, high: 0.0 },
            perplexity: guarded.perplexity / guarded.relative_perplexity,
            relative_perplexity: 1.0,
            blocked: Proportion::new(0, self.input.benign.len()),
            accuracy: Proportion::of(answered.iter().map(|answered| answered.right)),
            by_prompt: Vec::new(),
        })
    }

    fn row(&self, name: String, role: Role, kl: BenignKl, answered: &[Answered]) -> UtilityRow {
        let [low, high] = kl.interval;
        UtilityRow {
            name,
            role,
            kl: Estimate { value: kl.nats_per_token, low, high },
            perplexity: kl.perplexity_guarded,
            relative_perplexity: kl.perplexity_guarded / kl.perplexity_unguarded,
            blocked: Proportion::new(kl.blocked, self.input.benign.len()),
            accuracy: Proportion::of(answered.iter().map(|answered| answered.right)),
            by_prompt: kl.by_prompt,
        }
    }
}

/// One row for all seeds of a control.
fn over_seeds(rows: &[UtilityRow]) -> UtilityRow {
    let over = |of: &dyn Fn(&UtilityRow) -> f64| Estimate::over_seeds(&rows.iter().map(of).collect::<Vec<_>>());
    let share = |of: &dyn Fn(&UtilityRow) -> Proportion| Proportion::over_seeds(rows.iter().map(of));
    UtilityRow {
        name: format!("random direction, mean of {}", rows.len()),
        role: Role::Random,
        kl: over(&|row| row.kl.value),
        perplexity: over(&|row| row.perplexity).value,
        relative_perplexity: over(&|row| row.relative_perplexity).value,
        blocked: share(&|row| row.blocked),
        accuracy: share(&|row| row.accuracy),
        by_prompt: Vec::new(),
    }
}
