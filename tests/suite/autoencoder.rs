//! What is learnt of two tiny models: autoencoders by the command, and what becomes of a model whose residual is replaced.

use crate::support::{Fixture, done, pilotfish};
use crate::tiny_model::{Architecture, TinyModel};
use pilotfish::Guard;
use pilotfish::engine::{ActivationReader, Model, ModelOptions, ReplacedReader};
use pilotfish::guard::{MappingFile, VectorFile};
use pilotfish::tensor::{LayerIndex, TokenPosition};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const TEXT: &str = "the shark swims to the sea and eats pilot fish";

fn tiny(architecture: Architecture) -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    TinyModel::new(architecture).write(&path);
    let model = Model::load(&path, "tiny", &ModelOptions::default()).unwrap();
    (folder, model)
}

#[test]
fn a_row_replaced_by_itself_changes_nothing_and_by_another_all_that_follows() {
    for architecture in [Architecture::Llama, Architecture::Gemma3] {
        let (_folder, model) = tiny(architecture);
        let tokens = model.prompt_tokens(TEXT).unwrap();
        let layers: Vec<LayerIndex> = (0..model.shape().n_layer - 1).map(LayerIndex).collect();
        let mut reader = ActivationReader::of(&model, layers.clone(), tokens.len()).unwrap();
        let rows = reader.every_token(&tokens).unwrap();
        let mut replacing = ReplacedReader::of(&model, tokens.len()).unwrap();
        let mut logits = |replaced: Option<(LayerIndex, &[TokenPosition], pilotfish::tensor::Residual<'_>)>| {
            let mut all = Vec::new();
            replacing.logits(&tokens, replaced, |_, logits| all.push(logits.to_vec())).unwrap();
            all
        };
        let own = logits(None);
        assert_eq!(own.len(), tokens.len());
        let (at, other) = (tokens.len() / 2, 1);
        for layer in layers {
            let all: Vec<_> = rows.positions().to_vec();
            assert_eq!(
                logits(Some((layer, &all, rows.layer(layer)))),
                own,
                "{architecture:?}, layer {layer}: by itself"
            );
            // Rows start at the second token.
            let stranger = rows.select(std::iter::once(other - 1));
            let changed = logits(Some((layer, &[TokenPosition(at as i32)], stranger.layer(layer))));
            assert_eq!(changed[..at], own[..at], "{architecture:?}, layer {layer}: what came before");
            assert_ne!(changed[at], own[at], "{architecture:?}, layer {layer}: its own token");
            assert!(changed[at + 1..] != own[at + 1..], "{architecture:?}, layer {layer}: what attends to it");
        }
        assert_eq!(logits(None), own, "{architecture:?}: a replacement ends with its decode");
    }
}

#[test]
fn what_can_not_be_replaced_is_an_error() {
    let (_folder, model) = tiny(Architecture::Llama);
    let tokens = model.prompt_tokens(TEXT).unwrap();
    let mut replacing = ReplacedReader::of(&model, tokens.len()).unwrap();
    let mut problem = |layer, positions: &[TokenPosition], width: usize| {
        let values = vec![0.5; positions.len() * width];
        let rows = pilotfish::tensor::Residual::new(&values, width).unwrap();
        replacing.logits(&tokens, Some((LayerIndex(layer), positions, rows)), |_, _| ()).unwrap_err().to_string()
    };
    let width = model.shape().n_embd.0;
    let narrow = problem(1, &[TokenPosition(2)], width - 1);
    assert!(narrow.contains(&format!("its rows have {width} values, those to replace them {}", width - 1)), "{narrow}");
    let nowhere = problem(77, &[TokenPosition(2)], width);
    assert!(nowhere.contains("no layer 77"), "{nowhere}");
    let outside = problem(1, &[TokenPosition(tokens.len() as i32)], width);
    assert!(outside.contains(&format!("has {} tokens", tokens.len())), "{outside}");
}

/// Two tiny models, texts for both, and the vector of the small one.
struct Pair {
    fixture: Fixture,
}

impl Pair {
    fn new() -> Self {
        let pair = Self { fixture: Fixture::new(&[]) };
        let mut large = TinyModel::new(Architecture::Gemma3);
        large.n_embd = 96;
        large.write(pair.at("large.gguf").as_ref());
        let corpus: String =
            (0..60).map(|n| format!("the shark {n} swims to the sea and eats {} pilot fish\n", n * 7)).collect();
        std::fs::write(pair.at("corpus.txt"), corpus).unwrap();
        pair
    }

    fn at(&self, name: &str) -> String {
        self.fixture.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn map(&self, output: &str, more: &[&str]) -> Vec<String> {
        let (large, corpus, output) = (self.at("large.gguf"), self.at("corpus.txt"), self.at(output));
        let models = ["map", "--source", self.fixture.model(), "--target", &large, "--corpus", &corpus];
        let all = [&models[..], &["--layers", "1:2", "--kind", "autoencoder", "-o", &output], more].concat();
        all.into_iter().map(str::to_owned).collect()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.at(name)).unwrap()
    }
}

const MAPPING: &str = "m.map.safetensors";

#[test]
fn an_autoencoder_is_trained_and_a_guard_carries_a_vector_by_it() {
    let pair = Pair::new();
    let table = done(&pair.map(MAPPING, &["--epochs", "30", "--learning-rate", "0.003", "--replacement", "5"]));
    assert!(table.contains("autoencoder") && table.contains("documents set aside"), "{table}");
    let file = MappingFile::from_bytes("m", &pair.read(MAPPING)).unwrap();
    let (map, quality) = &file.autoencoders[0];
    assert!(quality.fraction_unexplained < 0.9, "{quality:?}");
    let replaced = file.replacements[&(LayerIndex(1).into(), LayerIndex(2))];
    assert!(replaced.kl < replaced.kl_mean_ablation && replaced.replaced > 0.5, "{replaced:?}");
    assert_eq!(replaced.n_documents, 5);
    assert!(!Path::new(&pair.at("m.1-2.checkpoint.safetensors")).exists(), "nothing is left of the training");

    let (large, vectors, mapping, guard) =
        (pair.at("large.gguf"), pair.at("vectors.safetensors"), pair.at(MAPPING), pair.at("mapped"));
    let build = ["guard", "build", "--name", "mapped", "--model", &large, "--vectors", &vectors, "--layer", "1:2"];
    done(&[&build[..], &["--mapping", &mapping, "--gate", "sharks", "--intervene", "add", "-o", &guard]].concat());
    let negative = pair.fixture.negative.to_str().unwrap();
    done(&["calibrate", "--model", &large, "--guard", &guard, "--benign", negative]);
    done(&["guard", "verify", &guard, "--model", &large]);

    // By hand, from the files alone.
    let source = VectorFile::from_bytes("v", &std::fs::read(&vectors).unwrap()).unwrap();
    let means = source.vectors[0].class_means.as_ref().unwrap();
    let mapped = |mean: &[f32]| map.apply(&mean.iter().map(|value| f64::from(*value)).collect::<Vec<_>>());
    let expected: Vec<f32> =
        mapped(&means.positive).iter().zip(mapped(&means.negative)).map(|(p, n)| (p - n) as f32).collect();
    let built = Guard::load(guard.as_ref()).unwrap();
    assert_eq!(built.vectors()[0].direction, expected);
    assert_eq!(built.vectors()[0].layer, LayerIndex(2));
    assert_eq!(done(&["guard", "inspect", &guard]).matches("unexplained").count(), 1);
}

#[test]
fn a_training_that_is_killed_goes_on_to_the_same_file() {
    let pair = Pair::new();
    let long = ["--epochs", "50", "--patience", "50"];
    done(&pair.map("whole.map.safetensors", &long));

    let mut child = Command::new(env!("CARGO_BIN_EXE_pilotfish"))
        .args(pair.map("cut.map.safetensors", &long))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let checkpoint = pair.at("cut.1-2.checkpoint.safetensors");
    let start = Instant::now();
    while !Path::new(&checkpoint).exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint was written");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!Path::new(&pair.at("cut.map.safetensors")).exists(), "it was killed too late to tell");

    let other =
        pilotfish(&pair.map("cut.map.safetensors", &[&long[..], &["--resume", "--learning-rate", "0.5"]].concat()));
    assert!(other.code == 2 && other.stderr.contains("its options differ"), "{other:?}");
    let resumed = pilotfish(&pair.map("cut.map.safetensors", &[&long[..], &["--resume"]].concat()));
    assert_eq!(resumed.code, 0, "{resumed:?}");
    assert!(!resumed.stderr.contains("epoch 1:"), "it began anew: {}", resumed.stderr);
    assert!(pair.read("cut.map.safetensors") == pair.read("whole.map.safetensors"), "another map");
}

#[test]
fn what_an_autoencoder_can_not_do_is_said() {
    let pair = Pair::new();
    let mut auto = pair.map(MAPPING, &[]);
    let layers = auto.iter().position(|argument| argument == "1:2").unwrap();
    auto[layers] = "auto".to_owned();
    let ran = pilotfish(&auto);
    assert!(ran.code == 2 && ran.stderr.contains("`--layers S:T`"), "{ran:?}");
    let ran = pilotfish(&pair.map(MAPPING, &["--learning-rate", "1e30"]));
    assert!(ran.code == 2 && ran.stderr.contains("the training has diverged"), "{ran:?}");
    let ran = pilotfish(&pair.map(MAPPING, &["--replacement", "60"]));
    assert!(ran.code == 2 && ran.stderr.contains("the corpus has 60 documents"), "{ran:?}");
    std::fs::write(pair.at("m.1-2.checkpoint.safetensors"), "no checkpoint").unwrap();
    let ran = pilotfish(&pair.map(MAPPING, &["--resume"]));
    assert!(ran.code == 2 && ran.stderr.contains("not a checkpoint"), "{ran:?}");
}
