//! Gemma 3, the part that reads text: Gemma 2's block with normalized queries and keys in place of the soft cap on scores; five layers of six slide, with
//! rotary frequencies of their own.

use super::gemma2::{gemma_spec, shared_defaults};
use super::{ConfigFile, Family};
use crate::engine::spec::ModelSpec;
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family = Family { model_type: "gemma3_text", spec };

/// Models that see images too (4B and larger): the text model is a part of them, and labpipe runs that part.
pub const WITH_VISION: Family = Family { model_type: "gemma3", spec: |config| spec(&config.section("text_config")?) };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let mut defaults = shared_defaults();
    defaults.extend([
        ("vocab_size", json!(262_208)),
        ("max_position_embeddings", json!(131_072)),
        ("rope_theta", json!(1_000_000.0)),
    ]);
    let config = config.with_defaults(&defaults);
    let mut spec = gemma_spec(&config, "gemma3")?;
    // `max_position_embeddings` is already what the linear scaling allows.
    spec.n_ctx_max = config.size("max_position_embeddings")?.unwrap_or(spec.n_ctx_max);
    spec.block.qk_norm = true;
    let pattern = config.size("sliding_window_pattern")?.unwrap_or(6);
    let sliding = config.sliding_layers(spec.n_layers, |layer_idx| (layer_idx + 1) % pattern != 0)?;
    let rope = config.sliding_rope(spec.head_dim, 10_000.0)?;
    spec.set_sliding(&sliding, config.size("sliding_window")?, rope);
    Ok(spec)
}
