//! Stories on real models, as commands that the reader can type again: each one is shown, then run as it stands.

mod harm;
mod organism;

use super::args::{Arguments, DemoArguments, Story};
use super::{Outcome, execute};
use anyhow::{Context, ensure};
use clap::Parser;
use std::io::{IsTerminal, Write};
use std::path::Path;

const SOURCE: &str = "smollm2-135m-instruct";
const TARGET: &str = "gemma-3-270m";

pub fn demo(arguments: DemoArguments) -> anyhow::Result<Outcome> {
    match arguments.story {
        Story::Harm => harm::demo(&arguments),
        Story::Backdoor => organism::removed(&arguments),
        Story::Switch => organism::switched(&arguments),
    }
}

fn ensure_folder(folder: &Path) -> anyhow::Result<()> {
    ensure!(
        folder.is_dir(),
        "there is no `{}`: run the demo in the project's own folder, or say with `--guards` and `--organisms` where these are",
        folder.display()
    );
    Ok(())
}

/// Shows a command and runs it. That the guard blocks is what the demo is about, not an end of it.
fn run(words: &[&str]) -> anyhow::Result<()> {
    let shown: Vec<String> =
        words.iter().map(|word| if word.contains(' ') { format!("\"{word}\"") } else { (*word).to_owned() }).collect();
    emphasised(&format!("$ pilotfish {}", shown.join(" ")));
    let arguments = Arguments::try_parse_from(std::iter::once("pilotfish").chain(words.iter().copied()))?;
    execute(arguments.command)?;
    say("");
    Ok(())
}

/// Told on stderr, as everything that is not a command's own output.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn emphasised(line: &str) {
    if std::io::stderr().is_terminal() { say(&format!("\x1b[1m{line}\x1b[0m")) } else { say(line) }
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("`{}` is not a path in UTF-8", path.display()))
}
