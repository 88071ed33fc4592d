//! `run` and `rerun`.

use super::args::{Global, RerunArgs, RunArgs};
use super::download::download;
use super::engine;
use super::error::CliError;
use super::print;
use super::workspace::{Planned, Read, planned, read};
use crate::artifact::StageStatus;
use crate::event::{Event, EventSink, Level};
use crate::pipeline::ParseOptions;
use crate::plan::{Remeasure, Selection};
use crate::run::{
    RunFile, RunOutcome, RunRequest, environment, execute, external_files, metrics_rows, planned_stages, run_id,
    timestamp,
};
use crate::store::{Results, append_metrics_csv};
use crate::ui::{sink, summary_table};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

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
    let Planned { plan, store, workers } = planned(global, &read, selection)?;
    let results = Results::new(&global.results);
    let info = workers.info().clone();
    let run_file = RunFile {
        run_id: run_id(),
        pipeline: read.pipeline.name.clone(),
        pipeline_path: file.to_owned(),
        root: global.root.clone(),
        command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        selection: asked(selection),
        jobs,
        plan: planned_stages(&plan),
        files: external_files(&plan, &global.root),
        pipeline_text: read.text.clone(),
        set: read.options.set.clone(),
        matrix: read.options.matrix.clone(),
        device_asked: read.options.device.clone(),
        device: info.device.clone(),
        device_reason: workers.reason().to_owned(),
        environment: environment(&info, engine::gpus().as_deref()),
        started_at: timestamp(),
        ended_at: None,
        load_average_after: None,
        status: "running".to_owned(),
        stages: Vec::new(),
    };
    let run_dir = results.start(&read.pipeline.name, &run_file.run_id, &run_file.to_json())?;
    let cancel = Arc::new(AtomicBool::new(false));
    let teller = catch_interrupts(&cancel, &events)?;
    let request = RunRequest {
        plan: &plan,
        catalogue: &read.catalogue,
        root: &global.root,
        store: &store,
        run_dir: &run_dir,
        run_file,
        runner: Arc::new(workers),
        events,
        cancel: Arc::clone(&cancel),
        jobs,
    };
    let outcome = execute(&request)?;
    // A signal that stopped the run has woken the thread too: its word comes before the last one.
    if let Some(teller) = teller.filter(|_| cancel.load(Ordering::Relaxed)) {
        let _ = teller.join();
    }
    if std::env::var("SAVE_EVAL_RESULTS").is_ok_and(|value| !["", "0", "false"].contains(&value.as_str())) {
        append_metrics_csv(&global.results.join("metrics.csv"), &metrics_rows(&outcome.results, &timestamp()))?;
    }
    print(&closing(&outcome, &run_dir.path, &again(global, file, &read.options)))?;
    Ok(outcome.exit_code)
}

fn asked(selection: &Selection) -> Value {
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
    })
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

/// Returns the command that goes on with this run, options included; what the environment says it says again.
fn again(global: &Global, file: &Path, options: &ParseOptions) -> String {
    let mut command = format!("labpipe run {}", quoted(&file.to_string_lossy()));
    for (option, folder, default, variable) in [
        ("--root", &global.root, ".", None),
        ("--cache", &global.cache, "cache", Some("LABPIPE_CACHE")),
        ("--results", &global.results, "results", Some("LABPIPE_RESULTS")),
    ] {
        if folder != Path::new(default) && variable.is_none_or(|name| std::env::var_os(name).is_none()) {
            command.push_str(&format!(" {option} {}", quoted(&folder.to_string_lossy())));
        }
    }
    for (name, value) in &options.set {
        command.push_str(&format!(" --set {}", quoted(&format!("{name}={value}"))));
    }
    for (name, values) in &options.matrix {
        command.push_str(&format!(" --matrix {}", quoted(&format!("{name}={}", values.join(",")))));
    }
    if let Some(device) = &options.device {
        command.push_str(&format!(" --device {}", quoted(device)));
    }
    command
}

/// Quotes a word for a POSIX shell where it needs that.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

fn closing(outcome: &RunOutcome, run_dir: &Path, again: &str) -> String {
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
    if outcome.was_cancelled {
        text.push_str(&format!("\nstopped; {again} goes on from the last committed stage"));
    } else if outcome.exit_code != 0 {
        text.push_str(&format!("\nsome stages failed; mend the cause and run again: {again}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_goes_on_has_the_run_s_options() {
        let folder = |name: &str| PathBuf::from(name);
        let global = Global {
            root: folder("."),
            cache: folder("/a b"),
            results: folder("results"),
            log_format: super::super::args::LogFormat::Auto,
            verbose: false,
            quiet: false,
        };
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let options = ParseOptions {
            set: vec![pair("model", "/models/x"), pair("n_prompt", "[512, 2048]"), pair("title", "it's")],
            matrix: vec![("config".to_owned(), vec!["nf4".to_owned(), "int8".to_owned()])],
            device: Some("cpu".to_owned()),
            ..ParseOptions::default()
        };
        assert_eq!(
            again(&global, Path::new("p.yaml"), &options),
            r"labpipe run p.yaml --cache '/a b' --set model=/models/x --set 'n_prompt=[512, 2048]' --set 'title=it'\''s' --matrix config=nf4,int8 --device cpu"
        );
    }
}
