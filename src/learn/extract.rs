use super::{Classes, LearnError, Progress, prompt_activations, separation, threads};
use crate::engine::{Activations, Model, Prompt};
use crate::mapping::Standardization;
use crate::steering::{
    ContrastSet, DEFAULT_PENALTY, DEFAULT_SHRINKAGE, Extracted, ExtractionMethod, PromptTokens, SteeringError,
    SteeringVector, VectorQuality, difference_of_means, linear_discriminant, logistic_regression, principal_difference,
};
use crate::tensor::{LayerIndex, Residual, cosine, norm};

/// Steering vectors from classes of prompts, one a layer, each with how well it tells them apart.
#[derive(Debug, Clone)]
pub struct Contrast {
    /// Each with its quality.
    pub vectors: Vec<SteeringVector>,
    /// Area under the ROC curve on held-out prompts (five-fold), a layer each: the mean over the sets.
    pub separation: Vec<(LayerIndex, f64)>,
    /// Of all prompts of all classes, a layer each.
    pub standardization: Vec<Standardization>,
}

/// How vectors are made from classes of prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct ContrastOptions {
    pub method: ContrastMethod,
    pub tokens: PromptTokens,
    /// What each set has to say beside the others; the same where there are none.
    pub weights: Vec<f64>,
    /// Bootstrap resamples for the vectors' stability; with 0 it is not measured.
    pub resamples: u32,
    /// Of the resamples.
    pub seed: u64,
}

impl Default for ContrastOptions {
    /// The difference of the means at the last token, sets with equal say, no resamples.
    fn default() -> Self {
        let (method, tokens) = (ContrastMethod::DifferenceOfMeans, PromptTokens::Last);
        Self { method, tokens, weights: Vec::new(), resamples: 0, seed: 0 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ContrastMethod {
    /// [`difference_of_means`]
    DifferenceOfMeans,
    /// [`principal_difference`]
    PrincipalDifference,
    /// [`linear_discriminant`]
    LinearDiscriminant { shrinkage: f64 },
    /// [`logistic_regression`]
    LogisticRegression { penalty: f64 },
}

impl ContrastMethod {
    /// The method that a vector was made by, with its own regularization where it is known; `None` of an imported one.
    pub fn of(vector: &SteeringVector) -> Option<Self> {
        let known = vector.quality.as_ref().and_then(|quality| quality.regularization);
        Some(match vector.method {
            ExtractionMethod::DifferenceOfMeans => Self::DifferenceOfMeans,
            ExtractionMethod::PrincipalDifference => Self::PrincipalDifference,
            ExtractionMethod::LinearDiscriminant => {
                Self::LinearDiscriminant { shrinkage: known.unwrap_or(DEFAULT_SHRINKAGE) }
            }
            ExtractionMethod::LogisticRegression => {
                Self::LogisticRegression { penalty: known.unwrap_or(DEFAULT_PENALTY) }
            }
            ExtractionMethod::Imported => return None,
        })
    }

    pub(super) fn extract(self, sets: &[ContrastSet<'_>]) -> Result<Extracted, SteeringError> {
        match self {
            Self::DifferenceOfMeans => difference_of_means(sets),
            Self::PrincipalDifference => principal_difference(sets),
            Self::LinearDiscriminant { shrinkage } => linear_discriminant(sets, shrinkage),
            Self::LogisticRegression { penalty } => logistic_regression(sets, penalty),
        }
    }

    fn regularization(self) -> Option<f64> {
        match self {
            Self::DifferenceOfMeans | Self::PrincipalDifference => None,
            Self::LinearDiscriminant { shrinkage } => Some(shrinkage),
            Self::LogisticRegression { penalty } => Some(penalty),
        }
    }

    /// Whether row `i` of one class goes with row `i` of the other.
    pub(super) fn is_paired(self) -> bool {
        self == Self::PrincipalDifference
    }
}

/// Activations of the prompts of one set, as [`prompt_activations`] gives them.
#[derive(Debug, Clone)]
pub struct ClassActivations {
    pub positive: Activations,
    pub negative: Activations,
}

/// Activations at `layers` of the prompts of every set. Prompts that several sets share are read once.
///
/// # Errors
/// What [`prompt_activations`] refuses.
pub fn class_activations(
    model: &Model,
    layers: &[LayerIndex],
    sets: &[Classes<'_>],
    tokens: &PromptTokens,
    progress: Progress<'_>,
) -> Result<Vec<ClassActivations>, LearnError> {
    let mut distinct: Vec<&[Prompt]> = Vec::new();
    for class in sets.iter().flat_map(|set| [set.positive, set.negative]) {
        if !distinct.contains(&class) {
            distinct.push(class);
        }
    }
    let total = distinct.iter().map(|class| class.len()).sum();
    let (mut read, mut done) = (Vec::new(), 0);
    for class in &distinct {
        read.push(prompt_activations(model, layers, class, tokens, &mut |step, _| progress(done + step, total))?);
        done += class.len();
    }
    let of = |class: &[Prompt]| {
        let index = distinct.iter().position(|known| *known == class).expect("every class is among the distinct ones");
        read[index].clone()
    };
    Ok(sets.iter().map(|set| ClassActivations { positive: of(set.positive), negative: of(set.negative) }).collect())
}

/// A vector at every layer of `layers` that tells the positive classes of the `sets` from their negative ones (arXiv 2503.04429, section 3, for the
/// difference in means of one set).
///
/// # Errors
/// Fewer than five prompts in a class, weights that are not one a set, or what [`prompt_activations`] and the method refuse.
pub fn contrast(
    model: &Model,
    layers: &[LayerIndex],
    name: &str,
    sets: &[Classes<'_>],
    options: &ContrastOptions,
    progress: Progress<'_>,
) -> Result<Contrast, LearnError> {
    for set in sets {
        for (what, prompts) in [("the positive class", set.positive), ("the negative class", set.negative)] {
            if prompts.len() < separation::FOLDS {
                return Err(LearnError::TooFewPrompts { what, needed: separation::FOLDS, found: prompts.len() });
            }
        }
    }
    let read = class_activations(model, layers, sets, &options.tokens, progress)?;
    contrast_of_sets(layers, name, &read, options)
}

/// As [`contrast`], of one set's activations that are at hand: what [`prompt_activations`] gave for `layers` and the tokens of `options`.
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
    let set = ClassActivations { positive: positive.clone(), negative: negative.clone() };
    contrast_of_sets(layers, name, &[set], &options)
}

/// As [`contrast`], of activations that are at hand: what [`class_activations`] gave for `layers` and the tokens of `options`.
///
/// # Errors
/// As [`contrast`].
pub fn contrast_of_sets(
    layers: &[LayerIndex],
    name: &str,
    sets: &[ClassActivations],
    options: &ContrastOptions,
) -> Result<Contrast, LearnError> {
    if !options.weights.is_empty() && options.weights.len() != sets.len() {
        return Err(LearnError::Weights { sets: sets.len(), found: options.weights.len() });
    }
    let one = |layer: LayerIndex| -> Result<_, SteeringError> {
        let sets = sets_at(sets, layer, &options.weights);
        let mut vector = options.method.extract(&sets)?.named(name, layer, options.tokens.clone());
        vector.quality = Some(VectorQuality {
            auc: separation::held_out(&sets, options.method)?,
            stability: separation::stability(&sets, options.method, &vector.values, options.resamples, options.seed),
            norm: norm(&vector.values),
            cosine_before: None,
            cosine_after: None,
            regularization: options.method.regularization(),
        });
        let all: Vec<f32> =
            sets.iter().flat_map(|set| [set.positive.values(), set.negative.values()]).flatten().copied().collect();
        let all = Residual::new(&all, sets[0].positive.width()).expect("rows of the same width");
        Ok((vector, Standardization::of(all)))
    };
    // A discriminant, its folds and its resamples take a thread a second or more a layer.
    let found = threads::each(layers, &mut |_, _| (), |layer| {
        one(*layer).map_err(|source| LearnError::Steering { layer: *layer, source })
    })?;
    let (mut vectors, standardization): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    compare_neighbours(&mut vectors);
    let separation = vectors.iter().map(|vector| (vector.layer, auc_of(vector))).collect();
    Ok(Contrast { vectors, separation, standardization })
}

/// The sets' rows at `layer`.
pub(super) fn sets_at<'a>(sets: &'a [ClassActivations], layer: LayerIndex, weights: &[f64]) -> Vec<ContrastSet<'a>> {
    let at = |(index, set): (usize, &'a ClassActivations)| ContrastSet {
        positive: set.positive.layer(layer),
        negative: set.negative.layer(layer),
        weight: weights.get(index).copied().unwrap_or(1.0),
    };
    sets.iter().enumerate().map(at).collect()
}

fn auc_of(vector: &SteeringVector) -> f64 {
    vector.quality.as_ref().map_or(f64::NAN, VectorQuality::mean_auc)
}

fn compare_neighbours(vectors: &mut [SteeringVector]) {
    let cosine_to = |vectors: &[SteeringVector], of: usize, layer: Option<u32>| {
        let other = vectors.iter().find(|other| Some(other.layer.0) == layer)?;
        Some(cosine(&vectors[of].values, &other.values))
    };
    for index in 0..vectors.len() {
        let layer = vectors[index].layer.0;
        let (before, after) =
            (cosine_to(vectors, index, layer.checked_sub(1)), cosine_to(vectors, index, layer.checked_add(1)));
        if let Some(quality) = &mut vectors[index].quality {
            (quality.cosine_before, quality.cosine_after) = (before, after);
        }
    }
}
