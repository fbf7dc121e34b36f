//! Small LoRA adapters of random weights for the models of `tiny_model`, written as `convert_lora_to_gguf.py` writes them.

use crate::tiny_model::{Architecture, TinyModel, Weight, Weights};
use pilotfish::synthetic::TensorType;
use pilotfish::synthetic::gguf::{GgufWriter, TensorInfo, Value};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

/// An adapter of the down projections of all blocks. The same value always writes the same file.
#[derive(Debug, Clone, Copy)]
pub struct TinyAdapter {
    pub architecture: Architecture,
    pub rank: usize,
    pub alpha: f32,
    pub seed: u64,
}

impl TinyAdapter {
    pub fn new(architecture: Architecture, seed: u64) -> Self {
        Self { architecture, rank: 2, alpha: 4.0, seed }
    }

    /// The two factors of each matrix that it changes, by the matrix's name: `[rank, n_in]`, then `[n_out, rank]`, row-major.
    fn factors(&self, weights: &Weights) -> BTreeMap<String, [Weight; 2]> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut random = |shape: [usize; 2]| {
            let values = (0..shape.iter().product()).map(|_| rng.random_range(-0.2..0.2f32)).collect();
            Weight { shape: shape.to_vec(), values }
        };
        let changed = weights.iter().filter(|(name, _)| name.contains(".ffn_down.weight"));
        let pair = |(name, weight): (&String, &Weight)| {
            let [n_in, n_out] = weight.shape[..] else { panic!("`{name}` is no matrix") };
            (name.clone(), [random([n_in, self.rank]), random([self.rank, n_out])])
        };
        changed.map(pair).collect()
    }

    /// Writes an adapter for `model`.
    ///
    /// # Panics
    /// If the file can't be written.
    pub fn write(&self, path: &Path, model: &TinyModel) {
        let factors = self.factors(&model.weights());
        let parts: Vec<(String, &Weight)> = factors
            .iter()
            .flat_map(|(name, [a, b])| [(format!("{name}.lora_a"), a), (format!("{name}.lora_b"), b)])
            .collect();
        let info = |(name, weight): &(String, &Weight)| TensorInfo {
            name: name.clone(),
            dimensions: weight.shape.iter().map(|length| *length as u64).collect(),
            kind: TensorType::F32,
        };
        let infos: Vec<_> = parts.iter().map(info).collect();
        let text = |text: &str| Value::Text(text.to_owned());
        let metadata = [
            ("general.type", text("adapter")),
            ("general.architecture", text(self.architecture.name())),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Value::Float32(self.alpha)),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        let write = || -> std::io::Result<()> {
            let mut writer = GgufWriter::begin(BufWriter::new(File::create(path)?), &metadata, &infos)?;
            for value in parts.iter().flat_map(|(_, weight)| &weight.values) {
                writer.put(&value.to_le_bytes())?;
            }
            writer.finish()?.into_inner()?.sync_all()
        };
        write().expect("the adapter can be written");
    }

    /// Adds what the adapter is, `scale` times, to `weights`: `W + scale · alpha / rank · B A`.
    pub fn merge_into(&self, weights: &mut Weights, scale: f32) {
        for (name, [a, b]) in self.factors(weights) {
            let weight = weights.get_mut(&name).expect("a matrix of the model");
            let n_in = weight.shape[0];
            for (index, value) in weight.values.iter_mut().enumerate() {
                let (row, column) = (index / n_in, index % n_in);
                let product = |k: usize| b.values[row * self.rank + k] * a.values[k * n_in + column];
                *value += scale * self.alpha / self.rank as f32 * (0..self.rank).map(product).sum::<f32>();
            }
        }
    }
}
