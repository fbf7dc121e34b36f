use super::{Classes, LearnError, Progress, prompt_activations};
use crate::engine::Model;
use crate::guard::{Readout, carry};
use crate::mapping::ResidualMap;
use crate::steering::{PromptTokens, SteeringVector, stacked};
use crate::tensor::{LayerIndex, auc, dot};

/// How well each of `maps` carries its source layer's vector over: the AUC of what a gate with this `readout` of the carried vector reads
/// from `tokens` of positive against negative prompts in the target `model`, in the order of `maps`; `None` where `vectors` has none of that
/// source layer, or the map can't carry it.
///
/// The prompts should be those that the vectors were made from. Variance explained says how much of the residual a map carries, this
/// how much of the one direction that matters.
///
/// # Errors
/// A prompt that the model can't run.
pub fn separation_by_map(
    model: &Model,
    vectors: &[SteeringVector],
    maps: &[&ResidualMap],
    readout: Readout,
    tokens: PromptTokens,
    Classes { positive, negative }: Classes<'_>,
    progress: Progress<'_>,
) -> Result<Vec<Option<f64>>, LearnError> {
    let mut layers: Vec<LayerIndex> = maps.iter().map(|map| map.target_layer()).collect();
    layers.sort_unstable();
    layers.dedup();
    let total = positive.len() + negative.len();
    let positive = prompt_activations(model, &layers, positive, tokens, &mut |done, _| progress(done, total))?;
    let before = positive.n_rows();
    let negative = prompt_activations(model, &layers, negative, tokens, &mut |done, _| progress(before + done, total))?;
    Ok(maps
        .iter()
        .map(|map| {
            let vector = stacked(vectors, &map.source_layer())?;
            let means = vector.class_means.as_ref();
            let mut mapped = carry(map, vector.method.kind(), &vector.values, means).ok()?;
            if readout == Readout::Standardized {
                mapped = map.target().readout(&mapped);
            }
            let scores = |activations: &crate::engine::Activations| -> Vec<f64> {
                activations.layer(map.target_layer()).rows().map(|row| f64::from(dot(row, &mapped))).collect()
            };
            Some(auc(&scores(&positive), &scores(&negative)))
        })
        .collect())
}
