//! `run` and `rerun`.

use super::args::{Global, RerunArgs, RunArgs};
use super::download::download;
use super::error::CliError;
use super::print;
use super::workspace::{Planned, Read, planned, read};
use crate::artifact::StageStatus;
use crate::event::{Event, Level};
use crate::pipeline::ParseOptions;
use crate::plan::Selection;
use crate::run::{RunFile, RunOutcome, RunRequest, environment, execute, metrics_rows, run_id, timestamp};
use crate::store::{Results, append_metrics_csv};
use crate::ui::{sink, summary_table};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Runs a pipeline.
pub fn run(global: &Global, args: &RunArgs) -> Result<u8, CliError> {
    let read = read(&args.pipeline.file, args.pipeline.options())?;
    start(global, &args.pipeline.file, read, &args.select.selection(), args.jobs)
}

/// Runs part of an earlier run again, with the options that one had.
pub fn rerun(global: &Global, args: &RerunArgs) -> Result<u8, CliError> {
    let results = Results::new(&global.results);
    let found = match &args.run {
        Some(run_id) => results.run(run_id),
        None => results.latest(),
    };
    let (_, run) = found.map_err(|error| CliError::Usage {
        message: format!("failed to {error}"),
        hint: Some("run a pipeline first: labpipe run FILE".to_owned()),
    })?;
    let file = PathBuf::from(run["pipeline_path"].as_str().unwrap_or_default());
    let global = Global { root: PathBuf::from(run["root"].as_str().unwrap_or(".")), ..global.clone() };
    let read = read(&file, options(&run))?;
    if run["pipeline_text"].as_str() != Some(read.text.as_str()) {
        let text = format!("{} changed since run {}", file.display(), run["run_id"].as_str().unwrap_or("?"));
        sink(global.log_format(), global.level()).emit(Event::Note { stage: None, level: Level::Warning, text });
    }
    let selection =
        Selection { from: args.from.clone(), rebuild_upstream: args.rebuild_upstream, ..Selection::default() };
    start(&global, &file, read, &selection, args.jobs)
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
    }
}

fn start(global: &Global, file: &Path, read: Read, selection: &Selection, jobs: usize) -> Result<u8, CliError> {
    let events = sink(global.log_format(), global.level());
    download(&read, &global.root, &events)?;
    let Planned { plan, store, engine, device_reason } = planned(global, &read, selection)?;
    let results = Results::new(&global.results);
    let info = engine.info();
    let run_file = RunFile {
        run_id: run_id(),
        pipeline: read.pipeline.name.clone(),
        pipeline_path: file.to_owned(),
        root: global.root.clone(),
        pipeline_text: read.text.clone(),
        set: read.options.set.clone(),
        matrix: read.options.matrix.clone(),
        device_asked: read.options.device.clone(),
        device: info.device.clone(),
        device_reason,
        environment: environment(&info),
        started_at: timestamp(),
        ended_at: None,
        status: "running".to_owned(),
        stages: Vec::new(),
    };
    let run_dir = results.start(&read.pipeline.name, &run_file.run_id, &run_file.to_json())?;
    let cancel = Arc::new(AtomicBool::new(false));
    catch_interrupts(&cancel)?;
    let request = RunRequest {
        plan: &plan,
        catalogue: &read.catalogue,
        root: &global.root,
        store: &store,
        run_dir: &run_dir,
        run_file,
        engine,
        events,
        cancel,
        jobs,
    };
    let outcome = execute(&request)?;
    if std::env::var("SAVE_EVAL_RESULTS").is_ok_and(|value| !["", "0", "false"].contains(&value.as_str())) {
        append_metrics_csv(&global.results.join("metrics.csv"), &metrics_rows(&outcome.results, &timestamp()))?;
    }
    print(&closing(&outcome, &run_dir.path, file))?;
    Ok(outcome.exit_code)
}

/// The first Ctrl-C asks the run to stop, the second ends the process at once.
fn catch_interrupts(cancel: &Arc<AtomicBool>) -> Result<(), CliError> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM] {
        let shutdown = signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(cancel));
        let request = shutdown.and_then(|_| signal_hook::flag::register(signal, Arc::clone(cancel)));
        request
            .map_err(|error| CliError::Usage { message: format!("failed to catch signals: {error}"), hint: None })?;
    }
    Ok(())
}

fn closing(outcome: &RunOutcome, run_dir: &Path, file: &Path) -> String {
    let shown: Vec<StageStatus> =
        outcome.stages.iter().filter(|stage| stage.error.as_deref() != Some("not selected")).cloned().collect();
    let mut text = summary_table(&shown);
    text.push_str(&format!("\nresults: {}", run_dir.display()));
    let reports = outcome.results.values().filter(|result| result.kind == "report");
    for report in reports {
        let dir = crate::store::RunDir { path: run_dir.to_owned() }.stage_dir(&report.address);
        text.push_str(&format!("\nreport:  {}", dir.join("report.md").display()));
    }
    if outcome.was_cancelled {
        text.push_str(&format!("\nstopped; labpipe run {} goes on from the last committed stage", file.display()));
    } else if outcome.exit_code != 0 {
        text.push_str(&format!("\nsome stages failed; mend the cause and run again: labpipe run {}", file.display()));
    }
    text
}
