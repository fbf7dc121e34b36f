//! Other ways to reach a server.

use super::*;
use std::io::Write;
use std::time::{Duration, Instant};

#[cfg(unix)]
#[test]
fn a_unix_socket_is_its_owners_and_goes_with_the_server() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;
    let fixture = Fixture::new(&[]);
    let path = fixture.folder.path().join("socket");
    let environment = [("PILOTFISH_SERVE__UNIX_SOCKET", text(&path))];
    let arguments = ["--model", fixture.model()];
    for ends_well in [false, true] {
        let server = Server::start_with(&arguments, &environment);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
        assert_eq!(answer(&mut stream).json()["status"], "ok");
        // Killed it leaves its file, which the next one takes over.
        server.signal(if ends_well { "TERM" } else { "KILL" });
        assert_eq!(server.wait().success(), ends_well);
        assert_eq!(path.exists(), !ends_well);
    }
    std::fs::write(&path, "mine").unwrap();
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_pilotfish"))
        .args(["serve", "--listen", "127.0.0.1:0"])
        .args(arguments)
        .envs(environment)
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

#[cfg(unix)]
#[test]
fn https_by_a_certificate_that_is_renewed() {
    use rustls::pki_types::pem::PemObject;
    let fixture = Fixture::new(&[]);
    let [certificate, key] = ["server.pem", "server.key"].map(|name| fixture.folder.path().join(name));
    let issue = || {
        let issued = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&certificate, issued.cert.pem()).unwrap();
        std::fs::write(&key, issued.signing_key.serialize_pem()).unwrap();
        issued.cert.pem()
    };
    let first = issue();
    let environment =
        [("PILOTFISH_SERVE__TLS__CERTIFICATE", text(&certificate)), ("PILOTFISH_SERVE__TLS__KEY", text(&key))];
    let server = Server::start_with(&["--model", fixture.model()], &environment);
    let address = format!("https://localhost:{}/health", server.address.port());
    // Whether a client that trusts this certificate alone is answered.
    let trusts = |pem: &str| {
        let root = ureq::tls::Certificate::from_pem(pem.as_bytes()).unwrap();
        let roots = ureq::tls::RootCerts::new_with_certs(&[root]);
        let tls = ureq::tls::TlsConfig::builder().root_certs(roots).build();
        let agent: ureq::Agent = ureq::Agent::config_builder().tls_config(tls).build().into();
        agent.get(&address).call().is_ok_and(|answer| answer.status() == 200)
    };
    let patiently = |what: &str, done: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what} does not come: {}", server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // What clients are offered that take HTTP/2 where they get it.
    let negotiated = |pem: &str| {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        let certificate = rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        roots.add(certificate).unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut config = builder.unwrap().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let name = "localhost".try_into().unwrap();
        let mut tls = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
        let mut stream = server.connect();
        while tls.is_handshaking() {
            tls.complete_io(&mut stream).unwrap();
        }
        tls.alpn_protocol().map(<[u8]>::to_vec)
    };
    assert!(trusts(&first));
    assert_eq!(negotiated(&first).as_deref(), Some(&b"http/1.1"[..]));
    let second = issue();
    assert!(!trusts(&second));
    server.signal("HUP");
    patiently("the new certificate", &|| trusts(&second));
    assert!(!trusts(&first));
    assert_eq!(negotiated(&second).as_deref(), Some(&b"http/1.1"[..]));
    // One that is none leaves the one that is in use.
    std::fs::write(&certificate, "nonsense").unwrap();
    server.signal("HUP");
    patiently("a warning", &|| server.log().contains("not renewed"));
    assert!(trusts(&second));
}

#[test]
fn the_pages_are_in_the_binary() {
    let fixture = Fixture::new(&[]);
    let server = Server::start(&["--model", fixture.model()]);
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/dashboard/app.js", "text/javascript; charset=utf-8"),
        ("/dashboard/style.css", "text/css; charset=utf-8"),
        ("/openapi.json", "application/json"),
    ] {
        let answer = server.get(path);
        assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, kind), "{path}");
        assert!(answer.headers["content-security-policy"].starts_with("default-src 'none'; script-src 'self'"));
        // Nothing comes from elsewhere, and the policy would refuse it.
        assert!(!answer.body.contains("src=\"http") && !answer.body.contains("@import"), "{path}");
    }
    let page = server.get("/").body;
    assert!(!page.contains("<style") && !page.contains(" style=") && !page.contains(" onclick="));
    for file in ["/dashboard/app.js", "/dashboard/style.css"] {
        assert!(page.contains(file), "{file}");
    }
    // Each address that the document has is one, and takes each method that it has.
    let document = server.get("/openapi.json").json();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "tiny");
        for method in methods.as_object().unwrap().keys().filter(|key| ["get", "post", "patch"].contains(&key.as_str()))
        {
            let answer = server.request(&method.to_uppercase(), &path, None, b"{}");
            assert!(![405].contains(&answer.status), "{method} {path}: {answer:?}");
            let nothing = answer.status == 404 && answer.body.contains("nothing at this address");
            assert!(!nothing, "{method} {path}: {answer:?}");
        }
    }
}

/// As a collector hears of answers: OTLP's messages, whose strings stand in them as they are.
#[cfg(feature = "otel")]
#[test]
fn answers_are_spans_of_the_requests_trace() {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::sync::{Arc, Mutex};
    let collector = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", collector.local_addr().unwrap());
    let received: Arc<Mutex<Vec<u8>>> = Arc::default();
    let all = Arc::clone(&received);
    std::thread::spawn(move || {
        for stream in collector.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut head = String::new();
            while reader.read_line(&mut head).unwrap() > 2 {}
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("content-length").then(|| value.parse().unwrap())
            });
            let mut body = vec![0; length.unwrap()];
            reader.read_exact(&mut body).unwrap();
            assert!(head.starts_with("POST /v1/traces "), "{head}");
            all.lock().unwrap().extend_from_slice(&body);
            let _ = reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    let fixture = Fixture::new(&["--on-fire", "block"]);
    let guards = directory(&fixture, &["sharks"]);
    let environment = [("PILOTFISH_SERVE__TELEMETRY__OTLP", address.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "50")];
    let server = Server::start_with(&["--model", fixture.model(), "--guards", text(&guards)], &environment);
    let heard = |what: &[u8]| received.lock().unwrap().windows(what.len()).any(|window| window == what);
    let until = |what: &[u8]| {
        server.until("a span", |_| heard(what));
    };
    let body =
        json!({ "messages": [{ "role": "user", "content": "shark sea sea sea sea" }], "max_tokens": 4 }).to_string();
    let trace: Vec<u8> = (1..=16).collect();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ntraceparent: 00-0102030405060708090a0b0c0d0e0f10-00000000000000ff-01\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = server.connect();
    stream.write_all((head + &body).as_bytes()).unwrap();
    let id = answer(&mut stream).json()["id"].as_str().unwrap().to_owned();
    until(id.as_bytes());
    for what in
        ["chat tiny", "gen_ai.usage.input_tokens", "content_filter", "pilotfish.score", "shark-gate", "service.name"]
    {
        assert!(heard(what.as_bytes()), "{what}");
    }
    assert!(heard(&trace) && !heard(b"shark sea"));
    // The last of them go out at the end.
    let last = server.done("/v1/completions", &greedy("the sea"))["id"].as_str().unwrap().to_owned();
    server.signal("TERM");
    assert!(server.wait().success());
    assert!(heard(last.as_bytes()));
    // Where nobody listens, answers come all the same.
    let nobody = [("PILOTFISH_SERVE__TELEMETRY__OTLP", "http://127.0.0.1:9")];
    let alone = Server::start_with(&["--model", fixture.model()], &nobody);
    alone.done("/v1/completions", &greedy("the sea"));
}
