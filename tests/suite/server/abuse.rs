//! What is too large, too slow, too much or nonsense: bounded, and answered as stated.

use super::*;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

fn small(fixture: &Fixture, extra: &[(&str, &str)]) -> Server {
    let mut environment = vec![
        ("PILOTFISH_SERVE__LIMITS__BODY_BYTES", "4096"),
        ("PILOTFISH_SERVE__LIMITS__READ_SECONDS", "1"),
        ("PILOTFISH_SERVE__LIMITS__PARALLEL", "1"),
        ("PILOTFISH_SERVE__LIMITS__QUEUE", "2"),
    ];
    environment.extend_from_slice(extra);
    Server::start_with(&["--model", fixture.model()], &environment)
}

#[test]
fn bodies_are_bounded_and_read_with_care() {
    let fixture = Fixture::new(&[]);
    let server = small(&fixture, &[]);
    let post = |body: &[u8]| server.request("POST", "/v1/completions", None, body);
    // What is too large is let go, so that who sends it hears of it and does not find a broken connection.
    for n_bytes in [5000, 30_000] {
        let large = post(&vec![b' '; n_bytes]);
        assert_eq!((large.status, large.error()["code"].as_str()), (413, Some("body_too_large")));
    }
    for nonsense in [
        &b""[..],
        b"{",
        b"\"text\"",
        b"{\"prompt\": \"\xff\xfe\"}",
        "[".repeat(4000).as_bytes(),
        b"{\"prompt\": 1e999}",
    ] {
        let answer = post(nonsense);
        assert_eq!(
            (answer.status, answer.error()["type"].as_str()),
            (400, Some("invalid_request_error")),
            "{answer:?}"
        );
    }
    server.done("/v1/completions", &greedy("sea"));
}

#[test]
fn slow_clients_are_cut_off_and_hinder_nobody() {
    let fixture = Fixture::new(&[]);
    let server = small(&fixture, &[]);
    // A head that never ends, a body that never comes, and connections on which nothing is said.
    let mut head = server.connect();
    head.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: te").unwrap();
    let mut body = server.connect();
    body.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{").unwrap();
    let quiet: Vec<_> = (0..50).map(|_| server.connect()).collect();
    server.done("/v1/completions", &greedy("sea"));
    let mut said = String::new();
    let _ = head.read_to_string(&mut said);
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 408"), "{said}");
    body.write_all(b" ").ok();
    let mut buffer = [0; 4096];
    let n = body.read(&mut buffer).unwrap();
    assert!(String::from_utf8_lossy(&buffer[..n]).starts_with("HTTP/1.1 408"));
    for mut stream in quiet {
        let ended = stream.read_to_string(&mut String::new());
        let waited = |error: &std::io::Error| [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind());
        assert!(!ended.as_ref().is_err_and(waited), "a quiet connection is not ended: {ended:?}");
    }
}

/// A form that nothing ends before it has all of its 3500 tokens.
fn endless() -> Value {
    let schema =
        json!({ "type": "object", "properties": { "a": { "type": "string", "minLength": 3500 } }, "required": ["a"] });
    json!({ "type": "json_schema", "json_schema": { "schema": schema } })
}

/// Requests that take `n` places and don't end before they are hung up.
pub fn hold_places(server: &Server, n: usize) -> Vec<std::net::TcpStream> {
    // What nobody reads fills the connection, and the place is held all the same.
    let long =
        json!({ "prompt": "sea", "max_tokens": 3000, "stream": true, "response_format": endless(), "logprobs": 20 });
    let long = long.to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{long}", long.len());
    let hold = |_| {
        let mut stream = server.connect();
        stream.write_all(head.as_bytes()).unwrap();
        // Its answer has begun: it has a place.
        let mut first = [0; 1];
        stream.read_exact(&mut first).unwrap();
        stream
    };
    (0..n).map(hold).collect()
}

#[test]
fn more_than_may_wait_is_told_to_come_again() {
    let fixture = Fixture::new(&[]);
    let server = small(&fixture, &[]);
    let held = hold_places(&server, 3);
    let refused = server.post("/v1/completions", &greedy("sea"));
    assert_eq!((refused.status, refused.error()["code"].as_str()), (429, Some("queue_full")), "{refused:?}");
    assert!(refused.headers["retry-after"].parse::<u64>().unwrap() >= 1);
    assert_eq!(server.get("/ready").status, 503);
    // Whoever hangs up gives his place back, and the model does not go on for him.
    held.iter().for_each(hang_up);
    server.until("room", |_| server.get("/ready").status == 200);
    server.done("/v1/completions", &greedy("sea"));
}

/// Ten thousand at once, to a server that lets all of them wait and to one that has no place left.
#[cfg(unix)]
#[test]
fn ten_thousand_requests_at_once_are_each_answered() {
    // Each takes a file here and one at the server.
    let allowed = rlimit::increase_nofile_limit(u64::MAX).unwrap() as usize;
    let n_requests = allowed.saturating_sub(500).min(10_000);
    assert!(n_requests >= 1000, "the system allows {allowed} open files, too few for this test");
    if n_requests < 10_000 {
        eprintln!("only {n_requests} requests: the system allows {allowed} open files");
    }
    let fixture = Fixture::new(&[]);
    let body = json!({ "prompt": "sea", "temperature": 0, "max_tokens": 1 }).to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    for (queue, wanted) in [("10000", 200), ("2", 429)] {
        let limits = [("PILOTFISH_SERVE__LIMITS__QUEUE", queue), ("PILOTFISH_SERVE__LIMITS__PARALLEL", "1")];
        let server = Server::start_with(&["--model", fixture.model()], &limits);
        let held = if wanted == 429 { hold_places(&server, 3) } else { Vec::new() };
        let before = server.memory();
        // Everybody has asked before anybody is heard.
        let ask = |_| {
            let mut stream = server.connect();
            stream.write_all(request.as_bytes()).unwrap();
            stream
        };
        let mut streams: Vec<_> = (0..n_requests).map(ask).collect();
        let mut highest = 0;
        for (n, stream) in streams.iter_mut().enumerate() {
            let answer = answer(stream);
            assert_eq!(answer.status, wanted, "number {n} with a queue of {queue}: {answer:?}");
            if wanted == 429 {
                assert_eq!(answer.error()["code"], "queue_full");
                assert!(answer.headers.contains_key("retry-after"));
            }
            if n % 100 == 0 {
                highest = highest.max(server.memory());
            }
        }
        let grown = highest.saturating_sub(before) >> 20;
        assert!(grown < 400, "{grown} MiB for {n_requests} requests");
        held.iter().for_each(hang_up);
        server.until("room", |_| server.get("/ready").status == 200);
        server.done("/v1/completions", &greedy("sea"));
    }
}

/// What a request has brought is let go when it is answered, however long that takes: more of them run and wait than bodies may be in memory.
#[test]
fn a_running_answer_holds_no_place_for_bodies() {
    let fixture = Fixture::new(&[]);
    let server = small(&fixture, &[("PILOTFISH_SERVE__LIMITS__BODIES", "1"), ("PILOTFISH_SERVE__LIMITS__QUEUE", "0")]);
    // Not streamed: its answer is waited for with all of the request at hand.
    let body = json!({ "prompt": "sea", "max_tokens": 3000, "response_format": endless() }).to_string();
    let mut running = server.connect();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    running.write_all(head.as_bytes()).unwrap();
    server.until("a request", |_| server.get("/metrics").body.contains("pilotfish_requests_running 1"));
    let refused = server.post("/v1/completions", &greedy("sea"));
    assert_eq!((refused.status, refused.error()["code"].as_str()), (429, Some("queue_full")), "{refused:?}");
    hang_up(&running);
}

#[test]
fn it_is_open_to_other_machines_only_with_keys() {
    let fixture = Fixture::new(&[]);
    let ran = crate::support::pilotfish(&["serve", "--model", fixture.model(), "--listen", "0.0.0.0:0"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("no keys"), "{}", ran.stderr);
}

/// Whatever has been answered is on record, whenever the server is killed.
#[cfg(unix)]
#[test]
fn a_killed_server_has_written_down_what_it_answered() {
    let fixture = Fixture::new(&["--on-fire", "block"]);
    let guards = directory(&fixture, &["sharks"]);
    let log = fixture.folder.path().join("audit.jsonl");
    let arguments = ["--model", fixture.model(), "--guards", text(&guards), "--audit", text(&log)];
    let mut answered = Vec::new();
    for round in 0..3 {
        let server = Server::start(&arguments);
        for n in 0..=round {
            let answer = server.done("/v1/completions", &greedy(&"pilot fish sea ".repeat(n + 1)));
            answered.push(answer["id"].as_str().unwrap().to_owned());
        }
        server.signal("KILL");
        server.wait();
    }
    let records = std::fs::read_to_string(&log).unwrap();
    let records: Vec<Value> = records.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<_> = records.iter().filter_map(|record| record["record"]["id"].as_str()).collect();
    assert_eq!(ids, answered);
    let gates = |record: &Value| record["record"]["choices"][0]["gates"].as_array().map_or(0, Vec::len);
    assert!(records.iter().filter(|record| record["record"]["event"] == "answer").all(|record| gates(record) == 1));
    let checked = crate::support::done(&["audit", "--json", text(&log)]);
    assert_eq!(serde_json::from_str::<Value>(&checked).unwrap()["records"], records.len());
    // No words of the prompt's.
    assert!(!std::fs::read_to_string(&log).unwrap().contains("pilot fish"));
    let edited = std::fs::read_to_string(&log).unwrap().replacen("\"event\":\"answer\"", "\"event\":\"change\"", 1);
    std::fs::write(&log, edited).unwrap();
    let ran = crate::support::pilotfish(&["audit", text(&log)]);
    assert!(ran.code == 2 && ran.stderr.contains("edited"), "{}", ran.stderr);
}

#[test]
fn the_configuration_is_layered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.toml");
    std::fs::write(&path, "model = \"a\"\nlisten = \"127.0.0.1:1\"\n[limits]\nqueue = 3\nparallel = 2\n").unwrap();
    let print = |arguments: &[&str], environment: &[(&str, &str)]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_pilotfish"))
            .args(["serve", "--print-config", "--config", text(&path)])
            .args(arguments)
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap(), output.status.code())
    };
    let (printed, _, code) = print(
        &["--parallel", "9"],
        &[("PILOTFISH_SERVE__LIMITS__QUEUE", "5"), ("PILOTFISH_SERVE__LIMITS__PARALLEL", "4")],
    );
    let printed: toml::Table = printed.parse().unwrap();
    assert_eq!(code, Some(0));
    assert_eq!(
        (
            printed["model"].as_str(),
            printed["limits"]["queue"].as_integer(),
            printed["limits"]["parallel"].as_integer()
        ),
        (Some("a"), Some(5), Some(9))
    );
    // What is printed is a configuration.
    std::fs::write(&path, printed.to_string()).unwrap();
    assert_eq!(print(&[], &[]).2, Some(0));
    std::fs::write(&path, "model = \"a\"\n[limits]\nqeue = 3\n").unwrap();
    let (_, error, code) = print(&[], &[]);
    assert_eq!(code, Some(2));
    assert!(error.contains("qeue") && error.contains("server.toml"), "{error}");
}

/// What a client has read before it hung up is on record too.
#[test]
fn who_hangs_up_is_on_record() {
    let fixture = Fixture::new(&["--on-fire", "block"]);
    let guards = directory(&fixture, &["sharks"]);
    let log = fixture.folder.path().join("audit.jsonl");
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards), "--audit", text(&log)]);
    for stream in [true, false] {
        let prompt = "pilot fish sea sea sea";
        let body = json!({ "messages": [{ "role": "user", "content": prompt }], "stream": stream, "response_format": endless() });
        let body = body.to_string();
        let head =
            format!("POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len());
        let mut client = server.connect();
        client.write_all((head + &body).as_bytes()).unwrap();
        server.until("a request", |_| server.get("/metrics").body.contains("pilotfish_requests_running 1"));
        hang_up(&client);
        server.until("its end", |_| server.get("/metrics").body.contains("pilotfish_requests_running 0"));
    }
    let begun = Instant::now();
    let records = loop {
        let log = std::fs::read_to_string(&log).unwrap();
        let records: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        if records.len() == 3 {
            break records;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{log}");
        std::thread::sleep(Duration::from_millis(20));
    };
    for record in &records[1..] {
        let record = &record["record"];
        assert_eq!(record["error"], "the client hung up");
        let choice = &record["choices"][0];
        assert_eq!(
            (choice["finish_reason"].as_str(), choice["gates"][0]["fired"].as_bool()),
            (Some("cancelled"), Some(false))
        );
        assert!(choice["answer_tokens"].as_u64().unwrap() < 3500);
    }
}
