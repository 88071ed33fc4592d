//! Mistral: Llama's block, each query seeing a window of keys in the first releases. With `layer_types`, transformers takes such
//! a config for a Ministral, some of whose layers slide.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, NO_ATTENTION_BIAS, NO_MLP_BIAS, WHOLE_HEADS, harmless_as, read};
use super::notes::Rules;
use super::{ConfigFile, Family};
use crate::engine::spec::ModelSpec;
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family =
    Family { model_type: "mistral", rules: Rules { own: &[COMMON, DECODER, FIELDS], section: &[] }, spec };

const FIELDS: &[FieldRule] = &[
    WHOLE_HEADS,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    harmless_as("use_sliding_window", &["true"]),
    read("hidden_act"),
    read("layer_types"),
    read("sliding_window"),
];

const NAMES: BaseNames = BaseNames { family: "mistral", activation: "hidden_act", rope: ConfigFile::rope };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    config.refuse_null("num_key_value_heads")?;
    let config = config.with_stated_defaults(&[
        ("max_position_embeddings", json!(131_072)),
        ("num_key_value_heads", json!(8)),
        ("sliding_window", json!(4096)),
    ]);
    let mut spec = config.base_spec(&NAMES)?;
    let slides = config.size("sliding_window")?.is_some();
    let sliding = config.sliding_layers(spec.n_layers, |_| slides)?;
    let rope = spec.attentions[0].rope.clone();
    spec.set_sliding(&sliding, config.window(&sliding)?, rope);
    Ok(spec)
}
