//! Measures: every number of a report in one shape, with unit, n, spread and method.

use super::numbers::{significant, thousands};
use super::paired::AgainstBaseline;
use super::speeds::Starts;
use crate::artifact::{
    BlockInterval, DecodeResult, Disturbance, DivergenceResult, MemoryFigures, ModuleDiff, PowerResult, PplResult,
    PrefillResult, number,
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
    /// 95 % interval of the value; null where none is known.
    #[serde(with = "number::optional")]
    pub low: Option<f64>,
    #[serde(with = "number::optional")]
    pub high: Option<f64>,
    /// Blocks of text that a standard error or an interval rests on.
    pub n_blocks: Option<usize>,
    pub method: String,
    /// Address of the stage that measured it.
    pub stage: String,
    /// Of a speed.
    #[serde(skip)]
    pub starts: Option<Starts>,
    /// What else went on: `disturbed: …`, `measured again, at first disturbed: …`; null if nothing that is known.
    pub disturbance: Option<String>,
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
            low: None,
            high: None,
            n_blocks: None,
            method: String::new(),
            stage: self.stage.to_owned(),
            starts: None,
            disturbance: None,
        }
    }

    /// Returns the speed and latency of a prefill, or of scoring a text in one pass.
    pub fn prefill(&self, row: &PrefillResult, starts: &Starts) -> Vec<Measure> {
        let (metrics, end) = match row.scores {
            false => (["prefill_tokens_per_second", "ttft_s"], "the first token's logits"),
            true => (["scoring_tokens_per_second", "scoring_s"], "all tokens' negative log-likelihoods"),
        };
        let n_starts = row.n_starts();
        let rate = self.measure(metrics[0], &row.label, row.tokens_per_second, "tokens/s", n_starts);
        let time = self.measure(metrics[1], &row.label, row.ttft_s_mean, "s", n_starts);
        let n_passes = row.samples_s.len();
        vec![
            rate.method(&format!("n_prompt / mean time to {end} over {n_passes} passes; n starts")),
            time.method(&format!("mean time to {end} over {n_passes} passes; n starts")),
        ]
        .into_iter()
        .map(|measure| measure.starts(starts).disturbance(row.disturbance.as_ref()))
        .collect()
    }

    /// Returns the speed and latency of a decode.
    pub fn decode(&self, row: &DecodeResult, starts: &Starts) -> Vec<Measure> {
        let n_starts = row.n_starts();
        let rate = self.measure("decode_tokens_per_second", &row.label, row.tokens_per_second, "tokens/s", n_starts);
        let latency = self.measure("token_latency_s", &row.label, row.token_latency_s_mean, "s", n_starts);
        let (n_sequences, n_tokens) = (row.n_sequences, row.samples_s.len());
        vec![
            rate.method(&format!("1 / mean token latency over {n_sequences} sequences; n starts")),
            latency.method(&format!("mean over {n_tokens} single tokens; n starts")),
        ]
        .into_iter()
        .map(|measure| measure.starts(starts).disturbance(row.disturbance.as_ref()))
        .collect()
    }

    /// Returns the energy a token took, where the device told.
    pub fn energy(&self, row: &PowerResult) -> Option<Measure> {
        let joules = row.energy_per_token_j?;
        // Records of earlier versions have no parts.
        let n = if row.energy_n_windows > 0 { row.energy_n_windows } else { 1 };
        let measure = self.measure("energy_per_token_j", &row.label, joules, "J/token", n);
        Some(measure.spread(row.energy_per_token_j_stdev, SpreadKind::Stdev).method(&row.energy_method))
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
        let own = row.llama_cpp_stderr.map(|stderr| format!("; llama.cpp's own ± {}", significant(stderr)));
        let mut measures = vec![
            perplexity
                .method(&format!("{method}{}", own.unwrap_or_default()))
                .block_interval(row.perplexity_interval.as_ref()),
            nll.method(&method).block_interval(row.nll_interval.as_ref()),
        ];
        let units = [
            ("word_perplexity", row.word_perplexity, &row.word_perplexity_interval, "1"),
            ("byte_perplexity", row.byte_perplexity, &row.byte_perplexity_interval, "1"),
            ("bits_per_byte", row.bits_per_byte, &row.bits_per_byte_interval, "bits/byte"),
        ];
        measures.extend(units.into_iter().filter_map(|(metric, value, interval, unit)| {
            let measure = self.measure(metric, label, value?, unit, row.n_scored);
            Some(measure.method(&method).block_interval(interval.as_ref()))
        }));
        measures
    }

    /// Returns how a model's mean NLL and its perplexity differ from the baseline's.
    pub fn against_baseline(pair: &AgainstBaseline) -> Vec<Measure> {
        let source = Source { model: &pair.model, stage: &pair.stage };
        let kind = if pair.is_paired { "paired" } else { "unpaired" };
        let method = format!("{kind} against {}", pair.baseline);
        let difference = pair.nll_mean[1] - pair.nll_mean[0];
        let ratio = pair.interval.as_ref().and_then(BlockInterval::exp);
        vec![
            source
                .measure("nll_minus_baseline", &pair.label, difference, "nats/token", pair.n_scored)
                .method(&method)
                .block_interval(pair.interval.as_ref()),
            source
                .measure("perplexity_over_baseline", &pair.label, pair.ratio(), "1", pair.n_scored)
                .method(&method)
                .block_interval(ratio.as_ref()),
        ]
    }

    /// Returns how far a model is from its base.
    pub fn divergence(&self, row: &DivergenceResult, label: &str, base: &str) -> Vec<Measure> {
        let method = format!("against {base}, whose log-probabilities were kept as {}", row.base_log_probs);
        let means = [
            ("kl_mean", row.kl_mean, &row.kl_mean_interval, "nats"),
            ("delta_p_mean", row.delta_p_mean, &row.delta_p_mean_interval, "1"),
            ("top1_agreement", row.top1_agreement, &row.top1_agreement_interval, "1"),
            ("ln_ppl_ratio", row.ln_ppl_ratio, &row.ln_ppl_ratio_interval, "nats/token"),
        ];
        let means = means.into_iter().map(|(metric, value, interval, unit)| {
            self.measure(metric, label, value, unit, row.n_scored).method(&method).block_interval(interval.as_ref())
        });
        let of = |value: f64| Some(value);
        let others = [
            ("kl_median", of(row.kl_median), row.kl_median_stderr, "nats"),
            ("kl_p90", of(row.kl_p90), row.kl_p90_stderr, "nats"),
            ("kl_p95", row.kl_p95, row.kl_p95_stderr, "nats"),
            ("kl_p99", row.kl_p99, row.kl_p99_stderr, "nats"),
            ("kl_p99_9", row.kl_p99_9, row.kl_p99_9_stderr, "nats"),
            ("kl_max", of(row.kl_max), None, "nats"),
            ("kl_min", of(row.kl_min), None, "nats"),
            ("delta_p_rms", of(row.delta_p_rms), row.delta_p_rms_stderr, "1"),
            ("delta_p_p01", row.delta_p_p01, None, "1"),
            ("delta_p_median", of(row.delta_p_median), None, "1"),
            ("delta_p_p99", row.delta_p_p99, None, "1"),
            ("nll_correlation", row.nll_correlation, row.nll_correlation_stderr, "1"),
        ];
        // Errors of records without intervals took tokens as independent.
        let n_blocks = row.kl_mean_interval.as_ref().map(|interval| interval.n_blocks);
        let others = others.into_iter().filter_map(|(metric, value, stderr, unit)| {
            let measure = self.measure(metric, label, value?, unit, row.n_scored).method(&method);
            let stderr = stderr.filter(|_| n_blocks.is_some());
            Some(Measure { n_blocks, ..measure.spread(stderr, SpreadKind::Stderr) })
        });
        means.chain(others).collect()
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

    fn starts(mut self, starts: &Starts) -> Measure {
        self.starts = Some(starts.clone());
        self
    }

    /// Returns its 95 % interval.
    pub fn interval(&self) -> Option<(f64, f64)> {
        self.low.zip(self.high)
    }

    /// Returns true where a larger value is a slower one.
    fn is_time(&self) -> bool {
        self.unit == "s"
    }

    /// Gives a speed, or a time, the interval that the spread between starts tells.
    pub fn with_interval(&mut self, factors: Option<(f64, f64)>) {
        let factors = factors.map(|(low, high)| if self.is_time() { (1.0 / high, 1.0 / low) } else { (low, high) });
        self.low = factors.map(|(low, _)| self.value * low);
        self.high = factors.map(|(_, high)| self.value * high);
    }

    fn disturbance(mut self, seen: Option<&Disturbance>) -> Measure {
        self.disturbance = seen.and_then(Disturbance::mark);
        self
    }

    /// Takes a block interval's ends and standard error, and how it came about into the method.
    fn block_interval(self, interval: Option<&BlockInterval>) -> Measure {
        let Some(found) = interval else { return self };
        let blocks = format!("{} blocks of {} tokens", thousands(found.n_blocks), thousands(found.block_tokens));
        let method = format!("{}; 95 % interval from {blocks}: {}", self.method, found.method);
        let measure = self.spread(Some(found.stderr), SpreadKind::Stderr).method(&method);
        Measure { low: Some(found.low), high: Some(found.high), n_blocks: Some(found.n_blocks), ..measure }
    }

    fn method(mut self, method: &str) -> Measure {
        self.method = method.to_owned();
        self
    }
}
