//! One context of the app's under its guards: what each batch is to the sequences that are known, the decode, and what follows from it.

use crate::guards::LoadedModel;
use crate::llama::{Batch, Context, Llama, Model};
use crate::record::{Of, Record, Written};
use crate::seat::{Ran, Seat};
use crate::track::{Next, Track};
use pilotfish::Program;
use pilotfish::attach::control::GateScore;
use pilotfish::guard::BLOCKED;
use pilotfish::hook::{BatchRow, Ended, Hook, HookFault, Splitting};
use pilotfish::program::{Checkpoint, RowKind};
use pilotfish::tensor::{SequenceId, TokenPosition};
use std::collections::BTreeMap;
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Weak};

/// A context of the app's.
pub struct Guarding {
    seat: NonNull<Seat>,
    llama: &'static Llama,
    model: Arc<LoadedModel>,
    /// The app's model, for its tokens.
    raw_model: *const Model,
    /// The context, once it has decoded.
    context: *mut Context,
    splitting: Splitting,
    /// What becomes of the batch that is being decoded.
    pending: Option<Pending>,
    /// The epoch of the program of sequences to come.
    epoch: Option<u64>,
    /// Programs that sequences may run under, and their epochs.
    epochs: Vec<(Weak<Program>, u64)>,
    /// What decisions are told to, if anything.
    record: Option<Arc<Record>>,
    /// What is told of the running decode, and must be on the disk before it ends.
    written: Vec<Written>,
    tracks: BTreeMap<SequenceId, Track>,
    /// Sequences whose cells are all those of another: it and they are one for all that guards know.
    twins: BTreeMap<SequenceId, SequenceId>,
    /// Why all gates of a sequence count as fired, whatever they have read.
    unread: BTreeMap<SequenceId, &'static str>,
    /// What is said in place of answers that were ended.
    speeches: BTreeMap<SequenceId, Speech>,
    /// Whether a decode has shown that this llama.cpp does what is relied upon.
    checked: bool,
    rows: Vec<BatchRow>,
    tokens: Vec<i32>,
}

/// What a batch will have changed, once it is decoded, and what is taken back if it is not.
#[derive(Default)]
struct Pending {
    tracks: Vec<(SequenceId, Track)>,
    shared: Shared,
    before: Vec<Before>,
}

/// Rows of a batch that belong to several sequences.
#[derive(Default)]
struct Shared {
    /// Sequences all whose cells are those of another, before the batch and behind it: each pair from the one to the other.
    twins: Vec<(SequenceId, SequenceId)>,
    /// Others, of which no gate reads the whole.
    mixed: Vec<SequenceId>,
}

/// What a sequence was before a batch.
struct Before {
    sequence: SequenceId,
    state: (Checkpoint, Option<HookFault>),
    unread: Option<&'static str>,
    /// What was being said, where the batch makes an end of that.
    speech: Option<Speech>,
}

/// Tokens that are said in place of an answer, and then its end.
struct Speech {
    tokens: Vec<i32>,
    end: Option<i32>,
    /// Position of the row that predicts the first of them.
    first: i32,
}

/// Why a context can't be guarded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    NoProgram(Arc<str>),
    #[error("this llama.cpp is not one that pilotfish knows: {0}")]
    Unknown(&'static str),
    #[error(
        "an answer that a guard has ended could not be ended: the context gives no logits, or a sampler on the device has chosen already"
    )]
    NoLogits,
    #[error("a guarded context is for one context of llama.cpp, and this is another than it has decoded on")]
    OtherContext,
    #[error("the context is one of another model than it was to be guarded as")]
    OtherModel,
    #[error("the batch has a row of sequence {0}, and the context has {1}")]
    NoSequence(i32, u32),
    #[error(
        "the context does not ask the guard: is it made with the parameters that `PILOTFISH_ATTACH` was called with?"
    )]
    NotAttached,
    #[error("a batch is begun, decoded and ended, one at a time: {0}")]
    OutOfOrder(&'static str),
    /// Of a decode that was guarded.
    #[error("{0}")]
    NotOnRecord(String),
}

// SAFETY: the seat is reached through this alone, and by llama.cpp on the thread that decodes, which holds the lock that this lies behind; the app's user data is
// handed back to the app's callback on the thread on which llama.cpp would have called it.
unsafe impl Send for Guarding {}

impl Drop for Guarding {
    fn drop(&mut self) {
        // SAFETY: made from a box in `new` and freed only here, when the context is freed or has been.
        drop(unsafe { Box::from_raw(self.seat.as_ptr()) });
    }
}

impl Guarding {
    /// What is to guard a context of the model `raw_model`, which is `model`. Its callback is set where llama.cpp sets its own, or (`is_linked`) by the app.
    ///
    /// # Safety
    /// `raw_model` must be a model of `llama` that lives as long as the context.
    pub unsafe fn new(
        llama: &'static Llama,
        raw_model: *const Model,
        model: Arc<LoadedModel>,
        is_linked: bool,
    ) -> Self {
        let hook = Hook::new(llama.ggml, Arc::new(Program::observer(model.shape)));
        let seat = Seat::new(hook, llama, is_linked);
        Self {
            seat: NonNull::from(Box::leak(Box::new(seat))),
            llama,
            model,
            raw_model,
            context: null_mut(),
            splitting: Splitting { n_streams: 1, n_ubatch: 1 },
            pending: None,
            epoch: None,
            epochs: Vec::new(),
            record: None,
            written: Vec::new(),
            tracks: BTreeMap::new(),
            twins: BTreeMap::new(),
            unread: BTreeMap::new(),
            speeches: BTreeMap::new(),
            checked: false,
            rows: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Has `record` told of what guards decide.
    pub fn tell(&mut self, record: Arc<Record>) {
        self.record = Some(record);
    }

    pub fn seat(&self) -> NonNull<Seat> {
        self.seat
    }

    /// Whether a batch has begun and not ended: llama.cpp may be using the hook.
    pub fn is_decoding(&self) -> bool {
        self.pending.is_some()
    }

    /// What guards the context. Not while a batch is decoded.
    pub fn hook(&mut self) -> &mut Hook {
        // SAFETY: the seat lives as long as this, and llama.cpp uses it only between `begin` and `end`, in which this is not called.
        unsafe { (*self.seat.as_ptr()).hook() }
    }

    /// Runs a decode of `batch` under the guards: `run` has llama.cpp do it, and gives its result, which is given back.
    ///
    /// # Safety
    /// As of [`begin`](Self::begin).
    ///
    /// # Errors
    /// The context can't be guarded; where `run` has been called already, what it has decoded must not be used.
    pub unsafe fn decode(
        &mut self,
        context: *mut Context,
        batch: &Batch,
        run: impl FnOnce(&Llama) -> i32,
    ) -> Result<i32, Refusal> {
        // SAFETY: guaranteed by the caller.
        unsafe {
            self.begin(context, batch)?;
            let result = run(self.llama);
            self.end(result)?;
            Ok(result)
        }
    }

    /// Prepares for the decode of `batch`, which the caller has llama.cpp do then, and ends by [`end`](Self::end).
    ///
    /// # Safety
    /// `context` must be a living context of the model, always the same, and `batch` valid as llama.cpp would have it.
    ///
    /// # Errors
    /// The context can't be guarded, and nothing is to be decoded.
    pub unsafe fn begin(&mut self, context: *mut Context, batch: &Batch) -> Result<(), Refusal> {
        if self.is_decoding() {
            return Err(Refusal::OutOfOrder("the one before has not ended"));
        }
        // SAFETY: guaranteed by the caller.
        unsafe { self.bind(context)? };
        // SAFETY: nothing decodes, and the seat is the context's.
        if unsafe { (*self.seat.as_ptr()).take_passed() } {
            self.loaded(None);
        }
        let guarded = self.take_program()?;
        if !guarded {
            // SAFETY: nothing decodes, and the seat is the context's.
            unsafe { Seat::begin(self.seat, None) };
            // What is decoded now no guard has read.
            self.loaded(None);
            self.rows.clear();
            self.pending = Some(Pending::default());
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        let (batch_rows, shared) = unsafe { self.rows_of(batch)? };
        let (tracks, before) = self.plan(&batch_rows);
        let (rows, tokens, splitting) =
            (std::mem::take(&mut self.rows), std::mem::take(&mut self.tokens), self.splitting);
        self.hook().begin(&rows, &tokens, splitting);
        // SAFETY: nothing decodes yet, and the seat is the context's.
        unsafe { Seat::begin(self.seat, Some(rows.len())) };
        (self.rows, self.tokens) = (rows, tokens);
        self.pending = Some(Pending { tracks, shared, before });
        Ok(())
    }

    /// Ends what [`begin`](Self::begin) has begun: `result` is what llama.cpp's function gave.
    ///
    /// # Safety
    /// The context must live.
    ///
    /// # Errors
    /// The context can't be guarded: what was decoded must not be used.
    pub unsafe fn end(&mut self, result: i32) -> Result<(), Refusal> {
        let Some(Pending { tracks, shared, before }) = self.pending.take() else {
            return Err(Refusal::OutOfOrder("none has begun"));
        };
        // SAFETY: the decode is over, and the seat is the context's.
        let ran = unsafe { (*self.seat.as_ptr()).end() };
        if !ran.is_guarded {
            if let (Some(record), 0) = (&self.record, result) {
                record.passed();
            }
            return Ok(());
        }
        if result != 0 {
            // It is as if it had not begun. Where a part of it is in the cells, that is seen at the next decode.
            for Before { sequence, state, unread, speech } in before {
                self.hook().restore(sequence, state);
                self.unread.remove(&sequence);
                self.unread.extend(unread.map(|why| (sequence, why)));
                self.speeches.extend(speech.map(|speech| (sequence, speech)));
            }
            return Ok(());
        }
        self.check(&ran)?;
        if let Err(fault) = self.hook().finish() {
            tracing::error!(%fault, "a guard failed");
        }
        if self.hook().is_uncertain() {
            let sequences = self.rows.iter().map(|row| row.sequence);
            self.unread.extend(sequences.map(|sequence| (sequence, "rows of sequences could not be told apart")));
        }
        for (sequence, track) in tracks {
            self.tracks.insert(sequence, track);
            self.part(sequence);
        }
        self.share(&shared);
        self.close_gaps(ran.n_logits);
        self.tell_decisions();
        // SAFETY: guaranteed by the caller.
        let spoken = unsafe { self.speak() };
        self.put_on_record()?;
        spoken
    }

    /// Takes note of the context that this is for.
    ///
    /// # Safety
    /// As of [`begin`](Self::begin).
    unsafe fn bind(&mut self, context: *mut Context) -> Result<(), Refusal> {
        if self.context == context {
            return Ok(());
        }
        if !self.context.is_null() {
            return Err(Refusal::OtherContext);
        }
        // SAFETY: guaranteed by the caller.
        let (n_streams, n_ctx, n_ubatch, model) = unsafe {
            let llama = self.llama;
            (llama.n_streams(context), (llama.n_ctx)(context), (llama.n_ubatch)(context), (llama.get_model)(context))
        };
        if model != self.raw_model {
            return Err(Refusal::OtherModel);
        }
        self.splitting = Splitting { n_streams, n_ubatch: n_ubatch as usize };
        self.hook().set_capacity(n_ctx as usize / n_streams);
        self.context = context;
        Ok(())
    }

    /// Waits until what was told of this decode is on the disk.
    fn put_on_record(&mut self) -> Result<(), Refusal> {
        if let Some(record) = self.record.clone() {
            self.count(&record);
        }
        // All of them, so that none is left for the next.
        let written: Vec<_> = self.written.drain(..).map(Written::wait).collect();
        written.into_iter().collect::<Result<(), String>>().map_err(Refusal::NotOnRecord)?;
        // A log that has failed once stays so: no answer goes on that should have been on record.
        let failure = self.record.as_ref().and_then(|record| record.failure());
        failure.map_or(Ok(()), |problem| Err(Refusal::NotOnRecord(problem)))
    }

    /// Counts the decode and its rows. Where guards have been turned off, sequences that began before are guarded and others in the same batch are not.
    fn count(&mut self, record: &Record) {
        let (mut n_prompt, mut n_answer) = (0, 0);
        let mut of = None;
        for index in 0..self.rows.len() {
            let BatchRow { sequence, kind, .. } = self.rows[index];
            let is_guarded = match of {
                Some((known, is_guarded)) if known == sequence => is_guarded,
                _ => self.is_guarded(sequence),
            };
            of = Some((sequence, is_guarded));
            match kind {
                _ if !is_guarded => {}
                RowKind::Generated => n_answer += 1,
                RowKind::Prompt | RowKind::PromptEnd => n_prompt += 1,
            }
        }
        match n_prompt + n_answer {
            0 => record.passed(),
            _ => record.decoded(n_prompt, n_answer),
        }
    }

    fn is_guarded(&mut self, sequence: SequenceId) -> bool {
        self.hook().sequences().program(sequence).is_some_and(|program| !program.guards().is_empty())
    }

    /// Tells `what` of a sequence, which runs under `program`.
    fn tell_of(&mut self, sequence: SequenceId, what: impl FnOnce(&Record, &Of<'_>) -> Written) {
        let Some(record) = self.record.clone() else { return };
        let model = Arc::clone(&self.model);
        let sequences = self.hook().sequences();
        let Some(program) = sequences.program(sequence).cloned() else { return };
        let epoch = self.epochs.iter().find(|(known, _)| std::ptr::eq(known.as_ptr(), Arc::as_ptr(&program)));
        let epoch = epoch.map_or(0, |(_, epoch)| *epoch);
        let written = what(&record, &Of { sequence, epoch, program: &program, model: &model });
        self.written.push(written);
    }

    /// What the gates of a sequence have decided.
    pub fn decisions(&mut self, sequence: SequenceId) -> Vec<GateScore> {
        let sequences = self.hook().sequences();
        let Some(program) = sequences.program(sequence) else { return Vec::new() };
        let decision = |(number, gate): (usize, &pilotfish::program::Gate)| {
            let decision = sequences.decision(sequence, number)?;
            let guard = &program.guards()[gate.guard].name;
            Some(GateScore {
                guard: guard.clone(),
                gate: program.own_name(guard, &gate.name).to_owned(),
                score: decision.score,
                fired: decision.fired,
            })
        };
        program.gates().iter().enumerate().filter_map(decision).collect()
    }

    /// Writes down what gates have decided over the prompts that end in this batch.
    fn tell_decisions(&mut self) {
        for index in 0..self.rows.len() {
            let BatchRow { sequence, kind, .. } = self.rows[index];
            if kind != RowKind::PromptEnd || !self.is_guarded(sequence) {
                continue;
            }
            let decisions = self.decisions(sequence);
            for GateScore { guard, gate, score, fired } in &decisions {
                match *score {
                    Some(score) if *fired => tracing::info!(%sequence, guard, gate, score, fired, "gate"),
                    Some(score) => tracing::debug!(%sequence, guard, gate, score, fired, "gate"),
                    None => tracing::info!(%sequence, guard, gate, fired, "gate: what it reads can't be told"),
                }
            }
            let all_fired = !decisions.is_empty() && decisions.iter().all(|decision| decision.fired);
            let unread = self.unread.get(&sequence).copied().filter(|_| all_fired);
            self.tell_of(sequence, |record, of| record.prompt(of, &decisions, unread));
        }
    }

    /// Takes the program that is in force for sequences to come. Returns whether anything is to be guarded.
    fn take_program(&mut self) -> Result<bool, Refusal> {
        let standing = self.model.standing();
        let program = standing.program.map_err(Refusal::NoProgram)?;
        if self.epoch != Some(standing.epoch) {
            self.epoch = Some(standing.epoch);
            let model = Arc::clone(&self.model);
            let hook = self.hook();
            if !program.texts().is_empty() && !hook.sequences().knows_vocabulary() {
                hook.set_vocabulary(model.vocabulary.clone());
            }
            hook.set_program(Arc::clone(&program));
            self.epochs.retain(|(known, _)| known.strong_count() > 0);
            self.epochs.push((Arc::downgrade(&program), standing.epoch));
        }
        // A sequence that began under a guard goes on under it.
        let lives = |hook: &Hook| {
            hook.sequences()
                .live()
                .any(|live| hook.sequences().program(live).is_some_and(|program| !program.guards().is_empty()))
        };
        Ok(!program.guards().is_empty() || lives(self.hook()))
    }

    /// Rows of a batch, by their sequences, and which sequences share rows of others: the batch in `self.rows` and `self.tokens`, whose kinds are to be found.
    ///
    /// # Safety
    /// As of [`begin`](Self::begin).
    unsafe fn rows_of(&mut self, batch: &Batch) -> Result<(BTreeMap<SequenceId, SequenceRows>, Shared), Refusal> {
        self.rows.clear();
        self.tokens.clear();
        let mut of_sequences: BTreeMap<SequenceId, SequenceRows> = BTreeMap::new();
        let mut others: BTreeMap<(SequenceId, SequenceId), usize> = BTreeMap::new();
        let n_tokens = usize::try_from(batch.n_tokens).unwrap_or(0);
        // SAFETY: the arrays that are not null have `n_tokens` elements, those of sequence ids as many as their counts say (llama.h).
        unsafe {
            for index in 0..n_tokens {
                let n_ids =
                    if batch.n_seq_id.is_null() || batch.seq_id.is_null() { 0 } else { *batch.n_seq_id.add(index) };
                let id = |of: usize| *(*batch.seq_id.add(index)).add(of);
                let sequence = if n_ids > 0 { self.known(id(0))? } else { SequenceId(0) };
                let rows = of_sequences
                    .entry(sequence)
                    .or_insert_with(|| SequenceRows { in_cells: self.in_cells(sequence), indices: Vec::new() });
                let position = match batch.pos.is_null() {
                    true => rows.in_cells + rows.indices.len() as i32,
                    false => *batch.pos.add(index),
                };
                let output = match batch.logits.is_null() {
                    true => index + 1 == n_tokens,
                    false => *batch.logits.add(index) != 0,
                };
                rows.indices.push(index);
                let kind = RowKind::Prompt;
                self.rows.push(BatchRow { sequence, position: TokenPosition(position), kind, output });
                for other in 1..usize::try_from(n_ids).unwrap_or(0) {
                    let other = self.known(id(other))?;
                    if other != sequence {
                        *others.entry((sequence, other)).or_default() += 1;
                    }
                }
            }
            if !batch.token.is_null() {
                self.tokens.extend_from_slice(std::slice::from_raw_parts(batch.token, n_tokens));
            }
        }
        let mut shared = Shared::default();
        for ((from, to), n_shared) in &others {
            let rows = &of_sequences[from];
            let is_all = *n_shared == rows.indices.len() && !of_sequences.contains_key(to);
            let of_one = others.keys().filter(|(_, other)| other == to).count() == 1;
            // SAFETY: guaranteed by the caller, and the id is one that the context has.
            let in_cells = unsafe { self.in_cells(*to) };
            let is_same = in_cells == 0 || self.twins.get(to) == Some(from) && in_cells == rows.in_cells;
            if is_all && of_one && is_same {
                shared.twins.push((*from, *to));
            } else if !shared.mixed.contains(to) {
                shared.mixed.push(*to);
            }
        }
        Ok((of_sequences, shared))
    }

    /// How many tokens the cells of a sequence hold.
    ///
    /// # Safety
    /// The context must live, and have such a sequence.
    unsafe fn in_cells(&self, sequence: SequenceId) -> i32 {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let memory = (self.llama.get_memory)(self.context);
            if memory.is_null() { 0 } else { (self.llama.seq_pos_max)(memory, sequence.0) + 1 }
        }
    }

    /// Prepares the sequences of a batch for its rows, and says what they are: what each track is once it is decoded.
    fn plan(&mut self, batch: &BTreeMap<SequenceId, SequenceRows>) -> (Vec<(SequenceId, Track)>, Vec<Before>) {
        let (mut after, mut before) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        for (sequence, SequenceRows { in_cells, indices }) in batch {
            let rows = || indices.iter().map(|index| (self.rows[*index].position.0, self.rows[*index].output));
            let track = self.tracks.get(sequence).copied();
            let (mut next, kinds, track) = Track::take(track, *in_cells, rows());
            for (index, kind) in indices.iter().zip(kinds) {
                self.rows[*index].kind = kind;
            }
            after.push((*sequence, track));
            let (sequence, n) = (*sequence, usize::try_from(*in_cells).unwrap_or(0));
            let goes_on = next == Next::GoesOn;
            let speech = if goes_on { None } else { self.speeches.remove(&sequence) };
            let unread = self.unread.get(&sequence).copied();
            if next == Next::Begins {
                self.unread.remove(&sequence);
            }
            let hook = self.hook();
            before.push(Before { sequence, state: hook.checkpoint(sequence, !goes_on), unread, speech });
            let began_unguarded = hook.sequences().program(sequence).is_some_and(|own| own.guards().is_empty());
            if next == Next::Turn && began_unguarded && !hook.program().guards().is_empty() {
                next = Next::Unseen;
            }
            match next {
                Next::GoesOn => {}
                Next::Begins => hook.clear(sequence),
                Next::Turn => {
                    let is_resumed = hook.resume(sequence, sequence, n);
                    if !is_resumed {
                        // What it holds is not what its gates would have read of a prompt, so they read what is new; one that has fired stays so.
                        hook.begin_prompt(sequence);
                    }
                    let program = Arc::clone(hook.program());
                    let own = hook.sequences().program(sequence);
                    let is_other = own.is_some_and(|own| !own.differs_in_strengths_alone(&program));
                    let had_fired = is_other && !is_resumed && self.decisions(sequence).iter().any(|gate| gate.fired);
                    if is_other && self.hook().go_on_under(sequence, program, is_resumed) {
                        if had_fired {
                            self.unread.insert(sequence, "a gate of the guards before had fired");
                        }
                    } else if is_other {
                        tracing::warn!(%sequence, "a prompt goes on behind {n} tokens that were read under other guards, which stay in force for it: those of now look for texts that may begin there");
                    }
                }
                Next::Unseen => {
                    tracing::warn!(%sequence, "{n} tokens are there that no guard has read: its gates count as fired");
                    let program = Arc::clone(hook.program());
                    hook.assign(sequence, program);
                    let shared = self.unread.get(&sequence).copied().filter(|why| *why == SHARED);
                    self.fire(sequence, shared.unwrap_or("there were tokens that no guard has read"));
                }
            }
        }
        (after, before)
    }

    /// Has sequences be what those are whose rows they share. Where a sequence has but some rows of another's, or others besides, no gate has read the whole of it.
    fn share(&mut self, shared: &Shared) {
        for (from, to) in &shared.twins {
            self.copy(*from, *to);
        }
        for sequence in &shared.mixed {
            tracing::warn!(%sequence, "it shares some rows with another sequence, so that no gate reads the whole of it: its gates count as fired");
            self.loaded(Some(*sequence));
            let hook = self.hook();
            if hook.sequences().program(*sequence).is_none() {
                let program = Arc::clone(hook.program());
                hook.assign(*sequence, program);
            }
            self.fire(*sequence, SHARED);
        }
    }

    /// Has all gates of `sequence` count as fired, and notes why.
    fn fire(&mut self, sequence: SequenceId, why: &'static str) {
        self.hook().fire(sequence);
        self.unread.insert(sequence, why);
    }

    /// Makes of `to`, which was empty, what `from` is.
    fn copy(&mut self, from: SequenceId, to: SequenceId) {
        self.hook().copy(from, to);
        self.speeches.remove(&to);
        self.unread.remove(&to);
        self.unread.extend(self.unread.get(&from).copied().map(|why| (to, why)));
        self.part(to);
        match self.tracks.get(&from).copied() {
            Some(track) => {
                self.tracks.insert(to, track);
                self.twins.insert(to, from);
            }
            None => drop(self.tracks.remove(&to)),
        }
    }

    /// Says that the cells of `sequence` are no other's any more.
    fn part(&mut self, sequence: SequenceId) {
        self.twins.retain(|to, from| *to != sequence && *from != sequence);
    }

    /// Sees that no token is chosen by logits that no gate has decided about: fires gates that have yet to decide where there are any, and all of the batch where
    /// llama.cpp has computed more rows of logits than it was asked for in the batch (contexts that give embeddings do).
    fn close_gaps(&mut self, n_logits: i64) {
        let n_asked = self.rows.iter().filter(|row| row.output).count();
        let gives_more = usize::try_from(n_logits).is_ok_and(|n| n > n_asked);
        for index in 0..self.rows.len() {
            let BatchRow { sequence, output, .. } = self.rows[index];
            if gives_more {
                self.rows[index].output = true;
                self.fire(sequence, "the context gives logits also of tokens for which none were asked");
            } else if output && self.hook().sequences().is_undecided(sequence) {
                self.fire(sequence, "a gate had not decided where logits were asked for");
            }
        }
    }

    /// Whether the cells of `sequence` hold nothing.
    ///
    /// # Safety
    /// The context must live.
    pub unsafe fn is_empty(&self, sequence: SequenceId) -> bool {
        // SAFETY: guaranteed by the caller; the sequence is one that the context has.
        unsafe { self.known(sequence.0).is_ok_and(|sequence| self.in_cells(sequence) == 0) }
    }

    /// Has cells of `from` copied to `to` by llama.cpp, positions from `first` to before `end` (below 0: all).
    ///
    /// # Safety
    /// The context must live, and both be sequences that it has.
    ///
    /// # Errors
    /// Nothing was decoded, or there is no such sequence.
    pub unsafe fn copy_cells(&mut self, from: SequenceId, to: SequenceId, first: i32, end: i32) -> Result<(), Refusal> {
        // SAFETY: guaranteed by the caller.
        unsafe {
            self.known(from.0)?;
            self.known(to.0)?;
            let was_empty = self.is_empty(to);
            (self.llama.seq_cp)((self.llama.get_memory)(self.context), from.0, to.0, first, end);
            self.copied(from, to, first, was_empty);
        }
        Ok(())
    }

    /// Has positions of `sequence` from `first` to before `end` (below 0: all) changed by `by`.
    ///
    /// # Safety
    /// The context must live.
    ///
    /// # Errors
    /// As of [`copy_cells`](Self::copy_cells).
    pub unsafe fn shift_cells(&mut self, sequence: SequenceId, first: i32, end: i32, by: i32) -> Result<(), Refusal> {
        // SAFETY: guaranteed by the caller.
        unsafe {
            self.known(sequence.0)?;
            (self.llama.seq_add)((self.llama.get_memory)(self.context), sequence.0, first, end, by);
        }
        self.shifted(sequence, first, by);
        Ok(())
    }

    /// The sequence of that id, which the context, that has decoded, has: llama.cpp ends the process where it is asked for another.
    ///
    /// # Safety
    /// The context must live.
    unsafe fn known(&self, id: i32) -> Result<SequenceId, Refusal> {
        if self.context.is_null() {
            return Err(Refusal::OutOfOrder("nothing was decoded yet"));
        }
        // SAFETY: guaranteed by the caller.
        let n_sequences = unsafe { (self.llama.n_seq_max)(self.context) };
        match u32::try_from(id) {
            Ok(known) if known < n_sequences => Ok(SequenceId(id)),
            _ => Err(Refusal::NoSequence(id, n_sequences)),
        }
    }

    /// Says that cells of `from` have been copied to `to`, from position `first` on (below 0: all), which had none or had some.
    pub fn copied(&mut self, from: SequenceId, to: SequenceId, first: i32, was_empty: bool) {
        match from == to {
            true => {}
            false if first <= 0 && was_empty => self.copy(from, to),
            false => self.loaded(Some(to)),
        }
    }

    /// Says that what comes next of `sequence` is another prompt.
    pub fn begin_prompt(&mut self, sequence: SequenceId) {
        if let Some(track) = self.tracks.get_mut(&sequence) {
            track.begin_prompt();
        }
    }

    /// Says that cells of `sequence` (or of all) hold what was not decoded here.
    pub fn loaded(&mut self, sequence: Option<SequenceId>) {
        match sequence {
            Some(sequence) => {
                self.tracks.remove(&sequence);
                self.part(sequence);
            }
            None => {
                self.tracks.clear();
                self.twins.clear();
            }
        }
    }

    /// Says that positions of `sequence` from `first` on have changed by `by`, as an app does to make room.
    pub fn shifted(&mut self, sequence: SequenceId, first: i32, by: i32) {
        if let Some(track) = self.tracks.get_mut(&sequence) {
            track.shift(first, by);
        }
        self.part(sequence);
        let kept = usize::try_from(first.saturating_add(by.min(0))).unwrap_or(0);
        self.hook().forget_rows_from(sequence, kept);
    }

    /// Makes sure, once, that what is relied upon is so: that llama.cpp asks about the nodes of its graphs, and that these read the tokens of the batch.
    fn check(&mut self, ran: &Ran) -> Result<(), Refusal> {
        if ran.n_nodes == 0 {
            return Err(match ran.is_linked {
                true => Refusal::NotAttached,
                false => Refusal::Unknown("it decodes without asking the eval callback"),
            });
        }
        if !self.checked {
            let one = self.rows.iter().all(|row| row.sequence == self.rows[0].sequence);
            if one && self.hook().is_uncertain() {
                return Err(Refusal::Unknown(
                    "its graphs read other tokens than the batch that was to be decoded holds",
                ));
            }
            self.checked = one;
        }
        Ok(())
    }

    /// Where a sequence of the batch has come to an end, has llama.cpp predict what is said in its place.
    ///
    /// # Safety
    /// The context must live, and its decode have just ended well.
    unsafe fn speak(&mut self) -> Result<(), Refusal> {
        let mut outcome = Ok(());
        for index in 0..self.rows.len() {
            let BatchRow { sequence, output, position, .. } = self.rows[index];
            if !output {
                continue;
            }
            let Some(ended) = self.hook().ended(sequence) else {
                self.speeches.remove(&sequence);
                continue;
            };
            if !self.speeches.contains_key(&sequence) {
                self.tell_of(sequence, |record, of| record.ended(of, &ended));
                let message = match ended {
                    Ended::Fault { guard, fault } => {
                        tracing::warn!(%sequence, "guard `{guard}` failed, and its answer ends: {fault}");
                        FAILED.to_owned()
                    }
                    Ended::Blocked { guard, gate, message } => {
                        tracing::warn!(%sequence, "guard `{guard}` blocks: gate `{gate}` fired");
                        message.unwrap_or_else(|| BLOCKED.to_owned())
                    }
                };
                // An app that asks for the logits of a whole prompt goes on from the last.
                let of_it = self.rows.iter().filter(|row| row.sequence == sequence && row.output);
                let first = of_it.map(|row| row.position.0).max().unwrap_or(position.0);
                // SAFETY: the model lives as long as its context.
                let speech = unsafe {
                    let tokens = self.llama.tokens(self.raw_model, &message);
                    Speech { tokens, end: self.llama.end_of_answer(self.raw_model), first }
                };
                self.speeches.insert(sequence, speech);
            }
            let Some(speech) = self.speeches.get(&sequence) else { continue };
            let said = usize::try_from(position.0.saturating_sub(speech.first)).unwrap_or(0);
            let token = speech.tokens.get(said).copied().or(speech.end);
            // SAFETY: guaranteed by the caller; row `index` of the batch has logits, as many as there are tokens.
            unsafe {
                let is_chosen = self.llama.is_sampled(self.context, index as i32);
                let logits = (self.llama.get_logits_ith)(self.context, index as i32);
                let n_tokens = (self.llama.n_tokens)((self.llama.get_vocab)(self.raw_model));
                match token {
                    Some(token) if !logits.is_null() && !is_chosen => {
                        let n_tokens = usize::try_from(n_tokens).unwrap_or(0);
                        say(std::slice::from_raw_parts_mut(logits, n_tokens), token);
                    }
                    // The others are to be ended all the same.
                    _ => outcome = Err(Refusal::NoLogits),
                }
            }
        }
        outcome
    }
}

/// Why gates of a sequence count as fired that has but some rows of another's.
const SHARED: &str = "it shares some rows with another sequence";

/// What is said where a guard could not do its work.
const FAILED: &str = "The safety guard failed, so there is no answer.";

/// Where logits leave no doubt, and stay numbers that a sampler can work with: one that may not take `token`, as for a grammar, chooses among the others blindly.
const CERTAIN: f32 = 100.0;

/// Has any sampler choose `token`.
fn say(logits: &mut [f32], token: i32) {
    logits.fill(-CERTAIN);
    if let Some(chosen) = usize::try_from(token).ok().and_then(|token| logits.get_mut(token)) {
        *chosen = CERTAIN;
    }
}

/// Rows of a batch that are one sequence's.
struct SequenceRows {
    /// Tokens that its cells hold before the decode.
    in_cells: i32,
    indices: Vec<usize>,
}
