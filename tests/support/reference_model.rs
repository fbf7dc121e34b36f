//! The forward pass of a [`TinyModel`] in `f64`, written from the architectures' definitions and with nothing of llama.cpp or of
//! the hook in it. A guard may act on its residuals between blocks, which tells what every later layer must be.

use crate::tiny_model::{Architecture, TinyModel, Weights};
use llama_cpp_2::token::LlamaToken;
use pilotfish::synthetic::NORM_EPSILON;

pub struct ReferenceModel {
    model: TinyModel,
    weights: Weights,
}

/// What a run computed.
pub struct Trace {
    /// The residual after every block, as it was passed on: `[n_layer][n_tokens][n_embd]`.
    pub residuals: Vec<Vec<Vec<f64>>>,
    /// `[n_tokens][n_vocab]`
    pub logits: Vec<Vec<f64>>,
}

impl ReferenceModel {
    pub fn new(model: &TinyModel) -> Self {
        Self { model: model.clone(), weights: model.weights() }
    }

    /// Runs `tokens`, the first at position 0. `patch` is shown every row of the residual after every block, as layer, position and
    /// values, in the order of layers and then of positions, and may change it.
    pub fn run(&self, tokens: &[LlamaToken], mut patch: impl FnMut(u32, usize, &mut [f64])) -> Trace {
        let gemma = self.model.architecture == Architecture::Gemma3;
        let scale = if gemma { f64::from(self.model.n_embd).sqrt() } else { 1.0 };
        let mut rows: Vec<Vec<f64>> = tokens
            .iter()
            .map(|token| {
                self.row("token_embd.weight", token.0 as usize).iter().map(|x| scale * f64::from(*x)).collect()
            })
            .collect();
        let mut residuals = Vec::new();
        for layer in 0..self.model.n_layer {
            let attention = self.attention(layer, &rows);
            for (position, (row, attention)) in rows.iter_mut().zip(attention).enumerate() {
                self.add_part(layer, "post_attention_norm", attention, row);
                let fed = self.feed_forward(layer, row);
                self.add_part(layer, "post_ffw_norm", fed, row);
                patch(layer, position, row);
            }
            residuals.push(rows.clone());
        }
        let head = if self.weights.contains_key("output.weight") { "output.weight" } else { "token_embd.weight" };
        let logits = rows.iter().map(|row| self.matrix(head, &self.norm("output_norm.weight", row))).collect();
        Trace { residuals, logits }
    }

    /// Adds what a part of a block gives to the residual, through a norm where the architecture has one there.
    fn add_part(&self, layer: u32, norm: &str, part: Vec<f64>, row: &mut [f64]) {
        let name = format!("blk.{layer}.{norm}.weight");
        let part = if self.weights.contains_key(&name) { self.norm(&name, &part) } else { part };
        row.iter_mut().zip(part).for_each(|(row, part)| *row += part);
    }

    /// Grouped-query attention of every row over the rows before it and itself.
    fn attention(&self, layer: u32, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let width = self.model.n_head_width() as usize;
        let rotated = |part: &str, position: usize, row: &[f64]| -> Vec<f64> {
            let mut heads = self.linear(&name(part), row);
            for head in heads.chunks_exact_mut(width) {
                let norm = name(&format!("{part}_norm.weight"));
                if self.weights.contains_key(&norm) {
                    head.copy_from_slice(&self.norm(&norm, head));
                }
                self.rotate(layer, position, head);
            }
            heads
        };
        let normed: Vec<Vec<f64>> = rows.iter().map(|row| self.norm(&name("attn_norm.weight"), row)).collect();
        let keys: Vec<_> = normed.iter().enumerate().map(|(p, row)| rotated("attn_k", p, row)).collect();
        let values: Vec<_> = normed.iter().map(|row| self.linear(&name("attn_v"), row)).collect();
        let group = (self.model.n_head / self.model.n_head_kv) as usize;
        let window = if self.model.slides(layer) { self.model.sliding_window as usize } else { usize::MAX };
        let attend = |(position, row): (usize, &Vec<f64>)| {
            let first = (position + 1).saturating_sub(window);
            let mut joined = Vec::new();
            for (head, query) in rotated("attn_q", position, row).chunks_exact(width).enumerate() {
                let of = |all: &Vec<f64>| all[head / group * width..][..width].to_vec();
                let scores = (first..=position).map(|p| dot(query, &of(&keys[p])) / (width as f64).sqrt());
                let scores: Vec<f64> = scores.collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let exponentials: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = exponentials.iter().sum();
                let mut mixed = vec![0.0; width];
                for (weight, p) in exponentials.iter().zip(first..) {
                    mixed.iter_mut().zip(of(&values[p])).for_each(|(mixed, value)| *mixed += weight / total * value);
                }
                joined.extend(mixed);
            }
            self.linear(&name("attn_output"), &joined)
        };
        normed.iter().enumerate().map(attend).collect()
    }

    /// The rotary embedding of one head. llama's files pair neighbouring values, the others those half a head apart.
    fn rotate(&self, layer: u32, position: usize, head: &mut [f64]) {
        let half = head.len() / 2;
        for pair in 0..half {
            let (a, b) = match self.model.architecture {
                Architecture::Llama => (2 * pair, 2 * pair + 1),
                _ => (pair, pair + half),
            };
            let frequency = f64::from(self.model.rope_base(layer)).powf(-(pair as f64) / half as f64);
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
        }
    }

    fn feed_forward(&self, layer: u32, row: &[f64]) -> Vec<f64> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let activation = if self.model.architecture == Architecture::Gemma3 { gelu } else { silu };
        let normed = self.norm(&name("ffn_norm.weight"), row);
        let gate = self.linear(&name("ffn_gate"), &normed);
        let up = self.linear(&name("ffn_up"), &normed);
        let hidden: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| activation(*gate) * up).collect();
        self.linear(&name("ffn_down"), &hidden)
    }

    /// Root-mean-square norm.
    fn norm(&self, name: &str, row: &[f64]) -> Vec<f64> {
        let mean = dot(row, row) / row.len() as f64;
        let scale = (mean + f64::from(NORM_EPSILON)).sqrt().recip();
        row.iter().zip(&self.weights[name].values).map(|(x, weight)| x * scale * f64::from(*weight)).collect()
    }

    /// `NAME.weight` and, where there is one, `NAME.bias`.
    fn linear(&self, name: &str, row: &[f64]) -> Vec<f64> {
        let mut result = self.matrix(&format!("{name}.weight"), row);
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            result.iter_mut().zip(&bias.values).for_each(|(x, bias)| *x += f64::from(*bias));
        }
        result
    }

    fn matrix(&self, name: &str, row: &[f64]) -> Vec<f64> {
        let n_out = self.weights[name].shape[1];
        (0..n_out).map(|out| self.row(name, out).iter().zip(row).map(|(w, x)| f64::from(*w) * x).sum()).collect()
    }

    fn row(&self, name: &str, row: usize) -> &[f32] {
        let weight = &self.weights[name];
        &weight.values[row * weight.shape[0]..][..weight.shape[0]]
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// The tanh form. On the CPU ggml looks it up by the half-precision value of `x` in a table of half-precision results
/// (`GGML_GELU_FP16` in ggml-cpu/vec.h), which alone would put a layer some 1e-4 off, so this rounds as the table does.
fn gelu(x: f64) -> f64 {
    let x = half_precision(x);
    let root = (2.0 / std::f64::consts::PI).sqrt();
    half_precision(0.5 * x * (1.0 + (root * x * (1.0 + 0.044715 * x * x)).tanh()))
}

/// The nearest half-precision number, of eleven significant bits and none below 2⁻²⁴.
fn half_precision(x: f64) -> f64 {
    let exponent = if x == 0.0 { 0.0 } else { x.abs().log2().floor() };
    let step = (exponent - 10.0).max(-24.0).exp2();
    (x / step).round_ties_even() * step
}
