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
    /// Disjoint chunks, the second half of each scored (llama.cpp's `llama-perplexity`).
    LlamaCpp,
    /// Rolling windows over each document (lm-evaluation-harness).
    LmEval,
}

/// Which windows a convention cuts. Conventions with the same cut are scored once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    Strided {
        max_length: usize,
        stride: usize,
    },
    /// Chunks of `n_ctx` tokens of which the second half is scored.
    Halves {
        n_ctx: usize,
    },
    /// Windows of up to `max_length` tokens that go on where the last one ended, over each document by itself.
    Rolling {
        max_length: usize,
    },
}

impl Cut {
    /// Returns a name for files: `strided-512-256`.
    pub fn name(self) -> String {
        match self {
            Cut::Strided { max_length, stride } => format!("strided-{max_length}-{stride}"),
            Cut::Halves { n_ctx } => format!("halves-{n_ctx}"),
            Cut::Rolling { max_length } => format!("rolling-{max_length}"),
        }
    }
}

impl Convention {
    const ALL: [Convention; 5] = [
        Convention::HfStrided,
        Convention::HfStridedLegacy,
        Convention::Disjoint,
        Convention::LlamaCpp,
        Convention::LmEval,
    ];
    pub const NAMES: [&'static str; 5] = ["hf-strided", "hf-strided-legacy", "disjoint", "llama-cpp", "lm-eval"];

    pub fn parse(name: &str) -> Option<Convention> {
        Convention::ALL.into_iter().find(|convention| convention.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Convention::HfStrided => "hf-strided",
            Convention::HfStridedLegacy => "hf-strided-legacy",
            Convention::Disjoint => "disjoint",
            Convention::LlamaCpp => "llama-cpp",
            Convention::LmEval => "lm-eval",
        }
    }

    /// Returns the windows it cuts; only `hf-strided` and its legacy have a stride of their own.
    pub fn cut(self, max_length: usize, stride: usize) -> Cut {
        match self {
            Convention::HfStrided | Convention::HfStridedLegacy => Cut::Strided { max_length, stride },
            Convention::Disjoint => Cut::Strided { max_length, stride: max_length },
            Convention::LlamaCpp => Cut::Halves { n_ctx: max_length },
            Convention::LmEval => Cut::Rolling { max_length },
        }
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

/// Returns llama.cpp's windows: disjoint chunks of `n_ctx` tokens, a rest left out; logits n_ctx/2 … n_ctx − 2 are scored.
///
/// # Errors
/// `TooFew` where there are fewer than two chunks, as llama.cpp refuses them; `TooShort` where a chunk has no second half.
pub fn half_windows(n_tokens: usize, n_ctx: usize) -> Result<Vec<Window>, MetricsError> {
    if n_ctx < 4 {
        return Err(MetricsError::TooShort { n_tokens: n_ctx });
    }
    if n_tokens < 2 * n_ctx {
        return Err(MetricsError::TooFew { n_tokens, n_ctx });
    }
    let chunk = |i: usize| Window { begin: i * n_ctx, end: (i + 1) * n_ctx, first_target: n_ctx / 2 + 1, n_new: n_ctx };
    Ok((0..n_tokens / n_ctx).map(chunk).collect())
}

/// Returns lm-evaluation-harness's windows over one document (`get_rolling_token_windows` with a context of 1, then
/// `make_disjoint_window`). The document begins with the prefix token at `begin` and has `n_tokens` tokens after it; each of
/// those is scored once, from at most `max_length` tokens. A window's slice is one longer: its last token is a target only.
pub fn rolling_windows(begin: usize, n_tokens: usize, max_length: usize) -> Vec<Window> {
    let max_length = max_length.max(1);
    let mut windows = Vec::new();
    for n_done in (0..n_tokens).step_by(max_length) {
        let n_new = max_length.min(n_tokens - n_done);
        // The first window is as long as its targets; later ones reach back so that their input is a whole context.
        let n_input = if n_done == 0 { n_new } else { max_length };
        let end = begin + n_done + n_new + 1;
        windows.push(Window { begin: end - n_input - 1, end, first_target: n_input + 1 - n_new, n_new });
    }
    windows
}

/// Words and bytes that lm-evaluation-harness divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TextUnits {
    /// Parts between runs of white space, counted as Python's `re.split(r"\s+", text)` does: an empty part at either end
    /// counts.
    pub n_words: usize,
    pub n_bytes: usize,
}

impl TextUnits {
    /// Counts a document.
    pub fn of(text: &str) -> TextUnits {
        // Python's \s also takes the four separators U+001C to U+001F.
        let is_space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
        let (mut n_runs, mut was_space) = (0, false);
        for c in text.chars() {
            let space = is_space(c);
            n_runs += usize::from(space && !was_space);
            was_space = space;
        }
        TextUnits { n_words: n_runs + 1, n_bytes: text.len() }
    }

    /// Returns the sum over documents.
    pub fn plus(self, other: TextUnits) -> TextUnits {
        TextUnits { n_words: self.n_words + other.n_words, n_bytes: self.n_bytes + other.n_bytes }
    }
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
            Convention::HfStrided | Convention::Disjoint | Convention::LlamaCpp | Convention::LmEval => {
                self.nll / self.n_scored as f64
            }
            Convention::HfStridedLegacy => self.legacy / self.n_new as f64,
        }
    }

    /// Returns the perplexity and its standard error as llama.cpp computes it, ppl·√((mean(nll²) − mean(nll)²)/(n − 1)), which takes tokens
    /// as independent. The perplexity is infinite above 709.78 nats per token; the error is None where [`PerplexitySum::nll_stderr`] is.
    pub fn perplexity(&self, convention: Convention) -> (f64, Option<f64>) {
        let perplexity = self.nll_mean(convention).exp();
        (perplexity, scaled(self.nll_stderr(), perplexity))
    }

    /// Returns the standard error of the mean NLL of independent tokens, in nats per token; None for a single token, and where an NLL is not finite.
    pub fn nll_stderr(&self) -> Option<f64> {
        let n = self.n_scored as f64;
        let variance = self.nll_squared / n - (self.nll / n).powi(2);
        // Rounding can leave a spread of nothing below 0.
        (self.n_scored > 1 && variance.is_finite()).then(|| (variance.max(0.0) / (n - 1.0)).sqrt())
    }

    /// Perplexity of another unit than the token: exp(ΣNLL/n_units).
    pub fn perplexity_per(&self, n_units: usize) -> f64 {
        (self.nll / n_units as f64).exp()
    }

    /// Bits per byte: ΣNLL/(n_bytes·ln 2).
    pub fn bits_per_byte(&self, n_bytes: usize) -> f64 {
        self.nll / (n_bytes as f64 * std::f64::consts::LN_2)
    }
}

/// Scales a standard error; None where infinity times nothing says nothing.
fn scaled(stderr: Option<f64>, factor: f64) -> Option<f64> {
    stderr.map(|stderr| stderr * factor).filter(|stderr| !stderr.is_nan())
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

    #[test]
    fn half_windows_equal_the_reference_counts() {
        let text = include_str!("../../tests/fixtures/stories260k.json");
        let reference: serde_json::Value = serde_json::from_str(text).expect("JSON");
        for (name, n_tokens) in [("tinystories_first_20000_chars", 9613), ("wiki_first_20000_chars", 12429)] {
            let row = &reference["stories260K"][name]["halves"][0];
            let windows = half_windows(n_tokens, 512).expect("windows");
            let n_scored: usize = windows.iter().map(|w| w.end - w.begin - w.first_target).sum();
            assert_eq!(Some(windows.len() as u64), row["chunks"].as_u64());
            assert_eq!(Some(n_scored as u64), row["n_scored"].as_u64());
        }
        assert!(half_windows(1023, 512).is_err() && half_windows(100, 3).is_err());
    }

    #[test]
    fn rolling_windows_equal_lm_evals() {
        let text = include_str!("../../tests/fixtures/lm_eval.json");
        let reference: serde_json::Value = serde_json::from_str(text).expect("JSON");
        for case in reference["windows"].as_array().expect("cases") {
            let size = |field: &str| case[field].as_u64().expect("a number") as usize;
            // The document as we hold it: the prefix -1, then the tokens 0, 1, 2, ….
            let tokens: Vec<i64> = (-1..size("n_tokens") as i64).collect();
            let found: Vec<(Vec<i64>, Vec<i64>)> = rolling_windows(0, size("n_tokens"), size("max_length"))
                .iter()
                .map(|w| {
                    let slice = &tokens[w.begin..w.end];
                    (slice[..w.first_target].to_vec(), slice[w.first_target..].to_vec())
                })
                .collect();
            let expected: Vec<(Vec<i64>, Vec<i64>)> =
                serde_json::from_value(case["pairs"].clone()).expect("pairs of lists");
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn words_are_counted_as_python_splits_them() {
        let text = include_str!("../../tests/fixtures/lm_eval.json");
        let reference: serde_json::Value = serde_json::from_str(text).expect("JSON");
        let cases = reference["words"].as_array().expect("cases");
        assert!(cases.len() > 5);
        for case in cases {
            let units = TextUnits::of(case["text"].as_str().expect("a text"));
            assert_eq!(Some(units.n_words as u64), case["n_words"].as_u64(), "{case}");
            assert_eq!(Some(units.n_bytes as u64), case["n_bytes"].as_u64(), "{case}");
        }
    }

    #[test]
    fn other_units_follow_their_formulae() {
        let mut sum = PerplexitySum::default();
        sum.push(&Window { begin: 0, end: 5, first_target: 1, n_new: 5 }, &[1.0, 2.0, 3.0, 6.0]);
        assert!((sum.perplexity_per(2) - 6f64.exp()).abs() < 1e-9);
        // The standard deviation of the four with n - 1, over √4.
        let stderr = (14.0f64 / 3.0).sqrt() / 2.0;
        assert!((sum.nll_stderr().expect("an error") - stderr).abs() < 1e-12);
        assert!((sum.bits_per_byte(10) - 1.2 / std::f64::consts::LN_2).abs() < 1e-12);
    }

    #[test]
    fn one_token_has_no_spread_and_huge_nlls_keep_their_mean() {
        let sum_of = |nlls: &[f64]| {
            let mut sum = PerplexitySum::default();
            sum.push(&Window { begin: 0, end: nlls.len() + 1, first_target: 1, n_new: nlls.len() + 1 }, nlls);
            sum
        };
        let one = sum_of(&[2.0]);
        assert_eq!(one.perplexity(Convention::HfStrided), (2f64.exp(), None));
        assert_eq!(one.nll_stderr(), None);
        // Twice the same: a spread that was measured, and is 0.
        assert_eq!(sum_of(&[2.0, 2.0]).perplexity(Convention::HfStrided).1, Some(0.0));
        let huge = sum_of(&[12_000.0, 13_000.0]);
        assert_eq!(huge.nll_mean(Convention::HfStrided), 12_500.0);
        assert_eq!(huge.nll_stderr(), Some(500.0));
        assert_eq!(huge.perplexity(Convention::HfStrided), (f64::INFINITY, Some(f64::INFINITY)));
        assert_eq!(sum_of(&[800.0, 800.0]).perplexity(Convention::HfStrided), (f64::INFINITY, None));
        assert_eq!(sum_of(&[1.0, f64::INFINITY]).nll_stderr(), None);
    }
}
