//! Records of `ppl`.

use super::interval::BlockInterval;
use super::number;
use super::record::RecordBody;
use crate::units::DType;
use serde::{Deserialize, Serialize};

/// The body of a `ppl` record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PplRecord {
    /// One row per convention.
    pub results: Vec<PplResult>,
    /// Address of the base stage; absent without one, like `divergence`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// One row per way of cutting windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<Vec<DivergenceResult>>,
    /// Absent where nothing was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_probs: Option<Vec<KeptLogProbs>>,
    pub token_scores: Vec<TokenScoresFile>,
    /// Tokens of all windows, those that overlap as often as they were run.
    pub n_tokens_run: usize,
    #[serde(with = "number")]
    pub scoring_s: f64,
    #[serde(default, with = "number::optional")]
    pub scoring_tokens_per_second: Option<f64>,
    pub scoring_method: String,
    pub compute_dtype: DType,
}

impl RecordBody for PplRecord {
    const KIND: &'static str = "ppl";
}

/// A Parquet file with the scores of single tokens, relative to the artifact's folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenScoresFile {
    /// The windows' name: `strided-512-256`.
    pub windows: String,
    pub file: String,
}

/// What is kept of every scored token, in the order of scoring, which is that of the text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenScores {
    /// Which window scored it.
    pub window_idx: Vec<u32>,
    /// Which of the text's documents it belongs to; empty in files of labpipe 0.1's ppl up to version 4.
    pub document_idx: Vec<u32>,
    /// The token itself.
    pub token_id: Vec<u32>,
    /// Negative log-likelihood in nats.
    pub nll: Vec<f64>,
    /// The model's own first choice.
    pub argmax: Vec<u32>,
    /// KL(base ‖ model) in nats; empty where there is no base, like the two that follow.
    pub kl: Vec<f64>,
    /// The base's negative log-likelihood in nats.
    pub base_nll: Vec<f64>,
    /// Both have the same first choice.
    pub same_top: Vec<bool>,
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
    #[serde(with = "number")]
    pub nll_mean: f64,
    /// exp(nll_mean): infinite above 709.78 nats per token.
    #[serde(with = "number")]
    pub perplexity: f64,
    /// 95 % interval of the mean, in nats per token, from blocks of text. Null where the text is too short for two blocks, where an NLL is
    /// not finite, and in records of labpipe 0.1's ppl up to version 4.
    #[serde(default)]
    pub nll_interval: Option<BlockInterval>,
    /// The same of the perplexity.
    #[serde(default)]
    pub perplexity_interval: Option<BlockInterval>,
    /// One standard error of the perplexity and of the mean NLL, those of the intervals; null where there are none. (Records of versions up
    /// to 4 took tokens as independent.)
    #[serde(default, with = "number::optional")]
    pub stderr: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub nll_stderr: Option<f64>,
    /// For `llama-cpp` only: the ± that llama.cpp prints, perplexity·√((mean(nll²) − mean(nll)²)/(n − 1)). It takes tokens as
    /// independent.
    #[serde(default, with = "number::optional", skip_serializing_if = "Option::is_none")]
    pub llama_cpp_stderr: Option<f64>,
    /// The rest for `lm-eval` only, null elsewhere. Documents that the text consists of.
    #[serde(default)]
    pub n_documents: Option<usize>,
    /// Words and bytes of the original text, counted as lm-evaluation-harness does.
    #[serde(default)]
    pub n_words: Option<usize>,
    #[serde(default)]
    pub n_bytes: Option<usize>,
    #[serde(default, with = "number::optional")]
    pub word_perplexity: Option<f64>,
    #[serde(default)]
    pub word_perplexity_interval: Option<BlockInterval>,
    #[serde(default, with = "number::optional")]
    pub word_perplexity_stderr: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub byte_perplexity: Option<f64>,
    #[serde(default)]
    pub byte_perplexity_interval: Option<BlockInterval>,
    #[serde(default, with = "number::optional")]
    pub byte_perplexity_stderr: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub bits_per_byte: Option<f64>,
    #[serde(default)]
    pub bits_per_byte_interval: Option<BlockInterval>,
    #[serde(default, with = "number::optional")]
    pub bits_per_byte_stderr: Option<f64>,
}

/// One row of a `ppl` record's `divergence`: the model against its base over the tokens that one way of cutting windows
/// scores. KL and log-likelihoods in nats; every `_stderr` is one standard error from blocks of text and every `_interval` a 95 % one, null
/// where the text is too short. In records of labpipe 0.1's ppl up to version 4, which have no intervals, errors take tokens as independent.
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
    #[serde(with = "number")]
    pub kl_mean: f64,
    #[serde(default, with = "number::optional")]
    pub kl_mean_stderr: Option<f64>,
    #[serde(default)]
    pub kl_mean_interval: Option<BlockInterval>,
    #[serde(with = "number")]
    pub kl_median: f64,
    #[serde(default, with = "number::optional")]
    pub kl_median_stderr: Option<f64>,
    #[serde(with = "number")]
    pub kl_p90: f64,
    #[serde(default, with = "number::optional")]
    pub kl_p90_stderr: Option<f64>,
    /// Null below 20 tokens.
    #[serde(default, with = "number::optional")]
    pub kl_p95: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub kl_p95_stderr: Option<f64>,
    /// Null below 100 tokens.
    #[serde(default, with = "number::optional")]
    pub kl_p99: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub kl_p99_stderr: Option<f64>,
    /// Null below 1,000 tokens.
    #[serde(default, with = "number::optional")]
    pub kl_p99_9: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub kl_p99_9_stderr: Option<f64>,
    #[serde(with = "number")]
    pub kl_max: f64,
    #[serde(with = "number")]
    pub kl_min: f64,
    /// p(true token) by the model minus that by the base.
    #[serde(with = "number")]
    pub delta_p_mean: f64,
    #[serde(default, with = "number::optional")]
    pub delta_p_mean_stderr: Option<f64>,
    #[serde(default)]
    pub delta_p_mean_interval: Option<BlockInterval>,
    /// √ of the mean square.
    #[serde(with = "number")]
    pub delta_p_rms: f64,
    #[serde(default, with = "number::optional")]
    pub delta_p_rms_stderr: Option<f64>,
    #[serde(with = "number")]
    pub delta_p_min: f64,
    #[serde(default, with = "number::optional")]
    pub delta_p_p01: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub delta_p_p05: Option<f64>,
    #[serde(with = "number")]
    pub delta_p_p25: f64,
    #[serde(with = "number")]
    pub delta_p_median: f64,
    #[serde(with = "number")]
    pub delta_p_p75: f64,
    #[serde(default, with = "number::optional")]
    pub delta_p_p95: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub delta_p_p99: Option<f64>,
    #[serde(with = "number")]
    pub delta_p_max: f64,
    /// Share of tokens at which both models have the same first choice; without an error where they never differ.
    #[serde(with = "number")]
    pub top1_agreement: f64,
    #[serde(default, with = "number::optional")]
    pub top1_agreement_stderr: Option<f64>,
    #[serde(default)]
    pub top1_agreement_interval: Option<BlockInterval>,
    /// exp of the mean NLL over the scored tokens, of the base and of the model.
    #[serde(with = "number")]
    pub base_perplexity: f64,
    #[serde(with = "number")]
    pub perplexity: f64,
    /// ln(perplexity/base_perplexity), its error from the tokens' own differences.
    #[serde(with = "number")]
    pub ln_ppl_ratio: f64,
    #[serde(default, with = "number::optional")]
    pub ln_ppl_ratio_stderr: Option<f64>,
    #[serde(default)]
    pub ln_ppl_ratio_interval: Option<BlockInterval>,
    #[serde(with = "number")]
    pub ppl_ratio: f64,
    #[serde(default, with = "number::optional")]
    pub ppl_ratio_stderr: Option<f64>,
    #[serde(default)]
    pub ppl_ratio_interval: Option<BlockInterval>,
    /// Pearson's, of the two models' log-likelihoods of the true tokens; null where one does not vary.
    #[serde(default, with = "number::optional")]
    pub nll_correlation: Option<f64>,
    #[serde(default, with = "number::optional")]
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
    #[serde(with = "number")]
    pub bytes_per_token: f64,
}
