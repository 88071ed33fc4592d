//! How far a model's distributions are from its base's, over the scored tokens of a text.

use super::statistics::{mean_and_stderr, percentile, quantile_stderr};
use crate::artifact::DivergenceResult;

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

/// Returns the statistics of all tokens; nothing for none. Tokens count as independent of one another. Convention, windows
/// and what was kept of the base are the caller's to fill in.
pub fn divergence(pairs: &[TokenPair]) -> Option<DivergenceResult> {
    if pairs.is_empty() {
        return None;
    }
    let n = pairs.len();
    let sorted = |of: &dyn Fn(&TokenPair) -> f64| {
        let mut values: Vec<f64> = pairs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let kl = sorted(&|pair| pair.kl);
    let delta_p = sorted(&TokenPair::delta_p);
    let (kl_mean, kl_mean_stderr) = mean_and_stderr(&kl);
    let (delta_p_mean, delta_p_mean_stderr) = mean_and_stderr(&delta_p);
    let (mean_square, mean_square_stderr) = mean_and_stderr(&delta_p.iter().map(|d| d * d).collect::<Vec<_>>());
    let rms = mean_square.sqrt();
    let (agreement, agreement_stderr) =
        mean_and_stderr(&pairs.iter().map(|pair| f64::from(u8::from(pair.same_top))).collect::<Vec<_>>());
    let (ln_ratio, ln_ratio_stderr) =
        mean_and_stderr(&pairs.iter().map(|pair| pair.nll - pair.base_nll).collect::<Vec<_>>());
    let correlation = correlation(pairs);
    let kl_tail = |p: f64, n_needed: usize| (n >= n_needed).then(|| percentile(&kl, p));
    Some(DivergenceResult {
        n_scored: n,
        kl_mean,
        kl_mean_stderr,
        kl_median: percentile(&kl, 50.0),
        kl_median_stderr: quantile_stderr(&kl, 50.0),
        kl_p90: percentile(&kl, 90.0),
        kl_p90_stderr: quantile_stderr(&kl, 90.0),
        kl_p95: kl_tail(95.0, 20),
        kl_p95_stderr: quantile_stderr(&kl, 95.0),
        kl_p99: kl_tail(99.0, 100),
        kl_p99_stderr: quantile_stderr(&kl, 99.0),
        kl_p99_9: kl_tail(99.9, 1000),
        kl_p99_9_stderr: quantile_stderr(&kl, 99.9).filter(|_| n >= 1000),
        kl_max: kl[n - 1],
        kl_min: kl[0],
        delta_p_mean,
        delta_p_mean_stderr,
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
        top1_agreement: agreement,
        top1_agreement_stderr: agreement_stderr,
        base_perplexity: (pairs.iter().map(|pair| pair.base_nll).sum::<f64>() / n as f64).exp(),
        perplexity: (pairs.iter().map(|pair| pair.nll).sum::<f64>() / n as f64).exp(),
        ln_ppl_ratio: ln_ratio,
        ln_ppl_ratio_stderr: ln_ratio_stderr,
        ppl_ratio: ln_ratio.exp(),
        ppl_ratio_stderr: ln_ratio_stderr.map(|stderr| stderr * ln_ratio.exp()),
        nll_correlation: correlation,
        // Asymptotic for a normal pair: (1 − r²)/√(n − 1).
        nll_correlation_stderr: correlation.filter(|_| n > 2).map(|r| (1.0 - r * r) / (n as f64 - 1.0).sqrt()),
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
        let found = divergence(&pairs).expect("statistics");
        let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(close(found.kl_mean, 0.2) && close(found.kl_mean_stderr.expect("an error"), 0.1 / 3f64.sqrt()));
        assert_eq!((found.kl_median, found.kl_max, found.kl_min), (0.2, 0.3, 0.1));
        assert_eq!((found.kl_p95, found.kl_p99, found.kl_p99_9, found.kl_p90_stderr), (None, None, None, None));
        assert!(close(found.delta_p_mean, 0.0) && close(found.delta_p_rms, (0.125f64 / 3.0).sqrt()));
        assert!(close(found.top1_agreement, 2.0 / 3.0));
        assert!(close(found.top1_agreement_stderr.expect("an error"), (2.0f64 / 9.0 / 2.0).sqrt()));
        assert!(close(found.ln_ppl_ratio, 0.0) && close(found.ppl_ratio, 1.0));
        assert!(close(found.base_perplexity, found.perplexity));
        // Deviations of ln 2 · (1/3, 1/3, -2/3) and (-2/3, 1/3, 1/3) swapped in place: r = -1/2.
        assert!(close(found.nll_correlation.expect("it varies"), -0.5));
    }

    #[test]
    fn a_model_and_itself_agree_in_everything() {
        let pairs: Vec<TokenPair> =
            (1..=200).map(|i| pair(1.0 / f64::from(i), 1.0 / f64::from(i), 0.0, true)).collect();
        let found = divergence(&pairs).expect("statistics");
        assert_eq!((found.kl_mean, found.kl_p99, found.top1_agreement), (0.0, Some(0.0), 1.0));
        assert_eq!((found.ln_ppl_ratio, found.ln_ppl_ratio_stderr), (0.0, Some(0.0)));
        assert_eq!((found.delta_p_rms, found.delta_p_rms_stderr), (0.0, None));
        assert!((found.nll_correlation.expect("it varies") - 1.0).abs() < 1e-12);
        assert_eq!(divergence(&[]), None);
        assert_eq!(divergence(&pairs[..1]).expect("statistics").nll_correlation, None);
    }
}
