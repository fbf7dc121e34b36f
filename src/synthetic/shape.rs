use super::gguf::Value;
use super::{Architecture, MIN_VOCABULARY, SyntheticError, Vocabulary};

/// `layer_norm_rms_epsilon`
pub const NORM_EPSILON: f32 = 1e-5;

/// `LLAMA_MAX_LAYERS`
const MOST_LAYERS: u32 = 512;
/// Above any model's; products of three such sizes fit in 64 bits with room for bytes a value.
pub(super) const MOST: u32 = 1 << 20;

/// What a model's tensors are like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    pub architecture: Architecture,
    /// Of the residual stream.
    pub width: u32,
    pub layers: u32,
    pub heads: u32,
    /// Heads of keys and values: a divisor of `heads`.
    pub kv_heads: u32,
    /// Of an attention head.
    pub head_width: u32,
    /// Hidden width of the feed-forward part.
    pub feed_forward: u32,
    /// Tokens.
    pub vocabulary: u32,
    /// Longest context that the file says it was trained for.
    pub context: u32,
    /// Whether the embeddings give the logits too.
    pub tied: bool,
    /// Of the rotary embedding's frequencies.
    pub rope_base: f32,
    /// `gemma3`'s alone.
    pub sliding: Option<Sliding>,
}

/// Layers that see only the last tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sliding {
    /// Tokens that they see.
    pub window: u32,
    /// Every so manieth layer sees all tokens.
    pub pattern: u32,
    /// Of their rotary embedding's frequencies.
    pub rope_base: f32,
}

/// A tensor and what its random values are like.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedTensor {
    pub name: String,
    /// ggml's order: the length of a row first.
    pub dimensions: Vec<u64>,
    pub mean: f32,
    pub deviation: f32,
    pub role: Role,
}

/// What decides how a tensor is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A norm or a bias.
    Vector,
    Embedding,
    Output,
    /// `attn_v`
    Value {
        layer: u32,
    },
    /// `ffn_down`
    Down {
        layer: u32,
    },
    Matrix,
}

impl Shape {
    /// The same sizes in another architecture. Only `gemma3` keeps a sliding window.
    #[must_use]
    pub fn with_architecture(self, architecture: Architecture) -> Self {
        let sliding = self.sliding.filter(|_| architecture == Architecture::Gemma3);
        Self { architecture, sliding, ..self }
    }

    /// # Errors
    /// What llama.cpp would not load or this room can't fill.
    pub fn validate(&self) -> Result<(), SyntheticError> {
        let Self { architecture, width, heads, kv_heads, head_width, sliding, .. } = *self;
        for (what, found, least, most) in [
            ("the width", width, 1, MOST),
            ("the number of layers", self.layers, 1, MOST_LAYERS),
            ("the number of heads", heads, 1, MOST),
            ("the number of heads of keys and values", kv_heads, 1, MOST),
            ("the head width", head_width, 2, MOST),
            ("the feed-forward width", self.feed_forward, 1, MOST),
            ("the vocabulary", self.vocabulary, MIN_VOCABULARY, MOST),
            ("the context", self.context, 1, i32::MAX as u32),
            ("the sliding window", sliding.map_or(1, |sliding| sliding.window), 1, i32::MAX as u32),
            ("the sliding window's pattern", sliding.map_or(1, |sliding| sliding.pattern), 1, MOST_LAYERS),
        ] {
            if !(least..=most).contains(&found) {
                return Err(SyntheticError::Size { what, found, least, most });
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(SyntheticError::Heads { heads, kv_heads });
        }
        if !head_width.is_multiple_of(2) {
            return Err(SyntheticError::OddHead { found: head_width });
        }
        let together = u64::from(heads) * u64::from(head_width);
        if together > u64::from(MOST) {
            let (found, least, most) = (u32::try_from(together).unwrap_or(u32::MAX), 2, MOST);
            return Err(SyntheticError::Size { what: "the width of all heads", found, least, most });
        }
        if architecture == Architecture::Qwen2 && together != u64::from(width) {
            return Err(SyntheticError::HeadWidth { architecture, width, heads, head_width });
        }
        if sliding.is_some() && architecture != Architecture::Gemma3 {
            return Err(SyntheticError::Sliding { architecture });
        }
        Ok(())
    }

    /// Whether `layer` sees only the last tokens.
    pub fn slides(&self, layer: u32) -> bool {
        self.sliding.is_some_and(|sliding| layer % sliding.pattern < sliding.pattern - 1)
    }

    /// All tensors, in the order in which they are written. Their deviations keep a residual's root mean square at about 1 in the beginning, and let
    /// it grow a little at every block.
    pub fn tensors(&self) -> Vec<PlannedTensor> {
        use Architecture::{Gemma3, Qwen2, Qwen3};
        let [width, ff, head] = [self.width, self.feed_forward, self.head_width].map(u64::from);
        let (width_q, width_kv) = (head * u64::from(self.heads), head * u64::from(self.kv_heads));
        let vocabulary = u64::from(self.vocabulary);
        let mut plan = Plan(Vec::new());

        // gemma3 multiplies embeddings by the root of the width.
        let embedding = if self.architecture == Gemma3 { keeps(width) } else { 1.0 };
        plan.matrix("token_embd.weight".into(), [width, vocabulary], embedding, Role::Embedding);
        plan.vector("output_norm.weight".into(), width, 1.0, 0.1);
        if !self.tied {
            plan.matrix("output.weight".into(), [width, vocabulary], keeps(width), Role::Output);
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            plan.vector(name("attn_norm.weight"), width, 1.0, 0.1);
            for (part, n_out, role) in [
                ("attn_q", width_q, Role::Matrix),
                ("attn_k", width_kv, Role::Matrix),
                ("attn_v", width_kv, Role::Value { layer }),
            ] {
                plan.matrix(name(&format!("{part}.weight")), [width, n_out], keeps(width), role);
                if self.architecture == Qwen2 {
                    plan.vector(name(&format!("{part}.bias")), n_out, 0.0, 0.2);
                }
            }
            if matches!(self.architecture, Qwen3 | Gemma3) {
                plan.vector(name("attn_q_norm.weight"), head, 1.0, 0.1);
                plan.vector(name("attn_k_norm.weight"), head, 1.0, 0.1);
            }
            plan.matrix(name("attn_output.weight"), [width_q, width], keeps(width_q), Role::Matrix);
            plan.vector(name("ffn_norm.weight"), width, 1.0, 0.1);
            plan.matrix(name("ffn_gate.weight"), [width, ff], keeps(width), Role::Matrix);
            plan.matrix(name("ffn_up.weight"), [width, ff], keeps(width), Role::Matrix);
            plan.matrix(name("ffn_down.weight"), [ff, width], keeps(ff), Role::Down { layer });
            if self.architecture == Gemma3 {
                plan.vector(name("post_attention_norm.weight"), width, 0.5, 0.05);
                // Little: ggml rounds gemma3's activation to half precision, where the last bit of the input decides which way.
                plan.vector(name("post_ffw_norm.weight"), width, 0.1, 0.01);
            }
        }
        plan.0
    }

    /// What a file of this shape says of itself and of `vocabulary`.
    pub fn metadata(&self, name: &str, vocabulary: &Vocabulary) -> Vec<(String, Value)> {
        let architecture = self.architecture.name();
        let own = |key: &str, value: Value| (format!("{architecture}.{key}"), value);
        let mut metadata = vec![
            ("general.architecture".to_owned(), Value::Text(architecture.to_owned())),
            ("general.name".to_owned(), Value::Text(name.to_owned())),
            own("context_length", Value::Uint32(self.context)),
            own("embedding_length", Value::Uint32(self.width)),
            own("block_count", Value::Uint32(self.layers)),
            own("feed_forward_length", Value::Uint32(self.feed_forward)),
            own("attention.head_count", Value::Uint32(self.heads)),
            own("attention.head_count_kv", Value::Uint32(self.kv_heads)),
            own("attention.key_length", Value::Uint32(self.head_width)),
            own("attention.value_length", Value::Uint32(self.head_width)),
            own("attention.layer_norm_rms_epsilon", Value::Float32(NORM_EPSILON)),
            own("rope.freq_base", Value::Float32(self.rope_base)),
        ];
        if let Some(sliding) = self.sliding {
            metadata.push(own("rope.freq_base_swa", Value::Float32(sliding.rope_base)));
            metadata.push(own("attention.sliding_window", Value::Uint32(sliding.window)));
            metadata.push(own("attention.sliding_window_pattern", Value::Uint32(sliding.pattern)));
        }
        metadata.extend(vocabulary.metadata());
        metadata
    }
}

/// The deviation with which a matrix keeps the root mean square of what it is applied to.
fn keeps(n_in: u64) -> f32 {
    (n_in as f32).sqrt().recip()
}

struct Plan(Vec<PlannedTensor>);

impl Plan {
    fn vector(&mut self, name: String, length: u64, mean: f32, deviation: f32) {
        self.0.push(PlannedTensor { name, dimensions: vec![length], mean, deviation, role: Role::Vector });
    }

    fn matrix(&mut self, name: String, dimensions: [u64; 2], deviation: f32, role: Role) {
        self.0.push(PlannedTensor { name, dimensions: dimensions.to_vec(), mean: 0.0, deviation, role });
    }
}
