//! An app whose model is on a GPU: node-llama-cpp with its own build for Vulkan, on whatever device there is, Mesa's software driver too.

use super::{App, app, directory, json_line, one_by_one, prompts, required};
use crate::support::{Fixture, done};
use std::path::{Path, PathBuf};

/// What runs a program with Vulkan's driver, as `make test` sets it up; `None`, and a word of it, where it or the app is not.
fn with_driver() -> Option<PathBuf> {
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/vulkan-run/run");
    let run = std::env::var_os("PILOTFISH_TEST_VULKAN_RUN").map_or(run, PathBuf::from);
    required(&[&run], "make vulkan-driver").then_some(run)
}

/// Node.js with Vulkan's driver, which also starts itself so: node-llama-cpp tries its binary out in a process of its own.
fn node(run: &Path, folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("node");
    let script = format!("#!/bin/sh\nexport NODE_COMMAND='{}'\nexec '{}' node \"$@\"\n", path.display(), run.display());
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Residuals are read and patched where they lie. The products of a GPU are less exact than those of a CPU, so that scores are only nearly the same.
#[test]
fn an_attached_app_on_a_gpu_decides_and_says_what_pilotfish_does() {
    let (Some(package), Some(run)) = (app(), with_driver()) else { return };
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "3"]);
    let guards = directory(&[&fixture.guard]);
    let texts = ["shark sea sea", "pilot fish sea", "the sea of the shark", "shark", "a fish in the sea sea sea"];
    let (path, tokens) = prompts(fixture.folder.path(), fixture.model(), &texts);
    let (model, guard) = (fixture.model(), fixture.guard());
    let says = |more: &[&str]| {
        done(&[&["run", "--model", model, "--prompts", &path, "--max-tokens", "12", "--json"], more].concat())
    };
    let (guarded, plain) = (says(&["--guard", guard]), says(&[]));
    let node = node(&run, fixture.folder.path());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/attach/app.js");
    let command = [node.as_os_str(), script.as_ref(), model.as_ref(), "1".as_ref(), "1".as_ref(), "vulkan".as_ref()];
    let alone = one_by_one(&mut App::run(&command, &package, None, &[]), &tokens, 12);
    let mut app = App::run(&command, &package, Some(guards.path()), &[]);
    let answers = one_by_one(&mut app, &tokens, 12);
    let decisions = app.decisions();
    assert_eq!(decisions.len(), texts.len(), "{}", app.log());
    let (mut fired, mut changed) = (0, 0);
    for ((((line, plain), answer), alone), (_, score, has_fired)) in
        guarded.lines().zip(plain.lines()).zip(&answers).zip(&alone).zip(decisions)
    {
        let (expected, plain) = (json_line(line), json_line(plain));
        let gate = &expected["gates"]["sharks"];
        assert_eq!(gate["fired"], has_fired, "{expected}\n{}", app.log());
        let expected_score = gate["score"].as_f64().unwrap();
        assert!((score - expected_score).abs() <= 2e-2 * expected_score.abs(), "{score}, expected {expected_score}");
        // What no gate fires on is what the app says alone, and the rest what it says on the CPU.
        let said = if has_fired { expected["text"].as_str().unwrap() } else { &alone.text };
        assert_eq!(answer.text, said, "{}", app.log());
        fired += usize::from(has_fired);
        changed += usize::from(expected["text"] != plain["text"]);
    }
    assert!((1..texts.len()).contains(&fired), "{fired} of {} fired: nothing is told apart", texts.len());
    assert_eq!(changed, fired, "what fires is patched, and nothing else");
}
