//! What the host tells of itself while something is timed: who else uses its processors.

use crate::artifact::HostFigures;

/// Other processes that take less than this many processors leave a measurement undisturbed.
pub const QUIET_CPUS: f64 = 0.1;

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
}
