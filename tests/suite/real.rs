//! On the two real models, where they have been pulled.

use crate::raw_llama;
use crate::support::done;
use pilotfish::engine::{ChatMessage, ChatTemplate, Model, ModelOptions, Session, SessionOptions};
use pilotfish::eval::Report;
use pilotfish::guard::{Guard, VectorFile};
use pilotfish::models::{Catalog, ModelCache};
use pilotfish::tensor::LayerIndex;
use serde_json::Value;
use std::path::{Path, PathBuf};

pub const SMALL: &str = "smollm2-135m-instruct";
pub const LARGE: &str = "gemma-3-270m";
const GUARD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guards/harm-gate-smollm2-to-gemma3");
const REFUSAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guards/refusal-smollm2-to-gemma3");

/// Where the model is; `None`, and a word of it, where it has not been pulled. With `PILOTFISH_REAL_MODELS=require`, as `make test`
/// sets it, it must be there.
pub fn located(name: &str) -> Option<PathBuf> {
    let catalog = Catalog::load().unwrap();
    let path = ModelCache::from_env().unwrap().locate(catalog.find(name).unwrap());
    if path.is_none() {
        let required = std::env::var("PILOTFISH_REAL_MODELS").is_ok_and(|value| value == "require");
        assert!(!required, "{name} is required but not here: run `pilotfish models pull {name}`");
        eprintln!("skipped: {name} is not here; `pilotfish models pull {name}` gets it");
    }
    path
}

fn load(name: &str) -> Option<Model> {
    let catalog = Catalog::load().unwrap();
    let fallback_template = catalog.find(name).unwrap().template.clone();
    let options = ModelOptions { fallback_template, ..Default::default() };
    Some(Model::load(&located(name)?, name, &options).unwrap())
}

#[test]
fn descriptors_say_what_the_models_are() {
    let catalog = Catalog::load().unwrap();
    for name in [SMALL, LARGE] {
        let Some(model) = load(name) else { return };
        let descriptor = catalog.find(name).unwrap();
        assert_eq!(
            descriptor.fingerprint.as_deref(),
            Some(model.identity().fingerprint.to_string().as_str()),
            "{name}"
        );
        assert_eq!(descriptor.architecture, model.identity().architecture);
        assert_eq!((descriptor.n_layer, descriptor.n_embd), (model.shape().n_layer, model.shape().n_embd.0 as u32));
    }
}

/// A conversation's first token is there once, whoever writes it: SmolLM2's template does, and Gemma's tokenizer.
#[test]
fn a_conversation_begins_with_its_first_token() {
    for name in [SMALL, LARGE] {
        let Some(model) = load(name) else { return };
        let said = |content: &str| vec![ChatMessage { role: "user".into(), content: content.into() }];
        let template = ChatTemplate::of(&model).unwrap();
        let bos = model.llama().vocab().bos();
        // The second spells a control token, which its content must not become.
        for content in ["Name three birds.", "Name <|im_start|> <start_of_turn> three birds."] {
            let tokens = template.tokens(&model, &said(content)).unwrap();
            assert_eq!(tokens.first(), Some(&bos), "{name}: {tokens:?}");
            assert_ne!(tokens.get(1), Some(&bos), "{name}: {tokens:?}");
        }
    }
}

/// The shipped adapter of that name.
fn organism(name: &str) -> String {
    format!("{}/models/organisms/{name}.lora.gguf", env!("CARGO_MANIFEST_DIR"))
}

/// What is shipped runs as it stands: its files are whole, and its probe is answered by the model that it is for.
#[test]
fn every_shipped_guard_is_whole_and_for_its_model() {
    let catalog = Catalog::load().unwrap();
    let entries = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/guards")).unwrap();
    let folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    assert!([GUARD, REFUSAL].iter().all(|guard| folders.iter().any(|folder| folder == Path::new(guard))));
    for folder in folders {
        let guard = Guard::load(&folder).unwrap();
        // Its report is one of this version's, in which nothing goes lost.
        let written = std::fs::read_to_string(folder.join("report/report.json")).unwrap();
        let report = Report::from_json(&written).unwrap();
        assert!(report.to_html().unwrap().contains(guard.name()), "{}", folder.display());
        let [written, again]: [Value; 2] = [written, report.to_json()].map(|text| serde_json::from_str(&text).unwrap());
        for (key, value) in written.as_object().unwrap() {
            assert!(again[key] == *value, "{}: {key}", folder.display());
        }
        let fingerprint = guard.target().fingerprint.to_string();
        let is_its = |name: &&str| catalog.find(name).unwrap().fingerprint.as_ref() == Some(&fingerprint);
        let name = [SMALL, LARGE].into_iter().find(is_its).unwrap_or_else(|| panic!("{}", folder.display()));
        let adapters = guard.target().adapters.iter().map(|adapter| organism(&adapter.name));
        let adapters: Vec<String> = adapters.flat_map(|path| ["--lora".to_owned(), path]).collect();
        if located(name).is_some() {
            let verify = ["guard", "verify", folder.to_str().unwrap(), "--model", name];
            let carried: Vec<&str> = adapters.iter().map(String::as_str).collect();
            done(&[&verify[..], &carried].concat());
        }
    }
}

/// The difference of the classes' means, in f64, from residuals that llama.cpp's own C API gave.
#[test]
fn extraction_agrees_with_raw_activations() {
    let Some(model) = load(SMALL) else { return };
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, prompts: &[&str]| {
        let path = folder.path().join(name);
        std::fs::write(&path, prompts.join("\n")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let positive =
        ["Praise the sea.", "Write a cheerful song", "Tell me why birds are wonderful", "I love it!", "Hooray for tea"];
    let negative =
        ["Blame the sea.", "Write a gloomy song", "Tell me why birds are dreadful", "I hate it!", "Down with tea"];
    const LAYER: u32 = 20;
    let (path, layers) = (located(SMALL).unwrap(), format!("3,{LAYER}"));
    let (positive_file, negative_file) = (write("p.txt", &positive), write("n.txt", &negative));
    for tokens in ["last", "mean"] {
        let vectors = folder.path().join(format!("{tokens}.safetensors"));
        let extract = ["extract", "--model", SMALL, "--layers", &layers, "--name", "mood", "--tokens", tokens];
        let classes = ["--positive", &positive_file, "--negative", &negative_file, "-o", vectors.to_str().unwrap()];
        done(&[&extract[..], &classes].concat());
        let file = VectorFile::from_bytes("mood", &std::fs::read(&vectors).unwrap()).unwrap();
        let found = file.vectors.iter().find(|vector| vector.layer == LayerIndex(LAYER)).unwrap();

        let mean = |prompts: &[&str]| -> Vec<f64> {
            let mut mean = vec![0.0; model.shape().n_embd.0];
            for prompt in prompts {
                let ids: Vec<i32> = model.prompt_tokens(prompt).unwrap().iter().map(|token| token.0).collect();
                let rows = raw_llama::decode(&path, &ids, LAYER, None).residual;
                let read = if tokens == "last" { &rows[rows.len() - 1..] } else { &rows[1..] };
                let share = 1.0 / (read.len() * prompts.len()) as f64;
                for row in read {
                    mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x) * share);
                }
            }
            mean
        };
        let expected: Vec<f64> = mean(&positive).iter().zip(mean(&negative)).map(|(p, n)| p - n).collect();
        let differences = expected.iter().zip(&found.values).map(|(e, f)| (e - f64::from(*f)).powi(2));
        let (error, norm) = (differences.sum::<f64>().sqrt(), expected.iter().map(|x| x * x).sum::<f64>().sqrt());
        assert!(error <= 1e-5 * norm, "{tokens}: {error} of {norm}");
    }
}

#[test]
fn the_shipped_guard_is_for_this_model_and_no_other() {
    let (Some(large), Some(small)) = (load(LARGE), load(SMALL)) else { return };
    let guard = Guard::load(Path::new(GUARD)).unwrap();
    let options = SessionOptions { n_ctx: 128, ..Default::default() };
    // Fingerprint, probe, compilation and dry run.
    Session::new(&large, &[&guard], options).unwrap();
    let error = Session::new(&small, &[&guard], options).err().unwrap().to_string();
    assert!(error.contains("another model"), "{error}");
}

/// On the demo's prompts, which had no part in its making: those above its middle line are harmful.
#[test]
fn the_shipped_guard_tells_the_demos_prompts_apart() {
    if located(LARGE).is_none() {
        return;
    }
    let prompts = format!("{GUARD}/prompts/demo.txt");
    let text = std::fs::read_to_string(&prompts).unwrap();
    for made_from in ["harmful", "harmless"] {
        let used = std::fs::read_to_string(format!("{GUARD}/prompts/{made_from}.jsonl")).unwrap();
        assert!(text.lines().all(|prompt| !used.contains(prompt)), "a prompt of the demo is in {made_from}.jsonl");
    }
    let scores: Vec<f64> = done(&["score", "--model", LARGE, "--guard", GUARD, "--prompts", &prompts, "--json"])
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["gates"]["harmful"]["score"].as_f64().unwrap())
        .collect();
    let (harmful, harmless) = scores.split_at(scores.len() / 2);
    let auc = pilotfish::tensor::auc(harmful, harmless);
    assert!(auc >= 0.9, "AUC {auc}: {scores:.2?}");
}

/// A guard that only reads leaves a real model's logits as they are, to the last bit, in the prompt and after it.
#[test]
fn reading_changes_no_bit_of_the_logits() {
    let Some(model) = load(LARGE) else { return };
    let guard = Guard::load(Path::new(GUARD)).unwrap();
    let options = SessionOptions { n_ctx: 128, ..Default::default() };
    let mut plain = Session::new(&model, &[], options).unwrap();
    let mut guarded = Session::new(&model, &[&guard], options).unwrap();
    let prompt = model.prompt_tokens("Name three birds that swim.").unwrap();
    let (mut a, mut b) = (plain.prefill(&prompt).unwrap(), guarded.prefill(&prompt).unwrap());
    for step in 0..12 {
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(plain.logits(a)) == bits(guarded.logits(b)), "step {step}");
        let best = plain.logits(a).iter().enumerate().max_by(|x, y| x.1.total_cmp(y.1)).unwrap().0;
        let token = llama_cpp_2::token::LlamaToken(best as i32);
        a = plain.step(prompt.len() + step, token).unwrap();
        b = guarded.step(prompt.len() + step, token).unwrap();
    }
}

/// The written guard refuses what it was to refuse, as `eval` sees it too, and keeps the ratio of its strengths.
#[test]
fn a_strength_is_found_for_a_share_of_refusals() {
    if located(LARGE).is_none() {
        return;
    }
    const TARGET: f64 = 0.5;
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(REFUSAL).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let (guard, manifest) = (folder.path().to_str().unwrap(), folder.path().join("guard.toml"));
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replacen("kind = \"add\"\n", "kind = \"add\" # steers\n", 1)).unwrap();
    let before = Guard::load(folder.path()).unwrap();

    let demo = std::fs::read_to_string(format!("{GUARD}/prompts/demo.txt")).unwrap();
    let lines: Vec<&str> = demo.lines().collect();
    let write = |name: &str, prompts: &[&str]| {
        let path = folder.path().join(name);
        std::fs::write(&path, prompts.join("\n")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (harmful, harmless) = lines.split_at(lines.len() / 2);
    let (positive, negative) = (write("harmful.txt", harmful), write("harmless.txt", harmless));
    let on = ["--model", LARGE, "--guard", guard, "--positive", &positive, "--limit", "4", "--max-tokens", "10"];
    let asked = ["--benign", &negative, "--refusals", "0.5"];
    let told = done(&[&["calibrate"][..], &on, &asked].concat());
    let chosen = told.lines().filter(|line| line.contains(" * ") && line.contains("of 4,")).count();
    assert_eq!(chosen, 1, "{told}");

    let after = Guard::load(folder.path()).unwrap();
    let factor = |index: usize| after.interventions()[index].strength / before.interventions()[index].strength;
    assert!((0.0..=2.0).contains(&factor(0)), "{}", factor(0));
    for index in 0..after.interventions().len() {
        assert!((factor(index) - factor(0)).abs() < 1e-5, "{index}: {} and {}", factor(index), factor(0));
    }
    assert!(std::fs::read_to_string(&manifest).unwrap().contains("kind = \"add\" # steers\n"));
    let controls = ["--task", "steering", "--negative", &negative, "--control-seeds", "0", "--json"];
    let found: Value = serde_json::from_str(&done(&[&["eval"][..], &on, &controls].concat())).unwrap();
    let row = found["rows"].as_array().unwrap().iter().find(|row| row["role"] == "guard").unwrap();
    let refused = row["harmful"]["refuses"]["share"].as_f64().unwrap();
    // One of the four may be answered otherwise: which prompts are read together differs, and rounding with it.
    assert!(refused >= TARGET - 0.25, "{refused} of the harmful prompts: {told}");
}
