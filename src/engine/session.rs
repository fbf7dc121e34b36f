use super::attach::program_for;
use super::model::{Model, backend, context_params};
use super::{EngineError, GuardOptions};
use crate::guard::Guard;
use crate::hook::{ContextError, ExecutorKind, GuardedBatch, GuardedContext};
use crate::program::{Gate, GateDecision, Program};
use crate::tensor::{LayerIndex, SequenceId, TokenPosition};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;
use std::sync::Arc;

/// One sequence on one context, guarded or not, token by token: for measuring. [`Scheduler`](super::Scheduler) answers prompts.
pub struct Session<'model> {
    context: SessionContext<'model>,
    n_ctx: usize,
}

enum SessionContext<'model> {
    Plain { context: LlamaContext<'model>, batch: LlamaBatch<'static> },
    Guarded { context: GuardedContext<'model>, batch: GuardedBatch },
}

#[derive(Debug, Clone, Copy)]
pub struct SessionOptions {
    /// Tokens that prompt and answer have room for.
    pub n_ctx: u32,
    pub guard: GuardOptions,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { n_ctx: 2048, guard: GuardOptions::default() }
    }
}

/// What a gate made of the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct GateReading {
    pub gate: String,
    /// In benign standard deviations; `None` where nothing could be read.
    pub score: Option<f64>,
    pub fired: bool,
}

const ONLY: SequenceId = SequenceId(0);

/// Rows that llama.cpp takes in one `llama_decode`.
const BATCH: usize = 512;

impl<'model> Session<'model> {
    /// A sequence under `guards`, which act in this order; with none it is unguarded.
    ///
    /// # Errors
    /// A guard is not for this model or does not compile, or llama.cpp can't make the context.
    pub fn new(model: &'model Model, guards: &[&Guard], options: SessionOptions) -> Result<Self, EngineError> {
        let backend = backend()?;
        let params = context_params(options.n_ctx, BATCH as u32);
        let context = if guards.is_empty() {
            SessionContext::Plain {
                context: model.llama().new_context(backend, params).map_err(ContextError::from)?,
                batch: LlamaBatch::new(BATCH, 1),
            }
        } else {
            let program = program_for(model.llama(), backend, guards, options.guard)?;
            SessionContext::Guarded {
                context: GuardedContext::new(model.llama(), backend, params, Arc::new(program))?,
                batch: GuardedBatch::new(BATCH),
            }
        };
        let n_ctx = context.llama().n_ctx() as usize;
        Ok(Self { context, n_ctx })
    }

    /// Chooses how a guarded session reaches the residual.
    pub fn set_executor(&mut self, kind: ExecutorKind) {
        if let SessionContext::Guarded { context, .. } = &mut self.context {
            context.set_executor(kind);
        }
    }

    /// How a guarded session reaches the residual; `None` unguarded.
    pub fn executor(&self) -> Option<ExecutorKind> {
        match &self.context {
            SessionContext::Plain { .. } => None,
            SessionContext::Guarded { context, .. } => Some(context.executor()),
        }
    }

    /// How the residual of each hook point was reached in the last decode, the dry run before any other; none unguarded.
    pub fn executors(&self) -> Vec<(LayerIndex, ExecutorKind)> {
        match &self.context {
            SessionContext::Plain { .. } => Vec::new(),
            SessionContext::Guarded { context, .. } => context.executors().collect(),
        }
    }

    /// Forgets what came before, reads `prompt`, and returns the index of its logits.
    ///
    /// # Errors
    /// The prompt is empty or too long, or the guard fails or blocks.
    pub fn prefill(&mut self, prompt: &[LlamaToken]) -> Result<i32, EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt.len() > self.n_ctx {
            return Err(EngineError::PromptTooLong { found: prompt.len(), capacity: self.n_ctx });
        }
        self.context.clear();
        let mut last = 0;
        let n_chunks = prompt.len().div_ceil(BATCH);
        for (index, chunk) in prompt.chunks(BATCH).enumerate() {
            last = self.context.decode_prompt(index * BATCH, chunk, index + 1 == n_chunks)?;
        }
        Ok(last)
    }

    /// Feeds `token` at `position`, and returns the index of its logits.
    ///
    /// # Errors
    /// The guard fails, or llama.cpp does.
    pub fn step(&mut self, position: usize, token: LlamaToken) -> Result<i32, EngineError> {
        self.context.decode_generated(position, token)
    }

    /// Logits of the row `index` of the last decode, `[n_vocab]`.
    pub fn logits(&self, index: i32) -> &[f32] {
        self.context.llama().get_logits_ith(index)
    }

    /// What the gates made of the last prompt; none in an unguarded session.
    pub fn gate_readings(&self) -> Vec<GateReading> {
        let SessionContext::Guarded { context, .. } = &self.context else { return Vec::new() };
        readings(context.program(), context.gate_decisions(ONLY))
    }

    /// What the gates make of `prompt`, without an answer. A gate that blocks is no error here.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn score(&mut self, prompt: &[LlamaToken]) -> Result<Vec<GateReading>, EngineError> {
        match self.prefill(prompt) {
            Ok(_) | Err(EngineError::Context(ContextError::Blocked { .. })) => Ok(self.gate_readings()),
            Err(error) => Err(error),
        }
    }
}

/// What the gates of `program` decided, by name.
pub(super) fn readings(program: &Program, decisions: Vec<Option<GateDecision>>) -> Vec<GateReading> {
    let reading = |(gate, decision): (&Gate, Option<GateDecision>)| GateReading {
        gate: gate.name.clone(),
        score: decision.and_then(|decision| decision.score),
        fired: decision.is_some_and(|decision| decision.fired),
    };
    program.gates().iter().zip(decisions).map(reading).collect()
}

impl<'model> SessionContext<'model> {
    fn llama(&self) -> &LlamaContext<'model> {
        match self {
            Self::Plain { context, .. } => context,
            Self::Guarded { context, .. } => context,
        }
    }

    fn clear(&mut self) {
        match self {
            Self::Plain { context, .. } => context.clear_kv_cache(),
            Self::Guarded { context, .. } => context.clear(),
        }
    }

    fn decode_prompt(&mut self, start: usize, tokens: &[LlamaToken], ends: bool) -> Result<i32, EngineError> {
        let position = TokenPosition(start as i32);
        match self {
            Self::Guarded { context, batch } => {
                batch.clear();
                let last = if ends {
                    batch.add_prompt(ONLY, position, tokens)
                } else {
                    batch.add_prompt_part(ONLY, position, tokens)
                };
                let last = last.map_err(ContextError::from)?;
                context.decode(batch)?;
                Ok(last)
            }
            Self::Plain { context, batch } => {
                batch.clear();
                for (offset, token) in tokens.iter().enumerate() {
                    let output = ends && offset + 1 == tokens.len();
                    batch
                        .add(*token, position.0 + offset as i32, &[ONLY.0], output)
                        .expect("chunks are no longer than the batch");
                }
                context.decode(batch).map_err(ContextError::from)?;
                Ok(tokens.len() as i32 - 1)
            }
        }
    }

    fn decode_generated(&mut self, position: usize, token: LlamaToken) -> Result<i32, EngineError> {
        let position = TokenPosition(position as i32);
        match self {
            Self::Guarded { context, batch } => {
                batch.clear();
                let index = batch.add_generated(ONLY, position, token).map_err(ContextError::from)?;
                context.decode(batch)?;
                Ok(index)
            }
            Self::Plain { context, batch } => {
                batch.clear();
                batch.add(token, position.0, &[ONLY.0], true).expect("an empty batch has room for one token");
                context.decode(batch).map_err(ContextError::from)?;
                Ok(0)
            }
        }
    }
}
