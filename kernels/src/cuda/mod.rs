//! Everything that calls the CUDA driver, cuBLAS or NVRTC directly, and the only place that does (`tests/driver_calls.rs`): what of
//! CUDA a machine has, products by cuBLAS beside cubecl's launches, and recorded launches that overlap.
//!
//! cubecl 0.11 shows neither its stream nor the graph that it records. What is known of its insides is in `streams`, tied to the version
//! that kernels/Cargo.toml pins, and checked before an address is used. Each function fails with a reason; callers then take what
//! cubecl has, and say so ([`Paths`](crate::cube::Paths)).

pub mod cublas;
pub(crate) mod overlap;
pub mod parts;
mod streams;

pub use overlap::OverlapError;
