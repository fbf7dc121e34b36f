//! Models of random weights: what ggml reads in their blocks, and that llama.cpp runs them under guards.

use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;
use pilotfish::engine::scheduler::{Event, Request, SchedulerOptions};
use pilotfish::engine::{LockStep, Model, ModelOptions, Sampling, Scheduler, SessionOptions, backend, guard_context};
use pilotfish::guard::{Digest, Guard, from_control_vector, write_guard};
use pilotfish::hook::{ExecutorKind, GuardedBatch, GuardedContext};
use pilotfish::program::Program;
use pilotfish::steering::ControlVector;
use pilotfish::synthetic::{
    Architecture, MIN_VOCABULARY, Quantization, Shape, Sliding, SyntheticError, SyntheticModel, TensorType,
};
use pilotfish::tensor::{LayerIndex, SequenceId, TokenPosition, norm};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;

/// Longer than the sliding window.
const TEXT: &str = "The pilot fish swims beside the shark, 12 times.";

/// Three heads share a head of keys and values, and but for qwen2, which can't, heads do not fill the width: rows of `attn_output` are no whole
/// super-blocks.
fn odd(architecture: Architecture) -> Shape {
    let heads = if architecture == Architecture::Qwen2 { 8 } else { 6 };
    let sliding = Sliding { window: 6, pattern: 3, rope_base: 1e4 };
    Shape {
        architecture,
        width: 256,
        layers: 5,
        heads,
        kv_heads: 2,
        head_width: 32,
        feed_forward: 512,
        vocabulary: 700,
        context: 512,
        tied: matches!(architecture, Architecture::Gemma3 | Architecture::Qwen3),
        rope_base: 1e6,
        sliding: (architecture == Architecture::Gemma3).then_some(sliding),
    }
}

fn all() -> impl Iterator<Item = SyntheticModel> {
    let each = |architecture| {
        let name = format!("odd {architecture}");
        Quantization::ALL.map(|quantization| SyntheticModel::new(&name, odd(architecture), quantization, 1).unwrap())
    };
    Architecture::ALL.into_iter().flat_map(each)
}

fn bytes(model: &SyntheticModel) -> Vec<u8> {
    let mut file = Vec::new();
    model.write_to(&mut file, |_, _| ()).unwrap();
    assert_eq!(file.len() as u64, model.file_bytes());
    file
}

/// What ggml makes of `data`.
fn values(kind: sys::ggml_type, data: &[u8], n: usize) -> Vec<f32> {
    if kind == sys::GGML_TYPE_F32 {
        return data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    }
    let mut values = vec![0.0; n];
    // SAFETY: `data` holds `n` values of this type, as the callers check, and `values` has room for them.
    unsafe {
        assert!(sys::ggml_validate_row_data(kind, data.as_ptr().cast(), data.len()));
        let to_float = (*sys::ggml_get_type_traits(kind)).to_float.expect("a type that can be read");
        to_float(data.as_ptr().cast(), values.as_mut_ptr(), n as i64);
    }
    values
}

fn mean_and_deviation(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().copied().map(f64::from).sum::<f64>() / n;
    let square = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
    (mean, square.sqrt())
}

#[test]
fn blocks_have_the_mean_and_deviation_asked_for_as_ggml_reads_them() {
    const N: usize = 256 * 1024;
    for kind in TensorType::ALL {
        // SAFETY: ggml's table of types, by a number of one of them.
        let traits = unsafe { &*sys::ggml_get_type_traits(kind.id()) };
        assert_eq!(traits.blck_size as u64, kind.block_length(), "{kind:?}");
        assert_eq!(traits.type_size as u64, kind.block_bytes(), "{kind:?}");
        // An embedding, and matrices of rows of 576 and of 28672 values.
        for deviation in [1.0, 576f32.sqrt().recip(), 28_672f32.sqrt().recip()] {
            let mut data = vec![0; N / kind.block_length() as usize * kind.block_bytes() as usize];
            kind.fill(&mut ChaCha8Rng::seed_from_u64(7), 0.0, deviation, &mut data);
            let values = values(kind.id(), &data, N);
            assert!(values.iter().all(|x| x.is_finite() && x.abs() < 4.0 * deviation), "{kind:?}");
            let (mean, found) = mean_and_deviation(&values);
            let deviation = f64::from(deviation);
            assert!(mean.abs() < 0.01 * deviation, "{kind:?}: mean {mean:.2e} of {deviation:.2e}");
            assert!(
                (found / deviation - 1.0).abs() < 0.01,
                "{kind:?}: deviation {found:.4e}, expected {deviation:.4e}"
            );
        }
    }
}

/// Every tensor of every kind of file, found by ggml's own reader.
#[test]
fn files_hold_the_tensors_that_were_planned() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for model in all() {
        model.write(&path, |_, _| ()).unwrap();
        let file = std::fs::read(&path).unwrap();
        let name = CString::new(path.to_str().unwrap()).unwrap();
        let planned = model.shape().tensors();
        // SAFETY: plain use of gguf.h; the context is freed in the end.
        unsafe {
            let gguf = sys::gguf_init_from_file(
                name.as_ptr(),
                sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() },
            );
            assert!(!gguf.is_null(), "ggml reads the file");
            assert_eq!(sys::gguf_get_n_tensors(gguf), planned.len() as i64);
            for tensor in &planned {
                let name = CString::new(tensor.name.as_str()).unwrap();
                let id = sys::gguf_find_tensor(gguf, name.as_ptr());
                assert!(id >= 0, "{name:?}");
                let kind = sys::gguf_get_tensor_type(gguf, id);
                let n = tensor.dimensions.iter().product::<u64>() as usize;
                let size = sys::gguf_get_tensor_size(gguf, id);
                assert_eq!(size, sys::ggml_row_size(kind, n as i64), "{name:?}");
                let at = sys::gguf_get_data_offset(gguf) + sys::gguf_get_tensor_offset(gguf, id);
                let values = values(kind, &file[at..at + size], n);
                let (mean, deviation) = mean_and_deviation(&values);
                let (expected, spread) = (f64::from(tensor.mean), f64::from(tensor.deviation));
                // Five times what so many values let one expect, and what half precision rounds away.
                let near =
                    |found: f64, expected: f64| (found - expected).abs() < spread * (5.0 / (n as f64).sqrt() + 0.01);
                assert!(near(mean, expected) && near(deviation, spread), "{name:?}: {mean:.3e}, {deviation:.3e}");
            }
            sys::gguf_free(gguf);
        }
    }
}

#[test]
fn the_same_seed_writes_the_same_bytes_and_another_others() {
    for quantization in Quantization::ALL {
        let model = |seed| SyntheticModel::new("odd", odd(Architecture::Qwen3), quantization, seed).unwrap();
        let once = bytes(&model(1));
        let at_once: Vec<_> = std::thread::scope(|scope| {
            let threads = [(); 2].map(|()| scope.spawn(|| bytes(&model(1))));
            threads.map(|thread| thread.join().unwrap()).into()
        });
        assert!(at_once.iter().all(|again| *again == once), "{quantization}");
        let other = bytes(&model(2));
        assert_eq!(other.len(), once.len());
        let same = other.iter().zip(&once).filter(|(a, b)| a == b).count();
        // The head is the same, the weights are not.
        assert!(same < once.len() / 2, "{quantization}: {same} of {} bytes are the same", once.len());
    }
}

/// Of other versions of this library and on other machines too: figures are compared by the seed.
#[test]
fn the_bytes_of_a_seed_do_not_change() {
    let digests = Quantization::ALL.map(|quantization| {
        let model = SyntheticModel::new("odd", odd(Architecture::Gemma3), quantization, 1).unwrap();
        format!("{quantization} {}", Digest::of(&bytes(&model)))
    });
    assert_eq!(
        digests,
        [
            "f32 bc9671619981f669f05a61dd57849bbab7347b1f4754eda88d436c62950060b2",
            "f16 56c41ddfaaeca2d88157554e126648f22a4855f3314101331ca163a04371b9eb",
            "q8_0 0905390fd7f670dba5084741566a07833ac5927a6feffc5c39d295a1846d5dbd",
            "q4_0 f3f7f6ef2ce4973901ed455a1726794f86f31c230c59fae1d2f62950e8e0c2be",
            "q4_k_m 593ff80e8b9f0ce144a80d0c15db9309b926efc5d6e50a99793b2b78e50f65db",
        ]
    );
}

/// A guard that adds `size` times a residual's norm at every layer but the first, which a control vector has no direction for.
fn steering(model: &Model, folder: &Path, size: f32) -> Guard {
    let (width, layers) = (model.shape().n_embd.0, model.shape().n_layer);
    let direction =
        |layer: u32| (0..width).map(|i| size * ((layer as usize * width + i) as f32 * 0.37).sin()).collect();
    let directions = (1..layers).map(|layer| (LayerIndex(layer), direction(layer))).collect();
    let vector = ControlVector::new(model.identity().architecture.clone(), directions).unwrap();
    let (manifest, tensors) = from_control_vector("steering", &vector, model.identity(), 1.0);
    let _none_yet = std::fs::remove_dir_all(folder);
    write_guard(folder, &manifest, &tensors, &[]).unwrap()
}

fn params() -> LlamaContextParams {
    LlamaContextParams::default().with_n_ctx(NonZeroU32::new(256)).with_n_threads(1).with_n_threads_batch(1)
}

fn prefill(context: &mut GuardedContext, prompt: &[LlamaToken]) -> Vec<f32> {
    let mut batch = GuardedBatch::new(prompt.len());
    let last = batch.add_prompt(SequenceId(0), TokenPosition(0), prompt).unwrap();
    context.decode(&mut batch).unwrap();
    context.get_logits_ith(last).to_vec()
}

#[test]
fn llama_cpp_runs_every_architecture_in_every_quantization_under_a_guard() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for written in all() {
        written.write(&path, |_, _| ()).unwrap();
        let what = format!("{}, {} bytes", written.shape().architecture, written.file_bytes());
        let model = Model::load(&path, "odd", &ModelOptions::default()).unwrap();
        let shape = written.shape();
        assert_eq!((model.shape().n_embd.0 as u32, model.shape().n_layer), (shape.width, shape.layers), "{what}");
        assert_eq!(model.identity().architecture, shape.architecture.name(), "{what}");
        assert_eq!(model.llama().n_vocab(), shape.vocabulary as i32, "{what}");

        let vocab = model.llama().vocab();
        let prompt = model.prompt_tokens(TEXT).unwrap();
        let spelt: Vec<u8> = prompt[1..].iter().flat_map(|token| vocab.token_to_piece(*token, false, None)).collect();
        assert_eq!(String::from_utf8(spelt).unwrap(), TEXT, "{what}");

        let observer = Arc::new(Program::observer(model.shape()));
        let mut context = GuardedContext::new(model.llama(), backend().unwrap(), params(), observer).unwrap();
        context.capture((0..shape.layers).map(LayerIndex));
        let plain = prefill(&mut context, &prompt);
        assert!(plain.iter().all(|logit| logit.is_finite()), "{what}");
        let mut sizes: BTreeMap<LayerIndex, Vec<f64>> = BTreeMap::new();
        for captured in context.take_captured() {
            let root = f64::from(shape.width).sqrt();
            sizes.insert(captured.layer, captured.each().map(|(_, values)| norm(values) / root).collect());
        }
        assert_eq!(sizes.keys().map(|layer| layer.0).collect::<Vec<_>>(), (0..shape.layers).collect::<Vec<_>>());
        let mean = |sizes: &Vec<f64>| sizes.iter().sum::<f64>() / sizes.len() as f64;
        let sizes: Vec<f64> = sizes.values().map(mean).collect();
        assert!(sizes.iter().all(|size| (0.9..3.0).contains(size)), "{what}: root mean squares {sizes:.2?}");
        assert!(sizes.windows(2).all(|pair| pair[1] > 0.95 * pair[0]), "{what}: root mean squares {sizes:.2?}");

        let guard = steering(&model, &folder.path().join("guard"), 0.5);
        let mut guarded = guard_context(model.llama(), backend().unwrap(), params(), &[&guard]).unwrap();
        let steered = prefill(&mut guarded, &prompt);
        assert!(steered.iter().all(|logit| logit.is_finite()), "{what}");
        let moved: Vec<f32> = steered.iter().zip(&plain).map(|(a, b)| a - b).collect();
        assert!(norm(&moved) > 0.05 * norm(&plain), "{what}: a guard at every layer moves the logits");

        let options = SchedulerOptions { n_ctx: 64, ..Default::default() };
        let mut scheduler = Scheduler::guarded(&model, &[&guard], options).unwrap();
        // So that it goes on to its fifth token.
        let sampling = Sampling { logit_bias: vec![(model.llama().vocab().eos(), -1e9)], ..Default::default() };
        scheduler.submit(Request { sampling, ..Request::new(prompt, 5) }).unwrap();
        let mut n_tokens = None;
        let mut on_event = |event| {
            if let Event::Ended { summary, .. } = event {
                n_tokens = Some(summary.tokens);
            }
        };
        while scheduler.step(&mut on_event).unwrap() {}
        assert_eq!(n_tokens, Some(5), "{what}");
    }
}

/// llama.cpp refuses positions that do not follow each other, and the hook rows that it can't tell.
#[test]
fn sequences_go_in_step_with_and_without_a_guard() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for architecture in [Architecture::Llama, Architecture::Gemma3] {
        SyntheticModel::new("odd", odd(architecture), Quantization::Q8_0, 1).unwrap().write(&path, |_, _| ()).unwrap();
        let model = Model::load(&path, "odd", &ModelOptions::default()).unwrap();
        let guard = steering(&model, &folder.path().join("guard"), 0.5);
        let text = model.prompt_tokens(TEXT).unwrap();
        // 5 sequences do not divide a batch of 512 rows, and their 150 tokens take two.
        for (n_sequences, n_tokens) in [(1, 3), (5, 150), (16, 40)] {
            let options = SessionOptions { n_ctx: n_tokens as u32 + 2, ..Default::default() };
            let prompt = |i: usize| text.iter().copied().cycle().skip(i).take(n_tokens).collect::<Vec<_>>();
            let prompts: Vec<_> = (0..n_sequences).map(prompt).collect();
            for guards in [&[][..], &[&guard][..]] {
                let mut sequences = LockStep::new(&model, guards, n_sequences as u32, options).unwrap();
                sequences.set_executor(ExecutorKind::Copy);
                for _again in 0..2 {
                    sequences.prefill(&prompts).unwrap();
                    for step in 0..2 {
                        sequences.step(n_tokens + step, &vec![text[1]; n_sequences]).unwrap();
                    }
                }
                assert!(sequences.step(n_tokens, &vec![text[1]; n_sequences]).is_err(), "a position that has been");
                assert_eq!(sequences.executor(), (!guards.is_empty()).then_some(ExecutorKind::Copy));
                assert!(sequences.prefill(&vec![vec![text[1]; n_tokens + 3]; n_sequences]).is_err(), "no room");
                assert!(sequences.prefill(&vec![Vec::new(); n_sequences]).is_err(), "no prompt");
            }
        }
    }
}

#[test]
fn a_shape_that_makes_no_sense_is_refused_by_name() {
    let good = odd(Architecture::Llama);
    let of = |shape: Shape, quantization| SyntheticModel::new("bad", shape, quantization, 0).map(|_| ());
    let refused = |shape, quantization, says: &[&str]| {
        let error = of(shape, quantization).expect_err("it makes no sense").to_string();
        assert!(says.iter().all(|word| error.contains(word)), "{error}");
    };
    use Quantization::{F32, Q4_0, Q4_K_M, Q8_0};
    for (shape, quantization, says) in [
        (Shape { width: 0, ..good }, F32, &["width is 0", "1 to"][..]),
        (Shape { layers: 0, ..good }, F32, &["layers is 0"]),
        (Shape { layers: 513, ..good }, F32, &["layers is 513", "512"]),
        (Shape { heads: 0, ..good }, F32, &["heads is 0"]),
        (Shape { kv_heads: 0, ..good }, F32, &["keys and values is 0"]),
        (Shape { feed_forward: 0, ..good }, F32, &["feed-forward width is 0"]),
        (Shape { context: 0, ..good }, F32, &["context is 0"]),
        (Shape { vocabulary: MIN_VOCABULARY - 1, ..good }, F32, &["vocabulary is 285", "286"]),
        (Shape { vocabulary: u32::MAX, ..good }, F32, &["vocabulary is 4294967295"]),
        (Shape { heads: 7, ..good }, F32, &["7 attention heads", "2 heads of keys"]),
        (Shape { head_width: 33, ..good }, F32, &["33", "odd"]),
        (Shape { heads: 1 << 19, head_width: 1 << 19, ..good }, F32, &["all heads"]),
        (Shape { heads: 6, ..odd(Architecture::Qwen2) }, F32, &["qwen2", "6 heads of 32", "256"]),
        (Shape { sliding: odd(Architecture::Gemma3).sliding, ..good }, F32, &["llama", "sliding"]),
        (Shape { width: 250, ..good }, Q8_0, &["token_embd.weight", "250", "q8_0", "block of 32"]),
        (Shape { feed_forward: 500, ..good }, Q4_0, &["blk.0.ffn_down.weight", "500", "block of 32"]),
        (Shape { head_width: 30, ..good }, Q4_K_M, &["attn_output.weight", "180", "q4_k_m"]),
    ] {
        refused(shape, quantization, says);
    }
    of(good, Q4_K_M).unwrap();
    of(Shape { width: 250, head_width: 30, feed_forward: 500, ..good }, F32).unwrap();
}

#[test]
fn what_can_not_be_written_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = SyntheticModel::new("odd", odd(Architecture::Llama), Quantization::Q4_0, 1).unwrap();
    let files =
        || -> Vec<_> { std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect() };

    let error = model.write(folder.path(), |_, _| ()).unwrap_err();
    assert!(matches!(error, SyntheticError::Directory { .. }), "{error}");
    let error = model.write(&at("none").join("model.gguf"), |_, _| ()).unwrap_err();
    assert!(matches!(error, SyntheticError::Io { action: "create", .. }), "{error}");
    assert!(files().is_empty(), "{:?}", files());

    // A model that another process writes.
    let partial = std::fs::File::create(at("model.gguf.partial")).unwrap();
    partial.lock().unwrap();
    let error = model.write(&at("model.gguf"), |_, _| ()).unwrap_err();
    assert!(matches!(error, SyntheticError::Busy { .. }), "{error}");
    assert_eq!(files(), ["model.gguf.partial"]);
    drop(partial);

    // What an interrupted run left is written over, and what was there is replaced as a whole.
    std::fs::write(at("model.gguf.partial"), vec![1; 10_000_000]).unwrap();
    std::fs::write(at("model.gguf"), b"old").unwrap();
    let mut told = Vec::new();
    model.write(&at("model.gguf"), |done, total| told.push((done, total))).unwrap();
    assert_eq!(std::fs::read(at("model.gguf")).unwrap(), bytes(&model));
    assert_eq!(files(), ["model.gguf"]);
    assert!(told.windows(2).all(|pair| pair[0].0 < pair[1].0), "{told:?}");
    assert_eq!(told.last(), Some(&(model.file_bytes(), model.file_bytes())));
}

/// A disk that takes the first 100000 bytes.
struct SmallDisk(usize);

impl io::Write for SmallDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.0);
        self.0 -= n;
        if n == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(n) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_is_full_is_an_error() {
    let model = SyntheticModel::new("odd", odd(Architecture::Llama), Quantization::F16, 1).unwrap();
    let error = model.write_to(SmallDisk(100_000), |_, _| ()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

/// The device on which there is never any space.
#[cfg(target_os = "linux")]
#[test]
fn no_space_is_told_with_what_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::os::unix::fs::symlink("/dev/full", folder.path().join("model.gguf.partial")).unwrap();
    let model = SyntheticModel::new("odd", odd(Architecture::Llama), Quantization::F16, 1).unwrap();
    let error = model.write(&path, |_, _| ()).unwrap_err();
    assert!(error.to_string().contains(&format!("needs {} bytes", model.file_bytes())), "{error}");
    assert!(matches!(error, SyntheticError::NoSpace { written: 0, .. }), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
