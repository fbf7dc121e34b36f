use super::activations::rows_of;
use super::{LearnError, Progress};
use crate::engine::{ActivationReader, Model, Prompt};
use crate::guard::{Guard, Intervention, InterventionKind};
use crate::tensor::{LayerIndex, dot, mean_and_deviation, unit};

/// Longest prompt, in tokens with its template.
const CAPACITY: usize = 2048;

/// What benign prompts give along an intervention's unit vector at its layer, over those of their tokens that it names, never the first.
#[derive(Debug, Clone, PartialEq)]
pub struct BenignProjection {
    pub intervention: String,
    /// What an `ablate` should leave: plain ablation (a mean of 0) often wrecks a model.
    pub mean: f64,
    /// The unit in which an `add` can be measured.
    pub deviation: f64,
}

/// The benign projections of those interventions of `guard` that are `wanted` and have a vector.
///
/// # Errors
/// A prompt that the model can't run or that has no such token, an intervention at the model's last layer, or fewer than two tokens in all.
pub fn benign_projections(
    model: &Model,
    guard: &Guard,
    wanted: impl Fn(&Intervention) -> bool,
    benign: &[Prompt],
    progress: Progress<'_>,
) -> Result<Vec<BenignProjection>, LearnError> {
    let measured: Vec<_> = guard
        .interventions()
        .iter()
        .filter(|known| wanted(known))
        .filter_map(|intervention| {
            let vector = &guard.vectors()[intervention.kind.vector()?];
            Some((intervention, vector.layer, unit(&vector.direction)?))
        })
        .collect();
    if measured.is_empty() {
        return Ok(Vec::new());
    }
    let mut layers: Vec<LayerIndex> = measured.iter().map(|(_, layer, _)| *layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let mut reader = ActivationReader::of(model, layers, CAPACITY)?;
    let mut projections = vec![Vec::new(); measured.len()];
    for (index, prompt) in benign.iter().enumerate() {
        let ids = model.tokens_read(None, prompt)?;
        let activations = reader.every_token(&ids)?;
        for (projections, (intervention, layer, unit)) in projections.iter_mut().zip(&measured) {
            let tokens = &intervention.benign_tokens;
            let rows = rows_of(model, &ids, tokens);
            if rows.is_empty() {
                return Err(LearnError::NoSuchToken { tokens: tokens.clone(), index });
            }
            projections.extend(rows.into_iter().map(|row| f64::from(dot(activations.layer(*layer).row(row), unit))));
        }
        progress(index + 1, benign.len());
    }
    let projection = |((intervention, ..), projections): ((&Intervention, LayerIndex, Vec<f32>), Vec<f64>)| {
        // What an `ablate` leaves may be the same in every prompt, as at a mark that they all begin with.
        let adds = matches!(intervention.kind, InterventionKind::Add { .. });
        let intervention = intervention.name.clone();
        let (mean, deviation) = mean_and_deviation(&projections)
            .filter(|(_, deviation)| !adds || *deviation > 0.0)
            .ok_or(LearnError::NoSpread { gate: intervention.clone(), found: benign.len() })?;
        Ok(BenignProjection { intervention, mean, deviation })
    };
    measured.into_iter().zip(projections).map(projection).collect()
}
