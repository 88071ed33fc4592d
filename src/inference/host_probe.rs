//! What the host tells of itself while something is timed: who else uses its processors.

use crate::artifact::HostFigures;

/// Other processes that take less than this many processors leave a measurement undisturbed.
pub const QUIET_CPUS: f64 = 0.1;

/// A processor that runs at less than this share of its best speed disturbs what is measured on it.
pub const FULL_SPEED: f64 = 0.9;

/// Threads whose processors are asked how fast they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The one that asks. Others may sleep: waking them would find their processors slow.
    Calling,
    /// All that compute.
    All,
}

/// Watches the host over the regions that a stage times.
pub trait HostProbe: Send {
    /// Begins a timed region; within one it does nothing.
    fn begin(&mut self);

    /// Ends it; outside of one it does nothing.
    fn end(&mut self);

    /// Ends what was begun, returns what was seen since the last `take`, and forgets it.
    fn take(&mut self) -> HostFigures;

    /// Waits until other processes leave the processors alone: for 2 s at most, 0.2 s if an earlier wait was in vain,
    /// and no longer than `keep_waiting` says.
    fn wait_until_quiet(&mut self, keep_waiting: &dyn Fn() -> bool);

    /// Returns the lowest share of its best speed at which a processor of these threads runs now; `None` where that is unknown.
    fn processor_speed(&mut self, _threads: Threads) -> Option<f64> {
        None
    }
}
