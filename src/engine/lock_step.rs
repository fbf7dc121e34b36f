use super::attach::program_for;
use super::model::{Model, backend, context_params};
use super::{EngineError, SessionOptions};
use crate::guard::Guard;
use crate::hook::{BatchRow, ContextError, ExecutorKind, GuardedBatch, GuardedContext};
use crate::program::RowKind;
use crate::tensor::{SequenceId, TokenPosition};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;
use std::sync::Arc;

/// Several sequences of one context that go in step, guarded or not: every decode has as many tokens of each. For timing.
///
/// Each has a KV stream of its own, as under a [`Scheduler`](super::Scheduler). A gate that blocks is no matter here: the work has been done when
/// it speaks.
pub struct LockStep<'model> {
    context: StepContext<'model>,
    n_sequences: usize,
    /// Tokens that each sequence has room for.
    n_ctx: usize,
    n_batch: usize,
}

enum StepContext<'model> {
    Plain { context: LlamaContext<'model>, batch: LlamaBatch<'static> },
    Guarded { context: Box<GuardedContext<'model>>, batch: GuardedBatch },
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
        let context = if guards.is_empty() {
            let context = model.llama().new_context(backend()?, params).map_err(ContextError::from)?;
            StepContext::Plain { context, batch: LlamaBatch::new(n_batch, 1) }
        } else {
            let program = program_for(model.llama(), backend()?, guards, options.guard)?;
            let context = Box::new(GuardedContext::new(model.llama(), backend()?, params, Arc::new(program))?);
            StepContext::Guarded { context, batch: GuardedBatch::new(n_batch) }
        };
        Ok(Self { context, n_sequences: n as usize, n_ctx: options.n_ctx as usize, n_batch })
    }

    /// Chooses how guarded sequences reach the residual.
    pub fn set_executor(&mut self, kind: ExecutorKind) {
        if let StepContext::Guarded { context, .. } = &mut self.context {
            context.set_executor(kind);
        }
    }

    /// How guarded sequences reach the residual; `None` unguarded.
    pub fn executor(&self) -> Option<ExecutorKind> {
        match &self.context {
            StepContext::Plain { .. } => None,
            StepContext::Guarded { context, .. } => Some(context.executor()),
        }
    }

    /// Forgets what came before, and reads a prompt for each sequence, all of one length, in as few decodes as there is room for.
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
                let row = move |(offset, token): (usize, &LlamaToken)| {
                    let position = start + offset;
                    let ends = position + 1 == found;
                    (*token, row(sequence, position, if ends { RowKind::PromptEnd } else { RowKind::Prompt }))
                };
                prompt[start..end].iter().enumerate().map(row)
            });
            self.context.decode(rows)?;
        }
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
        let generated = |(sequence, token): (usize, &LlamaToken)| (*token, row(sequence, position, RowKind::Generated));
        self.context.decode(tokens.iter().enumerate().map(generated))
    }
}

/// Logits are asked for where a token is to follow.
fn row(sequence: usize, position: usize, kind: RowKind) -> BatchRow {
    let output = kind != RowKind::Prompt;
    BatchRow { sequence: SequenceId(sequence as i32), position: TokenPosition(position as i32), kind, output }
}

impl StepContext<'_> {
    fn clear(&mut self) {
        match self {
            Self::Plain { context, .. } => context.clear_kv_cache(),
            Self::Guarded { context, .. } => context.clear(),
        }
    }

    fn decode(&mut self, rows: impl Iterator<Item = (LlamaToken, BatchRow)>) -> Result<(), EngineError> {
        match self {
            Self::Plain { context, batch } => {
                batch.clear();
                for (token, row) in rows {
                    batch
                        .add(token, row.position.0, &[row.sequence.0], row.output)
                        .expect("no more rows than the batch has room for");
                }
                context.decode(batch).map_err(ContextError::from)?;
            }
            Self::Guarded { context, batch } => {
                batch.clear();
                for (token, row) in rows {
                    batch.add(token, row).map_err(ContextError::from)?;
                }
                let ended = context.decode_each(batch)?;
                let failed = |error: &ContextError| !matches!(error, ContextError::Blocked { .. });
                if let Some(error) = ended.into_iter().map(|(_, error)| error).find(failed) {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }
}
