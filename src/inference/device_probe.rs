//! What a device's board tells of itself: what it is and, while something is timed, energy, clocks, and who else uses it.

use serde::Serialize;

/// A GPU of the machine, whether the engine uses it or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuIdentity {
    /// `NVIDIA H200`.
    pub name: String,
    /// Version of its driver; null where it does not tell.
    pub driver: Option<String>,
    /// Memory in all; null where it does not tell.
    pub memory_bytes: Option<u64>,
}

/// What was seen over the timed regions of one case. Null where the device does not tell.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DeviceFigures {
    /// Time that the regions took together, on the host's clock.
    pub window_s: f64,
    /// Energy over the regions, where they were one; null where there were several, whose ends the counter does not resolve.
    pub energy: Option<EnergyWindow>,
    /// The limit that is enforced.
    pub power_limit_w: Option<f64>,
    /// Clocks in MHz: the lowest and the median of `n_samples`, and the highest that the device has.
    pub sm_clock_mhz_min: Option<f64>,
    pub sm_clock_mhz_median: Option<f64>,
    pub sm_clock_mhz_max: Option<f64>,
    pub memory_clock_mhz_min: Option<f64>,
    pub memory_clock_mhz_median: Option<f64>,
    pub n_samples: usize,
    /// Why clocks were lower than they could be, in any sample: `sw_power_cap`. Sorted.
    pub throttle_reasons: Vec<String>,
    /// The most that was seen at once.
    pub others: Option<OtherProcesses>,
}

/// Processes beside this one that compute on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct OtherProcesses {
    /// Those that are not this labpipe's.
    pub n: usize,
    /// The most of the device's time that they took at once, in percent; null where the driver does not say.
    pub utilization_percent: Option<u32>,
    /// Device memory that they hold; null where the driver does not say.
    pub bytes: Option<u64>,
    /// Other workers of this labpipe.
    pub n_labpipe: usize,
}

/// Readings of energy over one stretch of uninterrupted work.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EnergyWindow {
    /// Duration of the stretch.
    pub window_s: f64,
    /// When the counter was seen to have moved, in seconds from the beginning, and what it said then, in joules. The first movement is
    /// the first entry.
    pub updates: Vec<(f64, f64)>,
    /// Where the readings come from, in words.
    pub method: String,
    /// False where the board tells neither energy nor power: there is nothing to wait for.
    pub has_source: bool,
}

/// Watches a device's board over the regions that a stage times.
pub trait DeviceProbe: Send {
    /// Begins a timed region; within one it does nothing.
    fn begin(&mut self);

    /// Ends it; outside of one it does nothing.
    fn end(&mut self);

    /// Ends what was begun, returns what was seen since the last `take`, and forgets it.
    fn take(&mut self) -> DeviceFigures;

    /// Begins to read energy as often as its counter moves: for work that is repeated for that alone and not timed.
    fn begin_energy(&mut self);

    /// Returns what was read since `begin_energy`.
    fn energy_so_far(&self) -> EnergyWindow;

    /// Ends what `begin_energy` began.
    fn end_energy(&mut self) -> EnergyWindow;
}
