//! The burn backend extension: a linear layer whose weight stays as it is stored (f16, bf16, packed codes).
//!
//! It knows tensors and weights, nothing of models. No path here ever holds more than one panel of dequantized rows a
//! thread ([`PANEL_BYTES`]).

mod flex;
mod host;

pub use host::{PANEL_BYTES, linear_into, peak_panel_bytes};

use crate::weight::HostWeight;
use burn::backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;
use std::sync::Arc;

/// Linear layers over weights in their stored form.
#[backend_extension(Flex)]
pub trait StoredLinear: Backend {
    /// Returns `x · Wᵀ` in the type of `x`, accumulated in fp32.
    ///
    /// # Shapes
    /// `x` `[m, in]`, `weight` `[out, in]`, result `[m, out]`.
    fn stored_linear(x: FloatTensor<Self>, weight: Arc<HostWeight>) -> FloatTensor<Self>;
}

/// Returns `x · Wᵀ` (see [`StoredLinear::stored_linear`]).
///
/// # Shapes
/// `x` `[m, in]`, `weight` `[out, in]`, result `[m, out]`.
pub fn stored_linear(x: Tensor<2>, weight: &Arc<HostWeight>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::stored_linear(x.into_dispatch(), Arc::clone(weight)))
}
