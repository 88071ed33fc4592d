//! Confidence intervals as records hold them.

use super::number;
use serde::{Deserialize, Serialize};

/// A 95 % confidence interval of a figure over the scored tokens of a text, from the spread between blocks of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockInterval {
    /// The figure itself.
    #[serde(with = "number")]
    pub value: f64,
    /// Ends of the interval.
    #[serde(with = "number")]
    pub low: f64,
    #[serde(with = "number")]
    pub high: f64,
    /// One standard error.
    #[serde(with = "number")]
    pub stderr: f64,
    pub n_tokens: usize,
    /// Documents that the tokens belong to.
    pub n_documents: usize,
    pub n_blocks: usize,
    /// Tokens per block: the last one of a document is longer, documents that are shorter are put together; the mean where blocks are whole
    /// documents.
    pub block_tokens: usize,
    /// Lag-1 correlation of neighbouring blocks that was left; null where blocks do not differ.
    #[serde(default, with = "number::optional")]
    pub lag1_correlation: Option<f64>,
    /// How it was computed, and what is not in it.
    pub method: String,
}

impl BlockInterval {
    /// Blocks below which an interval is given but nothing is concluded from it.
    pub const MIN_VERDICT_BLOCKS: usize = 8;

    /// Returns the interval of an increasing function of the figure. `slope` is its derivative at the figure, which scales the standard
    /// error; `None` where an end or the error is NaN.
    pub fn map(&self, function: impl Fn(f64) -> f64, slope: f64) -> Option<BlockInterval> {
        let (value, low, high) = (function(self.value), function(self.low), function(self.high));
        let stderr = self.stderr * slope;
        let is_known = ![value, low, high, stderr].iter().any(|number| number.is_nan());
        is_known.then(|| BlockInterval { value, low, high, stderr, ..self.clone() })
    }

    /// Returns the interval of exp of the figure.
    pub fn exp(&self) -> Option<BlockInterval> {
        self.map(f64::exp, self.value.exp())
    }

    /// Returns the interval moved to another value of the figure: of a mean whose weights differ little.
    #[must_use]
    pub fn around(&self, value: f64) -> BlockInterval {
        let shift = value - self.value;
        BlockInterval { value, low: self.low + shift, high: self.high + shift, ..self.clone() }
    }

    /// Returns the interval with its ends kept within what the figure can be.
    #[must_use]
    pub fn within(&self, min: f64, max: f64) -> BlockInterval {
        BlockInterval { low: self.low.max(min), high: self.high.min(max), ..self.clone() }
    }

    /// Returns whether there are enough blocks to conclude anything.
    pub fn allows_verdict(&self) -> bool {
        self.n_blocks >= Self::MIN_VERDICT_BLOCKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_keep_the_ends_and_scale_the_error() {
        let interval = BlockInterval {
            value: 2.0,
            low: 1.9,
            high: 2.2,
            stderr: 0.05,
            n_tokens: 4000,
            n_documents: 1,
            n_blocks: 31,
            block_tokens: 128,
            lag1_correlation: Some(0.02),
            method: "a test".to_owned(),
        };
        let found = interval.exp().expect("it is finite");
        assert_eq!((found.value, found.low, found.high), (2f64.exp(), 1.9f64.exp(), 2.2f64.exp()));
        assert!((found.stderr - 0.05 * 2f64.exp()).abs() < 1e-12);
        let moved = interval.around(3.0);
        assert!((moved.low - 2.9).abs() < 1e-12 && (moved.high - 3.2).abs() < 1e-12);
        assert_eq!((interval.within(1.95, 2.1).low, interval.within(1.95, 2.1).high), (1.95, 2.1));
        assert_eq!(interval.map(|_| f64::NAN, 1.0), None);
        let far = interval.around(800.0).exp().expect("infinity is a number");
        assert_eq!(far.value, f64::INFINITY);
    }
}
