//! Cache keys: blake3 over the named fields that determine what a stage produces.

use super::build::{Facts, MissingFile, PlanError};
use super::external::external_files;
use super::types::{Key, KeyFields};
use crate::artifact::key_of;
use crate::pipeline::PipelineStage;
use crate::stage::{ParamType, StageDescription};
use labpipe_kernels::SCHEMES;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Returns the fields that don't depend on inputs.
///
/// # Errors
/// `MissingFiles`, `Hash`.
pub fn own_fields(
    stage: &PipelineStage,
    description: &StageDescription,
    root: &Path,
    facts: &dyn Facts,
) -> Result<KeyFields, PlanError> {
    let mut fields = KeyFields::new();
    fields.insert("kind".to_owned(), stage.kind.clone());
    fields.insert("stage.version".to_owned(), description.version.to_string());
    for param in description.params {
        if !matches!(param.ty, ParamType::StageRef(_) | ParamType::StageRefs(_)) {
            let value = stage.params.get(param.name).map(canonical).unwrap_or_default();
            fields.insert(format!("params.{}", param.name), value);
        }
    }
    let address = || stage.address.clone();
    let files = external_files(description, &stage.params, root).map_err(|missing| {
        PlanError::MissingFiles(vec![MissingFile {
            stage: stage.name.clone(),
            line: stage.line,
            param: missing.param,
            reason: missing.reason,
        }])
    })?;
    for file in files {
        let hash = match &file.path {
            Some(path) => facts.file_hash(path).map_err(|reason| PlanError::Hash { stage: address(), reason })?,
            // No artifact has this key: whoever computes downloads first.
            None => "not downloaded yet".to_owned(),
        };
        fields.insert(format!("files.{}", file.written), hash);
    }
    if description.computes || description.measures {
        let engine = facts.engine();
        fields.insert("engine.backend".to_owned(), engine.backend.clone());
        fields.insert("engine.numerics".to_owned(), engine.numerics_version.to_string());
        let schemes: Vec<String> =
            SCHEMES.iter().map(|scheme| format!("{}={}", scheme.name(), scheme.version())).collect();
        fields.insert("engine.schemes".to_owned(), schemes.join(","));
        if description.measures {
            fields.insert("device".to_owned(), engine.device);
        }
    }
    Ok(fields)
}

/// Returns JSON text that does not depend on the order in which a mapping was written.
fn canonical(value: &Value) -> String {
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

/// An input's key, and its artifact's digest where it is a measurement.
pub type InputKey = (Key, Option<String>);

/// Adds what a stage takes from its inputs and returns the key. `lookup` gives an input's key and digest, or nothing for an
/// input that failed (gathering stages alone have those); measurements count by their digest, so that new numbers always
/// reach their consumers.
pub fn resolve_key(
    stage: &PipelineStage,
    own: &KeyFields,
    lookup: &dyn Fn(&str) -> Option<InputKey>,
) -> (Key, KeyFields) {
    let mut fields: KeyFields =
        own.iter().filter(|(name, _)| !name.starts_with("inputs.")).map(|(n, v)| (n.clone(), v.clone())).collect();
    for (param, addresses) in &stage.inputs {
        for (i, address) in addresses.iter().enumerate() {
            let value = match lookup(address) {
                None => "failed".to_owned(),
                Some((_, Some(digest))) => format!("digest:{digest}"),
                Some((key, None)) => format!("key:{}", key.0),
            };
            // What gathers shows its inputs by name; for the others a name changes nothing.
            let value = if stage.gathers.contains(param) { format!("{address} {value}") } else { value };
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
