use super::{PlannedTensor, Role, Shape, SyntheticError, TensorType};
use std::fmt;
use std::str::FromStr;

/// How a file's matrices are stored, as `llama-quantize` stores them. Norms and biases are `F32` always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "llama.cpp's names")]
pub enum Quantization {
    F32,
    F16,
    Q8_0,
    Q4_0,
    /// `Q4_K`, with `Q6_K` for the output and for about half of the layers' `attn_v` and `ffn_down`.
    Q4_K_M,
}

impl Quantization {
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Q8_0, Self::Q4_0, Self::Q4_K_M];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_K_M => "q4_k_m",
        }
    }

    /// `general.file_type`, `enum llama_ftype`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4_K_M => 15,
        }
    }

    /// The type of a tensor of a model of `shape`: `llama_tensor_get_type_impl` and `tensor_type_fallback` (llama-quant.cpp), less what concerns
    /// other architectures, models of experts, and `attn_v` of 80 layers.
    ///
    /// # Errors
    /// Rows that even the fallback, blocks of 32, does not divide. llama.cpp stores such a tensor in half precision.
    pub fn of(self, tensor: &PlannedTensor, shape: &Shape) -> Result<TensorType, SyntheticError> {
        if tensor.role == Role::Vector {
            return Ok(TensorType::F32);
        }
        let gives_logits = tensor.role == Role::Output || tensor.role == Role::Embedding && shape.tied;
        let wanted = match self {
            Self::F32 => TensorType::F32,
            Self::F16 => TensorType::F16,
            Self::Q8_0 => TensorType::Q8_0,
            Self::Q4_0 | Self::Q4_K_M if gives_logits => TensorType::Q6_K,
            Self::Q4_0 => TensorType::Q4_0,
            Self::Q4_K_M => match tensor.role {
                Role::Value { layer } | Role::Down { layer } if has_more_bits(layer, shape.layers) => TensorType::Q6_K,
                _ => TensorType::Q4_K,
            },
        };
        let divides = |kind: TensorType| tensor.dimensions[0].is_multiple_of(kind.block_length());
        let kind = match wanted {
            TensorType::Q4_K if !divides(wanted) => TensorType::Q5_0,
            TensorType::Q6_K if !divides(wanted) => TensorType::Q8_0,
            _ => wanted,
        };
        if divides(kind) {
            return Ok(kind);
        }
        Err(SyntheticError::Block {
            tensor: tensor.name.clone(),
            found: tensor.dimensions[0] as u32,
            quantization: self.name(),
            block: kind.block_length() as u32,
        })
    }
}

/// `use_more_bits`: the first and the last eighth of the layers, and every third between them.
fn has_more_bits(layer: u32, layers: u32) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Quantization {
    type Err = SyntheticError;

    fn from_str(name: &str) -> Result<Self, SyntheticError> {
        let found = Self::ALL.into_iter().find(|quantization| quantization.name() == name);
        found.ok_or_else(|| SyntheticError::Name {
            what: "quantization",
            found: name.to_owned(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Preset;
    use super::*;
    use std::collections::BTreeMap;

    fn types(preset: &str, quantization: Quantization) -> BTreeMap<String, TensorType> {
        let shape = Preset::find(preset).unwrap().shape;
        let of = |tensor: PlannedTensor| (tensor.name.clone(), quantization.of(&tensor, &shape).unwrap());
        shape.tensors().into_iter().map(of).collect()
    }

    #[test]
    fn the_mix_of_an_8b_model_is_llama_quantizes() {
        let types = types("llama-8b", Quantization::Q4_K_M);
        let more = |part: &str| -> Vec<u32> {
            (0..32).filter(|layer| types[&format!("blk.{layer}.{part}.weight")] == TensorType::Q6_K).collect()
        };
        let expected = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31];
        assert_eq!(more("ffn_down"), expected);
        assert_eq!(more("attn_v"), expected);
        assert_eq!([more("ffn_up"), more("attn_q")], [[], []] as [[u32; 0]; 2]);
        assert_eq!(types["output.weight"], TensorType::Q6_K);
        assert_eq!(types["token_embd.weight"], TensorType::Q4_K);
        assert_eq!(types["blk.0.attn_norm.weight"], TensorType::F32);
    }

    #[test]
    fn embeddings_that_give_logits_have_more_bits() {
        assert_eq!(types("llama-1b", Quantization::Q4_K_M)["token_embd.weight"], TensorType::Q6_K);
        assert_eq!(types("llama-1b", Quantization::Q4_0)["token_embd.weight"], TensorType::Q6_K);
        assert_eq!(types("llama-8b", Quantization::Q4_0)["token_embd.weight"], TensorType::Q4_0);
    }

    #[test]
    fn rows_of_no_whole_super_block_have_small_blocks() {
        let types = types("smollm2-135m", Quantization::Q4_K_M);
        assert_eq!(types["blk.0.attn_q.weight"], TensorType::Q5_0);
        assert_eq!(types["token_embd.weight"], TensorType::Q8_0);
        // Rows of 1536.
        assert_eq!(types["blk.4.ffn_down.weight"], TensorType::Q4_K);
    }
}
