//! Small models with random weights, written as GGUF files that llama.cpp loads, tokenizes with and runs like any other.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
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
/// `layer_norm_rms_epsilon`, or `layer_norm_epsilon`
pub const NORM_EPSILON: f32 = 1e-5;

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
        std::fs::write(path, gguf(&self.metadata(), weights)).expect("the model can be written");
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
        use Architecture::{Gemma3, Gpt2, Llama, Qwen2, Qwen3};
        let architecture = self.architecture;
        let (width, ff, head) = (self.n_embd as usize, self.n_ff as usize, self.n_head_width() as usize);
        let width_kv = head * self.n_head_kv as usize;
        let n_vocab = self.vocabulary().len();
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut weights = Weights::new();
        let mut add = |name: String, shape: &[usize], centre: f32, deviation: f32| {
            // A uniform distribution this wide has this standard deviation.
            let range = 3f32.sqrt() * deviation;
            let values = (0..shape.iter().product()).map(|_| centre + rng.random_range(-range..range)).collect();
            weights.insert(name, Weight { shape: shape.to_vec(), values });
        };
        // A matrix this wide keeps the root mean square of what it is applied to.
        let keeps = |n_in: usize| (n_in as f32).sqrt().recip();

        // gemma3 multiplies embeddings by the root of the width.
        let embedding = if architecture == Gemma3 { keeps(width) } else { 1.0 };
        add("token_embd.weight".into(), &[width, n_vocab], 0.0, embedding);
        add("output_norm.weight".into(), &[width], 1.0, 0.1);
        if matches!(architecture, Llama | Qwen2 | Qwen3) {
            add("output.weight".into(), &[width, n_vocab], 0.0, keeps(width));
        }
        if architecture == Gpt2 {
            add("position_embd.weight".into(), &[width, self.n_ctx as usize], 0.0, 0.5);
            add("output_norm.bias".into(), &[width], 0.0, 0.1);
        }
        for layer in 0..self.n_layer {
            let name = |part: &str| format!("blk.{layer}.{part}");
            add(name("attn_norm.weight"), &[width], 1.0, 0.1);
            let projections: &[_] = match architecture {
                Gpt2 => &[("attn_qkv", width + 2 * width_kv)],
                _ => &[("attn_q", width), ("attn_k", width_kv), ("attn_v", width_kv)],
            };
            for (part, n_out) in projections {
                add(name(&format!("{part}.weight")), &[width, *n_out], 0.0, keeps(width));
                if matches!(architecture, Qwen2 | Gpt2) {
                    add(name(&format!("{part}.bias")), &[*n_out], 0.0, 0.2);
                }
            }
            if matches!(architecture, Qwen3 | Gemma3) {
                add(name("attn_q_norm.weight"), &[head], 1.0, 0.1);
                add(name("attn_k_norm.weight"), &[head], 1.0, 0.1);
            }
            add(name("attn_output.weight"), &[width, width], 0.0, keeps(width));
            add(name("ffn_norm.weight"), &[width], 1.0, 0.1);
            if architecture == Gpt2 {
                for (part, n_out) in [
                    ("attn_norm", width),
                    ("attn_output", width),
                    ("ffn_norm", width),
                    ("ffn_up", ff),
                    ("ffn_down", width),
                ] {
                    add(name(&format!("{part}.bias")), &[n_out], 0.0, 0.1);
                }
            } else {
                add(name("ffn_gate.weight"), &[width, ff], 0.0, keeps(width));
            }
            add(name("ffn_up.weight"), &[width, ff], 0.0, keeps(width));
            add(name("ffn_down.weight"), &[ff, width], 0.0, keeps(ff));
            if architecture == Gemma3 {
                add(name("post_attention_norm.weight"), &[width], 0.5, 0.05);
                // Little: ggml rounds gemma3's activation to half precision, where the last bit of the input decides which way.
                add(name("post_ffw_norm.weight"), &[width], 0.1, 0.01);
            }
        }
        weights
    }

    /// Text, score and kind of every token: a SentencePiece vocabulary with a token for every byte.
    fn vocabulary(&self) -> Vec<(String, f32, i32)> {
        const NORMAL: i32 = 1;
        const UNKNOWN: i32 = 2;
        const CONTROL: i32 = 3;
        const BYTE: i32 = 6;
        let mut tokens = vec![
            ("<unk>".to_owned(), 0.0, UNKNOWN),
            ("<s>".to_owned(), 0.0, CONTROL),
            ("</s>".to_owned(), 0.0, CONTROL),
        ];
        tokens.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), 0.0, BYTE)));
        let mut texts = vec!["▁".to_owned()];
        texts.extend(('a'..='z').map(String::from));
        // The tokenizer joins two neighbours at a time, so every beginning of a word is a token too.
        let mut seen = BTreeSet::new();
        for word in &self.words {
            texts.extend(
                (1..=word.len()).map(|end| format!("▁{}", &word[..end])).filter(|text| seen.insert(text.clone())),
            );
        }
        tokens.extend(texts.into_iter().enumerate().map(|(index, text)| (text, -(index as f32), NORMAL)));
        tokens
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let architecture = self.architecture.name();
        let own = |key: &str, value: Value| (format!("{architecture}.{key}"), value);
        let general = |key: &str, value: Value| (key.to_owned(), value);
        let vocabulary = self.vocabulary();
        let mut metadata = vec![
            general("general.architecture", Value::Text(architecture.to_owned())),
            general("general.name", Value::Text(format!("tiny {architecture}"))),
            own("context_length", Value::Uint32(self.n_ctx)),
            own("embedding_length", Value::Uint32(self.n_embd)),
            own("block_count", Value::Uint32(self.n_layer)),
            own("feed_forward_length", Value::Uint32(self.n_ff)),
            own("attention.head_count", Value::Uint32(self.n_head)),
            own("attention.head_count_kv", Value::Uint32(self.n_head_kv)),
            own("attention.key_length", Value::Uint32(self.n_head_width())),
            own("attention.value_length", Value::Uint32(self.n_head_width())),
            general("tokenizer.ggml.model", Value::Text("llama".to_owned())),
            general("tokenizer.ggml.tokens", Value::Texts(vocabulary.iter().map(|token| token.0.clone()).collect())),
            general("tokenizer.ggml.scores", Value::Floats(vocabulary.iter().map(|token| token.1).collect())),
            general("tokenizer.ggml.token_type", Value::Ints(vocabulary.iter().map(|token| token.2).collect())),
            general("tokenizer.ggml.unknown_token_id", Value::Uint32(0)),
            general("tokenizer.ggml.bos_token_id", Value::Uint32(1)),
            general("tokenizer.ggml.eos_token_id", Value::Uint32(2)),
            general("tokenizer.ggml.add_bos_token", Value::Bool(true)),
            general("tokenizer.ggml.add_eos_token", Value::Bool(false)),
            // So that the tokens spell the text.
            general("tokenizer.ggml.add_space_prefix", Value::Bool(false)),
        ];
        let epsilon = if self.architecture == Architecture::Gpt2 { "epsilon" } else { "rms_epsilon" };
        metadata.push(own(&format!("attention.layer_norm_{epsilon}"), Value::Float32(NORM_EPSILON)));
        // The layer after the last sliding one sees everything; its base is the model's.
        metadata.push(own("rope.freq_base", Value::Float32(self.rope_base(SLIDING_PATTERN - 1))));
        if self.architecture == Architecture::Gemma3 {
            metadata.push(own("rope.freq_base_swa", Value::Float32(self.rope_base(0))));
            metadata.push(own("attention.sliding_window", Value::Uint32(self.sliding_window)));
            metadata.push(own("attention.sliding_window_pattern", Value::Uint32(SLIDING_PATTERN)));
        }
        metadata
    }
}

enum Value {
    Text(String),
    Uint32(u32),
    Float32(f32),
    Bool(bool),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
}

/// A GGUF file of version 3 with F32 tensors (ggml/include/gguf.h).
fn gguf(metadata: &[(String, Value)], weights: &Weights) -> Vec<u8> {
    const ALIGNMENT: usize = 32;
    const F32: u32 = 0;
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((weights.len() as u64).to_le_bytes());
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut file, key);
        put_value(&mut file, value);
    }
    let mut offset = 0;
    for (name, weight) in weights {
        assert_eq!(weight.values.len(), weight.shape.iter().product::<usize>(), "shape of `{name}`");
        put_text(&mut file, name);
        file.extend((weight.shape.len() as u32).to_le_bytes());
        weight.shape.iter().for_each(|length| file.extend((*length as u64).to_le_bytes()));
        file.extend(F32.to_le_bytes());
        file.extend((offset as u64).to_le_bytes());
        offset += (4 * weight.values.len()).next_multiple_of(ALIGNMENT);
    }
    for weight in weights.values() {
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        weight.values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    }
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file
}

fn put_text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn put_value(file: &mut Vec<u8>, value: &Value) {
    const UINT32: u32 = 4;
    const INT32: u32 = 5;
    const FLOAT32: u32 = 6;
    const BOOL: u32 = 7;
    const STRING: u32 = 8;
    const ARRAY: u32 = 9;
    fn put_array<T>(file: &mut Vec<u8>, kind: u32, values: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
        file.extend(ARRAY.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| put(file, value));
    }
    let mut put = |kind: u32, bytes: &[u8]| {
        file.extend(kind.to_le_bytes());
        file.extend(bytes);
    };
    match value {
        Value::Uint32(value) => put(UINT32, &value.to_le_bytes()),
        Value::Float32(value) => put(FLOAT32, &value.to_le_bytes()),
        Value::Bool(value) => put(BOOL, &[u8::from(*value)]),
        Value::Text(text) => {
            put(STRING, &[]);
            put_text(file, text);
        }
        Value::Texts(texts) => put_array(file, STRING, texts, |file, text| put_text(file, text)),
        Value::Floats(values) => put_array(file, FLOAT32, values, |file, value| file.extend(value.to_le_bytes())),
        Value::Ints(values) => put_array(file, INT32, values, |file, value| file.extend(value.to_le_bytes())),
    }
}
