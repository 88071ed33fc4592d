//! Log-likelihoods and divergences from logits: this engine's rows come to the host some at a time, and the port's own
//! arithmetic (`inference::score_logits`, `inference::diverge_logits`) does the rest.

use super::forward::Executor;
use super::tap::Tap;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use crate::inference::TokenScore;
use crate::inference::{InferenceError, TakeLogits};
use burn::tensor::{DType as BurnDType, Tensor};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use burn::tensor::{Int, TensorData};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use labpipe_kernels::burn_ext::row_ops;
use std::ops::Range;

/// Rows of logits that are on the host at once: bounds them to 64 · vocab_size values.
pub const LOGIT_ROWS: usize = 64;

/// Runs `tokens` and hands the logits of the positions `rows` to `take`, [`LOGIT_ROWS`] at a time.
///
/// # Errors
/// What the pass or `take` returns.
pub fn logits_in_chunks(
    executor: &Executor,
    tokens: &[u32],
    rows: Range<usize>,
    take: &mut TakeLogits<'_>,
) -> Result<(), InferenceError> {
    let hidden = executor.hidden_states(tokens, None, &mut Tap::closed())?;
    let [_, width] = hidden.dims();
    for first in rows.clone().step_by(LOGIT_ROWS) {
        let chunk = hidden.clone().slice([first..(first + LOGIT_ROWS).min(rows.end), 0..width]);
        take(&values(executor.logits(chunk)?)?)?;
    }
    Ok(())
}

/// Returns a tensor's values in f32 on the host.
///
/// # Errors
/// `NotFiniteResult` where they can't be read.
pub fn values(tensor: Tensor<2>) -> Result<Vec<f32>, InferenceError> {
    tensor
        .into_data_dtype(BurnDType::F32)
        .try_into_vec::<f32>()
        .map_err(|error| InferenceError::NotFiniteResult { what: format!("logits ({error:?})") })
}

/// Runs `tokens` and scores `targets`, the first of which row `first_row` of the pass predicts, where the logits are: a likelihood and a
/// choice for each come to the host.
///
/// # Errors
/// What the pass returns.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub fn scores_on_device(
    executor: &Executor,
    tokens: &[u32],
    targets: &[u32],
    first_row: usize,
) -> Result<Vec<TokenScore>, InferenceError> {
    let hidden = executor.hidden_states(tokens, None, &mut Tap::closed())?;
    let [_, width] = hidden.dims();
    let mut scores = Vec::with_capacity(targets.len());
    for (chunk_idx, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
        let (first, n) = (first_row + chunk_idx * LOGIT_ROWS, targets.len());
        let logits = executor.logits(hidden.clone().slice([first..first + n, 0..width]))?;
        let ids: Vec<i32> = targets.iter().map(|token| *token as i32).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, 1]), &executor.device);
        let largest = logits.clone().max_dim(1);
        let sum = logits.clone().sub(largest.clone()).exp().sum_dim(1);
        let nll = values(sum.log().add(largest).sub(logits.clone().gather(1, ids)))?;
        let choices = row_ops::argmax(logits).into_data_dtype(BurnDType::I64).try_into_vec::<i64>();
        let choices =
            choices.map_err(|error| InferenceError::NotFiniteResult { what: format!("chosen tokens ({error:?})") })?;
        let score = |(nll, choice): (f32, i64)| TokenScore { nll: f64::from(nll), argmax: choice as u32 };
        scores.extend(nll.into_iter().zip(choices).map(score));
    }
    Ok(scores)
}
