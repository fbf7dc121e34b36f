use crate::engine::{EngineError, Model, Prompt, Session, SessionOptions};
use crate::eval::EvalError;
use crate::eval::generate::{Generated, generate, tokens_of};
use crate::eval::metrics::{RESAMPLES, drawn};
use crate::guard::Guard;
use crate::hook::ContextError;
use crate::learn::Progress;
use crate::tensor::{kl_divergence, log_softmax, quantile};
use llama_cpp_2::token::LlamaToken;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A model's own unguarded answers to benign prompts: the text on which guards are compared with none. Made once, it serves any number of
/// guards.
pub struct BenignAnswers {
    texts: Vec<Text>,
    /// Prompts that the model answered with nothing.
    empty: usize,
}

/// A prompt, its tokens in the model's template, and the tokens of the answer.
struct Text {
    index: usize,
    words: Prompt,
    prompt: Vec<LlamaToken>,
    answer: Vec<LlamaToken>,
}

/// How far a guard moves a model on text that it should leave alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenignKl {
    /// Mean over all tokens of `KL(unguarded ‖ guarded)`, in nats.
    pub nats_per_token: f64,
    /// Its 95 % interval, by a percentile bootstrap over prompts.
    pub interval: [f64; 2],
    /// The same of each prompt that was compared.
    pub by_prompt: Vec<PromptKl>,
    /// Tokens that were compared.
    pub tokens: usize,
    /// Perplexity of the answers unguarded: `exp(−mean ln p)`.
    pub perplexity_unguarded: f64,
    /// The same under the guard.
    pub perplexity_guarded: f64,
    /// Prompts that the guard blocks, of which nothing can be compared.
    pub blocked: usize,
    /// Prompts that the model answers with nothing.
    pub empty: usize,
}

/// Of one prompt's answer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PromptKl {
    /// Which of the prompts.
    pub index: usize,
    pub nats_per_token: f64,
    pub tokens: usize,
    /// Whether a gate fired on the prompt.
    pub fired: bool,
}

impl BenignAnswers {
    /// Greedy answers of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// No prompts, or one that the model can't answer.
    pub fn new(
        model: &Model,
        prompts: &[Prompt],
        max_tokens: usize,
        progress: Progress<'_>,
    ) -> Result<Self, EvalError> {
        let tokens = tokens_of(model, None, prompts)?;
        let answers = generate(model, &[], &tokens, max_tokens, progress)?;
        Ok(Self::of(model, prompts, tokens, &answers))
    }

    /// Of answers that the model, unguarded, has given to `prompts`, whose tokens are `tokens`.
    pub(in crate::eval) fn of(
        model: &Model,
        prompts: &[Prompt],
        tokens: Vec<Vec<LlamaToken>>,
        answers: &[Generated],
    ) -> Self {
        let text = |(index, ((words, prompt), answer)): (usize, ((&Prompt, _), &Generated))| {
            let answer = model.text_tokens(&answer.text);
            Text { index, words: words.clone(), prompt, answer }
        };
        let texts = prompts.iter().zip(tokens).zip(answers).enumerate().map(text);
        let texts: Vec<Text> = texts.filter(|text| !text.answer.is_empty()).collect();
        Self { empty: prompts.len() - texts.len(), texts }
    }

    /// `KL(unguarded ‖ guarded)` at every token of the answers, and their perplexity under both. Both read the same tokens (teacher
    /// forcing), so that one token that turns out otherwise does not make all after it incomparable.
    ///
    /// # Errors
    /// The guard is not for this model, fails, or blocks every prompt.
    pub fn compare(&self, model: &Model, guard: &Guard, progress: Progress<'_>) -> Result<BenignKl, EvalError> {
        self.compare_with(model, Some(guard), None, None, progress)
    }

    /// As [`compare`](Self::compare), of a control that does something only where `fired` says that the guard's gates fired: elsewhere it is the
    /// unguarded model, and is not run.
    pub(in crate::eval) fn compare_control(
        &self,
        model: &Model,
        control: &Guard,
        fired: &[PromptKl],
        progress: Progress<'_>,
    ) -> Result<BenignKl, EvalError> {
        self.compare_with(model, Some(control), None, Some(fired), progress)
    }

    /// As [`compare`](Self::compare), of a system prompt in place of a guard.
    ///
    /// # Errors
    /// The template can't be applied.
    pub fn compare_system(&self, model: &Model, system: &str, progress: Progress<'_>) -> Result<BenignKl, EvalError> {
        self.compare_with(model, None, Some(system), None, progress)
    }

    fn compare_with(
        &self,
        model: &Model,
        guard: Option<&Guard>,
        system: Option<&str>,
        fired: Option<&[PromptKl]>,
        progress: Progress<'_>,
    ) -> Result<BenignKl, EvalError> {
        let words: Vec<Prompt> = self.texts.iter().map(|text| text.words.clone()).collect();
        let prompts = tokens_of(model, system, &words)?;
        let longest = self
            .texts
            .iter()
            .zip(&prompts)
            .map(|(text, prompt)| prompt.len().max(text.prompt.len()) + text.answer.len());
        let n_ctx = longest.max().unwrap_or(0).max(8) as u32;
        let options = SessionOptions { n_ctx, ..Default::default() };
        let mut plain = Session::new(model, &[], options)?;
        let mut guarded = Session::new(model, guard.as_slice(), options)?;
        let mut sums = Vec::with_capacity(self.texts.len());
        let mut by_prompt = Vec::with_capacity(self.texts.len());
        let mut blocked = 0;
        let mut reference: Vec<f32> = Vec::new();
        for (at, (Text { index, prompt, answer, .. }, other)) in self.texts.iter().zip(&prompts).enumerate() {
            reference.clear();
            plain.forced(prompt, answer, |_, logits| reference.extend_from_slice(logits))?;
            let width = reference.len() / answer.len();
            let mut own = Sums::default();
            let row = |at: usize| &reference[at * width..(at + 1) * width];
            // What was blocked under the guard is not among these, and is run.
            let known = fired.and_then(|known| known.iter().find(|known| known.index == *index));
            let compared = if known.is_some_and(|known| !known.fired) {
                (0..answer.len()).for_each(|at| own.add(row(at), row(at), answer[at]));
                Ok(())
            } else {
                guarded.forced(other, answer, |at, logits| own.add(row(at), logits, answer[at]))
            };
            match compared {
                Ok(()) => {
                    let (nats_per_token, tokens) = (own.kl / own.tokens as f64, own.tokens);
                    let fired = known
                        .map_or_else(|| guarded.gate_readings().iter().any(|gate| gate.fired), |known| known.fired);
                    by_prompt.push(PromptKl { index: *index, nats_per_token, tokens, fired });
                    sums.push(own);
                }
                Err(EngineError::Context(ContextError::Blocked { .. })) => blocked += 1,
                Err(source) => return Err(EvalError::Prompt { index: *index, source }),
            }
            progress(at + 1, self.texts.len());
        }
        let all = Sums::of(sums.iter());
        if all.tokens == 0 {
            let prompts = self.texts.len() + self.empty;
            let guard = guard.map(|guard| guard.name().to_owned()).unwrap_or_default();
            return Err(EvalError::NothingToCompare { guard, prompts });
        }
        let n = all.tokens as f64;
        Ok(BenignKl {
            nats_per_token: all.kl / n,
            interval: interval(&sums),
            by_prompt,
            tokens: all.tokens,
            perplexity_unguarded: (-all.unguarded / n).exp(),
            perplexity_guarded: (-all.guarded / n).exp(),
            blocked,
            empty: self.empty,
        })
    }
}

/// Of the mean over tokens, by resampling prompts.
pub(in crate::eval) fn interval(by_prompt: &[Sums]) -> [f64; 2] {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut draw = |_| &by_prompt[drawn(&mut rng, by_prompt.len())];
    let resampled: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let all = Sums::of((0..by_prompt.len()).map(&mut draw));
            all.kl / all.tokens as f64
        })
        .collect();
    [0.025, 0.975].map(|q| quantile(&resampled, q))
}

/// Sums over an answer's tokens, of what is compared with the unguarded model.
#[derive(Default)]
pub(in crate::eval) struct Sums {
    pub kl: f64,
    /// Log-likelihood of the answers.
    pub unguarded: f64,
    pub guarded: f64,
    pub tokens: usize,
}

impl Sums {
    pub fn add(&mut self, unguarded: &[f32], guarded: &[f32], token: LlamaToken) {
        let token = token.0 as usize;
        // The same bits, as of a guard whose gate stays shut: spares three softmaxes over the vocabulary.
        if unguarded == guarded {
            let log = log_softmax(unguarded)[token];
            self.unguarded += log;
            self.guarded += log;
        } else {
            self.kl += kl_divergence(unguarded, guarded);
            self.unguarded += log_softmax(unguarded)[token];
            self.guarded += log_softmax(guarded)[token];
        }
        self.tokens += 1;
    }

    pub fn of<'a>(parts: impl Iterator<Item = &'a Self>) -> Self {
        let mut all = Self::default();
        for part in parts {
            all.kl += part.kl;
            all.unguarded += part.unguarded;
            all.guarded += part.guarded;
            all.tokens += part.tokens;
        }
        all
    }
}
