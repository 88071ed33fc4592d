//! Qwen2 and Qwen2.5: Llama's block with biases on the query, key and value projections.

use super::{ConfigFile, Family};
use crate::engine::spec::{BlockSpec, ModelSpec};
use crate::inference::InferenceError;

pub const FAMILY: Family = Family { model_type: "qwen2", spec };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    if config.flag("use_sliding_window")?.unwrap_or(false) {
        return Err(config.error("use_sliding_window is true: sliding windows are not supported yet"));
    }
    config.model_spec(
        "qwen2",
        BlockSpec {
            qkv_bias: true,
            o_bias: false,
            mlp_bias: false,
            activation: config.activation()?,
            norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: config.rope(10_000.0)?,
        },
    )
}
