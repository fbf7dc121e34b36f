//! Reading the activations of every token at all layers that have them, beside plain prefill of the same prompt by llama.cpp with no callback. Neither
//! asks for logits. Both run in turn, and what counts is the median of the pairs' ratios. Contexts are made anew every few pairs, since where one lies in
//! memory shifts its time by a few per cent.
//!
//! `cargo bench --profile dev --bench capture -- MODEL.gguf [PAIRS [TOKENS …]]`

use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use pilotfish::engine::{ActivationReader, Model, ModelOptions, backend};
use pilotfish::tensor::{LayerIndex, quantile};
use std::error::Error;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Instant;

/// Before contexts are made anew.
const PAIRS_A_CONTEXT: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(path) = arguments.next() else {
        println!("capture: skipped, no model given (cargo bench --bench capture -- MODEL.gguf [PAIRS [TOKENS …]])");
        return Ok(());
    };
    let pairs = arguments.next().map_or(Ok(16), |pairs| pairs.parse::<usize>())?;
    let mut lengths = arguments.map(|length| length.parse()).collect::<Result<Vec<usize>, _>>()?;
    if lengths.is_empty() {
        lengths = vec![100, 250, 500];
    }
    let model = Model::load(Path::new(&path), "bench", &ModelOptions::default())?;
    let longest = lengths.iter().copied().max().unwrap_or(1);
    let text = model.prompt_tokens("The pilot fish swims beside the shark and keeps it clean. ")?;
    let tokens: Vec<_> = text.iter().copied().cycle().take(longest).collect();

    // All but the last, where llama.cpp keeps only rows with logits.
    let layers: Vec<LayerIndex> = (0..model.shape().n_layer - 1).map(LayerIndex).collect();
    let threads = std::thread::available_parallelism()?.get() as i32;
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(longest as u32))
        .with_n_batch(longest as u32)
        .with_n_ubatch(longest.min(512) as u32)
        .with_n_threads(threads)
        .with_n_threads_batch(threads);
    let mut batch = LlamaBatch::new(longest, 1);

    println!("{} layers of {}", layers.len(), model.shape().n_embd.0);
    for length in lengths {
        let tokens = &tokens[..length];
        let mut ratios = Vec::new();
        while ratios.len() < pairs {
            let mut reader = ActivationReader::of(&model, layers.clone(), longest)?;
            let mut plain = model.llama().new_context(backend()?, params.clone())?;
            let mut captured = || -> Result<f64, Box<dyn Error>> {
                let start = Instant::now();
                let rows = reader.every_token(tokens)?;
                let seconds = start.elapsed().as_secs_f64();
                assert_eq!(rows.n_rows(), length - 1);
                Ok(seconds)
            };
            let mut unread = || -> Result<f64, Box<dyn Error>> {
                let start = Instant::now();
                plain.clear_kv_cache();
                batch.clear();
                for (position, token) in tokens.iter().enumerate() {
                    batch.add(*token, position as i32, &[0], false)?;
                }
                plain.decode(&mut batch)?;
                plain.synchronize();
                Ok(start.elapsed().as_secs_f64())
            };
            captured()?;
            unread()?;
            for pair in 0..PAIRS_A_CONTEXT.min(pairs - ratios.len()) {
                let (captured, unread) = if pair % 2 == 0 {
                    let captured = captured()?;
                    (captured, unread()?)
                } else {
                    let unread = unread()?;
                    (captured()?, unread)
                };
                ratios.push(captured / unread);
            }
        }
        let at = |share| quantile(&ratios, share);
        println!(
            "{length} tokens: {:.3} of the time of plain prefill ({:.3} – {:.3}), {pairs} pairs",
            at(0.5),
            at(0.0),
            at(1.0)
        );
    }
    Ok(())
}
