//! The command line. It alone builds an engine and reads the environment; errors get their hints here.

mod args;
mod cache;
mod catalogue;
mod compare;
mod doctor;
mod download;
mod engine;
mod error;
mod plan;
mod run;
mod show;
mod workspace;

pub use args::Args;
pub use error::CliError;

use args::Command;
use clap::{CommandFactory, Parser};
use std::io::Write;
use std::process::ExitCode;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // clap writes help to stdout and usage errors to stderr; a closed pipe is nobody's fault.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match dispatch(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{}", error.render());
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(args: Args) -> Result<u8, CliError> {
    match args.command {
        Command::Run(run) => run::run(&args.global, &run),
        Command::Rerun(rerun) => run::rerun(&args.global, &rerun),
        Command::Plan(plan) => plan::plan(&args.global, &plan),
        Command::Graph(graph) => plan::graph(&args.global, &graph),
        Command::Validate(validate) => plan::validate(&args.global, &validate),
        Command::Matrix(matrix) => plan::matrix(&args.global, &matrix),
        Command::Show(show) => show::show(&args.global, &show),
        Command::Compare(compare) => compare::compare(&args.global, &compare),
        Command::Stages { json } => catalogue::stages(json),
        Command::Schema => catalogue::schema(),
        Command::Cache { action } => cache::cache(&args.global, &action),
        Command::Doctor => doctor::doctor(),
        Command::Worker { device } => Ok(engine::work(&device)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "labpipe", &mut std::io::stdout());
            Ok(0)
        }
    }
}

/// Writes results to stdout; a reader that went away (`| head`) ends the program quietly.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(source) => Err(CliError::Output(source)),
        Ok(()) => Ok(()),
    }
}
