use super::maybe_guarded::{MaybeGuarded, prompt_rows, row};
use super::model::{Model, context_params};
use super::{EngineError, GuardOptions};
use crate::guard::Guard;
use crate::hook::{BatchRow, ContextError, ExecutorKind, GuardedContext};
use crate::program::{Gate, GateDecision, Program, RowKind, Setting, ToggleError};
use crate::tensor::{LayerIndex, SequenceId};
use llama_cpp_2::token::LlamaToken;

/// One sequence on one context, guarded or not, token by token: for measuring. [`Scheduler`](super::Scheduler) answers prompts.
pub struct Session<'model> {
    context: MaybeGuarded<'model>,
    n_ctx: usize,
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
        let params = context_params(options.n_ctx, BATCH as u32);
        let context = MaybeGuarded::new(model, guards, options.guard, params, BATCH)?;
        let n_ctx = context.llama().n_ctx() as usize;
        Ok(Self { context, n_ctx })
    }

    /// How the residual of each hook point was reached in the last decode, the dry run before any other; none unguarded.
    pub fn executors(&self) -> Vec<(LayerIndex, ExecutorKind)> {
        self.context.guarded().into_iter().flat_map(GuardedContext::executors).collect()
    }

    /// Sets the interventions called `name` from the next token on, also of prompts to come: see [`GuardedContext::set_intervention`].
    ///
    /// # Errors
    /// No guard has one of that name, or it can't be set so.
    pub fn set_intervention(&mut self, name: &str, setting: Setting) -> Result<(), EngineError> {
        match self.context.guarded_mut() {
            Some(context) => Ok(context.set_intervention(name, setting)?),
            None => Err(ToggleError::Unknown { name: name.to_owned(), known: Vec::new() }.into()),
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
        let mut index = 0;
        for (chunk, tokens) in prompt.chunks(BATCH).enumerate() {
            let rows = prompt_rows(ONLY, chunk * BATCH, tokens, prompt.len() - 1);
            index = self.decode(rows, &prompt[chunk * BATCH + tokens.len()..])?;
        }
        Ok(index)
    }

    /// Feeds `token` at `position`, and returns the index of its logits.
    ///
    /// # Errors
    /// The guard fails, or llama.cpp does.
    pub fn step(&mut self, position: usize, token: LlamaToken) -> Result<i32, EngineError> {
        self.decode(std::iter::once((token, row(ONLY, position, RowKind::Generated))), &[])
    }

    /// Decodes `rows`, which `rest` of their prompt follows, and returns the index of the last one's logits.
    fn decode(
        &mut self,
        rows: impl Iterator<Item = (LlamaToken, BatchRow)>,
        rest: &[LlamaToken],
    ) -> Result<i32, EngineError> {
        let mut n_rows = 0;
        let ended = self.context.decode(rows.inspect(|_| n_rows += 1), &[(ONLY, rest)])?;
        ended.into_iter().next().map_or(Ok(n_rows - 1), |(_, error)| Err(error.into()))
    }

    /// Forgets what came before, reads `prompt`, feeds `answer` to it as if the model had written it, and shows `each` the logits, `[n_vocab]`, that
    /// predict each token of `answer`, with that token's index: what a guard does to an answer, without sampling one.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), and prompt and answer together too long.
    pub fn forced(
        &mut self,
        prompt: &[LlamaToken],
        answer: &[LlamaToken],
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        let found = prompt.len() + answer.len();
        if found > self.n_ctx {
            return Err(EngineError::PromptTooLong { found, capacity: self.n_ctx });
        }
        let last = self.prefill(prompt)?;
        let Some((_, fed)) = answer.split_last() else { return Ok(()) };
        each(0, self.logits(last));
        for (chunk, tokens) in fed.chunks(BATCH).enumerate() {
            let start = chunk * BATCH;
            let rows = tokens.iter().enumerate().map(|(offset, token)| {
                let position = prompt.len() + start + offset;
                (*token, row(ONLY, position, RowKind::Generated))
            });
            self.decode(rows, &[])?;
            for offset in 0..tokens.len() {
                each(start + offset + 1, self.logits(offset as i32));
            }
        }
        Ok(())
    }

    /// Logits of the row `index` of the last decode, `[n_vocab]`.
    pub fn logits(&self, index: i32) -> &[f32] {
        self.context.llama().get_logits_ith(index)
    }

    /// What the gates made of the last prompt; none in an unguarded session.
    pub fn gate_readings(&self) -> Vec<GateReading> {
        let Some(context) = self.context.guarded() else { return Vec::new() };
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
