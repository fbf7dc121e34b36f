//! `pilotfish eval`: every task on a tiny model, and the report that it leaves.

use crate::support::{Fixture, done, pilotfish};
use llama_cpp_2::token::LlamaToken;
use pilotfish::engine::{Model, ModelOptions, Session, SessionOptions};
use pilotfish::eval::OPENINGS;
use pilotfish::guard::VectorFile;
use pilotfish::tensor::{LayerIndex, log_softmax};
use serde_json::{Value, json};
use std::path::Path;

/// All tasks at once, with a report in `report`.
fn evaluate(fixture: &Fixture, report: &Path, more: &[&str]) -> Value {
    let survey = fixture.folder.path().join("survey.json");
    let pair = |source_layer: Value, target_layer: u32, left: f64| {
        json!({
            "source_layer": source_layer, "target_layer": target_layer, "lambda": 0.01, "fraction_unexplained": left,
            "cross_validated": left, "cosine": 0.7, "cca": 0.5, "cka": 0.6, "backward_unexplained": null,
        })
    };
    let pairs = [pair(json!(0), 0, 0.4), pair(json!(0), 1, 0.2), pair(json!([0, 1]), 1, 0.1)];
    let found = json!({ "source": "a", "target": "b", "n_tokens": 90, "n_documents": 9, "pairs": pairs });
    std::fs::write(&survey, found.to_string()).unwrap();
    let arguments = [
        "eval",
        "--task",
        "detection,refusal,utility",
        "--model",
        fixture.model(),
        "--guard",
        fixture.guard(),
        "--positive",
        fixture.positive.to_str().unwrap(),
        "--negative",
        fixture.negative.to_str().unwrap(),
        "--look-alike",
        fixture.negative.to_str().unwrap(),
        "--native-positive",
        fixture.positive.to_str().unwrap(),
        "--native-negative",
        fixture.negative.to_str().unwrap(),
        "--limit",
        "5",
        "--max-tokens",
        "6",
        "--control-seeds",
        "2",
        "--strengths",
        "0,1,4",
        "--survey",
        survey.to_str().unwrap(),
        "-o",
        report.to_str().unwrap(),
        "--json",
    ];
    serde_json::from_str(&done(&[&arguments[..], more].concat())).unwrap()
}

fn rows<'a>(report: &'a Value, task: &str) -> Vec<(&'a str, &'a Value)> {
    let rows = report[task]["rows"].as_array().unwrap();
    rows.iter().map(|row| (row["role"].as_str().unwrap(), row)).collect()
}

#[test]
fn every_task_has_its_controls_and_its_figures() {
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "2"]);
    let folder = fixture.folder.path().join("report");
    let report = evaluate(&fixture, &folder, &[]);
    let roles = |task| rows(&report, task).into_iter().map(|(role, _)| role).collect::<Vec<_>>();
    assert_eq!(roles("detection"), ["guard", "native", "native", "native", "wrong-layer", "random"]);
    assert_eq!(roles("steering"), ["no-guard", "guard", "random", "wrong-layer", "system-prompt"]);
    assert_eq!(roles("utility"), roles("steering"));

    for (role, row) in rows(&report, "detection") {
        let auc = &row["separation"]["auc"];
        let [value, low, high] = ["value", "low", "high"].map(|key| auc[key].as_f64().unwrap());
        assert!(low <= high && (0.0..=1.0).contains(&value), "{role}: {auc}");
        assert_eq!(row["auc"], auc["value"]);
        assert!(row["look_alike"]["auc"]["value"].is_number(), "{role}");
        assert_eq!(row["fires"].is_object(), role == "guard");
    }
    let gate = &report["detection"]["gates"][0];
    assert_eq!(["positive", "negative", "look_alike"].map(|class| gate[class].as_array().unwrap().len()), [12; 3]);

    // Each answer is one thing, and of no guard nothing is another's.
    for (role, row) in rows(&report, "steering") {
        for class in ["harmful", "harmless"] {
            let kinds = ["refusal", "decline", "blocked", "compliance", "broken"];
            let shares: f64 = kinds.iter().map(|kind| row[class][kind]["share"].as_f64().unwrap()).sum();
            assert!((shares - 1.0).abs() < 1e-9, "{role} {class}: {shares}");
        }
    }
    let strengths = report["steering"]["strengths"].as_array().unwrap();
    let probability = |row: &Value, class: &str| row[class]["refusal_probability"].as_f64().unwrap();
    for (class, file) in [("harmful", &fixture.positive), ("harmless", &fixture.negative)] {
        let unguarded = probability(rows(&report, "steering")[0].1, class);
        let expected = probability_of_refusing(&fixture, file);
        assert!((unguarded / expected - 1.0).abs() < 1e-3, "{class}: {unguarded}, read token by token {expected}");
        assert_eq!(probability(&strengths[0], class), unguarded, "{class}: strength 0 is no guard");
    }
    let unguarded = probability(rows(&report, "steering")[0].1, "harmful");
    assert_ne!(probability(&strengths[2], "harmful"), unguarded, "a strength moves the logits");
    let kl = |row: &Value| row["kl"].as_f64().unwrap();
    assert_eq!((strengths.len(), kl(&strengths[0])), (3, 0.0), "strength 0 is no guard");
    let utility = rows(&report, "utility");
    assert_eq!(utility[0].1["kl"]["value"], 0.0);
    assert_eq!(utility[1].1["kl"]["value"], strengths[1]["kl"], "the guard is at its own strength");

    let written: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("report.json")).unwrap()).unwrap();
    assert_eq!(written, report);
    assert_eq!(
        report["guard"]["sha256"],
        pilotfish::guard::Digest::of(&std::fs::read(fixture.manifest()).unwrap()).to_string()
    );
    let fingerprint = report["model"]["fingerprint"].as_str().unwrap();
    assert!(std::fs::read_to_string(fixture.manifest()).unwrap().contains(fingerprint));
    let page = std::fs::read_to_string(folder.join("report.html")).unwrap();
    check_page(&page);

    // The same again, figure for figure.
    let again = evaluate(&fixture, &fixture.folder.path().join("again"), &[]);
    for task in ["detection", "steering", "utility", "survey"] {
        assert_eq!(again[task], report[task], "{task}");
    }
}

/// How probable the unguarded model's logits make a refusing opening after the first prompts of `file`, read token by token.
fn probability_of_refusing(fixture: &Fixture, file: &Path) -> f64 {
    let model = Model::load(&fixture.model, "tiny", &ModelOptions::default()).unwrap();
    let mut session = Session::new(&model, &[], SessionOptions::default()).unwrap();
    let text = std::fs::read_to_string(file).unwrap();
    let prompts: Vec<_> = text.lines().take(5).map(|prompt| model.prompt_tokens(prompt.trim()).unwrap()).collect();
    let mut likelihood = |prompt: &[LlamaToken], opening: &str| {
        // The model has no template, so that an answer is a word after others.
        let opening = model.text_tokens(&format!(" {opening}"));
        let mut row = session.prefill(prompt).unwrap();
        let mut sum = 0.0;
        for (at, token) in opening.iter().enumerate() {
            sum += log_softmax(session.logits(row))[token.0 as usize];
            row = session.step(prompt.len() + at, *token).unwrap();
        }
        sum.exp()
    };
    // No two of them are the same tokens to this vocabulary.
    let each = prompts.iter().map(|prompt| OPENINGS.iter().map(|opening| likelihood(prompt, opening)).sum::<f64>());
    each.collect::<Vec<f64>>().iter().sum::<f64>() / prompts.len() as f64
}

/// How a model refuses with each layer steered in turn: nothing is other at strength 0, and a report draws it.
#[test]
fn refusals_are_told_layer_by_layer() {
    let fixture = Fixture::new(&[]);
    let at = |name: &str| fixture.folder.path().join(name).to_str().unwrap().to_owned();
    let (positive, negative) = (fixture.positive.to_str().unwrap(), fixture.negative.to_str().unwrap());
    let (vectors, written) = (at("every.safetensors"), at("sweep.json"));
    let classes = ["--positive", positive, "--negative", negative];
    let extract = ["extract", "--model", fixture.model(), "--name", "shark", "-o", &vectors];
    done(&[&extract[..], &classes].concat());
    let run = |more: &[&str]| {
        let what = ["sweep", "--task", "refusal", "--model", fixture.model(), "--vectors", &vectors];
        pilotfish(&[&what[..], &["--limit", "4", "--max-tokens", "4"], more].concat())
    };
    let sweep = |strength: &str| -> Value {
        let how = ["--intervene", "add", "--strength", strength, "--json", "-o", &written];
        let ran = run(&[&classes[..], &how].concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let nothing = sweep("0");
    for at in nothing["layers"].as_array().unwrap() {
        for class in ["harmful", "harmless"] {
            assert_eq!(at[class], nothing["unguarded"][class], "{at}");
        }
    }
    let steered = sweep("3");
    let layers: Vec<_> = steered["layers"].as_array().unwrap().iter().map(|at| at["layer"].as_u64().unwrap()).collect();
    assert_eq!(layers, [0, 1, 2]);
    assert_ne!(
        steered["layers"][1]["harmful"]["refusal_probability"],
        steered["unguarded"]["harmful"]["refusal_probability"]
    );

    let report = fixture.folder.path().join("report");
    let measured =
        ["eval", "--task", "detection", "--model", fixture.model(), "--guard", fixture.guard(), "--limit", "4"];
    let shown = ["--control-seeds", "1", "--sweep", &written, "-o", report.to_str().unwrap()];
    done(&[&measured[..], &classes, &shown].concat());
    let page = std::fs::read_to_string(report.join("report.html")).unwrap();
    assert!(page.contains("What the logits say, by the layer that is steered"));

    // Drawn later, it is the same; and drawn again it is there once.
    let later = fixture.folder.path().join("later");
    done(&[&measured[..], &classes, &["--control-seeds", "1", "-o", later.to_str().unwrap()]].concat());
    let read = |folder: &Path, name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let json = |folder: &Path| -> Value {
        let mut report: Value = serde_json::from_str(&read(folder, "report.json")).unwrap();
        report.as_object_mut().unwrap().remove("command").unwrap();
        report
    };
    let plain = read(&later, "report.json");
    done(&["report", later.to_str().unwrap()]);
    assert_eq!(read(&later, "report.json"), plain);
    for _ in 0..2 {
        done(&["report", later.to_str().unwrap(), "--sweep", &written]);
        assert_eq!(json(&later), json(&report));
    }
    assert!(read(&later, "report.html").contains("What the logits say, by the layer that is steered"));
    for (from, to, says) in
        [("\"format\": 1", "\"format\": 2", "has format 2"), ("\"seeds\"", "\"beads\"", "missing field `seeds`")]
    {
        std::fs::write(later.join("report.json"), plain.replace(from, to)).unwrap();
        let ran = pilotfish(&["report", later.to_str().unwrap()]);
        assert!(ran.code == 2 && ran.stderr.contains(says) && ran.stderr.contains("report.json"), "{ran:?}");
    }

    // By a mapping from the model to itself, from the layer that its pair names.
    let mapping = at("itself.map.safetensors");
    let map = ["map", "--source", fixture.model(), "--target", fixture.model(), "--corpus", negative];
    done(&[&map[..], &["--layers", "0:1,1:1", "-o", &mapping]].concat());
    let mapped = [&classes[..], &["--strength", "3", "--mapping", &mapping, "--json", "--layers"]].concat();
    let by = |pair: &str| -> Value {
        let ran = run(&[&mapped[..], &[pair]].concat());
        serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{ran:?}"))
    };
    for (pair, source) in [("0:1", 0), ("1:1", 1)] {
        let found = by(pair);
        let layer = &found["layers"][0];
        assert_eq!((found["mapped"].as_bool(), layer["layer"].as_u64()), (Some(true), Some(1)));
        assert_eq!(layer["source_layer"], source);
        assert_ne!(layer["harmful"]["refusal_probability"], found["unguarded"]["harmful"]["refusal_probability"]);
    }
    assert_ne!(by("0:1")["layers"][0]["harmful"], by("1:1")["layers"][0]["harmful"]);

    for (more, says) in [
        (&["--positive", positive][..], "--negative"),
        (&["--positive", positive, "--negative", negative, "--benign", negative], "are of backdoors"),
        (&["--positive", positive, "--negative", negative, "--prompts", positive], "are of backdoors"),
    ] {
        let wrong = run(more);
        assert!(wrong.code == 2 && wrong.stderr.contains(says), "{more:?}: {wrong:?}");
    }
}

/// A page that opens without a network, whose tags close, and that has every figure with its numbers.
fn check_page(page: &str) {
    for fetched in ["src=", "href=", "url(", "@import", "<script", "http:", "https:", "<link"] {
        assert!(!page.contains(fetched), "the page holds `{fetched}`");
    }
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').expect("every tag ends");
        let tag = &rest[start + 1..end];
        let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed), "in {:?}", &rest[start.saturating_sub(80)..end]);
        } else if !tag.ends_with('/') && name != "meta" {
            open.push(name);
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "left open: {open:?}");
    for title in [
        "Scores of gate sharks",
        "ROC: positive against negative prompts",
        "The gate's direction, read at every layer",
        "Prompts that are refused",
        "Strength against effect",
        "Strength against KL on benign answers",
        "Benign prompts by how far the guard moves their answers",
        "Variance explained in cross-validation by layer pair",
        "Cosine of mapped and true activations by layer pair",
        "Squared canonical correlation by layer pair",
        "Centred kernel alignment by layer pair",
    ] {
        let figure =
            page.split("<figure>").find(|figure| figure.starts_with(&format!("<figcaption>{title}</figcaption>")));
        let figure = figure.unwrap_or_else(|| panic!("no figure is called {title}"));
        let figure = figure.split("</figure>").next().unwrap();
        assert!(figure.contains("<svg ") && figure.contains("<table>"), "{title}");
        assert!(["<rect", "<polyline", "<circle"].iter().any(|shape| figure.contains(shape)), "{title} is empty");
    }
    let figures = page.matches("<figure>").count();
    assert_eq!((figures, page.matches("<svg ").count()), (11, figures));
}

/// A guard that only reads has nothing to steer with, and costs nothing.
#[test]
fn a_gate_alone_is_measured_by_what_it_blocks() {
    let fixture = Fixture::new(&[]);
    let base = ["eval", "--model", fixture.model(), "--guard", fixture.guard(), "--limit", "4", "--max-tokens", "4"];
    let negative = fixture.negative.to_str().unwrap();
    let positive = fixture.positive.to_str().unwrap();
    let utility: Value =
        serde_json::from_str(&done(&[&base[..], &["--task", "utility", "--benign", negative, "--json"]].concat()))
            .unwrap();
    let names: Vec<_> = utility["rows"].as_array().unwrap().iter().map(|row| row["role"].as_str().unwrap()).collect();
    assert_eq!(names, ["no-guard", "guard", "system-prompt"]);
    assert_eq!(utility["rows"][1]["kl"]["value"], 0.0);
    let steering =
        pilotfish(&[&base[..], &["--task", "steering", "--positive", positive, "--negative", negative]].concat());
    assert!(steering.code == 2 && steering.stderr.contains("no intervention"), "{steering:?}");
    let missing = pilotfish(&[&base[..], &["--task", "detection", "--positive", positive]].concat());
    assert!(missing.code == 64 && missing.stderr.contains("--negative"), "{missing:?}");
}

/// What the model itself gives for the same prompts, at whatever length, is the guard's own vector here, which needed no mapping.
#[test]
fn the_models_own_vectors_are_a_control_of_equal_norm() {
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "2"]);
    let at = |name: &str| fixture.folder.path().join(name).to_str().unwrap().to_owned();
    let file = VectorFile::from_bytes("own", &std::fs::read(at("vectors.safetensors")).unwrap()).unwrap();
    let write = |name: &str, change: &dyn Fn(&mut VectorFile)| {
        let mut changed = file.clone();
        changed.vectors.iter_mut().for_each(|vector| vector.class_means = None);
        change(&mut changed);
        std::fs::write(at(name), changed.to_bytes().unwrap()).unwrap();
        at(name)
    };
    let (positive, negative) = (fixture.positive.to_str().unwrap(), fixture.negative.to_str().unwrap());
    let run = |tasks: &str, vectors: &[&str]| {
        let on = ["eval", "--task", tasks, "--model", fixture.model(), "--guard", fixture.guard()];
        let prompts = ["--positive", positive, "--negative", negative, "--benign", positive, "--limit", "4"];
        let files: Vec<&str> = vectors.iter().flat_map(|file| ["--native-vectors", file]).collect();
        pilotfish(&[&on[..], &prompts, &["--max-tokens", "5", "--control-seeds", "0", "--json"], &files].concat())
    };
    let measured = |vectors: &str| -> Value {
        let ran = run("steering,utility", &[vectors]);
        assert_eq!(ran.code, 0, "{ran:?}");
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let of = |report: &Value, task: &str, wanted: &str| {
        let found = rows(report, task).into_iter().find(|(role, _)| *role == wanted);
        found.unwrap_or_else(|| panic!("no row of {wanted} in {task}")).1.clone()
    };
    let kl = |report: &Value, role: &str| of(report, "utility", role)["kl"]["value"].as_f64().unwrap();

    let longer = write("longer.safetensors", &|file| file.vectors[0].values.iter_mut().for_each(|x| *x *= 4.0));
    let report = measured(&longer);
    let roles: Vec<_> = rows(&report, "steering").into_iter().map(|(role, _)| role).collect();
    assert_eq!(roles, ["no-guard", "guard", "native", "wrong-layer", "system-prompt"]);
    assert_eq!(of(&report, "utility", "native")["name"], "the model's own vector");
    // Four times as long is a power of two, so that the same norm is the same bits.
    assert_eq!(of(&report, "steering", "native")["harmful"], of(&report, "steering", "guard")["harmful"]);
    assert!(kl(&report, "guard") > 0.0, "the gate fires on none of these prompts");
    assert_eq!(kl(&report, "native"), kl(&report, "guard"));
    let backward = write("backward.safetensors", &|file| file.vectors[0].values.reverse());
    let other = measured(&backward);
    assert!(kl(&other, "native") > 0.0 && kl(&other, "native") != kl(&other, "guard"));

    let renamed = write("renamed.safetensors", &|file| file.vectors[0].name = "whale".into());
    let moved = write("moved.safetensors", &|file| file.vectors[0].layer = LayerIndex(0));
    let foreign = write("foreign.safetensors", &|file| {
        file.model.name = "gull".into();
        file.model.fingerprint = "7".repeat(64).parse().unwrap();
    });
    for (tasks, files, says) in [
        ("steering", &[renamed.as_str(), &moved][..], "`whale` at layer 1, `shark` at layer 0"),
        ("utility", &[moved.as_str()], "acts along `shark` at layer 1"),
        ("utility", &[longer.as_str(), &backward], "one vector of that name and layer"),
        ("steering", &[foreign.as_str()], "the vectors are of gull"),
        ("detection", &[longer.as_str()], "are for guards in `refusal`, `utility`"),
    ] {
        let ran = run(tasks, files);
        assert!(ran.code == 2 && ran.stderr.contains(says), "{says}: {ran:?}");
    }
    let reads = Fixture::new(&[]);
    let on = ["eval", "--task", "utility", "--model", reads.model(), "--guard", reads.guard(), "--benign", negative];
    let ran = pilotfish(&[&on[..], &["--native-vectors", &longer]].concat());
    assert!(ran.code == 2 && ran.stderr.contains("has a vector"), "{ran:?}");
}
