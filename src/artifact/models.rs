//! What records say of quantized modules, and the record of `report`.

use super::number;
use super::record::RecordBody;
use serde::{Deserialize, Serialize};

/// One row of a `quantize` record's `modules`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizedModule {
    /// `model.layers.4.mlp.down_proj`.
    pub module: String,
    /// `nf4`, `int8`, `int4`, or the base dtype where it was kept.
    pub scheme: String,
    /// Values per block or group; null where the scheme has none (per row, or kept).
    pub block_size: Option<usize>,
    pub double_quant: bool,
    pub n_params: u64,
    /// 8 · bytes / n_params.
    #[serde(with = "number")]
    pub bits_per_weight: f64,
    pub bytes: u64,
    /// Mean squared difference between the dequantized and the base weight.
    #[serde(with = "number")]
    pub weight_mse: f64,
    /// 10·log10(Σw²/Σ(w − ŵ)²); null where the difference is 0.
    #[serde(default, with = "number::optional")]
    pub weight_sqnr_db: Option<f64>,
}

/// All linears of a `quantize` record together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizeTotals {
    pub n_quantized: usize,
    pub n_kept: usize,
    /// Parameters of quantized modules, and the bytes they take.
    pub quantized_params: u64,
    pub quantized_bytes: u64,
    /// Null where none is quantized.
    #[serde(default, with = "number::optional")]
    pub quantized_bits_per_weight: Option<f64>,
    /// All weights of the model, embeddings and norms included.
    pub weights_bytes: u64,
    pub base_bytes: u64,
    #[serde(with = "number")]
    pub bits_per_weight: f64,
}

/// A folder that `quantize` saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFolder {
    /// Relative to the artifact's folder.
    pub folder: String,
    pub format: String,
    pub bytes: u64,
}

/// The body of a `report` record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportRecord {
    pub files: Vec<ReportedFile>,
    /// Addresses of inputs that failed or were skipped.
    pub missing_inputs: Vec<String>,
}

/// A file of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedFile {
    /// Relative to the artifact's folder.
    pub path: String,
    pub bytes: u64,
}

impl RecordBody for ReportRecord {
    const KIND: &'static str = "report";
}
