//! `show`: a stage's record.

use super::args::{Global, ShowArgs};
use super::error::CliError;
use super::{check_run, print};
use crate::pipeline::did_you_mean;
use crate::store::{Results, RunDir};
use crate::ui::table;
use serde_json::Value;

/// Shows a stage's record of a run.
pub fn show(global: &Global, args: &ShowArgs) -> Result<u8, CliError> {
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
    let address = address(&run, &args.stage)?;
    let record = record(&dir, &run, &address)?;
    print(&if args.json { serde_json::to_string_pretty(&record).unwrap_or_default() } else { text(&record) })?;
    Ok(0)
}

/// Returns the one address that a name stands for.
fn address(run: &Value, name: &str) -> Result<String, CliError> {
    let all: Vec<&str> =
        run["stages"].as_array().into_iter().flatten().filter_map(|stage| stage["stage"].as_str()).collect();
    if all.contains(&name) {
        return Ok(name.to_owned());
    }
    let copies: Vec<&str> = all.iter().copied().filter(|address| address.split('[').next() == Some(name)).collect();
    match copies.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => Err(CliError::Usage {
            message: format!("run {} has no stage {name:?}", run["run_id"].as_str().unwrap_or("?")),
            hint: did_you_mean(name, all),
        }),
        several => Err(CliError::Usage {
            message: format!("stage {name:?} has {} copies, one a cell", several.len()),
            hint: Some(format!("name one of: {}", several.join(", "))),
        }),
    }
}

fn record(dir: &RunDir, run: &Value, address: &str) -> Result<Value, CliError> {
    dir.record(address, run).map_err(|error| {
        let status = run["stages"].as_array().into_iter().flatten().find(|stage| stage["stage"] == address);
        match status.and_then(|status| status["error"].as_str()) {
            Some(reason) => {
                let outcome = status.and_then(|status| status["outcome"].as_str()).unwrap_or_default();
                let reason = if outcome == "failed" { format!("it failed to {reason}") } else { reason.to_owned() };
                CliError::Usage { message: format!("stage {address} left no record: {reason}"), hint: None }
            }
            None => CliError::Store(error),
        }
    })
}

fn text(record: &Value) -> String {
    let mut text = String::new();
    let Value::Object(fields) = record else { return text };
    for (name, value) in fields {
        match value {
            Value::Array(_) | Value::Object(_) => {}
            Value::String(string) => text.push_str(&format!("{name}: {string}\n")),
            other => text.push_str(&format!("{name}: {other}\n")),
        }
    }
    for (name, value) in fields {
        match value.as_array() {
            Some(rows) if rows.iter().any(Value::is_object) => {
                text.push_str(&format!("\n{name}:\n{}\n", rows_table(rows)))
            }
            _ => {}
        }
    }
    text
}

/// Most fields that fit side by side.
const N_COLUMNS: usize = 10;
/// Most objects that fit side by side.
const N_OBJECTS: usize = 6;

/// Shows objects as rows, or as columns where they are few and have many fields; lists inside them (raw samples) only by their
/// length.
fn rows_table(rows: &[Value]) -> String {
    let fields: Vec<&String> = rows.iter().find_map(Value::as_object).into_iter().flat_map(|row| row.keys()).collect();
    if fields.len() > N_COLUMNS && rows.len() <= N_OBJECTS {
        let (name, others) = fields.split_first().map_or(("", &[][..]), |(first, rest)| (first.as_str(), rest));
        let heads: Vec<String> = rows.iter().map(|row| cell(&row[name])).collect();
        let mut table = table(std::iter::once(name).chain(heads.iter().map(String::as_str)));
        for field in others {
            table.add_row(std::iter::once(field.to_string()).chain(rows.iter().map(|row| cell(&row[field.as_str()]))));
        }
        return table.to_string();
    }
    let mut table = table(fields.iter().map(|field| field.as_str()));
    for row in rows {
        table.add_row(fields.iter().map(|field| cell(&row[field.as_str()])));
    }
    table.to_string()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) if items.iter().all(Value::is_string) => {
            items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
        }
        Value::Array(items) => format!("{} values", items.len()),
        Value::Object(_) => "…".to_owned(),
        Value::String(text) => text.chars().take(48).collect(),
        Value::Number(number) if number.is_f64() => {
            crate::units::format_significant(number.as_f64().unwrap_or(f64::NAN))
        }
        Value::Null => "–".to_owned(),
        other => other.to_string(),
    }
}
