use super::model::{Model, beside, context_params};
use super::{EngineError, Weights};
use crate::hook::{BatchRow, CaptureRows, ContextError, GuardedBatch, GuardedContext};
use crate::program::{ModelShape, Program, RowKind};
use crate::tensor::{LayerIndex, LayerStack, Residual, SequenceId, TokenPosition};
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::token::LlamaToken;
use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Reads residual activations of a model, prompt by prompt, at several layers in one pass.
pub struct ActivationReader<'model> {
    context: GuardedContext<'model>,
    shape: ModelShape,
    layers: Vec<LayerIndex>,
    batch: GuardedBatch,
    capacity: usize,
}

/// Residual rows by layer, the same rows of the same tokens at each.
#[derive(Debug, Clone, Default)]
pub struct Activations {
    width: usize,
    /// Position of each row's token.
    positions: Vec<TokenPosition>,
    layers: BTreeMap<LayerIndex, Vec<f32>>,
}

const ONLY: SequenceId = SequenceId(0);

impl<'model> ActivationReader<'model> {
    /// A reader of `layers` of a model that this room loaded.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(model: &'model Model, layers: Vec<LayerIndex>, capacity: usize) -> Result<Self, EngineError> {
        Self::new(model.weights(), layers, capacity)
    }

    /// A reader of `layers` for prompts of up to `capacity` tokens.
    ///
    /// # Errors
    /// A layer that the model does not have, or llama.cpp can't make the context.
    pub fn new(weights: Weights<'model>, layers: Vec<LayerIndex>, capacity: usize) -> Result<Self, EngineError> {
        let observer = Program::observer(weights.shape());
        Self::with_program(weights, observer, layers, capacity, context_params)
    }

    /// One that works [`beside`] other contexts.
    pub(super) fn beside(
        weights: Weights<'model>,
        layers: Vec<LayerIndex>,
        capacity: usize,
    ) -> Result<Self, EngineError> {
        let observer = Program::observer(weights.shape());
        let params = |n_ctx, n_batch| beside(context_params(n_ctx, n_batch));
        Self::with_program(weights, observer, layers, capacity, params)
    }

    fn with_program(
        weights: Weights<'model>,
        program: Program,
        layers: Vec<LayerIndex>,
        capacity: usize,
        params: impl FnOnce(u32, u32) -> LlamaContextParams,
    ) -> Result<Self, EngineError> {
        let shape = weights.shape();
        if let Some(layer) = layers.iter().find(|layer| layer.0 >= shape.n_layer) {
            return Err(EngineError::NoLayer { layer: *layer, last: shape.n_layer - 1 });
        }
        let size = u32::try_from(capacity.max(8)).unwrap_or(u32::MAX);
        let context = weights.guarded(params(size, size), Arc::new(program))?;
        Ok(Self { context, shape, layers, batch: GuardedBatch::new(size as usize), capacity: size as usize })
    }

    /// A reader of `layers` of a model that `program` acts on: residuals are as they are after it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn under(
        model: &'model Model,
        program: Program,
        layers: Vec<LayerIndex>,
        capacity: usize,
    ) -> Result<Self, EngineError> {
        Self::with_program(model.weights(), program, layers, capacity, context_params)
    }

    pub fn layers(&self) -> &[LayerIndex] {
        &self.layers
    }

    /// Activations of the last token of `tokens`: one row a layer.
    ///
    /// # Errors
    /// The prompt is empty or too long, or llama.cpp fails.
    pub fn last_token(&mut self, tokens: &[LlamaToken]) -> Result<Activations, EngineError> {
        self.read(tokens, true)
    }

    /// Activations of every token of `tokens` but the first, whose activations are those of an attention sink.
    ///
    /// # Errors
    /// As [`last_token`](Self::last_token); and the model's last layer, where llama.cpp keeps only rows with logits.
    pub fn every_token(&mut self, tokens: &[LlamaToken]) -> Result<Activations, EngineError> {
        let last = self.shape.n_layer - 1;
        if let Some(layer) = self.layers.iter().find(|layer| layer.0 == last) {
            return Err(EngineError::NotEveryToken { layer: *layer, last });
        }
        self.read(tokens, false)
    }

    /// Activations of every token but the first of `prompt` and of `answer`, fed as if the model had written it. At the model's last layer, which is
    /// then to be the only one, those of the tokens that the answer is predicted from.
    ///
    /// # Errors
    /// As [`last_token`](Self::last_token); and the model's last layer beside others.
    pub fn answered(&mut self, prompt: &[LlamaToken], answer: &[LlamaToken]) -> Result<Activations, EngineError> {
        let last = self.shape.n_layer - 1;
        let has_last = self.layers.iter().any(|layer| layer.0 == last);
        if has_last && self.layers.len() > 1 {
            return Err(EngineError::NotEveryToken { layer: LayerIndex(last), last });
        }
        self.begin(prompt.len(), prompt.len() + answer.len())?;
        for (index, token) in prompt.iter().chain(answer).enumerate() {
            let kind = match (index + 1).cmp(&prompt.len()) {
                Ordering::Less => RowKind::Prompt,
                Ordering::Equal => RowKind::PromptEnd,
                Ordering::Greater => RowKind::Generated,
            };
            // Nothing follows the last token.
            let predicts = kind != RowKind::Prompt && (index + 1 < prompt.len() + answer.len() || answer.is_empty());
            let output = has_last && predicts;
            let row = BatchRow { sequence: ONLY, position: TokenPosition(index as i32), kind, output };
            self.batch.add(*token, row).map_err(ContextError::from)?;
        }
        self.run(CaptureRows::AfterFirst)
    }

    fn read(&mut self, tokens: &[LlamaToken], only_last: bool) -> Result<Activations, EngineError> {
        self.begin(tokens.len(), tokens.len())?;
        if only_last {
            self.batch.add_prompt(ONLY, TokenPosition(0), tokens)
        } else {
            // Without logits: nobody reads them, and with a large vocabulary they cost more than the layers.
            self.batch.add_prompt_part(ONLY, TokenPosition(0), tokens, &[])
        }
        .map_err(ContextError::from)?;
        self.run(if only_last { CaptureRows::PromptEnds } else { CaptureRows::AfterFirst })
    }

    /// Makes ready for a prompt of `n_prompt` tokens and what follows it, `n_tokens` in all.
    fn begin(&mut self, n_prompt: usize, n_tokens: usize) -> Result<(), EngineError> {
        if n_prompt == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if n_tokens > self.capacity {
            return Err(EngineError::PromptTooLong { found: n_tokens, capacity: self.capacity });
        }
        self.context.clear();
        self.batch.clear();
        Ok(())
    }

    fn run(&mut self, which: CaptureRows) -> Result<Activations, EngineError> {
        self.context.capture_rows(self.layers.iter().copied(), which);
        self.context.decode(&mut self.batch)?;

        let mut read = Activations { width: self.shape.n_embd.0, ..Default::default() };
        for captured in self.context.take_captured() {
            if captured.layer == self.layers[0] {
                read.positions = captured.rows.iter().map(|row| row.position).collect();
            }
            read.layers.insert(captured.layer, captured.values);
        }
        Ok(read)
    }
}

impl Activations {
    /// Rows at `layer`, `[n_rows, n_embd]`; none where the layer was not read.
    ///
    /// # Panics
    /// On activations that no reader made.
    pub fn layer(&self, layer: LayerIndex) -> Residual<'_> {
        let values = self.layers.get(&layer).map_or(&[][..], Vec::as_slice);
        Residual::new(values, self.width).expect("rows of the model's width")
    }

    /// Rows at the layers of `stack` beside each other, and how wide they are.
    ///
    /// # Panics
    /// On activations that no reader made.
    pub fn stacked(&self, stack: &LayerStack) -> (Cow<'_, [f32]>, usize) {
        let layers: Vec<Residual<'_>> = stack.layers().iter().map(|layer| self.layer(*layer)).collect();
        let [first, rest @ ..] = layers.as_slice() else { unreachable!("a stack has a layer") };
        if rest.is_empty() {
            return (Cow::Borrowed(first.values()), self.width);
        }
        let rows = (0..first.n_rows()).flat_map(|row| layers.iter().flat_map(move |layer| layer.row(row)));
        (Cow::Owned(rows.copied().collect()), layers.len() * self.width)
    }

    pub fn positions(&self) -> &[TokenPosition] {
        &self.positions
    }

    pub fn n_rows(&self) -> usize {
        self.positions.len()
    }

    /// The mean of all rows, as one row at the last one's position; `None` of no rows.
    pub fn mean(&self) -> Option<Self> {
        let positions = vec![*self.positions.last()?];
        let n = self.n_rows() as f64;
        let mean = |values: &Vec<f32>| -> Vec<f32> {
            let mut sums = vec![0.0f64; self.width];
            for row in values.chunks_exact(self.width) {
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
            }
            sums.iter().map(|sum| (sum / n) as f32).collect()
        };
        let layers = self.layers.iter().map(|(layer, values)| (*layer, mean(values))).collect();
        Some(Self { width: self.width, positions, layers })
    }

    /// Appends the rows of `other`, which has the same layers.
    pub fn append(&mut self, other: Self) {
        self.width = other.width;
        self.positions.extend(other.positions);
        for (layer, values) in other.layers {
            self.layers.entry(layer).or_default().extend(values);
        }
    }

    /// Keeps the rows whose indices `rows` gives, in that order.
    pub fn select(&self, rows: impl Iterator<Item = usize> + Clone) -> Self {
        let positions = rows.clone().map(|row| self.positions[row]).collect();
        let layers = self
            .layers
            .iter()
            .map(|(layer, values)| {
                let kept = rows.clone().flat_map(|row| &values[row * self.width..(row + 1) * self.width]).copied();
                (*layer, kept.collect())
            })
            .collect();
        Self { width: self.width, positions, layers }
    }
}
