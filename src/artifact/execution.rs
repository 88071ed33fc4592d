//! How a stage's model was run.

use serde::{Deserialize, Serialize};

/// How a model was run: which definition of its computation, and what the device did of what makes it fast.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execution {
    /// `burn`: the definition in burn's tensor operations, which every device runs; `fused`: kernels that do several operations at
    /// once, on a GPU.
    pub path: String,
    /// Why the fused path was not taken, where it was not asked for either way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// What multiplies many rows at once: `cuBLAS 13.0.2`, `burn's matmul`, `cubecl kernels`, `gemm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub products: Option<String>,
    /// How single tokens went through the model: `recorded, overlapped`, `recorded`, `launched one by one`, `host slices`,
    /// `burn operations`. Absent where none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<String>,
    /// What the device could do and did not: a missing library, a refused recording. Absent where there is nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slow: Vec<String>,
}
