//! Axes: how values become positions, and where ticks go.

/// A tick: the value's position along the axis (0 to 1) and what is written there.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    pub position: f64,
    pub label: String,
}

/// An axis that maps values to 0..=1.
#[derive(Debug, Clone, PartialEq)]
pub enum Axis {
    Linear {
        min: f64,
        max: f64,
        step: f64,
    },
    /// Decades, from 10^`low` to 10^`high`.
    Log {
        low: i32,
        high: i32,
    },
    /// For values at or below 0: 0 at the top, then −10^`low`, below it a decade a step down to −10^`high`. Between 0
    /// and
    /// −10^`low` it is linear, so that 0 has a place.
    NegativeSymlog {
        low: i32,
        high: i32,
    },
}

impl Axis {
    /// Returns an axis over the values, widened to round numbers, with about `n_ticks` ticks.
    pub fn linear(values: impl Iterator<Item = f64> + Clone, n_ticks: usize) -> Axis {
        let (mut min, mut max) = bounds(values);
        if max - min <= f64::EPSILON * max.abs().max(min.abs()) * 8.0 {
            let half = if max == 0.0 { 0.5 } else { max.abs() * 0.05 };
            (min, max) = (min - half, max + half);
        }
        let step = round_step((max - min) / n_ticks.max(1) as f64);
        Axis::Linear { min: (min / step).floor() * step, max: (max / step).ceil() * step, step }
    }

    /// Returns a logarithmic axis over values above 0, in whole decades.
    pub fn log(values: impl Iterator<Item = f64> + Clone) -> Axis {
        let (min, max) = bounds(values.filter(|value| *value > 0.0));
        let low = min.log10().floor() as i32;
        Axis::Log { low, high: (max.log10().ceil() as i32).max(low + 1) }
    }

    /// Returns an axis over negated magnitudes (values at or below 0), at most `n_decades` of them.
    pub fn negative_symlog(values: impl Iterator<Item = f64> + Clone, n_decades: i32) -> Axis {
        let magnitudes = values.map(|value| -value).filter(|value| *value > 0.0);
        let (min, max) = bounds(magnitudes);
        let high = max.log10().ceil() as i32;
        Axis::NegativeSymlog { low: (min.log10().floor() as i32).clamp(high - n_decades, high - 1), high }
    }

    /// Returns where a value is, 0 at the axis' start and 1 at its end; values outside stay at the ends.
    pub fn position(&self, value: f64) -> f64 {
        let position = match *self {
            Axis::Linear { min, max, .. } => (value - min) / (max - min),
            Axis::Log { low, high } => (value.log10() - f64::from(low)) / f64::from(high - low),
            Axis::NegativeSymlog { low, high } => {
                let ratio = -value / 10f64.powi(low);
                let steps_down = if ratio > 1.0 { 1.0 + ratio.log10() } else { ratio };
                1.0 - steps_down / f64::from(high - low + 1)
            }
        };
        if position.is_nan() { 0.0 } else { position.clamp(0.0, 1.0) }
    }

    /// Returns the ticks in ascending position.
    pub fn ticks(&self) -> Vec<Tick> {
        match *self {
            Axis::Linear { min, max, step } => {
                let n_steps = ((max - min) / step).round() as usize;
                let n_decimals = (-step.log10().floor()).max(0.0) as usize
                    + usize::from((step / 10f64.powf(step.log10().floor()) - 2.5).abs() < 1e-6);
                let tick = |idx: usize| {
                    let value = min + idx as f64 * step;
                    // Avoids "-0".
                    let value = if value.abs() < step * 1e-6 { 0.0 } else { value };
                    Tick { position: self.position(value), label: linear_label(value, n_decimals) }
                };
                (0..=n_steps).map(tick).collect()
            }
            Axis::Log { low, high } => (low..=high)
                .map(|decade| Tick { position: self.position(10f64.powi(decade)), label: decade_label(decade) })
                .collect(),
            Axis::NegativeSymlog { low, high } => {
                let decades = (low..=high).rev().map(|decade| Tick {
                    position: self.position(-10f64.powi(decade)),
                    label: format!("−{}", decade_label(decade)),
                });
                decades.chain([Tick { position: 1.0, label: "0".to_owned() }]).collect()
            }
        }
    }
}

fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (min, max) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), value| (min.min(value), max.max(value)));
    if min.is_finite() { (min, max) } else { (1.0, 1.0) }
}

/// Returns the smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let magnitude = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|factor| factor * magnitude >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * magnitude
}

fn linear_label(value: f64, n_decimals: usize) -> String {
    if n_decimals > 6 || value.abs() >= 1e7 {
        format!("{value:.1e}").replace('-', "−")
    } else {
        format!("{value:.n_decimals$}").replace('-', "−")
    }
}

/// Writes a power of ten the way people read it: 1e−5, 0.001, 100.
fn decade_label(decade: i32) -> String {
    match decade {
        -3..=0 => format!("{:.*}", decade.unsigned_abs() as usize, 10f64.powi(decade)),
        1..=4 => format!("{:.0}", 10f64.powi(decade)),
        _ => format!("1e{decade}").replace('-', "−"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks().into_iter().map(|tick| tick.label).collect()
    }

    #[test]
    fn linear_ticks_are_round_and_cover_the_values() {
        let axis = Axis::linear([0.9581, 0.9999].into_iter(), 5);
        assert_eq!(labels(&axis), ["0.95", "0.96", "0.97", "0.98", "0.99", "1.00"]);
        assert!((axis.position(0.975) - 0.5).abs() < 1e-9);
        assert_eq!(labels(&Axis::linear([-1.0, 1.0].into_iter(), 4)), ["−1.0", "−0.5", "0.0", "0.5", "1.0"]);
    }

    #[test]
    fn equal_values_still_have_an_axis() {
        for value in [0.0, 3.0, -2e-12] {
            let axis = Axis::linear([value].into_iter(), 5);
            assert!((axis.position(value) - 0.5).abs() < 0.4, "{axis:?}");
        }
        assert!(!labels(&Axis::linear(std::iter::empty(), 5)).is_empty());
    }

    #[test]
    fn negated_magnitudes_keep_zero_and_give_each_decade_a_step() {
        let axis = Axis::negative_symlog([0.0, -2e-4, -0.05].into_iter(), 8);
        assert_eq!(axis, Axis::NegativeSymlog { low: -4, high: -1 });
        assert_eq!(labels(&axis), ["−0.1", "−0.01", "−0.001", "−1e−4", "0"]);
        assert_eq!((axis.position(0.0), axis.position(-0.1)), (1.0, 0.0));
        assert!((axis.position(-0.01) - 0.25).abs() < 1e-9);
        assert!((axis.position(-0.5e-4) - 0.875).abs() < 1e-9);
    }

    #[test]
    fn all_zero_magnitudes_have_an_axis() {
        let axis = Axis::negative_symlog([0.0, 0.0].into_iter(), 8);
        assert_eq!(axis.position(0.0), 1.0);
        assert!(axis.ticks().len() >= 2);
    }
}
