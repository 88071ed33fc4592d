//! What most commands begin with: the pipeline read, the store open, the plan built.

use super::args::{Global, LogFormat, PipelineArgs, SelectArgs};
use super::engine;
use super::error::CliError;
use crate::event::Level;
use crate::pipeline::{Diagnostic, ParseOptions, Pipeline, PipelineError, parse};
use crate::plan::{MissingFile, Plan, PlanError, Remeasure, Selection, build};
use crate::run::{StoreFacts, Workers};
use crate::stage::Catalogue;
use crate::stages::catalogue;
use crate::store::{FileHashes, Store};
use crate::ui;
use std::path::Path;

/// A pipeline with its text.
pub struct Read {
    pub pipeline: Pipeline,
    pub text: String,
    pub options: ParseOptions,
    pub catalogue: Catalogue,
}

/// A pipeline with its plan, and what it was planned with.
pub struct Planned {
    pub plan: Plan,
    pub store: Store,
    pub workers: Workers,
}

impl Global {
    pub fn log_format(&self) -> ui::LogFormat {
        match self.log_format {
            LogFormat::Auto => ui::LogFormat::Auto,
            LogFormat::Plain => ui::LogFormat::Plain,
            LogFormat::Json => ui::LogFormat::Json,
        }
    }

    pub fn level(&self) -> Level {
        match (self.verbose, self.quiet) {
            (true, _) => Level::Debug,
            (_, true) => Level::Warning,
            _ => Level::Info,
        }
    }
}

impl PipelineArgs {
    /// Returns what the command line adds to the file.
    pub fn options(&self) -> ParseOptions {
        let split = |values: &str| values.split(',').map(|value| value.trim().to_owned()).collect();
        ParseOptions {
            set: self.set.clone(),
            matrix: self.matrix.iter().map(|(name, values)| (name.clone(), split(values))).collect(),
            env: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
            device: self.device.clone(),
        }
    }
}

impl SelectArgs {
    /// Returns the selection.
    pub fn selection(&self) -> Selection {
        let named: Vec<String> = self.remeasure.iter().filter(|name| !name.is_empty()).cloned().collect();
        let remeasure = match (self.remeasure.is_empty(), named.is_empty()) {
            (true, _) => Remeasure::No,
            (false, true) => Remeasure::All,
            (false, false) => Remeasure::Stages(named),
        };
        Selection {
            only: self.only.clone(),
            until: self.until.clone(),
            force: self.force,
            remeasure,
            ..Selection::default()
        }
    }
}

/// Reads and checks a pipeline file.
///
/// # Errors
/// `Read`, `Pipeline`.
pub fn read(file: &Path, options: ParseOptions) -> Result<Read, CliError> {
    let text = std::fs::read_to_string(file).map_err(|source| CliError::Read { path: file.to_owned(), source })?;
    let catalogue = catalogue();
    let pipeline = parse(&text, &file.to_string_lossy(), &catalogue, &options).map_err(CliError::Pipeline)?;
    Ok(Read { pipeline, text, options, catalogue })
}

/// Shows missing files as what they are: mistakes in the pipeline file, each with its place.
fn missing_files(read: &Read, files: &[MissingFile]) -> PipelineError {
    let mut diagnostics: Vec<Diagnostic> = Vec::new();
    for file in files {
        let line = read.text.lines().nth(file.line.saturating_sub(1)).unwrap_or_default();
        let diagnostic = Diagnostic {
            line: Some(file.line),
            column: Some(line.chars().take_while(|c| c.is_whitespace()).count() + 1),
            message: format!("stage {:?}: {}: {}", file.stage, file.param, file.reason),
            hint: Some("relative paths start at --root; --set NAME=VALUE changes a variable".to_owned()),
        };
        // Cells of a matrix share a stage's line.
        if !diagnostics.contains(&diagnostic) {
            diagnostics.push(diagnostic);
        }
    }
    diagnostics.sort_by_key(|diagnostic| diagnostic.line);
    PipelineError { origin: read.pipeline.origin.clone(), text: read.text.clone(), diagnostics }
}

/// Starts a worker on the device, opens the store and plans.
///
/// # Errors
/// `Device`, `Store`, `Plan`; `Pipeline` where it names files that aren't there.
pub fn planned(global: &Global, read: &Read, selection: &Selection) -> Result<Planned, CliError> {
    let workers = engine::workers(&read.pipeline.device)?;
    let store = Store::open(&global.cache)?;
    let facts = StoreFacts {
        store: store.clone(),
        hashes: FileHashes::open(store.dir()),
        pipeline: read.pipeline.name.clone(),
        engine: workers.info().clone(),
    };
    let plan =
        build(&read.pipeline, &read.catalogue, &global.root, &facts, selection).map_err(|error| match error {
            PlanError::MissingFiles(files) => CliError::Pipeline(missing_files(read, &files)),
            other => CliError::Plan(other),
        })?;
    Ok(Planned { plan, store, workers })
}
