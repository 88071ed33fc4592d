//! What both benchmarks do with starts: how many there are, what falls to each, and how their records become one.

use super::bench_tokens::size;
use crate::artifact::{BenchCommon, Disturbance, MemoryFigures, PowerResult, RecordBody, StartResult};
use crate::bench::SamplePlan;
use crate::metrics::percentile;
use crate::stage::{ParamDefault, ParamDesc, ParamType, Params, StageContext, StageError, StageOutput};
use crate::units::format_significant;
use serde_json::Value;
use std::collections::BTreeSet;

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

/// Makes one power row of those of the starts: clocks of all, energy of the first one, which alone reads it.
pub fn combine_power(rows: &[&PowerResult]) -> Option<PowerResult> {
    let first = rows.first()?;
    let least = |of: fn(&PowerResult) -> Option<f64>| rows.iter().filter_map(|row| of(row)).reduce(f64::min);
    let median = |of: fn(&PowerResult) -> Option<f64>| {
        let mut values: Vec<f64> = rows.iter().filter_map(|row| of(row)).collect();
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then(|| percentile(&values, 50.0))
    };
    let throttle_reasons: BTreeSet<&String> = rows.iter().flat_map(|row| &row.throttle_reasons).collect();
    Some(PowerResult {
        n_tokens: rows.iter().map(|row| row.n_tokens).sum(),
        window_s: rows.iter().map(|row| row.window_s).sum(),
        sm_clock_mhz_min: least(|row| row.sm_clock_mhz_min),
        sm_clock_mhz_median: median(|row| row.sm_clock_mhz_median),
        memory_clock_mhz_min: least(|row| row.memory_clock_mhz_min),
        memory_clock_mhz_median: median(|row| row.memory_clock_mhz_median),
        n_samples: rows.iter().map(|row| row.n_samples).sum(),
        throttle_reasons: throttle_reasons.into_iter().cloned().collect(),
        ..(*first).clone()
    })
}

/// Reads what the starts gave.
///
/// # Errors
/// Where one is no record of its kind.
pub fn read_starts<R: RecordBody>(outputs: Vec<StageOutput>) -> Result<Vec<R>, StageError> {
    let read = |start: StageOutput| serde_json::from_value(start.body.into());
    let starts: Result<Vec<R>, serde_json::Error> = outputs.into_iter().map(read).collect();
    starts.map_err(|error| StageError::Other(format!("combine the starts: {error}")))
}

/// Makes one of what the starts measured beside their rows: the memory of the one that took most, the most other processes.
///
/// # Errors
/// Where there is no start, or they have different rows.
pub fn combine_common(starts: &[&BenchCommon]) -> Result<BenchCommon, StageError> {
    let first = starts.first().ok_or_else(|| StageError::Other("combine the starts: there is none".to_owned()))?;
    let power: Option<Vec<Vec<PowerResult>>> = starts.iter().map(|start| start.power.clone()).collect();
    let size = |figures: &&MemoryFigures| (figures.memory_bytes, figures.pool_peak_bytes, figures.process_peak_bytes);
    Ok(BenchCommon {
        power: power.map(|power| combine_rows(&power, combine_power)).transpose()?,
        n_other_processes: starts.iter().filter_map(|start| start.n_other_processes).max(),
        other_processes_bytes: starts.iter().filter_map(|start| start.other_processes_bytes).max(),
        memory: starts.iter().map(|start| &start.memory).max_by_key(size).cloned().unwrap_or_default(),
        ..(*first).clone()
    })
}

/// A row as its summary tells it.
pub struct Speed<'a> {
    pub label: &'a str,
    pub tokens_per_second: f64,
    pub low: Option<f64>,
    pub high: Option<f64>,
    pub starts: &'a [StartResult],
    pub disturbance: Option<&'a Disturbance>,
}

/// Returns a record with its summary: every row's, rates with so many decimals, then the memory that it took.
pub fn output<'a, R: RecordBody>(
    record: &R,
    common: &BenchCommon,
    speeds: impl Iterator<Item = Speed<'a>>,
    n_decimals: usize,
) -> StageOutput {
    let rows = speeds.map(|speed| speed.summary(common.power.as_deref(), n_decimals));
    let summary: Vec<String> = rows.chain(common.memory.summary()).collect();
    StageOutput::new(record.to_fields(), summary.join(", "))
}

impl Speed<'_> {
    /// Returns the row's summary: `pp128 15374 [14950, 15811] t/s, 5 starts, 1.53 J/token`, and what disturbed it.
    fn summary(&self, power: Option<&[PowerResult]>, n_decimals: usize) -> String {
        let Speed { label, tokens_per_second, .. } = self;
        let interval = self.low.zip(self.high);
        let interval =
            interval.map_or_else(String::new, |(low, high)| format!(" [{low:.n_decimals$}, {high:.n_decimals$}]"));
        let n_starts = self.starts.iter().filter(|start| !start.is_left_out).count();
        let n_starts = if n_starts == 1 { "1 start".to_owned() } else { format!("{n_starts} starts") };
        let row = power.into_iter().flatten().find(|row| row.label == *label);
        let energy = row.and_then(|row| row.energy_per_token_j);
        let energy = energy.map_or_else(String::new, |joules| format!(", {} J/token", format_significant(joules)));
        let disturbed = match self.disturbance.map(|seen| (seen.disturbed.as_deref(), seen.repeated)) {
            Some((Some(reason), _)) => format!(", disturbed: {reason}"),
            Some((None, true)) => ", measured again, disturbed at first".to_owned(),
            _ => String::new(),
        };
        format!("{label} {tokens_per_second:.n_decimals$}{interval} t/s, {n_starts}{energy}{disturbed}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_those_of_all_starts_and_energy_is_the_first_one_s() {
        let start = |median: f64, joules: Option<f64>| PowerResult {
            n_tokens: 10,
            window_s: 0.5,
            sm_clock_mhz_min: Some(median - 100.0),
            sm_clock_mhz_median: Some(median),
            energy_per_token_j: joules,
            ..PowerResult::default()
        };
        let starts = [start(1800.0, Some(1.5)), start(1980.0, None), start(1900.0, None)];
        let row = combine_power(&starts.iter().collect::<Vec<_>>()).expect("a row");
        assert_eq!((row.sm_clock_mhz_median, row.sm_clock_mhz_min), (Some(1900.0), Some(1700.0)));
        assert_eq!((row.n_tokens, row.window_s, row.energy_per_token_j), (30, 1.5, Some(1.5)));
        assert_eq!(row.memory_clock_mhz_median, None);
    }
}
