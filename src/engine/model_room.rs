//! The memory that a model's caches and passes come from.

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use super::gpu::Room;
use super::memory::{HostRoom, trim_heap};
use crate::inference::InferenceError;

/// The memory of the device that a model is on.
pub enum ModelRoom {
    Host(HostRoom),
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    Device(Room),
}

impl ModelRoom {
    /// Refuses what can't fit, before any of it is allocated.
    ///
    /// # Errors
    /// `OutOfMemory`, `OverLimit`.
    pub fn check(&self, what: &str, asked_bytes: u64) -> Result<(), InferenceError> {
        match self {
            ModelRoom::Host(room) => room.check(what, asked_bytes),
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            ModelRoom::Device(room) => room.check(what, asked_bytes),
        }
    }

    /// Gives back what the allocator holds without need.
    pub fn tidy(&self) {
        match self {
            ModelRoom::Host(_) => trim_heap(),
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            ModelRoom::Device(room) => room.tidy(),
        }
    }
}
