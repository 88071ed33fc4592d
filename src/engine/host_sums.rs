//! What counters of the host gained over timed regions, and the arithmetic of their shares.

use crate::artifact::HostFigures;
use crate::metrics::statistics;
use std::collections::BTreeMap;
use std::time::Instant;

/// A thread that ran for less of the window does not compute. A probe's thread wakes every 5 ms; while threads
/// compute on all processors it waits for one (85 % of the window was measured), which is no disturbance.
const COMPUTES_SHARE: f64 = 0.1;

/// Counters at one moment, in seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// When `idle_s` and `steal_s` were read.
    pub at: Option<Instant>,
    pub idle_s: Option<f64>,
    pub steal_s: Option<f64>,
    /// By thread: time that it ran, and time that it waited to.
    pub threads: BTreeMap<u32, (f64, f64)>,
    pub involuntary: Option<u64>,
    pub relatives_s: f64,
    pub pressure_s: Option<f64>,
    pub n_thermal: Option<u64>,
}

/// What the regions since the last `take` add up to; null once a counter could not be read.
pub struct Sums {
    pub window_s: f64,
    pub busy_s: Option<f64>,
    pub steal_s: Option<f64>,
    pub own_s: f64,
    pub threads: BTreeMap<u32, (f64, f64)>,
    pub involuntary: Option<u64>,
    pub relatives_s: f64,
    pub pressure_s: Option<f64>,
    pub n_thermal: Option<u64>,
    pub clocks_mhz: Vec<f64>,
}

impl Default for Sums {
    fn default() -> Sums {
        Sums {
            window_s: 0.0,
            busy_s: Some(0.0),
            steal_s: Some(0.0),
            own_s: 0.0,
            threads: BTreeMap::new(),
            involuntary: Some(0),
            relatives_s: 0.0,
            pressure_s: Some(0.0),
            n_thermal: Some(0),
            clocks_mhz: Vec::new(),
        }
    }
}

impl Sums {
    /// Adds what was counted over a region.
    pub fn add(&mut self, window_s: f64, n_cpus: usize, before: &Snapshot, after: &Snapshot) {
        let gain = |sum: Option<f64>, before: Option<f64>, after: Option<f64>| Some(sum? + (after? - before?).max(0.0));
        let count =
            |sum: Option<u64>, before: Option<u64>, after: Option<u64>| Some(sum? + after?.saturating_sub(before?));
        self.window_s += window_s;
        // Idle time is exact where ticks stop on idle processors; busy time is sampled by the tick, and beats with whatever wakes by a timer.
        let passed_s = before.at.zip(after.at).map(|(before, after)| (after - before).as_secs_f64() * n_cpus as f64);
        let unused = |before: &Snapshot| Some(before.idle_s? + before.steal_s?);
        let unused_s = gain(Some(0.0), unused(before), unused(after));
        self.busy_s = self.busy_s.zip(passed_s.zip(unused_s)).map(|(sum, (passed, unused))| sum + passed - unused);
        self.steal_s = gain(self.steal_s, before.steal_s, after.steal_s);
        self.pressure_s = gain(self.pressure_s, before.pressure_s, after.pressure_s);
        self.involuntary = count(self.involuntary, before.involuntary, after.involuntary);
        self.n_thermal = count(self.n_thermal, before.n_thermal, after.n_thermal);
        self.relatives_s += (after.relatives_s - before.relatives_s).max(0.0);
        for (thread, (ran, waited)) in &after.threads {
            let (ran_before, waited_before) = before.threads.get(thread).copied().unwrap_or_default();
            let sum = self.threads.entry(*thread).or_default();
            sum.0 += ran - ran_before;
            sum.1 += waited - waited_before;
            self.own_s += ran - ran_before;
        }
    }

    /// Returns the sums as shares of the regions' time.
    pub fn figures(&self, n_cpus: usize, load_average: Option<f64>) -> HostFigures {
        let share = |seconds: Option<f64>, of_s: f64| seconds.filter(|_| of_s > 0.0).map(|seconds| seconds / of_s);
        let cpu_s = self.window_s * n_cpus as f64;
        // Without times of threads their own work can't be told from that of others.
        let others_s = self.busy_s.filter(|_| !self.threads.is_empty());
        let others_s = others_s.map(|busy_s| (busy_s - self.own_s - self.relatives_s).max(0.0));
        let computing = self.threads.values().filter(|(ran, _)| *ran >= COMPUTES_SHARE * self.window_s);
        let waited_s = computing.map(|(_, waited)| *waited).reduce(f64::max);
        let waited_s = waited_s.or((!self.threads.is_empty()).then_some(0.0));
        let clocks = statistics(&self.clocks_mhz);
        HostFigures {
            window_s: self.window_s,
            n_cpus,
            others_cpu_share: share(others_s, cpu_s),
            own_cpu_share: share((!self.threads.is_empty()).then_some(self.own_s), cpu_s),
            labpipe_cpu_share: share(Some(self.relatives_s), cpu_s),
            steal_share: share(self.steal_s, cpu_s),
            waiting_share: share(waited_s, self.window_s).map(|share| share.min(1.0)),
            involuntary_switches_per_s: share(self.involuntary.map(|n| n as f64), self.window_s),
            load_average,
            cpu_pressure_share: share(self.pressure_s, self.window_s),
            cpu_mhz_min: clocks.as_ref().map(|clocks| clocks.min),
            cpu_mhz_median: clocks.as_ref().map(|clocks| clocks.median),
            processor_speed_min: None,
            n_thermal_events: self.n_thermal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_hardly_run_do_not_count_as_waiting() {
        let threads = |team: (f64, f64), probe: (f64, f64)| Snapshot {
            threads: [(1, (0.9, 0.01)), (2, team), (3, probe)].into(),
            ..Snapshot::default()
        };
        let before = Snapshot { threads: [(1, (0.0, 0.0))].into(), ..Snapshot::default() };
        let waiting = |after: Snapshot| {
            let mut sums = Sums::default();
            sums.add(1.0, 2, &before, &after);
            sums.figures(2, None).waiting_share
        };
        assert_eq!(waiting(threads((0.95, 0.02), (0.02, 0.85))), Some(0.02));
        assert_eq!(waiting(threads((0.5, 0.45), (0.02, 0.85))), Some(0.45));
    }

    #[test]
    fn time_that_was_neither_idle_nor_stolen_nor_the_processes_own_is_that_of_others() {
        let at = Instant::now();
        let read = |s: u64, idle_s: f64, steal_s: f64, ran_s: f64| Snapshot {
            at: Some(at + std::time::Duration::from_secs(s)),
            idle_s: Some(idle_s),
            steal_s: Some(steal_s),
            threads: [(1, (ran_s, 0.0))].into(),
            ..Snapshot::default()
        };
        let mut sums = Sums::default();
        sums.add(2.0, 2, &read(0, 10.0, 1.0, 5.0), &read(2, 11.0, 1.25, 7.0));
        let figures = sums.figures(2, None);
        assert_eq!((figures.others_cpu_share, figures.steal_share), (Some(0.75 / 4.0), Some(0.25 / 4.0)));
    }
}
