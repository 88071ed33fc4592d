//! Why a metric could not be computed.

/// The text fits "failed to {error}".
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    #[error(
        "split {n_tokens} token(s) into windows: at least 2 are needed, one to predict from and one to score; use a \
         longer text"
    )]
    TextTooShort { n_tokens: usize },
    #[error("split a text into windows of {max_length} token(s): max_length must be at least 2")]
    MaxLength { max_length: usize },
    #[error(
        "split a text into windows of {max_length} tokens every {stride}: stride must be between 1 and max_length, \
         or tokens would be skipped"
    )]
    Stride { stride: usize, max_length: usize },
    #[error("score window {begin}..{end}: {expected} value(s) expected, {found} found")]
    WindowScores { begin: usize, end: usize, expected: usize, found: usize },
    #[error(
        "score token {token_idx}: its negative log-likelihood is {value}; the model's logits are not finite, so try \
         a wider compute_dtype"
    )]
    ScoreNotFinite { token_idx: usize, value: f64 },
    #[error(
        "compute a perplexity from {n_scored} scored token(s): at least 2 are needed for a standard error; use a \
         longer text"
    )]
    TooFewScores { n_scored: usize },
    #[error("compute a perplexity: e to the power of a mean NLL of {nll_mean} nats is too large for a number")]
    PerplexityOverflow { nll_mean: f64 },
    #[error(
        "compare rows of width {width}: the reference has {reference} value(s), the candidate {candidate}; both must \
         hold the same whole rows"
    )]
    RowShape { width: usize, reference: usize, candidate: usize },
    #[error("compare values: {which} value {value} at row {row_idx}, column {column_idx} is not finite")]
    ValueNotFinite { which: &'static str, row_idx: usize, column_idx: usize, value: f32 },
    #[error("compare {module}: no rows were captured for it")]
    NoRows { module: String },
    #[error("compare weights: {reference} reference value(s) against {candidate}")]
    WeightShape { reference: usize, candidate: usize },
}
