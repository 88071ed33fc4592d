//! Two runs' numbers side by side: what changed, by how much, and whether that is more than noise.

use super::evidence::Evidence;
use super::measure::{Measure, SpreadKind};
use super::paired::NoTokens;
use super::request::{NoScatter, ReportError, ReportRequest};
use super::speeds::{NoVerdict, Spreads};
use crate::artifact::{BlockInterval, number};
use crate::metrics::{Estimate, difference};
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
    /// Speeds of too few starts: fewer than 8 degrees of freedom.
    TooFewStarts,
    /// Speeds of different days that no common reference ties together.
    OtherDay,
    /// They differ, and the blocks of text are too few to conclude anything.
    TooFewBlocks,
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
            Verdict::TooFewStarts => "too few starts",
            Verdict::OtherDay => "another day",
            Verdict::TooFewBlocks => "no verdict: too few blocks of text",
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
    /// Ends of the difference's 95 % interval; null where no spread is known.
    #[serde(with = "number::optional")]
    pub low: Option<f64>,
    #[serde(with = "number::optional")]
    pub high: Option<f64>,
    /// The interval is that of token by token differences: both runs scored the same tokens.
    pub paired: bool,
    /// Of a speed: b / a, with its 95 % interval.
    pub speed_ratio: Option<SpeedRatio>,
    /// Blocks of text that the interval rests on, the fewer of the two where it is not paired; null for other figures.
    pub n_blocks: Option<usize>,
    pub verdict: Verdict,
    /// What else went on while each was measured; null if nothing that is known.
    pub disturbance_a: Option<String>,
    pub disturbance_b: Option<String>,
}

/// How many times as fast.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpeedRatio {
    #[serde(with = "number")]
    pub ratio: f64,
    #[serde(with = "number")]
    pub low: f64,
    #[serde(with = "number")]
    pub high: f64,
    /// The stage that both were taken relative to, because they were measured on different days; null where they were not.
    pub relative_to: Option<String>,
}

/// What speeds of both runs may be judged by.
#[derive(Default)]
pub struct SpeedBasis<'a> {
    pub spreads: Spreads<'a>,
    /// Finds the same figure of a model that both runs measured together with what is compared: the reference's stage, and its measure
    /// in either run.
    #[expect(clippy::type_complexity, reason = "a function of one caller")]
    pub reference: Option<&'a dyn Fn(&Measure, &Measure) -> Option<(String, &'a Measure, &'a Measure)>>,
}

/// Interval of a metric's difference, where the two runs' single values could be paired: by metric and label.
pub type Paired<'a> = dyn Fn(&str, &str) -> Option<BlockInterval> + 'a;

/// Returns the numbers of one stage's record.
///
/// # Errors
/// [`ReportError::Record`] where it lacks what its kind promises.
pub fn measures(stage: &Arc<StageInput>) -> Result<Vec<Measure>, ReportError> {
    let inputs = [Arc::clone(stage)];
    let request = ReportRequest {
        title: "",
        pipeline: "",
        inputs: &inputs,
        missing: &[],
        formats: &[],
        scatter: &NoScatter,
        tokens: &NoTokens,
    };
    Ok(Evidence::gather(&request)?.measures)
}

/// Returns every metric that both sides of a stage have. `same_subject` is false where they are about other texts.
pub fn compare(
    a: &[Measure],
    b: &[Measure],
    same_subject: bool,
    paired: &Paired<'_>,
    basis: &SpeedBasis<'_>,
) -> Vec<Compared> {
    let mut rows = Vec::new();
    for one in a {
        let Some(other) = b.iter().find(|other| other.metric == one.metric && other.label == one.label) else {
            continue;
        };
        let by_token = paired(one.metric, &one.label);
        let found = by_token.as_ref().map_or_else(|| independent(one, other), Interval::paired);
        let is_score = one.spread_kind == Some(SpreadKind::Stderr);
        let (speed_ratio, of_speed) = match (&one.starts, &other.starts) {
            (Some(_), Some(_)) => judge_speed(one, other, basis),
            _ => (None, None),
        };
        let found = match &speed_ratio {
            Some(speed) => Interval::of_speed(one, speed),
            None => found,
        };
        let verdict = match found.leaves_out_zero() {
            // Scores of texts of other lengths are about other tokens.
            _ if !same_subject || (is_score && one.n != other.n) => Verdict::NotComparable,
            _ if one.value == other.value || (one.value.is_nan() && other.value.is_nan()) => Verdict::Equal,
            _ if !one.value.is_finite() || !other.value.is_finite() => Verdict::OutsideNoise,
            _ if of_speed.is_some() => of_speed.unwrap_or(Verdict::UnknownNoise),
            Some(_) if found.n_blocks.is_some_and(|n| n < BlockInterval::MIN_VERDICT_BLOCKS) => Verdict::TooFewBlocks,
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
            difference: other.value - one.value,
            low: found.ends.map(|(low, _)| low),
            high: found.ends.map(|(_, high)| high),
            paired: by_token.is_some(),
            n_blocks: found.n_blocks,
            speed_ratio,
            verdict,
            disturbance_a: one.disturbance.clone(),
            disturbance_b: other.disturbance.clone(),
        });
    }
    rows
}

/// Returns how many times as fast the second run is, and what that is worth: of one day directly, of different days relative to a
/// reference that both measured.
fn judge_speed(one: &Measure, other: &Measure, basis: &SpeedBasis<'_>) -> (Option<SpeedRatio>, Option<Verdict>) {
    let (Some(a), Some(b)) = (&one.starts, &other.starts) else { return (None, None) };
    let directly = basis.spreads.ratio(a, b).map(|ratio| (ratio, None));
    let found = match directly {
        Err(NoVerdict::OtherDay) => basis
            .reference
            .and_then(|find| find(one, other))
            .and_then(|(stage, in_a, in_b)| Some((stage, in_a.starts.as_ref()?, in_b.starts.as_ref()?)))
            .map_or(Err(NoVerdict::OtherDay), |(stage, in_a, in_b)| {
                Ok((basis.spreads.referred((a, in_a), (b, in_b))?, Some(stage)))
            }),
        other => other,
    };
    match found {
        Ok((found, relative_to)) => {
            let ratio = SpeedRatio { ratio: found.ratio, low: found.low, high: found.high, relative_to };
            let verdict = match found.differs {
                Some(true) => Verdict::OutsideNoise,
                Some(false) => Verdict::WithinNoise,
                None => Verdict::TooFewStarts,
            };
            (Some(ratio), Some(verdict))
        }
        Err(NoVerdict::NoSpread) => (None, Some(Verdict::UnknownNoise)),
        Err(NoVerdict::OtherDay) => (None, Some(Verdict::OtherDay)),
        Err(NoVerdict::OtherDevice) => (None, Some(Verdict::NotComparable)),
    }
}

/// The 95 % interval of a difference.
struct Interval {
    ends: Option<(f64, f64)>,
    n_blocks: Option<usize>,
}

impl Interval {
    fn paired(found: &BlockInterval) -> Interval {
        let ends = Some((found.low, found.high)).filter(|(low, high)| low.is_finite() && high.is_finite());
        Interval { ends, n_blocks: Some(found.n_blocks) }
    }

    /// Of a speed, or a time. Where it was judged relative to a reference the ratio is not that of the two values.
    fn of_speed(before: &Measure, speed: &SpeedRatio) -> Interval {
        let (low, high) =
            if before.unit == "s" { (1.0 / speed.high, 1.0 / speed.low) } else { (speed.low, speed.high) };
        let ends = (before.value * (low - 1.0), before.value * (high - 1.0));
        Interval { ends: speed.relative_to.is_none().then_some(ends), n_blocks: None }
    }

    fn leaves_out_zero(&self) -> Option<bool> {
        self.ends.map(|(low, high)| low > 0.0 || high < 0.0)
    }
}

/// Returns the interval of the difference of two measures that are taken as independent.
fn independent(one: &Measure, other: &Measure) -> Interval {
    let found = difference(estimate(one), estimate(other));
    let width = found.half_width.filter(|width| width.is_finite());
    let ends = width.map(|width| (found.value - width, found.value + width));
    Interval { ends, n_blocks: one.n_blocks.zip(other.n_blocks).map(|(a, b)| a.min(b)) }
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
    // The spread of scores is that between blocks of text.
    Estimate { value: measure.value, stderr, n: measure.n_blocks.unwrap_or(n) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::{decode, interval, load, ppl};

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
            let rows = compare(&of(&stage), &of(&stage), true, &|_, _| None, &SpeedBasis::default());
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
            let lost = |metric: &str, _: &str| (metric == "perplexity").then(|| interval(0.0, f64::INFINITY));
            let rows = compare(a, b, true, &lost, &SpeedBasis::default());
            assert_eq!(verdict(&rows, "perplexity"), wanted);
            let text = serde_json::to_string(&rows).expect("JSON");
            assert!(!text.contains("\"a\":null") && !text.contains("\"b\":null"), "{text}");
        }
    }

    #[test]
    fn pairing_finds_what_the_two_errors_hide() {
        let model = load("fp16");
        let (a, b) = (of(&ppl("ppl", &model, 9.06)), of(&ppl("ppl", &model, 9.10)));
        let alone = compare(&a, &b, true, &|_, _| None, &SpeedBasis::default());
        assert_eq!(verdict(&alone, "perplexity"), Verdict::WithinNoise);
        let by_token = |n_blocks| {
            let found = BlockInterval { n_blocks, ..interval(0.04, 0.01) };
            let paired = move |metric: &str, _: &str| (metric == "perplexity").then(|| found.clone());
            compare(&a, &b, true, &paired, &SpeedBasis::default())
        };
        assert_eq!(verdict(&by_token(31), "perplexity"), Verdict::OutsideNoise);
        assert_eq!(verdict(&by_token(7), "perplexity"), Verdict::TooFewBlocks);
        assert!(
            compare(&a, &b, false, &|_, _| None, &SpeedBasis::default())
                .iter()
                .all(|row| row.verdict == Verdict::NotComparable)
        );
    }

    /// A decode record measured by another run, so many hours after the first one.
    fn later(stage: &Arc<StageInput>, hours: i64) -> Arc<StageInput> {
        let mut later = Arc::clone(stage);
        let head = &mut Arc::make_mut(&mut later).record.head;
        head.produced_by_run = "another".to_owned();
        let at: jiff::Timestamp = head.started_at.parse().expect("a time");
        head.started_at = (at + jiff::SignedDuration::from_hours(hours)).to_string();
        later
    }

    #[test]
    fn speeds_have_noise_and_bytes_have_none() {
        let model = load("fp16");
        let (a, b) = (decode("d", &model, 0.001, 1000), later(&decode("d", &model, 0.002, 1001), 1));
        let of_one_depth = |stage| -> Vec<Measure> {
            of(stage).into_iter().filter(|measure| measure.label != "tg64 @ d256").collect()
        };
        let (of_a, of_b) = (of_one_depth(&a), of_one_depth(&b));
        let basis = SpeedBasis { spreads: Spreads::of(of_a.iter().chain(&of_b)), reference: None };
        let rows = compare(&of_a, &of_b, true, &|_, _| None, &basis);
        assert_eq!(verdict(&rows, "weights_bytes"), Verdict::OutsideNoise);
        // Three starts each: four degrees of freedom.
        assert_eq!(verdict(&rows, "decode_tokens_per_second"), Verdict::TooFewStarts);
        assert_eq!(verdict(&rows, "memory_bytes"), Verdict::UnknownNoise);
        let rate = rows.iter().find(|row| row.metric == "decode_tokens_per_second").expect("a row");
        assert!((rate.speed_ratio.as_ref().expect("a ratio").ratio - 0.5).abs() < 0.02, "{rate:?}");
    }

    #[test]
    fn more_speeds_give_a_verdict_and_other_days_need_a_reference() {
        // Each of a model of its own.
        let decode = |name: &str, seconds| decode(name, &load(&format!("model-{name}")), seconds, 1000);
        let figures: Vec<Vec<Measure>> =
            ["d", "e", "f", "g", "h"].iter().map(|name| of(&decode(name, 0.001))).collect();
        let slower = of(&later(&decode("d", 0.002), 1));
        let other_day = of(&later(&decode("d", 0.002), 30));
        let reference = of(&later(&decode("e", 0.002), 30));
        let all = || figures.iter().flatten().chain(&slower).chain(&other_day).chain(&reference);
        let spreads = || Spreads::of(all());
        let rows =
            compare(&figures[0], &slower, true, &|_, _| None, &SpeedBasis { spreads: spreads(), reference: None });
        assert_eq!(verdict(&rows, "decode_tokens_per_second"), Verdict::OutsideNoise);
        assert_eq!(verdict(&rows, "token_latency_s"), Verdict::OutsideNoise);
        let rows =
            compare(&figures[0], &other_day, true, &|_, _| None, &SpeedBasis { spreads: spreads(), reference: None });
        assert_eq!(verdict(&rows, "decode_tokens_per_second"), Verdict::OtherDay);
        // What slowed the reference as much is no difference of the model's.
        let find = |one: &Measure, _: &Measure| {
            let of =
                |list: &[Measure]| list.iter().position(|other| other.metric == one.metric && other.label == one.label);
            let (at_a, at_b) = (of(&figures[1])?, of(&reference)?);
            Some(("e".to_owned(), &figures[1][at_a], &reference[at_b]))
        };
        let basis = SpeedBasis { spreads: spreads(), reference: Some(&find) };
        let rows = compare(&figures[0], &other_day, true, &|_, _| None, &basis);
        assert_eq!(verdict(&rows, "decode_tokens_per_second"), Verdict::WithinNoise);
        let rate = rows.iter().find(|row| row.metric == "decode_tokens_per_second").expect("a row");
        assert_eq!(rate.speed_ratio.as_ref().and_then(|found| found.relative_to.as_deref()), Some("e"));
    }
}
