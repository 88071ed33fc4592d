//! What both benchmarks do with a device's board: watch it over timed regions, and tell what it told.

use crate::artifact::PowerResult;
use crate::bench::power_result;
use crate::event::{Level, Progress};
use crate::inference::{DeviceProbe, Engine, OtherProcesses};
use crate::units::{format_bytes, format_significant};

/// A stage's watch over its device; does nothing where the device tells nothing.
pub struct Watch {
    probe: Option<Box<dyn DeviceProbe>>,
    rows: Vec<PowerResult>,
    others: Option<OtherProcesses>,
}

impl Watch {
    pub fn start(engine: &dyn Engine) -> Watch {
        Watch { probe: engine.device_probe(), rows: Vec::new(), others: None }
    }

    /// Begins a timed region, unless one has begun.
    pub fn begin(&mut self) {
        if let Some(probe) = &mut self.probe {
            probe.begin();
        }
    }

    /// Ends the timed region.
    pub fn end(&mut self) {
        if let Some(probe) = &mut self.probe {
            probe.end();
        }
    }

    /// Ends a case in whose timed regions there were `n_tokens` tokens.
    pub fn case(&mut self, label: &str, n_tokens: usize) {
        if let Some(probe) = &mut self.probe {
            let seen = probe.take();
            self.others = self.others.max(seen.others);
            self.rows.push(power_result(label, n_tokens, seen));
        }
    }

    /// Returns what was seen, and warns of other processes on the device.
    pub fn finish(self, progress: &dyn Progress) -> Watched {
        if let Some(OtherProcesses { n, bytes }) = self.others.filter(|others| others.n > 0) {
            let held =
                bytes.map_or_else(String::new, |bytes| format!(" and held {} of its memory", format_bytes(bytes)));
            let text = format!(
                "{n} other process(es) used the device while it was measured{held}: the figures may be slower than the device"
            );
            progress.note(Level::Warning, &text);
        }
        Watched { power: self.probe.is_some().then_some(self.rows), others: self.others }
    }
}

/// Returns the end of a case's summary: `, 1.53 J/token`; nothing where it is not known.
pub fn energy_words(power: Option<&[PowerResult]>, label: &str) -> String {
    let row = power.into_iter().flatten().find(|row| row.label == label);
    let energy = row.and_then(|row| row.energy_per_token_j);
    energy.map_or_else(String::new, |joules| format!(", {} J/token", format_significant(joules)))
}

/// What a watch saw.
pub struct Watched {
    /// None where the device does not tell of its board.
    pub power: Option<Vec<PowerResult>>,
    pub others: Option<OtherProcesses>,
}
