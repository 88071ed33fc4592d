//! Llama (1, 2, 3.x, SmolLM2, TinyStories and others that share its blocks).

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, NO_WINDOWS, WHOLE_HEADS, read};
use super::notes::Rules;
use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec};
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family =
    Family { model_type: "llama", rules: Rules { own: &[COMMON, DECODER, NO_WINDOWS, FIELDS], section: &[] }, spec };

const FIELDS: &[FieldRule] = &[WHOLE_HEADS, read("attention_bias"), read("hidden_act"), read("mlp_bias")];

const NAMES: BaseNames = BaseNames { family: "llama", activation: "hidden_act", rope: ConfigFile::rope };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let config = config.with_stated_defaults(&[("max_position_embeddings", json!(2048))]);
    let mut spec = config.base_spec(&NAMES)?;
    config.note_full_layers();
    let attention_bias = config.flag("attention_bias", false)?;
    let mlp = config.flag("mlp_bias", false)?;
    spec.block.biases =
        LinearBiases { o: attention_bias, gate: mlp, up: mlp, down: mlp, ..LinearBiases::qkv(attention_bias) };
    Ok(spec)
}
