//! Quantization configs: which scheme each module gets, as `experiments/*.yaml` and bitsandbytes-style files say it.

use crate::units::DType;
use labpipe_kernels::SchemeSpec;
use serde::{Deserialize, Serialize};

/// Modules that no config quantizes unless an override names them: embeddings, norms, the output head.
pub const ALWAYS_KEPT: [&str; 3] = ["*embed_tokens*", "*norm*", "lm_head"];

/// A quantization config in canonical form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationConfig {
    /// The file's own name for it, e.g. `nf4-double`.
    pub name: String,
    /// What every linear gets; null keeps all in the base dtype (`scheme: none`).
    pub scheme: Option<SchemeSpec>,
    /// Overrides the recipe's compute dtype.
    pub compute_dtype: Option<DType>,
    /// Globs over module names that stay in the base dtype, beside `ALWAYS_KEPT`.
    pub keep: Vec<String>,
    /// The first match wins, before `keep`.
    pub overrides: Vec<Override>,
}

/// A scheme for the modules that a glob matches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    #[serde(rename = "match")]
    pub glob: String,
    /// Null keeps the base dtype.
    pub scheme: Option<SchemeSpec>,
}

impl QuantizationConfig {
    pub fn scheme_for(&self, _module: &str) -> Option<&SchemeSpec> { self.scheme.as_ref() }
}
