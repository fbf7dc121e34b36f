//! A guarded llama.cpp model in an app of one's own: `cargo run --example guarded -- MODEL.gguf GUARD "a prompt"`.

use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::{LlamaModel, params::LlamaModelParams};
use llama_cpp_2::sampling::LlamaSampler;
use pilotfish::engine::PromptTemplate;
use pilotfish::tensor::{SequenceId, TokenPosition};
use pilotfish::{Guard, GuardedBatch, guard_context};
use std::io::Write;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [model, guard, prompt] =
        std::env::args().skip(1).collect::<Vec<_>>().try_into().map_err(|_| "MODEL GUARD PROMPT")?;
    let backend = LlamaBackend::init()?;
    let model = LlamaModel::load_from_file(&backend, model, &LlamaModelParams::default())?;
    let guard = Guard::load(Path::new(&guard))?;
    let mut context = guard_context(&model, &backend, LlamaContextParams::default(), &[&guard])?;

    let template = PromptTemplate::of(&model, Some("Instruction: {prompt}\nResponse:"));
    let tokens = template.tokens(&model, &prompt)?;
    let (mut batch, sequence) = (GuardedBatch::new(512), SequenceId(0));
    let mut last = batch.add_prompt(sequence, TokenPosition(0), &tokens)?;
    let mut sampler = LlamaSampler::greedy();
    for position in tokens.len()..tokens.len() + 64 {
        context.decode(&mut batch)?; // an error if the guard blocks the sequence or fails: nothing is sampled then
        let token = sampler.sample(&context, last);
        if model.vocab().is_eog(token) {
            break;
        }
        std::io::stdout().write_all(&model.vocab().token_to_piece(token, false, None))?;
        batch.clear();
        last = batch.add_generated(sequence, TokenPosition(position as i32), token)?;
    }
    Ok(())
}
