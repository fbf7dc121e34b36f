use super::{Classes, LearnError, Progress, threads};
use crate::engine::{ActivationReader, Activations, Model};
use crate::mapping::Standardization;
use crate::steering::{
    Extracted, PromptTokens, SteeringError, SteeringVector, difference_of_means, linear_discriminant,
};
use crate::tensor::{LayerIndex, Residual, auc, dot};

/// Steering vectors from two classes of prompts, one a layer, each with how well it tells them apart.
#[derive(Debug, Clone)]
pub struct Contrast {
    pub vectors: Vec<SteeringVector>,
    /// Area under the ROC curve of projections on held-out prompts (five-fold), a layer each.
    pub separation: Vec<(LayerIndex, f64)>,
    /// Of all prompts of both classes, a layer each.
    pub standardization: Vec<Standardization>,
}

/// Folds of the cross-validated separation.
const FOLDS: usize = 5;

/// The longest prompt, in tokens with its template.
const CAPACITY: usize = 2048;

/// How vectors are made from two classes of prompts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContrastOptions {
    pub method: ContrastMethod,
    pub tokens: PromptTokens,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ContrastMethod {
    /// [`difference_of_means`]
    DifferenceOfMeans,
    /// [`linear_discriminant`]
    LinearDiscriminant { shrinkage: f64 },
}

impl ContrastMethod {
    fn extract(self, positive: Residual<'_>, negative: Residual<'_>) -> Result<Extracted, SteeringError> {
        match self {
            Self::DifferenceOfMeans => difference_of_means(positive, negative),
            Self::LinearDiscriminant { shrinkage } => linear_discriminant(positive, negative, shrinkage),
        }
    }
}

/// Activations at `layers` of every prompt, one row a prompt, all layers in one pass: of its last token, or their mean over all its
/// tokens but the first.
///
/// # Errors
/// A prompt that the model can't run, or of which nothing is left without its first token; and, for a mean, the model's last layer.
pub fn prompt_activations(
    model: &Model,
    layers: &[LayerIndex],
    prompts: &[String],
    tokens: PromptTokens,
    progress: Progress<'_>,
) -> Result<Activations, LearnError> {
    let mut reader = ActivationReader::of(model, layers.to_vec(), CAPACITY)?;
    let mut all = Activations::default();
    for (index, prompt) in prompts.iter().enumerate() {
        let prompt = model.prompt_tokens(prompt)?;
        all.append(match tokens {
            PromptTokens::Last => reader.last_token(&prompt)?,
            PromptTokens::Mean => reader.every_token(&prompt)?.mean().ok_or(LearnError::NothingToAverage { index })?,
        });
        progress(index + 1, prompts.len());
    }
    Ok(all)
}

/// A vector at every layer of `layers` that tells the positive class of prompts from the negative one (arXiv 2503.04429, section 3, for the difference
/// in means).
///
/// # Errors
/// Fewer than five prompts in a class, or what [`prompt_activations`] refuses.
pub fn contrast(
    model: &Model,
    layers: &[LayerIndex],
    name: &str,
    Classes { positive, negative }: Classes<'_>,
    options: ContrastOptions,
    progress: Progress<'_>,
) -> Result<Contrast, LearnError> {
    for (what, prompts) in [("the positive class", positive), ("the negative class", negative)] {
        if prompts.len() < FOLDS {
            return Err(LearnError::TooFewPrompts { what, needed: FOLDS, found: prompts.len() });
        }
    }
    let total = positive.len() + negative.len();
    let tokens = options.tokens;
    let positive = prompt_activations(model, layers, positive, tokens, &mut |done, _| progress(done, total))?;
    let before = positive.n_rows();
    let negative = prompt_activations(model, layers, negative, tokens, &mut |done, _| progress(before + done, total))?;
    contrast_of(layers, name, &positive, &negative, options)
}

/// As [`contrast`], of activations that are at hand: what [`prompt_activations`] gave for `layers` and the tokens of `options`.
///
/// # Errors
/// As [`contrast`].
pub fn contrast_of(
    layers: &[LayerIndex],
    name: &str,
    positive: &Activations,
    negative: &Activations,
    options: ContrastOptions,
) -> Result<Contrast, LearnError> {
    let one = |layer: LayerIndex| -> Result<_, SteeringError> {
        let (positive, negative) = (positive.layer(layer), negative.layer(layer));
        let vector = options.method.extract(positive, negative)?.named(name, layer, options.tokens);
        let both = [positive.values(), negative.values()].concat();
        let both = Residual::new(&both, positive.width()).expect("rows of the same width");
        Ok((vector, separation(positive, negative, options.method)?, Standardization::of(both)))
    };
    let mut all = Contrast { vectors: Vec::new(), separation: Vec::new(), standardization: Vec::new() };
    // A discriminant takes a thread a second or more a layer.
    let found = threads::each(layers, &mut |_, _| (), |layer| {
        one(*layer).map_err(|source| LearnError::Steering { layer: *layer, source })
    })?;
    for (layer, (vector, separation, standardization)) in layers.iter().zip(found) {
        all.vectors.push(vector);
        all.separation.push((*layer, separation));
        all.standardization.push(standardization);
    }
    Ok(all)
}

/// Cross-validated AUC: every prompt is scored by a vector that was made without its fold.
fn separation(positive: Residual<'_>, negative: Residual<'_>, method: ContrastMethod) -> Result<f64, SteeringError> {
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
        let direction = method.extract(rows(&kept_positive), rows(&kept_negative))?.values;
        let scores = |values: &[f32]| -> Vec<f64> {
            values.chunks_exact(width).map(|row| f64::from(dot(row, &direction))).collect()
        };
        total += auc(&scores(&held_positive), &scores(&held_negative));
    }
    Ok(total / FOLDS as f64)
}
