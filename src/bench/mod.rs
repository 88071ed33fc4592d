//! The sampling loop: warm-up, then samples, each timed by whoever owns the clock. It knows no engine.

mod disturbance;
mod energy;

pub use disturbance::{Reason, disturbance};
pub use energy::{LONGEST_S, N_WINDOWS, NoEnergy, Repeated, TokenEnergy, is_enough, token_energy};

use crate::artifact::{DecodeResult, DeviceUse, PowerResult, PrefillResult};
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

/// Builds a power row of what was seen while `n_tokens` tokens were timed, and of the energy that the same work took.
pub fn power_result(
    label: &str,
    n_tokens: usize,
    seen: DeviceFigures,
    energy: Result<TokenEnergy, NoEnergy>,
) -> PowerResult {
    let row = PowerResult {
        label: label.to_owned(),
        n_tokens,
        window_s: seen.window_s,
        power_limit_w: seen.power_limit_w,
        sm_clock_mhz_min: seen.sm_clock_mhz_min,
        sm_clock_mhz_median: seen.sm_clock_mhz_median,
        memory_clock_mhz_min: seen.memory_clock_mhz_min,
        memory_clock_mhz_median: seen.memory_clock_mhz_median,
        n_samples: seen.n_samples,
        throttle_reasons: seen.throttle_reasons,
        ..PowerResult::default()
    };
    match energy {
        Err(reason) => PowerResult { energy_method: format!("not measured: {reason}"), ..row },
        Ok(energy) => {
            let energy_j = energy.joules_mean * energy.n_tokens as f64;
            PowerResult {
                energy_per_token_j: Some(energy.joules_mean),
                energy_per_token_j_stdev: energy.joules_stdev,
                energy_n_windows: N_WINDOWS,
                energy_n_updates: energy.n_updates,
                energy_n_tokens: energy.n_tokens,
                energy_window_s: Some(energy.tokens_s),
                energy_j: Some(energy_j),
                power_w_mean: Some(energy_j / energy.tokens_s),
                energy_method: energy.method,
                ..row
            }
        }
    }
}

/// Returns what a board's figures say of who used the device, and how.
pub fn device_use(seen: &DeviceFigures) -> DeviceUse {
    DeviceUse {
        sm_clock_mhz_median: seen.sm_clock_mhz_median,
        sm_clock_mhz_max: seen.sm_clock_mhz_max,
        n_samples: seen.n_samples,
        throttle_reasons: seen.throttle_reasons.clone(),
        n_other_processes: seen.others.map(|others| others.n),
        other_processes_bytes: seen.others.and_then(|others| others.bytes),
        others_utilization: seen
            .others
            .and_then(|others| others.utilization_percent)
            .map(|percent| f64::from(percent) / 1e2),
        n_labpipe_processes: seen.others.map(|others| others.n_labpipe),
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
        disturbance: None,
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
        disturbance: None,
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
    fn a_power_row_has_the_energy_of_its_own_window_or_says_why_not() {
        let seen = DeviceFigures { window_s: 0.2, n_samples: 4, ..DeviceFigures::default() };
        let energy = TokenEnergy {
            joules_mean: 1.5625,
            joules_stdev: Some(0.01),
            n_updates: 25,
            n_tokens: 384,
            tokens_s: 2.0,
            method: "scripted".to_owned(),
        };
        let row = power_result("tg128", 128, seen.clone(), Ok(energy));
        assert_eq!((row.energy_per_token_j, row.energy_j, row.power_w_mean), (Some(1.5625), Some(600.0), Some(300.0)));
        assert_eq!((row.n_tokens, row.energy_n_tokens, row.window_s, row.energy_n_updates), (128, 384, 0.2, 25));
        let silent = power_result("tg128", 128, seen, Err(NoEnergy::TooShort { n_updates: 3, covered_s: 0.25 }));
        assert_eq!((silent.energy_per_token_j, silent.energy_j, silent.power_w_mean), (None, None, None));
        assert!(silent.energy_method.starts_with("not measured: 3 movements"), "{}", silent.energy_method);
    }

    #[test]
    fn decode_rates_are_per_sequence_and_latencies_per_token() {
        let row = decode_result(2, 512, vec![vec![0.5, 0.5], vec![0.25, 0.25]]).expect("a row");
        assert_eq!((row.label.as_str(), row.samples_s.len(), row.tokens_per_second), ("tg2 @ d512", 4, 3.0));
        assert!(decode_result(2, 0, Vec::new()).is_none());
    }
}
