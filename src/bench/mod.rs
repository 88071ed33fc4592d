//! The sampling loop: warm-up, then samples, each timed by whoever owns the clock. It knows no engine.

use crate::artifact::{DecodeResult, PrefillResult};
use crate::event::Progress;
use crate::metrics::statistics;

/// How often something is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplePlan {
    /// Runs before the first that counts.
    pub warmup: usize,
    pub samples: usize,
}

/// Runs `measure` for warm-up and samples, returning what the samples gave.
///
/// # Errors
/// What `measure` returns, and `cancelled()` once the user asked to stop.
pub fn sample<T, E>(
    plan: SamplePlan,
    progress: &dyn Progress,
    cancelled: impl Fn() -> E,
    mut measure: impl FnMut() -> Result<T, E>,
) -> Result<Vec<T>, E> {
    let mut samples = Vec::with_capacity(plan.samples);
    for run in 0..plan.warmup + plan.samples {
        if progress.is_cancelled() {
            return Err(cancelled());
        }
        let result = measure()?;
        if run >= plan.warmup {
            samples.push(result);
        }
        progress.advance(1);
    }
    Ok(samples)
}

/// Builds a prefill row from samples in seconds; nothing where there are none.
pub fn prefill_result(n_prompt: usize, samples_s: Vec<f64>) -> Option<PrefillResult> {
    let ttft = statistics(&samples_s)?;
    let rates: Vec<f64> = samples_s.iter().map(|sample_s| n_prompt as f64 / sample_s).collect();
    let rate = statistics(&rates)?;
    Some(PrefillResult {
        label: format!("pp{n_prompt}"),
        n_prompt,
        n_samples: samples_s.len(),
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

/// Builds a decode row from sequences of token latencies in seconds; nothing where there are none.
pub fn decode_result(n_gen: usize, n_depth: usize, sequences_s: Vec<Vec<f64>>) -> Option<DecodeResult> {
    let rates: Vec<f64> =
        sequences_s.iter().map(|latencies| latencies.len() as f64 / latencies.iter().sum::<f64>()).collect();
    let rate = statistics(&rates)?;
    let samples_s: Vec<f64> = sequences_s.concat();
    let latency = statistics(&samples_s)?;
    Some(DecodeResult {
        label: if n_depth == 0 { format!("tg{n_gen}") } else { format!("tg{n_gen} @ d{n_depth}") },
        n_gen,
        n_depth,
        n_sequences: sequences_s.len(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::NullProgress;

    #[test]
    fn warm_up_runs_do_not_count() {
        let mut latencies = [9.0, 8.0, 1.0, 3.0].into_iter();
        let plan = SamplePlan { warmup: 2, samples: 2 };
        let samples = sample(plan, &NullProgress, || (), || latencies.next().ok_or(())).expect("samples");
        let row = prefill_result(10, samples).expect("a row");
        assert_eq!((row.label.as_str(), row.ttft_s_mean, row.n_samples), ("pp10", 2.0, 2));
        assert!((row.tokens_per_second_mean - (10.0 + 10.0 / 3.0) / 2.0).abs() < 1e-12);
    }

    #[test]
    fn decode_rates_are_per_sequence_and_latencies_per_token() {
        let row = decode_result(2, 512, vec![vec![0.5, 0.5], vec![0.25, 0.25]]).expect("a row");
        assert_eq!((row.label.as_str(), row.samples_s.len(), row.tokens_per_second), ("tg2 @ d512", 4, 3.0));
        assert!(decode_result(2, 0, Vec::new()).is_none());
    }
}
