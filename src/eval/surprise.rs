use super::EvalError;
use super::generate::Generated;
use crate::engine::{EngineError, Model, Session, SessionOptions};
use crate::tensor::log_softmax;
use llama_cpp_2::token::LlamaToken;

/// Reads answers under a model that no guard is on: how surprised it is by what was said.
pub(super) struct Reader<'model> {
    model: &'model Model,
    session: Session<'model>,
}

impl<'model> Reader<'model> {
    /// For answers of up to `max_tokens` tokens to prompts of up to `longest`.
    ///
    /// # Errors
    /// llama.cpp can't make the context.
    pub fn new(model: &'model Model, longest: usize, max_tokens: usize) -> Result<Self, EvalError> {
        // An answer may come to other tokens when it is read again.
        let n_ctx = (longest + 2 * max_tokens + 64) as u32;
        Ok(Self { model, session: Session::new(model, &[], SessionOptions { n_ctx, ..Default::default() })? })
    }

    /// `exp(−mean ln p)` over all tokens of the answers, each after its prompt; `None` where nothing was answered. Blocked prompts do not count.
    ///
    /// # Errors
    /// A prompt that the model can't run.
    pub fn perplexity(&mut self, prompts: &[Vec<LlamaToken>], answers: &[Generated]) -> Result<Option<f64>, EvalError> {
        let (mut sum, mut n) = (0.0, 0usize);
        for (index, (prompt, answer)) in prompts.iter().zip(answers).enumerate() {
            if answer.blocked {
                continue;
            }
            let answer = self.model.text_tokens(&answer.text);
            sum += log_likelihood(&mut self.session, prompt, &answer)
                .map_err(|source| EvalError::Prompt { index, source })?;
            n += answer.len();
        }
        Ok((n > 0).then(|| (-sum / n as f64).exp()))
    }
}

/// `ln p` of all tokens of `answer` together, as `session` finds it after `prompt`.
///
/// # Errors
/// As [`Session::forced`].
pub(super) fn log_likelihood(
    session: &mut Session<'_>,
    prompt: &[LlamaToken],
    answer: &[LlamaToken],
) -> Result<f64, EngineError> {
    let mut sum = 0.0;
    session.forced(prompt, answer, |at, logits| sum += log_softmax(logits)[answer[at].0 as usize])?;
    Ok(sum)
}
