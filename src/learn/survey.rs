use crate::tensor::{LayerIndex, LayerStack};
use serde::{Deserialize, Serialize};

/// What was found of every pair of layers, for people and plots: which layers of two models hold the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Survey {
    /// Names of the two models.
    pub source: String,
    pub target: String,
    /// Paired tokens and documents that they come from.
    pub n_tokens: usize,
    pub n_documents: usize,
    /// In the order of the source's layers, then the target's.
    pub pairs: Vec<SurveyedPair>,
}

impl Survey {
    pub fn pair(&self, source: &LayerStack, target: LayerIndex) -> Option<&SurveyedPair> {
        self.pairs.iter().find(|pair| pair.source_layer == *source && pair.target_layer == target)
    }
}

/// A pair of layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SurveyedPair {
    pub source_layer: LayerStack,
    pub target_layer: LayerIndex,
    /// The chosen penalty, as a multiple of the number of rows.
    pub lambda: f64,
    /// Of the variance of the first part of the documents, predicted from the others.
    pub fraction_unexplained: f64,
    /// The same with each part predicted in turn.
    pub cross_validated: f64,
    /// Mean cosine of a predicted and a true row of the first part.
    pub cosine: f64,
    /// Mean squared canonical correlation ([`Similarity::cca`](crate::mapping::Similarity::cca)).
    pub cca: f64,
    /// Linear centred kernel alignment.
    pub cka: f64,
    /// Of the variance of the source's rows, predicted from the target's; for pairs of which a map was fitted.
    pub backward_unexplained: Option<f64>,
}

/// What makes one pair of layers better than another, without a look at any vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RankBy {
    /// A low [`cross_validated`](SurveyedPair::cross_validated) fraction.
    #[default]
    Unexplained,
    /// A high [`cca`](SurveyedPair::cca).
    Canonical,
}

impl RankBy {
    /// The lower the better.
    pub(super) fn cost(self, pair: &SurveyedPair) -> f64 {
        match self {
            Self::Unexplained => pair.cross_validated,
            Self::Canonical => -pair.cca,
        }
    }
}
