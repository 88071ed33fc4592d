//! Llama (1, 2, 3.x, SmolLM2, TinyStories and others that share its blocks).

use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec};
use crate::inference::InferenceError;

pub const FAMILY: Family = Family { model_type: "llama", spec };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let mut spec = config.base_spec("llama")?;
    let attention_bias = config.flag("attention_bias")?.unwrap_or(false);
    let mlp = config.flag("mlp_bias")?.unwrap_or(false);
    spec.block.biases =
        LinearBiases { o: attention_bias, gate: mlp, up: mlp, down: mlp, ..LinearBiases::qkv(attention_bias) };
    Ok(spec)
}
