use super::gates::{GateState, RowKind, Standing, UNREAD};
use super::host::RowFault;
use super::spelling::{Next, Spelt, Texts, TokenBytes};
use super::trail::Trail;
use super::{Condition, Gate, GateDecision, Patch, Positions, Program, Row, Scope, Setting, ToggleError};
use crate::guard::{OnFire, Rule, Truth};
use crate::tensor::{LayerIndex, SequenceId, TokenPosition};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Every live sequence of a context: the program that it runs, its gates, and what went wrong with it.
///
/// A sequence takes the program that is current when its first row comes and keeps it until it is cleared, whatever is set meanwhile.
#[derive(Debug)]
pub struct Sequences {
    current: Arc<Program>,
    /// Programs that sequences were set to, the last ones last: who is set back takes the same program again, and what was read under it.
    variants: Vec<Arc<Program>>,
    states: BTreeMap<SequenceId, SequenceState>,
    /// Of cleared sequences, whose memory is used again.
    spare: Vec<(Vec<GateState>, Trail, Spelt)>,
    /// What tokens are, where programs look for texts.
    vocabulary: Option<TokenBytes>,
    /// Tokens that follow those of the next decode in their prompts, as far as a text reaches.
    following: BTreeMap<SequenceId, Vec<i32>>,
    /// Rows that a sequence may come to have, as far as is known.
    capacity: usize,
    /// The sequences of the decode.
    batch: Vec<SequenceId>,
    open: OpenGates,
    /// The program of rows that could be of any sequence of the batch; `None` where these have different ones.
    shared: Option<Arc<Program>>,
}

#[derive(Debug, Clone)]
pub(super) struct SequenceState {
    pub program: Arc<Program>,
    gates: Vec<GateState>,
    fault: Option<(LayerIndex, RowFault)>,
    trail: Trail,
    /// Of a program that looks for texts.
    spelt: Spelt,
}

/// What a sequence was before a decode, for one that comes to nothing: see [`Sequences::checkpoint`].
#[derive(Debug)]
pub struct Checkpoint(Saved);

#[derive(Debug)]
enum Saved {
    /// It did not live.
    Nothing,
    /// Its gates alone: the rest is taken back by whoever decodes the same positions again.
    Gates(Vec<GateState>),
    Whole(Box<SequenceState>),
}

/// Programs that are kept for those who set them again.
const MAX_VARIANTS: usize = 8;

/// [`Row::matched`] of a row of which it is not known what it spells.
pub(crate) const EVERY_TEXT: u64 = u64::MAX;

/// Which gates of scope `token` are open for which rows of the micro-batch.
#[derive(Debug, Default)]
pub(super) struct OpenGates {
    open: Vec<bool>,
    n_rows: usize,
    n_gates: usize,
}

impl OpenGates {
    fn slot(&self, row: usize, gate: usize) -> Option<usize> {
        (row < self.n_rows && gate < self.n_gates).then(|| row * self.n_gates + gate)
    }

    fn get(&self, row: usize, gate: usize) -> bool {
        self.slot(row, gate).is_some_and(|slot| self.open[slot])
    }
}

impl Sequences {
    pub fn new(program: Arc<Program>) -> Self {
        Self {
            current: program,
            variants: Vec::new(),
            states: BTreeMap::new(),
            spare: Vec::new(),
            vocabulary: None,
            following: BTreeMap::new(),
            capacity: 0,
            batch: Vec::new(),
            open: OpenGates::default(),
            shared: None,
        }
    }

    /// Says how many rows a sequence may have, so that memory for what is kept of them is there from its beginning.
    pub fn set_capacity(&mut self, n_rows: usize) {
        self.capacity = n_rows;
    }

    /// Says what tokens are, by their ids: programs that look for texts need it. Without it every token of a prompt counts as a part of each.
    pub fn set_vocabulary(&mut self, vocabulary: TokenBytes) {
        self.vocabulary = Some(vocabulary);
    }

    pub fn knows_vocabulary(&self) -> bool {
        self.vocabulary.is_some()
    }

    /// The program of sequences to come.
    pub fn current(&self) -> &Arc<Program> {
        &self.current
    }

    /// Sets the program of sequences to come. Those that live keep theirs.
    pub fn set_current(&mut self, program: Arc<Program>) {
        self.variants.retain(|variant| variant.differs_in_strengths_alone(&program));
        self.current = program;
    }

    /// `program` with an intervention set (see [`Program::with_setting`]): the very same program whenever it comes to the same strengths.
    ///
    /// # Errors
    /// As there.
    pub fn variant(
        &mut self,
        program: &Arc<Program>,
        name: &str,
        setting: Setting,
    ) -> Result<Arc<Program>, ToggleError> {
        let strengths = program.strengths_with(name, setting)?;
        let variant = match self.at_strengths(program, &strengths) {
            Some(known) => known,
            None => Arc::new(program.at(strengths)?),
        };
        for used in [program, &variant] {
            self.variants.retain(|known| !Arc::ptr_eq(known, used));
            self.variants.push(Arc::clone(used));
        }
        let n_old = self.variants.len().saturating_sub(MAX_VARIANTS);
        self.variants.drain(..n_old);
        Ok(variant)
    }

    /// A program that differs from `program` in strengths alone and has these, if there is one already.
    fn at_strengths(&self, program: &Arc<Program>, strengths: &[f32]) -> Option<Arc<Program>> {
        let live = self.states.values().map(|state| &state.program);
        let mut known = [program, &self.current].into_iter().chain(&self.variants).chain(live);
        let has_these = |other: &Program| other.interventions().map(|(_, at)| at).eq(strengths.iter().copied());
        known.find(|other| other.differs_in_strengths_alone(program) && has_these(other)).map(Arc::clone)
    }

    /// Has `sequence`, which keeps its gates and what they have read, go on under `program`, a [variant](Self::variant) of its own. Rows that the
    /// difference may have acted on are no longer [reusable](Self::reusable): they are not what they would be under `program`. Returns whether
    /// it lives and `program` is a variant.
    pub fn turn(&mut self, sequence: SequenceId, program: Arc<Program>) -> bool {
        let Some(state) = self.states.get_mut(&sequence) else { return false };
        if !state.program.differs_in_strengths_alone(&program) {
            return false;
        }
        let changed: Vec<Positions> = state
            .program
            .interventions()
            .zip(program.interventions())
            .filter(|((_, before), (_, after))| before != after)
            .map(|((dial, _), _)| dial.condition.positions)
            .collect();
        // What acts on answers alone has left prompts as they are.
        let spares_prompts = changed.iter().all(|positions| *positions == Positions::Generated);
        let n_sound = if spares_prompts { state.trail.n_prompt() } else { 0 };
        if !changed.is_empty() && state.trail.n_rows() > n_sound {
            state.trail.close_at(n_sound);
        }
        state.program = program;
        true
    }

    /// Sequences that live.
    pub fn live(&self) -> impl Iterator<Item = SequenceId> {
        self.states.keys().copied()
    }

    /// Starts `sequence` with a program of its own; anything known of it is forgotten.
    pub fn assign(&mut self, sequence: SequenceId, program: Arc<Program>) {
        self.clear(sequence);
        let state = self.state_for(program);
        self.states.insert(sequence, state);
    }

    /// The program that `sequence` runs, if it lives.
    pub fn program(&self, sequence: SequenceId) -> Option<&Arc<Program>> {
        self.states.get(&sequence).map(|state| &state.program)
    }

    /// Programs of the decode's sequences, some perhaps more than once.
    pub fn programs(&self) -> impl Iterator<Item = &Arc<Program>> {
        self.batch.iter().filter_map(|sequence| self.program(*sequence))
    }

    /// Whether no sequence lives.
    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// Forgets `sequence`: its next row starts a new prompt.
    pub fn clear(&mut self, sequence: SequenceId) {
        self.spare.extend(self.states.remove(&sequence).map(SequenceState::into_memory));
    }

    pub fn clear_all(&mut self) {
        let states = std::mem::take(&mut self.states).into_values();
        self.spare.extend(states.map(SequenceState::into_memory));
    }

    /// Prepares for a decode of `rows`: makes room for their sequences, so that no row of theirs allocates.
    pub fn begin(&mut self, rows: impl Iterator<Item = (SequenceId, TokenPosition, RowKind)>) {
        self.batch.clear();
        for (sequence, position, kind) in rows {
            let is_new = self.batch.last() != Some(&sequence) && !self.batch.contains(&sequence);
            if is_new && !self.states.contains_key(&sequence) {
                let state = self.state_for(Arc::clone(&self.current));
                self.states.insert(sequence, state);
            }
            let Some(state) = self.states.get_mut(&sequence) else { continue };
            if is_new {
                self.batch.push(sequence);
                state.gates.iter_mut().for_each(GateState::begin_decode);
                state.trail.begin_decode();
            }
            state.trail.expect(position, kind);
        }
        let mut programs =
            self.batch.iter().filter_map(|sequence| self.states.get(sequence)).map(|state| &state.program);
        let first = programs.next();
        let shared = first.filter(|first| programs.all(|other| Arc::ptr_eq(first, other)));
        if !matches!((&self.shared, shared), (Some(old), Some(new)) if Arc::ptr_eq(old, new)) {
            self.shared = shared.cloned();
        }
    }

    /// Says that `rest`, its token ids, follows the rows of the next decode in the prompt of `sequence`, up to the prompt's end.
    pub fn follow(&mut self, sequence: SequenceId, rest: &[i32]) {
        let program = self.program(sequence).unwrap_or(&self.current);
        let Some(vocabulary) = self.vocabulary.as_ref().filter(|_| !program.texts.is_empty()) else { return };
        let reach = Texts { texts: &program.texts, vocabulary }.reach();
        let mut n_bytes = 0;
        let near = rest.iter().copied().take_while(|token| {
            let is_near = n_bytes < reach;
            n_bytes += vocabulary.of(*token).len();
            is_near
        });
        let near = near.collect();
        self.following.insert(sequence, near);
    }

    /// Whether a patch may act on any of these rows of a decode that has begun, or whether it is certain that none does.
    pub fn may_act(&self, rows: impl Iterator<Item = (SequenceId, RowKind)>) -> bool {
        let mut seen = None;
        rows.filter(|row| seen.replace(*row) != Some(*row)).any(|(sequence, kind)| {
            let Some(SequenceState { program, gates, .. }) = self.states.get(&sequence) else { return true };
            let mut patches = program.points.iter().flat_map(|point| &point.patches);
            patches.any(|Patch { condition, .. }| {
                // Within a prompt its gates may yet decide.
                if kind != RowKind::Generated {
                    return true;
                }
                if matches!(condition.positions, Positions::Prompt | Positions::Matching(_)) {
                    return false;
                }
                let Some(rule) = &condition.when else { return true };
                let reads_answers = |gate: &usize| matches!(program.gates[*gate].scope, Scope::Token { .. });
                rule.gates().iter().any(reads_answers)
                    || holds(rule, |gate| gates[gate].standing(&program.gates[gate], kind, false))
            })
        })
    }

    /// Finds the rows of a decode that has [begun](Self::begin) that spell texts of their programs: `marks` becomes [`Row::matched`] of each of
    /// `rows`, or stays empty where no program looks for a text. `tokens` are their ids, or none where these are not known: then all count.
    ///
    /// At the end of a part of a prompt of which it is not known what [follows](Self::follow), tokens count that a text may begin with.
    pub fn mark_texts(
        &mut self,
        rows: impl Iterator<Item = (SequenceId, TokenPosition, RowKind)> + Clone,
        tokens: &[i32],
        marks: &mut Vec<u64>,
    ) {
        let following = std::mem::take(&mut self.following);
        marks.clear();
        if self.programs().all(|program| program.texts.is_empty()) {
            return;
        }
        marks.resize(rows.clone().count(), EVERY_TEXT);
        for sequence in &self.batch {
            let state = self.states.get_mut(sequence).filter(|state| !state.program.texts.is_empty());
            let Some(SequenceState { program, spelt, .. }) = state else { continue };
            let (Some(vocabulary), true) = (&self.vocabulary, tokens.len() == marks.len()) else {
                spelt.lose_track();
                continue;
            };
            let texts = Texts { texts: &program.texts, vocabulary };
            let own = rows.clone().enumerate().filter(|(_, (of, ..))| of == sequence);
            if !spelt.take(own.clone().map(|(index, (_, position, _))| (position, tokens[index]))) {
                continue;
            }
            let next = following.get(sequence).map_or(Next::Unknown, |following| Next::Known(following));
            spelt.mark_taken(own.clone().map(|(_, (.., kind))| kind), texts, next);
            own.zip(spelt.taken()).for_each(|((index, _), mark)| marks[index] = *mark);
        }
    }

    /// Ends a decode for `sequence`. Unless it went `well`, what its gates have read can't be told from here on.
    pub fn finish(&mut self, sequence: SequenceId, well: bool) {
        if let Some(state) = self.states.get_mut(&sequence) {
            state.trail.finish_decode(well);
        }
    }

    /// The sequences of the decode, each once.
    pub fn batch(&self) -> &[SequenceId] {
        &self.batch
    }

    /// Prepares for a micro-batch of `n_rows` rows.
    pub fn begin_rows(&mut self, n_rows: usize) {
        let n_gates = self.programs().map(|program| program.gates.len()).max().unwrap_or(0);
        self.open.open.clear();
        self.open.open.resize(n_rows * n_gates, false);
        (self.open.n_rows, self.open.n_gates) = (n_rows, n_gates);
    }

    fn state_for(&mut self, program: Arc<Program>) -> SequenceState {
        let (mut gates, mut trail, mut spelt) = self.spare.pop().unwrap_or_default();
        gates.clear();
        gates.resize(program.gates.len(), UNREAD);
        trail.restart(gates.len(), self.capacity);
        spelt.restart(if program.texts.is_empty() { 0 } else { self.capacity });
        SequenceState { program, gates, fault: None, trail, spelt }
    }

    /// How many of the first `n_rows` rows of `sequence` are what they would be in any new prompt that begins with their tokens, under the same
    /// program.
    ///
    /// Those of its prompt are, but for its last token. Those after it are too, unless what has acted on them knows an answer from a
    /// prompt, by its positions or by a gate that had decided. Rows at the end that may spell a text, as the prompt goes on, are not.
    pub fn reusable(&self, sequence: SequenceId, n_rows: usize) -> usize {
        let Some(state) = self.states.get(&sequence) else { return 0 };
        let n_known = if state.treats_answers_as_prompts() { state.trail.n_rows() } else { state.trail.n_prompt() };
        let n = n_rows.min(n_known);
        let texts = &state.program.texts;
        match &self.vocabulary {
            _ if texts.is_empty() => n,
            Some(vocabulary) => state.spelt.settled(n, Texts { texts, vocabulary }),
            None => 0,
        }
    }

    /// Makes nothing [reusable](Self::reusable) of what has been read up to now: what reads it has become another model.
    pub fn forget_rows(&mut self) {
        self.states.values_mut().for_each(|state| state.trail.close_at(0));
    }

    /// Makes of `to` a new sequence under the program of `from` whose prompt begins with the first `n_rows` rows of `from`, its gates as they
    /// are then. Returns whether that many rows are [reusable](Self::reusable); if not, nothing is changed.
    pub fn resume(&mut self, from: SequenceId, to: SequenceId, n_rows: usize) -> bool {
        if n_rows > self.reusable(from, n_rows) {
            return false;
        }
        let Some(program) = self.program(from).map(Arc::clone) else { return false };
        let mut state = self.state_for(program);
        let Some(source) = self.states.get(&from) else { return false };
        state.trail.extend_as_prompt(&source.trail, n_rows);
        if !state.program.texts.is_empty() {
            state.spelt.extend(&source.spelt, n_rows);
        }
        state.read_again(to, n_rows);
        self.clear(to);
        self.states.insert(to, state);
        true
    }

    /// Prepares `sequence` for a further prompt (another turn): projections are gathered anew, and a gate that has fired stays fired.
    pub fn begin_prompt(&mut self, sequence: SequenceId) {
        let Some(state) = self.states.get_mut(&sequence) else { return };
        // What acted on rows up to here is told by decisions that are forgotten now.
        if !state.treats_answers_as_prompts() {
            state.trail.close_at(state.trail.n_prompt());
        }
        state.gates.iter_mut().for_each(GateState::begin_prompt);
    }

    /// Has `sequence`, whose next prompt begins now, go on under `program`, whose guards are others than those that it began under. A gate that reads what one of
    /// theirs has read takes that over; any other reads what is to come. Patches have acted on what is there, or not, as they did.
    ///
    /// Where its first rows were [resumed](Self::resume) (`is_resumed`), gates decide over them anew; after [`begin_prompt`](Self::begin_prompt) all have fired if one
    /// had. Returns whether that can be: not where `program` looks for other texts, which may begin in what is there.
    pub fn go_on_under(&mut self, sequence: SequenceId, program: Arc<Program>, is_resumed: bool) -> bool {
        let Some(old) = self.states.get(&sequence).cloned() else { return false };
        if program.texts != old.program.texts {
            return false;
        }
        let gates: Vec<Option<usize>> =
            (0..program.gates.len()).map(|gate| program.gate_that_reads_alike(gate, &old.program)).collect();
        let has_fired = old.gates.iter().any(|gate| gate.decision().is_some_and(|decision| decision.fired));
        let mut state = self.state_for(program);
        state.trail = old.trail.for_gates(&gates, self.capacity);
        (state.spelt, state.fault) = (old.spelt, old.fault);
        if is_resumed {
            let n_rows = state.trail.n_rows();
            state.read_again(sequence, n_rows);
        } else if has_fired {
            state.gates.iter_mut().for_each(GateState::fire);
        }
        self.clear(sequence);
        self.states.insert(sequence, state);
        true
    }

    /// Fires every gate of `sequence`, if it lives, whatever it reads: where it has read only a part of what is there. Nothing of it is
    /// [reusable](Self::reusable) then.
    pub fn fire(&mut self, sequence: SequenceId) {
        let Some(state) = self.states.get_mut(&sequence) else { return };
        state.gates.iter_mut().for_each(GateState::fire);
        state.trail.close_at(0);
    }

    /// Makes nothing [reusable](Self::reusable) of rows of `sequence` from number `n` on.
    pub fn forget_rows_from(&mut self, sequence: SequenceId, n: usize) {
        if let Some(state) = self.states.get_mut(&sequence) {
            state.trail.close_at(n.min(state.trail.n_rows()));
        }
    }

    /// What `sequence` is now, for [`restore`](Self::restore): before a decode that goes on with it, or (`whole`) before one that makes something else of it.
    pub fn checkpoint(&self, sequence: SequenceId, whole: bool) -> Checkpoint {
        Checkpoint(match self.states.get(&sequence) {
            None => Saved::Nothing,
            Some(state) if whole => Saved::Whole(Box::new(state.clone())),
            Some(state) => Saved::Gates(state.gates.clone()),
        })
    }

    /// Makes of `sequence` what it was, where llama.cpp has refused or broken off a decode.
    pub fn restore(&mut self, sequence: SequenceId, checkpoint: Checkpoint) {
        match checkpoint.0 {
            Saved::Nothing => self.clear(sequence),
            Saved::Gates(gates) => {
                if let Some(state) = self.states.get_mut(&sequence) {
                    state.gates = gates;
                }
            }
            Saved::Whole(state) => {
                self.clear(sequence);
                self.states.insert(sequence, *state);
            }
        }
    }

    /// Whether a gate of `sequence` that blocks has yet to decide over its prompt.
    pub fn is_undecided(&self, sequence: SequenceId) -> bool {
        let Some(state) = self.states.get(&sequence) else { return false };
        state.program.gates.iter().zip(&state.gates).any(|(gate, known)| {
            gate.on_fire == OnFire::Block && matches!(gate.scope, Scope::Prompt(_)) && known.decision().is_none()
        })
    }

    /// Makes of `to` what `from` is, answer and decisions and all; of one that does not live, nothing.
    pub fn copy(&mut self, from: SequenceId, to: SequenceId) {
        if from == to {
            return;
        }
        self.clear(to);
        if let Some(state) = self.states.get(&from).cloned() {
            self.states.insert(to, state);
        }
    }

    /// Fires every gate of the decode's sequences, whatever it reads: where it is uncertain which rows are whose.
    pub fn fire_batch(&mut self) {
        for sequence in &self.batch {
            let states = self.states.get_mut(sequence).into_iter();
            states.flat_map(|state| &mut state.gates).for_each(GateState::fire);
        }
    }

    /// Latches `fault` for `sequence`, the first one only: until it is cleared, nothing that is decoded for it may be used. Rows without a
    /// sequence could be of any.
    pub(crate) fn fail(&mut self, sequence: Option<SequenceId>, layer: LayerIndex, fault: &RowFault) {
        let one = sequence.as_slice();
        for sequence in if sequence.is_some() { one } else { &self.batch } {
            if let Some(state) = self.states.get_mut(sequence) {
                state.fault.get_or_insert_with(|| (layer, fault.clone()));
            }
        }
    }

    /// What went wrong with `sequence`, and at which layer.
    pub fn fault(&self, sequence: SequenceId) -> Option<&(LayerIndex, RowFault)> {
        self.states.get(&sequence)?.fault.as_ref()
    }

    /// Guards `sequence` again, whatever went wrong with it.
    pub(crate) fn forget_fault(&mut self, sequence: SequenceId) {
        if let Some(state) = self.states.get_mut(&sequence) {
            state.fault = None;
        }
    }

    /// The decision of gate number `gate` for `sequence`, or `None` before there is one.
    pub fn decision(&self, sequence: SequenceId, gate: usize) -> Option<GateDecision> {
        self.states.get(&sequence)?.gates.get(gate)?.decision()
    }

    /// What each gate read at each token of `sequence` of which that can be told, from position 0 on, `[n_tokens][n_gates]`: in benign standard deviations
    /// from the benign mean. `None` where it read nothing, and at the first position, which no gate counts.
    pub fn token_scores(&self, sequence: SequenceId) -> Vec<Vec<Option<f64>>> {
        let Some(SequenceState { program, trail, .. }) = self.states.get(&sequence) else { return Vec::new() };
        let scores = |row: usize| {
            let mut scores = vec![None; program.gates.len()];
            let is_sink = TokenPosition(i32::try_from(row).unwrap_or(i32::MAX)).is_sink();
            for (index, projection) in trail.projections(row).filter(|_| !is_sink) {
                let gate = &program.gates[index];
                scores[index] = Some((f64::from(projection) - gate.mean) / gate.deviation);
            }
            scores
        };
        (0..trail.n_rows()).map(scores).collect()
    }

    /// The first fired gate of `sequence` that blocks, with the program that it is of.
    pub fn blocked_by(&self, sequence: SequenceId) -> Option<(&Arc<Program>, &Gate)> {
        let state = self.states.get(&sequence)?;
        let blocks = |(gate, known): (&Gate, &GateState)| {
            gate.on_fire == OnFire::Block && known.decision().is_some_and(|decision| decision.fired)
        };
        let index = state.program.gates.iter().zip(&state.gates).position(blocks)?;
        Some((&state.program, &state.program.gates[index]))
    }

    /// The program for rows of `sequence`; for rows without one, that of all sequences, if they have one.
    pub(crate) fn program_of_rows(&self, sequence: Option<SequenceId>) -> Option<&Arc<Program>> {
        match sequence {
            Some(sequence) => self.states.get(&sequence).map(|state| &state.program),
            None => self.shared.as_ref(),
        }
    }

    /// Whether rows of `sequence` are to be guarded yet: a sequence that failed is not, since nothing of it is used.
    pub(crate) fn has_failed(&self, sequence: Option<SequenceId>) -> bool {
        sequence.and_then(|sequence| self.states.get(&sequence)).is_some_and(|state| state.fault.is_some())
    }

    /// Takes the projection of `row` for gate number `gate` of its program.
    pub(crate) fn read(&mut self, row: &Row, gate: usize, projection: f32) {
        let Some(state) = row.sequence.and_then(|sequence| self.states.get_mut(&sequence)) else { return };
        let Some((known, gate_of)) = state.gates.get_mut(gate).zip(state.program.gates.get(gate)) else { return };
        let open = known.read(gate_of, row, f64::from(projection));
        state.trail.read(row.position, gate, projection);
        if let Some(slot) = self.open.slot(row.index, gate) {
            self.open.open[slot] = open;
        }
    }

    /// Whether a patch of the row's program acts on it. Where it is uncertain whose row it is or what a gate says, it does.
    pub(crate) fn acts(&self, condition: &Condition, row: &Row) -> bool {
        if !condition.positions.cover(row) || (row.position.is_sink() && !condition.first_position) {
            return false;
        }
        let Some(rule) = &condition.when else { return true };
        let Some(sequence) = row.sequence else { return true };
        let Some(state) = self.states.get(&sequence) else { return true };
        holds(rule, |gate| {
            let open = self.open.get(row.index, gate);
            state.gates[gate].standing(&state.program.gates[gate], row.kind, open)
        })
    }
}

impl SequenceState {
    /// What of it is used again.
    fn into_memory(self) -> (Vec<GateState>, Trail, Spelt) {
        (self.gates, self.trail, self.spelt)
    }

    /// Has the gates, which have read nothing, read the first `n_rows` rows again, which are a prompt's of `sequence`.
    fn read_again(&mut self, sequence: SequenceId, n_rows: usize) {
        for row in 0..n_rows {
            let position = TokenPosition(i32::try_from(row).unwrap_or(i32::MAX));
            let matched = self.spelt.mark_at(row);
            let read = Row { sequence: Some(sequence), position, kind: RowKind::Prompt, index: row, matched };
            for (gate, projection) in self.trail.projections(row) {
                self.gates[gate].read(&self.program.gates[gate], &read, f64::from(projection));
            }
        }
    }

    /// Whether every patch does to a row of the answer, and to the prompt's last, what it would do to the same token in a prompt, if that token
    /// spells the same texts: of an answer none.
    fn treats_answers_as_prompts(&self) -> bool {
        let mut patches = self.program.points.iter().flat_map(|point| &point.patches);
        patches.all(|Patch { condition, .. }| {
            let gates = condition.when.as_ref().map(Rule::gates).unwrap_or_default();
            let scope = |gate: &usize| self.program.gates[*gate].scope;
            if gates.iter().any(|gate| matches!(scope(gate), Scope::Token { .. })) {
                // Such a gate reads a row alike wherever it lies. A rule that asks one of the prompt too is not looked into.
                let reads_all = |gate| matches!(scope(gate), Scope::Token { positions: Positions::All, .. });
                let alike = matches!(condition.positions, Positions::All | Positions::Matching(_));
                return alike && gates.iter().all(reads_all);
            }
            // No gate decides before a prompt's end, and there only at its own layer.
            let undecided = condition.when.as_ref().is_none_or(|rule| holds(rule, |_| Standing::Undecided));
            let decided = condition.when.as_ref().is_none_or(|rule| {
                holds(rule, |gate| self.gates[gate].standing(&self.program.gates[gate], RowKind::Generated, false))
            });
            match condition.positions {
                Positions::All | Positions::Matching(_) => undecided == decided,
                Positions::Prompt | Positions::Generated => !undecided && !decided,
            }
        })
    }
}

/// Whether a rule over gates of that standing lets a patch act: one that has not decided keeps what hangs on it from acting, one that could
/// not be read lets it act.
fn holds(rule: &Rule, standing: impl Fn(usize) -> Standing) -> bool {
    let undecided = Cell::new(false);
    let truth = rule.eval(&|gate| match standing(gate) {
        Standing::Undecided => {
            undecided.set(true);
            Truth::Unknown
        }
        Standing::Decided(truth) => truth,
    });
    match truth {
        Truth::True => true,
        Truth::False => false,
        Truth::Unknown => !undecided.get(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::Aggregate;
    use crate::program::{HookPoint, ModelShape, Readout};
    use crate::tensor::HiddenSize;

    /// A program that looks for `texts`, in a vocabulary of bytes.
    fn looking_for(texts: &[&str]) -> Arc<Program> {
        let shape = ModelShape { n_embd: HiddenSize(4), n_layer: 2 };
        let texts = texts.iter().map(|text| text.as_bytes().into()).collect();
        Arc::new(Program { texts, ..Program::observer(shape) })
    }

    /// Decodes rows of sequences, each a byte of text, and gives their marks.
    fn marks(sequences: &mut Sequences, rows: &[(i32, i32, RowKind, u8)], tokens_are_known: bool) -> Vec<u64> {
        let tokens: Vec<i32> = rows.iter().map(|row| i32::from(row.3)).collect();
        let rows = rows.iter().map(|(sequence, at, kind, _)| (SequenceId(*sequence), TokenPosition(*at), *kind));
        sequences.begin(rows.clone());
        let mut marks = vec![7];
        sequences.mark_texts(rows, if tokens_are_known { &tokens } else { &[] }, &mut marks);
        (0..2).for_each(|sequence| sequences.finish(SequenceId(sequence), true));
        marks
    }

    #[test]
    fn rows_are_marked_by_the_texts_of_their_own_sequences() {
        use RowKind::{Generated, Prompt, PromptEnd};
        let bytes = || TokenBytes::new((0..=u8::MAX).map(|byte| [byte]));
        let mut sequences = Sequences::new(looking_for(&["ab", "bc"]));
        sequences.set_vocabulary(bytes());
        sequences.assign(SequenceId(1), looking_for(&["c"]));
        // Rows of both in turn, the first with a following, the second with none.
        sequences.follow(SequenceId(0), &[i32::from(b'x'), i32::from(b'b')]);
        let rows = [
            (0, 0, Prompt, b'a'),
            (1, 0, Prompt, b'c'),
            (0, 1, Prompt, b'b'),
            (1, 1, PromptEnd, b'x'),
            (0, 2, Prompt, b'x'),
            (0, 3, Prompt, b'a'),
        ];
        assert_eq!(marks(&mut sequences, &rows, true), [1, 1, 1, 0, 0, 0]);
        // What was said to follow counts for one decode.
        let rows = [(0, 4, Prompt, b'a'), (1, 2, Generated, b'c')];
        assert_eq!(marks(&mut sequences, &rows, true), [1, 0]);
        assert_eq!(sequences.reusable(SequenceId(0), 9), 3, "either `a` may go on");
        assert_eq!(
            sequences.reusable(SequenceId(1), 9),
            2,
            "of an answer no row is marked, in a prompt the third would be"
        );
        assert!(
            !sequences.resume(SequenceId(1), SequenceId(1), 3) && sequences.resume(SequenceId(1), SequenceId(1), 2)
        );
        assert_eq!(marks(&mut sequences, &[(1, 2, Prompt, b'c'), (1, 3, PromptEnd, b'c')], true), [1, 1]);
    }

    #[test]
    fn where_tokens_are_not_known_every_text_counts() {
        let mut sequences = Sequences::new(looking_for(&["ab"]));
        let rows = [(0, 0, RowKind::Prompt, b'x'), (0, 1, RowKind::PromptEnd, b'x')];
        assert_eq!(marks(&mut sequences, &rows, true), [EVERY_TEXT; 2], "no vocabulary");
        assert_eq!(sequences.reusable(SequenceId(0), 9), 0);
        sequences.set_vocabulary(TokenBytes::new((0..=u8::MAX).map(|byte| [byte])));
        sequences.clear(SequenceId(0));
        assert_eq!(marks(&mut sequences, &rows, false), [EVERY_TEXT; 2], "no ids");
        assert_eq!(marks(&mut sequences, &[(0, 2, RowKind::Prompt, b'b')], true), [1], "it may have begun before");
        assert_eq!(sequences.reusable(SequenceId(0), 9), 0);
        let mut sequences = Sequences::new(looking_for(&[]));
        assert!(marks(&mut sequences, &rows, true).is_empty(), "nobody asks");
        assert_eq!(sequences.reusable(SequenceId(0), 9), 2);
    }

    /// A program with a gate for each layer and threshold, which reads the sum of a row.
    fn reading(gates: &[(u32, f64)]) -> Arc<Program> {
        let shape = ModelShape { n_embd: HiddenSize(4), n_layer: 2 };
        let gate = |(index, (layer, threshold)): (usize, &(u32, f64))| Gate {
            name: format!("{index}"),
            guard: 0,
            layer: LayerIndex(*layer),
            scope: Scope::Prompt(Aggregate::Max),
            mean: 0.0,
            deviation: 1.0,
            threshold: Some(*threshold),
            on_fire: OnFire::Block,
        };
        let point = |layer| HookPoint {
            layer: LayerIndex(layer),
            readouts: gates
                .iter()
                .enumerate()
                .filter(|(_, (of, _))| *of == layer)
                .map(|(gate, _)| Readout { gate, direction: [0.5; 4].into() })
                .collect(),
            patches: Vec::new(),
        };
        Arc::new(Program {
            gates: gates.iter().enumerate().map(gate).collect(),
            points: (0..2).map(point).filter(|point| !point.readouts.is_empty()).collect(),
            ..Program::observer(shape)
        })
    }

    /// Decodes a prompt from `first` on, whose rows each gate reads as these.
    fn decode(sequences: &mut Sequences, first: i32, rows: &[f32], ends: bool) {
        let kind = |row: usize| if ends && row + 1 == rows.len() { RowKind::PromptEnd } else { RowKind::Prompt };
        let position = |row: usize| TokenPosition(first + row as i32);
        sequences.begin((0..rows.len()).map(|row| (SequenceId(0), position(row), kind(row))));
        sequences.begin_rows(rows.len());
        for (index, projection) in rows.iter().enumerate() {
            let row =
                Row { sequence: Some(SequenceId(0)), position: position(index), kind: kind(index), index, matched: 0 };
            let n_gates = sequences.program(SequenceId(0)).unwrap().gates().len();
            (0..n_gates).for_each(|gate| sequences.read(&row, gate, *projection));
        }
        sequences.finish(SequenceId(0), true);
    }

    #[test]
    fn a_sequence_goes_on_under_other_guards_as_if_they_had_read_it() {
        let fired = |sequences: &Sequences, n: usize| -> Vec<bool> {
            (0..n).map(|gate| sequences.decision(SequenceId(0), gate).unwrap().fired).collect()
        };
        let a = SequenceId(0);
        // The second of what is kept has 5, the one of what is new 2.
        let new = |gates: &[(u32, f64)], resumed: bool| {
            let mut sequences = Sequences::new(reading(&[(0, 4.0)]));
            decode(&mut sequences, 0, &[0.0, 5.0, 1.0, 1.0], true);
            assert_eq!(fired(&sequences, 1), [true]);
            if resumed {
                assert!(sequences.resume(a, a, 3));
            } else {
                sequences.begin_prompt(a);
            }
            assert!(sequences.go_on_under(a, reading(gates), resumed));
            decode(&mut sequences, if resumed { 3 } else { 4 }, &[2.0, 2.0], true);
            fired(&sequences, gates.len())
        };
        assert_eq!(new(&[(0, 4.0)], true), [true], "the same");
        assert_eq!(new(&[(0, 6.0)], true), [false], "another threshold");
        assert_eq!(
            new(&[(1, 4.0), (0, 4.5)], true),
            [false, true],
            "one that has read nothing of it, and the same at another place"
        );
        assert_eq!(new(&[(1, 1.5)], true), [true], "what is new is read");
        assert_eq!(
            new(&[(0, 9.0), (1, 9.0)], false),
            [true, true],
            "what has fired stays so where nothing is read again"
        );
        // What it has not read under texts that nobody looked for may hold the beginning of one.
        let mut sequences = Sequences::new(looking_for(&["ab"]));
        decode(&mut sequences, 0, &[0.0], false);
        assert!(!sequences.go_on_under(a, looking_for(&["bc"]), true));
        assert!(sequences.go_on_under(a, looking_for(&["ab"]), true));
    }

    #[test]
    fn what_is_resumed_time_and_again_takes_no_more_memory() {
        let shape = ModelShape { n_embd: HiddenSize(4), n_layer: 2 };
        let mut sequences = Sequences::new(Arc::new(Program::observer(shape)));
        let [a, b] = [0, 1].map(SequenceId);
        sequences.begin((0..3).map(|at| (a, TokenPosition(at), RowKind::Prompt)));
        sequences.finish(a, true);
        for _ in 0..9 {
            assert!(sequences.resume(a, b, 2) && sequences.resume(a, a, 3));
        }
        assert_eq!(sequences.reusable(b, 9), 2);
        assert!(sequences.spare.len() <= 1, "{}", sequences.spare.len());
    }
}
