//! The sampling loop: warm-up, then samples, each timed by whoever owns the clock. It knows no engine.

use crate::artifact::{DecodeResult, PowerResult, PrefillResult};
use crate::event::Progress;
use crate::inference::DeviceFigures;
use crate::metrics::statistics;

/// How often something is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplePlan {
    /// Runs before the first that counts.
    pub warmup: usize,
    pub samples: usize,
}

/// Runs `measure` for warm-up and samples, telling it which counts, and returns what the samples gave.
///
/// # Errors
/// What `measure` returns, and `cancelled()` once the user asked to stop.
pub fn sample<T, E>(
    plan: SamplePlan,
    progress: &dyn Progress,
    cancelled: impl Fn() -> E,
    mut measure: impl FnMut(bool) -> Result<T, E>,
) -> Result<Vec<T>, E> {
    let mut samples = Vec::with_capacity(plan.samples);
    for run in 0..plan.warmup + plan.samples {
        if progress.is_cancelled() {
            return Err(cancelled());
        }
        let counts = run >= plan.warmup;
        let result = measure(counts)?;
        if counts {
            samples.push(result);
        }
        progress.advance(1);
    }
    Ok(samples)
}

/// Returns what names a prefill: `pp512`, and `pp512+nll` where all its tokens are scored.
pub fn prefill_label(n_prompt: usize, scores: bool) -> String {
    if scores { format!("pp{n_prompt}+nll") } else { format!("pp{n_prompt}") }
}

/// Returns what names a decode: `tg128`, `tg128 @ d512`.
pub fn decode_label(n_gen: usize, n_depth: usize) -> String {
    if n_depth == 0 { format!("tg{n_gen}") } else { format!("tg{n_gen} @ d{n_depth}") }
}

/// Builds a power row of what was seen while `n_tokens` tokens were timed.
pub fn power_result(label: &str, n_tokens: usize, seen: DeviceFigures) -> PowerResult {
    let over = |divisor: f64| seen.energy_j.filter(|_| divisor > 0.0).map(|joules| joules / divisor);
    PowerResult {
        label: label.to_owned(),
        n_tokens,
        energy_per_token_j: over(n_tokens as f64),
        energy_j: seen.energy_j,
        window_s: seen.window_s,
        power_w_mean: over(seen.window_s),
        power_limit_w: seen.power_limit_w,
        sm_clock_mhz_min: seen.sm_clock_mhz_min,
        sm_clock_mhz_median: seen.sm_clock_mhz_median,
        memory_clock_mhz_min: seen.memory_clock_mhz_min,
        memory_clock_mhz_median: seen.memory_clock_mhz_median,
        n_samples: seen.n_samples,
        throttle_reasons: seen.throttle_reasons,
        energy_method: seen.energy_method,
    }
}

/// Builds a prefill row from samples in seconds; nothing where there are none.
pub fn prefill_result(n_prompt: usize, scores: bool, samples_s: Vec<f64>) -> Option<PrefillResult> {
    let ttft = statistics(&samples_s)?;
    let rates: Vec<f64> = samples_s.iter().map(|sample_s| n_prompt as f64 / sample_s).collect();
    let rate = statistics(&rates)?;
    Some(PrefillResult {
        label: prefill_label(n_prompt, scores),
        n_prompt,
        scores,
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
        label: decode_label(n_gen, n_depth),
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
        let samples = sample(plan, &NullProgress, || (), |_| latencies.next().ok_or(())).expect("samples");
        let row = prefill_result(10, false, samples).expect("a row");
        assert_eq!((row.label.as_str(), row.ttft_s_mean, row.n_samples), ("pp10", 2.0, 2));
        assert!((row.tokens_per_second_mean - (10.0 + 10.0 / 3.0) / 2.0).abs() < 1e-12);
    }

    #[test]
    fn warm_up_is_told_from_what_counts() {
        let (mut told, plan) = (Vec::new(), SamplePlan { warmup: 1, samples: 2 });
        let record = |counts: bool| {
            told.push(counts);
            Ok::<_, ()>(())
        };
        sample(plan, &NullProgress, || (), record).expect("samples");
        assert_eq!(told, [false, true, true]);
    }

    #[test]
    fn energy_a_token_is_that_of_the_timed_regions_over_their_tokens() {
        let seen = DeviceFigures { window_s: 2.0, energy_j: Some(600.0), ..DeviceFigures::default() };
        let row = power_result("tg128", 384, seen.clone());
        assert_eq!((row.energy_per_token_j, row.power_w_mean), (Some(1.5625), Some(300.0)));
        let silent = power_result("tg128", 384, DeviceFigures { energy_j: None, ..seen });
        assert_eq!((silent.energy_per_token_j, silent.power_w_mean), (None, None));
    }

    #[test]
    fn decode_rates_are_per_sequence_and_latencies_per_token() {
        let row = decode_result(2, 512, vec![vec![0.5, 0.5], vec![0.25, 0.25]]).expect("a row");
        assert_eq!((row.label.as_str(), row.samples_s.len(), row.tokens_per_second), ("tg2 @ d512", 4, 3.0));
        assert!(decode_result(2, 0, Vec::new()).is_none());
    }
}
