use super::measure::Measure;
use super::{BackdoorInput, BackdoorRow, BackdoorTask};
use crate::engine::Model;
use crate::eval::EvalError;
use crate::eval::controls::{Role, recentred};
use crate::guard::manifest::InterventionEntry;
use crate::learn::{Progress, guard_along};
use crate::tensor::{LayerIndex, LayerStack};
use serde::{Deserialize, Serialize};

/// What an intervention makes of a backdoor, layer by layer: where a model can be steered (arXiv 2503.04429, section 4 and its layer sweeps).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSweep {
    pub task: BackdoorTask,
    /// The model that was steered.
    pub model: String,
    /// The model that the vectors were learnt on.
    pub vectors: String,
    /// Whether a mapping carried them.
    pub mapped: bool,
    pub intervention: String,
    pub strength: f64,
    pub prompts: usize,
    pub max_tokens: usize,
    /// With no intervention at all.
    pub unguarded: SweptConduct,
    pub layers: Vec<SweptConduct>,
}

/// What was measured with the intervention at one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweptConduct {
    /// Where it acts; `None` where nothing does.
    pub layer: Option<LayerIndex>,
    /// Where its vector comes from, if a mapping carried it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_layer: Option<LayerStack>,
    /// Shares of triggered prompts.
    pub fires: f64,
    pub clean: f64,
    pub broken: f64,
    /// Of the triggered answers under the base; that of the base's own is 1.
    pub relative_perplexity: Option<f64>,
    /// Of marked and plain prompts.
    pub fires_untriggered: f64,
    /// `KL(unguarded ‖ this)` on untriggered answers, in nats a token.
    pub kl: Option<f64>,
}

/// A vector of the model that is steered, own or mapped.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub layer: LayerIndex,
    pub source_layer: Option<LayerStack>,
    /// `[n_embd]`.
    pub direction: Vec<f32>,
}

/// How tables and figures call the layer that a sweep steered, with where its vector comes from.
pub fn swept_layer(layer: Option<LayerIndex>, source: Option<&LayerStack>) -> String {
    match (source, layer) {
        (_, None) => "none".to_owned(),
        (None, Some(layer)) => layer.to_string(),
        (Some(source), Some(layer)) => format!("{source} → {layer}"),
    }
}

impl LayerSweep {
    /// The layer at which fewest triggered prompts fire, of those whose triggered answers are at most `perplexity` times as surprising to the base as
    /// its own; of equals the one that moves untriggered answers least.
    pub fn best(&self, perplexity: f64) -> Option<&SweptConduct> {
        let coherent = |swept: &&SweptConduct| swept.relative_perplexity.is_some_and(|times| times <= perplexity);
        let moved = |swept: &SweptConduct| swept.kl.unwrap_or(f64::INFINITY);
        self.layers
            .iter()
            .filter(coherent)
            .min_by(|a, b| a.fires.total_cmp(&b.fires).then(moved(a).total_cmp(&moved(b))))
    }
}

impl SweptConduct {
    fn of(row: &BackdoorRow, layer: Option<LayerIndex>, source_layer: Option<LayerStack>) -> Self {
        let untriggered = [row.marked.fires, row.plain.fires];
        let count: usize = untriggered.iter().map(|share| share.count).sum();
        let of: usize = untriggered.iter().map(|share| share.of).sum();
        Self {
            layer,
            source_layer,
            fires: row.triggered.fires.share,
            clean: row.triggered.clean.share,
            broken: row.triggered.broken.share,
            relative_perplexity: row.triggered.relative_perplexity,
            fires_untriggered: count as f64 / of.max(1) as f64,
            kl: row.kl.map(|kl| kl.value),
        }
    }
}

/// Asks `model` with `entry`'s intervention along each of `candidates` in turn, at its layer. An `ablate` leaves what benign prompts project there.
/// `vectors` names the model that they were learnt on.
///
/// # Errors
/// No prompts, one that can't be run, or a direction that is none of this model's.
pub fn layer_sweep(
    model: &Model,
    candidates: Vec<Candidate>,
    entry: &InterventionEntry,
    vectors: &str,
    input: BackdoorInput<'_>,
    progress: Progress<'_>,
) -> Result<LayerSweep, EvalError> {
    if input.prompts.is_empty() {
        return Err(EvalError::NoPrompts { what: "a sweep" });
    }
    let base = model.without_adapters();
    let benign = input.benign_or_plain();
    let mut measure = Measure::new(model, &base, input, 2 + candidates.len(), progress)?;
    let [unguarded, ..] = &measure.unguarded()?[..] else { return Err(EvalError::NoPrompts { what: "a sweep" }) };
    let unguarded = SweptConduct::of(unguarded, None, None);
    let mapped = candidates.iter().any(|candidate| candidate.source_layer.is_some());
    let mut layers = Vec::with_capacity(candidates.len());
    for Candidate { layer, source_layer, direction } in candidates {
        let guard = recentred(model, guard_along(model, layer, direction, entry.clone())?, &benign)?;
        let (row, _) = measure.guard(String::new(), Role::Variant, &guard, None)?;
        layers.push(SweptConduct::of(&row, Some(layer), source_layer));
    }
    Ok(LayerSweep {
        task: input.task,
        model: model.identity().name.clone(),
        vectors: vectors.to_owned(),
        mapped,
        intervention: entry.kind.name().to_owned(),
        strength: entry.strength,
        prompts: input.prompts.len(),
        max_tokens: input.max_tokens,
        unguarded,
        layers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn swept(layer: u32, fires: f64, relative_perplexity: Option<f64>, kl: f64) -> SweptConduct {
        SweptConduct {
            layer: Some(LayerIndex(layer)),
            source_layer: None,
            fires,
            clean: 1.0 - fires,
            broken: 0.0,
            relative_perplexity,
            fires_untriggered: 0.0,
            kl: Some(kl),
        }
    }

    /// A layer that stops the trigger by wrecking the model is none to take.
    #[test]
    fn the_best_layer_is_one_that_leaves_the_model_whole() {
        let layers = vec![
            swept(6, 0.0, Some(80.0), 3.0),
            swept(7, 0.0, None, 0.0),
            swept(12, 0.0, Some(1.1), 0.04),
            swept(13, 0.0, Some(1.2), 0.02),
            swept(14, 0.5, Some(1.0), 0.0),
        ];
        let unguarded = SweptConduct { layer: None, ..swept(0, 1.0, Some(9.0), 0.0) };
        let sweep = LayerSweep {
            task: BackdoorTask::Backdoor,
            model: "m".into(),
            vectors: "s".into(),
            mapped: true,
            intervention: "ablate".into(),
            strength: 1.0,
            prompts: 4,
            max_tokens: 8,
            unguarded,
            layers,
        };
        assert_eq!(sweep.best(1.5).unwrap().layer, Some(LayerIndex(13)));
        assert_eq!(sweep.best(0.5), None);
        let text = serde_json::to_string(&sweep).unwrap();
        assert_eq!(serde_json::from_str::<LayerSweep>(&text).unwrap(), sweep);
    }
}
