//! Room on the device: whether what is about to be allocated fits, and what cubecl's allocator holds.

use super::rows::device_error;
use crate::artifact::MemoryFigures;
use crate::inference::{DeviceProbe, InferenceError, MemoryProbe};
use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::server::Handle;
use std::sync::Arc;

/// What is known of a device beside what it computes.
pub struct Senses {
    /// Starts to watch this process's memory.
    pub memory: Box<dyn Fn() -> Box<dyn MemoryProbe> + Send + Sync>,
    /// Makes what watches energy and clocks; nothing where the device tells of neither.
    pub device: Box<dyn Fn() -> Option<Box<dyn DeviceProbe>> + Send + Sync>,
    /// Returns the bytes that the driver could still hand out; nothing where it does not tell.
    pub free_bytes: Arc<dyn Fn() -> Option<u64> + Send + Sync>,
}

/// The memory of one device.
#[derive(Clone)]
pub struct Room {
    client: Client,
    free_bytes: Arc<dyn Fn() -> Option<u64> + Send + Sync>,
}

impl Room {
    pub fn new(client: &Client, senses: &Senses) -> Room {
        Room { client: client.clone(), free_bytes: Arc::clone(&senses.free_bytes) }
    }

    /// Returns what could still be allocated: what the driver has free, and what the allocator holds without need.
    pub fn free_bytes(&self) -> Option<u64> {
        let usage = self.client.memory_report(MemoryScope::Device).usage();
        (self.free_bytes)().map(|free| free + usage.bytes_reserved.saturating_sub(usage.bytes_in_use))
    }

    /// Refuses what can't fit, before any of it is allocated; lets everything pass where the device does not tell.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn check(&self, what: &str, asked_bytes: u64) -> Result<(), InferenceError> {
        match (self.free_bytes)() {
            Some(free) if free < asked_bytes => {}
            _ => return Ok(()),
        }
        // What the allocator only keeps goes back to the driver. It refuses while a graph is recorded, which is then not freed.
        let _ = self.client.memory_cleanup();
        match self.free_bytes() {
            Some(free) if free < asked_bytes => Err(InferenceError::out_of_memory(what, asked_bytes, Some(free))),
            _ => Ok(()),
        }
    }

    /// Returns the failure of an allocation: cubecl keeps it on the buffer until somebody reads it.
    ///
    /// # Errors
    /// `OutOfMemory`, `DeviceLost`, `Device`.
    pub fn check_allocated<'a>(&self, handles: impl Iterator<Item = &'a Handle>) -> Result<(), InferenceError> {
        self.client.check(handles).map_err(device_error)
    }
}

const POOL_METHOD: &str = "the most that cubecl's allocator held of the device's memory when asked, which is at the stage's start \
                           and after each of its cases; freed pages were handed back at the start";

/// Adds what the device's allocator holds to what another probe sees.
pub struct PoolProbe {
    client: Client,
    inner: Box<dyn MemoryProbe>,
    peak_bytes: u64,
}

impl PoolProbe {
    /// Hands freed pages back to the driver, then starts `inner`.
    pub fn start(client: &Client, inner: impl FnOnce() -> Box<dyn MemoryProbe>) -> PoolProbe {
        // Where it is refused more is counted, never less.
        let _ = client.memory_cleanup();
        let mut probe = PoolProbe { client: client.clone(), inner: inner(), peak_bytes: 0 };
        probe.mark();
        probe
    }
}

impl MemoryProbe for PoolProbe {
    fn mark(&mut self) {
        self.inner.mark();
        let usage = self.client.memory_report(MemoryScope::Device).usage();
        self.peak_bytes = self.peak_bytes.max(usage.bytes_reserved);
    }

    fn finish(mut self: Box<Self>) -> MemoryFigures {
        self.mark();
        let PoolProbe { inner, peak_bytes, .. } = *self;
        MemoryFigures {
            // A runtime without pools reports none.
            pool_peak_bytes: (peak_bytes > 0).then_some(peak_bytes),
            pool_peak_method: (peak_bytes > 0).then(|| POOL_METHOD.to_owned()),
            ..inner.finish()
        }
    }
}
