use super::{LearnError, Progress};
use crate::engine::{ActivationReader, Activations, Model};
use crate::mapping::Standardization;
use crate::steering::{SteeringVector, difference_of_means};
use crate::tensor::{LayerIndex, Residual, auc, dot};

/// Steering vectors from two classes of prompts, one a layer, each with how well it tells them apart.
#[derive(Debug, Clone)]
pub struct Contrast {
    pub vectors: Vec<SteeringVector>,
    /// Area under the ROC curve of projections on held-out prompts (five-fold), a layer each.
    pub separation: Vec<(LayerIndex, f64)>,
    /// Of all prompts of both classes at their last token, a layer each.
    pub standardization: Vec<Standardization>,
}

/// Folds of the cross-validated separation.
const FOLDS: usize = 5;

/// The longest prompt, in tokens with its template.
const CAPACITY: usize = 2048;

/// Activations at `layers` of the last token of every prompt, one row a prompt, all layers in one pass.
///
/// # Errors
/// A prompt that the model can't run.
pub fn last_token_activations(
    model: &Model,
    layers: &[LayerIndex],
    prompts: &[String],
    progress: Progress<'_>,
) -> Result<Activations, LearnError> {
    let mut reader = ActivationReader::of(model, layers.to_vec(), CAPACITY)?;
    let mut all = Activations::default();
    for (index, prompt) in prompts.iter().enumerate() {
        all.append(reader.last_token(&model.prompt_tokens(prompt)?)?);
        progress(index + 1, prompts.len());
    }
    Ok(all)
}

/// The direction from the mean of `negative` to the mean of `positive` at every layer of `layers`, at the prompts' last token
/// (arXiv 2503.04429, section 3: difference in means).
///
/// # Errors
/// Fewer than five prompts in a class, or prompts that the model can't run.
pub fn contrast(
    model: &Model,
    layers: &[LayerIndex],
    name: &str,
    positive: &[String],
    negative: &[String],
    progress: Progress<'_>,
) -> Result<Contrast, LearnError> {
    for (what, prompts) in [("the positive class", positive), ("the negative class", negative)] {
        if prompts.len() < FOLDS {
            return Err(LearnError::TooFewPrompts { what, needed: FOLDS, found: prompts.len() });
        }
    }
    let total = positive.len() + negative.len();
    let positive = last_token_activations(model, layers, positive, &mut |done, _| progress(done, total))?;
    let before = positive.n_rows();
    let negative = last_token_activations(model, layers, negative, &mut |done, _| progress(before + done, total))?;
    let mut found = Contrast { vectors: Vec::new(), separation: Vec::new(), standardization: Vec::new() };
    for layer in layers {
        let (positive, negative) = (positive.layer(*layer), negative.layer(*layer));
        let extracted =
            difference_of_means(positive, negative).map_err(|source| LearnError::Steering { layer: *layer, source })?;
        found.vectors.push(extracted.named(name, *layer));
        let separation =
            separation(positive, negative).map_err(|source| LearnError::Steering { layer: *layer, source })?;
        found.separation.push((*layer, separation));
        let both = [positive.values(), negative.values()].concat();
        let both = Residual::new(&both, positive.width()).expect("rows of the same width");
        found.standardization.push(Standardization::of(both));
    }
    Ok(found)
}

/// Cross-validated AUC: every prompt is scored by a direction that was made without its fold.
fn separation(positive: Residual<'_>, negative: Residual<'_>) -> Result<f64, crate::steering::SteeringError> {
    let split = |class: Residual<'_>, fold: usize| {
        let (mut kept, mut held) = (Vec::new(), Vec::new());
        for (index, row) in class.rows().enumerate() {
            if index % FOLDS == fold { &mut held } else { &mut kept }.extend_from_slice(row);
        }
        (kept, held)
    };
    let mut total = 0.0;
    for fold in 0..FOLDS {
        let width = positive.width();
        let rows = |values| Residual::new(values, width).expect("whole rows of the same width");
        let (kept_positive, held_positive) = split(positive, fold);
        let (kept_negative, held_negative) = split(negative, fold);
        let direction = difference_of_means(rows(&kept_positive), rows(&kept_negative))?.values;
        let scores = |values: &[f32]| -> Vec<f64> {
            values.chunks_exact(width).map(|row| f64::from(dot(row, &direction))).collect()
        };
        total += auc(&scores(&held_positive), &scores(&held_negative));
    }
    Ok(total / FOLDS as f64)
}
