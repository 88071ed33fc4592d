//! Records of `capture-activations` and `diff`.

use super::number;
use super::record::RecordBody;
use crate::units::DType;
use serde::{Deserialize, Serialize};

/// The body of a `capture-activations` record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaptureRecord {
    pub n_tokens: usize,
    /// blake3 of the token ids.
    pub tokens_hash: String,
    /// blake3 of the text; null for random tokens.
    pub text_hash: Option<String>,
    pub activations_bytes: u64,
    pub compute_dtype: DType,
    pub tensors: Vec<CapturedTensor>,
}

/// The body of a `diff` record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiffRecord {
    pub mode: String,
    pub n_tokens: usize,
    /// Modules that one capture has alone.
    pub only_in_reference: Vec<String>,
    pub only_in_candidate: Vec<String>,
    pub modules: Vec<ModuleDiff>,
}

impl RecordBody for CaptureRecord {
    const KIND: &'static str = "capture-activations";
}

impl RecordBody for DiffRecord {
    const KIND: &'static str = "diff";
}

/// One tensor that `capture-activations` kept, a row of its record's `tensors`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CapturedTensor {
    pub module: String,
    /// `input` or `output`.
    pub port: String,
    /// Index of the decoder layer; null outside of the layers.
    pub layer_idx: Option<usize>,
    /// `q_proj`, `norm`, `act`, `attn`, `block`, ….
    pub op: String,
    /// Position in execution order.
    pub order: usize,
    pub n_tokens: usize,
    pub width: usize,
    /// Parquet file, relative to the artifact's folder. Several rows may name one file (a shared input).
    pub file: String,
}

/// One row of a `diff` record's `modules`: output of the candidate against the reference's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModuleDiff {
    pub module: String,
    pub layer_idx: Option<usize>,
    pub op: String,
    pub n_tokens: usize,
    #[serde(with = "number")]
    pub mse: f64,
    /// Cosine similarity per token, averaged.
    #[serde(with = "number")]
    pub cosine: f64,
    /// 1st percentile of the cosine similarity over tokens.
    #[serde(with = "number")]
    pub cosine_p01: f64,
    /// 10·log10(Σr²/Σ(r − c)²); null where MSE is 0.
    #[serde(default, with = "number::optional")]
    pub sqnr_db: Option<f64>,
    /// ‖r − c‖/‖r‖ (Frobenius); null where the reference is all zeros.
    #[serde(default, with = "number::optional")]
    pub rel_frobenius: Option<f64>,
    #[serde(with = "number")]
    pub max_abs_diff: f64,
    #[serde(with = "number")]
    pub ref_mean_abs: f64,
    #[serde(with = "number")]
    pub ref_max_abs: f64,
}
