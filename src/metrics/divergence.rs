//! How far a model's distributions are from its base's, over the scored tokens of a text.

use super::intervals::{by_document, mean_interval};
use super::statistics::{percentile, quantile_stderr};
use crate::artifact::{BlockInterval, DivergenceResult};

/// What both models say of one scored token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenPair {
    /// Negative log-likelihoods in nats.
    pub base_nll: f64,
    pub nll: f64,
    /// KL(base ‖ model) of the whole distribution at that position, in nats.
    pub kl: f64,
    /// Both have the same first choice.
    pub same_top: bool,
}

impl TokenPair {
    /// Returns how much more probability the model gives the true token.
    pub fn delta_p(&self) -> f64 {
        (-self.nll).exp() - (-self.base_nll).exp()
    }
}

/// The tokens' pairs with the documents that they belong to.
struct Pairs<'a> {
    pairs: &'a [TokenPair],
    document_idx: &'a [u32],
}

impl Pairs<'_> {
    fn mean(&self, of: impl Fn(&TokenPair) -> f64) -> f64 {
        self.pairs.iter().map(of).sum::<f64>() / self.pairs.len() as f64
    }

    fn sorted(&self, of: impl Fn(&TokenPair) -> f64) -> Vec<f64> {
        let mut values: Vec<f64> = self.pairs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    /// Returns the interval of a mean over tokens.
    fn interval(&self, of: impl Fn(&TokenPair) -> f64) -> Option<BlockInterval> {
        let values: Vec<f64> = self.pairs.iter().map(of).collect();
        mean_interval(&by_document(&values, self.document_idx))
    }

    /// Returns the standard error of a percentile, and how the percentile moves with its share: from the interval of the share of tokens
    /// that lie at or below it.
    fn quantile_stderr(&self, of: impl Fn(&TokenPair) -> f64, sorted: &[f64], p: f64) -> Option<(f64, f64)> {
        let quantile = percentile(sorted, p);
        let share = self.interval(|pair| f64::from(u8::from(of(pair) <= quantile)))?;
        let stderr = quantile_stderr(sorted, p, share.stderr)?;
        Some((stderr, stderr / share.stderr))
    }

    /// Returns the interval of the share of tokens with the same first choice. Where they never differ nothing is known of its spread.
    fn agreement_interval(&self) -> Option<BlockInterval> {
        let differ = self.pairs.iter().any(|pair| !pair.same_top);
        self.interval(|pair| f64::from(u8::from(pair.same_top))).filter(|_| differ).map(|found| found.within(0.0, 1.0))
    }

    /// Returns the influence of each token on Pearson's correlation `r` of the two NLLs, z₁z₂ − r(z₁² + z₂²)/2 in standardized values
    /// (Devlin, Gnanadesikan and Kettenring, Biometrika 62, 1975). The standard error of its mean is that of r, and unlike
    /// (1 − r²)/√n asks for no normal distribution.
    fn correlation_influence(&self, r: f64) -> impl Fn(&TokenPair) -> f64 {
        let (base_mean, own_mean) = (self.mean(|pair| pair.base_nll), self.mean(|pair| pair.nll));
        let base_stdev = self.mean(|pair| (pair.base_nll - base_mean).powi(2)).sqrt();
        let own_stdev = self.mean(|pair| (pair.nll - own_mean).powi(2)).sqrt();
        move |pair: &TokenPair| {
            let base = (pair.base_nll - base_mean) / base_stdev;
            let own = (pair.nll - own_mean) / own_stdev;
            base * own - r * (base * base + own * own) / 2.0
        }
    }
}

/// A figure by name, as its value and as a series over the tokens whose mean has that figure's error: the tokens' own values where it is a
/// mean, else its value and the influence of each token on it.
pub type LinearFigure = (&'static str, Vec<f64>);

/// A value of one token.
type OfToken = fn(&TokenPair) -> f64;

/// Returns the figures of a divergence as series over tokens, so that those of two models on the same tokens can be paired. A figure
/// without an error is left out.
pub fn linear_figures(pairs: &[TokenPair], document_idx: &[u32]) -> Vec<LinearFigure> {
    let tokens = Pairs { pairs, document_idx };
    let series = |of: &dyn Fn(&TokenPair) -> f64| -> Vec<f64> { pairs.iter().map(of).collect() };
    let mut found: Vec<LinearFigure> = vec![
        ("kl_mean", series(&|pair| pair.kl)),
        ("delta_p_mean", series(&TokenPair::delta_p)),
        ("ln_ppl_ratio", series(&|pair| pair.nll - pair.base_nll)),
        ("top1_agreement", series(&|pair| f64::from(u8::from(pair.same_top)))),
    ];
    let kl = |pair: &TokenPair| pair.kl;
    let quantiles: [(&str, OfToken, f64); 8] = [
        ("kl_median", kl, 50.0),
        ("kl_p90", kl, 90.0),
        ("kl_p95", kl, 95.0),
        ("kl_p99", kl, 99.0),
        ("kl_p99_9", kl, 99.9),
        ("delta_p_p01", TokenPair::delta_p, 1.0),
        ("delta_p_median", TokenPair::delta_p, 50.0),
        ("delta_p_p99", TokenPair::delta_p, 99.0),
    ];
    for (name, of, p) in quantiles {
        let sorted = tokens.sorted(of);
        let quantile = percentile(&sorted, p);
        let slope = tokens.quantile_stderr(of, &sorted, p).map(|(_, slope)| slope).filter(|slope| slope.is_finite());
        found.extend(slope.map(|slope| {
            let is_below = |pair: &TokenPair| f64::from(u8::from(of(pair) <= quantile));
            (name, series(&|pair| quantile + (p / 100.0 - is_below(pair)) * slope))
        }));
    }
    let rms = tokens.mean(|pair| pair.delta_p().powi(2)).sqrt();
    if rms > 0.0 {
        found.push(("delta_p_rms", series(&|pair| rms + (pair.delta_p().powi(2) - rms * rms) / (2.0 * rms))));
    }
    if let Some(r) = correlation(pairs) {
        let influence = tokens.correlation_influence(r);
        found.push(("nll_correlation", series(&|pair| r + influence(pair))));
    }
    found
}

/// Returns the statistics of all tokens, in text order; `None` for none. Errors and intervals rest on blocks of text
/// ([`mean_interval`]). Convention, windows and what was kept of the base are the caller's to fill in.
pub fn divergence(pairs: &[TokenPair], document_idx: &[u32]) -> Option<DivergenceResult> {
    if pairs.is_empty() {
        return None;
    }
    let n = pairs.len();
    let tokens = Pairs { pairs, document_idx };
    let kl = tokens.sorted(|pair| pair.kl);
    let delta_p = tokens.sorted(TokenPair::delta_p);
    let stderr = |interval: &Option<BlockInterval>| interval.as_ref().map(|interval| interval.stderr);
    let kl_mean = tokens.interval(|pair| pair.kl);
    let delta_p_mean = tokens.interval(TokenPair::delta_p);
    let rms = tokens.mean(|pair| pair.delta_p().powi(2)).sqrt();
    let mean_square_stderr = stderr(&tokens.interval(|pair| pair.delta_p().powi(2)));
    let agreement = tokens.agreement_interval();
    let ln_ratio = tokens.interval(|pair| pair.nll - pair.base_nll);
    let ratio = ln_ratio.as_ref().and_then(BlockInterval::exp);
    let correlation = correlation(pairs);
    let kl_tail = |p: f64, n_needed: usize| (n >= n_needed).then(|| percentile(&kl, p));
    let kl_stderr = |p: f64| tokens.quantile_stderr(|pair| pair.kl, &kl, p).map(|(stderr, _)| stderr);
    let ln_ppl_ratio = tokens.mean(|pair| pair.nll - pair.base_nll);
    Some(DivergenceResult {
        n_scored: n,
        kl_mean: tokens.mean(|pair| pair.kl),
        kl_mean_stderr: stderr(&kl_mean),
        kl_mean_interval: kl_mean,
        kl_median: percentile(&kl, 50.0),
        kl_median_stderr: kl_stderr(50.0),
        kl_p90: percentile(&kl, 90.0),
        kl_p90_stderr: kl_stderr(90.0),
        kl_p95: kl_tail(95.0, 20),
        kl_p95_stderr: kl_stderr(95.0),
        kl_p99: kl_tail(99.0, 100),
        kl_p99_stderr: kl_stderr(99.0),
        kl_p99_9: kl_tail(99.9, 1000),
        kl_p99_9_stderr: kl_stderr(99.9).filter(|_| n >= 1000),
        kl_max: kl[n - 1],
        kl_min: kl[0],
        delta_p_mean: tokens.mean(TokenPair::delta_p),
        delta_p_mean_stderr: stderr(&delta_p_mean),
        delta_p_mean_interval: delta_p_mean,
        delta_p_rms: rms,
        // The delta method on √(mean square).
        delta_p_rms_stderr: mean_square_stderr.filter(|_| rms > 0.0).map(|stderr| stderr / (2.0 * rms)),
        delta_p_min: delta_p[0],
        delta_p_p01: (n >= 100).then(|| percentile(&delta_p, 1.0)),
        delta_p_p05: (n >= 20).then(|| percentile(&delta_p, 5.0)),
        delta_p_p25: percentile(&delta_p, 25.0),
        delta_p_median: percentile(&delta_p, 50.0),
        delta_p_p75: percentile(&delta_p, 75.0),
        delta_p_p95: (n >= 20).then(|| percentile(&delta_p, 95.0)),
        delta_p_p99: (n >= 100).then(|| percentile(&delta_p, 99.0)),
        delta_p_max: delta_p[n - 1],
        top1_agreement: tokens.mean(|pair| f64::from(u8::from(pair.same_top))),
        top1_agreement_stderr: stderr(&agreement),
        top1_agreement_interval: agreement,
        base_perplexity: tokens.mean(|pair| pair.base_nll).exp(),
        perplexity: tokens.mean(|pair| pair.nll).exp(),
        ln_ppl_ratio,
        ln_ppl_ratio_stderr: stderr(&ln_ratio),
        ln_ppl_ratio_interval: ln_ratio,
        ppl_ratio: ln_ppl_ratio.exp(),
        ppl_ratio_stderr: stderr(&ratio),
        ppl_ratio_interval: ratio,
        nll_correlation: correlation,
        nll_correlation_stderr: correlation.and_then(|r| stderr(&tokens.interval(tokens.correlation_influence(r)))),
        ..DivergenceResult::default()
    })
}

/// Pearson's correlation of the two NLLs; nothing where one does not vary.
fn correlation(pairs: &[TokenPair]) -> Option<f64> {
    let n = pairs.len() as f64;
    let mean = |of: fn(&TokenPair) -> f64| pairs.iter().map(of).sum::<f64>() / n;
    let (base_mean, own_mean) = (mean(|pair| pair.base_nll), mean(|pair| pair.nll));
    let (mut both, mut base, mut own) = (0.0, 0.0, 0.0);
    for pair in pairs {
        let (b, o) = (pair.base_nll - base_mean, pair.nll - own_mean);
        both += b * o;
        base += b * b;
        own += o * o;
    }
    let scale = base.sqrt() * own.sqrt();
    (scale > 0.0).then(|| (both / scale).clamp(-1.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(base_p: f64, p: f64, kl: f64, same_top: bool) -> TokenPair {
        TokenPair { base_nll: -base_p.ln(), nll: -p.ln(), kl, same_top }
    }

    #[test]
    fn figures_follow_their_formulae() {
        let pairs = [pair(0.5, 0.25, 0.1, true), pair(0.5, 0.5, 0.3, false), pair(0.25, 0.5, 0.2, true)];
        let found = divergence(&pairs, &[]).expect("statistics");
        let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(close(found.kl_mean, 0.2));
        assert_eq!((found.kl_median, found.kl_max, found.kl_min), (0.2, 0.3, 0.1));
        assert_eq!((found.kl_p95, found.kl_p99, found.kl_p99_9, found.kl_p90_stderr), (None, None, None, None));
        assert!(close(found.delta_p_mean, 0.0) && close(found.delta_p_rms, (0.125f64 / 3.0).sqrt()));
        assert!(close(found.top1_agreement, 2.0 / 3.0));
        assert!(close(found.ln_ppl_ratio, 0.0) && close(found.ppl_ratio, 1.0));
        assert!(close(found.base_perplexity, found.perplexity));
        // Deviations of ln 2 · (1/3, 1/3, -2/3) and (-2/3, 1/3, 1/3) swapped in place: r = -1/2.
        assert!(close(found.nll_correlation.expect("it varies"), -0.5));
        // Three tokens are no two blocks.
        assert_eq!((found.kl_mean_stderr, found.kl_mean_interval, found.nll_correlation_stderr), (None, None, None));
    }

    #[test]
    fn a_model_and_itself_agree_in_everything() {
        let pairs: Vec<TokenPair> =
            (0..2000).map(|i| pair(1.0 / f64::from(i % 200 + 1), 1.0 / f64::from(i % 200 + 1), 0.0, true)).collect();
        let found = divergence(&pairs, &[]).expect("statistics");
        assert_eq!((found.kl_mean, found.kl_p99, found.top1_agreement), (0.0, Some(0.0), 1.0));
        assert_eq!((found.ln_ppl_ratio, found.ln_ppl_ratio_stderr), (0.0, Some(0.0)));
        assert_eq!((found.delta_p_rms, found.delta_p_rms_stderr), (0.0, None));
        assert_eq!((found.top1_agreement_stderr, found.top1_agreement_interval), (None, None));
        assert!((found.nll_correlation.expect("it varies") - 1.0).abs() < 1e-12);
        assert_eq!(divergence(&[], &[]), None);
        assert_eq!(divergence(&pairs[..1], &[]).expect("statistics").nll_correlation, None);
    }

    #[test]
    fn intervals_of_alike_blocks_are_those_of_numpy() {
        // Ten documents of 130 tokens, KL i/10 in the i-th of [0, 9, 1, 8, …]: numpy: np.std(range(10), ddof=1)/√10/10 = 0.0957427.
        let levels = [0, 9, 1, 8, 2, 7, 3, 6, 4, 5];
        let pairs: Vec<TokenPair> =
            levels.iter().flat_map(|i| vec![pair(0.5, 0.25, f64::from(*i) / 10.0, *i != 0); 130]).collect();
        let document_idx: Vec<u32> = (0..10).flat_map(|i| vec![i; 130]).collect();
        let found = divergence(&pairs, &document_idx).expect("statistics");
        assert!((found.kl_mean_stderr.expect("an error") - 0.095_742_7).abs() < 1e-6);
        let agreement = found.top1_agreement_interval.expect("an interval");
        // np.std([0] + [1]*9, ddof=1)/√10 = 0.1; 0.9 + 2.262·0.1 is more than all.
        assert!((agreement.stderr - 0.1).abs() < 1e-9 && agreement.high == 1.0 && agreement.n_documents == 10);
        let ratio = found.ppl_ratio_interval.expect("an interval");
        assert!((ratio.value - 2.0).abs() < 1e-12 && (ratio.low - 2.0).abs() < 1e-9, "{ratio:?}");
    }

    #[test]
    fn series_of_figures_have_their_errors() {
        let mut normal = Normal(3);
        let pairs: Vec<TokenPair> = (0..4000)
            .map(|_| {
                let base_nll = normal.next().exp();
                let nll = base_nll * (1.0 + 0.2 * normal.next());
                TokenPair { base_nll, nll, kl: normal.next().exp(), same_top: normal.next() < 1.0 }
            })
            .collect();
        let row = divergence(&pairs, &[]).expect("statistics");
        let series = linear_figures(&pairs, &[]);
        for (name, value, stderr) in [
            ("kl_mean", row.kl_mean, row.kl_mean_stderr),
            ("kl_p90", row.kl_p90, row.kl_p90_stderr),
            ("delta_p_rms", row.delta_p_rms, row.delta_p_rms_stderr),
            ("top1_agreement", row.top1_agreement, row.top1_agreement_stderr),
            ("nll_correlation", row.nll_correlation.expect("it varies"), row.nll_correlation_stderr),
        ] {
            let (_, values) = series.iter().find(|(one, _)| *one == name).expect("a series");
            let found = mean_interval(&[values]).expect("an interval");
            let stderr = stderr.expect("an error");
            assert!((found.value - value).abs() < 0.01 * stderr, "{name}: {} and {value}", found.value);
            assert!((found.stderr / stderr - 1.0).abs() < 1e-6, "{name}: {} and {stderr}", found.stderr);
        }
        assert_eq!(series.len(), 14);
    }

    /// Numbers of a normal distribution: sums of twelve uniform ones less six.
    struct Normal(u64);

    impl Normal {
        fn next(&mut self) -> f64 {
            (0..12)
                .map(|_| {
                    self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (self.0 >> 11) as f64 / (1u64 << 53) as f64
                })
                .sum::<f64>()
                - 6.0
        }
    }

    #[test]
    fn standard_errors_are_the_spread_of_repeated_draws() {
        // Skewed NLL and KL that share a level for 50 tokens. The same process in numpy 2.4, 200 draws: spread of r 0.0084, of the median
        // 0.0036, of p90 0.018, of p99 0.088; (1 − r²)/√n would be 0.0020.
        let mut normal = Normal(7);
        let mut draw = || {
            let mut level = 0.0;
            let pairs: Vec<TokenPair> = (0..4000)
                .map(|i| {
                    if i % 50 == 0 {
                        level = 0.6 * normal.next();
                    }
                    let base_nll = 0.5 * (level + 0.8 * normal.next()).exp();
                    let nll = base_nll * (1.0 + 0.3 * normal.next());
                    TokenPair {
                        base_nll,
                        nll,
                        kl: 0.05 * (level + normal.next()).exp(),
                        same_top: normal.next() < level + 1.0,
                    }
                })
                .collect();
            divergence(&pairs, &[]).expect("statistics")
        };
        let draws: Vec<DivergenceResult> = (0..150).map(|_| draw()).collect();
        type Figure = fn(&DivergenceResult) -> (f64, Option<f64>);
        let figures: [(&str, Figure); 9] = [
            ("kl_mean", |row| (row.kl_mean, row.kl_mean_stderr)),
            ("kl_median", |row| (row.kl_median, row.kl_median_stderr)),
            ("kl_p90", |row| (row.kl_p90, row.kl_p90_stderr)),
            ("kl_p99", |row| (row.kl_p99.expect("enough"), row.kl_p99_stderr)),
            ("delta_p_mean", |row| (row.delta_p_mean, row.delta_p_mean_stderr)),
            ("delta_p_rms", |row| (row.delta_p_rms, row.delta_p_rms_stderr)),
            ("top1_agreement", |row| (row.top1_agreement, row.top1_agreement_stderr)),
            ("ppl_ratio", |row| (row.ppl_ratio, row.ppl_ratio_stderr)),
            ("nll_correlation", |row| (row.nll_correlation.expect("it varies"), row.nll_correlation_stderr)),
        ];
        for (name, figure) in figures {
            let (values, errors): (Vec<f64>, Vec<f64>) =
                draws.iter().map(figure).map(|(value, stderr)| (value, stderr.expect("an error"))).unzip();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let spread = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 149.0).sqrt();
            let told = (errors.iter().map(|error| error * error).sum::<f64>() / errors.len() as f64).sqrt();
            println!("{name}: spread {spread:.5}, standard error {told:.5}");
            assert!((0.75..1.33).contains(&(told / spread)), "{name}: spread {spread}, standard error {told}");
        }
    }
}
