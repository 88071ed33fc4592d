//! `run` and `rerun`.

use super::again::{Again, again};
use super::args::{Global, RerunArgs, RunArgs};
use super::download::download;
use super::engine;
use super::error::CliError;
use super::workspace::{Planned, Read, planned_and_verified, read};
use super::{check_run, print};
use crate::artifact::StageStatus;
use crate::event::{Event, EventSink, Level};
use crate::pipeline::ParseOptions;
use crate::plan::{Plan, Remeasure, Selection};
use crate::run::{
    RunFile, RunOutcome, RunRequest, Workers, environment, execute, external_files, forecast, metrics_rows,
    planned_keys, planned_stages, run_id, timestamp,
};
use crate::store::{Results, append_metrics_csv, take_notes};
use crate::ui::{sink, summary_table};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Runs a pipeline.
pub fn run(global: &Global, args: &RunArgs) -> Result<u8, CliError> {
    let read = read(&args.pipeline.file, args.pipeline.options(Some(&args.memory)))?;
    let again = again(std::env::args_os(), None);
    let asked = Asked { selection: &args.select.selection(), jobs: args.jobs, accept_disturbed: args.accept_disturbed };
    start(global, &args.pipeline.file, read, &asked, &again)
}

/// Runs part of an earlier run again, with the options that one had.
pub fn rerun(global: &Global, args: &RerunArgs) -> Result<u8, CliError> {
    let results = Results::new(&global.results);
    let found = match &args.run {
        Some(run_id) => results.run(run_id),
        None => results.latest(),
    };
    let (dir, run) = found.map_err(|error| CliError::Usage {
        message: format!("failed to {error}"),
        hint: Some("run a pipeline first: labpipe run FILE".to_owned()),
    })?;
    check_run(&run, &dir.path)?;
    let file = PathBuf::from(run["pipeline_path"].as_str().unwrap_or_default());
    let global = Global { root: PathBuf::from(run["root"].as_str().unwrap_or(".")), ..global.clone() };
    let options = options(&run);
    let memory_limit = args.memory.memory_limit.or(options.memory_limit);
    let read = read(&file, ParseOptions { memory_limit, ..options })?;
    if run["pipeline_text"].as_str() != Some(read.text.as_str()) {
        let text = format!("{} changed since run {}", file.display(), run["run_id"].as_str().unwrap_or("?"));
        sink(global.log_format(), global.level()).emit(Event::Note { stage: None, level: Level::Warning, text });
    }
    let selection =
        Selection { from: args.from.clone(), rebuild_upstream: args.rebuild_upstream, ..Selection::default() };
    let again = again(std::env::args_os(), run["run_id"].as_str());
    let asked = Asked { selection: &selection, jobs: args.jobs, accept_disturbed: args.accept_disturbed };
    start(&global, &file, read, &asked, &again)
}

/// Returns the options that a run was started with; the environment is today's.
fn options(run: &Value) -> ParseOptions {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |name: &str| run[name].as_array().cloned().unwrap_or_default();
    ParseOptions {
        set: list("set").iter().map(|item| (text(&item["name"]), text(&item["value"]))).collect(),
        matrix: list("matrix")
            .iter()
            .map(|item| (text(&item["name"]), item["values"].as_array().into_iter().flatten().map(text).collect()))
            .collect(),
        env: std::env::vars_os().filter_map(|(n, v)| Some((n.into_string().ok()?, v.into_string().ok()?))).collect(),
        device: run["device_asked"].as_str().map(str::to_owned),
        execution: run["execution_asked"].as_str().and_then(|name| name.parse().ok()),
        memory_limit: run["memory_limit_asked"].as_u64(),
    }
}

/// What the command line asks beside the pipeline.
struct Asked<'a> {
    selection: &'a Selection,
    jobs: usize,
    accept_disturbed: bool,
}

fn start(global: &Global, file: &Path, read: Read, asked: &Asked<'_>, again: &Again) -> Result<u8, CliError> {
    let events = sink(global.log_format(), global.level());
    download(&read, &global.root, &events)?;
    let (planned, verified) = planned_and_verified(global, &read, asked.selection, &events)?;
    let Planned { plan, store, sources, workers, guard } = planned;
    fits(&read, &plan, &global.root, &workers)?;
    let results = Results::new(&global.results);
    let info = workers.info().clone();
    let run_dir = results.reserve(&read.pipeline.name, &run_id())?;
    let active = store.list_run(&run_dir.run_id(), &read.pipeline.name, planned_keys(&plan))?;
    // From here on gc goes by the list.
    drop(guard);
    let run_file = RunFile {
        run_id: run_dir.run_id(),
        pipeline: read.pipeline.name.clone(),
        pipeline_path: file.to_owned(),
        root: global.root.clone(),
        command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        selection: asked.to_json(),
        jobs: asked.jobs,
        plan: planned_stages(&plan),
        files: external_files(&plan),
        inputs_verified: verified.to_json(),
        pipeline_text: read.text.clone(),
        set: read.options.set.clone(),
        matrix: read.options.matrix.clone(),
        device_asked: read.options.device.clone(),
        execution_asked: read.options.execution.map(|choice| choice.name().to_owned()),
        execution: read.pipeline.execution.name().to_owned(),
        memory_limit_asked: read.options.memory_limit,
        memory_limit_bytes: read.pipeline.memory_limit,
        device: info.device.clone(),
        device_reason: workers.reason().to_owned(),
        environment: environment(&info, engine::gpus().as_deref()),
        started_at: timestamp(),
        ended_at: None,
        load_average_after: None,
        status: "running".to_owned(),
        stages: Vec::new(),
    };
    results.start(&run_dir, &run_file.to_json())?;
    if let Err(error) = store.note_results(&global.results) {
        let text = format!("failed to {error}: cache gc does not know of this results folder; name it with --results");
        events.emit(Event::Note { stage: None, level: Level::Warning, text });
    }
    warn(&events, take_notes());
    let cancel = Arc::new(AtomicBool::new(false));
    let teller = catch_interrupts(&cancel, &events)?;
    let request = RunRequest {
        plan: &plan,
        catalogue: &read.catalogue,
        root: &global.root,
        store: &store,
        active: &active,
        sources: &sources,
        run_dir: &run_dir,
        run_file,
        runner: Arc::new(workers.accepting_disturbed(asked.accept_disturbed)),
        events,
        cancel: Arc::clone(&cancel),
        jobs: asked.jobs,
    };
    let outcome = execute(&request)?;
    // A signal that stopped the run has woken the thread too: its word comes before the last one.
    if let Some(teller) = teller.filter(|_| cancel.load(Ordering::Relaxed)) {
        let _ = teller.join();
    }
    if std::env::var("SAVE_EVAL_RESULTS").is_ok_and(|value| !["", "0", "false"].contains(&value.as_str())) {
        append_metrics_csv(&global.results.join("metrics.csv"), &metrics_rows(&outcome.results, &timestamp())?)?;
    }
    warn(&request.events, take_notes());
    match print(&closing(&outcome, &run_dir.path, again)) {
        // A stage that failed matters more than a table that could not be written.
        Err(error) if outcome.exit_code == 0 => Err(error),
        _ => Ok(outcome.exit_code),
    }
}

/// Refuses a run of stages that are predicted to take more memory than the limit allows; those in the cache need none.
fn fits(read: &Read, plan: &Plan, root: &Path, workers: &Workers) -> Result<(), CliError> {
    let Some(limit) = read.pipeline.memory_limit else { return Ok(()) };
    let memory = forecast(plan, &read.catalogue, root, workers);
    let refusals: Vec<String> = memory.iter().filter_map(|row| row.refusal(limit)).collect();
    if refusals.is_empty() { Ok(()) } else { Err(CliError::DoesNotFit { refusals }) }
}

/// Emits warnings.
fn warn(events: &Arc<dyn EventSink>, texts: Vec<String>) {
    for text in texts {
        events.emit(Event::Note { stage: None, level: Level::Warning, text });
    }
}

impl Asked<'_> {
    fn to_json(&self) -> Value {
        let selection = self.selection;
        let remeasure = match &selection.remeasure {
            Remeasure::No => Value::Null,
            Remeasure::All => "all".into(),
            Remeasure::Stages(stages) => json!(stages),
        };
        json!({
            "only": selection.only,
            "until": selection.until,
            "from": selection.from,
            "force": selection.force,
            "remeasure": remeasure,
            "rebuild_upstream": selection.rebuild_upstream,
            "accept_disturbed": self.accept_disturbed,
        })
    }
}

/// The first Ctrl-C asks the run to stop, and says so; the second ends the process at once.
fn catch_interrupts(cancel: &Arc<AtomicBool>, events: &Arc<dyn EventSink>) -> Result<Option<JoinHandle<()>>, CliError> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let failed =
        |error: std::io::Error| CliError::Usage { message: format!("failed to catch signals: {error}"), hint: None };
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(cancel)).map_err(failed)?;
        signal_hook::flag::register(signal, Arc::clone(cancel)).map_err(failed)?;
    }
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let events = Arc::clone(events);
    // Without the thread the run stops all the same; only the word is missing.
    let teller = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if signals.forever().next().is_some() {
            let text = "stopping at the next step; once more ends at once (what is committed stays)".to_owned();
            events.emit(Event::Note { stage: None, level: Level::Warning, text });
        }
    });
    Ok(teller.ok())
}

fn closing(outcome: &RunOutcome, run_dir: &Path, again: &Again) -> String {
    let shown: Vec<StageStatus> =
        outcome.stages.iter().filter(|stage| stage.error.as_deref() != Some("not selected")).cloned().collect();
    let mut text = summary_table(&shown);
    text.push_str(&format!("\nresults: {}", run_dir.display()));
    let reports = outcome.results.values().filter(|result| result.kind == "report");
    for report in reports {
        let dir = crate::store::RunDir { path: run_dir.to_owned() }.stage_dir(&report.address);
        let page = dir.join("report.md");
        text.push_str(&format!("\nreport:  {}", if page.is_file() { page } else { dir }.display()));
    }
    let Again { command, repeats } = again;
    if outcome.was_cancelled && repeats.is_empty() {
        text.push_str(&format!("\nstopped; to go on from the last committed stage:\n{command}"));
    } else if outcome.was_cancelled {
        let repeats = repeats.join(" ");
        text.push_str(&format!("\nstopped; to go on (what {repeats} asks for is computed again):\n{command}"));
    } else if outcome.exit_code != 0 {
        text.push_str(&format!("\nsome stages failed; mend the cause and run again:\n{command}"));
    }
    text
}
