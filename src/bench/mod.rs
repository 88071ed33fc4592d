//! The sampling loop: warm-up, then samples, each timed by the owner of the clock. It knows no engine.

mod disturbance;
mod energy;

pub use disturbance::{Reason, disturbance};
pub use energy::{LONGEST_S, N_WINDOWS, NoEnergy, Repeated, TokenEnergy, is_enough, token_energy};

use crate::artifact::{DecodeResult, DeviceUse, Disturbance, PowerResult, PrefillResult, StartResult};
use crate::event::Progress;
use crate::inference::DeviceFigures;
use crate::metrics::{RateInterval, own_variance, rate_interval, statistics};

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

/// Builds a prefill row from every start's samples in seconds; `None` where a start has no samples.
pub fn prefill_result(n_prompt: usize, scores: bool, starts_s: &[Vec<f64>]) -> Option<PrefillResult> {
    let rates = Rates::of(n_prompt, starts_s)?;
    let samples_s = starts_s.concat();
    let ttft = statistics(&samples_s)?;
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
        tokens_per_second: rates.of_all,
        tokens_per_second_low: rates.low,
        tokens_per_second_high: rates.high,
        starts: rates.starts,
        disturbance: None,
    })
}

/// Builds a decode row from every start's sequences of token latencies in seconds; `None` where a start has no samples.
pub fn decode_result(n_gen: usize, n_depth: usize, starts_s: &[Vec<Vec<f64>>]) -> Option<DecodeResult> {
    let sequences_s: Vec<Vec<f64>> =
        starts_s.iter().map(|start| start.iter().map(|latencies| latencies.iter().sum()).collect()).collect();
    let rates = Rates::of(n_gen, &sequences_s)?;
    let samples_s: Vec<f64> = starts_s.concat().concat();
    let latency = statistics(&samples_s)?;
    Some(DecodeResult {
        label: decode_label(n_gen, n_depth),
        n_gen,
        n_depth,
        n_sequences: sequences_s.iter().map(Vec::len).sum(),
        token_latency_s_mean: latency.mean,
        token_latency_s_stdev: latency.stdev,
        token_latency_s_median: latency.median,
        token_latency_s_p90: latency.p90,
        token_latency_s_p95: latency.p95,
        token_latency_s_p99: latency.p99,
        token_latency_s_min: latency.min,
        token_latency_s_max: latency.max,
        samples_s,
        tokens_per_second: rates.of_all,
        tokens_per_second_low: rates.low,
        tokens_per_second_high: rates.high,
        starts: rates.starts,
        disturbance: None,
    })
}

/// Rates of a row, over all samples and start by start.
struct Rates {
    of_all: f64,
    low: Option<f64>,
    high: Option<f64>,
    starts: Vec<StartResult>,
}

impl Rates {
    /// Returns the rates of samples of `n_tokens` each; `None` where a start has no samples.
    fn of(n_tokens: usize, starts_s: &[Vec<f64>]) -> Option<Rates> {
        let rate = |samples_s: &[f64]| (n_tokens * samples_s.len()) as f64 / samples_s.iter().sum::<f64>();
        if starts_s.is_empty() || starts_s.iter().any(Vec::is_empty) {
            return None;
        }
        let starts: Vec<StartResult> = starts_s
            .iter()
            .map(|samples_s| StartResult {
                n_samples: samples_s.len(),
                tokens_per_second: rate(samples_s),
                disturbance: None,
                is_left_out: false,
            })
            .collect();
        let of_all = rate(&starts_s.concat());
        let logs: Vec<f64> = starts.iter().map(|start| start.tokens_per_second.ln()).collect();
        let interval = own_variance(&logs).and_then(|spread| rate_interval(&logs, &spread));
        let bound = |of: fn(&RateInterval) -> f64| interval.map(|interval| of_all * of(&interval) / interval.rate);
        let (low, high) = (bound(|interval| interval.low), bound(|interval| interval.high));
        Some(Rates { of_all, low, high, starts })
    }
}

/// Makes one prefill row of those of its starts.
pub fn combine_prefills(rows: &[&PrefillResult]) -> Option<PrefillResult> {
    let first = rows.first()?;
    let seen: Vec<Option<&Disturbance>> = rows.iter().map(|row| row.disturbance.as_ref()).collect();
    let counts = counted(&seen);
    let starts_s: Vec<Vec<f64>> = kept(rows, &counts).map(|row| row.samples_s.clone()).collect();
    let mut row = prefill_result(first.n_prompt, first.scores, &starts_s)?;
    row.starts = all_starts(rows.iter().map(|row| &row.starts), &counts);
    row.disturbance = combine_disturbance(&seen, &mut row.starts);
    Some(row)
}

/// Makes one decode row of those of its starts.
pub fn combine_decodes(rows: &[&DecodeResult]) -> Option<DecodeResult> {
    let first = rows.first()?;
    let seen: Vec<Option<&Disturbance>> = rows.iter().map(|row| row.disturbance.as_ref()).collect();
    let counts = counted(&seen);
    let sequences = |row: &DecodeResult| row.samples_s.chunks(first.n_gen.max(1)).map(<[f64]>::to_vec).collect();
    let starts_s: Vec<Vec<Vec<f64>>> = kept(rows, &counts).map(sequences).collect();
    let mut row = decode_result(first.n_gen, first.n_depth, &starts_s)?;
    row.starts = all_starts(rows.iter().map(|row| &row.starts), &counts);
    row.disturbance = combine_disturbance(&seen, &mut row.starts);
    Some(row)
}

/// Returns which starts count: all, or, where two at least were undisturbed, those and the ones that `--accept-disturbed` keeps.
fn counted(seen: &[Option<&Disturbance>]) -> Vec<bool> {
    let counts = |seen: &Option<&Disturbance>| seen.is_none_or(|seen| seen.disturbed.is_none() || seen.accepted);
    let counts: Vec<bool> = seen.iter().map(counts).collect();
    let n_counted = counts.iter().filter(|counts| **counts).count();
    if n_counted < 2 { vec![true; seen.len()] } else { counts }
}

fn kept<'a, T>(rows: &'a [&T], counts: &'a [bool]) -> impl Iterator<Item = &'a T> {
    rows.iter().zip(counts).filter(|(_, counts)| **counts).map(|(row, _)| *row)
}

/// Puts the starts of rows of one start each together, and marks those that do not count.
fn all_starts<'a>(rows: impl Iterator<Item = &'a Vec<StartResult>>, counts: &[bool]) -> Vec<StartResult> {
    let mark = |(starts, counts): (&Vec<StartResult>, &bool)| {
        let is_left_out = !counts;
        starts.iter().map(|start| StartResult { is_left_out, ..start.clone() }).collect::<Vec<_>>()
    };
    rows.zip(counts).flat_map(mark).collect()
}

/// Returns what was seen in the start that was disturbed, else in one that was measured again, else in the first; says how many were, and
/// marks the starts.
fn combine_disturbance(seen: &[Option<&Disturbance>], starts: &mut [StartResult]) -> Option<Disturbance> {
    for (start, seen) in starts.iter_mut().zip(seen) {
        start.disturbance = seen.and_then(Disturbance::mark);
    }
    let known: Vec<&Disturbance> = seen.iter().flatten().copied().collect();
    let disturbed: Vec<&Disturbance> = known.iter().copied().filter(|one| one.disturbed.is_some()).collect();
    let Some(worst) = disturbed.first() else {
        return known.iter().find(|one| one.repeated).or(known.first()).map(|one| (*one).clone());
    };
    let reason = worst.disturbed.clone().unwrap_or_default();
    let n_left_out = starts.iter().filter(|start| start.is_left_out).count();
    let left_out = if n_left_out > 0 { " (left out)" } else { "" };
    let text = format!("{} of {} starts{left_out}, {reason}", disturbed.len(), seen.len());
    Some(Disturbance { disturbed: Some(text), ..(*worst).clone() })
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
        let row = prefill_result(10, false, &[samples]).expect("a row");
        assert_eq!((row.label.as_str(), row.ttft_s_mean, row.n_samples), ("pp10", 2.0, 2));
        assert_eq!((row.tokens_per_second, row.tokens_per_second_low, row.starts.len()), (5.0, None, 1));
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
    fn a_rate_is_tokens_over_time_and_its_interval_comes_from_the_starts() {
        let row = decode_result(2, 512, &[vec![vec![0.5, 0.5]], vec![vec![0.25, 0.25]]]).expect("a row");
        assert_eq!((row.label.as_str(), row.samples_s.len(), row.n_sequences), ("tg2 @ d512", 4, 2));
        // Four tokens in 1.5 s; the mean of the two rates would be 3.
        assert!((row.tokens_per_second - 4.0 / 1.5).abs() < 1e-12);
        assert_eq!(row.starts.iter().map(|start| start.tokens_per_second).collect::<Vec<_>>(), [2.0, 4.0]);
        // Log rates ln 2 and ln 4: stdev ln 2 / √2, t(0.975, 1) = 12.7062, half width 12.7062 · ln 2 / 2 = 4.40364.
        let high = row.tokens_per_second_high.expect("an interval") / row.tokens_per_second;
        assert!((high.ln() - 4.403_64).abs() < 1e-4, "{high}");
        assert!(decode_result(2, 0, &[]).is_none() && decode_result(2, 0, &[Vec::new()]).is_none());
    }

    #[test]
    fn rows_of_starts_make_the_row_of_all_samples() {
        let starts_s = [vec![1.0, 3.0], vec![2.0]];
        let rows: Vec<PrefillResult> =
            starts_s.iter().filter_map(|start| prefill_result(8, false, std::slice::from_ref(start))).collect();
        let combined = combine_prefills(&rows.iter().collect::<Vec<_>>());
        assert_eq!(combined, prefill_result(8, false, &starts_s));
        let starts_s = [vec![vec![1.0, 3.0], vec![1.0, 1.0]], vec![vec![2.0, 4.0]]];
        let rows: Vec<DecodeResult> =
            starts_s.iter().filter_map(|start| decode_result(2, 0, std::slice::from_ref(start))).collect();
        assert_eq!(combine_decodes(&rows.iter().collect::<Vec<_>>()), decode_result(2, 0, &starts_s));
    }

    #[test]
    fn a_disturbed_start_is_left_out_where_two_others_were_not_disturbed() {
        let start = |seconds: f64, disturbed: bool, accepted: bool| {
            let disturbed = disturbed.then(|| "others took 0.9 CPUs".to_owned());
            let row = prefill_result(8, false, &[vec![seconds]]).expect("a row");
            PrefillResult { disturbance: Some(Disturbance { disturbed, accepted, ..Disturbance::default() }), ..row }
        };
        let combined = |rows: &[PrefillResult]| combine_prefills(&rows.iter().collect::<Vec<_>>()).expect("a row");
        let row = combined(&[start(1.0, false, false), start(4.0, true, false), start(3.0, false, false)]);
        assert_eq!((row.tokens_per_second, row.samples_s.as_slice(), row.ttft_s_mean), (4.0, &[1.0, 3.0][..], 2.0));
        let left_out: Vec<(f64, bool)> =
            row.starts.iter().map(|start| (start.tokens_per_second, start.is_left_out)).collect();
        assert_eq!(left_out, [(8.0, false), (2.0, true), (8.0 / 3.0, false)]);
        let text = row.disturbance.and_then(|seen| seen.disturbed);
        assert_eq!(text.as_deref(), Some("1 of 3 starts (left out), others took 0.9 CPUs"));
        // One undisturbed start alone says nothing of the spread; a disturbed one that is accepted counts.
        for rows in [
            [start(1.0, false, false), start(4.0, true, false), start(3.0, true, false)],
            [start(1.0, false, false), start(4.0, true, true), start(3.0, false, false)],
        ] {
            assert_eq!(combined(&rows).tokens_per_second, 3.0);
        }
    }

    #[test]
    fn one_disturbed_start_marks_the_row_and_itself() {
        let quiet = Disturbance::default();
        let again = Disturbance { repeated: true, ..Disturbance::default() };
        let disturbed = Disturbance { disturbed: Some("others took 0.9 CPUs".to_owned()), ..Disturbance::default() };
        let start = StartResult { n_samples: 1, tokens_per_second: 1.0, disturbance: None, is_left_out: false };
        let mut starts = vec![start; 3];
        let row = combine_disturbance(&[Some(&quiet), Some(&disturbed), Some(&again)], &mut starts).expect("figures");
        assert_eq!(row.disturbed.as_deref(), Some("1 of 3 starts, others took 0.9 CPUs"));
        let marked: Vec<bool> = starts.iter().map(|start| start.disturbance.is_some()).collect();
        assert_eq!(marked, [false, true, false]);
        let row = combine_disturbance(&[Some(&quiet), Some(&again)], &mut starts).expect("figures");
        assert!(row.repeated && row.disturbed.is_none());
        assert_eq!(combine_disturbance(&[None, None], &mut starts), None);
    }
}
