//! Qwen2 and Qwen2.5: Llama's block with biases on the query, key and value projections.

use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec};
use crate::inference::InferenceError;

pub const FAMILY: Family = Family { model_type: "qwen2", spec };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let mut spec = config.base_spec("qwen2")?;
    spec.block.biases = LinearBiases::qkv(true);
    slide_upper_layers(config, &mut spec)?;
    Ok(spec)
}

/// Applies Qwen's sliding windows: off unless `use_sliding_window`, and then in the layers from `max_window_layers` on.
pub fn slide_upper_layers(config: &ConfigFile, spec: &mut ModelSpec) -> Result<(), InferenceError> {
    if !config.flag("use_sliding_window")?.unwrap_or(false) {
        return Ok(());
    }
    let window = config.size("sliding_window")?;
    let first = config.size("max_window_layers")?.unwrap_or(28);
    let sliding = config.sliding_layers(spec.n_layers, |layer_idx| window.is_some() && layer_idx >= first)?;
    let rope = spec.attentions[0].rope.clone();
    spec.set_sliding(&sliding, window, rope);
    Ok(())
}
