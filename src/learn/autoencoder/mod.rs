//! The paper's autoencoder map (arXiv 2503.04429, App. D), trained with candle.
//!
//! In: paired rows of two models, and which document each is from. Out: an [`Autoencoder`] with its quality, and after every epoch a
//! [checkpoint](AutoencoderTrainer::checkpoint), bytes that training goes on from as if it had never stopped. What is done with those bytes is
//! the caller's business.

mod adamw;
mod checkpoint;
mod device;
mod map;
mod network;
mod product;
mod rows;
#[cfg(test)]
mod tests;

use crate::mapping::{Autoencoder, AutoencoderQuality, MappingError};
use crate::tensor::{LayerIndex, Residual};
pub use map::{LayerPair, MappedByAutoencoder, TrainingWatch, map_by_autoencoder};

use adamw::AdamW;
use candle_core::{Device, Tensor};
use network::Network;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rows::Rows;
use serde::{Deserialize, Serialize};

/// How an autoencoder is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoencoderOptions {
    /// Hidden width `k`; `√(d_s d_t)` if none is given, as in the paper.
    pub hidden: Option<usize>,
    /// Of AdamW. The paper's is `1e-4`.
    pub learning_rate: f64,
    /// Of AdamW, PyTorch's default unless chosen.
    pub weight_decay: f64,
    /// Rows a step takes.
    pub batch_size: usize,
    /// Passes over the training rows at most.
    pub epochs: usize,
    /// Epochs without a lower held-out loss after which training ends.
    pub patience: usize,
    /// Parts that the documents are dealt into, as for the affine map; the first is held out.
    pub folds: usize,
    /// Of the held-out documents, the first weights, and the order of rows.
    pub seed: u64,
}

impl Default for AutoencoderOptions {
    /// The paper's rate, at which its three epochs go over far more rows than a mapping has here: training goes on while documents that it does
    /// not see are predicted better.
    fn default() -> Self {
        Self {
            hidden: None,
            learning_rate: 1e-4,
            weight_decay: 0.01,
            batch_size: 64,
            epochs: 100,
            patience: 3,
            folds: 5,
            seed: 0,
        }
    }
}

/// Residuals of two models on the same tokens.
#[derive(Debug, Clone, Copy)]
pub struct PairedRows<'a> {
    /// `[n, d_s]`
    pub source: Residual<'a>,
    /// `[n, d_t]`
    pub target: Residual<'a>,
    /// `[n]`: which document each row is from.
    pub documents: &'a [u32],
}

/// Why an autoencoder could not be trained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainingError {
    #[error(transparent)]
    Rows(#[from] MappingError),
    #[error("the tensors of the training: {0}")]
    Tensor(#[from] candle_core::Error),
    #[error(
        "the loss is {loss} in epoch {epoch}: the training has diverged; take a learning rate below {learning_rate}"
    )]
    Diverged { epoch: usize, loss: f64, learning_rate: f64 },
    #[error("not a checkpoint of an autoencoder's training: {reason}")]
    Checkpoint { reason: String },
    #[error("the checkpoint is of another training: its {what} differ; train anew, or with the same {what}")]
    OtherTraining { what: &'static str },
}

/// What an epoch came to. Losses are mean squared errors of standardized values: 1 is what the mean alone gives on the training rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Epoch {
    /// From 1.
    pub number: usize,
    /// Over the training rows, each as it was when its batch came.
    pub train_loss: f64,
    /// Over the held-out rows, after the epoch.
    pub heldout_loss: f64,
}

/// Trains an [`Autoencoder`] epoch by epoch, by AdamW on the mean squared error over all paired rows.
///
/// Both sides are standardised by the training rows, as for the affine map; the paper's own has raw rows, which the few large dimensions of a
/// residual would take for themselves. The weights with the lowest loss on held-out documents are kept. The same rows, options and
/// seed give the same bits on one machine's CPU.
pub struct AutoencoderTrainer {
    options: AutoencoderOptions,
    rows: Rows,
    network: Network,
    adamw: AdamW,
    epochs: Vec<Epoch>,
    /// Parameters after the best epoch.
    best: [Tensor; 4],
}

impl AutoencoderTrainer {
    /// A training on the CPU, or where the build has one and there is one, on the GPU.
    ///
    /// # Errors
    /// An option out of range, or rows that can't be trained on: of fewer than two documents, not finite, or as many of the one as of
    /// the other model.
    pub fn new(rows: PairedRows<'_>, options: AutoencoderOptions) -> Result<Self, TrainingError> {
        Self::on(device::best()?, rows, options)
    }

    fn on(device: Device, rows: PairedRows<'_>, options: AutoencoderOptions) -> Result<Self, TrainingError> {
        check(&options)?;
        let rows = Rows::new(rows, &options, &device)?;
        let (source, target) = (rows.source.mean.len(), rows.target.mean.len());
        let hidden = options.hidden.unwrap_or_else(|| ((source * target) as f64).sqrt().round() as usize);
        let network = Network::new(source, hidden, target, options.seed, &device)?;
        let adamw = AdamW::new(&network.parameters, options.learning_rate, options.weight_decay)?;
        let best = copies(&network.parameters)?;
        Ok(Self { options, rows, network, adamw, epochs: Vec::new(), best })
    }

    /// Epochs done.
    pub fn epochs(&self) -> &[Epoch] {
        &self.epochs
    }

    /// The epoch with the lowest held-out loss, the first of equals.
    pub fn best(&self) -> Option<&Epoch> {
        self.epochs.iter().min_by(|a, b| a.heldout_loss.total_cmp(&b.heldout_loss))
    }

    /// Whether there is nothing left to do: all epochs done, or none of the last ones better than the best.
    pub fn is_done(&self) -> bool {
        let since_best = self.best().map_or(0, |best| self.epochs.len() - best.number);
        self.epochs.len() >= self.options.epochs || since_best >= self.options.patience
    }

    /// Goes over all training rows once, in an order that the seed and the number of the epoch give.
    ///
    /// # Errors
    /// A loss that is not finite.
    pub fn epoch(&mut self) -> Result<Epoch, TrainingError> {
        let number = self.epochs.len() + 1;
        let n_train = self.rows.n_train();
        let mut order: Vec<u32> = (0..n_train as u32).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed);
        // The first stream gave the weights.
        rng.set_stream(number as u64);
        order.shuffle(&mut rng);
        let mut losses = Vec::with_capacity(n_train.div_ceil(self.options.batch_size));
        for batch in order.chunks(self.options.batch_size) {
            let (x, y) = self.rows.batch(batch)?;
            let (loss, gradients) = self.network.loss_and_gradients(&x, &y)?;
            self.adamw.step(&mut self.network.parameters, &gradients)?;
            losses.push((loss, batch.len()));
        }
        let mut sum = 0.0;
        for (loss, n) in losses {
            sum += f64::from(loss.to_scalar::<f32>()?) * n as f64;
        }
        let epoch =
            Epoch { number, train_loss: sum / n_train as f64, heldout_loss: self.rows.heldout_loss(&self.network)? };
        for loss in [epoch.train_loss, epoch.heldout_loss] {
            if !loss.is_finite() {
                let learning_rate = self.options.learning_rate;
                return Err(TrainingError::Diverged { epoch: number, loss, learning_rate });
            }
        }
        self.epochs.push(epoch);
        if self.best().is_some_and(|best| best.number == number) {
            self.best = copies(&self.network.parameters)?;
        }
        Ok(epoch)
    }

    /// The map with the best weights, and how well it predicts the held-out rows that they were chosen by.
    ///
    /// # Errors
    /// Held-out rows that do not vary.
    pub fn finish(
        &self,
        source_layer: LayerIndex,
        target_layer: LayerIndex,
    ) -> Result<(Autoencoder, AutoencoderQuality), TrainingError> {
        let best = Network { parameters: self.best.clone() };
        let quality = self.rows.quality(&best)?;
        let (source, target) = (self.rows.source.clone(), self.rows.target.clone());
        Ok((Autoencoder::new(source_layer, target_layer, source, target, best.weights()?)?, quality))
    }
}

/// Tensors of their own: a step changes parameters in place.
fn copies(parameters: &[Tensor; 4]) -> candle_core::Result<[Tensor; 4]> {
    let [a, b, c, d] = parameters.each_ref().map(Tensor::copy);
    Ok([a?, b?, c?, d?])
}

fn check(options: &AutoencoderOptions) -> Result<(), MappingError> {
    let positive = |value: f64| value > 0.0 && value.is_finite();
    let refused = |option, expected, found: String| Err(MappingError::Options { option, expected, found });
    let counts = [
        ("hidden", options.hidden.unwrap_or(1)),
        ("batch_size", options.batch_size),
        ("epochs", options.epochs),
        ("patience", options.patience),
    ];
    if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
        return refused(option, "1 or more", "0".to_owned());
    }
    if !positive(options.learning_rate) {
        return refused("learning_rate", "a number above 0", options.learning_rate.to_string());
    }
    if !(options.weight_decay >= 0.0 && options.weight_decay.is_finite()) {
        return refused("weight_decay", "a number, 0 or more", options.weight_decay.to_string());
    }
    if options.folds < 2 {
        return refused("folds", "2 or more", options.folds.to_string());
    }
    Ok(())
}
