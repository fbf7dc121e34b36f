//! What the guards made of a request, as answers and the audit log tell it.

use super::snapshot::Snapshot;
use crate::engine::GateReading;
use crate::engine::scheduler::{Block, End, Summary};
use crate::guard::{BLOCKED, Guard, Intervention};
use crate::program::Program;
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// Of a request, all its choices together.
#[derive(Debug, Clone, Serialize)]
pub(super) struct GuardReport {
    pub epoch: u64,
    /// Guards that did something: see [`acted`].
    pub acted: Vec<String>,
    pub blocked: bool,
}

/// Of one of its choices.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct ChoiceReport {
    pub gates: Vec<GateReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_by: Option<BlockReport>,
}

/// A gate's reading.
#[derive(Debug, Clone, Serialize)]
pub(super) struct GateReport {
    pub guard: String,
    pub gate: String,
    /// In standard deviations of benign prompts.
    pub score: Option<f64>,
    pub fired: bool,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct BlockReport {
    pub guard: String,
    pub gate: String,
    pub message: Option<String>,
}

impl GuardReport {
    /// Of requests under `snapshot` that came to these ends, under what became of its program for them.
    pub fn new<'a>(
        snapshot: &Snapshot,
        program: &Program,
        summaries: impl Iterator<Item = &'a Summary> + Clone,
    ) -> Self {
        let blocked = summaries.clone().any(|summary| matches!(summary.end, End::Blocked(_)));
        Self { epoch: snapshot.epoch, acted: acted(snapshot, program, summaries), blocked }
    }
}

impl ChoiceReport {
    pub fn new(snapshot: &Snapshot, summary: &Summary) -> Self {
        let blocked_by = match &summary.end {
            End::Blocked(Block { guard, gate, message }) => {
                let gate = snapshot.split(gate).1.to_owned();
                Some(BlockReport { guard: guard.clone(), gate, message: message.clone() })
            }
            _ => None,
        };
        Self { gates: gate_reports(snapshot, summary), blocked_by }
    }

    /// What a blocked request is told.
    pub fn refusal(&self) -> Option<String> {
        let block = self.blocked_by.as_ref()?;
        // A gate that reads nothing fires: a prompt of one token has nothing but its first position, which none reads.
        let is_unread =
            |gate: &GateReport| gate.guard == block.guard && gate.gate == block.gate && gate.score.is_none();
        if self.gates.iter().any(is_unread) {
            return Some(format!("The guard `{}` could not read this prompt, so it is not answered.", block.guard));
        }
        Some(block.message.clone().unwrap_or_else(|| BLOCKED.to_owned()))
    }
}

/// The guards that a request ran under, as the audit log has them.
pub(super) fn guard_names(snapshot: &Snapshot) -> Vec<Value> {
    let named = |guard: &Arc<Guard>| json!({ "name": guard.name(), "content": guard.content_hash().to_string() });
    snapshot.acting().map(named).collect()
}

/// Readings of a request's gates.
pub(super) fn gate_reports(snapshot: &Snapshot, summary: &Summary) -> Vec<GateReport> {
    let report = |reading: &GateReading| {
        let (guard, gate) = snapshot.split(&reading.gate);
        GateReport { guard: guard.to_owned(), gate: gate.to_owned(), score: reading.score, fired: reading.fired }
    };
    summary.gates.iter().map(report).collect()
}

/// Guards that did something: one that blocked, and those with an intervention that is on and waits for no gate, or of whose gates one fired.
fn acted<'a>(
    snapshot: &Snapshot,
    program: &Program,
    summaries: impl Iterator<Item = &'a Summary> + Clone,
) -> Vec<String> {
    let is_on = |guard: &Guard, intervention: &Intervention| {
        let name = snapshot.name_in_program(guard.name(), &intervention.name);
        program.interventions().any(|(dial, strength)| dial.name == name && strength != 0.0)
    };
    let did = |guard: &Guard, summary: &Summary| {
        let fired = summary.gates.iter().any(|gate| gate.fired && snapshot.split(&gate.gate).0 == guard.name());
        let on = || guard.interventions().iter().filter(|intervention| is_on(guard, intervention));
        match &summary.end {
            End::Blocked(block) if block.guard == guard.name() => true,
            // Another's gate fired, and nothing was written.
            End::Blocked(_) => on().any(|intervention| intervention.when.is_none()),
            _ => on().any(|intervention| intervention.when.is_none() || fired),
        }
    };
    let acted = snapshot.acting().filter(|guard| summaries.clone().any(|summary| did(guard, summary)));
    acted.map(|guard| guard.name().to_owned()).collect()
}
