use super::attach::program_for;
use super::model::Model;
use super::{EngineError, GuardOptions};
use crate::guard::Guard;
use crate::hook::{BatchRow, ContextError, ExecutorKind, GuardedBatch, GuardedContext};
use crate::program::RowKind;
use crate::tensor::{SequenceId, TokenPosition};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;
use std::sync::Arc;

/// A context and its batch, guarded or not, so that what is compared goes the same way.
pub(super) enum MaybeGuarded<'model> {
    Plain { context: LlamaContext<'model>, batch: LlamaBatch<'static> },
    Guarded { context: Box<GuardedContext<'model>>, batch: GuardedBatch },
}

impl<'model> MaybeGuarded<'model> {
    /// A context for batches of up to `n_batch` rows under `guards`, which act in this order; with none there is no callback at all.
    ///
    /// # Errors
    /// A guard is not for this model or does not compile, or llama.cpp can't make the context.
    pub fn new(
        model: &'model Model,
        guards: &[&Guard],
        options: GuardOptions,
        params: LlamaContextParams,
        n_batch: usize,
    ) -> Result<Self, EngineError> {
        if guards.is_empty() {
            let context = model.weights().plain(params)?;
            return Ok(Self::Plain { context, batch: LlamaBatch::new(n_batch, 1) });
        }
        let program = program_for(model.weights(), guards, options)?;
        let context = Box::new(model.weights().guarded(params, Arc::new(program))?);
        Ok(Self::Guarded { context, batch: GuardedBatch::new(n_batch) })
    }

    pub fn llama(&self) -> &LlamaContext<'model> {
        match self {
            Self::Plain { context, .. } => context,
            Self::Guarded { context, .. } => context,
        }
    }

    /// `None` where there is no guard.
    pub fn guarded(&self) -> Option<&GuardedContext<'model>> {
        match self {
            Self::Plain { .. } => None,
            Self::Guarded { context, .. } => Some(context),
        }
    }

    /// `None` where there is no guard.
    pub fn guarded_mut(&mut self) -> Option<&mut GuardedContext<'model>> {
        match self {
            Self::Plain { .. } => None,
            Self::Guarded { context, .. } => Some(context),
        }
    }

    /// Chooses how residuals are reached, if there is a guard that does.
    pub fn set_executor(&mut self, kind: ExecutorKind) {
        if let Some(context) = self.guarded_mut() {
            context.set_executor(kind);
        }
    }

    pub fn clear(&mut self) {
        match self {
            Self::Plain { context, .. } => context.clear_kv_cache(),
            Self::Guarded { context, .. } => context.clear(),
        }
    }

    /// Decodes `rows`, as many as there is room for, and tells which sequences have come to an end by their guards. `rest` is what is left of the
    /// prompts that rows are parts of.
    ///
    /// # Errors
    /// llama.cpp decoded nothing.
    pub fn decode(
        &mut self,
        rows: impl Iterator<Item = (LlamaToken, BatchRow)>,
        rest: &[(SequenceId, &[LlamaToken])],
    ) -> Result<Vec<(SequenceId, ContextError)>, ContextError> {
        match self {
            Self::Plain { context, batch } => {
                batch.clear();
                for (token, row) in rows {
                    let sequences = [row.sequence.0];
                    batch.add(token, row.position.0, &sequences, row.output).expect("the batch has room for its rows");
                }
                context.decode(batch)?;
                Ok(Vec::new())
            }
            Self::Guarded { context, batch } => {
                batch.clear();
                for (token, row) in rows {
                    batch.add(token, row)?;
                }
                for (sequence, tokens) in rest {
                    batch.follow(*sequence, tokens);
                }
                context.decode_each(batch)
            }
        }
    }
}

/// A row whose logits are asked for if a token is to follow it.
pub(super) fn row(sequence: SequenceId, position: usize, kind: RowKind) -> BatchRow {
    let output = kind != RowKind::Prompt;
    BatchRow { sequence, position: TokenPosition(position as i32), kind, output }
}

/// Part of a prompt from `start` on, whose last token is at `last`.
pub(super) fn prompt_rows(
    sequence: SequenceId,
    start: usize,
    part: &[LlamaToken],
    last: usize,
) -> impl Iterator<Item = (LlamaToken, BatchRow)> {
    part.iter().enumerate().map(move |(offset, token)| {
        let position = start + offset;
        (*token, row(sequence, position, if position == last { RowKind::PromptEnd } else { RowKind::Prompt }))
    })
}
