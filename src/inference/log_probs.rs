//! A base model's log-probabilities as they are kept and compared: packed rows, and the host's arithmetic on them in f64.
//!
//! An engine whose logits are on a device packs and compares there; the functions here are what its results must equal.

use super::{DivergenceScore, InferenceError, TokenScore};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How much of a base model's distribution is kept a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogProbFormat {
    /// ln p of the whole vocabulary: 4 bytes an entry.
    F32,
    /// max ln p − ln p of the whole vocabulary in f16: 2 bytes an entry; made to sum to 1 again when read.
    F16,
    /// The k likeliest tokens, 8 bytes each, and the mass of all others, 4 bytes.
    TopK(usize),
}

impl LogProbFormat {
    /// Returns the name used in pipeline files and records.
    pub fn name(self) -> &'static str {
        match self {
            LogProbFormat::F32 => "f32",
            LogProbFormat::F16 => "f16",
            LogProbFormat::TopK(_) => "top-k",
        }
    }

    /// Returns the bytes that one position takes before compression.
    pub fn bytes_per_token(self, vocab_size: usize) -> u64 {
        let bytes = match self {
            LogProbFormat::F32 => 4 * vocab_size,
            LogProbFormat::F16 => 2 * vocab_size,
            LogProbFormat::TopK(k) => 8 * k.min(vocab_size) + 4,
        };
        bytes as u64
    }
}

/// Log-probabilities (in nats) of consecutive positions, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum LogProbRows {
    /// ln p, `[n_rows, vocab_size]`.
    F32(Vec<f32>),
    /// max ln p − ln p, `[n_rows, vocab_size]`: ≥ 0, 0 at the likeliest token.
    F16(Vec<f16>),
    /// Likeliest first: `ids` and `log_probs` `[n_rows, k]`, `tail` (probability of all other tokens together) `[n_rows]`.
    TopK { k: usize, ids: Vec<u32>, log_probs: Vec<f32>, tail: Vec<f32> },
}

impl LogProbRows {
    /// Returns no rows yet, of that format.
    pub fn empty(format: LogProbFormat) -> LogProbRows {
        match format {
            LogProbFormat::F32 => LogProbRows::F32(Vec::new()),
            LogProbFormat::F16 => LogProbRows::F16(Vec::new()),
            LogProbFormat::TopK(k) => LogProbRows::TopK { k, ids: Vec::new(), log_probs: Vec::new(), tail: Vec::new() },
        }
    }

    /// Returns the number of rows.
    pub fn n_rows(&self, vocab_size: usize) -> usize {
        match self {
            LogProbRows::F32(values) => values.len() / vocab_size.max(1),
            LogProbRows::F16(values) => values.len() / vocab_size.max(1),
            LogProbRows::TopK { tail, .. } => tail.len(),
        }
    }

    /// Packs logits on the host.
    ///
    /// # Shapes
    /// `logits` `[n_rows, vocab_size]`, row-major.
    ///
    /// # Errors
    /// `NotFiniteResult` where a row has no finite maximum or holds NaN.
    pub fn pack(format: LogProbFormat, logits: &[f32], vocab_size: usize) -> Result<LogProbRows, InferenceError> {
        let sums: Vec<Normalizer> = logits
            .par_chunks_exact(vocab_size)
            .map(Normalizer::of)
            .collect::<Option<Vec<_>>>()
            .ok_or_else(not_finite)?;
        let rows = logits.par_chunks_exact(vocab_size).zip(sums.par_iter());
        Ok(match format {
            LogProbFormat::F32 => {
                let mut packed = vec![0f32; logits.len()];
                let out = packed.par_chunks_exact_mut(vocab_size);
                rows.zip(out).for_each(|((row, sum), out)| {
                    for (out, logit) in out.iter_mut().zip(row) {
                        *out = sum.log_prob(*logit) as f32;
                    }
                });
                LogProbRows::F32(packed)
            }
            LogProbFormat::F16 => {
                let mut packed = vec![f16::ZERO; logits.len()];
                let out = packed.par_chunks_exact_mut(vocab_size);
                rows.zip(out).for_each(|((row, sum), out)| {
                    for (out, logit) in out.iter_mut().zip(row) {
                        *out = f16::from_f32(sum.max - *logit);
                    }
                });
                LogProbRows::F16(packed)
            }
            LogProbFormat::TopK(k) => {
                let k = k.clamp(1, vocab_size);
                let kept: Vec<(Vec<u32>, Vec<f32>, f32)> = rows.map(|(row, sum)| top_k(row, sum, k)).collect();
                let (mut ids, mut log_probs, mut tail) = (Vec::new(), Vec::new(), Vec::new());
                for (row_ids, row_log_probs, row_tail) in kept {
                    ids.extend(row_ids);
                    log_probs.extend(row_log_probs);
                    tail.push(row_tail);
                }
                LogProbRows::TopK { k, ids, log_probs, tail }
            }
        })
    }
}

/// Takes packed rows in the order of their positions.
pub trait LogProbSink {
    /// # Errors
    /// Whatever kept it from storing them, in words; scoring stops and returns it.
    fn take(&mut self, rows: LogProbRows) -> Result<(), String>;
}

/// Gives packed rows back in the order in which they were taken.
pub trait LogProbSource {
    /// Returns the next `n_rows` rows, all of them.
    ///
    /// # Errors
    /// Where there are fewer, or they can't be read, in words.
    fn next_rows(&mut self, n_rows: usize) -> Result<LogProbRows, String>;
}

/// Scores one target a row.
///
/// # Shapes
/// `logits` `[targets.len(), vocab_size]`, row-major.
///
/// # Errors
/// `NotFiniteResult` where a row has no finite maximum or holds NaN.
pub fn score_logits(logits: &[f32], vocab_size: usize, targets: &[u32]) -> Result<Vec<TokenScore>, InferenceError> {
    logits
        .par_chunks_exact(vocab_size)
        .zip(targets.par_iter())
        .map(|(row, target)| Some(Normalizer::of(row)?.score(row, *target)))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(not_finite)
}

/// Scores one target a row, and the distance of the whole row from the base's.
///
/// # Shapes
/// `logits` `[targets.len(), vocab_size]`, row-major; `base` as many rows over the same vocabulary.
///
/// # Errors
/// `NotFiniteResult` as [`score_logits`]; `Sink` where `base` has other rows.
pub fn diverge_logits(
    logits: &[f32],
    vocab_size: usize,
    targets: &[u32],
    base: &LogProbRows,
) -> Result<Vec<DivergenceScore>, InferenceError> {
    if base.n_rows(vocab_size) != targets.len() {
        let reason = format!("the base has {} rows where {} are scored", base.n_rows(vocab_size), targets.len());
        return Err(InferenceError::Sink(reason));
    }
    if let LogProbRows::TopK { ids, .. } = base
        && let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size)
    {
        return Err(InferenceError::Sink(format!("the base names token {id} of a vocabulary of {vocab_size}")));
    }
    logits
        .par_chunks_exact(vocab_size)
        .zip(targets.par_iter())
        .enumerate()
        .map(|(row_idx, (row, target))| {
            let sum = Normalizer::of(row)?;
            let score = sum.score(row, *target);
            let kl = divergence(base, row_idx, row, &sum);
            kl.is_finite().then_some(DivergenceScore { nll: score.nll, argmax: score.argmax, kl })
        })
        .collect::<Option<Vec<_>>>()
        .ok_or_else(not_finite)
}

fn not_finite() -> InferenceError {
    InferenceError::NotFiniteResult { what: "logits".to_owned() }
}

/// What turns a row's logits into log-probabilities.
struct Normalizer {
    argmax: u32,
    max: f32,
    /// ln Σ exp(logit − max).
    ln_sum: f64,
}

impl Normalizer {
    fn of(row: &[f32]) -> Option<Normalizer> {
        let argmax = argmax(row)?;
        let max = row[argmax as usize];
        let sum: f64 = row.iter().map(|logit| f64::from(logit - max).exp()).sum();
        Some(Normalizer { argmax, max, ln_sum: sum.ln() })
    }

    fn log_prob(&self, logit: f32) -> f64 {
        f64::from(logit - self.max) - self.ln_sum
    }

    fn score(&self, row: &[f32], target: u32) -> TokenScore {
        TokenScore { nll: -self.log_prob(row[target as usize]), argmax: self.argmax }
    }
}

/// Returns KL(base ‖ row) in nats. What is kept of the base is taken as it is: probabilities that were rounded are made to
/// sum to 1 first, so that the result is a divergence (≥ 0) whatever was lost.
fn divergence(base: &LogProbRows, row_idx: usize, row: &[f32], sum: &Normalizer) -> f64 {
    let span = row_idx * row.len()..(row_idx + 1) * row.len();
    match base {
        LogProbRows::F32(values) => whole(values[span].iter().map(|value| f64::from(*value)), row, sum),
        LogProbRows::F16(values) => whole(values[span].iter().map(|value| -f64::from(value.to_f32())), row, sum),
        LogProbRows::TopK { k, ids, log_probs, tail } => {
            let span = row_idx * k..(row_idx + 1) * k;
            let tail = f64::from(tail[row_idx]);
            let kept: f64 = log_probs[span.clone()].iter().map(|value| f64::from(*value).exp()).sum();
            let total = kept + tail;
            let (mut kl, mut candidate_kept) = (0.0, 0.0);
            for (id, log_prob) in ids[span.clone()].iter().zip(&log_probs[span]) {
                let log_prob = f64::from(*log_prob) - total.ln();
                let candidate = sum.log_prob(row[*id as usize]);
                kl += log_prob.exp() * (log_prob - candidate);
                candidate_kept += candidate.exp();
            }
            let (tail, candidate_tail) = (tail / total, (1.0 - candidate_kept).max(f64::MIN_POSITIVE));
            if tail > 0.0 { kl + tail * (tail / candidate_tail).ln() } else { kl }
        }
    }
}

/// KL over the whole vocabulary, `log_weights` being ln p of the base up to a constant: with w = exp(log_weights) and
/// W = Σw, Σ (w/W)·(ln w − ln W − ln q).
fn whole(log_weights: impl Iterator<Item = f64>, row: &[f32], sum: &Normalizer) -> f64 {
    let (mut total, mut weighted) = (0.0, 0.0);
    for (log_weight, logit) in log_weights.zip(row) {
        let weight = log_weight.exp();
        if weight > 0.0 {
            total += weight;
            weighted += weight * (log_weight - f64::from(logit - sum.max));
        }
    }
    weighted / total - total.ln() + sum.ln_sum
}

fn top_k(row: &[f32], sum: &Normalizer, k: usize) -> (Vec<u32>, Vec<f32>, f32) {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let likelier = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, likelier);
    }
    let tail: f64 = order[k..].iter().map(|id| sum.log_prob(row[*id as usize]).exp()).sum();
    order.truncate(k);
    order.sort_unstable_by(likelier);
    let log_probs = order.iter().map(|id| sum.log_prob(row[*id as usize]) as f32).collect();
    (order, log_probs, tail as f32)
}

/// Returns the index of the largest value, the first of equals; nothing where a value is NaN, the largest is not finite, or
/// the row is empty.
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
    use proptest::prelude::*;

    /// Σ p (ln p − ln q), straight from the definition.
    fn exact(base: &[f32], candidate: &[f32]) -> f64 {
        let softmax = |row: &[f32]| {
            let total: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
            row.iter().map(|v| f64::from(*v).exp() / total).collect::<Vec<f64>>()
        };
        softmax(base).iter().zip(softmax(candidate)).map(|(p, q)| p * (p.ln() - q.ln())).sum()
    }

    fn kl(format: LogProbFormat, base: &[f32], candidate: &[f32]) -> f64 {
        let packed = LogProbRows::pack(format, base, base.len()).expect("finite logits");
        diverge_logits(candidate, candidate.len(), &[0], &packed).expect("finite logits")[0].kl
    }

    #[test]
    fn scores_are_negative_log_softmax() {
        let logits = [1.0f32, 2.0, 3.0, 0.0, 0.0, 0.0];
        let scores = score_logits(&logits, 3, &[0, 2]).expect("scores");
        let expected = (1f64.exp() + 2f64.exp() + 3f64.exp()).ln() - 1.0;
        assert!((scores[0].nll - expected).abs() < 1e-12);
        assert!((scores[1].nll - 3f64.ln()).abs() < 1e-12);
        assert_eq!(scores[0].argmax, 2);
    }

    #[test]
    fn nan_and_infinite_logits_are_errors() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(score_logits(&[1.0, bad], 2, &[0]).is_err());
            assert!(LogProbRows::pack(LogProbFormat::F16, &[1.0, bad], 2).is_err());
        }
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn rows_that_do_not_match_are_errors() {
        let base = LogProbRows::pack(LogProbFormat::F32, &[0.0; 8], 4).expect("rows");
        assert!(diverge_logits(&[0.0; 4], 4, &[1], &base).is_err());
        let foreign = LogProbRows::TopK { k: 1, ids: vec![9], log_probs: vec![0.0], tail: vec![0.0] };
        assert!(diverge_logits(&[0.0; 4], 4, &[1], &foreign).is_err());
    }

    #[test]
    fn a_model_does_not_diverge_from_itself() {
        let row: Vec<f32> = (0..300).map(|i| ((i * 37) % 101) as f32 / 7.0).collect();
        assert!(kl(LogProbFormat::F32, &row, &row).abs() < 1e-7);
        assert!((0.0..1e-6).contains(&kl(LogProbFormat::F16, &row, &row)));
        assert!(kl(LogProbFormat::TopK(8), &row, &row).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn every_format_gives_the_divergence_it_promises(
            rows in prop::collection::vec((-12f32..12.0, -12f32..12.0), 2..200), k in 1usize..32
        ) {
            let (base, candidate): (Vec<f32>, Vec<f32>) = rows.into_iter().unzip();
            let expected = exact(&base, &candidate);
            prop_assert!((kl(LogProbFormat::F32, &base, &candidate) - expected).abs() < 1e-5 * (1.0 + expected));
            // ln p to 11 bits: what is left of the error after normalizing is proportional to ln(p/q).
            let half = kl(LogProbFormat::F16, &base, &candidate);
            prop_assert!(half > -1e-12 && (half - expected).abs() < 2e-2 * (1.0 + expected), "{half} {expected}");
            // Merging tokens into a tail loses information, never adds any (the log sum inequality).
            let merged = kl(LogProbFormat::TopK(k), &base, &candidate);
            prop_assert!(merged > -1e-6 && merged < expected + 1e-5 * (1.0 + expected), "{merged} {expected}");
        }

        #[test]
        fn top_k_keeps_the_likeliest_and_all_the_mass(row in prop::collection::vec(-9f32..9.0, 1..80), k in 1usize..20) {
            let packed = LogProbRows::pack(LogProbFormat::TopK(k), &row, row.len()).expect("finite logits");
            let LogProbRows::TopK { k, ids, log_probs, tail } = packed else { panic!("it was asked for") };
            prop_assert_eq!(k, ids.len());
            let mass: f64 = log_probs.iter().map(|v| f64::from(*v).exp()).sum::<f64>() + f64::from(tail[0]);
            prop_assert!((mass - 1.0).abs() < 1e-5);
            let least = row[ids[k - 1] as usize];
            prop_assert!((0..row.len() as u32).filter(|id| !ids.contains(id)).all(|id| row[id as usize] <= least));
        }
    }
}
