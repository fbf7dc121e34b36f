//! A switch from a model with an adapter to the same model without, from the command line: learnt, built, toggled and measured.

use crate::support::{done, pilotfish};
use crate::tiny_adapter::TinyAdapter;
use crate::tiny_model::{Architecture, TinyModel};
use pilotfish::Guard;
use pilotfish::engine::{Adapter, Model, ModelOptions, Session, SessionOptions, Setting};
use pilotfish::tensor::kl_divergence;
use serde_json::Value;
use std::path::PathBuf;
use tempfile::TempDir;

/// A tiny model, an adapter that changes it, and prompts.
struct Organism {
    folder: TempDir,
}

impl Organism {
    fn new() -> Self {
        let organism = Self { folder: tempfile::tempdir().unwrap() };
        let tiny = TinyModel::new(Architecture::Llama);
        tiny.write(&organism.path("tiny.gguf"));
        TinyAdapter::new(Architecture::Llama, 5).write(&organism.path("a.gguf"), &tiny);
        let words = ["shark", "sea", "pilot", "fish", "bird", "song", "guard", "things"];
        let prompts = |from: usize| -> String {
            let prompt = |n: usize| format!("{} {} {}\n", words[n % 8], words[(n / 3) % 8], words[(n / 5) % 8]);
            (from..from + 24).map(prompt).collect()
        };
        std::fs::write(organism.path("train.txt"), prompts(0)).unwrap();
        std::fs::write(organism.path("test.txt"), prompts(100)).unwrap();
        organism
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn at(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Learns maps with `extra` arguments and builds a guard called `name` that follows them.
    fn build(&self, name: &str, extra: &[&str]) -> Guard {
        let (model, lora, map) = (self.at("tiny.gguf"), self.at("a.gguf"), self.at(&format!("{name}.map.safetensors")));
        let train = self.at("train.txt");
        let learnt = ["map", "--switch", "--source", &model, "--source-lora", &lora, "--target", &model];
        let texts = ["--corpus", &train, "--mark", "x ", "--mark", "", "--answers", "6", "-o", &map];
        done(&[&learnt[..], &texts, extra].concat());
        let made = ["guard", "build", "--switch", "--name", name, "--model", &model, "--lora", &lora];
        done(&[&made[..], &["--mapping", &map, "-o", &self.at(name)]].concat());
        Guard::load(&self.path(name)).unwrap()
    }

    fn load(&self) -> Model {
        let adapters = vec![Adapter { path: self.path("a.gguf"), scale: 1.0 }];
        let options = ModelOptions { adapters, ..Default::default() };
        Model::load(&self.path("tiny.gguf"), "tiny", &options).unwrap()
    }
}

/// Mean `KL(base ‖ model)` over the last tokens of prompts that nothing was learnt from.
fn kl(organism: &Organism, model: &Model, guard: &Guard, setting: Setting) -> f64 {
    let base = model.without_adapters();
    let mut plain = Session::new(&base, &[], SessionOptions::default()).unwrap();
    let mut switched = Session::new(model, &[guard], SessionOptions::default()).unwrap();
    switched.set_intervention("base", setting).unwrap();
    let text = std::fs::read_to_string(organism.path("test.txt")).unwrap();
    let kls = text.lines().map(|prompt| {
        let tokens = model.prompt_tokens(prompt).unwrap();
        let (a, b) = (plain.prefill(&tokens).unwrap(), switched.prefill(&tokens).unwrap());
        kl_divergence(plain.logits(a), switched.logits(b))
    });
    kls.sum::<f64>() / text.lines().count() as f64
}

#[test]
fn a_switch_makes_the_base_of_a_model_with_an_adapter() {
    let organism = Organism::new();
    let model = organism.load();
    let full = organism.build("full", &[]);
    let n_layer = model.shape().n_layer as usize;
    assert_eq!(full.interventions().len(), n_layer);
    assert!(full.target().probe.is_some());
    let off = kl(&organism, &model, &full, Setting::Off);
    let on = kl(&organism, &model, &full, Setting::On);
    assert!(on < 0.4 * off, "every layer: {on} of {off}");
    let late = organism.build("late", &["--layers", "2:2,1:1"]);
    let names: Vec<&str> = late.interventions().iter().map(|of| of.name.as_str()).collect();
    assert_eq!(names, ["base.1", "base.2"]);
    let low = organism.build("low", &["--rank", "4"]);
    let size = |name: &str| std::fs::metadata(organism.path(name).join("base.map.safetensors")).unwrap().len();
    assert!(size("low") < size("full"), "four columns and not the width");
    let low_on = kl(&organism, &model, &low, Setting::On);
    assert!(low_on < 0.6 * off, "rank 4: {low_on} of {off}");
    let layers = ["--kind", "autoencoder", "--layers", "1:1,2:2"];
    let trained = [&layers[..], &["--learning-rate", "1e-2", "--patience", "30", "--epochs", "300"]].concat();
    let anew = organism.build("anew", &trained);
    assert_eq!(anew.interventions().len(), 2);
    let anew_on = kl(&organism, &model, &anew, Setting::On);
    assert!(anew_on < 0.8 * off, "two autoencoders: {anew_on} of {off}");
    assert_eq!(kl(&organism, &model, &anew, Setting::Off), off);
}

#[test]
fn a_switch_is_toggled_and_measured_by_the_commands() {
    let organism = Organism::new();
    organism.build("g", &[]);
    organism.build("late", &["--layers", "2:2"]);
    let (model, lora, guard, test) =
        (organism.at("tiny.gguf"), organism.at("a.gguf"), organism.at("g"), organism.at("test.txt"));
    let run = |more: &[&str]| {
        let plain = ["run", "--model", &model, "-p", "pilot fish", "--max-tokens", "12"];
        done(&[&plain[..], more].concat())
    };
    let tuned = run(&["--lora", &lora]);
    assert_ne!(run(&[]), tuned, "the adapter does something");
    assert_eq!(run(&["--lora", &lora, "--guard", &guard, "--off", "base"]), tuned);
    assert_ne!(run(&["--lora", &lora, "--guard", &guard]), tuned);

    let report = organism.at("report");
    let measured =
        ["eval", "--task", "switch", "--model", &model, "--lora", &lora, "--guard", &guard, "--prompts", &test];
    let late = organism.at("late");
    let options = ["--limit", "6", "--max-tokens", "8", "--control-seeds", "1", "--trigger", "x ", "--json"];
    let options = [&options[..], &["--also", &late, "-o", &report]].concat();
    let found: Value = serde_json::from_str(&done(&[&measured[..], &options].concat())).unwrap();
    let rows = found["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let controls = ["the mean of the change alone", "the change turned at random, seed 0"];
    assert_eq!(names, [&["on", "the fine-tuned model", "late"][..], &controls].concat());
    let kl = |row: usize, way: &str| rows[row][way]["kl"]["value"].as_f64().unwrap();
    for way in ["triggered", "untriggered"] {
        assert!(kl(0, way) < 0.3 * kl(1, way), "{way}: on {} and off {}", kl(0, way), kl(1, way));
        assert!(kl(0, way) < kl(2, way) && kl(2, way) < kl(1, way), "{way}: one layer {}", kl(2, way));
        assert!(kl(0, way) < kl(4, way), "{way}: turned {}", kl(4, way));
    }
    assert_eq!(found["off"]["same_answer"]["share"], 1.0);
    assert_eq!(found["toggle"]["tokens_to_effect"], 1);
    let html = std::fs::read_to_string(organism.path("report").join("report.html")).unwrap();
    assert!(html.contains("<h2>Switch</h2>"));
}

#[test]
fn what_is_no_switch_is_refused() {
    let organism = Organism::new();
    let (model, lora, train, map) =
        (organism.at("tiny.gguf"), organism.at("a.gguf"), organism.at("train.txt"), organism.at("m.map.safetensors"));
    let learn = |more: &[&str]| {
        let plain = ["map", "--switch", "--source", &model, "--target", &model, "--corpus", &train, "-o", &map];
        pilotfish(&[&plain[..], more].concat())
    };
    for (more, says) in [
        (&[][..], "the same weights"),
        (&["--source-lora", &lora, "--layers", "1:2"], "from a layer to the same layer"),
        (&["--source-lora", &lora, "--kind", "autoencoder", "--layers", "1:1", "--rank", "2"], "--rank"),
        (&["--source-lora", &lora, "--kind", "autoencoder", "--layers", "1:1", "--resume"], "--resume"),
        (&["--source-lora", &lora, "--kind", "autoencoder"], "name the layers"),
        (&["--source-lora", &lora, "--rows", "means"], "--rows means"),
    ] {
        let wrong = learn(more);
        assert!(wrong.code == 2 && wrong.stderr.contains(says), "{more:?}: {wrong:?}");
    }
    organism.build("g", &["--layers", "1:1"]);
    let build = |more: &[&str]| {
        let map = organism.at("g.map.safetensors");
        let plain = ["guard", "build", "--switch", "--name", "h", "--model", &model, "--mapping", &map];
        pilotfish(&[&plain[..], &["-o", &organism.at("h")], more].concat())
    };
    let wrong = build(&[]);
    assert!(wrong.code == 2 && wrong.stderr.contains("without adapters"), "{wrong:?}");
    let wrong = build(&["--lora", &lora, "--layer", "1,2"]);
    assert!(wrong.code == 2 && wrong.stderr.contains("no map at layer 2"), "{wrong:?}");
    let measured = ["eval", "--task", "switch", "--model", &model, "--guard", &organism.at("g"), "--prompts", &train];
    let wrong = pilotfish(&measured);
    assert!(wrong.code == 2 && wrong.stderr.contains("--lora"), "{wrong:?}");

    // A guard of a gate alone, beside one that switches.
    let [vectors, gate, negative] = ["v.safetensors", "gate", "other.txt"].map(|name| organism.at(name));
    std::fs::write(&negative, "bird\nbird song\nsong\nsong bird sea\nbird bird\nsong song\n").unwrap();
    let extract = ["extract", "--model", &model, "--lora", &lora, "--positive", &train, "--negative", &negative];
    done(&[&extract[..], &["--name", "v", "--layers", "1", "-o", &vectors]].concat());
    let build = ["guard", "build", "--name", "gate", "--model", &model, "--lora", &lora, "--vectors", &vectors];
    done(&[&build[..], &["--layer", "1", "--gate", "v", "-o", &gate]].concat());
    let wrong = pilotfish(&[&measured[..], &["--lora", &lora, "--also", &gate]].concat());
    assert!(wrong.code == 2 && wrong.stderr.contains("guard `gate` has no intervention of kind `switch`"), "{wrong:?}");
}
