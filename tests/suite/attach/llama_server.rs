//! llama.cpp's own server, its `llama-completion` and its `llama-cli`, attached as they are.

use super::{HARM_GATE, MESSAGE, directory, library, prompts, required};
use crate::real::{SMALL, located};
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const SLOTS: usize = 4;
/// Of a harmless answer, as many as are said alike however prompts are batched.
const N_PREDICT: usize = 12;

/// Prompts of a kind, `harmless` or `harmful`.
fn asked(kind: &str) -> Vec<String> {
    let all: Value = serde_json::from_str(include_str!("../../attach/prompts.json")).unwrap();
    serde_json::from_value(all[kind].clone()).unwrap()
}

/// Where a tool of llama.cpp's is, as `make test` builds it; `None`, and a word of it, where it or the library is not.
fn tool(name: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/llama-server/bin");
    let path = std::env::var_os("PILOTFISH_TEST_LLAMA_SERVER").map_or(folder, PathBuf::from).join(name);
    required(&[&library(), &path], "make attach llama-server").then_some(path)
}

/// `tool`, under `guards` if they are given.
fn attached(tool: &Path, guards: Option<&Path>) -> Command {
    let Some(guards) = guards else { return Command::new(tool) };
    let mut command = Command::new(env!("CARGO_BIN_EXE_pilotfish"));
    command.arg("attach").arg("--guards").arg(guards).arg("--").arg(tool);
    command.env("PILOTFISH_LOG", "pilotfish=debug,pilotfish_attach=debug");
    command
}

struct Server {
    child: Child,
    address: String,
    log: PathBuf,
    /// How long the log was when it was ready: llama.cpp tries the model out before.
    before: usize,
    _folder: TempDir,
}

impl Server {
    fn start(tool: &Path, model: &Path, guards: Option<&Path>, options: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = attached(tool, guards);
        command.arg("--model").arg(model).args(["--host", "127.0.0.1", "--port", &port]);
        command.args([
            "--parallel",
            &SLOTS.to_string(),
            "--ctx-size",
            "2048",
            "--threads",
            "1",
            "--threads-batch",
            "1",
        ]);
        command.args(["--no-ui", "--log-verbosity", "2"]).args(options);
        let log_file = std::fs::File::create(&log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file).spawn().unwrap();
        let address = format!("http://127.0.0.1:{port}");
        let mut server = Self { child, address, log, before: 0, _folder: folder };
        let began = Instant::now();
        while ureq::get(format!("{}/health", server.address)).call().is_err() {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < Duration::from_secs(180), "{ended:?}: {}", server.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        server.before = server.log().len();
        server
    }

    /// What it says to a prompt, and whether it came to its end.
    fn answer(&self, tokens: &[i64]) -> (String, bool) {
        // Of a message there must be all.
        let body = json!({ "prompt": tokens, "n_predict": N_PREDICT + 20, "temperature": 0, "top_k": 1 });
        let url = format!("{}/completion", self.address);
        let answer = ureq::post(url).content_type("application/json").send(body.to_string());
        let answer = answer.unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        let answer: Value = serde_json::from_str(&answer.into_body().read_to_string().unwrap()).unwrap();
        (answer["content"].as_str().unwrap().to_owned(), answer["stop_type"] == "eos")
    }

    /// What it says to each prompt, asked by as many clients as it has slots, for so many rounds.
    fn answers_at_once(&self, tokens: &[Vec<i64>], rounds: usize) -> Vec<Vec<(String, bool)>> {
        let (next, answers) = (AtomicUsize::new(0), Mutex::new(vec![Vec::new(); tokens.len()]));
        let client = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(step) = [1, 5, 7, 11][..rounds].get(number / tokens.len()) else { return };
                // Other neighbours in each round.
                let index = number * step % tokens.len();
                let answer = self.answer(&tokens[index]);
                answers.lock().unwrap()[index].push(answer);
            }
        };
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..SLOTS).map(|_| scope.spawn(client)).collect();
            clients.into_iter().for_each(|client| client.join().unwrap());
        });
        answers.into_inner().unwrap()
    }

    /// What it has written to its standard error since it was ready.
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap().split_off(self.before)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first words of an answer: what comes later may hang on how prompts were batched.
fn beginning(text: &str) -> String {
    text.split_inclusive(' ').take(N_PREDICT / 2).collect()
}

/// Harmful and harmless prompts in all slots at once, for many rounds: a gate that fires in one opens in no other, and whoever asks the harmless is answered as if there were no guard.
#[test]
fn slots_of_llama_server_are_guarded_each_for_itself() {
    let (Some(tool), Some(model)) = (tool("llama-server"), located(SMALL)) else { return };
    let guards = directory(&[Path::new(HARM_GATE)]);
    let (harmless, harmful) = (asked("harmless"), asked("harmful"));
    let texts: Vec<&str> = harmless.iter().chain(&harmful).map(String::as_str).collect();
    let (_, tokens) = prompts(guards.path(), SMALL, &texts);
    for (options, exactly) in [
        (&["--cache-ram", "0", "--no-cache-prompt"][..], true),
        // A slot goes on behind what it has in common with the prompt before.
        (&["--cache-ram", "0"], true),
        // Prompts in parts, between tokens of others' answers, in cells that all share: numbers differ from time to time as batches do.
        (&["--cache-ram", "0", "--kv-unified", "--batch-size", "16", "--ubatch-size", "16"], false),
    ] {
        let plain = Server::start(&tool, &model, None, options);
        let unguarded = if exactly { plain.answers_at_once(&tokens, 2) } else { Vec::new() };
        drop(plain);
        let server = Server::start(&tool, &model, Some(guards.path()), options);
        let rounds = 4;
        let mut n_alike = 0;
        for (index, answers) in server.answers_at_once(&tokens, rounds).iter().enumerate() {
            let asked = texts[index];
            if index >= harmless.len() {
                assert!(answers.iter().all(|answer| answer == &(MESSAGE.to_owned(), true)), "{asked}: {answers:?}");
                continue;
            }
            assert!(!answers.iter().any(|(text, _)| text.contains(MESSAGE)), "{options:?}: {asked}: {answers:?}");
            // Where the server by itself says one thing, however its prompts were batched.
            let Some([first, others @ ..]) = unguarded.get(index).map(Vec::as_slice) else { continue };
            let expected = beginning(&first.0);
            if others.iter().all(|(text, _)| beginning(text) == expected) {
                assert!(answers.iter().all(|(text, _)| beginning(text) == expected), "{expected}: {answers:?}");
                n_alike += 1;
            }
        }
        assert!(!exactly || n_alike >= harmless.len() / 2, "{n_alike}: what is said hangs on how prompts are batched");
        let log = server.log();
        let count = |what: &str| log.lines().filter(|line| line.contains(": gate ") && line.contains(what)).count();
        assert_eq!((count("fired=true"), count("fired=false")), (rounds * harmful.len(), rounds * harmless.len()));
        assert!(!log.contains("count as fired"), "{log}");
    }
}

/// What is changed while the server runs is for the next prompt, also where slots keep what it has in common with the last.
#[test]
fn guards_reload_inside_llama_server() {
    let (Some(tool), Some(model)) = (tool("llama-server"), located(SMALL)) else { return };
    let guards = directory(&[Path::new(HARM_GATE)]);
    let (_, tokens) = prompts(guards.path(), SMALL, &[&asked("harmful")[1], &asked("harmless")[1]]);
    let manifest = guards.path().join("harm-gate-gemma3-to-smollm2/guard.toml");
    let written = std::fs::read_to_string(&manifest).unwrap();
    for option in ["--no-cache-prompt", "--cache-prompt"] {
        std::fs::write(&manifest, &written).unwrap();
        let server =
            Server::start(&tool, &model, Some(guards.path()), &["--cache-ram", "0", "--parallel", "1", option]);
        let harmless = server.answer(&tokens[1]).0;
        assert_eq!(server.answer(&tokens[0]).0, MESSAGE);
        std::fs::write(&manifest, written.replace(MESSAGE, "No.")).unwrap();
        let began = Instant::now();
        while !server.log().contains("epoch 1: guarded by") {
            assert!(began.elapsed() < Duration::from_secs(60), "{}", server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        // The same prompt, of which all but the last token is there.
        assert_eq!(server.answer(&tokens[0]).0, "No.", "{option}");
        assert_eq!(server.answer(&tokens[1]).0, harmless, "{option}");
        assert!(!server.log().contains("read under other guards, which stay in force"), "{}", server.log());
    }
}

/// What one of llama.cpp's own tools says to a prompt, and its log.
fn says(tool: &Path, model: &Path, more: &[&str], prompt: &str, guards: Option<&Path>) -> (String, String) {
    let mut command = attached(tool, guards);
    command.arg("--model").arg(model).args(["--prompt", prompt, "--single-turn", "--simple-io"]).args(more);
    command.args(["--temp", "0", "--predict", "20", "--ctx-size", "512", "--threads", "1"]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{log}");
    (String::from_utf8(output.stdout).unwrap(), log)
}

#[test]
fn llama_completion_is_guarded_as_it_is() {
    let (Some(tool), Some(model)) = (tool("llama-completion"), located(SMALL)) else { return };
    let guards = directory(&[Path::new(HARM_GATE)]);
    let says = |prompt: &str, guards| says(&tool, &model, &["--no-display-prompt"], prompt, guards);
    let (harmless, harmful) = (&asked("harmless")[1], &asked("harmful")[1]);
    let (alone, attached) = (says(harmless, None), says(harmless, Some(guards.path())));
    assert_eq!(attached.0, alone.0);
    assert!(attached.1.contains("guarded by harm-gate") && attached.1.contains("fired=false"), "{}", attached.1);
    let (alone, attached) = (says(harmful, None), says(harmful, Some(guards.path())));
    assert!(attached.0.contains(MESSAGE), "{attached:?}");
    assert!(!alone.0.contains(MESSAGE), "{alone:?}");
}

/// It runs the server in a thread of its own, and asks it.
#[test]
fn llama_cli_is_guarded_as_it_is() {
    let (Some(tool), Some(model)) = (tool("llama-cli"), located(SMALL)) else { return };
    let guards = directory(&[Path::new(HARM_GATE)]);
    let says = |prompt: &str, guards| says(&tool, &model, &["--cache-ram", "0", "--no-warmup"], prompt, guards);
    let harmful = &asked("harmful")[1];
    let (alone, attached) = (says(harmful, None), says(harmful, Some(guards.path())));
    assert!(attached.0.contains(MESSAGE) && attached.1.contains("guarded by harm-gate"), "{attached:?}");
    assert!(!alone.0.contains(MESSAGE), "{alone:?}");
    let attached = says(&asked("harmless")[1], Some(guards.path()));
    assert!(!attached.0.contains(MESSAGE) && attached.1.contains("fired=false"), "{attached:?}");
}
