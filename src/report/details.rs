//! Detail tables: every statistic of every measurement.

use super::Evidence;
use super::divergence::{divergence, units};
use super::evidence::short_hash;
use super::markdown::{Table, code};
use super::numbers::{decimals, mib, significant, thousands, with_spread};
use crate::metrics::short_text_note;
use crate::units::format_seconds;
use std::collections::BTreeSet;

/// One heading's worth of a report.
pub struct Section {
    pub heading: &'static str,
    pub text: String,
}

/// Returns the sections that have something to show.
pub fn sections(evidence: &Evidence<'_>) -> Vec<Section> {
    let sections = [
        prefill(evidence),
        decode(evidence),
        perplexity(evidence),
        divergence(evidence),
        memory(evidence),
        power(evidence),
        quantization(evidence),
    ];
    sections.into_iter().flatten().collect()
}

pub fn section(heading: &'static str, intro: &str, table: &Table, notes: &[String]) -> Option<Section> {
    if table.is_empty() {
        return None;
    }
    let mut text = format!("{intro}\n\n{}", table.render());
    for note in notes {
        text.push_str(&format!("\n{note}\n"));
    }
    Some(Section { heading, text })
}

/// Formats what is left out below a number of samples.
fn percentile_cell(seconds: Option<f64>, n_needed: usize) -> String {
    seconds.map_or_else(|| format!("n/a (n < {n_needed})"), format_seconds)
}

fn seconds_with_spread(mean: f64, stdev: Option<f64>) -> String {
    let (factor, unit) = match mean {
        mean if mean >= 1.0 => (1.0, "s"),
        mean if mean >= 1e-3 => (1e3, "ms"),
        _ => (1e6, "µs"),
    };
    format!("{} {unit}", with_spread(mean * factor, stdev.map(|stdev| stdev * factor)))
}

fn prefill(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table = Table::new([
        "stage",
        "model",
        "label",
        "n",
        "TTFT mean ± stdev",
        "median",
        "p90",
        "p95",
        "p99",
        "min",
        "max",
        "tokens/s mean ± stdev",
    ]);
    for row in &evidence.prefills {
        let one = &row.result;
        table.row([
            code(&row.stage),
            code(&row.model),
            one.label.clone(),
            thousands(one.samples_s.len()),
            seconds_with_spread(one.ttft_s_mean, one.ttft_s_stdev),
            format_seconds(one.ttft_s_median),
            format_seconds(one.ttft_s_p90),
            percentile_cell(one.ttft_s_p95, 20),
            percentile_cell(one.ttft_s_p99, 100),
            format_seconds(one.ttft_s_min),
            format_seconds(one.ttft_s_max),
            with_spread(one.tokens_per_second_mean, one.tokens_per_second_stdev),
        ]);
    }
    let intro = "Time to the first token's logits (TTFT): one pass over the whole prompt on a synchronized device, \
        after warm-up, tokenizing and sampling \
                 outside of the clock; n passes.";
    let scored =
        "Where a label ends with `+nll`, the time is that to the negative log-likelihoods of all tokens of the prompt.";
    let has_scored = evidence.prefills.iter().any(|row| row.result.scores);
    let intro = if has_scored { format!("{intro} {scored}") } else { intro.to_owned() };
    section("Prefill", &intro, &table, &[])
}

fn decode(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table = Table::new([
        "stage",
        "model",
        "label",
        "n tokens",
        "latency mean ± stdev",
        "median",
        "p90",
        "p95",
        "p99",
        "min",
        "max",
        "n sequences",
        "tokens/s mean ± stdev",
    ]);
    for row in &evidence.decodes {
        let one = &row.result;
        table.row([
            code(&row.stage),
            code(&row.model),
            one.label.clone(),
            thousands(one.samples_s.len()),
            seconds_with_spread(one.token_latency_s_mean, one.token_latency_s_stdev),
            format_seconds(one.token_latency_s_median),
            format_seconds(one.token_latency_s_p90),
            percentile_cell(one.token_latency_s_p95, 20),
            percentile_cell(one.token_latency_s_p99, 100),
            format_seconds(one.token_latency_s_min),
            format_seconds(one.token_latency_s_max),
            thousands(one.n_sequences),
            with_spread(one.tokens_per_second, one.tokens_per_second_stdev),
        ]);
    }
    let intro = "Latency of single tokens, generated one by one from a key-value cache, each timed after warm-up: on a synchronized \
                 device where the clock is the host's; tokens/s is n_gen / sum of latencies, averaged over sequences.";
    section("Decode", intro, &table, &[])
}

fn perplexity(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table = Table::new([
        "stage",
        "model",
        "convention",
        "window / stride (tokens)",
        "n_tokens",
        "n_windows",
        "n_scored",
        "mean NLL (nats/token)",
        "perplexity ± stderr",
        "BOS",
        "text",
        "tokenizer",
    ]);
    let mut notes = Vec::new();
    for row in &evidence.ppls {
        let one = &row.result;
        table.row([
            code(&row.stage),
            code(&row.model),
            one.convention.clone(),
            format!("{} / {}", thousands(one.max_length), thousands(one.stride)),
            thousands(one.n_tokens),
            thousands(one.n_windows),
            thousands(one.n_scored),
            decimals(one.nll_mean, 5),
            with_spread(one.perplexity, one.stderr),
            one.bos.clone(),
            code(short_hash(&one.text_hash)),
            code(short_hash(&one.tokenizer_hash)),
        ]);
        if let Some(note) = short_text_note(one.n_tokens, one.max_length) {
            notes.push(format!("{} ({}): {note}.", code(&row.stage), one.convention));
        }
    }
    notes.extend(units(evidence));
    let intro = "Perplexity is e to the power of the mean negative log-likelihood (NLL) of the scored tokens. Text \
        and tokenizer are named by the first digits of their \
                 blake3 hashes: only rows that share both, the convention and the window are comparable.";
    section("Perplexity", intro, &table, &notes)
}

fn memory(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table = Table::new([
        "stage",
        "model",
        "memory",
        "weights",
        "key-value cache",
        "activations and the rest",
        "mapped pages in it",
        "allocator pool peak",
        "how memory was measured",
    ]);
    let cell = |bytes: Option<u64>| bytes.map_or_else(|| "not measured".to_owned(), mib);
    for row in &evidence.memories {
        let one = &row.result;
        table.row([
            code(&row.stage),
            code(&row.model),
            cell(one.memory_bytes),
            cell(one.weights_bytes),
            cell(one.kv_cache_bytes),
            cell(one.memory_rest_bytes),
            cell(one.memory_mapped_bytes),
            cell(one.pool_peak_bytes),
            one.memory_method.clone().unwrap_or_else(|| "n/a".to_owned()),
        ]);
    }
    let intro = "Each figure is one reading (n = 1). Weights: bytes of parameters as stored. Pool peak: the most that the \
        device's allocator held when asked. Memory: the whole at the stage's peak, as the last column says; its parts are beside it, \
        the key-value cache is that of the stage's longest sequence.";
    section("Memory", intro, &table, &[])
}

fn power(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table = Table::new([
        "stage",
        "model",
        "label",
        "n tokens",
        "J/token",
        "energy",
        "over",
        "mean power",
        "power limit",
        "SM clock median (min)",
        "memory clock median (min)",
        "n samples",
        "throttled by",
    ]);
    let watts = |watts: Option<f64>| watts.map_or_else(|| "not told".to_owned(), |watts| format!("{watts:.0} W"));
    let clock = |median: Option<f64>, min: Option<f64>| match median.zip(min) {
        Some((median, min)) => format!("{median:.0} MHz ({min:.0})"),
        None => "not told".to_owned(),
    };
    for row in &evidence.powers {
        let one = &row.result;
        let joules = |joules: Option<f64>| joules.map_or_else(|| "not measured".to_owned(), significant);
        table.row([
            code(&row.stage),
            code(&row.model),
            one.label.clone(),
            thousands(one.n_tokens),
            joules(one.energy_per_token_j),
            one.energy_j.map_or_else(|| "not measured".to_owned(), |energy| format!("{} J", significant(energy))),
            format_seconds(one.window_s),
            watts(one.power_w_mean),
            watts(one.power_limit_w),
            clock(one.sm_clock_mhz_median, one.sm_clock_mhz_min),
            clock(one.memory_clock_mhz_median, one.memory_clock_mhz_min),
            thousands(one.n_samples),
            if one.throttle_reasons.is_empty() { "nothing".to_owned() } else { one.throttle_reasons.join(", ") },
        ]);
    }
    let methods: BTreeSet<&str> = evidence.powers.iter().map(|row| row.result.energy_method.as_str()).collect();
    let notes: Vec<String> = methods.into_iter().map(|method| format!("Energy: {method}.")).collect();
    let intro = "What the device's board told over the timed regions of each measurement, warm-up left out.";
    section("Energy and clocks", intro, &table, &notes)
}

fn quantization(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table =
        Table::new(["model", "scheme", "linears", "parameters", "bytes", "bits/weight", "lowest weight SQNR", "in"]);
    for model in &evidence.models {
        let mut schemes: Vec<&str> = Vec::new();
        for module in &model.modules {
            if !schemes.contains(&module.scheme.as_str()) {
                schemes.push(&module.scheme);
            }
        }
        for scheme in schemes {
            let of_scheme: Vec<_> = model.modules.iter().filter(|module| module.scheme == scheme).collect();
            let bytes: u64 = of_scheme.iter().map(|module| module.bytes).sum();
            let n_params: u64 = of_scheme.iter().map(|module| module.n_params).sum();
            let worst = of_scheme
                .iter()
                .filter_map(|module| Some((module.weight_sqnr_db?, module.module.as_str())))
                .min_by(|a, b| a.0.total_cmp(&b.0));
            table.row([
                code(&model.address),
                scheme.to_owned(),
                thousands(of_scheme.len()),
                thousands(n_params as usize),
                mib(bytes),
                significant(8.0 * bytes as f64 / n_params.max(1) as f64),
                worst.map_or_else(|| "exact".to_owned(), |(db, _)| format!("{db:.2} dB")),
                worst.map_or_else(|| "n/a".to_owned(), |(_, module)| code(module)),
            ]);
        }
    }
    let intro = "What each scheme stores, statistics included, and the weight that it changed most: SQNR is \
        10·log10(Σw²/Σ(w − ŵ)²) over all values of a \
                 weight.";
    section("Quantization", intro, &table, &[])
}
