//! Detail tables about log-likelihoods per word and byte, and about divergence from a base model.

use super::Evidence;
use super::details::{Section, section};
use super::evidence::window_label;
use super::markdown::{Table, code};
use super::numbers::{significant, thousands, with_block_interval, with_ends, with_spread};
use crate::artifact::BlockInterval;

/// Returns the table of perplexities per word and byte, where there are any.
pub fn units(evidence: &Evidence<'_>) -> Option<String> {
    let mut table = Table::new([
        "stage",
        "model",
        "documents",
        "words",
        "bytes",
        "word perplexity",
        "byte perplexity",
        "bits per byte",
    ]);
    for row in &evidence.ppls {
        let one = &row.result;
        let (Some(word), Some(byte), Some(bits)) = (one.word_perplexity, one.byte_perplexity, one.bits_per_byte) else {
            continue;
        };
        let count = |n: Option<usize>| n.map_or_else(|| "n/a".to_owned(), thousands);
        table.row([
            code(&row.stage),
            code(&row.model),
            count(one.n_documents),
            count(one.n_words),
            count(one.n_bytes),
            with_block_interval(word, one.word_perplexity_interval.as_ref()),
            with_block_interval(byte, one.byte_perplexity_interval.as_ref()),
            with_block_interval(bits, one.bits_per_byte_interval.as_ref()),
        ]);
    }
    let intro = "Per word and byte of the original text, as lm-evaluation-harness counts them, with the 95 % interval of the tokens that they are \
                 made of; lm-evaluation-harness itself gives these figures no error (it prints N/A):";
    (!table.is_empty()).then(|| format!("{intro}\n\n{}", table.render()))
}

/// Returns the section about divergence from a base model.
pub fn divergence(evidence: &Evidence<'_>) -> Option<Section> {
    let names = |one: &super::evidence::Diverged| {
        let row = &one.row.result;
        [code(&one.row.model), evidence.named(&one.base), window_label(&row.convention, row.max_length, row.stride)]
    };
    let mut kl = Table::new([
        "model",
        "base",
        "windows",
        "n_scored",
        "KL mean [95 %] (nats)",
        "median ± stderr",
        "p90",
        "p95",
        "p99",
        "p99.9",
        "max",
        "min",
        "base kept as",
    ]);
    let mut rest = Table::new([
        "model",
        "base",
        "windows",
        "same top token [95 %] (%)",
        "ln(ppl / base ppl) [95 %]",
        "ppl / base ppl [95 %]",
        "correlation of NLL ± stderr",
        "Δp mean [95 %] (%)",
        "Δp RMS ± stderr (%)",
        "Δp 1 % / 50 % / 99 % (%)",
    ]);
    let tail = |value: Option<f64>, stderr: Option<f64>, n_needed: &str| {
        value.map_or_else(|| format!("n/a (n < {n_needed})"), |value| with_spread(value, stderr))
    };
    for one in &evidence.divergences {
        let row = &one.row.result;
        kl.row(names(one).into_iter().chain([
            thousands(row.n_scored),
            with_block_interval(row.kl_mean, row.kl_mean_interval.as_ref()),
            with_spread(row.kl_median, row.kl_median_stderr),
            with_spread(row.kl_p90, row.kl_p90_stderr),
            tail(row.kl_p95, row.kl_p95_stderr, "20"),
            tail(row.kl_p99, row.kl_p99_stderr, "100"),
            tail(row.kl_p99_9, row.kl_p99_9_stderr, "1,000"),
            significant(row.kl_max),
            significant(row.kl_min),
            row.base_log_probs.clone(),
        ]));
        let percent = |value: f64, stderr: Option<f64>| with_spread(100.0 * value, stderr.map(|stderr| 100.0 * stderr));
        let percent_within = |value: f64, interval: &Option<BlockInterval>| match interval {
            Some(found) => with_ends(100.0 * value, 100.0 * found.low, 100.0 * found.high),
            None => significant(100.0 * value),
        };
        let correlation = row.nll_correlation.map(|r| with_spread(r, row.nll_correlation_stderr));
        let share = |value: Option<f64>| value.map_or_else(|| "n/a".to_owned(), |value| significant(100.0 * value));
        rest.row(names(one).into_iter().chain([
            percent_within(row.top1_agreement, &row.top1_agreement_interval),
            with_block_interval(row.ln_ppl_ratio, row.ln_ppl_ratio_interval.as_ref()),
            with_block_interval(row.ppl_ratio, row.ppl_ratio_interval.as_ref()),
            correlation.unwrap_or_else(|| "n/a".to_owned()),
            percent_within(row.delta_p_mean, &row.delta_p_mean_interval),
            percent(row.delta_p_rms, row.delta_p_rms_stderr),
            [share(row.delta_p_p01), share(Some(row.delta_p_median)), share(row.delta_p_p99)].join(" / "),
        ]));
    }
    let intro = "How far each model's whole distribution is from its base's at every scored token: KL(base ‖ model) in \
        nats. Intervals and standard errors come from blocks of text; those of percentiles through the share of tokens below \
        them, left out where there are too few tokens; extremes have none. A model against itself in another number format shows the noise floor.";
    let note = "Δp: probability of the true token by the model minus that by the base, in percentage points. The ratio's \
        interval is that of the tokens' own differences, so it is far narrower than the two perplexities' intervals suggest.";
    section("Divergence", intro, &kl, &[rest.render(), note.to_owned()])
}

#[cfg(test)]
mod tests {
    use crate::artifact::{PplRecord, PplResult, RecordBody};
    use crate::metrics::{TokenPair, divergence};
    use crate::report::testing::{input, interval, load, ppl, ppl_record, ppl_row, quantize, rendered, text_of};
    use serde_json::Value;

    #[test]
    fn divergence_and_bits_per_byte_are_shown_with_their_errors() {
        let fp16 = load("fp16");
        let nf4 = quantize("nf4", &fp16, Some(("nf4", Some(64))), 6_200);
        let base = ppl("ppl-fp16", &fp16, 9.0614951);
        let pair = |i: u32| {
            let nll = f64::from(i % 50) / 10.0;
            TokenPair {
                base_nll: nll,
                nll: nll + 0.01 * f64::from(i % 7),
                kl: 0.002 * f64::from(i % 9),
                same_top: !i.is_multiple_of(10),
            }
        };
        let mut row = divergence(&(0..5000).map(pair).collect::<Vec<_>>(), &[]).expect("statistics");
        (row.convention, row.base_log_probs) = ("lm-eval".to_owned(), "top-64".to_owned());
        (row.max_length, row.stride) = (512, 512);
        let result = PplResult {
            convention: "lm-eval".to_owned(),
            stride: 512,
            n_documents: Some(12),
            n_words: Some(3953),
            n_bytes: Some(20_000),
            word_perplexity: Some(155.783),
            word_perplexity_interval: Some(interval(155.783, 4.2)),
            byte_perplexity: Some(2.7124),
            byte_perplexity_interval: Some(interval(2.7124, 0.014)),
            bits_per_byte: Some(1.43956),
            bits_per_byte_interval: Some(interval(1.43956, 0.0077)),
            ..ppl_row(10.0)
        };
        let record =
            PplRecord { base: Some("ppl-fp16".to_owned()), divergence: Some(vec![row]), ..ppl_record(vec![result]) };
        let body = Value::Object(record.to_fields());
        let candidate = input("ppl-nf4", "ppl", body, &[("model", &nf4), ("base", &base)]);
        let files = rendered(&[base, candidate], &[], &["md", "csv"]).expect("a report");
        insta::assert_snapshot!("divergence_md", text_of(&files, "report.md"));
        let csv = text_of(&files, "report.csv");
        let kl: Vec<&str> =
            csv.lines().filter(|line| line.contains(",kl_") || line.contains(",bits_per_byte,")).collect();
        insta::assert_snapshot!("divergence_csv", kl.join("\n"));
    }
}
