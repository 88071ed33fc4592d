//! Measures: every number of a report in one shape, with unit, n, spread and method.

use super::numbers::thousands;
use crate::artifact::{
    DecodeResult, DivergenceResult, MemoryFigures, ModuleDiff, PowerResult, PplResult, PrefillResult, number,
};
use crate::inference::StoredType;
use serde::Serialize;

/// What a measure's `spread` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SpreadKind {
    /// Of single samples, with n − 1.
    Stdev,
    /// Of the mean.
    Stderr,
}

impl SpreadKind {
    pub fn name(self) -> &'static str {
        match self {
            SpreadKind::Stdev => "stdev",
            SpreadKind::Stderr => "stderr",
        }
    }
}

/// One number.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measure {
    /// Address of the model.
    pub model: String,
    /// `decode_tokens_per_second`.
    pub metric: &'static str,
    /// `tg128`, `hf-strided 512/256`, a module's name.
    pub label: String,
    #[serde(with = "number")]
    pub value: f64,
    pub unit: &'static str,
    /// How many samples, tokens or modules the value comes from.
    pub n: usize,
    #[serde(with = "number::optional")]
    pub spread: Option<f64>,
    pub spread_kind: Option<SpreadKind>,
    pub method: String,
    /// Address of the stage that measured it.
    pub stage: String,
}

/// Names a model and the stage that measured it, for all measures of a record.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    pub model: &'a str,
    pub stage: &'a str,
}

impl Source<'_> {
    fn measure(&self, metric: &'static str, label: &str, value: f64, unit: &'static str, n: usize) -> Measure {
        Measure {
            model: self.model.to_owned(),
            metric,
            label: label.to_owned(),
            value,
            unit,
            n,
            spread: None,
            spread_kind: None,
            method: String::new(),
            stage: self.stage.to_owned(),
        }
    }

    /// Returns the speed and latency of a prefill, or of scoring a text in one pass.
    pub fn prefill(&self, row: &PrefillResult) -> Vec<Measure> {
        let n = row.samples_s.len();
        let (metrics, end) = match row.scores {
            false => (["prefill_tokens_per_second", "ttft_s"], "the first token's logits"),
            true => (["scoring_tokens_per_second", "scoring_s"], "all tokens' negative log-likelihoods"),
        };
        let rate = self.measure(metrics[0], &row.label, row.tokens_per_second_mean, "tokens/s", n);
        let time = self.measure(metrics[1], &row.label, row.ttft_s_mean, "s", n);
        vec![
            rate.spread(row.tokens_per_second_stdev, SpreadKind::Stdev)
                .method(&format!("mean over passes of n_prompt / time to {end}")),
            time.spread(row.ttft_s_stdev, SpreadKind::Stdev).method(&format!("mean time to {end} over passes")),
        ]
    }

    /// Returns the speed and latency of a decode.
    pub fn decode(&self, row: &DecodeResult) -> Vec<Measure> {
        let n_sequences = row.n_sequences;
        let rate = self.measure("decode_tokens_per_second", &row.label, row.tokens_per_second, "tokens/s", n_sequences);
        let latency = self.measure("token_latency_s", &row.label, row.token_latency_s_mean, "s", row.samples_s.len());
        vec![
            rate.spread(row.tokens_per_second_stdev, SpreadKind::Stdev)
                .method("mean over sequences of n_gen / sum of token latencies"),
            latency.spread(row.token_latency_s_stdev, SpreadKind::Stdev).method("mean over single tokens"),
        ]
    }

    /// Returns the energy a token took, where the device told.
    pub fn energy(&self, row: &PowerResult) -> Option<Measure> {
        let joules = row.energy_per_token_j?;
        Some(self.measure("energy_per_token_j", &row.label, joules, "J/token", row.n_tokens).method(&row.energy_method))
    }

    /// Returns a perplexity and its mean NLL.
    pub fn ppl(&self, row: &PplResult, label: &str) -> Vec<Measure> {
        let method = format!(
            "{}, {} window(s) of up to {} tokens, one every {}",
            row.convention,
            thousands(row.n_windows),
            thousands(row.max_length),
            thousands(row.stride)
        );
        let perplexity = self.measure("perplexity", label, row.perplexity, "1", row.n_scored);
        let nll = self.measure("nll_mean", label, row.nll_mean, "nats/token", row.n_scored);
        // The error of the mean is that of its exponential over the exponential: all that older records have of it.
        let of_exponential = || row.stderr.map(|stderr| stderr / row.perplexity).filter(|stderr| stderr.is_finite());
        let nll_stderr = row.nll_stderr.or_else(of_exponential);
        let mut measures = vec![
            perplexity.spread(row.stderr, SpreadKind::Stderr).method(&method),
            nll.spread(nll_stderr, SpreadKind::Stderr).method(&method),
        ];
        let units = [
            ("word_perplexity", row.word_perplexity, row.word_perplexity_stderr, "1"),
            ("byte_perplexity", row.byte_perplexity, row.byte_perplexity_stderr, "1"),
            ("bits_per_byte", row.bits_per_byte, row.bits_per_byte_stderr, "bits/byte"),
        ];
        measures.extend(units.into_iter().filter_map(|(metric, value, stderr, unit)| {
            let measure = self.measure(metric, label, value?, unit, row.n_scored);
            Some(measure.spread(stderr, SpreadKind::Stderr).method(&method))
        }));
        measures
    }

    /// Returns how far a model is from its base.
    pub fn divergence(&self, row: &DivergenceResult, label: &str, base: &str) -> Vec<Measure> {
        let method = format!("against {base}, whose log-probabilities were kept as {}", row.base_log_probs);
        let of = |value: f64| Some(value);
        let known = [
            ("kl_mean", of(row.kl_mean), row.kl_mean_stderr, "nats"),
            ("kl_median", of(row.kl_median), row.kl_median_stderr, "nats"),
            ("kl_p90", of(row.kl_p90), row.kl_p90_stderr, "nats"),
            ("kl_p95", row.kl_p95, row.kl_p95_stderr, "nats"),
            ("kl_p99", row.kl_p99, row.kl_p99_stderr, "nats"),
            ("kl_p99_9", row.kl_p99_9, row.kl_p99_9_stderr, "nats"),
            ("kl_max", of(row.kl_max), None, "nats"),
            ("kl_min", of(row.kl_min), None, "nats"),
            ("delta_p_mean", of(row.delta_p_mean), row.delta_p_mean_stderr, "1"),
            ("delta_p_rms", of(row.delta_p_rms), row.delta_p_rms_stderr, "1"),
            ("delta_p_p01", row.delta_p_p01, None, "1"),
            ("delta_p_median", of(row.delta_p_median), None, "1"),
            ("delta_p_p99", row.delta_p_p99, None, "1"),
            ("top1_agreement", of(row.top1_agreement), row.top1_agreement_stderr, "1"),
            ("ln_ppl_ratio", of(row.ln_ppl_ratio), row.ln_ppl_ratio_stderr, "nats/token"),
            ("nll_correlation", row.nll_correlation, row.nll_correlation_stderr, "1"),
        ];
        let measures = known.into_iter().filter_map(|(metric, value, stderr, unit)| {
            let measure = self.measure(metric, label, value?, unit, row.n_scored);
            Some(measure.spread(stderr, SpreadKind::Stderr).method(&method))
        });
        measures.collect()
    }

    /// Returns what is known of a record's memory figures.
    pub fn memory(&self, figures: &MemoryFigures) -> Vec<Measure> {
        let method = figures.memory_method.as_deref().unwrap_or_default();
        // Older records have no other figure of the whole.
        let process_peak = figures.process_peak_bytes.filter(|_| figures.memory_bytes.is_none());
        let known = [
            ("weights_bytes", figures.weights_bytes, "bytes of parameters as stored"),
            ("kv_cache_bytes", figures.kv_cache_bytes, "bytes of the key-value cache as allocated"),
            ("pool_peak_bytes", figures.pool_peak_bytes, figures.pool_peak_method.as_deref().unwrap_or_default()),
            ("memory_bytes", figures.memory_bytes, method),
            ("memory_mapped_bytes", figures.memory_mapped_bytes, "of memory_bytes, pages of the model's mapped files"),
            ("memory_rest_bytes", figures.memory_rest_bytes, "of memory_bytes, neither weights nor cache"),
            ("process_peak_bytes", process_peak, figures.process_peak_method.as_str()),
        ];
        let measures = known.into_iter().filter_map(|(metric, bytes, method)| {
            bytes.map(|bytes| self.measure(metric, self.stage, bytes as f64, "bytes", 1).method(method))
        });
        measures.collect()
    }

    /// Returns the bytes that a model's files take for weights of one element type.
    pub fn source_bytes(&self, stored: &StoredType) -> Measure {
        self.measure("source_bytes", &stored.name, stored.bytes as f64, "bytes", stored.n_tensors)
            .method("bytes of the tensors of that element type in the model's files; n tensors")
    }

    /// Returns the bits a weight takes.
    pub fn bits_per_weight(&self, label: &str, bytes: u64, n_params: u64) -> Measure {
        let bits = 8.0 * bytes as f64 / n_params as f64;
        self.measure("bits_per_weight", label, bits, "bits", 1).method("8 · bytes as stored / number of parameters")
    }

    /// Returns the differences of one module's output.
    pub fn module_diff(&self, row: &ModuleDiff, mode: &str) -> Vec<Measure> {
        let method = format!("{mode} diff of the module's output over tokens");
        let known = [
            ("mse", Some(row.mse), "activation²"),
            ("cosine", Some(row.cosine), "1"),
            ("cosine_p01", Some(row.cosine_p01), "1"),
            ("sqnr_db", row.sqnr_db, "dB"),
            ("rel_frobenius", row.rel_frobenius, "1"),
            ("max_abs_diff", Some(row.max_abs_diff), "activation"),
            ("ref_mean_abs", Some(row.ref_mean_abs), "activation"),
            ("ref_max_abs", Some(row.ref_max_abs), "activation"),
        ];
        let measures = known.into_iter().filter_map(|(metric, value, unit)| {
            value.map(|value| self.measure(metric, &row.module, value, unit, row.n_tokens).method(&method))
        });
        measures.collect()
    }
}

impl Measure {
    fn spread(mut self, spread: Option<f64>, kind: SpreadKind) -> Measure {
        self.spread = spread;
        self.spread_kind = spread.map(|_| kind);
        self
    }

    fn method(mut self, method: &str) -> Measure {
        self.method = method.to_owned();
        self
    }
}
