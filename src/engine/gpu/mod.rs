//! The engine on a GPU: burn's device, cubecl's kernels.
//!
//! A model takes the fused path where that covers it, else the general one, which is the executor in burn's operations over weights that
//! `general` places. On the fused path whole sequences run in `pass`, tokens one by one in `decode`, recorded once as a graph and
//! replayed. Both interpret the same spec as the executor, over weights in stored form. On CUDA large products go through cuBLAS and small ones through tensor-core
//! kernels; elsewhere both go through a kernel that any runtime has.

mod arena;
mod cache;
mod decode;
mod engine;
mod forecast;
mod general;
mod model;
mod pass;
mod products;
mod room;
mod rope;
mod rows;
mod survey;
mod taps;
mod weights;

pub use engine::GpuEngine;
pub use room::{Room, Senses};
