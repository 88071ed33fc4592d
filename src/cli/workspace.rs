//! What most commands begin with: the pipeline read, the store open, the plan built.

use super::args::{Global, LogFormat, MemoryArgs, PipelineArgs, SelectArgs};
use super::engine;
use super::error::CliError;
use crate::event::{Event, EventSink, Level};
use crate::hub::HubSettings;
use crate::pipeline::{Diagnostic, ParseOptions, Pipeline, PipelineError, parse};
use crate::plan::{MissingFile, Plan, PlanError, Remeasure, Selection, build};
use crate::run::{Sources, StoreFacts, Verified, Workers, verify_cached};
use crate::stage::Catalogue;
use crate::stages::catalogue;
use crate::store::{FileHashes, Store, UseGuard, note_once};
use crate::ui;
use crate::units::{format_bytes, format_seconds};
use crate::yaml::{MAX_TEXT_BYTES, decode};
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

/// Verification that takes less is told with `--verbose` only.
const TOLD_ABOVE_S: f64 = 1.0;

/// A pipeline with its text.
pub struct Read {
    pub pipeline: Pipeline,
    pub text: String,
    pub options: ParseOptions,
    pub catalogue: Catalogue,
    /// Where the Hugging Face cache is, as the environment says it.
    pub hub: HubSettings,
}

/// A pipeline with its plan, and what it was planned with.
pub struct Planned {
    pub plan: Plan,
    pub store: Store,
    pub sources: Sources,
    pub workers: Workers,
    /// Keeps gc off what the plan found.
    pub guard: UseGuard,
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
    pub fn options(&self, memory: Option<&MemoryArgs>) -> ParseOptions {
        let split = |values: &str| values.split(',').map(str::to_owned).collect();
        ParseOptions {
            set: self.set.clone(),
            matrix: self.matrix.iter().map(|(name, values)| (name.clone(), split(values))).collect(),
            env: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
            device: self.device.clone(),
            execution: self.execution,
            memory_limit: memory.and_then(|memory| memory.memory_limit),
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
    let text = read_text(file)?;
    let catalogue = catalogue();
    let pipeline = parse(&text, &file.to_string_lossy(), &catalogue, &options).map_err(CliError::Pipeline)?;
    Ok(Read { pipeline, text, options, catalogue, hub: HubSettings::from_env() })
}

/// Reads a file of a bounded length, which must be UTF-8.
///
/// # Errors
/// `Read`; `Usage` where it is something else than text.
pub fn read_text(file: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::Read { path: file.to_owned(), source };
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(failed)?;
    // A device or a pipe may have no end.
    opened.take(MAX_TEXT_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    decode(bytes).map_err(|error| CliError::Usage {
        message: format!("failed to read {}: {error}", file.display()),
        hint: error.hint,
    })
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
    let workers = engine::workers(&engine::Asked {
        device: &read.pipeline.device,
        memory_limit: read.pipeline.memory_limit,
        execution: read.pipeline.execution,
    })?;
    let store = Store::open(&global.cache)?;
    let guard = store.hold_off_gc(&|| true)?;
    let sources = Sources::new(&global.root, read.hub.clone(), FileHashes::open(store.dir()));
    let facts = StoreFacts {
        store: store.clone(),
        sources: &sources,
        pipeline: read.pipeline.name.clone(),
        engine: workers.info().clone(),
    };
    let plan = plan(read, selection, &facts)?;
    if let Err(error) = sources.flush() {
        // What was hashed is hashed again next time; nothing else is lost.
        note_once("file hashes", format!("failed to {error}; files are hashed again next time"));
    }
    Ok(Planned { plan, store, sources, workers, guard })
}

fn plan(read: &Read, selection: &Selection, facts: &StoreFacts<'_>) -> Result<Plan, CliError> {
    build(&read.pipeline, &read.catalogue, facts, selection).map_err(|error| match error {
        PlanError::MissingFiles(files) => CliError::Pipeline(missing_files(read, &files)),
        other => CliError::Plan(other),
    })
}

/// Plans, and verifies what a run of the plan will read from the cache. What is damaged counts as missing and is planned anew,
/// with a warning.
///
/// # Errors
/// As [`planned`].
pub fn planned_and_verified(
    global: &Global,
    read: &Read,
    selection: &Selection,
    events: &Arc<dyn EventSink>,
) -> Result<(Planned, Verified), CliError> {
    let mut planned = planned(global, read, selection)?;
    let mut verified = Verified::default();
    loop {
        let found = verify_cached(&planned.plan, &planned.store);
        let new: Vec<_> = found.damaged.iter().filter(|(stage, _)| !verified.damaged.contains_key(*stage)).collect();
        for (stage, (key, damage)) in &new {
            let text = format!("its artifact {} is damaged ({damage}): it is computed again", key.short());
            events.emit(Event::Note { stage: Some((*stage).clone()), level: Level::Warning, text });
        }
        let is_sound = new.is_empty();
        verified.extend(found);
        if is_sound {
            break;
        }
        let facts = StoreFacts {
            store: planned.store.clone(),
            sources: &planned.sources,
            pipeline: read.pipeline.name.clone(),
            engine: planned.workers.info().clone(),
        };
        planned.plan = plan(read, selection, &facts)?;
    }
    if verified.n_files > 0 {
        let (bytes, took) = (format_bytes(verified.bytes), format_seconds(verified.duration_s));
        let text = format!("verified {} cached files ({bytes}) in {took}", verified.n_files);
        let level = if verified.duration_s < TOLD_ABOVE_S { Level::Debug } else { Level::Info };
        events.emit(Event::Note { stage: None, level, text });
    }
    Ok((planned, verified))
}
