//! What may be said of speeds: intervals from the spread between starts, and verdicts on differences.

use super::measure::Measure;
use crate::artifact::StartResult;
use crate::metrics::{
    FigureStarts, RateRatio, StartVariance, compared_variance, pooled_variance, rate_interval, rate_ratio,
    referred_ratio,
};
use crate::stage::StageInput;
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// Measurements further apart were not taken on the same day, and clocks, temperature and neighbours may have changed.
const SAME_DAY: SignedDuration = SignedDuration::from_hours(12);

/// What kind of work a speed is of: their spreads are pooled apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    Prefill,
    Decode,
}

/// The rates of a figure's single starts, and where they come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Starts {
    pub work: Work,
    pub device: String,
    /// The run that measured them.
    pub run: String,
    /// The model that they are of: figures of one model and run share their starts.
    pub model: String,
    /// RFC 3339, UTC.
    pub started_at: String,
    /// Logarithms of tokens/s, one for each start that counts.
    pub log_rates: Vec<f64>,
    /// Which start each is of.
    pub start_idxs: Vec<usize>,
}

impl Starts {
    pub fn new(input: &StageInput, work: Work, starts: &[StartResult]) -> Starts {
        let head = &input.record.head;
        let counted = starts.iter().enumerate().filter(|(_, start)| !start.is_left_out);
        let (start_idxs, log_rates) = counted.map(|(idx, start)| (idx, start.tokens_per_second.ln())).unzip();
        Starts {
            work,
            device: head.device.clone().unwrap_or_default(),
            run: head.produced_by_run.clone(),
            model: model_of(input),
            started_at: head.started_at.clone(),
            log_rates,
            start_idxs,
        }
    }

    fn figure(&self) -> FigureStarts<'_, Processes<'_>> {
        let processes = (self.run.as_str(), self.model.as_str());
        FigureStarts { processes, log_rates: &self.log_rates, start_idxs: &self.start_idxs }
    }

    fn group(&self) -> Group<'_> {
        (self.work, self.device.as_str(), self.run.as_str())
    }

    /// Returns true if both were measured so close to each other that they may be compared without a reference.
    fn is_same_day(&self, other: &Starts) -> bool {
        let at = |starts: &Starts| starts.started_at.parse::<Timestamp>().ok();
        match (at(self), at(other)) {
            (Some(one), Some(other)) => one.duration_since(other).abs() <= SAME_DAY,
            _ => false,
        }
    }
}

/// Whose starts: the run and the model.
type Processes<'a> = (&'a str, &'a str);

/// Returns the address of a stage's model: of its input, or, where only the record is at hand, as its parameters name it.
fn model_of(input: &StageInput) -> String {
    if let Some(model) = input.input("model") {
        return model.address.clone();
    }
    let name = input.record.head.params.get("model").and_then(|model| model.as_str());
    let cell = input.address.find('[').map_or("", |at| &input.address[at..]);
    name.map_or_else(|| input.address.clone(), |name| format!("{name}{cell}"))
}

type Group<'a> = (Work, &'a str, &'a str);

/// The spreads between starts of all speeds at hand.
#[derive(Debug, Default)]
pub struct Spreads<'a> {
    /// The starts of every figure, by kind of work, device and run.
    figures: BTreeMap<Group<'a>, Vec<FigureStarts<'a, Processes<'a>>>>,
}

/// Why a difference of two speeds has no verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoVerdict {
    /// One has no starts on record, or both have a single one.
    NoSpread,
    /// Measured on different days, without a common reference.
    OtherDay,
    OtherDevice,
}

impl<'a> Spreads<'a> {
    /// Gathers the spreads of all speeds among the measures.
    pub fn of(measures: impl Iterator<Item = &'a Measure>) -> Spreads<'a> {
        let mut spreads = Spreads::default();
        for measure in measures.filter(|measure| measure.metric.ends_with("tokens_per_second")) {
            if let Some(starts) = &measure.starts {
                spreads.figures.entry(starts.group()).or_default().push(starts.figure());
            }
        }
        spreads
    }

    /// Returns the variance between starts of some figures: pooled over all of the same work, device and run, or over these alone where
    /// those of all do not agree.
    pub fn variance(&self, of: &[&Starts]) -> Option<StartVariance> {
        let groups: BTreeSet<Group<'_>> = of.iter().map(|starts| starts.group()).collect();
        let all: Vec<FigureStarts<'_, Processes<'_>>> =
            groups.iter().filter_map(|group| self.figures.get(group)).flatten().copied().collect();
        let own: Vec<FigureStarts<'_, Processes<'_>>> = of.iter().map(|starts| starts.figure()).collect();
        pooled_variance(&all).or_else(|| compared_variance(&own))
    }

    /// Returns the 95 % interval of a speed, as factors of it.
    pub fn interval(&self, starts: &Starts) -> Option<(f64, f64)> {
        let interval = rate_interval(&starts.log_rates, &self.variance(&[starts])?)?;
        Some((interval.low / interval.rate, interval.high / interval.rate))
    }

    /// Returns how many times as fast `now` is; both must have been measured on one device and on one day.
    ///
    /// # Errors
    /// Why nothing is known of its noise.
    pub fn ratio(&self, before: &Starts, now: &Starts) -> Result<RateRatio, NoVerdict> {
        if before.device != now.device {
            return Err(NoVerdict::OtherDevice);
        }
        if !before.is_same_day(now) {
            return Err(NoVerdict::OtherDay);
        }
        let spread = self.variance(&[before, now]).ok_or(NoVerdict::NoSpread)?;
        rate_ratio(&before.log_rates, &now.log_rates, &spread).ok_or(NoVerdict::NoSpread)
    }

    /// Returns how many times as fast `now` is, each relative to a reference that was measured in the same run.
    ///
    /// # Errors
    /// As [`Spreads::ratio`].
    pub fn referred(
        &self,
        (before, its_reference): (&Starts, &Starts),
        (now, reference): (&Starts, &Starts),
    ) -> Result<RateRatio, NoVerdict> {
        if before.device != now.device {
            return Err(NoVerdict::OtherDevice);
        }
        let spread = self.variance(&[before, its_reference, now, reference]).ok_or(NoVerdict::NoSpread)?;
        referred_ratio((&before.log_rates, &its_reference.log_rates), (&now.log_rates, &reference.log_rates), &spread)
            .ok_or(NoVerdict::NoSpread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Rates of the starts of two names of one model, by figure (`prefill pp64`), as `.ci/extended/start_spread.sh` keeps them.
    #[derive(serde::Deserialize)]
    struct Campaign {
        /// Null for a start that was left out.
        figures: BTreeMap<String, BTreeMap<String, Vec<Option<f64>>>>,
    }

    /// Pairs of runs with `n_starts` starts each, cut from a campaign: how many there are, how many identical ones are flagged, and in how
    /// many a slowdown is found.
    #[derive(Debug, Default)]
    struct Judged {
        n_pairs: usize,
        n_flagged: usize,
        n_found: usize,
        n_without_verdict: usize,
    }

    impl Campaign {
        fn read(path: &Path) -> Campaign {
            serde_json::from_str(&std::fs::read_to_string(path).expect("the rates")).expect("JSON")
        }

        fn starts(&self, figure: &str, name: &str, of: std::ops::Range<usize>) -> Starts {
            let work = if figure.starts_with("prefill") { Work::Prefill } else { Work::Decode };
            let rates = self.figures[figure][name][of].iter().enumerate();
            let (start_idxs, log_rates) = rates.filter_map(|(idx, rate)| Some((idx, (*rate)?.ln()))).unzip();
            Starts {
                work,
                device: "cpu".to_owned(),
                run: "r".to_owned(),
                model: name.to_owned(),
                started_at: "2026-01-02T03:04:05Z".to_owned(),
                log_rates,
                start_idxs,
            }
        }

        /// Judges every figure of every pair as a report does; `slowdown` is 0.1 for one by 10 %.
        fn judge(&self, n_starts: usize, slowdown: f64) -> Judged {
            let n_all = self.figures.values().flat_map(BTreeMap::values).map(Vec::len).min().unwrap_or(0);
            let mut judged = Judged::default();
            for first in (0..n_all / n_starts).map(|run| run * n_starts) {
                let of = first..first + n_starts;
                let pairs: Vec<[Starts; 2]> = self
                    .figures
                    .keys()
                    .map(|figure| ["a", "b"].map(|name| self.starts(figure, name, of.clone())))
                    .collect();
                let mut spreads = Spreads::default();
                for starts in pairs.iter().flatten() {
                    spreads.figures.entry(starts.group()).or_default().push(starts.figure());
                }
                for [a, b] in &pairs {
                    let mut slower = b.clone();
                    slower.log_rates.iter_mut().for_each(|rate| *rate += (1.0 - slowdown).ln());
                    let verdict = |other: &Starts| spreads.ratio(a, other).ok().and_then(|ratio| ratio.differs);
                    judged.n_pairs += 1;
                    judged.n_flagged += usize::from(verdict(b) == Some(true));
                    judged.n_found += usize::from(verdict(&slower) == Some(true));
                    judged.n_without_verdict += usize::from(verdict(b).is_none());
                }
            }
            judged
        }
    }

    fn fixture(name: &str) -> Campaign {
        Campaign::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/starts").join(name))
    }

    #[test]
    fn of_200_identical_pairs_on_a_cpu_at_most_one_in_twenty_is_flagged() {
        for name in ["stories260k_cpu.json", "stories260k_cpu_quiet.json"] {
            let judged = fixture(name).judge(5, 0.1);
            assert_eq!(judged.n_pairs, 200);
            assert!(judged.n_flagged <= 10, "{name}: {judged:?}");
        }
    }

    #[test]
    fn on_a_cpu_a_speed_that_is_ten_percent_lower_is_found() {
        let judged = fixture("stories260k_cpu_quiet.json").judge(5, 0.1);
        assert!(judged.n_found >= 180, "{judged:?}");
        // Of samples that nothing was done about starts spread by 17 to 25 %: few could be told apart.
        let judged = fixture("stories260k_cpu.json").judge(5, 0.1);
        assert!(judged.n_found < 40, "{judged:?}");
    }

    #[test]
    fn on_a_gpu_a_decode_that_is_five_percent_slower_is_found() {
        let mut campaign = fixture("llama_3b_shape_h200.json");
        let all = campaign.judge(3, 0.05);
        assert_eq!((all.n_pairs, all.n_flagged), (60, 0), "{all:?}");
        campaign.figures.retain(|figure, _| figure.starts_with("decode"));
        let judged = campaign.judge(5, 0.05);
        assert_eq!((judged.n_pairs, judged.n_found), (14, 14), "{judged:?}");
        assert!(judged.n_flagged <= 1, "{judged:?}");
    }

    /// `.ci/extended/start_spread.sh` measures the rates and calls this with `STARTS_JSON`.
    #[test]
    #[ignore = "needs rates that were measured on this machine"]
    fn speeds_of_this_machine() {
        let path = std::env::var_os("STARTS_JSON").expect("STARTS_JSON names the rates");
        let campaign = Campaign::read(Path::new(&path));
        for (n_starts, slowdown) in [(5, 0.1), (3, 0.05)] {
            let Judged { n_pairs, n_flagged, n_found, n_without_verdict } = campaign.judge(n_starts, slowdown);
            println!(
                "{n_pairs} identical pairs of {n_starts} starts each: {n_flagged} flagged, {n_without_verdict} without a verdict; slowdowns by {} %: \
                 {n_found} found",
                100.0 * slowdown
            );
        }
    }
}
