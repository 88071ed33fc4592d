//! Speeds measured in several starts of a process: their spread, and what may be said of a difference.
//!
//! Repeated samples within one process agree better than processes do: placement of memory, clocks and neighbours differ from start to
//! start. So n counts starts. A start's value is the logarithm of its rate, whose spread is relative.

use super::statistics::t_quantile;
use statrs::distribution::{ChiSquared, ContinuousCDF};

/// Below this number of degrees of freedom a difference gets no verdict.
pub const MIN_VERDICT_DF: f64 = 8.0;
/// Variances are pooled unless Bartlett's test rejects at this level that they agree.
const AGREEMENT_LEVEL: f64 = 0.1;
/// The same for the figures of one comparison by themselves. Equally many starts compare well also where their variances differ (G. E. P.
/// Box, Annals of Mathematical Statistics 25, 1954), so only a gross difference stops it.
const OWN_AGREEMENT_LEVEL: f64 = 0.001;

/// The variance between starts of log rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StartVariance {
    pub variance: f64,
    /// Fewer than Σ(starts − 1) where figures that share their starts vary together.
    pub degrees_of_freedom: f64,
    /// Figures that it was pooled from.
    pub n_figures: usize,
}

/// A mean rate over starts with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateInterval {
    /// Geometric mean over starts.
    pub rate: f64,
    pub low: f64,
    pub high: f64,
    pub n_starts: usize,
}

/// The ratio of two rates with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateRatio {
    /// Second over first.
    pub ratio: f64,
    pub low: f64,
    pub high: f64,
    /// Whether the interval leaves out 1; null where there are too few degrees of freedom for a verdict.
    pub differs: Option<bool>,
}

/// The log rates of a figure, one per start.
#[derive(Debug, Clone, Copy)]
pub struct FigureStarts<'a, P> {
    /// Figures with the same value were measured in the same starts, of one model: what a start has of its own is in all of them.
    pub processes: P,
    pub log_rates: &'a [f64],
    /// Which start each is of, in rising order.
    pub start_idxs: &'a [usize],
}

/// Returns the variance between starts, pooled over figures of one kind on one device. `None` where no figure has two starts, or where the
/// figures' variances do not agree: figures beside those that are compared must agree well.
///
/// A sum of k variances of ν degrees of freedom each, from values that correlate by ρ, varies like one of kν/(1 + (k − 1)ρ²); ρ² is the
/// mean over pairs of figures that share their starts.
pub fn pooled_variance<P: PartialEq>(figures: &[FigureStarts<'_, P>]) -> Option<StartVariance> {
    pooled_if_agreed(figures, AGREEMENT_LEVEL)
}

/// Returns the variance between starts of the figures of one comparison, by themselves. `None` where no figure has two starts, or where
/// their variances differ grossly.
pub fn compared_variance<P: PartialEq>(figures: &[FigureStarts<'_, P>]) -> Option<StartVariance> {
    pooled_if_agreed(figures, OWN_AGREEMENT_LEVEL)
}

fn pooled_if_agreed<P: PartialEq>(figures: &[FigureStarts<'_, P>], level: f64) -> Option<StartVariance> {
    let repeated: Vec<&FigureStarts<'_, P>> = figures.iter().filter(|figure| figure.log_rates.len() > 1).collect();
    let variances: Vec<(f64, usize)> =
        repeated.iter().map(|figure| (variance(figure.log_rates), figure.log_rates.len() - 1)).collect();
    if variances.is_empty() || !agree(&variances, level) {
        return None;
    }
    let total_df: f64 = variances.iter().map(|(_, df)| *df as f64).sum();
    let squares: f64 = variances.iter().map(|(variance, df)| variance * *df as f64).sum();
    // Σ ν_j + Σ ν ρ², the second over ordered pairs.
    let mut covariances = 0.0;
    for (idx, one) in repeated.iter().enumerate() {
        for other in repeated.iter().skip(idx + 1).filter(|other| other.processes == one.processes) {
            let df = (one.log_rates.len().min(other.log_rates.len()) - 1) as f64;
            covariances += 2.0 * df * squared_correlation(one, other);
        }
    }
    let spread_of_sum = total_df + covariances;
    Some(StartVariance {
        variance: squares / total_df,
        degrees_of_freedom: total_df * total_df / spread_of_sum,
        n_figures: repeated.len(),
    })
}

/// Returns the variance of one figure's log rates by itself; `None` for fewer than two starts.
pub fn own_variance(starts: &[f64]) -> Option<StartVariance> {
    let start_idxs: Vec<usize> = (0..starts.len()).collect();
    pooled_variance(&[FigureStarts { processes: (), log_rates: starts, start_idxs: &start_idxs }])
}

/// Returns the square of Pearson's correlation over the starts that both figures have; 1 where it can't be told. So few starts correlate by
/// chance too: that leaves fewer degrees of freedom than there are, never more.
fn squared_correlation<P>(one: &FigureStarts<'_, P>, other: &FigureStarts<'_, P>) -> f64 {
    let rate_of = |figure: &FigureStarts<'_, P>, start_idx: usize| {
        let at = figure.start_idxs.binary_search(&start_idx).ok()?;
        figure.log_rates.get(at).copied()
    };
    let of_both = one.start_idxs.iter().filter_map(|idx| Some((rate_of(one, *idx)?, rate_of(other, *idx)?)));
    let (first, second): (Vec<f64>, Vec<f64>) = of_both.unzip();
    let (first, second) = (first.as_slice(), second.as_slice());
    if first.len() < 2 {
        return 1.0;
    }
    let (mean_first, mean_second) = (mean(first), mean(second));
    let product: f64 = first.iter().zip(second).map(|(one, other)| (one - mean_first) * (other - mean_second)).sum();
    let squares = |values: &[f64], mean: f64| values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    let found = product * product / (squares(first, mean_first) * squares(second, mean_second));
    if found.is_finite() { found.min(1.0) } else { 1.0 }
}

/// Returns the mean rate of a figure; `None` where it has no start.
pub fn rate_interval(starts: &[f64], spread: &StartVariance) -> Option<RateInterval> {
    let n_starts = starts.len();
    if n_starts == 0 {
        return None;
    }
    let half = t_quantile(spread.degrees_of_freedom) * (spread.variance / n_starts as f64).sqrt();
    let mean = mean(starts);
    Some(RateInterval { rate: mean.exp(), low: (mean - half).exp(), high: (mean + half).exp(), n_starts })
}

/// Returns how many times as fast the second figure is; `None` where one has no start.
pub fn rate_ratio(first: &[f64], second: &[f64], spread: &StartVariance) -> Option<RateRatio> {
    ratio_of(&[(first, -1.0), (second, 1.0)], spread)
}

/// Returns how many times as fast the second figure is, each taken relative to a reference that was measured with it: what slowed both
/// alike falls out. Each pair is (figure, its reference).
pub fn referred_ratio(first: (&[f64], &[f64]), second: (&[f64], &[f64]), spread: &StartVariance) -> Option<RateRatio> {
    ratio_of(&[(first.0, -1.0), (first.1, 1.0), (second.0, 1.0), (second.1, -1.0)], spread)
}

/// Returns exp of the signed sum of the figures' means, with its interval and verdict.
fn ratio_of(figures: &[(&[f64], f64)], spread: &StartVariance) -> Option<RateRatio> {
    if figures.iter().any(|(starts, _)| starts.is_empty()) {
        return None;
    }
    let per_start: f64 = figures.iter().map(|(starts, _)| 1.0 / starts.len() as f64).sum();
    let half = t_quantile(spread.degrees_of_freedom) * (spread.variance * per_start).sqrt();
    let log_ratio: f64 = figures.iter().map(|(starts, sign)| sign * mean(starts)).sum();
    let has_verdict = spread.degrees_of_freedom >= MIN_VERDICT_DF;
    Some(RateRatio {
        ratio: log_ratio.exp(),
        low: (log_ratio - half).exp(),
        high: (log_ratio + half).exp(),
        differs: has_verdict.then_some(log_ratio.abs() > half),
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64
}

/// Bartlett's test of equal variances (Snedecor and Cochran, Statistical Methods, section 13.10).
fn agree(figures: &[(f64, usize)], level: f64) -> bool {
    if figures.len() < 2 {
        return true;
    }
    let total_df: f64 = figures.iter().map(|(_, df)| *df as f64).sum();
    let pooled = figures.iter().map(|(variance, df)| variance * *df as f64).sum::<f64>() / total_df;
    if pooled == 0.0 {
        return true;
    }
    let logs: f64 = figures.iter().map(|(variance, df)| *df as f64 * (variance / pooled).ln()).sum();
    let inverses: f64 = figures.iter().map(|(_, df)| 1.0 / *df as f64).sum();
    let n_others = (figures.len() - 1) as f64;
    let correction = 1.0 + (inverses - 1.0 / total_df) / (3.0 * n_others);
    let statistic = -logs / correction;
    ChiSquared::new(n_others).is_ok_and(|chi| statistic <= chi.inverse_cdf(1.0 - level))
}
#[cfg(test)]
mod tests {
    use super::*;

    /// Standard normal numbers from a linear congruential generator (Knuth's MMIX constants), by the sum of twelve uniform ones.
    struct Normals(u64);

    impl Normals {
        fn next(&mut self) -> f64 {
            let uniform = |state: &mut u64| {
                *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (*state >> 11) as f64 / (1u64 << 53) as f64
            };
            (0..12).map(|_| uniform(&mut self.0)).sum::<f64>() - 6.0
        }

        fn starts(&mut self, mean: f64, stdev: f64) -> Vec<f64> {
            (0..5).map(|_| mean + stdev * self.next()).collect()
        }
    }

    fn figure(processes: usize, log_rates: &[f64]) -> FigureStarts<'_, usize> {
        FigureStarts { processes, log_rates, start_idxs: &[0, 1, 2, 3, 4][..log_rates.len()] }
    }

    /// Every figure from starts of its own.
    fn pooled(figures: &[&[f64]]) -> Option<StartVariance> {
        let figures: Vec<FigureStarts<'_, usize>> =
            figures.iter().enumerate().map(|(processes, log_rates)| figure(processes, log_rates)).collect();
        pooled_variance(&figures)
    }

    #[test]
    fn figures_of_the_same_starts_count_by_how_little_they_vary_together() {
        let degrees_of_freedom = |second: &[f64], processes: usize| {
            let first: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0];
            let figures = [figure(0, first), figure(processes, second)];
            pooled_variance(&figures).expect("a variance").degrees_of_freedom
        };
        // The same deviations twice: 8²/(8 + 2 · 4 · 1).
        assert!((degrees_of_freedom(&[2.0, 3.0, 4.0, 5.0, 6.0], 0) - 4.0).abs() < 1e-12);
        assert!((degrees_of_freedom(&[2.0, 3.0, 4.0, 5.0, 6.0], 1) - 8.0).abs() < 1e-12);
        // Deviations −1, 2, −2, 2, −1 have no correlation with −2 … 2.
        assert!((degrees_of_freedom(&[0.0, 3.0, -1.0, 3.0, 0.0], 0) - 8.0).abs() < 1e-12);
        // SciPy 1.17: pearsonr([1,2,3,4,5], [1,2,3,5,4]) is 0.9.
        let expected = 64.0 / (8.0 + 8.0 * 0.81);
        assert!((degrees_of_freedom(&[1.0, 2.0, 3.0, 5.0, 4.0], 0) - expected).abs() < 1e-9);
    }

    #[test]
    fn figures_that_lack_a_start_are_compared_over_the_others() {
        let first = figure(0, &[1.0, 2.0, 3.0, 4.0, 5.0]);
        // Start 1 was left out. Over starts 0, 2, 3 and 4 both are the same.
        let second = FigureStarts { log_rates: &[1.0, 3.0, 4.0, 5.0], start_idxs: &[0, 2, 3, 4], ..first };
        assert!((squared_correlation(&first, &second) - 1.0).abs() < 1e-12);
        // SciPy 1.17: pearsonr([1, 3, 4, 5], [1, 2, 0, 3]) is 0.3779645.
        let third = FigureStarts { log_rates: &[1.0, 2.0, 0.0, 3.0], ..second };
        assert!((squared_correlation(&first, &third) - 0.377_964_5f64.powi(2)).abs() < 1e-7);
        let apart = FigureStarts { log_rates: &[1.0, 2.0], start_idxs: &[7, 8], ..first };
        assert_eq!(squared_correlation(&first, &apart), 1.0);
    }

    #[test]
    fn variances_are_pooled_by_their_degrees_of_freedom() {
        // Variances 1 (df 2) and 2 (df 1): (2 · 1 + 1 · 2) / 3.
        let spread = pooled(&[&[1.0, 2.0, 3.0], &[0.0, 2.0], &[5.0]]).expect("a variance");
        assert!((spread.variance - 4.0 / 3.0).abs() < 1e-12);
        assert_eq!((spread.degrees_of_freedom, spread.n_figures), (3.0, 2));
        assert!(pooled(&[&[1.0]]).is_none());
    }

    #[test]
    fn variances_that_disagree_are_not_pooled() {
        // SciPy 1.17: bartlett([1,2,3,4,5], [1,1.01,1.02,1.03,1.04]) has p = 1.3e-7, bartlett([1,2,3,4,5], [1,3,5,7,9]) p = 0.21.
        assert!(pooled(&[&[1.0, 2.0, 3.0, 4.0, 5.0], &[1.0, 1.01, 1.02, 1.03, 1.04]]).is_none());
        assert!(pooled(&[&[1.0, 2.0, 3.0, 4.0, 5.0], &[1.0, 3.0, 5.0, 7.0, 9.0]]).is_some());
    }

    #[test]
    fn a_ratio_has_the_textbook_interval() {
        // Two figures of five starts, each with variance 2.5e-4 in log rate: 8 degrees of freedom, t(0.975, 8) = 2.306004,
        // half width 2.306004 · √(2.5e-4 · 2/5) = 0.02306.
        let first: Vec<f64> = [-0.02, -0.01, 0.0, 0.01, 0.02].to_vec();
        let second: Vec<f64> = first.iter().map(|value| value + 0.03).collect();
        let spread = pooled(&[&first, &second]).expect("a variance");
        let ratio = rate_ratio(&first, &second, &spread).expect("a ratio");
        assert!(
            (ratio.ratio.ln() - 0.03).abs() < 1e-12 && (ratio.low.ln() - 0.03 + 0.023_060).abs() < 1e-5,
            "{ratio:?}"
        );
        assert_eq!(ratio.differs, Some(true));
        let own = own_variance(&first).expect("a variance");
        assert_eq!(rate_ratio(&first, &second, &own).expect("a ratio").differs, None);
    }

    #[test]
    fn a_common_reference_takes_out_what_slowed_both() {
        // Everything half as fast on the second day, the figure a tenth slower beside: ratio 0.9, its variance that of four means.
        let starts: Vec<f64> = [-0.02, -0.01, 0.0, 0.01, 0.02].to_vec();
        let shifted = |by: f64| starts.iter().map(|value| value + by.ln()).collect::<Vec<f64>>();
        let spread = pooled(&[&starts, &starts]).expect("a variance");
        let (figure, reference) = (shifted(0.45), shifted(0.5));
        let ratio = referred_ratio((&starts, &starts), (&figure, &reference), &spread).expect("a ratio");
        // 2.306004 · √(2.5e-4 · 4/5) = 0.032612.
        assert!(
            (ratio.ratio - 0.9).abs() < 1e-12 && (ratio.high.ln() - 0.9f64.ln() - 0.032_612).abs() < 1e-5,
            "{ratio:?}"
        );
        assert_eq!(ratio.differs, Some(true));
        assert!(referred_ratio((&starts, &[]), (&figure, &reference), &spread).is_none());
    }

    #[test]
    fn of_200_identical_pairs_few_are_flagged_and_slowdowns_are_found() {
        // Two kinds of figure in each run, as a prefill of two lengths, two models, five starts; spread 3 % between starts.
        let mut normals = Normals(1);
        let (mut flagged, mut found) = (0, 0);
        for _ in 0..200 {
            let figures: Vec<Vec<f64>> = (0..4).map(|_| normals.starts(0.0, 0.03)).collect();
            let slower: Vec<f64> = normals.starts(-(1.1f64.ln()), 0.03);
            let slices: Vec<&[f64]> = figures.iter().map(Vec::as_slice).collect();
            // As reports do: where the spreads of all do not agree, those of the two.
            let differs = |second: &[f64]| {
                let spread = pooled(&slices).or_else(|| pooled(&[&figures[0], second]))?;
                rate_ratio(&figures[0], second, &spread)?.differs
            };
            flagged += u32::from(differs(&figures[1]) == Some(true));
            found += u32::from(differs(&slower) == Some(true));
        }
        // 5 % of 200 is 10, with a binomial standard deviation of 3.1.
        assert!(flagged <= 16, "{flagged} of 200 identical pairs");
        assert!(found >= 180, "{found} of 200 slowdowns by 10 %");
    }
}
