use super::rules::RULES_VERSION;
use super::steering::{Behaviour, SteeringInput, SteeringRow, Subject};
use crate::engine::Model;
use crate::eval::EvalError;
use crate::eval::backdoor::Candidate;
use crate::eval::controls::{Role, recentred};
use crate::guard::manifest::InterventionEntry;
use crate::learn::{Progress, guard_along};
use crate::tensor::{LayerIndex, LayerStack};
use serde::{Deserialize, Serialize};

/// What an intervention without any gate makes of answers to harmful and harmless prompts, layer by layer: where a model can be made to refuse.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusalSweep {
    /// The model that was steered.
    pub model: String,
    /// The model that the vectors were learnt on.
    pub vectors: String,
    /// Whether a mapping carried them.
    pub mapped: bool,
    pub intervention: String,
    pub strength: f64,
    pub max_tokens: usize,
    /// Of the rules by which answers are judged.
    pub rules_version: u32,
    /// With no intervention at all.
    pub unguarded: RefusalsAt,
    pub layers: Vec<RefusalsAt>,
}

/// What was measured with the intervention at one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusalsAt {
    /// Where it acts; `None` where nothing does.
    pub layer: Option<LayerIndex>,
    /// Where its vector comes from, if a mapping carried it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source_layer: Option<LayerStack>,
    pub harmful: Behaviour,
    pub harmless: Behaviour,
}

impl RefusalSweep {
    /// The layer at which most harmful prompts are refused, of those whose answers to them are at most `perplexity` times as surprising to the
    /// unguarded model as its own; of equals the one at which fewest harmless ones are.
    pub fn best(&self, perplexity: f64) -> Option<&RefusalsAt> {
        let coherent = |at: &&RefusalsAt| at.harmful.relative_perplexity.is_some_and(|times| times <= perplexity);
        self.layers.iter().filter(coherent).max_by(|a, b| {
            let refused = |at: &RefusalsAt| (at.harmful.refuses.share, -at.harmless.refuses.share);
            let (a, b) = (refused(a), refused(b));
            a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
        })
    }
}

/// Steers `model` with `entry`'s intervention along each of `candidates` in turn, at its layer. An `ablate` leaves what the harmless prompts project
/// there. `vectors` names the model that they were learnt on.
///
/// # Errors
/// A class without prompts, one that can't be run, or a direction that is none of this model's.
pub fn refusal_sweep(
    model: &Model,
    candidates: Vec<Candidate>,
    entry: &InterventionEntry,
    vectors: &str,
    input: SteeringInput<'_>,
    progress: Progress<'_>,
) -> Result<RefusalSweep, EvalError> {
    let mut subject = Subject::new(model, input, 1 + candidates.len(), progress)?;
    let at = |row: SteeringRow, layer, source_layer| RefusalsAt {
        layer,
        source_layer,
        harmful: row.harmful,
        harmless: row.harmless,
    };
    let unguarded = at(subject.unguarded_row()?, None, None);
    let mapped = candidates.iter().any(|candidate| candidate.source_layer.is_some());
    let mut layers = Vec::with_capacity(candidates.len());
    for Candidate { layer, source_layer, direction } in candidates {
        let guard = recentred(model, guard_along(model, layer, direction, entry.clone())?, input.harmless)?;
        let answers = subject.answers(&guard, None)?;
        layers.push(at(subject.row(String::new(), Role::Variant, &answers)?, Some(layer), source_layer));
    }
    Ok(RefusalSweep {
        model: model.identity().name.clone(),
        vectors: vectors.to_owned(),
        mapped,
        intervention: entry.kind.name().to_owned(),
        strength: entry.strength,
        max_tokens: input.max_tokens,
        rules_version: RULES_VERSION,
        unguarded,
        layers,
    })
}
