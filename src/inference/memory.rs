//! What a stage asks of a model's memory, and what an engine predicts that it takes.

use serde::{Deserialize, Serialize};

/// What a stage does with a model, as far as memory depends on it; known from the stage's parameters alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Workload {
    /// Positions that the key-value cache has room for; 0 where passes keep no keys and values on a CPU.
    pub n_ctx: usize,
    /// Tokens of the longest pass.
    pub n_pass: usize,
    /// Rows of logits that are computed of it.
    pub n_logits: usize,
    /// Tokens generated one by one.
    pub n_gen: usize,
    /// Module outputs are handed over.
    pub captures: bool,
    /// A text is tokenized for it.
    pub reads_text: bool,
}

/// What a stage that holds a model will ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryNeed {
    /// It holds none.
    Nothing,
    Known(Workload),
    /// It depends on what is read when the stage runs, which this says.
    Unknown(&'static str),
}

/// The memory that a stage takes at its peak, in bytes, part by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemoryPrediction {
    /// Parameters as stored; on a CPU those that are mapped from files too.
    pub weights_bytes: u64,
    pub kv_cache_bytes: u64,
    /// Activations of the longest pass, logits, scratch of products, what generating keeps.
    pub activations_bytes: u64,
    /// What the process takes before it holds a model: on a GPU the driver's context and libraries.
    pub program_bytes: u64,
}

impl MemoryPrediction {
    /// Returns the peak.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes + self.kv_cache_bytes + self.activations_bytes + self.program_bytes
    }
}
