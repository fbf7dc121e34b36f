use super::capture::{Capture, CapturedLayer, Replacement};
use super::executor::{AutoExecutor, Executor, ExecutorKind, HostExecutor};
use super::rows::{BatchRow, GraphInputs, RowTracker, Splitting};
use super::table::{GgmlTable, RawTensor, Tensor, read_i32};
use super::{CopyExecutor, DeviceExecutor, Ended, HookFault};
use crate::guard::OnError;
use crate::program::{Checkpoint, Program, Sequences, Setting, ToggleError, TokenBytes, panic_message};
use crate::tensor::{LayerIndex, SequenceId};
use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The name that llama.cpp's graphs give the residual after block `L`: `l_out-L`.
const RESIDUAL_PREFIX: &[u8] = b"l_out-";

/// The name that they give the token ids.
const TOKENS: &CStr = c"inp_tokens";

/// State behind the eval callback of one context: its sequences with their programs and gates, what it knows of the batch, and the fault
/// latches.
///
/// A context's callback and its user data are fixed when it is made, so a program is swapped by changing what lies behind them.
pub struct Hook {
    table: GgmlTable,
    sequences: Sequences,
    executor: Box<dyn Executor>,
    /// Layers whose residual is asked for: those of the decode's programs and of the capture, in order. On a GPU llama.cpp uses a graph
    /// again only while this stays the same.
    wanted: Vec<LayerIndex>,
    /// Sequences that failed, each with what went wrong first.
    failed: Vec<(SequenceId, HookFault)>,
    /// Sequences whose cells may hold what is no number, whatever their guards say of faults.
    tainted: Vec<SequenceId>,
    capture: Option<Capture>,
    replacement: Option<Replacement>,
    /// Rows that were replaced in this decode.
    n_replaced: usize,
    rows: RowTracker,
    micro_batch: MicroBatch,
    /// Layers whose residual came in this decode, and how it was reached where it was guarded.
    fired: Vec<Fired>,
    /// What went wrong with the whole decode.
    fault: Option<HookFault>,
    /// What went wrong at a layer with all rows at once: with the sequences that are guarded there.
    layer_faults: Vec<(LayerIndex, HookFault)>,
    working_on: Option<LayerIndex>,
}

#[derive(Debug, Clone, Copy)]
struct Fired {
    layer: LayerIndex,
    executor: Option<ExecutorKind>,
}

/// Finds where a micro-batch begins in the stream of nodes, and which positions it has.
#[derive(Debug, Default)]
struct MicroBatch {
    /// Layer of the last rotary embedding seen, and whether a residual was seen after it: a rotary embedding of the same or a lower
    /// layer then belongs to the next micro-batch.
    rope_layer: Option<u32>,
    residual_since: bool,
    /// Positions and tokens of the micro-batch. On a device positions are read with the first residual, when the backend is synchronised.
    inputs: GraphInputs,
    unread_positions: Option<*const RawTensor>,
    /// Whether a rotary embedding announced a micro-batch whose first residual has not come yet.
    announced: bool,
    last_layer: Option<LayerIndex>,
    /// Layer of the last residual asked about, and the rows of the first one of this micro-batch: it has them all, where a later one
    /// may be the model's last, with only the rows whose logits were asked for.
    asked_layer: Option<LayerIndex>,
    n_rows: usize,
}

// SAFETY: the only field that is not `Send` is a tensor pointer in `MicroBatch`, which is set and used within one `llama_decode` on
// the thread that runs it, and dropped at the start of the next (`begin`).
unsafe impl Send for Hook {}

impl Hook {
    pub fn new(table: GgmlTable, program: Arc<Program>) -> Self {
        Self {
            table,
            sequences: Sequences::new(program),
            executor: Box::<AutoExecutor>::default(),
            wanted: Vec::new(),
            failed: Vec::new(),
            tainted: Vec::new(),
            capture: None,
            replacement: None,
            n_replaced: 0,
            rows: RowTracker::default(),
            micro_batch: MicroBatch::default(),
            fired: Vec::new(),
            fault: None,
            layer_faults: Vec::new(),
            working_on: None,
        }
    }

    /// Takes another way to reach the residual. The default is [`AutoExecutor`].
    pub fn set_executor(&mut self, executor: Box<dyn Executor>) {
        self.executor = executor;
    }

    pub fn executor_kind(&self) -> ExecutorKind {
        self.executor.kind()
    }

    /// How the residual of each layer was reached in the last decode. A model's layers may lie in several places.
    pub fn executors(&self) -> impl Iterator<Item = (LayerIndex, ExecutorKind)> {
        self.fired.iter().filter_map(|fired| Some((fired.layer, fired.executor?)))
    }

    /// Takes `kind` of executor.
    pub fn set_executor_kind(&mut self, kind: ExecutorKind) {
        self.executor = match kind {
            ExecutorKind::Host => Box::<HostExecutor>::default(),
            ExecutorKind::Copy => Box::<CopyExecutor>::default(),
            ExecutorKind::Device => Box::<DeviceExecutor>::default(),
        };
    }

    /// The program of sequences to come.
    pub fn program(&self) -> &Arc<Program> {
        self.sequences.current()
    }

    /// Runs `program` for sequences to come. Those that live keep theirs.
    pub fn set_program(&mut self, program: Arc<Program>) {
        self.sequences.set_current(program);
    }

    /// Starts `sequence` with a program of its own; anything known of it is forgotten.
    pub fn assign(&mut self, sequence: SequenceId, program: Arc<Program>) {
        self.clear(sequence);
        self.sequences.assign(sequence, program);
    }

    pub fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    /// `program` with an intervention set: see [`Sequences::variant`].
    ///
    /// # Errors
    /// As there.
    pub fn variant(
        &mut self,
        program: &Arc<Program>,
        name: &str,
        setting: Setting,
    ) -> Result<Arc<Program>, ToggleError> {
        self.sequences.variant(program, name, setting)
    }

    /// Has `sequence` go on under a variant of its program: see [`Sequences::turn`].
    pub fn turn(&mut self, sequence: SequenceId, program: Arc<Program>) -> bool {
        self.sequences.turn(sequence, program)
    }

    /// Prepares `sequence` for a further prompt: its gates read anew, and one that has fired stays fired.
    pub fn begin_prompt(&mut self, sequence: SequenceId) {
        self.sequences.begin_prompt(sequence);
    }

    /// Forgets `sequence`, what went wrong with it too.
    pub fn clear(&mut self, sequence: SequenceId) {
        self.sequences.clear(sequence);
        self.failed.retain(|(failed, _)| *failed != sequence);
    }

    pub fn clear_all(&mut self) {
        self.sequences.clear_all();
        self.failed.clear();
    }

    /// Fires every gate of `sequence`, which lives: where its cells hold tokens that no gate has read. See [`Sequences::fire`].
    pub fn fire(&mut self, sequence: SequenceId) {
        self.sequences.fire(sequence);
    }

    /// Says that rows of `sequence` from number `n` on lie elsewhere now: none of them is used for another prompt.
    pub fn forget_rows_from(&mut self, sequence: SequenceId, n: usize) {
        self.sequences.forget_rows_from(sequence, n);
    }

    /// Whether it could not be told in the last decode which row is whose: its gates have fired then.
    pub fn is_uncertain(&self) -> bool {
        self.rows.is_uncertain()
    }

    /// What `sequence` is before a decode: see [`Sequences::checkpoint`]. With it what went wrong with it.
    pub fn checkpoint(&self, sequence: SequenceId, whole: bool) -> (Checkpoint, Option<HookFault>) {
        (self.sequences.checkpoint(sequence, whole), self.fault_of(sequence).cloned())
    }

    /// Makes of `sequence` what it was before a decode that has come to nothing.
    pub fn restore(&mut self, sequence: SequenceId, (checkpoint, fault): (Checkpoint, Option<HookFault>)) {
        self.sequences.restore(sequence, checkpoint);
        self.failed.retain(|(failed, _)| *failed != sequence);
        self.failed.extend(fault.map(|fault| (sequence, fault)));
    }

    /// Makes of `to` what `from` is: see [`Sequences::copy`]. What went wrong with the one went wrong with the other.
    pub fn copy(&mut self, from: SequenceId, to: SequenceId) {
        if from == to {
            return;
        }
        self.sequences.copy(from, to);
        self.failed.retain(|(failed, _)| *failed != to);
        self.failed.extend(self.fault_of(from).cloned().map(|fault| (to, fault)));
    }

    /// Makes of `to` a new sequence whose prompt begins with the first `n_rows` rows of `from`: see [`Sequences::resume`]. Returns whether that
    /// can be.
    pub fn resume(&mut self, from: SequenceId, to: SequenceId, n_rows: usize) -> bool {
        let can = self.sequences.resume(from, to, n_rows);
        if can {
            self.failed.retain(|(failed, _)| *failed != to);
        }
        can
    }

    /// Has `sequence`, whose next prompt begins now, go on under another program: see [`Sequences::go_on_under`]. Returns whether that can be.
    pub fn go_on_under(&mut self, sequence: SequenceId, program: Arc<Program>, is_resumed: bool) -> bool {
        self.sequences.go_on_under(sequence, program, is_resumed)
    }

    /// Says that the cells of such sequences hold numbers alone: they were overwritten, not only cleared.
    pub fn scrubbed(&mut self, sequence: impl Fn(SequenceId) -> bool) {
        self.tainted.retain(|tainted| !sequence(*tainted));
    }

    /// Whether something has gone wrong with `sequence` since its cells were [scrubbed](Self::scrubbed): what is no number may lie there, cleared
    /// or not, and llama.cpp's attention multiplies cells that it masks by 0.
    pub fn is_tainted(&self, sequence: SequenceId) -> bool {
        self.tainted.contains(&sequence)
    }

    /// Says that the model has become another: see [`Sequences::forget_rows`].
    pub fn forget_rows(&mut self) {
        self.sequences.forget_rows();
    }

    /// Says what tokens are, by their ids, for programs that act on a text's tokens. Where it is not known, nor the ids of a batch's tokens, they act
    /// on all tokens of prompts.
    pub fn set_vocabulary(&mut self, vocabulary: TokenBytes) {
        self.sequences.set_vocabulary(vocabulary);
    }

    /// Says which token ids follow those of the next decode in the prompt of `sequence`: see [`Sequences::follow`].
    pub fn follow(&mut self, sequence: SequenceId, rest: &[i32]) {
        self.sequences.follow(sequence, rest);
    }

    /// Says how many rows a sequence may have, so that no decode needs memory for what is kept of them.
    pub fn set_capacity(&mut self, n_rows: usize) {
        self.sequences.set_capacity(n_rows);
    }

    /// What went wrong with `sequence` since it was cleared. Nothing that was decoded for it is to be used then.
    pub fn fault_of(&self, sequence: SequenceId) -> Option<&HookFault> {
        self.failed.iter().find_map(|(failed, fault)| (*failed == sequence).then_some(fault))
    }

    /// Why `sequence` is to get no more tokens, if it is not.
    pub fn ended(&self, sequence: SequenceId) -> Option<Ended> {
        if let Some(fault) = self.fault_of(sequence) {
            let guard = self.sequences.program(sequence).map(|program| program.name()).unwrap_or_default();
            return Some(Ended::Fault { guard, fault: fault.clone() });
        }
        let (program, gate) = self.sequences.blocked_by(sequence)?;
        let guard = &program.guards()[gate.guard];
        let (gate, message) = (gate.name.clone(), guard.message.clone());
        Some(Ended::Blocked { guard: guard.name.clone(), gate, message })
    }

    pub fn set_capture(&mut self, capture: Option<Capture>) {
        self.capture = capture;
    }

    /// Rows captured since the last call, by layer.
    pub fn take_captured(&mut self) -> Vec<CapturedLayer> {
        self.capture.as_mut().map(Capture::take).unwrap_or_default()
    }

    /// Replaces rows of a residual in the decodes that follow, until it is told otherwise. A row of a batch that is to be replaced and does not
    /// come, or can't be told from others, is a fault of the decode.
    pub fn set_replacement(&mut self, replacement: Option<Replacement>) {
        self.replacement = replacement;
    }

    /// Prepares for one `llama_decode` of `batch`, whose token ids are `tokens` (as long, or empty where they are not known), on a context
    /// that cuts batches by `splitting`.
    pub fn begin(&mut self, batch: &[BatchRow], tokens: &[i32], splitting: Splitting) {
        self.rows.begin(batch, tokens, splitting);
        let rows = batch.iter().map(|row| (row.sequence, row.position, row.kind));
        self.sequences.begin(rows.clone());
        self.sequences.mark_texts(rows, tokens, self.rows.marks_mut());
        self.wanted.clear();
        for program in self.sequences.programs() {
            self.wanted.extend(program.points().iter().map(|point| point.layer));
        }
        self.wanted.extend(self.capture.iter().flat_map(Capture::layers));
        self.wanted.extend(self.replacement.iter().map(Replacement::layer));
        self.wanted.sort_unstable();
        self.wanted.dedup();
        self.micro_batch = MicroBatch { inputs: std::mem::take(&mut self.micro_batch.inputs), ..Default::default() };
        self.micro_batch.inputs.positions.clear();
        self.micro_batch.inputs.tokens.clear();
        self.fired.clear();
        self.fault = None;
        self.layer_faults.clear();
        self.n_replaced = 0;
        self.working_on = None;
    }

    /// Whether residuals are only read in the decode that has begun: then it is no matter when they are shown, as long as they are what they were.
    pub fn only_reads(&self) -> bool {
        let rows = self.rows.batch().iter().map(|row| (row.sequence, row.kind));
        self.replacement.is_none() && !self.sequences.may_act(rows)
    }

    /// Layers whose residual is asked for in the decode that has begun, in order.
    pub fn wanted(&self) -> &[LayerIndex] {
        &self.wanted
    }

    /// Ends a decode: fires the gates of sequences that it could not tell apart, and latches what went wrong for the sequences that it
    /// went wrong with. [`fault_of`](Self::fault_of) then tells of each; for one whose guards say `pass` a warning is all.
    ///
    /// # Errors
    /// What went wrong first, whatever guards say of errors: with the whole decode, which is latched for every sequence of the batch, or with
    /// some of them (a hook point of theirs that did not fire, too).
    pub fn finish(&mut self) -> Result<(), HookFault> {
        if self.rows.is_uncertain() {
            self.sequences.fire_batch();
        }
        let fired = |layer: &LayerIndex| self.fired.iter().any(|fired| fired.layer == *layer);
        let missing = |layer| HookFault::MissingHookPoint { layer };
        let uncaptured = || self.capture.as_ref()?.layers().find(|layer| !fired(layer));
        let whole = self.fault.take().or_else(|| uncaptured().map(missing)).or_else(|| self.unreplaced());
        let certain = !self.rows.is_uncertain();
        let mut first = whole.clone();
        for index in 0..self.sequences.batch().len() {
            let sequence = self.sequences.batch()[index];
            let own = self.sequences.fault(sequence);
            let own = own.map(|(layer, source)| HookFault::Row { layer: *layer, source: source.clone() });
            let of_layers = || {
                let mut points = self.sequences.program(sequence)?.points().iter().map(|point| point.layer);
                points.find_map(|layer| match self.layer_faults.iter().find(|(failed, _)| *failed == layer) {
                    Some((_, fault)) => Some(fault.clone()),
                    None => (!fired(&layer)).then(|| missing(layer)),
                })
            };
            let fault = own.or_else(|| whole.clone()).or_else(of_layers);
            self.sequences.finish(sequence, certain && fault.is_none());
            let Some(fault) = fault else { continue };
            if !self.tainted.contains(&sequence) {
                self.tainted.push(sequence);
            }
            first.get_or_insert_with(|| fault.clone());
            let passes = self.sequences.program(sequence).is_some_and(|program| program.on_error() == OnError::Pass);
            if passes {
                tracing::warn!(%sequence, %fault, "unguarded decode: on_error is `pass`");
                self.sequences.forget_fault(sequence);
            } else if self.fault_of(sequence).is_none() {
                self.failed.push((sequence, fault));
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// llama.cpp's `cb_eval`. `user_data` is a `*mut Hook`.
    ///
    /// # Safety
    /// `user_data` must point to a [`Hook`] that nothing else uses while llama.cpp decodes, and `tensor` to a tensor of the llama.cpp
    /// that the hook's table belongs to.
    pub unsafe extern "C" fn callback(tensor: *mut RawTensor, ask: bool, user_data: *mut c_void) -> bool {
        // SAFETY: guaranteed by the caller.
        let hook = unsafe { &mut *user_data.cast::<Self>() };
        let table = hook.table;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the tensor is valid for this call, which `tensor` does not outlive.
            let tensor = unsafe { Tensor::new(tensor, &table) };
            if ask {
                return Ok(hook.asked(&tensor));
            }
            hook.shown(tensor)?;
            hook.working_on = None;
            Ok(true)
        }));
        match outcome {
            Ok(Ok(answer)) => answer,
            Ok(Err(fault)) => hook.latch(fault),
            Err(payload) => {
                let message = panic_message(&*payload);
                hook.latch(HookFault::Panic { layer: hook.working_on, message })
            }
        }
    }

    /// Takes a fault of all rows at once, and answers llama.cpp: stop, or go on to logits that some sequences may use. Those may that are not
    /// guarded at the layer where it happened, and those whose guards let it pass.
    fn latch(&mut self, fault: HookFault) -> bool {
        tracing::debug!(%fault, "guard fault");
        let captured = |layer| self.capture.as_ref().is_some_and(|capture| capture.has(layer));
        let replaced = |layer| self.replacement.as_ref().is_some_and(|replacement| replacement.layer() == layer);
        let layer = fault.layer().filter(|layer| !captured(*layer) && !replaced(*layer));
        let mut programs = self.sequences.batch().iter().filter_map(|sequence| self.sequences.program(*sequence));
        let goes_on = programs.any(|program| {
            program.on_error() == OnError::Pass || layer.is_some_and(|layer| program.point(layer).is_none())
        });
        match layer {
            Some(layer) => self.layer_faults.push((layer, fault)),
            None => drop(self.fault.get_or_insert(fault)),
        }
        goes_on
    }

    /// What is wrong if not all rows of this decode were replaced that were to be.
    fn unreplaced(&self) -> Option<HookFault> {
        let replacement = self.replacement.as_ref()?;
        let named = self.rows.batch().iter().filter(|row| replacement.has(row.sequence, row.position)).count();
        (named != self.n_replaced).then(|| HookFault::Residual {
            layer: replacement.layer(),
            reason: format!("{named} rows of the batch were to be replaced, {} were", self.n_replaced),
        })
    }

    /// Whether llama.cpp is to stop after this node and show it.
    fn asked(&mut self, tensor: &Tensor<'_>) -> bool {
        let name = tensor.name();
        if let Some(layer) = residual_layer(name) {
            self.micro_batch.residual_since = true;
            if self.micro_batch.asked_layer.replace(layer).is_none_or(|last| layer <= last) {
                self.micro_batch.n_rows = tensor.n_rows();
            }
            return self.fault.is_none() && self.wants(layer);
        }
        match layer_suffix(name) {
            Some(layer) if self.micro_batch.may_begin_at(layer) && tensor.is_rope() => self.announce(layer, tensor),
            None if tensor.is_row_lookup() => self.read_tokens(tensor),
            _ => {}
        }
        false
    }

    fn wants(&self, layer: LayerIndex) -> bool {
        self.wanted.binary_search(&layer).is_ok()
    }

    /// Takes note of a rotary embedding: the first one of a micro-batch tells its positions.
    fn announce(&mut self, layer: u32, rope: &Tensor<'_>) {
        let begins = self.micro_batch.rope_layer.is_none_or(|last| self.micro_batch.residual_since && layer <= last);
        self.micro_batch.rope_layer = Some(layer);
        self.micro_batch.residual_since = false;
        if !begins {
            return;
        }
        self.micro_batch.announced = true;
        self.micro_batch.inputs.positions.clear();
        self.micro_batch.unread_positions = rope.second_source();
        // Inputs are set before the graph runs, and their memory may be used again after their last reader, so read them now where
        // they lie on the host.
        if let Some(source) = self.micro_batch.unread_positions
            // SAFETY: `source` is a source of the tensor that llama.cpp is showing.
            && unsafe { !self.table.host_data(source).is_null() }
        {
            self.read_positions();
        }
    }

    /// Takes the token ids of the micro-batch from the lookup of their embeddings, where they lie in host memory.
    fn read_tokens(&mut self, lookup: &Tensor<'_>) {
        let Some(source) = lookup.second_source() else { return };
        // SAFETY: `source` is a source of the tensor that llama.cpp is showing, an input whose data is set before the graph runs.
        let read = unsafe {
            CStr::from_ptr((self.table.name)(source)) != TOKENS
                || !self.table.host_data(source).is_null()
                    && read_i32(&self.table, source, &mut self.micro_batch.inputs.tokens)
        };
        if !read {
            self.micro_batch.inputs.tokens.clear();
        }
    }

    fn read_positions(&mut self) {
        if let Some(source) = self.micro_batch.unread_positions.take() {
            // SAFETY: `source` is an input of the graph that this decode is computing, and its data is set.
            if unsafe { !read_i32(&self.table, source, &mut self.micro_batch.inputs.positions) } {
                self.micro_batch.inputs.positions.clear();
            }
        }
    }

    /// Guards a residual that has just been computed.
    fn shown(&mut self, mut tensor: Tensor<'_>) -> Result<(), HookFault> {
        let Some(layer) = residual_layer(tensor.name()) else { return Ok(()) };
        if self.fault.is_some() {
            return Ok(());
        }
        self.working_on = Some(layer);
        let fired = match self.fired.iter().position(|fired| fired.layer == layer) {
            Some(fired) => fired,
            None => {
                self.fired.push(Fired { layer, executor: None });
                self.fired.len() - 1
            }
        };

        let width = self.program().width().0;
        if let Some(reason) = tensor.shape_problem(width) {
            return Err(HookFault::Residual { layer, reason });
        }
        let wraps = self.micro_batch.last_layer.is_none_or(|last| layer <= last);
        if std::mem::take(&mut self.micro_batch.announced) || wraps {
            self.read_positions();
            let MicroBatch { inputs, n_rows, .. } = &mut self.micro_batch;
            let GraphInputs { positions, tokens } = &*inputs;
            let n_rows = match (tokens.len(), positions.len()) {
                (0, 0) => *n_rows,
                // M-RoPE, where a token has four.
                (0, n_positions) if n_positions == 4 * *n_rows => *n_rows,
                (0, n_positions) => n_positions,
                (n_tokens, _) => n_tokens,
            };
            self.rows.enter(n_rows, inputs);
            inputs.tokens.clear();
            self.sequences.begin_rows(n_rows);
        }
        self.micro_batch.last_layer = Some(layer);

        let n_rows = tensor.n_rows();
        let Some(rows) = self.rows.rows(n_rows) else {
            let reason = format!("it has {n_rows} rows, which is neither the micro-batch nor its outputs");
            return Err(HookFault::Residual { layer, reason });
        };
        if rows.is_empty() {
            return Ok(());
        }
        if let Some(replacement) = self.replacement.as_ref().filter(|replacement| replacement.layer() == layer) {
            if replacement.width() != width {
                let reason = format!("its rows have {width} values, those to replace them {}", replacement.width());
                return Err(HookFault::Residual { layer, reason });
            }
            // SAFETY: the shape was checked above, and llama.cpp waits for the callback.
            self.n_replaced += unsafe { replacement.run(rows, &mut tensor) };
        }
        self.executor
            .run(layer, rows, &mut self.sequences, &mut tensor)
            .map_err(|source| HookFault::Row { layer, source })?;
        self.fired[fired].executor = Some(self.executor.kind());
        if let Some(capture) = &mut self.capture {
            // SAFETY: the shape was checked above, and llama.cpp waits for the callback.
            unsafe { capture.take_note(layer, rows, width, &mut tensor) };
        }
        Ok(())
    }
}

impl MicroBatch {
    /// Whether a rotary embedding at `layer` would tell anything new, so that the other nodes are passed by cheaply.
    fn may_begin_at(&self, layer: u32) -> bool {
        self.rope_layer.is_none_or(|last| layer > last || self.residual_since)
    }
}

/// `L` of `l_out-L`.
fn residual_layer(name: &CStr) -> Option<LayerIndex> {
    decimal(name.to_bytes().strip_prefix(RESIDUAL_PREFIX)?).map(LayerIndex)
}

/// `L` of `anything-L`.
fn layer_suffix(name: &CStr) -> Option<u32> {
    let name = name.to_bytes();
    let dash = name.iter().rposition(|byte| *byte == b'-')?;
    decimal(&name[dash + 1..])
}

fn decimal(digits: &[u8]) -> Option<u32> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u32, |value, byte| {
        byte.is_ascii_digit().then(|| value.checked_mul(10)?.checked_add(u32::from(byte - b'0')))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_residual_names_count() {
        assert_eq!(residual_layer(c"l_out-12"), Some(LayerIndex(12)));
        for other in [c"l_out-", c"l_out-1x", c"l_out", c"attn_out-3", c"l_out--1", c"l_out-99999999999", c""] {
            assert_eq!(residual_layer(other), None, "{other:?}");
        }
        assert_eq!(layer_suffix(c"Qcur-7"), Some(7));
        assert_eq!(layer_suffix(c"Qcur-7 (view)"), None);
    }
}
