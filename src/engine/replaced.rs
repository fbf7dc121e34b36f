use super::EngineError;
use super::model::{Model, context_params};
use crate::hook::{BatchRow, ContextError, GuardedBatch, GuardedContext, Replacement};
use crate::program::{Program, RowKind};
use crate::tensor::{LayerIndex, Residual, SequenceId, TokenPosition};
use llama_cpp_2::token::LlamaToken;
use std::sync::Arc;

/// Reads prompts with rows of one layer's residual replaced by others, and shows what the model then predicts: for measuring.
pub struct ReplacedReader<'model> {
    context: GuardedContext<'model>,
    batch: GuardedBatch,
    capacity: usize,
    n_layer: u32,
}

const ONLY: SequenceId = SequenceId(0);

impl<'model> ReplacedReader<'model> {
    /// A reader of prompts of up to `capacity` tokens.
    ///
    /// # Errors
    /// llama.cpp can't make the context.
    pub fn of(model: &'model Model, capacity: usize) -> Result<Self, EngineError> {
        let size = u32::try_from(capacity.max(8)).unwrap_or(u32::MAX);
        let observer = Arc::new(Program::observer(model.shape()));
        let context = model.weights().guarded(context_params(size, size), observer)?;
        Ok(Self {
            context,
            batch: GuardedBatch::new(size as usize),
            capacity: size as usize,
            n_layer: model.shape().n_layer,
        })
    }

    /// Reads `tokens` with `rows`, `[n, n_embd]`, in place of the residual after `layer` of the tokens at `positions`, `[n]`, and shows `each` the
    /// logits, `[n_vocab]`, after every token, with that token's index. Without rows the model is as it is.
    ///
    /// # Errors
    /// The prompt is empty or too long, a position is not in it, or llama.cpp fails.
    ///
    /// # Panics
    /// If there are not as many rows as positions.
    pub fn logits(
        &mut self,
        tokens: &[LlamaToken],
        replaced: Option<(LayerIndex, &[TokenPosition], Residual<'_>)>,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        if tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if tokens.len() > self.capacity {
            return Err(EngineError::PromptTooLong { found: tokens.len(), capacity: self.capacity });
        }
        if let Some((layer, positions, _)) = &replaced {
            self.check(tokens.len(), *layer, positions)?;
        }
        let replacement = replaced.map(|(layer, positions, rows)| {
            Replacement::new(layer, positions.iter().map(|position| (ONLY, *position)), rows)
        });
        self.context.replace(replacement);
        self.context.clear();
        self.batch.clear();
        for (index, token) in tokens.iter().enumerate() {
            let kind = if index + 1 == tokens.len() { RowKind::PromptEnd } else { RowKind::Prompt };
            let row = BatchRow { sequence: ONLY, position: TokenPosition(index as i32), kind, output: true };
            self.batch.add(*token, row).map_err(ContextError::from)?;
        }
        let decoded = self.context.decode(&mut self.batch);
        self.context.replace(None);
        decoded?;
        for index in 0..tokens.len() {
            each(index, self.context.get_logits_ith(index as i32));
        }
        Ok(())
    }

    fn check(&self, n_tokens: usize, layer: LayerIndex, positions: &[TokenPosition]) -> Result<(), EngineError> {
        if layer.0 >= self.n_layer {
            return Err(EngineError::NoLayer { layer, last: self.n_layer - 1 });
        }
        match positions.iter().find(|position| usize::try_from(position.0).map_or(true, |at| at >= n_tokens)) {
            Some(position) => Err(EngineError::NoPosition { position: *position, n_tokens }),
            None => Ok(()),
        }
    }
}
