//! What llama.cpp's eval callback costs by itself: a token of a tiny model, whose own work is next to nothing, with no callback, with one that asks for
//! no node, and with one that asks for the residual of one layer and of every layer and reads a gate there. The difference of two lines over the nodes or
//! layers between them is the cost of each.

use criterion::{Criterion, criterion_group, criterion_main};
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::token::LlamaToken;
use pilotfish::engine::{Model, ModelOptions, backend};
use pilotfish::guard::{Digest, Guard};
use pilotfish::hook::{GuardedBatch, GuardedContext};
use pilotfish::program::{Calibration, Program};
use pilotfish::tensor::{SequenceId, TokenPosition};
use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::Arc;
use tiny_model::{Architecture, TinyModel};

#[path = "../tests/support/tiny_model.rs"]
#[expect(dead_code, reason = "what the tests need besides")]
mod tiny_model;

/// Gates that read the residual of each of `layers`.
fn gates(model: &Model, layers: std::ops::Range<u32>) -> Program {
    let shape = model.shape();
    let direction: Vec<u8> = (0..shape.n_embd.0).flat_map(|i| ((i as f32 * 0.37).sin()).to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![shape.n_embd.0], &direction);
    let tensors = safetensors::serialize([("v", view.expect("one row"))], None).expect("a tensor file");
    let mut manifest = format!(
        "format = 1\nname = \"bench\"\ndescription = \"\"\n[target]\narchitecture = \"llama\"\nfingerprint = \"{0}\"\n\
         [tensors]\nfile = \"tensors.safetensors\"\nsha256 = \"{0}\"\n",
        Digest::of(&tensors)
    );
    for layer in layers {
        manifest += &format!(
            "[[vector]]\nname = \"v{layer}\"\nlayer = {layer}\ntensor = \"v\"\n\
             [[gate]]\nname = \"g{layer}\"\nvector = \"v{layer}\"\nthreshold = 1e9\nmean = 0.0\ndeviation = 1.0\n"
        );
    }
    let guard = Guard::from_parts("bench", manifest.as_bytes(), &tensors, &[]).expect("a valid guard");
    Program::compile(&guard, shape, Calibration::Required).expect("a guard of this width")
}

fn params() -> LlamaContextParams {
    LlamaContextParams::default().with_n_ctx(NonZeroU32::new(256)).with_n_threads(1).with_n_threads_batch(1)
}

/// The same position again and again, so that no token has more to attend to than another.
fn callback(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tiny.gguf");
    let shape = TinyModel::new(Architecture::Llama);
    let n_layer = shape.n_layer;
    shape.write_with(&path, &shape.weights());
    let model = Model::load(&path, "tiny", &ModelOptions::default()).expect("a model that llama.cpp loads");
    let backend = backend().expect("llama.cpp starts");
    let mut group = c.benchmark_group(format!("a token of {n_layer} tiny layers"));

    let mut plain = model.llama().new_context(backend, params()).expect("a context");
    let mut batch = LlamaBatch::new(1, 1);
    batch.add(LlamaToken(5), 0, &[0], true).expect("room for one");
    group.bench_function("no callback", |b| {
        b.iter(|| {
            plain.clear_kv_cache();
            plain.decode(black_box(&mut batch)).expect("one token");
        });
    });
    for (name, layers) in
        [("asks for nothing", 0..0), ("asks for one layer", 1..2), ("asks for every layer", 0..n_layer)]
    {
        let program = if layers.is_empty() { Program::observer(model.shape()) } else { gates(&model, layers) };
        let mut context = GuardedContext::new(model.llama(), backend, params(), Arc::new(program)).expect("a context");
        let mut batch = GuardedBatch::new(1);
        batch.add_generated(SequenceId(0), TokenPosition(0), LlamaToken(5)).expect("room for one");
        group.bench_function(name, |b| {
            b.iter(|| {
                context.clear_sequence(SequenceId(0)).expect("a sequence that lives");
                context.decode(black_box(&mut batch)).expect("one token");
            });
        });
    }
}

criterion_group!(benches, callback);
criterion_main!(benches);
