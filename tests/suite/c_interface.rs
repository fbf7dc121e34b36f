//! `include/pilotfish.h` from C, C++ and Python: the examples, and a program that does all that it has. In C llama.cpp is the one that the tests have, linked in.

use crate::attach::{HARMFUL, MESSAGE, app, directory, library, python, required, required_if};
use crate::real::{SMALL, located};
use crate::support::{Fixture, pilotfish};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The library, where it is built.
fn built() -> Option<PathBuf> {
    required(&[&library()], "make attach").then(library)
}

/// Where the source of the crate llama-cpp-sys-2 is.
fn llama_source() -> PathBuf {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--locked", "--manifest-path"])
        .arg(Path::new(ROOT).join("Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(metadata.status.success(), "{}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let mut packages = metadata["packages"].as_array().unwrap().iter();
    let package = packages.find(|package| package["name"] == "llama-cpp-sys-2").unwrap();
    Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("llama.cpp")
}

/// Where cargo has built llama.cpp.
fn llama_libraries() -> PathBuf {
    let builds = Path::new(env!("CARGO_BIN_EXE_pilotfish")).with_file_name("build");
    let built = std::fs::read_dir(builds).unwrap().map(|folder| folder.unwrap().path().join("out/lib"));
    let built = built.filter(|folder| folder.join("libllama.a").exists());
    let made = |folder: &PathBuf| folder.join("libllama.a").metadata().and_then(|file| file.modified()).unwrap();
    built.max_by_key(made).expect("llama.cpp has been built for these tests")
}

/// Compiles `source` by `compiler`, for the headers of llama.cpp and of Pilotfish.
fn compile(compiler: &str, flags: &[&str], source: &str, program: &Path, link: impl FnOnce(&mut Command)) {
    let llama = llama_source();
    let mut command = Command::new(compiler);
    command.args(["-O1", "-g", "-Wall", "-Wextra", "-Werror"]).args(flags);
    for include in [Path::new(ROOT).join("include"), llama.join("include"), llama.join("ggml/include")] {
        command.arg("-I").arg(include);
    }
    command.arg(Path::new(ROOT).join(source)).arg("-o").arg(program);
    link(&mut command);
    let Output { status, stderr, .. } = command.output().expect("a compiler is installed: `make setup`");
    assert!(status.success(), "{command:?}\n{}", String::from_utf8_lossy(&stderr));
}

/// Compiles a program that has llama.cpp linked in, and exports it for the library to find.
fn compile_static(folder: &Path, compiler: &str, flags: &[&str], source: &str, library: &Path) -> PathBuf {
    let program = folder.join("program");
    let libraries = llama_libraries();
    compile(compiler, flags, source, &program, |command| {
        command.arg("-Wl,--whole-archive");
        command.args(["llama", "ggml", "ggml-cpu", "ggml-base"].map(|name| libraries.join(format!("lib{name}.a"))));
        command.arg("-Wl,--no-whole-archive").arg("-rdynamic");
        let folder = library.parent().unwrap();
        command.arg("-L").arg(folder).arg("-lpilotfish_attach").arg(format!("-Wl,-rpath,{}", folder.display()));
        command.args(["-lstdc++", "-lgomp", "-lm", "-lpthread", "-ldl"]);
    });
    program
}

struct Said {
    status: Option<i32>,
    out: String,
    log: String,
}

fn run(program: &Path, arguments: &[&Path], prompts: &[&str]) -> Said {
    let Output { status, stdout, stderr } =
        Command::new(program).args(arguments).args(prompts).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { status: status.code(), out: text(&stdout), log: text(&stderr) }
}

/// A folder with the harm gate, as an app has it.
fn harm_gate() -> TempDir {
    directory(&[&Path::new(ROOT).join("guards/harm-gate-gemma3-to-smollm2")])
}

const HARMLESS: &str = "Name three birds.";

#[test]
fn the_c_interface_does_what_its_header_says() {
    let Some(library) = built() else { return };
    let folder = tempfile::tempdir().unwrap();
    let program = compile_static(folder.path(), "cc", &["-std=c11"], "tests/attach/abi.c", &library);
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "3"]);
    let guards = directory(&[&fixture.guard]);
    let message = "sea shark sea fish";
    fixture.edit_manifest("on_fire = \"steer\"", "on_fire = \"block\"");
    fixture.edit_manifest("description = ", &format!("message = \"{message}\"\ndescription = "));
    let blocking = directory(&[&fixture.guard]);
    let folders = [fixture.model.as_path(), guards.path(), blocking.path()];
    let Said { status, out, log } = run(&program, &folders, &["shark sea sea", "pilot fish sea", message]);
    assert_eq!((status, out.as_str()), (Some(0), "done\n"), "{log}");
}

/// The same llama.cpp, so what it says and decides is the same as of `pilotfish run`, to the last bit.
#[test]
fn the_c_example_says_what_pilotfish_does() {
    let (Some(library), Some(model)) = (built(), located(SMALL)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let program = compile_static(folder.path(), "cc", &["-std=c11", "-pedantic"], "examples/c/guarded.c", &library);
    let guards = harm_gate();
    let guard = guards.path().join("harm-gate-gemma3-to-smollm2");
    for (prompt, code, message) in [(HARMLESS, 0, None), (HARMFUL, 1, Some(MESSAGE))] {
        let Said { status, out, log } = run(&program, &[&model, guards.path()], &[prompt]);
        assert_eq!(status, Some(code), "{log}");
        let arguments =
            ["run", "--model", SMALL, "--guard", guard.to_str().unwrap(), "-p", prompt, "--max-tokens", "48"];
        let ran = pilotfish(&[&arguments[..], &["--json"]].concat());
        let expected: Value = serde_json::from_str(ran.stdout.lines().next().unwrap()).unwrap();
        let said = message.or(expected["text"].as_str()).unwrap();
        assert_eq!(out.trim_end_matches('\n'), said.trim_end_matches('\n'));
        let score = log.split("harmful: score ").nth(1).unwrap().split([',', '\n']).next().unwrap();
        assert_eq!(score, format!("{:.4}", expected["gates"]["harmful"]["score"].as_f64().unwrap()));
        assert_eq!(log.contains("harm-gate has ended the answer"), message.is_some(), "{log}");
    }
    let nothing = run(&program, &[&model, Path::new("/there/is/no/such/directory")], &[HARMLESS]);
    assert_eq!(nothing.status, Some(2));
    assert!(nothing.log.contains("/there/is/no/such/directory"), "{}", nothing.log);
}

#[test]
fn the_cpp_example_guards_each_prompt_for_itself() {
    let (Some(library), Some(model)) = (built(), located(SMALL)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let program = compile_static(folder.path(), "c++", &["-std=c++17"], "examples/cpp/guarded.cpp", &library);
    let guards = harm_gate();
    let answers = |prompts: &[&str]| {
        let Said { status, out, log } = run(&program, &[&model, guards.path()], prompts);
        assert_eq!(status, Some(0), "{log}");
        out
    };
    let alone = answers(&[HARMLESS]);
    let together = answers(&[HARMLESS, HARMFUL]);
    assert_eq!(together, format!("{alone}1 (ended): {MESSAGE}\n"));
    // The other way round.
    let together = answers(&[HARMFUL, HARMLESS]);
    assert_eq!(together, format!("0 (ended): {MESSAGE}\n1{}", &alone[1..]));
}

/// Of the same source as the tests' llama.cpp, and built for the same machine.
#[test]
fn the_python_example_says_what_pilotfish_does() {
    let (Some(mut python), Some(library), Some(model)) = (python(), built(), located(SMALL)) else { return };
    let guards = harm_gate();
    python.arg(Path::new(ROOT).join("examples/python/guarded.py")).arg(&model).arg(guards.path());
    python.env("PILOTFISH_ATTACH_LIBRARY", &library);
    let guard = guards.path().join("harm-gate-gemma3-to-smollm2");
    for (prompt, code, message) in [(HARMLESS, 0, None), (HARMFUL, 1, Some(MESSAGE))] {
        let mut command = Command::new(python.get_program());
        command.args(python.get_args()).arg(prompt);
        command.envs(python.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let Output { status, stdout, stderr } = command.output().unwrap();
        let log = String::from_utf8_lossy(&stderr);
        assert_eq!(status.code(), Some(code), "{log}");
        let arguments =
            ["run", "--model", SMALL, "--guard", guard.to_str().unwrap(), "-p", prompt, "--max-tokens", "48"];
        let expected: Value =
            serde_json::from_str(pilotfish(&[&arguments[..], &["--json"]].concat()).stdout.trim()).unwrap();
        let said = message.or(expected["text"].as_str()).unwrap();
        assert_eq!(String::from_utf8_lossy(&stdout).trim_end_matches('\n'), said.trim_end_matches('\n'));
        let score: f64 =
            log.split("harmful: score ").nth(1).unwrap().split([',', '\n']).next().unwrap().parse().unwrap();
        let expected = expected["gates"]["harmful"]["score"].as_f64().unwrap();
        assert!((score - expected).abs() <= 1e-3 * expected.abs() + 1e-4, "{score}, expected {expected}");
    }
}

/// `make install-library` puts things where `pkg-config` tells a compiler of them.
#[test]
fn what_is_installed_is_found_by_pkg_config() {
    let Some(library) = built() else { return };
    let has_it = Command::new("pkg-config").arg("--version").output().is_ok_and(|ran| ran.status.success());
    if !required_if(has_it, "pkg-config", "make portable-attach") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let run = |command: &mut Command| {
        let Output { status, stdout, stderr } = command.output().unwrap();
        assert!(status.success(), "{command:?}\n{}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap()
    };
    let prefix = format!("PREFIX={}", folder.path().display());
    let made = format!("LIBRARY={}", library.display());
    run(Command::new("make").current_dir(ROOT).args(["install-library", &prefix, &made]));
    let flags = run(Command::new("pkg-config")
        .args(["--cflags", "--libs", "pilotfish"])
        .env("PKG_CONFIG_PATH", folder.path().join("lib/pkgconfig")));
    let source = folder.path().join("app.c");
    let text = "#include <pilotfish.h>\n#include <stdio.h>\nint main(void) { puts(pilotfish_version()); return pilotfish_abi_version() != PILOTFISH_ABI_VERSION; }\n";
    std::fs::write(&source, text).unwrap();
    let app = folder.path().join("app");
    run(Command::new("cc").arg(&source).arg("-o").arg(&app).args(flags.split_whitespace()));
    let said = run(Command::new(&app).env("LD_LIBRARY_PATH", folder.path().join("lib")));
    assert_eq!(said.trim(), env!("CARGO_PKG_VERSION"));
}

/// What lives and dies in an app, each thing with the library called by it and with the library preloaded, under valgrind, which tells of each byte that is used
/// and is not the app's.
#[test]
fn nothing_is_used_after_it_was_freed() {
    // One for any machine: valgrind does not know the instructions of the newest.
    let library = Path::new(ROOT).join("target/tools/portable/debug/libpilotfish_attach.so");
    let Some(package) = app() else { return };
    let has_valgrind = Command::new("valgrind").arg("--version").output().is_ok_and(|ran| ran.status.success());
    if !required(&[&library], "make portable-attach") || !required_if(has_valgrind, "valgrind", "make portable-attach")
    {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("lives");
    // The structs of this header are those of node-llama-cpp's llama.cpp.
    compile("cc", &["-std=c11"], "tests/attach/lives.c", &program, |command| {
        command.args(["-ldl", "-lpthread"]);
    });
    let libraries = package.ancestors().nth(3).unwrap().join("@node-llama-cpp/linux-x64/bins/linux-x64");
    let fixture = Fixture::new(&["--intervene", "add", "--strength", "3"]);
    let guards = directory(&[&fixture.guard]);
    let known = Path::new(ROOT).join("tests/attach/valgrind.supp");
    for scenario in ["models", "reloads", "forks", "unloads"] {
        for preloaded in [false, true] {
            let mut command = Command::new("valgrind");
            command.args(["--error-exitcode=99", "--trace-children=yes", "-q", "--num-callers=40"]);
            command.arg(format!("--suppressions={}", known.display())).arg(&program);
            command.arg(scenario).arg(&libraries).arg(&fixture.model).arg(guards.path());
            match preloaded {
                true => command
                    .env("LD_PRELOAD", &library)
                    .env("PILOTFISH_ATTACH_GUARDS", guards.path())
                    .env("XDG_RUNTIME_DIR", folder.path())
                    .env("PILOTFISH_LOG", "pilotfish=debug,pilotfish_attach=debug"),
                false => command.arg(&library),
            };
            let Output { status, stdout, stderr } = command.output().unwrap();
            let (log, out) = (String::from_utf8_lossy(&stderr), String::from_utf8_lossy(&stdout));
            assert!(status.success(), "{scenario}, preloaded: {preloaded}: {status}\n{log}");
            assert!(out.ends_with("done\n"), "{out}");
            // It did guard.
            assert!(!preloaded || log.contains("gate sequence=0"), "{scenario}: {log}");
        }
    }
}
