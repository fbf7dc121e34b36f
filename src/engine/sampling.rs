use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::logit_bias::LlamaLogitBias;

/// How a token is chosen from its logits. The steps act in the order of the fields, as llama.cpp's own server has them.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(LlamaToken, f32)>,
    /// How many of the answer's last tokens the penalties look at; −1 is all.
    pub penalty_last_n: i32,
    /// Divides the logit of a token that is among these (multiplies it below 0); 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once a time that the token is among these; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted where it is at all; 0 is off.
    pub presence_penalty: f32,
    /// Only the `k` likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Only the likeliest tokens that together have this probability; 1 is off.
    pub top_p: f32,
    /// Only tokens with at least this share of the likeliest one's probability; 0 is off.
    pub min_p: f32,
    /// 0 is greedy.
    pub temperature: f32,
    pub seed: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            logit_bias: Vec::new(),
            penalty_last_n: 64,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// llama.cpp's chain for one sequence, of up to `n_tokens` tokens, of a model with `n_vocab`.
    pub(super) fn sampler(&self, n_vocab: i32, n_tokens: u32) -> LlamaSampler {
        let mut chain = Vec::new();
        if !self.logit_bias.is_empty() {
            let biases: Vec<_> =
                self.logit_bias.iter().map(|(token, bias)| LlamaLogitBias::new(*token, *bias)).collect();
            chain.push(LlamaSampler::logit_bias(n_vocab, &biases));
        }
        if self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0 {
            let Self { repeat_penalty, frequency_penalty, presence_penalty, .. } = *self;
            // llama.cpp takes a negative number for none, and has memory for as many as it is told.
            let all = i32::try_from(n_tokens).unwrap_or(i32::MAX);
            let last_n = if self.penalty_last_n < 0 { all } else { self.penalty_last_n.min(all) };
            chain.push(LlamaSampler::penalties(n_vocab, last_n, repeat_penalty, frequency_penalty, presence_penalty));
        }
        if self.temperature <= 0.0 {
            chain.push(LlamaSampler::greedy());
            return LlamaSampler::chain_simple(chain);
        }
        if self.top_k > 0 {
            chain.push(LlamaSampler::top_k(i32::try_from(self.top_k).unwrap_or(i32::MAX)));
        }
        if self.top_p < 1.0 {
            chain.push(LlamaSampler::top_p(self.top_p, 1));
        }
        if self.min_p > 0.0 {
            chain.push(LlamaSampler::min_p(self.min_p, 1));
        }
        chain.extend([LlamaSampler::temp(self.temperature), LlamaSampler::dist(self.seed)]);
        LlamaSampler::chain_simple(chain)
    }
}
