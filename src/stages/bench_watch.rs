//! What both benchmarks do around the work that they time: watch the host and the device's board, sample a case again where it was
//! disturbed, and read the energy of the same work.

use crate::artifact::{DiscardedAttempt, Disturbance, HostFigures, PowerResult};
use crate::bench::{
    LONGEST_S, NoEnergy, Reason, Repeated, SamplePlan, TokenEnergy, device_use, disturbance, is_enough, power_result,
    sample, token_energy,
};
use crate::event::{Level, Progress};
use crate::inference::{DeviceFigures, DeviceProbe, FULL_SPEED, HostProbe, OtherProcesses, Threads};
use crate::stage::{StageContext, StageError};
use std::time::{Duration, Instant};

/// How long processors are kept busy to reach their full speed. A virtual machine's processor that was idle may wake beside another
/// machine's on one core, and is moved to a core of its own within this time if it stays busy.
const SPEED_WAIT: Duration = Duration::from_secs(1);
/// Full speed counts if it was found so often on end.
const SPEED_LOOKS: usize = 50;

/// A stage's watch over host and device.
pub struct Watch<'a> {
    context: &'a StageContext<'a>,
    is_host: bool,
    /// Threads that do what is timed.
    threads: Threads,
    regions: Regions,
    rows: Vec<PowerResult>,
    others: Option<OtherProcesses>,
    /// A processor stayed slow throughout a wait: the next ones look once.
    stays_slow: bool,
    /// Cases that were measured again, with the reason: of the first attempt where the second was undisturbed, else of the one kept.
    mended: Vec<String>,
    disturbed: Vec<String>,
}

/// Begins and ends the device's timed regions. Has no effect on a device without a board of its own.
pub struct Regions {
    host: Option<Box<dyn HostProbe>>,
    device: Option<Box<dyn DeviceProbe>>,
}

/// A case that was sampled.
pub struct Case<T> {
    pub samples: Vec<T>,
    pub disturbance: Disturbance,
    seen: Option<DeviceFigures>,
}

/// What is repeated while energy is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// What a sample does, and what has to be done before it.
    Whole,
    /// What has to be done before it, alone.
    Fill,
}

struct Attempt<T> {
    samples: Vec<T>,
    host: Option<HostFigures>,
    seen: Option<DeviceFigures>,
    reason: Option<Reason>,
    is_worth_repeating: bool,
    /// Samples that were taken again.
    n_repeated: usize,
    /// Samples that were slowed, also when they were taken again.
    n_set_aside: usize,
}

/// A sample, and the lowest share of its best speed that a processor had right before or after it.
struct Sample<T> {
    taken: T,
    speed: Option<f64>,
}

impl<T> Sample<T> {
    fn is_slowed(&self) -> bool {
        self.speed.is_some_and(|speed| speed < FULL_SPEED)
    }
}

impl Regions {
    /// Begins a timed region, unless one has begun.
    pub fn begin(&mut self) {
        if let Some(device) = &mut self.device {
            device.begin();
        }
    }

    /// Ends the timed region.
    pub fn end(&mut self) {
        if let Some(device) = &mut self.device {
            device.end();
        }
    }
}

impl<'a> Watch<'a> {
    /// Begins to watch; `threads` do what is timed, where the host computes.
    pub fn start(context: &'a StageContext<'a>, threads: Threads) -> Watch<'a> {
        let regions = Regions { host: context.engine.host_probe(), device: context.engine.device_probe() };
        let is_host = context.engine.info().is_host;
        Watch {
            context,
            is_host,
            threads,
            regions,
            rows: Vec::new(),
            others: None,
            stays_slow: false,
            mended: Vec::new(),
            disturbed: Vec::new(),
        }
    }

    /// Samples a case. A sample on a slowed processor is taken once more when that is back, and set aside if it was slowed again and others
    /// were not. Where none was taken again, a case that was disturbed is sampled once more as a whole, and the less disturbed attempt is
    /// kept; `mean_s` is what is noted of the other. With `--accept-disturbed` the first attempt is kept as it is.
    ///
    /// # Errors
    /// What `measure` returns; `Cancelled`.
    pub fn sample<T>(
        &mut self,
        label: &str,
        plan: SamplePlan,
        mean_s: impl Fn(&[T]) -> f64,
        mut measure: impl FnMut(bool, &mut Regions) -> Result<T, StageError>,
    ) -> Result<Case<T>, StageError> {
        let progress = self.context.progress;
        let accepts = self.context.accept_disturbed;
        let first = self.attempt(plan, progress, !accepts, &mut measure)?;
        let may_repeat = !accepts && self.context.may_repeat && first.is_worth_repeating;
        let (kept, discarded) = match first.reason.as_ref().filter(|_| may_repeat) {
            None => (first, None),
            Some(reason) => {
                progress.note(Level::Debug, &format!("{label} was disturbed, measuring once more: {}", reason.text));
                if let Some(host) = &mut self.regions.host {
                    host.wait_until_quiet(&|| !progress.is_cancelled());
                }
                let second = self.attempt(plan, &Uncounted(progress), false, &mut measure)?;
                let severity = |attempt: &Attempt<T>| attempt.reason.as_ref().map_or(0.0, |reason| reason.severity);
                if severity(&second) <= severity(&first) { (second, Some(first)) } else { (first, Some(second)) }
            }
        };
        let of_case = |reason: &Reason| format!("{label} ({})", reason.text);
        match (&kept.reason, discarded.as_ref().map(|attempt| &attempt.reason)) {
            (Some(reason), Some(_)) => self.disturbed.push(of_case(reason)),
            (None, Some(Some(reason))) => self.mended.push(of_case(reason)),
            _ => {}
        }
        let others = kept.seen.as_ref().and_then(|seen| seen.others);
        self.others = self.others.max(others);
        let text = |reason: Option<Reason>| reason.map(|reason| reason.text);
        let disturbance = Disturbance {
            disturbed: text(kept.reason),
            accepted: accepts,
            repeated: discarded.is_some(),
            n_samples_repeated: kept.n_repeated,
            n_samples_set_aside: kept.n_set_aside,
            discarded: discarded.map(|attempt| DiscardedAttempt {
                n_samples: attempt.samples.len(),
                sample_s_mean: mean_s(&attempt.samples),
                disturbed: text(attempt.reason),
            }),
            host: kept.host,
            device: kept.seen.as_ref().map(device_use),
        };
        Ok(Case { samples: kept.samples, disturbance, seen: kept.seen })
    }

    fn attempt<T>(
        &mut self,
        plan: SamplePlan,
        progress: &dyn Progress,
        may_repeat: bool,
        measure: &mut impl FnMut(bool, &mut Regions) -> Result<T, StageError>,
    ) -> Result<Attempt<T>, StageError> {
        let mut n_repeated = 0;
        let mut is_warm = !may_repeat;
        let samples = sample(
            plan,
            progress,
            || StageError::Cancelled,
            |counts| {
                if counts && !is_warm {
                    self.wait_for_speed();
                    is_warm = true;
                }
                if counts && let Some(host) = &mut self.regions.host {
                    // One region for all samples: times in `/proc` are too coarse for each.
                    host.begin();
                }
                let first = self.one_sample(counts, measure)?;
                let is_taken_again = counts && may_repeat && first.is_slowed() && self.wait_for_speed();
                if !is_taken_again {
                    return Ok(first);
                }
                n_repeated += 1;
                let second = self.one_sample(counts, measure)?;
                Ok(if second.speed >= first.speed { second } else { first })
            },
        );
        let regions = &mut self.regions;
        regions.end();
        let seen = regions.device.as_mut().map(|device| device.take());
        let mut host = regions.host.as_mut().map(|host| host.take());
        let mut samples = samples?;
        let n_taken = samples.len();
        if may_repeat && samples.iter().any(|sample| !sample.is_slowed()) {
            samples.retain(|sample| !sample.is_slowed());
        }
        let n_set_aside = n_taken - samples.len();
        let use_of_device = seen.as_ref().map(device_use);
        let reason_of = |host: Option<&HostFigures>| disturbance(host, use_of_device.as_ref(), self.is_host);
        // Processors that stayed slow were waited for: to begin anew would not help.
        let is_worth_repeating = n_repeated == 0 && reason_of(host.as_ref()).is_some();
        if let Some(host) = &mut host {
            host.processor_speed_min = samples.iter().filter_map(|sample| sample.speed).reduce(f64::min);
        }
        let reason = reason_of(host.as_ref());
        let samples = samples.into_iter().map(|sample| sample.taken).collect();
        Ok(Attempt { samples, host, seen, reason, is_worth_repeating, n_repeated, n_set_aside })
    }

    fn one_sample<T>(
        &mut self,
        counts: bool,
        measure: &mut impl FnMut(bool, &mut Regions) -> Result<T, StageError>,
    ) -> Result<Sample<T>, StageError> {
        let before = self.processor_speed();
        let taken = measure(counts, &mut self.regions)?;
        let speed = before.zip(self.processor_speed()).map(|(before, after)| before.min(after));
        Ok(Sample { taken, speed })
    }

    /// Returns how fast the processors run now; `None` where they do not compute.
    fn processor_speed(&mut self) -> Option<f64> {
        if !self.is_host {
            return None;
        }
        self.regions.host.as_mut()?.processor_speed(self.threads)
    }

    /// Keeps the processors busy until none is slowed; returns false if one still is.
    fn wait_for_speed(&mut self) -> bool {
        let start = Instant::now();
        let mut n_full = 0;
        while n_full < SPEED_LOOKS {
            n_full = if self.processor_speed().is_none_or(|speed| speed >= FULL_SPEED) { n_full + 1 } else { 0 };
            let is_over = self.stays_slow || start.elapsed() > SPEED_WAIT || self.context.progress.is_cancelled();
            if n_full == 0 && is_over {
                self.stays_slow = true;
                return false;
            }
        }
        self.stays_slow = false;
        true
    }

    /// Reads the energy of a case whose samples have `n_tokens` tokens each. Where its timed region is too short for that, `work` is
    /// repeated; where `has_fill`, also without what a sample is timed for.
    ///
    /// # Errors
    /// What `work` returns; `Cancelled`.
    pub fn energy<T>(
        &mut self,
        label: &str,
        case: &mut Case<T>,
        n_tokens: usize,
        has_fill: bool,
        mut work: impl FnMut(Work) -> Result<(), StageError>,
    ) -> Result<(), StageError> {
        let Some(mut seen) = case.seen.take() else { return Ok(()) };
        let timed = seen.energy.take().filter(|window| !has_fill && is_enough(window));
        let energy = match timed {
            // It costs seconds, and its spread is that of its own parts.
            _ if self.context.start.idx > 0 => Err(NoEnergy::OfFirstStart),
            Some(window) => token_energy(&Repeated { window, n_repetitions: case.samples.len() }, None, n_tokens),
            None => self.repeated_energy(n_tokens, has_fill, &mut work)?,
        };
        self.rows.push(power_result(label, n_tokens * case.samples.len(), seen, energy));
        Ok(())
    }

    fn repeated_energy(
        &mut self,
        n_tokens: usize,
        has_fill: bool,
        work: &mut dyn FnMut(Work) -> Result<(), StageError>,
    ) -> Result<Result<TokenEnergy, NoEnergy>, StageError> {
        let whole = self.repeat(Work::Whole, work)?;
        // Without a figure of the whole there is none to take the rest off.
        let fill = if has_fill && is_enough(&whole.window) { Some(self.repeat(Work::Fill, work)?) } else { None };
        Ok(token_energy(&whole, fill.as_ref(), n_tokens))
    }

    fn repeat(
        &mut self,
        part: Work,
        work: &mut dyn FnMut(Work) -> Result<(), StageError>,
    ) -> Result<Repeated, StageError> {
        let Some(device) = &mut self.regions.device else { return Ok(Repeated::default()) };
        device.begin_energy();
        let mut n_repetitions = 0;
        loop {
            if self.context.progress.is_cancelled() {
                return Err(StageError::Cancelled);
            }
            work(part)?;
            n_repetitions += 1;
            let window = device.energy_so_far();
            if !window.has_source || is_enough(&window) || window.window_s >= LONGEST_S {
                break;
            }
        }
        Ok(Repeated { window: device.end_energy(), n_repetitions })
    }

    /// Returns what was seen, and tells of cases that were disturbed.
    pub fn finish(self) -> Watched {
        let progress = self.context.progress;
        if !self.mended.is_empty() {
            progress.note(Level::Info, &format!("measured again after a disturbance: {}", self.mended.join(", ")));
        }
        if !self.disturbed.is_empty() {
            let text = format!("disturbed, also when measured again: {}", self.disturbed.join(", "));
            progress.note(Level::Warning, &text);
        }
        Watched { power: self.regions.device.is_some().then_some(self.rows), others: self.others }
    }
}

/// What a watch saw.
pub struct Watched {
    /// None where the device does not tell of its board.
    pub power: Option<Vec<PowerResult>>,
    pub others: Option<OtherProcesses>,
}

/// Passes everything on but steps: those of a second attempt are not among those that were announced.
struct Uncounted<'a>(&'a dyn Progress);

impl Progress for Uncounted<'_> {
    fn begin(&self, total: Option<u64>, unit: &str) {
        self.0.begin(total, unit);
    }

    fn advance(&self, _n: u64) {}

    fn note(&self, level: Level, text: &str) {
        self.0.note(level, text);
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}
