//! Confidence intervals for means over tokens of a text, whose values depend on one another.
//!
//! Tokens are gathered into blocks: contiguous runs in text order within one document. Blocks grow until neighbours are no longer
//! correlated; the interval then rests on the spread between blocks, or between whole documents where that is larger.

use super::statistics::{percentile, t_quantile};
use crate::artifact::BlockInterval;

/// Tokens in the smallest blocks.
pub const MIN_BLOCK_TOKENS: usize = 128;
/// Blocks grow while the lag-1 correlation of neighbours is at least this.
const MAX_CORRELATION: f64 = 0.1;
/// Blocks do not grow below this number: an interval from fewer is wider than the text can justify.
const MIN_BLOCKS: usize = BlockInterval::MIN_VERDICT_BLOCKS;
/// From this number of blocks on the interval is a bootstrap's.
const BOOTSTRAP_BLOCKS: usize = 50;
const N_RESAMPLES: usize = 2000;
/// Fixes the bootstrap's draws.
const SEED: u64 = 1;
/// Nominal coverage in percent.
const COVERAGE: f64 = 95.0;
/// Documents from which on how they differ is in the interval: measured on WikiText-2 (docs/definitions.md).
const MIN_DOCUMENTS: usize = 10;

/// One block: the sum of its tokens and their number.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    sum: f64,
    n: f64,
}

impl Block {
    fn add(&mut self, values: &[f64]) {
        self.sum += values.iter().sum::<f64>();
        self.n += values.len() as f64;
    }
}

/// Cuts values of tokens in text order where their document changes. Without indices all are of one document.
pub fn by_document<'a>(values: &'a [f64], document_idx: &[u32]) -> Vec<&'a [f64]> {
    if document_idx.len() != values.len() {
        return vec![values];
    }
    let (mut documents, mut rest) = (Vec::new(), values);
    for run in document_idx.chunk_by(|a, b| a == b) {
        let (document, behind) = rest.split_at(run.len());
        documents.push(document);
        rest = behind;
    }
    documents
}

/// Returns the interval of the mean over all tokens of all documents, in text order. `None` where there are fewer than two blocks, or
/// where a value is not finite.
pub fn mean_interval(documents: &[&[f64]]) -> Option<BlockInterval> {
    if documents.iter().flat_map(|document| document.iter()).any(|value| !value.is_finite()) {
        return None;
    }
    let mut block_tokens = MIN_BLOCK_TOKENS;
    let mut blocks = blocks_of(documents, block_tokens);
    loop {
        let larger = blocks_of(documents, 2 * block_tokens);
        let is_correlated = lag1_correlation(&blocks).is_some_and(|correlation| correlation >= MAX_CORRELATION);
        if !is_correlated || larger.len() < MIN_BLOCKS {
            break;
        }
        (blocks, block_tokens) = (larger, 2 * block_tokens);
    }
    if blocks.len() < 2 {
        return None;
    }
    let n_documents = documents.iter().filter(|document| !document.is_empty()).count();
    let n_tokens = documents.iter().map(|document| document.len()).sum();
    let mut unit = "blocks";
    if n_documents >= MIN_DOCUMENTS {
        // Long documents may differ by less than neighbouring blocks show, and still by more than their number lets average out.
        let whole = whole_documents(documents);
        if stderr_of(&whole) > stderr_of(&blocks) {
            (blocks, block_tokens, unit) = (whole, n_tokens / n_documents, "whole documents");
        }
    }
    let value = mean_of(&blocks);
    let stderr = stderr_of(&blocks);
    let (low, high, method) = if blocks.len() < BOOTSTRAP_BLOCKS {
        let half = t_quantile((blocks.len() - 1) as f64) * stderr;
        (value - half, value + half, format!("student-t over {unit}"))
    } else {
        let (low, high) = bootstrap(&blocks, SEED);
        (low, high, format!("bootstrap over {unit} ({N_RESAMPLES} resamples, seed {SEED})"))
    };
    Some(BlockInterval {
        value,
        low,
        high,
        stderr,
        n_tokens,
        n_documents,
        n_blocks: blocks.len(),
        block_tokens,
        lag1_correlation: lag1_correlation(&blocks),
        method: method + &reach(n_documents),
    })
}

/// Returns what the interval of so few documents leaves out.
fn reach(n_documents: usize) -> String {
    match n_documents {
        1 => "; for this text, which counts as one document: how documents differ is not in it".to_owned(),
        n if n < MIN_DOCUMENTS => format!("; for these {n} documents: how others differ from them is not in it"),
        _ => String::new(),
    }
}

/// Returns the interval of the mean difference, second minus first, of two series over the same tokens.
pub fn paired_interval(first: &[f64], second: &[f64], document_idx: &[u32]) -> Option<BlockInterval> {
    if first.len() != second.len() {
        return None;
    }
    let differences: Vec<f64> = first.iter().zip(second).map(|(first, second)| second - first).collect();
    mean_interval(&by_document(&differences, document_idx))
}

/// Cuts documents into blocks; a document's last one is longer. Documents shorter than a block are put together whole, and what is left
/// of them joins the block before.
fn blocks_of(documents: &[&[f64]], block_tokens: usize) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut short = Block::default();
    let close = |blocks: &mut Vec<Block>, short: &mut Block| {
        let rest = std::mem::take(short);
        match blocks.last_mut() {
            Some(last) if rest.n < block_tokens as f64 => {
                last.sum += rest.sum;
                last.n += rest.n;
            }
            _ if rest.n > 0.0 => blocks.push(rest),
            _ => {}
        }
    };
    for document in documents {
        if document.len() < block_tokens {
            short.add(document);
            if short.n >= block_tokens as f64 {
                close(&mut blocks, &mut short);
            }
            continue;
        }
        close(&mut blocks, &mut short);
        let n_blocks = document.len() / block_tokens;
        for i in 0..n_blocks {
            let end = if i + 1 == n_blocks { document.len() } else { (i + 1) * block_tokens };
            let mut block = Block::default();
            block.add(&document[i * block_tokens..end]);
            blocks.push(block);
        }
    }
    close(&mut blocks, &mut short);
    blocks
}

/// Returns a block for each document that is not empty.
fn whole_documents(documents: &[&[f64]]) -> Vec<Block> {
    let block = |document: &&[f64]| Block { sum: document.iter().sum(), n: document.len() as f64 };
    documents.iter().filter(|document| !document.is_empty()).map(block).collect()
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

/// Returns the correlation of neighbouring blocks, those of two documents among them; `None` where there are none, or all blocks are
/// alike.
fn lag1_correlation(blocks: &[Block]) -> Option<f64> {
    let residuals = residuals(blocks);
    let variance = residuals.iter().map(|residual| residual * residual).sum::<f64>() / residuals.len() as f64;
    let product: f64 = residuals.windows(2).map(|pair| pair[0] * pair[1]).sum();
    (residuals.len() > 1 && variance > 0.0).then(|| product / (residuals.len() - 1) as f64 / variance)
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
        // Ten documents of one block each, every value of a document being one of 0 to 9: mean 4.5, standard deviation of block means
        // 3.0277 (n − 1), standard error 3.0277/√10 = 0.95743; t(0.975, 9) = 2.26216 (R: qt(0.975, 9)).
        let documents = [0, 9, 1, 8, 2, 7, 3, 6, 4, 5].map(|i| vec![f64::from(i); 130]);
        let slices: Vec<&[f64]> = documents.iter().map(Vec::as_slice).collect();
        let interval = mean_interval(&slices).expect("an interval");
        assert!((interval.value - 4.5).abs() < 1e-12 && (interval.stderr - 0.957_427).abs() < 1e-6, "{interval:?}");
        assert!((interval.high - 4.5 - 2.262_157 * 0.957_427).abs() < 1e-5, "{interval:?}");
        assert_eq!((interval.n_tokens, interval.n_documents, interval.n_blocks), (1300, 10, 10));
        assert!(interval.lag1_correlation.expect("it varies") < 0.0);
        assert_eq!(interval.method, "student-t over blocks");
        let one = mean_interval(&[&slices.concat()]).expect("an interval");
        assert!(one.method.ends_with("counts as one document: how documents differ is not in it"), "{}", one.method);
    }

    #[test]
    fn blocks_end_with_documents_and_short_documents_are_put_together() {
        let lengths = |documents: &[usize], block_tokens: usize| -> Vec<usize> {
            let values: Vec<Vec<f64>> = documents.iter().map(|n| vec![1.0; *n]).collect();
            let slices: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
            let blocks = blocks_of(&slices, block_tokens);
            assert!(blocks.iter().all(|block| block.sum == block.n));
            blocks.iter().map(|block| block.n as usize).collect()
        };
        assert_eq!(lengths(&[300, 256], 128), [128, 172, 128, 128]);
        assert_eq!(lengths(&[60, 60, 60, 0, 300, 20, 300, 50], 128), [180, 128, 192, 128, 222]);
        assert_eq!(lengths(&[60, 300], 128), [60, 128, 172]);
        assert_eq!(lengths(&[100], 128), [100]);
        assert_eq!(lengths(&[], 128), [0; 0]);
        let values: Vec<f64> = (0..6).map(f64::from).collect();
        let found: Vec<usize> = by_document(&values, &[0, 0, 2, 3, 3, 3]).iter().map(|one| one.len()).collect();
        assert_eq!(found, [2, 1, 3]);
        assert_eq!(by_document(&values, &[]).len(), 1);
    }

    #[test]
    fn what_long_documents_differ_by_is_in_the_interval() {
        // Twenty documents of 10,000 tokens with levels of their own that the noise of a block hides: 0.05 beside 2/√128 = 0.18.
        let mut state = 5;
        let levels = normals(&mut state, 20);
        let documents: Vec<Vec<f64>> = levels
            .iter()
            .map(|level| normals(&mut state, 10_000).into_iter().map(|noise| 0.05 * level + 2.0 * noise).collect())
            .collect();
        let slices: Vec<&[f64]> = documents.iter().map(Vec::as_slice).collect();
        let interval = mean_interval(&slices).expect("an interval");
        assert_eq!((interval.method.as_str(), interval.n_blocks), ("student-t over whole documents", 20));
        // √(0.05² + 2²/10,000)/√20 = 0.0120; blocks alone would give √(0.05² + 2²/128)/√1,560 = 0.0046.
        assert!((0.008..0.016).contains(&interval.stderr), "{interval:?}");
    }

    #[test]
    fn rows_of_one_article_are_not_taken_for_independent_documents() {
        // 60 articles of ten rows of 100 tokens each; an article has a level of its own.
        let mut state = 11;
        let levels = normals(&mut state, 60);
        let rows: Vec<Vec<f64>> =
            levels.iter().flat_map(|level| (0..10).map(|_| vec![*level; 100]).collect::<Vec<_>>()).collect();
        let slices: Vec<&[f64]> = rows.iter().map(Vec::as_slice).collect();
        let interval = mean_interval(&slices).expect("an interval");
        // The standard error of 60 levels is 1/√60 = 0.129; that of 600 independent rows would be 0.041.
        assert!((0.09..0.18).contains(&interval.stderr), "{interval:?}");
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
        let interval = mean_interval(&[&values]).expect("an interval");
        assert!(interval.block_tokens >= 512 && interval.n_blocks <= 80, "{interval:?}");
        // The standard error of 40 independent levels is 1/√40 = 0.158; that of independent tokens would be 0.005.
        assert!((0.1..0.25).contains(&interval.stderr), "{interval:?}");
    }

    #[test]
    fn too_little_text_and_values_that_are_not_finite_have_no_interval() {
        assert!(mean_interval(&[&[1.0; 200]]).is_none());
        assert!(mean_interval(&[]).is_none());
        let mut values = vec![1.0; 1000];
        values[500] = f64::INFINITY;
        assert!(mean_interval(&[&values]).is_none());
    }

    /// Returns the share of draws whose interval covers `truth`.
    fn coverage(truth: f64, draws: impl Iterator<Item = Vec<Vec<f64>>>) -> f64 {
        let (mut n, mut covered) = (0.0, 0.0);
        for documents in draws {
            let slices: Vec<&[f64]> = documents.iter().map(Vec::as_slice).collect();
            let interval = mean_interval(&slices).expect("an interval");
            n += 1.0;
            covered += f64::from(u8::from(interval.low <= truth && truth <= interval.high));
        }
        covered / n
    }

    /// Returns the coverage of 500 draws of a series: of 4,000 tokens each, in so many stretches from all over it.
    fn coverage_of_stretches(series: &[f64], n_stretches: usize) -> f64 {
        let truth = series.iter().sum::<f64>() / series.len() as f64;
        let n = 4000 / n_stretches;
        let mut state = 1;
        let draws = (0..500).map(|_| {
            let mut starts: Vec<usize> = (0..n_stretches).map(|_| draw(&mut state, series.len() - n)).collect();
            starts.sort_unstable();
            starts.into_iter().map(|start| series[start..start + n].to_vec()).collect()
        });
        coverage(truth, draws)
    }

    /// Reads little-endian half precision (tests/fixtures/README.md).
    fn halves(name: &str) -> Vec<f16> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let bytes = std::fs::read(path).expect("the fixture");
        bytes.as_chunks::<2>().0.iter().map(|raw| f16::from_le_bytes(*raw)).collect()
    }

    #[test]
    fn intervals_of_4000_tokens_of_a_real_text_cover_the_whole_texts_value() {
        // 134,730 tokens of TinyStories under stories260K, and NF4 against it: KL, negative where the first choices differ.
        let nll: Vec<f64> = halves("nll_tinystories.f16").into_iter().map(f16::to_f64).collect();
        let divergence = halves("kl_tinystories.f16");
        let kl: Vec<f64> = divergence.iter().map(|kl| kl.to_f64().abs()).collect();
        let same_top: Vec<f64> = divergence.iter().map(|kl| f64::from(u8::from(kl.is_sign_positive()))).collect();
        assert_eq!((nll.len(), kl.len()), (134_730, 134_730));
        for (what, series) in [("nll", &nll), ("kl", &kl), ("same top", &same_top)] {
            let (one, eight) = (coverage_of_stretches(series, 1), coverage_of_stretches(series, 8));
            println!("{what}: {one} of contiguous draws, {eight} of draws in eight stretches");
            assert!((0.92..=0.98).contains(&eight), "{what}: {eight}");
            // The text holds 34 stretches of 4,000 tokens that do not overlap, which leaves the share uncertain by some 4 %.
            assert!((0.92..=1.0).contains(&one), "{what}: {one}");
        }
    }

    /// Run by .ci/extended/interval_coverage.sh, which names a file of token scores.
    #[test]
    #[ignore = "takes a file of token scores (.ci/extended/interval_coverage.sh)"]
    fn coverage_of_intervals_on_a_text() {
        let path = std::env::var("LABPIPE_TOKEN_SCORES").expect("LABPIPE_TOKEN_SCORES names a file");
        let scores = crate::store::read_token_scores(Path::new(&path)).expect("token scores");
        let same_top: Vec<f64> = scores.same_top.iter().map(|same| f64::from(u8::from(*same))).collect();
        let ratio: Vec<f64> = scores.nll.iter().zip(&scores.base_nll).map(|(own, base)| own - base).collect();
        let n_documents = by_document(&scores.nll, &scores.document_idx).len();
        println!(
            "{} tokens in {n_documents} documents; shares of 500 intervals that cover the whole text's value",
            scores.nll.len()
        );
        println!("{:<10} {:>12} {:>12} {:>12} {:>14}", "", "contiguous", "8 stretches", "10 documents", "20 documents");
        for (what, series) in [("nll", &scores.nll), ("ln ratio", &ratio), ("kl", &scores.kl), ("same top", &same_top)]
        {
            let documents = by_document(series, &scores.document_idx);
            let truth = series.iter().sum::<f64>() / series.len() as f64;
            // Documents with replacement: the text's own are the population.
            let of_documents = |n: usize| {
                let mut state = 1;
                let draws =
                    (0..500).map(|_| (0..n).map(|_| documents[draw(&mut state, documents.len())].to_vec()).collect());
                coverage(truth, draws)
            };
            println!(
                "{what:<10} {:>12.3} {:>12.3} {:>12.3} {:>14.3}",
                coverage_of_stretches(series, 1),
                coverage_of_stretches(series, 8),
                of_documents(10),
                of_documents(20)
            );
        }
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
            vec![series.skip(200).collect()]
        });
        let covered = coverage(0.0, draws);
        assert!((0.92..=0.98).contains(&covered), "{covered}");
    }

    #[test]
    fn many_blocks_are_resampled_and_the_seed_fixes_the_draws() {
        let values = normals(&mut 5, 128 * 200);
        let (one, again) = (mean_interval(&[&values]), mean_interval(&[&values]));
        assert_eq!(one, again);
        let interval = one.expect("an interval");
        assert!(interval.method.starts_with("bootstrap over blocks (2000 resamples, seed 1)"), "{}", interval.method);
        // 1.96 standard errors to either side, within the noise of 2,000 resamples.
        let half = (interval.high - interval.low) / 2.0 / interval.stderr;
        assert!((1.8..2.1).contains(&half), "{half}");
    }
}
