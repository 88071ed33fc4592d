//! Formulae: statistics of samples, perplexity, activation differences. Pure; docs/definitions.md has them with sources.

mod activation;
mod perplexity;
mod statistics;

pub use activation::ActivationDiff;
pub use perplexity::{Convention, PerplexitySum, Window, short_text_note, windows};
pub use statistics::{percentile, statistics};

/// Why a figure can't be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    #[error("score a text of {n_tokens} token(s): at least 2 are needed")]
    TooShort { n_tokens: usize },
    #[error("use stride {stride}: expected 1 to max_length ({max_length})")]
    Stride { stride: usize, max_length: usize },
    #[error("compare rows of {width}: the reference has {reference} value(s), the candidate {candidate}")]
    Rows { width: usize, reference: usize, candidate: usize },
    #[error("compare values of {what}: {value} at index {index}")]
    NotFinite { what: &'static str, index: usize, value: f32 },
}
