//! Decoding on the host without tensors: one token's step on plain slices, its buffers made once, its products split over the
//! threads of one [`Team`](team::Team). Weights are those of the executor; keys and values are the cache's own, moved and not copied
//! (see [`KvCache::host_layers`](super::kv_cache::KvCache::host_layers)).
//!
//! It computes in f32 alone and takes every model that the executor takes, but for what [`Unsupported`] names; that decodes through
//! burn as prefill does. Sums are taken in another order than burn takes them, so logits agree to rounding and not to the bit.

mod step;
mod team;
mod weights;

pub use step::HostDecoder;

/// What keeps a model from decoding here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    #[error("activations are rounded to a compute dtype other than f32")]
    ComputeDtype,
    #[error("the activation is exact GELU")]
    ExactGelu,
    #[error("a scheme's product quantizes activations too (LLM.int8())")]
    QuantizedActivations,
    #[error("the weights are on a device")]
    OnDevice,
}
