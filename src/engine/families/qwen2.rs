//! Qwen2 and Qwen2.5: Llama's block with biases on the query, key and value projections.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, NO_MLP_BIAS, WHOLE_HEADS, harmless_as, read};
use super::notes::Rules;
use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec};
use crate::inference::InferenceError;
use serde_json::{Value, json};

pub const FAMILY: Family =
    Family { model_type: "qwen2", rules: Rules { own: &[COMMON, DECODER, WINDOWS, FIELDS], section: &[] }, spec };

/// What Qwen2 and Qwen3 read of sliding windows.
pub const WINDOWS: &[FieldRule] =
    &[read("layer_types"), read("max_window_layers"), read("sliding_window"), read("use_sliding_window")];

const FIELDS: &[FieldRule] = &[WHOLE_HEADS, NO_MLP_BIAS, harmless_as("attention_bias", &["true"]), read("hidden_act")];

const NAMES: BaseNames = BaseNames { family: "qwen2", activation: "hidden_act", rope: ConfigFile::rope };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let config = config.with_stated_defaults(&stated_defaults());
    let mut spec = config.base_spec(&NAMES)?;
    spec.block.biases = LinearBiases::qkv(true);
    slide_upper_layers(&config, &mut spec)?;
    Ok(spec)
}

/// Returns what Qwen2 and Qwen3 take for fields that every config of theirs has.
pub fn stated_defaults() -> [(&'static str, Value); 2] {
    [("max_position_embeddings", json!(32_768)), ("num_key_value_heads", json!(32))]
}

/// Applies Qwen's sliding windows: off unless `use_sliding_window`, and then in the layers from `max_window_layers` on.
pub fn slide_upper_layers(config: &ConfigFile, spec: &mut ModelSpec) -> Result<(), InferenceError> {
    if !config.flag("use_sliding_window", false)? {
        if config.sliding_layers(spec.n_layers, |_| false)?.contains(&true) {
            let types = config.peek("layer_types").unwrap_or(&Value::Null);
            config.overrule("layer_types", types, "use_sliding_window", &json!(false));
        }
        return Ok(());
    }
    let config = config.with_defaults(&[("sliding_window", json!(4096))]);
    let has_window = config.size("sliding_window")?.is_some();
    let first = config.count("max_window_layers", 28)?;
    let sliding = config.sliding_layers(spec.n_layers, |layer_idx| has_window && layer_idx >= first)?;
    let rope = spec.attentions[0].rope.clone();
    spec.set_sliding(&sliding, config.window(&sliding)?, rope);
    Ok(())
}
