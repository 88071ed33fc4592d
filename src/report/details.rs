//! Detail tables: every statistic of every measurement.

use super::Evidence;
use super::divergence::{divergence, units};
use super::evidence::short_hash;
use super::findings::perplexity_change;
use super::markdown::{Table, code};
use super::measure::Measure;
use super::numbers::{decimals, mib, significant, thousands, with_block_interval, with_interval, with_spread};
use crate::artifact::StartResult;
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
        disturbances(evidence),
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
        "starts",
        "tokens/s [95 %]",
        "of single starts",
        "n passes",
        "TTFT mean ± stdev",
        "median",
        "p90",
        "p95",
        "p99",
        "min",
        "max",
    ]);
    for row in &evidence.prefills {
        let one = &row.result.row;
        table.row([
            code(&row.stage),
            code(&row.model),
            one.label.clone(),
            thousands(one.n_starts()),
            rate(evidence, &row.stage, &one.label, one.tokens_per_second),
            single_starts(&one.starts),
            thousands(one.samples_s.len()),
            seconds_with_spread(one.ttft_s_mean, one.ttft_s_stdev),
            format_seconds(one.ttft_s_median),
            format_seconds(one.ttft_s_p90),
            percentile_cell(one.ttft_s_p95, 20),
            percentile_cell(one.ttft_s_p99, 100),
            format_seconds(one.ttft_s_min),
            format_seconds(one.ttft_s_max),
        ]);
    }
    let intro = format!(
        "Time to the first token's logits (TTFT): one pass over the whole prompt on a synchronized device, after warm-up, tokenizing and \
         sampling outside of the clock. {STARTS}"
    );
    let scored =
        "Where a label ends with `+nll`, the time is that to the negative log-likelihoods of all tokens of the prompt.";
    let has_scored = evidence.prefills.iter().any(|row| row.result.row.scores);
    let intro = if has_scored { format!("{intro} {scored}") } else { intro };
    section("Prefill", &intro, &table, &[])
}

/// How speeds are told.
const STARTS: &str = "Tokens/s is tokens / mean time over all starts, each a process of its own that loaded the model and took its share of the \
                      samples, models taking turns. The interval comes from the spread between starts, pooled over the speeds of one kind and run \
                      where their spreads agree; the spread of times beside it is that of single passes or tokens.";

/// Returns a speed with the interval that its measure has.
fn rate(evidence: &Evidence<'_>, stage: &str, label: &str, value: f64) -> String {
    let is_it = |one: &&Measure| one.stage == stage && one.label == label && one.metric.ends_with("tokens_per_second");
    with_interval(value, evidence.measures.iter().find(is_it).and_then(Measure::interval))
}

/// Returns the lowest and highest rate of single starts.
fn single_starts(starts: &[StartResult]) -> String {
    let counted = starts.iter().filter(|start| !start.is_left_out);
    let rates: Vec<f64> = counted.map(|start| start.tokens_per_second).collect();
    match rates.as_slice() {
        [] => "not kept".to_owned(),
        [only] => significant(*only),
        several => {
            let (min, max) =
                several.iter().fold((f64::INFINITY, 0.0f64), |(min, max), rate| (min.min(*rate), max.max(*rate)));
            format!("{} to {}", significant(min), significant(max))
        }
    }
}

fn decode(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table = Table::new([
        "stage",
        "model",
        "label",
        "starts",
        "tokens/s [95 %]",
        "of single starts",
        "n sequences",
        "n tokens",
        "latency mean ± stdev",
        "median",
        "p90",
        "p95",
        "p99",
        "min",
        "max",
    ]);
    for row in &evidence.decodes {
        let one = &row.result.row;
        table.row([
            code(&row.stage),
            code(&row.model),
            one.label.clone(),
            thousands(one.n_starts()),
            rate(evidence, &row.stage, &one.label, one.tokens_per_second),
            single_starts(&one.starts),
            thousands(one.n_sequences),
            thousands(one.samples_s.len()),
            seconds_with_spread(one.token_latency_s_mean, one.token_latency_s_stdev),
            format_seconds(one.token_latency_s_median),
            format_seconds(one.token_latency_s_p90),
            percentile_cell(one.token_latency_s_p95, 20),
            percentile_cell(one.token_latency_s_p99, 100),
            format_seconds(one.token_latency_s_min),
            format_seconds(one.token_latency_s_max),
        ]);
    }
    let intro = format!(
        "Latency of single tokens, generated one by one from a key-value cache, each timed after warm-up: on a synchronized device where \
         the clock is the host's. {STARTS}"
    );
    section("Decode", &intro, &table, &[])
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
        "mean NLL [95 %] (nats/token)",
        "perplexity [95 %]",
        "blocks of tokens",
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
            one.nll_interval
                .as_ref()
                .map_or_else(|| decimals(one.nll_mean, 5), |found| with_block_interval(one.nll_mean, Some(found))),
            match one.llama_cpp_stderr {
                Some(stderr) => format!(
                    "{}<br>llama.cpp's own ±: {}",
                    with_block_interval(one.perplexity, one.perplexity_interval.as_ref()),
                    significant(stderr)
                ),
                None => with_block_interval(one.perplexity, one.perplexity_interval.as_ref()),
            },
            one.nll_interval.as_ref().map_or_else(
                || "n/a".to_owned(),
                |found| format!("{} of {}", thousands(found.n_blocks), thousands(found.block_tokens)),
            ),
            one.bos.clone(),
            code(short_hash(&one.text_hash)),
            code(short_hash(&one.tokenizer_hash)),
        ]);
        if let Some(note) = short_text_note(one.n_tokens, one.max_length) {
            notes.push(format!("{} ({}): {note}.", code(&row.stage), one.convention));
        }
    }
    notes.extend(units(evidence));
    notes.extend(against_baselines(evidence));
    let methods: BTreeSet<&str> =
        evidence.ppls.iter().filter_map(|row| Some(row.result.nll_interval.as_ref()?.method.as_str())).collect();
    notes.extend(methods.into_iter().map(|method| format!("95 % interval: {method}.")));
    let intro = "Perplexity is e to the power of the mean negative log-likelihood (NLL) of the scored tokens. Text \
        and tokenizer are named by the first digits of their \
                 blake3 hashes: only rows that share both, the convention and the window are comparable.";
    section("Perplexity", intro, &table, &notes)
}

/// Returns the table of perplexities against the baselines', where there are any.
fn against_baselines(evidence: &Evidence<'_>) -> Option<String> {
    let mut table = Table::new([
        "model",
        "baseline",
        "windows",
        "n_scored",
        "mean NLL minus baseline's [95 %] (nats/token)",
        "perplexity against baseline's [95 %]",
        "interval",
    ]);
    for pair in &evidence.against {
        table.row([
            code(&pair.model),
            evidence.named(&pair.baseline),
            pair.label.clone(),
            thousands(pair.n_scored),
            with_block_interval(pair.nll_mean[1] - pair.nll_mean[0], pair.interval.as_ref()),
            perplexity_change(pair),
            pair.basis(),
        ]);
    }
    let intro = "Against the baseline. A paired interval is that of the differences of single tokens, which both models scored:";
    (!table.is_empty()).then(|| format!("{intro}\n\n{}", table.render()))
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
        "J/token mean ± stdev",
        "n parts (movements)",
        "n tokens",
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
        let unmeasured = || "not measured".to_owned();
        table.row([
            code(&row.stage),
            code(&row.model),
            one.label.clone(),
            one.energy_per_token_j.map_or_else(unmeasured, |joules| with_spread(joules, one.energy_per_token_j_stdev)),
            format!("{} ({})", thousands(one.energy_n_windows), thousands(one.energy_n_updates)),
            thousands(one.energy_n_tokens),
            one.energy_j.map_or_else(unmeasured, |energy| format!("{} J", significant(energy))),
            one.energy_window_s.map_or_else(unmeasured, format_seconds),
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
    let intro = "Energy: of the same work repeated for at least 2 s and 20 movements of the counter, n equal parts. Clocks, limits and \
                 throttling: over the timed regions of each measurement, warm-up left out.";
    section("Energy and clocks", intro, &table, &notes)
}

fn disturbances(evidence: &Evidence<'_>) -> Option<Section> {
    let mut table = Table::new(["stage", "model", "label", "what", "kept mean", "other attempt's mean"]);
    let prefills = evidence.prefills.iter().map(|row| {
        let one = &row.result.row;
        (&row.stage, &row.model, &one.label, one.ttft_s_mean, one.disturbance.as_ref())
    });
    let decodes = evidence.decodes.iter().map(|row| {
        let one = &row.result.row;
        (&row.stage, &row.model, &one.label, one.token_latency_s_mean, one.disturbance.as_ref())
    });
    for (stage, model, label, mean_s, seen) in prefills.chain(decodes) {
        let Some((seen, mark)) = seen.and_then(|seen| Some((seen, seen.mark()?))) else { continue };
        let discarded = seen.discarded.as_ref().map(|attempt| attempt.sample_s_mean);
        table.row([
            code(stage),
            code(model),
            label.clone(),
            mark,
            format_seconds(mean_s),
            discarded.map_or_else(|| "none was made".to_owned(), format_seconds),
        ]);
    }
    let intro = "Measurements during which something else used the processors or the device. Each was made once more unless that was \
                 asked off (`--accept-disturbed`), and the less disturbed attempt kept. \
                 Means are seconds per pass of a prefill and per token of a decode.";
    section("Disturbed measurements", intro, &table, &[])
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
