//! Whether two estimates differ by more than their noise.

use super::statistics::t_quantile;

/// A mean with the spread of what it is the mean of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    pub value: f64,
    /// Standard error of `value`; null where it is not known.
    pub stderr: Option<f64>,
    /// Samples behind it.
    pub n: usize,
}

/// Two estimates side by side.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Second minus first.
    pub value: f64,
    /// Half the width of the 95 % confidence interval of `value`; null where no spread is known.
    pub half_width: Option<f64>,
}

impl Difference {
    /// Returns whether 0 lies outside the 95 % interval; nothing where no spread is known.
    pub fn is_outside_noise(&self) -> Option<bool> {
        self.half_width.map(|half_width| self.value.abs() > half_width)
    }
}

/// Returns the difference of two independent estimates (Welch's interval; degrees of freedom by Satterthwaite).
pub fn difference(a: Estimate, b: Estimate) -> Difference {
    let half_width = match (a.stderr, b.stderr) {
        (Some(sa), Some(sb)) => {
            let (va, vb) = (sa * sa, sb * sb);
            let total = va + vb;
            let share = |v: f64, n: usize| v * v / (n as f64 - 1.0).max(1.0);
            let below = share(va, a.n) + share(vb, b.n);
            let freedom = if below > 0.0 { total * total / below } else { f64::INFINITY };
            Some(t_quantile(freedom) * total.sqrt())
        }
        _ => None,
    };
    Difference { value: b.value - a.value, half_width }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::mean_and_stderr;

    #[test]
    fn welch_s_interval_is_scipy_s() {
        // scipy 1.17: stats.ttest_ind([14, 15, 17, 16, 18], [10, 12, 11, 13], equal_var=False).confidence_interval(0.95)
        // is 4.5 ± 2.26522.
        let (a, sa) = mean_and_stderr(&[10.0, 12.0, 11.0, 13.0]);
        let (b, sb) = mean_and_stderr(&[14.0, 15.0, 17.0, 16.0, 18.0]);
        let found = difference(Estimate { value: a, stderr: sa, n: 4 }, Estimate { value: b, stderr: sb, n: 5 });
        assert_eq!(found.value, 4.5);
        assert!((found.half_width.expect("spreads") - 2.26522).abs() < 1e-5, "{found:?}");
        assert_eq!(found.is_outside_noise(), Some(true));
    }

    #[test]
    fn without_a_spread_there_is_no_interval() {
        let estimate = |stderr| Estimate { value: 1.0, stderr, n: 100 };
        assert_eq!(difference(estimate(None), estimate(Some(0.1))).is_outside_noise(), None);
    }
}
