/// How well a map predicts rows of documents it was not fitted on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MappingQuality {
    /// The chosen penalty, as a multiple of the number of rows.
    pub lambda: f64,
    /// Fraction of variance unexplained, `Σ‖z − ẑ‖² / Σ‖z‖²` over held-out rows: `z` is the target standardised with the mean and
    /// scale of the training rows, so 1 is what predicting their mean scores. A bad map can exceed 1.
    pub fraction_unexplained: f64,
    /// Mean over held-out rows of the cosine of `ẑ` and `z`.
    pub cosine: f64,
    pub n_train: usize,
    pub n_heldout: usize,
    /// Of the regression the other way round, where there is one ([`AffineMap::backward`](super::AffineMap::backward)).
    pub backward: Option<FitQuality>,
}

/// How well a regression predicts held-out rows: fields as in [`MappingQuality`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FitQuality {
    pub lambda: f64,
    pub fraction_unexplained: f64,
    pub cosine: f64,
}

impl From<MappingQuality> for FitQuality {
    fn from(MappingQuality { lambda, fraction_unexplained, cosine, .. }: MappingQuality) -> Self {
        Self { lambda, fraction_unexplained, cosine }
    }
}
