//! Artifacts: the records that stages leave. Field names are a contract with whoever reads the JSON.

use crate::event::Outcome;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Version of every JSON file labpipe writes; it grows when a field changes its meaning.
pub const FORMAT_VERSION: u32 = 1;

/// A cache key: 64 hex digits of blake3.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub String);

impl Key {
    /// Returns true if this is the form of a key: 64 lowercase hex digits. Anything else names no folder of the cache.
    pub fn is_well_formed(&self) -> bool {
        self.0.len() == 64 && self.0.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    }

    /// Returns the first 12 digits, for people.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

/// The fields that went into a key, by dotted name (`params.block_size`, `files.models/x/config.json`, `inputs.model`,
/// `engine.numerics`, `device`): committed beside the artifact, so that a later miss can name the field that changed.
pub type KeyFields = BTreeMap<String, String>;

/// Returns the hash of a set of fields.
pub fn key_of(fields: &KeyFields) -> Key {
    let mut hasher = blake3::Hasher::new();
    for (name, value) in fields {
        // Lengths keep fields apart whatever they hold.
        hasher.update(format!("{}:{name}={}:{value}\n", name.len(), value.len()).as_bytes());
    }
    Key(hasher.finalize().to_hex().to_string())
}

/// What is true of a stage's record whatever its kind; the kind's own fields stand beside these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecordHead {
    pub format_version: u32,
    pub pipeline: String,
    /// The run that shows this record.
    pub run_id: String,
    /// The run that computed it (another one where `cached`).
    pub produced_by_run: String,
    /// The stage's address, `nf4` or `nf4[config=int8]`.
    pub stage: String,
    pub kind: String,
    /// 64 hex digits.
    pub key: String,
    pub cached: bool,
    /// RFC 3339, UTC.
    pub started_at: String,
    pub duration_s: f64,
    /// Name of the device that computed it, e.g. `cpu: AMD EPYC 7B13`; null where none was used.
    pub device: Option<String>,
    /// Canonical parameters, defaults filled in.
    pub params: Map<String, Value>,
}

/// A stage's record: head and body, one flat JSON object on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub head: RecordHead,
    pub body: Map<String, Value>,
}

impl Record {
    /// Returns the flat JSON object: the head's fields, then the body's.
    pub fn to_json(&self) -> Value {
        let mut object = match serde_json::to_value(&self.head) {
            Ok(Value::Object(object)) => object,
            // RecordHead is a struct with string keys: it always becomes an object.
            _ => unreachable!("a record head serializes to an object"),
        };
        object.extend(self.body.clone());
        Value::Object(object)
    }

    /// Splits a flat JSON object into head and body.
    ///
    /// # Errors
    /// Where a field of the head is missing or has another type.
    pub fn from_json(value: Value) -> Result<Record, serde_json::Error> {
        let head: RecordHead = serde_json::from_value(value.clone())?;
        let head_fields = serde_json::to_value(&head)?;
        let mut body = match value {
            Value::Object(object) => object,
            _ => Map::new(),
        };
        body.retain(|name, _| head_fields.get(name).is_none());
        Ok(Record { head, body })
    }
}

/// Statistics of repeated samples. Percentiles by linear interpolation; stdev with n − 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    pub n: usize,
    pub mean: f64,
    /// Null for a single sample.
    pub stdev: Option<f64>,
    pub median: f64,
    pub p90: f64,
    /// Null below 20 samples.
    pub p95: Option<f64>,
    /// Null below 100 samples.
    pub p99: Option<f64>,
    pub min: f64,
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
}

/// One row of a `ppl` record's `results`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PplResult {
    pub convention: String,
    /// Window length in tokens.
    pub max_length: usize,
    /// Tokens between the starts of two windows.
    pub stride: usize,
    /// Tokens in the text.
    pub n_tokens: usize,
    pub n_windows: usize,
    pub n_scored: usize,
    /// How the text begins, e.g. `added by tokenizer (id 1)` or `none`.
    pub bos: String,
    /// blake3 of the text that was tokenized.
    pub text_hash: String,
    /// blake3 of tokenizer.json.
    pub tokenizer_hash: String,
    /// Mean negative log-likelihood in nats per token.
    pub nll_mean: f64,
    pub perplexity: f64,
    /// perplexity · √((mean(nll²) − mean(nll)²)/(n − 1)).
    pub stderr: f64,
    /// The rest for `lm-eval` only, null elsewhere. Documents that the text consists of.
    #[serde(default)]
    pub n_documents: Option<usize>,
    /// Words and bytes of the original text, counted as lm-evaluation-harness does.
    #[serde(default)]
    pub n_words: Option<usize>,
    #[serde(default)]
    pub n_bytes: Option<usize>,
    #[serde(default)]
    pub word_perplexity: Option<f64>,
    #[serde(default)]
    pub word_perplexity_stderr: Option<f64>,
    #[serde(default)]
    pub byte_perplexity: Option<f64>,
    #[serde(default)]
    pub byte_perplexity_stderr: Option<f64>,
    #[serde(default)]
    pub bits_per_byte: Option<f64>,
    #[serde(default)]
    pub bits_per_byte_stderr: Option<f64>,
}

/// One row of a `ppl` record's `divergence`: the model against its base over the tokens that one way of cutting windows
/// scores. KL and log-likelihoods in nats; every `_stderr` is one standard error, null where it can't be told from so few
/// tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DivergenceResult {
    /// The first of the conventions that cut these windows.
    pub convention: String,
    pub max_length: usize,
    pub stride: usize,
    /// What was kept of the base's distribution: `f32`, `f16`, `top-64`.
    pub base_log_probs: String,
    pub n_scored: usize,
    /// KL(base ‖ model) per token.
    pub kl_mean: f64,
    pub kl_mean_stderr: Option<f64>,
    pub kl_median: f64,
    pub kl_median_stderr: Option<f64>,
    pub kl_p90: f64,
    pub kl_p90_stderr: Option<f64>,
    /// Null below 20 tokens.
    pub kl_p95: Option<f64>,
    pub kl_p95_stderr: Option<f64>,
    /// Null below 100 tokens.
    pub kl_p99: Option<f64>,
    pub kl_p99_stderr: Option<f64>,
    /// Null below 1,000 tokens.
    pub kl_p99_9: Option<f64>,
    pub kl_p99_9_stderr: Option<f64>,
    pub kl_max: f64,
    pub kl_min: f64,
    /// p(true token) by the model minus that by the base.
    pub delta_p_mean: f64,
    pub delta_p_mean_stderr: Option<f64>,
    /// √ of the mean square.
    pub delta_p_rms: f64,
    pub delta_p_rms_stderr: Option<f64>,
    pub delta_p_min: f64,
    pub delta_p_p01: Option<f64>,
    pub delta_p_p05: Option<f64>,
    pub delta_p_p25: f64,
    pub delta_p_median: f64,
    pub delta_p_p75: f64,
    pub delta_p_p95: Option<f64>,
    pub delta_p_p99: Option<f64>,
    pub delta_p_max: f64,
    /// Share of tokens at which both models have the same first choice.
    pub top1_agreement: f64,
    pub top1_agreement_stderr: Option<f64>,
    /// exp of the mean NLL over the scored tokens, of the base and of the model.
    pub base_perplexity: f64,
    pub perplexity: f64,
    /// ln(perplexity/base_perplexity), its error from the tokens' own differences.
    pub ln_ppl_ratio: f64,
    pub ln_ppl_ratio_stderr: Option<f64>,
    pub ppl_ratio: f64,
    pub ppl_ratio_stderr: Option<f64>,
    /// Pearson's, of the two models' log-likelihoods of the true tokens; null where one does not vary.
    pub nll_correlation: Option<f64>,
    pub nll_correlation_stderr: Option<f64>,
}

/// What a `ppl` stage kept of its model's distributions, a row of its record's `log_probs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeptLogProbs {
    /// `f32`, `f16`, `top-64`.
    pub format: String,
    /// Parquet file, relative to the artifact's folder.
    pub file: String,
    pub n_tokens: usize,
    pub bytes: u64,
    pub bytes_per_token: f64,
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
    pub samples_s: Vec<f64>,
    pub ttft_s_mean: f64,
    pub ttft_s_stdev: Option<f64>,
    pub ttft_s_median: f64,
    pub ttft_s_p90: f64,
    pub ttft_s_p95: Option<f64>,
    pub ttft_s_p99: Option<f64>,
    pub ttft_s_min: f64,
    pub ttft_s_max: f64,
    /// n_prompt / sample, averaged over samples.
    pub tokens_per_second_mean: f64,
    pub tokens_per_second_stdev: Option<f64>,
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
    pub token_latency_s_mean: f64,
    pub token_latency_s_stdev: Option<f64>,
    pub token_latency_s_median: f64,
    pub token_latency_s_p90: f64,
    pub token_latency_s_p95: Option<f64>,
    pub token_latency_s_p99: Option<f64>,
    pub token_latency_s_min: f64,
    pub token_latency_s_max: f64,
    pub samples_s: Vec<f64>,
    /// n_gen / Σ latencies, averaged over sequences.
    pub tokens_per_second: f64,
    pub tokens_per_second_stdev: Option<f64>,
}

/// One row of a benchmark record's `power`: the device's board over the timed regions of the row of `results` that has the same
/// label. Null where the board does not tell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PowerResult {
    /// `pp512`, `tg128 @ d512`.
    pub label: String,
    /// Tokens read or generated in the timed regions.
    pub n_tokens: usize,
    pub energy_per_token_j: Option<f64>,
    pub energy_j: Option<f64>,
    /// Duration of the timed regions together.
    pub window_s: f64,
    /// energy_j / window_s.
    pub power_w_mean: Option<f64>,
    pub power_limit_w: Option<f64>,
    pub sm_clock_mhz_min: Option<f64>,
    pub sm_clock_mhz_median: Option<f64>,
    pub memory_clock_mhz_min: Option<f64>,
    pub memory_clock_mhz_median: Option<f64>,
    /// Samples of clocks, power and throttling.
    pub n_samples: usize,
    /// Why clocks were lower than they could be, as NVML names it, in any sample.
    pub throttle_reasons: Vec<String>,
    /// Where `energy_j` comes from, or why there is none.
    pub energy_method: String,
}

/// One row of a `quantize` record's `modules`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizedModule {
    /// `model.layers.4.mlp.down_proj`.
    pub module: String,
    /// `nf4`, `int8`, `int4`, or the base dtype where it was kept.
    pub scheme: String,
    /// Values per block or group; null where the scheme has none (per row, or kept).
    pub block_size: Option<usize>,
    pub double_quant: bool,
    pub n_params: u64,
    /// 8 · bytes / n_params.
    pub bits_per_weight: f64,
    pub bytes: u64,
    /// Mean squared difference between the dequantized and the base weight.
    pub weight_mse: f64,
    /// 10·log10(Σw²/Σ(w − ŵ)²); null where the difference is 0.
    pub weight_sqnr_db: Option<f64>,
}

/// One tensor that `capture-activations` kept, a row of its record's `tensors`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CapturedTensor {
    pub module: String,
    /// `input` or `output`.
    pub port: String,
    /// Index of the decoder layer; null outside of the layers.
    pub layer_idx: Option<usize>,
    /// `q_proj`, `norm`, `act`, `attn`, `block`, ….
    pub op: String,
    /// Position in execution order.
    pub order: usize,
    pub n_tokens: usize,
    pub width: usize,
    /// Parquet file, relative to the artifact's folder. Several rows may name one file (a shared input).
    pub file: String,
}

/// One row of a `diff` record's `modules`: output of the candidate against the reference's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModuleDiff {
    pub module: String,
    pub layer_idx: Option<usize>,
    pub op: String,
    pub n_tokens: usize,
    pub mse: f64,
    /// Cosine similarity per token, averaged.
    pub cosine: f64,
    /// 1st percentile of the cosine similarity over tokens.
    pub cosine_p01: f64,
    /// 10·log10(Σr²/Σ(r − c)²); null where MSE is 0.
    pub sqnr_db: Option<f64>,
    /// ‖r − c‖/‖r‖ (Frobenius); null where the reference is all zeros.
    pub rel_frobenius: Option<f64>,
    pub max_abs_diff: f64,
    pub ref_mean_abs: f64,
    pub ref_max_abs: f64,
}

/// One stage of a run as `run.json` lists it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageStatus {
    pub stage: String,
    pub kind: String,
    pub key: Option<String>,
    pub outcome: Option<String>,
    pub duration_s: Option<f64>,
    pub summary: Option<String>,
    pub error: Option<String>,
}

impl Outcome {
    /// Returns the word used in `run.json`.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::Cached => "cached",
            Outcome::Failed => "failed",
            Outcome::Skipped => "skipped",
            Outcome::Cancelled => "cancelled",
        }
    }
}
