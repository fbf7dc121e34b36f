//! The command line: arguments become library calls, results become text or JSON.
//!
//! Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the guard blocked, 2 operational error, 64 usage. Nobody
//! imports this room.

mod args;
#[cfg(unix)]
mod attach;
mod backdoor;
mod bench;
#[cfg(unix)]
mod ctl;
mod demo;
mod eval;
mod guard;
mod learn;
mod map;
mod models;
mod progress;
mod prompts;
mod report;
mod run;
mod serve;
mod strength;
mod sweep;
mod switch;
mod synthesize;
mod table;
mod tokens;

use args::{Arguments, Command};
use clap::Parser;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

/// What a command ended with, when it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Outcome {
    #[default]
    Done,
    /// A guard kept at least one prompt from being answered.
    Blocked,
}

const BLOCKED: u8 = 1;
const OPERATIONAL: u8 = 2;
const USAGE: u8 = 64;

pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version go to stdout and are no error.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("PILOTFISH_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("pilotfish=warn,off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .init();

    match execute(arguments.command) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Blocked) => ExitCode::from(BLOCKED),
        // The reader of our output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {}", with_causes(&error));
            ExitCode::from(OPERATIONAL)
        }
    }
}

fn execute(command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Demo(arguments) => demo::demo(arguments),
        Command::Models(command) => models::models(command),
        Command::Extract(arguments) => learn::extract(arguments),
        Command::Map(arguments) => map::map(arguments),
        Command::Guard(command) => guard::guard(command),
        Command::Calibrate(arguments) => learn::calibrate(arguments),
        Command::Score(arguments) => run::score(arguments),
        Command::Tokens(arguments) => tokens::tokens(arguments),
        Command::Run(arguments) => run::run(arguments),
        Command::Sweep(arguments) => sweep::sweep(*arguments),
        Command::Eval(arguments) => eval::eval(*arguments),
        Command::Report(arguments) => report::report(arguments),
        Command::Bench(arguments) => bench::bench(arguments),
        Command::Serve(arguments) => serve::serve(&arguments),
        Command::Audit(arguments) => serve::audit(&arguments),
        #[cfg(unix)]
        Command::Attach(arguments) => attach::attach(&arguments),
        #[cfg(unix)]
        Command::Ctl(arguments) => ctl::ctl(&arguments),
    }
}

/// What went wrong and why, each once: some errors say their cause themselves.
fn with_causes(error: &anyhow::Error) -> String {
    let mut told = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !told.ends_with(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
