//! Perplexity: which tokens are scored in which windows, and how their log-likelihoods are put together.

use super::MetricsError;

/// A way to cut a text into windows and to weight them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convention {
    /// Overlapping windows; NLL summed over valid targets, divided by their number (Hugging Face, current).
    HfStrided,
    /// The same windows; each window's mean weighted by its new tokens, divided by the number of tokens (Hugging Face's
    /// older page, and many published numbers).
    HfStridedLegacy,
    /// `HfStrided` with stride = max_length.
    Disjoint,
}

impl Convention {
    pub const NAMES: [&'static str; 3] = ["hf-strided", "hf-strided-legacy", "disjoint"];

    pub fn parse(name: &str) -> Option<Convention> {
        [Convention::HfStrided, Convention::HfStridedLegacy, Convention::Disjoint]
            .into_iter()
            .find(|c| c.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Convention::HfStrided => "hf-strided",
            Convention::HfStridedLegacy => "hf-strided-legacy",
            Convention::Disjoint => "disjoint",
        }
    }

    /// Returns the stride that is used: `disjoint` has its own.
    pub fn stride(self, stride: usize, max_length: usize) -> usize {
        if self == Convention::Disjoint { max_length } else { stride }
    }
}

/// Tokens `begin..end`, of which those from `first_target` on (an index within the window, at least 1) are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub begin: usize,
    pub end: usize,
    pub first_target: usize,
    /// Tokens that no earlier window held: the legacy weighting's `trg_len`.
    pub n_new: usize,
}

/// Returns the windows over a text of `n_tokens`. A last window of one new token that is its first, and therefore never a
/// target, is left out: it has nothing to score.
///
/// # Errors
/// `TooShort`, `Stride`.
pub fn windows(n_tokens: usize, max_length: usize, stride: usize) -> Result<Vec<Window>, MetricsError> {
    if n_tokens < 2 || max_length < 2 {
        return Err(MetricsError::TooShort { n_tokens: n_tokens.min(max_length) });
    }
    if stride == 0 || stride > max_length {
        return Err(MetricsError::Stride { stride, max_length });
    }
    let mut windows = Vec::new();
    let mut previous_end = 0;
    for begin in (0..n_tokens).step_by(stride) {
        let end = (begin + max_length).min(n_tokens);
        let first_target = (previous_end - begin).max(1);
        if begin + first_target < end {
            windows.push(Window { begin, end, first_target, n_new: end - previous_end });
        }
        previous_end = end;
        if end == n_tokens {
            break;
        }
    }
    Ok(windows)
}

/// Returns what to tell the user where a text does not fill one window: its perplexity is that of a shorter context.
pub fn short_text_note(n_tokens: usize, max_length: usize) -> Option<String> {
    (n_tokens < max_length).then(|| {
        format!(
            "the text has {n_tokens} tokens, fewer than one window of {max_length}: it is scored as one short window"
        )
    })
}

/// Puts windows' log-likelihoods together.
#[derive(Debug, Clone, Default)]
pub struct PerplexitySum {
    n_scored: usize,
    nll: f64,
    nll_squared: f64,
    legacy: f64,
    n_new: usize,
}

impl PerplexitySum {
    /// Adds a window's negative log-likelihoods, in nats.
    pub fn push(&mut self, window: &Window, nlls: &[f64]) {
        let sum: f64 = nlls.iter().sum();
        self.n_scored += nlls.len();
        self.nll += sum;
        self.nll_squared += nlls.iter().map(|nll| nll * nll).sum::<f64>();
        if !nlls.is_empty() {
            self.legacy += sum / nlls.len() as f64 * window.n_new as f64;
        }
        self.n_new += window.n_new;
    }

    pub fn n_scored(&self) -> usize {
        self.n_scored
    }

    /// Mean NLL in nats per token, as the convention weights it.
    pub fn nll_mean(&self, convention: Convention) -> f64 {
        match convention {
            Convention::HfStrided | Convention::Disjoint => self.nll / self.n_scored as f64,
            Convention::HfStridedLegacy => self.legacy / self.n_new as f64,
        }
    }

    /// Perplexity and its standard error, ppl·√((mean(nll²) − mean(nll)²)/(n − 1)).
    pub fn perplexity(&self, convention: Convention) -> (f64, f64) {
        let perplexity = self.nll_mean(convention).exp();
        let n = self.n_scored as f64;
        let variance = (self.nll_squared / n - (self.nll / n).powi(2)).max(0.0);
        (perplexity, perplexity * (variance / (n - 1.0).max(1.0)).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_score_every_token_but_the_first_exactly_once() {
        for (n, max_length, stride) in [(9613, 512, 256), (700, 512, 512), (100, 512, 256), (513, 512, 512), (7, 3, 1)]
        {
            let windows = windows(n, max_length, stride).expect("windows");
            let scored: usize = windows.iter().map(|w| w.end - w.begin - w.first_target).sum();
            let lost = windows.iter().filter(|w| w.first_target == 1 && w.n_new == w.end - w.begin).count();
            let end = windows.last().expect("a window").end;
            assert_eq!(scored, end - lost, "{n} {max_length} {stride}");
            assert_eq!(windows.iter().map(|w| w.n_new).sum::<usize>(), end);
            assert!(end == n || (n, max_length, stride) == (513, 512, 512));
        }
        assert_eq!(windows(9613, 512, 256).expect("windows").len(), 37);
    }

    #[test]
    fn target_counts_equal_the_reference() {
        let text = include_str!("../../tests/fixtures/stories260k.json");
        let reference: serde_json::Value = serde_json::from_str(text).expect("JSON");
        let mut n_checked = 0;
        for name in ["tinystories_first_20000_chars", "wiki_first_20000_chars"] {
            for row in reference["stories260K"][name]["strided"].as_array().expect("rows") {
                let count = |field: &str| row[field].as_u64().expect("a count") as usize;
                let windows = windows(count("n_tokens"), count("max_length"), count("stride")).expect("windows");
                let n_scored: usize = windows.iter().map(|w| w.end - w.begin - w.first_target).sum();
                assert_eq!(n_scored, count("n_scored"));
                n_checked += 1;
            }
        }
        assert_eq!(n_checked, 6);
    }

    #[test]
    fn every_window_has_something_to_score() {
        for n_tokens in 2..60 {
            for max_length in 2..12 {
                for stride in 1..=max_length {
                    let windows = windows(n_tokens, max_length, stride).expect("windows");
                    let has_targets = |w: &Window| w.first_target >= 1 && w.begin + w.first_target < w.end;
                    assert!(!windows.is_empty() && windows.iter().all(has_targets));
                    assert!(windows.iter().all(|w| w.end - w.begin <= max_length));
                }
            }
        }
    }

    #[test]
    fn too_short_texts_and_bad_strides_are_errors() {
        assert!(windows(1, 512, 256).is_err());
        assert!(windows(100, 512, 513).is_err());
        assert!(windows(100, 512, 0).is_err());
    }

    #[test]
    fn the_legacy_weighting_counts_the_first_window_s_first_token() {
        let window = Window { begin: 0, end: 3, first_target: 1, n_new: 3 };
        let mut sum = PerplexitySum::default();
        sum.push(&window, &[1.0, 3.0]);
        sum.push(&Window { begin: 1, end: 4, first_target: 2, n_new: 1 }, &[5.0]);
        assert_eq!(sum.nll_mean(Convention::HfStrided), 3.0);
        assert_eq!(sum.nll_mean(Convention::HfStridedLegacy), (2.0 * 3.0 + 5.0) / 4.0);
    }
}
