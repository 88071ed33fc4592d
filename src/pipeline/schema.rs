//! The JSON Schema of pipeline files, from the same descriptions that files are read with.

use super::read::expected;
use crate::stage::{Catalogue, ParamDefault, ParamDesc, ParamType};
use serde_json::{Map, Value, json};

/// Returns the schema (JSON Schema 2020-12).
pub fn schema(catalogue: &Catalogue) -> Value {
    let kinds: Vec<Value> = catalogue.iter().map(|stage| stage_schema(stage.description())).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "labpipe pipeline",
        "type": "object",
        "additionalProperties": false,
        "required": ["version", "name", "stages"],
        "properties": {
            "version": { "const": 1 },
            "name": { "type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$" },
            "vars": { "type": "object", "description": "variables, used as ${name}" },
            "execution": { "enum": ["auto", "burn", "fused"], "default": "auto" },
            "device": { "type": "string", "pattern": "^(auto|cpu|wgpu|cuda(:[0-9]{1,3})?)$", "default": "auto" },
            "memory_limit": {
                "anyOf": [{ "type": "integer", "minimum": 1 }, { "type": "string", "pattern": "^[0-9.]+ *([KMGTkmgt]?([iI]?[bB])?)$" }],
                "description": "most memory that a model and all it needs may take, as 7.5GiB"
            },
            "matrix": { "type": "object", "description": "lists of values by variable; include and exclude are lists of mappings" },
            "stages": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": { "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$" },
                "additionalProperties": { "oneOf": kinds }
            }
        }
    })
}

fn stage_schema(description: &crate::stage::StageDescription) -> Value {
    let mut properties = Map::new();
    properties.insert("kind".to_owned(), json!({ "const": description.kind }));
    properties.insert("after".to_owned(), list_of(json!({ "type": "string" })));
    for param in description.params {
        properties.insert(param.name.to_owned(), param_schema(param));
    }
    let needed = description.params.iter().filter(|param| param.default == ParamDefault::Required);
    let required: Vec<&str> = ["kind"].into_iter().chain(needed.map(|param| param.name)).collect();
    json!({
        "type": "object",
        "description": description.summary,
        "additionalProperties": false,
        "required": required,
        "properties": properties,
    })
}

/// Any value may also be a reference to a variable, and so may a part of one.
fn or_variable(schema: Value) -> Value {
    json!({ "anyOf": [schema, { "type": "string", "pattern": "\\$\\{[^}]+\\}" }] })
}

fn param_schema(param: &ParamDesc) -> Value {
    let mut schema = or_variable(type_schema(&param.ty));
    schema["description"] = Value::from(format!("{} ({})", param.help, expected(param)));
    if let ParamDefault::Json(text) = &param.default {
        schema["default"] = serde_json::from_str(text).unwrap_or(Value::Null);
    }
    schema
}

fn list_of(item: Value) -> Value {
    json!({ "anyOf": [item, { "type": "array", "items": or_variable(item), "minItems": 1 }] })
}

fn type_schema(ty: &ParamType) -> Value {
    match ty {
        ParamType::Bool => json!({ "type": "boolean" }),
        ParamType::Integer { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        ParamType::Integers { min, max } => list_of(json!({ "type": "integer", "minimum": min, "maximum": max })),
        ParamType::Float { min, max } => json!({ "type": "number", "minimum": min, "maximum": max }),
        ParamType::Word | ParamType::Model | ParamType::StageRef(_) => json!({ "type": "string", "minLength": 1 }),
        ParamType::OneOf(words) => json!({ "enum": words }),
        ParamType::SomeOf(words) => list_of(json!({ "enum": words })),
        ParamType::Globs | ParamType::StageRefs(_) => list_of(json!({ "type": "string" })),
        ParamType::RandomModel => json!({
            "type": "object", "additionalProperties": false, "required": ["config"],
            "properties": { "config": { "type": "string" }, "seed": or_variable(json!({ "type": "integer", "minimum": 0 })) }
        }),
        ParamType::TextSource => json!({ "anyOf": [
            { "type": "string", "minLength": 1 },
            { "type": "array", "items": { "type": "string", "minLength": 1 }, "minItems": 1 },
            {
                "type": "object", "additionalProperties": false, "required": ["source"],
                "properties": {
                    "source": list_of(json!({ "type": "string", "minLength": 1 })),
                    "n_chars": or_variable(json!({ "type": "integer", "minimum": 1 })),
                    "n_tokens": or_variable(json!({ "type": "integer", "minimum": 1 })),
                    "separator": { "type": "string", "minLength": 1 },
                    "column": { "type": "string", "minLength": 1, "default": "text" },
                    "join": { "type": "string", "default": "\n\n" },
                    "chat": { "anyOf": [{ "type": "boolean" }, {
                        "type": "object", "additionalProperties": false, "properties": { "system": { "type": "string" } }
                    }] }
                }
            }
        ] }),
        ParamType::QuantizationConfig => json!({ "type": ["string", "object"] }),
    }
}
