use super::{Gate, Positions, Scope};
use crate::guard::{Aggregate, Truth};
use crate::tensor::{SequenceId, TokenPosition};

/// What a row of the residual is, as far as a program needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// `None` where it is uncertain which sequence the row belongs to: then every gate counts as fired for it.
    pub sequence: Option<SequenceId>,
    pub position: TokenPosition,
    pub kind: RowKind,
    /// Number of the row in its micro-batch, the same at every layer.
    pub index: usize,
    /// Bit `i`: whether its token spells a part of text `i` of its sequence's [`Program::texts`](super::Program::texts), or may.
    pub matched: u64,
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
    /// Whether what has these positions acts on `row`. The answer is predicted from the last row of the prompt on, so that row is both of the
    /// prompt and of what is generated.
    pub(super) fn cover(self, row: &Row) -> bool {
        match self {
            Self::All => true,
            Self::Prompt => row.kind != RowKind::Generated,
            Self::Generated => row.kind != RowKind::Prompt,
            Self::Matching(text) => row.kind != RowKind::Generated && row.matched >> text & 1 == 1,
        }
    }
}

/// A gate's decision for a sequence. It holds until the sequence is cleared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateDecision {
    /// In benign standard deviations from the benign mean; of a gate of scope `token` the highest yet. `None` where nothing could be read
    /// for certain, which counts as fired.
    pub score: Option<f64>,
    /// Whether the gate has fired, at any token.
    pub fired: bool,
}

/// A gate of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct GateState {
    sum: f64,
    max: f64,
    last: f64,
    count: u32,
    decision: Option<GateDecision>,
    /// Whether a decision on the prompt fell in the current decode.
    fresh: bool,
    /// Scope `token`: whether the last token that was read left the gate open.
    open: bool,
}

pub(super) const UNREAD: GateState =
    GateState { sum: 0.0, max: f64::NEG_INFINITY, last: 0.0, count: 0, decision: None, fresh: false, open: false };

/// What a rule over gates is to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The gate has not decided for this row: rules that ask it do not act.
    Undecided,
    Decided(Truth),
}

impl GateState {
    pub fn begin_decode(&mut self) {
        self.fresh = false;
    }

    /// Projections of a further prompt are gathered anew; what has fired stays fired.
    pub fn begin_prompt(&mut self) {
        *self = Self { decision: self.decision.filter(|decision| decision.fired), open: self.open, ..UNREAD };
    }

    /// Takes the projection of one row, and decides: at the end of the prompt, or for this token. Returns whether the gate, of scope
    /// `token`, is open for the row.
    pub fn read(&mut self, gate: &Gate, row: &Row, projection: f64) -> bool {
        match gate.scope {
            Scope::Prompt(aggregate) => {
                self.read_prompt(gate, aggregate, row, projection);
                false
            }
            Scope::Token { positions, release } => {
                if positions.cover(row) && !row.position.is_sink() {
                    self.read_token(gate, release, projection);
                }
                self.open
            }
        }
    }

    fn read_prompt(&mut self, gate: &Gate, aggregate: Aggregate, row: &Row, projection: f64) {
        if row.kind == RowKind::Generated {
            return;
        }
        if !row.position.is_sink() {
            self.sum += projection;
            self.max = self.max.max(projection);
            self.last = projection;
            self.count += 1;
        }
        if row.kind == RowKind::PromptEnd {
            let fired_before = self.decision.is_some_and(|decision| decision.fired);
            let aggregate = match (self.count, aggregate) {
                (0, _) => None,
                (_, Aggregate::Last) => Some(self.last),
                (count, Aggregate::Mean) => Some(self.sum / f64::from(count)),
                (_, Aggregate::Max) => Some(self.max),
            };
            let score = aggregate.map(|aggregate| (aggregate - gate.mean) / gate.deviation);
            let over = |threshold| score.is_none_or(|score| score >= threshold);
            let fired = fired_before || gate.threshold.is_some_and(over);
            self.decision = Some(GateDecision { score, fired });
            self.fresh = !fired_before;
        }
    }

    fn read_token(&mut self, gate: &Gate, release: f64, projection: f64) {
        let score = (projection - gate.mean) / gate.deviation;
        self.open = gate.threshold.is_some_and(|threshold| score >= if self.open { release } else { threshold });
        let before = self.decision.unwrap_or(GateDecision { score: Some(f64::NEG_INFINITY), fired: false });
        let highest = before.score.map(|before| before.max(score));
        self.decision = Some(GateDecision { score: highest, fired: before.fired || self.open });
    }

    /// Counts as fired, whatever was read.
    pub fn fire(&mut self) {
        self.decision = Some(GateDecision { score: None, fired: true });
        self.open = true;
    }

    pub fn decision(&self) -> Option<GateDecision> {
        self.decision
    }

    /// What the gate says for a row of `kind`, `open` being what its tokens' own reading said there.
    ///
    /// A prompt gate that decided in this decode has not for the tokens of the prompt before its last: llama.cpp may compute these after
    /// the decision, at a later layer, or before it, as it cuts the prompt.
    pub fn standing(&self, gate: &Gate, kind: RowKind, open: bool) -> Standing {
        if matches!(gate.scope, Scope::Token { .. }) {
            let unreadable = self.decision.is_some_and(|decision| decision.score.is_none());
            return Standing::Decided(if unreadable { Truth::Unknown } else { open.into() });
        }
        match self.decision {
            None => Standing::Undecided,
            Some(_) if self.fresh && kind == RowKind::Prompt => Standing::Undecided,
            Some(GateDecision { score: None, fired: true }) => Standing::Decided(Truth::Unknown),
            Some(GateDecision { fired, .. }) => Standing::Decided(fired.into()),
        }
    }
}
