//! The kernels in cubecl: the same code runs on CUDA and, where it uses no tensor cores, on any runtime that cubecl has.
//!
//! A stored matrix lives on the device as a [`DeviceMatrix`]: the host's packed bytes as u32 words, and its statistics. Kernels decode
//! through the [`Decode`](decode::Decode) trait, one implementation a scheme. This room allocates and launches; it knows no model.

#![expect(
    clippy::collapsible_if,
    clippy::identity_op,
    clippy::manual_is_multiple_of,
    clippy::reversed_empty_ranges,
    reason = "device code: cubecl does not know what these would make of it, or it has another meaning there"
)]

mod attention;
pub mod decode;
pub mod decode_attention;
mod dequantize;
pub mod flash;
mod form;
pub mod gemv;
pub mod kernel_store;
mod launch;
mod launch_attention;
mod launch_dequantize;
mod launch_logits;
mod linear;
mod loader;
pub mod logits;
pub mod loss;
mod matrix;
pub mod ops;
pub mod outliers;
pub mod overlap;
mod paths;
pub mod quantize;
mod reduce;
mod rows;
mod staging;
mod tensor_core;
mod tile;

#[cfg(feature = "cuda")]
pub use crate::cuda::{cublas, parts as nvidia};
pub use form::{FileMatrix, Form};
pub use launch::{
    Element, Place, Residual, add_bias, add_norm, embed, gate, gate_columns, linear, linear_add, soft_cap,
};
pub use launch_attention::{DecodeScratch, LayerCache, attention, decode_attention, rope_append};
pub use launch_dequantize::{Piece, dequantize, dequantize_piece};
pub use launch_logits::{ChooseScratch, choose, has_clock, score, stamp};
pub use loader::{MatrixLoader, kept};
pub use loss::{LOSS_BUDGET, Loss, LossMeter, measuring_bytes};
pub use matrix::{DeviceMatrix, Kind};
pub use outliers::outlier_linear;
pub use paths::{NotTaken, Paths};
pub use rows::{argmax, rms_norm, rotate};
pub use tensor_core::{Gemv, Norm, Tuning, flash_attention, flash_fits, gemv, gemv_fits};
