use super::product::product;
use crate::mapping::AutoencoderWeights;
use candle_core::{DType, Device, Result, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Names of the parts of an array of four that goes by parameters, in its order.
pub(super) const PARAMETERS: [&str; 4] = ["encoder", "encoder_bias", "decoder", "decoder_bias"];

/// `ŷ = W₂ ReLU(W₁ x + b₁) + b₂` on a device: `W₁` (`[k, d_s]`), `b₁` (`[k]`), `W₂` (`[d_t, k]`), `b₂` (`[d_t]`), in the order of
/// [`PARAMETERS`].
pub(super) struct Network {
    pub parameters: [Tensor; 4],
}

impl Network {
    /// Weights and biases uniform in `±1/√(inputs)`, as PyTorch begins a `Linear`.
    pub fn new(source: usize, hidden: usize, target: usize, seed: u64, device: &Device) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = |length: usize, inputs: usize| -> Vec<f32> {
            let bound = 1.0 / (inputs as f32).sqrt();
            (0..length).map(|_| rng.random_range(-bound..bound)).collect()
        };
        let encoder = uniform(hidden * source, source);
        let encoder_bias = uniform(hidden, source);
        let decoder = uniform(target * hidden, hidden);
        let decoder_bias = uniform(target, hidden);
        let parameters = [
            Tensor::from_vec(encoder, (hidden, source), device)?,
            Tensor::from_vec(encoder_bias, hidden, device)?,
            Tensor::from_vec(decoder, (target, hidden), device)?,
            Tensor::from_vec(decoder_bias, target, device)?,
        ];
        Ok(Self { parameters })
    }

    /// `x`, `[n, d_s]`, to `[n, d_t]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.decoded(&self.hidden(x)?)
    }

    /// `ReLU(W₁ x + b₁)`, `[n, k]`
    fn hidden(&self, x: &Tensor) -> Result<Tensor> {
        let [encoder, bias, ..] = &self.parameters;
        product(x, &encoder.t()?)?.broadcast_add(bias)?.relu()
    }

    fn decoded(&self, hidden: &Tensor) -> Result<Tensor> {
        let [.., decoder, bias] = &self.parameters;
        product(hidden, &decoder.t()?)?.broadcast_add(bias)
    }

    /// The mean squared error `L` of `x`, `[n, d_s]`, against `y`, `[n, d_t]`, over all `n · d_t` values, and its gradient by each parameter. Two
    /// layers need no tape: with `δ = 2 (ŷ − y) / (n d_t)` and `h` the hidden row, `∂W₂ = δᵀh`, `∂b₂ = Σδ`, `δ' = δW₂ ⊙ [h > 0]`, `∂W₁ = δ'ᵀx`, `∂b₁ = Σδ'`.
    pub fn loss_and_gradients(&self, x: &Tensor, y: &Tensor) -> Result<(Tensor, [Tensor; 4])> {
        let hidden = self.hidden(x)?;
        let error = (self.decoded(&hidden)? - y)?;
        let loss = error.sqr()?.mean_all()?;
        let delta = (&error * (2.0 / error.elem_count() as f64))?;
        let decoder = product(&delta.t()?, &hidden)?;
        let open = hidden.gt(0.0)?.to_dtype(DType::F32)?;
        let inner = (product(&delta, &self.parameters[2])? * open)?;
        let encoder = product(&inner.t()?, x)?;
        Ok((loss, [encoder, inner.sum(0)?, decoder, delta.sum(0)?]))
    }

    pub fn weights(&self) -> Result<AutoencoderWeights> {
        let [encoder, encoder_bias, decoder, decoder_bias] = &self.parameters;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        Ok(AutoencoderWeights {
            encoder: values(encoder)?,
            encoder_bias: values(encoder_bias)?,
            decoder: values(decoder)?,
            decoder_bias: values(decoder_bias)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn made(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    #[test]
    fn gradients_are_those_of_candles_tape() {
        let (x, y) = (made(13, 7, 1), made(13, 5, 2));
        let network = Network::new(7, 6, 5, 3, &Device::Cpu).unwrap();
        let (loss, found) = network.loss_and_gradients(&x, &y).unwrap();

        let variables = network.parameters.each_ref().map(|tensor| Var::from_tensor(tensor).unwrap());
        let [w1, b1, w2, b2] = variables.each_ref().map(Var::as_tensor);
        let hidden = x.matmul(&w1.t().unwrap()).unwrap().broadcast_add(b1).unwrap().relu().unwrap();
        let predicted = hidden.matmul(&w2.t().unwrap()).unwrap().broadcast_add(b2).unwrap();
        let expected_loss = (predicted - &y).unwrap().sqr().unwrap().mean_all().unwrap();
        let expected = expected_loss.backward().unwrap();
        let scalar = |tensor: &Tensor| tensor.to_scalar::<f32>().unwrap();
        assert!((scalar(&loss) - scalar(&expected_loss)).abs() < 1e-6);
        for (variable, found) in variables.iter().zip(&found) {
            let expected = expected.get(variable).unwrap();
            assert_eq!(found.shape(), expected.shape());
            let difference = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
            assert!(scalar(&difference) < 1e-6, "{difference}");
        }
    }
}
