//! Small models with random weights, written as GGUF files that llama.cpp loads, tokenizes with and runs like any other.

use pilotfish::synthetic::gguf::{GgufWriter, TensorInfo, Value};
use pilotfish::synthetic::{self, PlannedTensor, Role, Shape, Sliding, TensorType, Vocabulary};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    Gemma3,
    /// No rotary embedding: tokens have an embedding of their position.
    Gpt2,
    /// Its graph names no `l_out-L` (llama.cpp's models/eurobert.cpp).
    EuroBert,
}

impl Architecture {
    /// Those that guards are made for.
    pub const WITH_RESIDUAL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3];

    /// `general.architecture`
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
            Self::Gpt2 => "gpt2",
            Self::EuroBert => "eurobert",
        }
    }
}

/// What a small model is like. The same value always writes the same file.
#[derive(Debug, Clone)]
pub struct TinyModel {
    pub architecture: Architecture,
    /// A multiple of twice `n_head`.
    pub n_embd: u32,
    pub n_layer: u32,
    pub n_head: u32,
    /// A divisor of `n_head`.
    pub n_head_kv: u32,
    pub n_ff: u32,
    /// Longest context that the file says it was trained for.
    pub n_ctx: u32,
    /// Tokens that gemma3's layers with a sliding window see: every [`SLIDING_PATTERN`]th layer sees all of them.
    pub sliding_window: u32,
    /// Of the weights.
    pub seed: u64,
    /// Words that are one token after a space; any other text goes by letters and bytes.
    pub words: Vec<&'static str>,
}

/// gemma3's `sliding_window_pattern`.
pub const SLIDING_PATTERN: u32 = 2;

const WORDS: [&str; 12] =
    ["the", "sea", "fish", "shark", "pilot", "swims", "bird", "song", "water", "guard", "eats", "things"];

/// Tensors by name.
pub type Weights = BTreeMap<String, Weight>;

#[derive(Debug, Clone)]
pub struct Weight {
    /// ggml's order: the length of a row first.
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl TinyModel {
    pub fn new(architecture: Architecture) -> Self {
        Self {
            architecture,
            n_embd: 64,
            n_layer: 4,
            n_head: 4,
            n_head_kv: 2,
            n_ff: 128,
            n_ctx: 1024,
            sliding_window: 6,
            seed: 1,
            words: WORDS.to_vec(),
        }
    }

    /// A model whose graph names no residual `l_out-L`, so that it has no hook point.
    pub fn without_residual_names() -> Self {
        Self::new(Architecture::EuroBert)
    }

    /// Writes the model to `path`.
    ///
    /// # Panics
    /// If the file can't be written.
    pub fn write(&self, path: &Path) {
        self.write_with(path, &self.weights());
    }

    /// Writes the model with other weights than its own.
    ///
    /// # Panics
    /// If the file can't be written.
    pub fn write_with(&self, path: &Path, weights: &Weights) {
        let info = |(name, weight): (&String, &Weight)| TensorInfo {
            name: name.clone(),
            dimensions: weight.shape.iter().map(|length| *length as u64).collect(),
            kind: TensorType::F32,
        };
        let infos: Vec<_> = weights.iter().map(info).collect();
        let write = || -> std::io::Result<()> {
            let mut writer = GgufWriter::begin(BufWriter::new(File::create(path)?), &self.metadata(), &infos)?;
            for value in weights.values().flat_map(|weight| &weight.values) {
                writer.put(&value.to_le_bytes())?;
            }
            writer.finish()?.into_inner()?.sync_all()
        };
        write().expect("the model can be written");
    }

    /// Width of an attention head.
    pub fn n_head_width(&self) -> u32 {
        self.n_embd / self.n_head
    }

    /// Whether `layer` sees only the last [`sliding_window`](Self::sliding_window) tokens.
    pub fn slides(&self, layer: u32) -> bool {
        self.architecture == Architecture::Gemma3 && layer % SLIDING_PATTERN < SLIDING_PATTERN - 1
    }

    /// Base of the rotary embedding's frequencies. In gemma3 layers with a sliding window have another.
    pub fn rope_base(&self, layer: u32) -> f32 {
        if self.architecture == Architecture::Gemma3 && !self.slides(layer) { 1e6 } else { 1e4 }
    }

    /// Random weights, scaled so that a residual has a root mean square of about 1, and grows a little at every block.
    pub fn weights(&self) -> Weights {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let tensors =
            if self.architecture == Architecture::Gpt2 { self.gpt2_tensors() } else { self.shape().tensors() };
        let mut filled = |tensor: PlannedTensor| {
            let shape: Vec<usize> = tensor.dimensions.iter().map(|length| *length as usize).collect();
            // A uniform distribution this wide has this standard deviation.
            let range = 3f32.sqrt() * tensor.deviation;
            let values = (0..shape.iter().product()).map(|_| tensor.mean + rng.random_range(-range..range)).collect();
            (tensor.name, Weight { shape, values })
        };
        tensors.into_iter().map(&mut filled).collect()
    }

    /// What the model is like to those who write synthetic ones. An architecture that these don't know has the shape of llama, and of its tensors
    /// those that it needs.
    fn shape(&self) -> Shape {
        let architecture = match self.architecture {
            Architecture::Llama | Architecture::Gpt2 | Architecture::EuroBert => synthetic::Architecture::Llama,
            Architecture::Qwen2 => synthetic::Architecture::Qwen2,
            Architecture::Qwen3 => synthetic::Architecture::Qwen3,
            Architecture::Gemma3 => synthetic::Architecture::Gemma3,
        };
        let sliding = Sliding { window: self.sliding_window, pattern: SLIDING_PATTERN, rope_base: self.rope_base(0) };
        Shape {
            architecture,
            width: self.n_embd,
            layers: self.n_layer,
            heads: self.n_head,
            kv_heads: self.n_head_kv,
            head_width: self.n_head_width(),
            feed_forward: self.n_ff,
            vocabulary: self.vocabulary().tokens().len() as u32,
            context: self.n_ctx,
            tied: !matches!(self.architecture, Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3),
            // The layer after the last sliding one sees everything; its base is the model's.
            rope_base: self.rope_base(SLIDING_PATTERN - 1),
            sliding: (architecture == synthetic::Architecture::Gemma3).then_some(sliding),
        }
    }

    fn gpt2_tensors(&self) -> Vec<PlannedTensor> {
        let shape = self.shape();
        let (width, ff, context) = (u64::from(self.n_embd), u64::from(self.n_ff), u64::from(self.n_ctx));
        let qkv = width + 2 * u64::from(self.n_head_width() * self.n_head_kv);
        let planned = |name: String, dimensions: &[u64], mean: f32, deviation: f32| {
            let role = if dimensions.len() == 1 { Role::Vector } else { Role::Matrix };
            PlannedTensor { name, dimensions: dimensions.to_vec(), mean, deviation, role }
        };
        // Those of its parts that llama has too.
        let shared = |tensor: &PlannedTensor| {
            !["attn_q.", "attn_k.", "attn_v.", "ffn_gate."].iter().any(|part| tensor.name.contains(part))
        };
        let mut tensors: Vec<_> = shape.tensors().into_iter().filter(shared).collect();
        tensors.push(planned("position_embd.weight".into(), &[width, context], 0.0, 0.5));
        tensors.push(planned("output_norm.bias".into(), &[width], 0.0, 0.1));
        for layer in 0..self.n_layer {
            let name = |part: &str| format!("blk.{layer}.{part}");
            tensors.push(planned(name("attn_qkv.weight"), &[width, qkv], 0.0, (width as f32).sqrt().recip()));
            tensors.push(planned(name("attn_qkv.bias"), &[qkv], 0.0, 0.2));
            for (part, n_out) in
                [("attn_norm", width), ("attn_output", width), ("ffn_norm", width), ("ffn_up", ff), ("ffn_down", width)]
            {
                tensors.push(planned(name(&format!("{part}.bias")), &[n_out], 0.0, 0.1));
            }
        }
        tensors
    }

    fn vocabulary(&self) -> Vocabulary {
        Vocabulary::new(&self.words)
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let (known, own) = (self.shape().architecture.name(), self.architecture.name());
        let mut metadata = self.shape().metadata(&format!("tiny {own}"), &self.vocabulary());
        for (key, value) in &mut metadata {
            if key == "general.architecture" {
                *value = Value::Text(own.to_owned());
            } else if let Some(rest) = key.strip_prefix(&format!("{known}.")) {
                let rest =
                    if own == "gpt2" { rest.replace("norm_rms_epsilon", "norm_epsilon") } else { rest.to_owned() };
                *key = format!("{own}.{rest}");
            }
        }
        metadata
    }
}
