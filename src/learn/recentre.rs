use super::{LearnError, Progress};
use crate::engine::{ActivationReader, Model};
use crate::guard::{Guard, InterventionKind};
use crate::tensor::{LayerIndex, dot, unit};

/// Longest prompt, in tokens with its template.
const CAPACITY: usize = 2048;

/// The benign mean projection that every `ablate` of `guard` should recentre on, by the intervention's name: over all tokens of the
/// benign prompts but the first. Plain ablation (a mean of 0) often wrecks a model.
///
/// # Errors
/// A prompt that the model can't run, or an `ablate` at the model's last layer.
pub fn benign_means(
    model: &Model,
    guard: &Guard,
    benign: &[String],
    progress: Progress<'_>,
) -> Result<Vec<(String, f64)>, LearnError> {
    let ablated: Vec<_> = guard
        .interventions()
        .iter()
        .filter_map(|intervention| match intervention.kind {
            InterventionKind::Ablate { vector, .. } => Some((intervention.name.clone(), &guard.vectors()[vector])),
            _ => None,
        })
        .collect();
    if ablated.is_empty() {
        return Ok(Vec::new());
    }
    let mut layers: Vec<LayerIndex> = ablated.iter().map(|(_, vector)| vector.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let directions: Vec<Vec<f32>> =
        ablated.iter().map(|(_, vector)| unit(&vector.direction).unwrap_or_default()).collect();
    let mut reader = ActivationReader::of(model, layers, CAPACITY)?;
    let (mut sums, mut rows) = (vec![0.0; ablated.len()], 0usize);
    for (index, prompt) in benign.iter().enumerate() {
        let activations = reader.every_token(&model.prompt_tokens(prompt)?)?;
        rows += activations.n_rows();
        for ((sum, direction), (_, vector)) in sums.iter_mut().zip(&directions).zip(&ablated) {
            *sum += activations.layer(vector.layer).rows().map(|row| f64::from(dot(row, direction))).sum::<f64>();
        }
        progress(index + 1, benign.len());
    }
    Ok(ablated.into_iter().zip(sums).map(|((name, _), sum)| (name, sum / rows.max(1) as f64)).collect())
}
