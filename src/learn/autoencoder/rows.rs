use super::network::Network;
use super::{AutoencoderOptions, PairedRows};
use crate::guard::Digest;
use crate::mapping::{AutoencoderQuality, Folds, MappingError, Standardization};
use crate::tensor::{Residual, cosine};
use candle_core::{Device, Result, Tensor};

/// Rows of the held-out documents that are predicted at once.
const CHUNK: usize = 1024;

/// Paired rows on the device, standardised by the training rows.
pub(super) struct Rows {
    pub source: Standardization,
    pub target: Standardization,
    /// `[n, d_s]` and `[n, d_t]`
    train: (Tensor, Tensor),
    heldout: (Tensor, Tensor),
    /// Of all rows and the documents that they are from.
    pub digest: Digest,
}

impl Rows {
    pub fn new(
        rows: PairedRows<'_>,
        options: &AutoencoderOptions,
        device: &Device,
    ) -> std::result::Result<Self, super::TrainingError> {
        let PairedRows { source, target, documents } = rows;
        for (what, found) in [("`source`", source.n_rows()), ("`target`", target.n_rows())] {
            if found != documents.len() {
                return Err(MappingError::RowCount { what, expected: documents.len(), found }.into());
            }
        }
        for (side, rows) in [("source", source), ("target", target)] {
            if let Some((row, index, value)) = rows.first_non_finite() {
                return Err(MappingError::NonFiniteRow { side, row, index, value }.into());
            }
        }
        let folds = Folds::new(documents, options.folds, false, options.seed)?;
        let (train, heldout) = (folds.train(), folds.heldout());
        let standardization = |rows: Residual<'_>| {
            let values: Vec<f32> = train.iter().flat_map(|row| rows.row(*row)).copied().collect();
            Standardization::of(Residual::new(&values, rows.width()).expect("whole rows"))
        };
        let (by_source, by_target) = (standardization(source), standardization(target));
        let both = |which: &[usize]| -> Result<(Tensor, Tensor)> {
            Ok((standardized(source, &by_source, which, device)?, standardized(target, &by_target, which, device)?))
        };
        Ok(Self {
            train: both(train)?,
            heldout: both(heldout)?,
            digest: digest(source, target, documents),
            source: by_source,
            target: by_target,
        })
    }

    pub fn n_train(&self) -> usize {
        self.train.0.dims()[0]
    }

    /// Training rows by number.
    pub fn batch(&self, rows: &[u32]) -> Result<(Tensor, Tensor)> {
        let rows = Tensor::new(rows, self.train.0.device())?;
        Ok((self.train.0.index_select(&rows, 0)?, self.train.1.index_select(&rows, 0)?))
    }

    /// Mean squared error over the held-out rows.
    pub fn heldout_loss(&self, network: &Network) -> Result<f64> {
        let mut sum = 0.0;
        self.each_heldout(network, |predicted, actual| sum += squared(predicted, actual))?;
        Ok(sum / self.heldout.1.elem_count() as f64)
    }

    pub fn quality(&self, network: &Network) -> std::result::Result<AutoencoderQuality, super::TrainingError> {
        let (mut unexplained, mut total, mut cosines) = (0.0f64, 0.0f64, 0.0f64);
        self.each_heldout(network, |predicted, actual| {
            unexplained += squared(predicted, actual);
            total += actual.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
            cosines += cosine(predicted, actual);
        })?;
        if total == 0.0 {
            return Err(MappingError::ConstantTarget.into());
        }
        let n_heldout = self.heldout.0.dims()[0];
        Ok(AutoencoderQuality {
            fraction_unexplained: unexplained / total,
            cosine: cosines / n_heldout as f64,
            n_train: self.n_train(),
            n_heldout,
        })
    }

    /// Shows each held-out row as it is predicted and as it is.
    fn each_heldout(&self, network: &Network, mut each: impl FnMut(&[f32], &[f32])) -> Result<()> {
        let (x, y) = &self.heldout;
        let (n, width) = y.dims2()?;
        for start in (0..n).step_by(CHUNK) {
            let count = CHUNK.min(n - start);
            let predicted = network.forward(&x.narrow(0, start, count)?)?.flatten_all()?.to_vec1::<f32>()?;
            let actual = y.narrow(0, start, count)?.flatten_all()?.to_vec1::<f32>()?;
            predicted.chunks_exact(width).zip(actual.chunks_exact(width)).for_each(|(p, a)| each(p, a));
        }
        Ok(())
    }
}

fn squared(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

fn standardized(rows: Residual<'_>, by: &Standardization, which: &[usize], device: &Device) -> Result<Tensor> {
    let mut values = Vec::with_capacity(which.len() * rows.width());
    for row in which {
        let row = rows.row(*row).iter().zip(by.mean.iter().zip(&by.scale));
        values.extend(row.map(|(x, (mean, scale))| ((f64::from(*x) - f64::from(*mean)) / f64::from(*scale)) as f32));
    }
    Tensor::from_vec(values, (which.len(), rows.width()), device)
}

fn digest(source: Residual<'_>, target: Residual<'_>, documents: &[u32]) -> Digest {
    let mut bytes = Vec::with_capacity(4 * (source.values().len() + target.values().len() + documents.len()));
    for values in [source.values(), target.values()] {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    bytes.extend(documents.iter().flat_map(|document| document.to_le_bytes()));
    Digest::of(&bytes)
}
