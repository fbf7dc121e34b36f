use serde::{Deserialize, Serialize};

/// What is known of how good a vector is, from the prompts that it was made of alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorQuality {
    /// Area under the ROC curve for each contrast set, five-fold: every prompt is scored by a vector that was made without its fold, and
    /// the figure is the mean over the folds.
    pub auc: Vec<f64>,
    /// Mean cosine to the vector of those made from bootstrap resamples of its prompts; `None` where none were made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stability: Option<Stability>,
    /// L2 norm of the vector. It is to be compared with the mean norm of the residual.
    pub norm: f64,
    /// Cosine to the vector of the layer before this one and of the one after, where there are such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine_before: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine_after: Option<f64>,
    /// The shrinkage or the penalty that the method was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regularization: Option<f64>,
}

/// How much a vector hangs on the prompts that happened to be there.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stability {
    pub mean_cosine: f64,
    pub resamples: u32,
    pub seed: u64,
}

impl VectorQuality {
    /// The mean of the sets' AUC: they have equal say.
    pub fn mean_auc(&self) -> f64 {
        self.auc.iter().sum::<f64>() / self.auc.len() as f64
    }

    /// Every number, to be checked.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = f64> {
        let others = [
            Some(self.norm),
            self.stability.map(|stability| stability.mean_cosine),
            self.cosine_before,
            self.cosine_after,
            self.regularization,
        ];
        self.auc.iter().copied().chain(others.into_iter().flatten())
    }
}
