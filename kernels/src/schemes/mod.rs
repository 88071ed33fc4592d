//! The registry of schemes. It knows no tensor library and no model.

pub mod dynamic_map;
mod int4;
mod int8;
pub mod nf4;

use serde::{Deserialize, Serialize};

/// A scheme and its settings, as a quantization config names them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchemeSpec {
    /// A name in [`SCHEMES`]: `nf4`, `int8`, `int4`.
    pub scheme: String,
    /// Values per block (nf4) or per group (int4); null where the scheme has none (int8: one scale a row).
    pub block_size: Option<usize>,
    /// The block scales are quantized too (nf4 only).
    pub double_quant: bool,
    /// Zero point 8 instead of one per group (int4 only).
    pub symmetric: bool,
}

/// A weight matrix in packed form, row-major `[n_rows, n_cols]` = `[out, in]`.
#[derive(Debug, Clone)]
pub struct Packed {
    pub spec: SchemeSpec,
    pub n_rows: usize,
    pub n_cols: usize,
    /// Codes as the scheme packs them (for nf4: two a byte over the flattened matrix, even index in the high nibble).
    pub codes: Vec<u8>,
    /// Scales: per block (nf4 absmax, decoded if double quantized), per row (int8 absmax), per group (int4 scale).
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
    /// Bytes stored: codes, statistics and second-level statistics as the scheme's standard stores them.
    fn stored_bytes(&self, packed: &Packed) -> u64;
}

/// Every scheme there is.
pub static SCHEMES: &[&dyn Scheme] = &[&nf4::Nf4, &int8::Int8, &int4::Int4];

/// Returns the scheme of that name.
///
/// # Errors
/// [`SchemeError::Unknown`].
pub fn scheme(name: &str) -> Result<&'static dyn Scheme, SchemeError> {
    SCHEMES.iter().copied().find(|scheme| scheme.name() == name).ok_or_else(|| SchemeError::Unknown(name.to_owned()))
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
