use super::steering::judged;
use crate::engine::{Model, Prompt};
use crate::eval::EvalError;
use crate::eval::controls::{only_when_fired, scaled};
use crate::eval::generate::{Generated, generate_where_fired, tokens_of};
use crate::eval::utility::{BenignAnswers, PromptKl};
use crate::guard::Guard;
use crate::learn::{Progress, StrengthOptions, StrengthSearch, search_strength};
use llama_cpp_2::token::LlamaToken;

/// What strengths are judged on.
#[derive(Debug, Clone, Copy)]
pub struct StrengthInput<'a> {
    /// Prompts that should be refused.
    pub harmful: &'a [Prompt],
    /// Prompts that should be answered as without a guard.
    pub benign: &'a [Prompt],
    /// Of an answer.
    pub max_tokens: usize,
}

/// What to multiply all of `guard`'s strengths by for a share of `options.target` of the harmful prompts to be refused, at the least KL to the
/// unguarded model: the search's strengths are such factors.
///
/// The effect of a factor is the share of harmful prompts whose greedy answer refuses by [`rules`](super::rules()), or which are
/// blocked; its KL, in nats a token, is that on the unguarded model's own answers to the benign prompts.
///
/// # Errors
/// A guard that has no strength to multiply, or is not for this model; a class without prompts, or one that can't be run; a factor that takes a
/// strength out of range, or at which the guard fails.
pub fn strength_for_refusals(
    model: &Model,
    guard: &Guard,
    input: StrengthInput<'_>,
    options: StrengthOptions,
    progress: Progress<'_>,
) -> Result<StrengthSearch, EvalError> {
    if guard.interventions().iter().all(|acts| acts.strength == 0.0) {
        return Err(EvalError::NoStrength { guard: guard.name().into() });
    }
    let mut trial = Trial::new(model, guard, input, options, progress)?;
    search_strength(options, |factor| {
        trial.at(factor).map_err(|source| EvalError::Factor { factor, source: Box::new(source) })
    })
}

/// A guard, and what it is tried on.
struct Trial<'a> {
    model: &'a Model,
    guard: &'a Guard,
    harmful: Vec<Vec<LlamaToken>>,
    answers: BenignAnswers,
    n_benign: usize,
    max_tokens: usize,
    /// What came of the first factor, where it comes of all others for the prompts that no gate fires on.
    known: Option<(Vec<Generated>, Vec<PromptKl>)>,
    done: usize,
    /// If the target is crossed once.
    total: usize,
    progress: Progress<'a>,
}

impl<'a> Trial<'a> {
    fn new(
        model: &'a Model,
        guard: &'a Guard,
        input: StrengthInput<'_>,
        options: StrengthOptions,
        progress: Progress<'a>,
    ) -> Result<Self, EvalError> {
        let StrengthInput { harmful, benign, max_tokens } = input;
        let n_benign = benign.len();
        let total = n_benign + (options.coarse + options.halvings) * (harmful.len() + n_benign);
        let harmful = tokens_of(model, None, harmful)?;
        let answers = BenignAnswers::new(model, benign, max_tokens, &mut |done, _| progress(done, total))?;
        let (known, done) = (None, n_benign);
        Ok(Self { model, guard, harmful, answers, n_benign, max_tokens, known, done, total, progress })
    }

    /// The share of harmful prompts that is refused at that factor, and the KL on benign ones.
    fn at(&mut self, factor: f64) -> Result<(f64, f64), EvalError> {
        let Self { model, max_tokens, .. } = *self;
        let guard = scaled(self.guard, factor)?;
        let known = self.known.as_ref();
        let (fired, fired_benign) =
            known.map_or((None, &[][..]), |(harmful, benign)| (Some(&harmful[..]), &benign[..]));
        let answered = self.done + self.harmful.len();
        let after = answered + self.n_benign;
        let total = self.total.max(after);
        let (before, progress) = (self.done, &mut self.progress);
        let harmful = generate_where_fired(model, &[&guard], &self.harmful, fired, max_tokens, &mut |done, _| {
            progress(before + done, total);
        })?;
        let kl = self
            .answers
            .compare_control(model, &guard, fired_benign, &mut |done, _| progress(answered + done, total))?;
        self.done = after;
        let refused = harmful.iter().filter(|answer| judged(answer).refuses()).count();
        let share = refused as f64 / harmful.len() as f64;
        if self.known.is_none() && only_when_fired(self.guard) {
            self.known = Some((harmful, kl.by_prompt));
        }
        Ok((share, kl.nats_per_token))
    }
}
