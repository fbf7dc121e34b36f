//! The models that guards are tested on: tiny ones, whose weights the tests know, and the two real ones where they have been pulled.

use super::*;
use crate::real::{LARGE, SMALL, located};
use std::ops::Deref;
use std::sync::OnceLock;

/// Layers that tests speak of, 0 to 3: those of a tiny model.
pub(super) const LAYERS: u32 = 4;

/// Whether the build has a GPU. One whose backends are loaded at run time (`dynamic-backends`) is told so when it is compiled.
pub(super) const GPU: bool =
    cfg!(any(feature = "cuda", feature = "metal", feature = "vulkan")) || option_env!("PILOTFISH_TEST_GPU").is_some();

/// A loaded model, tiny or real, with what any of them can be asked.
///
/// Tests are written for four layers with residuals whose values have a root mean square of about 1. In a real model [`layer`](Self::layer)
/// spreads those layers over the depth, and a [`Policy`] makes its numbers as large as the residual is there.
pub(super) struct Subject {
    pub model: Model,
    name: &'static str,
    /// What a tiny model is.
    known: Option<TinyModel>,
    /// Root mean square of a residual's values at each of the tests' layers.
    sizes: [f32; LAYERS as usize],
}

impl Subject {
    fn load(name: &'static str, path: &std::path::Path, options: &ModelOptions) -> Self {
        let model = Model::load(path, name, options).unwrap();
        Self { model, name, known: None, sizes: [1.0; LAYERS as usize] }
    }

    /// A real model, in which the sizes of residuals are read.
    fn load_real(name: &'static str, gpu_layers: u32) -> Option<Self> {
        // Without a template: what comes after a prompt is the same text's continuation.
        let options = ModelOptions { gpu_layers, raw: true, ..Default::default() };
        let mut subject = Self::load(name, &located(name)?, &options);
        let (residuals, _) = subject.script().run_captured(&subject, &mut subject.observed());
        for (size, rows) in subject.sizes.iter_mut().zip(&residuals) {
            let square = |row: &Vec<f32>| row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            // The first position is an attention sink.
            let mut sizes: Vec<f32> = rows[1..].iter().map(|row| square(row).sqrt()).collect();
            sizes.sort_by(f32::total_cmp);
            *size = sizes[sizes.len() / 2];
        }
        Some(subject)
    }

    /// The real models that are here, loaded once for all tests; a word of those that are not.
    pub fn real() -> impl Iterator<Item = &'static Self> {
        static LOADED: [OnceLock<Option<Subject>>; 2] = [const { OnceLock::new() }; 2];
        [SMALL, LARGE].into_iter().zip(&LOADED).filter_map(|(name, loaded)| {
            // So that a skip is told by every test.
            located(name)?;
            loaded.get_or_init(|| Self::load_real(name, 0)).as_ref()
        })
    }

    /// [`real`](Self::real) on the GPU, if there is one.
    pub fn real_placed() -> impl Iterator<Item = &'static Self> {
        static LOADED: [OnceLock<Option<Subject>>; 2] = [const { OnceLock::new() }; 2];
        let on_gpu = [SMALL, LARGE].into_iter().zip(&LOADED).filter(|_| GPU).filter_map(|(name, loaded)| {
            located(name)?;
            loaded.get_or_init(|| Self::load_real(name, 99)).as_ref()
        });
        on_gpu.chain(Self::real().filter(|_| !GPU))
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Whether its weights are quantized, so that llama.cpp computes a row by other kernels in a batch of another size, and rounds what it
    /// multiplies to eight bits.
    pub fn is_quantized(&self) -> bool {
        self.known.is_none()
    }

    /// What a tiny model is, whose forward pass can be told from that.
    pub fn known(&self) -> Option<&TinyModel> {
        self.known.as_ref()
    }

    /// The model's layer that tests call `layer`.
    pub fn layer(&self, layer: u32) -> LayerIndex {
        assert!(layer < LAYERS);
        LayerIndex(layer * (self.model.shape().n_layer - 1) / (LAYERS - 1))
    }

    pub fn last_layer(&self) -> u32 {
        LAYERS - 1
    }

    pub fn width(&self) -> u32 {
        self.model.shape().n_embd.0 as u32
    }

    /// Root mean square of a residual's values at `layer`: about what it has along a random direction.
    pub fn size(&self, layer: u32) -> f32 {
        self.sizes[layer as usize]
    }

    /// What an intervention of a test calls 1: an eighth of a residual's norm, which is 8 in a tiny model.
    pub fn amount(&self, layer: u32) -> f64 {
        f64::from(self.size(layer)) * f64::from(self.width() / 64).sqrt()
    }

    pub fn tokens(&self, text: &str) -> Vec<LlamaToken> {
        self.model.prompt_tokens(text).unwrap()
    }

    /// The tokens of a text that goes on: what is tokenized alone may start with a beginning-of-sequence token.
    pub fn more_tokens(&self, text: &str) -> Vec<LlamaToken> {
        let tokens = self.tokens(text);
        let begins = tokens.first() == Some(&self.model.llama().vocab().bos());
        tokens[usize::from(begins)..].to_vec()
    }

    pub fn script(&self) -> Script {
        let mut prompt = self.tokens(PROMPT);
        if self.is_quantized() {
            // A real model takes its time, and its sliding window is longer than any prompt of a test.
            prompt.truncate(8);
        }
        Script { prompt, answer: self.more_tokens(ANSWER) }
    }

    pub fn plain(&self, params: LlamaContextParams) -> LlamaContext<'_> {
        self.model.llama().new_context(backend().unwrap(), params).unwrap()
    }

    pub fn guarded(&self, guard: &Guard, params: LlamaContextParams) -> GuardedContext<'_> {
        self.stacked(&[guard], params)
    }

    pub fn stacked(&self, guards: &[&Guard], params: LlamaContextParams) -> GuardedContext<'_> {
        guard_context(self.model.llama(), backend().unwrap(), params, guards).unwrap()
    }

    pub fn programmed(&self, program: &Arc<Program>, params: LlamaContextParams) -> GuardedContext<'_> {
        GuardedContext::new(self.model.llama(), backend().unwrap(), params, Arc::clone(program)).unwrap()
    }

    /// A program that patches nothing.
    pub fn observer(&self) -> Arc<Program> {
        Arc::new(Program::observer(self.model.shape()))
    }

    /// A context whose hook patches nothing.
    pub fn observed(&self) -> GuardedContext<'_> {
        self.programmed(&self.observer(), params())
    }

    pub fn policy(&self) -> Policy<'_> {
        Policy::new(self)
    }
}

/// A tiny model.
pub(super) struct Tiny {
    subject: Subject,
    _folder: TempDir,
}

impl Deref for Tiny {
    type Target = Subject;

    fn deref(&self) -> &Subject {
        &self.subject
    }
}

impl Tiny {
    pub fn new(architecture: Architecture) -> Self {
        let shape = TinyModel::new(architecture);
        let weights = shape.weights();
        Self::with_weights(shape, &weights)
    }

    pub fn with_weights(shape: TinyModel, weights: &Weights) -> Self {
        Self::load(shape, weights, &ModelOptions::default())
    }

    /// A model in which the embedding of one token is infinite: that token, and one that is not.
    pub fn poisoned(architecture: Architecture) -> (Self, LlamaToken, LlamaToken) {
        let sound = Self::new(architecture);
        let (poisoned, other) = (sound.tokens(" shark")[1], sound.tokens(" sea")[1]);
        assert_ne!(poisoned, other);
        let shape = TinyModel::new(architecture);
        let mut weights = shape.weights();
        let embedding = weights.get_mut("token_embd.weight").unwrap();
        embedding.values[poisoned.0 as usize * embedding.shape[0]] = f32::INFINITY;
        (Self::with_weights(shape, &weights), poisoned, other)
    }

    /// On the GPU, if there is one.
    pub fn placed(shape: TinyModel, weights: &Weights) -> Self {
        let gpu_layers = if GPU { 99 } else { 0 };
        Self::load(shape, weights, &ModelOptions { gpu_layers, ..Default::default() })
    }

    fn load(shape: TinyModel, weights: &Weights, options: &ModelOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        shape.write_with(&path, weights);
        let mut subject = Subject::load(shape.architecture.name(), &path, options);
        subject.known = Some(shape);
        assert_eq!(subject.model.shape().n_layer, LAYERS);
        Self { subject, _folder: folder }
    }

    /// One of every architecture that has hook points.
    pub fn all() -> impl Iterator<Item = Self> {
        Architecture::WITH_RESIDUAL.into_iter().map(Self::new)
    }

    /// [`all`](Self::all) on the GPU, if there is one.
    pub fn all_placed() -> impl Iterator<Item = Self> {
        let shapes = Architecture::WITH_RESIDUAL.into_iter().map(TinyModel::new);
        shapes.map(|shape| {
            let weights = shape.weights();
            Self::placed(shape, &weights)
        })
    }
}
