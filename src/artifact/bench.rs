//! Records of the benchmarks.

use super::disturbance::Disturbance;
use super::number;
use super::record::RecordBody;
use crate::units::{DType, format_bytes};
use serde::{Deserialize, Serialize};

/// The body of a `prefill-bench` record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrefillRecord {
    pub results: Vec<PrefillResult>,
    #[serde(flatten)]
    pub common: BenchCommon,
}

/// The body of a `decode-bench` record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecodeRecord {
    pub results: Vec<DecodeResult>,
    /// Positions at which decode's logits were held against prefill's before anything was timed.
    pub decode_check_n_positions: usize,
    #[serde(with = "number")]
    pub decode_check_relative_error_max: f64,
    #[serde(with = "number")]
    pub decode_check_budget: f64,
    #[serde(flatten)]
    pub common: BenchCommon,
}

/// What the records of both benchmarks hold, among their own fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchCommon {
    /// Null where the device does not tell of its board.
    pub power: Option<Vec<PowerResult>>,
    /// Other processes that computed on the device while it was timed; null where it is not told.
    pub n_other_processes: Option<usize>,
    pub other_processes_bytes: Option<u64>,
    #[serde(flatten)]
    pub memory: MemoryFigures,
    /// What one sample is.
    pub method: String,
    pub clock: String,
    pub engine: String,
    pub compute_dtype: DType,
}

impl RecordBody for PrefillRecord {
    const KIND: &'static str = "prefill-bench";
}

impl RecordBody for DecodeRecord {
    const KIND: &'static str = "decode-bench";
}

/// Statistics of repeated samples. Percentiles by linear interpolation; stdev with n − 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    pub n: usize,
    #[serde(with = "number")]
    pub mean: f64,
    /// Null for a single sample.
    #[serde(default, with = "number::optional")]
    pub stdev: Option<f64>,
    #[serde(with = "number")]
    pub median: f64,
    #[serde(with = "number")]
    pub p90: f64,
    /// Null below 20 samples.
    #[serde(default, with = "number::optional")]
    pub p95: Option<f64>,
    /// Null below 100 samples.
    #[serde(default, with = "number::optional")]
    pub p99: Option<f64>,
    #[serde(with = "number")]
    pub min: f64,
    #[serde(with = "number")]
    pub max: f64,
}

/// Memory figures, each named by its method. All in bytes; null where unknown.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MemoryFigures {
    /// Bytes of parameters as stored (packed codes and their statistics; tied weights once).
    pub weights_bytes: Option<u64>,
    /// Bytes of the key-value cache as allocated.
    pub kv_cache_bytes: Option<u64>,
    /// The most that the device's allocator held when asked, cleaned at the stage's start.
    pub pool_peak_bytes: Option<u64>,
    /// How `pool_peak_bytes` was measured, in words; null where it was not.
    #[serde(default)]
    pub pool_peak_method: Option<String>,
    pub process_peak_bytes: Option<u64>,
    /// How `process_peak_bytes` was measured, in words.
    pub process_peak_method: String,
    /// What it takes to run the model: weights, cache, activations and the program, at the stage's peak. On a CPU resident memory of
    /// the worker process, pages of the model's own mapped files included; on a GPU device memory of the process.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Which part of `memory_bytes` are resident pages of the model's mapped files.
    #[serde(default)]
    pub memory_mapped_bytes: Option<u64>,
    /// Which part of `memory_bytes` is neither weights nor cache: activations, logits, scratch, the program.
    #[serde(default)]
    pub memory_rest_bytes: Option<u64>,
    /// How `memory_bytes` was measured, in words; null where it was not.
    #[serde(default)]
    pub memory_method: Option<String>,
}

impl MemoryFigures {
    /// Returns the whole for a stage's summary: `memory 8.35 MiB`.
    pub fn summary(&self) -> Option<String> {
        self.memory_bytes.map(|bytes| format!("memory {}", format_bytes(bytes)))
    }

    /// Fills in what is the model's.
    #[must_use]
    pub fn of_model(self, weights_bytes: u64, kv_cache_bytes: u64) -> MemoryFigures {
        MemoryFigures {
            weights_bytes: Some(weights_bytes),
            kv_cache_bytes: Some(kv_cache_bytes),
            memory_rest_bytes: self.memory_bytes.map(|all| all.saturating_sub(weights_bytes + kv_cache_bytes)),
            ..self
        }
    }
}

/// One row of a `prefill-bench` record's `results`; times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrefillResult {
    /// `pp512`; `pp512+nll` where every token was scored.
    pub label: String,
    pub n_prompt: usize,
    /// A pass ends with the negative log-likelihoods of all its tokens, not with the last position's logits; the `ttft_s` are then
    /// the times of such passes.
    #[serde(default)]
    pub scores: bool,
    pub n_samples: usize,
    #[serde(with = "number::list")]
    pub samples_s: Vec<f64>,
    #[serde(with = "number")]
    pub ttft_s_mean: f64,
    #[serde(default, with = "number::optional")]
    pub ttft_s_stdev: Option<f64>,
    #[serde(with = "number")]
    pub ttft_s_median: f64,
    #[serde(with = "number")]
    pub ttft_s_p90: f64,
    #[serde(default, with = "number::optional")]
    pub ttft_s_p95: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub ttft_s_p99: Option<f64>,
    #[serde(with = "number")]
    pub ttft_s_min: f64,
    #[serde(with = "number")]
    pub ttft_s_max: f64,
    /// n_prompt / mean time. (Records of versions up to 3: the mean of n_prompt / time.)
    #[serde(alias = "tokens_per_second_mean", with = "number")]
    pub tokens_per_second: f64,
    /// 95 % interval of it from the spread between this row's own starts; null for a single one.
    #[serde(default, with = "number::optional")]
    pub tokens_per_second_low: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub tokens_per_second_high: Option<f64>,
    /// Empty in records of versions up to 3.
    #[serde(default)]
    pub starts: Vec<StartResult>,
    /// What else went on, in the most disturbed start; null in records of earlier versions.
    #[serde(default)]
    pub disturbance: Option<Disturbance>,
}

/// One start of a row: a process of its own that loaded the model and took its share of the samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartResult {
    /// Passes of a prefill, sequences of a decode; their times stand in `samples_s` start by start, but for starts that were left out.
    pub n_samples: usize,
    /// Tokens / time over this start's samples.
    #[serde(with = "number")]
    pub tokens_per_second: f64,
    /// What disturbed it; null if nothing that is known.
    #[serde(default)]
    pub disturbance: Option<String>,
    /// It was disturbed, and two others at least were not: no figure of the row counts it.
    #[serde(default)]
    pub is_left_out: bool,
}

/// Returns how many starts count; one where a record of an older version names none.
fn n_counted(starts: &[StartResult]) -> usize {
    starts.iter().filter(|start| !start.is_left_out).count().max(1)
}

impl PrefillResult {
    /// Returns how many starts its figures count.
    pub fn n_starts(&self) -> usize {
        n_counted(&self.starts)
    }
}

impl DecodeResult {
    /// Returns how many starts its figures count.
    pub fn n_starts(&self) -> usize {
        n_counted(&self.starts)
    }
}

/// One row of a `decode-bench` record's `results`; times in seconds per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecodeResult {
    /// `tg128`, or `tg128 @ d512` after 512 tokens of context.
    pub label: String,
    pub n_gen: usize,
    pub n_depth: usize,
    /// Number of sequences generated; `samples_s` has n_gen times as many entries.
    pub n_sequences: usize,
    #[serde(with = "number")]
    pub token_latency_s_mean: f64,
    #[serde(default, with = "number::optional")]
    pub token_latency_s_stdev: Option<f64>,
    #[serde(with = "number")]
    pub token_latency_s_median: f64,
    #[serde(with = "number")]
    pub token_latency_s_p90: f64,
    #[serde(default, with = "number::optional")]
    pub token_latency_s_p95: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub token_latency_s_p99: Option<f64>,
    #[serde(with = "number")]
    pub token_latency_s_min: f64,
    #[serde(with = "number")]
    pub token_latency_s_max: f64,
    #[serde(with = "number::list")]
    pub samples_s: Vec<f64>,
    /// 1 / mean latency. (Records of versions up to 2: the mean over sequences of n_gen / Σ latencies.)
    #[serde(with = "number")]
    pub tokens_per_second: f64,
    /// 95 % interval of it from the spread between this row's own starts; null for a single one.
    #[serde(default, with = "number::optional")]
    pub tokens_per_second_low: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub tokens_per_second_high: Option<f64>,
    /// Empty in records of versions up to 2.
    #[serde(default)]
    pub starts: Vec<StartResult>,
    /// What else went on, in the most disturbed start; null in records of earlier versions.
    #[serde(default)]
    pub disturbance: Option<Disturbance>,
}

/// One row of a benchmark record's `power`: the device's board over the row of `results` that has the same label. Clocks and limits are
/// of the timed regions. Energy is of work that was repeated after them, unless they were long enough. Null where the board does not
/// tell.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PowerResult {
    /// `pp512`, `tg128 @ d512`.
    pub label: String,
    /// Tokens read or generated in the timed regions.
    pub n_tokens: usize,
    #[serde(default, with = "number::optional")]
    pub energy_per_token_j: Option<f64>,
    /// Standard deviation over `energy_n_windows` equal parts of the energy window.
    #[serde(default, with = "number::optional")]
    pub energy_per_token_j_stdev: Option<f64>,
    #[serde(default)]
    pub energy_n_windows: usize,
    /// Times that the counter was seen to move.
    #[serde(default)]
    pub energy_n_updates: usize,
    /// Tokens read or generated in the energy window.
    #[serde(default)]
    pub energy_n_tokens: usize,
    /// Duration of the work that `energy_j` is of.
    #[serde(default, with = "number::optional")]
    pub energy_window_s: Option<f64>,
    /// energy_per_token_j · energy_n_tokens.
    #[serde(default, with = "number::optional")]
    pub energy_j: Option<f64>,
    /// Duration of the timed regions together.
    #[serde(with = "number")]
    pub window_s: f64,
    /// energy_j / energy_window_s.
    #[serde(default, with = "number::optional")]
    pub power_w_mean: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub power_limit_w: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub sm_clock_mhz_min: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub sm_clock_mhz_median: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub memory_clock_mhz_min: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub memory_clock_mhz_median: Option<f64>,
    /// Samples of clocks, power and throttling.
    pub n_samples: usize,
    /// Why clocks were lower than they could be, as NVML names it, in any sample.
    pub throttle_reasons: Vec<String>,
    /// Where `energy_j` comes from, or why there is none.
    pub energy_method: String,
}
