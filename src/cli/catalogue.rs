//! `stages` and `schema`: what a pipeline file may say.

use super::error::CliError;
use super::print;
use crate::pipeline::{expected, schema as pipeline_schema};
use crate::stage::{ParamDefault, ParamDesc, StageDescription};
use crate::stages::catalogue;
use serde_json::{Value, json};

/// Lists the kinds of stage with every parameter.
pub fn stages(as_json: bool) -> Result<u8, CliError> {
    let catalogue = catalogue();
    let text = if as_json {
        let kinds: Vec<Value> = catalogue.iter().map(|stage| stage_json(stage.description())).collect();
        serde_json::to_string_pretty(&kinds).unwrap_or_default()
    } else {
        catalogue.iter().map(|stage| stage_text(stage.description())).collect::<Vec<_>>().join("\n")
    };
    print(&text)?;
    Ok(0)
}

/// Prints the JSON Schema.
pub fn schema() -> Result<u8, CliError> {
    print(&serde_json::to_string_pretty(&pipeline_schema(&catalogue())).unwrap_or_default())?;
    Ok(0)
}

fn default(param: &ParamDesc) -> String {
    match &param.default {
        ParamDefault::Required => "required".to_owned(),
        ParamDefault::Absent => "optional".to_owned(),
        ParamDefault::Json(text) => format!("default {text}"),
    }
}

fn stage_text(description: &StageDescription) -> String {
    let nature = match (description.measures, description.computes) {
        (true, _) => " (measures: holds its device alone)",
        (false, true) => " (computes with a model)",
        (false, false) => "",
    };
    let mut text = format!("{}{nature}\n  {}\n", description.kind, description.summary);
    for param in description.params {
        text.push_str(&format!("    {:<15} {} [{}]\n", param.name, expected(param), default(param)));
        text.push_str(&format!("    {:<15}   {}\n", "", param.help));
    }
    text
}

fn stage_json(description: &StageDescription) -> Value {
    let params: Vec<Value> = description
        .params
        .iter()
        .map(|param| {
            let value = match &param.default {
                ParamDefault::Json(text) => serde_json::from_str(text).unwrap_or(Value::Null),
                _ => Value::Null,
            };
            json!({
                "name": param.name,
                "type": expected(param),
                "unit": param.unit,
                "required": param.default == ParamDefault::Required,
                "default": value,
                "help": param.help,
            })
        })
        .collect();
    json!({
        "kind": description.kind,
        "summary": description.summary,
        "version": description.version,
        "measures": description.measures,
        "computes": description.computes,
        "params": params,
    })
}
