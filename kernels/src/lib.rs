//! Quantization schemes for the weights of linear layers: what is stored, how it is packed, and how to compute from it.
//!
//! Host pack and unpack are always compiled. A scheme is one file in `schemes/` and one line in [`SCHEMES`].
//! Feature `burn` adds the backend extension that multiplies activations with packed weights.

#[cfg(feature = "burn")]
pub mod burn_ext;
#[cfg(feature = "cube")]
pub mod cube;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dense;
mod error;
pub mod schemes;
pub mod simd;
pub mod strips;
pub mod token;
pub mod weight;

pub use error::reconstruction_error;
pub use schemes::{Packed, SCHEMES, Scheme, SchemeError, SchemeSpec, scheme};
