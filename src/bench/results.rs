//! Rows of `prefill-bench` and `decode-bench` records, made from samples.

use crate::artifact::{DecodeResult, PrefillResult, Statistics};
use crate::metrics;

/// Why samples could not become a result. The text fits "failed to {error}".
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    #[error("sum up {label}: no samples were taken; set samples to at least 1")]
    NoSamples { label: String },
    #[error("sum up {label}: sample {sample_idx} took {value} s, which is no duration; the clock can't be trusted")]
    BadSample { label: String, sample_idx: usize, value: f64 },
    #[error("sum up {label}: sequence {sequence_idx} has {found} token times instead of {expected}")]
    BadSequence { label: String, sequence_idx: usize, expected: usize, found: usize },
}

/// Returns `pp512`.
pub fn prefill_label(n_prompt: usize) -> String {
    format!("pp{n_prompt}")
}

/// Returns `tg128`, or `tg128 @ d512` after 512 tokens of context.
pub fn decode_label(n_gen: usize, n_depth: usize) -> String {
    if n_depth == 0 { format!("tg{n_gen}") } else { format!("tg{n_gen} @ d{n_depth}") }
}

/// Sums up prefills of `n_prompt` tokens; `samples_s` are times to the first token's logits, in seconds.
///
/// # Errors
/// `NoSamples`; `BadSample` for a time that is not finite or not above 0.
pub fn prefill_result(n_prompt: usize, samples_s: Vec<f64>) -> Result<PrefillResult, BenchError> {
    let label = prefill_label(n_prompt);
    let ttft = duration_statistics(&label, &samples_s)?;
    let rates: Vec<f64> = samples_s.iter().map(|sample_s| n_prompt as f64 / sample_s).collect();
    let rate = statistics_of(&label, &rates)?;
    Ok(PrefillResult {
        label,
        n_prompt,
        n_samples: ttft.n,
        samples_s,
        ttft_s_mean: ttft.mean,
        ttft_s_stdev: ttft.stdev,
        ttft_s_median: ttft.median,
        ttft_s_p90: ttft.p90,
        ttft_s_p95: ttft.p95,
        ttft_s_p99: ttft.p99,
        ttft_s_min: ttft.min,
        ttft_s_max: ttft.max,
        tokens_per_second_mean: rate.mean,
        tokens_per_second_stdev: rate.stdev,
    })
}

/// Sums up sequences of `n_gen` tokens decoded after `n_depth` tokens of context; each sequence holds one latency
/// per token, in seconds.
///
/// # Errors
/// `NoSamples`; `BadSequence` where a sequence has not `n_gen` latencies; `BadSample` for one that is not finite or
/// not above 0.
pub fn decode_result(n_gen: usize, n_depth: usize, sequences: &[Vec<f64>]) -> Result<DecodeResult, BenchError> {
    let label = decode_label(n_gen, n_depth);
    if let Some((sequence_idx, sequence)) = sequences.iter().enumerate().find(|(_, sequence)| sequence.len() != n_gen) {
        return Err(BenchError::BadSequence { label, sequence_idx, expected: n_gen, found: sequence.len() });
    }
    let samples_s: Vec<f64> = sequences.concat();
    let latency = duration_statistics(&label, &samples_s)?;
    let rates: Vec<f64> = sequences.iter().map(|sequence| n_gen as f64 / sequence.iter().sum::<f64>()).collect();
    let rate = statistics_of(&label, &rates)?;
    Ok(DecodeResult {
        label,
        n_gen,
        n_depth,
        n_sequences: sequences.len(),
        token_latency_s_mean: latency.mean,
        token_latency_s_stdev: latency.stdev,
        token_latency_s_median: latency.median,
        token_latency_s_p90: latency.p90,
        token_latency_s_p95: latency.p95,
        token_latency_s_p99: latency.p99,
        token_latency_s_min: latency.min,
        token_latency_s_max: latency.max,
        samples_s,
        tokens_per_second: rate.mean,
        tokens_per_second_stdev: rate.stdev,
    })
}

fn duration_statistics(label: &str, samples_s: &[f64]) -> Result<Statistics, BenchError> {
    match samples_s.iter().enumerate().find(|(_, value)| !(value.is_finite() && **value > 0.0)) {
        None => statistics_of(label, samples_s),
        Some((sample_idx, &value)) => Err(BenchError::BadSample { label: label.to_owned(), sample_idx, value }),
    }
}

fn statistics_of(label: &str, samples: &[f64]) -> Result<Statistics, BenchError> {
    metrics::statistics(samples).ok_or_else(|| BenchError::NoSamples { label: label.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_llama_benchs() {
        assert_eq!(prefill_label(512), "pp512");
        assert_eq!(decode_label(128, 0), "tg128");
        assert_eq!(decode_label(128, 512), "tg128 @ d512");
    }

    #[test]
    fn prefill_rates_are_averaged_over_samples() {
        let row = prefill_result(100, vec![1.0, 2.0]).unwrap();
        assert_eq!((row.label.as_str(), row.n_samples, row.ttft_s_mean), ("pp100", 2, 1.5));
        assert_eq!(row.tokens_per_second_mean, 75.0);
        assert_eq!(row.ttft_s_p95, None);
    }

    #[test]
    fn decode_rates_are_per_sequence_and_latencies_per_token() {
        let row = decode_result(2, 16, &[vec![0.1, 0.3], vec![0.2, 0.6]]).unwrap();
        assert_eq!((row.label.as_str(), row.n_sequences, row.samples_s.len()), ("tg2 @ d16", 2, 4));
        assert!((row.tokens_per_second - (5.0 + 2.5) / 2.0).abs() < 1e-9);
        assert!((row.token_latency_s_mean - 0.3).abs() < 1e-12);
    }

    #[test]
    fn impossible_samples_are_errors() {
        assert!(matches!(prefill_result(8, vec![]), Err(BenchError::NoSamples { .. })));
        assert!(matches!(prefill_result(8, vec![0.1, 0.0]), Err(BenchError::BadSample { sample_idx: 1, .. })));
        assert!(matches!(prefill_result(8, vec![f64::NAN]), Err(BenchError::BadSample { .. })));
        let short = decode_result(2, 0, &[vec![0.1, 0.1], vec![0.1]]);
        assert!(matches!(short, Err(BenchError::BadSequence { sequence_idx: 1, expected: 2, found: 1, .. })));
    }
}
