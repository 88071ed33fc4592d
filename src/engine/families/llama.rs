//! Llama (1, 2, 3.x, SmolLM2, TinyStories and others that share its blocks).

use super::{ConfigFile, Family};
use crate::engine::spec::{BlockSpec, ModelSpec};
use crate::inference::InferenceError;

pub const FAMILY: Family = Family { model_type: "llama", spec };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let attention_bias = config.flag("attention_bias")?.unwrap_or(false);
    config.model_spec(
        "llama",
        BlockSpec {
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: config.flag("mlp_bias")?.unwrap_or(false),
            activation: config.activation()?,
            norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: config.rope(10_000.0)?,
        },
    )
}
