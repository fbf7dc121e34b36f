use super::{Gate, Program};
use crate::guard::{Aggregate, OnFire, Positions};
use crate::tensor::{SequenceId, TokenPosition};
use std::collections::BTreeMap;

/// What a row of the residual is, as far as a program needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// `None` where it is uncertain which sequence the row belongs to: then every gate counts as fired for it.
    pub sequence: Option<SequenceId>,
    pub position: TokenPosition,
    pub kind: RowKind,
}

/// A row's place between prompt and answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    /// A token of the prompt, but not its last.
    Prompt,
    /// The last token of the prompt: prompt gates decide here, and the first token of the answer is predicted from it.
    PromptEnd,
    /// A token of the answer, fed back.
    Generated,
}

impl Positions {
    /// Whether an intervention with these positions acts on a row of `kind`. The answer is predicted from the last row of
    /// the prompt on, so that row is both of the prompt and of what is generated.
    pub(super) fn cover(self, kind: RowKind) -> bool {
        match self {
            Self::All => true,
            Self::Prompt => kind != RowKind::Generated,
            Self::Generated => kind != RowKind::Prompt,
        }
    }
}

/// A prompt gate's decision for a sequence. It holds until the sequence is cleared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateDecision {
    /// In benign standard deviations from the benign mean. `None` where nothing could be read, which counts as fired.
    pub score: Option<f64>,
    pub fired: bool,
}

/// The gates of every live sequence.
#[derive(Debug, Default, Clone)]
pub struct GateStates {
    sequences: BTreeMap<SequenceId, Vec<GateState>>,
}

#[derive(Debug, Clone, Copy)]
struct GateState {
    sum: f64,
    max: f64,
    last: f64,
    count: u32,
    decision: Option<GateDecision>,
    /// Whether the decision fell in the current decode.
    fresh: bool,
}

const UNREAD: GateState =
    GateState { sum: 0.0, max: f64::NEG_INFINITY, last: 0.0, count: 0, decision: None, fresh: false };

impl GateStates {
    /// Forgets `sequence`: its next row starts a new prompt.
    pub fn clear(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    pub fn clear_all(&mut self) {
        self.sequences.clear();
    }

    /// Prepares `sequence` for a decode: makes room for it, so that no row of it allocates.
    pub fn open(&mut self, program: &Program, sequence: SequenceId) {
        let states = self.sequences.entry(sequence).or_insert_with(|| vec![UNREAD; program.gates.len()]);
        states.iter_mut().for_each(|state| state.fresh = false);
    }

    /// Gives `to` the gate states of `from`, as llama.cpp's KV copy gives it the cells.
    pub fn copy(&mut self, from: SequenceId, to: SequenceId) {
        if let Some(states) = self.sequences.get(&from).cloned() {
            self.sequences.insert(to, states);
        }
    }

    /// Prepares `sequence` for a further prompt (another turn): projections are gathered anew, and a gate that has fired stays fired.
    pub fn begin_prompt(&mut self, sequence: SequenceId) {
        for state in self.sequences.get_mut(&sequence).into_iter().flatten() {
            *state = GateState { decision: state.decision.filter(|decision| decision.fired), ..UNREAD };
        }
    }

    /// Takes the projection of one row into `gate`, and decides at the end of the prompt.
    pub(super) fn read(&mut self, gates: &[Gate], gate: usize, row: &Row, projection: f64) {
        let Some(sequence) = row.sequence else { return };
        if row.kind == RowKind::Generated {
            return;
        }
        let Some(state) = self.sequences.get_mut(&sequence).and_then(|states| states.get_mut(gate)) else { return };
        if !row.position.is_sink() {
            state.sum += projection;
            state.max = state.max.max(projection);
            state.last = projection;
            state.count += 1;
        }
        if row.kind == RowKind::PromptEnd {
            let fired_before = state.decision.is_some_and(|decision| decision.fired);
            let mut decision = state.decide(&gates[gate]);
            decision.fired |= fired_before;
            state.decision = Some(decision);
            state.fresh = !fired_before;
        }
    }

    /// Fires every gate of `sequence`, whatever it reads: for rows whose sequence is uncertain.
    pub fn fire_all(&mut self, program: &Program, sequence: SequenceId) {
        self.open(program, sequence);
        for state in self.sequences.get_mut(&sequence).into_iter().flatten() {
            let score = state.decision.and_then(|decision| decision.score);
            state.decision = Some(GateDecision { score, fired: true });
        }
    }

    /// Whether `gate` is open for `row`. A gate that has not decided yet is closed, and so is one that decided in this decode for the
    /// tokens of the prompt before its last: llama.cpp may compute these after the decision, at a later layer, or before it, as it cuts
    /// the prompt. A row without a sequence opens every gate.
    pub(super) fn is_open(&self, gate: usize, row: &Row) -> bool {
        match row.sequence {
            None => true,
            Some(sequence) => {
                let state = self.sequences.get(&sequence).and_then(|states| states.get(gate));
                state.is_some_and(|state| {
                    let fired = state.decision.is_some_and(|decision| decision.fired);
                    fired && !(state.fresh && row.kind == RowKind::Prompt)
                })
            }
        }
    }

    /// The decision of gate number `gate` for `sequence`, or `None` before the end of its prompt.
    pub fn decision(&self, sequence: SequenceId, gate: usize) -> Option<GateDecision> {
        self.sequences.get(&sequence)?.get(gate)?.decision
    }

    /// The first fired gate of `sequence` that blocks.
    pub fn blocked_by<'p>(&self, program: &'p Program, sequence: SequenceId) -> Option<&'p Gate> {
        program.gates.iter().enumerate().find_map(|(index, gate)| {
            let fired = self.decision(sequence, index).is_some_and(|decision| decision.fired);
            (fired && gate.on_fire == OnFire::Block).then_some(gate)
        })
    }
}

impl GateState {
    fn decide(&self, gate: &Gate) -> GateDecision {
        let aggregate = match (self.count, gate.aggregate) {
            (0, _) => return GateDecision { score: None, fired: gate.threshold.is_some() },
            (_, Aggregate::Last) => self.last,
            (count, Aggregate::Mean) => self.sum / f64::from(count),
            (_, Aggregate::Max) => self.max,
        };
        let score = (aggregate - gate.mean) / gate.deviation;
        GateDecision { score: Some(score), fired: gate.threshold.is_some_and(|threshold| score >= threshold) }
    }
}
