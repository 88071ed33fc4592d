//! Phi-3, Phi-3.5-mini and Phi-4: Llama's block with query, key and value in one matrix, and gate and up in another.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, NO_ATTENTION_BIAS, NO_MLP_BIAS, harmless_as, read};
use super::notes::Rules;
use super::{ConfigFile, Family};
use crate::engine::spec::ModelSpec;
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family =
    Family { model_type: "phi3", rules: Rules { own: &[COMMON, DECODER, FIELDS], section: &[] }, spec };

const FIELDS: &[FieldRule] = &[
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    harmless_as("full_attn_mod", &["1"]),
    harmless_as("interpolate_factor", &["1"]),
    harmless_as("layer_types", &[]),
    read("hidden_act"),
    read("partial_rotary_factor"),
    read("sliding_window"),
];

const NAMES: BaseNames = BaseNames { family: "phi3", activation: "hidden_act", rope: ConfigFile::phi3_rope };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let config = config
        .with_stated_defaults(&[("max_position_embeddings", json!(4096))])
        .with_defaults(&[("original_max_position_embeddings", json!(4096)), ("rms_norm_eps", json!(1e-5))]);
    let mut spec = config.base_spec(&NAMES)?;
    config.note_full_layers();
    spec.attentions[0].window = config.size("sliding_window")?;
    spec.block.fused_qkv = true;
    spec.block.fused_gate_up = true;
    Ok(spec)
}
