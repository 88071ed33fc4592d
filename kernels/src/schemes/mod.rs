//! The registry of schemes. It knows no tensor library and no model.

pub mod codebook;
pub mod dynamic_map;
pub mod fp4;
mod grouped;
mod int4;
mod int8;
mod int8_product;
pub mod mxfp4;
pub mod nf4;

use serde::{Deserialize, Serialize};

/// A scheme and its settings, as a quantization config names them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchemeSpec {
    /// A name in [`SCHEMES`]: `nf4`, `fp4`, `int8`, `int4`, `mxfp4`.
    pub scheme: String,
    /// Values per block (nf4, fp4) or per group (int4, mxfp4); null where the scheme has none (int8: one scale a row).
    pub block_size: Option<usize>,
    /// The block scales are quantized too (nf4 and fp4 only).
    pub double_quant: bool,
    /// Zero point 8 instead of one per group (int4 only).
    pub symmetric: bool,
    /// Products as LLM.int8() has them (int8 only): activations are quantized to 8 bits as well, but for columns that hold a
    /// magnitude of at least this; 0 quantizes every column. Null leaves activations as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_threshold: Option<f32>,
}

impl SchemeSpec {
    /// Returns a scheme with all its settings at their defaults.
    pub fn new(scheme: impl Into<String>) -> SchemeSpec {
        SchemeSpec {
            scheme: scheme.into(),
            block_size: None,
            double_quant: false,
            symmetric: false,
            outlier_threshold: None,
        }
    }
}

/// A weight matrix in packed form, row-major `[n_rows, n_cols]` = `[out, in]`.
#[derive(Debug, Clone)]
pub struct Packed {
    pub spec: SchemeSpec,
    pub n_rows: usize,
    pub n_cols: usize,
    /// Codes as the scheme packs them (4-bit ones two a byte, the even index in the high nibble: over the flattened matrix for
    /// nf4 and fp4, row by row for int4 and mxfp4).
    pub codes: Vec<u8>,
    /// Scales: per block (nf4 and fp4 absmax, decoded if double quantized), per row (int8 absmax), per group (int4 scale, mxfp4
    /// power of two).
    pub scales: Vec<f32>,
    /// int4 zero points, one a group; empty otherwise.
    pub zeros: Vec<u8>,
    /// Second-level statistics of double quantization.
    pub nested: Option<Nested>,
}

/// Double quantization: absmax as 8-bit codes of the dynamic map, blocks of 256.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    pub codes: Vec<u8>,
    /// One a block of 256 absmax values.
    pub absmax: Vec<f32>,
    pub offset: f32,
}

/// Why a matrix could not be packed or unpacked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SchemeError {
    #[error("scheme {0:?} is not known")]
    Unknown(String),
    #[error("block_size {found} is not usable for {scheme}: {expected}")]
    BlockSize { scheme: &'static str, found: usize, expected: &'static str },
    #[error("{n_values} values do not fill a {n_rows}x{n_cols} matrix")]
    Shape { n_values: usize, n_rows: usize, n_cols: usize },
    #[error("value {value} at index {index} can't be quantized")]
    NotFinite { index: usize, value: f32 },
    #[error("setting {setting} does not apply to {scheme}")]
    Setting { scheme: &'static str, setting: &'static str },
    #[error("outlier_threshold {found} is not usable: expected a number from 0 (LLM.int8() takes 6)")]
    Threshold { found: f32 },
}

/// One way to store a weight matrix in fewer bits.
pub trait Scheme: Send + Sync {
    /// Name in configs and records.
    fn name(&self) -> &'static str;
    /// Grows when packed bytes change for the same input; in the key of whatever uses the scheme.
    fn version(&self) -> u32;
    /// One sentence: what is stored.
    fn summary(&self) -> &'static str;
    /// Fills in defaults (block size) and refuses settings the scheme lacks.
    fn normalize(&self, spec: &SchemeSpec) -> Result<SchemeSpec, SchemeError>;
    /// Packs a row-major matrix. NaN and infinities are refused.
    fn pack(&self, spec: &SchemeSpec, values: &[f32], n_rows: usize, n_cols: usize) -> Result<Packed, SchemeError>;
    /// Writes rows `first_row..first_row + n` as f32 into `out` (`[n, n_cols]`).
    fn unpack_rows(&self, packed: &Packed, first_row: usize, out: &mut [f32]);
    /// Writes `y[i] = Σ_k w[first_row + i, k]·x[k]` for `y.len()` rows, fp32 accumulation.
    fn matvec_rows(&self, packed: &Packed, first_row: usize, x: &[f32], y: &mut [f32]);
    /// Returns true where [`product`](Self::product) computes.
    fn has_own_product(&self, _packed: &Packed) -> bool {
        false
    }
    /// Writes `x · Wᵀ` into `out` (`[m, n_rows]`) and returns true where the scheme's product is more than that of its decoded
    /// weights: activations are quantized too. `x` is `[m, n_cols]`.
    fn product(&self, _packed: &Packed, _x: &[f32], _m: usize, _out: &mut [f32]) -> bool {
        false
    }
    /// Bytes stored: codes, statistics and second-level statistics as the scheme's standard stores them.
    fn stored_bytes(&self, packed: &Packed) -> u64;
}

/// Every scheme there is.
pub static SCHEMES: &[&dyn Scheme] = &[&nf4::NF4, &fp4::FP4, &int8::Int8, &int4::Int4, &mxfp4::Mxfp4];

/// Returns the scheme of that name.
///
/// # Errors
/// [`SchemeError::Unknown`].
pub fn scheme(name: &str) -> Result<&'static dyn Scheme, SchemeError> {
    SCHEMES.iter().copied().find(|scheme| scheme.name() == name).ok_or_else(|| SchemeError::Unknown(name.to_owned()))
}

/// Refuses what a spec sets beside `allowed`, its name and its block size.
fn refuse_all_but(allowed: &[&str], scheme: &'static str, spec: &SchemeSpec) -> Result<(), SchemeError> {
    let set = [
        ("double_quant", spec.double_quant),
        ("symmetric", spec.symmetric),
        ("outlier_threshold", spec.outlier_threshold.is_some()),
    ];
    match set.into_iter().find(|(setting, is_set)| *is_set && !allowed.contains(setting)) {
        Some((setting, _)) => Err(SchemeError::Setting { scheme, setting }),
        None => Ok(()),
    }
}

/// Checks that values fill the matrix and are finite.
fn check_values(values: &[f32], n_rows: usize, n_cols: usize) -> Result<(), SchemeError> {
    if n_rows.checked_mul(n_cols) != Some(values.len()) {
        return Err(SchemeError::Shape { n_values: values.len(), n_rows, n_cols });
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(SchemeError::NotFinite { index, value: values[index] }),
        None => Ok(()),
    }
}
