//! The command line. It alone builds an engine and reads the environment; errors get their hints here.

mod again;
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
mod self_test;
mod show;
mod workspace;

pub use args::Args;
pub use error::CliError;

use crate::artifact::FORMAT_VERSION;
use crate::store::take_notes;
use args::Command;
use clap::{CommandFactory, Parser};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let result = match Args::try_parse() {
        Ok(args) => dispatch(args),
        // --help and --version are results; usage errors go to stderr.
        Err(error) if !error.use_stderr() => print(&styled(&error)).map(|()| 0),
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    // What a run did not tell as events.
    for text in take_notes() {
        let _ = writeln!(std::io::stderr(), "warning: {text}");
    }
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{}", error.render());
            ExitCode::from(error.exit_code())
        }
    }
}

/// Returns clap's help or version, with its styles where a terminal shows them.
fn styled(error: &clap::Error) -> String {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let text = error.render();
    if std::io::stdout().is_terminal() && !no_color { text.ansi().to_string() } else { text.to_string() }
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
        Command::Doctor { self_test: false, .. } => doctor::doctor(),
        Command::Doctor { device, .. } => self_test::self_test(&device),
        Command::Worker { device, memory_limit, execution, accept_disturbed, processor_speeds } => {
            let asked = engine::Asked { device: &device, memory_limit, execution };
            Ok(engine::work(&asked, accept_disturbed, processor_speeds.as_deref()))
        }
        Command::Completions { shell } => {
            // Into memory first: clap panics where it can't write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "labpipe", &mut script);
            print(&String::from_utf8_lossy(&script)).map(|()| 0)
        }
    }
}

/// Writes results to stdout. A reader that went away (`| head`) is no error: the command's exit code stays its own.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(source) => Err(CliError::Output(source)),
        Ok(()) => Ok(()),
    }
}

/// Checks that a `run.json` is one that this labpipe reads.
fn check_run(run: &serde_json::Value, dir: &std::path::Path) -> Result<(), CliError> {
    let refused = |reason: String, hint: &str| {
        let message = format!("failed to read {}: {reason}", dir.join("run.json").display());
        Err(CliError::Usage { message, hint: Some(hint.to_owned()) })
    };
    match run["format_version"].as_u64() {
        Some(found) if found > u64::from(FORMAT_VERSION) => refused(
            format!("it has format_version {found}, this labpipe reads {FORMAT_VERSION}"),
            "use the labpipe that wrote it",
        ),
        None => refused("field format_version is missing".to_owned(), "the file is damaged; run the pipeline again"),
        Some(_) if !run["stages"].is_array() => {
            refused("field stages is missing".to_owned(), "the file is damaged; run the pipeline again")
        }
        Some(_) => Ok(()),
    }
}
