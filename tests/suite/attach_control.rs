//! An attached process that runs: what it is asked and told over its socket, what it counts, and what it writes down.

use crate::attach::{App, HARM_GATE, HARMFUL, app, decode, directory, json_line, prompts};
use crate::real::{SMALL, located};
use crate::support::{Fixture, Ran, done, pilotfish};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const TEXTS: [&str; 4] = ["shark sea sea", "pilot fish sea", "the sea of the shark", "a fish in the sea sea sea"];

/// Runs `pilotfish ctl` where processes have their sockets in `runtime`.
fn ctl(runtime: &Path, arguments: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_pilotfish"))
        .arg("ctl")
        .args(arguments)
        .env("XDG_RUNTIME_DIR", runtime)
        .env_remove("PILOTFISH_LOG")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn asked(app: &App, arguments: &[&str]) -> Value {
    let ran = ctl(app.folder.path(), &[arguments, &["--json"]].concat());
    assert_eq!(ran.code, 0, "{arguments:?}: {}\n{}", ran.stderr, app.log());
    json_line(ran.stdout.trim())
}

/// Why it was not done.
fn refused(app: &App, arguments: &[&str]) -> String {
    let ran = ctl(app.folder.path(), arguments);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{arguments:?}");
    ran.stderr
}

fn socket_of(app: &App) -> PathBuf {
    app.folder.path().join(format!("pilotfish/{}.sock", app.child.id()))
}

/// The likeliest tokens after a prompt, one after another, in sequence 0 begun anew.
fn greedy(app: &mut App, prompt: &[i64], n: usize) -> Vec<i64> {
    app.does(&[json!(["remove", 0, -1, -1])]);
    let mut said = Vec::new();
    let mut next = decode(prompt, 0, 0);
    for at in 0..n {
        let done = app.does(&[next]).remove(0);
        assert_eq!(done[0], 0, "{}", app.log());
        let token = done[1].as_i64().unwrap();
        said.push(token);
        next = decode(&[token], 0, prompt.len() + at);
    }
    said
}

fn metric(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no `{name}` in\n{text}")).parse().unwrap()
}

/// Records of an audit log, which is whole.
fn records(log: &Path) -> Vec<Value> {
    let verified = json_line(done(&["audit", log.to_str().unwrap(), "--json"]).trim());
    let text = std::fs::read_to_string(log).unwrap();
    let records: Vec<Value> = text.lines().map(|line| json_line(line)["record"].clone()).collect();
    assert_eq!(verified["records"], records.len());
    records
}

fn of_event<'r>(records: &'r [Value], event: &str) -> Vec<&'r Value> {
    records.iter().filter(|record| record["event"] == event).collect()
}

#[test]
fn a_guard_is_toggled_in_a_process_that_runs_and_all_of_it_is_counted_and_on_record() {
    let Some(package) = app() else { return };
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "3"]);
    let guards = directory(&[&fixture.guard]);
    let (_, tokens) = prompts(fixture.folder.path(), fixture.model(), &TEXTS);
    let log = fixture.folder.path().join("audit.jsonl");
    let mut plain = App::start_python(&package, &fixture.model, 1, None, &[]);
    let unguarded: Vec<_> = tokens.iter().map(|tokens| greedy(&mut plain, tokens, 6)).collect();
    let more = ["--audit", log.to_str().unwrap()];
    let mut app = App::start_python_with(&package, &fixture.model, 1, Some(guards.path()), &[], &more, &[]);
    // Before any decode there is no model yet, and the guards are there.
    let status = asked(&app, &["status"]);
    assert_eq!((status["pid"].as_u64(), &status["counts"]["prompts"]), (Some(u64::from(app.child.id())), &json!(0)));
    let guard = &status["in_force"]["guards"][0];
    assert_eq!((&guard["name"], &guard["enabled"]), (&json!("shark-gate"), &json!(true)));
    let intervention = guard["interventions"][0]["name"].as_str().unwrap().to_owned();
    assert_eq!(guard["interventions"][0]["strength"], 3.0);

    let all = |app: &mut App| tokens.iter().map(|tokens| greedy(app, tokens, 6)).collect::<Vec<_>>();
    let guarded = all(&mut app);
    assert_ne!(guarded, unguarded, "the guard does nothing: its toggling could not be told");
    assert_eq!(app.decisions().len(), 4);
    let fired = app.decisions().iter().filter(|(.., fired)| *fired).count();
    assert!((1..4).contains(&fired), "{fired}");
    // All of it off: nothing is read and nothing patched.
    let changed = asked(&app, &["toggle", "shark-gate", "off"]);
    assert_eq!((&changed["epoch"], &changed["models"][0]["guards"]), (&json!(1), &json!([])));
    assert_eq!(all(&mut app), unguarded);
    assert_eq!(app.decisions().len(), 4);
    // By its folder on again, its intervention off: the gate decides, and nothing follows.
    asked(&app, &["toggle", "guard", "on", &format!("{intervention}=off")]);
    assert_eq!(all(&mut app), unguarded);
    assert_eq!(app.decisions()[..4], app.decisions()[4..]);
    // At another strength, and as its file has it again.
    asked(&app, &["toggle", "shark-gate", &format!("{intervention}=-3")]);
    let turned = all(&mut app);
    assert!(turned != unguarded && turned != guarded);
    let status = asked(&app, &["status"]);
    let shown = &status["in_force"]["guards"][0];
    assert_eq!(
        (&shown["interventions"][0]["strength"], &shown["settings"][&intervention]),
        (&json!(-3.0), &json!(-3.0))
    );
    asked(&app, &["toggle", "shark-gate", &format!("{intervention}=reset")]);
    assert_eq!(all(&mut app), guarded);

    // What can't be says why, and changes nothing.
    let before = asked(&app, &["status"]);
    for (arguments, said) in [
        (["toggle", "nobody", "off"], "no guard is called `nobody`; there are `shark-gate`"),
        (["toggle", "shark-gate", "nothing=on"], "no intervention is called `nothing`"),
        (["toggle", "shark-gate", "maybe"], "`maybe` is no change"),
        (["toggle", "shark-gate", "nothing=loud"], "`loud` is no setting"),
    ] {
        let why = refused(&app, &arguments);
        assert!(why.contains(said), "{why}");
    }
    assert_eq!(ctl(app.folder.path(), &["toggle", "shark-gate"]).code, 64);
    assert_eq!(asked(&app, &["status"]), before);

    // Files are read when that is asked for: a change without a trace in the file's times is one that no watching sees.
    let manifest = guards.path().join("guard/guard.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("strength = 3", "strength = 2")).unwrap();
    let reloaded = asked(&app, &["reload"]);
    assert_eq!(reloaded["epoch"], 5);
    assert_eq!(reloaded["guards"][0]["interventions"][0]["strength"], 2.0);
    std::fs::write(&manifest, "name = 3").unwrap();
    let reload = ctl(app.folder.path(), &["reload", "--json"]);
    assert!(reload.code == 2 && reload.stderr.contains("what was read before stays in force"), "{reload:?}");
    let reloaded = json_line(reload.stdout.trim());
    assert!(reloaded["guards"][0]["problem"].is_string() && reloaded["guards"][0]["enabled"] == true, "{reloaded}");

    let decisions = app.decisions();
    assert_eq!(decisions.len(), 16);
    let n_fired = decisions.iter().filter(|(.., fired)| *fired).count() as u64;
    let text = asked(&app, &["metrics"])["metrics"].as_str().unwrap().to_owned();
    assert_eq!(ctl(app.folder.path(), &["metrics"]).stdout, text);
    let labels = r#"{guard="shark-gate",gate="sharks"}"#;
    let n_tokens: usize = tokens.iter().map(Vec::len).sum();
    for (name, expected) in [
        ("pilotfish_prompts_total".to_owned(), 16),
        (format!("pilotfish_gate_decisions_total{labels}"), 16),
        (format!("pilotfish_gate_fired_total{labels}"), n_fired),
        // Four times each prompt and the five tokens that were fed back.
        ("pilotfish_decodes_total".to_owned(), 4 * 4 * 6),
        ("pilotfish_prompt_tokens_total".to_owned(), 4 * n_tokens as u64),
        ("pilotfish_answer_tokens_total".to_owned(), 4 * 4 * 5),
        ("pilotfish_faults_total".to_owned(), 0),
        ("pilotfish_refused_decodes_total".to_owned(), 0),
        // Once, while the guard was off.
        ("pilotfish_unguarded_decodes_total".to_owned(), 4 * 6),
        (r#"pilotfish_reloads_total{outcome="taken"}"#.to_owned(), 1),
        (r#"pilotfish_reloads_total{outcome="refused"}"#.to_owned(), 1),
        ("pilotfish_epoch".to_owned(), 6),
        ("pilotfish_guards".to_owned(), 1),
        ("pilotfish_problems".to_owned(), 1),
    ] {
        assert_eq!(metric(&text, &name), expected, "{name}\n{text}");
    }

    let records = records(&log);
    let on_record = of_event(&records, "prompt");
    let scores: Vec<(usize, f64, bool)> = on_record
        .iter()
        .map(|record| {
            let gate = &record["gates"][0];
            assert_eq!((&gate["guard"], &gate["gate"]), (&json!("shark-gate"), &json!("sharks")));
            let sequence = record["sequence"].as_u64().unwrap() as usize;
            (sequence, gate["score"].as_f64().unwrap(), gate["fired"].as_bool().unwrap())
        })
        .collect();
    assert_eq!(scores, decisions);
    let epochs: Vec<u64> = on_record.iter().map(|record| record["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [[0; 4], [2; 4], [3; 4], [4; 4]].concat());
    let first = on_record[0];
    assert_eq!(first["guards"][0]["content"], guard["content"]);
    assert_eq!(first["model"]["fingerprint"], before["in_force"]["models"][0]["fingerprint"]);
    assert_eq!(of_event(&records, "start").len(), 1);
    assert_eq!(of_event(&records, "change").len(), 4);
    let outcomes: Vec<&Value> = of_event(&records, "reload").iter().map(|record| &record["outcome"]).collect();
    assert_eq!(outcomes, ["taken", "refused"]);
    assert!(on_record.iter().all(|record| record.get("unread").is_none()));

    // What was decoded while it was off no gate has read.
    asked(&app, &["toggle", "shark-gate", "off"]);
    greedy(&mut app, &tokens[0], 2);
    asked(&app, &["toggle", "shark-gate", "on"]);
    let harmless = decisions[..4].iter().position(|(.., fired)| !fired).unwrap();
    app.does(&[decode(&tokens[harmless], 0, tokens[0].len() + 1)]);
    let records = self::records(&log);
    let last = *of_event(&records, "prompt").last().unwrap();
    assert_eq!(last["gates"][0]["fired"], true);
    assert_eq!(last["unread"], "there were tokens that no guard has read");
}

/// A prompt over the socket is what it is of the app's own, and the app does not notice it.
#[test]
fn a_score_is_the_decision_that_the_apps_own_prompt_gets() {
    let Some(package) = app() else { return };
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "3"]);
    let guards = directory(&[&fixture.guard]);
    let path = fixture.folder.path().join("prompts.jsonl");
    let lines: String = TEXTS.iter().map(|text| json!({ "prompt": text }).to_string() + "\n").collect();
    std::fs::write(&path, lines).unwrap();
    let raw = done(&["tokens", "--model", fixture.model(), "--raw", "--prompts", path.to_str().unwrap(), "--json"]);
    let tokens: Vec<Vec<i64>> =
        raw.lines().map(|line| serde_json::from_value(json_line(line)["tokens"].clone()).unwrap()).collect();
    let mut app = App::start_python(&package, &fixture.model, 1, Some(guards.path()), &[]);
    assert!(refused(&app, &["score", "shark"]).contains("no model has decoded"));
    let expected: Vec<_> = tokens.iter().map(|tokens| greedy(&mut app, tokens, 6)).collect();
    let decisions = app.decisions();
    assert_eq!(decisions.len(), 4);
    let counts = asked(&app, &["status"])["counts"].clone();
    for ((text, (_, score, fired)), tokens) in TEXTS.iter().zip(&decisions).zip(&tokens) {
        let found = asked(&app, &["score", text]);
        assert_eq!(found["tokens"], tokens.len());
        let gate = &found["gates"][0];
        let found_score = gate["score"].as_f64().unwrap();
        assert!((found_score - score).abs() <= 1e-5 * score.abs(), "`{text}`: {found_score}, expected {score}");
        assert_eq!(gate["fired"], *fired, "`{text}`");
        assert_eq!(found["flagged"], *fired);
    }
    assert_eq!(asked(&app, &["status"])["counts"], counts, "they are not the app's");
    // In the midst of an answer.
    app.does(&[json!(["remove", 0, -1, -1]), decode(&tokens[0], 0, 0)]);
    asked(&app, &["score", TEXTS[1]]);
    let done = app.does(&[decode(&[expected[0][0]], 0, tokens[0].len())]).remove(0);
    assert_eq!(done[1], expected[0][1]);
    let again: Vec<_> = tokens.iter().map(|tokens| greedy(&mut app, tokens, 6)).collect();
    assert_eq!(again, expected);
    // The token that the model begins with is there once, whoever has put it there.
    let text = asked(&app, &["score", TEXTS[0]]);
    for whole in [TEXTS[0].to_owned(), format!("<s>{}", TEXTS[0])] {
        assert_eq!(asked(&app, &["score", "--templated", &whole]), text, "{whole}");
    }
    assert!(refused(&app, &["score", &"sea ".repeat(600)]).contains("there is room for 512"));
    assert!(refused(&app, &["score", "sea", "--model", "7"]).contains("there is no model 7"));
}

#[test]
fn what_a_guard_ends_is_counted_and_on_record() {
    let (Some(package), Some(model)) = (app(), located(SMALL)) else { return };
    let guards = directory(&[Path::new(HARM_GATE)]);
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("audit-{pid}.jsonl");
    let texts = ["Name three birds.", HARMFUL];
    let (_, tokens) = prompts(folder.path(), SMALL, &texts);
    let more = ["--audit", log.to_str().unwrap()];
    let mut app = App::start_python_with(&package, &model, 2, Some(guards.path()), &[], &more, &[]);
    let m = tokens[1].len();
    let said = app.does(&[decode(&tokens[0], 0, 0), decode(&tokens[1], 1, 0)]);
    let token = said[1][1].as_i64().unwrap();
    app.does(&[decode(&[token], 1, m)]);
    let text = asked(&app, &["metrics"])["metrics"].as_str().unwrap().to_owned();
    assert_eq!(metric(&text, r#"pilotfish_blocked_total{guard="harm-gate"}"#), 1, "{text}");
    // With the template the harmful one is flagged over the socket too, and the harmless one is not.
    for (text, flagged) in texts.iter().zip([false, true]) {
        let chat = asked(&app, &["score", "--chat", text]);
        assert_eq!(chat["flagged"], flagged, "`{text}`");
        // The same prompt as an app would have it, and as nothing but text.
        let templated = format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(asked(&app, &["score", "--templated", &templated]), chat);
        assert_ne!(asked(&app, &["score", &templated])["tokens"], chat["tokens"]);
    }
    let log = folder.path().join(format!("audit-{}.jsonl", app.child.id()));
    let records = records(&log);
    let ends = of_event(&records, "end");
    assert_eq!(ends.len(), 1, "an answer ends once, however long what is said in its place");
    assert_eq!(
        (&ends[0]["end"], &ends[0]["sequence"], &ends[0]["guard"]),
        (&json!("blocked"), &json!(1), &json!("harm-gate"))
    );
    let fired: Vec<&Value> = of_event(&records, "prompt").iter().map(|record| &record["gates"][0]["fired"]).collect();
    assert_eq!(fired, [false, true]);
    assert_eq!(of_event(&records, "score").len(), 6);
}

/// What should be on record and can't be does not happen, unless the app is told to go on.
#[test]
fn where_the_audit_log_can_not_be_written_nothing_decodes_unless_told_to() {
    let Some(package) = app() else { return };
    let fixture = Fixture::new(&[]);
    let guards = directory(&[&fixture.guard]);
    let (_, tokens) = prompts(fixture.folder.path(), fixture.model(), &TEXTS[..1]);
    let log = fixture.folder.path().join("audit.jsonl");
    let log = log.to_str().unwrap();
    let start =
        |more: &[&str]| App::start_python_with(&package, &fixture.model, 1, Some(guards.path()), &[], more, &[]);
    let mut first = start(&["--audit", log]);
    assert_eq!(first.does(&[decode(&tokens[0], 0, 0)])[0][0], 0, "{}", first.log());
    // A second process on one log.
    let mut second = start(&["--audit", log]);
    assert_eq!(second.does(&[decode(&tokens[0], 0, 0)])[0], json!([-3]));
    assert!(second.log().contains("another process writes the audit log"), "{}", second.log());
    let status = asked(&second, &["status"]);
    assert!(status["audit"]["problem"].as_str().unwrap().contains("another process"), "{status}");
    assert_eq!((&status["counts"]["refused"], &status["counts"]["unguarded"]), (&json!(1), &json!(0)));
    let mut open = start(&["--audit", log, "--fail", "open"]);
    assert_eq!(open.does(&[decode(&tokens[0], 0, 0)])[0][0], 0, "{}", open.log());
    assert!(open.log().contains("NOT ON RECORD"), "{}", open.log());
    assert_eq!(open.decisions(), first.decisions(), "it is guarded all the same");
    assert_eq!(records(Path::new(log)).len(), 2);
    // Where that is seen before, nothing begins.
    for nowhere in ["none/audit.jsonl", "none/audit-{pid}.jsonl", "tiny.gguf/audit.jsonl", "."] {
        let nowhere = fixture.folder.path().join(nowhere);
        let guards = guards.path().to_str().unwrap();
        let ran = pilotfish(&["attach", "--guards", guards, "--audit", nowhere.to_str().unwrap(), "--", "false"]);
        assert!(ran.code == 2 && ran.stderr.contains("the audit log"), "{ran:?}");
    }
}

/// Of two processes each has its socket; what one leaves that is killed is removed; a child by `fork` has none, and takes none away.
#[test]
fn each_process_has_a_socket_of_its_own_and_leaves_none() {
    let Some(package) = app() else { return };
    let fixture = Fixture::new(&[]);
    let guards = directory(&[&fixture.guard]);
    let runtime = tempfile::tempdir().unwrap();
    let variable = format!("XDG_RUNTIME_DIR={}", runtime.path().display());
    let start = || {
        let through = ["env", &variable];
        App::start_python_with(&package, &fixture.model, 1, Some(guards.path()), &[], &[], &through)
    };
    let none = ctl(runtime.path(), &["status"]);
    assert!(none.code == 2 && none.stderr.contains("no attached process"), "{none:?}");
    let (mut first, mut second) = (start(), start());
    let pids = [first.child.id(), second.child.id()].map(|pid| pid.to_string());
    let folder = runtime.path().join("pilotfish");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let sockets = pids.clone().map(|pid| folder.join(format!("{pid}.sock")));
    assert_eq!((mode(&folder), mode(&sockets[0]), mode(&sockets[1])), (0o700, 0o600, 0o600));
    let several = ctl(runtime.path(), &["status"]);
    assert!(several.code == 2 && pids.iter().all(|pid| several.stderr.contains(pid)), "{several:?}");
    assert!(several.stderr.contains("app.py"), "{several:?}");
    let shown = ctl(runtime.path(), &["status", "--pid", &pids[1]]);
    assert!(shown.stdout.starts_with(&format!("process {}: ", pids[1])), "{shown:?}");
    assert!(shown.stdout.contains("app.py") && shown.stdout.contains("shark-gate"), "{shown:?}");
    let unknown = ctl(runtime.path(), &["status", "--pid", "1"]);
    assert!(unknown.code == 2 && unknown.stderr.contains("process 1 is not attached"), "{unknown:?}");

    assert_eq!(first.does(&[json!(["fork"])]), [json!(0)], "{}", first.log());
    assert!(sockets[0].exists());
    second.child.kill().unwrap();
    second.child.wait().unwrap();
    assert!(sockets[1].exists(), "nothing could remove it");
    let only = ctl(runtime.path(), &["status", "--json"]);
    assert_eq!(json_line(only.stdout.trim())["pid"].to_string(), pids[0]);
    assert!(!sockets[1].exists());
    // One that comes to its end takes its socket along.
    first.hang_up();
    assert!(first.child.wait().unwrap().success());
    assert!(!sockets[0].exists());
    let named = ctl(runtime.path(), &["status", "--socket", sockets[0].to_str().unwrap()]);
    assert!(named.code == 2 && named.stderr.contains("there is no socket"), "{named:?}");
}

#[test]
fn a_socket_is_where_it_is_named_or_nowhere() {
    let Some(package) = app() else { return };
    let fixture = Fixture::new(&[]);
    let guards = directory(&[&fixture.guard]);
    let path = fixture.folder.path().join("control.sock");
    let named = path.to_str().unwrap();
    let start =
        |more: &[&str]| App::start_python_with(&package, &fixture.model, 1, Some(guards.path()), &[], more, &[]);
    // What a process left that is no more is taken over, and what somebody uses is not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let first = start(&["--control", named]);
    let second = start(&["--control", named]);
    assert!(second.log().contains("another process listens there"), "{}", second.log());
    let asked = ctl(second.folder.path(), &["status", "--socket", named, "--json"]);
    assert_eq!(json_line(asked.stdout.trim())["pid"], first.child.id());
    let mut none = start(&["--no-control"]);
    assert!(!none.folder.path().join("pilotfish").exists());
    let (_, tokens) = prompts(fixture.folder.path(), fixture.model(), &TEXTS[..1]);
    assert_eq!(none.does(&[decode(&tokens[0], 0, 0)])[0][0], 0);
    assert_eq!(none.decisions().len(), 1);
}

/// Whatever comes in over the socket, the app goes on, and others are answered.
#[test]
fn bad_requests_and_slow_clients_harm_nobody() {
    let Some(package) = app() else { return };
    let fixture = Fixture::new(&[]);
    let guards = directory(&[&fixture.guard]);
    let (_, tokens) = prompts(fixture.folder.path(), fixture.model(), &TEXTS[..1]);
    let mut app = App::start_python(&package, &fixture.model, 1, Some(guards.path()), &[]);
    let socket = socket_of(&app);
    let connect = || UnixStream::connect(&socket).unwrap();
    let stream = connect();
    let mut answers = BufReader::new(&stream);
    let mut ask = |line: &str| {
        writeln!(&stream, "{line}").unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        json_line(answer.trim())
    };
    // One after another, on one connection.
    for (line, said) in [
        ("", "is no JSON"),
        ("[1", "is no JSON"),
        ("{}", "has no `version`"),
        (r#"{"version":2,"request":"status"}"#, "is of version 2, and this process knows 1"),
        (r#"{"version":1,"request":"stop"}"#, "unknown variant `stop`"),
        (r#"{"version":1,"request":"status","more":1}"#, "unknown field `more`"),
        (r#"{"version":1,"request":{"toggle":{"guard":"shark-gate","on":true}}}"#, "unknown field `on`"),
        (r#"{"version":1,"request":{"toggle":{"guard":"shark-gate"}}}"#, "nothing is to be changed"),
        (
            r#"{"version":1,"request":{"toggle":{"guard":"shark-gate","interventions":{"a":"loud"}}}}"#,
            "`loud` is no setting",
        ),
    ] {
        let answer = ask(line);
        let error = answer["answer"]["error"].as_str().unwrap_or_else(|| panic!("{line}: {answer}"));
        assert!(error.contains(said), "{line}: {error}");
    }
    assert_eq!(ask(r#"{"version":1,"request":"status"}"#)["answer"]["status"]["in_force"]["epoch"], 0);
    // A line without an end.
    let endless = connect();
    let part = vec![b'x'; 1 << 20];
    while (&endless).write_all(&part).is_ok() {}
    // As many as are answered at once, and none of them says anything.
    let silent: Vec<UnixStream> = (0..8).map(|_| connect()).collect();
    let began = Instant::now();
    let mut refused = Some(ctl(app.folder.path(), &["status"]).stderr);
    assert_eq!(app.does(&[decode(&tokens[0], 0, 0)])[0][0], 0, "{}", app.log());
    while began.elapsed() < Duration::from_secs(60) {
        let ran = ctl(app.folder.path(), &["status"]);
        if ran.code == 0 {
            break;
        }
        refused = Some(ran.stderr);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(
        refused.as_ref().is_some_and(|why| why.contains("clients are being answered")),
        "there was room: {refused:?}"
    );
    assert_eq!(ctl(app.folder.path(), &["status"]).code, 0, "silent clients keep their places");
    drop(silent);
    // One that hangs up before its answer.
    for _ in 0..3 {
        writeln!(connect(), r#"{{"version":1,"request":"metrics"}}"#).unwrap();
    }
    app.does(&[json!(["remove", 0, -1, -1]), decode(&tokens[0], 0, 0)]);
    assert_eq!(asked(&app, &["status"])["counts"]["prompts"], 2);
}
