use super::maybe_guarded::{MaybeGuarded, prompt_rows, row};
use super::model::{Model, context_params};
use super::{EngineError, SessionOptions};
use crate::guard::Guard;
use crate::hook::{ContextError, ExecutorKind, GuardedContext};
use crate::program::RowKind;
use crate::tensor::SequenceId;
use llama_cpp_2::token::LlamaToken;

/// Several sequences of one context that go in step, guarded or not: every decode has as many tokens of each. For timing.
///
/// Each has a KV stream of its own, as under a [`Scheduler`](super::Scheduler). A gate that blocks is no matter here: the work has been done when
/// it speaks.
pub struct LockStep<'model> {
    context: MaybeGuarded<'model>,
    n_sequences: usize,
    /// Tokens that each sequence has room for.
    n_ctx: usize,
    n_batch: usize,
}

/// Rows that llama.cpp takes in one `llama_decode`, if there are not more sequences.
const BATCH: usize = 512;

impl<'model> LockStep<'model> {
    /// `n_sequences` sequences, each with room for `options.n_ctx` tokens, under `guards`; with none they are unguarded.
    ///
    /// # Errors
    /// A guard is not for this model or does not compile, or llama.cpp can't make the context.
    pub fn new(
        model: &'model Model,
        guards: &[&Guard],
        n_sequences: u32,
        options: SessionOptions,
    ) -> Result<Self, EngineError> {
        let n = n_sequences.max(1);
        let n_batch = BATCH.max(n as usize);
        let params = context_params(options.n_ctx.saturating_mul(n), n_batch as u32);
        let params = params.with_n_seq_max(n).with_kv_unified(false);
        let context = MaybeGuarded::new(model, guards, options.guard, params, n_batch)?;
        Ok(Self { context, n_sequences: n as usize, n_ctx: options.n_ctx as usize, n_batch })
    }

    /// Chooses how guarded sequences reach the residual.
    pub fn set_executor(&mut self, kind: ExecutorKind) {
        self.context.set_executor(kind);
    }

    /// How guarded sequences reach the residual; `None` unguarded.
    pub fn executor(&self) -> Option<ExecutorKind> {
        self.context.guarded().map(GuardedContext::executor)
    }

    /// Forgets what came before, and reads a prompt for each sequence, all of one length, in as few decodes as there is room for. A device that works on
    /// behind llama.cpp's back has finished when this returns, as in [`step`](Self::step): else what it still does would be counted to what comes next.
    ///
    /// # Errors
    /// The prompts are empty or too long, or a guard fails.
    ///
    /// # Panics
    /// If there is not a prompt for each sequence, or they differ in length.
    pub fn prefill(&mut self, prompts: &[Vec<LlamaToken>]) -> Result<(), EngineError> {
        assert_eq!(prompts.len(), self.n_sequences, "a prompt for each sequence");
        let found = prompts[0].len();
        assert!(prompts.iter().all(|prompt| prompt.len() == found), "prompts of one length");
        if found == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if found > self.n_ctx {
            return Err(EngineError::PromptTooLong { found, capacity: self.n_ctx });
        }
        self.context.clear();
        let share = self.n_batch / self.n_sequences;
        for start in (0..found).step_by(share) {
            let end = (start + share).min(found);
            let rows = prompts.iter().enumerate().flat_map(|(sequence, prompt)| {
                prompt_rows(SequenceId(sequence as i32), start, &prompt[start..end], found - 1)
            });
            let rest: Vec<_> = prompts
                .iter()
                .enumerate()
                .map(|(sequence, prompt)| (SequenceId(sequence as i32), &prompt[end..]))
                .collect();
            unless_blocked(self.context.decode(rows, &rest)?)?;
        }
        self.context.llama().synchronize();
        Ok(())
    }

    /// Feeds each sequence its token at `position`.
    ///
    /// # Errors
    /// A guard fails, or llama.cpp does.
    ///
    /// # Panics
    /// If there is not a token for each sequence.
    pub fn step(&mut self, position: usize, tokens: &[LlamaToken]) -> Result<(), EngineError> {
        assert_eq!(tokens.len(), self.n_sequences, "a token for each sequence");
        let generated = |(sequence, token): (usize, &LlamaToken)| {
            (*token, row(SequenceId(sequence as i32), position, RowKind::Generated))
        };
        unless_blocked(self.context.decode(tokens.iter().enumerate().map(generated), &[])?)?;
        self.context.llama().synchronize();
        Ok(())
    }
}

fn unless_blocked(ended: Vec<(SequenceId, ContextError)>) -> Result<(), EngineError> {
    let failed = |error: &ContextError| !matches!(error, ContextError::Blocked { .. });
    ended.into_iter().map(|(_, error)| error).find(failed).map_or(Ok(()), |error| Err(error.into()))
}
