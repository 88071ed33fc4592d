//! Two models on the same tokens: what differs, from the differences of single tokens.

use super::evidence::{Evidence, Row, window_label};
use super::model::Model;
use crate::artifact::{BlockInterval, DivergenceResult, PplRecord, PplResult, TokenScores};
use crate::metrics::{Convention, Estimate, TokenPair, difference, linear_figures, paired_interval};
use crate::stage::StageInput;
use std::collections::BTreeMap;

/// Where the scores of single tokens come from: what a `ppl` stage keeps beside its record.
pub trait TokenSource: Sync {
    /// Returns the scores of the windows of that name; `None` where the artifact is gone or cannot be read.
    fn read(&self, ppl: &StageInput, windows: &str) -> Option<TokenScores>;
}

/// No scores of single tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTokens;

impl TokenSource for NoTokens {
    fn read(&self, _ppl: &StageInput, _windows: &str) -> Option<TokenScores> {
        None
    }
}

/// A `ppl` stage and its record.
#[derive(Clone, Copy)]
pub struct Scored<'a> {
    pub stage: &'a StageInput,
    pub record: &'a PplRecord,
}

/// Intervals of differences, second minus first, by metric and by label.
pub type Differences = BTreeMap<(String, String), BlockInterval>;

/// Returns whether two `ppl` stages scored the same text with the same tokenizer.
pub fn is_same_text(first: &PplRecord, second: &PplRecord) -> bool {
    let subject =
        |record: &PplRecord| record.results.first().map(|row| (row.text_hash.clone(), row.tokenizer_hash.clone()));
    subject(first).is_some_and(|subject_of_first| Some(subject_of_first) == subject(second))
}

/// Returns the differences of those metrics whose single tokens both artifacts still hold; none where the texts differ.
pub fn paired_differences(first: Scored<'_>, second: Scored<'_>, tokens: &dyn TokenSource) -> Differences {
    let mut found = Differences::new();
    if !is_same_text(first.record, second.record) {
        return found;
    }
    for row in &first.record.results {
        let Some(other) = second.record.results.iter().find(|other| is_same_cut(row, other)) else { continue };
        let Some((ours, theirs)) = same_tokens(first.stage, second.stage, row, tokens) else { continue };
        let label = window_label(&row.convention, row.max_length, row.stride);
        let of = |first: &[f64], second: &[f64]| paired_interval(first, second, &ours.document_idx);
        if let Some(nll) = of(&ours.nll, &theirs.nll) {
            let nll = nll.around(other.nll_mean - row.nll_mean);
            for (metric, interval) in of_log_likelihoods(row, other, &nll) {
                found.insert((metric.to_owned(), label.clone()), interval);
            }
        }
        // Divergence is measured once for all conventions that cut the same windows, under the first of them.
        let of_label = |record: &PplRecord| -> Option<DivergenceResult> {
            let mut rows = record.divergence.iter().flatten();
            rows.find(|one| window_label(&one.convention, one.max_length, one.stride) == label).cloned()
        };
        if let (Some(one), Some(another)) = (of_label(first.record), of_label(second.record)) {
            for (metric, interval) in of_divergence((&one, &ours), (&another, &theirs)) {
                found.insert((metric.to_owned(), label.clone()), interval);
            }
        }
    }
    found
}

fn is_same_cut(row: &PplResult, other: &PplResult) -> bool {
    (&other.convention, other.max_length, other.stride) == (&row.convention, row.max_length, row.stride)
}

/// Returns the scores of a row's windows, where both stages hold those of the same tokens.
fn same_tokens(
    first: &StageInput,
    second: &StageInput,
    row: &PplResult,
    tokens: &dyn TokenSource,
) -> Option<(TokenScores, TokenScores)> {
    let windows = Convention::parse(&row.convention)?.cut(row.max_length, row.stride).name();
    let (ours, theirs) = (tokens.read(first, &windows)?, tokens.read(second, &windows)?);
    let is_same = (&ours.token_id, &ours.window_idx) == (&theirs.token_id, &theirs.window_idx);
    is_same.then_some((ours, theirs))
}

/// Returns the differences that follow from that of the mean NLL.
fn of_log_likelihoods(row: &PplResult, other: &PplResult, nll: &BlockInterval) -> Vec<(&'static str, BlockInterval)> {
    // b − a = √(ab)·2·sinh(ln(b/a)/2): the ratio has the interval, the level is taken as known.
    let of_exponentials = |a: f64, b: f64, per_unit: f64| {
        let level = (a * b).sqrt();
        nll.map(|nll| 2.0 * level * (nll * per_unit / 2.0).sinh(), level * per_unit)
    };
    let per = |n_units: Option<usize>| row.n_scored as f64 / n_units.unwrap_or(1).max(1) as f64;
    let mut found =
        vec![("nll_mean", Some(nll.clone())), ("perplexity", of_exponentials(row.perplexity, other.perplexity, 1.0))];
    if let (Some(a), Some(b)) = (row.word_perplexity, other.word_perplexity) {
        found.push(("word_perplexity", of_exponentials(a, b, per(row.n_words))));
    }
    if let (Some(a), Some(b)) = (row.byte_perplexity, other.byte_perplexity) {
        found.push(("byte_perplexity", of_exponentials(a, b, per(row.n_bytes))));
        let bits = per(row.n_bytes) / std::f64::consts::LN_2;
        found.push(("bits_per_byte", nll.map(|nll| nll * bits, bits)));
    }
    found.into_iter().filter_map(|(metric, interval)| Some((metric, interval?))).collect()
}

/// Returns the differences of two divergences from a base; none where it was kept in another precision.
fn of_divergence(
    (first, ours): (&DivergenceResult, &TokenScores),
    (second, theirs): (&DivergenceResult, &TokenScores),
) -> Vec<(&'static str, BlockInterval)> {
    let (Some(first_pairs), Some(second_pairs)) = (pairs_of(ours), pairs_of(theirs)) else { return Vec::new() };
    if first.base_log_probs != second.base_log_probs {
        return Vec::new();
    }
    let other_series = linear_figures(&second_pairs, &theirs.document_idx);
    let mut found = Vec::new();
    for (metric, series) in linear_figures(&first_pairs, &ours.document_idx) {
        let other = other_series.iter().find(|(other, _)| *other == metric);
        let interval = other.and_then(|(_, other)| paired_interval(&series, other, &ours.document_idx));
        found.extend(interval.map(|interval| (metric, interval)));
    }
    found
}

/// Returns what both models say of each token; `None` for scores without a base, and those of labpipe 0.1's ppl up to version 4.
fn pairs_of(scores: &TokenScores) -> Option<Vec<TokenPair>> {
    let n = scores.nll.len();
    let is_whole = n > 0 && [scores.kl.len(), scores.base_nll.len(), scores.same_top.len()] == [n; 3];
    let pair = |i: usize| TokenPair {
        base_nll: scores.base_nll[i],
        nll: scores.nll[i],
        kl: scores.kl[i],
        same_top: scores.same_top[i],
    };
    is_whole.then(|| (0..n).map(pair).collect())
}

/// How the mean NLL of a model differs from that of its baseline, under one label.
#[derive(Debug, Clone)]
pub struct AgainstBaseline {
    pub model: String,
    pub baseline: String,
    /// The stage that scored the model.
    pub stage: String,
    pub label: String,
    pub nll_mean: [f64; 2],
    /// Of the baseline and of the model.
    pub perplexity: [f64; 2],
    pub n_scored: usize,
    /// Of the model's mean NLL minus the baseline's; `None` where the text is too short.
    pub interval: Option<BlockInterval>,
    /// The interval is that of the differences of single tokens.
    pub is_paired: bool,
}

impl AgainstBaseline {
    /// Returns the ratio of the perplexities.
    pub fn ratio(&self) -> f64 {
        (self.nll_mean[1] - self.nll_mean[0]).exp()
    }

    /// Returns how the interval came about: `paired, 4,000 tokens in 31 blocks`.
    pub fn basis(&self) -> String {
        let n = super::numbers::thousands(self.n_scored);
        let Some(interval) = &self.interval else { return format!("no interval: {n} tokens are too few") };
        let blocks = super::numbers::thousands(interval.n_blocks);
        let few = if interval.allows_verdict() { "" } else { ", too few to conclude anything" };
        if self.is_paired {
            format!("95 %, paired, {n} tokens in {blocks} blocks{few}")
        } else {
            format!("95 %, unpaired for lack of single tokens' scores, {n} tokens, at least {blocks} blocks each{few}")
        }
    }
}

/// Returns every quantized model's mean NLL against its baseline's, where both scored the same text with the same tokenizer.
pub fn against_baselines(evidence: &Evidence<'_>) -> Vec<AgainstBaseline> {
    let mut found: Vec<AgainstBaseline> = Vec::new();
    for model in &evidence.models {
        let Some(baseline) = evidence.baseline_of(model) else { continue };
        for row in evidence.ppls.iter().filter(|row| row.model == model.address) {
            let is_counterpart = |other: &&Row<PplResult>| {
                let (a, b) = (&other.result, &row.result);
                other.model == baseline.address
                    && is_same_cut(a, b)
                    && (&a.text_hash, &a.tokenizer_hash, a.n_scored) == (&b.text_hash, &b.tokenizer_hash, b.n_scored)
            };
            let Some(before) = evidence.ppls.iter().find(is_counterpart) else { continue };
            found.push(against(evidence, (baseline, before), (model, row)));
        }
    }
    found
}

fn against(
    evidence: &Evidence<'_>,
    (baseline, before): (&Model, &Row<PplResult>),
    (model, row): (&Model, &Row<PplResult>),
) -> AgainstBaseline {
    let (first, second) = (&before.result, &row.result);
    let paired = || {
        let stage = |address: &str| evidence.inputs.iter().find(|input| input.address == address);
        let (ours, theirs) = same_tokens(stage(&before.stage)?, stage(&row.stage)?, first, evidence.request.tokens)?;
        let nll = paired_interval(&ours.nll, &theirs.nll, &ours.document_idx)?;
        Some(nll.around(second.nll_mean - first.nll_mean))
    };
    let paired = paired();
    AgainstBaseline {
        model: model.address.clone(),
        baseline: baseline.address.clone(),
        stage: row.stage.clone(),
        label: evidence.ppl_label(second),
        nll_mean: [first.nll_mean, second.nll_mean],
        perplexity: [first.perplexity, second.perplexity],
        n_scored: second.n_scored,
        is_paired: paired.is_some(),
        interval: paired.or_else(|| unpaired(first, second)),
    }
}

/// Returns the interval of the difference of two means that are taken as independent.
fn unpaired(first: &PplResult, second: &PplResult) -> Option<BlockInterval> {
    let (a, b) = (first.nll_interval.as_ref()?, second.nll_interval.as_ref()?);
    let estimate = |one: &BlockInterval| Estimate { value: one.value, stderr: Some(one.stderr), n: one.n_blocks };
    let found = difference(estimate(a), estimate(b));
    let half_width = found.half_width.filter(|width| width.is_finite())?;
    Some(BlockInterval {
        value: found.value,
        low: found.value - half_width,
        high: found.value + half_width,
        stderr: a.stderr.hypot(b.stderr),
        n_blocks: a.n_blocks.min(b.n_blocks),
        lag1_correlation: None,
        method: "Welch's interval over the blocks of each".to_owned(),
        ..a.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::RecordBody;
    use crate::report::testing::{input, load, ppl_record, ppl_row, quantize, rendered_with, text_of};
    use serde_json::Value;

    /// 4,000 tokens whose NLL varies far more from token to token than the two stages differ: `nf4` loses ln 1.2 on average.
    struct TwoModels;

    impl TokenSource for TwoModels {
        fn read(&self, ppl: &StageInput, windows: &str) -> Option<TokenScores> {
            assert_eq!(windows, "strided-512-256");
            let loss =
                |i: u32| if ppl.address == "ppl-nf4" { 1.2f64.ln() + 0.05 * (f64::from(i) * 1.7).sin() } else { 0.0 };
            let nll = |i: u32| 2.0 + 1.5 * (f64::from(i) * 0.9).sin() + loss(i);
            Some(TokenScores {
                window_idx: vec![0; 4000],
                document_idx: vec![0; 4000],
                token_id: (0..4000).collect(),
                nll: (0..4000).map(nll).collect(),
                ..TokenScores::default()
            })
        }
    }

    fn stages(n_scored: usize) -> Vec<std::sync::Arc<StageInput>> {
        let base = load("fp16");
        let nf4 = quantize("nf4", &base, Some(("nf4", Some(64))), 6_200);
        let stage = |address: &str, model, perplexity: f64| {
            let row = PplResult { n_scored, ..ppl_row(perplexity) };
            input(address, "ppl", Value::Object(ppl_record(vec![row]).to_fields()), &[("model", model)])
        };
        vec![stage("ppl-fp16", &base, 9.0), stage("ppl-nf4", &nf4, 10.8)]
    }

    #[test]
    fn a_reports_comparison_is_paired_and_says_so() {
        let files = rendered_with(&stages(4000), &TwoModels, &["md", "csv"]).expect("a report");
        let report = text_of(&files, "report.md");
        assert!(report.contains("`nf4` has +20.000 % [+19.9"), "{report}");
        assert!(
            report.contains("(95 %, paired, 4,000 tokens in 31 blocks; 10.80 instead of 9.000, hf-strided 512/256)"),
            "{report}"
        );
        assert!(!report.contains("noise") && !report.contains("independent samples"), "{report}");
        let csv = text_of(&files, "report.csv");
        let row = csv.lines().find(|line| line.starts_with("nf4,nll_minus_baseline,")).expect("a row");
        assert!(row.contains("paired against fp16"), "{row}");
    }

    #[test]
    fn without_single_tokens_the_interval_is_unpaired_and_says_so() {
        let files = rendered_with(&stages(9612), &NoTokens, &["md"]).expect("a report");
        let report = text_of(&files, "report.md");
        assert!(report.contains("95 %, unpaired for lack of single tokens' scores, 9,612 tokens"), "{report}");
    }

    #[test]
    fn differences_of_every_metric_come_from_single_tokens() {
        let stages = stages(4000);
        let record = |i: usize| -> PplRecord { stages[i].record.read().expect("a record") };
        let (first, second) = (record(0), record(1));
        let scored = |i: usize, record| Scored { stage: &stages[i], record };
        let found = paired_differences(Scored { ..scored(0, &first) }, scored(1, &second), &TwoModels);
        let label = "hf-strided 512/256".to_owned();
        let of = |metric: &str| found[&(metric.to_owned(), label.clone())].clone();
        assert!((of("nll_mean").value - 1.2f64.ln()).abs() < 1e-12);
        assert!((of("perplexity").value - 1.8).abs() < 1e-9, "{:?}", of("perplexity"));
        // The spread of single tokens, 1.5/√2, would make it wider than this by far.
        assert!(of("nll_mean").high - of("nll_mean").low < 0.01);
        assert!(paired_differences(scored(0, &first), scored(1, &second), &NoTokens).is_empty());
        let mut other = second.clone();
        other.results[0].text_hash = "ef".repeat(32);
        assert!(paired_differences(scored(0, &first), scored(1, &other), &TwoModels).is_empty());
    }
}
