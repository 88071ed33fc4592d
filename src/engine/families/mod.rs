//! Model families: each maps a `config.json` to a [`ModelSpec`]. One file and one line in [`FAMILIES`] a family; none has a
//! forward pass of its own.

mod config;
mod decoder;
mod fields;
mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod notes;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod rope_config;
mod rope_fields;
mod smollm3;

pub use config::ConfigFile;

use super::spec::ModelSpec;
use crate::inference::{AccountPart, InferenceError};
use notes::Rules;

/// A family of models.
pub struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// The fields that it reads, and those that are known to change nothing.
    pub rules: Rules,
    /// Maps a config to a spec.
    pub spec: fn(&ConfigFile) -> Result<ModelSpec, InferenceError>,
}

/// Every family labpipe knows.
pub static FAMILIES: &[Family] = &[
    llama::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    mistral::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    gemma3::WITH_VISION,
    phi3::FAMILY,
    smollm3::FAMILY,
    olmo2::FAMILY,
];

/// Returns the spec that a config stands for.
///
/// # Errors
/// `File` where a field is missing or absurd, `UnknownArchitecture` where no family claims it.
pub fn spec_of(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let family = family_of(config)?;
    config.check_supported(family.rules.own)?;
    (family.spec)(config)
}

/// Returns what becomes of each field of a config.
///
/// # Errors
/// As [`spec_of`].
pub fn account_of(config: &ConfigFile) -> Result<AccountPart, InferenceError> {
    spec_of(config)?;
    config.saved_dtype();
    Ok(config.account(&family_of(config)?.rules))
}

fn family_of(config: &ConfigFile) -> Result<&'static Family, InferenceError> {
    let model_type = config.text("model_type")?.unwrap_or_default();
    FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
        let known = FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ");
        let found = match config.architecture() {
            Some(architecture) if model_type.is_empty() => architecture,
            _ => model_type,
        };
        InferenceError::UnknownArchitecture { path: config.path().to_owned(), found, known }
    })
}

#[cfg(test)]
mod tests {
    use super::fields::FieldRole;
    use super::*;
    use crate::engine::rope::RopeSpec;
    use crate::engine::spec::Activation;
    use serde_json::{Map, Value, json};
    use std::path::Path;

    const FIELDS_FILE: &str = "tests/fixtures/config_fields.json";
    /// Configs that transformers refuses or fails with, and why labpipe reads them.
    const READ_ALL_THE_SAME: [(&str, &str); 9] = [
        ("llama-window", "only the cache of keys and values has a window"),
        ("llama-layers", "only the cache of keys and values has kinds of layers"),
        ("phi3-layers", "only the cache of keys and values has kinds of layers"),
        ("qwen2-head-dim-null", "null counts as missing"),
        ("phi3-head-dim-null", "null counts as missing"),
        ("smollm3-head-dim-null", "null counts as missing"),
        ("olmo2-window", "only the cache of keys and values has a window"),
        ("olmo2-layers", "only the cache of keys and values has kinds of layers"),
        ("olmo2-head-dim-null", "null counts as missing"),
    ];
    /// Configs that transformers reads by leaving out what is nested.
    const REFUSED: [&str; 3] = ["llama-rope-nested", "mistral-rope-nested", "olmo2-rope-nested"];

    fn fixture(path: &str) -> Value {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("the fixture");
        serde_json::from_str(&text).expect("JSON")
    }

    fn numbers(value: &Value) -> Vec<f64> {
        value.as_array().expect("a list").iter().map(|value| value.as_f64().expect("a number")).collect()
    }

    fn is_near(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= 2e-6 * expected.abs()
    }

    fn rope_differences(found: &RopeSpec, expected: &Value, lengths: &[f64]) -> Vec<String> {
        let mut differences = Vec::new();
        for (n_seq, expected) in lengths.iter().zip(expected["inverse_frequencies"].as_array().expect("a list")) {
            let (found, expected) = (found.inverse_frequencies(*n_seq as usize), numbers(expected));
            if found.len() != expected.len() || !found.iter().zip(&expected).all(|(f, e)| is_near(*f, *e)) {
                differences.push(format!("frequencies at {n_seq}: {found:?}, transformers {expected:?}"));
            }
        }
        let expected = expected["attention_factor"].as_f64().expect("a number");
        if !is_near(found.attention_factor(), expected) {
            differences.push(format!("attention factor {}, transformers {expected}", found.attention_factor()));
        }
        differences
    }

    fn spec_differences(spec: &ModelSpec, expected: &Value, lengths: &[f64]) -> Vec<String> {
        let activation = match spec.block.activation {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
        };
        let biases = spec.block.biases;
        let windows: Vec<Option<usize>> =
            (0..spec.n_layers).map(|layer_idx| spec.attention(layer_idx).window).collect();
        let found = json!({
            "n_kv_heads": spec.n_kv_heads, "head_dim": spec.head_dim, "activation": activation, "windows": windows,
            "tied": spec.tied_embeddings, "qkv_bias": biases.q && biases.k && biases.v, "o_bias": biases.o,
            "mlp_bias": biases.down, "logits_are_capped": spec.logit_softcap.is_some(),
        });
        let mut differences = Vec::new();
        for (field, value) in found.as_object().expect("a mapping") {
            if value != &expected[field] {
                differences.push(format!("{field} {value}, transformers {}", expected[field]));
            }
        }
        for (field, found) in [("norm_eps", spec.block.norm_eps), ("attn_scale", spec.block.attn_scale)] {
            if !is_near(found, expected[field].as_f64().expect("a number")) {
                differences.push(format!("{field} {found}, transformers {}", expected[field]));
            }
        }
        for (layer_idx, rope_idx) in expected["layer_ropes"].as_array().expect("a list").iter().enumerate() {
            match (&spec.attention(layer_idx).rope, rope_idx.as_u64()) {
                (Some(found), Some(rope_idx)) => {
                    differences.extend(rope_differences(found, &expected["ropes"][rope_idx as usize], lengths));
                }
                (None, None) => {}
                (found, _) => differences.push(format!("layer {layer_idx}: {found:?}, transformers {rope_idx}")),
            }
        }
        differences
    }

    // Expected values: modules that transformers 5.24 builds of the same configs (scripts/fixtures/make_config_cases.py).
    #[test]
    fn configs_mean_what_transformers_makes_of_them() {
        let file = fixture("tests/fixtures/config_cases.json");
        let lengths = numbers(&file["lengths"]);
        let (mut n_specs, mut differences) = (0, Vec::new());
        for case in file["cases"].as_array().expect("a list") {
            let name = case["name"].as_str().expect("a text");
            let spec = spec_of(&ConfigFile::of(Path::new("config.json"), case["config"].clone()));
            let is_read_all_the_same = READ_ALL_THE_SAME.iter().any(|(known, _)| name.starts_with(known));
            match (&case["expected"], spec) {
                (Value::Null, Err(error)) => assert!(error.to_string().contains("config.json"), "{name}: {error}"),
                (Value::Null, Ok(_)) if is_read_all_the_same => {}
                (Value::Null, Ok(_)) => differences.push(format!("{name}: read, and transformers refuses it")),
                (_, Err(_)) if REFUSED.contains(&name) => {}
                (_, Err(error)) => differences.push(format!("{name}: {error}")),
                (expected, Ok(spec)) => {
                    let found = spec_differences(&spec, expected, &lengths);
                    differences.extend(found.into_iter().map(|difference| format!("{name}: {difference}")));
                    n_specs += 1;
                }
            }
        }
        assert!(differences.is_empty(), "{}", differences.join("\n"));
        assert!(n_specs > 300, "{n_specs} specs");
    }

    fn lists(family: &Family) -> Value {
        let mut lists = json!({ "read": {}, "harmless": {}, "harmless_as": {}, "only": {} });
        for list in family.rules.own {
            for rule in *list {
                let (role, values): (_, &[&str]) = match rule.role {
                    FieldRole::Read => ("read", &[]),
                    FieldRole::Harmless => ("harmless", &[]),
                    FieldRole::HarmlessAs(values) => ("harmless_as", values),
                    FieldRole::Only(values) => ("only", values),
                };
                lists[role][rule.name] = json!(values);
            }
        }
        lists
    }

    #[test]
    fn the_lists_that_are_compared_with_transformers_are_the_codes() {
        let mut file = fixture(FIELDS_FILE);
        let found: Map<String, Value> =
            FAMILIES.iter().map(|family| (family.model_type.to_owned(), lists(family))).collect();
        if std::env::var_os("LABPIPE_WRITE_FIXTURES").is_some() {
            file["labpipe"] = Value::Object(found);
            file["labpipe"].sort_all_objects();
            let text = serde_json::to_string_pretty(&file).expect("JSON") + "\n";
            std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIELDS_FILE), text).expect("the fixture");
            return;
        }
        let hint =
            "write the lists anew with LABPIPE_WRITE_FIXTURES=1, then run scripts/fixtures/compare_config_fields.py";
        assert_eq!(Value::Object(found), file["labpipe"], "{hint}");
    }

    // Expected values: the attributes of transformers' classes and what its code reads of a config, found by that script.
    #[test]
    fn every_field_that_transformers_reads_is_listed() {
        let file = fixture(FIELDS_FILE);
        for family in FAMILIES {
            let fields = file["read_by_transformers"][family.model_type].as_array().expect("a list");
            assert!(fields.len() > 70, "{}: {} fields", family.model_type, fields.len());
            for field in fields.iter().filter_map(Value::as_str) {
                assert!(fields::rule_of(family.rules.own, field).is_some(), "{}: {field}", family.model_type);
            }
        }
    }
}
