//! Two runs' numbers side by side: what changed, by how much, and whether that is more than noise.

use super::evidence::Evidence;
use super::measure::{Measure, SpreadKind};
use super::request::{NoScatter, ReportError, ReportRequest};
use crate::artifact::number;
use crate::metrics::{Difference, Estimate, difference};
use crate::stage::StageInput;
use serde::Serialize;
use std::sync::Arc;

/// What a difference is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The very same number.
    Equal,
    /// 0 lies within the 95 % interval of the difference.
    WithinNoise,
    /// It does not; or a quantity without noise (bytes of weights) changed.
    OutsideNoise,
    /// They differ and nothing is known of their spread.
    UnknownNoise,
    /// They are not about the same thing: another text, or another number of scored tokens.
    NotComparable,
}

impl Verdict {
    /// Returns the words of the table.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Equal => "equal",
            Verdict::WithinNoise => "within noise",
            Verdict::OutsideNoise => "OUTSIDE NOISE",
            Verdict::UnknownNoise => "spread not known",
            Verdict::NotComparable => "not comparable",
        }
    }
}

/// One metric of one stage in both runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    pub stage: String,
    pub metric: &'static str,
    pub label: String,
    pub unit: &'static str,
    #[serde(with = "number")]
    pub a: f64,
    pub n_a: usize,
    #[serde(with = "number")]
    pub b: f64,
    pub n_b: usize,
    /// b − a.
    #[serde(with = "number")]
    pub difference: f64,
    /// Half the width of the difference's 95 % interval; null where no spread is known.
    #[serde(with = "number::optional")]
    pub half_width: Option<f64>,
    /// The interval is that of token by token differences: both runs scored the same tokens.
    pub paired: bool,
    pub verdict: Verdict,
}

/// Half-width of a metric's difference, where the two runs' single values could be paired: by metric and label.
pub type Paired<'a> = dyn Fn(&str, &str) -> Option<f64> + 'a;

/// Returns the numbers of one stage's record.
///
/// # Errors
/// [`ReportError::Record`] where it lacks what its kind promises.
pub fn measures(stage: &Arc<StageInput>) -> Result<Vec<Measure>, ReportError> {
    let inputs = [Arc::clone(stage)];
    let request =
        ReportRequest { title: "", pipeline: "", inputs: &inputs, missing: &[], formats: &[], scatter: &NoScatter };
    Ok(Evidence::gather(&request)?.measures)
}

/// Returns every metric that both sides of a stage have. `same_subject` is false where they are about other texts.
pub fn compare(a: &[Measure], b: &[Measure], same_subject: bool, paired: &Paired<'_>) -> Vec<Compared> {
    let mut rows = Vec::new();
    for one in a {
        let Some(other) = b.iter().find(|other| other.metric == one.metric && other.label == one.label) else {
            continue;
        };
        let by_token = paired(one.metric, &one.label);
        let independent = difference(estimate(one), estimate(other));
        let half_width = by_token.or(independent.half_width).filter(|width| width.is_finite());
        let found = Difference { half_width, ..independent };
        // Scores of texts of other lengths are about other tokens.
        let is_score = one.spread_kind == Some(SpreadKind::Stderr);
        let verdict = match found.is_outside_noise() {
            _ if !same_subject || (is_score && one.n != other.n) => Verdict::NotComparable,
            _ if one.value == other.value || (one.value.is_nan() && other.value.is_nan()) => Verdict::Equal,
            _ if !one.value.is_finite() || !other.value.is_finite() => Verdict::OutsideNoise,
            Some(true) => Verdict::OutsideNoise,
            Some(false) => Verdict::WithinNoise,
            None if is_exact(one.metric) => Verdict::OutsideNoise,
            None => Verdict::UnknownNoise,
        };
        rows.push(Compared {
            stage: one.stage.clone(),
            metric: one.metric,
            label: one.label.clone(),
            unit: one.unit,
            a: one.value,
            n_a: one.n,
            b: other.value,
            n_b: other.n,
            difference: found.value,
            half_width: found.half_width,
            paired: by_token.is_some(),
            verdict,
        });
    }
    rows
}

/// Quantities that are counted and not measured.
fn is_exact(metric: &str) -> bool {
    ["weights_bytes", "kv_cache_bytes", "bits_per_weight", "source_bytes"].contains(&metric)
}

fn estimate(measure: &Measure) -> Estimate {
    let n = measure.n;
    let stderr = match measure.spread_kind {
        Some(SpreadKind::Stdev) if n > 1 => measure.spread.map(|stdev| stdev / (n as f64).sqrt()),
        Some(SpreadKind::Stderr) => measure.spread,
        _ => None,
    };
    Estimate { value: measure.value, stderr, n }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::{decode, load, ppl};

    fn of(stage: &Arc<StageInput>) -> Vec<Measure> {
        measures(stage).expect("a whole record")
    }

    fn verdict(rows: &[Compared], metric: &str) -> Verdict {
        rows.iter().find(|row| row.metric == metric).unwrap_or_else(|| panic!("{metric}")).verdict
    }

    #[test]
    fn a_run_equals_itself_in_everything() {
        let model = load("fp16");
        for stage in [decode("decode", &model, 0.001, 1000), ppl("ppl", &model, 9.06)] {
            let rows = compare(&of(&stage), &of(&stage), true, &|_, _| None);
            assert!(rows.len() > 1 && rows.iter().all(|row| row.verdict == Verdict::Equal), "{rows:?}");
        }
    }

    #[test]
    fn infinite_and_missing_numbers_have_a_verdict() {
        let model = load("fp16");
        let of = |perplexity: f64| of(&ppl("ppl", &model, perplexity));
        let (finite, lost, void) = (of(9.06), of(f64::INFINITY), of(f64::NAN));
        for (a, b, wanted) in [
            (&finite, &lost, Verdict::OutsideNoise),
            (&lost, &finite, Verdict::OutsideNoise),
            (&lost, &lost, Verdict::Equal),
            (&void, &void, Verdict::Equal),
            (&void, &finite, Verdict::OutsideNoise),
        ] {
            let rows = compare(a, b, true, &|metric, _| (metric == "perplexity").then_some(f64::INFINITY));
            assert_eq!(verdict(&rows, "perplexity"), wanted);
            let text = serde_json::to_string(&rows).expect("JSON");
            assert!(!text.contains("\"a\":null") && !text.contains("\"b\":null"), "{text}");
        }
    }

    #[test]
    fn pairing_finds_what_the_two_errors_hide() {
        let model = load("fp16");
        let (a, b) = (of(&ppl("ppl", &model, 9.06)), of(&ppl("ppl", &model, 9.10)));
        let alone = compare(&a, &b, true, &|_, _| None);
        assert_eq!(verdict(&alone, "perplexity"), Verdict::WithinNoise);
        let paired = compare(&a, &b, true, &|metric, _| (metric == "perplexity").then_some(0.01));
        assert_eq!(verdict(&paired, "perplexity"), Verdict::OutsideNoise);
        assert!(compare(&a, &b, false, &|_, _| None).iter().all(|row| row.verdict == Verdict::NotComparable));
    }

    #[test]
    fn speeds_have_noise_and_bytes_have_none() {
        let model = load("fp16");
        let (a, b) = (decode("d", &model, 0.001, 1000), decode("d", &model, 0.002, 1001));
        let rows = compare(&of(&a), &of(&b), true, &|_, _| None);
        assert_eq!(verdict(&rows, "weights_bytes"), Verdict::OutsideNoise);
        assert_eq!(verdict(&rows, "decode_tokens_per_second"), Verdict::OutsideNoise);
        assert_eq!(verdict(&rows, "memory_bytes"), Verdict::UnknownNoise);
    }
}
