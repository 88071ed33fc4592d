//! Qwen3: Qwen2's block without biases, its queries and keys normalized head by head.

use super::qwen2::slide_upper_layers;
use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec};
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family = Family { model_type: "qwen3", spec };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let config = config.with_defaults(&[("head_dim", json!(128))]);
    let mut spec = config.base_spec("qwen3")?;
    let attention_bias = config.flag("attention_bias")?.unwrap_or(false);
    spec.block.biases = LinearBiases { o: attention_bias, ..LinearBiases::qkv(attention_bias) };
    spec.block.qk_norm = true;
    slide_upper_layers(&config, &mut spec)?;
    Ok(spec)
}
