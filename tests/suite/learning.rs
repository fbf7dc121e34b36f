//! Making guards by the command: vectors, what is recorded of them, and figures for each quantization.

use crate::support::{Fixture, LAYER, done, pilotfish};
use crate::tiny_model::{Architecture, TinyModel};
use pilotfish::Guard;
use pilotfish::engine::{Model, ModelOptions, Prompt, Session, SessionOptions};
use pilotfish::guard::{InterventionKind, VectorFile};
use pilotfish::learn::{FirstTokens, adding, benign_projections, prompt_activations};
use pilotfish::steering::{PromptTokens, SteeringVector};
use pilotfish::tensor::LayerIndex;
use serde_json::Value;
use std::path::Path;
use tempfile::TempDir;

/// Prompts in the files of a folder.
struct Prompts {
    folder: TempDir,
}

impl Prompts {
    /// Twelve prompts about each of two things, and as many more about one of them as `extra` says.
    fn new() -> Self {
        let prompts = Self { folder: tempfile::tempdir().unwrap() };
        let of =
            |word: &str, n: usize| (0..n).map(|n| format!("{word} {}\n", "sea ".repeat(n + 1))).collect::<String>();
        for (name, text) in
            [("sharks.txt", of("shark", 12)), ("fish.txt", of("pilot fish", 12)), ("birds.txt", of("bird song", 40))]
        {
            std::fs::write(prompts.folder.path().join(name), text).unwrap();
        }
        prompts
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn model(&self) -> String {
        let path = self.at("tiny.gguf");
        TinyModel::new(Architecture::Llama).write(Path::new(&path));
        path
    }

    /// `extract`, sharks against fish, with `more`; the file's bytes.
    fn extract(&self, model: &str, name: &str, more: &[&str]) -> Vec<u8> {
        let output = self.at(name);
        let (positive, negative) = (self.at("sharks.txt"), self.at("fish.txt"));
        let plain = ["extract", "--model", model, "--positive", &positive, "--negative", &negative, "-o", &output];
        done(&[&plain[..], more].concat());
        std::fs::read(output).unwrap()
    }
}

fn vectors(bytes: &[u8]) -> Vec<SteeringVector> {
    VectorFile::from_bytes("v", bytes).unwrap().vectors
}

#[test]
fn every_method_is_recorded_and_the_same_twice() {
    let prompts = Prompts::new();
    let model = prompts.model();
    for method in ["mean", "pca", "lda", "logistic"] {
        let more = ["--method", method, "--resamples", "6", "--seed", "3"];
        let first = prompts.extract(&model, "first.safetensors", &more);
        assert!(first == prompts.extract(&model, "second.safetensors", &more), "{method}: not the same bytes");
        let found = vectors(&first);
        assert_eq!(found.len(), 4);
        for vector in &found {
            let quality = vector.quality.as_ref().unwrap();
            assert_eq!(vector.method.to_string(), method);
            assert_eq!(quality.auc.len(), 1);
            assert!((0.0..=1.0).contains(&quality.auc[0]), "{quality:?}");
            let stability = quality.stability.unwrap();
            assert!(stability.resamples == 6 && stability.seed == 3 && stability.mean_cosine > 0.0, "{quality:?}");
            assert!((quality.norm - pilotfish::tensor::norm(&vector.values)).abs() < 1e-9 * quality.norm);
            assert_eq!(
                (quality.cosine_before.is_some(), quality.cosine_after.is_some()),
                (vector.layer.0 > 0, vector.layer.0 < 3)
            );
        }
        let other =
            prompts.extract(&model, "other.safetensors", &["--method", method, "--resamples", "6", "--seed", "4"]);
        let mean_cosine =
            |vectors: &[SteeringVector]| vectors[1].quality.as_ref().unwrap().stability.unwrap().mean_cosine;
        assert_ne!(mean_cosine(&found), mean_cosine(&vectors(&other)), "{method}: another seed");
    }
}

/// The table of a sweep, and what the library gives for one layer of it.
#[test]
fn a_sweep_steers_with_every_vector_and_says_what_that_does() {
    let prompts = Prompts::new();
    let path = prompts.model();
    let (positive, negative, output) = (prompts.at("sharks.txt"), prompts.at("fish.txt"), prompts.at("v.safetensors"));
    let plain = ["extract", "--model", &path, "--positive", &positive, "--negative", &negative, "-o", &output];
    let told = done(&[&plain[..], &["--sweep", "3", "--sweep-prompts", "5", "--effect-tokens", " sea"]].concat());
    let table = told.split("effect").nth(1).unwrap();
    assert_eq!(table.lines().filter(|line| line.contains(['+', '-']) && line.contains("0.")).count(), 3, "{told}");

    let model = Model::load(Path::new(&path), "tiny", &ModelOptions::default()).unwrap();
    let vector = &vectors(&std::fs::read(&output).unwrap())[1];
    let (steered, kept) = ([Prompt::from("shark")], [Prompt::from("pilot fish")]);
    let first_tokens = FirstTokens::new(&model, &[" sea".to_owned()], &steered, &kept).unwrap();
    let measured = |strength: f64| first_tokens.measure(&adding(&model, vector, strength, 2.0).unwrap()).unwrap();
    assert_eq!(measured(0.0), (0.0, 0.0), "nothing added, nothing changed");
    let (some, more) = (measured(1.0), measured(20.0));
    assert!(some.0 != 0.0 && some.1 > 0.0 && more.1 > some.1, "{some:?} {more:?}");
    // The same by hand: log-odds of the one token, guarded and not.
    let sea = model.llama().vocab().tokenize(b" sea", false, false)[0];
    let odds = |guards: &[&Guard]| {
        let mut session = Session::new(&model, guards, SessionOptions::default()).unwrap();
        let last = session.prefill(&model.prompt_tokens("shark").unwrap()).unwrap();
        let log = pilotfish::tensor::log_softmax(session.logits(last))[sea.0 as usize];
        log - (-log.exp()).ln_1p()
    };
    let expected = odds(&[&adding(&model, vector, 1.0, 2.0).unwrap()]) - odds(&[]);
    assert!((some.0 - expected).abs() < 1e-6, "{} and {expected}", some.0);
}

#[test]
fn several_contrasts_have_equal_say_or_their_weights() {
    let prompts = Prompts::new();
    let model = prompts.model();
    let (sharks, birds) = (prompts.at("sharks.txt"), prompts.at("birds.txt"));
    let one = vectors(&prompts.extract(&model, "one.safetensors", &[]));
    let again = ["--positive", &sharks, "--negative", &birds];
    let both = vectors(&prompts.extract(&model, "both.safetensors", &again));
    let heavy = vectors(&prompts.extract(&model, "heavy.safetensors", &[&again[..], &["--weights", "3,1"]].concat()));
    let other = {
        let output = prompts.at("other.safetensors");
        done(&["extract", "--model", &model, "--positive", &sharks, "--negative", &birds, "-o", &output]);
        vectors(&std::fs::read(output).unwrap())
    };
    for layer in 0..4 {
        assert_eq!(both[layer].quality.as_ref().unwrap().auc.len(), 2);
        assert_eq!((both[layer].n_positive, both[layer].n_negative), (24, 52));
        for index in 0..one[layer].values.len() {
            let (a, b) = (one[layer].values[index], other[layer].values[index]);
            assert!((both[layer].values[index] - (a + b) / 2.0).abs() < 1e-5);
            assert!((heavy[layer].values[index] - (3.0 * a + b) / 4.0).abs() < 1e-5);
        }
    }
    let wrong = |more: &[&str]| {
        let output = prompts.at("wrong.safetensors");
        let plain = ["extract", "--model", &model, "--positive", &sharks, "--negative", &birds, "-o", &output];
        let ran = pilotfish(&[&plain[..], more].concat());
        assert!(ran.code == 2 && !Path::new(&output).exists(), "{ran:?}");
        ran.stderr
    };
    assert!(wrong(&["--positive", &sharks]).contains("there are 2 and 1"));
    assert!(wrong(&["--weights", "1,2"]).contains("2 weights for 1 contrast"));
    assert!(wrong(&["--method", "pca"]).contains("equal size"));
    assert!(wrong(&["--method", "logistic", "--penalty", "0"]).contains("the penalty is 0"));
}

/// Rows as the model has them, token by token.
#[test]
fn chosen_and_matching_tokens_are_the_ones_that_are_read() {
    let prompts = Prompts::new();
    let path = prompts.model();
    let model = Model::load(Path::new(&path), "tiny", &ModelOptions::default()).unwrap();
    let layer = LayerIndex(LAYER);
    let text = [Prompt::from("the pilot fish eats")];
    let read = |tokens: &str| {
        let tokens: PromptTokens = tokens.parse().unwrap();
        prompt_activations(&model, &[layer], &text, &tokens, &mut |_, _| ())
            .map(|read| read.layer(layer).row(0).to_vec())
    };
    let ids = model.tokens_read(None, &text[0]).unwrap();
    let mut reader = pilotfish::engine::ActivationReader::of(&model, vec![layer], 64).unwrap();
    let all = reader.every_token(&ids).unwrap();
    let row = |token: usize| all.layer(layer).row(token - 1).to_vec();
    assert_eq!(read("-2").unwrap(), row(ids.len() - 2));
    assert_eq!(read("-1").unwrap(), read("last").unwrap());

    let pieces: Vec<_> = ids.iter().map(|id| model.llama().vocab().token_to_piece(*id, true, None)).collect();
    let spells = |word: &str| pieces.iter().position(|piece| piece.trim_ascii() == word.as_bytes()).unwrap();
    assert_eq!(read("matching=fish").unwrap(), row(spells("fish")));
    let both = read("matching=pilot fish").unwrap();
    for (index, found) in both.iter().enumerate() {
        let expected = (row(spells("pilot"))[index] + row(spells("fish"))[index]) / 2.0;
        assert!((found - expected).abs() < 1e-5);
    }
    assert_eq!(read("matching=pilot;matching=fish;matching=shark;matching=pilot fish").unwrap(), both);
    let behind = read("after=pilot").unwrap();
    for (index, found) in behind.iter().enumerate() {
        let expected = (row(spells("fish"))[index] + row(spells("eats"))[index]) / 2.0;
        assert!((found - expected).abs() < 1e-5);
    }
    // Nothing stands behind the last word.
    for none in ["matching=shark", "-50", "after=shark", "after=eats"] {
        let error = read(none).unwrap_err().to_string();
        assert!(error.contains(&format!("`{none}`")) && error.contains("prompt 0"), "{error}");
    }
}

/// How an answer begins is read behind the template, as what the model has said itself.
#[test]
fn an_answer_that_has_begun_is_read_behind_the_template() {
    let prompts = Prompts::new();
    let options = ModelOptions { fallback_template: Some("shark {prompt} song".to_owned()), ..ModelOptions::default() };
    let model = Model::load(Path::new(&prompts.model()), "tiny", &options).unwrap();
    let begun = |prefill: &str| Prompt { text: "the pilot fish".into(), prefill: prefill.into() };
    let tokens = |prompt: &Prompt| model.tokens_read(None, prompt).unwrap();
    let asked = model.prompt_tokens("the pilot fish").unwrap();
    assert_eq!(tokens(&begun("")), asked);
    let said = [asked.clone(), model.text_tokens(" eats fish")].concat();
    assert_eq!(tokens(&begun("eats fish")), said, "behind a space, since the template ends in none");
    // No word of the model's own ends its turn, or begins anything.
    let vocab = model.llama().vocab();
    assert!(tokens(&begun("eats</s>"))[asked.len()..].iter().all(|token| !vocab.is_control(*token)));

    let layout = model.template().layout(model.llama(), &begun("eats fish")).unwrap();
    assert_eq!((layout.answer, &layout.tokens), (asked.len(), &said));
    let [.., words, song, eats, fish] = layout.ends.as_slice() else { panic!("{layout:?}") };
    assert_eq!([*words, *song, *eats, *fish], [Some(14), None, Some(18), Some(23)]);

    let last = |prompt: Prompt, tokens: &str| {
        let layer = LayerIndex(LAYER);
        let read = prompt_activations(&model, &[layer], &[prompt], &tokens.parse().unwrap(), &mut |_, _| ());
        read.unwrap().layer(layer).row(0).to_vec()
    };
    assert_eq!(last(begun("eats fish"), "last"), last(begun("eats fish"), "-1"));
    assert_eq!(last(begun("eats fish"), "-3"), last(begun("eats"), "-2"), "the template's last token, either time");
    assert_ne!(last(begun("eats"), "last"), last(begun(""), "last"));
}

/// What an ablation leaves is measured on the tokens that it names, and on all but the first where it names none.
#[test]
fn an_ablation_is_recentred_on_the_tokens_that_it_names() {
    let texts = ["the pilot fish eats", "a fish and a shark"].map(Prompt::from);
    let mean = |benign_tokens: &[&str]| {
        let fixture = Fixture::new(&[&["--intervene", "ablate"], benign_tokens].concat());
        let model = Model::load(Path::new(fixture.model()), "tiny", &ModelOptions::default()).unwrap();
        let guard = Guard::load(Path::new(fixture.guard())).unwrap();
        let found = benign_projections(&model, &guard, |_| true, &texts, &mut |_, _| ());
        let vector = &guard.vectors()[guard.interventions()[0].kind.vector().unwrap()];
        let length = vector.direction.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let mut reader = pilotfish::engine::ActivationReader::of(&model, vec![vector.layer], 64).unwrap();
        let mut expected = |is_it: &dyn Fn(&[u8]) -> bool| {
            let mut projections = Vec::new();
            for text in &texts {
                let ids = model.tokens_read(None, text).unwrap();
                let rows = reader.every_token(&ids).unwrap();
                for (token, id) in ids.iter().enumerate().skip(1) {
                    if is_it(model.llama().vocab().token_to_piece(*id, true, None).trim_ascii()) {
                        let row = rows.layer(vector.layer).row(token - 1).iter().zip(&vector.direction);
                        projections.push(row.map(|(x, v)| f64::from(*x) * f64::from(*v)).sum::<f64>() / length);
                    }
                }
            }
            projections.iter().sum::<f64>() / projections.len() as f64
        };
        (found.map(|found| found[0].mean), expected(&|_| true), expected(&|piece| piece == b"fish"))
    };
    let (all, expected_of_all, _) = mean(&[]);
    let (fish, _, expected_of_fish) = mean(&["--benign-tokens", "matching=fish"]);
    assert!((all.unwrap() - expected_of_all).abs() < 1e-4);
    assert!((fish.unwrap() - expected_of_fish).abs() < 1e-4);
    assert!((expected_of_all - expected_of_fish).abs() > 1e-2);
    let (none, ..) = mean(&["--benign-tokens", "matching=pilot"]);
    assert!(none.unwrap_err().to_string().contains("prompt 1"));
}

/// One model in several quantizations, which have another residual each, and so other figures.
#[test]
fn a_gate_goes_by_the_figures_of_the_file_that_is_loaded() {
    let prompts = Prompts::new();
    let file = |quantization: &str| {
        let output = prompts.at(&format!("{quantization}.gguf"));
        let sizes = ["--width", "64", "--layers", "4", "--heads", "4", "--kv-heads", "2", "--head-width", "16"];
        let more = ["--feed-forward", "128", "--vocabulary", "600", "--context", "512", "--quantization", quantization];
        done(&[&["models", "synthesize", "--preset", "llama-8b", "-o", &output][..], &sizes, &more].concat());
        output
    };
    let [first, second, third] = ["q8_0", "f16", "q4_0"].map(file);
    prompts.extract(&first, "v.safetensors", &[]);
    let guard = prompts.at("guard");
    let build = [
        "guard",
        "build",
        "--name",
        "sharks",
        "--model",
        &first,
        "--vectors",
        &prompts.at("v.safetensors"),
        "-o",
        &guard,
    ];
    done(&[&build[..], &["--layer", "1", "--gate", "sharks", "--intervene", "add"]].concat());
    // Random weights of one quantization are no quantization of those of another.
    let manifest = format!("{guard}/guard.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let (before, probe) = text.split_once("[target.probe]").unwrap();
    let after = probe.split_once("\n[").unwrap().1;
    std::fs::write(&manifest, format!("{before}[{after}")).unwrap();

    let benign = prompts.at("birds.txt");
    let calibrate = |model: &str, more: &[&str]| {
        let (sharks, plain) = (prompts.at("sharks.txt"), ["calibrate", "--model", model, "--guard", &guard]);
        done(&[&plain[..], &["--benign", &benign, "--positive", &sharks], more].concat())
    };
    let told = calibrate(&first, &["--strength-sd", "2.5"]);
    assert!(told.contains("0.5 %") && told.contains("of 40"), "{told}");
    let after_one = Guard::load(guard.as_ref()).unwrap();
    calibrate(&second, &[]);
    let loaded = Guard::load(guard.as_ref()).unwrap();
    let known = &loaded.gates()[0].calibrations;
    assert_eq!(known.iter().map(|known| known.quantization.as_str()).collect::<Vec<_>>(), ["Q8_0", "F16"]);
    assert_eq!(known[0], after_one.gates()[0].calibrations[0], "the first one's figures stay");
    assert_ne!(known[0].mean, known[1].mean);
    assert!(known[0].points.len() >= 6 && known[0].points.iter().all(|point| point.detection.is_some()));
    // The strength asked for stays; what it is in units of is measured anew.
    let added = |guard: &Guard| (guard.interventions()[0].strength, guard.interventions()[0].deviation.unwrap());
    assert_eq!((added(&after_one).0, added(&loaded).0), (2.5, 2.5));
    assert_ne!(added(&after_one).1, added(&loaded).1);

    // Benign scores have mean 0 and deviation 1 on either file.
    let scores = |model: &str| -> Vec<f64> {
        let lines = done(&["score", "--model", model, "--guard", &guard, "--prompts", &benign, "--json"]);
        let score = |line: &str| serde_json::from_str::<Value>(line).unwrap()["gates"]["sharks"]["score"].as_f64();
        lines.lines().map(|line| score(line).unwrap()).collect()
    };
    for model in [&first, &second] {
        let (mean, deviation) = pilotfish::tensor::mean_and_deviation(&scores(model)).unwrap();
        assert!(mean.abs() < 1e-4 && (deviation - 1.0).abs() < 1e-4, "{model}: {mean} ± {deviation}");
    }
    // One that was never measured runs on the last one's, and says so.
    let ran = pilotfish(&["score", "--model", &third, "--guard", &guard, "--prompts", &benign, "--json"]);
    assert!(ran.code == 0 && ran.stderr.contains("`sharks` is not calibrated on Q4_0"), "{ran:?}");
    assert!(
        !pilotfish(&["score", "--model", &first, "--guard", &guard, "--prompts", &benign])
            .stderr
            .contains("calibrated")
    );

    // An operating point of the table, for all of them.
    done(&["calibrate", "--guard", &guard, "--use", "0.1"]);
    let chosen = Guard::load(guard.as_ref()).unwrap();
    for known in &chosen.gates()[0].calibrations {
        assert_eq!(known.threshold, known.point(0.1).unwrap().threshold);
        assert_eq!(known.point(0.1).unwrap().fired, 4);
    }
    assert_eq!(chosen.gates()[0].threshold, Some(chosen.gates()[0].calibrations[1].threshold));
    let unknown = pilotfish(&["calibrate", "--guard", &guard, "--use", "0.3"]);
    assert!(unknown.code == 2 && unknown.stderr.contains("operating point `0.3`"), "{unknown:?}");
}

#[test]
fn being_sure_of_a_rate_takes_more_prompts() {
    let fixture = Fixture::new(&[]);
    let benign = fixture.folder.path().join("benign.txt");
    let prompts: String = (0..60).map(|n| format!("bird {}\n", "song ".repeat(n + 1))).collect();
    std::fs::write(&benign, &prompts).unwrap();
    let calibrate = |more: &[&str]| {
        let plain =
            ["calibrate", "--model", fixture.model(), "--guard", fixture.guard(), "--benign", benign.to_str().unwrap()];
        pilotfish(&[&plain[..], more].concat())
    };
    assert_eq!(calibrate(&["--confidence", "0.95"]).code, 0);
    let sure = Guard::load(&fixture.guard).unwrap();
    let point = sure.gates()[0].calibrations[0].point(0.05).unwrap();
    assert_eq!((point.fired, point.threshold), (0, sure.gates()[0].threshold.unwrap()));
    assert_eq!(calibrate(&[]).code, 0);
    assert_eq!(Guard::load(&fixture.guard).unwrap().gates()[0].calibrations[0].point(0.05).unwrap().fired, 3);
    let few = calibrate(&["--confidence", "0.95", "--false-positive-rate", "0.01"]);
    assert!(few.code == 2 && few.stderr.contains("at least 299 prompts, found 60"), "{few:?}");
    assert_eq!(calibrate(&["--confidence", "1.5"]).code, 2);
}

/// What is benign for a gate need not be what an ablation is to leave.
#[test]
fn one_part_of_a_guard_is_calibrated_alone() {
    let fixture = Fixture::new(&["--intervene", "ablate"]);
    let files = Prompts::new();
    let calibrate = |benign: &str, more: &[&str]| {
        let benign = files.at(benign);
        let plain = ["calibrate", "--model", fixture.model(), "--guard", fixture.guard(), "--benign", &benign];
        pilotfish(&[&plain[..], more].concat())
    };
    let found = || {
        let guard = Guard::load(&fixture.guard).unwrap();
        let InterventionKind::Ablate { mean, .. } = guard.interventions()[0].kind else { panic!("it ablates") };
        (guard.gates()[0].calibrations[0].mean, mean)
    };
    let (gate, intervention) = {
        let guard = Guard::load(&fixture.guard).unwrap();
        (guard.gates()[0].name.clone(), guard.interventions()[0].name.clone())
    };
    assert_eq!(calibrate("birds.txt", &[]).code, 0);
    let of_birds = found();
    assert_eq!(calibrate("fish.txt", &["--only", &intervention]).code, 0);
    let with_fish = found();
    assert_eq!(with_fish.0, of_birds.0);
    assert_ne!(with_fish.1, of_birds.1);
    assert_eq!(calibrate("fish.txt", &["--only", &gate]).code, 0);
    assert_eq!(found().1, with_fish.1);
    assert_ne!(found().0, of_birds.0);
    let both = calibrate("fish.txt", &["--only", &gate, "--only", &intervention]);
    assert_eq!(both.code, 0, "{both:?}");
    // What is added has no unit that could be measured.
    let adds = Fixture::new(&["--intervene", "add"]);
    let name = Guard::load(&adds.guard).unwrap().interventions()[0].name.clone();
    let benign = files.at("fish.txt");
    let plain = ["calibrate", "--model", adds.model(), "--guard", adds.guard(), "--benign", &benign, "--only", &name];
    let nothing = pilotfish(&plain);
    assert!(nothing.code == 2 && nothing.stderr.contains("nothing to measure"), "{nothing:?}");
    assert_eq!(pilotfish(&[&plain[..], &["--strength-sd", "2"]].concat()).code, 0);
    let unknown = calibrate("fish.txt", &["--only", "whale"]);
    assert!(unknown.code == 2 && unknown.stderr.contains(&format!("`whale`; it has `{gate}`")), "{unknown:?}");
    assert_eq!(
        calibrate("fish.txt", &["--only", &gate, "--positive", &files.at("birds.txt"), "--refusals", "0.5"]).code,
        64
    );
}

/// A gate whose vector a map of means carries, then an intervention by another vector and another map, put together.
#[test]
fn a_guard_of_several_vectors_is_made_step_by_step() {
    let prompts = Prompts::new();
    let source = prompts.model();
    let target = prompts.at("target.gguf");
    TinyModel { seed: 9, ..TinyModel::new(Architecture::Qwen2) }.write(Path::new(&target));
    prompts.extract(&source, "harm.safetensors", &["--name", "harm", "--method", "lda", "--tokens", "mean"]);
    prompts.extract(&source, "away.safetensors", &["--name", "away"]);
    let (birds, sharks) = (prompts.at("birds.txt"), prompts.at("sharks.txt"));
    let map = |name: &str, rows: &str| {
        let output = prompts.at(name);
        let models = ["map", "--source", &source, "--target", &target, "--layers", "1:1", "--rows", rows];
        let told = done(&[&models[..], &["--corpus", &birds, "--corpus", &sharks, "-o", &output]].concat());
        (told, output)
    };
    let (told, means) = map("means.map.safetensors", "means");
    assert!(told.contains("52 paired means of 52 documents"), "{told}");
    let (told, tokens) = map("tokens.map.safetensors", "tokens");
    assert!(told.contains("paired tokens of 52 documents"), "{told}");

    let build = |name: &str, vectors: &str, mapping: &str, more: &[&str]| {
        let (vectors, output) = (prompts.at(vectors), prompts.at(name));
        let plain = ["guard", "build", "--name", name, "--model", &target, "--vectors", &vectors, "--mapping", mapping];
        let ran = pilotfish(&[&plain[..], &["--layer", "1:1", "-o", &output], more].concat());
        (ran, output)
    };
    let (ran, gate) = build("gate", "harm.safetensors", &means, &["--gate", "harmful", "--description", "Reads"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    done(&["calibrate", "--model", &target, "--guard", &gate, "--benign", &birds]);
    let steer =
        ["--intervene", "add", "--positions", "prompt", "--strength", "3", "--when", "harmful", "--onto", &gate];
    // Both maps go by the same name in a guard.
    let (ran, _) = build("steer", "away.safetensors", &tokens, &steer);
    assert!(ran.code == 2 && ran.stderr.contains("1-to-target-1"), "{ran:?}");
    let (ran, both) = build("steer", "away.safetensors", &tokens, &[&steer[..], &["--baked"]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");

    let (gate, both) = (Guard::load(gate.as_ref()).unwrap(), Guard::load(both.as_ref()).unwrap());
    assert_eq!((both.name(), both.description()), ("steer", "Reads"));
    assert_eq!(both.gates(), gate.gates(), "the gate with its calibration");
    assert_eq!(both.vectors()[0], gate.vectors()[0]);
    let added = &both.interventions()[0];
    assert_eq!((both.operand_of(added), added.strength), ("away", 3.0));
    assert_eq!(added.when.as_ref().map(|rule| both.written(rule)).as_deref(), Some("harmful"));
    // Where the gate fires it acts, and nowhere else.
    let model = Model::load(Path::new(&target), "target", &ModelOptions::default()).unwrap();
    let logits = |guards: &[&Guard], prompt: &str| {
        let mut session = Session::new(&model, guards, SessionOptions::default()).unwrap();
        let tokens = model.prompt_tokens(prompt).unwrap();
        let last = session.prefill(&tokens).unwrap();
        let fired = session.gate_readings().iter().any(|reading| reading.fired);
        (fired, session.logits(last).to_vec())
    };
    let texts: Vec<String> = std::fs::read_to_string(&sharks).unwrap().lines().map(str::to_owned).collect();
    let benign: Vec<String> = std::fs::read_to_string(&birds).unwrap().lines().map(str::to_owned).collect();
    let mut seen = [0, 0];
    for text in texts.iter().chain(&benign) {
        let (fired, guarded) = logits(&[&both], text);
        assert_eq!(fired, guarded != logits(&[], text).1, "{text}");
        seen[usize::from(fired)] += 1;
    }
    assert!(seen[0] > 0 && seen[1] > 0, "both kinds: {seen:?}");

    let other = prompts.at("other.gguf");
    TinyModel::new(Architecture::Gemma3).write(Path::new(&other));
    let vectors = prompts.at("other.safetensors");
    prompts.extract(&other, "other.safetensors", &["--name", "other"]);
    let output = prompts.at("mixed");
    let onto = prompts.at("gate");
    let mixed = ["guard", "build", "--name", "mixed", "--model", &other, "--vectors", &vectors, "--layer", "1"];
    let ran = pilotfish(&[&mixed[..], &["--onto", &onto, "--intervene", "add", "-o", &output]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("expected a guard for the model"), "{ran:?}");

    // Another source: the guard says of one that all its vectors were learnt there.
    let mapping = prompts.at("other.map.safetensors");
    let models = ["map", "--source", &other, "--target", &target, "--layers", "1:1"];
    done(&[&models[..], &["--corpus", &birds, "--corpus", &sharks, "-o", &mapping]].concat());
    let (ran, _) = build("mixed", "other.safetensors", &mapping, &[&steer[..], &["--baked"]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("expected vectors learnt on"), "{ran:?}");
}

/// A tiny model says bytes, and never that it will not.
#[test]
fn a_share_of_refusals_that_no_strength_reaches_leaves_the_guard_as_it_is() {
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "2"]);
    let (positive, negative) = (fixture.positive.to_str().unwrap(), fixture.negative.to_str().unwrap());
    let calibrate = |guard: &str, more: &[&str]| {
        let plain = ["calibrate", "--model", fixture.model(), "--guard", guard, "--benign", negative];
        pilotfish(&[&plain[..], more].concat())
    };
    let before = std::fs::read_to_string(fixture.manifest()).unwrap();
    let asked = ["--positive", positive, "--limit", "3", "--max-tokens", "4", "--refusals"];
    let ran = calibrate(fixture.guard(), &[&asked[..], &["0.5", "--false-positive-rate", "0.2"]].concat());
    assert_eq!(ran.code, 2, "{ran:?}");
    for says in ["has 50 % of the harmful prompts refused", "the most is 0 of 3, 0 % at 0 times", "--strengths"] {
        assert!(ran.stderr.contains(says), "{says}: {}", ran.stderr);
    }
    // What was tried is told: the coarse factors, since the target is crossed nowhere.
    let tried: Vec<_> = ran.stdout.lines().filter(|line| line.contains("0 of 3, 0 %")).collect();
    assert!(tried.len() == 9 && tried[0].contains("0.0000") && tried[8].starts_with("│ 2 "), "{}", ran.stdout);
    assert_eq!(std::fs::read_to_string(fixture.manifest()).unwrap(), before);

    for (more, code, says) in [
        (&[&asked[..], &["1.5"]].concat()[..], 2, "a share above 0"),
        (&[&asked[..], &["0.5", "--strengths", "2..1"]].concat(), 64, "no range of factors"),
        (&["--refusals", "0.5"], 64, "--positive"),
        (&["--limit", "3"], 64, "--refusals"),
    ] {
        let ran = calibrate(fixture.guard(), more);
        assert!(ran.code == code && ran.stderr.contains(says), "{says}: {ran:?}");
    }
    let table = pilotfish(&["calibrate", "--guard", fixture.guard(), "--use", "0.05", "--refusals", "0.5"]);
    assert!(table.code == 64 && table.stderr.contains("cannot be used with"), "{table:?}");
    let reads = Fixture::new(&[]);
    let ran = calibrate(reads.guard(), &[&asked[..], &["0.5"]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("no intervention"), "{ran:?}");
    fixture.edit_manifest("strength = 2.0", "strength = 0.0");
    let ran = calibrate(fixture.guard(), &[&asked[..], &["0.5"]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("of a strength other than 0"), "{ran:?}");
}
