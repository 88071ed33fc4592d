//! What both benchmarks do with starts: how many there are, what falls to each, and how their records become one.

use super::bench_tokens::size;
use crate::artifact::{MemoryFigures, PowerResult};
use crate::bench::SamplePlan;
use crate::stage::{ParamDefault, ParamDesc, ParamType, Params, StageContext, StageError};
use serde_json::Value;

/// Starts on a CPU and on a GPU where the pipeline names no number.
const DEFAULT_STARTS: (u64, u64) = (5, 3);

/// The parameter.
pub const STARTS: ParamDesc = ParamDesc {
    name: "starts",
    ty: ParamType::Integer { min: 1, max: 1_000 },
    unit: Some("processes"),
    default: ParamDefault::Absent,
    help: "fresh processes that the samples are spread over, which take turns with those of other models; unless given 5 on a CPU and 3 \
           on a GPU, or as many as there are samples",
};

/// Returns the number of starts.
pub fn n_starts(params: &Params, is_host: bool) -> usize {
    let default = if is_host { DEFAULT_STARTS.0 } else { DEFAULT_STARTS.1 };
    let asked = params.get("starts").and_then(Value::as_u64).unwrap_or(default);
    usize::try_from(asked).unwrap_or(usize::MAX).clamp(1, size(params, "samples").max(1))
}

/// Says where there are more starts than samples.
pub fn check(params: &Params) -> Option<(&'static str, String, Option<String>)> {
    let (starts, samples) = (params.get("starts")?.as_u64()?, params.get("samples")?.as_u64()?);
    (starts > samples).then(|| {
        let message = format!("{starts} starts of {samples} sample(s): every start takes one at least");
        ("starts", message, Some(format!("write samples: {starts} or fewer starts")))
    })
}

/// Returns what this start samples.
pub fn sample_plan(context: &StageContext<'_>) -> SamplePlan {
    let samples = context.start.share(size(context.params, "samples"));
    SamplePlan { warmup: size(context.params, "warmup"), samples }
}

/// Makes one row each of the starts' rows, which stand in the same order in every start.
///
/// # Errors
/// Where the starts have different rows.
pub fn combine_rows<T>(starts: &[Vec<T>], combine: impl Fn(&[&T]) -> Option<T>) -> Result<Vec<T>, StageError> {
    let n_rows = starts.first().map_or(0, Vec::len);
    let rows = (0..n_rows).map(|idx| {
        let of_starts: Vec<&T> = starts.iter().filter_map(|rows| rows.get(idx)).collect();
        if of_starts.len() < starts.len() { None } else { combine(&of_starts) }
    });
    let rows: Option<Vec<T>> = rows.collect();
    rows.ok_or_else(|| StageError::Other("combine the starts: they measured different things".to_owned()))
}

/// Returns the largest of every figure over the starts; what is the same in all stays.
pub fn largest(starts: impl Iterator<Item = MemoryFigures>) -> MemoryFigures {
    starts.fold(MemoryFigures::default(), |all, one| MemoryFigures {
        weights_bytes: all.weights_bytes.max(one.weights_bytes),
        kv_cache_bytes: all.kv_cache_bytes.max(one.kv_cache_bytes),
        pool_peak_bytes: all.pool_peak_bytes.max(one.pool_peak_bytes),
        pool_peak_method: one.pool_peak_method,
        process_peak_bytes: all.process_peak_bytes.max(one.process_peak_bytes),
        process_peak_method: one.process_peak_method,
    })
}

/// Makes one power row of those of the starts.
pub fn combine_power(rows: &[&PowerResult]) -> Option<PowerResult> {
    let first = rows.first()?;
    let sum = |of: fn(&PowerResult) -> Option<f64>| rows.iter().map(|row| of(row)).sum::<Option<f64>>();
    let least = |of: fn(&PowerResult) -> Option<f64>| rows.iter().filter_map(|row| of(row)).reduce(f64::min);
    let median = |of: fn(&PowerResult) -> Option<f64>| {
        let mut values: Vec<f64> = rows.iter().filter_map(|row| of(row)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let (n_tokens, window_s) = (rows.iter().map(|row| row.n_tokens).sum(), rows.iter().map(|row| row.window_s).sum());
    let energy_j = sum(|row| row.energy_j);
    let mut throttle_reasons: Vec<String> = rows.iter().flat_map(|row| row.throttle_reasons.clone()).collect();
    throttle_reasons.sort();
    throttle_reasons.dedup();
    Some(PowerResult {
        label: first.label.clone(),
        n_tokens,
        energy_per_token_j: energy_j.map(|joules| joules / n_tokens as f64),
        energy_j,
        window_s,
        power_w_mean: energy_j.map(|joules| joules / window_s),
        power_limit_w: first.power_limit_w,
        sm_clock_mhz_min: least(|row| row.sm_clock_mhz_min),
        sm_clock_mhz_median: median(|row| row.sm_clock_mhz_median),
        memory_clock_mhz_min: least(|row| row.memory_clock_mhz_min),
        memory_clock_mhz_median: median(|row| row.memory_clock_mhz_median),
        n_samples: rows.iter().map(|row| row.n_samples).sum(),
        throttle_reasons,
        energy_method: first.energy_method.clone(),
    })
}

/// Returns a rate with its interval: `15374 [14950, 15811] t/s, 5 starts`.
pub fn rate_words(rate: f64, interval: Option<(f64, f64)>, n_starts: usize, n_decimals: usize) -> String {
    let interval =
        interval.map_or_else(String::new, |(low, high)| format!(" [{low:.n_decimals$}, {high:.n_decimals$}]"));
    let starts = if n_starts == 1 { "1 start".to_owned() } else { format!("{n_starts} starts") };
    format!("{rate:.n_decimals$}{interval} t/s, {starts}")
}
