//! Formulae: statistics of samples, perplexity, activation differences. Pure; docs/definitions.md has them with sources.

mod activation;
mod difference;
mod divergence;
mod intervals;
mod perplexity;
mod starts;
mod statistics;

pub use activation::ActivationDiff;
pub use difference::{Difference, Estimate, difference};
pub use divergence::{TokenPair, divergence, linear_figures};
pub use intervals::{MIN_BLOCK_TOKENS, by_document, mean_interval, paired_interval};
pub use perplexity::{
    Convention, Cut, PerplexitySum, TextUnits, Window, half_windows, rolling_windows, short_text_note, windows,
};
pub use starts::{
    FigureStarts, MIN_VERDICT_DF, RateInterval, RateRatio, StartVariance, compared_variance, own_variance,
    pooled_variance, rate_interval, rate_ratio, referred_ratio,
};
pub use statistics::{mean_and_stderr, percentile, quantile_stderr, statistics};

/// Why a figure can't be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    #[error("score a text of {n_tokens} token(s): at least 2 are needed")]
    TooShort { n_tokens: usize },
    #[error("score {n_tokens} tokens in chunks of {n_ctx}: llama.cpp's convention takes at least two")]
    TooFew { n_tokens: usize, n_ctx: usize },
    #[error("use stride {stride}: expected 1 to max_length ({max_length})")]
    Stride { stride: usize, max_length: usize },
    #[error("compare rows of {width}: the reference has {reference} value(s), the candidate {candidate}")]
    Rows { width: usize, reference: usize, candidate: usize },
    #[error("compare values of {what}: {value} at index {index}")]
    NotFinite { what: &'static str, index: usize, value: f32 },
}
