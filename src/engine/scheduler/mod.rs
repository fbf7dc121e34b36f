//! Many requests in one context: continuous batching under guards.
//!
//! Requests join and leave between steps. Each step decodes one batch: first the next token of every answer, then parts of prompts that are
//! still being read, the oldest first, each with a fair share of the room that is left. Every request runs under a program of its own (the one
//! that was current when it was submitted, or its own), in a KV stream of its own, so that no other can take its room or spoil its attention.
//!
//! A prompt that begins as another request's text does is not read again as far as they agree, if both run under the same program (the very
//! same: a guard that is loaded anew is another epoch) and the program did nothing to these tokens that it would not do in a prompt: text that was
//! written with an open gate is read anew. What gates have made of the shared tokens is kept with them.
//!
//! The scheduler does nothing by itself: whoever owns it calls [`step`](Scheduler::step).

mod text;

pub use text::{Streamed, TextStream};

use super::attach::program_for;
use super::model::{Model, context_params};
use super::sampling::Sampling;
use super::session::{GateReading, readings};
use super::{EngineError, GuardOptions, identity_of};
use crate::guard::Guard;
use crate::hook::{ContextError, Executor, ExecutorKind, GuardedBatch, GuardedContext};
use crate::program::{Program, Setting};
use crate::tensor::{SequenceId, TokenPosition};
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// Requests that run at once.
    pub n_sequences: u32,
    /// Tokens that each has room for, prompt and answer.
    pub n_ctx: u32,
    /// Rows of a step: at least one a sequence.
    pub n_batch: u32,
    /// Requests that may wait.
    pub queue: usize,
    /// Whether prompts that begin alike share what was read of them.
    pub reuse_prefixes: bool,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self { n_sequences: 4, n_ctx: 2048, n_batch: 512, queue: 64, reuse_prefixes: true }
    }
}

/// What is to be answered, and how.
#[derive(Debug, Clone)]
pub struct Request {
    pub prompt: Vec<LlamaToken>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// The answer ends before the first of these to be complete.
    pub stop: Vec<String>,
    /// Guards of this request's own, compiled for this model; else those that are current when it is submitted.
    pub program: Option<Arc<Program>>,
    /// Interventions to set on the way, in this order where several are due at once.
    pub toggles: Vec<Toggle>,
    /// Whether an [`Event::Token`] is to come before the text of each token, and with how many of the likeliest tokens in its place.
    pub probabilities: Option<usize>,
    /// What the answer's form allows; anything where there is none.
    pub form: Option<Box<dyn Form>>,
    /// Whether [`Summary::token_scores`] are wanted.
    pub token_scores: bool,
}

/// A form that an answer keeps to, token by token.
pub trait Form: Send + fmt::Debug {
    /// Sets the logits of those `candidates` to −∞ that can't come next. Where the form is complete, a token that ends the answer can.
    ///
    /// # Errors
    /// None can come, or it can't be told.
    fn restrict(&mut self, candidates: &mut [LlamaTokenData]) -> Result<(), String>;

    /// Goes on by `token`, which does not end the answer.
    ///
    /// # Errors
    /// It could not come here.
    fn accept(&mut self, token: LlamaToken) -> Result<(), String>;

    /// The same, at the same place.
    fn copy(&self) -> Box<dyn Form>;
}

impl Clone for Box<dyn Form> {
    fn clone(&self) -> Self {
        self.copy()
    }
}

/// An intervention of a request that is set when its answer has come so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Toggle {
    /// As for [`Program::with_setting`].
    pub name: String,
    /// The first token of the answer that is predicted so, from 1 on: at 1 the prompt is read so too.
    pub from_token: usize,
    pub setting: Setting,
}

impl Request {
    /// A greedy answer of up to `max_tokens` tokens under the current guards.
    pub fn new(prompt: Vec<LlamaToken>, max_tokens: usize) -> Self {
        Self {
            prompt,
            max_tokens,
            sampling: Sampling::default(),
            stop: Vec::new(),
            program: None,
            toggles: Vec::new(),
            probabilities: None,
            form: None,
            token_scores: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}", self.0)
    }
}

/// What happens to a request.
#[derive(Debug)]
pub enum Event {
    /// The answer goes on: whole characters, and nothing of a stop string.
    Text { request: RequestId, text: String },
    /// A token of the answer, where the request asks for probabilities: the tokens of a stop string and of text that is held back come too, when they do.
    Token { request: RequestId, token: TokenProbability, instead: Vec<TokenProbability> },
    /// The last event of a request.
    Ended { request: RequestId, summary: Summary },
}

/// How likely the model, under its guards, held a token, before anything that [`Sampling`] does.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenProbability {
    pub token: LlamaToken,
    /// What it spells; of a character of several tokens a part.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub log_probability: f32,
}

/// What came of a request.
#[derive(Debug)]
pub struct Summary {
    pub end: End,
    pub prompt_tokens: usize,
    /// Tokens of the prompt that had been read for another request.
    pub reused_tokens: usize,
    /// Tokens of the answer, the ones of a stop string included.
    pub tokens: usize,
    /// From the step in which it joined to the first token of its answer, or to its end.
    pub prefill_time: Duration,
    /// From then on.
    pub decode_time: Duration,
    /// What the gates made of it, in the order of its program.
    pub gates: Vec<GateReading>,
    /// What each of them read at each token, prompt and answer, `[n_tokens][n_gates]`, as far as it can be told: none unless the request asks for it. In benign
    /// standard deviations; `None` where it read nothing.
    pub token_scores: Vec<Vec<Option<f64>>>,
}

/// Why an answer ended.
#[derive(Debug)]
pub enum End {
    /// The model ended it.
    Stop,
    /// A stop string came: its index.
    StopString(usize),
    /// It has the tokens that were asked for.
    Length,
    /// Prompt and answer fill the sequence's room.
    ContextFull,
    /// A gate blocks.
    Blocked(Block),
    /// Its guard failed, or llama.cpp did: nothing of it is to be used.
    Failed(ContextError),
    /// It can't go on in its form: why.
    OutOfForm(String),
    Cancelled,
}

/// What blocked a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub guard: String,
    /// As its guard has it, and in a stack of several guards `GUARD/GATE`.
    pub gate: String,
    /// What the guard has to say to the caller.
    pub message: Option<String>,
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guard `{}` blocked the sequence: gate `{}` fired", self.guard, self.gate)?;
        self.message.as_ref().map_or(Ok(()), |message| write!(f, ": {message}"))
    }
}

/// Runs requests. See the [module](self).
pub struct Scheduler<'model> {
    model: &'model Model,
    context: GuardedContext<'model>,
    batch: GuardedBatch,
    options: SchedulerOptions,
    waiting: VecDeque<(RequestId, Request, Arc<Program>)>,
    /// One a sequence.
    slots: Vec<Slot>,
    next_id: u64,
    n_steps: u64,
}

/// Tokens from which on it is worth a copy of another sequence's cells to share them. llama.cpp copies a whole stream at once: 47 MiB for SmolLM2
/// with room for 2048 tokens, some 10 ms, in which it reads about seven.
const MIN_COPIED: usize = 16;

/// A sequence of the context.
#[derive(Default)]
struct Slot {
    running: Option<Running>,
    /// Tokens that are in its cells, of the request that runs or of the last one that did.
    tokens: Vec<LlamaToken>,
    /// The step in which it was last given away.
    given: u64,
}

/// A request that has a sequence.
struct Running {
    id: RequestId,
    request: Request,
    sampler: LlamaSampler,
    text: TextStream,
    reused: usize,
    joined: Instant,
    /// When its prompt had been read.
    answering: Option<Instant>,
    /// The answer's last token, which is not.
    next: Option<LlamaToken>,
    tokens: usize,
    /// Row of this step's batch whose logits are its own.
    row: Option<i32>,
}

impl<'model> Scheduler<'model> {
    /// Requests run under `guards`, which act in this order, unless they bring a program of their own.
    ///
    /// # Errors
    /// A guard is not for this model or does not compile, or llama.cpp can't make the context.
    pub fn guarded(model: &'model Model, guards: &[&Guard], options: SchedulerOptions) -> Result<Self, EngineError> {
        let program = match guards {
            [] => Program::observer(model.shape()),
            _ => program_for(model.weights(), guards, GuardOptions::default())?,
        };
        Self::new(model, Arc::new(program), options)
    }

    /// Requests run under `program`, unless they bring their own.
    ///
    /// # Errors
    /// A program for a model of another shape, or llama.cpp can't make the context.
    pub fn new(model: &'model Model, program: Arc<Program>, options: SchedulerOptions) -> Result<Self, EngineError> {
        let n = options.n_sequences.max(1);
        let options = SchedulerOptions { n_sequences: n, n_batch: options.n_batch.max(n), ..options };
        check_shape(model, &program)?;
        let params = context_params(options.n_ctx.saturating_mul(n), options.n_batch);
        let params = params.with_n_seq_max(n).with_kv_unified(false);
        let context = model.weights().guarded(params, program)?;
        let batch = GuardedBatch::new(options.n_batch as usize);
        let slots = (0..n).map(|_| Slot::default()).collect();
        let waiting = VecDeque::new();
        Ok(Self { model, context, batch, options, waiting, slots, next_id: 0, n_steps: 0 })
    }

    /// Takes `program` for requests to come. Those that wait or run keep theirs.
    ///
    /// # Errors
    /// A program for a model of another shape.
    pub fn set_program(&mut self, program: Arc<Program>) -> Result<(), EngineError> {
        check_shape(self.model, &program)?;
        let old = Arc::clone(self.context.program());
        if Arc::ptr_eq(&old, &program) {
            return Ok(());
        }
        // What ran under the old one is of no more use, and would keep it in memory.
        for slot in 0..self.slots.len() {
            let own = self.context.program_of(SequenceId(slot as i32));
            let of_old = own.is_some_and(|own| own.differs_in_strengths_alone(&old));
            if self.slots[slot].running.is_none() && of_old {
                self.forget(slot)?;
            }
        }
        self.context.set_program(program);
        Ok(())
    }

    /// Puts `request` in the queue. It joins at one of the next steps.
    ///
    /// # Errors
    /// The prompt is empty, has a token that the model has not, or is longer than a sequence's room, its program is for a model of another shape
    /// or can't be set as it asks, or the queue is full.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        // llama.cpp refuses a whole batch for one.
        self.model.check_tokens(&request.prompt)?;
        let (found, capacity) = (request.prompt.len(), self.options.n_ctx as usize);
        if found > capacity {
            return Err(EngineError::PromptTooLong { found, capacity });
        }
        if self.waiting.len() >= self.options.queue {
            return Err(EngineError::QueueFull { capacity: self.options.queue });
        }
        let program = request.program.clone().unwrap_or_else(|| Arc::clone(self.context.program()));
        check_shape(self.model, &program)?;
        let program = self.toggled_at_first(program, &request.toggles)?;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.waiting.push_back((id, request, program));
        Ok(id)
    }

    /// The program that a request with these toggles begins with.
    ///
    /// # Errors
    /// One of them, now or later, can't be.
    fn toggled_at_first(&mut self, program: Arc<Program>, toggles: &[Toggle]) -> Result<Arc<Program>, EngineError> {
        let (first, later): (Vec<_>, Vec<_>) = toggles.iter().partition(|toggle| toggle.from_token <= 1);
        let mut at_first = program;
        for Toggle { name, setting, .. } in first {
            at_first = self.context.variant(&at_first, name, *setting)?;
        }
        let mut then = Arc::clone(&at_first);
        let mut later = later;
        later.sort_by_key(|toggle| toggle.from_token);
        for Toggle { name, setting, .. } in later {
            then = self.context.variant(&then, name, *setting)?;
        }
        Ok(at_first)
    }

    /// Sets the interventions called `name` for requests to come, and for those that wait or run and have one of that name, from their next tokens
    /// on: see [`GuardedContext::set_intervention`].
    ///
    /// # Errors
    /// The current guards have no intervention of that name, or one can't be set so, of any request; nothing is changed then.
    pub fn set_intervention(&mut self, name: &str, setting: Setting) -> Result<(), EngineError> {
        let current = Arc::clone(self.context.program());
        let current = self.context.variant(&current, name, setting)?;
        let mut waiting = Vec::with_capacity(self.waiting.len());
        for index in 0..self.waiting.len() {
            let own = Arc::clone(&self.waiting[index].2);
            waiting.push(if own.has_intervention(name) { self.context.variant(&own, name, setting)? } else { own });
        }
        let mut running = Vec::new();
        for slot in (0..self.slots.len()).filter(|slot| self.slots[*slot].running.is_some()) {
            let sequence = SequenceId(slot as i32);
            let own = self.context.program_of(sequence).filter(|program| program.has_intervention(name));
            if let Some(own) = own.map(Arc::clone) {
                running.push((sequence, self.context.variant(&own, name, setting)?));
            }
        }
        self.context.set_program(current);
        self.waiting.iter_mut().zip(waiting).for_each(|((.., own), program)| *own = program);
        running.into_iter().for_each(|(sequence, program)| self.context.turn(sequence, program));
        Ok(())
    }

    /// As [`set_intervention`](Self::set_intervention), for one request. Returns whether it waits or runs.
    ///
    /// # Errors
    /// Its guards have no intervention of that name, or it can't be set so.
    pub fn set_intervention_of(&mut self, id: RequestId, name: &str, setting: Setting) -> Result<bool, EngineError> {
        if let Some(index) = self.waiting.iter().position(|(waiting, ..)| *waiting == id) {
            let own = Arc::clone(&self.waiting[index].2);
            self.waiting[index].2 = self.context.variant(&own, name, setting)?;
            return Ok(true);
        }
        let Some(slot) = self.slot_of(id) else { return Ok(false) };
        self.context.set_intervention_of(SequenceId(slot as i32), name, setting)?;
        Ok(true)
    }

    fn slot_of(&self, id: RequestId) -> Option<usize> {
        self.slots.iter().position(|slot| slot.running.as_ref().is_some_and(|running| running.id == id))
    }

    /// Ends a request that waits or runs. `None` where there is none of that name.
    ///
    /// # Errors
    /// llama.cpp can't empty its sequence.
    pub fn cancel(&mut self, id: RequestId) -> Result<Option<Summary>, EngineError> {
        if let Some(index) = self.waiting.iter().position(|(waiting, ..)| *waiting == id) {
            let removed = self.waiting.remove(index);
            return Ok(removed.map(|(_, request, _)| Summary {
                end: End::Cancelled,
                prompt_tokens: request.prompt.len(),
                reused_tokens: 0,
                tokens: 0,
                prefill_time: Duration::ZERO,
                decode_time: Duration::ZERO,
                gates: Vec::new(),
                token_scores: Vec::new(),
            }));
        }
        let Some(slot) = self.slot_of(id) else { return Ok(None) };
        self.leave(slot, End::Cancelled)
    }

    /// How residuals were reached in the last step.
    pub fn executor(&self) -> ExecutorKind {
        self.context.executor()
    }

    /// Chooses how residuals are reached: see [`GuardedContext::set_executor`].
    pub fn set_executor(&mut self, kind: ExecutorKind) {
        self.context.set_executor(kind);
    }

    /// Takes an executor of the app's own.
    pub fn set_custom_executor(&mut self, executor: Box<dyn Executor>) {
        self.context.set_custom_executor(executor);
    }

    /// Requests that run and that wait.
    pub fn load(&self) -> (usize, usize) {
        (self.slots.iter().filter(|slot| slot.running.is_some()).count(), self.waiting.len())
    }

    /// Decodes one batch of what there is to do, and tells `on_event` what came of it. Returns whether there was anything.
    ///
    /// # Errors
    /// llama.cpp can't empty a sequence. What goes wrong with a request is its own end.
    pub fn step(&mut self, mut on_event: impl FnMut(Event)) -> Result<bool, EngineError> {
        self.n_steps += 1;
        self.join()?;
        self.toggle_due(&mut on_event)?;
        self.fill()?;
        if self.batch.is_empty() {
            return Ok(false);
        }
        match self.context.decode_each(&mut self.batch) {
            Ok(ended) => {
                for (sequence, error) in ended {
                    let end = match error {
                        ContextError::Blocked { guard, gate, message, .. } => {
                            End::Blocked(Block { guard, gate, message })
                        }
                        failed => End::Failed(failed),
                    };
                    self.end(sequence.0 as usize, end, &mut on_event)?;
                }
            }
            Err(error) => {
                self.refused(error, &mut on_event)?;
                return Ok(true);
            }
        }
        for slot in 0..self.slots.len() {
            if let Some(end) = self.advance(slot, &mut on_event) {
                self.end(slot, end, &mut on_event)?;
            }
        }
        Ok(true)
    }

    /// Gives free sequences to those that wait.
    fn join(&mut self) -> Result<(), EngineError> {
        while self.slots.iter().any(|slot| slot.running.is_none()) {
            let Some((id, request, program)) = self.waiting.pop_front() else { break };
            let (slot, reused) = self.prepare(&request.prompt, program)?;
            let sampler = request.sampling.sampler(self.model.llama().n_vocab(), self.options.n_ctx);
            let text = TextStream::new(&request.stop);
            self.slots[slot].given = self.n_steps;
            let (next, tokens, row, joined, answering) = (None, 0, None, Instant::now(), None);
            self.slots[slot].running =
                Some(Running { id, request, sampler, text, reused, joined, answering, next, tokens, row });
        }
        Ok(())
    }

    /// Makes a free sequence ready for `prompt` under `program`: which, and how many tokens of the prompt it has.
    fn prepare(&mut self, prompt: &[LlamaToken], program: Arc<Program>) -> Result<(usize, usize), EngineError> {
        let free = |slot: usize| self.slots[slot].running.is_none();
        let shared: Vec<usize> = (0..self.slots.len()).map(|slot| self.shared(slot, prompt, &program)).collect();
        let longest = |slots: &mut dyn Iterator<Item = usize>| slots.max_by_key(|slot| shared[*slot]);
        let own = longest(&mut (0..self.slots.len()).filter(|slot| free(*slot))).unwrap_or_default();
        let best = longest(&mut (0..self.slots.len())).unwrap_or_default();
        // One that runs can only be copied from.
        let source = if free(best) || shared[best] < shared[own] + MIN_COPIED { own } else { best };
        let shared = shared[source];
        let oldest = |but: Option<usize>| {
            let others = (0..self.slots.len()).filter(|slot| Some(*slot) != but && free(*slot));
            others.min_by_key(|slot| self.slots[*slot].given)
        };
        // A text that goes on takes its own sequence along; one that only begins alike leaves the other where it is, if it can.
        let goes_on = free(source) && 2 * shared >= self.slots[source].tokens.len();
        // Where the source runs, there is another that is free.
        let target = oldest(Some(source)).filter(|_| !goes_on).unwrap_or(source);
        let (from, to) = (SequenceId(source as i32), SequenceId(target as i32));
        if shared >= if from == to { 1 } else { MIN_COPIED } {
            match self.context.resume(from, to, shared) {
                Ok(()) => {
                    self.slots[target].tokens.clear();
                    self.slots[target].tokens.extend_from_slice(&prompt[..shared]);
                    return Ok((target, shared));
                }
                // It can be read anew.
                Err(error) => tracing::debug!(%error, "a prefix is not used again"),
            }
        }
        let target = oldest(None).unwrap_or(target);
        self.forget(target)?;
        self.context.assign(SequenceId(target as i32), program);
        Ok((target, 0))
    }

    /// Tokens of `prompt` that a sequence has already, as they would be read under `program`. The last is always to be read: logits come of it.
    fn shared(&self, slot: usize, prompt: &[LlamaToken], program: &Arc<Program>) -> usize {
        if !self.options.reuse_prefixes || !self.runs(slot, program) {
            return 0;
        }
        let alike = self.slots[slot].tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        self.context.reusable(SequenceId(slot as i32), alike.min(prompt.len() - 1))
    }

    /// Whether the sequence runs under `program`, this very one, or did last.
    fn runs(&self, slot: usize, program: &Arc<Program>) -> bool {
        self.context.program_of(SequenceId(slot as i32)).is_some_and(|own| Arc::ptr_eq(own, program))
    }

    /// Empties a sequence.
    fn forget(&mut self, slot: usize) -> Result<(), EngineError> {
        self.slots[slot].tokens.clear();
        Ok(self.context.clear_sequence(SequenceId(slot as i32))?)
    }

    /// Sets interventions of requests whose answers have come so far.
    fn toggle_due(&mut self, on_event: &mut impl FnMut(Event)) -> Result<(), EngineError> {
        for slot in 0..self.slots.len() {
            let Some(running) = self.slots[slot].running.as_ref().filter(|running| running.next.is_some()) else {
                continue;
            };
            let due = running.request.toggles.iter().filter(|toggle| toggle.from_token == running.tokens + 1);
            let set = |toggle: &Toggle| {
                self.context.set_intervention_of(SequenceId(slot as i32), &toggle.name, toggle.setting)
            };
            if let Err(error) = due.into_iter().try_for_each(set) {
                self.end(slot, End::Failed(error), on_event)?;
            }
        }
        Ok(())
    }

    /// Answers' next tokens, then prompts.
    fn fill(&mut self) -> Result<(), EngineError> {
        self.batch.clear();
        let mut reading: Vec<usize> = Vec::new();
        for (slot, Slot { running, tokens, .. }) in self.slots.iter_mut().enumerate() {
            let Some(running) = running else { continue };
            running.row = None;
            let Some(token) = running.next.take() else {
                reading.push(slot);
                continue;
            };
            let (sequence, at) = (SequenceId(slot as i32), TokenPosition(tokens.len() as i32));
            running.row = Some(self.batch.add_generated(sequence, at, token).map_err(ContextError::from)?);
            tokens.push(token);
        }
        reading.sort_by_key(|slot| self.slots[*slot].running.as_ref().map(|running| running.id));
        let n_reading = reading.len();
        for (index, slot) in reading.into_iter().enumerate() {
            let Slot { running: Some(running), tokens, .. } = &mut self.slots[slot] else { continue };
            let room = self.options.n_batch as usize - self.batch.len();
            let share = room.div_ceil(n_reading - index);
            let rest = &running.request.prompt[tokens.len()..];
            let part = &rest[..rest.len().min(share)];
            if part.is_empty() {
                continue;
            }
            let (sequence, at) = (SequenceId(slot as i32), TokenPosition(tokens.len() as i32));
            if part.len() == rest.len() {
                running.row = Some(self.batch.add_prompt(sequence, at, part).map_err(ContextError::from)?);
            } else {
                let rest = &rest[part.len()..];
                self.batch.add_prompt_part(sequence, at, part, rest).map_err(ContextError::from)?;
            }
            tokens.extend_from_slice(part);
        }
        Ok(())
    }

    /// Takes the next token of a request from its logits. Gives its end, if it has come to it.
    fn advance(&mut self, slot: usize, on_event: &mut impl FnMut(Event)) -> Option<End> {
        let Slot { running, tokens: in_cells, .. } = &mut self.slots[slot];
        let running = running.as_mut()?;
        let row = running.row.take()?;
        running.answering.get_or_insert_with(Instant::now);
        if running.tokens >= running.request.max_tokens {
            return Some(End::Length);
        }
        let vocab = self.model.llama().vocab();
        let token = match &mut running.request.form {
            None => {
                let token = running.sampler.sample(&self.context, row);
                // Where all is banned that there is, something is chosen all the same.
                let banned = (token, f32::NEG_INFINITY);
                if running.request.sampling.logit_bias.contains(&banned) {
                    return Some(End::OutOfForm("every token is banned".into()));
                }
                token
            }
            Some(form) => {
                match sample_in(form.as_mut(), &mut running.sampler, self.context.token_data_array_ith(row)) {
                    Ok(token) => token,
                    Err(reason) => return Some(End::OutOfForm(reason)),
                }
            }
        };
        if vocab.is_eog(token) {
            return Some(End::Stop);
        }
        if let Some(form) = &mut running.request.form
            && let Err(reason) = form.accept(token)
        {
            return Some(End::OutOfForm(reason));
        }
        running.tokens += 1;
        let bytes = vocab.token_to_piece(token, false, None);
        if let Some(n) = running.request.probabilities {
            let spelt = |token: LlamaToken| vocab.token_to_piece(token, false, None);
            let (token, instead) = probabilities(self.context.get_logits_ith(row), token, n, spelt);
            on_event(Event::Token { request: running.id, token, instead });
        }
        let Streamed { text, stopped_by } = running.text.push(&bytes);
        if !text.is_empty() {
            on_event(Event::Text { request: running.id, text });
        }
        if let Some(stop) = stopped_by {
            return Some(End::StopString(stop));
        }
        if running.tokens >= running.request.max_tokens {
            return Some(End::Length);
        }
        if in_cells.len() >= self.options.n_ctx as usize {
            return Some(End::ContextFull);
        }
        running.next = Some(token);
        None
    }

    /// llama.cpp decoded nothing. Every sequence has room of its own, so this is no matter of room, and none of them can go on.
    fn refused(&mut self, error: ContextError, on_event: &mut impl FnMut(Event)) -> Result<(), EngineError> {
        let reason = error.to_string();
        let mut first = Some(error);
        for slot in 0..self.slots.len() {
            if self.slots[slot].running.is_some() {
                let again = || ContextError::Cache(reason.clone());
                self.end(slot, End::Failed(first.take().unwrap_or_else(again)), on_event)?;
            }
        }
        Ok(())
    }

    fn end(&mut self, slot: usize, end: End, on_event: &mut impl FnMut(Event)) -> Result<(), EngineError> {
        let Some(running) = &mut self.slots[slot].running else { return Ok(()) };
        let request = running.id;
        // What was held back is text of the answer, unless it was ended for what it says.
        if matches!(end, End::Stop | End::Length | End::ContextFull) {
            let text = running.text.finish();
            if !text.is_empty() {
                on_event(Event::Text { request, text });
            }
        }
        if let Some(summary) = self.leave(slot, end)? {
            on_event(Event::Ended { request, summary });
        }
        Ok(())
    }

    /// Frees a sequence, and leaves what it has read for others.
    fn leave(&mut self, slot: usize, end: End) -> Result<Option<Summary>, EngineError> {
        let Some(running) = self.slots[slot].running.take() else { return Ok(None) };
        let sequence = SequenceId(slot as i32);
        let program = self.context.program_of(sequence).map(Arc::clone);
        let decisions = self.context.gate_decisions(sequence);
        let gates = program.map(|program| readings(&program, decisions)).unwrap_or_default();
        let wanted = running.request.token_scores.then(|| self.context.token_scores(sequence));
        if matches!(end, End::Failed(_)) || !self.options.reuse_prefixes {
            self.forget(slot)?;
        }
        let now = Instant::now();
        let answering = running.answering.unwrap_or(now);
        Ok(Some(Summary {
            end,
            prompt_tokens: running.request.prompt.len(),
            reused_tokens: running.reused,
            tokens: running.tokens,
            prefill_time: answering - running.joined,
            decode_time: now - answering,
            gates,
            token_scores: wanted.unwrap_or_default(),
        }))
    }
}

/// The next token of an answer that has a form.
fn sample_in(
    form: &mut dyn Form,
    sampler: &mut LlamaSampler,
    mut candidates: LlamaTokenDataArray,
) -> Result<LlamaToken, String> {
    form.restrict(&mut candidates.data)?;
    candidates.apply_sampler(sampler);
    let chosen = candidates.selected.and_then(|index| candidates.data.get(index));
    // What biases ban may be all that the form allows.
    let chosen = chosen.filter(|chosen| chosen.logit() > f32::NEG_INFINITY).ok_or("no token can come next")?;
    sampler.accept(chosen.id());
    Ok(chosen.id())
}

/// The log-probability of `token` by its logits, `[n_vocab]`, and those of the `n` likeliest, the likeliest first.
fn probabilities(
    logits: &[f32],
    token: LlamaToken,
    n: usize,
    spelt: impl Fn(LlamaToken) -> Vec<u8>,
) -> (TokenProbability, Vec<TokenProbability>) {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    let shift = f64::from(highest) + sum.ln();
    let of = |token: LlamaToken| {
        let log_probability = (f64::from(logits[token.0 as usize]) - shift) as f32;
        TokenProbability { token, bytes: spelt(token), log_probability }
    };
    let n = n.min(logits.len());
    let mut order: Vec<i32> = (0..logits.len() as i32).collect();
    let falling = |a: &i32, b: &i32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, falling);
    }
    order.truncate(n);
    order.sort_unstable_by(falling);
    (of(token), order.into_iter().map(|token| of(LlamaToken(token))).collect())
}

fn check_shape(model: &Model, program: &Program) -> Result<(), EngineError> {
    let shape = model.shape();
    let last = shape.n_layer.saturating_sub(1);
    if let Some(point) = program.points().iter().find(|point| point.layer.0 > last) {
        return Err(EngineError::NoLayer { layer: point.layer, last });
    }
    if program.width() != shape.n_embd {
        let (guard, identity) = (program.name(), identity_of("", model.llama())?);
        let expected = format!("residuals of {} values", program.width());
        let found = format!("`{}` with {}", identity.architecture, shape.n_embd);
        return Err(EngineError::OtherModel { guard, expected, found });
    }
    Ok(())
}
