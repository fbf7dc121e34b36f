use super::Outcome;
use super::args::SynthesizeArguments;
use super::progress::Bar;
use indicatif::HumanBytes;
use pilotfish::synthetic::{Preset, Shape, Sliding, SyntheticModel};
use std::io::Write;

/// What a sliding window is like where the preset has none: as in every gemma3 model.
const SLIDING_PATTERN: u32 = 6;
const SLIDING_ROPE_BASE: f32 = 1e4;

pub fn synthesize(arguments: SynthesizeArguments) -> anyhow::Result<Outcome> {
    let preset = Preset::find(&arguments.preset)?;
    let shape = shape(&arguments, preset.shape);
    let model =
        SyntheticModel::new(&format!("synthetic {}", preset.name), shape, arguments.quantization, arguments.seed)?;
    let bar = Bar::bytes("writing");
    model.write(&arguments.output, |done, total| bar.at(done as usize, total as usize))?;
    drop(bar);
    eprintln!(
        "{} with {:.1} million random weights, {}",
        shape.architecture,
        model.n_weights() as f64 / 1e6,
        HumanBytes(model.file_bytes())
    );
    writeln!(std::io::stdout().lock(), "{}", arguments.output.display())?;
    Ok(Outcome::Done)
}

fn shape(arguments: &SynthesizeArguments, preset: Shape) -> Shape {
    let preset = preset.with_architecture(arguments.architecture.unwrap_or(preset.architecture));
    let usual = Sliding { window: 0, pattern: SLIDING_PATTERN, rope_base: SLIDING_ROPE_BASE };
    let sliding = match arguments.sliding_window {
        None => preset.sliding,
        Some(0) => None,
        Some(window) => Some(Sliding { window, ..preset.sliding.unwrap_or(usual) }),
    };
    Shape {
        width: arguments.width.unwrap_or(preset.width),
        layers: arguments.layers.unwrap_or(preset.layers),
        heads: arguments.heads.unwrap_or(preset.heads),
        kv_heads: arguments.kv_heads.unwrap_or(preset.kv_heads),
        head_width: arguments.head_width.unwrap_or(preset.head_width),
        feed_forward: arguments.feed_forward.unwrap_or(preset.feed_forward),
        vocabulary: arguments.vocabulary.unwrap_or(preset.vocabulary),
        context: arguments.context.unwrap_or(preset.context),
        tied: arguments.tied.unwrap_or(preset.tied),
        rope_base: arguments.rope_base.unwrap_or(preset.rope_base),
        sliding,
        ..preset
    }
}
