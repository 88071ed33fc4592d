//! Phi-3, Phi-3.5-mini and Phi-4: Llama's block with query, key and value in one matrix, and gate and up in another.

use super::{ConfigFile, Family};
use crate::engine::rope::RopeScaling;
use crate::engine::spec::ModelSpec;
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family = Family { model_type: "phi3", spec };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let defaults = [("original_max_position_embeddings", json!(4096)), ("rms_norm_eps", json!(1e-5))];
    let config = config.with_defaults(&defaults);
    let mut spec = config.base_spec("phi3")?;
    let attention = &mut spec.attentions[0];
    if !matches!(attention.rope.scaling, RopeScaling::None | RopeScaling::LongRope { .. }) {
        return Err(config.error("rope scaling: a phi3 model has longrope or none"));
    }
    attention.window = config.size("sliding_window")?;
    spec.block.fused_qkv = true;
    spec.block.fused_gate_up = true;
    Ok(spec)
}
