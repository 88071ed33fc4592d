//! Formulae over numbers: statistics of samples, perplexity, activation and weight errors. Everything is computed in
//! f64.
//!
//! This room knows no model, no file and no clock. The formulae are those of docs/definitions.md.

pub mod activation;
mod error;
pub mod perplexity;
mod statistics;
pub mod weights;

pub use error::MetricsError;
pub use statistics::{percentile, statistics};
