//! labpipe turns a YAML file into evidence about a quantized language model: how fast it prefills and decodes, how much
//! memory it takes, how much accuracy it loses, and in which layers.
//!
//! The one natural way through: YAML text -> [`pipeline`] -> [`plan`] -> [`run`] -> artifacts in the [`store`] -> [`report`].
//! ARCHITECTURE.md has the map.

// Words.
pub mod artifact;
pub mod event;
pub mod json_file;
pub mod units;

// Contracts.
pub mod inference;
pub mod quantization;
pub mod stage;

// Pure rooms (the store, the hub and the GGUF reader do I/O and nothing else).
pub mod bench;
pub mod dataset;
pub mod gguf;
pub mod hub;
pub mod metrics;
pub mod pipeline;
pub mod plan;
pub mod report;
pub mod store;

// Work.
#[cfg(feature = "cpu")]
pub mod engine;
pub mod stages;

// Top.
pub mod cli;
pub mod run;
pub mod ui;
