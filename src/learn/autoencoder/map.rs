use super::{AutoencoderOptions, AutoencoderTrainer, Epoch, PairedRows};
use crate::engine::{Model, Prompt};
use crate::learn::map::{MapRows, read_pairs};
use crate::learn::{LearnError, Progress};
use crate::mapping::{Autoencoder, AutoencoderQuality};
use crate::tensor::LayerIndex;

/// A source's and a target's layer.
pub type LayerPair = (LayerIndex, LayerIndex);

/// Whoever has autoencoders trained: is told how it goes, and keeps checkpoints where it will.
pub trait TrainingWatch {
    /// So many documents of so many have been read.
    fn read(&mut self, done: usize, total: usize);

    /// The checkpoint of a training of this pair that is to be gone on with.
    ///
    /// # Errors
    /// There is one, but it can't be read.
    fn checkpoint(&mut self, pair: LayerPair) -> std::io::Result<Option<Vec<u8>>>;

    /// An epoch of at most `most` is done, and training could go on from `checkpoint` later.
    ///
    /// # Errors
    /// The checkpoint can't be kept, which ends the training.
    fn epoch(&mut self, pair: LayerPair, epoch: &Epoch, most: usize, checkpoint: &[u8]) -> std::io::Result<()>;
}

/// Autoencoders, and what they were trained on.
#[derive(Debug, Clone)]
pub struct MappedByAutoencoder {
    /// In the order of the pairs asked for.
    pub maps: Vec<(Autoencoder, AutoencoderQuality)>,
    /// Paired tokens and documents that they come from.
    pub n_tokens: usize,
    pub n_documents: usize,
}

/// Trains an autoencoder from `source` to `target` for each pair of `layers` on `documents`, which the models read as [`map`](crate::learn::map)
/// has them read. Document numbers are the same from run to run, and so is all else on one machine's CPU.
///
/// # Errors
/// Too little text, a model that can't run it, a loss that is not finite, or a checkpoint of another training.
pub fn map_by_autoencoder(
    source: &Model,
    target: &Model,
    documents: &[Prompt],
    layers: &[LayerPair],
    options: &AutoencoderOptions,
    watch: &mut dyn TrainingWatch,
) -> Result<MappedByAutoencoder, LearnError> {
    let read: Progress<'_> = &mut |done, total| watch.read(done, total);
    let stacks: Vec<_> = layers.iter().map(|(source, target)| ((*source).into(), *target)).collect();
    let paired = read_pairs(source, target, documents, &stacks, MapRows::Tokens, read)?;
    let mut maps = Vec::with_capacity(layers.len());
    for pair @ (source_layer, target_layer) in layers.iter().copied() {
        let problem = |source| LearnError::Training { source_layer, target_layer, source };
        let rows = PairedRows {
            source: paired.source.layer(source_layer),
            target: paired.target.layer(target_layer),
            documents: &paired.documents,
        };
        let kept = watch.checkpoint(pair).map_err(LearnError::Checkpoint)?;
        let trainer = match kept {
            Some(checkpoint) => AutoencoderTrainer::resume(rows, options.clone(), &checkpoint),
            None => AutoencoderTrainer::new(rows, options.clone()),
        };
        let mut trainer = trainer.map_err(problem)?;
        while !trainer.is_done() {
            let epoch = trainer.epoch().map_err(problem)?;
            let checkpoint = trainer.checkpoint().map_err(problem)?;
            watch.epoch(pair, &epoch, options.epochs, &checkpoint).map_err(LearnError::Checkpoint)?;
        }
        maps.push(trainer.finish(source_layer, target_layer).map_err(problem)?);
    }
    Ok(MappedByAutoencoder { maps, n_tokens: paired.documents.len(), n_documents: documents.len() })
}
