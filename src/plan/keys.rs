//! Cache keys: blake3 over the named fields that determine what a stage produces.

use super::build::{Facts, MissingFile, PlanError};
use super::external::{External, Unusable, external};
use super::types::{Key, KeyFields};
use crate::artifact::key_of;
use crate::inference::EngineInfo;
use crate::pipeline::PipelineStage;
use crate::stage::{ParamType, StageDescription};
use crate::versions;
use labpipe_kernels::SCHEMES;
use serde_json::Value;
use std::collections::BTreeMap;

/// Returns the fields that don't depend on inputs, and the files that they were made from.
///
/// # Errors
/// `MissingFiles`, `Hash`.
pub fn own_fields(
    pipeline: &str,
    stage: &PipelineStage,
    description: &StageDescription,
    facts: &dyn Facts,
) -> Result<External, PlanError> {
    let mut own = external(description, &stage.params, facts).map_err(|unusable| match unusable {
        Unusable::Missing { param, reason } => PlanError::MissingFiles(vec![MissingFile {
            stage: stage.name.clone(),
            line: stage.line,
            param: param.to_owned(),
            reason,
        }]),
        Unusable::Unreadable { reason } => PlanError::Hash { stage: stage.address.clone(), reason },
    })?;
    let fields = &mut own.fields;
    fields.insert("kind".to_owned(), stage.kind.clone());
    fields.insert("stage.version".to_owned(), description.version.to_string());
    if !stage.gathers.is_empty() {
        // What gathers shows who it is.
        fields.insert("shown_as".to_owned(), format!("{} of pipeline {pipeline}", stage.address));
    }
    if description.computes || description.measures {
        let engine = facts.engine();
        engine_fields(description, &engine, fields);
        if description.measures {
            fields.insert("device".to_owned(), engine.device);
        }
    }
    let is_text = |ty: &ParamType| *ty == ParamType::TextSource;
    if description.params.iter().any(|param| is_text(&param.ty) && has_value(stage, param.name)) {
        let crates = versions::of_text();
        fields.extend(crates.into_iter().map(|(name, version)| (format!("text.{name}"), version)));
    }
    Ok(own)
}

fn has_value(stage: &PipelineStage, param: &str) -> bool {
    stage.params.get(param).is_some_and(|value| !value.is_null())
}

/// Adds who computes. A stage that names a model reads its files and computes no number from them: only how this engine stores
/// what it reads matters there, not the libraries nor the machine.
fn engine_fields(description: &StageDescription, engine: &EngineInfo, fields: &mut KeyFields) {
    let names_a_model = |ty: &ParamType| matches!(ty, ParamType::Model | ParamType::RandomModel);
    let only_reads = !description.measures && description.params.iter().any(|param| names_a_model(&param.ty));
    let backend = match only_reads {
        true => engine.backend.split(' ').next().unwrap_or_default(),
        false => engine.backend.as_str(),
    };
    fields.insert("engine.backend".to_owned(), backend.to_owned());
    fields.insert("engine.numerics".to_owned(), engine.numerics_version.to_string());
    let schemes: Vec<String> = SCHEMES.iter().map(|scheme| format!("{}={}", scheme.name(), scheme.version())).collect();
    fields.insert("engine.schemes".to_owned(), schemes.join(","));
    if !only_reads {
        fields.extend(engine.computed_with.iter().map(|(name, value)| (format!("engine.{name}"), value.clone())));
    }
}

/// Returns JSON text that does not depend on the order in which a mapping was written.
pub fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, String> = map.iter().map(|(name, value)| (name, canonical(value))).collect();
            let parts: Vec<String> = sorted.iter().map(|(name, value)| format!("{name:?}:{value}")).collect();
            format!("{{{}}}", parts.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

/// Returns a hash of what a report may show of a stage beside its numbers: its address, its parameters as written, the name of
/// its config, and the same of all that it was made from. `inputs` gives the hashes of its inputs.
pub fn shown(
    stage: &PipelineStage,
    description: &StageDescription,
    config_name: Option<&str>,
    inputs: &[&str],
) -> String {
    let mut fields = KeyFields::from([("address".to_owned(), stage.address.clone())]);
    let is_reference = |ty: &ParamType| matches!(ty, ParamType::StageRef(_) | ParamType::StageRefs(_));
    for param in description.params.iter().filter(|param| !is_reference(&param.ty)) {
        let value = stage.params.get(param.name).map(canonical).unwrap_or_default();
        fields.insert(format!("params.{}", param.name), value);
    }
    fields.extend(config_name.map(|name| ("config_name".to_owned(), name.to_owned())));
    fields.extend(inputs.iter().enumerate().map(|(i, input)| (format!("inputs[{i}]"), (*input).to_owned())));
    key_of(&fields).0
}

/// What a stage's key takes of an input.
#[derive(Debug, Clone, PartialEq)]
pub struct InputKey {
    pub key: Key,
    /// Of the artifact, where the input is a measurement.
    pub digest: Option<String>,
    /// See [`PlanNode::shown`](super::PlanNode::shown).
    pub shown: String,
}

/// Adds what a stage takes from its inputs and returns the key. `lookup` gives an input's key, or nothing for an input that failed
/// (gathering stages alone have those); measurements count by their digest, so that new numbers always reach their consumers.
pub fn resolve_key(
    stage: &PipelineStage,
    own: &KeyFields,
    lookup: &dyn Fn(&str) -> Option<InputKey>,
) -> (Key, KeyFields) {
    let mut fields: KeyFields =
        own.iter().filter(|(name, _)| !name.starts_with("inputs.")).map(|(n, v)| (n.clone(), v.clone())).collect();
    for (param, addresses) in &stage.inputs {
        for (i, address) in addresses.iter().enumerate() {
            let found = lookup(address);
            let value = match &found {
                None => "failed".to_owned(),
                Some(InputKey { digest: Some(digest), .. }) => format!("digest:{digest}"),
                Some(InputKey { key, .. }) => format!("key:{}", key.0),
            };
            // What gathers shows its inputs and what they were made from by name; for the others a name changes nothing.
            let value = match stage.gathers.contains(param) {
                true => format!("{address} {value} shown:{}", found.map(|input| input.shown).unwrap_or_default()),
                false => value,
            };
            fields.insert(format!("inputs.{param}[{i}]"), value);
        }
    }
    (key_of(&fields), fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_a_mapping_changes_no_key() {
        let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        let (a, b) =
            (parse(r#"{"x": [1, {"b": 2, "a": 3}], "c": null}"#), parse(r#"{"c": null, "x": [1, {"a": 3, "b": 2}]}"#));
        assert_eq!(canonical(&a), canonical(&b));
    }

    #[test]
    fn keys_keep_fields_apart_and_stay_what_they_were() {
        let fields = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect::<KeyFields>()
        };
        let key = key_of(&fields(&[("kind", "load"), ("params.model", "\"m\"")]));
        assert_eq!(key.short(), "7b451d1bc063");
        assert_ne!(key_of(&fields(&[("a", "b\nc=d")])), key_of(&fields(&[("a", "b"), ("c", "d")])));
    }
}
