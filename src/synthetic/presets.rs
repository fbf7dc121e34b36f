use super::{Architecture, Shape, Sliding, SyntheticError};

/// The shape of a well-known model, by its published configuration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    pub name: &'static str,
    pub shape: Shape,
}

impl Preset {
    /// # Errors
    /// No preset has this name.
    pub fn find(name: &str) -> Result<&'static Self, SyntheticError> {
        PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| SyntheticError::Name {
            what: "preset",
            found: name.to_owned(),
            known: PRESETS.iter().map(|preset| preset.name).collect::<Vec<_>>().join(", "),
        })
    }
}

/// From a row of the table: width, layers, heads, heads of keys and values, head width, feed-forward width.
const fn preset(
    name: &'static str,
    architecture: Architecture,
    [width, layers, heads, kv_heads, head_width, feed_forward]: [u32; 6],
    vocabulary: u32,
    context: u32,
    tied: bool,
    rope_base: f32,
) -> Preset {
    let sliding = None;
    let shape = Shape {
        architecture,
        width,
        layers,
        heads,
        kv_heads,
        head_width,
        feed_forward,
        vocabulary,
        context,
        tied,
        rope_base,
        sliding,
    };
    Preset { name, shape }
}

const fn gemma3(name: &'static str, sizes: [u32; 6], vocabulary: u32, context: u32, window: u32) -> Preset {
    let Preset { name, shape } = preset(name, Architecture::Gemma3, sizes, vocabulary, context, true, 1e6);
    let sliding = Some(Sliding { window, pattern: 6, rope_base: 1e4 });
    Preset { name, shape: Shape { sliding, ..shape } }
}

const LLAMA: Architecture = Architecture::Llama;
const QWEN2: Architecture = Architecture::Qwen2;
const QWEN3: Architecture = Architecture::Qwen3;

/// Each architecture's, smallest first. `llama-*` are Llama 3.1 and 3.2, `qwen2-*` Qwen 2.5 (Qwen 2 has the same shapes).
pub const PRESETS: &[Preset] = &[
    preset("smollm2-135m", LLAMA, [576, 30, 9, 3, 64, 1536], 49_152, 8192, true, 1e5),
    preset("smollm2-360m", LLAMA, [960, 32, 15, 5, 64, 2560], 49_152, 8192, true, 1e5),
    preset("tinyllama-1.1b", LLAMA, [2048, 22, 32, 4, 64, 5632], 32_000, 2048, false, 1e4),
    preset("llama-1b", LLAMA, [2048, 16, 32, 8, 64, 8192], 128_256, 131_072, true, 5e5),
    preset("llama-3b", LLAMA, [3072, 28, 24, 8, 128, 8192], 128_256, 131_072, true, 5e5),
    preset("mistral-7b", LLAMA, [4096, 32, 32, 8, 128, 14_336], 32_768, 32_768, false, 1e6),
    preset("llama-8b", LLAMA, [4096, 32, 32, 8, 128, 14_336], 128_256, 131_072, false, 5e5),
    preset("llama-70b", LLAMA, [8192, 80, 64, 8, 128, 28_672], 128_256, 131_072, false, 5e5),
    preset("qwen2-0.5b", QWEN2, [896, 24, 14, 2, 64, 4864], 151_936, 32_768, true, 1e6),
    preset("qwen2-1.5b", QWEN2, [1536, 28, 12, 2, 128, 8960], 151_936, 32_768, true, 1e6),
    preset("qwen2-7b", QWEN2, [3584, 28, 28, 4, 128, 18_944], 152_064, 32_768, false, 1e6),
    preset("qwen3-0.6b", QWEN3, [1024, 28, 16, 8, 128, 3072], 151_936, 40_960, true, 1e6),
    preset("qwen3-1.7b", QWEN3, [2048, 28, 16, 8, 128, 6144], 151_936, 40_960, true, 1e6),
    preset("qwen3-4b", QWEN3, [2560, 36, 32, 8, 128, 9728], 151_936, 40_960, true, 1e6),
    preset("qwen3-8b", QWEN3, [4096, 36, 32, 8, 128, 12_288], 151_936, 40_960, false, 1e6),
    gemma3("gemma3-270m", [640, 18, 4, 1, 256, 2048], 262_144, 32_768, 512),
    gemma3("gemma3-1b", [1152, 26, 4, 1, 256, 6912], 262_144, 32_768, 512),
    gemma3("gemma3-4b", [2560, 34, 8, 4, 256, 10_240], 262_208, 131_072, 1024),
];

#[cfg(test)]
mod tests {
    use super::super::{Quantization, SyntheticModel};
    use super::*;

    #[test]
    fn every_preset_is_valid_in_every_quantization() {
        for Preset { name, shape } in PRESETS {
            for quantization in Quantization::ALL {
                SyntheticModel::new(name, *shape, quantization, 0).unwrap_or_else(|error| panic!("{name}: {error}"));
            }
        }
    }

    /// The published numbers of weights, in millions.
    #[test]
    fn presets_have_as_many_weights_as_the_models() {
        for (name, millions) in [
            ("smollm2-135m", 134.5),
            ("llama-1b", 1235.8),
            ("llama-3b", 3212.7),
            ("llama-8b", 8030.3),
            ("llama-70b", 70_553.7),
            ("mistral-7b", 7248.0),
            ("qwen2-0.5b", 494.0),
            ("qwen2-7b", 7615.6),
            ("qwen3-0.6b", 596.0),
            ("qwen3-8b", 8190.7),
            ("gemma3-270m", 268.1),
            ("gemma3-1b", 999.9),
        ] {
            let shape = Preset::find(name).unwrap().shape;
            let weights: u64 = shape.tensors().iter().map(|tensor| tensor.dimensions.iter().product::<u64>()).sum();
            let found = weights as f64 / 1e6;
            assert!((found - millions).abs() < 0.06, "{name}: {found}");
        }
    }
}
