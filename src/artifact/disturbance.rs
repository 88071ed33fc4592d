//! What else went on while a benchmark timed: a block in each row of its record.

use super::number;
use serde::{Deserialize, Serialize};

/// What was seen while one measurement was timed, and what was made of it. Null where it is not known.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Disturbance {
    /// Why the attempt that was kept counts as disturbed; null if it does not.
    pub disturbed: Option<String>,
    /// `--accept-disturbed`: it counts like any other.
    #[serde(default)]
    pub accepted: bool,
    /// The first attempt was disturbed and the measurement was made once more.
    pub repeated: bool,
    /// Samples during which a processor was slowed, and that were therefore taken again; the one at the higher speed was kept.
    #[serde(default)]
    pub n_samples_repeated: usize,
    /// Samples that were slowed again, and therefore left out of every figure; if all were slowed, all were kept.
    #[serde(default)]
    pub n_samples_set_aside: usize,
    /// The attempt that was not kept.
    pub discarded: Option<DiscardedAttempt>,
    /// Of the attempt that was kept.
    pub host: Option<HostFigures>,
    /// Of the attempt that was kept.
    pub device: Option<DeviceUse>,
}

impl Disturbance {
    /// Returns what marks the measurement wherever it is shown: `disturbed: …`, `measured again, at first disturbed: …`; `None` if
    /// nothing disturbed it.
    pub fn mark(&self) -> Option<String> {
        let at_first = self.discarded.as_ref().and_then(|attempt| attempt.disturbed.as_deref());
        match (&self.disturbed, at_first) {
            (Some(reason), _) => Some(format!("disturbed: {reason}")),
            (None, Some(reason)) => Some(format!("measured again, at first disturbed: {reason}")),
            (None, None) => None,
        }
    }
}

/// An attempt that was more disturbed than the one that was kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiscardedAttempt {
    /// Why it counts as disturbed; null if it does not.
    pub disturbed: Option<String>,
    pub n_samples: usize,
    /// Mean of its samples: seconds per pass, or per token.
    #[serde(with = "number")]
    pub sample_s_mean: f64,
}

/// The host over timed regions. Shares are of 1; those of processor time are of all processors that the process may use.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct HostFigures {
    /// Duration of the regions together.
    #[serde(with = "number")]
    pub window_s: f64,
    /// Processors that the process may use.
    pub n_cpus: usize,
    /// Processor time of other processes, and of interrupts.
    #[serde(default, with = "number::optional")]
    pub others_cpu_share: Option<f64>,
    /// Processor time of the process that was measured.
    #[serde(default, with = "number::optional")]
    pub own_cpu_share: Option<f64>,
    /// Processor time of labpipe's parent process and of its other workers; not in `others_cpu_share`.
    #[serde(default, with = "number::optional")]
    pub labpipe_cpu_share: Option<f64>,
    /// Processor time that the hypervisor gave to others.
    #[serde(default, with = "number::optional")]
    pub steal_share: Option<f64>,
    /// Time that the process's most delayed computing thread was ready to run and had no processor, over `window_s`.
    #[serde(default, with = "number::optional")]
    pub waiting_share: Option<f64>,
    /// Of all threads of the process.
    #[serde(default, with = "number::optional")]
    pub involuntary_switches_per_s: Option<f64>,
    /// Over the last minute, at the end.
    #[serde(default, with = "number::optional")]
    pub load_average: Option<f64>,
    /// Time during which any process of the machine waited for a processor, over `window_s` (pressure stall information).
    #[serde(default, with = "number::optional")]
    pub cpu_pressure_share: Option<f64>,
    /// Processor clocks, read at the end of each region.
    #[serde(default, with = "number::optional")]
    pub cpu_mhz_min: Option<f64>,
    #[serde(default, with = "number::optional")]
    pub cpu_mhz_median: Option<f64>,
    /// The lowest share of its best speed at which a processor ran right before or after a sample that was kept: lower where its clock
    /// was lowered, and where another program used the second hardware thread of its core.
    #[serde(default, with = "number::optional")]
    pub processor_speed_min: Option<f64>,
    /// Times that the processor lowered its clock because of heat.
    pub n_thermal_events: Option<u64>,
}

/// A device with a board of its own over timed regions.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DeviceUse {
    #[serde(default, with = "number::optional")]
    pub sm_clock_mhz_median: Option<f64>,
    /// The highest clock that the device has.
    #[serde(default, with = "number::optional")]
    pub sm_clock_mhz_max: Option<f64>,
    /// Samples of clocks and throttling.
    pub n_samples: usize,
    /// As NVML names them, in any sample.
    pub throttle_reasons: Vec<String>,
    /// Processes on the device that are not labpipe's, the most at once.
    pub n_other_processes: Option<usize>,
    pub other_processes_bytes: Option<u64>,
    /// The most that they computed at once, as a share of the device's time.
    #[serde(default, with = "number::optional")]
    pub others_utilization: Option<f64>,
    /// Processes on the device that are other workers of this labpipe.
    pub n_labpipe_processes: Option<usize>,
}
