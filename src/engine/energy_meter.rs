//! Readings of a board's energy: when its counter moved, and what it said then.

use crate::inference::EnergyWindow;
use std::time::Instant;

const COUNTED: &str = "the board's total energy counter (NVML), between two of its movements at least 2 s and 20 movements apart; idle power is in it";
const SAMPLED: &str = "the board's power (NVML) over time, between two of its changes at least 2 s and 20 changes apart; this board has no energy counter";
const UNKNOWN: &str = "the board tells neither energy nor power";

/// Takes readings of one stretch of work.
pub struct EnergyMeter {
    start: Instant,
    /// The last reading.
    counter_mj: Option<u64>,
    first_mj: u64,
    counted: Vec<(f64, f64)>,
    /// The last reading of power, when it was taken, and the energy until then.
    power_w: Option<(f64, f64)>,
    sampled_j: f64,
    sampled: Vec<(f64, f64)>,
}

impl EnergyMeter {
    /// Begins a stretch.
    pub fn start(counter_mj: Option<u64>, power_w: Option<f64>) -> EnergyMeter {
        EnergyMeter {
            start: Instant::now(),
            counter_mj,
            first_mj: counter_mj.unwrap_or(0),
            counted: Vec::new(),
            power_w: power_w.map(|watts| (watts, 0.0)),
            sampled_j: 0.0,
            sampled: Vec::new(),
        }
    }

    /// Returns true until the counter has moved: one that never does is one that the board lacks, and power is needed then.
    pub fn needs_power(&self) -> bool {
        self.counted.is_empty()
    }

    /// Takes a reading.
    pub fn read(&mut self, counter_mj: Option<u64>, power_w: Option<f64>) {
        self.read_at(self.start.elapsed().as_secs_f64(), counter_mj, power_w);
    }

    fn read_at(&mut self, now_s: f64, counter_mj: Option<u64>, power_w: Option<f64>) {
        if let (Some(before), Some(now)) = (self.counter_mj, counter_mj)
            && now > before
        {
            self.counter_mj = Some(now);
            self.counted.push((now_s, (now - self.first_mj) as f64 / 1e3));
        }
        if let (Some((before_w, then_s)), Some(now_w)) = (self.power_w, power_w) {
            self.sampled_j += before_w * (now_s - then_s);
            self.power_w = Some((now_w, now_s));
            if now_w != before_w {
                self.sampled.push((now_s, self.sampled_j));
            }
        }
    }

    /// Returns what was read so far.
    pub fn window(&self) -> EnergyWindow {
        let window_s = self.start.elapsed().as_secs_f64();
        // A counter that stands still is one that the board lacks.
        let (updates, method) = match (self.counted.is_empty(), self.counter_mj, self.power_w) {
            (false, ..) | (true, Some(_), None) => (self.counted.clone(), COUNTED),
            (true, _, Some(_)) => (self.sampled.clone(), SAMPLED),
            (true, None, None) => (Vec::new(), UNKNOWN),
        };
        EnergyWindow { window_s, updates, method: method.to_owned(), has_source: method != UNKNOWN }
    }
}
