//! The command under test, and a guard for a tiny model that the command itself made.

use crate::tiny_model::{Architecture, TinyModel};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// What a run of the command ended with.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `pilotfish` with nothing of the user's own settings.
pub fn pilotfish<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Ran {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_pilotfish"))
        .args(arguments)
        .env_remove("PILOTFISH_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the command starts");
    Ran {
        code: output.status.code().expect("it was not killed by a signal"),
        // Tiny models say bytes that are no text.
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

/// [`pilotfish`], which must succeed.
pub fn done<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(arguments: &[S]) -> String {
    let ran = pilotfish(arguments);
    assert_eq!(ran.code, 0, "pilotfish {arguments:?}: {}", ran.stderr);
    ran.stdout
}

/// A tiny model and a guard for it with a calibrated gate, an intervention and a probe.
pub struct Fixture {
    pub folder: TempDir,
    pub model: PathBuf,
    pub guard: PathBuf,
    pub positive: PathBuf,
    pub negative: PathBuf,
}

/// Layer of the guard's vector.
pub const LAYER: u32 = 1;

impl Fixture {
    /// `extra` goes to `guard build`.
    pub fn new(extra: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (model, guard) = (at("tiny.gguf"), at("guard"));
        TinyModel::new(Architecture::Llama).write(&model);
        let (positive, negative) = (at("positive.txt"), at("negative.txt"));
        let prompts = |word: &str| (0..12).map(|n| format!("{word} {}\n", "sea ".repeat(n + 1))).collect::<String>();
        std::fs::write(&positive, prompts("shark")).unwrap();
        std::fs::write(&negative, prompts("pilot fish")).unwrap();

        let vectors = at("vectors.safetensors");
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        done(&[
            "extract",
            "--model",
            &text(&model),
            "--positive",
            &text(&positive),
            "--negative",
            &text(&negative),
            "--layers",
            &LAYER.to_string(),
            "--name",
            "shark",
            "-o",
            &text(&vectors),
        ]);
        let mut build: Vec<String> = [
            "guard",
            "build",
            "--name",
            "shark-gate",
            "--model",
            &text(&model),
            "--vectors",
            &text(&vectors),
            "--layer",
            &LAYER.to_string(),
            "--gate",
            "sharks",
            "-o",
            &text(&guard),
        ]
        .map(str::to_owned)
        .to_vec();
        build.extend(extra.iter().map(|argument| (*argument).to_owned()));
        done(&build);
        done(&["calibrate", "--model", &text(&model), "--guard", &text(&guard), "--benign", &text(&negative)]);
        Self { folder, model, guard, positive, negative }
    }

    pub fn model(&self) -> &str {
        self.model.to_str().unwrap()
    }

    pub fn guard(&self) -> &str {
        self.guard.to_str().unwrap()
    }

    pub fn manifest(&self) -> PathBuf {
        self.guard.join("guard.toml")
    }

    pub fn tensors(&self) -> PathBuf {
        self.guard.join("tensors.safetensors")
    }

    /// Replaces `from`, which must be there, in the manifest.
    pub fn edit_manifest(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.manifest()).unwrap();
        assert!(text.contains(from), "no `{from}` in\n{text}");
        std::fs::write(self.manifest(), text.replace(from, to)).unwrap();
    }

    /// Changes the tensor file; with `sign` its sha256 in the manifest follows, as an attacker's would.
    pub fn edit_tensors(&self, sign: bool, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.tensors()).unwrap();
        let before = pilotfish::guard::Digest::of(&bytes).to_string();
        change(&mut bytes);
        std::fs::write(self.tensors(), &bytes).unwrap();
        if sign {
            self.edit_manifest(&before, &pilotfish::guard::Digest::of(&bytes).to_string());
        }
    }
}
