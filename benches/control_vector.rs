//! The same directions added at every layer but the first: by a guard, and by llama.cpp's own control vector. Both run the same tokens in turn, and
//! what counts is the median of the pairs' ratios.
//!
//! `cargo bench --profile dev --bench control_vector -- MODEL.gguf [PAIRS]`

use llama_cpp_sys_2 as sys;
use pilotfish::engine::{Model, ModelOptions, Session, SessionOptions};
use pilotfish::guard::{from_control_vector, write_guard};
use pilotfish::steering::ControlVector;
use pilotfish::tensor::{LayerIndex, quantile};
use std::ffi::CString;
use std::path::Path;
use std::time::Instant;

const PROMPT_TOKENS: usize = 256;
const TOKENS: usize = 64;
const STRENGTH: f64 = 1e-6;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(path) = arguments.next() else {
        println!("control_vector: skipped, no model given (cargo bench --bench control_vector -- MODEL.gguf [PAIRS])");
        return;
    };
    let pairs: usize = arguments.next().map_or(24, |pairs| pairs.parse().expect("a number of pairs"));
    let path = Path::new(&path);
    let model = Model::load(path, "bench", &ModelOptions::default()).expect("a model that llama.cpp loads");
    let (n_layer, width) = (model.shape().n_layer, model.shape().n_embd.0);
    let direction = |layer: u32| (0..width).map(|i| ((layer as usize * width + i) as f32 * 0.37).sin()).collect();
    let directions = (1..n_layer).map(|layer| (LayerIndex(layer), direction(layer))).collect();
    let vector = ControlVector::new("bench".into(), directions).expect("one width");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (manifest, tensors) = from_control_vector("bench", &vector, model.identity(), STRENGTH);
    let guard = write_guard(&folder.path().join("bench"), &manifest, &tensors, &[]).expect("a valid guard");

    let text = model.prompt_tokens("The pilot fish swims beside the shark and keeps it clean. ").expect("plain text");
    let tokens: Vec<_> = text.iter().copied().cycle().take(PROMPT_TOKENS + TOKENS).collect();
    let raw_tokens: Vec<i32> = tokens.iter().map(|token| token.0).collect();
    let options = SessionOptions { n_ctx: (PROMPT_TOKENS + TOKENS) as u32, ..Default::default() };
    let mut session = Session::new(&model, &[&guard], options).expect("a guarded context");
    let mut own = OwnControlVector::new(path, &vector, width, options.n_ctx);

    let mut guarded = || {
        let start = Instant::now();
        session.prefill(&tokens[..PROMPT_TOKENS]).expect("room for the prompt");
        let prefill = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for (offset, token) in tokens[PROMPT_TOKENS..].iter().enumerate() {
            session.step(PROMPT_TOKENS + offset, *token).expect("room for the answer");
        }
        [prefill, start.elapsed().as_secs_f64()]
    };
    let mut ratios: [Vec<f64>; 2] = Default::default();
    guarded();
    own.run(&raw_tokens);
    for pair in 0..pairs {
        let (ours, theirs) = if pair % 2 == 0 {
            let ours = guarded();
            (ours, own.run(&raw_tokens))
        } else {
            let theirs = own.run(&raw_tokens);
            (guarded(), theirs)
        };
        for (ratios, (ours, theirs)) in ratios.iter_mut().zip(ours.iter().zip(theirs)) {
            ratios.push(theirs / ours);
        }
    }
    println!("speed of the guard over that of llama.cpp's control vector, {pairs} pairs: median (lowest – highest)");
    for (name, ratios) in ["prefill", "decode"].iter().zip(&ratios) {
        let [low, median, high] = [0.0, 0.5, 1.0].map(|share| quantile(ratios, share));
        println!("{name:8} {median:.3} ({low:.3} – {high:.3})");
    }
}

/// llama.cpp by its own C API, with none of Pilotfish's code.
struct OwnControlVector {
    model: *mut sys::llama_model,
    context: *mut sys::llama_context,
}

impl OwnControlVector {
    fn new(path: &Path, vector: &ControlVector, width: usize, n_ctx: u32) -> Self {
        let path = CString::new(path.to_str().expect("a path in UTF-8")).expect("no NUL");
        let n_threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as i32;
        // Of layers 1, 2, …, each `[n_embd]`.
        let data: Vec<f32> =
            vector.directions().values().flatten().map(|value| (f64::from(*value) * STRENGTH) as f32).collect();
        // SAFETY: plain use of llama.h; model and context are freed in `drop`.
        unsafe {
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            let model = sys::llama_model_load_from_file(path.as_ptr(), params);
            assert!(!model.is_null(), "llama.cpp loads the model");
            let mut params = sys::llama_context_default_params();
            (params.n_ctx, params.n_batch, params.n_ubatch) = (n_ctx, 512, 512);
            (params.n_threads, params.n_threads_batch) = (n_threads, n_threads);
            let context = sys::llama_init_from_model(model, params);
            assert!(!context.is_null(), "llama.cpp makes a context");
            let last = vector.directions().len() as i32;
            let set = sys::llama_set_adapter_cvec(context, data.as_ptr(), data.len(), width as i32, 1, last);
            assert_eq!(set, 0, "llama.cpp takes the control vector");
            Self { model, context }
        }
    }

    /// Seconds of prefill and decode.
    fn run(&mut self, tokens: &[i32]) -> [f64; 2] {
        let mut tokens = tokens.to_vec();
        let (prompt, answer) = tokens.split_at_mut(PROMPT_TOKENS);
        let decode = |tokens: &mut [i32]| {
            // SAFETY: the context is valid, and the batch refers to tokens that live until it is decoded.
            let status = unsafe {
                sys::llama_decode(self.context, sys::llama_batch_get_one(tokens.as_mut_ptr(), tokens.len() as i32))
            };
            assert_eq!(status, 0);
        };
        // SAFETY: as above.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context), false) };
        let start = Instant::now();
        decode(prompt);
        let prefill = start.elapsed().as_secs_f64();
        let start = Instant::now();
        answer.chunks_mut(1).for_each(decode);
        [prefill, start.elapsed().as_secs_f64()]
    }
}

impl Drop for OwnControlVector {
    fn drop(&mut self) {
        // SAFETY: made in `new` and freed only here, the context first.
        unsafe {
            sys::llama_free(self.context);
            sys::llama_model_free(self.model);
        }
    }
}
