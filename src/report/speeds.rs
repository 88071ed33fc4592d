//! What may be said of speeds: intervals from the spread between starts, and verdicts on differences.

use super::measure::Measure;
use crate::metrics::{
    RateRatio, StartVariance, own_variance, pooled_variance, rate_interval, rate_ratio, referred_ratio,
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
    /// RFC 3339, UTC.
    pub started_at: String,
    /// Logarithms of tokens/s, one a start.
    pub log_rates: Vec<f64>,
}

impl Starts {
    pub fn new(input: &StageInput, work: Work, rates: impl Iterator<Item = f64>) -> Starts {
        let head = &input.record.head;
        Starts {
            work,
            device: head.device.clone().unwrap_or_default(),
            run: head.produced_by_run.clone(),
            started_at: head.started_at.clone(),
            log_rates: rates.map(f64::ln).collect(),
        }
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

type Group<'a> = (Work, &'a str, &'a str);

/// The spreads between starts of all speeds at hand.
#[derive(Debug, Default)]
pub struct Spreads<'a> {
    /// The starts of every figure, by kind of work, device and run.
    figures: BTreeMap<Group<'a>, Vec<&'a [f64]>>,
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
                spreads.figures.entry(starts.group()).or_default().push(&starts.log_rates);
            }
        }
        spreads
    }

    /// Returns the variance between starts of some figures: pooled over all of the same work, device and run, or over these alone where
    /// those of all do not agree.
    pub fn variance(&self, of: &[&Starts]) -> Option<StartVariance> {
        let groups: BTreeSet<Group<'_>> = of.iter().map(|starts| starts.group()).collect();
        let all: Vec<&[f64]> = groups.iter().filter_map(|group| self.figures.get(group)).flatten().copied().collect();
        let own: Vec<&[f64]> = of.iter().map(|starts| starts.log_rates.as_slice()).collect();
        pooled_variance(&all).or_else(|| match own.as_slice() {
            [one] => own_variance(one),
            several => pooled_variance(several),
        })
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
