//! What a guard does to a model's residual and to its logits, on tiny models of several architectures that llama.cpp runs for real, and on
//! real ones where they have been pulled.

/// Makes tests of bodies that take a [`Subject`]: `tiny::NAME` gives it every tiny model, `real::NAME` the real ones.
macro_rules! on_every_model {
    (placed: $($name:ident),+ $(,)?) => { on_every_model! { all_placed, real_placed: $($name),+ } };
    ($all:ident, $real:ident: $($name:ident),+) => {
        mod tiny {
            $(#[test] fn $name() { super::Tiny::$all().for_each(|tiny| super::$name(&tiny)); })+
        }
        mod real {
            $(#[test] fn $name() { super::Subject::$real().for_each(super::$name); })+
        }
    };
    ($($name:ident),+ $(,)?) => { on_every_model! { all, real: $($name),+ } };
}

mod allocations;
mod device;
mod device_faults;
mod expected;
mod fault_sweep;
mod faults;
mod gates;
mod matching;
mod patches;
#[path = "../support/reference_model.rs"]
mod reference_model;
mod reuse;
mod rows;
mod scheduler;
mod scheduler_shapes;
mod sequences;
mod stacks;
mod subject;
mod table;
mod toggles;

use crate::tiny_model::{Architecture, TinyModel, Weights};
use expected::Captured;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;
use pilotfish::engine::{Model, ModelOptions, backend, guard_context};
use pilotfish::guard::manifest::{
    GateEntry, InterventionEntry, InterventionName, MappingEntry, MappingKind, Scope, VectorEntry,
};
use pilotfish::guard::{
    Aggregate, Digest, Guard, Manifest, MappingFile, OnError, OnFire, Positions, Readout, write_guard,
};
use pilotfish::hook::{BatchRow, ContextError, GuardedBatch, GuardedContext};
use pilotfish::mapping::{
    AffineMap, Autoencoder, AutoencoderQuality, AutoencoderWeights, MappingQuality, Standardization,
};
use pilotfish::program::{Program, RowKind, reference};
use pilotfish::steering::VectorKind;
use pilotfish::tensor::{LayerIndex, SequenceId, TokenPosition};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference_model::{ReferenceModel, Trace};
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use subject::{GPU, LAYERS, Subject, Tiny};
use tempfile::TempDir;

/// Longer than gemma3's sliding window.
const PROMPT: &str = "the shark eats things in the sea and the bird has a song";
const ANSWER: &str = " pilot fish guard";
const ONLY: SequenceId = SequenceId(0);
const OTHER: SequenceId = SequenceId(1);

/// How far a residual or logits may be from what they should be, as a fraction of their norm.
const TOLERANCE: f64 = 1e-4;

/// The KV cache is F32 and not llama.cpp's default, F16, and there is no flash attention, which would make F16 of it on the way:
/// that rounding alone is as large as [`TOLERANCE`].
fn params() -> LlamaContextParams {
    LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(512))
        .with_n_batch(128)
        .with_n_ubatch(128)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_type_k(KvCacheType::F32)
        .with_type_v(KvCacheType::F32)
        .with_flash_attention_policy(llama_cpp_sys_2::LLAMA_FLASH_ATTN_TYPE_DISABLED)
}

/// Room for two sequences in one KV stream.
fn params_for_two() -> LlamaContextParams {
    params().with_n_seq_max(2).with_kv_unified(true)
}

/// A prompt, and the tokens of an answer to it.
struct Script {
    prompt: Vec<LlamaToken>,
    answer: Vec<LlamaToken>,
}

impl Script {
    fn tokens(&self) -> Vec<LlamaToken> {
        [self.prompt.as_slice(), &self.answer].concat()
    }

    fn kind(&self, position: usize) -> RowKind {
        match (position + 1).cmp(&self.prompt.len()) {
            std::cmp::Ordering::Less => RowKind::Prompt,
            std::cmp::Ordering::Equal => RowKind::PromptEnd,
            std::cmp::Ordering::Greater => RowKind::Generated,
        }
    }

    /// The rows of each decode: the whole prompt, then the answer token by token. Logits are asked for at every token, so that the
    /// last layer keeps all rows.
    fn decodes(&self) -> Vec<Vec<(LlamaToken, BatchRow)>> {
        let row = |(position, token): (usize, LlamaToken)| {
            let at = TokenPosition(position as i32);
            (token, BatchRow { sequence: ONLY, position: at, kind: self.kind(position), output: true })
        };
        let mut rows = self.tokens().into_iter().enumerate().map(row);
        let prompt = rows.by_ref().take(self.prompt.len()).collect();
        std::iter::once(prompt).chain(rows.map(|row| vec![row])).collect()
    }

    /// The logits of every token with no guard.
    fn run_plain(&self, context: &mut LlamaContext) -> Vec<Vec<f32>> {
        let mut logits = Vec::new();
        for rows in self.decodes() {
            let mut batch = LlamaBatch::new(rows.len(), 1);
            for (token, row) in &rows {
                batch.add(*token, row.position.0, &[row.sequence.0], row.output).unwrap();
            }
            context.decode(&mut batch).unwrap();
            logits.extend((0..rows.len()).map(|index| context.get_logits_ith(index as i32).to_vec()));
        }
        logits
    }

    /// The logits of every token under the context's guard.
    fn run(&self, context: &mut GuardedContext) -> Result<Vec<Vec<f32>>, ContextError> {
        let mut logits = Vec::new();
        for rows in self.decodes() {
            let mut batch = GuardedBatch::new(rows.len());
            for (token, row) in &rows {
                batch.add(*token, *row).unwrap();
            }
            context.decode(&mut batch)?;
            logits.extend((0..rows.len()).map(|index| context.get_logits_ith(index as i32).to_vec()));
        }
        Ok(logits)
    }

    /// [`run`](Self::run) with the residuals of the tests' layers.
    fn run_captured(&self, subject: &Subject, context: &mut GuardedContext) -> Captured {
        subject.capture(context);
        let logits = self.run(context).unwrap();
        let mut rows = subject.rows(context);
        let n_tokens = self.tokens().len();
        let mut row = |layer, position| rows.remove(&(ONLY, layer, position)).expect("it was captured");
        ((0..LAYERS).map(|layer| (0..n_tokens).map(|position| row(layer, position)).collect()).collect(), logits)
    }
}

/// Decodes `prompt` as apps do, and gives the logits of its last token.
fn prefill(
    context: &mut GuardedContext,
    sequence: SequenceId,
    prompt: &[LlamaToken],
) -> Result<Vec<f32>, ContextError> {
    let mut batch = GuardedBatch::new(prompt.len());
    let last = batch.add_prompt(sequence, TokenPosition(0), prompt).unwrap();
    context.decode(&mut batch)?;
    Ok(context.get_logits_ith(last).to_vec())
}

/// Decodes one token of an answer, and gives its logits.
fn step(
    context: &mut GuardedContext,
    sequence: SequenceId,
    position: usize,
    token: LlamaToken,
) -> Result<Vec<f32>, ContextError> {
    let mut batch = GuardedBatch::new(1);
    let index = batch.add_generated(sequence, TokenPosition(position as i32), token).unwrap();
    context.decode(&mut batch)?;
    Ok(context.get_logits_ith(index).to_vec())
}

/// A guard in the making.
struct Policy<'t> {
    subject: &'t Subject,
    manifest: Manifest,
    /// Of the tests' layers, that of each vector.
    layers: BTreeMap<String, u32>,
    tensors: Vec<(String, Vec<f32>)>,
    mappings: Vec<(String, Vec<u8>)>,
}

impl<'t> Policy<'t> {
    fn new(subject: &'t Subject) -> Self {
        let message = Some("not this".into());
        let manifest = Manifest { message, ..Manifest::new("tested", subject.model.identity()) };
        Self { subject, manifest, layers: BTreeMap::new(), tensors: Vec::new(), mappings: Vec::new() }
    }

    /// A random direction at `layer`, about half as long as a residual; another one for every vector of a guard.
    fn vector(self, name: &str, layer: u32) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1000 + self.tensors.len() as u64);
        let size = self.subject.size(layer);
        let values = (0..self.subject.width()).map(|_| size * rng.random_range(-1.0f32..1.0)).collect();
        self.direction(name, layer, values)
    }

    /// The direction against that of vector `of`.
    fn opposite(self, name: &str, of: &str) -> Self {
        let (_, values) = self.tensors.iter().find(|(name, _)| name == of).unwrap();
        let (layer, values) = (self.layers[of], values.iter().map(|x| -x).collect());
        self.direction(name, layer, values)
    }

    fn direction(mut self, name: &str, layer: u32, values: Vec<f32>) -> Self {
        self.manifest.vectors.push(VectorEntry {
            name: name.into(),
            layer: self.subject.layer(layer).into(),
            tensor: name.into(),
            kind: VectorKind::Direction,
            mapping: None,
            method: None,
            mean_norm: None,
        });
        self.layers.insert(name.into(), layer);
        self.tensors.push((name.into(), values));
        self
    }

    fn named(mut self, name: &str) -> Self {
        self.manifest.name = name.into();
        self
    }

    /// A mapping of random weights from the residual at `layer` to what it should be there.
    fn map(mut self, name: &str, layer: u32, kind: MappingKind) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(2000 + u64::from(layer));
        let (width, size) = (self.subject.width(), self.subject.size(layer));
        let mut random = |n: u32, size: f32| -> Vec<f32> { (0..n).map(|_| rng.random_range(-size..size)).collect() };
        let mut side = || Standardization {
            mean: random(width, 0.5).into_iter().map(|x| size * x).collect(),
            scale: random(width, 0.5).into_iter().map(|x| size * (1.0 + x)).collect(),
        };
        let (source, target, at) = (side(), side(), self.subject.layer(layer));
        // A sum over a wider row is of smaller parts.
        let part = (64.0 / width as f32).sqrt();
        let identity = self.subject.model.identity();
        let mut file = MappingFile {
            source: identity.clone(),
            target: identity.clone(),
            corpus: "none".into(),
            seed: 0,
            pairs: Vec::new(),
            autoencoders: Vec::new(),
            replacements: Default::default(),
        };
        let (fraction_unexplained, cosine, n_train, n_heldout) = (0.5, 0.5, 1, 1);
        match kind {
            MappingKind::Affine => {
                let weight = random(width * width, 0.4 * part);
                let quality =
                    MappingQuality { lambda: 1.0, fraction_unexplained, cosine, n_train, n_heldout, backward: None };
                file.pairs.push((AffineMap::new(at, at, source, target, weight).unwrap(), quality));
            }
            MappingKind::Autoencoder => {
                let hidden = width / 2;
                let weights = AutoencoderWeights {
                    encoder: random(hidden * width, 0.5 * part),
                    encoder_bias: random(hidden, 0.3),
                    decoder: random(hidden * width, 0.5 * part),
                    decoder_bias: random(width, 0.3),
                };
                let quality = AutoencoderQuality { fraction_unexplained, cosine, n_train, n_heldout };
                file.autoencoders.push((Autoencoder::new(at, at, source, target, weights).unwrap(), quality));
            }
        }
        let bytes = file.to_bytes().unwrap();
        self.manifest.mappings.push(MappingEntry {
            name: name.into(),
            sha256: Digest::of(&bytes),
            kind,
            source_layer: at.into(),
            target_layer: at,
        });
        self.mappings.push((format!("{name}.map.safetensors"), bytes));
        self
    }

    /// `entry`, its calibration as for a residual of size 1.
    fn gate(mut self, mut entry: GateEntry) -> Self {
        let size = f64::from(self.subject.size(self.layers[&entry.vector]));
        for figure in [&mut entry.mean, &mut entry.deviation].into_iter().flatten() {
            *figure *= size;
        }
        self.manifest.gates.push(entry);
        self
    }

    /// `entry`, its projections as for a residual of norm 8.
    fn intervene(mut self, mut entry: InterventionEntry) -> Self {
        let layer = entry.vector.as_ref().and_then(|vector| self.layers.get(vector));
        let amount = layer.map_or(1.0, |layer| self.subject.amount(*layer));
        for figure in [&mut entry.mean, &mut entry.low, &mut entry.high].into_iter().flatten() {
            *figure *= amount;
        }
        self.manifest.interventions.push(entry);
        self
    }

    fn on_error(mut self, on_error: OnError) -> Self {
        self.manifest.on_error = on_error;
        self
    }

    fn guard(self) -> Guard {
        let folder = tempfile::tempdir().unwrap();
        write_guard(folder.path(), &self.manifest, &self.tensors, &self.mappings).unwrap()
    }
}

/// A benign projection, and its deviation.
const BENIGN: (f64, f64) = (0.25, 2.0);

/// A gate named like its vector.
fn gate(vector: &str, aggregate: Aggregate, threshold: f64, on_fire: OnFire) -> GateEntry {
    GateEntry {
        name: vector.into(),
        vector: vector.into(),
        scope: Scope::Prompt,
        aggregate: Some(aggregate),
        positions: None,
        release: None,
        readout: Readout::Projection,
        threshold: Some(threshold),
        mean: Some(BENIGN.0),
        deviation: Some(BENIGN.1),
        on_fire,
        calibrations: Vec::new(),
    }
}

/// A gate on each token, named like its vector.
fn token_gate(vector: &str, threshold: f64, release: Option<f64>) -> GateEntry {
    let prompt = gate(vector, Aggregate::Last, threshold, OnFire::Steer);
    GateEntry { scope: Scope::Token, aggregate: None, release, ..prompt }
}

/// A score that no gate reaches.
const NEVER: f64 = 1e9;

fn add(vector: &str) -> InterventionEntry {
    InterventionEntry::new(InterventionName::Add, vector)
}

fn ablate(vector: &str, mean: f64) -> InterventionEntry {
    InterventionEntry { mean: Some(mean), ..InterventionEntry::new(InterventionName::Ablate, vector) }
}

fn clamp(vector: &str, low: f64, high: f64) -> InterventionEntry {
    InterventionEntry { low: Some(low), high: Some(high), ..InterventionEntry::new(InterventionName::Clamp, vector) }
}

fn rotate(vector: &str, angle: f64) -> InterventionEntry {
    InterventionEntry { angle: Some(angle), ..InterventionEntry::new(InterventionName::Rotate, vector) }
}

fn switch(mapping: &str) -> InterventionEntry {
    InterventionEntry::new(InterventionName::Switch, mapping)
}

/// The same under another name, which an operand used twice needs.
fn called(name: &str, entry: InterventionEntry) -> InterventionEntry {
    InterventionEntry { name: Some(name.into()), ..entry }
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// `‖found − expected‖ / ‖expected‖`; infinite where either holds what is no number.
fn distance(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let difference: f64 =
        found.iter().zip(expected).map(|(found, expected)| square(f64::from(*found) - expected)).sum();
    let relative = (difference / expected.iter().copied().map(square).sum::<f64>()).sqrt();
    if relative.is_nan() { f64::INFINITY } else { relative }
}

fn widened(row: &[f32]) -> Vec<f64> {
    row.iter().map(|x| f64::from(*x)).collect()
}
