use super::extract::sets_at;
use super::separation::{FOLDS, auc_of_fold, without_fold};
use super::{Classes, ContrastMethod, LearnError, Progress, class_activations, threads};
use crate::engine::Model;
use crate::guard::{Readout, carry};
use crate::mapping::ResidualMap;
use crate::steering::{Extracted, SteeringVector, stacked};
use crate::tensor::LayerIndex;

/// How well each of `maps` carries its source layer's vector over, in the order of `maps`: the cross-validated AUC of what a gate with this
/// `readout` reads in the `target` of positive against negative prompts, the mean over the sets and five folds. Every prompt is read along a vector
/// that was made without it in the `source`, and carried; an imported vector was made without any of them. `None` where `vectors` has none of that
/// source layer, or the map can't carry it.
///
/// The prompts should be those that the vectors were made from. Variance explained says how much of the residual a map carries, this
/// how much of the one direction that matters.
///
/// # Errors
/// Fewer than five prompts in a class, or one that a model can't run.
pub fn separation_by_map(
    source: &Model,
    target: &Model,
    vectors: &[SteeringVector],
    maps: &[&ResidualMap],
    readout: Readout,
    sets: &[Classes<'_>],
    progress: Progress<'_>,
) -> Result<Vec<Option<f64>>, LearnError> {
    for prompts in sets.iter().flat_map(|set| [set.positive, set.negative]) {
        if prompts.len() < FOLDS {
            let what = "choosing layers, in either class,";
            return Err(LearnError::TooFewPrompts { what, needed: FOLDS, found: prompts.len() });
        }
    }
    let Some(first) = vectors.first() else { return Ok(vec![None; maps.len()]) };
    let usable: Vec<_> = maps.iter().filter(|map| stacked(vectors, &map.source_layer()).is_some()).collect();
    let from = distinct(usable.iter().flat_map(|map| map.source_layer().layers().to_vec()));
    let to = distinct(usable.iter().map(|map| map.target_layer()));
    let from_activations =
        class_activations(source, &from, sets, &first.tokens, &mut |done, total| progress(done, 2 * total))?;
    let to_activations =
        class_activations(target, &to, sets, &first.tokens, &mut |done, total| progress(total + done, 2 * total))?;

    // Of each source layer, the vector without each fold.
    let made = threads::each(&from, &mut |_, _| (), |layer| {
        let vector = vectors.iter().find(|vector| vector.layer == *layer).expect("a layer of a vector");
        let sets = sets_at(&from_activations, *layer, &[]);
        let fold = |fold| match ContrastMethod::of(vector) {
            Some(method) => {
                let Extracted { values, class_means, .. } = without_fold(&sets, method, fold)?;
                Ok(SteeringVector { values, class_means, ..vector.clone() })
            }
            None => Ok(vector.clone()),
        };
        let made = (0..FOLDS).map(fold).collect::<Result<Vec<_>, _>>();
        made.map_err(|source| LearnError::Steering { layer: *layer, source })
    })?;
    let folds: Vec<Vec<SteeringVector>> =
        (0..FOLDS).map(|fold| made.iter().map(|of_layer| of_layer[fold].clone()).collect()).collect();
    let separation = |map: &ResidualMap| {
        let sets = sets_at(&to_activations, map.target_layer(), &[]);
        let mut total = 0.0;
        for (fold, vectors) in folds.iter().enumerate() {
            let carried = read_along(map, &stacked(vectors, &map.source_layer())?, readout)?;
            total += sets.iter().map(|set| auc_of_fold(set.positive, set.negative, fold, &carried)).sum::<f64>();
        }
        Some(total / (FOLDS * sets.len()) as f64)
    };
    Ok(maps.iter().map(|map| separation(map)).collect())
}

/// What a gate with this `readout` of the carried vector projects on.
fn read_along(map: &ResidualMap, vector: &SteeringVector, readout: Readout) -> Option<Vec<f32>> {
    let carried = carry(map, vector.method.kind(), &vector.values, vector.class_means.as_ref()).ok()?;
    Some(if readout == Readout::Standardized { map.target().readout(&carried) } else { carried })
}

fn distinct(layers: impl Iterator<Item = LayerIndex>) -> Vec<LayerIndex> {
    let mut layers: Vec<_> = layers.collect();
    layers.sort_unstable();
    layers.dedup();
    layers
}
