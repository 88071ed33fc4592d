//! What both benchmarks do around the work that they time: watch the host and the device's board, sample a case again where it was
//! disturbed, and read the energy of the same work.

use crate::artifact::{DiscardedAttempt, Disturbance, HostFigures, PowerResult};
use crate::bench::{
    LONGEST_S, NoEnergy, Reason, Repeated, SamplePlan, TokenEnergy, device_use, disturbance, is_enough, power_result,
    sample, token_energy,
};
use crate::event::{Level, Progress};
use crate::inference::{DeviceFigures, DeviceProbe, HostProbe, OtherProcesses};
use crate::stage::{StageContext, StageError};

/// A stage's watch over host and device.
pub struct Watch<'a> {
    context: &'a StageContext<'a>,
    is_host: bool,
    regions: Regions,
    rows: Vec<PowerResult>,
    others: Option<OtherProcesses>,
    /// Cases that were measured again, with the reason: of the first attempt where the second was undisturbed, else of the one kept.
    mended: Vec<String>,
    disturbed: Vec<String>,
}

/// Begins and ends timed regions; does nothing where nothing can be watched.
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
}

impl Regions {
    /// Begins a timed region, unless one has begun.
    pub fn begin(&mut self) {
        if let Some(host) = &mut self.host {
            host.begin();
        }
        if let Some(device) = &mut self.device {
            device.begin();
        }
    }

    /// Ends the timed region.
    pub fn end(&mut self) {
        if let Some(device) = &mut self.device {
            device.end();
        }
        if let Some(host) = &mut self.host {
            host.end();
        }
    }
}

impl<'a> Watch<'a> {
    pub fn start(context: &'a StageContext<'a>) -> Watch<'a> {
        let regions = Regions { host: context.engine.host_probe(), device: context.engine.device_probe() };
        let is_host = context.engine.info().is_host;
        Watch { context, is_host, regions, rows: Vec::new(), others: None, mended: Vec::new(), disturbed: Vec::new() }
    }

    /// Samples a case. One that was disturbed is sampled once more, and the less disturbed attempt is kept; `mean_s` is what is noted
    /// of the other. With `--accept-disturbed` the first attempt is kept as it is.
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
        let first = self.attempt(plan, progress, &mut measure)?;
        let (kept, discarded) = match first.reason.as_ref().filter(|_| !self.context.accept_disturbed) {
            None => (first, None),
            Some(reason) => {
                progress.note(Level::Debug, &format!("{label} was disturbed, measuring once more: {}", reason.text));
                if let Some(host) = &mut self.regions.host {
                    host.wait_until_quiet(&|| !progress.is_cancelled());
                }
                let second = self.attempt(plan, &Uncounted(progress), &mut measure)?;
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
            repeated: discarded.is_some(),
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
        measure: &mut impl FnMut(bool, &mut Regions) -> Result<T, StageError>,
    ) -> Result<Attempt<T>, StageError> {
        let regions = &mut self.regions;
        let samples = sample(plan, progress, || StageError::Cancelled, |counts| measure(counts, regions));
        regions.end();
        let seen = regions.device.as_mut().map(|device| device.take());
        let host = regions.host.as_mut().map(|host| host.take());
        let samples = samples?;
        let reason = disturbance(host.as_ref(), seen.as_ref().map(device_use).as_ref(), self.is_host);
        Ok(Attempt { samples, host, seen, reason })
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
