//! A device's board over the regions that a stage times: what is counted, what is sampled, and the arithmetic of both.

use super::energy_meter::EnergyMeter;
use crate::inference::{DeviceFigures, DeviceProbe, EnergyWindow, OtherProcesses};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two samples within a region. The driver renews what it tells less often than that.
#[cfg(feature = "cuda")]
pub const PERIOD: Duration = Duration::from_millis(50);

/// Time between two readings of energy while work is repeated for that alone: a quarter of the shortest time between two movements of a
/// counter (20 ms).
const ENERGY_PERIOD: Duration = Duration::from_millis(5);

/// What the sampling thread does.
const IDLE: u8 = 0;
const TIMED: u8 = 1;
const ENERGY: u8 = 2;

/// What a board tells at one moment. Null where it doesn't.
#[derive(Debug, Clone, Default)]
pub struct BoardSample {
    pub power_limit_w: Option<f64>,
    pub sm_clock_mhz: Option<f64>,
    pub sm_clock_mhz_max: Option<f64>,
    pub memory_clock_mhz: Option<f64>,
    pub throttle_reasons: Vec<&'static str>,
    pub others: Option<OtherProcesses>,
}

/// A board.
pub trait Board: Send + Sync {
    /// Returns the energy used since some time in the past, in mJ.
    fn energy_mj(&self) -> Option<u64>;

    fn power_w(&self) -> Option<f64>;

    fn sample(&self) -> BoardSample;
}

/// Samples a board during timed regions, on a thread of its own.
pub struct BoardProbe {
    board: Arc<dyn Board>,
    seen: Arc<Mutex<Vec<BoardSample>>>,
    /// Of the first timed region since the last `take`, or of what `begin_energy` began.
    meter: Arc<Mutex<Option<EnergyMeter>>>,
    mode: Arc<AtomicU8>,
    is_over: Arc<AtomicBool>,
    sampler: Option<JoinHandle<()>>,
    start: Option<Instant>,
    window_s: f64,
    n_regions: usize,
    /// Energy over the first region.
    energy: Option<EnergyWindow>,
}

impl BoardProbe {
    /// Watches a board; without a `period` it is sampled at the ends of regions alone.
    pub fn new(board: Arc<dyn Board>, period: Option<Duration>) -> BoardProbe {
        let (seen, meter) = (Arc::<Mutex<Vec<BoardSample>>>::default(), Arc::<Mutex<Option<EnergyMeter>>>::default());
        let (mode, is_over) = (Arc::<AtomicU8>::default(), Arc::<AtomicBool>::default());
        let sampler = period.and_then(|period| {
            let (board, seen, meter) = (Arc::clone(&board), Arc::clone(&seen), Arc::clone(&meter));
            let (mode, is_over) = (Arc::clone(&mode), Arc::clone(&is_over));
            let sample = move || {
                while !is_over.load(Ordering::Relaxed) {
                    let is_energy = mode.load(Ordering::Relaxed) == ENERGY;
                    std::thread::park_timeout(if is_energy { ENERGY_PERIOD } else { period });
                    if mode.load(Ordering::Relaxed) != IDLE {
                        read_energy(board.as_ref(), &meter);
                    }
                    if mode.load(Ordering::Relaxed) == TIMED {
                        let sample = board.sample();
                        lock(&seen).push(sample);
                    }
                }
            };
            std::thread::Builder::new().name("device-probe".to_owned()).spawn(sample).ok()
        });
        BoardProbe {
            board,
            seen,
            meter,
            mode,
            is_over,
            sampler,
            start: None,
            window_s: 0.0,
            n_regions: 0,
            energy: None,
        }
    }

    fn sample(&self) {
        let sample = self.board.sample();
        lock(&self.seen).push(sample);
    }

    /// Returns what the meter read, after a last reading.
    fn end_meter(&self) -> Option<EnergyWindow> {
        read_energy(self.board.as_ref(), &self.meter);
        lock(&self.meter).take().map(|meter| meter.window())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the meter, where there is one, a reading.
fn read_energy(board: &dyn Board, meter: &Mutex<Option<EnergyMeter>>) {
    if let Some(meter) = lock(meter).as_mut() {
        let energy_mj = board.energy_mj();
        let power_w = if meter.needs_power() { board.power_w() } else { None };
        meter.read(energy_mj, power_w);
    }
}

impl DeviceProbe for BoardProbe {
    fn begin(&mut self) {
        if self.start.is_some() {
            return;
        }
        self.sample();
        self.n_regions += 1;
        if self.n_regions == 1 {
            // The counter last, and first at the end: what reading the rest takes is not in the region.
            *lock(&self.meter) = Some(EnergyMeter::start(self.board.energy_mj(), self.board.power_w()));
        }
        self.mode.store(TIMED, Ordering::Relaxed);
        self.start = Some(Instant::now());
    }

    fn end(&mut self) {
        let Some(start) = self.start.take() else { return };
        self.window_s += start.elapsed().as_secs_f64();
        let energy = self.end_meter();
        self.mode.store(IDLE, Ordering::Relaxed);
        self.energy = energy.filter(|_| self.n_regions == 1);
        self.sample();
    }

    fn take(&mut self) -> DeviceFigures {
        self.end();
        let samples = std::mem::take(&mut *lock(&self.seen));
        let window_s = std::mem::replace(&mut self.window_s, 0.0);
        self.n_regions = 0;
        figures(&samples, window_s, self.energy.take())
    }

    fn begin_energy(&mut self) {
        *lock(&self.meter) = Some(EnergyMeter::start(self.board.energy_mj(), self.board.power_w()));
        self.mode.store(ENERGY, Ordering::Relaxed);
        if let Some(sampler) = &self.sampler {
            // It may sleep for as long as between two samples of a timed region.
            sampler.thread().unpark();
        }
    }

    fn energy_so_far(&self) -> EnergyWindow {
        lock(&self.meter).as_ref().map(EnergyMeter::window).unwrap_or_default()
    }

    fn end_energy(&mut self) -> EnergyWindow {
        let energy = self.end_meter();
        self.mode.store(IDLE, Ordering::Relaxed);
        energy.unwrap_or_default()
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
fn figures(samples: &[BoardSample], window_s: f64, energy: Option<EnergyWindow>) -> DeviceFigures {
    let values = |of: fn(&BoardSample) -> Option<f64>| -> Vec<f64> { samples.iter().filter_map(of).collect() };
    let [sm, memory] = [values(|sample| sample.sm_clock_mhz), values(|sample| sample.memory_clock_mhz)];
    let reasons: BTreeSet<&str> = samples.iter().flat_map(|sample| sample.throttle_reasons.iter().copied()).collect();
    DeviceFigures {
        window_s,
        energy,
        power_limit_w: values(|sample| sample.power_limit_w).into_iter().reduce(f64::min),
        sm_clock_mhz_min: sm.iter().copied().reduce(f64::min),
        sm_clock_mhz_median: median(sm),
        sm_clock_mhz_max: values(|sample| sample.sm_clock_mhz_max).into_iter().reduce(f64::max),
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
    use std::sync::atomic::AtomicUsize;

    /// Draws `power_w`; its counter moves every `period_s`. Every sample has a lower clock than the one before.
    struct Scripted {
        start: Instant,
        power_w: f64,
        period_s: Option<f64>,
        n_sampled: AtomicUsize,
    }

    fn scripted(power_w: f64, period_s: Option<f64>) -> Arc<Scripted> {
        Arc::new(Scripted { start: Instant::now(), power_w, period_s, n_sampled: AtomicUsize::default() })
    }

    impl Board for Scripted {
        fn energy_mj(&self) -> Option<u64> {
            let period_s = self.period_s?;
            let moved_s = (self.start.elapsed().as_secs_f64() / period_s).floor() * period_s;
            Some((moved_s * self.power_w * 1e3) as u64)
        }

        fn power_w(&self) -> Option<f64> {
            Some(self.power_w)
        }

        fn sample(&self) -> BoardSample {
            let n = self.n_sampled.fetch_add(1, Ordering::Relaxed);
            let others = OtherProcesses { n: n % 2, bytes: Some(1000 * (n as u64 % 2)), ..OtherProcesses::default() };
            BoardSample {
                power_limit_w: Some(700.0),
                sm_clock_mhz: Some(1980.0 - 15.0 * n as f64),
                sm_clock_mhz_max: Some(1980.0),
                memory_clock_mhz: None,
                throttle_reasons: if n == 1 { vec!["sw_power_cap"] } else { Vec::new() },
                others: Some(others),
            }
        }
    }

    fn timed(probe: &mut BoardProbe, s: f64) {
        probe.begin();
        std::thread::sleep(Duration::from_secs_f64(s));
        probe.end();
    }

    #[test]
    fn regions_are_summed_and_their_samples_summarized() {
        let mut probe = BoardProbe::new(scripted(300.0, Some(0.02)), None);
        probe.begin();
        timed(&mut probe, 0.05);
        std::thread::sleep(Duration::from_millis(50));
        probe.begin();
        let figures = probe.take();
        assert_eq!(figures.energy, None, "two regions: the counter does not resolve their ends");
        assert_eq!((figures.sm_clock_mhz_min, figures.sm_clock_mhz_median), (Some(1935.0), Some(1957.5)));
        assert_eq!((figures.sm_clock_mhz_max, figures.memory_clock_mhz_min), (Some(1980.0), None));
        assert_eq!((figures.power_limit_w, figures.n_samples), (Some(700.0), 4));
        assert_eq!(figures.throttle_reasons, ["sw_power_cap"]);
        let others = figures.others.expect("others");
        assert_eq!((others.n, others.bytes), (1, Some(1000)), "the most at once");
        assert!((0.05..0.09).contains(&figures.window_s), "{}", figures.window_s);
        let next = probe.take();
        assert_eq!((next.n_samples, next.window_s, next.energy), (0, 0.0, None), "a case begins anew");
        timed(&mut probe, 0.05);
        let energy = probe.take().energy.expect("of a single region");
        assert!(!energy.updates.is_empty() && energy.has_source, "{energy:?}");
    }

    #[test]
    fn energy_of_repeated_work_is_read_as_often_as_the_counter_moves() {
        let read = |period_s: f64| {
            let mut probe = BoardProbe::new(scripted(400.0, Some(period_s)), Some(Duration::from_millis(50)));
            probe.begin_energy();
            while probe.energy_so_far().updates.len() < 8 {
                std::thread::sleep(Duration::from_millis(1));
            }
            probe.end_energy()
        };
        for period_s in [0.02, 0.1] {
            let window = read(period_s);
            let (first, last) = (window.updates[0], window.updates[window.updates.len() - 1]);
            let (power_w, exact_s) = ((last.1 - first.1) / (last.0 - first.0), 7.0 * period_s);
            // A movement is seen at most a reading too late; a busy machine may read later.
            assert!((power_w - 400.0).abs() < 400.0 * 0.02 / exact_s, "{power_w} W with a counter of {period_s} s");
            assert!(last.0 <= window.window_s && window.method.contains("energy counter"), "{window:?}");
        }
    }

    #[test]
    fn a_board_without_a_counter_is_read_for_power_and_a_silent_one_for_nothing() {
        let mut meter = EnergyMeter::start(None, Some(100.0));
        meter.read(None, Some(100.0));
        meter.read(None, Some(200.0));
        let window = meter.window();
        assert!(window.has_source && window.updates.len() == 1 && window.method.contains("power"), "{window:?}");
        let window = EnergyMeter::start(None, None).window();
        assert!(!window.has_source && window.updates.is_empty(), "{window:?}");
    }

    #[test]
    fn the_thread_samples_within_regions_and_ends_with_the_probe() {
        let board = scripted(100.0, None);
        let mut probe = BoardProbe::new(board.clone(), Some(Duration::from_millis(1)));
        timed(&mut probe, 0.1);
        assert!(probe.take().n_samples > 2);
        drop(probe);
        assert_eq!(Arc::strong_count(&board), 1, "the thread is gone");
    }
}
