//! Records of the stages that name models: the recipe in them takes the place of weights.

use super::{ModelInfo, ModelRecipe, SourceAccount};
use crate::artifact::{QuantizeTotals, QuantizedModule, RecordBody, SavedFolder};
use crate::quantization::QuantizationConfig;
use serde::{Deserialize, Serialize};

/// The body of a `load` record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadRecord {
    pub recipe: ModelRecipe,
    pub model: ModelInfo,
    /// What of the files was used. Null in records before version 2 of `load`.
    #[serde(default)]
    pub account: Option<SourceAccount>,
    /// Bytes of all weights as the recipe stores them.
    #[serde(default)]
    pub weights_bytes: Option<u64>,
    /// Absent for what does not come from the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubRevision>,
}

/// Which revision of a model on the hub was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubRevision {
    pub id: String,
    /// Null where the cache does not say.
    pub commit: Option<String>,
}

/// The body of a `quantize` record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizeRecord {
    pub recipe: ModelRecipe,
    pub model: ModelInfo,
    pub config: QuantizationConfig,
    #[serde(default)]
    pub weights_bytes: Option<u64>,
    pub totals: QuantizeTotals,
    /// One row per linear.
    pub modules: Vec<QuantizedModule>,
    /// Absent where nothing was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<SavedFolder>,
}

impl RecordBody for LoadRecord {
    const KIND: &'static str = "load";
}

impl RecordBody for QuantizeRecord {
    const KIND: &'static str = "quantize";
}
