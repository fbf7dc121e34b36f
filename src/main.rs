//! The `pilotfish` command: arguments in, text and JSON out.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
