use super::{
    Adapters, BatchRow, Capture, CaptureRows, CapturedLayer, Ended, EvalCallbackParams, ExecutorKind, GgmlTable, Hook,
    HookFault, Replacement, Splitting,
};
use crate::program::{GateDecision, Program, RowKind, Setting, ToggleError, TokenBytes};
use crate::tensor::{LayerIndex, SequenceId, TokenPosition};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::kv_cache::KvCacheConversionError;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::{LlamaLoraAdapter, LlamaModel};
use llama_cpp_2::token::LlamaToken;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::Arc;

/// A llama.cpp context with a guard in its eval callback.
///
/// It owns both the context and the callback's state, so that the state outlives the context whatever the app does. It reads like
/// a [`LlamaContext`] and decodes through [`decode`](Self::decode), which tells the guard which row is which token and checks the
/// fault latch. There is no `DerefMut`: a `&mut LlamaContext` could be swapped with another context's.
///
/// The context can't outlive its model, nor be taken out of the guard:
///
/// ```compile_fail
/// # use pilotfish::hook::GuardedContext;
/// # use llama_cpp_2::context::LlamaContext;
/// fn unguard(guarded: GuardedContext<'_>) -> LlamaContext<'_> {
///     *guarded // cannot move out of dereference
/// }
/// ```
///
/// ```compile_fail
/// # use pilotfish::hook::GuardedContext;
/// fn swap<'m>(a: &mut GuardedContext<'m>, b: &mut GuardedContext<'m>) {
///     std::mem::swap(&mut **a, &mut **b) // cannot borrow as mutable: no DerefMut
/// }
/// ```
pub struct GuardedContext<'model> {
    // Dropped first: llama.cpp may call the hook until the context is freed.
    context: LlamaContext<'model>,
    hook: OwnedHook,
    splitting: Splitting,
    model: &'model LlamaModel,
}

/// A [`Hook`] on the heap that llama.cpp also has a pointer to.
struct OwnedHook(NonNull<Hook>);

// SAFETY: `Hook` is `Send`, and the pointer is the only handle but llama.cpp's, which is used on the thread that decodes.
unsafe impl Send for OwnedHook {}

impl OwnedHook {
    fn new(hook: Hook) -> Self {
        Self(NonNull::from(Box::leak(Box::new(hook))))
    }

    fn as_ref(&self) -> &Hook {
        // SAFETY: made from a box that lives until drop. llama.cpp uses it only inside `llama_decode`, which needs `&mut GuardedContext`.
        unsafe { self.0.as_ref() }
    }

    fn as_mut(&mut self) -> &mut Hook {
        // SAFETY: as in `as_ref`.
        unsafe { self.0.as_mut() }
    }
}

impl Drop for OwnedHook {
    fn drop(&mut self) {
        // SAFETY: made from a box in `new` and freed only here; the context that also points to it was dropped before.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// Why a guarded context could not be made, or a decode not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContextError {
    #[error("llama.cpp could not make a context: {0}")]
    Create(#[from] llama_cpp_2::LlamaContextLoadError),
    #[error("llama.cpp could not decode: {0}")]
    Decode(#[from] llama_cpp_2::DecodeError),
    #[error("the batch could not be filled: {0}")]
    Batch(#[from] BatchError),
    /// The guard failed, and its `on_error` says block: the decode's logits must not be used.
    #[error("guard `{guard}` failed: {fault}")]
    Fault { guard: String, fault: HookFault },
    /// A gate that blocks has fired: the sequence is to get no more tokens.
    #[error("guard `{guard}` blocked the sequence: gate `{gate}` fired{}", .message.as_ref().map(|m| format!(": {m}")).unwrap_or_default())]
    Blocked { guard: String, sequence: SequenceId, gate: String, message: Option<String> },
    #[error("llama.cpp's KV cache operation failed: {0}")]
    Cache(String),
    #[error(transparent)]
    Toggle(#[from] ToggleError),
    #[error("llama.cpp can't put the model's adapters on a context: {0}")]
    Adapters(String),
    /// Tokens of another sequence that are not what they would be in a new prompt, or no longer there.
    #[error("{asked} tokens of sequence {sequence} can't be used again: its first {reusable} can")]
    NotReusable { sequence: SequenceId, asked: usize, reusable: usize },
}

impl From<KvCacheConversionError> for ContextError {
    fn from(error: KvCacheConversionError) -> Self {
        Self::Cache(error.to_string())
    }
}

impl<'model> GuardedContext<'model> {
    /// Makes a context of `model` that runs `program`, and proves with a dry run of one token that every hook point fires.
    ///
    /// # Errors
    /// llama.cpp refuses the context, or the model's graph lacks a residual that the program needs.
    pub fn new(
        model: &'model LlamaModel,
        backend: &LlamaBackend,
        params: LlamaContextParams,
        program: Arc<Program>,
    ) -> Result<Self, ContextError> {
        let mut hook = OwnedHook::new(Hook::new(GgmlTable::linked(), program));
        let n_streams = params.n_streams();
        // SAFETY: the hook is on the heap and freed after the context (field order), nothing else uses it while the context decodes
        // (that takes `&mut self`), and it serves this one context.
        let params = unsafe { params.with_eval_hook(hook.0.as_ptr()) };
        let context = model.new_context(backend, params)?;
        let splitting = Splitting { n_streams, n_ubatch: context.n_ubatch() as usize };
        hook.as_mut().set_capacity(context.n_ctx() as usize / n_streams);
        let mut guarded = Self { context, hook, splitting, model };
        let program = Arc::clone(guarded.program());
        guarded.prepare_for(&program);
        guarded.dry_run()?;
        Ok(guarded)
    }

    /// Reads the vocabulary, once, if `program` looks for texts.
    fn prepare_for(&mut self, program: &Program) {
        if program.texts().is_empty() || self.hook.as_ref().sequences().knows_vocabulary() {
            return;
        }
        let vocab = self.model.vocab();
        let bytes = TokenBytes::new(vocab.tokens().map(|token| vocab.token_to_piece(token, true, None)));
        self.hook.as_mut().set_vocabulary(bytes);
    }

    /// Decodes one token and checks that every hook point fired. Clears the KV cache.
    fn dry_run(&mut self) -> Result<(), ContextError> {
        let mut batch = GuardedBatch::new(1);
        let bos = self.model.vocab().bos();
        batch.add_prompt(SequenceId(0), TokenPosition(0), &[if bos.0 < 0 { LlamaToken(0) } else { bos }])?;
        let outcome = self.run(&mut batch)?;
        self.clear();
        self.context.reset_timings();
        let guard = self.program().name();
        outcome.map_err(|fault| ContextError::Fault { guard, fault })
    }

    /// Decodes `batch` under the guards.
    ///
    /// # Errors
    /// [`ContextError::Decode`] from llama.cpp. [`ContextError::Fault`] if a guard failed and says block, and [`ContextError::Blocked`] if a
    /// gate blocks, for any sequence of the batch: [`decode_each`](Self::decode_each) tells which, and lets the others go on.
    pub fn decode(&mut self, batch: &mut GuardedBatch) -> Result<(), ContextError> {
        self.decode_each(batch)?.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Decodes `batch` under the guards, and tells which of its sequences have come to an end, each with [`ContextError::Fault`] or
    /// [`ContextError::Blocked`]: logits of theirs must not be used, and they are to be cleared. Those of the others may be used.
    ///
    /// # Errors
    /// [`ContextError::Decode`] from llama.cpp: it decoded nothing.
    pub fn decode_each(&mut self, batch: &mut GuardedBatch) -> Result<Vec<(SequenceId, ContextError)>, ContextError> {
        // What went wrong with the whole decode went wrong with each of its sequences.
        let _latched = self.run(batch)?;
        let hook = self.hook.as_ref();
        let ended = |sequence: &SequenceId| self.ended(*sequence).map(|error| (*sequence, error));
        Ok(hook.sequences().batch().iter().filter_map(ended).collect())
    }

    fn run(&mut self, batch: &mut GuardedBatch) -> Result<Result<(), HookFault>, ContextError> {
        for (sequence, rest) in &batch.following {
            self.hook.as_mut().follow(*sequence, &batch.rest[rest.clone()]);
        }
        self.hook.as_mut().begin(&batch.rows, &batch.tokens, self.splitting);
        let decoded = self.context.decode(&mut batch.batch);
        // A failed decode first: its hook points have not fired, and that is not the guard's fault.
        decoded?;
        Ok(self.hook.as_mut().finish())
    }

    /// Why `sequence` is to get no more tokens, if it is not.
    pub fn ended(&self, sequence: SequenceId) -> Option<ContextError> {
        Some(match self.hook.as_ref().ended(sequence)? {
            Ended::Fault { guard, fault } => ContextError::Fault { guard, fault },
            Ended::Blocked { guard, gate, message } => ContextError::Blocked { guard, sequence, gate, message },
        })
    }

    /// The program of sequences to come.
    pub fn program(&self) -> &Arc<Program> {
        self.hook.as_ref().program()
    }

    /// Runs `program` for sequences to come; those that live keep theirs. A hook point of it that this model's graph lacks is a fault of the
    /// first decode.
    pub fn set_program(&mut self, program: Arc<Program>) {
        self.prepare_for(&program);
        self.hook.as_mut().set_program(program);
    }

    /// Ends all sequences, takes `program` for those to come, and proves with a dry run of one token that every hook point of it fires.
    ///
    /// # Errors
    /// The model's graph lacks a residual that the program needs, or the program fails.
    pub fn prove(&mut self, program: Arc<Program>) -> Result<(), ContextError> {
        self.clear();
        self.set_program(program);
        self.dry_run()
    }

    /// Starts `sequence`, which has no tokens yet, with a program of its own.
    pub fn assign(&mut self, sequence: SequenceId, program: Arc<Program>) {
        self.prepare_for(&program);
        self.hook.as_mut().assign(sequence, program);
    }

    /// The program that `sequence` runs, if it lives.
    pub fn program_of(&self, sequence: SequenceId) -> Option<&Arc<Program>> {
        self.hook.as_ref().sequences().program(sequence)
    }

    /// Sets the interventions called `name` (see [`Program::with_setting`]) for sequences to come and for those that live, from their next tokens
    /// on. Nothing is loaded or compiled again, and no decode allocates for it. A sequence whose own program has no such intervention stays as it is.
    ///
    /// Cells of tokens that have been read stay what they are: what an intervention made of them remains in the KV cache. Other prompts are given
    /// none that the new setting would have made otherwise ([`reusable`](Self::reusable)).
    ///
    /// # Errors
    /// The current program has no intervention of that name, or can't be set so, nor can a living one; nothing is changed then.
    pub fn set_intervention(&mut self, name: &str, setting: Setting) -> Result<(), ContextError> {
        let current = Arc::clone(self.program());
        let current = self.variant(&current, name, setting)?;
        let mut turned = Vec::new();
        for sequence in self.hook.as_ref().sequences().live().collect::<Vec<_>>() {
            let Some(program) = self.program_of(sequence).filter(|program| program.has_intervention(name)) else {
                continue;
            };
            let program = Arc::clone(program);
            turned.push((sequence, self.variant(&program, name, setting)?));
        }
        self.hook.as_mut().set_program(current);
        turned.into_iter().for_each(|(sequence, program)| self.turn(sequence, program));
        Ok(())
    }

    /// As [`set_intervention`](Self::set_intervention), for one sequence; one that does not live begins so.
    ///
    /// # Errors
    /// As there, of the sequence's program.
    pub fn set_intervention_of(
        &mut self,
        sequence: SequenceId,
        name: &str,
        setting: Setting,
    ) -> Result<(), ContextError> {
        let own = self.program_of(sequence).unwrap_or(self.program());
        let program = Arc::clone(own);
        let program = self.variant(&program, name, setting)?;
        if !self.hook.as_mut().turn(sequence, Arc::clone(&program)) {
            self.hook.as_mut().assign(sequence, program);
        }
        Ok(())
    }

    /// Has `sequence` go on under `program`, a [variant](Self::variant) of its own.
    pub(crate) fn turn(&mut self, sequence: SequenceId, program: Arc<Program>) {
        self.hook.as_mut().turn(sequence, program);
    }

    /// `program` with the interventions called `name` set, for [`assign`](Self::assign) and [`set_program`](Self::set_program): the very same
    /// program whenever it comes to the same strengths.
    ///
    /// # Errors
    /// As of [`Program::with_setting`].
    pub fn variant(
        &mut self,
        program: &Arc<Program>,
        name: &str,
        setting: Setting,
    ) -> Result<Arc<Program>, ContextError> {
        Ok(self.hook.as_mut().variant(program, name, setting)?)
    }

    /// Every gate's decision for `sequence`, in the order of its program; `None` before there is one.
    pub fn gate_decisions(&self, sequence: SequenceId) -> Vec<Option<GateDecision>> {
        let sequences = self.hook.as_ref().sequences();
        let program = sequences.program(sequence).unwrap_or(sequences.current());
        (0..program.gates().len()).map(|gate| sequences.decision(sequence, gate)).collect()
    }

    /// What each gate read at each token of `sequence`: see [`Sequences::token_scores`](crate::program::Sequences::token_scores).
    pub fn token_scores(&self, sequence: SequenceId) -> Vec<Vec<Option<f64>>> {
        self.hook.as_ref().sequences().token_scores(sequence)
    }

    /// Empties the KV cache and forgets every sequence.
    pub fn clear(&mut self) {
        self.context.clear_kv_cache();
        self.hook.as_mut().clear_all();
        self.hook.as_mut().scrubbed(|_| true);
    }

    /// Removes `sequence` from the KV cache and forgets its gates, and what went wrong with it.
    ///
    /// # Errors
    /// llama.cpp can't remove it.
    pub fn clear_sequence(&mut self, sequence: SequenceId) -> Result<(), ContextError> {
        let id = u32::try_from(sequence.0).map_err(|_| ContextError::Cache(format!("no sequence {sequence}")))?;
        self.context.clear_kv_cache_seq(Some(id), None, None)?;
        self.hook.as_mut().clear(sequence);
        if self.hook.as_ref().is_tainted(sequence) {
            self.scrub(sequence)?;
        }
        Ok(())
    }

    /// Takes what is no number out of the cells of `sequence`, which has been cleared. llama.cpp leaves the values of cleared cells where they are,
    /// and its attention may multiply them by 0, which leaves NaN of whatever comes to lie in the same stream.
    fn scrub(&mut self, sequence: SequenceId) -> Result<(), KvCacheConversionError> {
        let n_streams = self.splitting.n_streams as i32;
        let sane = (0..n_streams).map(SequenceId).find(|other| !self.hook.as_ref().is_tainted(*other));
        if self.hook.as_ref().sequences().is_empty() {
            // Nobody's cells are lost.
            self.clear();
        } else if let Some(sane) = sane.filter(|_| n_streams > 1) {
            // A copy takes the whole stream, the cells of no sequence too.
            self.context.copy_kv_cache_seq(sane.0, sequence.0, None, None)?;
            self.context.clear_kv_cache_seq(Some(sequence.0.unsigned_abs()), None, None)?;
            self.hook.as_mut().scrubbed(|tainted| tainted == sequence);
        }
        // In one stream with others it stays, until they are gone: they have it in their attention as it is.
        Ok(())
    }

    /// How many of the first `n_tokens` tokens of `sequence` a new prompt that begins with these may have from it, under the same program: see
    /// [`resume`](Self::resume). Tokens of an answer are among them where the program has treated them as it would in a prompt. Those at the end
    /// are not, if a text that the program looks for may begin with them: what they count as depends on what follows.
    pub fn reusable(&self, sequence: SequenceId, n_tokens: usize) -> usize {
        // Cells that are cut off keep their values, and a copy of a stream has them too.
        if self.hook.as_ref().is_tainted(sequence) {
            return 0;
        }
        // A cache that forgets (a sliding window that is not kept whole) has no beginning any more.
        let there = match self.context.kv_cache_seq_pos_min(sequence.0) {
            0 => usize::try_from(self.context.kv_cache_seq_pos_max(sequence.0) + 1).unwrap_or(0),
            _ => 0,
        };
        self.hook.as_ref().sequences().reusable(sequence, n_tokens.min(there))
    }

    /// Makes of `to` a new sequence under the program of `from` whose prompt begins with the first `n_tokens` tokens of `from`: their cells are
    /// not computed again, and gates have read them. The two may be the same sequence.
    ///
    /// # Errors
    /// [`ContextError::NotReusable`]; nothing is changed then. [`ContextError::Cache`] where llama.cpp can't cut the sequence there, which
    /// leaves `to` empty.
    pub fn resume(&mut self, from: SequenceId, to: SequenceId, n_tokens: usize) -> Result<(), ContextError> {
        let refused = |reusable| ContextError::NotReusable { sequence: from, asked: n_tokens, reusable };
        let reusable = self.reusable(from, n_tokens);
        let [Ok(id), Ok(at)] = [u32::try_from(to.0), u32::try_from(n_tokens)] else { return Err(refused(reusable)) };
        if n_tokens > reusable || !self.hook.as_mut().resume(from, to, n_tokens) {
            return Err(refused(reusable));
        }
        if from != to {
            self.context.clear_kv_cache_seq(Some(id), None, None)?;
            // The whole of it: between two KV streams llama.cpp copies nothing less.
            self.context.copy_kv_cache_seq(from.0, to.0, None, None)?;
        }
        if self.context.clear_kv_cache_seq(Some(id), Some(at), None)? {
            return Ok(());
        }
        self.clear_sequence(to)?;
        Err(ContextError::Cache(format!("sequence {to} can't be cut at token {n_tokens}")))
    }

    /// Prepares `sequence` for another turn's prompt: its gates read anew, and one that has fired stays fired.
    pub fn begin_prompt(&mut self, sequence: SequenceId) {
        self.hook.as_mut().begin_prompt(sequence);
    }

    /// Copies the residual rows of `layers`, as they are after the program, in the decodes that follow.
    pub fn capture(&mut self, layers: impl IntoIterator<Item = LayerIndex>) {
        self.capture_rows(layers, CaptureRows::All);
    }

    /// As [`capture`](Self::capture), of some rows alone.
    pub fn capture_rows(&mut self, layers: impl IntoIterator<Item = LayerIndex>, which: CaptureRows) {
        self.hook.as_mut().set_capture(Some(Capture::new(layers, which)));
    }

    /// Rows captured since the last call, by layer.
    pub fn take_captured(&mut self) -> Vec<CapturedLayer> {
        self.hook.as_mut().take_captured()
    }

    /// Replaces rows of a residual before the program meets it, in the decodes that follow, until it is told otherwise: for measuring what a model
    /// makes of another residual. A row of a batch that is to be replaced and does not come is a fault of the decode.
    pub fn replace(&mut self, replacement: Option<Replacement>) {
        self.hook.as_mut().set_replacement(replacement);
    }

    /// How residuals were reached in the last decode: what the chosen executor could do with where they lie.
    pub fn executor(&self) -> ExecutorKind {
        self.hook.as_ref().executor_kind()
    }

    /// How the residual of each layer was reached in the last decode: before any other that is the dry run, which has been through all hook
    /// points. A model's layers may lie in several places.
    pub fn executors(&self) -> impl Iterator<Item = (LayerIndex, ExecutorKind)> {
        self.hook.as_ref().executors()
    }

    /// Chooses how residuals are reached; the default is in place where they lie in host memory, and on their device where they do not.
    pub fn set_executor(&mut self, kind: ExecutorKind) {
        self.hook.as_mut().set_executor_kind(kind);
    }

    /// Takes an executor of the app's own.
    pub fn set_custom_executor(&mut self, executor: Box<dyn super::Executor>) {
        self.hook.as_mut().set_executor(executor);
    }

    /// Sets a LoRA adapter, as `LlamaContext::lora_adapter_set`. What has been read up to now is not [reusable](Self::reusable) any more.
    ///
    /// # Errors
    /// llama.cpp refuses the adapter.
    pub fn lora_adapter_set(&mut self, adapter: &mut LlamaLoraAdapter, scale: f32) -> Result<(), ContextError> {
        self.hook.as_mut().forget_rows();
        self.context.lora_adapter_set(adapter, scale).map_err(|error| ContextError::Adapters(error.to_string()))
    }

    /// Puts the adapters of its model on a context that has read nothing yet.
    ///
    /// # Errors
    /// llama.cpp refuses them.
    pub(crate) fn put_on(&mut self, adapters: &Adapters) -> Result<(), ContextError> {
        self.hook.as_mut().forget_rows();
        adapters.put_on(&mut self.context)
    }
}

impl<'model> Deref for GuardedContext<'model> {
    type Target = LlamaContext<'model>;

    fn deref(&self) -> &Self::Target {
        &self.context
    }
}

/// Why a token could not be added to a batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    #[error("a batch of {capacity} tokens has no room for {wanted}")]
    Full { capacity: usize, wanted: usize },
    #[error("sequence {sequence} has no room for position {start} + {count}")]
    Position { sequence: SequenceId, start: i32, count: usize },
}

/// A llama.cpp batch whose rows the guard knows: which sequence and position each token has, and where a prompt ends.
pub struct GuardedBatch {
    batch: LlamaBatch<'static>,
    rows: Vec<BatchRow>,
    /// Token ids of `rows`.
    tokens: Vec<i32>,
    /// Which of `rest` follow in the prompts of which sequences.
    following: Vec<(SequenceId, Range<usize>)>,
    rest: Vec<i32>,
    capacity: usize,
}

impl GuardedBatch {
    /// # Panics
    /// If `capacity` is above `i32::MAX`.
    pub fn new(capacity: usize) -> Self {
        let (rows, tokens) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        let (following, rest) = (Vec::new(), Vec::new());
        Self { batch: LlamaBatch::new(capacity, 1), rows, tokens, following, rest, capacity }
    }

    pub fn clear(&mut self) {
        self.batch.clear();
        self.rows.clear();
        self.tokens.clear();
        self.following.clear();
        self.rest.clear();
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Adds one token with everything said of it. Returns its index in the batch, by which its logits are asked for.
    ///
    /// # Errors
    /// The batch is full.
    pub fn add(&mut self, token: LlamaToken, row: BatchRow) -> Result<i32, BatchError> {
        let index = self.rows.len();
        self.batch
            .add(token, row.position.0, &[row.sequence.0], row.output)
            .map_err(|_| BatchError::Full { capacity: self.capacity, wanted: index + 1 })?;
        self.rows.push(row);
        self.tokens.push(token.0);
        Ok(index as i32)
    }

    /// Adds `tokens`, the whole prompt of `sequence` or the last part of it: gates decide at its last token, whose logits are asked
    /// for. Returns that token's index.
    ///
    /// # Errors
    /// The batch is full.
    pub fn add_prompt(
        &mut self,
        sequence: SequenceId,
        start: TokenPosition,
        tokens: &[LlamaToken],
    ) -> Result<i32, BatchError> {
        self.add_tokens(sequence, start, tokens, true)
    }

    /// Adds `tokens`, a part of the prompt of `sequence` that `rest` will follow: all that is left of the prompt, or nothing where that is not
    /// known yet.
    ///
    /// A guard that acts on the tokens of a text sees by `rest` whether the text goes on there. Where it is not known, tokens at the end of the
    /// part that the text may begin with count as its own.
    ///
    /// # Errors
    /// The batch is full.
    pub fn add_prompt_part(
        &mut self,
        sequence: SequenceId,
        start: TokenPosition,
        tokens: &[LlamaToken],
        rest: &[LlamaToken],
    ) -> Result<i32, BatchError> {
        let last = self.add_tokens(sequence, start, tokens, false)?;
        self.follow(sequence, rest);
        Ok(last)
    }

    /// Says that `rest`, all that is left of its prompt, will follow the rows of `sequence` in this batch, which were added one by one:
    /// [`add_prompt_part`](Self::add_prompt_part) says it by itself.
    pub fn follow(&mut self, sequence: SequenceId, rest: &[LlamaToken]) {
        self.following.retain(|(other, _)| *other != sequence);
        if !rest.is_empty() {
            let start = self.rest.len();
            self.rest.extend(rest.iter().map(|token| token.0));
            self.following.push((sequence, start..self.rest.len()));
        }
    }

    /// Adds a token of the answer. Returns its index.
    ///
    /// # Errors
    /// The batch is full.
    pub fn add_generated(
        &mut self,
        sequence: SequenceId,
        position: TokenPosition,
        token: LlamaToken,
    ) -> Result<i32, BatchError> {
        self.add(token, BatchRow { sequence, position, kind: RowKind::Generated, output: true })
    }

    fn add_tokens(
        &mut self,
        sequence: SequenceId,
        start: TokenPosition,
        tokens: &[LlamaToken],
        ends: bool,
    ) -> Result<i32, BatchError> {
        if self.rows.len() + tokens.len() > self.capacity {
            return Err(BatchError::Full { capacity: self.capacity, wanted: self.rows.len() + tokens.len() });
        }
        let mut last = -1;
        for (offset, token) in tokens.iter().enumerate() {
            let position = i32::try_from(offset)
                .ok()
                .and_then(|offset| start.0.checked_add(offset))
                .ok_or(BatchError::Position { sequence, start: start.0, count: tokens.len() })?;
            let output = ends && offset + 1 == tokens.len();
            let kind = if output { RowKind::PromptEnd } else { RowKind::Prompt };
            last = self.add(*token, BatchRow { sequence, position: TokenPosition(position), kind, output })?;
        }
        Ok(last)
    }
}
