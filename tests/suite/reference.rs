//! The numbers beside those of an independent program: `tests/reference/reference.py`, which has numpy alone.

use pilotfish::mapping::{Autoencoder, AutoencoderWeights, Regression, RidgeOptions, Standardization};
use pilotfish::steering::{
    ContrastSet, difference_of_means, linear_discriminant, logistic_regression, principal_difference,
};
use pilotfish::tensor::{LayerIndex, Residual};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const TOLERANCE: f64 = 1e-4;
const SHRINKAGE: f64 = 0.3;
const PENALTY: f64 = 0.05;

/// What Rust makes of each question, by the reference's name for it.
type Answers = BTreeMap<String, Vec<f64>>;

#[test]
fn numbers_agree_with_the_python_reference() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut answers = Answers::new();
    // More rows than dimensions, and fewer; one set, and two of unlike size and weight.
    let contrasts: Vec<Value> = [
        ("one", 9, vec![(40, 40, 1.0)]),
        ("wide", 50, vec![(12, 12, 1.0)]),
        ("two", 7, vec![(30, 30, 1.0), (8, 8, 2.5)]),
        ("unpaired", 6, vec![(25, 60, 1.0)]),
    ]
    .into_iter()
    .map(|(name, width, sizes)| contrast(&mut rng, name, width, &sizes, &mut answers))
    .collect();
    let question = json!({
        "contrasts": contrasts,
        "ridge": ridge(&mut rng, &mut answers),
        "autoencoder": autoencoder(&mut rng, &mut answers),
    });
    let Some(reference) = ask_python(&question) else { return };
    assert_eq!(reference.keys().collect::<Vec<_>>(), answers.keys().collect::<Vec<_>>());
    for (name, expected) in &reference {
        let found = &answers[name];
        assert_eq!(found.len(), expected.len(), "{name}");
        let differences = found.iter().zip(expected).map(|(found, expected)| (found - expected).powi(2));
        let (error, norm) = (differences.sum::<f64>().sqrt(), expected.iter().map(|x| x * x).sum::<f64>().sqrt());
        assert!(norm > 0.0 && error <= TOLERANCE * norm, "{name}: {error:.3e} of {norm:.3e}");
    }
}

/// Rows around a common mean, dimensions of unlike size, shifted by `shift` along some of them.
fn noise(rng: &mut ChaCha8Rng, n: usize, width: usize, shift: f32) -> Vec<f32> {
    (0..n * width)
        .map(|index| {
            let dimension = (index % width) as f32;
            (1.0 + dimension) * (rng.random::<f32>() + 0.3) + shift * (dimension % 3.0)
        })
        .collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

fn contrast(
    rng: &mut ChaCha8Rng,
    name: &str,
    width: usize,
    sizes: &[(usize, usize, f64)],
    answers: &mut Answers,
) -> Value {
    let classes: Vec<_> =
        sizes.iter().map(|(p, n, weight)| (noise(rng, *p, width, 0.4), noise(rng, *n, width, 0.0), *weight)).collect();
    let rows = |values| Residual::new(values, width).unwrap();
    let sets: Vec<_> = classes
        .iter()
        .map(|(p, n, weight)| ContrastSet { positive: rows(p), negative: rows(n), weight: *weight })
        .collect();
    let mut found = vec![
        ("mean", difference_of_means(&sets)),
        ("lda", linear_discriminant(&sets, SHRINKAGE)),
        ("logistic", logistic_regression(&sets, PENALTY)),
    ];
    if sizes.iter().all(|(p, n, _)| p == n) {
        found.push(("pca", principal_difference(&sets)));
    }
    for (method, extracted) in found {
        answers.insert(format!("{name} {method}"), wide(&extracted.unwrap().values));
    }
    let sets: Vec<_> =
        classes.iter().map(|(p, n, weight)| json!({ "positive": p, "negative": n, "weight": weight })).collect();
    json!({ "name": name, "width": width, "sets": sets, "shrinkage": SHRINKAGE, "penalty": PENALTY })
}

fn ridge(rng: &mut ChaCha8Rng, answers: &mut Answers) -> Value {
    const N: usize = 120;
    const WIDTHS: (usize, usize) = (8, 11);
    let source = noise(rng, N, WIDTHS.0, 0.0);
    let own = noise(rng, N, WIDTHS.1, 0.0);
    // What can be told from the source, and noise.
    let target: Vec<f32> = own
        .iter()
        .enumerate()
        .map(|(index, noise)| {
            let row = &source[index / WIDTHS.1 * WIDTHS.0..][..WIDTHS.0];
            row[index % WIDTHS.0] - 0.5 * row[(index + 3) % WIDTHS.0] + 0.2 * noise
        })
        .collect();
    let direction: Vec<f32> = (0..WIDTHS.0).map(|_| rng.random::<f32>() - 0.5).collect();

    let documents: Vec<u32> = (0..N as u32).map(|row| row / 10).collect();
    let options = RidgeOptions { lambdas: vec![PENALTY], ..Default::default() };
    let regression = Regression::new(&documents, &options).unwrap();
    let side = |values, width, name| regression.side(Residual::new(values, width).unwrap(), name, 1).unwrap();
    let (from, to) = (side(&source, WIDTHS.0, "source"), side(&target, WIDTHS.1, "target"));
    let (map, _) = regression.pair(&from, &to, 1).fit(LayerIndex(0), LayerIndex(0)).unwrap();
    answers.insert("ridge".into(), wide(map.weight()));
    answers.insert("ridge direction".into(), wide(&map.apply_direction(&direction)));
    json!({
        "source": source, "target": target, "source_width": WIDTHS.0, "target_width": WIDTHS.1,
        "penalty": PENALTY, "direction": direction,
    })
}

fn autoencoder(rng: &mut ChaCha8Rng, answers: &mut Answers) -> Value {
    const WIDTHS: (usize, usize, usize) = (6, 10, 9);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random::<f32>() - 0.5).collect() };
    let scale = |values: Vec<f32>| values.iter().map(|value| value + 1.0).collect::<Vec<f32>>();
    let source = Standardization { mean: random(WIDTHS.0), scale: scale(random(WIDTHS.0)) };
    let target = Standardization { mean: random(WIDTHS.2), scale: scale(random(WIDTHS.2)) };
    let weights = AutoencoderWeights {
        encoder: random(WIDTHS.0 * WIDTHS.1),
        encoder_bias: random(WIDTHS.1),
        decoder: random(WIDTHS.1 * WIDTHS.2),
        decoder_bias: random(WIDTHS.2),
    };
    let rows = random(20 * WIDTHS.0);
    let question = json!({
        "rows": rows,
        "weights": {
            "source_mean": source.mean, "source_scale": source.scale, "target_mean": target.mean,
            "target_scale": target.scale, "encoder": weights.encoder, "encoder_bias": weights.encoder_bias,
            "decoder": weights.decoder, "decoder_bias": weights.decoder_bias,
        },
    });
    let map = Autoencoder::new(LayerIndex(0), LayerIndex(0), source, target, weights).unwrap();
    answers.insert("autoencoder".into(), rows.chunks_exact(WIDTHS.0).flat_map(|row| map.apply(&wide(row))).collect());
    question
}

/// What the reference answers; `None`, and a word of it, where there is no Python with numpy. With `PILOTFISH_REAL_MODELS=require`, as `make test`
/// sets it, there must be.
fn ask_python(question: &Value) -> Option<Answers> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var("PILOTFISH_PYTHON").ok().filter(|python| !python.is_empty());
    let python = python.unwrap_or_else(|| "python3".into());
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&python);
        // Where `make` puts numpy; one of the user's own does as well.
        command.args(arguments).env("PYTHONPATH", root.join("target/tools/reference"));
        command
    };
    let numpy = run(&["-c", "import numpy"]).output();
    if !numpy.as_ref().is_ok_and(|output| output.status.success()) {
        let required = std::env::var("PILOTFISH_REAL_MODELS").is_ok_and(|value| value == "require");
        assert!(!required, "`{python}` has no numpy: run `make reference` ({numpy:?})");
        eprintln!("skipped: `{python}` has no numpy; `make reference` gets it");
        return None;
    }
    let script = root.join("tests/reference/reference.py");
    let mut child = run(&[script.to_str().unwrap()]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(question.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the reference failed: {}", output.status);
    Some(serde_json::from_slice(&output.stdout).unwrap())
}
