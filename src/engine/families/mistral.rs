//! Mistral: Llama's block, each query seeing a window of keys in the first releases.

use super::{ConfigFile, Family};
use crate::engine::spec::ModelSpec;
use crate::inference::InferenceError;

pub const FAMILY: Family = Family { model_type: "mistral", spec };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let mut spec = config.base_spec("mistral")?;
    // Absent and null both mean no window: every config that has one says so.
    spec.attentions[0].window = config.size("sliding_window")?;
    Ok(spec)
}
