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
    /// Returns the bytes of the device's memory that this process has; `None` where the driver does not say.
    pub used_bytes: Arc<dyn Fn() -> Option<u64> + Send + Sync>,
    /// Most bytes of the device's memory that this process may have.
    pub limit_bytes: Option<u64>,
}

/// The memory of one device.
#[derive(Clone)]
pub struct Room {
    client: Client,
    free_bytes: Arc<dyn Fn() -> Option<u64> + Send + Sync>,
    used_bytes: Arc<dyn Fn() -> Option<u64> + Send + Sync>,
    limit_bytes: Option<u64>,
}

impl Room {
    pub fn new(client: &Client, senses: &Senses) -> Room {
        Room {
            client: client.clone(),
            free_bytes: Arc::clone(&senses.free_bytes),
            used_bytes: Arc::clone(&senses.used_bytes),
            limit_bytes: senses.limit_bytes,
        }
    }

    /// Returns true where the device records launches, to be replayed at once.
    pub fn records_launches(&self) -> bool {
        self.client.name() == "cuda"
    }

    /// Gives what the allocator holds without need back to the driver. The runtime refuses while another thread records a graph; then
    /// it stays where it is, and nothing else is wrong.
    pub fn tidy(&self) {
        let _ = self.client.memory_cleanup();
    }

    /// Returns what could still be allocated: what the driver has free, and what the allocator holds without need.
    pub fn free_bytes(&self) -> Option<u64> {
        let usage = self.client.memory_report(MemoryScope::Device).usage();
        (self.free_bytes)().map(|free| free + usage.bytes_reserved.saturating_sub(usage.bytes_in_use))
    }

    /// Returns what this process has of the device's memory outside of the allocator: the driver's context, libraries, code; `None`
    /// where the driver does not say.
    pub fn program_bytes(&self) -> Option<u64> {
        let reserved = self.client.memory_report(MemoryScope::Device).usage().bytes_reserved;
        (self.used_bytes)().map(|used| used.saturating_sub(reserved))
    }

    /// Returns what this process has of the device's memory: by the driver, else what the allocator holds.
    fn held_bytes(&self) -> u64 {
        let reserved = self.client.memory_report(MemoryScope::Device).usage().bytes_reserved;
        (self.used_bytes)().map_or(reserved, |used| used.max(reserved))
    }

    /// Refuses what can't fit, before any of it is allocated: the device's free memory and the limit. Lets everything pass where the
    /// device does not tell and there is no limit.
    ///
    /// # Errors
    /// `OutOfMemory`, `OverLimit`.
    pub fn check(&self, what: &str, asked_bytes: u64) -> Result<(), InferenceError> {
        self.check_limit(what, asked_bytes)?;
        self.check_free(what, asked_bytes)
    }

    fn check_limit(&self, what: &str, asked_bytes: u64) -> Result<(), InferenceError> {
        let Some(limit) = self.limit_bytes else { return Ok(()) };
        if self.held_bytes() + asked_bytes <= limit {
            return Ok(());
        }
        let _ = self.client.memory_cleanup();
        let usage = self.client.memory_report(MemoryScope::Device).usage();
        // What the allocator could not give back it can still give out.
        let kept = usage.bytes_reserved.saturating_sub(usage.bytes_in_use);
        let left = limit.saturating_sub(self.held_bytes().saturating_sub(kept));
        if asked_bytes <= left { Ok(()) } else { Err(InferenceError::over_limit(what, asked_bytes, left, limit)) }
    }

    fn check_free(&self, what: &str, asked_bytes: u64) -> Result<(), InferenceError> {
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

const POOL_MEMORY_METHOD: &str = "the most that cubecl's allocator held of the device's memory when asked: weights, cache, activations; what \
                                  the driver takes for itself is not told here and not in it";

/// Takes the allocator's peak for the device's memory where the driver names none.
fn with_pool(seen: MemoryFigures, peak_bytes: u64) -> MemoryFigures {
    // Of a process's memory on the host nothing is said here: it is not where the model is.
    let is_of_device = seen.memory_bytes.is_some() && seen.memory_mapped_bytes.is_none();
    if is_of_device || peak_bytes == 0 {
        return seen;
    }
    MemoryFigures {
        memory_bytes: Some(peak_bytes),
        memory_mapped_bytes: None,
        memory_method: Some(POOL_MEMORY_METHOD.to_owned()),
        ..seen
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
            ..with_pool(inner.finish(), peak_bytes)
        }
    }
}
