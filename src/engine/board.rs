//! A device's board over the regions that a stage times: what is counted, what is sampled, and the arithmetic of both.

use crate::inference::{DeviceFigures, DeviceProbe, OtherProcesses};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two samples within a region. The driver renews what it tells less often than that.
#[cfg(feature = "cuda")]
pub const PERIOD: Duration = Duration::from_millis(50);

/// Regions that are shorter together tell nothing of energy: the counter moves every 20 to 100 ms, depending on the card.
const SHORTEST_S: f64 = 0.1;

const COUNTED: &str =
    "the board's total energy counter (NVML), read at both ends of each timed region; idle power is in it";
const SAMPLED: &str = "mean of the board's power (NVML), sampled every 50 ms and at both ends of each timed region, times their duration; \
                       this board has no energy counter";
const TOO_SHORT: &str =
    "not measured: the timed regions are shorter than 0.1 s together, and the board renews its counter less often";
const UNKNOWN: &str = "not measured: the board tells neither energy nor power";

/// What a board tells at one moment. Null where it doesn't.
#[derive(Debug, Clone, Default)]
pub struct BoardSample {
    pub power_w: Option<f64>,
    pub power_limit_w: Option<f64>,
    pub sm_clock_mhz: Option<f64>,
    pub memory_clock_mhz: Option<f64>,
    pub throttle_reasons: Vec<&'static str>,
    pub others: Option<OtherProcesses>,
}

/// A board.
pub trait Board: Send + Sync {
    /// Returns the energy used since some time in the past, in mJ.
    fn energy_mj(&self) -> Option<u64>;

    fn sample(&self) -> BoardSample;
}

/// Samples a board during timed regions, on a thread of its own.
pub struct BoardProbe {
    board: Arc<dyn Board>,
    seen: Arc<Mutex<Vec<BoardSample>>>,
    is_timed: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
    sampler: Option<JoinHandle<()>>,
    region: Option<Region>,
    window_s: f64,
    /// Null once a region's ends could not both be read.
    counted_mj: Option<u64>,
}

struct Region {
    start: Instant,
    energy_mj: Option<u64>,
}

impl BoardProbe {
    /// Watches a board; without a `period` it is sampled at the ends of regions alone.
    pub fn new(board: Arc<dyn Board>, period: Option<Duration>) -> BoardProbe {
        let (seen, is_timed, is_over) =
            (Arc::<Mutex<Vec<BoardSample>>>::default(), Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let sampler = period.and_then(|period| {
            let (board, seen) = (Arc::clone(&board), Arc::clone(&seen));
            let (is_timed, is_over) = (Arc::clone(&is_timed), Arc::clone(&is_over));
            let sample = move || {
                while !is_over.load(Ordering::Relaxed) {
                    std::thread::park_timeout(period);
                    if is_timed.load(Ordering::Relaxed) {
                        let sample = board.sample();
                        seen.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
                    }
                }
            };
            std::thread::Builder::new().name("device-probe".to_owned()).spawn(sample).ok()
        });
        BoardProbe { board, seen, is_timed, is_over, sampler, region: None, window_s: 0.0, counted_mj: Some(0) }
    }

    fn sample(&self) {
        let sample = self.board.sample();
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
    }
}

impl DeviceProbe for BoardProbe {
    fn begin(&mut self) {
        if self.region.is_some() {
            return;
        }
        self.sample();
        self.is_timed.store(true, Ordering::Relaxed);
        // The counter last, and first at the end: what reading the rest takes is not in the region.
        let energy_mj = self.board.energy_mj();
        self.region = Some(Region { start: Instant::now(), energy_mj });
    }

    fn end(&mut self) {
        let Some(region) = self.region.take() else { return };
        self.window_s += region.start.elapsed().as_secs_f64();
        let used_mj = region.energy_mj.zip(self.board.energy_mj()).and_then(|(before, now)| now.checked_sub(before));
        self.counted_mj = self.counted_mj.zip(used_mj).map(|(sum, used)| sum + used);
        self.is_timed.store(false, Ordering::Relaxed);
        self.sample();
    }

    fn take(&mut self) -> DeviceFigures {
        self.end();
        let samples = std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        let window_s = std::mem::replace(&mut self.window_s, 0.0);
        let counted_mj = self.counted_mj.replace(0);
        figures(&samples, window_s, counted_mj)
    }
}

impl Drop for BoardProbe {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(sampler) = self.sampler.take() {
            sampler.thread().unpark();
            // A sampler that panicked has nothing more to tell.
            let _ = sampler.join();
        }
    }
}

/// Sums up what was seen over `window_s` seconds of timed regions.
fn figures(samples: &[BoardSample], window_s: f64, counted_mj: Option<u64>) -> DeviceFigures {
    let values = |of: fn(&BoardSample) -> Option<f64>| -> Vec<f64> { samples.iter().filter_map(of).collect() };
    let power_w = values(|sample| sample.power_w);
    let sampled_j = (!power_w.is_empty()).then(|| power_w.iter().sum::<f64>() / power_w.len() as f64 * window_s);
    // A counter that did not move is one that the board lacks.
    let counted_j = counted_mj.filter(|counted_mj| *counted_mj > 0).map(|counted_mj| counted_mj as f64 / 1e3);
    let (energy_j, energy_method) = match (counted_j, sampled_j) {
        (None, None) => (None, UNKNOWN),
        _ if window_s < SHORTEST_S => (None, TOO_SHORT),
        (Some(joules), _) => (Some(joules), COUNTED),
        (None, Some(joules)) => (Some(joules), SAMPLED),
    };
    let [sm, memory] = [values(|sample| sample.sm_clock_mhz), values(|sample| sample.memory_clock_mhz)];
    let reasons: BTreeSet<&str> = samples.iter().flat_map(|sample| sample.throttle_reasons.iter().copied()).collect();
    DeviceFigures {
        window_s,
        energy_j,
        energy_method: energy_method.to_owned(),
        power_limit_w: values(|sample| sample.power_limit_w).into_iter().reduce(f64::min),
        sm_clock_mhz_min: sm.iter().copied().reduce(f64::min),
        sm_clock_mhz_median: median(sm),
        memory_clock_mhz_min: memory.iter().copied().reduce(f64::min),
        memory_clock_mhz_median: median(memory),
        n_samples: samples.len(),
        throttle_reasons: reasons.into_iter().map(str::to_owned).collect(),
        others: samples.iter().filter_map(|sample| sample.others).max(),
    }
}

fn median(values: Vec<f64>) -> Option<f64> {
    crate::metrics::statistics(&values).map(|statistics| statistics.median)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, AtomicUsize};

    /// Uses 1.5 J between any two readings of its counter, and lowers its clock with every sample.
    #[derive(Default)]
    struct Scripted {
        has_counter: bool,
        energy_mj: AtomicU64,
        n_sampled: AtomicUsize,
    }

    impl Board for Scripted {
        fn energy_mj(&self) -> Option<u64> {
            self.has_counter.then(|| self.energy_mj.fetch_add(1_500, Ordering::Relaxed))
        }

        fn sample(&self) -> BoardSample {
            let n = self.n_sampled.fetch_add(1, Ordering::Relaxed);
            BoardSample {
                power_w: Some(if n.is_multiple_of(2) { 100.0 } else { 300.0 }),
                power_limit_w: Some(700.0),
                sm_clock_mhz: Some(1980.0 - 15.0 * n as f64),
                memory_clock_mhz: None,
                throttle_reasons: if n == 1 { vec!["sw_power_cap"] } else { Vec::new() },
                others: Some(OtherProcesses { n: n % 2, bytes: Some(1000 * (n as u64 % 2)) }),
            }
        }
    }

    fn timed(probe: &mut BoardProbe) {
        probe.begin();
        std::thread::sleep(Duration::from_secs_f64(SHORTEST_S));
        probe.end();
    }

    #[test]
    fn energy_is_the_counters_difference_over_the_regions_alone() {
        let board = Arc::new(Scripted { has_counter: true, ..Scripted::default() });
        let mut probe = BoardProbe::new(board.clone(), None);
        probe.begin();
        timed(&mut probe);
        board.energy_mj.fetch_add(1_000_000, Ordering::Relaxed);
        probe.begin();
        let figures = probe.take();
        assert_eq!(figures.energy_j, Some(3.0), "two regions; what was used between them is in neither");
        assert_eq!((figures.energy_method.as_str(), figures.n_samples), (COUNTED, 4));
        assert_eq!((figures.sm_clock_mhz_min, figures.sm_clock_mhz_median), (Some(1935.0), Some(1957.5)));
        assert_eq!((figures.memory_clock_mhz_min, figures.power_limit_w), (None, Some(700.0)));
        assert_eq!(figures.throttle_reasons, ["sw_power_cap"]);
        assert_eq!(figures.others, Some(OtherProcesses { n: 1, bytes: Some(1000) }), "the most at once");
        assert!(figures.window_s >= SHORTEST_S, "{}", figures.window_s);
        let next = probe.take();
        assert_eq!((next.n_samples, next.window_s, next.energy_j), (0, 0.0, None), "a case begins anew");
    }

    #[test]
    fn without_a_counter_energy_is_mean_power_times_time() {
        let mut probe = BoardProbe::new(Arc::new(Scripted::default()), None);
        timed(&mut probe);
        let figures = probe.take();
        assert_eq!(figures.energy_method, SAMPLED);
        assert!((figures.energy_j.expect("joules") - 200.0 * figures.window_s).abs() < 1e-9);
    }

    #[test]
    fn what_is_too_short_for_the_counter_or_not_told_is_not_given() {
        let sample = BoardSample { power_w: Some(100.0), ..BoardSample::default() };
        let short = figures(std::slice::from_ref(&sample), 0.01, Some(5));
        assert_eq!((short.energy_j, short.energy_method.as_str()), (None, TOO_SHORT));
        let silent = figures(&[BoardSample::default()], 1.0, None);
        assert_eq!((silent.energy_j, silent.energy_method.as_str(), silent.others), (None, UNKNOWN, None));
        // A counter that stands still is none.
        assert_eq!(figures(&[sample], 2.0, Some(0)).energy_j, Some(200.0));
    }

    #[test]
    fn the_thread_samples_within_regions_and_ends_with_the_probe() {
        let board = Arc::new(Scripted::default());
        let mut probe = BoardProbe::new(board.clone(), Some(Duration::from_millis(1)));
        timed(&mut probe);
        assert!(probe.take().n_samples > 2);
        drop(probe);
        assert_eq!(Arc::strong_count(&board), 1, "the thread is gone");
    }
}
