//! Confidence intervals for means over tokens of a text, whose values depend on one another.
//!
//! Tokens are gathered into blocks: contiguous runs in text order within one document. Blocks grow until neighbours are no longer
//! correlated; the interval then rests on the spread between blocks.

use super::statistics::{percentile, t_quantile};
use serde::{Deserialize, Serialize};

/// Tokens in the smallest blocks.
pub const MIN_BLOCK_TOKENS: usize = 128;
/// Blocks grow while the lag-1 correlation of neighbours is at least this.
const MAX_CORRELATION: f64 = 0.1;
/// Blocks do not grow below this number: an interval from fewer is wider than the text can justify.
const MIN_BLOCKS: usize = 8;
/// From this number of blocks on the interval is a bootstrap's.
const BOOTSTRAP_BLOCKS: usize = 50;
const N_RESAMPLES: usize = 2000;
/// Nominal coverage in percent.
const COVERAGE: f64 = 95.0;

/// A 95 % confidence interval of a mean.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeanInterval {
    pub mean: f64,
    /// One standard error, from the spread between blocks.
    pub stderr: f64,
    /// Ends of the interval.
    pub low: f64,
    pub high: f64,
    pub n_blocks: usize,
    /// Tokens per block; a document's last block is longer, and a document that is shorter is one block.
    pub block_tokens: usize,
    /// Lag-1 correlation of neighbouring blocks that was left; null where no document has two blocks.
    pub lag1_correlation: Option<f64>,
    /// `student-t over blocks` or `bootstrap over blocks`.
    pub method: String,
}

/// One block: how far its sum is from that of as many average tokens, and its number of tokens.
#[derive(Debug, Clone, Copy)]
struct Block {
    document_idx: usize,
    sum: f64,
    n: f64,
}

/// Returns the interval of the mean over all tokens of all documents, in text order; `seed` fixes the bootstrap's draws. `None` where
/// there are fewer than two blocks, or where a value is not finite.
pub fn mean_interval(documents: &[&[f64]], seed: u64) -> Option<MeanInterval> {
    if documents.iter().flat_map(|document| document.iter()).any(|value| !value.is_finite()) {
        return None;
    }
    let mut block_tokens = MIN_BLOCK_TOKENS;
    let mut blocks = blocks_of(documents, block_tokens);
    loop {
        let larger = blocks_of(documents, 2 * block_tokens);
        let is_correlated = lag1_correlation(&blocks).is_some_and(|correlation| correlation >= MAX_CORRELATION);
        if !is_correlated || larger.len() < MIN_BLOCKS || larger.len() == blocks.len() {
            break;
        }
        (blocks, block_tokens) = (larger, 2 * block_tokens);
    }
    if blocks.len() < 2 {
        return None;
    }
    let mean = mean_of(&blocks);
    let stderr = stderr_of(&blocks);
    let (low, high, method) = if blocks.len() < BOOTSTRAP_BLOCKS {
        let half = t_quantile((blocks.len() - 1) as f64) * stderr;
        (mean - half, mean + half, "student-t over blocks")
    } else {
        let (low, high) = bootstrap(&blocks, seed);
        (low, high, "bootstrap over blocks")
    };
    Some(MeanInterval {
        mean,
        stderr,
        low,
        high,
        n_blocks: blocks.len(),
        block_tokens,
        lag1_correlation: lag1_correlation(&blocks),
        method: method.to_owned(),
    })
}

fn blocks_of(documents: &[&[f64]], block_tokens: usize) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (document_idx, document) in documents.iter().enumerate().filter(|(_, document)| !document.is_empty()) {
        let n_blocks = (document.len() / block_tokens).max(1);
        for i in 0..n_blocks {
            let end = if i + 1 == n_blocks { document.len() } else { (i + 1) * block_tokens };
            let values = &document[i * block_tokens..end];
            blocks.push(Block { document_idx, sum: values.iter().sum(), n: values.len() as f64 });
        }
    }
    blocks
}

fn mean_of(blocks: &[Block]) -> f64 {
    blocks.iter().map(|block| block.sum).sum::<f64>() / blocks.iter().map(|block| block.n).sum::<f64>()
}

/// Returns each block's sum less that of as many average tokens.
fn residuals(blocks: &[Block]) -> Vec<f64> {
    let mean = mean_of(blocks);
    blocks.iter().map(|block| block.sum - mean * block.n).collect()
}

/// Returns the standard error of a ratio of sums over blocks (Cochran, Sampling Techniques, section 2.11, without the finite population
/// correction); for blocks of one length it is the standard deviation of block means over √blocks.
fn stderr_of(blocks: &[Block]) -> f64 {
    let n_blocks = blocks.len() as f64;
    let squares: f64 = residuals(blocks).iter().map(|residual| residual * residual).sum();
    let n_tokens: f64 = blocks.iter().map(|block| block.n).sum();
    (n_blocks / (n_blocks - 1.0) * squares).sqrt() / n_tokens
}

/// Returns the correlation of neighbouring blocks of the same document; `None` where there are none, or all blocks are alike.
fn lag1_correlation(blocks: &[Block]) -> Option<f64> {
    let residuals = residuals(blocks);
    let variance = residuals.iter().map(|residual| residual * residual).sum::<f64>() / residuals.len() as f64;
    let neighbours = blocks.windows(2).zip(residuals.windows(2));
    let (mut n_pairs, mut product) = (0usize, 0.0);
    for (_, pair) in neighbours.filter(|(blocks, _)| blocks[0].document_idx == blocks[1].document_idx) {
        n_pairs += 1;
        product += pair[0] * pair[1];
    }
    (n_pairs > 0 && variance > 0.0).then(|| product / n_pairs as f64 / variance)
}

/// Returns the percentiles of the means of blocks drawn with replacement.
fn bootstrap(blocks: &[Block], seed: u64) -> (f64, f64) {
    let mut state = seed;
    let mut means: Vec<f64> = (0..N_RESAMPLES)
        .map(|_| {
            let (mut sum, mut n) = (0.0, 0.0);
            for _ in 0..blocks.len() {
                let block = blocks[draw(&mut state, blocks.len())];
                sum += block.sum;
                n += block.n;
            }
            sum / n
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let tail = (100.0 - COVERAGE) / 2.0;
    (percentile(&means, tail), percentile(&means, 100.0 - tail))
}

/// Draws an index below `n` by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn draw(state: &mut u64, n: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((u128::from(z ^ (z >> 31)) * n as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use std::path::Path;

    /// Standard normal numbers: the sum of twelve uniform ones less six.
    fn normals(state: &mut u64, n: usize) -> Vec<f64> {
        let uniform = |state: &mut u64| draw(state, 1 << 40) as f64 / (1u64 << 40) as f64;
        (0..n).map(|_| (0..12).map(|_| uniform(state)).sum::<f64>() - 6.0).collect()
    }

    #[test]
    fn independent_blocks_have_the_textbook_interval() {
        // Ten documents of one block each, every value of document i being i: mean 4.5, standard deviation of block means 3.0277
        // (n − 1), standard error 3.0277/√10 = 0.95743; t(0.975, 9) = 2.26216 (R: qt(0.975, 9)).
        let documents: Vec<Vec<f64>> = (0..10).map(|i| vec![f64::from(i); 100]).collect();
        let slices: Vec<&[f64]> = documents.iter().map(Vec::as_slice).collect();
        let interval = mean_interval(&slices, 1).expect("an interval");
        assert!((interval.mean - 4.5).abs() < 1e-12 && (interval.stderr - 0.957_427).abs() < 1e-6, "{interval:?}");
        assert!((interval.high - 4.5 - 2.262_157 * 0.957_427).abs() < 1e-5, "{interval:?}");
        assert_eq!((interval.n_blocks, interval.lag1_correlation), (10, None));
        assert_eq!(interval.method, "student-t over blocks");
    }

    #[test]
    fn blocks_grow_until_neighbours_are_not_correlated() {
        // Every 1,024 tokens share a level: blocks of 128 are correlated, those of 1,024 are not.
        let mut state = 7;
        let levels = normals(&mut state, 40);
        let values: Vec<f64> = levels
            .iter()
            .flat_map(|level| normals(&mut state, 1024).into_iter().map(move |v| level + 0.1 * v))
            .collect();
        let interval = mean_interval(&[&values], 1).expect("an interval");
        assert!(interval.block_tokens >= 512 && interval.n_blocks <= 80, "{interval:?}");
        // The standard error of 40 independent levels is 1/√40 = 0.158; that of independent tokens would be 0.005.
        assert!((0.1..0.25).contains(&interval.stderr), "{interval:?}");
    }

    #[test]
    fn too_little_text_and_values_that_are_not_finite_have_no_interval() {
        assert!(mean_interval(&[&[1.0; 200]], 1).is_none());
        assert!(mean_interval(&[], 1).is_none());
        let mut values = vec![1.0; 1000];
        values[500] = f64::INFINITY;
        assert!(mean_interval(&[&values], 1).is_none());
    }

    /// Returns the share of draws whose interval covers `truth`.
    fn coverage(truth: f64, draws: impl Iterator<Item = Vec<f64>>) -> f64 {
        let (mut n, mut covered) = (0.0, 0.0);
        for values in draws {
            let interval = mean_interval(&[&values], 1).expect("an interval");
            n += 1.0;
            covered += f64::from(u8::from(interval.low <= truth && truth <= interval.high));
        }
        covered / n
    }

    #[test]
    fn intervals_of_4000_tokens_of_a_real_text_cover_the_whole_texts_mean() {
        // Negative log-likelihoods of 134,730 tokens of TinyStories under stories260K (tests/fixtures/README.md).
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nll_tinystories.f16");
        let bytes = std::fs::read(path).expect("the fixture");
        let nll: Vec<f64> = bytes.as_chunks::<2>().0.iter().map(|raw| f16::from_le_bytes(*raw).to_f64()).collect();
        assert_eq!(nll.len(), 134_730);
        let truth = nll.iter().sum::<f64>() / nll.len() as f64;
        let mut state = 1;
        let draws = (0..500).map(|_| {
            let start = draw(&mut state, nll.len() - 4000);
            nll[start..start + 4000].to_vec()
        });
        let covered = coverage(truth, draws);
        assert!((0.92..=0.98).contains(&covered), "{covered}");
    }

    #[test]
    fn intervals_of_an_autoregressive_series_cover_its_mean() {
        // x(t) = 0.9 x(t − 1) + e(t): the mean is 0. The binomial standard deviation of 500 draws is 1 %.
        let mut state = 3;
        let draws = (0..500).map(|_| {
            let noise = normals(&mut state, 4200);
            let mut x = 0.0;
            let series = noise.iter().map(|e| {
                x = 0.9 * x + e;
                x
            });
            series.skip(200).collect()
        });
        let covered = coverage(0.0, draws);
        assert!((0.92..=0.98).contains(&covered), "{covered}");
    }

    #[test]
    fn many_blocks_are_resampled_and_the_seed_fixes_the_draws() {
        let values = normals(&mut 5, 128 * 200);
        let (one, again) = (mean_interval(&[&values], 1), mean_interval(&[&values], 1));
        assert_eq!(one, again);
        let interval = one.expect("an interval");
        assert_eq!(interval.method, "bootstrap over blocks");
        // 1.96 standard errors to either side, within the noise of 2,000 resamples.
        let half = (interval.high - interval.low) / 2.0 / interval.stderr;
        assert!((1.8..2.1).contains(&half), "{half}");
    }
}
