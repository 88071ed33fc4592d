//! The burn backend extension: linear layers and embeddings whose weights stay as they are stored (f16, bf16, packed codes).
//!
//! It knows tensors and weights, nothing of models. On a CPU no path here ever holds more than one panel of dequantized rows a
//! thread ([`PANEL_BYTES`]); on burn's cubecl backend (feature `burn-cube`: CUDA and wgpu) kernels launch on the stream and in the
//! memory pools that burn's own operations use.

#[cfg(feature = "burn-cube")]
mod cube;
#[cfg(feature = "burn-cube")]
mod device_weight;
mod flex;
mod host;
#[cfg(feature = "burn-cube")]
pub mod row_ops;
mod stored_weight;

#[cfg(feature = "burn-cube")]
pub use cube::DEVICE_PANEL_BYTES;
#[cfg(feature = "burn-cube")]
pub use device_weight::{DeviceWeight, LargeProducts};
pub use host::{PANEL_BYTES, linear_into, peak_panel_bytes};
pub use stored_weight::{ElsewhereError, ProductError, StoredWeight};

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{Int, Tensor};
use std::sync::Arc;

/// Products with weights in their stored form, and products that are as exact as their element type.
#[backend_extension(Flex, Cube: cfg(feature = "burn-cube"))]
pub trait StoredLinear: Backend {
    /// Returns `x · Wᵀ` in the type of `x`, accumulated in fp32.
    ///
    /// # Shapes
    /// `x` `[m, in]`, `weight` `[out, in]`, result `[m, out]`.
    fn stored_linear(x: FloatTensor<Self>, weight: Arc<StoredWeight>) -> FloatTensor<Self>;

    /// Returns rows of a weight in f32.
    ///
    /// # Shapes
    /// `ids` `[n]`, each below the weight's rows; `weight` `[rows, width]`; result `[n, width]`.
    fn stored_rows(ids: IntTensor<Self>, weight: Arc<StoredWeight>) -> FloatTensor<Self>;

    /// Returns `lhs · rhs`; of f32 tensors without rounding their values to a shorter type first, as tensor cores would (TF32).
    ///
    /// # Shapes
    /// `lhs` `[.., m, k]`, `rhs` `[.., k, n]`, result `[.., m, n]`.
    fn exact_matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Returns `x · Wᵀ` (see [`StoredLinear::stored_linear`]).
///
/// # Shapes
/// `x` `[m, in]`, `weight` `[out, in]`, result `[m, out]`.
///
/// # Errors
/// `Elsewhere` if the weight is not where `x` is; `Cublas` if cuBLAS failed in this product or an earlier one.
pub fn stored_linear(x: Tensor<2>, weight: &Arc<StoredWeight>) -> Result<Tensor<2>, ProductError> {
    weight.check_place(&x.device())?;
    let product = Tensor::from_dispatch(Dispatch::stored_linear(x.into_dispatch(), Arc::clone(weight)));
    weight.check_products()?;
    Ok(product)
}

/// Returns rows of a weight in f32 (see [`StoredLinear::stored_rows`]).
///
/// # Shapes
/// `ids` `[n]`, each below the weight's rows; `weight` `[rows, width]`; result `[n, width]`.
///
/// # Errors
/// [`ElsewhereError`] where the weight is not where `ids` are.
pub fn stored_rows(ids: Tensor<1, Int>, weight: &Arc<StoredWeight>) -> Result<Tensor<2>, ElsewhereError> {
    weight.check_place(&ids.device())?;
    Ok(Tensor::from_dispatch(Dispatch::stored_rows(ids.into_dispatch(), Arc::clone(weight))))
}

/// Returns `lhs · rhs` (see [`StoredLinear::exact_matmul`]).
///
/// # Shapes
/// `lhs` `[.., m, k]`, `rhs` `[.., k, n]`, result `[.., m, n]`.
pub fn exact_matmul<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::exact_matmul(lhs.into_dispatch(), rhs.into_dispatch()))
}
