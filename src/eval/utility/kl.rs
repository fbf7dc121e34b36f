use crate::engine::{EngineError, Model, Session, SessionOptions};
use crate::eval::EvalError;
use crate::eval::generate::{answer_tokens, generate, tokens_of};
use crate::guard::Guard;
use crate::hook::ContextError;
use crate::learn::Progress;
use crate::tensor::{kl_divergence, log_softmax};
use llama_cpp_2::token::LlamaToken;
use serde::Serialize;

/// A model's own unguarded answers to benign prompts: the text on which guards are compared with none. Made once, it serves any number of
/// guards.
pub struct BenignAnswers {
    /// Prompt and answer.
    texts: Vec<(Vec<LlamaToken>, Vec<LlamaToken>)>,
    /// Prompts that the model answered with nothing.
    empty: usize,
}

/// How far a guard moves a model on text that it should leave alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenignKl {
    /// Mean over all tokens of `KL(unguarded ‖ guarded)`, in nats.
    pub nats_per_token: f64,
    /// The same of each prompt that was compared.
    pub by_prompt: Vec<f64>,
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

impl BenignAnswers {
    /// Greedy answers of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// No prompts, or one that the model can't answer.
    pub fn new(
        model: &Model,
        prompts: &[String],
        max_tokens: usize,
        progress: Progress<'_>,
    ) -> Result<Self, EvalError> {
        let prompts = tokens_of(model, prompts)?;
        let answers = generate(model, &[], &prompts, max_tokens, progress)?;
        let all = prompts.len();
        let texts: Vec<_> = prompts
            .into_iter()
            .zip(answers)
            .map(|(prompt, answer)| (prompt, answer_tokens(model, &answer.text)))
            .filter(|(_, answer)| !answer.is_empty())
            .collect();
        Ok(Self { empty: all - texts.len(), texts })
    }

    /// `KL(unguarded ‖ guarded)` at every token of the answers, and their perplexity under both. Both read the same tokens (teacher
    /// forcing), so that one token that turns out otherwise does not make all after it incomparable.
    ///
    /// # Errors
    /// The guard is not for this model, fails, or blocks every prompt.
    pub fn compare(&self, model: &Model, guard: &Guard, progress: Progress<'_>) -> Result<BenignKl, EvalError> {
        let longest = self.texts.iter().map(|(prompt, answer)| prompt.len() + answer.len()).max().unwrap_or(0);
        let options = SessionOptions { n_ctx: longest.max(8) as u32, ..Default::default() };
        let mut plain = Session::new(model, &[], options)?;
        let mut guarded = Session::new(model, &[guard], options)?;
        let mut sums = Sums::default();
        let mut by_prompt = Vec::with_capacity(self.texts.len());
        let mut blocked = 0;
        let mut reference: Vec<f32> = Vec::new();
        for (index, (prompt, answer)) in self.texts.iter().enumerate() {
            reference.clear();
            plain.forced(prompt, answer, |_, logits| reference.extend_from_slice(logits))?;
            let width = reference.len() / answer.len();
            let mut own = Sums::default();
            let compared = guarded.forced(prompt, answer, |at, logits| {
                let before = &reference[at * width..(at + 1) * width];
                own.add(before, logits, answer[at]);
            });
            match compared {
                Ok(()) => {
                    by_prompt.push(own.kl / own.tokens as f64);
                    sums.join(own);
                }
                Err(EngineError::Context(ContextError::Blocked { .. })) => blocked += 1,
                Err(source) => return Err(EvalError::Prompt { index, source }),
            }
            progress(index + 1, self.texts.len());
        }
        if sums.tokens == 0 {
            let prompts = self.texts.len() + self.empty;
            return Err(EvalError::NothingToCompare { guard: guard.name().into(), prompts });
        }
        let n = sums.tokens as f64;
        Ok(BenignKl {
            nats_per_token: sums.kl / n,
            by_prompt,
            tokens: sums.tokens,
            perplexity_unguarded: (-sums.unguarded / n).exp(),
            perplexity_guarded: (-sums.guarded / n).exp(),
            blocked,
            empty: self.empty,
        })
    }
}

/// [`BenignAnswers::compare`] on answers of up to `max_tokens` tokens that are made for it.
///
/// # Errors
/// As [`BenignAnswers::new`] and [`BenignAnswers::compare`].
pub fn benign_kl(
    model: &Model,
    guard: &Guard,
    prompts: &[String],
    max_tokens: usize,
    progress: Progress<'_>,
) -> Result<BenignKl, EvalError> {
    let total = 2 * prompts.len();
    let answers = BenignAnswers::new(model, prompts, max_tokens, &mut |done, _| progress(done, total))?;
    answers.compare(model, guard, &mut |done, _| progress(prompts.len() + done, total))
}

#[derive(Default)]
struct Sums {
    kl: f64,
    /// Log-likelihood of the answers.
    unguarded: f64,
    guarded: f64,
    tokens: usize,
}

impl Sums {
    fn add(&mut self, unguarded: &[f32], guarded: &[f32], token: LlamaToken) {
        let token = token.0 as usize;
        // Bit for bit the same: most tokens of a guard whose gate stays shut. Spares two softmaxes over the vocabulary.
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

    fn join(&mut self, other: Self) {
        self.kl += other.kl;
        self.unguarded += other.unguarded;
        self.guarded += other.guarded;
        self.tokens += other.tokens;
    }
}
