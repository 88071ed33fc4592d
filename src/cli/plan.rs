//! `plan`, `graph`, `validate`, `matrix`: what a pipeline is, without running it.

use super::args::{Global, GraphArgs, GraphFormat, MatrixArgs, MatrixFormat, PipelineArgs, PlanArgs};
use super::error::CliError;
use super::print;
use super::workspace::{Planned, Read, planned, read, read_text};
use crate::inference::MemoryPrediction;
use crate::pipeline::github_matrix;
use crate::plan::Selection;
use crate::quantization;
use crate::run::{Predicted, StageMemory, forecast};
use crate::ui::table;
use crate::units::format_bytes;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Shows what would run, and why.
pub fn plan(global: &Global, args: &PlanArgs) -> Result<u8, CliError> {
    let read = read(&args.pipeline.file, args.pipeline.options(Some(&args.memory)))?;
    let Planned { plan, workers, .. } = planned(global, &read, &args.select.selection())?;
    let (rows, memory) = (plan.rows(), forecast(&plan, &read.catalogue, &global.root, &workers));
    let memory_of = |stage: &str| memory.iter().find(|row| row.stage == stage);
    let limit = read.pipeline.memory_limit;
    if args.json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|[stage, kind, action, why, key]| {
                let mut row = json!({ "stage": stage, "kind": kind, "action": action, "why": why, "key": key });
                if let Some(memory) = memory_of(stage) {
                    row["memory"] = memory_json(memory, limit);
                }
                row
            })
            .collect();
        print(&serde_json::to_string_pretty(&rows).unwrap_or_default())?;
        return Ok(0);
    }
    let mut table = table(["stage", "kind", "action", "why", "memory", "key"]);
    let n_run = rows.iter().filter(|row| row[2] == "run").count();
    let n = rows.len();
    for [stage, kind, action, why, key] in rows {
        let peak = memory_of(&stage).map_or_else(String::new, |memory| match (memory.peak_bytes(), limit) {
            (None, _) => "not known".to_owned(),
            (Some(peak), Some(limit)) if memory.exceeds(limit) => format!("{}, does not fit", format_bytes(peak)),
            (Some(peak), _) => format_bytes(peak),
        });
        table.add_row([stage, kind, action, why, peak, key]);
    }
    let mut text = format!("{table}\n{n_run} of {n} stages would run");
    let unknown: BTreeMap<&str, usize> = memory.iter().fold(BTreeMap::new(), |mut unknown, row| {
        if let Predicted::Unknown(why) = &row.predicted {
            *unknown.entry(why.as_str()).or_default() += 1;
        }
        unknown
    });
    for (why, n) in unknown {
        text.push_str(&format!("\npeak memory of {n} stages is not known: {why}"));
    }
    for refusal in limit.iter().flat_map(|limit| memory.iter().filter_map(|row| row.refusal(*limit))) {
        text.push_str(&format!("\n{refusal}"));
    }
    print(&text)?;
    Ok(0)
}

fn memory_json(memory: &StageMemory, limit: Option<u64>) -> Value {
    match &memory.predicted {
        Predicted::Unknown(why) => json!({ "peak_bytes": null, "why": why }),
        Predicted::Known(prediction) => {
            let MemoryPrediction { weights_bytes, kv_cache_bytes, activations_bytes, program_bytes } = *prediction;
            json!({
                "peak_bytes": prediction.total_bytes(),
                "weights_bytes": weights_bytes,
                "kv_cache_bytes": kv_cache_bytes,
                "activations_bytes": activations_bytes,
                "program_bytes": program_bytes,
                "limit_bytes": limit,
                "fits": limit.map(|limit| prediction.total_bytes() <= limit),
            })
        }
    }
}

/// Prints the graph.
pub fn graph(global: &Global, args: &GraphArgs) -> Result<u8, CliError> {
    let read = read(&args.pipeline.file, args.pipeline.options(None))?;
    let plan = planned(global, &read, &Selection::default())?.plan;
    print(&match args.format {
        GraphFormat::Dot => plan.to_dot(),
        GraphFormat::Mermaid => plan.to_mermaid(),
    })?;
    Ok(0)
}

/// Checks a pipeline file and that what it names is there.
pub fn validate(global: &Global, args: &PipelineArgs) -> Result<u8, CliError> {
    let read = read(&args.file, args.options(None))?;
    let plan = planned(global, &read, &Selection::default())?.plan;
    check_configs(global, &read)?;
    let cells = match read.pipeline.cells.len() {
        0 => String::new(),
        n => format!(", {n} cells"),
    };
    print(&format!("{}: ok, {} stages{cells}", args.file.display(), plan.order.len()))?;
    Ok(0)
}

/// Reads every quantization config that the pipeline names. A run leaves this to the stages: one cell's damaged config must not
/// keep the others from running.
fn check_configs(global: &Global, read: &Read) -> Result<(), CliError> {
    let stages = read.pipeline.stages.iter().filter(|stage| stage.kind == "quantize");
    let files: BTreeSet<&str> = stages.filter_map(|stage| stage.params.get("config").and_then(Value::as_str)).collect();
    let mut problems = Vec::new();
    for file in files {
        let path = global.root.join(file);
        let text = read_text(&path)?;
        problems.extend(quantization::parse(&text, file, file).err().map(|error| error.to_string()));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(CliError::Usage { message: format!("failed to {}", problems.join("\nerror: failed to ")), hint: None })
}

/// Lists the cells of the matrix.
pub fn matrix(_global: &Global, args: &MatrixArgs) -> Result<u8, CliError> {
    let read = read(&args.pipeline.file, args.pipeline.options(None))?;
    let cells = &read.pipeline.cells;
    print(&match args.format {
        MatrixFormat::Github => github_matrix(&read.pipeline).to_string(),
        MatrixFormat::Json => {
            let cells: Vec<Value> = cells
                .iter()
                .map(|cell| {
                    Value::Object(cell.values.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect())
                })
                .collect();
            serde_json::to_string_pretty(&cells).unwrap_or_default()
        }
        MatrixFormat::Text if cells.is_empty() => "no matrix".to_owned(),
        MatrixFormat::Text => cells.iter().map(|cell| cell.label()).collect::<Vec<_>>().join("\n"),
    })?;
    Ok(0)
}
