use super::network::PARAMETERS;
use super::{AutoencoderOptions, AutoencoderTrainer, Epoch, PairedRows, TrainingError};
use crate::guard::Digest;
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

const FORMAT: &str = "pilotfish-training-1";

/// The one key of the metadata: the safetensors crate writes several in no fixed order.
const KEY: &str = "training";

/// What of a training is no tensor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    format: String,
    options: AutoencoderOptions,
    /// Of the rows, to which a training belongs.
    rows: Digest,
    steps: u64,
    epochs: Vec<Epoch>,
}

impl AutoencoderTrainer {
    /// All that training needs to go on, after whichever epoch: safetensors with the parameters (`encoder` and so on), AdamW's moments
    /// (`encoder.first`, `encoder.second`) and the best parameters up to now (`encoder.best`).
    ///
    /// # Errors
    /// The device can't be read.
    pub fn checkpoint(&self) -> Result<Vec<u8>, TrainingError> {
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        let mut add = |name: String, tensor: &Tensor| -> Result<(), TrainingError> {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            tensors.push((name, tensor.dims().to_vec(), values.iter().flat_map(|value| value.to_le_bytes()).collect()));
            Ok(())
        };
        for (index, name) in PARAMETERS.iter().enumerate() {
            let [first, second] = &self.adamw.moments[index];
            add((*name).to_owned(), &self.network.parameters[index])?;
            add(format!("{name}.first"), first)?;
            add(format!("{name}.second"), second)?;
            add(format!("{name}.best"), &self.best[index])?;
        }
        let description = Description {
            format: FORMAT.to_owned(),
            options: self.options.clone(),
            rows: self.rows.digest,
            steps: self.adamw.steps,
            epochs: self.epochs.clone(),
        };
        let description = serde_json::to_string(&description).map_err(unreadable)?;
        let views = tensors.iter().map(|(name, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(unreadable)?))
        });
        let views = views.collect::<Result<Vec<_>, TrainingError>>()?;
        safetensors::serialize(views, Some(HashMap::from([(KEY.to_owned(), description)]))).map_err(unreadable)
    }

    /// Goes on from a [`checkpoint`](Self::checkpoint) to the same bits as if training had never stopped. `options` may have other `epochs` and
    /// `patience` than the training began with.
    ///
    /// # Errors
    /// As [`new`](Self::new), and bytes that are no checkpoint, or one of other rows or options.
    pub fn resume(rows: PairedRows<'_>, options: AutoencoderOptions, checkpoint: &[u8]) -> Result<Self, TrainingError> {
        let mut trainer = Self::new(rows, options)?;
        let (_, metadata) = SafeTensors::read_metadata(checkpoint).map_err(unreadable)?;
        let description = metadata.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
        let description = description.ok_or_else(|| unreadable(format!("its metadata has no `{KEY}`")))?;
        let description: Description = serde_json::from_str(description).map_err(unreadable)?;
        trainer.belongs(&description)?;

        let tensors = SafeTensors::deserialize(checkpoint).map_err(unreadable)?;
        let device = trainer.network.parameters[0].device().clone();
        for (index, name) in PARAMETERS.iter().enumerate() {
            let like = trainer.network.parameters[index].dims().to_vec();
            let read = |suffix: &str| read(&tensors, &format!("{name}{suffix}"), &like, &device);
            let moments = [read(".first")?, read(".second")?];
            (trainer.network.parameters[index], trainer.best[index]) = (read("")?, read(".best")?);
            trainer.adamw.moments[index] = moments;
        }
        trainer.adamw.steps = description.steps;
        trainer.epochs = description.epochs;
        Ok(trainer)
    }

    fn belongs(&self, description: &Description) -> Result<(), TrainingError> {
        let Description { format, options, rows, epochs, .. } = description;
        if format != FORMAT {
            return Err(unreadable(format!("its format is `{format}`, expected `{FORMAT}`")));
        }
        if *rows != self.rows.digest {
            return Err(TrainingError::OtherTraining { what: "rows" });
        }
        let AutoencoderOptions { epochs: at_most, patience, .. } = self.options;
        if (AutoencoderOptions { epochs: at_most, patience, ..options.clone() }) != self.options {
            return Err(TrainingError::OtherTraining { what: "options" });
        }
        let in_order = epochs.iter().enumerate().all(|(index, epoch)| {
            epoch.number == index + 1 && epoch.train_loss.is_finite() && epoch.heldout_loss.is_finite()
        });
        if in_order { Ok(()) } else { Err(unreadable("its epochs are out of order")) }
    }
}

fn read(tensors: &SafeTensors<'_>, name: &str, like: &[usize], device: &Device) -> Result<Tensor, TrainingError> {
    let view = tensors.tensor(name).map_err(unreadable)?;
    if view.dtype() != Dtype::F32 || view.shape() != like {
        let found =
            format!("tensor `{name}` is {:?} of shape {:?}, expected F32 of {like:?}", view.dtype(), view.shape());
        return Err(unreadable(found));
    }
    let (bytes, _) = view.data().as_chunks::<4>();
    let values: Vec<f32> = bytes.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if values.iter().any(|value| !value.is_finite()) {
        return Err(unreadable(format!("tensor `{name}` has a value that is not finite")));
    }
    Ok(Tensor::from_vec(values, like, device)?)
}

fn unreadable(reason: impl ToString) -> TrainingError {
    TrainingError::Checkpoint { reason: reason.to_string() }
}
