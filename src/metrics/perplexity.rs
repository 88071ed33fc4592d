//! Perplexity: how a text is cut into windows, and how their negative log-likelihoods become one number.

use super::MetricsError;

/// How windows are laid and weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Convention {
    /// Hugging Face's strided windows, the NLL of every valid target weighted alike.
    HfStrided,
    /// The same windows, each window's mean NLL weighted by `trg_len`, as older transformers pages have it.
    HfStridedLegacy,
    /// `HfStrided` with a stride of `max_length`: windows that do not overlap.
    Disjoint,
}

impl Convention {
    pub const ALL: [Convention; 3] = [Convention::HfStrided, Convention::HfStridedLegacy, Convention::Disjoint];

    /// Names of all conventions, in the order of [`Convention::ALL`].
    pub const NAMES: &'static [&'static str] = &["hf-strided", "hf-strided-legacy", "disjoint"];

    /// Returns the name used in pipeline files and records.
    pub fn name(self) -> &'static str {
        match self {
            Convention::HfStrided => "hf-strided",
            Convention::HfStridedLegacy => "hf-strided-legacy",
            Convention::Disjoint => "disjoint",
        }
    }

    /// Returns the convention of that name.
    pub fn parse(name: &str) -> Option<Convention> {
        Convention::ALL.into_iter().find(|convention| convention.name() == name)
    }

    /// Returns the tokens between the starts of two windows: `stride`, or `max_length` where windows don't overlap.
    pub fn effective_stride(self, max_length: usize, stride: usize) -> usize {
        match self {
            Convention::HfStrided | Convention::HfStridedLegacy => stride,
            Convention::Disjoint => max_length,
        }
    }
}

/// One window of a text: run `tokens[begin..end]`, score its positions from `first_target` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Index of its first token in the text.
    pub begin: usize,
    /// One past its last token in the text.
    pub end: usize,
    /// First position that is scored, counted from `begin`; at least 1.
    pub first_target: usize,
    /// Tokens that no earlier window covers: the recipe's `trg_len`. One more than [`Window::n_targets`] where the
    /// window's first token is among them, which is never a target.
    pub trg_len: usize,
}

impl Window {
    /// Returns the number of tokens scored in this window.
    pub fn n_targets(&self) -> usize {
        self.end - self.begin - self.first_target
    }
}

/// Lays windows of `max_length` tokens that begin every `stride` tokens over a text of `n_tokens`, until its end.
///
/// In each window the targets are the tokens that no earlier window covers; its first token is never one. A last
/// window in which nothing is left to score is left out. `stride` is ignored by `disjoint`. A text shorter than
/// `max_length` is one short window ([`short_text_note`] says so). Source: "Perplexity of fixed-length models" in
/// the Hugging Face transformers documentation.
///
/// # Errors
/// `TextTooShort` below 2 tokens, `MaxLength` below 2, `Stride` outside of 1..=`max_length`.
pub fn windows(
    convention: Convention,
    n_tokens: usize,
    max_length: usize,
    stride: usize,
) -> Result<Vec<Window>, MetricsError> {
    let stride = convention.effective_stride(max_length, stride);
    if max_length < 2 {
        return Err(MetricsError::MaxLength { max_length });
    }
    if stride == 0 || stride > max_length {
        return Err(MetricsError::Stride { stride, max_length });
    }
    if n_tokens < 2 {
        return Err(MetricsError::TextTooShort { n_tokens });
    }
    let mut windows = Vec::new();
    let mut covered_end = 0;
    for begin in (0..n_tokens).step_by(stride) {
        let end = begin.saturating_add(max_length).min(n_tokens);
        let window = Window { begin, end, first_target: (covered_end - begin).max(1), trg_len: end - covered_end };
        if window.begin + window.first_target < window.end {
            windows.push(window);
        }
        covered_end = end;
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

/// What a text's windows add up to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    pub n_windows: usize,
    pub n_scored: usize,
    /// Mean negative log-likelihood in nats per token, weighted as the convention says.
    pub nll_mean: f64,
    /// e to the power of `nll_mean`.
    pub perplexity: f64,
    /// perplexity · √((mean(nll²) − mean(nll)²)/(n − 1)), both means over scored tokens.
    pub stderr: f64,
}

/// Adds up windows as they are scored. It keeps sums only.
#[derive(Debug, Clone)]
pub struct PerplexityAccumulator {
    convention: Convention,
    n_windows: usize,
    n_scored: usize,
    nll_sum: f64,
    nll_square_sum: f64,
    /// Σ over windows of mean NLL · trg_len.
    weighted_sum: f64,
    /// `end` of the last window.
    end: usize,
}

impl PerplexityAccumulator {
    pub fn new(convention: Convention) -> PerplexityAccumulator {
        PerplexityAccumulator {
            convention,
            n_windows: 0,
            n_scored: 0,
            nll_sum: 0.0,
            nll_square_sum: 0.0,
            weighted_sum: 0.0,
            end: 0,
        }
    }

    /// Adds a window and the NLL of each of its targets, in nats.
    ///
    /// # Errors
    /// `WindowScores` where there is not one value per target, `ScoreNotFinite`.
    pub fn push(&mut self, window: &Window, nlls: &[f64]) -> Result<(), MetricsError> {
        let expected = window.n_targets();
        if nlls.len() != expected || expected == 0 {
            return Err(MetricsError::WindowScores {
                begin: window.begin,
                end: window.end,
                expected,
                found: nlls.len(),
            });
        }
        if let Some((idx, &value)) = nlls.iter().enumerate().find(|(_, nll)| !nll.is_finite()) {
            return Err(MetricsError::ScoreNotFinite { token_idx: window.begin + window.first_target + idx, value });
        }
        let window_sum: f64 = nlls.iter().sum();
        self.n_windows += 1;
        self.n_scored += nlls.len();
        self.nll_sum += window_sum;
        self.nll_square_sum += nlls.iter().map(|nll| nll * nll).sum::<f64>();
        self.weighted_sum += window_sum / nlls.len() as f64 * window.trg_len as f64;
        self.end = window.end;
        Ok(())
    }

    /// Returns the perplexity of what was pushed.
    ///
    /// # Errors
    /// `TooFewScores` below 2 scored tokens, `PerplexityOverflow`.
    pub fn finish(&self) -> Result<Perplexity, MetricsError> {
        if self.n_scored < 2 {
            return Err(MetricsError::TooFewScores { n_scored: self.n_scored });
        }
        let n = self.n_scored as f64;
        let token_mean = self.nll_sum / n;
        let nll_mean = match self.convention {
            Convention::HfStrided | Convention::Disjoint => token_mean,
            Convention::HfStridedLegacy => self.weighted_sum / self.end as f64,
        };
        let perplexity = nll_mean.exp();
        if !perplexity.is_finite() {
            return Err(MetricsError::PerplexityOverflow { nll_mean });
        }
        let variance = (self.nll_square_sum / n - token_mean * token_mean).max(0.0);
        let stderr = perplexity * (variance / (n - 1.0)).sqrt();
        Ok(Perplexity { n_windows: self.n_windows, n_scored: self.n_scored, nll_mean, perplexity, stderr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn target_counts_equal_the_reference() {
        let text = include_str!("../../tests/fixtures/stories260k.json");
        let reference: serde_json::Value = serde_json::from_str(text).unwrap();
        let mut n_checked = 0;
        for name in ["tinystories_first_20000_chars", "wiki_first_20000_chars"] {
            let of_text = &reference["stories260K"][name];
            for row in of_text["strided"].as_array().unwrap() {
                let count = |field: &str| row[field].as_u64().unwrap() as usize;
                let (max_length, stride) = (count("max_length"), count("stride"));
                let laid = windows(Convention::HfStrided, count("n_tokens"), max_length, stride).unwrap();
                assert_eq!(laid.iter().map(Window::n_targets).sum::<usize>(), count("n_scored"));
                assert_eq!(laid.iter().map(|window| window.trg_len).sum::<usize>(), count("n_tokens"));
                n_checked += 1;
            }
        }
        assert_eq!(n_checked, 6);
    }

    #[test]
    fn legacy_weighting_counts_the_first_token_of_the_first_window() {
        // By hand: windows 0..4 (targets 1, 2, 3) and 2..5 (target 4): (mean(1, 2, 3) * 4 + 6 * 1) / 5.
        let laid = windows(Convention::HfStridedLegacy, 5, 4, 2).unwrap();
        assert_eq!(laid[0], Window { begin: 0, end: 4, first_target: 1, trg_len: 4 });
        assert_eq!(laid[1], Window { begin: 2, end: 5, first_target: 2, trg_len: 1 });
        let score = |convention| {
            let mut sum = PerplexityAccumulator::new(convention);
            sum.push(&laid[0], &[1.0, 2.0, 3.0]).unwrap();
            sum.push(&laid[1], &[6.0]).unwrap();
            sum.finish().unwrap()
        };
        assert!((score(Convention::HfStridedLegacy).nll_mean - 2.8).abs() < 1e-12);
        let by_token = score(Convention::HfStrided);
        assert_eq!((by_token.n_scored, by_token.n_windows, by_token.nll_mean), (4, 2, 3.0));
        // mean(nll²) = 12.5, variance 3.5, n - 1 = 3.
        assert!((by_token.stderr - 3f64.exp() * (3.5f64 / 3.0).sqrt()).abs() < 1e-9);
    }

    #[test]
    fn disjoint_windows_lose_one_token_each_and_a_last_single_token() {
        let laid = windows(Convention::Disjoint, 9, 4, 1).unwrap();
        assert_eq!(laid.len(), 2);
        assert!(laid.iter().all(|window| window.n_targets() == 3));
        let with_tail = windows(Convention::Disjoint, 10, 4, 1).unwrap();
        assert_eq!(with_tail[2], Window { begin: 8, end: 10, first_target: 1, trg_len: 2 });
    }

    #[test]
    fn a_text_shorter_than_a_window_is_one_short_window_and_that_is_said() {
        let laid = windows(Convention::HfStrided, 5, 512, 256).unwrap();
        assert_eq!(laid, [Window { begin: 0, end: 5, first_target: 1, trg_len: 5 }]);
        assert!(short_text_note(5, 512).unwrap().contains("one short window"));
        assert_eq!(short_text_note(512, 512), None);
    }

    #[test]
    fn unusable_windows_and_scores_are_errors() {
        assert_eq!(windows(Convention::HfStrided, 1, 8, 4), Err(MetricsError::TextTooShort { n_tokens: 1 }));
        assert_eq!(windows(Convention::HfStrided, 9, 8, 0), Err(MetricsError::Stride { stride: 0, max_length: 8 }));
        assert_eq!(windows(Convention::HfStrided, 9, 8, 9), Err(MetricsError::Stride { stride: 9, max_length: 8 }));
        assert_eq!(windows(Convention::Disjoint, 9, 1, 1), Err(MetricsError::MaxLength { max_length: 1 }));
        let window = windows(Convention::HfStrided, 3, 8, 4).unwrap()[0];
        let mut sum = PerplexityAccumulator::new(Convention::HfStrided);
        assert!(matches!(sum.push(&window, &[1.0]), Err(MetricsError::WindowScores { expected: 2, found: 1, .. })));
        assert!(matches!(sum.push(&window, &[1.0, f64::NAN]), Err(MetricsError::ScoreNotFinite { token_idx: 2, .. })));
        assert_eq!(sum.finish(), Err(MetricsError::TooFewScores { n_scored: 0 }));
        sum.push(&window, &[800.0, 800.0]).unwrap();
        assert!(matches!(sum.finish(), Err(MetricsError::PerplexityOverflow { .. })));
    }

    #[test]
    fn names_read_back() {
        for (convention, &name) in Convention::ALL.into_iter().zip(Convention::NAMES) {
            assert_eq!(convention.name(), name);
            assert_eq!(Convention::parse(name), Some(convention));
        }
        assert_eq!(Convention::parse("llama-cpp"), None);
    }

    proptest! {
        #[test]
        fn overlapping_windows_score_every_token_but_the_first_once(
            n_tokens in 2usize..400, max_length in 2usize..64, cut in 1usize..64,
        ) {
            let stride = (max_length - 1).min(cut);
            let laid = windows(Convention::HfStrided, n_tokens, max_length, stride).unwrap();
            let scored: Vec<usize> =
                laid.iter().flat_map(|window| window.begin + window.first_target..window.end).collect();
            prop_assert_eq!(scored, (1..n_tokens).collect::<Vec<_>>());
            prop_assert!(laid.iter().all(|window| window.end - window.begin <= max_length && window.first_target >= 1));
        }
    }
}
