use super::affine::{check_finite, check_side};
use super::{MappingError, Standardization};
use crate::tensor::LayerIndex;

/// An autoencoder map from residuals of a source model at one layer to residuals of a target model at one layer (arXiv 2503.04429, App. D):
/// `ŷ = μ_t + σ_t ⊙ (W₂ ReLU(W₁ (x − μ_s)/σ_s + b₁) + b₂)`. The paper's own has no standardization, which is `μ = 0`, `σ = 1`.
#[derive(Debug, Clone, PartialEq)]
pub struct Autoencoder {
    source_layer: LayerIndex,
    target_layer: LayerIndex,
    source: Standardization,
    target: Standardization,
    weights: AutoencoderWeights,
}

/// Weights of an [`Autoencoder`] of hidden width `k`, matrices row-major with a row an output, as PyTorch's `Linear` has them.
#[derive(Debug, Clone, PartialEq)]
pub struct AutoencoderWeights {
    /// `W₁`, `[k, d_s]`
    pub encoder: Vec<f32>,
    /// `b₁`, `[k]`
    pub encoder_bias: Vec<f32>,
    /// `W₂`, `[d_t, k]`
    pub decoder: Vec<f32>,
    /// `b₂`, `[d_t]`
    pub decoder_bias: Vec<f32>,
}

/// How well an autoencoder predicts rows of documents that it was not trained on, in standardized units.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AutoencoderQuality {
    /// Squared error over the target's variance; 0 is perfect, 1 is what the mean alone gives.
    pub fraction_unexplained: f64,
    /// Mean cosine of predicted and true rows.
    pub cosine: f64,
    pub n_train: usize,
    pub n_heldout: usize,
}

impl Autoencoder {
    /// # Errors
    /// If a length does not fit the others, a width is 0, a value is not finite, or a scale is not a positive normal number.
    pub fn new(
        source_layer: LayerIndex,
        target_layer: LayerIndex,
        source: Standardization,
        target: Standardization,
        weights: AutoencoderWeights,
    ) -> Result<Self, MappingError> {
        check_side(&source, "`source_mean`", "`source_scale`")?;
        check_side(&target, "`target_mean`", "`target_scale`")?;
        let hidden = weights.encoder_bias.len().max(1);
        for (what, values, expected) in [
            ("`encoder_bias`", &weights.encoder_bias, hidden),
            ("`encoder`", &weights.encoder, hidden.saturating_mul(source.mean.len())),
            ("`decoder`", &weights.decoder, hidden.saturating_mul(target.mean.len())),
            ("`decoder_bias`", &weights.decoder_bias, target.mean.len()),
        ] {
            if values.len() != expected {
                return Err(MappingError::Length { what, expected, found: values.len() });
            }
            check_finite(values, what)?;
        }
        Ok(Self { source_layer, target_layer, source, target, weights })
    }

    pub fn source_layer(&self) -> LayerIndex {
        self.source_layer
    }

    pub fn target_layer(&self) -> LayerIndex {
        self.target_layer
    }

    /// `μ_s`, `σ_s`
    pub fn source(&self) -> &Standardization {
        &self.source
    }

    /// `μ_t`, `σ_t`
    pub fn target(&self) -> &Standardization {
        &self.target
    }

    pub fn weights(&self) -> &AutoencoderWeights {
        &self.weights
    }

    /// `d_s`
    pub fn source_width(&self) -> usize {
        self.source.mean.len()
    }

    /// `d_t`
    pub fn target_width(&self) -> usize {
        self.target.mean.len()
    }

    /// `k`
    pub fn hidden_width(&self) -> usize {
        self.weights.encoder_bias.len()
    }

    /// A residual, `[d_s]` to `[d_t]`, in `f64`.
    ///
    /// # Panics
    /// If `x` is not [`source_width`](Self::source_width) long.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.source_width(), "a residual of the wrong width");
        let Standardization { mean, scale } = &self.source;
        let z = x.iter().zip(mean.iter().zip(scale));
        let z: Vec<f64> = z.map(|(x, (mean, scale))| (x - f64::from(*mean)) / f64::from(*scale)).collect();
        let AutoencoderWeights { encoder, encoder_bias, decoder, decoder_bias } = &self.weights;
        let hidden: Vec<f64> = linear(encoder, encoder_bias, &z).map(|h| h.max(0.0)).collect();
        let Standardization { mean, scale } = &self.target;
        let y = linear(decoder, decoder_bias, &hidden).zip(mean.iter().zip(scale));
        y.map(|(y, (mean, scale))| f64::from(*mean) + f64::from(*scale) * y).collect()
    }
}

/// `W x + b` with `W` of `[b.len(), x.len()]`.
fn linear<'a>(weight: &'a [f32], bias: &'a [f32], x: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
    weight.chunks_exact(x.len()).zip(bias).map(move |(row, bias)| {
        f64::from(*bias) + row.iter().zip(x).map(|(weight, x)| f64::from(*weight) * x).sum::<f64>()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(width: usize) -> Standardization {
        Standardization { mean: vec![0.0; width], scale: vec![1.0; width] }
    }

    fn weights() -> AutoencoderWeights {
        AutoencoderWeights {
            encoder: vec![1.0, -1.0, 0.5, 2.0],
            encoder_bias: vec![0.0, -1.0],
            decoder: vec![1.0, 0.0, 0.0, 2.0, 1.0, 1.0],
            decoder_bias: vec![0.5, 0.0, 0.0],
        }
    }

    #[test]
    fn it_is_two_layers_with_a_relu_between() {
        let at = LayerIndex(1);
        let map = Autoencoder::new(at, at, plain(2), plain(3), weights()).unwrap();
        // hidden: relu(1·1 − 1·2) = 0, relu(0.5·1 + 2·2 − 1) = 3.5
        assert_eq!(map.apply(&[1.0, 2.0]), [0.5, 7.0, 3.5]);
        let source = Standardization { mean: vec![1.0, 0.0], scale: vec![2.0, 1.0] };
        let target = Standardization { mean: vec![0.0, 0.0, 10.0], scale: vec![1.0, 1.0, 3.0] };
        let map = Autoencoder::new(at, at, source, target, weights()).unwrap();
        assert_eq!(map.apply(&[3.0, 2.0]), [0.5, 7.0, 10.0 + 3.0 * 3.5]);
    }

    #[test]
    fn weights_of_another_shape_are_refused() {
        let at = LayerIndex(1);
        for change in [
            (|w: &mut AutoencoderWeights| w.encoder.truncate(3)) as fn(&mut AutoencoderWeights),
            |w| w.decoder.push(0.0),
            |w| w.decoder_bias.clear(),
            |w| w.encoder_bias.clear(),
            |w| w.encoder[0] = f32::NAN,
        ] {
            let mut weights = weights();
            change(&mut weights);
            assert!(Autoencoder::new(at, at, plain(2), plain(3), weights).is_err());
        }
    }
}
