//! Log-likelihoods from logits, on the host, in f64.

use crate::inference::{InferenceError, TokenScore};
use rayon::prelude::*;

/// Scores one target a row.
///
/// # Shapes
/// `logits` `[targets.len(), vocab_size]`, row-major.
///
/// # Errors
/// `NotFiniteResult` where a row holds NaN.
pub fn score_rows(logits: &[f32], vocab_size: usize, targets: &[u32]) -> Result<Vec<TokenScore>, InferenceError> {
    logits
        .par_chunks_exact(vocab_size)
        .zip(targets.par_iter())
        .map(|(row, target)| score_row(row, *target))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| InferenceError::NotFiniteResult { what: "logits".to_owned() })
}

fn score_row(row: &[f32], target: u32) -> Option<TokenScore> {
    let argmax = argmax(row)?;
    let max = row[argmax as usize];
    let sum: f64 = row.iter().map(|logit| f64::from((logit - max).exp())).sum();
    let nll = sum.ln() - f64::from(row[target as usize] - max);
    nll.is_finite().then_some(TokenScore { nll, argmax })
}

/// Returns the index of the largest value, the first of equals; nothing where a value is NaN or the row is empty.
pub fn argmax(row: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (index, &value) in row.iter().enumerate() {
        if value.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, largest)| value > largest) {
            best = Some((index, value));
        }
    }
    best.filter(|(_, value)| value.is_finite()).and_then(|(index, _)| u32::try_from(index).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_negative_log_softmax() {
        let logits = [1.0f32, 2.0, 3.0, 0.0, 0.0, 0.0];
        let scores = score_rows(&logits, 3, &[0, 2]).expect("scores");
        let expected = (1f64.exp() + 2f64.exp() + 3f64.exp()).ln() - 1.0;
        assert!((scores[0].nll - expected).abs() < 1e-6);
        assert!((scores[1].nll - 3f64.ln()).abs() < 1e-6);
        assert_eq!(scores[0].argmax, 2);
    }

    #[test]
    fn nan_logits_are_an_error() {
        assert!(score_rows(&[1.0, f32::NAN], 2, &[0]).is_err());
        assert_eq!(argmax(&[]), None);
    }
}
