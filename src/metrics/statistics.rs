//! Statistics of repeated samples.

use crate::artifact::Statistics;

/// Fewest samples from which a 95th percentile is given.
const P95_MIN_SAMPLES: usize = 20;
/// Fewest samples from which a 99th percentile is given.
const P99_MIN_SAMPLES: usize = 100;

/// Returns the statistics of `samples`, in their unit; None where there are none, or one of them is not finite.
pub fn statistics(samples: &[f64]) -> Option<Statistics> {
    if samples.is_empty() || samples.iter().any(|sample| !sample.is_finite()) {
        return None;
    }
    let n = samples.len();
    let mean = samples.iter().sum::<f64>() / n as f64;
    let stdev = (n > 1).then(|| {
        let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
        (squares / (n - 1) as f64).sqrt()
    });
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Statistics {
        n,
        mean,
        stdev,
        median: percentile(&sorted, 50.0),
        p90: percentile(&sorted, 90.0),
        p95: (n >= P95_MIN_SAMPLES).then(|| percentile(&sorted, 95.0)),
        p99: (n >= P99_MIN_SAMPLES).then(|| percentile(&sorted, 99.0)),
        min: sorted[0],
        max: sorted[n - 1],
    })
}

/// Returns the `p`th percentile (0 to 100) of values in ascending order, interpolated linearly between the two
/// nearest ranks as numpy.percentile does by default. NaN where `sorted` is empty.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let Some(last_idx) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let rank = p.clamp(0.0, 100.0) / 100.0 * last_idx as f64;
    let below_idx = rank.floor() as usize;
    let above_idx = (below_idx + 1).min(last_idx);
    let (below, above) = (sorted[below_idx], sorted[above_idx]);
    let fraction = rank - below_idx as f64;
    // numpy interpolates from the nearer end, which keeps the result between the two ranks despite rounding.
    if fraction < 0.5 { below + (above - below) * fraction } else { above - (above - below) * (1.0 - fraction) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * b.abs().max(1.0)
    }

    #[test]
    fn percentiles_equal_numpys_default() {
        // numpy.percentile([3, 1, 4, 1, 5, 9, 2, 6], [1, 25, 50, 90, 95, 99])
        let mut samples = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0];
        samples.sort_by(f64::total_cmp);
        for (p, expected) in [(1.0, 1.0), (25.0, 1.75), (50.0, 3.5), (90.0, 6.9), (95.0, 7.95), (99.0, 8.79)] {
            assert!(close(percentile(&samples, p), expected), "p{p}: {}", percentile(&samples, p));
        }
        assert_eq!(percentile(&samples, 0.0), 1.0);
        assert_eq!(percentile(&samples, 100.0), 9.0);
    }

    #[test]
    fn mean_and_stdev_equal_numpys_with_ddof_1() {
        let samples = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0];
        let found = statistics(&samples).unwrap();
        assert_eq!(found.n, 8);
        assert!(close(found.mean, 3.875));
        assert!(close(found.stdev.unwrap(), 2.748376143938713));
        assert_eq!((found.min, found.max), (1.0, 9.0));
    }

    #[test]
    fn high_percentiles_need_enough_samples() {
        let of = |n: usize| statistics(&(0..n).map(|i| i as f64).collect::<Vec<_>>()).unwrap();
        assert_eq!((of(19).p95, of(19).p99), (None, None));
        assert!(of(20).p95.is_some_and(|p95| close(p95, 18.05)));
        assert_eq!(of(99).p99, None);
        assert!(of(100).p99.is_some_and(|p99| close(p99, 98.01)));
    }

    #[test]
    fn a_single_sample_has_no_stdev_and_no_samples_have_nothing() {
        let one = statistics(&[2.5]).unwrap();
        assert_eq!((one.mean, one.median, one.p90, one.stdev), (2.5, 2.5, 2.5, None));
        assert_eq!(statistics(&[]), None);
        assert_eq!(statistics(&[1.0, f64::NAN]), None);
        assert!(percentile(&[], 50.0).is_nan());
    }
}
