//! The command as its users meet it: what it prints where, how it ends, and what it says of input that is wrong.

use crate::raw_llama::{self, ControlVector};
use crate::support::{Fixture, LAYER, done, pilotfish};
use crate::tiny_model::{Architecture, TinyModel};
use pilotfish::Guard;
use pilotfish::engine::{Model, ModelOptions, Session, SessionOptions};
use pilotfish::guard::{Aggregate, GateScope, MappingFile, Readout, VectorFile};
use pilotfish::learn::Survey;
use pilotfish::steering::VectorKind;
use serde_json::Value;
use std::path::Path;

/// What is done to a good guard, and what the error must say.
type Spoil = (&'static str, fn(&Fixture), &'static [&'static str]);

/// Every way in which a guard may be wrong that a user is likely to meet.
const SPOILED: &[Spoil] = &[
    (
        "the tensor file is cut short",
        |f| f.edit_tensors(false, |b| b.truncate(b.len() - 10)),
        &["tensors.safetensors", "sha256"],
    ),
    (
        "the tensor file is cut short and signed",
        |f| f.edit_tensors(true, |b| b.truncate(b.len() - 10)),
        &["tensors.safetensors"],
    ),
    (
        "one byte has changed",
        |f| f.edit_tensors(false, |b| *b.last_mut().unwrap() ^= 1),
        &["tensors.safetensors", "sha256"],
    ),
    (
        "a value is not a number",
        |f| {
            f.edit_tensors(true, |b| {
                let n = b.len();
                b[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes())
            })
        },
        &["shark.1", "NaN"],
    ),
    ("the layer does not exist", |f| f.edit_manifest("layer = 1", "layer = 99"), &["layer 99"]),
    (
        "a key is unknown",
        |f| f.edit_manifest("[target]\n", "[target]\nquantisation = \"Q4\"\n"),
        &["guard.toml", "quantisation"],
    ),
    (
        "a gate is not calibrated",
        |f| {
            // The gate's own, which comes before those of single quantizations.
            let text = std::fs::read_to_string(f.manifest()).unwrap();
            std::fs::write(f.manifest(), text.replacen("deviation = ", "# deviation = ", 1)).unwrap();
        },
        &["deviation", "calibrate"],
    ),
    ("it is no TOML", |f| f.edit_manifest("[target]", "[target"), &["guard.toml:6", "unclosed"]),
    ("the format is another", |f| f.edit_manifest("format = 1", "format = 2"), &["format"]),
    ("the manifest is not there", |f| std::fs::remove_file(f.manifest()).unwrap(), &["guard.toml"]),
    ("the tensors are not there", |f| std::fs::remove_file(f.tensors()).unwrap(), &["tensors.safetensors"]),
    (
        "it is for another model",
        |f| {
            let mut other = TinyModel::new(Architecture::Llama);
            other.n_layer += 1;
            other.write(&f.model)
        },
        &["another model"],
    ),
    (
        "it is for other weights of the same shape",
        |f| {
            let mut other = TinyModel::new(Architecture::Llama);
            other.seed += 1;
            other.write(&f.model)
        },
        &["probe"],
    ),
];

#[test]
fn a_guard_that_is_wrong_is_one_line_of_error_and_nothing_generated() {
    for (what, spoil, says) in SPOILED {
        let fixture = Fixture::new(&["--intervene", "add"]);
        spoil(&fixture);
        assert_refused(what, &fixture, says);
    }
}

#[test]
fn a_model_without_the_residual_that_a_guard_needs_is_refused() {
    let fixture = Fixture::new(&["--intervene", "add"]);
    let good = Model::load(&fixture.model, "tiny", &ModelOptions::default()).unwrap();
    let other = fixture.folder.path().join("no-residual.gguf");
    TinyModel::without_residual_names().write(&other);
    let bad = Model::load(&other, "other", &ModelOptions::default()).unwrap();
    fixture.edit_manifest(&good.identity().architecture, &bad.identity().architecture);
    fixture.edit_manifest(&good.identity().fingerprint.to_string(), &bad.identity().fingerprint.to_string());
    std::fs::copy(&other, &fixture.model).unwrap();
    assert_refused("no such hook point", &fixture, &[&format!("layer {LAYER}"), "did not fire"]);
}

fn assert_refused(what: &str, fixture: &Fixture, says: &[&str]) {
    let ran =
        pilotfish(&["run", "--model", fixture.model(), "--guard", fixture.guard(), "-p", "shark", "--max-tokens", "4"]);
    assert_eq!(ran.code, 2, "{what}: {ran:?}");
    assert_eq!(ran.stdout, "", "{what}");
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.lines().count() == 1, "{what}: {}", ran.stderr);
    for word in says {
        assert!(ran.stderr.contains(word), "{what}: `{word}` is not in: {}", ran.stderr);
    }
}

/// What a record has for an answer is read as it stands, after the prompt in its template.
#[test]
fn tokens_are_those_that_the_model_reads() {
    let fixture = Fixture::new(&[]);
    let prompts = fixture.folder.path().join("answered.jsonl");
    std::fs::write(&prompts, "{\"prompt\": \"red fish\", \"answer\": \" blue\"}\n{\"prompt\": \"shark\"}\n").unwrap();
    let prompts = prompts.to_str().unwrap();
    let lines = json_lines(&done(&["tokens", "--model", fixture.model(), "--prompts", prompts, "--json"]));
    let model = Model::load(&fixture.model, "tiny", &ModelOptions::default()).unwrap();
    for (line, prompt) in lines.iter().zip(["red fish", "shark"]) {
        let read: Vec<i32> = model.prompt_tokens(prompt).unwrap().iter().map(|token| token.0).collect();
        assert_eq!(line["tokens"], serde_json::json!(read), "{prompt}");
    }
    let answer = model.llama().vocab().tokenize(b" blue", false, false);
    assert_eq!(lines[0]["answer"], serde_json::json!(answer.iter().map(|token| token.0).collect::<Vec<_>>()));
    assert!(lines[1].get("answer").is_none());
    let pieces = done(&["tokens", "--model", fixture.model(), "--prompts", prompts]);
    assert_eq!(pieces.lines().count(), 2);
}

/// A model that is told the beginning of its own answer goes on as it did, and a gate reads what has been said.
#[test]
fn an_answer_goes_on_from_its_beginning() {
    let fixture = Fixture::new(&[]);
    let file = fixture.folder.path().join("begun.jsonl");
    let run = |prompt: &str, prefill: &str, max_tokens: &str| -> String {
        std::fs::write(&file, serde_json::json!({ "prompt": prompt, "prefill": prefill }).to_string()).unwrap();
        let prompts = file.to_str().unwrap();
        let what = ["run", "--model", fixture.model(), "--prompts", prompts, "--max-tokens", max_tokens, "--json"];
        json_lines(&done(&what))[0]["text"].as_str().unwrap().to_owned()
    };
    let model = Model::load(&fixture.model, "tiny", &ModelOptions::default()).unwrap();
    // Random weights say single bytes too, which are no text.
    let words = ["red", "fish", "shark", "sea", "pilot", "bird", "song", "blue", "guard", "things"];
    let prompts = words.iter().flat_map(|a| words.map(|b| format!("{a} {b}")));
    let (prompt, begun) = prompts
        .map(|prompt| (prompt.clone(), run(&prompt, "", "2")))
        .find(|(_, begun)| model.text_tokens(begun).len() == 2 && begun.starts_with(' ') && !begun.contains('\u{fffd}'))
        .expect("some answer begins with two words");
    let whole = run(&prompt, "", "6");
    assert!(whole.len() > begun.len() && whole.starts_with(&begun), "{begun:?} of {whole:?}");
    assert_eq!(begun.clone() + &run(&prompt, &begun, "4"), whole);
    let score = || {
        let prompts = file.to_str().unwrap();
        let lines =
            done(&["score", "--model", fixture.model(), "--guard", fixture.guard(), "--prompts", prompts, "--json"]);
        json_lines(&lines)[0]["gates"]["sharks"]["score"].as_f64().unwrap()
    };
    let with = score();
    run(&prompt, "", "1");
    assert_ne!(with, score());
}

#[test]
fn score_and_run_print_a_line_of_json_a_prompt() {
    let fixture = Fixture::new(&["--intervene", "add", "--positions", "generated"]);
    let prompts = fixture.positive.to_str().unwrap();
    let score =
        done(&["score", "--model", fixture.model(), "--guard", fixture.guard(), "--prompts", prompts, "--json"]);
    let scored = json_lines(&score);
    assert_eq!(scored.len(), 12);
    for (index, line) in scored.iter().enumerate() {
        assert_eq!(line["index"], index);
        assert!(line["gates"]["sharks"]["score"].is_f64() && line["gates"]["sharks"]["fired"].is_boolean(), "{line}");
    }

    let run = [
        "run",
        "--model",
        fixture.model(),
        "--guard",
        fixture.guard(),
        "--prompts",
        prompts,
        "--max-tokens",
        "3",
        "--json",
    ];
    let ran = json_lines(&done(&run));
    assert_eq!(ran.len(), 12);
    for (line, scored) in ran.iter().zip(&scored) {
        assert_eq!(line["gates"], scored["gates"], "one prompt, one score, whatever comes after it");
        assert!(line["finish"] == "length" && line["tokens"] == 3 || line["finish"] == "stop", "{line}");
        assert!(line["text"].is_string() && line["prefill_tok_s"].as_f64().unwrap() > 0.0, "{line}");
    }
    // Greedy: a second run says the same, and so does one that answers several at once, in the same order.
    let told = |lines: &[Value]| {
        let told = |line: &Value| (line["index"].clone(), line["text"].clone(), line["finish"].clone());
        lines.iter().map(told).collect::<Vec<_>>()
    };
    assert_eq!(told(&json_lines(&done(&run))), told(&ran));
    assert_eq!(told(&json_lines(&done(&[&run[..], &["--parallel", "5"]].concat()))), told(&ran));
    let plain = &run[..run.len() - 1];
    assert_eq!(done(&[plain, &["--parallel", "5"]].concat()), done(plain));
    let stopped = json_lines(&done(&[&run[..], &["--stop", "-", "--stop", "/"]].concat()));
    assert!(stopped.iter().all(|line| !line["text"].as_str().unwrap().contains(['-', '/'])), "{stopped:?}");
    assert!(stopped.iter().zip(&ran).any(|(stopped, ran)| stopped["text"] != ran["text"]), "{stopped:?}");
}

/// What is wrong with a prompt is told after the answers before it, however many are answered at once.
#[test]
fn a_prompt_that_is_too_long_takes_no_answer_before_it_along() {
    let fixture = Fixture::new(&["--intervene", "add"]);
    let prompts = fixture.folder.path().join("prompts.txt");
    std::fs::write(&prompts, format!("shark\nthe sea\n{}\nbird\n", "the sea ".repeat(200))).unwrap();
    let run = ["run", "--model", fixture.model(), "--prompts", prompts.to_str().unwrap(), "--max-tokens", "6"];
    let run = |n: &str| pilotfish(&[&run[..], &["--context", "200", "--parallel", n]].concat());
    let alone = run("1");
    assert!(alone.code == 2 && alone.stderr.contains("prompt 2") && !alone.stdout.is_empty(), "{alone:?}");
    for n in ["2", "4"] {
        let found = run(n);
        assert_eq!((found.code, found.stdout, found.stderr), (2, alone.stdout.clone(), alone.stderr.clone()), "{n}");
    }
}

#[test]
fn a_gate_that_blocks_ends_the_answer_before_it_begins_and_exits_1() {
    let fixture = Fixture::new(&["--on-fire", "block", "--message", "No sharks here."]);
    let threshold = |value: &str| {
        let text = std::fs::read_to_string(fixture.manifest()).unwrap();
        let line = text.lines().find(|line| line.starts_with("threshold = ")).unwrap().to_owned();
        fixture.edit_manifest(&line, &format!("threshold = {value}"));
    };
    let run = ["run", "--model", fixture.model(), "--guard", fixture.guard(), "-p", "shark", "--max-tokens", "4"];

    threshold("-1e6");
    let blocked = pilotfish(&run);
    assert_eq!((blocked.code, blocked.stdout.as_str()), (1, ""), "{blocked:?}");
    assert!(blocked.stderr.contains("sharks") && blocked.stderr.contains("No sharks here."), "{}", blocked.stderr);
    let json = pilotfish(&[&run[..], &["--json"]].concat());
    assert_eq!(json.code, 1);
    let line = &json_lines(&json.stdout)[0];
    assert_eq!((&line["finish"], &line["tokens"], &line["text"]), (&"blocked".into(), &0.into(), &"".into()));

    threshold("1e6");
    let passed = pilotfish(&run);
    assert_eq!(passed.code, 0, "{passed:?}");
    let unguarded = pilotfish(&["run", "--model", fixture.model(), "-p", "shark", "--max-tokens", "4"]);
    assert_eq!(passed.stdout, unguarded.stdout, "a gate that does not fire changes nothing");
}

#[test]
fn strength_is_set_from_outside_and_must_name_an_intervention() {
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "40"]);
    // Always, so that the strength shows.
    fixture.edit_manifest("when = \"sharks\"\n", "");
    let run = |more: &[&str]| {
        let plain = ["run", "--model", fixture.model(), "-p", "pilot", "--max-tokens", "8"];
        pilotfish(&[&plain[..], more].concat())
    };
    let guarded = |more: &[&str]| run(&[&["--guard", fixture.guard()], more].concat());
    let unguarded = run(&[]).stdout;
    assert_ne!(guarded(&[]).stdout, unguarded, "forty times the vector changes a tiny model's answer");
    assert_eq!(guarded(&["--strength", "shark=0"]).stdout, unguarded);
    let wrong = guarded(&["--strength", "whale=1"]);
    assert_eq!((wrong.code, wrong.stdout.as_str()), (2, ""));
    assert!(wrong.stderr.contains("whale") && wrong.stderr.contains("shark"), "{}", wrong.stderr);
    let malformed = guarded(&["--strength", "shark"]);
    assert!(malformed.code == 2 && malformed.stderr.contains("NAME=X"), "{malformed:?}");
}

#[test]
fn an_intervention_is_turned_off_and_on_while_an_answer_is_written() {
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "40"]);
    fixture.edit_manifest("when = \"sharks\"\n", "");
    let run = |more: &[&str]| {
        let plain = ["run", "--model", fixture.model(), "-p", "pilot", "--max-tokens", "12", "--json"];
        pilotfish(&[&plain[..], more].concat())
    };
    let text = |more: &[&str]| json_lines(&run(more).stdout)[0]["text"].as_str().unwrap().to_owned();
    let guarded = |more: &[&str]| text(&[&["--guard", fixture.guard()], more].concat());
    let (on, off) = (guarded(&[]), text(&[]));
    assert_ne!(on, off);
    assert_eq!(guarded(&["--off", "shark"]), off);
    assert_eq!(guarded(&["--toggle", "shark@1=off"]), off);
    assert_eq!(guarded(&["--off", "shark", "--toggle", "shark@1=on"]), on);
    assert_eq!(guarded(&["--toggle", "shark@13=off"]), on, "it ends before");
    let late = guarded(&["--off", "shark", "--toggle", "shark@7=40"]);
    assert!(late != on && late != off, "{on:?}, {off:?}, {late:?}");
    assert_eq!(late, guarded(&["--off", "shark", "--toggle", "shark@7=on"]), "on is the guard's strength");
    let common = late.bytes().zip(off.bytes()).take_while(|(a, b)| a == b).count();
    assert!(common > 0, "it begins as with the guard off: {late:?} and {off:?}");
    for (toggle, code, says) in
        [("shark@0=on", 64, "counted from 1"), ("shark=on", 64, "NAME@N"), ("whale@2=on", 2, "`shark`")]
    {
        let wrong = run(&["--guard", fixture.guard(), "--toggle", toggle]);
        assert!(wrong.code == code && wrong.stderr.contains(says), "{toggle}: {wrong:?}");
    }
}

#[test]
fn wrong_usage_exits_64_and_help_0() {
    for arguments in
        [&["run"][..], &["swim"], &["run", "--model", "m", "-p", "a", "--prompts", "b"], &["models", "pull"]]
    {
        let ran = pilotfish(arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (64, ""), "{arguments:?}: {ran:?}");
        assert!(ran.stderr.contains("Usage"), "{}", ran.stderr);
    }
    assert!(done(&["--help"]).contains("Usage"));
    assert!(done(&["--version"]).starts_with("pilotfish "));
}

#[test]
fn a_model_that_is_not_there_is_said_with_the_way_to_get_it() {
    let ran = pilotfish(&["run", "--model", "no-such-model", "-p", "a"]);
    assert!(ran.code == 2 && ran.stderr.contains("pilotfish models list"), "{ran:?}");
    let empty = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_pilotfish"))
        .args(["run", "--model", "gemma-3-270m", "-p", "a"])
        .env("PILOTFISH_MODELS", empty.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("pilotfish models pull gemma-3-270m"));
}

#[test]
fn a_guard_can_be_looked_at_and_verified() {
    let fixture = Fixture::new(&["--intervene", "ablate"]);
    let inspected: Value =
        serde_json::from_str(&done(&["guard", "inspect", fixture.guard(), "--model", fixture.model(), "--json"]))
            .unwrap();
    assert_eq!(inspected["name"], "shark-gate");
    assert_eq!(inspected["executor"], "host");
    assert_eq!(inspected["executors"], serde_json::json!({ LAYER.to_string(): "host" }));
    assert_eq!(inspected["gates"][0]["layer"], LAYER);
    assert_eq!(inspected["interventions"][0]["kind"], "ablate");
    let table = done(&["guard", "inspect", fixture.guard()]);
    assert!(table.contains("sharks") && table.contains("ablate"), "{table}");
    let verified = done(&["guard", "verify", fixture.guard(), "--model", fixture.model()]);
    assert!(verified.contains("every hook point fires"), "{verified}");
    // The recentring that `calibrate` measured is in the manifest.
    let manifest = std::fs::read_to_string(fixture.manifest()).unwrap();
    let ablate = manifest.split("[[intervention]]").nth(1).unwrap();
    assert!(ablate.contains("mean = "), "{manifest}");
}

#[test]
fn a_control_vector_becomes_a_guard_that_adds_it() {
    let fixture = Fixture::new(&[]);
    let mut directions = std::collections::BTreeMap::new();
    const PUSH: f32 = 30.0;
    let n_embd = TinyModel::new(Architecture::Llama).n_embd as usize;
    directions.insert(pilotfish::tensor::LayerIndex(2), vec![PUSH; n_embd]);
    let vector = pilotfish::steering::ControlVector::new("llama".into(), directions).unwrap();
    let (file, guard) = (fixture.folder.path().join("vector.gguf"), fixture.folder.path().join("imported"));
    std::fs::write(&file, vector.to_gguf()).unwrap();
    let (file, guard) = (file.to_str().unwrap(), guard.to_str().unwrap());
    done(&["guard", "import", file, "--name", "imported", "--model", fixture.model(), "-o", guard]);
    // What llama.cpp itself makes of the same directions, to the last bit.
    let model = Model::load(&fixture.model, "tiny", &ModelOptions::default()).unwrap();
    let tokens = model.prompt_tokens("pilot").unwrap();
    let mut session = Session::new(
        &model,
        &[&Guard::load(guard.as_ref()).unwrap()],
        SessionOptions { n_ctx: 512, ..Default::default() },
    )
    .unwrap();
    let last = session.prefill(&tokens).unwrap();
    let mut data = vec![0.0; 2 * n_embd];
    data[n_embd..].fill(PUSH);
    let raw: Vec<i32> = tokens.iter().map(|token| token.0).collect();
    let own = ControlVector { data: &data, layers: 1..=2 };
    let expected = raw_llama::decode(&fixture.model, &raw, 1, Some(own)).logits;
    assert!(expected != raw_llama::decode(&fixture.model, &raw, 1, None).logits, "the vector does something");
    assert!(session.logits(last) == expected);

    let run = |more: &[&str]| {
        done(&[&["run", "--model", fixture.model(), "-p", "pilot", "--max-tokens", "8"], more].concat())
    };
    assert_ne!(run(&["--guard", guard]), run(&[]));
    assert_eq!(run(&["--guard", guard, "--strength", "direction.2=0"]), run(&[]));

    std::fs::write(fixture.folder.path().join("no.gguf"), b"GGUF but no more").unwrap();
    let no = fixture.folder.path().join("no.gguf");
    let ran =
        pilotfish(&["guard", "import", no.to_str().unwrap(), "--name", "x", "--model", fixture.model(), "-o", guard]);
    assert!(ran.code == 2 && ran.stderr.contains("no.gguf") && ran.stderr.lines().count() == 1, "{ran:?}");
}

/// From two models to a mapped guard, and its measurement.
#[test]
fn a_mapped_guard_is_made_and_measured_by_the_commands() {
    let fixture = Fixture::new(&[]);
    let at = |name: &str| fixture.folder.path().join(name).to_str().unwrap().to_owned();
    let mut large = TinyModel::new(Architecture::Gemma3);
    large.n_embd = 96;
    large.write(at("large.gguf").as_ref());
    let corpus: String =
        (0..60).map(|n| format!("the fish {n} swims to the sea and eats {} things\n", n * 7)).collect();
    std::fs::write(at("corpus.txt"), corpus).unwrap();
    let (large, mapping, guard) = (at("large.gguf"), at("small-to-large.map.safetensors"), at("mapped"));
    let (positive, negative) = (fixture.positive.to_str().unwrap(), fixture.negative.to_str().unwrap());

    let table = done(&[
        "map",
        "--source",
        fixture.model(),
        "--target",
        &large,
        "--corpus",
        &at("corpus.txt"),
        "--layers",
        "1:1,1:2",
        "-o",
        &mapping,
    ]);
    assert!(table.contains("1 → 2") && table.contains("60 documents"), "{table}");
    let build = |more: &[&str]| {
        let plain = [
            "guard",
            "build",
            "--name",
            "mapped",
            "--model",
            &large,
            "--vectors",
            &at("vectors.safetensors"),
            "--mapping",
            &mapping,
            "--gate",
            "sharks",
            "-o",
            &guard,
        ];
        pilotfish(&[&plain[..], more].concat())
    };
    let wrong = build(&["--layer", "1:3"]);
    assert!(wrong.code == 2 && wrong.stderr.contains("1:1") && wrong.stderr.contains("1:2"), "{wrong:?}");
    // Each prompt is judged by a vector made without it, in the model that the vectors are of.
    let nowhere = build(&["--positive", positive, "--negative", negative]);
    assert!(nowhere.code == 2 && nowhere.stderr.contains("give `--source`"), "{nowhere:?}");
    let other = build(&["--positive", positive, "--negative", negative, "--source", &large]);
    assert!(other.code == 2 && other.stderr.contains("another model"), "{other:?}");
    let built = build(&["--positive", positive, "--negative", negative, "--source", fixture.model()]);
    assert_eq!(built.code, 0, "{built:?}");
    assert!(built.stderr.contains("chose layers 1:"), "{built:?}");
    done(&["calibrate", "--model", &large, "--guard", &guard, "--benign", negative, "--false-positive-rate", "0.1"]);
    let report: Value = serde_json::from_str(&done(&[
        "eval",
        "--task",
        "detection",
        "--model",
        &large,
        "--guard",
        &guard,
        "--positive",
        positive,
        "--negative",
        negative,
        "--native-positive",
        positive,
        "--native-negative",
        negative,
        "--json",
    ]))
    .unwrap();
    let names: Vec<_> = report["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "gate `sharks`",
            "the model's own direction",
            "the model's own direction, standardized",
            "the model's own discriminant",
            "wrong layer, as gate `sharks`",
            "random direction, mean of 20"
        ]
    );
    let results = |guard: &str| done(&["guard", "inspect", guard, "--json"]).matches("of a test").count();
    assert_eq!(results(&guard), 0);
    for _ in 0..2 {
        done(&[
            "eval",
            "--task",
            "detection",
            "--model",
            &large,
            "--guard",
            &guard,
            "--positive",
            positive,
            "--negative",
            negative,
            "--record",
            "prompts of a test",
        ]);
        // The gate's AUC, rate and two shares, the wrong layer, and two of random directions: a second measurement takes the place of the first.
        assert_eq!(results(&guard), 7);
    }
    // The guard carries what it needs: the mapping may go.
    std::fs::remove_file(&mapping).unwrap();
    done(&["guard", "verify", &guard, "--model", &large]);

    let bench: Value = serde_json::from_str(&done(&[
        "bench", "--model", &large, "--guard", &guard, "--pairs", "3", "--tokens", "4", "--json",
    ]))
    .unwrap();
    assert_eq!((&bench["pairs"], &bench["sequences"]), (&Value::from(3), &Value::from(1)));
    for phase in ["prefill", "decode"] {
        assert!(bench[phase]["ratio"].as_f64().unwrap() > 0.0, "{bench}");
    }
}

#[test]
fn a_model_of_random_weights_is_written_and_timed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let model = path.to_str().unwrap();
    let with = |extra: &[&str]| {
        let small = "models synthesize --preset llama-8b --width 256 --layers 3 --heads 4 --kv-heads 2 --head-width 64 \
                     --feed-forward 512 --vocabulary 400 --context 512";
        let arguments = small.split_whitespace().chain(extra.iter().copied()).chain(["-o", model]);
        pilotfish(&arguments.collect::<Vec<_>>())
    };
    let ran = with(&["--seed", "3", "--quantization", "q4_0"]);
    assert_eq!((ran.code, ran.stdout.trim_end()), (0, model), "{ran:?}");
    assert!(ran.stderr.contains("llama with 2.0 million random weights"), "{ran:?}");
    let written = std::fs::read(&path).unwrap();
    let ran = with(&["--sliding-window", "8"]);
    assert!(ran.code == 2 && ran.stderr.contains("`llama` has no layers that see a sliding window"), "{ran:?}");
    let ran = with(&["--quantization", "q3_k"]);
    assert!(ran.code == 64 && ran.stderr.contains("q4_k_m"), "{ran:?}");
    assert!(std::fs::read(&path).unwrap() == written, "an error leaves what was there");

    for (extra, executor) in [
        (&["--points", "all"][..], "host"),
        (&["--points", "2", "--against", "copy", "--executor", "device"], "device"),
    ] {
        let bench =
            ["bench", "--model", model, "--intervention", "gated-add", "--pairs", "2", "--tokens", "3", "--json"];
        let arguments = [&bench[..], &["--sequences", "3", "--prompt-tokens", "200"], extra].concat();
        let report: Value = serde_json::from_str(&done(&arguments)).unwrap();
        let mut keys: Vec<_> = report.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["against", "decode", "executor", "pairs", "prefill", "ratio_spread", "sequences"]);
        assert_eq!((&report["sequences"], &report["executor"]), (&Value::from(3), &Value::from(executor)));
        for phase in ["prefill", "decode"] {
            assert!(report[phase]["ratio"].as_f64().unwrap() > 0.0, "{report}");
        }
    }
    let ran = pilotfish(&["bench", "--model", model, "--intervention", "add", "--sequences", "0"]);
    assert!(ran.code == 2 && ran.stderr.contains("one sequence"), "{ran:?}");

    let ran = with(&["--architecture", "gemma3", "--sliding-window", "8"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let prompt = "a b c d e f g h i j k l";
    let line = done(&["run", "--model", model, "-p", prompt, "--max-tokens", "4", "--json"]);
    let answer: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(answer["tokens"], 4, "{answer}");
}

/// A reading of the small model, carried to a larger one: the gate's score is `w_t · mean(x_t)` with `w_t` and the mean worked out here.
#[test]
fn a_discriminant_reads_a_larger_model_as_the_small_one_would_be_read() {
    discriminant_is_carried("1:2");
}

/// The same with the residuals of two layers as one row, and their discriminants one after the other.
#[test]
fn several_source_layers_are_read_as_one_row() {
    discriminant_is_carried("0+1:2");
}

fn discriminant_is_carried(pair: &str) {
    let fixture = Fixture::new(&[]);
    let at = |name: &str| fixture.folder.path().join(name).to_str().unwrap().to_owned();
    let mut large = TinyModel::new(Architecture::Gemma3);
    large.n_embd = 96;
    large.write(at("large.gguf").as_ref());
    let corpus: String =
        (0..60).map(|n| format!("the shark {n} swims to the sea and eats {} pilot fish\n", n * 7)).collect();
    std::fs::write(at("corpus.txt"), corpus).unwrap();
    let (large, mapping, vectors, guard) =
        (at("large.gguf"), at("m.map.safetensors"), at("lda.safetensors"), at("mapped"));
    let (positive, negative) = (fixture.positive.to_str().unwrap(), fixture.negative.to_str().unwrap());
    let classes = ["--positive", positive, "--negative", negative];
    let extract = ["extract", "--model", fixture.model(), "--name", "shark", "--method", "lda", "--tokens", "mean"];
    done(&[&extract[..], &classes, &["-o", &vectors]].concat());
    let map = ["map", "--source", fixture.model(), "--target", &large, "--layers", pair, "-o", &mapping];
    let survey = at("survey.json");
    done(&[&map[..], &["--corpus", &at("corpus.txt"), "--corpus", positive, "--survey", &survey]].concat());
    let build = ["guard", "build", "--name", "mapped", "--model", &large, "--vectors", &vectors, "--layer", pair];
    done(&[&build[..], &["--mapping", &mapping, "--gate", "sharks", "-o", &guard]].concat());
    done(&["calibrate", "--model", &large, "--guard", &guard, "--benign", negative]);

    let built = Guard::load(guard.as_ref()).unwrap();
    let (vector, gate) = (&built.vectors()[0], &built.gates()[0]);
    assert_eq!((vector.kind, vector.layer.0), (VectorKind::Discriminant, 2));
    assert_eq!((&gate.scope, gate.readout), (&GateScope::Prompt(Aggregate::Mean), Readout::Projection));

    // The reading, from the files alone.
    let file = MappingFile::from_bytes("m", &std::fs::read(&mapping).unwrap()).unwrap();
    let (map, quality) = &file.pairs[0];
    assert!(quality.backward.unwrap().fraction_unexplained < 1.0, "{quality:?}");
    let source = VectorFile::from_bytes("v", &std::fs::read(&vectors).unwrap()).unwrap();
    let of = |layer| &source.vectors.iter().find(|vector| vector.layer == layer).unwrap().values;
    let w: Vec<f32> = map.source_layer().layers().iter().flat_map(|layer| of(*layer)).copied().collect();
    let surveyed: Survey = serde_json::from_slice(&std::fs::read(&survey).unwrap()).unwrap();
    let surveyed = surveyed.pair(map.source_layer(), map.target_layer()).unwrap();
    assert_eq!(format!("{}:{}", surveyed.source_layer, surveyed.target_layer), pair);
    assert_eq!(surveyed.fraction_unexplained, quality.fraction_unexplained);
    assert_eq!(surveyed.backward_unexplained, Some(quality.backward.unwrap().fraction_unexplained));
    assert!(surveyed.cross_validated > 0.0 && (0.0..=1.0).contains(&surveyed.cca), "{surveyed:?}");
    let reading: Vec<f64> = map
        .backward()
        .unwrap()
        .chunks_exact(w.len())
        .zip(&map.target().scale)
        .map(|(row, target)| {
            let terms = row.iter().zip(&w).zip(&map.source().scale);
            terms.map(|((b, w), scale)| f64::from(*b) * f64::from(*w) * f64::from(*scale)).sum::<f64>()
                / f64::from(*target)
        })
        .collect();
    let norm = reading.iter().map(|x| x * x).sum::<f64>().sqrt();

    // The residual, from llama.cpp alone.
    let prompt = "shark sea sea";
    let model = Model::load(large.as_ref(), "large", &ModelOptions::default()).unwrap();
    let tokens: Vec<i32> = model.prompt_tokens(prompt).unwrap().iter().map(|token| token.0).collect();
    let rows = raw_llama::decode(large.as_ref(), &tokens, 2, None).residual;
    let projection = |row: &Vec<f32>| row.iter().zip(&reading).map(|(x, w)| f64::from(*x) * w).sum::<f64>() / norm;
    let mean = rows[1..].iter().map(projection).sum::<f64>() / (rows.len() - 1) as f64;
    let calibration = gate.calibration.unwrap();
    let expected = (mean - calibration.mean) / calibration.deviation;

    std::fs::write(at("one.txt"), prompt).unwrap();
    let scored = done(&["score", "--model", &large, "--guard", &guard, "--prompts", &at("one.txt"), "--json"]);
    let found = json_lines(&scored)[0]["gates"]["sharks"]["score"].as_f64().unwrap();
    assert!((found - expected).abs() <= 1e-3 * expected.abs().max(1.0), "{found} and {expected}");
}

#[test]
fn a_shrinkage_out_of_range_writes_nothing() {
    let fixture = Fixture::new(&[]);
    let at = |name: &str| fixture.folder.path().join(name).to_str().unwrap().to_owned();
    let refused = pilotfish(&[
        "extract",
        "--model",
        fixture.model(),
        "--method",
        "lda",
        "--shrinkage",
        "1.5",
        "--positive",
        fixture.positive.to_str().unwrap(),
        "--negative",
        fixture.negative.to_str().unwrap(),
        "-o",
        &at("x.safetensors"),
    ]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.stderr.contains("the shrinkage is 1.5"), "{refused:?}");
    assert!(!Path::new(&at("x.safetensors")).exists());
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// From the command line to the rows of a prompt, and back to who asks what the guard does.
#[test]
fn a_guard_acts_on_the_tokens_of_a_text() {
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "40", "--positions", "matching=eats thi"]);
    assert!(std::fs::read_to_string(fixture.manifest()).unwrap().contains("matching = \"eats thi\""));
    assert!(done(&["guard", "inspect", fixture.guard()]).contains("matching=eats thi"));
    let json: Value = serde_json::from_str(&done(&["guard", "inspect", fixture.guard(), "--json"])).unwrap();
    assert_eq!(json["interventions"][0]["positions"], serde_json::json!({ "matching": "eats thi" }));
    // Its gate is to stay out of it.
    fixture.edit_manifest("when = \"sharks\"\n", "");
    let answer = |prompt: &str, guard: &[&str]| {
        done(&[&["run", "--model", fixture.model(), "-p", prompt, "--max-tokens", "8"], guard].concat())
    };
    let guarded = ["--guard", fixture.guard()];
    for (prompt, acts) in [("a shark eats things", true), ("a shark eats the things", false)] {
        assert_eq!(answer(prompt, &guarded) != answer(prompt, &[]), acts, "{prompt}");
    }
    let empty = pilotfish(&[
        "guard",
        "build",
        "--name",
        "g",
        "--model",
        fixture.model(),
        "--vectors",
        "v",
        "--intervene",
        "add",
        "--positions",
        "matching=",
        "-o",
        "g",
    ]);
    assert!(empty.code == 64 && empty.stderr.contains("an empty one"), "{empty:?}");
}
