use super::{AffineMap, Autoencoder, AutoencoderQuality, Factors, MappingError, MappingQuality, Standardization};
use crate::tensor::{LayerIndex, LayerStack};

/// A map between residuals, of either kind.
#[derive(Debug, Clone, PartialEq)]
pub enum ResidualMap {
    Affine(AffineMap),
    Autoencoder(Autoencoder),
}

impl ResidualMap {
    /// Several where the map reads their residuals beside each other, as one row.
    pub fn source_layer(&self) -> LayerStack {
        match self {
            Self::Affine(map) => map.source_layer().clone(),
            Self::Autoencoder(map) => map.source_layer().into(),
        }
    }

    pub fn target_layer(&self) -> LayerIndex {
        match self {
            Self::Affine(map) => map.target_layer(),
            Self::Autoencoder(map) => map.target_layer(),
        }
    }

    /// `d_s`
    pub fn source_width(&self) -> usize {
        match self {
            Self::Affine(map) => map.source_width(),
            Self::Autoencoder(map) => map.source_width(),
        }
    }

    /// `d_t`
    pub fn target_width(&self) -> usize {
        match self {
            Self::Affine(map) => map.target_width(),
            Self::Autoencoder(map) => map.target_width(),
        }
    }

    /// `μ_t`, `σ_t`
    pub fn target(&self) -> &Standardization {
        match self {
            Self::Affine(map) => map.target(),
            Self::Autoencoder(map) => map.target(),
        }
    }

    /// What a map between residuals of one space adds to them in the mean, `[d]`: over the rows that it was fitted on.
    pub fn mean_change(&self) -> Vec<f32> {
        let source = match self {
            Self::Affine(map) if map.is_correction() => return map.target().mean.clone(),
            Self::Affine(map) => map.source(),
            Self::Autoencoder(map) => map.source(),
        };
        self.target().mean.iter().zip(&source.mean).map(|(target, source)| target - source).collect()
    }

    /// The correction that adds [`mean_change`](Self::mean_change) whatever it reads: a control, for what more a map does.
    ///
    /// # Errors
    /// A map between two widths, or from several layers.
    pub fn mean_alone(&self) -> Result<Self, MappingError> {
        let (mean, width) = (self.mean_change(), self.target_width());
        let nothing = Factors { rank: 1, left: vec![0.0; self.source_width()], right: vec![0.0; width] };
        let source = Standardization { mean: vec![0.0; self.source_width()], scale: vec![1.0; self.source_width()] };
        let target = Standardization { mean, scale: vec![1.0; width] };
        let map = AffineMap::of_low_rank(self.source_layer(), self.target_layer(), source, target, nothing)?;
        Ok(Self::Affine(map.into_correction()?))
    }

    /// The correction whose change is as long, in another direction: a control. `None` where this is no correction.
    pub fn turned(&self, seed: u64) -> Option<Self> {
        match self {
            Self::Affine(map) => Some(Self::Affine(map.turned(seed)?)),
            Self::Autoencoder(_) => None,
        }
    }

    /// A residual, `[d_s]` to `[d_t]`, in `f64`.
    ///
    /// # Panics
    /// If `x` is not [`source_width`](Self::source_width) long.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Self::Affine(map) => map.apply_f64(x),
            Self::Autoencoder(map) => map.apply(x),
        }
    }
}

/// How well a map of either kind predicts rows of documents that it was not made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MapQuality {
    Affine(MappingQuality),
    Autoencoder(AutoencoderQuality),
}

impl MapQuality {
    /// Squared error over the target's variance, in standardized units; 0 is perfect, 1 is what the mean alone gives.
    pub fn fraction_unexplained(&self) -> f64 {
        match self {
            Self::Affine(quality) => quality.fraction_unexplained,
            Self::Autoencoder(quality) => quality.fraction_unexplained,
        }
    }

    /// Mean cosine of predicted and true rows, in standardized units.
    pub fn cosine(&self) -> f64 {
        match self {
            Self::Affine(quality) => quality.cosine,
            Self::Autoencoder(quality) => quality.cosine,
        }
    }

    pub fn n_train(&self) -> usize {
        match self {
            Self::Affine(quality) => quality.n_train,
            Self::Autoencoder(quality) => quality.n_train,
        }
    }
}

/// What becomes of the target's output when the residual at the mapped layer is replaced by what the map makes of the source's (arXiv
/// 2503.04429, App. C), on documents that the map was not made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplacementQuality {
    /// Mean Kullback-Leibler divergence of the target's next-token distribution from what it is untouched, in nats a token.
    pub kl: f64,
    /// The same with the target's mean in the same rows: what a map that knows nothing would give.
    pub kl_mean_ablation: f64,
    /// Part of the tokens whose residual was replaced. The others, which no token of the source ends with, kept their own.
    pub replaced: f64,
    /// Tokens that the divergences are means over: all but the first of each document.
    pub n_tokens: usize,
    pub n_documents: usize,
}
