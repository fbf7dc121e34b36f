//! Guards that change while the server serves.

use super::*;
use std::time::Duration;

/// The text of a greedy completion, and the epoch that it was written in.
fn said(server: &Server) -> (String, u64) {
    let answer = server.done("/v1/completions", &greedy("the sea sea"));
    (answer["choices"][0]["text"].as_str().unwrap().to_owned(), answer["guard"]["epoch"].as_u64().unwrap())
}

fn strength(from: &str, to: &str) -> impl Fn(String) -> String {
    let (from, to) = (format!("strength = {from}"), format!("strength = {to}"));
    move |text| {
        assert!(text.contains(&from), "no `{from}` in\n{text}");
        text.replace(&from, &to)
    }
}

#[test]
fn a_guard_that_is_rewritten_is_in_force_and_a_broken_one_is_not() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    let manifest = guards.join("steer/guard.toml");
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards)]);
    let (first, epoch) = said(&server);
    assert_eq!(epoch, 1);

    replace(&manifest, strength("4.0", "-4.0"));
    server.until("epoch 2", |health| health["epoch"] == 2);
    let (second, epoch) = said(&server);
    assert_eq!(epoch, 2);
    assert_ne!(first, second);

    let whole = std::fs::read_to_string(&manifest).unwrap();
    replace(&manifest, |text| text + "\nnonsense = 1\n");
    let health = server.until("a problem", |health| health["status"] == "degraded");
    assert_eq!(health["epoch"], 2);
    let problem = health["problems"]["steer"].as_str().unwrap();
    assert!(problem.contains("nonsense") && problem.contains("guard.toml"), "{problem}");
    assert_eq!(said(&server), (second.clone(), 2));
    assert!(server.log().contains("nonsense"), "{}", server.log());
    assert!(server.get("/metrics").body.contains("pilotfish_reloads_total{outcome=\"refused\"} 1"));

    // As it was: nothing is new.
    replace(&manifest, |_| whole);
    server.until("no problem", |health| health["status"] == "ok");
    assert_eq!(said(&server), (second, 2));

    replace(&manifest, strength("-4.0", "4.0"));
    server.until("epoch 3", |health| health["epoch"] == 3);
    assert_eq!(said(&server), (first, 3));
}

#[test]
fn guards_come_and_go_with_their_folders() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards)]);
    let guarded = said(&server).0;
    // In place: file by file, as an editor or a copy does it.
    copy(&fixture.guard, &guards.join("another"));
    let name = |text: String| text.replace("name = \"shark-gate\"", "name = \"second\"");
    replace(&guards.join("another/guard.toml"), name);
    let health = server.until("a second guard", |health| health["guards"] == json!(["second", "shark-gate"]));
    assert_eq!(health["status"], "ok");
    std::fs::remove_dir_all(guards.join("another")).unwrap();
    server.until("one guard", |health| health["guards"] == json!(["shark-gate"]));
    assert_eq!(said(&server).0, guarded);
    std::fs::remove_dir_all(guards.join("steer")).unwrap();
    server.until("no guard", |health| health["guards"] == json!([]));
    let free = said(&server).0;
    assert_ne!(free, guarded);
    // The whole directory is gone: what is in force stays.
    copy(&fixture.guard, &guards.join("steer"));
    server.until("one guard", |health| health["guards"] == json!(["shark-gate"]));
    std::fs::rename(&guards, fixture.folder.path().join("elsewhere")).unwrap();
    let health = server.until("a problem", |health| health["status"] == "degraded");
    assert_eq!(health["guards"], json!(["shark-gate"]));
    std::fs::rename(fixture.folder.path().join("elsewhere"), &guards).unwrap();
    server.until("no problem", |health| health["status"] == "ok");
    assert_eq!(said(&server).0, guarded);
}

/// As Kubernetes mounts a ConfigMap: `steer` → `..data/steer`, `..data` → a dated folder, which is swapped.
#[cfg(unix)]
#[test]
fn links_are_followed_to_what_they_lead_to_now() {
    use std::os::unix::fs::symlink;
    let fixture = steering("4");
    let guards = fixture.folder.path().join("guards");
    copy(&fixture.guard, &guards.join("..2026_a/steer"));
    copy(&fixture.guard, &guards.join("..2026_b/steer"));
    replace(&guards.join("..2026_b/steer/guard.toml"), strength("4.0", "-4.0"));
    symlink("..2026_a", guards.join("..data")).unwrap();
    symlink("..data/steer", guards.join("steer")).unwrap();
    let environment = [("PILOTFISH_SERVE__RELOAD__POLL_MS", "50")];
    let server = Server::start_with(&["--model", fixture.model(), "--guards", text(&guards)], &environment);
    let first = said(&server).0;
    symlink("..2026_b", guards.join("..next")).unwrap();
    std::fs::rename(guards.join("..next"), guards.join("..data")).unwrap();
    server.until("epoch 2", |health| health["epoch"] == 2);
    assert_ne!(said(&server).0, first);
}

#[test]
fn what_an_admin_has_set_outlives_a_reload() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards)]);
    let off = server.patch("/v1/guards/shark-gate", None, &json!({ "enabled": false }));
    assert_eq!(off.status, 200);
    let free = said(&server).0;
    replace(&guards.join("steer/guard.toml"), strength("4.0", "-4.0"));
    let begun = std::time::Instant::now();
    loop {
        let listed = server.get("/v1/guards").json();
        if listed["data"][0]["interventions"][0]["strength_of_guard"] == -4.0 {
            assert_eq!(listed["data"][0]["enabled"], false);
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{listed}");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(said(&server).0, free);
}

#[cfg(unix)]
#[test]
fn signals_reload_and_drain() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    let environment = [("PILOTFISH_SERVE__RELOAD__POLL_MS", "3600000")];
    let server = Server::start_with(&["--model", fixture.model(), "--guards", text(&guards)], &environment);
    server.signal("HUP");
    assert_eq!(said(&server).1, 1);
    // Written in place, as long as before, and said to be as old: the system still knows better.
    let manifest = guards.join("steer/guard.toml");
    let written = std::fs::metadata(&manifest).unwrap().modified().unwrap();
    let text = strength("4.0", "5.0")(std::fs::read_to_string(&manifest).unwrap());
    std::fs::write(&manifest, text).unwrap();
    std::fs::File::options().write(true).open(&manifest).unwrap().set_modified(written).unwrap();
    server.signal("HUP");
    server.until("epoch 2", |health| health["epoch"] == 2);
    // A request that runs is answered to its end.
    let mut stream = server.connect();
    let body = json!({ "prompt": "sea", "temperature": 0, "max_tokens": 400, "stream": true }).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    std::io::Write::write_all(&mut stream, (head + &body).as_bytes()).unwrap();
    // Its answer has begun.
    stream.peek(&mut [0]).unwrap();
    server.signal("TERM");
    let events = answer(&mut stream).events();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert!(server.wait().success());
}

#[test]
fn what_has_become_of_the_guards_is_told() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards)]);
    let history = || server.get("/v1/guard/history").json()["data"].as_array().unwrap().clone();
    let told = |entry: &Value| (entry["event"].as_str().unwrap().to_owned(), entry["epoch"].as_u64().unwrap());
    assert_eq!(history().iter().map(told).collect::<Vec<_>>(), [("start".into(), 1)]);
    let manifest = guards.join("steer/guard.toml");
    replace(&manifest, strength("4.0", "5.0"));
    server.until("epoch 2", |health| health["epoch"] == 2);
    let whole = std::fs::read_to_string(&manifest).unwrap();
    replace(&manifest, |text| text + "\nnonsense = 1\n");
    server.until("a problem", |health| health["status"] == "degraded");
    replace(&manifest, |_| whole);
    server.until("no problem", |health| health["status"] == "ok");
    assert_eq!(server.patch("/v1/guards/steer", None, &json!({ "enabled": false })).status, 200);
    let entries = history();
    let events = [("change", 3), ("reload", 2), ("refused", 2), ("reload", 2), ("start", 1)];
    assert_eq!(
        entries.iter().map(told).collect::<Vec<_>>(),
        events.map(|(event, epoch)| (event.to_owned(), epoch)),
        "{entries:?}"
    );
    let changed: Vec<_> = entries.iter().map(|entry| entry["changed"].clone()).collect();
    assert_eq!(changed, [json!(["steer"]), json!([]), json!([]), json!(["steer"]), json!(["steer"])]);
    assert!(entries[2]["problems"]["steer"].as_str().unwrap().contains("nonsense"), "{:?}", entries[2]);
    assert!(entries.windows(2).all(|two| two[0]["time"].as_f64() >= two[1]["time"].as_f64()));
}

#[cfg(unix)]
#[test]
fn keys_have_limits_and_are_renewed() {
    let fixture = Fixture::new(&[]);
    let path = keys(&fixture, &[("app", "user", "requests_per_minute = 2"), ("lab", "user", "tokens_per_minute = 10")]);
    let server = Server::start(&["--model", fixture.model(), "--keys", text(&path)]);
    let ask =
        |key: &str| server.request("POST", "/v1/completions", Some(key), greedy("the sea").to_string().as_bytes());
    let limited = |answer: &Answer| {
        assert_eq!((answer.status, answer.error()["code"].as_str()), (429, Some("rate_limit_exceeded")), "{answer:?}");
        assert!((1..=60).contains(&answer.headers["retry-after"].parse::<u64>().unwrap()));
    };
    assert_eq!([ask("sk-app").status, ask("sk-app").status], [200, 200]);
    limited(&ask("sk-app"));
    // Twelve tokens are more than ten, and are known when they have been written.
    assert_eq!(ask("sk-lab").status, 200);
    limited(&ask("sk-lab"));
    // One comes, one goes, and one has another limit; what has been used of the other stays used.
    keys(
        &fixture,
        &[("new", "user", ""), ("app", "user", "requests_per_minute = 100"), ("lab", "user", "tokens_per_minute = 10")],
    );
    server.signal("HUP");
    server.until("the new key", |_| ask("sk-new").status == 200);
    assert_eq!(ask("sk-app").status, 200);
    limited(&ask("sk-lab"));
    keys(&fixture, &[("new", "user", "")]);
    server.signal("HUP");
    server.until("an end of the old key", |_| ask("sk-app").status == 401);
    // What is no file of keys leaves the last one in use.
    std::fs::write(&path, "nonsense").unwrap();
    server.signal("HUP");
    server.until("a warning", |_| server.log().contains("the keys stay as they were"));
    assert_eq!(ask("sk-new").status, 200);
}

/// What a drain cuts off is on record all the same.
#[cfg(unix)]
#[test]
fn what_the_end_cuts_off_is_on_record() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    let log = fixture.folder.path().join("audit.jsonl");
    let arguments = ["--model", fixture.model(), "--guards", text(&guards), "--audit", text(&log)];
    let server = Server::start_with(&arguments, &[("PILOTFISH_SERVE__LIMITS__DRAIN_SECONDS", "0")]);
    let held = super::abuse::hold_places(&server, 2);
    server.signal("TERM");
    assert!(server.wait().success());
    drop(held);
    let records = std::fs::read_to_string(&log).unwrap();
    let errors = records.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["record"]["error"].clone());
    assert_eq!(
        errors.collect::<Vec<_>>(),
        [json!(null), json!("the server ended"), json!("the server ended")],
        "{records}"
    );
}

#[test]
fn with_a_guard_that_can_t_be_read_it_does_not_begin() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    replace(&guards.join("steer/guard.toml"), |text| text + "\nnonsense = 1\n");
    let ran = crate::support::pilotfish(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--model",
        fixture.model(),
        "--guards",
        text(&guards),
    ]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("nonsense") && ran.stderr.contains("steer"), "{}", ran.stderr);
}
