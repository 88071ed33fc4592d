//! Statistics of repeated samples.

use crate::artifact::Statistics;
use statrs::distribution::{ContinuousCDF, StudentsT};

/// Returns the p-th percentile (0 to 100) of sorted values, by linear interpolation between order statistics.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = p / 100.0 * last as f64;
    let low = (at.floor() as usize).min(last);
    let high = (low + 1).min(last);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

/// Returns the statistics of samples; nothing for none.
pub fn statistics(samples: &[f64]) -> Option<Statistics> {
    let n = samples.len();
    if n == 0 {
        return None;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mean = samples.iter().sum::<f64>() / n as f64;
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    Some(Statistics {
        n,
        mean,
        stdev: (n > 1).then(|| (squares / (n - 1) as f64).sqrt()),
        median: percentile(&sorted, 50.0),
        p90: percentile(&sorted, 90.0),
        p95: (n >= 20).then(|| percentile(&sorted, 95.0)),
        p99: (n >= 100).then(|| percentile(&sorted, 99.0)),
        min: sorted[0],
        max: sorted[n - 1],
    })
}

/// Returns the mean and its standard error, stdev/√n with n − 1; no error for a single value.
pub fn mean_and_stderr(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()))
}

/// Returns the standard error of the p-th percentile (0 to 100) of sorted values, `share_stderr` being that of the share of values at most
/// as large: half the distance between the quantiles that far to either side, which asks nothing of the values' distribution
/// (Woodruff, JASA 47, 1952). `None` where either would lie outside the sample.
pub fn quantile_stderr(sorted: &[f64], p: f64, share_stderr: f64) -> Option<f64> {
    let n = sorted.len() as f64;
    let (low, high) = (n * (p / 100.0 - share_stderr), n * (p / 100.0 + share_stderr));
    // Written so that NaN is outside, too.
    if !(low >= 1.0 && high <= n) || sorted.len() < 2 {
        return None;
    }
    let at = |rank: f64| percentile(sorted, (rank - 1.0) / (n - 1.0) * 100.0);
    Some((at(high) - at(low)) / 2.0)
}

/// Degrees of freedom from which the expansion below is exact to 1e-9; statrs (0.19) takes seconds there.
const MANY_DEGREES: f64 = 1000.0;

/// Returns the 0.975 quantile of Student's t, which bounds the central 95 %. Fewer than one degree of freedom count as one.
pub fn t_quantile(degrees_of_freedom: f64) -> f64 {
    if degrees_of_freedom >= MANY_DEGREES {
        // Abramowitz and Stegun, 26.7.5.
        const Z: f64 = 1.959_963_984_540_054;
        let first = (Z.powi(3) + Z) / 4.0;
        let second = (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / 96.0;
        return Z + first / degrees_of_freedom + second / degrees_of_freedom.powi(2);
    }
    // NaN counts as one, too.
    let student = StudentsT::new(0.0, 1.0, degrees_of_freedom.max(1.0));
    student.map_or(f64::INFINITY, |student| student.inverse_cdf(0.975))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t_quantiles_equal_those_of_scipy() {
        // scipy 1.17: stats.t.ppf(0.975, ν).
        for (freedom, expected) in [
            (1.0, 12.706_205),
            (2.0, 4.302_653),
            (4.0, 2.776_445),
            (5.0, 2.570_582),
            (9.0, 2.262_157),
            (30.0, 2.042_272),
            (999.0, 1.962_341),
            (1000.0, 1.962_339),
            (1e9, 1.959_964),
        ] {
            assert!((t_quantile(freedom) / expected - 1.0).abs() < 1e-5, "{freedom}: {}", t_quantile(freedom));
        }
        assert!(t_quantile(2.5) < t_quantile(2.0) && t_quantile(2.5) > t_quantile(3.0));
        assert!(t_quantile(0.1).is_finite());
    }

    #[test]
    fn percentiles_interpolate_linearly_as_numpy_does() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(percentile(&sorted, 50.0), 3.0);
        assert!((percentile(&sorted, 90.0) - 6.8).abs() < 1e-12);
        assert_eq!(percentile(&sorted, 100.0), 8.0);
    }

    #[test]
    fn statistics_equal_numpys() {
        // numpy 2.4: percentile(samples, [90]), std(samples, ddof=1).
        let found = statistics(&[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]).expect("statistics");
        assert_eq!((found.mean, found.median, found.min, found.max), (3.875, 3.5, 1.0, 9.0));
        assert!((found.p90 - 6.9).abs() < 1e-12);
        assert!((found.stdev.expect("a spread") - 2.748376143938713).abs() < 1e-12);
        let many: Vec<f64> = (0..100).map(f64::from).collect();
        assert!((statistics(&many).expect("statistics").p99.expect("enough samples") - 98.01).abs() < 1e-12);
    }

    #[test]
    fn tail_percentiles_need_enough_samples_and_the_spread_more_than_one() {
        let few = statistics(&[3.0, 1.0, 2.0]).expect("statistics");
        assert_eq!((few.mean, few.stdev, few.p95, few.p99), (2.0, Some(1.0), None, None));
        let many: Vec<f64> = (0..100).map(f64::from).collect();
        assert!(statistics(&many).expect("statistics").p99.is_some());
        assert_eq!(statistics(&[1.0]).expect("statistics").stdev, None);
        assert_eq!(statistics(&[]), None);
    }

    #[test]
    fn the_error_of_a_quantile_is_that_of_repeated_draws() {
        // For a uniform sample the median's standard error is about 1/(2√n), the 90th percentile's √(0.09/n).
        let n = 10_000;
        let sorted: Vec<f64> = (0..n).map(|i| (f64::from(i) + 0.5) / f64::from(n)).collect();
        let close = |found: Option<f64>, expected: f64| (found.expect("an error") / expected - 1.0).abs() < 0.01;
        let independent = |p: f64| (p / 100.0 * (1.0 - p / 100.0) / f64::from(n)).sqrt();
        assert!(close(quantile_stderr(&sorted, 50.0, independent(50.0)), 0.005));
        assert!(close(quantile_stderr(&sorted, 90.0, independent(90.0)), 0.003));
        // Shares that are twice as uncertain make quantiles twice as uncertain.
        assert!(close(quantile_stderr(&sorted, 90.0, 2.0 * independent(90.0)), 0.006));
        assert_eq!(quantile_stderr(&sorted[..20], 99.0, 0.022), None);
        assert_eq!(quantile_stderr(&sorted, 50.0, f64::NAN), None);
        assert_eq!(mean_and_stderr(&[1.0, 3.0]), (2.0, Some(1.0)));
        assert_eq!(mean_and_stderr(&[1.0]).1, None);
    }
}
